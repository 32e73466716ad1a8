"""Every Mixture-of-Experts causal language model of the installed transformers, as a tiny random model: exact, or refused.

    python -m pytest tests/test_architectures.py
    python tests/test_architectures.py            # the README's table of families
"""

import functools
import inspect
import os

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import capture  # noqa: E402
from common import InputError, edit_routing, find_routers, record_routing, routing_shape  # noqa: E402

PIN = "5.23.0"  # of requirements.txt; in older versions some families are refused, which skips their tests
SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, moe_intermediate_size=24, shared_expert_intermediate_size=24, max_position_embeddings=128, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8,
    num_experts_per_tok=2, moe_topk=2, moe_k=2, top_k_experts=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_group=4, topk_group=2, sliding_window=16,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, linear_head_dim=8,
    linear_num_heads=4, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, moe_shared_expert_intermediate_size=24,
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8)
# what a family wants besides, where a small size contradicts one of its defaults
MORE = {
    "dbrx": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, attn_config=dict(kv_n_heads=2, rope_theta=1e4),
                 ffn_config=dict(ffn_hidden_size=48, moe_num_experts=8, moe_top_k=2)),
    "doge": dict(is_moe=True, num_experts=16),
    "dots3_note": dict(vision_config=dict(adapter_out_dim=32), audio_config=dict(adapter_out_dim=32)),
    "dots1": dict(n_shared_experts=1),
    "dots3_note_text": dict(num_hidden_layers=2),
    "gemma4_text": dict(enable_moe_block=True, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, layer_types=["mamba", "attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "longcat_flash": dict(num_layers=2, zero_expert_num=2, expert_ffn_hidden_size=24, ffn_hidden_size=48),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16,
                           indexer_compress_ratio=4, ngram_vocab_size_base=64),
    "zaya": dict(num_experts_per_tok=1),
}
UNSUPPORTED = {  # and why
    "dbrx": "its block, not its router, selects the experts",
    "doge": "retrieves experts by product keys within the experts module; there is no router to watch or edit",
    "jetmoe": "routes attention heads as well, and its router returns sorted tokens instead of selections",
    "zaya": "a class of its router skips all experts, and is reported as expert 0",
}


def model_types():
    """Every causal language model type whose modelling file declares router_logits to be recorded."""
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        path = inspect.getsourcefile(transformers.CONFIG_MAPPING[model_type]).replace("configuration_", "modeling_")
        if os.path.exists(path) and '"router_logits": ' in open(path, encoding="utf-8").read():
            yield model_type


def tiny_config(model_type):
    config_class = transformers.CONFIG_MAPPING[model_type]
    text = config_class.sub_configs.get("text_config")
    if text is not None:  # a model of several towers: its text tower is small, and the others are not built
        return config_class(text_config=tiny_config(text.model_type).to_dict(), **MORE.get(model_type, {}))
    known = inspect.signature(config_class.__init__).parameters
    sizes = SMALL | (dict(num_key_value_heads=4) if "kv_lora_rank" in known else {})
    return config_class(**{k: v for k, v in sizes.items() if k in known} | MORE.get(model_type, {}))


@functools.lru_cache(maxsize=4)
def build(model_type):
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(tiny_config(model_type)).eval()
        find_routers(model)
    except (InputError, AttributeError) as error:
        if transformers.__version__ == PIN:
            raise
        pytest.skip(f"refused in transformers {transformers.__version__}: {error}")
    with torch.no_grad():  # many families start with equal routers, which pick the same experts for every token
        for router in find_routers(model).values():
            for parameter in router.parameters():
                if parameter.dim() == 2 and parameter.shape[1] == 32:
                    parameter.normal_(0, 0.3)
    return model


TYPES = list(model_types())
SUPPORTED = [t for t in TYPES if t not in UNSUPPORTED]
families = pytest.mark.parametrize("model_type", SUPPORTED)
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def blocks(model):
    """{layer: module that owns the router and the experts}."""
    owners = {}
    for layer, router in find_routers(model).items():
        owners[layer] = next(m for m in model.modules() if router in list(m.children()))
    return owners


def routing(model, ids=IDS):
    calls = {}
    with torch.inference_mode(), record_routing(model, lambda layer, *output: calls.__setitem__(layer, output)):
        model(ids, use_cache=False)
    return calls


def outputs(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def check_captured(model):
    """The recorded selections and weights are those that reach the experts modules, in every layer that has any."""
    received, handles = {}, []
    for layer, block in blocks(model).items():
        handles.append(block.experts.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: received.__setitem__(layer, [*args, *kwargs.values()]), with_kwargs=True))
    calls = routing(model)
    for handle in handles:
        handle.remove()
    num_layers = model.config.get_text_config().num_hidden_layers
    assert list(calls) == list(received) == list(find_routers(model)) and set(calls) <= set(range(num_layers))
    for layer, (router_logits, weights, selected) in calls.items():
        num_experts, top_k = routing_shape(model)[layer]
        assert router_logits.flatten(0, -2).shape == (24, num_experts) and selected.flatten(0, -2).shape == (24, top_k)
        if len(received[layer]) >= 3:
            index, given = received[layer][1:3]
            assert torch.equal(index.flatten(0, -2), selected.flatten(0, -2))
            assert torch.equal(given.flatten(0, -2), weights.flatten(0, -2))
        else:  # Llama 4 hands every token to every expert, times its score
            scaled = received[layer][0].view(num_experts, 24, -1)
            assert torch.equal((scaled != 0).any(-1).T, torch.zeros(24, num_experts).scatter(1, selected, 1).bool())


@families
def test_what_is_captured_is_what_the_experts_get(model_type):
    check_captured(build(model_type))


@families
def test_there_is_a_router_for_every_layer_with_experts_and_for_no_other(model_type):
    model = build(model_type)
    names = [name for name, _ in model.get_decoder().named_modules() if name.endswith(".experts")]
    layers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    if model_type == "deepseek_v4":  # its first layers have experts that a hash of the token chooses
        layers = [l for l, kind in enumerate(model.config.mlp_layer_types) if kind != "hash_moe"]
    assert list(find_routers(model)) == layers and layers


@families
def test_right_padded_batches_capture_what_single_sequences_do(model_type):
    model = build(model_type)
    sequences = [IDS[0, :n].tolist() for n in (12, 7, 3)]
    corpora = {"aa": (sequences[::2], [1, 1]), "bb": (sequences[1:2], [1])}  # of two languages, in one batch
    together, padded = capture.capture(model, corpora, batch_tokens=100)
    alone, _ = capture.capture(model, corpora, batch_tokens=1)
    assert padded == 14
    for language in corpora:
        check_same(together[language], alone[language])


def check_same(together, alone):
    assert (together["selected_experts"] == alone["selected_experts"]).all() and (together["counts"] == alone["counts"]).all()
    assert abs(together["mean_probs"] - alone["mean_probs"]).max() < 1e-4


@families
def test_a_masked_expert_is_never_selected(model_type):
    model = build(model_type)
    plain = routing(model)
    masks = {layer: selected.flatten().mode().values.reshape(1).tolist() for layer, (*_, selected) in plain.items()}
    with edit_routing(model, masks=masks):
        edited = routing(model)
        assert torch.isfinite(outputs(model)).all()
    for layer, (_, weights, selected) in edited.items():
        assert (plain[layer][2] == masks[layer][0]).any() and not (selected == masks[layer][0]).any()
        assert torch.isfinite(weights).all()
        before, after = plain[layer][1].float().sum(-1), weights.float().sum(-1)
        if before.std() < 1e-5 * before.mean().abs():  # a family that normalises goes on doing so
            torch.testing.assert_close(after, before)


@families
def test_a_strong_boost_is_selected_by_every_token_and_a_zero_boost_changes_no_bit(model_type):
    model = build(model_type)
    plain, before = routing(model), outputs(model)
    layers = list(find_routers(model))
    layer, (num_experts, top_k) = layers[-1], routing_shape(model)[layers[-1]]
    # a group competes by its best or two best experts, so where there are groups of two, both are boosted
    wanted = [4, 5] if getattr(find_routers(model)[layer], "num_group", 1) not in (1, None) else [5]
    boost = torch.zeros(num_experts)
    boost[wanted] = 1000.0
    with edit_routing(model, boosts={layer: boost}, rule="soft"):
        edited = routing(model)
    for expert in wanted:
        assert (edited[layer][2] == expert).any(-1).all()
    for other in layers[:-1]:
        assert torch.equal(edited[other][2], plain[other][2]) and torch.equal(edited[other][1], plain[other][1])
    with pytest.warns(UserWarning, match="moved no selection"):
        with edit_routing(model, boosts={layer: torch.zeros(n) for layer, (n, _) in routing_shape(model).items()}):
            assert torch.equal(outputs(model), before)


@families
def test_leaving_the_block_restores_the_model(model_type):
    model = build(model_type)
    before, layer = outputs(model), list(find_routers(model))[0]
    with pytest.raises(ZeroDivisionError):
        with edit_routing(model, masks={layer: [0]}):
            routing(model)
            1 / 0
    assert torch.equal(outputs(model), before)


@families
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_a_checkpoint_loaded_in_bfloat16_is_captured_and_edited_alike(model_type, experts, tmp_path):
    if experts == "grouped_mm" and not build(model_type)._can_set_experts_implementation():
        pytest.skip("this family has but one implementation of its experts")
    build(model_type).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation=experts).eval()
    assert list(find_routers(model)) == list(find_routers(build(model_type)))
    check_captured(model)
    plain, before = routing(model), outputs(model)
    masks = {layer: selected.flatten().mode().values.reshape(1).tolist() for layer, (*_, selected) in plain.items()}
    with edit_routing(model, masks=masks):
        for layer, (*_, selected) in routing(model).items():
            assert not (selected == masks[layer][0]).any()
    boosts = {layer: torch.zeros(n) for layer, (n, _) in routing_shape(model).items()}
    with edit_routing(model, boosts=boosts, count_moved=False):
        assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("model_type", [t for t in UNSUPPORTED if t in TYPES])
def test_an_unsupported_family_is_refused_before_any_forward_pass(model_type):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
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
    print(f"Exact in transformers {transformers.__version__}, {len(exact)} model types: {', '.join(exact)}. Refused:\n")
    for name, reason in refused.items():
        print(f"- `{name}`: {reason}")
