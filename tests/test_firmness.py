"""The published routing of Qwen3-30B-A3B, and how firm what it shows is: intervals, company, settings,
families, random routers, and two dumps of the same tokens.
"""

import json
import sys

import numpy as np
import pytest

import analyze
from analyze import (InputError, agreement, family_test, frequencies,
                     holm, language_shares, load_languages, load_routing, script_of,
                     shared_experts, whose_experts)
from test_statistics import bootstrap, run

NAMES = "bn de en es fr ja sw zh".split()
PUBLISHED = [f"tests/data/qwen3-30b-a3b/{name}.npz" for name in NAMES]
SW = NAMES.index("sw")


# --------------------------------------------------------------------------- the published routing

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(printed, arrays) of analyze.py over the eight dumps, once."""
    with pytest.MonkeyPatch.context() as patch:
        import contextlib
        import io
        out = io.StringIO()
        path = tmp_path_factory.mktemp("published") / "a.npz"
        patch.setattr(sys, "argv", ["analyze.py", *PUBLISHED, "--leave-one-out", "--sensitivity",
                                    "--out", str(path)])
        with contextlib.redirect_stdout(out):
            analyze.main()
    with np.load(path, allow_pickle=False) as file:
        return out.getvalue(), dict(file)


def test_the_published_routing_gives_the_check_values(published):
    printed, result = published
    number = dict(zip(NAMES, result["num_exclusive"]))
    assert (number["sw"], number["de"]) == (271, 48)
    assert result["mean_similarity"] == pytest.approx([0.776, 0.913, 0.598], abs=5e-4)
    assert "early         0-4       0.776" in printed  # in the paper's bands
    assert "\nsw               271   207     413\n" in printed
    frequency = frequencies(load_languages(PUBLISHED))
    sources = language_shares(frequency[[NAMES.index("en"), NAMES.index("zh")]], 20)
    assert shared_experts(sources, 0.7)[10:40].sum() == 420


def test_counts_that_are_said_to_be_inexact_need_not_add_up(tmp_path):
    dump = load_routing(PUBLISHED[0])
    assert (dump["counts"].sum(1) != dump["num_tokens"] * 8).any() and dump["top_k"] == 8
    with np.load(PUBLISHED[0]) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    assert "bfloat16" in meta.pop("inexact")
    np.savez(tmp_path / "bn.npz", **arrays | {"meta": json.dumps(meta)})
    with pytest.raises(InputError, match="do not add up"):
        load_routing(str(tmp_path / "bn.npz"))


@pytest.mark.parametrize("flag", ["--bootstrap=5", "--parallel", "--vocabulary", "--part=text"])
def test_what_needs_tokens_is_a_line_of_what_the_dump_lacks(monkeypatch, capsys, tmp_path, flag):
    with pytest.raises(InputError, match="bn.npz holds no [a-z_]+; capture it again"):
        run(monkeypatch, capsys, tmp_path, *PUBLISHED, flag)


def test_a_part_of_the_exclusive_experts_belongs_to_two_languages(published):
    _, result = published
    owners = result["exclusive"].sum(0)
    assert ((owners > 0).sum(), (owners == 2).sum(), owners.max()) == (929, 218, 2)
    assert result["num_only"].sum() == 929 - 218
    # at a threshold of .4, the first is aa's and bb's at once, the second is aa's alone
    found = whose_experts(np.array([[[0.5, 0.5]], [[0.5, 0.1]]]), 2, 0.4)
    assert found["num_exclusive"].tolist() == [2, 1] and found["num_only"].tolist() == [1, 0]


def test_the_company_makes_the_number_of_exclusive_experts(published):
    _, result = published
    assert result["num_changed"][0].tolist() == [165, 264] and result["num_changed_by"][0] == "sw"
    frequency = frequencies(load_languages(PUBLISHED))
    copied = whose_experts(np.concatenate([frequency, frequency[[SW]]]), 15, 0.4)
    assert copied["num_exclusive"][SW] == 148
    without = whose_experts(np.delete(frequency, SW, 0), 15, 0.4)
    assert result["num_without"][:SW, SW].tolist() == without["num_exclusive"][:SW].tolist()
    np.testing.assert_allclose(result["reliance_without"][:SW, SW],
                               without["mean_reliance"][:SW, 0])
    assert np.isnan(result["num_without"].diagonal()).all()


def test_over_all_settings_swahili_relies_most_on_its_own_except_against_chinese(published):
    printed, result = published
    first = dict(zip(NAMES, result["first"][:, 0] * 42))
    assert (round(first["sw"]), round(first["zh"])) == (32, 10)
    exclusive = dict(zip(NAMES, result["exclusive_more"][SW]))
    assert [exclusive[name] for name in "de en es fr ja".split()] == [1] * 5
    assert exclusive["zh"] == pytest.approx(32 / 42)
    less = dict(zip(NAMES, result["shared_more"][:, SW]))  # than it, the column
    assert less["de"] == pytest.approx(0.55, abs=0.005) and less["en"] == pytest.approx(10 / 42)
    assert "sw            0.762" in printed


def test_the_settings_of_a_grid_are_counted_one_by_one():
    frequency = np.random.default_rng(0).dirichlet(np.full(32, 0.3), size=(3, 4)) * 2
    result, more, first = analyze.sensitivity(frequency), np.zeros((2, 3, 3)), np.zeros((3, 2))
    numbers = [2, 4, 5, 6, 8, 11]  # a twentieth and 10 of 128 are both two of 32
    for number in numbers:
        for threshold in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
            found = whose_experts(frequency, number, threshold)
            for k in (0, 1):
                parts = found["mean_reliance"][:, k]
                more[k] += [[a > b for b in parts] for a in parts]
            first[found["mean_reliance"][:, 0].argmax(), 0] += 1
            first[:, 1] += found["num_exclusive"] == found["num_exclusive"].max()
    np.testing.assert_allclose([result["exclusive_more"], result["shared_more"]], more / 36)
    np.testing.assert_allclose(result["first"], first / 36)


def test_reliance_is_nearly_the_mirror_of_similarity(published):
    printed, result = published
    rho, = result["mirror"]
    x = [sum(result["mean_reliance"][:, 0] < r) for r in result["mean_reliance"][:, 0]]
    alike = [row.sum() for row in result["similarity"].mean(0)]
    y = [sum(other < a for other in alike) for a in alike]
    gap = sum((a - b) ** 2 for a, b in zip(x, y))
    assert rho == pytest.approx(1 - 6 * gap / (8 * 63)) == pytest.approx(-0.905, abs=5e-4)
    assert "\n-0.905" in printed


def test_languages_of_no_order_show_the_mirror_too():
    """It comes with the definitions: what is as far from others as chance makes it shows it."""
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        base = rng.normal(0, 1.5, (12, 64))
        frequency = analyze.distribution(np.exp(base + rng.normal(0, 0.8, (8, 12, 64)))) * 4
        result = analyze.analyze(frequency, 8, 0.4)
        alike = result["similarity"].mean(0).sum(1)
        found.append(analyze.rank_correlation(result["mean_reliance"][:, 0], alike, rng)[0])
    assert np.mean(found) < -0.3


# ----------------------------------------------------------------------------------------- families

def test_families_branches_and_scripts_of_the_published_routing(published):
    printed, result = published
    assert result["scripts"].tolist() == "Beng Latn Latn Latn Latn Jpan Latn Hans".split()
    family, branch, script = result["family_tests"].reshape(3, 3, 5)
    assert result["family_rows"][3:6].tolist() == ["branch early", "branch middle", "branch late"]
    assert branch[:, 2] == pytest.approx([0.005, 0.033, 0.038], abs=5e-4)
    assert script[:, 2] == pytest.approx([0.071, 0.232, 0.036], abs=5e-4)
    # of 8! labelings, two branches of two, three languages alone: 2! 2! 2! 3! are this one
    assert branch[:, 3] == pytest.approx(1 / 210 * np.ones(3))
    assert script[:, 3] == pytest.approx(1 / 56 * np.ones(3))  # five of eight
    assert result["family_tests"][:, 4] == pytest.approx(holm(result["family_tests"][:, 2]))
    assert "branch early   0.923  0.765  0.005  0.005  0.043" in printed


def test_a_script_is_that_of_the_table_or_of_the_codes_end():
    codes = "de zh zho_Hans zho_Hant ja jpn_Jpan ru srp sw urd_Arab xx xx_Latn".split()
    scripts = "Latn Hans Hans Hant Jpan Jpan Cyrl Cyrl Latn Arab  Latn"
    assert list(map(script_of, codes)) == scripts.split(" ")


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.5, 0.4])) == pytest.approx([0.8, 0.8])
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1, 1])


def test_families_are_found_where_planted_and_else_as_rarely_as_p_says():
    rng, labels = np.random.default_rng(0), np.array(list("aaabbccd"))
    noise = rng.normal(size=(100, 8, 8))
    noise = noise + noise.transpose(0, 2, 1)
    found = family_test(noise, labels, rng)[:, 2]
    assert (found < 0.05).mean() <= 0.10  # two standard deviations of 100 draws of .05
    planted = noise[:30] + 4 * (labels[:, None] == labels)
    assert (family_test(planted, labels, rng)[:, 2] < 0.05).mean() > 0.9
    # of nine rows of chance, Holm leaves one below .05 in one case of twenty at the most
    nine = rng.random((4000, 9))
    assert np.mean([(holm(row) < 0.05).any() for row in nine]) < 0.06


# ---------------------------------------------------------------------------------------- intervals

LAYERS, EXPERTS, BANDS = 2, 32, {"all": np.ones(2, bool)}
COVERED = ("mean_reliance", "num_exclusive", "num_shared", "mean_jaccard", "mean_similarity",
           "mean_entropy")


def test_intervals_cover_the_truth_and_hold_their_estimate():
    """Three languages of known distributions, 40 samples of 60 sequences, 60 draws of each. With
    neither rule for the bias (the estimate less it, as normal intervals are) .70 to .77 of those
    that a threshold makes hold the truth.
    """
    rng, covered = np.random.default_rng(0), {key: [] for key in COVERED}
    for _ in range(40):
        base = rng.normal(0, 1, (LAYERS, EXPERTS))
        routing = np.exp(base + rng.normal(0, 0.6, (3, LAYERS, EXPERTS)))
        truth = analyze.summarize(analyze.analyze(analyze.distribution(routing), 5, 0.4), BANDS)
        counts = []
        for language in routing:  # sequences of 40 tokens, each near the language's distribution
            rates = language * rng.gamma(4, 1 / 4, (60, LAYERS, EXPERTS))
            counts.append(rng.poisson(40 * rates / language.sum(-1, keepdims=True)).astype("f4"))
        result = bootstrap(counts, 60, 5, 0.4, BANDS, rng)
        total = np.stack([each.sum(0) for each in counts]).astype(float)
        estimate = analyze.summarize(analyze.analyze(analyze.distribution(total), 5, 0.4), BANDS)
        for key in COVERED:
            low, high = result[f"interval_{key}"]
            assert (low <= estimate[key]).all() and (estimate[key] <= high).all()
            covered[key] += ((low <= truth[key]) & (truth[key] <= high)).ravel().tolist()
    assert {key: np.mean(values) for key, values in covered.items()
            if np.mean(values) < 0.88} == {}


def test_stable_reliance_is_on_experts_that_stay_exclusive_in_the_draws():
    rng = np.random.default_rng(0)
    # expert 0 is aa's for certain, 1 on the edge of .6
    rates = np.array([[40, 31.0, 29], [10, 20, 70]])[:, None, None]
    counts = [rng.poisson(np.broadcast_to(rate, (40, 1, 3))).astype("f4") for rate in rates]
    result = bootstrap(counts, 200, 2, 0.6, {"all": np.ones(1, bool)}, rng)
    stay, total = result["exclusive_stability"][0, 0], np.stack([each.sum(0) for each in counts])
    assert language_shares(analyze.distribution(total), 2)[0, 0, 1] > 0.6  # in the estimate
    assert stay[0] == 1 and 0.05 < stay[1] < 0.95
    part = counts[0].sum(0)[0] / counts[0].sum()
    assert result["stable_reliance"][0, 0] == pytest.approx(part[0], abs=1e-6)
    assert result["num_stable"][0, 0] == 1


# ----------------------------------------------------------------------------- routers of no training

def save(path, ids, language="xx", num_experts=8, **more):
    np.savez(path, selected_experts=ids, **more,
             meta=json.dumps({"language": language, "num_experts": num_experts}))
    return str(path)


def test_what_random_routers_show_stands_beside_what_was_measured(monkeypatch, capsys, tmp_path):
    rng, paths, null = np.random.default_rng(0), [], []
    for language in ("aa", "bb", "cc"):
        ids = np.argsort(rng.random((60, 4, 8)))[..., :2]
        null.append(rng.multinomial(120, rng.dirichlet(np.ones(8)), size=(5, 4)))
        paths.append(save(tmp_path / f"{language}.npz", ids, language, null_counts=null[-1]))
    flags = ("--threshold", 0.6, "--bands", "a=0-1", "b=2-3")
    printed, result = run(monkeypatch, capsys, tmp_path, *paths, *flags)
    each = [analyze.summarize(analyze.analyze(draw / 60, 1, 0.6), analyze.parse_bands(
        ["a=0-1", "b=2-3"], np.arange(4))) for draw in np.stack(null, 1)]
    for key in ("mean_similarity", "layer_similarity", "num_exclusive", "layer_exclusive"):
        np.testing.assert_allclose(result[f"null_{key}"], np.mean([e[key] for e in each], 0))
    band = next(line for line in printed.split("\n") if line.startswith("a   "))
    assert band.split()[3] == f"{result['null_mean_similarity'][0]:.3f}"
    save(tmp_path / "cc.npz", ids, "cc")  # without
    printed, result = run(monkeypatch, capsys, tmp_path, *paths, *flags)
    assert "note: no null routers are shown: there are none of cc" in printed
    assert "  null" not in printed and not any(key.startswith("null") for key in result)


# --------------------------------------------------------------------------- two dumps, the same text

def compare(monkeypatch, capsys, *paths):
    monkeypatch.setattr(sys, "argv", ["analyze.py", "--agreement", *map(str, paths)])
    analyze.main()
    return capsys.readouterr().out


def test_agreement_by_hand():
    # 3 tokens, 2 layers, top_k 2: the first token swaps an order, the second an expert of layer 1
    a = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    b = np.array([[[1, 0], [2, 3]], [[0, 1], [2, 4]], [[4, 5], [6, 7]]])
    columns, identical = agreement(a, b, 8)
    assert columns["same set"].tolist() == pytest.approx([1, 2 / 3])
    assert columns["overlap"] == pytest.approx([1, 5 / 6])
    assert columns["part here"].tolist() == pytest.approx([0, 1 / 3])
    assert columns["similarity"][0] == pytest.approx(1) and columns["similarity"][1] < 1
    assert identical == pytest.approx(2 / 3)


def test_agreement_of_dumps_counts_what_one_has_alone_and_names_the_first_other_token(
        monkeypatch, capsys, tmp_path):
    ids, tokens = np.argsort(np.random.default_rng(0).random((10, 3, 8)))[..., :2], np.arange(10)
    whole = save(tmp_path / "a.npz", ids, token_ids=tokens, sequence_offsets=[0, 4, 10],
                 prompt_lengths=[2, 3])
    last = [3, 9]  # an engine leaves them out
    short = save(tmp_path / "b.npz", np.delete(ids, last, 0)[..., ::-1], sequence_offsets=[0, 3, 8],
                 token_ids=np.delete(tokens, last))
    printed = compare(monkeypatch, capsys, whole, short)
    assert "8 tokens compared; 2 are in one dump only; 100.0% have the same" in printed
    assert "5 tokens compared; 0 are" in compare(monkeypatch, capsys, whole, whole, "--part=prompt")
    blind = save(tmp_path / "c.npz", np.delete(ids, last, 0), sequence_offsets=[0, 3, 8])
    assert "compared by the lengths of sequences alone" in compare(monkeypatch, capsys, whole, blind)
    ids[[0, 4, 5]] = -1  # as where an engine had the start of a prompt in its cache
    cached = save(tmp_path / "e.npz", ids, token_ids=tokens, sequence_offsets=[0, 4, 10])
    assert "7 tokens compared; 3 are in one" in compare(monkeypatch, capsys, whole, cached)
    tokens[6] = 77
    other = save(tmp_path / "d.npz", ids, token_ids=tokens, sequence_offsets=[0, 4, 10])
    with pytest.raises(InputError, match="first in sequence 1 at token 2: 6 and 77"):
        compare(monkeypatch, capsys, whole, other)
    with pytest.raises(InputError, match="holds no selected_experts"):
        compare(monkeypatch, capsys, *PUBLISHED[:2])
