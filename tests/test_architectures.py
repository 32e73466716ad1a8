"""Every Mixture-of-Experts causal language model of the installed transformers, as a tiny random
model: exact, or refused.

    python -m pytest tests/test_architectures.py
    python tests/test_architectures.py            # the README's table of families
"""

import functools
import inspect
import os
import sys
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
from common import (InputError, RULES, edit_routing, find_routers, record_routing,  # noqa: E402
                    routing_shape)

PIN = "5.23.0"  # of requirements.txt; older versions refuse some families, which skips their tests
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, moe_intermediate_size=24, shared_expert_intermediate_size=24,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts=8,
    num_local_experts=8, n_routed_experts=8, moe_num_experts=8, num_experts_per_tok=2, moe_topk=2,
    moe_k=2, top_k_experts=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_group=4, topk_group=2,
    sliding_window=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_head_dim=8, linear_num_heads=4, mamba_num_heads=8,
    mamba_head_dim=8, ssm_state_size=8, moe_shared_expert_intermediate_size=24,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8)
# what a family wants besides: where a small size contradicts a default, or a default is easy
MORE = {
    "dbrx": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64,
                 attn_config=dict(kv_n_heads=2, rope_theta=1e4),
                 ffn_config=dict(ffn_hidden_size=48, moe_num_experts=8, moe_top_k=2)),
    "deepseek_v2": dict(topk_method="group_limited_greedy"),
    "doge": dict(is_moe=True, num_experts=16),
    "dots3_note": dict(vision_config=dict(adapter_out_dim=32),
                       audio_config=dict(adapter_out_dim=32)),
    "dots1": dict(n_shared_experts=1),
    "dots3_note_text": dict(num_hidden_layers=2),
    "gemma4_text": dict(enable_moe_block=True, vocab_size_per_layer_input=64,
                        hidden_size_per_layer_input=8),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
                             layer_types=["mamba", "attention"] * 2),
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
    "doge": "retrieves experts by product keys within the experts module; there is no router to "
            "watch or edit",
    "jetmoe": "routes attention heads as well, and its router returns sorted tokens instead of "
              "selections",
    "zaya": "a class of its router skips all experts, and is reported as expert 0",
}


def model_types():
    """Every causal language model type whose modelling file declares router_logits."""
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        path = inspect.getsourcefile(transformers.CONFIG_MAPPING[model_type])
        path = path.replace("configuration_", "modeling_")
        if os.path.exists(path) and '"router_logits": ' in open(path, encoding="utf-8").read():
            yield model_type


def tiny_config(model_type):
    config_class = transformers.CONFIG_MAPPING[model_type]
    text = config_class.sub_configs.get("text_config")
    if text is not None:  # of several towers: that of text is small, and the others are not built
        return config_class(text_config=tiny_config(text.model_type).to_dict(),
                            **MORE.get(model_type, {}))
    known = inspect.signature(config_class.__init__).parameters
    sizes = SMALL | (dict(num_key_value_heads=4) if "kv_lora_rank" in known else {})
    return config_class(**{k: v for k, v in sizes.items() if k in known} | MORE.get(model_type, {}))


def skeleton(model_type):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type))


@functools.lru_cache(maxsize=1)
def build(model_type):
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
        find_routers(model)
    except (InputError, AttributeError) as error:
        if transformers.__version__ == PIN:
            raise
        pytest.skip(f"refused in transformers {transformers.__version__}: {error}")
    with torch.no_grad():  # routers that start equal pick the same experts for every token
        for router in find_routers(model).values():
            for parameter in router.parameters():
                if parameter.dim() == 2 and parameter.shape[1] == 32:
                    parameter.normal_(0, 0.3)
    return model


TYPES = list(model_types())
SUPPORTED = [t for t in TYPES if t not in UNSUPPORTED]
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=SUPPORTED)  # a family's tests, then the next's
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def model(model_type):
    return build(model_type)


def blocks(model):
    """{layer: module that owns the router and the experts}."""
    return {layer: next(m for m in model.modules() if router in list(m.children()))
            for layer, router in find_routers(model).items()}


def routing(model):
    """{layer: (logits, weights, selected)}, (tokens, ...) each, of a forward pass; its output."""
    calls = {}

    def on_router(layer, *answer):
        assert layer not in calls
        calls[layer] = [x.flatten(0, -2) for x in answer]

    with torch.inference_mode(), record_routing(model, on_router):
        output = model(IDS, use_cache=False).logits
    return calls, output


def outputs(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def routing_at_the_experts(model):
    """routing(model); in every layer its selections and weights are those that the experts get."""
    received, handles = {}, []
    for layer, block in blocks(model).items():
        def hook(module, args, kwargs, layer=layer):
            received[layer] = [*args, *kwargs.values()]
        handles.append(block.experts.register_forward_pre_hook(hook, with_kwargs=True))
    calls, output = routing(model)
    for handle in handles:
        handle.remove()
    assert list(calls) == list(received) == list(find_routers(model))
    for layer, (logits, weights, selected) in calls.items():
        num_experts, top_k = routing_shape(model)[layer]
        assert logits.shape == (24, num_experts) and weights.shape == selected.shape == (24, top_k)
        assert (selected.sort(-1)[0].diff() > 0).all()  # top_k experts, not one of them twice
        if len(received[layer]) >= 3:
            index, given = received[layer][1:3]
            assert torch.equal(index.flatten(0, -2), selected)
            assert torch.equal(given.flatten(0, -2), weights)
        else:  # Llama 4 hands every token to every expert, times its score
            scaled = received[layer][0].view(num_experts, 24, -1)
            expected = torch.zeros(24, num_experts, dtype=torch.bool).scatter(1, selected, True)
            assert torch.equal((scaled != 0).any(-1).T, expected)
    return calls, output


def most_used(calls, n):
    return {layer: selected.flatten().bincount().argsort(descending=True)[:n].tolist()
            for layer, (_, _, selected) in calls.items()}


def zero_boosts(model):
    return {layer: np.zeros(n) for layer, (n, _) in routing_shape(model).items()}


def test_what_is_captured_is_what_the_experts_get(model):
    calls, output = routing_at_the_experts(model)
    assert torch.equal(output, outputs(model))  # to be watched changes nothing
    for logits, _, selected in calls.values():
        assert len(selected.unique()) > 2  # not the same for every token
        # logits: not probabilities, which sum to 1
        assert not torch.allclose(logits.float().sum(-1), torch.ones(24))


def test_there_is_a_router_for_every_layer_with_experts_and_for_no_other(model):
    names = [name for name, _ in model.get_decoder().named_modules() if name.endswith(".experts")]
    layers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    if model.config.model_type == "deepseek_v4":  # in its first layers a hash of the token chooses
        layers = [l for l, kind in enumerate(model.config.mlp_layer_types) if kind != "hash_moe"]
    assert list(find_routers(model)) == layers and layers
    assert layers[-1] < model.config.get_text_config().num_hidden_layers


def test_the_shape_of_the_routing_is_known_before_there_are_weights(model, model_type):
    shape = routing_shape(skeleton(model_type))
    assert shape == routing_shape(model)
    # LongCat has two experts more, which return their input
    assert set(shape.values()) == {(10 if model_type == "longcat_flash" else 8, 2)}


def test_right_padded_batches_capture_what_single_sequences_do(model):
    ids = torch.randint(3, 64, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    sequences = [ids[:38], ids, ids[::-1][:36]]
    together, padded = capture.capture(model, sequences, batch_tokens=120, null_draws=2)
    alone, none = capture.capture(model, sequences, batch_tokens=1, null_draws=2)
    assert (padded, none) == (2 + 4, 0)
    assert np.array_equal(together["selected_experts"], alone["selected_experts"])
    for key in ("counts", "null_counts"):
        assert np.array_equal(together[key], alone[key])
    assert (alone["null_counts"].sum(-1) == 2 * sum(map(len, sequences))).all()
    np.testing.assert_allclose(together["mean_probs"], alone["mean_probs"], atol=1e-4)
    np.testing.assert_allclose(together["weight_sums"], alone["weight_sums"], rtol=1e-3, atol=1e-3)


def test_masked_experts_are_never_selected_and_the_rest_is_scored_as_ever(model):
    plain, before = routing(model)
    masks = most_used(plain, 2)
    with edit_routing(model, masks=masks):
        edited, after = routing_at_the_experts(model)
    assert torch.isfinite(after).all() and not torch.equal(after, before)
    for layer, (_, weights, selected) in edited.items():
        assert not torch.isin(selected, torch.tensor(masks[layer])).any()
        assert torch.isfinite(weights).all()
        before, after = (x.float().sum(-1) for x in (plain[layer][1], weights))
        if before.std() < 1e-5 * before.mean().abs():  # a family that normalises goes on doing so
            torch.testing.assert_close(after, before)


def test_a_strong_boost_is_selected_by_every_token(model):
    plain, _ = routing(model)
    last = max(plain)
    # a group competes by its best or two best experts: where there are groups of two, boost both
    groups = getattr(find_routers(model)[last], "num_group", 1) or 1
    wanted, boost = [4, 5] if groups > 1 else [5], zero_boosts(model)[last]
    for rule, strength in (("soft", 1000), ("hard", 1)):
        boost[wanted] = strength
        with edit_routing(model, boosts={last: boost}, rule=rule) as moved:
            edited, _ = routing_at_the_experts(model)
        for expert in wanted:
            assert (edited[last][2] == expert).any(-1).all()
        assert list(moved) == [last] and 0 < moved[last] <= 1
        for layer in plain.keys() - {last}:
            assert all(torch.equal(x, y) for x, y in zip(edited[layer], plain[layer]))


@pytest.mark.filterwarnings("ignore:the edit moved no selection")
def test_a_zero_boost_changes_no_bit(model):
    before = outputs(model)
    for rule in RULES:
        with edit_routing(model, boosts=zero_boosts(model), rule=rule) as moved:
            assert torch.equal(outputs(model), before)
        assert moved == dict.fromkeys(find_routers(model), 0)


def test_leaving_the_block_restores_the_model_also_after_an_exception(model):
    calls, before = routing(model)
    first = min(calls)
    with pytest.raises(ZeroDivisionError):
        with edit_routing(model, masks={first: most_used(calls, 1)[first]}):
            assert not torch.equal(outputs(model), before)
            1 / 0
    assert torch.equal(outputs(model), before)
    for router in find_routers(model).values():
        assert "forward" not in router.__dict__ and not router._forward_hooks


def test_zeroed_experts_are_those_of_a_zeroed_down_projection_bit_for_bit(model):
    calls, before = routing(model)
    zeroed, kept = most_used(calls, 1), {}
    with edit_routing(model, zeroed=zeroed):
        edited_calls, edited = routing(model)
    first = min(calls)
    assert torch.equal(edited_calls[first][2], calls[first][2])  # selected as before
    for layer, block in blocks(model).items():
        for name in ("down_proj", "down_proj_bias"):
            parameter = getattr(block.experts, name, None)
            if parameter is not None:
                kept[parameter] = parameter.detach().clone()
                parameter.data[zeroed[layer]] = 0
    try:
        expected = outputs(model)
    finally:
        for parameter, value in kept.items():
            parameter.data.copy_(value)
    assert torch.equal(edited, expected) and not torch.equal(edited, before)
    assert torch.equal(outputs(model), before)


def test_the_trial_before_a_run_accepts_a_whole_checkpoint_and_one_step_of_decoding(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = common.load_weights(tmp_path, model.config, "float32", "cpu")  # no weight is missing
    ids, tokenizer = IDS.flatten()[:16].tolist(), SimpleNamespace(
        eos_token_id=None, pad_token_id=0, batch_decode=lambda ids, **_: list(ids))
    decode = functools.partial(common.generate, loaded, tokenizer, [{"ids": ids}], 100,
                               max_new_tokens=2, eos_token_id=None)
    # of these, the small ones have no layer of attention, without which transformers generates not
    linear = model.config.model_type in ("bailing_hybrid", "jamba", "kimi_linear")
    common.try_model(loaded, ids, decode=None if linear else decode)
    for router in find_routers(loaded).values():
        assert "forward" not in router.__dict__ and not router._forward_hooks


def test_a_checkpoint_loaded_in_bfloat16_is_captured_and_edited_alike(model, tmp_path):
    model.save_pretrained(tmp_path)
    one_or_two = ["eager", "grouped_mm"] if model._can_set_experts_implementation() else ["eager"]
    for experts in one_or_two:
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, experts_implementation=experts).eval()
        assert routing_shape(loaded) == routing_shape(model)
        plain, before = routing_at_the_experts(loaded)
        masks = most_used(plain, 1)
        with edit_routing(loaded, masks=masks):
            for layer, (_, _, selected) in routing_at_the_experts(loaded)[0].items():
                assert not (selected == masks[layer][0]).any()
        with edit_routing(loaded, boosts=zero_boosts(loaded), count_moved=False):
            assert torch.equal(outputs(loaded), before)


def test_where_a_router_gives_probabilities_their_logs_are_recorded():
    model = build("gemma4_text")
    for layer, (logits, weights, selected) in routing(model)[0].items():
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(24))
        chosen = logits.softmax(-1).gather(-1, selected)  # normalised, these are the weights
        torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))


@pytest.mark.parametrize("model_type", [t for t in UNSUPPORTED if t in TYPES])
def test_an_unsupported_family_is_refused_before_any_forward_pass(model_type):
    model = skeleton(model_type)
    for use in (find_routers, routing_shape, lambda m: edit_routing(m, masks={0: [0]}).__enter__(),
                lambda m: record_routing(m, print).__enter__()):
        with pytest.raises(InputError, match="ForCausalLM is not supported") as error:
            use(model)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(transformers.__version__ != PIN, reason="earlier versions know fewer families")
def test_at_least_fifty_model_types_are_exact():
    assert len(SUPPORTED) >= 50


if __name__ == "__main__":
    exact, refused = [], UNSUPPORTED.copy()
    for name in SUPPORTED:
        try:
            exact.append(name) if routing_shape(build(name)) else None
        except pytest.skip.Exception as reason:
            refused[name] = str(reason)
    print(f"Exact in transformers {transformers.__version__}, {len(exact)} model types: "
          f"{', '.join(exact)}. Refused:\n")
    for name, reason in refused.items():
        print(f"- `{name}`: {reason}")
