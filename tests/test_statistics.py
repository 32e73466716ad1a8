"""Similarities, their noise, families and contrasts: by hand, against slow references, on planted
structure and on none.
"""

import inspect
import itertools
import json
import re
import sys

import numpy as np
import pytest

import analyze
from analyze import (InputError, aligned_divergence, family_of,
                     family_test, grouped_counts, jensen_shannon,
                     linkage_order, pair_measures, rank_correlation,
                     read_families, select_contrast, split_half_floor)

# ----------------------------------------------------------------------------------- made by hand


def test_normalized_divergence_by_hand():
    p, q = np.array([0.5, 0.5, 0]), np.array([0, 0.5, 0.5])
    # JSD .5 bit; there is room for log2(3) bits less the 1 bit that each has
    assert jensen_shannon(p, q)[1] == pytest.approx(0.5 / (np.log2(3) - 1))
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0]))[1] == pytest.approx(1)
    uniform = np.array([0.5, 0.5])
    assert jensen_shannon(uniform, uniform)[1] == 0  # no room, no difference
    assert jensen_shannon(p, p)[1] == pytest.approx(0)


def test_pair_measures_by_hand():
    # two languages, one layer, three experts; the most frequent two are {0, 1} and {1, 2}
    measures = pair_measures(np.array([[[1.0, 1.0, 0.0]], [[0.0, 1.0, 1.0]]]), 2)
    shapes = {name: measure.shape for name, measure in measures.items()}
    assert shapes == dict.fromkeys(analyze.MEASURES, (1, 2, 2))
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
        one, other = (set(np.argsort(-x)[:5]) for x in (a, b))
        p, q, middle = a / 2, b / 2, (a + b) / 4
        nats = (sum(p * np.log(p / middle)) + sum(q * np.log(q / middle))) / 2
        entropy = -(sum(p * np.log(p)) + sum(q * np.log(q))) / 2
        expected = {"similarity": 1 - nats / np.log(2), "divergence": nats / (np.log(16) - entropy),
                    "jaccard": len(one & other) / len(one | other),
                    "cosine": a @ b / np.sqrt((a @ a) * (b @ b))}
        assert {m: measures[m][layer, i, j] for m in measures} == pytest.approx(expected)


def test_aligned_divergence_is_the_mean_over_sequences():
    probs = np.random.default_rng(1).dirichlet(np.ones(8), size=(3, 5, 2)).astype(np.float32)
    divergence, by_sequence = aligned_divergence(list(probs))
    for layer in range(2):
        each = [[jensen_shannon(*probs[pair, s, layer].astype(float))[1] for s in range(5)]
                for pair in ([0, 1], [0, 2], [1, 2])]
        pairs = divergence[layer][np.triu_indices(3, 1)]
        np.testing.assert_allclose(pairs, np.mean(each, 1), rtol=1e-4)
        np.testing.assert_allclose(by_sequence[:, layer], np.mean(each, 0), rtol=1e-4)
    assert (divergence == divergence.transpose(0, 2, 1)).all()


def test_counts_by_group_add_up_and_are_where_they_belong():
    # 3 tokens, 2 layers, top_k 2
    ids = np.array([[[0, 1], [2, 3]], [[1, 0], [2, 1]], [[0, 3], [2, 0]]], np.uint8)
    counts = grouped_counts(ids, np.array([1, 0, 1]), 2, 4)
    assert counts.tolist() == [[[1, 1, 0, 0], [0, 1, 1, 0]], [[2, 1, 0, 1], [1, 0, 2, 1]]]


def test_what_a_language_relies_on_by_hand():
    # of the two kept experts, aa's is exclusive to it, the other is shared half and half
    frequency = np.array([[[0.6, 0.3, 0.1, 0.0]], [[0.1, 0.3, 0.0, 0.6]]])
    result = analyze.analyze(frequency, 2, 0.7)
    assert result["exclusive"].astype(int).tolist() == [[[1, 0, 0, 0]], [[0, 0, 0, 1]]]
    assert result["shared"].astype(int).tolist() == [[0, 1, 0, 0]]
    np.testing.assert_allclose(result["reliance"][:, 0], [[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]])
    assert result["most_used"].ravel() == pytest.approx([0.6, 0.6])
    assert result["active"].tolist() == [[3], [3]]
    summary = analyze.summarize(result, {"all": np.array([True])})
    assert summary["num_exclusive"].tolist() == summary["num_shared"].tolist() == [1, 1]


def symmetric(n, pairs):
    """(n, n) with a diagonal of ones, from {(i, j): value}."""
    matrix = np.eye(n)
    for (i, j), value in pairs.items():
        matrix[i, j] = matrix[j, i] = value
    return matrix


def test_linkage_puts_the_alike_side_by_side():
    order = linkage_order(symmetric(
        5, {(0, 3): 0.9, (1, 4): 0.8, (0, 1): 0.2, (2, 3): 0.5, (0, 2): 0.5}))
    assert sorted(order) == list(range(5))
    where = {language: order.index(language) for language in order}
    assert abs(where[0] - where[3]) == abs(where[1] - where[4]) == 1
    assert {1, 4} in (set(order[:2]), set(order[3:]))  # 2 joins 0 and 3 before 1 and 4 do


def test_average_linkage_takes_means_over_members():
    # 0 and 1 join first; to them, 2 is nearer at best (.8 to .5), but 3 on average (.475 to .45)
    similarity = symmetric(4, {(0, 1): 0.9, (0, 2): 0.8, (1, 2): 0.1, (0, 3): 0.5, (1, 3): 0.45,
                               (2, 3): 0.46})
    assert linkage_order(similarity) in ([1, 0, 3, 2], [2, 3, 0, 1])  # with the best: 1 0 2 3
    # 0 1 and 2 join first; 3 is nearer to the three (.4 to .347), but 4 to the mean of 0 1 and of 2
    similarity = symmetric(5, {(0, 1): 0.9, (0, 2): 0.8, (1, 2): 0.85, (0, 3): 0.6, (1, 3): 0.6,
                               (0, 4): 0.4, (1, 4): 0.4, (2, 4): 0.24, (3, 4): 0.25})
    assert linkage_order(similarity) in ([2, 1, 0, 3, 4], [4, 3, 0, 1, 2])  # else: 2 1 0 4 3


def test_rank_correlation_and_its_p_by_hand():
    rng = np.random.default_rng(0)
    # rho = 1 - 6 * 2 / (4 * 15); of 24 orders 1 has rho 1 and 3 have .8, and as many the negative
    rho, p = rank_correlation([1, 2, 3, 4], [10, 20, 40, 30], rng)
    assert rho == pytest.approx(0.8) and p == pytest.approx(8 / 24)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1], rng)[0] == pytest.approx(-1)
    # ties get their mean rank: 1, 2.5, 2.5, 4 against 1, 2, 3, 4
    rho, _ = rank_correlation([5, 6, 6, 7], [1, 2, 3, 4], rng)
    assert rho == pytest.approx(4.5 / np.sqrt(4.5 * 5))


SIMILARITY = np.array([[1, 0.9, 0.1, 0.2, 0.9], [0.9, 1, 0.3, 0.0, 0.9], [0.1, 0.3, 1, 0.7, 0.1],
                       [0.2, 0.0, 0.7, 1, 0.9], [0.9, 0.9, 0.1, 0.9, 1]])


def test_family_test_by_hand():
    similarity, rng = np.stack([SIMILARITY[:4, :4], SIMILARITY[:4, :4] / 2]), np.random.default_rng(0)
    first, second = family_test(similarity, np.array(["a", "a", "b", "b"]), rng)
    assert first[:2] == pytest.approx([0.8, 0.15]) and second[:2] == pytest.approx([0.4, 0.075])
    # of 24 ways to deal the labels 8 make the same pairs
    assert first[2] == second[2] == first[3] == pytest.approx(8 / 24)
    assert np.isnan(family_test(similarity, np.array(list("abcd")), rng)).all()  # no pair in a family
    assert np.isnan(family_test(similarity, np.array(list("aaaa")), rng)).all()  # no pair of two


def test_languages_whose_family_is_unknown_are_left_out():
    similarity, rng = np.roll(SIMILARITY, (1, 1), (0, 1))[None], np.random.default_rng(0)
    found = family_test(similarity, np.array(["", "a", "a", "b", "b"]), rng)  # the first is unknown
    assert found[0] == pytest.approx([0.8, 0.15, 8 / 24, 8 / 24])  # as above
    assert np.isnan(family_test(similarity, np.array([""] * 5), rng)).all()


def test_contrasts_by_hand():
    a = np.array([[0.9, 0.5, 0.6], [0.1, 1.0, 0.9]])
    b = np.array([[0.4, 0.4, 1.2], [0.2, 0.5, 1.3]])
    difference, chosen = select_contrast(a, b, tau=0.45)
    np.testing.assert_allclose(difference, [[0.5, 0.1, -0.6], [-0.1, 0.5, -0.4]])
    assert chosen.astype(int).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert select_contrast(a, b, top=3)[1].astype(int).tolist() == [[1, 0, 1], [0, 1, 0]]


# by ISO 639-1 and as FLORES and Belebele name them
LANGUAGES = """
af:afr am:amh ar:arb as:asm az:azj be:bel bg:bul bn:ben bo:bod bs:bos ca:cat cs:ces cy:cym da:dan
de:deu el:ell en:eng es:spa et:est eu:eus fa:pes ff:fuv fi:fin fr:fra ga:gle gl:glg gu:guj ha:hau
he:heb hi:hin hr:hrv ht:hat hu:hun hy:hye id:ind ig:ibo is:isl it:ita ja:jpn jv:jav ka:kat kk:kaz
km:khm kn:kan ko:kor ku:kmr ky:kir lg:lug ln:lin lo:lao lt:lit lv:lvs mg:plt mi:mri mk:mkd ml:mal
mn:khk mr:mar ms:zsm mt:mlt my:mya nb:nob ne:npi nl:nld no:nob ny:nya om:gaz or:ory pa:pan pl:pol
ps:pbt pt:por ro:ron ru:rus rw:kin si:sin sk:slk sl:slv sn:sna so:som sq:als sr:srp st:sot su:sun
sv:swe sw:swh ta:tam te:tel tg:tgk th:tha tl:tgl tn:tsn tr:tur ts:tso tt:tat tw:twi ug:uig uk:ukr
ur:urd uz:uzn vi:vie wo:wol xh:xho yo:yor zh:zho zu:zul"""
FAMILY_BY_HAND = {
    "de": "Indo-European/Germanic", "es": "Indo-European/Romance", "ru": "Indo-European/Slavic",
    "el": "Indo-European/Hellenic", "hi": "Indo-European/Indo-Aryan", "fa": "Indo-European/Iranian",
    "zh": "Sino-Tibetan/Sinitic", "my": "Sino-Tibetan/Tibeto-Burman", "ar": "Afro-Asiatic/Semitic",
    "sw": "Atlantic-Congo/Bantu", "yo": "Atlantic-Congo/Volta-Niger", "vi": "Austroasiatic/Vietic",
    "id": "Austronesian/Malayo-Polynesian", "fi": "Uralic/Finnic", "hu": "Uralic/Hungarian",
    "te": "Dravidian", "ja": "Japonic", "ko": "Koreanic", "th": "Tai-Kadai", "eu": "Basque",
    "tr": "Turkic", "mn": "Mongolic", "ka": "Kartvelian"}


def test_every_language_of_mgsm_and_xquad_and_most_of_belebele_has_one_family():
    source = inspect.getsource(analyze).split('FAMILIES = by_code("""\\\n')[1].split('"""')[0]
    codes = [code for line in source.replace("\\\n", "").splitlines() for code in line.split()[1:]]
    assert len(codes) == len(set(codes)) == len(analyze.FAMILIES)
    table, pairs = read_families(), [pair.split(":") for pair in LANGUAGES.split()]
    assert [code for pair in pairs for code in pair if code not in table] == []
    assert [pair for pair in pairs if table[pair[0]] != table[pair[1]]] == []
    mgsm, xquad = "bn de en es fr ja ru sw te th zh", "ar de el en es hi ro ru th tr vi zh"
    assert [code for code in (mgsm + " " + xquad).split() if code not in table] == []
    assert {code: table[code] for code in FAMILY_BY_HAND} == FAMILY_BY_HAND


def test_a_family_is_found_by_the_codes_first_part_and_a_file_goes_over_the_table(tmp_path):
    table, path = read_families(), tmp_path / "f.tsv"
    assert family_of("deu_Latn", table) == family_of("de-AT", table) == "Indo-European/Germanic"
    assert family_of("zho_Hans", table) == "Sino-Tibetan/Sinitic" and family_of("xx", table) == ""
    path.write_text("xx\tMine\nde\tGermanic\n")
    assert [family_of(code, read_families(path)) for code in ("xx", "de")] == ["Mine", "Germanic"]
    path.write_text("xx Mine\n")
    with pytest.raises(InputError, match="f.tsv is not lines of a code, a tab and a family"):
        read_families(path)


# ------------------------------------------------------------------------------------------ noise

BANDS = {"all": np.array([True, True])}


def bootstrap(counts, draws, experts_per_language, threshold, bands, rng, by_sequence=None):
    """analyze.bootstrap, with the estimates from the same counts."""
    settings, totals = (experts_per_language, threshold), [c.sum(0, dtype=float) for c in counts]
    result = analyze.analyze(analyze.distribution(np.stack(totals)), *settings)
    if by_sequence is not None:
        result["layer_aligned"] = by_sequence.mean(0)
    return analyze.bootstrap(counts, draws, result | analyze.summarize(result, bands), settings,
                             bands, rng, by_sequence)


def test_bootstrap_errors_are_those_of_a_slow_bootstrap():
    rng = np.random.default_rng(0)
    rates = [rng.gamma(0.5, 4, size=(1, 2, 8)) for _ in range(2)]
    counts = [rng.poisson(rate, size=(30, 2, 8)).astype(np.float32) + 1 for rate in rates]
    result = bootstrap(counts, 2000, 3, 0.6, BANDS, np.random.default_rng(1))
    slow, exclusive = [], np.zeros((2, 2, 8))
    for _ in range(2000):
        totals = [sum(c[i] for i in rng.integers(30, size=30)) for c in counts]
        frequency = np.stack([t / t.sum(-1, keepdims=True) for t in totals])
        slow.append(jensen_shannon(*frequency)[0].mean())
        exclusive += analyze.exclusive_experts(analyze.language_shares(frequency, 3), 0.6)
    frequency = np.stack([c.sum(0) / c.sum((0, 2))[:, None] for c in counts]).astype(float)
    estimate = jensen_shannon(*frequency)[0].mean()
    low, high = result["interval_mean_similarity"][:, 0]
    bias = np.mean(slow) - estimate  # draws look less alike: the interval is longer upwards
    assert bias < 0 and high - estimate == pytest.approx(1.96 * np.std(slow) - bias, rel=0.1)
    assert estimate - low == pytest.approx(1.96 * np.std(slow), rel=0.1)
    stays = result["exclusive_stability"]
    np.testing.assert_allclose(stays, exclusive / 2000, atol=0.05)
    assert ((stays > 0.1) & (stays < 0.9)).any()  # some expert is on the edge


def test_parallel_languages_draw_the_same_sequences():
    rng = np.random.default_rng(0)
    length = rng.integers(1, 50, size=(40, 1, 1))  # long problems are long in both languages
    counts = [length * rng.integers(0, 5, size=(40, 2, 8)).astype(np.float32) for _ in range(2)]
    by_sequence = rng.random((40, 2))
    low, high = bootstrap(counts, 3000, 3, 0.6, BANDS, rng, by_sequence)["interval_layer_aligned"]
    error = by_sequence.std(0) / np.sqrt(40)  # of a mean
    np.testing.assert_allclose(high - low, 2 * 1.96 * error, rtol=0.1)
    np.testing.assert_allclose((high + low) / 2, by_sequence.mean(0), atol=0.01)
    same = [counts[0], counts[0].copy()]
    # always alike: no expert is ever exclusive
    stays = bootstrap(same, 50, 3, 0.6, BANDS, rng, by_sequence)["exclusive_stability"]
    assert stays.sum() == 0 < bootstrap(same, 50, 3, 0.6, BANDS, rng)["exclusive_stability"].sum()


def test_the_floor_is_one_for_a_language_that_repeats_itself_and_else_that_of_all_halvings():
    rng = np.random.default_rng(0)
    steady = np.tile(rng.integers(1, 9, size=(1, 2, 8)), (10, 1, 1)).astype(np.float32)
    np.testing.assert_allclose(split_half_floor(steady, rng), 1)
    varied = rng.multinomial(20, np.full(8, 1 / 8), size=(10, 2)).astype(np.float32)
    # against the mean over all ways to halve ten sequences
    every = []
    for half in itertools.combinations(range(10), 5):
        parts = [varied[list(half)].sum(0), varied[[i for i in range(10) if i not in half]].sum(0)]
        every.append(jensen_shannon(*(x / x.sum(-1, keepdims=True) for x in parts))[0])
    floor = split_half_floor(varied, rng)
    assert floor == pytest.approx(np.mean(every, 0), abs=0.01)
    assert np.mean(every) < 0.995


# ------------------------------------------------------------------ planted structure, and none

LAYERS, EXPERTS, TOP_K = 6, 32, 4
FAMILY_OF = {"de": "g", "en": "g", "nl": "g", "es": "r", "fr": "r", "it": "r"}
NULL = "bn de en es fr ja sw zh".split()


def routing_logits(preference, rng, sequences, tokens):
    """(sequences, tokens, layers, experts): a preference, and noise of sequences and of tokens."""
    noise = rng.normal(0, 0.3, (sequences, 1, LAYERS, EXPERTS))
    return preference + noise + rng.gumbel(0, 1, (sequences, tokens, LAYERS, EXPERTS))


def make_dump(folder, language, preference, rng, sequences=60, tokens=25):
    """A dump of tokens that prefer experts by preference (layers, experts)."""
    logits = routing_logits(preference, rng, sequences, tokens)
    ids = np.argsort(-logits.reshape(-1, LAYERS, EXPERTS), -1)[..., :TOP_K].astype(np.uint8)
    probs = np.exp(logits)
    probs = (probs / probs.sum(-1, keepdims=True)).mean(1).astype(np.float32)
    path = folder / f"{language}.npz"
    np.savez(path, selected_experts=ids, mean_probs=probs, token_ids=rng.integers(0, 500, len(ids)),
             sequence_offsets=np.arange(sequences + 1) * tokens,
             prompt_lengths=np.full(sequences, tokens),
             meta=json.dumps({"language": language, "num_experts": EXPERTS}))
    return str(path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Six languages: alike in all layers, but by family in the first two and the last two; it has
    experts of its own, 30 and 31.
    """
    folder, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    base = rng.normal(0, 1, (LAYERS, EXPERTS))
    base[:, 30:] = -5
    where = np.array([1, 1, 0, 0, 1, 1])[:, None]
    family = {name: rng.normal(0, 1.5, (LAYERS, EXPERTS)) * where for name in "gr"}
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
    return [make_dump(folder, language, preference, rng) for language in NULL]


def run(monkeypatch, capsys, folder, *arguments):
    """analyze.py as from the shell, in this process: what it printed and what it wrote."""
    out = ["--out", str(folder / "analysis.npz")]
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments), *out])
    analyze.main()
    with np.load(folder / "analysis.npz", allow_pickle=False) as file:
        return capsys.readouterr().out, dict(file)


THREE = ["--bands", "early=0-1", "middle=2-3", "late=4-5"]


def test_planted_structure_is_found(planted, monkeypatch, capsys, tmp_path):
    families = "".join(f"{language}\t{name}\n" for language, name in FAMILY_OF.items())
    (tmp_path / "f.tsv").write_text(families)
    printed, result = run(monkeypatch, capsys, tmp_path, *planted, *THREE, "--bootstrap", 200,
                          "--families", tmp_path / "f.tsv")
    languages = result["languages"].tolist()
    low, high = result["interval_mean_similarity"]
    assert low[1] > max(high[0], high[2])  # the middle is shared
    within, between, p = result["family_tests"][:3, :3].T
    assert result["family_rows"][:3].tolist() == ["family early", "family middle", "family late"]
    # no labelling separates better than this one, which 72 of 720 are
    assert p[0] == p[2] == pytest.approx(72 / 720) and p[1] > 0.1
    assert within[0] > between[0] + 0.1 and abs(within[1] - between[1]) < 0.02
    for band in (0, 2):  # families stand together
        order = [FAMILY_OF[languages[i]] for i in result["order"][band]]
        assert order in (list("gggrrr"), list("rrrggg"))
    it = languages.index("it")
    assert result["exclusive"][it, :, 30:].all()
    assert (result["exclusive_stability"][it, :, 30:] >= 0.95).all()
    assert (result["floor_similarity"] > 0.97).all()
    assert result["interval_mean_reliance"][0, it, 0] > 0.3
    np.testing.assert_allclose(result["layer_floor"], result["floor_similarity"].mean(0))
    np.testing.assert_allclose(result["band_floor"], result["layer_floor"].reshape(3, 2).mean(1))
    assert f"  {result['band_floor'][0]:.3f}  " in printed and printed.count("floor") >= 2
    stable = (result["exclusive"] & (result["exclusive_stability"] >= analyze.STABLE)).sum((1, 2))
    assert result["num_stable"][:, 0].tolist() == stable.tolist()
    line = printed.split("number of experts")[1].split("\nit ")[1].split("\n")[0]
    assert line.split() == [str(n) for n in (result["num_exclusive"][it], result["num_only"][it],
                                             *result["num_stable"][it], result["num_shared"][it])]


def test_no_printed_line_is_longer_than_a_hundred_columns(planted, monkeypatch, capsys, tmp_path):
    printed, _ = run(monkeypatch, capsys, tmp_path, *planted, *THREE, "--bootstrap", 2,
                     "--parallel", "--vocabulary", "--leave-one-out", "--sensitivity")
    assert [line for line in printed.splitlines() if len(line) > 100] == []


def test_on_a_null_nothing_is_found(null, monkeypatch, capsys, tmp_path):
    scores = tmp_path / "s.json"
    scores.write_text(json.dumps(dict(zip(NULL, [7, 3, 5, 8, 2, 6, 4, 1]))))
    printed, result = run(monkeypatch, capsys, tmp_path, *null, *THREE, "--bootstrap", 200,
                          "--scores", scores)
    stable = result["exclusive"] & (result["exclusive_stability"] >= analyze.STABLE)
    assert stable.sum() == 0 < result["exclusive"].sum()  # by the definition alone there are some
    shared = result["shared"] & (result["shared_stability"] >= analyze.STABLE)
    assert shared.sum() > 0.8 * 4 * LAYERS * 0.5
    # languages are as alike as halves of one
    assert (abs(result["layer_similarity"] - result["floor_similarity"].mean(0)) < 0.01).all()
    assert (result["family_tests"][:, 4] > 0.05).all()
    assert (result["score_correlation"][:, 1] > 0.05).all()


def test_scores_are_correlated_with_the_similarity_to_the_reference(planted, monkeypatch, capsys,
                                                                    tmp_path):
    """Scores that rise with the similarity to it in the first band; es has a score, but no dump."""
    paths = [path for path in planted if "es.npz" not in path]
    _, result = run(monkeypatch, capsys, tmp_path, *paths, *THREE)
    similarity = dict(zip(result["languages"].tolist(), result["band_similarity"][0, -1]))
    scores = {name: similarity[name] ** 3 for name in ("fr", "de", "nl")} | {"it": -1, "es": 5}
    (tmp_path / "s.json").write_text(json.dumps(scores))
    monkeypatch.setattr(analyze, "REFERENCE", "it")
    lists = {name: [0.5, 0.6] for name in ("fr", "de", "nl", "en")}
    for wrong in (scores, lists, dict.fromkeys(lists, float("nan"))):
        (tmp_path / "s.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="not a JSON object with a score of each of"):
            run(monkeypatch, capsys, tmp_path, *paths, "--scores", tmp_path / "s.json")
    (tmp_path / "s.json").write_text(json.dumps(scores | {"en": similarity["en"] ** 3}))
    printed, result = run(monkeypatch, capsys, tmp_path, *paths, *THREE,
                          "--scores", tmp_path / "s.json")
    # of 24 orders, this one and its reverse
    assert result["score_correlation"][0] == pytest.approx([1, 2 / 24])
    assert "rank correlation of the similarity to" in printed


def test_intervals_cover_what_more_data_shows():
    """The similarity of two languages, by 60 sequences twenty times, against that by 3,000."""
    rng, bands = np.random.default_rng(2), {"all": np.ones(LAYERS, bool)}
    preferences = [rng.normal(0, 1, (LAYERS, EXPERTS)) for _ in range(2)]

    def counts(preference, sequences):
        logits = routing_logits(preference, rng, sequences, 10).reshape(-1, LAYERS, EXPERTS)
        ids = np.argpartition(-logits, TOP_K, -1)[..., :TOP_K]
        return grouped_counts(ids, np.repeat(np.arange(sequences), 10), sequences, EXPERTS)

    many = [counts(preference, 3000).sum(0) / (3000 * 10 * TOP_K) for preference in preferences]
    truth, covered = jensen_shannon(*many)[0].mean(), 0
    for _ in range(20):
        sample = [counts(preference, 60).astype(np.float32) for preference in preferences]
        low, high = bootstrap(sample, 60, 4, 0.6, bands, rng)["interval_mean_similarity"][:, 0]
        covered += low < truth < high
    assert covered >= 17


def test_the_vocabulary_control_tells_words_from_languages(monkeypatch, capsys, tmp_path):
    """Two languages that route common tokens alike and their own apart, against plain counts."""
    rng, paths, kept = np.random.default_rng(0), [], {}
    for language, own in (("aa", range(10, 20)), ("bb", range(20, 30))):
        ids = rng.choice([*range(10), *own], size=400)
        expert = np.where(ids < 10, ids % 4, 4 + ids % (4 if language == "aa" else 8))
        paths.append(tmp_path / f"{language}.npz")
        selected = np.tile(expert.astype(np.uint8)[:, None, None], (1, 2, 1))
        np.savez(paths[-1], selected_experts=selected, token_ids=ids,
                 meta=json.dumps({"language": language, "num_experts": 12}))
        kept[language] = [np.bincount(expert[mask], minlength=12) / mask.sum()
                          for mask in (ids < 10, ids >= 10)]
    _, result = run(monkeypatch, capsys, tmp_path, *paths, "--vocabulary", "--bands", "all=0-1",
                    "--threshold", 0.6)
    for k, name in enumerate(("common", "own")):
        expected = jensen_shannon(kept["aa"][k], kept["bb"][k])[0]
        np.testing.assert_allclose(result[f"similarity_{name}_tokens"][:, 0, 1], expected)
    common, own = (result[f"similarity_{name}_tokens"] for name in ("common", "own"))
    assert common[0, 0, 1] > 0.98 > own[0, 0, 1] + 0.2
    assert np.isnan(own[:, [0, 1], [0, 1]]).all()  # no token is a language's own against itself
    np.testing.assert_allclose(result["common_tokens"][0, 1], 0.5, atol=0.08)
    np.testing.assert_allclose(result["common_tokens"].diagonal(), 1)


def test_parallel_data_are_compared_sequence_by_sequence(planted, monkeypatch, capsys, tmp_path):
    printed, result = run(monkeypatch, capsys, tmp_path, *planted, *THREE, "--parallel",
                          "--bootstrap", 50)
    arrays = [dict(np.load(path)) for path in planted[:2]]
    expected = jensen_shannon(*(a["mean_probs"].astype(float) for a in arrays))[1].mean(0)
    np.testing.assert_allclose(result["divergence_aligned"][:, 0, 1], expected, rtol=1e-4)
    assert f"{result['mean_aligned'][1]:.3f} [" in printed
    np.savez(tmp_path / "short.npz", **arrays[0] | {"mean_probs": arrays[0]["mean_probs"][:-1]})
    with pytest.raises(InputError, match="--parallel takes as many sequences in every language"):
        run(monkeypatch, capsys, tmp_path, *planted[1:], tmp_path / "short.npz", "--parallel")
    gap = dict(np.load(planted[0]))  # one more sequence, without tokens and mean_probs
    np.savez(tmp_path / "gap.npz", **gap | {
        "mean_probs": np.append(gap["mean_probs"], gap["mean_probs"][:1], 0),
        "sequence_offsets": np.append(gap["sequence_offsets"], gap["sequence_offsets"][-1])})
    with pytest.raises(InputError, match="takes dumps with tokens in every sequence"):
        run(monkeypatch, capsys, tmp_path, tmp_path / "gap.npz", "x=" + str(tmp_path / "gap.npz"),
            "--parallel", "--bootstrap", 2)


# --------------------------------------------------------------------------- reading and writing

def test_the_plain_tables_read_no_more_than_they_need(planted, monkeypatch, tmp_path):
    arrays = dict(np.load(planted[0]))
    ids = arrays["selected_experts"]
    arrays["counts"] = grouped_counts(ids, np.zeros(1500, int), 1, EXPERTS)[0].astype(np.int64)
    arrays |= {"layers": np.arange(LAYERS, dtype=np.int32), "weight_sums": arrays["counts"] / 2}
    meta = {"language": "de", "num_experts": EXPERTS, "top_k": TOP_K}
    np.savez(tmp_path / "de.npz", **arrays | {"meta": json.dumps(meta)})
    read, get = set(), np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__",
                        lambda self, key: (read.add(key), get(self, key))[1])
    assert analyze.load_routing(str(tmp_path / "de.npz"))["num_tokens"] == 1500
    assert read == {"counts", "weight_sums", "layers", "meta", "sequence_offsets"}


def test_a_digest_tells_counts_apart(tmp_path):
    digests = []
    for name, counts in (("a", [[3, 1]]), ("same", [[3, 1]]), ("other", [[1, 3]])):
        np.savez(tmp_path / f"{name}.npz", counts=counts, sequence_offsets=[0, 4],
                 meta=json.dumps({"language": name, "top_k": 1, "num_experts": 2}))
        digests += analyze.load_routing(str(tmp_path / f"{name}.npz"))["digest"]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("arguments, message", [
    (["--bootstrap", "1"], "--bootstrap takes 2 draws or more"),
    (["--scores", "none.json"], "No such file"),
    (["--scores", "README.md"], "README.md is not a JSON object"),
    (["--figures", "README.md"], "README.md is a file; --figures takes a folder"),
    (["--top", "3"], "top without effect here; --contrast A B takes"),
    (["--selection", "s.json", "--tau", ".1"], "selection, tau without effect here"),
    (["--agreement", "a.npz", "b.npz", "--contrast", "a.npz", "b.npz"], "agreement, dumps, out without"),
    (["--families", "none.tsv"], "none.tsv not found"),
    (["--parallel", "--part", "prompt"], "leave out --part"),
    (["--experts-per-language", "4.5"], "neither a number from 1 to the 32 experts nor a part"),
    (["--threshold", "1.5"], "threshold 1.5 is not between 0 and 1"),
])
def test_a_bad_argument_is_refused_and_nothing_is_written(planted, monkeypatch, capsys, tmp_path,
                                                          arguments, message):
    with pytest.raises((InputError, OSError), match=message):
        run(monkeypatch, capsys, tmp_path, *planted, *arguments)
    assert not (tmp_path / "analysis.npz").exists()


@pytest.mark.parametrize("flag, message", [
    ("--bootstrap=10", "holds no [a-z_]+; capture it again .* of a recorder's"),
    ("--vocabulary", "holds no [a-z_]+; capture it again .* of a recorder's"),
    ("--parallel", "holds no [a-z_]+; capture it again .* of a recorder's")])
def test_a_recorders_file_is_refused_by_name_where_single_tokens_are_needed(
        monkeypatch, capsys, tmp_path, flag, message):
    layer = {str(e): {"activation_tokens": 1 + e} for e in range(8)} | {"total_tokens": 18}
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps({"0": layer}))
    with pytest.raises(InputError, match=f"a.json {message}"):
        run(monkeypatch, capsys, tmp_path, tmp_path / "a.json", tmp_path / "b.json", flag)


def test_figures_are_drawn_or_what_to_install_is_said(planted, monkeypatch, capsys, tmp_path):
    figures = tmp_path / "figures"
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(InputError, match="pip install matplotlib"):
            run(monkeypatch, capsys, tmp_path, *planted, "--figures", figures)
    pytest.importorskip("matplotlib")
    printed, _ = run(monkeypatch, capsys, tmp_path, *planted, "--bootstrap", 5,
                     "--figures", figures)
    drawn = sorted(path.name for path in figures.iterdir())
    assert drawn == ["heatmaps.png", "layers.png"]
    assert str(figures) in printed


DUMP = {"counts": np.zeros((LAYERS, EXPERTS)), "layers": np.arange(LAYERS), "num_experts": EXPERTS,
        "revision": None}


def test_a_contrast_is_printed_and_written(planted, monkeypatch, capsys, tmp_path):
    def contrast(*paths, tau, out):
        monkeypatch.setattr(sys, "argv", ["analyze.py", "--contrast", *paths, "--tau", str(tau),
                                          "--selection", str(tmp_path / out)])
        analyze.main()
        return capsys.readouterr().out

    printed = contrast(planted[5], planted[0], tau=0.5, out="s.json")
    selection = analyze.load_selection(tmp_path / "s.json", DUMP)
    it, de = analyze.frequencies(analyze.load_languages([planted[5], planted[0]]))
    expected = np.where(it - de > 0.5, it - de, 0)
    np.testing.assert_allclose(selection, expected, atol=1e-6)
    assert (selection[:, 30:] > 0.5).all()
    assert f"{(selection > 0).sum()} experts in layers 0-5, by a difference above 0.5" in printed
    with pytest.raises(InputError, match="no experts to select"):
        contrast(*planted[:2], tau=3, out="t.json")
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize("text, message", [
    ("{}", "is no selection of experts"),
    ('{"experts": {"9": {"0": 1}}}', "is no selection of experts of this model, "),
    ('{"experts": {"1": {"32": 1}}}', "is no selection of experts of this model, 32 in layers 0-5")])
def test_a_selection_that_does_not_fit_the_model_is_refused(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InputError, match=message):
        analyze.load_selection(tmp_path / "t.json", DUMP)


def test_every_array_that_is_written_is_described(planted, monkeypatch, capsys, tmp_path):
    scores = {language: 0.1 * i for i, language in enumerate(FAMILY_OF)}
    (tmp_path / "s.json").write_text(json.dumps(scores))
    _, result = run(monkeypatch, capsys, tmp_path, *planted, "--bootstrap", 5, "--parallel",
                    "--vocabulary", "--scores", tmp_path / "s.json", "--leave-one-out",
                    "--sensitivity")
    words = set(re.findall(r"\w+", analyze.save_analysis.__doc__))

    def described(key):
        """By its name, with M for a measure, or as the interval of a figure that is described."""
        name = re.sub(f"_({'|'.join(analyze.MEASURES)})$", "_M", key)
        return {key, name} & words or key.startswith("interval_") and described(key[9:])
    assert [key for key in result if not described(key)] == []
