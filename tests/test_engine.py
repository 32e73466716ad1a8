"""vLLM under router edits gives what transformers gives, text by text and selection by selection.

    .ci/vllm                                       # an environment with vLLM, and these tests in it
    python -m pytest tests/test_engine.py -m vllm
    python tests/test_engine.py qwen3_moe glm4_moe # a family each: how much is equal
"""

import importlib.util
import json
import math
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import ablate  # noqa: E402
import capture  # noqa: E402
import common  # noqa: E402
import steer  # noqa: E402

HAS_VLLM = importlib.util.find_spec("vllm") is not None
TINY, HEAD_DIM = ROOT / "tests/tiny_moe", 32  # the least that vLLM's attention takes on a CPU
OPTIONS = {"max_model_len": 512, "gpu_memory_utilization": 0.3}
# one process, one thread, one GiB for keys and values
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1",
               "VLLM_CPU_OMP_THREADS_BIND": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def needs_vllm(test):
    return pytest.mark.vllm(pytest.mark.skipif(
        not HAS_VLLM, reason="vLLM is not installed; .ci/vllm makes an environment with it")(test))


def wide_heads(source, target):
    """The tiny model as the same function with heads of HEAD_DIM: twice as many, half of them 0.

    The first half of a head is rotated against the second, by frequencies of 2i / head_dim: number
    i of either half goes to 2i of the new halves. q and k grow by sqrt(2), as the norms' divisor
    (a mean over twice as many) and attention's scale (1 / sqrt(head_dim)) shrink.
    """
    config = json.loads((source / "config.json").read_text())
    old = config["head_dim"]
    assert HEAD_DIM == 2 * old
    rotated = torch.cat([torch.arange(old // 2) * 2, HEAD_DIM // 2 + torch.arange(old // 2) * 2])

    def widen(weight, place):
        """(heads * old, n) -> (heads * HEAD_DIM, n), old number i of a head in place[i]."""
        heads = weight.view(-1, old, weight.shape[-1])
        wide = heads.new_zeros(len(heads), HEAD_DIM, weight.shape[-1])
        wide[:, place] = heads
        return wide.flatten(0, 1)

    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        weight, kind = weight.float(), name.split(".")[-2]
        if kind in ("q_proj", "k_proj"):
            weight = widen(weight * math.sqrt(2), rotated)
        elif kind == "v_proj":
            weight = widen(weight, torch.arange(old))
        elif kind == "o_proj":
            weight = widen(weight.T, torch.arange(old)).T
        elif kind in ("q_norm", "k_norm"):
            scale = math.sqrt(2) if kind == "q_norm" else 1
            weight = torch.ones(HEAD_DIM).index_copy(0, rotated, weight / scale)
        weights[name] = weight.contiguous()
    target.mkdir()
    for path in source.glob("*"):
        (target / path.name).write_bytes(path.read_bytes())
    (target / "config.json").write_text(json.dumps(config | {"head_dim": HEAD_DIM}))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def some_edits(shape, seed=0):
    """{name: edit} of every kind, in every layer, by chance."""
    rng = np.random.default_rng(seed)

    def draw(number):
        return {layer: rng.permutation(n)[:max(1, n // number)] for layer, (n, _) in shape.items()}

    boosts = {layer: np.where(rng.random(n) < 0.3, 0.6, 0) for layer, (n, _) in shape.items()}
    return {"none": {}, "mask": {"masks": draw(6)}, "proportional": {"boosts": boosts},
            "zeroed": {"zeroed": draw(6)}}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "wide"
    wide_heads(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def model(wide):
    return common.load_model(str(wide), device="cpu")


@pytest.fixture(scope="module")
def engine(wide):
    return common.VLLMEngine(str(wide), common.load_config(str(wide))[2], "float32", **OPTIONS)


@pytest.fixture(scope="module")
def prompts(model):
    """40 of them, German and Swahili."""
    return [e for language in ("de", "sw") for e in common.encode_examples(
        model[1], common.read_examples(ROOT / f"tests/data/eval_{language}.tsv")[:20])]


def arguments(monkeypatch, script, *args):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])


# -------------------------------------------------------------------------------- without vLLM

def test_wide_heads_are_the_same_function(model, prompts):
    narrow, tokenizer = common.load_model(str(TINY), device="cpu")
    for e in prompts[:10]:
        ids = torch.tensor([e["ids"]])
        assert torch.allclose(narrow(ids).logits, model[0](ids).logits, atol=1e-4)


def test_families_not_known_to_be_exact_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.30.0"))
    assert common.vllm_version(transformers.Qwen3MoeConfig()) == "0.30.0"
    with pytest.raises(common.InputError, match="does not support deepseek_v3: .* qwen3_moe"):
        common.vllm_version(transformers.DeepseekV3Config())


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
@pytest.mark.parametrize("script, metrics", [(ablate, ["--metrics", "accuracy"]),
                                             (steer, ["--metrics", "accuracy"]), (capture, [])])
def test_without_vllm_one_line_says_what_to_install(script, metrics, monkeypatch, tmp_path):
    routing = []
    if script is not capture:
        arguments(monkeypatch, "capture", "--out", tmp_path, "--limit", 5)
        capture.main()
        routing = ["--routing", *sorted(tmp_path.glob("*.npz"))]
    arguments(monkeypatch, script.__name__, *routing, *metrics, "--engine", "vllm", "--out",
              tmp_path / "out")
    with pytest.raises(common.InputError, match="needs vLLM; run: pip install vllm==0.30.0"):
        script.main()


def test_capture_refuses_what_only_the_other_engine_does(monkeypatch):
    for flags in (["--max-new-tokens", 5], ["--engine", "vllm", "--stats-only"]):
        arguments(monkeypatch, "capture", *flags)
        with pytest.raises(common.InputError, match="--engine vllm"):
            capture.main()


# ----------------------------------------------------------------------------------- with vLLM

@needs_vllm
@pytest.mark.parametrize("edit", ["none", "mask", "proportional", "zeroed"])
def test_texts_are_those_of_transformers(edit, model, engine, prompts):
    edit = some_edits(engine.shape)[edit]
    settings = common.generation_settings(model[0].generation_config, model[1], 2**20, 48)
    plain = engine.generate(prompts, **settings)
    with common.edit_routing(model[0], **edit):
        expected = common.generate(*model, prompts, 8192, **settings)
    with common.edit_routing(engine, **edit):
        assert engine.generate(prompts, **settings) == expected
        # again, with all prompts in the prefix cache
        assert engine.generate(prompts, **settings) == expected
    assert (expected == plain) == (not edit)
    assert engine.generate(prompts, **settings) == plain  # nothing of the edit is left


@needs_vllm
def test_selections_are_those_of_capture(model, engine, prompts):
    sequences = [e["ids"] for e in prompts]
    for edit in some_edits(engine.shape).values():
        with common.edit_routing(model[0], **edit):
            arrays, _ = capture.capture(model[0], sequences)
        with common.edit_routing(engine, **edit):
            ids, selected = common.route(engine, sequences)
        assert ids == sequences
        same = np.sort(selected) == np.sort(arrays["selected_experts"])
        assert same.mean() > 0.9999  # all but near ties


@needs_vllm
def test_what_does_not_hold_is_told(engine, prompts, monkeypatch):
    ids = [e["ids"] for e in prompts[:2]]
    layer, (num_experts, top_k) = next(iter(engine.shape.items()))
    with pytest.raises(common.InputError, match="leaves fewer than top_k"):
        with common.edit_routing(engine, masks={layer: range(num_experts - top_k + 1)}):
            pass
    with pytest.raises(RuntimeError, match="edited but never called"):
        with common.edit_routing(engine, masks={layer: [0]}):
            pass
    with pytest.warns(UserWarning, match="the edit moved no selection"):
        with common.edit_routing(engine, boosts={layer: np.full(num_experts, 1e-9)}):
            common.complete(engine, ids)
    with pytest.raises(common.InputError, match="there is an edit already"):
        with (common.edit_routing(engine, masks={layer: [0]}),
              common.edit_routing(engine, masks={layer: [1]})):
            pass
    common_one = int(np.bincount(common.route(engine, ids)[1][:, 0].ravel()).argmax())
    with monkeypatch.context() as patch:
        patch.setattr(common.LayerEdit, "edited", lambda self, logits: logits)
        with pytest.raises(RuntimeError, match=f"{layer}: the experts .{common_one}. were masked"):
            with common.edit_routing(engine, masks={layer: [common_one]}):
                common.complete(engine, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with common.edit_routing(engine, boosts={layer: np.eye(num_experts)[0] * 50}):
            common.complete(engine, ids)


@needs_vllm
def test_an_exception_leaves_no_edit(engine, prompts):
    ids = [e["ids"] for e in prompts[:4]]
    before = common.route(engine, ids)[1]
    with pytest.raises(ZeroDivisionError):
        with common.edit_routing(engine, masks={layer: [0, 1, 2] for layer in engine.shape}):
            common.complete(engine, ids)
            raise ZeroDivisionError
    assert (common.route(engine, ids)[1] == before).all()


@needs_vllm
def test_samples_depend_on_the_seed_alone(model, engine, prompts):
    settings = common.generation_settings(model[0].generation_config, model[1], 2**20, 16) | {
        "do_sample": True, "temperature": 2.0}
    first, again, other = (engine.generate(prompts, seed, **settings) for seed in (0, 0, 1))
    assert first == again != other


def run(script, *args):
    """What a script prints, in a process of its own: vLLM has one model a process."""
    return subprocess.run([sys.executable, ROOT / f"{script}.py", *map(str, args)], check=True,
                          cwd=ROOT, capture_output=True, text=True).stdout


VLLM = ["--engine", "vllm", "--engine-options", json.dumps(OPTIONS)]


@needs_vllm
def test_capture_records_what_vllm_selects(wide, tmp_path):
    for name, flags in (("transformers", []), ("vllm", VLLM),
                        ("answered", [*VLLM, "--max-new-tokens", 8])):
        run("capture", "--model", wide, "--out", tmp_path / name, "--limit", 10, *flags)
    for path in (tmp_path / "transformers").glob("*.npz"):
        theirs, ours, longer = (np.load(tmp_path / name / path.name)
                                for name in ("transformers", "vllm", "answered"))
        for key in ("token_ids", "sequence_offsets", "prompt_lengths", "text_spans", "layers"):
            assert (ours[key] == theirs[key]).all()
        assert set(theirs) - set(ours) == {"counts", "weight_sums", "mean_probs"}
        same = np.sort(ours["selected_experts"]) == np.sort(theirs["selected_experts"])
        assert same.mean() > 0.999  # all but near ties
        new = np.diff(longer["sequence_offsets"]) - longer["prompt_lengths"]
        assert 0 < new.max() <= 7  # of 8, the last went through no router
        assert (longer["prompt_lengths"] == ours["prompt_lengths"]).all()
    assert "8 languages" in run("analyze", *(tmp_path / "vllm").glob("*.npz"), "--out",
                                tmp_path / "analysis.npz")


@needs_vllm
@pytest.mark.parametrize("script, flags", [
    ("ablate", ["--bands", "all=0-7", "--metrics", "accuracy"]),
    ("steer", ["--sources", "en,zh", "--lambda", 1, "--metrics", "accuracy", "prompt_nll"])])
def test_experiments_find_the_same(script, flags, wide, tmp_path):
    run("capture", "--out", tmp_path, "--model", wide, "--limit", 20)
    rows = {}
    for name, engine in (("transformers", []), ("vllm", VLLM)):
        out = tmp_path / f"{name}.jsonl"
        run(script, "--model", wide, "--routing", *tmp_path.glob("*.npz"), "--languages", "de,sw",
            "--limit", 8, "--control-seeds", 1, "--max-new-tokens", 24, "--out", out, *flags,
            *engine)
        rows[name] = list(map(json.loads, out.read_text().splitlines()))
        assert {row["settings"]["engine"].split()[0] for row in rows[name]} == {name}
    assert len(rows["vllm"]) > 4
    assert [r["scores"] for r in rows["vllm"]] == [r["scores"] for r in rows["transformers"]]


@needs_vllm
def test_two_models_beside_each_other_want_to_be_told_their_memory(wide, tmp_path, monkeypatch):
    run("capture", "--out", tmp_path, "--model", wide, "--limit", 20)
    for metrics in (["prompt_nll"], ["accuracy", "prompt_nll"]):
        arguments(monkeypatch, "steer", "--model", wide, "--routing", *tmp_path.glob("*.npz"),
                  "--metrics", *metrics, "--engine", "vllm", "--out", tmp_path / "out.jsonl")
        with pytest.raises(common.InputError, match="vllm gives accuracy and language"):
            steer.main()


def agreement(family, folder):
    """{edit: (equal responses, of so many, equal selections, of so many)} of a random tiny model of
    a family, in vLLM and in transformers, in float32.
    """
    import test_architectures as architectures
    architectures.SMALL |= {"head_dim": HEAD_DIM, "hidden_size": 128, "moe_intermediate_size": 32,
                            "intermediate_size": 64, "vocab_size": 256, "sliding_window": 512,
                            "max_position_embeddings": 1024}
    architectures.MORE["gemma4_text"] |= {"vocab_size_per_layer_input": 256,
                                          "global_head_dim": HEAD_DIM}
    architectures.MORE |= {"glm4_moe": {"head_dim": HEAD_DIM},
                           "llama4_text": {"num_experts_per_tok": 1},  # all that vLLM takes
                           "mixtral": {"sliding_window": None}}  # as it is; else no IDs return
    torch.manual_seed(0)
    model = architectures.build.__wrapped__(family).float()
    for router in common.find_routers(model).values():
        for parameter in (p for p in router.parameters() if p.dim() == 2):
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)
    shape = common.routing_shape(model)
    common.vllm_version(model.config)
    engine = common.VLLMEngine(str(folder), shape, "float32", skip_tokenizer_init=True, **OPTIONS)
    rng, found = np.random.default_rng(0), {}
    prompts = [rng.integers(3, 256, n).tolist() for n in rng.integers(5, 40, 12)]
    for name, edit in some_edits(shape).items():
        with common.edit_routing(model, **edit, count_moved=False):
            expected = [model.generate(
                torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=2,
                pad_token_id=0)[0, len(ids):].tolist() for ids in prompts]
            arrays, _ = capture.capture(model, prompts)
        with common.edit_routing(engine, **edit):
            answers = common.complete(engine, prompts, max_new_tokens=16, eos_token_id=[2])
            _, selected = common.route(engine, prompts)
        equal = [list(a.token_ids) == e for a, e in zip(answers, expected)]
        same = np.sort(selected) == np.sort(arrays["selected_experts"])
        found[name] = sum(equal), len(equal), int(same.sum()), same.size
    return found


@needs_vllm
@pytest.mark.parametrize("family", common.VLLM_FAMILIES)
def test_families_that_are_named_are_exact(family, tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # vLLM has one model a process
        found = pool.apply(agreement, (family, tmp_path))
    for name, (equal, responses, same, selections) in found.items():
        assert equal == responses and same / selections > 0.999, (name, found)


if __name__ == "__main__":
    import tempfile
    for family in sys.argv[1:]:
        with (tempfile.TemporaryDirectory() as folder,
              multiprocessing.get_context("spawn").Pool(1) as pool):
            print(family, pool.apply(agreement, (family, folder)))
