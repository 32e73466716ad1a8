"""ablate.py: which experts are masked, what their controls are, and when a language is hurt."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

import ablate
import analyze
import capture
import common
from ablate import (
    Cell, change_columns, check_masks, choose_experts, draw_controls, effect_columns, is_hurt,
    matched_control, plan_cells, print_verdicts, random_controls, routing_weights,
    run_cell, take_weight, verdict, weight_removed)
from common import InputError
from conftest import (
    make_routing, parse, prompt_nll_one_by_one, read_rows, read_table, run, save_selection)

# With two experts per language, aa keeps 0 and 1, bb 1 and 2, cc 0 and 3. The shares are .5 of aa
# and .5 of cc in expert 0; .4 of aa and .6 of bb in expert 1; 1 of bb in expert 2, 1 of cc in 3.
# Nobody keeps 4 and 5, which aa and cc use. Both layers are alike.
HAND = make_routing({
    "aa": [[60, 48, 0, 0, 47, 45]] * 2,
    "bb": [[0, 72, 70, 58, 0, 0]] * 2,
    "cc": [[60, 0, 0, 70, 40, 30]] * 2,
})


def mask_of(*experts, num_experts):
    """Return a mask (1, num_experts) of these experts."""
    return np.isin(range(num_experts), experts)[None]


def experts_of(mask):
    return np.flatnonzero(mask).tolist()


# -------------------------------------------------------------------------------- chosen experts

@pytest.mark.parametrize("arguments, expected", [
    (["--threshold", 0.58], {"aa": [], "bb": [1, 2], "cc": [3]}),
    (["--threshold", 0.45], {"aa": [0], "bb": [1, 2], "cc": [0, 3]}),
    (["--threshold", 0.58, "--targets", "cc"], {"cc": [3]}),
    (["--threshold", 0.58, "--experts", "shared"], {"shared": [0]}),
    (["--threshold", 0.62, "--experts", "shared"], {"shared": [0, 1]}),
])
def test_experts_are_chosen_by_their_shares(arguments, expected):
    experts = choose_experts(parse(ablate, "--experts-per-language", 2, *arguments), HAND)
    for layer in (0, 1):
        assert {target: experts_of(rows[layer]) for target, rows in experts.items()} == expected


def test_the_shares_of_two_targets_together_are_added():
    args = parse(ablate, "--experts-per-language", 2, "--threshold", 0.7, "--targets",
                 "aa+cc,aa+bb")
    experts = choose_experts(args, HAND)
    # .5 + .5 in expert 0 and 1 in expert 3; .4 + .6 in expert 1 and 1 in expert 2
    assert experts_of(experts["aa+cc"][0]) == [0, 3]
    assert experts_of(experts["aa+bb"][0]) == [1, 2]


def test_of_a_selection_what_is_above_0_is_masked(tmp_path):
    path = save_selection(tmp_path / "s.npz", [[0.5, 0, -1, 0, 2, 0], [0, -0.1, 0, 0, 0, 1]],
                          HAND.layers)
    experts = choose_experts(parse(ablate, "--selection", path), HAND)
    assert [experts_of(row) for row in experts["selection"]] == [[0, 4], [5]]


def test_a_language_without_a_dump_has_the_mean_routing_weights_of_the_others():
    weights = routing_weights(make_routing({"aa": [[3, 1]], "bb": [[10, 30]]}), ["bb", "xx"])
    assert list(weights) == ["bb", "xx"]
    assert weights["bb"].tolist() == [[0.25, 0.75]]
    assert weights["xx"].tolist() == [[0.5, 0.5]]


# -------------------------------------------------------------------------------------- controls

def test_random_controls_are_different_sets_of_as_many_experts_that_are_in_use():
    masked = np.zeros((2, 8), bool)
    masked[0, [1, 2, 3]] = True
    used = np.ones((2, 8), bool)
    used[0, 7] = False
    controls = random_controls(masked, used, 20, seed=7)
    assert controls.shape == (20, 2, 8)
    for control in controls:
        assert control.sum(1).tolist() == [3, 0]
        assert not (control & ~used).any()
    assert len({control.tobytes() for control in [masked, *controls]}) == 21
    assert (controls & masked).any()  # a masked expert may be one of three


def test_random_controls_are_uniform_among_all_other_sets():
    masked = mask_of(0, 1, num_experts=5)
    drawn = {}
    for seed in range(2000):
        (control,) = random_controls(masked, np.ones((1, 5), bool), 1, seed)
        pair = tuple(experts_of(control))
        drawn[pair] = drawn.get(pair, 0) + 1
    assert set(drawn) == set(itertools.combinations(range(5), 2)) - {(0, 1)}
    expected = 2000 / 9
    assert max(abs(times - expected) for times in drawn.values()) < 4 * np.sqrt(expected)


def test_there_are_no_random_controls_if_too_few_sets_exist():
    masked, used = mask_of(0, 1, num_experts=5), np.ones((1, 5), bool)
    assert len(random_controls(masked, used, 9, seed=0)) == 9  # all other pairs of five
    assert random_controls(masked, used, 10, seed=0).shape == (0, 1, 5)
    only_one = mask_of(3, num_experts=5)
    assert len(random_controls(masked, only_one, 1, seed=0)) == 0


def test_more_draws_keep_those_that_fewer_give():
    masked, used = mask_of(0, 1, num_experts=16), np.ones((1, 16), bool)
    many = random_controls(masked, used, 6, seed=3)
    assert (random_controls(masked, used, 2, seed=3) == many[:2]).all()


def test_matched_controls_carry_as_much_weight_to_a_tenth_by_other_experts():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(32, 0.5), size=3)
    masked = np.zeros((3, 32), bool)
    masked[0, np.argsort(weights[0])[-2:]] = True
    masked[2, :4] = True
    controls = [matched_control(masked, weights, 2, seed) for seed in range(20)]
    for control in controls:
        assert not (control & masked).any()
        assert not control[1].any()
        for layer in (0, 2):
            wanted = weights[layer, masked[layer]].sum()
            carried = weights[layer, control[layer]].sum()
            assert 0.9 * wanted <= carried <= 1.1 * wanted
    assert len({control.tobytes() for control in controls}) > 15


def test_experts_are_taken_in_order_unless_they_would_exceed_the_weight():
    weights = np.array([0.3, 0.2, 0.1, 0.4])
    # 3 carries .4; with 0 it would be .7, with 1 it would be .6; with 2 it is .5
    drawn, total = take_weight([3, 0, 1, 2], weights, wanted=0.5)
    assert drawn == [3, 2] and total == pytest.approx(0.5)
    drawn, total = take_weight([3, 2, 1], weights, wanted=0.42)  # .4 is enough
    assert drawn == [3] and total == 0.4


def test_matched_experts_are_drawn_in_proportion_to_their_weight():
    # Either 1 matches expert 0, or 2, 3 and 4 do. Expert 1 carries half of their weight, so it is
    # the first of them in half of the draws; in a quarter, if weight did not matter.
    weights = np.array([[0.4, 0.36, 0.12, 0.12, 0.12, 0, 0]])
    masked = mask_of(0, num_experts=7)
    drawn = [experts_of(matched_control(masked, weights, 2, seed)) for seed in range(400)]
    assert all(experts in ([1], [2, 3, 4]) for experts in drawn)
    assert 0.4 < np.mean([experts == [1] for experts in drawn]) < 0.6


def test_matched_experts_are_drawn_again_until_they_carry_the_weight():
    # 1 and 2 match expert 0. With 3 there is .82 of its weight, and then each other is too much.
    weights = np.array([[1, 0.5, 0.5, 0.32, 0, 0]])
    for seed in range(20):
        control = matched_control(mask_of(0, num_experts=6), weights, 2, seed)
        assert experts_of(control) == [1, 2]


def test_where_others_carry_too_little_the_most_is_taken_and_top_k_experts_are_left():
    weights = np.array([[0.7, 0.1, 0.1, 0.06, 0.04]])
    control = matched_control(mask_of(0, num_experts=5), weights, 2, seed=0)
    assert experts_of(control) == [1, 2, 3]  # 5 - 2, the largest of the others


def test_controls_are_never_outside_of_the_band():
    rng = np.random.default_rng(0)
    in_band = np.array([False, True, True, False])
    masked = np.zeros((4, 12), bool)
    masked[1, :3] = True
    weights = rng.dirichlet(np.ones(12), size=4)
    controls = draw_controls(masked, weights, in_band, 4, 2, "name")
    assert {condition: len(draws) for condition, draws in controls.items()} == {
        "random": 4, "matched": ablate.MATCHED_SEEDS}
    for draws in controls.values():
        assert (draws.any((0, 2)) == [False, True, False, False]).all()


def test_random_controls_are_of_experts_that_the_language_uses():
    weights = np.array([[0.3, 0.3, 0.2, 0.1, 0.1, 0, 0, 0]])
    masked = mask_of(0, 1, num_experts=8)
    controls = draw_controls(masked, weights, np.array([True]), 9, 2, "name")["random"]
    assert len(controls) == 9
    assert not controls[:, 0, 5:].any()


# ----------------------------------------------------------------------------------------- cells

def plan(*arguments, languages=("aa", "a")):
    """Return (experts, cells) of the hand-made routing in two bands; there is no dump of a."""
    args = parse(ablate, "--experts-per-language", 2, "--control-seeds", 2, "--threshold", 0.58,
                 *arguments)
    experts = choose_experts(args, HAND)
    bands = {"low": np.array([True, False]), "both": np.array([True, True])}
    return experts, plan_cells(args, experts, bands, routing_weights(HAND, languages), 2)


def test_every_language_is_masked_in_the_band_and_a_targets_own_has_controls():
    experts, cells = plan("--targets", "cc,aa+cc")
    assert [(cell.band, cell.target, cell.language) for cell in cells] == list(
        itertools.product(["low", "both"], ["cc", "aa+cc"], ["aa", "a"]))
    for cell in cells:
        expected = experts[cell.target].copy()
        if cell.band == "low":
            expected[1] = False
        assert (cell.masked == expected).all()
        conditions = {condition: len(draws) for condition, draws in cell.masks.items()}
        if (cell.target, cell.language) == ("aa+cc", "aa"):
            assert cell.has_controls
            assert conditions == {"masked": 1, "random": 2, "matched": ablate.MATCHED_SEEDS}
        else:
            assert not cell.has_controls
            assert conditions == {"masked": 1}


def test_what_all_languages_share_has_controls_in_every_language():
    _, cells = plan("--experts", "shared")
    assert [cell.language for cell in cells if cell.has_controls] == ["aa", "a"] * 2


def test_a_target_without_experts_has_no_controls():
    _, cells = plan("--targets", "aa")
    assert not any(cell.has_controls for cell in cells)


def test_no_two_cells_share_a_draw():
    """The cells differ in nothing but their names: the band's, the target's or the language's."""
    rng = np.random.default_rng(0)
    weights = dict.fromkeys(["en", "sw"], rng.dirichlet(np.ones(64), size=2))
    masked = np.tile(np.arange(64) < 6, (2, 1))
    experts = {"en+sw": masked, "sw+en": masked}
    bands = dict.fromkeys(["low", "late"], np.array([True, True]))
    args = SimpleNamespace(control_seeds=3)
    cells = plan_cells(args, experts, bands, weights, 2)
    for condition, num_draws in (("random", 3), ("matched", ablate.MATCHED_SEEDS)):
        drawn = [draw.tobytes() for cell in cells for draw in cell.masks[condition]]
        assert len(drawn) == len(set(drawn)) == 8 * num_draws


def test_masks_leave_top_k_experts_but_all_may_be_zeroed():
    cells = [Cell("low", "sw", "en", {"masked": mask_of(*experts, num_experts=4)[None]})
             for experts in ([], [0, 1, 2])]
    check_masks(cells, "reroute", top_k=1)
    check_masks(cells, "zero", top_k=2)
    with pytest.raises(InputError):
        check_masks(cells, "reroute", top_k=2)


class CountingEvaluator:
    """Scores examples by 1 and 2 nats, and one nat more for each expert that is masked."""

    def __init__(self, how):
        self.args = SimpleNamespace(experts="exclusive", how=how)
        self.calls = []

    def evaluate(self, language, name="unedited", edit=None, settings=None):
        num_masked = 0
        if edit:
            self.calls.append((edit, settings))
            (masks,) = edit.values()
            num_masked = sum(rows.sum() for rows in masks.values())
        return {"scores": {"prompt_nll": np.array([1.0, 2.0]) + num_masked}}


@pytest.mark.parametrize("how, argument", [("reroute", "masks"), ("zero", "zeroed")])
def test_a_cells_changes_are_scores_under_masks_of_decoder_layers_less_those_without(how, argument):
    masked = np.array([[False, True, True], [False, False, False], [True, False, False]])
    random = np.array([np.eye(3, dtype=bool), np.zeros((3, 3), bool)])
    evaluator = CountingEvaluator(how)
    cell = Cell("all", "en", "en", {"masked": masked[None], "random": random})
    changes = run_cell(evaluator, cell, layers=np.array([3, 5, 7]))
    assert changes["masked"]["prompt_nll"].tolist() == [[3, 3]]
    assert changes["random"]["prompt_nll"].tolist() == [[3, 3], [0, 0]]
    # A layer without experts has no edit, and a mask without experts is not run
    (of_masked, settings), (of_random, random_settings) = evaluator.calls
    assert {layer: rows.tolist() for layer, rows in of_masked[argument].items()} == {
        3: [False, True, True], 7: [True, False, False]}
    assert list(of_random[argument]) == [3, 5, 7]
    assert (settings["condition"], random_settings["condition"]) == ("masked", "random")


# --------------------------------------------------------------------------------- who is hurt

# Nats of four examples, on average 2 more under the mask; in the second, due to one example
EVEN, UNEVEN = [2, 2, 2, 2], [5, 1, 1, 1]
HURT_CASES = {
    "all four hold": (True, EVEN, [[1, 1, 1, 1], [1.5, 1.5, 1.5, 1.5]], [1, 1, 1, 1]),
    # The interval is of the difference to random draws; to the matched one it would hold 0
    "uneven": (True, UNEVEN, [[0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]], [1.9, 1.9, 1.9, 1.9]),
    "an example without a score": (True, [2, 2, 2, np.nan], [[1, 1, 1, 1]], [1, 1, 1, np.nan]),
    # One draw of five does more harm; the mean of the five surely does less
    "a random draw": (False, EVEN, [[1, 1, 1, 1]] * 4 + [[2.1, 2.1, 2.1, 2.1]], [1, 1, 1, 1]),
    "a matched draw": (False, EVEN, [[1, 1, 1, 1], [1.5, 1.5, 1.5, 1.5]], [3, 3, 3, 3]),
    # Worse than all, but worse than random ones in one example of four alone
    "interval of the difference": (False, UNEVEN, [[1, 1, 1, 1], [1.1, 1, 1, 1]], [0, 0, 0, 0]),
    # Worse than all, surely worse than random ones, which help, but perhaps no harm by itself
    "interval of the change": (False, [4, -1, -1, 1], [[-1, -6, -6, -4]], [-1, -1, -1, -1]),
    "one example": (False, [2], [[1], [1.5]], [1]),
}


@pytest.mark.parametrize("more_is_better", [False, True])
@pytest.mark.parametrize("expected, masked, random, matched", HURT_CASES.values(), ids=HURT_CASES)
def test_each_condition_alone_decides_that_a_language_is_not_hurt(
        expected, masked, random, matched, more_is_better):
    sign = 1 if more_is_better else -1
    nats = [np.array(values, float) for values in (masked, random, [matched])]
    harm = [-sign * values for values in nats]
    assert is_hurt(sign, *harm) is expected
    assert not is_hurt(-sign, *harm)


@pytest.mark.parametrize("planted, low, high", [(False, 0, 0.06), (True, 0.9, 1)])
def test_random_experts_are_as_rarely_hurt_as_meant_and_planted_effects_are_found(
        planted, low, high):
    """Experts have very unequal effects, and examples are noisy; 1 row in 20 may be hurt."""
    rng = np.random.default_rng(0)
    used = np.ones((1, 24), bool)
    hurt = []
    for trial in range(50 if planted else 300):
        effects = rng.lognormal(0, 1.5, 24)
        masked = rng.permutation(24)[None] < 4
        random = random_controls(masked, used, 19, trial)
        matched = random_controls(masked, used, 5, [trial, 1])  # as exchangeable as random ones
        means = np.array([effects[mask[0]].sum() for mask in (masked, *random, *matched)])
        if planted:
            means[0] = means[1:].max() + 4 * means[1:20].std()
        scores = means[:, None] + rng.normal(0, 0.3, (25, 12))
        hurt.append(is_hurt(-1, scores[0], scores[1:20], scores[20:]))
    assert low <= np.mean(hurt) <= high


# ---------------------------------------------------------------------------------------- tables

def test_the_weight_removed_is_the_mean_over_layers_with_masked_experts():
    masked = np.array([[True, True, False], [False, False, False], [True, False, False]])
    weights = np.array([[0.5, 0.1, 0.4], [0.2, 0.2, 0.6], [0.2, 0.3, 0.5]])
    control = np.array([[False, False, True], [False, False, False], [False, True, False]])
    assert weight_removed(masked, weights, masked) == pytest.approx((0.6 + 0.2) / 2)
    both = weight_removed(np.array([masked, control]), weights, masked)
    assert both.tolist() == pytest.approx([0.4, 0.35])


WEIGHTS = np.array([[0.4, 0.37, 0.13, 0.1]])
MATCHED, LIGHTER = 1, 2  # an expert that carries nine tenths of expert 0's weight, and one less


def run_by_hand(language, masked, random=None, matched=None, matched_expert=MATCHED, metric="m"):
    """Return the Cell of target sw in a language: expert 0 is masked, with these changes."""
    masks = {"masked": mask_of(0, num_experts=4)[None]}
    changes = {"masked": {metric: np.array([masked], float)}}
    if random is not None:
        masks["random"] = np.tile(mask_of(3, num_experts=4), (len(random), 1, 1))
        masks["matched"] = np.tile(mask_of(matched_expert, num_experts=4), (len(matched), 1, 1))
        changes["random"] = {metric: np.array(random, float).reshape(-1, len(masked))}
        changes["matched"] = {metric: np.array(matched, float)}
    return Cell("low", "sw", language, masks, changes)


@pytest.mark.parametrize("metric, sign", [
    ("prompt_nll", 1), ("answer_nll", 1), ("accuracy", -1), ("language", -1)])
def test_harm_is_more_nats_and_less_of_every_other_score(metric, sign):
    harm = sign * np.array([2.0, 2.0, 3.0])
    controls = {"random": [0.1 * harm], "matched": [0.2 * harm], "metric": metric}
    assert verdict(metric, run_by_hand("sw", harm, **controls), WEIGHTS) == "hurt"
    assert verdict(metric, run_by_hand("sw", -harm, **controls), WEIGHTS) == "not hurt"


def test_a_verdict_says_if_matched_controls_carry_less_than_what_is_masked():
    controls = {"random": [[0, 0]], "matched": [[0, 0]], "metric": "prompt_nll"}
    cell = run_by_hand("sw", [2, 2], **controls, matched_expert=LIGHTER)
    assert verdict("prompt_nll", cell, WEIGHTS) == "hurt; matched carry less"


def test_without_random_controls_there_is_no_verdict():
    cell = run_by_hand("sw", [2, 2], random=[], matched=[[0, 0]], metric="prompt_nll")
    assert verdict("prompt_nll", cell, WEIGHTS).startswith("none")


def test_the_table_of_effects_has_one_row_for_a_language_by_hand():
    cells = [
        run_by_hand("en", [0, 0.2]),
        run_by_hand("sw", [1, 3], random=[[0, 1], [0, 0.5]], matched=[[0.1, 0.1], [0.4, 0.2]]),
        run_by_hand("zh", [0.4, 0.6]),
    ]
    columns = effect_columns("m", cells, dict.fromkeys(["en", "sw", "zh"], WEIGHTS))
    (interval,) = columns.pop("change [95 % interval]")
    assert interval == "+2.000 [+1.000 +3.000]"
    assert columns == {
        "language": ["sw"],
        "experts": [1],
        "weight removed": [0.4],
        "others": ["+0.300"],           # the mean of .1 and .5
        "random": ["0.250..0.500"],
        "matched": ["0.100..0.300"],
        "verdict": ["not hurt"],        # m is no number of nats, so that more is better
    }


def test_the_table_of_changes_has_languages_by_targets():
    cells = [run_by_hand("en", [0, 0.2]), run_by_hand("sw", [1, 3])]
    unmasked = {"en": {"scores": {"m": [1, 2]}}, "sw": {"scores": {"m": [3, np.nan]}}}
    assert change_columns("m", cells, unmasked) == {
        "language": ["en", "sw"], "unmasked": [1.5, 3], "sw": ["+0.100", "+2.000"]}


def test_verdicts_are_counted_beside_those_that_chance_gives(capsys):
    print_verdicts(["hurt", "hurt; matched carry less", "none: ..."] + ["not hurt"] * 28, 19)
    printed = capsys.readouterr().out
    assert "2 of 30 rows" in printed
    assert "1.5" in printed  # one in 20


# ------------------------------------------------------------------------------------ whole runs

@pytest.fixture(scope="module")
def ablation(dumps, tmp_path_factory):
    """A run with two evaluated languages, two targets and two bands."""
    out = tmp_path_factory.mktemp("results") / "ablate.jsonl"
    num_loads = 0

    def load_weights(*args, load=common.load_weights):
        nonlocal num_loads
        num_loads += 1
        return load(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "MATCHED_SEEDS", 3)
        patch.setattr(common, "load_weights", load_weights)
        printed = run(ablate, "--routing", *dumps, "--languages", "en,sw", "--targets", "sw,en+zh",
                      "--bands", "low=0-2", "late=7-7", "--limit", 6, "--control-seeds", 2,
                      "--metrics", "prompt_nll", "answer_nll", "--out", out)
    rows = {(row["cell"], row["settings"]["language"]): row for row in read_rows(out)}
    return SimpleNamespace(out=out, printed=printed, rows=rows, num_loads=num_loads)


def test_every_language_is_scored_under_each_mask_and_controls_in_its_own(ablation):
    assert ablation.num_loads == 1
    masks = {}  # {(condition, draw): {(band, target, language): number of experts}}
    for row in ablation.rows.values():
        settings = row["settings"]
        assert row["prompts"]["limit"] == len(row["scores"]["prompt_nll"]) == 6
        if row["cell"] != "unedited":
            cell = settings["band"], settings["target"], settings["language"]
            draw = settings["condition"], settings["draw"]
            masks.setdefault(draw, {})[cell] = row["experts"]
    assert list(ablation.rows)[:2] == [("unedited", "en"), ("unedited", "sw")]
    assert len(read_rows(ablation.out)) == len(ablation.rows)
    masked = masks.pop(("masked", 0))
    assert list(masked) == list(
        itertools.product(["low", "late"], ["sw", "en+zh"], ["en", "sw"]))
    own = {cell: experts for cell, experts in masked.items() if cell[2] in cell[1].split("+")}
    assert set(masks) == {("random", 0), ("random", 1),
                          ("matched", 0), ("matched", 1), ("matched", 2)}
    for (condition, _), cells in masks.items():
        assert cells.keys() == own.keys()
        if condition == "random":
            assert cells == own  # as many experts in each layer


def test_scores_are_those_of_an_edit_by_hand(ablation, dumps, tiny):
    routing = analyze.load_routing(dumps)  # of en, sw, zh
    exclusive = analyze.language_shares(routing.activation_frequency, 4)[1] > 0.4
    masks = {layer: experts_of(exclusive[layer]) for layer in (0, 1, 2)}
    row = ablation.rows["low-sw-masked0", "sw"]
    assert row["experts"] == {str(layer): len(ids) for layer, ids in masks.items() if ids}
    expected = prompt_nll_one_by_one(tiny, "sw", 6, masks=masks)
    assert row["scores"]["prompt_nll"] == pytest.approx(expected, abs=1e-5)
    unmasked = ablation.rows["unedited", "sw"]["scores"]["prompt_nll"]
    assert unmasked == pytest.approx(prompt_nll_one_by_one(tiny, "sw", 6), abs=1e-5)
    assert np.abs(np.subtract(expected, unmasked)).max() > 0.01
    weights = routing.weight_sums[1]
    removed = np.mean([weights[layer, ids].sum() / weights[layer].sum()
                       for layer, ids in masks.items() if ids])
    cells = read_table(ablation.printed, "prompt_nll, low", "controls")["sw"]
    assert cells["experts"] == str(sum(map(len, masks.values())))
    assert cells["weight removed"] == f"{removed:.3f}"


def change(ablation, metric, name, language):
    scores = [np.mean(ablation.rows[cell, language]["scores"][metric])
              for cell in (name, "unedited")]
    return scores[0] - scores[1]


@pytest.mark.parametrize("metric", ["prompt_nll", "answer_nll"])
@pytest.mark.parametrize("band, layers", [("low", "0-2"), ("late", "7")])
def test_the_printed_tables_hold_the_changes_of_the_rows(ablation, metric, band, layers):
    title = f"{metric}, {band} (layers {layers})"
    effects = read_table(ablation.printed, title, "controls")
    changes = read_table(ablation.printed, title, "each target")
    assert list(effects) == ["sw", "en+zh in en"]
    for label, target, language, other in (
            ("sw", "sw", "sw", "en"), ("en+zh in en", "en+zh", "en", "sw")):
        def range_of(condition, num_draws):
            draws = [change(ablation, metric, f"{band}-{target}-{condition}{draw}", language)
                     for draw in range(num_draws)]
            return f"{min(draws):.3f}..{max(draws):.3f}"

        own = change(ablation, metric, f"{band}-{target}-masked0", language)
        others = change(ablation, metric, f"{band}-{target}-masked0", other)
        assert effects[label]["change [95 % interval]"].startswith(f"{own:+.3f} [")
        assert effects[label]["others"] == f"{others:+.3f}"
        assert effects[label]["random"] == range_of("random", 2)
        assert effects[label]["matched"] == range_of("matched", 3)
        assert changes[language][target] == f"{own:+.3f}"
        assert changes[other][target] == f"{others:+.3f}"
        unmasked = np.mean(ablation.rows["unedited", language]["scores"][metric])
        assert changes[language]["unmasked"] == f"{unmasked:.3f}"


def test_zeroed_experts_are_selected_with_a_weight_of_0(dumps, tiny, tmp_path, monkeypatch):
    """An expert that Chinese selects often and English hardly ever."""
    monkeypatch.setattr(ablate, "MATCHED_SEEDS", 1)
    routing = analyze.load_routing(dumps)
    english, _, chinese = routing.counts
    rarest = np.where(chinese > 150, english, 10**6).argmin()
    layer, expert = map(int, np.unravel_index(rarest, english.shape))
    selection = np.zeros(english.shape)
    selection[layer, expert] = 1
    path = save_selection(tmp_path / "s.npz", selection, routing.layers)
    out = tmp_path / "r.jsonl"
    printed = run(ablate, "--routing", *dumps, "--selection", path, "--how", "zero", "--languages",
                  "en,zh", "--limit", 3, "--control-seeds", 1, "--out", out)
    rows = {(row["cell"], row["settings"]["language"]): row for row in read_rows(out)}
    assert list(read_table(printed, "controls")) == ["selection in en", "selection in zh"]
    expected = prompt_nll_one_by_one(tiny, "zh", 3, zeroed={layer: [expert]})
    row = rows["selected-selection-masked0", "zh"]  # the band is that of the selection
    assert row["scores"]["prompt_nll"] == pytest.approx(expected, abs=1e-5)
    assert list(row["zeroed"]) == [str(layer)] and row["zeroed"][str(layer)] > 0
    assert rows["unedited", "zh"]["scores"] != row["scores"]
    # No prompt in English selects it, which is printed
    edited = [row for row in rows.values() if "zeroed" in row]
    unused = [row for row in edited if row["zeroed"] == {str(layer): 0}]
    assert rows["selected-selection-masked0", "en"] in unused
    assert f"{len(unused)} of {len(edited)} rows" in printed


def test_responses_are_saved_and_captured_again_behind_their_prompts(dumps, tmp_path):
    run(ablate, "--routing", *dumps, "--languages", "en", "--targets", "en", "--bands", "7-7",
        "--limit", 2, "--control-seeds", 1, "--metrics", "accuracy", "--out", tmp_path / "r.jsonl")
    masked = read_rows(tmp_path / "r.jsonl")[1]
    predictions = read_rows(masked["predictions"])
    assert "=" in predictions[0]["response"]
    assert [row["score"] for row in predictions] == masked["scores"]["accuracy"]
    data = masked["predictions"].replace("en.jsonl", "{lang}.jsonl")
    run(capture, "--data", data, "--languages", "en", "--out", tmp_path)
    counts = {segment: analyze.load_routing(tmp_path / "en.npz", segment).counts
              for segment in ("prompt", "response", "all")}
    assert (counts["prompt"] + counts["response"] == counts["all"]).all()
    assert counts["response"].any()


@pytest.mark.parametrize("name, is_warned", [("eval", False), ("routing", True)])
def test_experts_that_are_judged_by_the_data_they_were_chosen_on_are_warned_of(
        dumps, capsys, tmp_path, name, is_warned):
    args = parse(ablate, "--languages", "sw", "--data", f"tests/data/{name}_{{lang}}.tsv",
                 "--out", tmp_path / "r.jsonl")
    common.Evaluator(args, analyze.load_routing(dumps))
    assert ("warning" in capsys.readouterr().out) == is_warned
