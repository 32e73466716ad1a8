"""Routers are found, recorded and edited exactly, and an edit proves that it took hold.

Small models of a known layout stand for all; every family is in test_architectures.py.
"""

import builtins
import json
import os
import re
import subprocess
import sys
import symtable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, DeepseekV3Config, LlamaConfig, Qwen3MoeConfig)

import common
from common import (
    RULES, InputError, RouterEdit, boost_logits, check_model, check_reports, edit_routing,
    find_routers, load_model, record_routing, routing_shape)
from conftest import TINY, RouterOutput, is_untouched, most_selected, record

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "head_dim": 8, "num_attention_heads": 4, "moe_intermediate_size": 24,
         "max_position_embeddings": 128, "pad_token_id": 0}
IDS = torch.arange(1, 21).view(2, 10)  # two sequences of ten tokens


def build(config):
    """Return a model of random weights, whose tokens select different experts."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # some families' routers start with equal rows
        for router in find_routers(model).values():
            router.weight.normal_()
    return model


def build_qwen(num_experts=8, top_k=2):
    """Return a model with routers in the layers 0 and 2; layer 1 is dense."""
    return build(Qwen3MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=num_experts, num_experts_per_tok=top_k,
        mlp_only_layers=[1], norm_topk_prob=True))


def build_deepseek():
    """Return a model with routers in the layers 1 and 2.

    A token selects 2 of the 8 experts, both in one of the groups 0 to 3 and 4 to 7.
    """
    config = DeepseekV3Config(
        **SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, n_shared_experts=1,
        n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1)
    try:
        return build(config)
    except InputError as error:
        pytest.skip(f"this transformers declares no routers of DeepSeek-V3: {error}")


@pytest.fixture
def qwen():
    return build_qwen()


@pytest.fixture(params=[(8, 3), (6, 2), (6, 3)], ids=str)
def mixed(request):
    """A model, and num_experts and top_k of its layer 2; layer 0 has 8 experts and top_k 2."""
    num_experts, top_k = request.param
    model = build_qwen()
    model.model.layers[2].mlp = build_qwen(num_experts, top_k).model.layers[2].mlp
    return model, num_experts, top_k


def random_states():
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def route(router, hidden_states):
    """Return what a single router does with hidden states."""
    with torch.inference_mode():
        return RouterOutput(*router(hidden_states))


# --------------------------------------------------------------------------------------- recording

def test_a_router_is_named_by_its_decoder_layer_and_dense_layers_have_none(qwen):
    layers = qwen.model.layers
    assert find_routers(qwen) == {0: layers[0].mlp.gate, 2: layers[2].mlp.gate}
    assert routing_shape(qwen) == {0: (8, 2), 2: (8, 2)}
    assert list(find_routers(build_deepseek())) == [1, 2]


def test_a_dense_checkpoint_is_refused_before_its_weights_are_read(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)  # and no weights at all
    with pytest.raises(InputError, match="LlamaForCausalLM .*dense"):
        load_model(str(tmp_path))


def test_a_layer_with_two_routers_is_refused(qwen):
    qwen.model.layers[2].mlp.another = find_routers(qwen)[0]
    with pytest.raises(InputError, match="Qwen3MoeForCausalLM is not supported"):
        find_routers(qwen)


@pytest.mark.parametrize("change", [
    lambda logits, weights, selected: logits,  # no selections, as before transformers 5.6
    lambda logits, weights, selected: (logits, weights, weights),
    lambda logits, weights, selected: (logits, weights, selected[:, :1]),
    lambda logits, weights, selected: (logits[:, :7], weights, selected),
    lambda logits, weights, selected: 1 / 0,
])
def test_a_router_that_returns_something_else_is_refused(qwen, monkeypatch, change):
    router_class = type(find_routers(qwen)[0])
    forward = router_class.forward
    monkeypatch.setattr(router_class, "forward",
                        lambda router, states: change(*forward(router, states)))
    with pytest.raises(InputError, match="Qwen3MoeForCausalLM is not supported"):
        find_routers(qwen)


def test_what_is_recorded_is_what_the_experts_are_given(mixed):
    model, num_experts, top_k = mixed
    given = {}
    for layer in (0, 2):
        def keep_arguments(experts, args, layer=layer):
            given[layer] = args[1:3]
        model.model.layers[layer].mlp.experts.register_forward_pre_hook(keep_arguments)
    recorded = record(model, IDS)
    assert routing_shape(model) == {0: (8, 2), 2: (num_experts, top_k)}
    assert [output.logits.shape for output in recorded.values()] == [(20, 8), (20, num_experts)]
    assert given.keys() == recorded.keys()
    for layer, (selected, weights) in given.items():
        assert torch.equal(recorded[layer].selected, selected)
        assert torch.equal(recorded[layer].weights, weights)


def test_hooks_are_removed_after_an_exception(qwen):
    with pytest.raises(ZeroDivisionError):
        with record_routing(qwen, lambda *output: 1 / 0):
            qwen(IDS)
    assert is_untouched(qwen)


def compile_model(model):
    model.compile(backend="eager")
    return model


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compile_decoder(model):
    model.model.compile(backend="eager")
    return model


def compile_layers(model):
    for layer, module in enumerate(model.model.layers):
        model.model.layers[layer] = torch.compile(module, backend="eager")
    return model


@pytest.mark.parametrize("compile_it", [
    compile_model, lambda model: torch.compile(model, backend="eager"), compile_forward,
    compile_decoder, compile_layers], ids=["model", "wrapper", "forward", "decoder", "layers"])
def test_a_compiled_model_is_neither_recorded_nor_edited_in_silence(qwen, compile_it):
    torch.compiler.reset()
    model = compile_it(qwen)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        with pytest.raises(RuntimeError, match="none of its routers was called.*compiled"):
            with record_routing(model, print):
                model(IDS, use_cache=False)
        with pytest.raises(ZeroDivisionError):  # which an exception of the block's own is not
            with record_routing(model, print):
                model(IDS, use_cache=False)
                1 / 0
        with record_routing(model, print):
            pass  # nothing ran
        with pytest.raises(InputError, match="compiled"):
            with edit_routing(model, masks={0: [1]}):
                pytest.fail("the block was entered")
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
    assert is_untouched(qwen)


def test_a_decoder_that_was_compiled_is_noticed_when_it_runs_alone(qwen):
    torch.compiler.reset()
    decoder = compile_decoder(qwen).get_decoder()
    with torch.no_grad():
        decoder(IDS, use_cache=False)
        with pytest.raises(RuntimeError, match="compiled"):
            with record_routing(qwen, print):
                decoder(IDS, use_cache=False)


def test_a_router_that_is_recorded_and_edited_does_not_wait_for_the_device(qwen, monkeypatch):
    edit = {"masks": {0: [1]}, "boosts": {0: np.eye(8)[2]}, "zeroed": {0: [3]}}
    with record_routing(qwen, lambda *output: None), edit_routing(qwen, **edit):
        with monkeypatch.context() as patch:
            for name in ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "numpy"):
                patch.setattr(torch.Tensor, name, lambda *args: pytest.fail("a tensor was read"))
            qwen.model.layers[0].mlp.gate(random_states())


# ---------------------------------------------------------------------------------------- editing

def test_boosted_logits_by_hand():
    # The mean is 1, and the deviations from it -3, 1, 2 and 0: a variance of 14 / 3
    logits = torch.tensor([[-2.0, 2.0, 3.0, 1.0]], dtype=torch.float64)
    boost = torch.tensor([0.5, -0.5, 0.0, 1.0], dtype=torch.float64)
    std = (14 / 3) ** 0.5
    expected = {
        "proportional": [-1, 1, 3, 2],
        "soft": [-2 + 0.5 * std, 2 - 0.5 * std, 3, 1 + std],
        "hard": [3.03, -2.02, 3, 3.03],  # a hundredth of 3 above 3, and of 2 below -2
    }
    assert expected.keys() == set(RULES)
    for rule in RULES:
        np.testing.assert_allclose(boost_logits(logits, boost, rule), [expected[rule]], rtol=1e-12)
    small = torch.tensor([[0.5, -0.25, 0.0]])  # below 1, the step is a hundredth of 1
    boosted = boost_logits(small, torch.tensor([0.0, 2.0, -2.0]), "hard")
    np.testing.assert_allclose(boosted, [[0.5, 0.51, -0.26]], rtol=1e-6)


def route_by_hand(router, hidden_states, boost, masked):
    """Return (weights, selected) of Qwen3-MoE's routing, in float64 and by another path."""
    logits = hidden_states.double().numpy() @ router.weight.detach().double().numpy().T
    logits = boost(logits)
    logits[:, masked] = -np.inf
    selected = np.argsort(-logits)[:, :2]
    exp = np.exp(np.take_along_axis(logits, selected, axis=-1))
    return exp / exp.sum(-1, keepdims=True), selected


BOOST = np.array([0, 0.4, 0, -0.7, 0.9, 0, 0, 0.1])


@pytest.mark.parametrize("rule, boost", [
    ("proportional", lambda z: z + BOOST * abs(z)),
    ("soft", lambda z: z + BOOST * np.std(z, axis=-1, ddof=1, keepdims=True)),
])
def test_a_boost_mask_and_zeroed_expert_act_together_as_by_hand(qwen, rule, boost):
    router, states = find_routers(qwen)[2], random_states()
    edit = {"masks": {2: [1, 6]}, "boosts": {2: BOOST}, "zeroed": {2: [4]}}
    with edit_routing(qwen, **edit, rule=rule, count_changes=False) as changed:
        edited = route(router, states)
    weights, selected = route_by_hand(router, states, boost, masked=[1, 6])
    is_zeroed = selected == 4
    assert edited.selected.tolist() == selected.tolist()
    np.testing.assert_allclose(edited.weights, np.where(is_zeroed, 0, weights), rtol=1e-4)
    assert is_zeroed.any()
    assert changed == {2: is_zeroed.mean()}


def test_a_hard_boost_is_selected_by_every_token_and_a_negative_one_by_none(qwen):
    with edit_routing(qwen, boosts={0: [0, -1, 0, 1, 0, 0, 0, 0]}, rule="hard"):
        selected = record(qwen, IDS)[0].selected
    assert (selected == 3).any(-1).all()
    assert not (selected == 1).any()


def test_if_all_but_top_k_experts_are_masked_the_others_are_selected(mixed):
    model, num_experts, top_k = mixed
    last = list(range(num_experts))[-top_k:]
    with edit_routing(model, masks={0: [0, 2, 3, 4, 5, 7], 2: range(num_experts - top_k)}):
        edited = record(model, IDS)
    assert edited[0].selected.sort(-1).values.tolist() == [[1, 6]] * 20
    assert edited[2].selected.sort(-1).values.tolist() == [last] * 20


def test_neither_a_bias_nor_its_group_brings_a_masked_expert_back():
    model = build_deepseek()
    router, states = find_routers(model)[2], random_states()
    router.e_score_correction_bias[3] = 50
    assert (route(router, states).selected == 3).any(-1).all()
    with edit_routing(model, masks={2: [3]}):
        edited = route(router, states)
    scores = (states @ router.weight.T).sigmoid()
    for of_token, selected in zip(scores.tolist(), edited.selected.tolist()):
        # The groups compete by the sum of their two best
        first = sorted((0, 1, 2), key=lambda expert: of_token[expert])[-2:]
        second = sorted((4, 5, 6, 7), key=lambda expert: of_token[expert])[-2:]
        best = max(first, second, key=lambda group: of_token[group[0]] + of_token[group[1]])
        assert sorted(selected) == sorted(best)


@pytest.mark.parametrize("select", [
    lambda scores: scores.topk(1).indices,
    lambda scores: scores.argmax(-1, keepdim=True),
    lambda scores: torch.max(scores, -1, keepdim=True).indices,
    lambda scores: torch.sort(scores, descending=True).indices[:, :1],
])
def test_a_bias_brings_no_masked_expert_back_however_experts_are_selected(qwen, select):
    router, states = find_routers(qwen)[0], random_states()

    def forward(hidden_states):
        logits = F.linear(hidden_states, router.weight)
        selected = select(logits + torch.tensor([0, 0, 0, 1e12, 0, 0, 0, 0]))
        return logits, logits.gather(-1, selected), selected

    router.forward = forward
    assert (route(router, states).selected == 3).all()
    with edit_routing(qwen, masks={0: [3]}):
        assert not (route(router, states).selected == 3).any()


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_a_mask_is_expert_ids_or_a_boolean_for_each_expert(qwen, kind):
    booleans = [False, True, True, False, False, False, True, False]
    for mask in ([1, 2, 6], booleans):
        with edit_routing(qwen, masks={0: kind(mask)}):
            selected = route(find_routers(qwen)[0], random_states()).selected
        assert selected.unique().tolist() == [0, 3, 4, 5, 7]


def test_a_boost_of_zero_changes_no_bit_in_bfloat16_and_says_so(qwen):
    router, states = find_routers(qwen.bfloat16())[0], random_states().bfloat16()
    plain = route(router, states)
    with pytest.warns(UserWarning, match="changed no selection"):
        with edit_routing(qwen, boosts={0: np.zeros(8)}) as changed:
            edited = route(router, states)
    assert all(torch.equal(before, after) for before, after in zip(plain, edited))
    assert changed == {0: 0}
    with edit_routing(qwen, boosts={0: torch.eye(8, dtype=torch.bfloat16)[3]}, rule="hard"):
        assert (route(router, states).selected == 3).any(-1).all()


def test_edits_hold_in_every_step_of_generate(qwen):
    masked = most_selected(record(qwen, IDS)[0], number=3)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    selected = []
    plain = qwen.generate(IDS, **arguments)
    with edit_routing(qwen, masks={0: masked, 2: masked}):
        with record_routing(qwen, lambda *output: selected.append(output[-1])):
            qwen.generate(IDS, **arguments)
    assert len(selected) == 2 * 6  # two layers, six steps
    assert not torch.isin(torch.cat(selected), torch.tensor(masked)).any()
    assert torch.equal(qwen.generate(IDS, **arguments), plain)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_boost_gives_finite_logits(rule, dtype):
    logits = random_states().to(dtype)  # of 32 experts
    edit = RouterEdit(logits, [False] * 31 + [True], zeroed=[False] * 32,
                      boost=[9e29, -9e29] + [0] * 30, rule=rule, count_changes=False)
    edited = edit.edit_logits(logits)
    assert edited.isfinite().all()
    assert edited.dtype == dtype
    assert torch.equal(edited[:, 2:-1], logits[:, 2:-1])


# -------------------------------------------------------------------------------- leaves no trace

def test_an_edit_inside_an_edit_is_of_other_layers_or_refused_without_a_trace(qwen):
    plain = record(qwen, IDS)
    first, second = most_selected(plain[2], number=2)
    with edit_routing(qwen, masks={2: [first]}):
        with edit_routing(qwen, masks={0: [1]}):
            assert not (record(qwen, IDS)[0].selected == 1).any()
        with pytest.raises(InputError, match="layer 2 .*one edit_routing") as error:
            with edit_routing(qwen, masks={0: [1], 2: [second]}):
                pytest.fail("the block was entered")
        assert error.value.__context__ is None
        inside = record(qwen, IDS)
    assert torch.equal(inside[0].selected, plain[0].selected)
    assert not (inside[2].selected == first).any()
    assert (inside[2].selected == second).any()
    assert is_untouched(qwen)


def test_a_routers_own_forward_is_run_and_put_back(qwen):
    router = find_routers(qwen)[0]
    calls = []

    def own_forward(hidden_states):  # as accelerate sets one
        calls.append(hidden_states)
        return type(router).forward(router, hidden_states)

    router.forward = own_forward
    boost = {"boosts": {0: np.eye(8)[3], 2: np.eye(8)[3]}, "rule": "hard"}
    mask = {"masks": {0: [0, 1, 2, 4, 5, 6]}}
    # Once, and once more to count what a boost changes
    for edit, num_calls in ((boost | {"count_changes": False}, 1), (boost, 2), (mask, 1)):
        calls.clear()
        with edit_routing(qwen, **edit) as changed:
            assert (record(qwen, IDS)[0].selected == 3).any(-1).all()
        assert len(calls) == num_calls
        assert bool(changed) == (num_calls == 2)
        assert router.forward is own_forward
    assert "forward" not in vars(find_routers(qwen)[2])


# ---------------------------------------------------------------------------------- proves itself

def test_the_fraction_of_changed_selections_is_that_of_the_layer(mixed):
    model, num_experts, top_k = mixed
    plain = record(model, IDS)[2].selected
    with edit_routing(model, boosts={2: np.eye(num_experts)[-1]}, rule="hard") as changed:
        edited = record(model, IDS)[2].selected
    assert (edited == num_experts - 1).any(-1).all()
    # One selection changes for each of the 20 tokens that had not selected the last expert
    num_new = 20 - int((plain == num_experts - 1).sum())
    assert 0 < num_new < 20
    assert changed == {2: num_new / (20 * top_k)}


def test_counts_by_hand():
    edit = RouterEdit(torch.zeros(1), mask=[False] * 4 + [True], zeroed=[True] + [False] * 4,
                      boost=[0, 0, 1, 0, 0], rule="soft", count_changes=True)
    # The order does not matter; 2 and 3 are new for the second token, and 0 has no weight
    edit.count(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [1, 4]]))
    report = {"num_selections": 4, "masked_but_selected": [], "num_changed": 3}
    assert edit.report() == report
    edit.count(torch.tensor([[1, 4]]), torch.tensor([[1, 4]]))
    assert edit.report() == report | {"num_selections": 6, "masked_but_selected": [4]}
    assert check_reports({5: report, 6: report | {"num_changed": None}}) == {5: 0.75}


def test_an_edited_router_that_is_never_called_is_an_error(qwen):
    with pytest.raises(RuntimeError, match="layer 0: .*never called"):
        with edit_routing(qwen, masks={0: [1]}):
            pass


def test_a_masked_expert_that_is_selected_is_an_error(qwen, monkeypatch):
    monkeypatch.setattr(common, "SELECTING", set())
    monkeypatch.setattr(RouterEdit, "edit_logits", lambda edit, router_logits: router_logits)
    with pytest.raises(RuntimeError, match="layer 0: .*masked and yet selected"):
        with edit_routing(qwen, masks={0: [1, 2, 3, 4]}):
            record(qwen, IDS)


def compute_without_linear(router):
    """Give a router a forward in which logits cannot be edited."""
    def forward(hidden_states):
        logits = hidden_states @ router.weight.T
        return logits, *logits.topk(2)

    router.forward = forward


def test_a_router_that_computes_its_logits_in_another_way_is_an_error(qwen):
    compute_without_linear(find_routers(qwen)[0])
    with pytest.raises(RuntimeError, match="cannot be edited"):
        with edit_routing(qwen, masks={0: [1]}):
            record(qwen, IDS)


@pytest.mark.parametrize("edit", [
    {"masks": {1: [0]}},                                   # a dense layer
    {"masks": {0: [8]}},                                   # no such expert
    {"masks": {0: [-1]}},
    {"masks": {0: ["5", "7"]}},                            # texts, as the keys of JSON are
    {"masks": {0: [[0], [1]]}},                            # two dimensions
    {"masks": {0: 5}},                                     # no list
    {"masks": {0: [True] * 2 + [False] * 5}},              # 7 booleans for 8 experts
    {"masks": {0: range(7)}},                              # leaves fewer than top_k
    {"masks": {2: range(4)}},                              # leaves fewer than top_k of that layer
    {"masks": {2: [6]}},                                   # an expert of the other layer alone
    {"zeroed": {0: np.array([0, 1, 0, 0, 0, 1, 0, 0])}},   # neither booleans nor different IDs
    {"boosts": {0: np.zeros(7)}},
    {"boosts": {2: np.zeros(8)}},
    {"boosts": {0: [False] * 8}},
    {"boosts": {0: np.full(8, np.nan)}},
    {"boosts": {0: np.full(8, 1e39)}},                     # float32 ends at 3e38
    {"boosts": {0: np.zeros(8)}, "rule": "hardest"},
], ids=str)
@pytest.mark.parametrize("mixed", [(6, 3)], indirect=True, ids=[""])
def test_an_edit_that_does_not_fit_is_refused_before_anything_runs(mixed, edit):
    model, _, _ = mixed
    with pytest.raises(InputError, match="^(layer [012]|rule 'hardest')"):
        with edit_routing(model, **edit):
            pytest.fail("the block was entered")
    assert is_untouched(model)


# ------------------------------------------------------------------------- checked before the run

PROMPT = list(range(5, 21))
GENERATION = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}


def test_a_model_that_is_checked_is_as_it_was(qwen):
    first = qwen.generate(torch.tensor([PROMPT]), max_new_tokens=1, do_sample=False)[0, -1].item()
    settings = qwen.generation_config
    # A token that ends a response at once does not keep generation from being checked
    check_model(qwen, PROMPT, generation=GENERATION | {"eos_token_id": [first]})
    check_model(qwen, [7])  # a prompt of one token
    assert qwen.generation_config is settings
    assert is_untouched(qwen)


def test_a_block_that_ignores_what_its_router_returns_is_refused(qwen):
    block = qwen.model.layers[2].mlp

    def ignore_router(hidden_states):
        block.gate(hidden_states.flatten(0, -2))
        return hidden_states

    block.forward = ignore_router
    check_model(qwen, PROMPT, edits=False)  # recording works
    with pytest.raises(InputError, match="layer 2 cannot be edited"):
        check_model(qwen, PROMPT)


def test_a_router_that_cannot_be_edited_is_refused(qwen):
    compute_without_linear(find_routers(qwen)[2])
    with pytest.raises(InputError, match="layer 2 cannot be edited"):
        check_model(qwen, PROMPT)


def test_a_router_that_is_bypassed_is_refused(qwen):
    qwen.model.layers[2].mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(InputError, match=r"layers \[2\] are bypassed"):
        check_model(qwen, PROMPT, edits=False)


def test_a_router_that_is_bypassed_in_generation_is_refused(qwen):
    qwen.generate = lambda input_ids: qwen(input_ids)  # one step instead of two
    with pytest.raises(InputError, match=r"layers \[0, 2\] are bypassed"):
        check_model(qwen, PROMPT, generation=GENERATION)


def test_nan_logits_are_refused(qwen):
    qwen.model.norm.weight.data[3] = torch.nan
    with pytest.raises(InputError, match="NaN; try --dtype float32"):
        check_model(qwen, PROMPT, edits=False)


@pytest.mark.parametrize("num_experts", [2, 3])
def test_a_model_with_hardly_more_experts_than_top_k_passes(num_experts):
    check_model(build_qwen(num_experts), PROMPT)


def test_options_of_a_call_go_before_those_of_every_model(monkeypatch):
    monkeypatch.setattr(common, "MODEL_OPTIONS", {"attn_implementation": "eager"})
    of_every_model, _ = load_model(TINY, device="cpu")
    of_this_one, _ = load_model(TINY, device="cpu", attn_implementation="sdpa")
    assert of_every_model.config._attn_implementation == "eager"
    assert of_this_one.config._attn_implementation == "sdpa"
    with pytest.raises(InputError, match="no_such_kernel"):
        load_model(TINY, device="cpu", attn_implementation="no_such_kernel")


# ------------------------------------------------------------------------------ the section alone

IMPORTS = """
import contextlib
import functools
import inspect
import re
import warnings
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

"""
USE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
import section

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
masks = {layer: [layer] for layer in section.find_routers(model)}

def count_masked():
    counts = {}
    def on_router(layer, router_logits, routing_weights, selected_experts):
        counts[layer] = int((selected_experts == layer).sum())
    with section.record_routing(model, on_router):
        model(torch.arange(5, 400).view(5, 79))
    return counts

before = count_masked()
with section.edit_routing(model, masks=masks):
    after = count_masked()
print(json.dumps([list(before.values()), list(after.values()), list(sys.modules)]))
"""


def routers_section():
    """Return the routers section of common.py, from its ruled line to the next one."""
    text = Path(common.__file__).read_text(encoding="utf-8")
    return re.search(r"^# -+ routers\n.*?(?=^# --)", text, re.DOTALL | re.MULTILINE)[0]


def test_the_routers_section_works_alone_in_a_fresh_process(tmp_path):
    (tmp_path / "section.py").write_text(IMPORTS + routers_section(), encoding="utf-8")
    (tmp_path / "use.py").write_text(USE, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run([sys.executable, "use.py", os.path.abspath(TINY)], cwd=tmp_path,
                             env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    before, after, modules = json.loads(process.stdout)
    assert len(before) == 8
    assert min(before) > 0
    assert after == [0] * 8
    assert "common" not in modules


def global_names(table):
    names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names.union(*[global_names(child) for child in table.get_children()])


def test_the_routers_section_uses_no_name_of_another_section():
    text = IMPORTS + routers_section()
    defined = {"__name__": "section"}
    exec(text, defined)
    used = global_names(symtable.symtable(text, "section.py", "exec"))
    assert "find_routers" in used
    assert used - defined.keys() - set(dir(builtins)) == set()
