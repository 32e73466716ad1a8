"""What common.py sees of a router is what the experts are given, for every family and for nothing else."""

import pytest
import torch
from transformers import (DeepseekV2Config, DeepseekV3Config, GptOssConfig, GraniteMoeConfig, JetMoeConfig, LlamaConfig,
                          MixtralConfig, OlmoeConfig, PhimoeConfig, Qwen2MoeConfig, Qwen3MoeConfig, AutoModelForCausalLM)

from common import InputError, find_routers, load_model, record_routing, routing_shape

SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, num_experts_per_tok=2, max_position_embeddings=128, pad_token_id=0)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, num_key_value_heads=4,
              moe_intermediate_size=24, first_k_dense_replace=1, n_shared_experts=1, n_routed_experts=8)
FAMILIES = {
    "qwen3_moe": Qwen3MoeConfig(**SIZE, num_experts=8, moe_intermediate_size=24, mlp_only_layers=[1], norm_topk_prob=True),
    "qwen2_moe": Qwen2MoeConfig(**SIZE, num_experts=8, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "olmoe": OlmoeConfig(**SIZE, num_experts=8),
    "mixtral": MixtralConfig(**SIZE, num_local_experts=8),
    "gpt_oss": GptOssConfig(**SIZE, num_local_experts=8),
    "deepseek_v2": DeepseekV2Config(**SIZE | LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "deepseek_v3": DeepseekV3Config(**SIZE | LATENT, n_group=4, topk_group=2),
    "phimoe": PhimoeConfig(**SIZE, num_local_experts=8),
    "granitemoe": GraniteMoeConfig(**SIZE, num_local_experts=8),
}
LAYERS = {"qwen3_moe": [0, 2], "deepseek_v2": [1, 2], "deepseek_v3": [1, 2]}


def build(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # some families start with equal routers, which pick the same experts for every token
        for router in find_routers(model).values():
            for parameter in router.parameters():
                parameter.normal_()
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param, build(FAMILIES[request.param])


def what_experts_get(model):
    """Hooks that collect (top_k_index, top_k_weights) as each layer's experts module receives them, in layer order."""
    received = []
    for router_owner in [m for m in model.modules() if hasattr(m, "experts") and not hasattr(m, "layers")]:
        router_owner.experts.register_forward_pre_hook(lambda module, args: received.append(args[1:3]))
    return received


def test_one_router_per_moe_layer_at_its_decoder_layer(family):
    name, model = family
    assert list(find_routers(model)) == LAYERS.get(name, [0, 1, 2])


def test_routers_report_their_own_number_of_experts_and_top_k(family):
    _, model = family
    assert set(routing_shape(model).values()) == {(8, 2)}


def test_recorded_selections_and_weights_are_what_the_experts_get(family):
    _, model = family
    received, recorded = what_experts_get(model), []
    with torch.no_grad(), record_routing(model, lambda *call: recorded.append(call)):
        model(torch.randint(1, 64, (2, 9)))
    assert [layer for layer, *_ in recorded] == list(find_routers(model))
    assert len(received) == len(recorded)
    for (_, logits, weights, selected), (index, given) in zip(recorded, received):
        assert logits.shape == (18, 8)
        assert torch.equal(selected, index) and torch.equal(weights, given)
    assert len({tuple(row.tolist()) for *_, selected in recorded for row in selected.sort(-1)[0]}) > 3


def test_hooks_are_gone_after_an_exception():
    model = build(FAMILIES["qwen3_moe"])
    with pytest.raises(ZeroDivisionError):
        with record_routing(model, lambda *call: 1 / 0):
            model(torch.ones(1, 3, dtype=torch.int64))
    assert not any(router._forward_hooks for router in find_routers(model).values())


def test_a_dense_model_is_refused_in_one_line():
    with pytest.raises(InputError, match="^LlamaForCausalLM has no routers .*dense") as error:
        find_routers(AutoModelForCausalLM.from_config(LlamaConfig(**SIZE | {"num_experts_per_tok": None})))
    assert "\n" not in str(error.value)


def test_an_unsupported_family_is_refused_in_one_line():
    config = JetMoeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
                          intermediate_size=48, num_local_experts=8)
    with pytest.raises(InputError, match="^JetMoeForCausalLM is not supported") as error:
        find_routers(AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(error.value)


def test_a_dense_checkpoint_is_refused_before_its_weights_are_read(tmp_path):
    from transformers import AutoTokenizer
    LlamaConfig(**SIZE).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained("tests/tiny_moe").save_pretrained(tmp_path)  # and no weights at all
    with pytest.raises(InputError, match="LlamaForCausalLM has no routers"):
        load_model(str(tmp_path))


def test_a_missing_model_is_one_line():
    with pytest.raises(InputError, match="no model 'no/such/model'"):
        load_model("no/such/model")
