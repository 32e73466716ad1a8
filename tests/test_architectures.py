"""
Every Mixture-of-Experts causal language model of the installed transformers is exact, or refused.

    python -m pytest tests/test_architectures.py
    python tests/test_architectures.py            # the README's table of families

Each family is built as a tiny model of random weights.
"""

import functools
import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import capture  # noqa: E402
import common  # noqa: E402
from common import (  # noqa: E402
    RULES, InputError, edit_routing, find_routers, record_routing, routing_shape)
from conftest import is_untouched, most_selected, record  # noqa: E402

PINNED = "5.23.0"  # in requirements.txt; older versions refuse some families: those are skipped
# Every family takes those of these sizes that it knows
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, moe_intermediate_size=24, shared_expert_intermediate_size=24,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts=8,
    num_local_experts=8, n_routed_experts=8, moe_num_experts=8, num_experts_per_tok=2, moe_topk=2,
    moe_k=2, top_k_experts=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_group=4, topk_group=2,
    sliding_window=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_head_dim=8, linear_num_heads=4, mamba_num_heads=8,
    mamba_head_dim=8, ssm_state_size=8, moe_shared_expert_intermediate_size=24,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, unpadded_vocab_size=64)
# What a family needs besides: a small size contradicts a default, or a default is too easy
MORE = {
    "bailing_hybrid": dict(layer_group_size=2),
    "dbrx": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
                 attn_config=dict(kv_n_heads=2, rope_theta=1e4),
                 ffn_config=dict(ffn_hidden_size=48, moe_num_experts=8, moe_top_k=2)),
    "deepseek_v2": dict(topk_method="group_limited_greedy"),
    "doge": dict(is_moe=True, num_experts=16),
    "dots1": dict(n_shared_experts=1),
    "dots3_note": dict(vision_config=dict(adapter_out_dim=32),
                       audio_config=dict(adapter_out_dim=32)),
    "dots3_note_text": dict(num_hidden_layers=2),
    "gemma4_text": dict(enable_moe_block=True, vocab_size_per_layer_input=64,
                        hidden_size_per_layer_input=8),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
                             layer_types=["mamba", "attention"] * 2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(layer_types=["linear_attention", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "longcat_flash": dict(num_layers=2, zero_expert_num=2, expert_ffn_hidden_size=24,
                          ffn_hidden_size=48),
    "qwen3_moe": dict(mlp_only_layers=[1], norm_topk_prob=True),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8,
                           indexer_budget=16, indexer_compress_ratio=4, ngram_vocab_size_base=64),
    "zaya": dict(num_experts_per_tok=1),
}
UNSUPPORTED = {  # and why
    "dbrx": "its block, not its router, selects the experts",
    "doge": "it retrieves experts by product keys within the experts module; there is no router to "
            "record or edit",
    "jetmoe": "it routes attention heads as well, and its router returns sorted tokens instead of "
              "selections",
    "zaya": "a class of its router skips all experts, and is reported as expert 0",
}
PADDING_MATTERS = ("deepseek_v4",)  # it pools windows of tokens, padding included
GENERATION = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def find_model_types():
    """Return every causal language model type whose modelling file declares router_logits."""
    model_types = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config_file = inspect.getsourcefile(transformers.CONFIG_MAPPING[model_type])
        modelling_file = Path(config_file.replace("configuration_", "modeling_"))
        if modelling_file.exists():
            if '"router_logits": ' in modelling_file.read_text(encoding="utf-8"):
                model_types.append(model_type)
    return model_types


def tiny_config(model_type):
    config_class = transformers.CONFIG_MAPPING[model_type]
    more = MORE.get(model_type, {})
    text_config = config_class.sub_configs.get("text_config")
    if text_config is not None:  # it also reads images or sounds; that part is not built
        return config_class(text_config=tiny_config(text_config.model_type).to_dict(), **more)
    known = inspect.signature(config_class.__init__).parameters
    sizes = {name: size for name, size in SIZES.items() if name in known}
    if "kv_lora_rank" in known:
        sizes["num_key_value_heads"] = 4
    return config_class(**sizes | more)


def build_skeleton(model_type):
    """Return a model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type))


@functools.lru_cache(maxsize=1)
def build(model_type):
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
        find_routers(model)
    except (InputError, AttributeError) as error:
        if transformers.__version__ == PINNED:
            raise
        pytest.skip(f"refused in transformers {transformers.__version__}: {error}")
    with torch.no_grad():  # routers that start with equal rows select the same for every token
        for router in find_routers(model).values():
            for parameter in router.parameters():
                if parameter.dim() == 2 and parameter.shape[1] == 32:
                    parameter.normal_(0, 0.3)
    return model


MODEL_TYPES = find_model_types()
SUPPORTED = [model_type for model_type in MODEL_TYPES if model_type not in UNSUPPORTED]
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
NUM_TOKENS = 24


@pytest.fixture(scope="module", params=SUPPORTED)  # all tests of a family, then the next family's
def model(request):
    return build(request.param)


def find_blocks(model):
    """Return {layer: module that owns the router and the experts}."""
    blocks = {}
    for layer, router in find_routers(model).items():
        for module in model.modules():
            if router in list(module.children()):
                blocks[layer] = module
    return blocks


def compute_logits(model):
    with torch.inference_mode():
        return common.compute_logits(model, IDS)


def record_at_experts(model):
    """Return record(model, IDS), checked to be what the experts are given in every layer."""
    given, handles = {}, []
    for layer, block in find_blocks(model).items():
        def keep_arguments(experts, args, kwargs, layer=layer):
            given[layer] = [*args, *kwargs.values()]
        handles.append(block.experts.register_forward_pre_hook(keep_arguments, with_kwargs=True))
    recorded = record(model, IDS)
    for handle in handles:
        handle.remove()
    assert list(recorded) == list(given) == list(find_routers(model))
    for layer, (logits, weights, selected) in recorded.items():
        num_experts, top_k = routing_shape(model)[layer]
        assert logits.shape == (NUM_TOKENS, num_experts)
        assert weights.shape == selected.shape == (NUM_TOKENS, top_k)
        assert (selected.sort(-1).values.diff() > 0).all()  # no expert twice
        if len(given[layer]) >= 3:
            given_selected, given_weights = given[layer][1:3]
            assert torch.equal(given_selected.flatten(0, -2), selected)
            assert torch.equal(given_weights.flatten(0, -2), weights)
        else:  # Llama 4 hands every token, times its score, to every expert
            scaled_states = given[layer][0].view(num_experts, NUM_TOKENS, -1)
            is_given = (scaled_states != 0).any(-1).T
            is_selected = torch.zeros_like(is_given).scatter(1, selected, True)
            assert torch.equal(is_given, is_selected)
    return recorded


def zero_boosts(model):
    return {layer: np.zeros(num_experts)
            for layer, (num_experts, _) in routing_shape(model).items()}


# -------------------------------------------------------------------------------------- recording

def test_what_is_recorded_is_what_the_experts_are_given(model):
    recorded = record_at_experts(model)
    for logits, _, selected in recorded.values():
        assert len(selected.unique()) > 2  # not the same for every token
        # Logits, and not probabilities, which sum to 1
        assert not torch.allclose(logits.float().sum(-1), torch.ones(NUM_TOKENS))


def test_every_layer_with_experts_has_a_router_and_no_other_layer_has(model):
    layers = set()
    for name, _ in model.get_decoder().named_modules():
        if name.endswith(".experts"):
            layers.update(int(part) for part in name.split(".") if part.isdigit())
    if model.config.model_type == "deepseek_v4":  # in its first layers a hash of the token selects
        kinds = model.config.mlp_layer_types
        layers = {layer for layer in layers if kinds[layer] != "hash_moe"}
    assert layers
    assert list(find_routers(model)) == sorted(layers)
    assert max(layers) < model.config.get_text_config().num_hidden_layers


def test_the_routing_shape_is_known_before_there_are_weights(model, request):
    model_type = request.node.callspec.params["model"]
    shape = routing_shape(build_skeleton(model_type))
    assert shape == routing_shape(model)
    # LongCat has two experts more, which return their input
    num_experts = 10 if model_type == "longcat_flash" else 8
    assert set(shape.values()) == {(num_experts, 2)}


def test_right_padded_batches_are_recorded_as_single_sequences_are(model):
    ids = torch.randint(3, 64, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    sequences = [ids[:38], ids, ids[::-1][:36]]
    batched, num_padding = capture.capture(model, sequences, batch_tokens=120, null_draws=2)
    single, no_padding = capture.capture(model, sequences, batch_tokens=1, null_draws=2)
    assert num_padding == 2 + 4
    assert no_padding == 0
    for key in ("selected_experts", "counts", "null_counts"):
        assert np.array_equal(batched[key], single[key]), key
    for sequence, null_counts in zip(sequences, single["null_counts"]):
        assert (null_counts.sum(-1) == 2 * len(sequence)).all()
    np.testing.assert_allclose(batched["mean_probs"], single["mean_probs"], atol=1e-4)
    np.testing.assert_allclose(batched["weight_sums"], single["weight_sums"], rtol=1e-3, atol=1e-3)


def test_of_a_router_that_returns_probabilities_the_logarithms_are_recorded():
    recorded = record(build("gemma4_text"), IDS)
    for logits, weights, selected in recorded.values():
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(NUM_TOKENS))
        probs = logits.softmax(-1).gather(-1, selected)  # normalised, these are the weights
        torch.testing.assert_close(weights, probs / probs.sum(-1, keepdim=True))


# ---------------------------------------------------------------------------------------- editing

def test_masked_experts_are_never_selected_and_weights_are_normalised_as_before(model):
    plain, plain_logits = record(model, IDS), compute_logits(model)
    masks = {layer: most_selected(plain[layer], number=2) for layer in plain}
    with edit_routing(model, masks=masks):
        edited, edited_logits = record_at_experts(model), compute_logits(model)
    assert edited_logits.isfinite().all()
    assert not torch.equal(edited_logits, plain_logits)
    for layer, (_, weights, selected) in edited.items():
        assert not torch.isin(selected, torch.tensor(masks[layer])).any()
        assert weights.isfinite().all()
        sums_before = plain[layer].weights.float().sum(-1)
        is_normalised = sums_before.std() < 1e-5 * sums_before.mean().abs()
        if is_normalised:
            torch.testing.assert_close(weights.float().sum(-1), sums_before)


def test_a_strong_boost_is_selected_by_every_token_and_other_layers_are_as_before(model):
    plain = record(model, IDS)
    last = max(plain)
    # Groups of two compete by their best or two best experts: there, boost both
    num_groups = getattr(find_routers(model)[last], "num_group", 1) or 1
    boosted = [4, 5] if num_groups > 1 else [5]
    boost = zero_boosts(model)[last]
    for rule, strength in (("soft", 1000), ("hard", 1)):
        boost[boosted] = strength
        with edit_routing(model, boosts={last: boost}, rule=rule) as changed:
            edited = record_at_experts(model)
        for expert in boosted:
            assert (edited[last].selected == expert).any(-1).all()
        assert list(changed) == [last]
        assert 0 < changed[last] <= 1
        for layer in plain.keys() - {last}:
            for before, after in zip(plain[layer], edited[layer]):
                assert torch.equal(before, after)


@pytest.mark.filterwarnings("ignore:the edit changed no selection")
def test_recording_and_a_boost_of_zero_change_no_bit(model):
    plain_logits = compute_logits(model)
    with record_routing(model, lambda *output: None):
        assert torch.equal(compute_logits(model), plain_logits)
    for rule in RULES:
        with edit_routing(model, boosts=zero_boosts(model), rule=rule) as changed:
            assert torch.equal(compute_logits(model), plain_logits)
        assert changed == dict.fromkeys(find_routers(model), 0)


def test_zeroed_experts_are_those_of_a_zeroed_down_projection_bit_for_bit(model):
    plain, plain_logits = record(model, IDS), compute_logits(model)
    zeroed = {layer: most_selected(plain[layer]) for layer in plain}
    with edit_routing(model, zeroed=zeroed):
        edited, edited_logits = record(model, IDS), compute_logits(model)
    first = min(plain)
    assert torch.equal(edited[first].selected, plain[first].selected)

    saved = {}
    for layer, block in find_blocks(model).items():
        for name in ("down_proj", "down_proj_bias"):
            parameter = getattr(block.experts, name, None)
            if parameter is not None:
                saved[parameter] = parameter.detach().clone()
                parameter.data[zeroed[layer]] = 0
    try:
        expected_logits = compute_logits(model)
    finally:
        for parameter, value in saved.items():
            parameter.data.copy_(value)
    assert torch.equal(edited_logits, expected_logits)
    assert not torch.equal(edited_logits, plain_logits)


def test_after_an_exception_the_model_is_as_it_was(model):
    plain, plain_logits = record(model, IDS), compute_logits(model)
    masks = {layer: most_selected(plain[layer]) for layer in plain}
    with pytest.raises(ZeroDivisionError):
        with edit_routing(model, masks=masks):
            assert not torch.equal(compute_logits(model), plain_logits)
            1 / 0
    assert torch.equal(compute_logits(model), plain_logits)
    assert is_untouched(model)


# ------------------------------------------------------------------------------------- generation

def respond(model, batch_tokens, equal_lengths):
    """Return five new tokens for each of three prompts, in two lengths, as text."""
    prompts = [*IDS.tolist(), IDS[0, 3:].tolist()]
    tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=0, all_special_ids=[], decode=str)
    responses, _ = common.generate(model, tokenizer, [{"ids": ids} for ids in prompts],
                                   batch_tokens, equal_lengths=equal_lengths, **GENERATION)
    return responses


def test_generation_in_a_batch_is_that_of_each_prompt_alone(model, request):
    is_pooling = request.node.callspec.params["model"] in PADDING_MATTERS
    prompt = IDS[0].tolist()
    assert common.padding_changes_logits(model, prompt, GENERATION) == is_pooling
    alone = respond(model, batch_tokens=1, equal_lengths=False)
    assert respond(model, batch_tokens=999, equal_lengths=is_pooling) == alone
    if is_pooling:
        assert respond(model, batch_tokens=999, equal_lengths=False) != alone


@pytest.mark.parametrize("model_type", [
    name for name in (*PADDING_MATTERS, "gemma4_text", "qwen3_moe") if name in SUPPORTED])
def test_padding_is_told_from_the_rounding_of_bfloat16(model_type, tmp_path):
    build(model_type).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for prompt in IDS.tolist():
        changes = common.padding_changes_logits(loaded, prompt, GENERATION)
        assert changes == (model_type in PADDING_MATTERS)


# ------------------------------------------------------------------------------------ checkpoints

def test_a_saved_checkpoint_passes_the_check_before_a_run(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = common.load_weights(tmp_path, model.config, "float32", "cpu")  # no tensor is missing
    common.check_model(loaded, IDS[0].tolist(), generation=GENERATION)
    assert is_untouched(loaded)


def test_a_checkpoint_is_recorded_and_edited_in_bfloat16_by_every_kernel(model, tmp_path):
    model.save_pretrained(tmp_path)
    kernels = ["eager"]
    if model._can_set_experts_implementation():
        kernels.append("grouped_mm")
    for kernel in kernels:
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, experts_implementation=kernel).eval()
        assert routing_shape(loaded) == routing_shape(model)
        plain, plain_logits = record_at_experts(loaded), compute_logits(loaded)
        masks = {layer: most_selected(plain[layer]) for layer in plain}
        with edit_routing(loaded, masks=masks):
            edited = record_at_experts(loaded)
        for layer, (_, _, selected) in edited.items():
            assert not (selected == masks[layer][0]).any()
        with edit_routing(loaded, boosts=zero_boosts(loaded), count_changes=False):
            assert torch.equal(compute_logits(loaded), plain_logits)


# ---------------------------------------------------------------------------------------- refused

@pytest.mark.parametrize("model_type", [name for name in UNSUPPORTED if name in MODEL_TYPES])
def test_an_unsupported_family_is_refused_before_any_forward_pass(model_type):
    model = build_skeleton(model_type)
    for use in (find_routers, routing_shape):
        with pytest.raises(InputError, match="ForCausalLM is not supported"):
            use(model)
    for block in (edit_routing(model, masks={0: [0]}), record_routing(model, print)):
        with pytest.raises(InputError, match="ForCausalLM is not supported"):
            with block:
                pytest.fail("the block was entered")


@pytest.mark.skipif(transformers.__version__ != PINNED, reason="older versions know fewer families")
def test_at_least_fifty_model_types_are_exact():
    assert len(SUPPORTED) >= 50


def print_families():
    exact, refused = [], dict(UNSUPPORTED)
    for model_type in SUPPORTED:
        try:
            build(model_type)
        except pytest.skip.Exception as reason:
            refused[model_type] = str(reason)
        else:
            exact.append(model_type)
    print(f"Exact in transformers {transformers.__version__}, {len(exact)} model types: "
          f"{', '.join(exact)}. Refused:\n")
    for model_type, reason in refused.items():
        print(f"- `{model_type}`: {reason}")


if __name__ == "__main__":
    print_families()
