"""vLLM under router edits generates what transformers generates, and edits prove themselves.

    .ci/vllm                                     # an environment with vLLM, and these tests in it
    python -m pytest -m vllm tests/test_vllm.py  # the tests alone, in such an environment

Tests without the marker need no vLLM and run everywhere.
"""

import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ablate
import capture
import common
import steer
from common import InputError, RouterEdit
from conftest import TINY, read_rows, run

HAS_VLLM = importlib.util.find_spec("vllm") is not None
HEAD_DIM = 32  # the smallest that vLLM's attention takes on a CPU
# Of vllm.LLM. The prefix cache holds whole blocks: the smallest, so that there are some
OPTIONS = {"max_model_len": 512, "gpu_memory_utilization": 0.3, "block_size": 32}
KINDS = ["none", "mask", "proportional", "soft", "hard", "zeroed", "all"]  # of draw_edits
# vLLM in this process, with one thread and one GiB of keys and values
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def needs_vllm(test):
    """Mark a test that runs only where vLLM is installed."""
    reason = "vLLM is not installed; .ci/vllm makes an environment that has it"
    return pytest.mark.vllm(pytest.mark.skipif(not HAS_VLLM, reason=reason)(test))


def widen_heads(source, target):
    """Save the tiny model as an equal one with heads of HEAD_DIM, twice as many: half of them 0.

    Rotary embeddings rotate number i of a head's first half against number i of its second half,
    by a frequency of 2i / head_dim. So the old number i goes to place 2i of the same half. Norms
    divide by a mean over twice as many numbers, and attention by sqrt(head_dim): q and k grow by
    sqrt(2) to make up for both.
    """
    config = json.loads((source / "config.json").read_text())
    old = config["head_dim"]
    assert HEAD_DIM == 2 * old
    even = torch.arange(old // 2) * 2
    rotary_places = torch.cat([even, HEAD_DIM // 2 + even])
    first_places = torch.arange(old)

    def widen(weight, places):
        """(heads * old, n) -> (heads * HEAD_DIM, n); number i of a head goes to places[i]."""
        heads = weight.view(-1, old, weight.shape[-1])
        wide = heads.new_zeros(len(heads), HEAD_DIM, weight.shape[-1])
        wide[:, places] = heads
        return wide.flatten(0, 1)

    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        weight = weight.float()
        module = name.split(".")[-2]
        if module in ("q_proj", "k_proj"):
            weight = widen(weight * math.sqrt(2), rotary_places)
        elif module == "v_proj":
            weight = widen(weight, first_places)
        elif module == "o_proj":
            weight = widen(weight.T, first_places).T
        elif module == "q_norm":
            weight = torch.ones(HEAD_DIM).index_copy(0, rotary_places, weight / math.sqrt(2))
        elif module == "k_norm":
            weight = torch.ones(HEAD_DIM).index_copy(0, rotary_places, weight)
        weights[name] = weight.contiguous()
    target.mkdir()
    for path in source.glob("*"):
        (target / path.name).write_bytes(path.read_bytes())
    (target / "config.json").write_text(json.dumps(config | {"head_dim": HEAD_DIM}))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def draw_edits(shape):
    """Return {kind: arguments of edit_routing}: every kind of edit, in every layer, by chance."""
    rng = np.random.default_rng(0)
    masks, zeroed, boosts, one_boosted = {}, {}, {}, {}
    for layer, (num_experts, _) in shape.items():
        drawn = rng.permutation(num_experts)
        masks[layer] = drawn[:num_experts // 4]
        zeroed[layer] = drawn[num_experts // 4:num_experts // 2]
        boosts[layer] = rng.choice([0, 0, 0.6, -0.3], num_experts)
        # The hard rule makes several experts equal, which engines order as they like
        one_boosted[layer] = np.eye(num_experts)[drawn[0]] - np.eye(num_experts)[drawn[1]]
    return {
        "none": {},
        "mask": {"masks": masks},
        "proportional": {"boosts": boosts},
        "soft": {"boosts": boosts, "rule": "soft"},
        "hard": {"boosts": one_boosted, "rule": "hard"},
        "zeroed": {"zeroed": zeroed},
        "all": {"masks": masks, "zeroed": zeroed, "boosts": boosts},
    }


@torch.inference_mode()
def count_in_transformers(model, sequences, edit):
    """Return what edit_routing counts of a model of transformers, one sequence at a time."""
    with common.edit_routing(model, **edit) as changed:
        for ids in sequences:
            model(input_ids=torch.tensor([ids]))
    return changed


def count_in_vllm(engine, sequences, edit):
    """Return what edit_routing counts of a model in vLLM."""
    with engine.edit_routing(**edit) as changed:
        engine.complete(sequences, read_cache=False)
    return changed


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Folder of the tiny model with wide heads."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    widen_heads(Path(TINY), folder)
    return folder


@pytest.fixture(scope="module")
def model(wide):
    """(model, tokenizer) in transformers."""
    return common.load_model(str(wide), device="cpu")


@pytest.fixture(scope="module")
def engine(wide):
    """The same model in vLLM."""
    _, _, shape = common.load_config(str(wide))
    return common.VLLMEngine(str(wide), shape, "float32", **OPTIONS)


@pytest.fixture(scope="module")
def prompts(model):
    """40 encoded examples, German and Swahili."""
    examples = []
    for language in ("de", "sw"):
        examples += common.read_examples(f"tests/data/eval_{language}.tsv")[:20]
    return common.encode_examples(model[1], examples)


@pytest.fixture(scope="module")
def sequences(prompts):
    """Token IDs of ten prompts."""
    return [example["ids"] for example in prompts[::4]]


# ----------------------------------------------------------------------------------- without vLLM

def test_wide_heads_are_the_same_function(tiny, model, sequences):
    for ids in sequences:
        ids = torch.tensor([ids])
        assert torch.allclose(tiny[0](ids).logits, model[0](ids).logits, atol=1e-4)


def test_families_not_known_to_be_exact_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.30.0"))
    assert common.vllm_version(transformers.Qwen3MoeConfig()) == "0.30.0"
    with pytest.raises(InputError, match="does not support deepseek_v3: .* qwen3_moe"):
        common.vllm_version(transformers.DeepseekV3Config())


@pytest.mark.parametrize("script", [ablate, steer])
def test_without_vllm_one_line_says_what_to_install(script, dumps, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(InputError, match="needs vLLM; run: pip install vllm"):
        run(script, "--routing", *dumps, "--metrics", "accuracy", "--engine", "vllm",
            "--out", tmp_path / "out.jsonl")


@pytest.mark.parametrize("script", [ablate, steer])
@pytest.mark.parametrize("metrics", [["prompt_nll"], ["accuracy", "prompt_nll"]])
def test_two_models_beside_each_other_need_to_be_told_their_memory(
        script, metrics, dumps, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.30.0"))
    with pytest.raises(InputError, match="vllm gives accuracy and language"):
        run(script, "--routing", *dumps, "--metrics", *metrics, "--engine", "vllm",
            "--out", tmp_path / "out.jsonl")


def test_a_router_of_vllm_scores_edited_logits_and_counts_what_changed():
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    router = SimpleNamespace(e_score_correction_bias=bias)

    def compute_routing(hidden_states, router_logits, input_ids=None):
        scores = router_logits.clamp(min=0)  # as with a sigmoid, masked experts have a score of 0
        selected = (scores + router.e_score_correction_bias).topk(2, dim=-1).indices
        return scores.gather(-1, selected), selected

    def route(**changes):
        plain = {"mask": [False] * 4, "zeroed": [False] * 4, "boost": None,
                 "rule": "proportional", "count_changes": True}
        edit = RouterEdit(torch.zeros(1), **plain | changes)
        logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
        weights, selected = common.route_edited(
            router, compute_routing, edit, None, logits, input_ids=None)
        return weights.tolist(), selected.tolist(), edit.report()["num_changed"]

    assert route() == ([[1, 4]], [[3, 0]], None)
    assert route(mask=[True, False, False, False]) == ([[1, 3]], [[3, 1]], None)
    assert route(mask=[False, False, False, True]) == ([[4, 3]], [[0, 1]], None)
    assert route(boost=[0.0, 0.0, 9.0, 0.0]) == ([[20, 1]], [[2, 3]], 1)
    assert route(boost=[0.0, 0.0, 9.0, 0.0], mask=[False, False, False, True]) == (
        [[20, 4]], [[2, 0]], 1)
    assert route(zeroed=[True, False, True, False]) == ([[1, 0]], [[3, 0]], 1)
    assert router.e_score_correction_bias is bias


# -------------------------------------------------------------------------------------- with vLLM

@needs_vllm
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_transformers(kind, model, engine, prompts):
    edit = draw_edits(engine.shape)[kind]
    settings = {"max_new_tokens": 48, "eos_token_id": [model[1].eos_token_id]}
    plain = engine.generate(prompts, **settings)
    with common.edit_routing(model[0], **edit):
        expected = common.generate(*model, prompts, **settings)
    with engine.edit_routing(**edit):
        assert engine.generate(prompts, **settings) == expected
        # Again, with all prompts in the prefix cache
        assert engine.generate(prompts, **settings) == expected
    assert (plain == expected) == (kind == "none")
    assert engine.generate(prompts, **settings) == plain  # nothing of the edit is left


@needs_vllm
@pytest.mark.parametrize("kind", KINDS)
def test_selections_are_those_of_transformers(kind, model, engine, sequences):
    edits = draw_edits(engine.shape)
    # What an edit counts depends on the selections; a mask counts nothing without zeroed experts
    edit = edits[kind] | {"zeroed": edits["zeroed"]["zeroed"]}
    expected = count_in_transformers(model[0], sequences, edit)
    counted = count_in_vllm(engine, sequences, edit)
    assert counted.keys() == engine.shape.keys()
    assert counted == pytest.approx(expected, abs=1e-3)  # all but near ties


@needs_vllm
def test_edits_that_do_not_fit_are_refused(engine):
    layer, (num_experts, top_k) = next(iter(engine.shape.items()))
    too_many = {layer: range(num_experts - top_k + 1)}
    with pytest.raises(InputError, match="leaves fewer than top_k"):
        with engine.edit_routing(masks=too_many):
            pass
    with pytest.raises(InputError, match="there is an edit already"):
        with engine.edit_routing(), engine.edit_routing():
            pass
    with engine.edit_routing():  # both are over
        pass


@needs_vllm
def test_an_edit_that_never_ran_raises(engine):
    with pytest.raises(RuntimeError, match="edited but never called"):
        with engine.edit_routing(masks={layer: [0] for layer in engine.shape}):
            pass


@needs_vllm
def test_an_edit_without_effect_raises_or_warns(engine, sequences, monkeypatch):
    num_experts = engine.shape[3][0]
    with pytest.warns(UserWarning, match="the edit changed no selection"):
        count_in_vllm(engine, sequences, {"boosts": {3: [1e-9] * num_experts}})
    half = list(range(0, num_experts, 2))
    monkeypatch.setattr(RouterEdit, "edit_logits", lambda self, router_logits: router_logits)
    with pytest.raises(RuntimeError, match="layer 3: the experts .* were masked and yet selected"):
        count_in_vllm(engine, sequences, {"masks": {3: half}})


@needs_vllm
def test_a_model_whose_routers_edits_do_not_reach_is_refused(engine, monkeypatch):
    def route_unedited(router, compute_routing, edit, *args, **kwargs):
        return compute_routing(*args, **kwargs)

    monkeypatch.setattr("vllm.LLM", lambda *args, **options: engine.llm)
    common.VLLMEngine("the same model", engine.shape)
    monkeypatch.setattr(common, "route_edited", route_unedited)
    with pytest.raises(InputError, match="edits do not reach this model's routers"):
        common.VLLMEngine("the same model", engine.shape)


@needs_vllm
def test_an_exception_leaves_no_edit(engine, prompts):
    before = engine.generate(prompts, max_new_tokens=8)
    with pytest.raises(ZeroDivisionError):
        with engine.edit_routing(**draw_edits(engine.shape)["mask"]):
            assert engine.generate(prompts, max_new_tokens=8) != before
            raise ZeroDivisionError
    assert engine.generate(prompts, max_new_tokens=8) == before


@needs_vllm
def test_samples_depend_on_the_seed_alone(engine, prompts):
    def sample(seed):
        return engine.generate(prompts, seed, max_new_tokens=16, do_sample=True, temperature=2.0,
                               top_p=1.0, top_k=0)

    assert sample(seed=0) == sample(seed=0)
    assert sample(seed=0) != sample(seed=1)


@needs_vllm
@pytest.mark.parametrize("script, flags", [
    (ablate, ["--bands", "all=0-7", "--metrics", "accuracy"]),
    (steer, ["--sources", "en,zh", "--lambda", 1, "--metrics", "accuracy", "prompt_nll"]),
])
def test_experiments_find_the_same(script, flags, wide, tmp_path):
    run(capture, "--out", tmp_path, "--model", wide, "--limit", 20)
    arguments = ["--routing", *tmp_path.glob("*.npz"), "--model", wide, "--languages", "de,sw",
                 "--limit", 8, "--control-seeds", 1, "--max-new-tokens", 24, *flags]
    run(script, *arguments, "--out", tmp_path / "transformers.jsonl")
    # A process can hold one model of vLLM, and by default vLLM runs it in one more
    command = [sys.executable, script.__file__, *arguments, "--out", tmp_path / "vllm.jsonl",
               "--engine", "vllm", "--engine-options", json.dumps(OPTIONS)]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL,
                   env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    expected = read_rows(tmp_path / "transformers.jsonl")
    rows = read_rows(tmp_path / "vllm.jsonl")
    assert len(rows) == len(expected) > 4
    for row, other in zip(rows, expected):
        assert row["settings"]["engine"].startswith("vllm 0.")
        assert row["scores"] == other["scores"]
        assert row.get("changed") == pytest.approx(other.get("changed"), abs=1e-3)


# --------------------------------------------------------------------------------------- families

SIZES = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "top_k_experts": 2, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2,
}
MORE_SIZES = {  # what a family needs besides
    "gemma4_text": {"enable_moe_block": True, "vocab_size_per_layer_input": 256,
                    "hidden_size_per_layer_input": 8, "global_head_dim": HEAD_DIM},
    "glm4_moe": {"head_dim": HEAD_DIM},
    "llama4_text": {"num_experts_per_tok": 1},  # all that vLLM takes
    "qwen3_moe": {"mlp_only_layers": [1], "norm_topk_prob": True},
}


def save_random_model(family, folder):
    """Save a small model of a family, whose tokens select different experts."""
    torch.manual_seed(0)
    config_class = transformers.CONFIG_MAPPING[family]
    known = config_class().to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in known}
    config = config_class(**sizes | MORE_SIZES.get(family, {}))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for router in common.find_routers(model).values():
            for parameter in router.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # it is 0 in a new model
                buffer.normal_(0, 0.5)
    model.save_pretrained(folder)


def compare_engines(folder):
    """Return {kind of edit: (responses of transformers, of vLLM, counts of transformers, of vLLM)}.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    shape = common.routing_shape(model)
    engine = common.VLLMEngine(folder, shape, "float32", skip_tokenizer_init=True, **OPTIONS)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 256, length).tolist() for length in rng.integers(5, 40, 12)]
    results = {}
    for kind, edit in draw_edits(shape).items():
        with common.edit_routing(model, **edit, count_changes=False):
            expected = [model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False,
                                       eos_token_id=2, pad_token_id=0)[0, len(ids):].tolist()
                        for ids in prompts]
        with engine.edit_routing(**edit, count_changes=False):
            outputs = engine.complete(prompts, max_new_tokens=16, eos_token_id=[2])
        responses = [list(output.token_ids) for output in outputs]
        counts = count_in_transformers(model, prompts, edit)
        results[kind] = expected, responses, counts, count_in_vllm(engine, prompts, edit)
    return results


@needs_vllm
@pytest.mark.parametrize("family", common.VLLM_FAMILIES)
def test_families_that_are_named_are_exact(family, tmp_path):
    try:
        save_random_model(family, tmp_path)
    except InputError as error:  # vLLM may ask for an older transformers
        pytest.skip(f"this transformers has no {family} whose routers can be edited: {error}")
    # A process can hold one model of vLLM; an executor reports a process that dies
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as executor:
        results = executor.submit(compare_engines, str(tmp_path)).result()
    for kind, (expected, responses, counts_expected, counts) in results.items():
        assert responses == expected, kind
        assert counts == pytest.approx(counts_expected, abs=1e-3), kind
    unedited = results.pop("none")
    assert all(responses != unedited[1] for _, responses, _, _ in results.values())
