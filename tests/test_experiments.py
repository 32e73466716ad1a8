"""ablate.py and steer.py: their steps by hand, and one whole run of each."""

import contextlib
import io
import itertools
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import ablate
import analyze
import capture
import common
import steer

LANGUAGES = ["en", "sw", "zh"]


@contextlib.contextmanager
def command_line(script, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        yield patch


def run(script, *arguments):
    """What a script prints."""
    with command_line(script, *arguments), contextlib.redirect_stdout(io.StringIO()) as printed:
        script.main()
    return printed.getvalue()


def parsed(script, *arguments):
    with command_line(script, *arguments):
        return script.parse_arguments()


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def numbers(text):
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d{3}", text)]


def lines_of(printed, *title):
    """{first word: figures of each such line} of the table with all of a title's parts in it."""
    table, found = next(t for t in printed.split("\n\n") if all(part in t for part in title)), {}
    for line in table.split("\n"):
        found.setdefault(line.split(" ")[0], []).append(numbers(line))
    return found


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    run(capture, "--languages", ",".join(LANGUAGES), "--limit", 60, "--out", folder)
    return [str(folder / f"{language}.npz") for language in LANGUAGES]


@pytest.fixture(scope="module")
def tiny():
    return common.load_model("tests/tiny_moe", device="cpu")


def dump_of(language, counts, num_tokens=100):
    """One as analyze.load_languages returns it."""
    counts = np.array(counts)
    return {"language": language, "counts": counts, "num_tokens": num_tokens, "path": [language],
            "num_experts": counts.shape[1], "layers": np.arange(len(counts)), "weights": counts,
            "top_k": 2}


# --------------------------------------------------------------------------- ablate: which experts

# with two experts kept each, aa has the shares .5 and .4 in experts 0 and 1, bb .6 and 1 in 1 and
# 2, cc .5 and 1 in 0 and 3; no one keeps 4 and 5, which aa alone uses
HAND = [dump_of("aa", [[60, 40, 0, 0, 30, 20]] * 2), dump_of("bb", [[0, 60, 40, 0, 0, 0]] * 2),
        dump_of("cc", [[60, 0, 0, 50, 0, 0]] * 2)]


@pytest.mark.parametrize("arguments, chosen", [
    (["--threshold", 0.58], {"aa": [], "bb": [1, 2], "cc": [3]}),
    (["--threshold", 0.45], {"aa": [0], "bb": [1, 2], "cc": [0, 3]}),
    (["--threshold", 0.58, "--targets", "cc,aa+cc,aa+bb"],  # shares are summed: .5 + .5, .4 + .6
     {"cc": [3], "aa+cc": [0, 3], "aa+bb": [1, 2]}),
    (["--threshold", 0.7, "--targets", "aa+bb"], {"aa+bb": [1, 2]}),
    (["--threshold", 0.58, "--experts", "shared"], {"shared": [0]}),
    (["--threshold", 0.62, "--experts", "shared"], {"shared": [0, 1]}),
])
def test_experts_are_chosen_by_the_targets_shares(arguments, chosen):
    found = ablate.choose_experts(parsed(ablate, "--experts-per-language", 2, *arguments), HAND)
    assert {target: np.flatnonzero(rows[0]).tolist() for target, rows in found.items()} == chosen
    assert all((rows[0] == rows[1]).all() for rows in found.values())


def test_a_constant_may_be_a_whole_number_or_a_single_one(monkeypatch):
    for script in (analyze, ablate, steer):
        monkeypatch.setattr(script, "EXPERTS_PER_LANGUAGE", 4)
        assert parsed(script, "--experts-per-language", ".3").experts_per_language == 0.3
    monkeypatch.setattr(analyze, "TAU", 0)
    assert parsed(analyze, "--contrast", "A", "B", "--tau", "0.5").tau == 0.5
    monkeypatch.setattr(steer, "LAMBDAS", 0.5)
    assert parsed(steer).lambdas == [0.5]
    monkeypatch.setattr(ablate, "METRICS", "prompt_nll")  # a text, and no list of one
    with pytest.raises(common.InputError, match="METRICS prompt_nll are not some of"):
        common.evaluation_settings(parsed(ablate), None, None, None)


@pytest.mark.parametrize("targets", ["fr", "aa,fr", "aa+fr"])
def test_a_target_without_routing_is_told_how_to_capture_it(targets):
    with pytest.raises(analyze.InputError, match="'fr'.*run: python capture.py --languages fr"):
        ablate.choose_experts(parsed(ablate, "--targets", targets), HAND)


def test_random_controls_are_different_sets_of_as_many_experts_in_use():
    masked = np.zeros((2, 8), bool)
    masked[0, [1, 2, 3]] = True
    used = np.array([[1, 1, 1, 1, 1, 1, 1, 0], [1] * 8], bool)
    draws = ablate.random_controls(masked, used, 20, 7)
    for control in draws:
        assert control.sum(1).tolist() == [3, 0] and not (control & ~used).any()
    assert len({control.tobytes() for control in [masked, *draws]}) == 21
    assert any((control & masked).any() for control in draws)  # masked experts may be in them
    again = ablate.random_controls(masked, used, 20, 7)
    assert all((a == b).all() for a, b in zip(draws, again))


def test_random_controls_are_uniform_and_none_where_there_are_too_few():
    masked, used = np.array([[True, True, False, False, False]]), np.ones((1, 5), bool)
    times = {}
    for seed in range(2000):  # one of the nine other pairs
        control, = ablate.random_controls(masked, used, 1, seed)
        times[tuple(np.flatnonzero(control[0]))] = times.get(tuple(np.flatnonzero(control[0])), 0) + 1
    assert len(times) == 9 and (0, 1) not in times
    assert max(abs(n - 2000 / 9) for n in times.values()) < 4 * np.sqrt(2000 / 9)
    assert len(ablate.random_controls(masked, used, 9, 0)) == 9  # all there are
    assert ablate.random_controls(masked, used, 10, 0) == []


def test_a_matched_control_carries_as_much_weight_in_every_layer_by_other_experts():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(32, 0.5), size=3)
    masked = np.zeros((3, 32), bool)
    masked[0, np.argsort(share[0])[-2:]], masked[2, :4] = True, True
    controls = [ablate.matched_control(masked, share, 2, [seed]) for seed in range(20)]
    for control in controls:
        assert not (control & masked).any() and not control[1].any()
        for layer in (0, 2):
            removed = ablate.part_removed(control[[layer]], share[[layer]], masked[[layer]])
            assert removed == pytest.approx(share[layer, masked[layer]].sum(), rel=0.1001)
    assert len({control.tobytes() for control in controls}) > 15


def test_where_others_do_not_carry_as_much_a_matched_control_carries_what_it_can():
    share, masked = np.array([[0.7, 0.1, 0.1, 0.06, 0.04]]), np.array([[True] + [False] * 4])
    control = ablate.matched_control(masked, share, 2, [0])
    assert control[0].sum() == 3 and not control[0, 0]  # two must stay
    assert ablate.part_removed(control, share, masked) > 0.19


@pytest.mark.parametrize("planted, expected", [(0, (0.005, 0.06)), (4, (0.9, 1))])
def test_random_experts_are_rarely_hurt_and_planted_effects_often(planted, expected):
    """Every expert has an effect of its own, very unequal ones; problems add noise."""
    rng, experts, problems, trials = np.random.default_rng(0), 24, 40, 2000 if not planted else 200
    used, hurt = np.ones((1, experts), bool), 0
    for trial in range(trials):
        effects = rng.lognormal(0, 1.5, experts)
        masked = rng.permutation(experts)[None] < 4
        random = ablate.random_controls(masked, used, 19, trial)
        matched = ablate.random_controls(masked, used, 5, [trial, 1])  # no less exchangeable
        means = np.array([effects[mask[0]].sum() for mask in (masked, *random, *matched)])
        means[0] += planted * means[1:20].std() + (means[20:].max() - means[0]) * (planted > 0)
        scores = means[:, None] + rng.normal(0, 0.3, (len(means), problems))
        hurt += ablate.is_hurt(-1, scores[0], scores[1:20], scores[20:])
    low, high = expected
    assert low <= hurt / trials <= high


def planned(*arguments, languages=("aa", "xx")):
    args = parsed(ablate, "--experts-per-language", 2, "--control-seeds", 2, "--threshold", 0.58,
                  *arguments)
    chosen = ablate.choose_experts(args, HAND)
    bands = {"low": np.array([True, False]), "both": np.array([True, True])}
    shares = ablate.routing_shares(HAND, languages)
    return chosen, ablate.plan_cells(args, chosen, bands, shares, 2)


def test_the_plan_masks_in_the_band_alone_and_controls_the_targets_own_languages():
    chosen, plan = planned("--targets", "cc,aa+cc")
    assert set(plan) == set(itertools.product(["low", "both"], ["cc", "aa+cc"], ["aa", "xx"]))
    for (band, target, language), cell in plan.items():
        masked, = cell["masked"]
        assert (masked[0] == chosen[target][0]).all()
        assert (masked[1] == chosen[target][1]).all() if band == "both" else not masked[1].any()
        if (target, language) != ("aa+cc", "aa"):
            assert list(cell) == ["masked"]
            continue
        assert {kind: len(masks) for kind, masks in cell.items()} == {
            "masked": 1, "random": 2, "matched": 5}
        for control in cell["random"]:  # two are masked; aa uses four
            assert control.sum(1).tolist() == [2, 2 if band == "both" else 0]
            assert not control[:, [2, 3]].any()
        assert not any((control & masked).any() for control in cell["matched"])


def test_without_matched_draws_the_verdict_is_by_the_random_ones(monkeypatch):
    monkeypatch.setattr(ablate, "MATCHED_SEEDS", 0)
    _, plan = planned("--targets", "aa+cc", languages=["aa"])
    (masked, random), = [cell.values() for (band, *_), cell in plan.items() if band == "low"]
    cell = {"masked": (masked, np.full((1, 9), 1.0) + np.arange(9) / 9), "random": (
        random, np.zeros((2, 9)))}
    share = np.where(masked[0], 0.4, 0.05)  # the random ones carry less
    rows = ablate.control_rows("aa", cell, share, "prompt_nll")
    assert [row["verdict"] for row in rows] == ["hurt", ""]


def test_what_all_languages_share_has_controls_in_every_language():
    _, plan = planned("--experts", "shared")
    for (band, target, language), cell in plan.items():
        assert target == "shared" and cell["masked"][0][0].nonzero()[0].tolist() == [0]
        assert len(cell) == 3  # also in xx, which has no dump: of experts that any language uses
    assert {language for _, _, language in plan} == {"aa", "xx"}


@pytest.mark.parametrize("how, kind", [("reroute", "masks"), ("zero", "zeroed")])
def test_masks_name_decoder_layers_and_leave_out_those_without_experts(how, kind):
    mask = np.array([[False, True, True], [False, False, False], [True, False, False]])
    edits, args = [], SimpleNamespace(experts="exclusive", how=how)
    experiment = SimpleNamespace(args=args, cell=lambda *_, **edit: edits.append(edit) or {"x": np.ones(1)})
    ablate.run_cells(experiment, {("all", "aa", "aa"): {"masked": mask[None]}}, "x",
                     {"all": np.array([True] * 3)}, np.array([3, 5, 7]))
    unmasked, edit = edits
    assert not unmasked and list(edit) == [kind]
    assert {layer: rows.tolist() for layer, rows in edit[kind].items()} == {
        3: [False, True, True], 7: [True, False, False]}


# in nats, 2 is masked: what is worse than 2 beats it
PLAIN, NOISY = [2.0, 2.0, 2.0, 2.0], [5.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("more_is_better", [False, True])
@pytest.mark.parametrize("hurt, masked, random, matched", [
    (True, PLAIN, [[1, 1, 1, 1], [1.5, 1.5, 1.5, 1.5]], [1, 1, 1, 1]),
    # one draw of five is as bad, though the interval over draws leaves out 0
    (False, PLAIN, [[1, 1, 1, 1]] * 4 + [[2.1, 2.1, 2.1, 2.1]], [1, 1, 1, 1]),
    # worse than every draw, by one example of four
    (False, NOISY, [[1, 1, 1, 1], [1.1, 1, 1, 1]], [0, 0, 0, 0]),
    (True, NOISY, [[0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]], [1, 1, 1, 1]),  # the interval is of random
    (False, PLAIN, [[1, 1, 1, 1], [1.5, 1.5, 1.5, 1.5]], [3, 3, 3, 3]),  # they do worse, surely
    (False, PLAIN, [[3, 3, 3, 3], [3.5, 3.5, 3.5, 3.5]], [3, 3, 3, 3]),  # masking helps
])
def test_hurt_is_worse_than_every_draw_and_than_random_ones_beyond_chance(
        hurt, masked, random, matched, more_is_better):
    sign = 1 if more_is_better else -1
    masked, random, matched = (-sign * np.array(x, float) for x in (masked, random, [matched]))
    assert ablate.is_hurt(sign, masked, random, matched) is hurt
    if hurt:
        assert not ablate.is_hurt(-sign, masked, random, matched)


# ------------------------------------------------------------------- steer: which experts, how much

def test_a_steered_band_may_have_a_name():
    share = np.ones((4, 2))
    assert list(steer.in_band(share, np.arange(4), "middle=1-2")) == [1, 2]


def test_coefficients_may_be_lists():
    assert steer.scaled({3: [0, 1, 2]}, 0.5)[3].tolist() == [0, 0.5, 1]


def test_coefficients_are_the_first_sources_share_in_what_the_sources_share():
    dumps = [dump_of("aa", [[60, 30, 10, 0], [50, 50, 0, 0]]), dump_of("xx", [[0, 0, 50, 50]] * 2),
             dump_of("bb", [[40, 0, 10, 50], [0, 50, 50, 0]])]

    def coefficients(sources, band, threshold):
        found = steer.steering_coefficients(dumps, sources, band, 2, threshold)
        return {layer: c.tolist() for layer, c in found.items()}

    # layer 0: aa keeps 0 and 1, bb 3 and 0, so that 0 has the shares .6 and .4; layer 1: 1, .5 each
    assert coefficients(["aa", "bb"], "0-1", 0.7) == {0: [0.6, 0, 0, 0], 1: [0, 0.5, 0, 0]}
    assert coefficients(["bb", "aa"], "0-0", 0.7) == {0: [0.4, 0, 0, 0]}
    assert coefficients(["aa", "bb"], "0-1", 0.55) == {1: [0, 0.5, 0, 0]}
    with pytest.raises(common.InputError, match="no expert to boost .* 0-0; .*raise --threshold"):
        coefficients(["aa", "bb"], "0-0", 0.55)
    with pytest.raises(analyze.InputError, match="'fr'.*run: python capture.py --languages fr"):
        coefficients(["aa", "fr"], "0-1", 0.7)


@pytest.mark.parametrize("layers, band", [(48, range(10, 40)), (8, range(1, 7)), (1, [0])])
def test_the_default_band_is_the_papers_part_of_the_depth(layers, band):
    dumps = [dump_of(language, [[50, 50, 0, 0]] * layers) for language in ("aa", "bb")]
    assert list(steer.steering_coefficients(dumps, ["aa", "bb"])) == list(band)


def test_a_selection_is_boosted_by_its_signs_and_stays_in_its_band(monkeypatch):
    selection, layers = np.array([[0.5, 0, 0], [0, -0.6, 0.7], [0, 0, 0]]), np.array([1, 2, 3])
    monkeypatch.setattr(analyze, "load_selection", lambda *_: selection)
    args, dumps = SimpleNamespace(selection="s.json"), [{"layers": layers}]
    found = steer.choose_coefficients(args, dumps, [], None)
    assert {layer: c.tolist() for layer, c in found.items()} == {1: [1, 0, 0], 2: [0, -1, 1]}
    assert list(steer.choose_coefficients(args, dumps, [], "2-3")) == [2]
    with pytest.raises(common.InputError, match="no expert to boost in the layers 3-3"):
        steer.choose_coefficients(args, dumps, [], "3-3")


def test_random_coefficients_are_the_same_ones_on_other_experts():
    coefficients = {3: np.array([0.6, 0, 0, 0.5, 0, 0, 0, 0.2])}
    draws = [steer.random_coefficients(coefficients, seed)[3] for seed in range(10)]
    assert all(sorted(d) == sorted(coefficients[3]) for d in draws)
    assert len({d.tobytes() for d in draws}) > 5
    assert (steer.random_coefficients(coefficients, 4)[3] == draws[4]).all()


def arms(*scores):
    """As run_arms returns them, of {language: scores} unsteered and under each arm."""
    return {l: np.array([each[l] for each in scores]) for l in scores[0]}


def effects(metric, *scores, part=slice(None)):
    return steer.effect_rows(metric, arms(*scores), part)


def test_the_best_lambda_has_the_most_gain_on_average_over_languages():
    def interleaved(*values):
        return np.stack([values, np.add(values, 9)], 1).ravel()  # even examples are looked at

    base = {"aa": interleaved(1, 1), "bb": interleaved(2, 2, 2, np.nan)}
    steered = {  # means over languages, not answers: +.5 and -.3; -.4 and 0; 0 and +.5
        0.1: {"aa": interleaved(1.5, 1.5), "bb": interleaved(1.7, 1.7, 1.7, np.nan)},
        0.3: {"aa": interleaved(0.6, 0.6), "bb": interleaved(2, 2, 2, np.nan)},
        -1.0: {"aa": interleaved(1, 1), "bb": interleaved(2.5, 2, 3, np.nan)}}
    for cells in (steered[0.1], steered[0.3]):
        cells["aa"][1::2] += 100  # and odd ones are not

    def gains(metric):
        return steer.lambda_gains(arms(base, *steered.values()), list(steered), metric)

    assert gains("accuracy") == pytest.approx({0.1: 0.1, 0.3: -0.2, -1.0: 0.25})
    assert gains("prompt_nll") == pytest.approx({0.1: -0.1, 0.3: 0.2, -1.0: -0.25})  # less is better
    alone = arms({"aa": base["aa"]}, {"aa": base["aa"] + np.tile([0, 1], 2)})
    assert steer.lambda_gains(alone, [0.1], "accuracy") == {0.1: 0.5}  # a single one is judged by all


def test_an_effect_by_hand():
    answers = {"aa": np.array([0, 0, 1, 1])}, {"aa": np.array([1, 0, 1, 1])}
    draws = [{"aa": np.array([0, 0, 1, 0])}, {"aa": np.array([1, 1, 1, 1])}]
    found, = effects("accuracy", *answers, *draws)
    assert (found["before"], found["after"], found["change"]) == (0.5, 0.75, 0.25)
    assert (found["random"], found["least"], found["most"]) == (0.125, -0.25, 0.5)
    assert (found["fixed"], found["broken"], found["p"]) == (1, 0, 1)
    odd, = effects("prompt_nll", *answers, part=slice(1, None, 2))
    assert (odd["before"], odd["after"]) == (0.5, 0.5) and not odd.keys() & {"random", "p"}


def test_an_effect_leaves_out_examples_without_a_score():
    before = np.array([3.0, 1.0, np.nan, 7.0])

    def effect(after, *draws):
        return effects("prompt_nll", *({"aa": each} for each in (before, after, *draws)))[0]

    constant = effect(before + 0.5)
    assert [constant[key] for key in ("change", "low", "high")] == pytest.approx([0.5] * 3)
    found = effect(np.array([4.0, 1.0, 9.0, 9.0]), before, before + 2, before - 1)  # +1, 0, +2
    assert found["change"] == pytest.approx(1) and 0 <= found["low"] < 1 < found["high"] <= 2
    assert (found["before"], found["after"]) == pytest.approx((11 / 3, 23 / 4))
    assert [found[k] for k in ("random", "least", "most")] == pytest.approx([1 / 3, -1, 2])


def test_an_effect_on_languages_together_resamples_problems():
    base = {"aa": np.array([0, 0, 1]), "bb": np.array([0, 1, 1])}
    scores = {"aa": np.array([1, 0, 1]), "bb": np.array([1, 1, 0])}
    *_, found = effects("accuracy", base, scores, base, {"aa": np.ones(3), "bb": np.ones(3)})
    assert found[""] == "together"
    assert (found["before"], found["after"]) == pytest.approx((3 / 6, 4 / 6))
    assert (found["least"], found["most"]) == pytest.approx((0, 3 / 6))
    assert (found["fixed"], found["broken"], found["p"]) == (2, 1, 1)
    # problems change by 1, 0 and -.5: of 27 draws of three, one has only the first and one only the
    # last, more than the 2.5 % that an interval leaves out; six answers would hardly do so
    assert [found[k] for k in ("change", "low", "high")] == pytest.approx([1 / 6, -0.5, 1])


def test_languages_are_taken_together_if_their_problems_are_as_many():
    def rows(*scores):
        return {row[""]: row for row in effects("accuracy", *scores)}

    base = {"aa": np.zeros(3), "bb": np.array([0.0, 1, 1])}
    scores = {"aa": np.ones(3), "bb": np.array([1.0, 1, 0])}
    draw = {"aa": np.zeros(3), "bb": np.zeros(3)}
    found = rows(base, scores, draw)
    assert list(found) == ["aa", "bb", "together"]
    assert [e["change"] for e in found.values()] == pytest.approx([1, 0, 1 / 2])
    assert [e["random"] for e in found.values()] == pytest.approx([0, -2 / 3, -1 / 3])
    assert found["together"]["fixed"] == 4 and found["together"]["broken"] == 1
    alone, uneven = {"aa": np.zeros(3)}, {"aa": np.zeros(3), "bb": np.zeros(2)}
    assert list(rows(alone, alone)) == ["aa"] and list(rows(uneven, uneven)) == ["aa", "bb"]


def test_signs_are_flipped_problem_by_problem():
    assert steer.sign_flip_p(np.array([1.0, 1, 1, 0, 0])) == 2 / 8
    five_to_one = np.array([1.0] * 5 + [-1] + [0] * 4)  # McNemar: 2 * (1 + 6) / 2**6
    assert steer.sign_flip_p(five_to_one) == 14 / 64
    few = np.array([0.5, 0.5, 1.0, -0.5, 0, np.nan])  # 16 ways; 10 of them at least 1.5 away from 0
    sums = [abs(a + b + c + d) for a, b, c, d in itertools.product(
        [0.5, -0.5], [0.5, -0.5], [1, -1], [0.5, -0.5])]
    exact = np.mean([s >= 1.5 for s in sums])
    assert steer.sign_flip_p(few) == pytest.approx(exact)
    assert steer.sign_flip_p(np.zeros(5)) == 1
    assert 0 < steer.sign_flip_p(np.ones(40)) < 0.001  # however few of 10,000 flips do as well
    rng = np.random.default_rng(0)
    rarely = np.mean([steer.sign_flip_p(rng.choice([-1, 0, 1], 40), seed) < 0.05
                      for seed in range(300)])
    assert rarely < 0.08


def test_together_errs_as_rarely_as_it_says_where_languages_answer_alike():
    """Eight languages get the same problems right: 10 independent problems, not 80 answers."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(200):
        base, scores = (np.tile(rng.random(60) < 0.7, (8, 1)).astype(float) for _ in range(2))
        base, scores = (dict(zip("abcdefgh", x)) for x in (base, scores))
        found += effects("accuracy", base, scores)[-1]["p"] < 0.05
    assert found / 200 < 0.09


def test_nothing_changed_is_the_rule_of_three_and_the_smallest_change_that_would_be_seen():
    base = {"aa": np.array([0, 1] * 30)}
    row, = effects("accuracy", base, base)
    assert (row["low"], row["high"]) == (-0.05, 0.05) and row["p"] == 1
    assert row["seen"] == pytest.approx(2.8 * np.sqrt(0.05) / np.sqrt(60))
    rng, n, part, found = np.random.default_rng(0), 200, 0.2, 0
    change = 2.8 * np.sqrt(part / n)  # of which it is said that four of five cases show it
    for _ in range(300):
        kind = rng.choice(3, n, p=[1 - part, (part + change) / 2, (part - change) / 2])
        before = np.where(kind == 0, rng.random(n) < 0.5, kind == 2)
        after = np.where(kind == 0, before, kind == 1)
        row, = effects("accuracy", {"a": before * 1.0}, {"a": after * 1.0})
        assert row["seen"] == pytest.approx(change, rel=0.35)
        found += row["p"] < 0.05
    assert 0.65 < found / 300 < 0.9


@pytest.mark.parametrize("planted", [0, 0.1])
def test_related_languages_gain_more_only_where_it_is_so(planted):
    languages, sources = "bn de en es fr ja sw zh".split(), ["en", "zh", "fr"]
    rng, found = np.random.default_rng(0), 0
    european = {"bn", "de", "en", "es", "fr"}
    for _ in range(20 if planted else 60):
        gains = rng.normal(0, 0.02, (3, 8)) + rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.1, 8)
        for i, source in enumerate(sources):
            gains[i] += [planted * ((l in european) == (source in european)) for l in languages]
            gains[i, languages.index(source)] = np.nan
        *_, p, least = steer.related_test(gains, sources, languages, rng)
        assert least == pytest.approx(1 / 56, rel=0.05)
        found += p < 0.05
    assert found / 60 < 0.15 if not planted else found / 20 > 0.8


# --------------------------------------------------------------------------- steer: the tiny model

@pytest.fixture(scope="module")
def coefficients(dumps):
    return steer.steering_coefficients(analyze.load_languages(dumps), ["en", "zh"])


def test_two_lines_steer_a_model_in_a_notebook(tiny, coefficients):
    model, tokenizer = tiny
    batch = tokenizer("<bos><|user|>Anna has 14 apples.<|assistant|>", return_tensors="pt",
                      return_token_type_ids=False)
    with steer.steer(model, coefficients, 0.5) as moved:
        model.generate(**batch, max_new_tokens=4)
    assert set(moved) == set(coefficients) and any(moved.values())


def test_moved_selections_are_counted_over_real_tokens(tiny, coefficients):
    model, tokenizer = tiny
    examples = common.read_examples("tests/data/eval_sw.tsv")[:5]
    sequences = [e["ids"] for e in common.encode_examples(tokenizer, examples)]
    experiment = SimpleNamespace(
        engine=None, model=model, shape=common.routing_shape(model),
        args=SimpleNamespace(rule="proportional", batch_tokens=150))
    moved = steer.moved_selections(experiment, sequences, coefficients, 1.0)

    def selections(ids, strength):
        seen = {}
        boosts = steer.scaled(coefficients, strength)
        with torch.inference_mode(), common.edit_routing(model, boosts=boosts, count_moved=False), \
                common.record_routing(model, lambda layer, *answer: seen.update(
                    {layer: answer[2].tolist()})):
            model(torch.tensor([ids]))
        return seen

    new, total = dict.fromkeys(coefficients, 0), sum(2 * len(ids) for ids in sequences)
    for ids in sequences:  # one at a time, so without padding
        plain, steered = selections(ids, 0), selections(ids, 1.0)
        for layer in new:
            new[layer] += sum(len(set(b) - set(a)) for a, b in zip(plain[layer], steered[layer]))
    assert moved == pytest.approx([n / total for n in new.values()], abs=2 / total)
    assert max(moved) > 0.05


# ------------------------------------------------------------------------------- a planted effect

@pytest.fixture(scope="module")
def carrier(tmp_path_factory):
    """A model in which expert 5 of layer 1 alone writes the answer, "7", and is never selected; and
    one in which it writes nothing. Every token has the same large first coordinate to work with.
    """
    place = tmp_path_factory.mktemp("carrier")
    tokenizer = AutoTokenizer.from_pretrained("tests/tiny_moe")
    seven, = tokenizer("7", add_special_tokens=False)["input_ids"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, moe_intermediate_size=8, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts=8,
        num_experts_per_tok=1, norm_topk_prob=True, tie_word_embeddings=False))
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.3)[:, 0] = 8.0
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(0, 0.5)[:, 0] = 0
        block = model.model.layers[1].mlp
        block.gate.weight[5, 0] = -1.0
        block.experts.gate_up_proj[5, :, 0] = 1.0
        direction = model.lm_head.weight.normal_(0, 0.3)[seven].clone()
        block.experts.down_proj[5] = direction[:, None] / direction.norm()
        model.save_pretrained(place / "writes")
        block.experts.down_proj[5] *= 0
        model.save_pretrained(place / "empty")
    for folder in ("writes", "empty"):
        tokenizer.save_pretrained(place / folder)
    (place / "en.tsv").write_text("".join(f"How many {word}s?\t7\n" for word in
                                          "apple egg pen cat dog box cup hat key map".split()))
    return place


@pytest.mark.parametrize("folder, found", [("writes", True), ("empty", False)])
def test_a_planted_effect_is_found_and_without_it_none(carrier, tmp_path, folder, found):
    args = parsed(steer, "--model", carrier / folder, "--data", carrier / "en.tsv", "--rule", "soft",
                  "--lambda", 6, "--metrics", "answer_nll", "--control-seeds", 7,
                  "--out", tmp_path / "r.jsonl")
    experiment = common.Experiment(args, [])
    boosted = {1: np.eye(8)[5]}
    draws = [(f"random-seed{seed}", steer.random_coefficients(boosted, seed)) for seed in range(7)]
    group = {"sources": [], "languages": ["en"], "arms": [[("shared", boosted), *draws]]}
    assert steer.choose_lambda(experiment, group)[:2] == (6, slice(0, None, 1))
    (_, (row,)), = steer.effect_tables(experiment, group, 6, slice(None))["answer_nll"]
    scores = steer.run_arms(experiment, group, draws, [6], "answer_nll")
    base, *random = scores["en"].mean(1)
    others = [mean - base for mean, drawn in zip(random, draws) if not drawn[1][1][5]]
    beyond = row["high"] < 0 and row["change"] < min(others) - 0.1
    assert bool(beyond) == found


# ------------------------------------------------------------------------------------------- cells

def test_a_cell_is_run_again_only_under_another_edit_or_settings(dumps, monkeypatch, tmp_path):
    loaded, ran = analyze.load_languages(dumps), []
    monkeypatch.setattr(common, "evaluate_cell",
                        lambda *a: ran.append(a) or {"scores": {"prompt_nll": [float(len(ran))]}})

    def experiment(*arguments):
        args = parsed(ablate, "--routing", *dumps, "--languages", "sw", "--limit", 2,
                      "--out", tmp_path / "r.jsonl", *arguments)
        return common.Experiment(args, loaded)

    boost = np.zeros(32)
    cells = [("sw",), ("sw", "a", {"kind": "a"}), ("sw", "b", {"kind": "b"})]
    edits = [{}, {"masks": {1: [3]}}, {"boosts": {1: boost}, "rule": "soft"}]

    def scores(experiment):
        return [experiment.cell(*cell, **edit)["prompt_nll"].tolist()
                for cell, edit in zip(cells, edits)]

    assert scores(experiment()) == scores(experiment()) == [[1], [2], [3]] and len(ran) == 3
    other, nudged = experiment(), boost.copy()
    nudged[7] = 1e-9
    for number, (cell, edit) in enumerate([
            (cells[1], {"masks": {1: [4]}}), (cells[1], {"masks": {2: [3]}}),
            (("sw", "a", {"kind": "c"}), edits[1]), (cells[2], edits[2] | {"rule": "hard"}),
            (cells[2], edits[2] | {"boosts": {1: nudged}})], 4):
        assert other.cell(*cell, **edit)["prompt_nll"] == [number]
    for flags in (["--limit", 3], ["--metrics", "answer_nll"], ["--dtype", "float64"]):
        assert scores(experiment(*flags)) == [[len(ran) - 2], [len(ran) - 1], [len(ran)]]
    ran.clear()  # the threshold is how experts are chosen: the unedited model does not know it
    assert scores(experiment("--threshold", 0.6)) == [[1], [1], [2]]


def test_another_draw_runs_no_other_cell_again(dumps, tmp_path):
    arguments = ["--routing", *dumps, "--languages", "sw", "--targets", "sw", "--bands", "all=0-7",
                 "--limit", 2, "--out", tmp_path / "r.jsonl"]
    run(ablate, *arguments, "--control-seeds", 1)
    first = rows_of(tmp_path / "r.jsonl")
    run(ablate, *arguments, "--control-seeds", 2)
    more = rows_of(tmp_path / "r.jsonl")
    assert more[:len(first)] == first and len(more) == len(first) + 1


def test_evaluating_on_the_captured_prompts_is_warned_of(dumps, capsys, tmp_path):
    for name, warned in ("eval", False), ("routing", True):
        args = parsed(ablate, "--languages", "sw", "--data", f"tests/data/{name}_{{lang}}.tsv",
                      "--out", tmp_path / "r.jsonl")
        common.Experiment(args, analyze.load_languages(dumps))
        line = f"warning: tests/data/{name}_sw.tsv is what the routing was captured on"
        assert (line in capsys.readouterr().out) == warned


# -------------------------------------------------------------------------------------- whole runs

def whole_run(script, out, *arguments):
    loads, load, arguments = [], common.load_weights, [*arguments, "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_weights", lambda *a, **k: loads.append(a) or load(*a, **k))
        printed = run(script, *arguments)
    rows = {(row["cell"], row["settings"]["language"]): row for row in rows_of(out)}
    return SimpleNamespace(script=script, arguments=arguments, out=out, printed=printed, rows=rows,
                           loads=len(loads))


@pytest.fixture(scope="module")
def ablation(dumps, tmp_path_factory):
    """Two evaluation languages, two targets, two bands."""
    out = tmp_path_factory.mktemp("results") / "ablate.jsonl"
    return whole_run(ablate, out, "--routing", *dumps, "--languages", "en,sw",
                     "--targets", "sw,en+zh", "--bands", "low=0-2", "late=7-7", "--limit", 6,
                     "--control-seeds", 2, "--metrics", "prompt_nll", "accuracy")


@pytest.fixture(scope="module")
def steering(dumps, tmp_path_factory):
    """Two evaluation languages, three lambdas, two draws, a control band; nothing is generated."""
    out = tmp_path_factory.mktemp("results") / "steer.jsonl"
    return whole_run(steer, out, "--routing", *dumps, "--languages", "sw,en",
                     "--lambda", 0.2, 2.0, -1.0, "--control-bands", "0-0", "--limit", 12,
                     "--control-seeds", 2, "--metrics", "prompt_nll", "answer_nll")


def best_lambda(steering):
    """By hand, over the even examples."""
    def nats(name, language):
        return np.mean(steering.rows[name, language]["scores"]["prompt_nll"][::2])
    return min((0.2, 2.0, -1.0), key=lambda strength: sum(
        nats(f"shared-lambda{strength}", l) - nats("baseline", l) for l in ("sw", "en")))


@pytest.mark.parametrize("name, metrics, generated, sources", [
    ("ablation", ["prompt_nll", "accuracy"], ["predictions", "cut_responses"], LANGUAGES),
    ("steering", ["prompt_nll", "answer_nll"], [], ["en", "zh"]),  # what it depends on
])
def test_one_load_makes_a_row_of_settings_and_scores_for_every_cell(
        name, metrics, generated, sources, dumps, request):
    done = request.getfixturevalue(name)
    rows = rows_of(done.out)
    assert done.loads == 1 and len(done.rows) == len(rows)
    assert len({json.dumps(row["settings"], sort_keys=True) for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["cell", "settings", "scores", "mean", "experts", *generated]
        assert list(row["scores"]) == list(row["mean"]) == metrics
        for metric, scores in row["scores"].items():
            assert len(scores) == row["settings"]["limit"]
            assert row["mean"][metric] == pytest.approx(np.mean(scores), abs=1e-6)
        assert row["settings"]["revision"] and row["settings"]["generation"]["max_new_tokens"] == 32
        if row["cell"] != "baseline":
            assert row["settings"]["dumps"] == {
                l: analyze.load_routing(dumps[LANGUAGES.index(l)])["digest"] for l in sources}


def test_the_ablation_grid_is_complete(ablation):
    kinds = {}  # {kind: {cell: experts of each layer}}
    for row in ablation.rows.values():
        s = row["settings"]
        if row["cell"] != "baseline":
            cell = tuple(s["band"]), s["target"], s["language"]
            kinds.setdefault(s["experts"], {})[cell] = row["experts"]
    assert len(ablation.rows) == sum(map(len, kinds.values())) + 2  # unmasked, once per language
    masked = kinds.pop("exclusive")
    assert set(masked) == set(itertools.product([(0, 1, 2), (7,)], ["sw", "en+zh"], ["en", "sw"]))
    assert {"random-seed0", "random-seed1"} < set(kinds)
    own = {cell: experts for cell, experts in masked.items() if cell[2] in cell[1].split("+")}
    for kind, cells in kinds.items():  # as many experts, layer by layer
        assert cells == own if kind.startswith("random") else cells.keys() == own.keys(), kind


def test_the_steering_grid_is_complete(steering):
    best = best_lambda(steering)
    controls = [f"random-seed0-lambda{best}", f"random-seed1-lambda{best}", f"band0-0-lambda{best}"]
    names = ["baseline", "shared-lambda0.2", "shared-lambda2.0", "shared-lambda-1.0", *controls]
    assert set(steering.rows) == set(itertools.product(names, ["sw", "en"]))
    for language in ("sw", "en"):
        shared, *random, band = (steering.rows[name, language]
                                 for name in (f"shared-lambda{best}", *controls))
        assert all(row["experts"] == shared["experts"] for row in random)  # as many, layer by layer
        assert len({str(row["scores"]) for row in (shared, *random)}) == 3  # and others
        assert list(band["experts"]) == ["0"] and "0" not in shared["experts"]


def check_by_hand(row, baseline, tiny, **edit):
    """The row's scores are those of the Swahili problems under the edit, which matters."""
    model, tokenizer = tiny
    examples = common.read_examples("tests/data/eval_sw.tsv")[:row["settings"]["limit"]]
    encoded, metrics = common.encode_examples(tokenizer, examples), list(row["scores"])
    with common.edit_routing(model, **edit):
        scores, *_ = common.evaluate(model, tokenizer, encoded, metrics, "sw", max_new_tokens=32)
    for metric in metrics:
        np.testing.assert_allclose(row["scores"][metric], scores[metric], atol=1e-5)
    change = np.subtract(row["scores"]["prompt_nll"], baseline["scores"]["prompt_nll"])
    assert abs(change).max() > 0.01


def test_a_masked_cell_is_what_masking_by_hand_gives(ablation, dumps, tiny):
    row = ablation.rows["low-exclusive-sw", "sw"]
    frequency = analyze.frequencies(analyze.load_languages(dumps))
    exclusive = analyze.language_shares(frequency, 4)[LANGUAGES.index("sw")] > 0.4
    masks = {layer: np.flatnonzero(exclusive[layer]).tolist() for layer in (0, 1, 2)}
    assert row["experts"] == {str(layer): len(ids) for layer, ids in masks.items() if ids}
    check_by_hand(row, ablation.rows["baseline", "sw"], tiny, masks=masks)


def test_a_steered_cell_is_what_boosting_by_hand_gives(steering, dumps, tiny):
    row = steering.rows["shared-lambda2.0", "sw"]
    en, _, zh = analyze.frequencies(analyze.load_languages(dumps))
    share = analyze.language_shares(np.stack([en, zh]), 10)
    boosts = {layer: 2 * np.where((share[:, layer] < 0.7).all(0), share[0, layer], 0)
              for layer in range(1, 7)}
    boosts = {layer: boost for layer, boost in boosts.items() if boost.any()}
    assert row["experts"] == {str(layer): np.count_nonzero(b) for layer, b in boosts.items()}
    assert row["settings"]["band"] == list(boosts)
    check_by_hand(row, steering.rows["baseline", "sw"], tiny, boosts=boosts)


@pytest.mark.parametrize("name", ["ablation", "steering"])
def test_a_run_goes_on_where_it_stopped(name, request, monkeypatch):
    done = request.getfixturevalue(name)
    whole, evaluate, ran = done.out.read_text(), common.evaluate_cell, []
    monkeypatch.setattr(common, "evaluate_cell", lambda *a: ran.append(a) or evaluate(*a))
    assert run(done.script, *done.arguments) == done.printed and not ran
    assert done.out.read_text() == whole
    done.out.write_text(whole[:-100])  # a kill while the last line was written
    assert run(done.script, *done.arguments) == done.printed and len(ran) == 1
    assert done.out.read_text() == whole


@pytest.mark.parametrize("metric", ["prompt_nll", "accuracy"])
@pytest.mark.parametrize("band, title", [("low", "low (layers 0-2)"), ("late", "late (layers 7)")])
def test_the_ablation_table_shows_changes_and_those_of_random_draws(ablation, band, title, metric):
    def scores(cell, language):
        return np.array(ablation.rows[cell, language]["scores"][metric])

    def change(kind, target, language):
        return (scores(f"{band}-{kind}-{target}", language) - scores("baseline", language)).mean()

    lines = lines_of(ablation.printed, title, metric)
    for language, target in (("sw", "sw"), ("en", "en+zh")):
        all_targets, own, drawn, matched = lines[language][:4]
        assert all_targets == pytest.approx(
            [scores("baseline", language).mean(), change("exclusive", "sw", language),
             change("exclusive", "en+zh", language)], abs=6e-4)
        random = [change(f"random-seed{seed}", target, language) for seed in range(2)]
        assert own[1] == pytest.approx(change("exclusive", target, language), abs=6e-4)
        assert drawn[1:] == pytest.approx([np.mean(random), *sorted(random)], abs=6e-4)
        matching = [change(f"matched-seed{seed}", target, language) for seed in range(5)]
        assert matched[1:] == pytest.approx(
            [np.mean(matching), min(matching), max(matching)], abs=6e-4)
        if matched[0] != pytest.approx(own[0], rel=0.11):  # of the weight removed
            assert matched[0] < own[0] and "others do not carry as much" in ablation.printed
        assert drawn[0] < own[0]


def test_what_no_prompt_selected_is_a_closing_line(dumps, tmp_path):
    # an expert that Chinese selects and English hardly, zeroed in three prompts of each
    counts = {l: analyze.load_routing(path)["counts"] for l, path in zip(LANGUAGES, dumps)}
    rare = np.where(counts["zh"] > 150, counts["en"], 10**6)
    layer, expert = map(int, np.unravel_index(rare.argmin(), rare.shape))
    selection = {"experts": {layer: {expert: 0.5}}}
    (tmp_path / "s.json").write_text(json.dumps(selection))
    out = tmp_path / "r.jsonl"
    printed = run(ablate, "--how", "zero", "--routing", *dumps, "--languages", "en,zh", "--limit", 3,
                  "--control-seeds", 1, "--selection", tmp_path / "s.json", "--out", out)
    zeroed = [sum(row["zeroed"].values()) for row in rows_of(out) if "zeroed" in row]
    assert f"no prompt selected what was zeroed in {zeroed.count(0)} of {len(zeroed)} cells" in printed
    assert 0 < zeroed.count(0) < len(zeroed)


@pytest.mark.parametrize("verdict", [True, False])
def test_the_ablation_table_says_who_is_hurt(ablation, monkeypatch, verdict):
    signs = []
    monkeypatch.setattr(ablate, "is_hurt", lambda *a: signs.append(a[0]) or verdict)
    lines = run(ablate, *ablation.arguments).split("\n")
    # two bands in each metric, two own languages: of nats, less is better
    assert signs == [-1] * 4 + [1] * 4
    verdicts = [line.endswith("  not hurt") for line in lines if line.endswith(" hurt")]
    assert verdicts == [not verdict] * 8


def test_steering_is_reported_on_other_examples_than_it_is_chosen_on(steering):
    best = best_lambda(steering)
    assert f"lambda {best}, chosen on the even examples" in steering.printed
    kinds = ("shared", "random-seed0", "random-seed1")
    names = ["baseline", *(f"{kind}-lambda{best}" for kind in kinds)]
    for metric in ("prompt_nll", "answer_nll"):
        base, steered, *draws = (
            np.array([steering.rows[name, l]["scores"][metric][1::2] for l in ("sw", "en")])
            for name in names)
        lines = lines_of(steering.printed, f"{metric}, lambda {best}")
        for name, rows in (("sw", 0), ("en", 1), ("together", slice(None))):
            before, after = base[rows].mean(), steered[rows].mean()
            random = [(draw[rows] - base[rows]).mean() for draw in draws]
            found = lines[name][0]
            assert found[:3] == pytest.approx([before, after, after - before], abs=6e-4)
            assert found[5:8] == pytest.approx([np.mean(random), *sorted(random)], abs=6e-4)
        band = steering.rows[f"band0-0-lambda{best}", "sw"]["scores"][metric][1::2]
        lines = lines_of(steering.printed, f"{metric}, lambda {best}, band0-0")
        assert lines["sw"][0][1] == pytest.approx(np.mean(band), abs=6e-4)


def test_predictions_are_captured_again_with_their_responses(ablation, tmp_path):
    row = ablation.rows["baseline", "en"]
    predictions = rows_of(row["predictions"])
    assert set(predictions[0]) >= {"prompt", "response", "answer", "score"}
    assert "=" in predictions[0]["response"]
    assert [p["score"] for p in predictions] == row["scores"]["accuracy"]
    run(capture, "--data", row["predictions"].replace("en.jsonl", "{lang}.jsonl"),
        "--languages", "en", "--out", tmp_path)
    prompt, response, both = (analyze.load_routing(str(tmp_path / "en.npz"), part)
                              for part in ("prompt", "response", "all"))
    assert response["num_tokens"] > 6 * 5
    assert (prompt["counts"] + response["counts"] == both["counts"]).all()


def test_sources_are_not_evaluated_unless_they_are_named(dumps, tmp_path):
    out = tmp_path / "r.jsonl"
    arguments = ["--routing", *dumps, "--lambda", 0.5, "--limit", 2, "--control-seeds", 1,
                 "--metrics", "prompt_nll", "--out", out]
    assert "\ntogether " in run(steer, *arguments)
    assert {r["settings"]["language"] for r in rows_of(out)} == set("bn de es fr ja sw".split())
    run(steer, *arguments, "--languages", "en")
    assert rows_of(out)[-1]["settings"]["language"] == "en"


def test_groups_of_sources_are_steered_each_for_itself_and_compared(dumps, tmp_path):
    out = tmp_path / "r.jsonl"
    printed = run(steer, "--routing", *dumps, "--sources", "en,zh", "zh,en", "--languages",
                  "sw,en,zh,de", "--lambda", 0.5, "--limit", 4, "--control-seeds", 1, "--metrics", "prompt_nll",
                  "--out", out)
    table = lines_of(printed, "gain of each language in prompt_nll")
    scores = {(r["cell"], r["settings"]["language"], *r["settings"].get("sources", [])): np.mean(
        r["scores"]["prompt_nll"]) for r in rows_of(out)}
    assert table["sw"][0] == pytest.approx(  # less nats are a gain
        [scores["baseline", "sw"] - scores["shared-lambda0.5", "sw", *group]
         for group in (("en", "zh"), ("zh", "en"))], abs=6e-4)
    # of the pairs of first source and language en-de alone is related
    assert re.search(r"first source's family gain [-+.\d]+ more, p [.\d]+ \(at best", printed)
    assert not any(key[1] in key[2:] for key in scores)  # sources are not evaluated in their group


def test_that_no_pair_is_related_is_said():
    groups = [{"sources": sources, "languages": ["sw"]} for sources in (["en", "zh"], ["zh", "en"])]
    effects = [{"prompt_nll": [("", [{"": "sw", "change": change}])]} for change in (0.1, 0.2)]
    _, (text, _) = steer.group_tables(groups, effects)
    assert "cannot be tested" in text


def test_a_lambda_that_moves_no_selection_is_left_out(dumps, tmp_path):
    printed = run(steer, "--routing", *dumps, "--languages", "sw", "--limit", 4, "--lambda", 1e-9, 0.5,
                  "--control-seeds", 2, "--metrics", "prompt_nll", "--out", tmp_path / "r.jsonl")
    assert re.search(r"\n1e-09 +left out( +0\.000)+\n0\.5 +\S+[^n]+\nrandom-seed0 .*[1-9]", printed)
    assert {r["settings"].get("lambda") for r in rows_of(tmp_path / "r.jsonl")} == {None, 0.5}


def test_a_lambda_that_moves_no_selection_is_an_error(dumps, tmp_path):
    with pytest.raises(common.InputError, match="no lambda moves any selection; take larger ones"):
        run(steer, "--routing", *dumps, "--languages", "sw", "--limit", 4, "--lambda", 1e-9,
            "--out", tmp_path / "r.jsonl")


# -------------------------------------------------------------------------------------- selections

@pytest.fixture(scope="module")
def contrast(dumps, tmp_path_factory):
    """(the file of) the twelve largest differences between Chinese and English."""
    path = tmp_path_factory.mktemp("contrast") / "selection.json"
    run(analyze, "--contrast", dumps[2], dumps[0], "--top", 12, "--selection", path)
    en, _, zh = analyze.frequencies(analyze.load_languages(dumps))
    differences = analyze.load_selection(path, analyze.load_routing(dumps[0]))
    assert (differences != 0).sum() == 12 and (differences > 0).any() and (differences < 0).any()
    chosen = differences != 0
    np.testing.assert_allclose(differences[chosen], (zh - en)[chosen], atol=1e-6)
    return path, differences


def test_a_contrast_is_masked(contrast, dumps, tmp_path):
    (selection, differences), out = contrast, tmp_path / "r.jsonl"
    arguments = ["--routing", *dumps, "--selection", selection, "--languages", "en,zh",
                 "--limit", 2, "--control-seeds", 1, "--out", out]
    printed = run(ablate, *arguments)  # by default in all of its layers
    rows = [r for r in rows_of(out) if r["settings"].get("experts") == "selection"]
    assert [r["settings"]["language"] for r in rows] == ["en", "zh"]
    more = {str(layer): int(n) for layer, n in enumerate((differences > 0).sum(1)) if n}
    assert rows[0]["experts"] == more
    own = printed.split("\nown ")[1]
    assert "\nen " in own and "\nzh " in own  # both with their controls
    with pytest.raises(common.InputError, match="--targets has no part in the selection experts"):
        run(ablate, *arguments, "--targets", "en")


def test_a_contrast_is_boosted(contrast, dumps, tiny, tmp_path):
    (selection, differences), out = contrast, tmp_path / "r.jsonl"
    printed = run(steer, "--routing", *dumps, "--selection", selection, "--languages", "sw",
                  "--limit", 4, "--control-seeds", 1, "--rule", "soft", "--lambda", 5, "--out", out)
    assert f"12 experts  rule soft  {selection}\n" in printed
    baseline, row, _ = rows_of(out)
    assert row["settings"]["kind"] == "selection"
    boosts = {layer: 5 * np.sign(d) for layer, d in enumerate(differences) if d.any()}
    check_by_hand(row, baseline, tiny, boosts=boosts, rule="soft")
    right = [np.array(r["scores"]["accuracy"]) for r in (baseline, row)]  # of all, with one lambda
    line = next(l for l in printed.split("\n") if l.startswith("sw "))
    assert numbers(line)[:2] == [r.mean() for r in right]
    fixed, broken = (right[1] > right[0]).sum(), (right[1] < right[0]).sum()
    assert fixed != broken and line.split()[-4:-2] == [str(fixed), str(broken)]
