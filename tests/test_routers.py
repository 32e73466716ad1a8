"""Which modules are routers, of which layer and shape; and common.py's room of routers, alone.

That what is recorded and edited is what the experts get, in every family: test_architectures.py.
"""

import ast
import builtins
import dis
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, LlamaConfig,
                          Qwen3MoeConfig)

import capture
import common
from common import (InputError, edit_routing, find_routers, load_model, record_routing,
                    routing_shape)

TINY = "tests/tiny_moe"  # 8 layers of 32 experts, top_k 2
SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=8,
            num_attention_heads=4, num_experts_per_tok=2, moe_intermediate_size=24,
            max_position_embeddings=128, pad_token_id=0)


def build(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # routers that start equal pick the same experts for every token
        for router in find_routers(model).values():
            router.weight.normal_()
    return model


def build_qwen(num_experts=8, top_k=2):
    """Experts in the layers 0 and 2; layer 1 is dense."""
    return build(Qwen3MoeConfig(**SIZE | {"num_experts_per_tok": top_k}, num_key_value_heads=2,
                                num_experts=num_experts, mlp_only_layers=[1], norm_topk_prob=True))


def build_deepseek():
    """Experts in the layers 1 and 2, 8 of them in 4 groups, of which a token gets 2; top_k 2."""
    return build(DeepseekV3Config(
        **SIZE, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_shared_experts=1,
        n_routed_experts=8, n_group=4, topk_group=2))


IDS = torch.arange(1, 21).view(2, 10)


def routing(model):
    """{layer: (logits, weights, selected)} of one forward pass."""
    calls = {}
    with torch.inference_mode(), record_routing(
            model, lambda layer, *answer: calls.__setitem__(layer, answer)):
        model(IDS)
    return calls


def used_most(model, layer, n=1):
    return routing(model)[layer][2].flatten().bincount().argsort(descending=True)[:n].tolist()


def untouched(model):
    return not any("forward" in router.__dict__ or router._forward_hooks
                   for router in find_routers(model).values())


def test_a_router_is_named_by_its_decoder_layer_and_dense_layers_have_none():
    qwen, deepseek = build_qwen(), build_deepseek()
    assert {layer: type(router).__name__ for layer, router in find_routers(qwen).items()} == {
        0: "Qwen3MoeTopKRouter", 2: "Qwen3MoeTopKRouter"}
    assert find_routers(qwen)[2] is qwen.model.layers[2].mlp.gate
    assert routing_shape(qwen) == {0: (8, 2), 2: (8, 2)}
    assert routing_shape(deepseek) == {1: (8, 2), 2: (8, 2)}
    assert list(routing(qwen)) == [0, 2] and list(routing(deepseek)) == [1, 2]


@pytest.fixture(params=[(8, 3), (6, 2), (6, 3)], ids=str)
def mixed(request):
    """A model with 8 experts, top_k 2 in layer 0 and another shape in layer 2; and that shape."""
    model, shape = build_qwen(), request.param
    model.model.layers[2].mlp = build_qwen(*shape).model.layers[2].mlp
    return model, *shape


def test_routers_of_two_shapes_are_recorded_each_in_its_own(mixed):
    model, num_experts, top_k = mixed
    received = {}
    for layer in (0, 2):
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(
            lambda module, args, layer=layer: received.__setitem__(layer, args[1:3]))
    assert routing_shape(model) == {0: (8, 2), 2: (num_experts, top_k)}
    for layer, (logits, weights, selected) in routing(model).items():
        assert (logits.shape[-1], selected.shape[-1]) == routing_shape(model)[layer]
        assert logits.shape[0] == 20 and weights.shape == selected.shape
        index, given = received[layer]
        assert torch.equal(selected, index) and torch.equal(weights, given)


def test_routers_of_two_shapes_are_masked_each_in_its_own(mixed):
    model, num_experts, top_k = mixed
    left = {0: [1, 6], 2: list(range(num_experts - top_k, num_experts))}  # just top_k of each
    masks = {0: sorted(set(range(8)) - set(left[0])), 2: list(range(num_experts - top_k))}
    plain = routing(model)
    with edit_routing(model, masks=masks):
        for layer, (_, _, selected) in routing(model).items():
            assert torch.isin(plain[layer][2], torch.tensor(masks[layer])).any()
            assert selected.sort(-1)[0].tolist() == [left[layer]] * 20


def test_routers_of_two_shapes_are_boosted_each_in_its_own(mixed):
    model, num_experts, top_k = mixed
    boosts, plain = {0: np.eye(8)[7], 2: np.eye(num_experts)[num_experts - 1]}, routing(model)
    with edit_routing(model, boosts=boosts, rule="hard"):
        for layer, (_, _, selected) in routing(model).items():
            assert (selected == len(boosts[layer]) - 1).any(-1).all()
    with edit_routing(model, boosts={2: boosts[2]}, rule="hard") as moved:
        routing(model)
    # one selection moved of each of the 20 tokens that had not selected the last expert
    without = 20 - int((plain[2][2] == num_experts - 1).sum())
    assert 0 < without and moved == {2: without / (20 * top_k)}


def test_an_edit_that_does_not_fit_its_own_layers_router_is_refused(mixed):
    model, num_experts, top_k = mixed
    for edit, message in [
            (dict(masks={2: range(num_experts - top_k + 1)}), f"fewer than top_k {top_k}"),
            (dict(masks={2: [num_experts]}), f"the experts 0 to {num_experts - 1},"),
            (dict(boosts={2: np.zeros(num_experts + 2)}), f"a boost is {num_experts} finite")]:
        with pytest.raises(InputError, match=f"^layer 2.* {message}"):
            with edit_routing(model, **edit):
                pytest.fail("the block was entered")


def test_routers_of_two_shapes_fit_no_dump(mixed):
    model, num_experts, top_k = mixed
    both = str(sorted([(8, 2), (num_experts, top_k)]))
    message = re.escape(f"differ in (num_experts, top_k): {both}; a dump cannot hold that")
    for use in (lambda: capture.one_shape(routing_shape(model)),
                lambda: capture.capture(model, IDS.tolist())):
        with pytest.raises(InputError, match=message):
            use()


def test_layers_of_one_shape_fit_a_dump():
    assert capture.one_shape({0: (8, 2), 2: (8, 2)}) == ([0, 2], 8, 2)


def test_hooks_are_gone_after_an_exception():
    model = build_qwen()
    with pytest.raises(ZeroDivisionError):
        with record_routing(model, lambda *call: 1 / 0):
            model(IDS)
    assert untouched(model)


def test_a_recorded_router_does_not_wait_for_the_device(monkeypatch):
    model = build_qwen()
    with record_routing(model, lambda *call: None):
        monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a tensor was read"))
        find_routers(model)[0](torch.randn(3, 32))


def test_a_dense_model_is_refused_in_one_line():
    dense = LlamaConfig(**SIZE | {"num_experts_per_tok": None})
    with pytest.raises(InputError, match="^LlamaForCausalLM has no routers .*dense") as error:
        find_routers(AutoModelForCausalLM.from_config(dense))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- room alone

def room():
    """The import lines of common.py, and its text from the ruled line "routers" to the next one."""
    text = Path(common.__file__).read_text(encoding="utf-8")
    imports = [ast.get_source_segment(text, node) for node in ast.parse(text).body
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.fullmatch("# -{20,} routers", line))
    stop = next(i for i in range(start + 1, len(lines)) if re.match("# -{20,}", lines[i]))
    return "\n".join([*imports, *lines[start:stop], ""])


USE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import room

model, ids = AutoModelForCausalLM.from_pretrained(sys.argv[1]), torch.arange(5, 105).view(2, 50)

def selected():
    seen = {}
    on_router = lambda layer, logits, weights, chosen: seen.update({layer: chosen})
    with torch.no_grad(), room.record_routing(model, on_router):
        model(ids)
    return seen

plain = selected()
masks = {layer: [int(chosen.mode().values.mode().values)] for layer, chosen in plain.items()}
with room.edit_routing(model, masks=masks):
    edited = selected()
count = lambda seen: [int((chosen == masks[layer][0]).sum()) for layer, chosen in seen.items()]
others = sorted({"common", "capture", "analyze", "ablate", "steer"} & set(sys.modules))
print(json.dumps([count(plain), count(edited), others]))
"""


def test_the_routers_room_works_alone_in_a_fresh_process(tmp_path):
    (tmp_path / "room.py").write_text(room(), encoding="utf-8")
    (tmp_path / "use.py").write_text(USE, encoding="utf-8")
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outcome = subprocess.run([sys.executable, "use.py", os.path.abspath(TINY)], cwd=tmp_path,
                             env=elsewhere, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    plain, edited, others = json.loads(outcome.stdout)
    assert len(plain) == 8 and min(plain) > 0  # what is masked was selected before
    assert edited == [0] * 8 and others == []


def test_the_routers_room_uses_no_name_from_outside_it():
    def names(code):
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                yield instruction.argval
        for constant in code.co_consts:
            if hasattr(constant, "co_code"):
                yield from names(constant)

    code, defined = compile(room(), "room.py", "exec"), {"__name__": "room"}
    exec(code, defined)
    assert {"InputError", "find_routers", "record_routing", "edit_routing"} <= defined.keys()
    known = defined.keys() | set(dir(builtins)) | {"__module__", "__qualname__"}
    assert set(names(code)) - known == set()


# --------------------------------------------------------------------------------------- the model

def test_a_dense_checkpoint_is_refused_before_its_weights_are_read(tmp_path):
    LlamaConfig(**SIZE).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)  # and no weights at all
    with pytest.raises(InputError, match="LlamaForCausalLM has no routers"):
        load_model(str(tmp_path))


def test_a_missing_model_is_one_line():
    with pytest.raises(InputError, match="no model 'no/such/model'") as error:
        load_model("no/such/model")
    assert "\n" not in str(error.value)


def test_options_reach_the_model_above_those_of_every_run(monkeypatch):
    monkeypatch.setattr(common, "MODEL_OPTIONS", {"attn_implementation": "eager"})
    of_every_run = load_model(TINY, device="cpu")[0]
    of_this_one = load_model(TINY, device="cpu", attn_implementation="sdpa")[0]
    assert [m.config._attn_implementation for m in (of_every_run, of_this_one)] == ["eager", "sdpa"]
    with pytest.raises(InputError, match="cannot load the weights .*no_such_kernel"):
        load_model(TINY, device="cpu", attn_implementation="no_such_kernel")
