"""How sure analyze.py's figures are: split halves, intervals, permutation tests and controls.

By hand, against slow versions, on planted structure, and where there is nothing to find.
"""

import itertools
import json
import tracemalloc

import numpy as np
import pytest

import analyze
from analyze import (
    InputError, aligned_divergence, count_by_group, family_tests, holm, interval, jensen_shannon,
    language_labels, load_routing, normalize, permutation_test, split_half_similarity)
from conftest import run_analyze, save_dump

PUBLISHED = [f"tests/data/qwen3-30b-a3b/{language}.npz"
             for language in "bn de en es fr ja sw zh".split()]
THREE_BANDS = ["--bands", "early=0-1", "middle=2-3", "late=4-5"]
BOTH_LAYERS = {"all": np.array([True, True])}


def slow_similarity(counts, others):
    """Return the mean similarity over layers of two languages' counts (sequences, layers, experts).
    """
    p, q = [total / total.sum(-1, keepdims=True) for total in (sum(counts), sum(others))]
    return jensen_shannon(p.astype(float), q.astype(float))[0].mean()


# ------------------------------------------------------------------------------------ split halves

def test_split_half_similarity_is_the_mean_over_halvings():
    rng = np.random.default_rng(0)
    steady = np.tile(rng.integers(1, 9, size=(1, 2, 8)), (10, 1, 1)).astype(np.float32)
    varied = rng.multinomial(20, np.full(8, 1 / 8), size=(10, 2)).astype(np.float32)
    bands = {"first": np.array([True, False]), "all": np.array([True, True])}
    result = split_half_similarity([steady, varied], bands, rng)
    np.testing.assert_allclose(result["split_half"][0], 1)  # all its sequences are the same

    similarities = []  # of all ways to halve ten sequences
    for half in itertools.combinations(range(10), 5):
        rest = [i for i in range(10) if i not in half]
        p, q = normalize(varied[list(half)].sum(0)), normalize(varied[rest].sum(0))
        similarities.append(jensen_shannon(p, q)[0])
    expected = np.mean(similarities, axis=0)
    assert expected.max() < 0.995
    np.testing.assert_allclose(result["split_half"][1], expected, atol=0.01)
    by_layer = result["split_half"].mean(0)
    np.testing.assert_allclose(result["layer_split_half"], by_layer)
    np.testing.assert_allclose(result["mean_split_half"], [by_layer[0], by_layer.mean()])


# --------------------------------------------------------------------------------------- intervals

def estimates_and_intervals(counts, bands, settings, num_draws, rng, sequence_aligned=None):
    """Return the estimates that these counts (sequences, layers, experts) give, and intervals."""
    totals = np.stack([by_sequence.sum(0, dtype=float) for by_sequence in counts])
    result = analyze.measure(normalize(totals), bands, *settings)
    if sequence_aligned is not None:
        layer_aligned = sequence_aligned.mean(0)
        result |= {"sequence_aligned": sequence_aligned, "layer_aligned": layer_aligned,
                   "mean_aligned": analyze.band_means(layer_aligned, bands)}
    return result, analyze.bootstrap(counts, result, bands, settings, num_draws, rng)


def test_counts_of_groups_by_hand():
    ids = np.array([[[0, 1], [2, 3]], [[1, 0], [2, 1]], [[0, 3], [2, 0]]], np.uint8)
    counts = count_by_group(ids, np.array([1, 0, 1]), 2, 4)
    assert counts.tolist() == [[[1, 1, 0, 0], [0, 1, 1, 0]], [[2, 1, 0, 1], [1, 0, 2, 1]]]


def test_sequences_without_a_token_of_the_segment_are_not_resampled(tmp_path):
    ids = np.array([[[0]], [[1]], [[2]], [[3]]])
    path = save_dump(tmp_path / "a.npz", ids, sequence_offsets=[0, 2, 3, 3, 4],
                     prompt_lengths=[1, 0, 0, 1])
    counts, = analyze.count_by_sequence(load_routing(path, "prompt"))
    assert counts[:, 0, :4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    counts, = analyze.count_by_sequence(load_routing(path))
    assert counts[:, 0, :4].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("kind, estimate, expected", [
    # the draws' mean is .4, their standard deviation .1414, of which 1.96 are .277
    ("smooth", [0.5], [0.223, 0.877]),       # .1 further up, away from the draws
    ("thresholded", [0.5], [0.123, 0.777]),  # .1 further down, towards the draws
    ("smooth", [0.8], [0.523, 1]),           # a fraction ends at 1
    ("thresholded", [0.2], [0, 0.677]),      # and at 0
    ("thresholded", [2], [0.123, 2.277]),    # a number of experts may be larger
])
def test_an_interval_by_hand(kind, estimate, expected):
    drawn = np.array([[0.3], [0.5]])
    low, high = interval(np.array(estimate), drawn, kind)
    assert [low[0], high[0]] == pytest.approx(expected, abs=5e-4)


def test_intervals_are_those_of_a_slow_bootstrap():
    rng = np.random.default_rng(0)
    counts = [rng.poisson(rng.gamma(0.5, 4, size=(1, 2, 8)), size=(30, 2, 8)) + 1
              for _ in range(2)]
    counts = [by_sequence.astype(np.float32) for by_sequence in counts]
    result, intervals = estimates_and_intervals(counts, BOTH_LAYERS, (3, 0.6), 2000, rng)
    drawn = []
    for _ in range(2000):
        resampled = [[by_sequence[i] for i in rng.integers(30, size=30)] for by_sequence in counts]
        drawn.append(slow_similarity(*resampled))
    estimate = slow_similarity(*counts)
    assert result["mean_similarity"] == pytest.approx(estimate)
    bias = np.mean(drawn) - estimate
    assert bias < 0  # resampled languages are less similar
    low, high = intervals["interval_mean_similarity"][:, 0]
    assert estimate - low == pytest.approx(1.96 * np.std(drawn), rel=0.1)
    assert high - estimate == pytest.approx(1.96 * np.std(drawn) - bias, rel=0.1)


COVERED = ["mean_reliance", "num_exclusive", "num_shared", "mean_jaccard", "mean_similarity",
           "mean_divergence", "layer_entropy"]


def test_intervals_cover_the_truth():
    """Forty samples of 60 sequences of three languages whose distributions are known.

    If intervals of thresholded figures were shifted by the bias, .70 to .77 would cover.
    """
    rng = np.random.default_rng(0)
    covered = {name: [] for name in COVERED}
    for _ in range(40):
        base = rng.normal(0, 1, (2, 32))
        truth_p = normalize(np.exp(base + rng.normal(0, 0.6, (3, 2, 32))))
        truth = analyze.measure(truth_p, BOTH_LAYERS, 5, 0.4)
        counts = []
        for p in truth_p:  # sequences of 40 tokens, each near its language's distribution
            rates = 40 * p * rng.gamma(4, 1 / 4, (60, 2, 32))
            counts.append(rng.poisson(rates).astype(np.float32))
        result, intervals = estimates_and_intervals(counts, BOTH_LAYERS, (5, 0.4), 60, rng)
        for name in COVERED:
            low, high = intervals[f"interval_{name}"]
            assert (low <= result[name]).all() and (result[name] <= high).all()
            covered[name] += ((low <= truth[name]) & (truth[name] <= high)).ravel().tolist()
    fractions = {name: np.mean(values) for name, values in covered.items()}
    assert min(fractions.values()) >= 0.88, fractions


def test_languages_of_parallel_data_draw_the_same_sequences():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, size=(40, 1, 1))  # a long problem is long in every language
    one, other = [(lengths * rng.integers(0, 5, size=(40, 2, 8))).astype(np.float32)
                  for _ in range(2)]
    aligned = rng.random((40, 2))
    _, intervals = estimates_and_intervals(
        [one, other], BOTH_LAYERS, (3, 0.6), 2000, rng, sequence_aligned=aligned)
    low, high = intervals["interval_layer_aligned"]
    standard_error = aligned.std(0) / np.sqrt(40)  # of a mean
    np.testing.assert_allclose(high - low, 2 * 1.96 * standard_error, rtol=0.1)
    np.testing.assert_allclose((high + low) / 2, aligned.mean(0), atol=0.01)
    low, high = intervals["interval_mean_aligned"]
    standard_error = aligned.mean(1).std() / np.sqrt(40)
    np.testing.assert_allclose(high - low, 2 * 1.96 * standard_error, rtol=0.1)

    # a language and its copy are equal in every draw if they draw the same, else in none
    for sequence_aligned, is_equal in ((aligned, True), (None, False)):
        _, intervals = estimates_and_intervals(
            [one, one.copy()], BOTH_LAYERS, (3, 0.6), 20, rng, sequence_aligned)
        low, high = intervals["interval_mean_similarity"][:, 0]
        assert (low == pytest.approx(1)) == is_equal
        assert (intervals["interval_num_exclusive"][1] == 0).all() == is_equal


# --------------------------------------------------------------------------------- families, tests

def slow_permutation_test(similarity, labels, shuffles):
    """Test one matrix, pair by pair; return the four columns of permutation_test."""
    pairs = list(itertools.combinations(range(len(labels)), 2))

    def means(order):
        same, other = [], []
        for i, j in pairs:
            group = same if labels[order[i]] == labels[order[j]] else other
            group.append(similarity[i, j])
        return sum(same) / len(same), sum(other) / len(other)

    def unites(order):
        return [labels[order[i]] == labels[order[j]] for i, j in pairs]

    same, other = means(range(len(labels)))
    gaps = [np.subtract(*means(order)) for order in shuffles]
    p = np.mean([gap >= same - other - 1e-12 for gap in gaps])
    smallest_p = np.mean([unites(order) == unites(range(len(labels))) for order in shuffles])
    return same, other, p, smallest_p


def random_similarity(rng, rows, n):
    matrix = rng.normal(size=(rows, n, n))
    return matrix + matrix.transpose(0, 2, 1)


def test_a_permutation_test_by_hand():
    similarity = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0], [0.1, 0.3, 1, 0.7],
                           [0.2, 0, 0.7, 1]])
    rng = np.random.default_rng(0)
    result = permutation_test(np.stack([similarity, similarity / 2]), np.array(list("aabb")), rng)
    # 8 of 24 permutations unite the same languages
    assert result[0] == pytest.approx([0.8, 0.15, 8 / 24, 8 / 24])
    assert result[1] == pytest.approx([0.4, 0.075, 8 / 24, 8 / 24])
    for labels in ("abcd", "aaaa"):  # no pair shares a label, or every one
        assert np.isnan(permutation_test(similarity[None], np.array(list(labels)), rng)).all()


@pytest.mark.parametrize("labels", ["ab" * 3, "aabcd", "aaab", "aab"])
def test_up_to_eight_languages_are_tested_exactly(labels):
    rng = np.random.default_rng(len(labels))
    similarity = random_similarity(rng, 12, len(labels)).round(1)  # with ties
    shuffles = list(itertools.permutations(range(len(labels))))
    result = permutation_test(similarity, np.array(list(labels)), rng)
    for row, matrix in zip(result, similarity):
        assert row == pytest.approx(slow_permutation_test(matrix, labels, shuffles))


def test_more_languages_are_tested_by_random_permutations(monkeypatch):
    monkeypatch.setattr(analyze, "NUM_PERMUTATIONS", 300)
    labels = "aaabbccdd"
    similarity = random_similarity(np.random.default_rng(0), 2, 9)
    shuffles = analyze.permutations(9, np.random.default_rng(5))
    assert shuffles.shape == (301, 9)
    assert shuffles[0].tolist() == list(range(9))  # the observed labelling counts, so p is not 0
    assert (np.sort(shuffles) == range(9)).all()
    result = permutation_test(similarity, np.array(list(labels)), np.random.default_rng(5))
    for row, matrix in zip(result, similarity):
        assert row == pytest.approx(slow_permutation_test(matrix, labels, shuffles))


def test_many_languages_are_tested_without_much_memory():
    similarity = random_similarity(np.random.default_rng(0), 1, 60)  # 1,770 pairs
    tracemalloc.start()
    permutation_test(similarity, np.repeat(range(20), 3), np.random.default_rng(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # a number for each pair of each of 10,000 permutations takes 140 MB


@pytest.mark.parametrize("labels", ["aaabbcc", "aaabbbcccddd"])
def test_a_planted_family_is_found_and_chance_as_rarely_as_p_says(monkeypatch, labels):
    monkeypatch.setattr(analyze, "NUM_PERMUTATIONS", 500)
    labels, rng = np.array(list(labels)), np.random.default_rng(0)
    noise = random_similarity(rng, 1000, len(labels))
    p = permutation_test(noise, labels, rng)[:, 2]
    assert (p < 0.05).mean() == pytest.approx(0.05, abs=0.014)  # two standard deviations
    assert p.mean() == pytest.approx(0.5, abs=0.03)
    planted = noise[:50] + 4 * (labels[:, None] == labels)
    assert (permutation_test(planted, labels, rng)[:, 2] < 0.05).mean() > 0.9


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.5, 0.4])) == pytest.approx([0.8, 0.8])
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1, 1])


def test_after_holm_chance_is_found_in_one_of_twenty_analyses():
    p = np.random.default_rng(0).random((4000, 9))
    assert 0.04 < np.mean([(holm(row) < 0.05).any() for row in p]) < 0.06


def test_languages_are_tested_by_family_branch_and_script():
    languages = ["de", "en", "ru", "zh", "yue", "xx"]  # xx is unknown, and most similar to all
    similarity = random_similarity(np.random.default_rng(0), 2, 6)
    similarity[:, 5] = similarity[:, :, 5] = 9
    result = {"bands": np.array(["low", "high"]), "band_similarity": similarity}
    result = family_tests(result | language_labels(languages), np.random.default_rng(0))
    names = result["family_rows"].tolist()
    assert names == [f"{level} {band}" for level in ("family", "branch", "script")
                     for band in ("low", "high")]
    tests = dict(zip(names, result["family_tests"]))
    by_hand = {"family": "aaabb", "branch": "aabcc", "script": "aabcd"}
    shuffles = list(itertools.permutations(range(5)))
    for level, labels in by_hand.items():
        for band, matrix in zip(("low", "high"), similarity):
            expected = slow_permutation_test(matrix, labels, shuffles)
            assert tests[f"{level} {band}"][:4] == pytest.approx(expected)
    assert result["family_tests"][:, 4] == pytest.approx(holm(result["family_tests"][:, 2]))


def test_families_branches_and_scripts_of_the_published_routing():
    routing = load_routing(PUBLISHED)
    bands = analyze.parse_bands(None, routing.layers)
    result = analyze.measure(routing.activation_frequency, bands, 15, 0.4)
    result |= {"bands": np.array(list(bands))} | language_labels(routing.languages)
    result = family_tests(result, np.random.default_rng(0))
    family, branch, script = result["family_tests"].reshape(3, 3, 5)
    assert branch[0, :2] == pytest.approx([0.923, 0.765], abs=5e-4)
    assert branch[:, 2] == pytest.approx([0.005, 0.033, 0.038], abs=5e-4)
    assert script[:, 2] == pytest.approx([0.071, 0.232, 0.036], abs=5e-4)
    assert branch[0, 4] == pytest.approx(0.043, abs=5e-4)
    # two branches of two and four alone: 2! 2! 2! 4! of 8! permutations; five of eight in Latn
    assert branch[:, 3] == pytest.approx(np.full(3, 1 / 210))
    assert script[:, 3] == pytest.approx(np.full(3, 1 / 56))


# ------------------------------------------------------------------- planted structure, and none

LAYERS, EXPERTS, TOP_K = 6, 32, 4
GERMANIC, ROMANCE = ("de", "en", "nl"), ("es", "fr", "it")


def make_dump(folder, language, preference, rng, sequences=60, tokens=25):
    """Write a dump of tokens that prefer experts by `preference` (layers, experts)."""
    logits = preference + rng.gumbel(0, 1, (sequences, tokens, LAYERS, EXPERTS))
    logits += rng.normal(0, 0.3, (sequences, 1, LAYERS, EXPERTS))
    ids = np.argsort(-logits.reshape(-1, LAYERS, EXPERTS))[..., :TOP_K]
    mean_probs = normalize(np.exp(logits)).mean(1).astype(np.float32)
    return save_dump(
        folder / f"{language}.npz", ids.astype(np.uint8), language, EXPERTS, mean_probs=mean_probs,
        sequence_offsets=np.arange(sequences + 1) * tokens)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Dumps of six languages. In the first and last two layers, branches differ; experts 30 and 31
    belong to it.
    """
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    base = rng.normal(0, 1, (LAYERS, EXPERTS))
    paths = []
    for branch in (GERMANIC, ROMANCE):
        of_branch = rng.normal(0, 1.5, (LAYERS, EXPERTS))
        of_branch[2:4] = 0
        for language in branch:
            preference = base + of_branch + rng.normal(0, 0.2, (LAYERS, EXPERTS))
            preference[:, 30:] = 4 if language == "it" else -5
            paths.append(make_dump(folder, language, preference, rng))
    return paths


def test_planted_structure_is_found(planted, tmp_path):
    printed, result = run_analyze(tmp_path / "a.npz", *planted, *THREE_BANDS, "--bootstrap", 100)
    low, high = result["interval_mean_similarity"]
    assert low[1] > max(high[0], high[2])  # languages are alike in the middle
    assert (result["mean_split_half"] > 0.97).all()

    # all languages are of one family and one script
    assert result["family_rows"].tolist() == ["branch early", "branch middle", "branch late"]
    same, other, p, _, holm_p = result["family_tests"].T
    # no permutation separates languages better than the 72 of 720 that unite the same
    assert p[0] == p[2] == pytest.approx(72 / 720)
    assert p[1] > 0.1
    assert same[0] > other[0] + 0.1 and abs(same[1] - other[1]) < 0.02
    assert holm_p[0] == pytest.approx(0.3)

    italian = result["languages"].tolist().index("it")
    assert result["exclusive"][italian, :, 30:].all()
    assert result["interval_mean_reliance"][0, italian, 0] > 0.3
    assert result["interval_num_exclusive"][0, italian] > result["num_exclusive"][:italian].max()
    assert f"  {result['mean_split_half'][0]:.3f}  " in printed
    cell = f"{result['mean_similarity'][1]:.3f} [{low[1]:.3f}".replace("[0.", "[.")
    assert cell in printed


def test_where_nothing_is_planted_nothing_is_found(tmp_path):
    """One language in eight dumps, under the names of eight languages."""
    rng = np.random.default_rng(1)
    preference = rng.normal(0, 1, (LAYERS, EXPERTS))
    paths = [make_dump(tmp_path, language, preference, rng)
             for language in "bn de en es fr ja sw zh".split()]
    _, result = run_analyze(tmp_path / "a.npz", *paths, *THREE_BANDS, "--bootstrap", 50)
    # languages are as similar as halves of one
    np.testing.assert_allclose(result["layer_similarity"], result["layer_split_half"], atol=0.01)
    assert (result["interval_layer_similarity"][1] > result["layer_split_half"]).all()
    assert len(result["family_rows"]) == 9
    assert (result["family_tests"][:, 4] > 0.05).all()


# -------------------------------------------------------------------------------------- vocabulary

@pytest.mark.filterwarnings("error")
def test_vocabulary_is_controlled_pair_by_pair_and_token_by_token(tmp_path):
    rng = np.random.default_rng(0)
    ids, experts, paths = {}, {}, []
    for language, first in (("aa", 0), ("bb", 5), ("cc", 12)):  # aa and bb have 10 words in common
        ids[language] = rng.integers(first, first + 15, size=200)
        experts[language] = np.argsort(rng.random((200, 2, 6)))[..., :2]
        paths.append(save_dump(tmp_path / f"{language}.npz", experts[language], language, 6,
                               token_ids=ids[language]))
    _, result = run_analyze(tmp_path / "a.npz", *paths, "--vocabulary", "--bands", "both=0-1")

    def distribution(language, other, layer, common):
        counts = [0] * 6
        for token, selected in zip(ids[language], experts[language]):
            if (token in ids[other]) == common:
                for expert in selected[layer]:
                    counts[expert] += 1
        return normalize(np.array(counts))

    pairs = list(itertools.permutations(enumerate(("aa", "bb", "cc")), 2))
    for (i, a), (j, b) in pairs:
        for name, common in (("common", True), ("own", False)):
            for layer in range(2):
                p, q = distribution(a, b, layer, common), distribution(b, a, layer, common)
                expected = jensen_shannon(p, q)[0]
                found = result[f"similarity_{name}_tokens"][layer, i, j]
                assert found == pytest.approx(expected)
        assert result["common_tokens"][i, j] == np.isin(ids[a], ids[b]).mean()
    assert result["common_tokens"].diagonal().tolist() == [1, 1, 1]
    assert np.isnan(result["similarity_own_tokens"][:, range(3), range(3)]).all()
    for name in ("common", "own"):
        similarity = result[f"similarity_{name}_tokens"]
        expected = np.mean([similarity[:, i, j] for (i, _), (j, _) in pairs])
        assert result[f"mean_{name}_tokens"] == pytest.approx(expected)


# ------------------------------------------------------------------------------------ null routers

def test_null_routers_give_the_mean_of_their_draws_figures(tmp_path):
    rng = np.random.default_rng(0)
    paths, null_counts = [], []
    for draws, language in ((5, "aa"), (5, "bb"), (7, "cc")):
        ids = np.argsort(rng.random((60, 4, 8)))[..., :2]
        null_counts.append(rng.multinomial(120, rng.dirichlet(np.ones(8)), size=(draws, 4)))
        paths.append(save_dump(tmp_path / f"{language}.npz", ids, language,
                               prompt_lengths=[60], null_counts=null_counts[-1]))
    flags = ["--threshold", 0.6, "--bands", "a=0-1", "b=2-3"]
    printed, result = run_analyze(tmp_path / "o.npz", *paths, *flags)
    bands = analyze.parse_bands(["a=0-1", "b=2-3"], np.arange(4))
    figures = []
    for draw in range(5):  # as many as every dump has
        frequency = np.stack([counts[draw] for counts in null_counts]) / 60
        figures.append(analyze.measure(frequency, bands, 1, 0.6))
    for name in ("mean_similarity", "layer_similarity", "num_exclusive", "layer_exclusive"):
        expected = np.mean([figure[name] for figure in figures], axis=0)
        np.testing.assert_allclose(result[f"null_{name}"], expected)
    assert f"{result['null_mean_similarity'][0]:.3f}" in printed

    _, result = run_analyze(tmp_path / "o.npz", *paths, *flags, "--segment", "prompt")
    assert not any(name.startswith("null") for name in result)  # they were given all tokens


def test_null_routers_are_left_out_with_a_note_if_a_dump_has_none(tmp_path, capsys):
    ids = np.argsort(np.random.default_rng(0).random((60, 4, 8)))[..., :2]
    null_counts = np.full((2, 4, 8), 15)
    with_null = save_dump(tmp_path / "a.npz", ids, "aa", null_counts=null_counts)
    without = save_dump(tmp_path / "b.npz", ids, "bb")
    assert len(load_routing([with_null, f"bb={with_null}"]).null_counts) == 2
    assert capsys.readouterr().err == ""
    assert len(load_routing([with_null, without]).null_counts) == 0
    assert "bb" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- parallel data

def test_parallel_data_are_compared_sequence_by_sequence():
    probs = np.random.default_rng(1).dirichlet(np.ones(8), size=(3, 5, 2)).astype(np.float32)
    bands = {"second": np.array([False, True])}
    result = aligned_divergence(list(probs), bands)
    by_pair = np.zeros((2, 3, 3))
    by_sequence = np.zeros((5, 2))
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for sequence in range(5):
            for layer in range(2):
                p, q = probs[[i, j], sequence, layer].astype(float)
                divergence = jensen_shannon(p, q)[1]
                by_pair[layer, [i, j], [j, i]] += divergence / 5
                by_sequence[sequence, layer] += divergence / 3
    np.testing.assert_allclose(result["divergence_aligned"], by_pair)
    np.testing.assert_allclose(result["sequence_aligned"], by_sequence)
    np.testing.assert_allclose(result["layer_aligned"], by_sequence.mean(0))
    np.testing.assert_allclose(result["mean_aligned"], [by_sequence[:, 1].mean()])


def test_a_parallel_analysis_reads_mean_probs(planted, tmp_path):
    printed, result = run_analyze(
        tmp_path / "a.npz", *planted, *THREE_BANDS, "--parallel", "--bootstrap", 20)
    p, q = [np.load(path)["mean_probs"].astype(float) for path in planted[:2]]
    expected = jensen_shannon(p, q)[1].mean(0)
    np.testing.assert_allclose(result["divergence_aligned"][:, 0, 1], expected)
    assert f"{result['mean_aligned'][1]:.3f} [" in printed


# ------------------------------------------------------------------------- what cannot be computed

@pytest.mark.parametrize("flag", ["--bootstrap=5", "--parallel", "--vocabulary", "--segment=text"])
def test_what_a_dump_lacks_is_named_with_the_fix(tmp_path, flag):
    bare = save_dump(tmp_path / "bare.npz", np.argsort(np.random.default_rng(0).random((9, 2, 8))))
    for path in (PUBLISHED[0], bare):  # counts alone; expert IDs alone
        with pytest.raises(InputError) as error:
            run_analyze(tmp_path / "a.npz", path, flag)
        assert path in str(error.value) and "\n" not in str(error.value)
        assert "capture it again" in str(error.value) or "leave out --bootstrap" in str(error.value)


@pytest.mark.parametrize("flags, change", [
    (["--bootstrap", 2], {"counts": np.full((2, 8), 10)}),
    (["--vocabulary"], {"counts": np.full((2, 8), 10)}),
    (["--bootstrap", 2], {"selected_experts": np.full((40, 2, 2), 77)}),
    (["--parallel"], {"mean_probs": np.ones((5, 2, 7))}),  # an expert is missing
    (["--parallel"], {"mean_probs": np.ones((4, 2, 8))}),  # a sequence is missing
    (["--parallel", "--bootstrap", 2], {"sequence_offsets": [0, 10, 10, 20, 30, 40]}),
])
def test_arrays_that_contradict_each_other_are_refused(tmp_path, flags, change):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40, 2, 8)))[..., :2]
    arrays = {
        "selected_experts": ids,
        "counts": count_by_group(ids, np.zeros(40, int), 1, 8)[0],
        "mean_probs": rng.dirichlet(np.ones(8), size=(5, 2)),
        "sequence_offsets": [0, 8, 16, 24, 32, 40],
        "token_ids": np.arange(40),
        "meta": json.dumps({"language": "aa", "num_experts": 8, "top_k": 2}),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez(tmp_path / "b.npz", **arrays | change)
    paths = [tmp_path / "a.npz", f"bb={tmp_path / 'b.npz'}"]
    run_analyze(tmp_path / "o.npz", paths[0], f"bb={paths[0]}", *flags)
    with pytest.raises(InputError) as error:
        run_analyze(tmp_path / "o.npz", *paths, *flags)
    assert "\n" not in str(error.value)
