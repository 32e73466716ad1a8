"""An edit of the routing does what its formula says, proves that it took hold, and leaves no trace.

In every family: test_architectures.py.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import InputError, edit_routing, find_routers, record_routing
from test_routers import IDS, build_deepseek, build_qwen, routing, untouched, used_most


def outputs(model):
    with torch.inference_mode():
        return model(IDS).logits


def hidden_states(seed, n=64):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def qwen():
    return build_qwen()  # routers in the layers 0 and 2, 8 experts, top_k 2


# ---------------------------------------------------------- exact, against the router's own weight

def by_hand(router, hidden, change):
    """Qwen3-MoE's routing from its weight and a change of the logits, in float64."""
    logits = change(F.linear(hidden.double(), router.weight.double()))
    top, selected = logits.softmax(-1).topk(2, -1)
    return top / top.sum(-1, keepdim=True), selected


@pytest.mark.parametrize("rule, formula", [
    ("proportional", lambda z, b: z + b * abs(z)),
    ("soft", lambda z, b: z + b * np.std(z, axis=-1, ddof=1, keepdims=True)),
    ("hard", lambda z, b: np.where(b > 0, z.max(-1, keepdims=True) + 1,
                                   np.where(b < 0, z.min(-1, keepdims=True) - 1, z))),
])
def test_edited_selections_follow_the_rule(qwen, rule, formula):
    boost = np.array([0, 0.4, 0, -0.7, 0.9, 0, 0, 0.1])
    hidden, router = hidden_states(1), find_routers(qwen)[2]
    with torch.inference_mode(), edit_routing(qwen, boosts={0: boost, 2: boost}, rule=rule):
        find_routers(qwen)[0](hidden)  # both edited routers are called
        _, weights, selected = router(hidden)
    expected_weights, expected = by_hand(
        router, hidden, lambda z: torch.tensor(formula(z.detach().numpy(), boost)))
    if rule == "hard":  # three experts are tied at the top: any two of them
        assert torch.isin(selected, torch.tensor([1, 4, 7])).all()
    else:
        assert torch.equal(selected, expected)
        torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)


def test_boosted_logits_by_hand():
    # of the mean 1, deviations -3, 1, 2 and 0: a variance of 14 / 3
    logits = torch.tensor([[-2.0, 2.0, 3.0, 1.0]], dtype=torch.float64)
    boost = torch.tensor([0.5, -0.5, 0.0, 1.0], dtype=torch.float64)
    std = (14 / 3) ** 0.5
    for rule, expected in [
            ("proportional", [-1, 1, 3, 2]),
            ("soft", [-2 + 0.5 * std, 2 - 0.5 * std, 3, 1 + std]),
            ("hard", [3.03, -2.02, 3, 3.03])]:  # a hundredth of 3 above it, of 2 below -2
        edited = common.boost_logits(logits, boost, rule)
        np.testing.assert_allclose(edited.numpy(), [expected], rtol=1e-12)
        assert edited[0, 2] == 3


def test_masked_routing_is_the_softmax_over_the_others(qwen):
    hidden, router = hidden_states(2), find_routers(qwen)[0]
    with torch.inference_mode(), edit_routing(qwen, masks={0: [1, 6]}, boosts={0: np.full(8, 0.3)}):
        _, weights, selected = router(hidden)

    def change(z):
        z = z + 0.3 * z.abs()
        z[:, [1, 6]] = -1e9
        return z

    expected_weights, expected = by_hand(router, hidden, change)
    assert torch.equal(selected, expected)
    torch.testing.assert_close(weights.double(), expected_weights, rtol=1e-5, atol=1e-6)


def test_a_bias_behind_the_scores_cannot_bring_a_masked_expert_back():
    model = build_deepseek()
    find_routers(model)[2].e_score_correction_bias[3] = 50.0
    assert (routing(model)[2][2] == 3).any(-1).all()
    with edit_routing(model, masks={2: [3]}):
        assert not (routing(model)[2][2] == 3).any()


def test_other_layers_routers_are_untouched(qwen):
    plain = routing(qwen)
    with edit_routing(qwen, masks={2: used_most(qwen, 2)}):
        edited = routing(qwen)
    assert torch.equal(edited[0][0], plain[0][0]) and torch.equal(edited[0][2], plain[0][2])
    assert not torch.equal(edited[2][2], plain[2][2])


def test_an_edit_inside_an_edit_is_refused(qwen):
    with edit_routing(qwen, masks={0: [1]}):
        with edit_routing(qwen, masks={2: [1]}):  # of another layer is fine
            routing(qwen)
        with pytest.raises(InputError, match="layer 0 is being edited already; give masks and"):
            with edit_routing(qwen, boosts={0: np.ones(8)}):
                pytest.fail("the block was entered")
        routing(qwen)
    assert untouched(qwen)


def test_a_zeroed_expert_is_selected_with_a_weight_of_zero_beside_masks_and_boosts(qwen):
    hidden, router = hidden_states(6), find_routers(qwen)[0]
    boost = np.eye(8)[2] * 0.7

    def change(z):
        z = z + torch.tensor(boost) * z.std(-1, keepdim=True)
        z[:, 1] = -1e9
        return z

    weights, selected = by_hand(router, hidden, change)
    with torch.inference_mode(), edit_routing(
            qwen, {0: [1]}, {0: boost}, "soft", False, zeroed={0: [2]}) as zeroed:
        _, found_weights, found = router(hidden)
    assert zeroed == {0: (selected == 2).sum() / selected.numel()} and zeroed[0] > 0
    assert torch.equal(found, selected) and (found == 2).any()
    torch.testing.assert_close(found_weights.double(), weights.masked_fill(selected == 2, 0),
                               rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_a_mask_is_ids_or_one_boolean_for_each_expert(qwen, kind):
    hidden, router = hidden_states(5), find_routers(qwen)[0]
    answers = []
    for mask in ([1, 2, 6], [False, True, True, False, False, False, True, False]):
        with torch.inference_mode(), edit_routing(qwen, masks={0: kind(mask)}):
            answers.append(router(hidden)[2])
    assert torch.equal(*answers)
    assert set(answers[0].unique().tolist()) == {0, 3, 4, 5, 7}


def test_it_works_in_bfloat16_and_changes_no_bit_at_zero():
    model = build_qwen().to(torch.bfloat16)
    plain = outputs(model)
    with pytest.warns(UserWarning, match="moved no selection"):
        with edit_routing(model, boosts={0: np.zeros(8)}):
            assert torch.equal(outputs(model), plain)
    with edit_routing(model, boosts={0: np.eye(8)[3]}, rule="hard"):
        assert (routing(model)[0][2] == 3).any(-1).all()


def test_it_works_in_generate():
    model = build_qwen()
    mask, seen = used_most(model, 0, 3), []
    arguments = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    plain = model.generate(IDS, **arguments)
    with edit_routing(model, masks={0: mask, 2: mask}), record_routing(
            model, lambda *call: seen.append(call[3])):
        edited = model.generate(IDS, **arguments)
    assert len(seen) == 2 * 6 and not torch.isin(torch.cat(seen), torch.tensor(mask)).any()
    assert edited.shape == plain.shape and torch.equal(model.generate(IDS, **arguments), plain)


# ----------------------------------------------------------------------------- it leaves no trace

@pytest.fixture
def second_fails(monkeypatch):
    """The set-up of the second edited router raises MemoryError; returns the routers tried."""
    set_up, tried = common.EditedForward.__init__, []

    def fails(forward, router, *args):
        tried.append(router)
        if len(tried) == 2:
            raise MemoryError("no room for the second")
        set_up(forward, router, *args)

    return lambda: monkeypatch.setattr(common.EditedForward, "__init__", fails) or tried


def test_an_edit_that_fails_half_way_shows_its_own_error_and_leaves_no_trace(qwen, second_fails):
    plain, tried = outputs(qwen), second_fails()
    with pytest.raises(MemoryError, match="^no room for the second$") as error:
        with edit_routing(qwen, masks={0: [0], 2: [0]}):
            pytest.fail("the block was entered")
    assert error.value.__context__ is None  # the first error, with nothing in its wake
    assert tried == list(find_routers(qwen).values())  # by then the first one had been edited
    assert untouched(qwen) and torch.equal(outputs(qwen), plain)


def test_an_edit_that_fails_half_way_leaves_the_edit_around_it(qwen, second_fails):
    a, b = used_most(qwen, 0, 2)
    with edit_routing(qwen, masks={0: [a]}):
        around = routing(qwen)[0][2]
        second_fails()
        with pytest.raises((MemoryError, InputError)):
            with edit_routing(qwen, masks={2: [b], 0: [b]}):
                pytest.fail("the block was entered")
        assert (around == b).any() and torch.equal(routing(qwen)[0][2], around)
    assert (routing(qwen)[0][2] == a).any() and untouched(qwen)


# ------------------------------------------------------------------------------- it proves itself

def test_moved_counts_the_selections_that_a_boost_changed(qwen):
    hidden, router = hidden_states(3, 50), find_routers(qwen)[0]
    before = router(hidden)[2]
    boost = 3 * (np.eye(8)[2] + np.eye(8)[5])
    with torch.inference_mode(), edit_routing(qwen, boosts={0: boost}) as moved:
        after = router(hidden)[2]
    new = [len(set(a) - set(b)) for a, b in zip(after.tolist(), before.tolist())]
    assert set(new) == {0, 1, 2} and moved == {0: sum(new) / 100}  # of 50 tokens' 2 selections


def test_boosts_that_move_nothing_say_so(qwen):
    with pytest.warns(UserWarning, match="moved no selection"):
        with edit_routing(qwen, boosts={0: np.full(8, 1e-12)}):
            routing(qwen)


def test_an_edit_that_no_router_ran_under_is_an_error(qwen):
    with pytest.raises(RuntimeError, match="layer 0: .*never called"):
        with edit_routing(qwen, masks={0: [1]}), record_routing(qwen, print):
            pass


def test_a_masked_expert_that_is_selected_is_an_error(qwen, monkeypatch):
    monkeypatch.setattr(common, "CHOICES", set())
    # no mask reaches the logits
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda self, *_: self)
    with pytest.raises(RuntimeError, match="layer 0: the experts .* were masked and yet selected"):
        with edit_routing(qwen, masks={0: used_most(qwen, 0, 4)}):
            find_routers(qwen)[0](torch.randn(50, 32))


def test_a_router_that_scores_in_another_way_is_an_error(qwen):
    router = find_routers(qwen)[0]
    router.forward = lambda hidden: (z := hidden @ router.weight.T, *z.topk(2))
    try:
        with pytest.raises(RuntimeError, match="cannot be edited"):
            with edit_routing(qwen, masks={0: [1]}):
                qwen(IDS)
    finally:
        del router.forward


@pytest.mark.parametrize("rule", common.RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_boost_gives_finite_logits(rule, dtype):
    logits, none = hidden_states(6).to(dtype), [False] * 32
    edit = common.LayerEdit(logits, none, none, [9e29, -9e29] + [0.0] * 30, rule, False)
    edited = edit.edited(logits)
    assert edited.isfinite().all() and edited.dtype == dtype
    assert torch.equal(edited[:, 2:], logits[:, 2:])


def test_ids_that_are_texts_are_refused():  # as the keys of JSON are
    with pytest.raises(InputError, match="each once, or booleans, not .'5', '9'."):
        common.as_mask(["5", "9"], 32)


@pytest.mark.parametrize("edit, message", [
    (dict(masks={1: [0]}), "layer 1 has no router; MoE layers are"),
    (dict(masks={0: [8]}), "experts 0 to 7"),
    (dict(masks={0: [-1]}), "experts 0 to 7"),
    (dict(zeroed={0: np.array([0, 1, 0, 0, 0, 1, 0, 0])}), "each once, or booleans"),
    (dict(boosts={0: np.full(8, 1e39)}), "8 finite numbers below 1e30"),
    (dict(masks={0: [True] * 2 + [False] * 5}), "8 booleans, not 7"),
    (dict(masks={0: range(7)}), "leaves fewer than top_k 2"),
    (dict(boosts={0: np.zeros(7)}), "8 finite numbers"),
    (dict(boosts={0: np.full(8, np.nan)}), "8 finite numbers"),
    (dict(boosts={0: np.zeros(8)}, rule="hardest"), "rule 'hardest'"),
])
def test_an_edit_that_does_not_fit_is_refused_before_anything_runs(qwen, edit, message):
    with pytest.raises(InputError, match=message):
        with edit_routing(qwen, **edit):
            pytest.fail("the block was entered")
    assert untouched(qwen)
