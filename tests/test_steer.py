"""steer.py: coefficients, the choice of lambda, effects beside controls, and their statistics."""

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import analyze
import common
import steer
from common import InputError
from conftest import (
    TINY, make_routing, parse, prompt_nll_one_by_one, read_rows, read_table, run, save_dump,
    save_selection)
from steer import (
    boost_settings, change_interval, choose_coefficients, effect_columns, effect_row,
    mean_gain, paper_band, print_choice, print_related, random_coefficients, related_languages,
    sign_flip_p, split_examples, steering_coefficients, scored_languages)

ALL = slice(None)


def as_lists(coefficients):
    return {layer: of_layer.tolist() for layer, of_layer in coefficients.items()}


# ----------------------------------------------------------------------------------- coefficients

@pytest.mark.parametrize("sources, band, threshold, expected", [
    # In layer 3, aa keeps 0 and 1, bb 3 and 0, so that expert 0 has the shares .6 and .4. In layer
    # 5, aa keeps 0 and 1, bb 1 and 2: expert 1 has .5 and .5.
    (["aa", "bb"], "3-5", 0.7, {3: [0.6, 0, 0, 0], 5: [0, 0.5, 0, 0]}),
    (["bb", "aa"], "3-5", 0.7, {3: [0.4, 0, 0, 0], 5: [0, 0.5, 0, 0]}),
    (["aa", "bb"], "3-3", 0.7, {3: [0.6, 0, 0, 0]}),
    (["aa", "bb"], "3-5", 0.55, {5: [0, 0.5, 0, 0]}),
    (["aa", "bb"], "middle=5-5", 0.55, {5: [0, 0.5, 0, 0]}),
])
def test_coefficients_are_the_first_sources_share_in_what_the_sources_share(
        sources, band, threshold, expected):
    routing = make_routing({
        "aa": [[60, 30, 10, 0], [50, 50, 0, 0]],
        "xx": [[50, 0, 50, 0], [0, 50, 50, 0]],  # other languages do not matter
        "bb": [[40, 0, 10, 50], [0, 50, 50, 0]],
    }, layers=[3, 5])
    coefficients = steering_coefficients(routing, sources, band, 2, threshold)
    assert as_lists(coefficients) == expected


@pytest.mark.parametrize("layers, expected", [
    (range(48), "10-39"),  # the paper's
    (range(8), "1-6"),
    (range(3, 51), "13-42"),  # behind three dense layers
    ([0], "0-0"),
])
def test_the_default_band_is_the_papers_fraction_of_the_depth(layers, expected):
    assert paper_band(np.array(layers)) == expected


def test_a_selection_boosts_what_is_above_0_and_suppresses_what_is_below(tmp_path):
    routing = make_routing({"aa": [[1, 1, 1]] * 3}, layers=[1, 2, 3])
    selection = [[0.5, 0, 0], [0, -0.6, 7], [0, 0, 0]]
    path = save_selection(tmp_path / "s.npz", selection, routing.layers)
    args = parse(steer, "--selection", path)
    assert as_lists(choose_coefficients(args, routing, None)) == {1: [1, 0, 0], 2: [0, -1, 1]}
    assert as_lists(choose_coefficients(args, routing, "2-3")) == {2: [0, -1, 1]}


def test_random_coefficients_are_the_same_ones_on_other_experts_of_the_layer():
    coefficients = {3: np.array([0.6, 0, 0, 0.5, 0, 0, 0, 0.2]), 5: np.array([0, 0.1] * 4)}
    draws = [random_coefficients(coefficients, seed) for seed in range(10)]
    for draw in draws:
        assert list(draw) == [3, 5]
        for layer in (3, 5):
            assert sorted(draw[layer]) == sorted(coefficients[layer])
    assert len({draw[3].tobytes() for draw in draws}) > 5
    assert as_lists(random_coefficients(coefficients, 4)) == as_lists(draws[4])


@pytest.mark.parametrize("rule", common.RULES)
def test_a_boost_is_lambda_times_the_coefficients_by_the_rule(rule):
    args = parse(steer, "--rule", rule)
    _, edit, settings = boost_settings(args, "shared", {3: [0, 1, 2]}, 0.5)
    assert as_lists(edit["boosts"]) == {3: [0, 0.5, 1]}
    assert edit["rule"] == settings["rule"] == rule


# ------------------------------------------------------------------------------ choice of lambda

def scored(metric="accuracy", **scores):
    """Return {language: row} as of the evaluator."""
    return {language: {"scores": {metric: np.array(values, float)}}
            for language, values in scores.items()}


def test_a_gain_is_the_mean_over_languages_of_more_right_answers_or_fewer_nats():
    changes = {"aa": [1, 0, 0, 0], "bb": [-0.1, np.nan]}  # means .25 and -.1
    for metric, expected in (("accuracy", 0.075), ("prompt_nll", -0.075)):
        unsteered = scored(metric, aa=[1, 1, 1, 1], bb=[2, 2])
        steered = {language: {"scores": {metric: row["scores"][metric] + changes[language]}}
                   for language, row in unsteered.items()}
        assert mean_gain(metric, unsteered, steered, ALL) == pytest.approx(expected)


def test_several_lambdas_are_judged_by_even_examples_and_one_by_all():
    unsteered = scored(aa=[0, 0, 0, 0])
    steered = scored(aa=[0.5, 9, 0.7, 7])
    choosing, reporting = split_examples(3)
    assert mean_gain("accuracy", unsteered, steered, choosing) == pytest.approx(0.6)
    assert mean_gain("accuracy", unsteered, steered, reporting) == pytest.approx(8)
    for examples in split_examples(1):
        assert mean_gain("accuracy", unsteered, steered, examples) == pytest.approx(4.3)


def test_the_best_of_lambdas_without_effect_gains_only_where_it_was_chosen():
    rng = np.random.default_rng(0)
    choosing, reporting = split_examples(10)
    on_choosing, on_reporting = [], []
    for _ in range(300):
        unsteered = scored(aa=np.zeros(40))
        steered = [scored(aa=rng.normal(0, 1, 40)) for _ in range(10)]
        gains = [mean_gain("accuracy", unsteered, each, choosing) for each in steered]
        best = steered[int(np.argmax(gains))]
        on_choosing.append(max(gains))
        on_reporting.append(mean_gain("accuracy", unsteered, best, reporting))
    error = 1 / np.sqrt(20 * 300)
    assert np.mean(on_choosing) > 20 * error
    assert abs(np.mean(on_reporting)) < 3 * error


def print_by_hand(capsys, gains, changed_by_random=0.02):
    changed = {0.1: {3: 0.01, 5: 0.03}, 0.3: {3: 0.05, 5: 0.05}, 1e-9: {3: 0.0, 5: 0.0}}
    print_choice("accuracy", changed, gains, max(gains, key=gains.get), [changed_by_random])
    return capsys.readouterr().out


def test_lambdas_are_printed_with_what_they_gain_and_change(capsys):
    printed = print_by_hand(capsys, {0.1: 0.5, 0.3: -0.25})
    table = read_table(printed, "lambda")
    assert table["0.1"] == {"gain of accuracy": "+0.5000", "selections changed (%)": "2.000",
                            "by layer (%)": "1.000..3.000"}
    assert table["0.3"]["gain of accuracy"] == "-0.2500"
    assert table["1e-09"]["gain of accuracy"] == "left out"
    assert "\nlambda 0.1, chosen on" in printed
    assert "equal" not in printed


def test_of_equal_gains_the_first_is_taken_and_it_is_printed(capsys):
    printed = print_by_hand(capsys, {0.1: 0.0, 0.3: 0.0})
    assert "0.1, 0.3 are equal" in printed
    assert "\nlambda 0.1" in printed


def test_random_experts_that_change_less_than_half_as_much_are_warned_of(capsys):
    assert "warning" not in print_by_hand(capsys, {0.1: 0.5}, changed_by_random=0.0101)
    assert "warning" in print_by_hand(capsys, {0.1: 0.5}, changed_by_random=0.0099)


# ------------------------------------------------------------------------------------ statistics

def test_signs_are_flipped_problem_by_problem():
    assert sign_flip_p(np.array([1.0, 1, 1, 0, 0])) == 2 / 8
    assert sign_flip_p(np.zeros(5)) == 1
    # The sum is 1.5. Of 16 ways to set the signs, two give +-2.5 and six +-1.5
    assert sign_flip_p(np.array([0.5, 0.5, 1.0, -0.5, 0, np.nan])) == 8 / 16


@pytest.mark.parametrize("fixed, broken", [(5, 1), (3, 3), (8, 0), (2, 10)])
def test_p_of_right_and_wrong_answers_is_mcnemars_by_hand(fixed, broken):
    changes = np.array([1.0] * fixed + [-1.0] * broken + [0.0] * 4)
    n = fixed + broken
    tail = sum(binomial(n, k) for k in range(min(fixed, broken) + 1))
    assert sign_flip_p(changes) == pytest.approx(min(1, 2 * tail / 2**n))


def binomial(n, k):
    return len(list(itertools.combinations(range(n), k)))


def test_p_from_random_flips_is_nearly_mcnemars_and_never_0():
    changes = np.array([1.0] * 15 + [-1.0] * 5)
    exact = 2 * sum(binomial(20, k) for k in range(6)) / 2**20  # .041
    assert sign_flip_p(changes) == pytest.approx(exact, abs=0.008)
    assert 0 < sign_flip_p(np.ones(40)) < 0.001


def test_nothing_changed_is_the_rule_of_three():
    assert change_interval("accuracy", np.zeros((2, 60))) == (-0.05, 0.05)  # 3 / 60
    assert change_interval("accuracy", np.zeros((1, 2))) == (-1, 1)
    assert change_interval("prompt_nll", np.zeros((2, 60))) == (0, 0)


def test_problems_are_resampled_and_not_answers():
    changes = np.array([[1, 0, 0], [1, 0, -1]])  # problems change by 1, 0 and -.5
    # One of 27 draws of three has only the first, and one only the last: more than 2.5 % each
    assert change_interval("accuracy", changes) == pytest.approx((-0.5, 1))


def test_languages_that_answer_alike_are_no_more_evidence_than_one():
    """Eight languages get the same ones of 60 problems right; nothing has an effect."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(100):
        before = dict.fromkeys("abcdefgh", rng.random(60) < 0.7)
        after = dict.fromkeys("abcdefgh", rng.random(60) < 0.7)
        row = effect_row("accuracy", list(before), ALL, scored(**before), scored(**after), [], {})
        found.append(row["p"] < 0.05)
    assert np.mean(found) <= 0.1


@pytest.mark.parametrize("sources, expected", [
    (["en", "zh"], ["de", "bn"]),          # Indo-European, whatever its branch
    (["zh", "en"], ["yue"]),
    (["fr", "es"], ["en", "de", "bn"]),
    (["unknown", "en"], []),               # of no known family, as another unknown one
    ([], []),
])
def test_related_languages_are_of_the_first_sources_family(sources, expected):
    targets = ["en", "de", "bn", "zh", "yue", "xx"]
    assert related_languages(targets, sources) == expected


# ---------------------------------------------------------------------------------------- tables

def test_an_effect_by_hand():
    before = scored(aa=[0, 0, 1, 1])
    after = scored(aa=[1, 0, 1, 1])
    random = [scored(aa=[0, 0, 1, 0]), scored(aa=[1, 1, 1, 1])]
    bands = {"0-3": scored(aa=[0, 0, 0, 0])}
    row = effect_row("accuracy", ["aa"], ALL, before, after, random, bands)
    assert row.pop("change [95 % interval]").startswith("+0.250 [")
    assert row == {
        "before": 0.5, "after": 0.75, "p": 1, "fixed": 1, "broken": 0,
        "random": "-0.250..0.500", "layers 0-3": "-0.500"}


def test_an_effect_on_nats_has_no_p_and_counts_the_reported_examples_alone():
    before = scored("prompt_nll", aa=[3, 1, 9, 7])
    after = scored("prompt_nll", aa=[4, 1, 0, 9])
    odd = slice(1, None, 2)
    row = effect_row("prompt_nll", ["aa"], odd, before, after, [before, after], {"0-3": after})
    assert row == {"before": 4, "after": 5, "change [95 % interval]": "+1.000 [+0.000 +2.000]",
                   "random": "0.000..1.000", "layers 0-3": "+1.000"}


def test_an_effect_leaves_out_examples_without_a_score():
    before = scored("prompt_nll", aa=[3, 1, np.nan, 7])
    after = scored("prompt_nll", aa=[4, 2, 9, 8])
    row = effect_row("prompt_nll", ["aa"], ALL, before, after, [before], {})
    assert row["change [95 % interval]"] == "+1.000 [+1.000 +1.000]"
    assert row["random"] == "0.000..0.000"


def test_languages_with_as_many_problems_have_a_row_for_all_of_them():
    before = scored(aa=[0, 0, 0], bb=[0, 1, 1])
    after = scored(aa=[1, 1, 1], bb=[1, 1, 0])
    random = [scored(aa=[0, 0, 0], bb=[0, 0, 0])]
    columns = effect_columns("accuracy", ALL, before, after, random, {}, ["bb"])
    changes = [text.split()[0] for text in columns["change [95 % interval]"]]
    assert columns["language"] == ["aa", "bb", "all"]
    assert columns["related"] == ["", "yes", ""]
    assert changes == ["+1.000", "+0.000", "+0.500"]
    assert columns["random"] == ["0.000..0.000", "-0.667..-0.667", "-0.333..-0.333"]
    assert (columns["fixed"][2], columns["broken"][2]) == (4, 1)
    alone = {"aa": before["aa"]}
    assert effect_columns("accuracy", ALL, alone, alone, [], {}, [])["language"] == ["aa"]
    uneven = scored(aa=[0, 0, 0], bb=[0, 0])
    assert effect_columns("accuracy", ALL, uneven, uneven, [], {}, [])["language"] == ["aa", "bb"]


def test_mean_changes_of_related_and_other_languages_stand_below_the_table(capsys):
    before = scored(de=[0, 0], fr=[0, 0], sw=[1, 1])
    after = scored(de=[1, 1], fr=[1, 0], sw=[1, 0])
    print_related("accuracy", ALL, before, after, ["de", "fr"], [])
    related, other = capsys.readouterr().out.splitlines()
    assert "de, fr" in related and related.endswith("+0.750")
    assert "sw" in other and other.endswith("-0.500")


# -------------------------------------------------------------------------------- the tiny model

def test_a_with_block_steers_a_model_in_a_notebook(tiny, dumps):
    model, tokenizer = tiny
    coefficients = steering_coefficients(analyze.load_routing(dumps), ["en", "zh"])
    batch = tokenizer("<bos><|user|>Anna has 14 apples.<|assistant|>", return_tensors="pt",
                      return_token_type_ids=False)
    with torch.inference_mode():
        before = model(**batch).logits
        with steer.steer(model, coefficients, 0.5) as changed:
            steered = model(**batch).logits
        with steer.steer(model, coefficients, 0.5, rule="soft"):
            softly = model(**batch).logits
        after = model(**batch).logits
    assert set(changed) == set(coefficients)
    assert any(changed.values())
    assert not torch.equal(before, steered)
    assert not torch.equal(steered, softly)
    assert torch.equal(before, after)


def count_changes_slowly(tiny, language, coefficients, strength):
    """Return {layer: fraction of the selections that change}, of 20 prompts, one at a time.

    In each layer, the unedited router and the boosted one select for the hidden states that the
    boosted model has there.
    """
    model, tokenizer = tiny
    examples = common.read_examples(f"tests/data/eval_{language}.tsv")[:20]
    gates = {layer: model.model.layers[layer].mlp.gate for layer in coefficients}
    changed, total = dict.fromkeys(coefficients, 0), dict.fromkeys(coefficients, 0)
    inputs = {}
    hooks = [gate.register_forward_hook(
        lambda gate, args, output, layer=layer: inputs.update({layer: (args[0], output[2])}))
        for layer, gate in gates.items()]
    for example in common.encode_examples(tokenizer, examples):
        with torch.inference_mode(), steer.steer(model, coefficients, strength):
            model(torch.tensor([example["ids"]]))
        for layer, (hidden_states, boosted) in list(inputs.items()):
            with torch.inference_mode():
                unedited = gates[layer](hidden_states)[2]
            for before, after in zip(unedited.tolist(), boosted.tolist()):
                changed[layer] += len(set(after) - set(before))
                total[layer] += len(after)
    for hook in hooks:
        hook.remove()
    return {str(layer): changed[layer] / total[layer] for layer in coefficients}


@pytest.fixture(scope="module")
def steering(dumps, tmp_path_factory):
    """A run with two evaluated languages, four lambdas, two draws and a control band."""
    out = tmp_path_factory.mktemp("results") / "steer.jsonl"
    printed = run(steer, "--routing", *dumps, "--languages", "sw,de", "--lambda", 1e-9, 2.0, 0.3,
                  -1.0, "--control-bands", "0-0", "--limit", 12, "--control-seeds", 2,
                  "--metrics", "prompt_nll", "answer_nll", "--out", out)
    rows = {}
    counted = {}
    for row in read_rows(out):
        kind = counted if "changed" in row else rows
        kind[row["cell"], row["settings"]["language"]] = row
    return SimpleNamespace(printed=printed, rows=rows, counted=counted)


def mean_score(steering, name, language, metric, examples):
    return np.mean(steering.rows[name, language]["scores"][metric][examples])


def best_lambda(steering):
    """Return the lambda with the fewest nats over the even examples."""
    nats = {strength: sum(mean_score(steering, f"shared-lambda{strength}", language, "prompt_nll",
                                     slice(0, None, 2)) for language in ("sw", "de"))
            for strength in (2.0, 0.3, -1.0)}
    return min(nats, key=nats.get)


def test_lambdas_that_change_nothing_are_left_out_before_they_are_evaluated(steering):
    assert not any(steering.counted["shared-lambda1e-09", "sw"]["changed"].values())
    assert ("shared-lambda1e-09", "sw") not in steering.rows
    assert read_table(steering.printed, "lambda")["1e-09"]["gain of prompt_nll"] == "left out"


def test_if_no_lambda_changes_a_selection_there_is_nothing_to_report(dumps, tmp_path):
    with pytest.raises(InputError, match="larger"):
        run(steer, "--routing", *dumps, "--languages", "sw", "--limit", 4, "--lambda", 1e-9,
            "--out", tmp_path / "r.jsonl")


def test_controls_are_scored_with_the_best_lambda_alone(steering):
    best = best_lambda(steering)
    random = [f"random{seed}-lambda{best}" for seed in (0, 1)]
    band = f"band 0-0-lambda{best}"
    shared = [f"shared-lambda{strength}" for strength in (2.0, 0.3, -1.0)]
    names = ["unedited", *shared, *random, band]
    assert list(steering.rows) == list(itertools.product(names, ["sw", "de"]))
    for language in ("sw", "de"):
        of_shared = steering.rows[f"shared-lambda{best}", language]
        of_random = [steering.rows[name, language] for name in random]
        for row in of_random:  # as many experts in each layer, but others
            assert row["experts"] == of_shared["experts"]
        assert len({str(row["scores"]) for row in (of_shared, *of_random)}) == 3
        assert list(steering.rows[band, language]["experts"]) == ["0"]
        assert "0" not in of_shared["experts"]


def test_scores_are_those_of_a_boost_by_hand(steering, dumps, tiny):
    english, _, chinese = analyze.load_routing(dumps).activation_frequency
    share = analyze.language_shares(np.stack([english, chinese]), 10)
    boosts = {}
    for layer in range(1, 7):  # of 8, as 10-39 of 48
        is_shared = (share[:, layer] < 0.7).all(0)
        if (share[0, layer] * is_shared).any():
            boosts[layer] = 2 * np.where(is_shared, share[0, layer], 0)
    row = steering.rows["shared-lambda2.0", "sw"]
    assert row["experts"] == {str(layer): np.count_nonzero(boosts[layer]) for layer in boosts}
    assert row["settings"]["band"] == list(boosts)
    expected = prompt_nll_one_by_one(tiny, "sw", 12, boosts=boosts)
    assert row["scores"]["prompt_nll"] == pytest.approx(expected, abs=1e-5)
    unsteered = steering.rows["unedited", "sw"]["scores"]["prompt_nll"]
    assert np.abs(np.subtract(expected, unsteered)).max() > 0.01


def test_changed_selections_are_counted_on_real_tokens(dumps, tiny, tmp_path):
    routing = analyze.load_routing(dumps)
    coefficients = steering_coefficients(routing, ["en", "zh"])
    args = parse(steer, "--routing", *dumps, "--languages", "sw,de", "--out", tmp_path / "r.jsonl")
    evaluator = common.Evaluator(args, routing)
    by_language = {}
    for language in ("sw", "de"):
        boost = boost_settings(args, "shared", coefficients, 0.3)
        by_language[language] = evaluator.changed_selections(language, *boost)
    slowly = count_changes_slowly(tiny, "sw", coefficients, 0.3)
    assert by_language["sw"] == pytest.approx(slowly, abs=1e-9)
    assert 0.01 < np.mean(list(slowly.values())) < 0.1
    mean = steer.mean_changed_selections(evaluator, ["sw", "de"], "shared", coefficients, 0.3)
    for layer in mean:
        of_layer = [changed[layer] for changed in by_language.values()]
        assert mean[layer] == pytest.approx(np.mean(of_layer))


def test_printed_gains_are_of_even_examples_and_effects_of_odd_ones(steering):
    best = best_lambda(steering)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    gains = read_table(steering.printed, "lambda")
    for strength in (2.0, 0.3, -1.0):
        changes = [mean_score(steering, f"shared-lambda{strength}", language, "prompt_nll", even)
                   - mean_score(steering, "unedited", language, "prompt_nll", even)
                   for language in ("sw", "de")]
        assert gains[str(strength)]["gain of prompt_nll"] == f"{-np.mean(changes):+.4f}"
    for metric in ("prompt_nll", "answer_nll"):
        table = read_table(steering.printed, f"{metric} without and with", f"lambda {best}")
        assert list(table) == ["sw", "de", "all"]
        assert [row["related"] for row in table.values()] == ["", "yes", ""]
        for label, languages in (("sw", ["sw"]), ("de", ["de"]), ("all", ["sw", "de"])):
            def mean(name):
                return np.mean([mean_score(steering, f"{name}-lambda{best}" if name else "unedited",
                                           language, metric, odd) for language in languages])

            before, after = mean(""), mean("shared")
            draws = [mean(f"random{seed}") - before for seed in (0, 1)]
            row = table[label]
            assert row["before"] == f"{before:.3f}" and row["after"] == f"{after:.3f}"
            assert row["change [95 % interval]"].startswith(f"{after - before:+.3f} [")
            assert row["random"] == f"{min(draws):.3f}..{max(draws):.3f}"
            assert row["layers 0-0"] == f"{mean('band 0-0') - before:+.3f}"
        # de is the only related language, and sw the only other one
        for name, language in (("related", "de"), ("other", "sw")):
            of_language = table[language]["change [95 % interval]"].split()[0]
            assert f"in {name} languages ({language}): {of_language}\n" in steering.printed


def test_what_random_experts_change_is_printed_beside_what_each_lambda_changes(steering):
    def mean_changed(name):
        return 100 * np.mean([list(steering.counted[name, language]["changed"].values())
                              for language in ("sw", "de")])

    best = best_lambda(steering)
    lambdas = read_table(steering.printed, "lambda")
    for strength in (2.0, 0.3, -1.0):
        expected = f"{mean_changed(f'shared-lambda{strength}'):.3f}"
        assert lambdas[str(strength)]["selections changed (%)"] == expected
    of_random = np.mean([mean_changed(f"random{seed}-lambda{best}") for seed in (0, 1)])
    assert f"{of_random:.3f} %" in steering.printed


@pytest.mark.parametrize("flags, languages, expected", [
    ([], ["de", "en", "zh"], ["de"]),
    (["--languages", "de,en"], ["de", "en"], ["de", "en"]),
    ([], ["en", "zh"], ["en", "zh"]),  # there is nothing else
])
def test_sources_are_not_scored_unless_they_are_named(flags, languages, expected):
    args = parse(steer, "--sources", "en,zh", *flags)
    assert scored_languages(args, dict.fromkeys(languages)) == expected


def test_a_selection_is_steered_in_responses_too(dumps, tiny, tmp_path):
    """The six experts that Chinese uses more than English are boosted, six others suppressed."""
    routing = analyze.load_routing(dumps)
    english, _, chinese = routing.activation_frequency
    difference = chinese - english
    largest = np.abs(difference) >= np.sort(np.abs(difference).ravel())[-12]
    selection = np.where(largest, difference, 0)
    assert (selection > 0).any() and (selection < 0).any()
    path = save_selection(tmp_path / "s.npz", selection, routing.layers)
    out = tmp_path / "r.jsonl"
    printed = run(steer, "--routing", *dumps, "--selection", path, "--languages", "sw", "--limit",
                  4, "--control-seeds", 1, "--rule", "soft", "--lambda", 5, "--out", out)
    rows = {row["cell"]: row for row in read_rows(out) if "changed" not in row}
    row, unsteered = rows["selection-lambda5.0"], rows["unedited"]

    model, tokenizer = tiny
    boosts = {layer: 5 * np.sign(of_layer) for layer, of_layer in enumerate(selection)
              if of_layer.any()}
    nll = prompt_nll_one_by_one(tiny, "sw", 4, boosts=boosts, rule="soft")
    assert row["scores"]["prompt_nll"] == pytest.approx(nll, abs=1e-5)
    examples = common.read_examples("tests/data/eval_sw.tsv")[:4]
    with common.edit_routing(model, boosts=boosts, rule="soft"):
        responses, _ = common.generate(
            model, tokenizer, common.encode_examples(tokenizer, examples), max_new_tokens=32)
    saved = read_rows(row["predictions"])
    assert [prediction["response"] for prediction in saved] == responses
    right = [common.last_number(response) == float(example["answer"][0])
             for response, example in zip(responses, examples)]
    assert row["scores"]["accuracy"] == right

    before = np.array(unsteered["scores"]["accuracy"])  # of all examples, with one lambda
    fixed, broken = sum(np.array(right) > before), sum(np.array(right) < before)
    assert fixed != broken
    cells = read_table(printed, "accuracy without and with")["sw"]
    assert (cells["fixed"], cells["broken"]) == (str(fixed), str(broken))
    assert (cells["before"], cells["after"]) == (f"{before.mean():.3f}", f"{np.mean(right):.3f}")


# ------------------------------------------------------------------------------ a planted effect

@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A folder with two models of two layers, and what is needed to boost expert 5 of layer 1.

    No token selects that expert. In the model "writes", it alone writes the answer, which is always
    7; in the model "empty", it writes nothing.
    """
    folder = tmp_path_factory.mktemp("planted")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    (seven,) = tokenizer.encode("7", add_special_tokens=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, moe_intermediate_size=8, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts=8,
        num_experts_per_tok=1, norm_topk_prob=True, tie_word_embeddings=False))
    with torch.no_grad():
        # The first coordinate is large in every token: expert 5 is turned away by it, and reads it
        model.model.embed_tokens.weight.normal_(0, 0.3)[:, 0] = 8
        for layer in model.model.layers:
            layer.mlp.gate.weight.normal_(0, 0.5)[:, 0] = 0
        block = model.model.layers[1].mlp
        block.gate.weight[5, 0] = -1
        block.experts.gate_up_proj[5, :, 0] = 1
        direction = model.lm_head.weight.normal_(0, 0.3)[seven].clone()
        block.experts.down_proj[5] = direction[:, None] / direction.norm()
        model.save_pretrained(folder / "writes")
        block.experts.down_proj[5] = 0
        model.save_pretrained(folder / "empty")
    for name in ("writes", "empty"):
        tokenizer.save_pretrained(folder / name)
    words = "apple egg pen cat dog box cup hat key map".split()
    (folder / "en.tsv").write_text("".join(f"How many {word}s?\t7\n" for word in words))
    save_dump(folder / "dump.npz", np.zeros((1, 2, 1), int))
    save_selection(folder / "s.npz", np.outer([0, 1], np.arange(8) == 5), [0, 1])
    return folder


@pytest.mark.parametrize("name, is_found", [("writes", True), ("empty", False)])
def test_a_planted_effect_is_found_and_without_it_none(planted, tmp_path, name, is_found):
    for seed in range(3):  # the draws are other experts
        assert random_coefficients({1: np.eye(8)[5]}, seed)[1][5] == 0
    printed = run(steer, "--model", planted / name, "--data", planted / "en.tsv", "--routing",
                  planted / "dump.npz", "--selection", planted / "s.npz", "--rule", "soft",
                  "--lambda", 6, "--metrics", "answer_nll", "--control-seeds", 3,
                  "--out", tmp_path / "r.jsonl")
    cells = read_table(printed, "answer_nll")["en"]
    change, _, ci_high = map(float, re.findall(r"[-+]\d\S*?\d{3}", cells["change [95 % interval]"]))
    least_random = float(cells["random"].split("..")[0])
    assert (ci_high < 0 and change < least_random - 0.1) == is_found
