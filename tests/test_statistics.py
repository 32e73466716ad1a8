"""Similarities, their noise, families and contrasts: by hand, against slow references, on planted structure and on none."""

import itertools
import json
import sys

import numpy as np
import pytest

import analyze
from analyze import (InputError, aligned_divergence, bootstrap, family_of, family_test, grouped_counts, linkage_order,
                     normalized_divergence, pair_measures, rank_correlation, read_families, select_contrast, split_half_floor)

# ----------------------------------------------------------------------------------------------------------- made by hand


def test_normalized_divergence_by_hand():
    p, q = np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])
    # JSD .5 bit; there is room for log2(3) bits less the 1 bit that each has
    assert normalized_divergence(p, q) == pytest.approx(0.5 / (np.log2(3) - 1))
    assert normalized_divergence(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(1)
    assert normalized_divergence(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 0  # no room, no difference
    assert normalized_divergence(p, p) == pytest.approx(0)


def test_pair_measures_by_hand():
    # two languages, one layer, three experts; the most frequent two are {0, 1} and {1, 2}
    measures = pair_measures(np.array([[[1.0, 1.0, 0.0]], [[0.0, 1.0, 1.0]]]), 2)
    assert {name: m.shape for name, m in measures.items()} == dict.fromkeys(analyze.MEASURES, (1, 2, 2))
    assert measures["similarity"][0, 0, 1] == pytest.approx(0.5)
    assert measures["divergence"][0, 0, 1] == pytest.approx(0.5 / (np.log2(3) - 1))
    assert measures["jaccard"][0, 0, 1] == pytest.approx(1 / 3)
    assert measures["cosine"][0, 0, 1] == pytest.approx(0.5)
    for name, itself in (("similarity", 1), ("divergence", 0), ("jaccard", 1), ("cosine", 1)):
        np.testing.assert_allclose(measures[name][0].diagonal(), itself, atol=1e-12)


def test_pair_measures_are_the_definitions_pair_by_pair():
    frequency = np.random.default_rng(0).dirichlet(np.full(16, 0.5), size=(4, 3)) * 2
    measures = pair_measures(frequency, 5)
    for i, j, layer in itertools.product(range(4), range(4), range(3)):
        a, b = frequency[i, layer], frequency[j, layer]
        top = [set(np.argsort(-x)[:5]) for x in (a, b)]
        natural = np.log(2) * (1 - analyze.jensen_shannon_similarity(a / 2, b / 2))
        entropies = [-sum(x / 2 * np.log(x / 2)) for x in (a, b)]
        assert measures["similarity"][layer, i, j] == pytest.approx(1 - natural / np.log(2))
        assert measures["divergence"][layer, i, j] == pytest.approx(natural / (np.log(16) - sum(entropies) / 2))
        assert measures["jaccard"][layer, i, j] == pytest.approx(len(top[0] & top[1]) / len(top[0] | top[1]))
        assert measures["cosine"][layer, i, j] == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_aligned_divergence_is_the_mean_over_sequences():
    probs = np.random.default_rng(1).dirichlet(np.ones(8), size=(3, 5, 2)).astype(np.float32)
    divergence, by_sequence = aligned_divergence(list(probs))
    for layer in range(2):
        each = [[normalized_divergence(probs[i, s, layer].astype(float), probs[j, s, layer].astype(float)) for s in range(5)]
                for i, j in ((0, 1), (0, 2), (1, 2))]
        np.testing.assert_allclose(divergence[layer][np.triu_indices(3, 1)], np.mean(each, 1), rtol=1e-4)
        np.testing.assert_allclose(by_sequence[:, layer], np.mean(each, 0), rtol=1e-4)
    assert (divergence == divergence.transpose(0, 2, 1)).all()


def test_counts_by_group_add_up_and_are_where_they_belong():
    ids = np.array([[[0, 1], [2, 3]], [[1, 0], [2, 1]], [[0, 3], [2, 0]]], np.uint8)  # 3 tokens, 2 layers, top_k 2
    counts = grouped_counts(ids, np.array([1, 0, 1]), 2, 4)
    assert counts[0].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]] and counts[1].tolist() == [[2, 1, 0, 1], [1, 0, 2, 1]]


def test_what_a_language_relies_on_by_hand():
    # of the two kept experts, aa's is exclusive to it, the other is shared half and half
    frequency = np.array([[[0.6, 0.3, 0.1, 0.0]], [[0.1, 0.3, 0.0, 0.6]]])
    result = analyze.analyze(frequency, 2, 0.7)
    assert result["exclusive"].astype(int).tolist() == [[[1, 0, 0, 0]], [[0, 0, 0, 1]]]
    assert result["shared"].astype(int).tolist() == [[0, 1, 0, 0]]
    np.testing.assert_allclose(result["reliance"][:, 0], [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])
    assert result["most_used"].ravel() == pytest.approx([0.6, 0.6]) and result["active"].tolist() == [[3], [3]]
    summary = analyze.summarize(result, {"all": np.array([True])})
    assert summary["num_exclusive"].tolist() == summary["num_shared"].tolist() == [1, 1]


def test_linkage_puts_the_alike_side_by_side():
    similarity = np.eye(5)
    for i, j, value in ((0, 3, 0.9), (1, 4, 0.8), (0, 1, 0.2), (2, 3, 0.5), (0, 2, 0.5)):
        similarity[i, j] = similarity[j, i] = value
    order = linkage_order(similarity)
    assert sorted(order) == list(range(5))
    where = {language: order.index(language) for language in order}
    assert abs(where[0] - where[3]) == abs(where[1] - where[4]) == 1
    assert {order[0], order[1]} == {1, 4} or {order[3], order[4]} == {1, 4}  # 2 joins 0 and 3 before 1 and 4 do


def test_average_linkage_takes_means_over_members():
    # 0 and 1 are joined first; to them, 2 is nearer at best (.8 to .5), but 3 on average (.475 to .45)
    similarity = np.eye(4)
    for i, j, value in ((0, 1, 0.9), (0, 2, 0.8), (1, 2, 0.1), (0, 3, 0.5), (1, 3, 0.45), (2, 3, 0.46)):
        similarity[i, j] = similarity[j, i] = value
    assert linkage_order(similarity) in ([1, 0, 3, 2], [2, 3, 0, 1])  # with the best for the mean: 1 0 2 3


def test_rank_correlation_and_its_p_by_hand():
    rng = np.random.default_rng(0)
    # rho = 1 - 6 * 2 / (4 * 15); of 24 orders 1 has rho 1 and 3 have .8, and as many the negative
    rho, p = rank_correlation([1, 2, 3, 4], [10, 20, 40, 30], rng)
    assert rho == pytest.approx(0.8) and p == pytest.approx(8 / 24)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1], rng)[0] == pytest.approx(-1)
    # ties get their mean rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    assert rank_correlation([5, 6, 6, 7], [1, 2, 3, 4], rng)[0] == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_family_test_by_hand():
    similarity = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.0], [0.1, 0.3, 1, 0.7], [0.2, 0.0, 0.7, 1]])
    within, between, p = family_test(similarity, ["a", "a", "b", "b"], np.random.default_rng(0))
    assert within == pytest.approx(0.8) and between == pytest.approx(0.15)
    assert p == pytest.approx(8 / 24)  # of 24 ways to deal the labels 8 make the same pairs
    assert np.isnan(family_test(similarity, list("abcd"), np.random.default_rng(0))).all()  # no pair in a family


def test_contrasts_by_hand():
    a, b = np.array([[0.9, 0.5, 0.6], [0.1, 1.0, 0.9]]), np.array([[0.4, 0.4, 1.2], [0.2, 0.5, 1.3]])
    difference, chosen = select_contrast(a, b, tau=0.45)
    np.testing.assert_allclose(difference, [[0.5, 0.1, -0.6], [-0.1, 0.5, -0.4]])
    assert chosen.astype(int).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert select_contrast(a, b, top=3)[1].astype(int).tolist() == [[1, 0, 1], [0, 1, 0]]


FLORES_200 = """ace acm acq aeb afr ajp aka amh apc arb ars ary arz asm ast awa ayr azb azj bak bam ban bel bem ben bho bjn bod bos bug
bul cat ceb ces cjk ckb crh cym dan deu dik dyu dzo ell eng epo est eus ewe fao fij fin fon fra fur fuv gaz gla gle glg grn guj hat
hau heb hin hne hrv hun hye ibo ilo ind isl ita jav jpn kab kac kam kan kas kat kaz kbp kea khk khm kik kin kir kmb kmr knc kon kor
lao lij lim lin lit lmo ltg ltz lua lug luo lus lvs mag mai mal mar min mkd mlt mni mos mri mya nld nno nob npi nso nus nya oci ory
pag pan pap pbt pes plt pol por prs quy ron run rus sag san sat scn shn sin slk slv smo sna snd som sot spa srd srp ssw sun swe swh
szl tam taq tat tel tgk tgl tha tir tpi tsn tso tuk tum tur twi tzm uig ukr umb urd uzn vec vie war wol xho ydd yor yue zho zsm zul"""


def test_every_language_of_flores_has_one_family(tmp_path):
    table = read_families(None)
    assert [code for code in FLORES_200.split() if code not in table] == []
    codes = [code for codes in analyze.FAMILIES.values() for code in codes.split()]
    assert len(codes) == len(set(codes))
    assert family_of("deu_Latn", table) == family_of("de-AT", table) == "Indo-European/Germanic"
    assert family_of("zho_Hans", table) == "Sino-Tibetan/Sinitic" and family_of("xx", table) is None
    (tmp_path / "f.tsv").write_text("xx\tMine\nde\tGermanic\n")
    assert family_of("xx", read_families(tmp_path / "f.tsv")) == "Mine" and family_of("de", read_families(tmp_path / "f.tsv")) == "Germanic"
    (tmp_path / "f.tsv").write_text("xx Mine\n")
    with pytest.raises(InputError, match="f.tsv:1: not a code, a tab and a family"):
        read_families(tmp_path / "f.tsv")


# ------------------------------------------------------------------------------------------------------------------ noise

BANDS = {"all": np.array([True, True])}


def test_bootstrap_errors_are_those_of_a_slow_bootstrap():
    rng = np.random.default_rng(0)
    counts = [rng.poisson(rng.gamma(0.5, 4, size=(1, 2, 8)), size=(30, 2, 8)).astype(np.float32) + 1 for _ in range(2)]
    intervals, stays, _ = bootstrap(counts, 2000, 3, 0.6, BANDS, np.random.default_rng(1))
    slow, exclusive = [], np.zeros((2, 2, 8))
    for _ in range(2000):
        totals = [sum(c[i] for i in rng.integers(30, size=30)) for c in counts]
        frequency = np.stack([t / t.sum(-1, keepdims=True) for t in totals])
        slow.append(analyze.jensen_shannon_similarity(*frequency).mean())
        exclusive += analyze.exclusive_experts(analyze.language_shares(frequency, 3), 0.6)
    frequency = np.stack([c.sum(0) / c.sum((0, 2))[:, None] for c in counts]).astype(float)
    middle = 2 * analyze.jensen_shannon_similarity(*frequency).mean() - np.mean(slow)  # the estimate less its bias
    low, high = intervals["mean_similarity"][:, 0]
    assert high - low == pytest.approx(2 * 1.96 * np.std(slow), rel=0.1) and (low + high) / 2 == pytest.approx(middle, abs=0.1 * (high - low))
    np.testing.assert_allclose(stays, exclusive / 2000, atol=0.05)
    assert ((stays > 0.1) & (stays < 0.9)).any()  # some expert is on the edge


def test_parallel_languages_draw_the_same_sequences():
    rng = np.random.default_rng(0)
    length = rng.integers(1, 50, size=(40, 1, 1))  # long problems are long in both languages
    counts = [np.broadcast_to(length, (40, 2, 8)) * rng.integers(0, 5, size=(40, 2, 8)).astype(np.float32) for _ in range(2)]
    by_sequence = rng.random((40, 2))
    low, high = bootstrap(counts, 3000, 3, 0.6, BANDS, rng, by_sequence)[0]["layer_aligned"]
    np.testing.assert_allclose(high - low, 2 * 1.96 * by_sequence.std(0) / np.sqrt(40), rtol=0.1)  # of a mean
    np.testing.assert_allclose((high + low) / 2, by_sequence.mean(0), atol=0.01)
    same = [counts[0], counts[0].copy()]
    assert bootstrap(same, 50, 3, 0.6, BANDS, rng, by_sequence)[1].sum() == 0  # always alike: no expert is ever exclusive
    assert bootstrap(same, 50, 3, 0.6, BANDS, rng)[1].sum() > 0


def test_the_floor_is_one_for_a_language_that_repeats_itself_and_lower_for_one_that_does_not():
    rng = np.random.default_rng(0)
    steady = np.tile(rng.integers(1, 9, size=(1, 2, 8)), (10, 1, 1)).astype(np.float32)
    floor = split_half_floor(steady, 3, rng)
    np.testing.assert_allclose(floor["similarity"], 1)
    np.testing.assert_allclose(floor["jaccard"], 1)
    varied = rng.multinomial(20, np.full(8, 1 / 8), size=(10, 2)).astype(np.float32)
    # against the mean over all ways to halve ten sequences
    every = []
    for half in itertools.combinations(range(10), 5):
        parts = [varied[list(half)].sum(0), varied[[i for i in range(10) if i not in half]].sum(0)]
        every.append(analyze.jensen_shannon_similarity(*(x / x.sum(-1, keepdims=True) for x in parts)))
    assert split_half_floor(varied, 3, rng)["similarity"] == pytest.approx(np.mean(every, 0), abs=0.01)
    assert np.mean(every) < 0.995


# ------------------------------------------------------------------------------------------------ planted structure, and none

LAYERS, EXPERTS, TOP_K = 6, 32, 4
FAMILY_OF = {"de": "g", "en": "g", "nl": "g", "es": "r", "fr": "r", "it": "r"}


def make_dump(folder, language, preference, rng, sequences=60, tokens=25, **arrays):
    """Routing of tokens that prefer experts by preference (layers, experts) plus noise of their sequence and their own."""
    noise = rng.normal(0, 0.3, (sequences, 1, LAYERS, EXPERTS)) + rng.gumbel(0, 1, (sequences, tokens, LAYERS, EXPERTS))
    logits = (preference + noise).reshape(-1, LAYERS, EXPERTS)
    ids = np.argsort(-logits, -1)[..., :TOP_K].astype(np.uint8)
    probs = np.exp(logits).reshape(sequences, tokens, LAYERS, EXPERTS)
    probs = (probs / probs.sum(-1, keepdims=True)).mean(1).astype(np.float32)
    meta = json.dumps({"language": language, "num_experts": EXPERTS})
    arrays = {"token_ids": rng.integers(0, 500, len(ids))} | arrays
    np.savez(folder / f"{language}.npz", selected_experts=ids, mean_probs=probs, sequence_offsets=np.arange(sequences + 1) * tokens,
             prompt_lengths=np.full(sequences, tokens), meta=meta, **arrays)
    return str(folder / f"{language}.npz")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Six languages: all layers alike, but the first two and the last two by family; it has experts of its own, 30 and 31."""
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    base = rng.normal(0, 1, (LAYERS, EXPERTS))
    base[:, 30:] = -5
    family = {name: rng.normal(0, 1.5, (LAYERS, EXPERTS)) * np.array([1, 1, 0, 0, 1, 1])[:, None] for name in "gr"}
    paths = []
    for language, name in FAMILY_OF.items():
        preference = base + family[name] + rng.normal(0, 0.2, (LAYERS, EXPERTS))
        preference[:, 30:] = 4 if language == "it" else -5
        paths.append(make_dump(folder, language, preference, rng))
    return paths


@pytest.fixture(scope="module")
def null(tmp_path_factory):
    """One language in eight parts."""
    folder, rng = tmp_path_factory.mktemp("null"), np.random.default_rng(1)
    preference = rng.normal(0, 1, (LAYERS, EXPERTS))
    return [make_dump(folder, language, preference, rng) for language in "bn de en es fr ja sw zh".split()]


def run(monkeypatch, capsys, folder, *arguments):
    """analyze.py as from the shell, in this process: what it printed and what it wrote."""
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments), "--out", str(folder / "analysis.npz")])
    analyze.main()
    with np.load(folder / "analysis.npz", allow_pickle=False) as file:
        return capsys.readouterr().out, dict(file)


THREE = ["--bands", "early=0-1", "middle=2-3", "late=4-5"]


def test_planted_structure_is_found(planted, monkeypatch, capsys, tmp_path):
    (tmp_path / "f.tsv").write_text("".join(f"{language}\t{name}\n" for language, name in FAMILY_OF.items()))
    printed, result = run(monkeypatch, capsys, tmp_path, *planted, *THREE, "--bootstrap", 200, "--families", tmp_path / "f.tsv")
    languages = result["languages"].tolist()
    low, high = result["interval_mean_similarity"]
    assert low[1] > max(high[0], high[2])  # the middle is shared
    within, between, p = result["family_tests"].T[:, :, 0]
    assert p[0] == p[2] == pytest.approx(72 / 720) and p[1] > 0.1  # no labelling separates better: 72 of 720 are this one
    assert within[0] > between[0] + 0.1 and abs(within[1] - between[1]) < 0.02
    for band in (0, 2):  # families stand together
        order = [FAMILY_OF[languages[i]] for i in result["order"][band]]
        assert order in (list("gggrrr"), list("rrrggg"))
    own = result["exclusive"][languages.index("it")] & (result["exclusive_stability"][languages.index("it")] >= 0.95)
    assert own[:, 30:].all()
    assert (result["floor_similarity"] > 0.97).all()
    assert result["interval_mean_reliance"][0, languages.index("it"), 0] > 0.3
    assert printed.count("floor") >= 2 and all(len(line) <= 100 for line in printed.splitlines())


def test_on_a_null_nothing_is_found(null, monkeypatch, capsys, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(dict(zip("bn de en es fr ja sw zh".split(), [7, 3, 5, 8, 2, 6, 4, 1]))))
    printed, result = run(monkeypatch, capsys, tmp_path, *null, *THREE, "--bootstrap", 200, "--scores", tmp_path / "s.json")
    stable = result["exclusive"] & (result["exclusive_stability"] >= analyze.STABLE)
    assert stable.sum() == 0 and result["exclusive"].sum() > 0  # by the definition alone there would be some
    assert (result["shared"] & (result["shared_stability"] >= analyze.STABLE)).sum() > 0.8 * 4 * LAYERS * 0.5
    assert (abs(result["layer_similarity"] - result["floor_similarity"].mean(0)) < 0.01).all()  # as alike as halves of one
    assert (result["family_tests"][:, :, 2] > 0.05).all()
    assert (result["score_correlation"][:, 1] > 0.05).all()


def test_intervals_cover_what_more_data_shows():
    """The mean similarity of two languages, estimated twenty times from 60 sequences each, against 3,000 sequences."""
    rng = np.random.default_rng(2)
    preference = [rng.normal(0, 1, (LAYERS, EXPERTS)) for _ in range(2)]

    def counts(k, sequences):
        noise = rng.normal(0, 0.3, (sequences, 1, LAYERS, EXPERTS)) + rng.gumbel(0, 1, (sequences, 10, LAYERS, EXPERTS))
        ids = np.argpartition(-(preference[k] + noise), TOP_K, -1)[..., :TOP_K].reshape(-1, LAYERS, TOP_K)
        return grouped_counts(ids, np.repeat(np.arange(sequences), 10), sequences, EXPERTS)

    def similarity(parts):
        return analyze.jensen_shannon_similarity(*(c.sum(0) / c.sum((0, 2))[:, None] for c in parts)).mean()

    truth, covered = similarity([counts(k, 3000) for k in (0, 1)]), 0
    bands = {"all": np.ones(LAYERS, bool)}
    for _ in range(20):
        sample = [counts(k, 60) for k in (0, 1)]
        low, high = bootstrap(sample, 60, 4, 0.6, bands, rng)[0]["mean_similarity"][:, 0]
        covered += low < truth < high
    assert covered >= 17


def test_the_vocabulary_control_tells_words_from_languages(monkeypatch, capsys, tmp_path):
    """Two languages that route common tokens alike and their own apart; against counting token by token."""
    rng = np.random.default_rng(0)
    paths, kept = [], {}
    for language, own in (("aa", range(10, 20)), ("bb", range(20, 30))):
        ids = rng.choice([*range(10), *own], size=400)
        selected = np.where(ids < 10, ids % 4, 4 + (ids % 4 if language == "aa" else ids % 8))[:, None, None] + np.zeros((1, 2, 1), int)
        meta = json.dumps({"language": language, "num_experts": 12})
        np.savez(tmp_path / f"{language}.npz", selected_experts=selected.astype(np.uint8), token_ids=ids, meta=meta)
        paths.append(tmp_path / f"{language}.npz")
        kept[language] = [np.bincount(selected[mask, 0, 0], minlength=12) / mask.sum() for mask in (ids < 10, ids >= 10)]
    printed, result = run(monkeypatch, capsys, tmp_path, *paths, "--vocabulary", "--bands", "all=0-1", "--threshold", 0.6)
    for k, name in enumerate(("common", "own")):
        expected = analyze.jensen_shannon_similarity(kept["aa"][k], kept["bb"][k])
        np.testing.assert_allclose(result[f"similarity_{name}_tokens"][:, 0, 1], expected)
    assert result["similarity_common_tokens"][0, 0, 1] > 0.98 > result["similarity_own_tokens"][0, 0, 1] + 0.2
    np.testing.assert_allclose(result["common_tokens"][0, 1], 0.5, atol=0.08)
    np.testing.assert_allclose(result["common_tokens"].diagonal(), 1)


def test_parallel_data_are_compared_sequence_by_sequence(planted, monkeypatch, capsys, tmp_path):
    printed, result = run(monkeypatch, capsys, tmp_path, *planted, *THREE, "--parallel", "--bootstrap", 50)
    probs = [np.load(path)["mean_probs"].astype(float) for path in planted[:2]]
    np.testing.assert_allclose(result["divergence_aligned"][:, 0, 1], normalized_divergence(*probs).mean(0), rtol=1e-4)
    assert f"{result['mean_aligned'][1]:.3f} [" in printed
    with np.load(planted[0]) as file:
        arrays = dict(file)
    np.savez(tmp_path / "short.npz", **arrays | {"mean_probs": arrays["mean_probs"][:-1]})
    with pytest.raises(InputError, match="--parallel takes as many sequences in every language"):
        run(monkeypatch, capsys, tmp_path, *planted[1:], tmp_path / "short.npz", "--parallel")


# ------------------------------------------------------------------------------------------------------ reading and writing

def test_the_plain_tables_read_no_more_than_they_need(planted, monkeypatch, capsys, tmp_path):
    with np.load(planted[0]) as file:
        arrays = dict(file)
    arrays["counts"] = grouped_counts(arrays["selected_experts"], np.zeros(1500, int), 1, EXPERTS)[0].astype(np.int64)
    arrays["meta"] = json.dumps({"language": "de", "num_experts": EXPERTS, "top_k": TOP_K})
    np.savez(tmp_path / "de.npz", **arrays)
    read, get = set(), np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: (read.add(key), get(self, key))[1])
    assert analyze.load_routing(str(tmp_path / "de.npz"))["num_tokens"] == 1500
    assert read == {"counts", "meta", "sequence_offsets"}


def test_a_digest_tells_contents_apart_without_their_bytes(tmp_path):
    for name, ids in (("a", [1, 2, 3]), ("same", [1, 2, 3]), ("other", [1, 2, 4])):
        np.savez(tmp_path / f"{name}.npz", selected_experts=np.array(ids))
    digests = [analyze.dump_digest(str(tmp_path / f"{name}.npz")) for name in ("a", "same", "other")]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("arguments, message", [
    (["--bootstrap", "1"], "--bootstrap takes 2 draws or more"),
    (["--scores", "none.json"], "No such file"),
    (["--scores", "README.md"], "README.md is not a JSON object"),
    (["--figures", "README.md"], "README.md is a file"),
    (["--top", "3"], "--top takes a number above 0, and --contrast A B"),
    (["--families", "none.tsv"], "No such file"),
    (["--figures", "no/such/folder"], "no such folder: no/such"),
    (["--parallel", "--part", "prompt"], "leave out --part"),
])
def test_what_is_missing_is_said_before_anything_is_computed(planted, monkeypatch, capsys, tmp_path, arguments, message):
    with pytest.raises((InputError, OSError), match=message):
        run(monkeypatch, capsys, tmp_path, *planted, *arguments)
    assert not (tmp_path / "analysis.npz").exists()


@pytest.mark.parametrize("flag", ["--bootstrap=10", "--vocabulary", "--parallel"])
def test_records_without_single_tokens_are_refused_by_name(monkeypatch, capsys, tmp_path, flag):
    layer = {str(e): {"activation_tokens": 1 + e} for e in range(8)} | {"total_tokens": 18}
    (tmp_path / "a.json").write_text(json.dumps({"0": layer}))
    (tmp_path / "b.json").write_text(json.dumps({"0": layer}))
    with pytest.raises(InputError, match="a.json is a recorder's, without single"):
        run(monkeypatch, capsys, tmp_path, tmp_path / "a.json", tmp_path / "b.json", flag)


def test_figures_are_drawn_or_what_to_install_is_said(planted, monkeypatch, capsys, tmp_path):
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(InputError, match="pip install matplotlib"):
            run(monkeypatch, capsys, tmp_path, *planted, "--figures", tmp_path / "figures")
    pytest.importorskip("matplotlib")
    run(monkeypatch, capsys, tmp_path, *planted, "--bootstrap", 5, "--figures", tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["experts.png", "heatmaps.png", "layers.png"]


def test_a_contrast_is_printed_and_written(planted, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["analyze.py", "--contrast", planted[5], planted[0], "--tau", "0.5", "--selection", str(tmp_path / "s.json")])
    analyze.main()
    printed = capsys.readouterr().out
    selection = analyze.load_selection(tmp_path / "s.json", np.arange(LAYERS), EXPERTS)
    it, de = (analyze.load_routing(path) for path in (planted[5], planted[0]))
    difference = it["counts"] / it["num_tokens"] - de["counts"] / de["num_tokens"]
    np.testing.assert_allclose(selection, np.where(difference > 0.5, difference, 0), atol=1e-6)
    assert (selection[:, 30:] > 0.5).all() and f"{(selection > 0).sum()} experts in layers 0-5: difference above 0.5" in printed
    monkeypatch.setattr(sys, "argv", ["analyze.py", "--contrast", *planted[:2], "--tau", "3", "--selection", str(tmp_path / "t.json")])
    with pytest.raises(InputError, match="no expert's frequency differs by more than 3"):
        analyze.main()
    for text, message in (("{}", "is no selection of experts"), ('{"experts": {"9": {"0": 1}}}', "names expert 0 of layer 9")):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(InputError, match=message):
            analyze.load_selection(tmp_path / "t.json", np.arange(LAYERS), EXPERTS)


def test_every_array_that_is_written_is_in_the_readme(planted, monkeypatch, capsys, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({language: 0.1 * i for i, language in enumerate(FAMILY_OF)}))
    _, result = run(monkeypatch, capsys, tmp_path, *planted, "--bootstrap", 5, "--parallel", "--vocabulary", "--scores", tmp_path / "s.json")
    readme = open("README.md", encoding="utf-8").read()
    assert [key for key in result if f"`{key}`" not in readme and not key.startswith("interval_")] == []
