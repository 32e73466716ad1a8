"""What analyze.py computes, worked by hand; what it reads and refuses; what it prints."""

import ast
import itertools
import json
import os
import re
import sys

import numpy as np
import pytest

import analyze
from analyze import (
    InputError, describe, entropy_bits, exclusive_experts, expert_ownership, jensen_shannon,
    language_indices, language_labels, language_order, language_shares, load_routing,
    load_selection, mean_over_pairs, most_frequent, number_of_experts, parse_bands, print_table,
    read_tokens, shared_experts)
from conftest import read_table, run, run_analyze, save_dump

# 3 tokens, 2 layers, top_k 2, of 4 experts
IDS = np.array([[[0, 1], [2, 3]], [[1, 0], [2, 1]], [[0, 3], [2, 0]]])
CAPTURED = {  # the same, with what capture.py writes beside it
    "counts": [[3, 2, 0, 1], [1, 1, 3, 1]],
    "selected_experts": IDS,
    "sequence_offsets": [0, 2, 3],
    "prompt_lengths": [1, 1],
    "text_spans": [[0, 1], [1, 1]],
    "layers": [0, 1],
}


def save_captured(path, meta=None, **changes):
    """Write the dump CAPTURED with changes, without arrays that are None, and return its path."""
    arrays = {name: array for name, array in (CAPTURED | changes).items() if array is not None}
    meta = {"language": "aa", "num_experts": 4, "top_k": 2} | (meta or {})
    np.savez(path, meta=json.dumps(meta), **arrays)
    return str(path)


def random_ids(tokens=40, layers=4, num_experts=32, top_k=2, seed=0):
    random = np.random.default_rng(seed).random((tokens, layers, num_experts))
    return np.argsort(random)[..., :top_k]


def assert_refused(function, *arguments, names):
    """Assert that a call ends in an InputError of one line that has all these words."""
    with pytest.raises(InputError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    for word in names:
        assert word in message


# ---------------------------------------------------------------- exclusive and shared experts

def test_activation_frequency_is_the_fraction_of_tokens(tmp_path):
    frequency = load_routing(save_captured(tmp_path / "a.npz")).activation_frequency
    np.testing.assert_allclose(frequency, [[[1, 2 / 3, 0, 1 / 3], [1 / 3, 1 / 3, 1, 1 / 3]]])


def test_shares_are_taken_over_the_languages_that_keep_an_expert():
    # expert:             0    1    2
    frequency = np.array([[[0.6, 0.3, 0.1]], [[0.2, 0.6, 0.4]]])
    share = language_shares(frequency, 2)  # the first keeps 0 and 1, the second 1 and 2
    np.testing.assert_allclose(share, [[[1, 1 / 3, 0]], [[0, 2 / 3, 1]]])


def test_of_equally_frequent_experts_the_lower_index_is_kept():
    kept = most_frequent(np.array([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]]), 2)
    assert kept.astype(int).tolist() == [[1, 1, 0, 0], [0, 1, 0, 1]]


def test_an_expert_that_is_never_used_is_neither_exclusive_nor_shared():
    share = language_shares(np.array([[[1.0, 0.0]], [[1.0, 0.0]]]), 2)
    assert share[:, 0, 1].tolist() == [0, 0]
    assert not exclusive_experts(share, 0.4)[:, 0, 1].any()
    assert not shared_experts(share, 0.6)[0, 1]


def test_exclusive_is_above_the_threshold_and_shared_below_it():
    share = np.array([[[0.7, 0.5, 0.4, 0]], [[0.3, 0.5, 0.3, 0]], [[0, 0, 0.3, 0]]])
    exclusive = exclusive_experts(share, 0.5)
    assert exclusive.astype(int).tolist() == [[[1, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]]
    assert shared_experts(share, 0.5).astype(int).tolist() == [[0, 0, 1, 0]]  # .5 is neither
    together = exclusive_experts(share[[0, 1]].sum(0), 0.65)
    assert together.astype(int).tolist() == [[1, 1, 1, 0]]


def test_expert_ownership_by_hand():
    frequency = 2 * np.array([  # of top_k 2; in the second layer, all keep experts 0 and 1
        [[0.6, 0.3, 0.1, 0.0], [0.5, 0.5, 0, 0]],  # keeps experts 0 and 1; 0 is exclusive to it
        [[0.1, 0.3, 0.0, 0.6], [0.5, 0.5, 0, 0]],  # keeps 1 and 3, .3 of .6 and .6 of 1.1
        [[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0, 0]],  # keeps 2 and 3; 2 is exclusive to it
    ])
    result = expert_ownership(frequency, 2, 0.7)
    assert result["num_exclusive"].tolist() == [1, 0, 1]
    assert result["num_shared"].tolist() == [1 + 2, 2 + 2, 1 + 2]
    assert result["layer_exclusive"].tolist() == [2, 0]
    assert result["layer_shared"].tolist() == [2, 2]
    # exclusive, shared, others: the second sends .1 to an expert that is exclusive to the first
    first_layer = np.array([[0.6, 0.3, 0.1], [0, 0.9, 0.1], [0.5, 0.5, 0]])
    np.testing.assert_allclose(result["reliance"][:, 0], first_layer, atol=1e-12)
    np.testing.assert_allclose(
        result["mean_reliance"], (first_layer + [0, 1, 0]) / 2, atol=1e-12)
    # at a threshold of .4, the first expert is exclusive to both, the second to the first alone
    result = expert_ownership(np.array([[[0.5, 0.5]], [[0.5, 0.1]]]), 2, 0.4)
    assert result["num_exclusive"].tolist() == [2, 1]
    assert result["num_only"].tolist() == [1, 0]


def test_exclusive_and_shared_experts_are_those_of_the_definitions_one_by_one():
    frequency = np.random.default_rng(0).integers(0, 6, size=(3, 4, 40)) / 10  # with many ties
    result = expert_ownership(frequency, 15, 0.45)
    for layer, expert in itertools.product(range(4), range(40)):
        kept = []
        for language in frequency[:, layer].tolist():
            order = sorted(range(40), key=lambda e: (-language[e], e))
            kept.append(language[expert] if expert in order[:15] else 0)
        total = sum(kept) or 1
        shares = [use / total for use in kept]
        assert result["share"][:, layer, expert].tolist() == pytest.approx(shares)
        assert result["exclusive"][:, layer, expert].tolist() == [s > 0.45 for s in shares]
        is_shared = max(shares) > 0 and all(s < 0.45 for s in shares)
        assert result["shared"][layer, expert] == is_shared


@pytest.mark.parametrize("given, num_experts, number", [
    (15 / 128, 32, 4), (15 / 128, 128, 15), (0.5, 4, 2), (0.01, 4, 1), (15, 32, 15), (1, 4, 1),
    (32, 32, 32), (4.0, 32, 4)])
def test_experts_per_language_is_a_fraction_below_one_and_else_a_number(
        given, num_experts, number):
    assert number_of_experts(given, num_experts) == number
    frequency = np.random.default_rng(0).random((2, 3, num_experts))
    assert (most_frequent(frequency, given).sum(-1) == number).all()


@pytest.mark.parametrize("given", [4.5, 33, 0, -0.5, float("nan")])
def test_an_impossible_number_of_experts_per_language_is_refused(given):
    frequency = np.zeros((2, 1, 32))
    assert_refused(language_shares, frequency, given, names=[f"{given:g}", "1 to the 32"])


@pytest.mark.parametrize("threshold", [0, 1, -1, float("nan")])
@pytest.mark.parametrize("function", [exclusive_experts, shared_experts])
def test_a_threshold_out_of_range_is_refused(function, threshold):
    assert_refused(function, np.zeros((2, 1, 4)), threshold, names=[f"threshold {threshold}"])


# ------------------------------------------------------------- how similarly languages are routed

def test_similarity_and_divergence_by_hand():
    half = np.array([0.5, 0.5, 0])
    assert entropy_bits(half) == 1
    assert entropy_bits(np.full(8, 1 / 8)) == 3
    assert jensen_shannon(half, half) == pytest.approx((1, 0))
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx((0, 1))
    # mean (.25, .5, .25) has 1.5 bits, each has 1 bit of at most log2(3)
    other = np.array([0, 0.5, 0.5])
    assert jensen_shannon(half, other) == pytest.approx((0.5, 0.5 / (np.log2(3) - 1)))
    uniform = np.array([0.5, 0.5])
    assert jensen_shannon(uniform, uniform) == (1, 0)  # there is no room for a divergence


def test_pair_measures_are_their_definitions_pair_by_pair():
    frequency = np.random.default_rng(0).dirichlet(np.full(16, 0.5), size=(4, 3)) * 2
    measures = analyze.pair_measures(frequency, 5)
    for i, j, layer in itertools.product(range(4), range(4), range(3)):
        p, q = frequency[i, layer] / 2, frequency[j, layer] / 2
        mean = (p + q) / 2
        nats = (sum(p * np.log(p / mean)) + sum(q * np.log(q / mean))) / 2
        entropy = -(sum(p * np.log(p)) + sum(q * np.log(q))) / 2
        top_p, top_q = set(np.argsort(-p)[:5]), set(np.argsort(-q)[:5])
        expected = {
            "similarity": 1 - nats / np.log(2),
            "divergence": nats / (np.log(16) - entropy),
            "jaccard": len(top_p & top_q) / len(top_p | top_q),
        }
        found = {name: matrix[layer, i, j] for name, matrix in measures.items()}
        assert found == pytest.approx(expected)


def test_the_mean_over_pairs_leaves_out_the_diagonal_and_nan():
    matrix = np.array([[9, 1, 2], [1, 9, 6], [2, 6, 9.0]])
    assert mean_over_pairs(matrix) == 3
    matrix[0, 1] = matrix[1, 0] = np.nan
    assert mean_over_pairs(np.stack([matrix, matrix + 1])).tolist() == [4, 5]
    assert np.isnan(mean_over_pairs(np.ones((2, 1, 1)))).tolist() == [True, True]  # no pair


def test_figures_of_bands_and_layers_are_means():
    # uniform over all four experts in the first layer, over two or one of them in the others
    frequency = np.array([[[1, 1, 1, 1], [2, 2, 0, 0], [2, 2, 0, 0]],
                          [[1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 4, 0]]]) / 2
    bands = {"start": np.array([True, True, False]), "end": np.array([False, False, True])}
    result = analyze.measure(frequency, bands, 2, 0.4)
    np.testing.assert_allclose(result["entropy"], [[1, 0.5, 0.5], [1, 0.5, 0]], atol=1e-12)
    np.testing.assert_allclose(result["layer_entropy"], [1, 0.5, 0.25])
    np.testing.assert_allclose(result["layer_similarity"], [1, 1, 0], atol=1e-12)
    np.testing.assert_allclose(result["mean_jaccard"], [1, 1 / 3])  # {0, 1} and {2, 0}
    np.testing.assert_allclose(
        result["band_similarity"], [[[1, 1], [1, 1]], [[1, 0], [0, 1]]], atol=1e-12)


# --------------------------------------------------------------------------------- bands of layers

@pytest.mark.parametrize("num_layers, early, middle, late", [
    (48, range(0, 5), range(22, 27), range(43, 48)),  # the paper's for Qwen3-30B-A3B
    (8, [0], [4], [7]),
    (1, [0], [0], [0]),
])
def test_default_bands_are_the_first_middle_and_last_tenth(num_layers, early, middle, late):
    bands = parse_bands(None, np.arange(num_layers))
    rows = {name: np.flatnonzero(in_band).tolist() for name, in_band in bands.items()}
    assert rows == {"early": list(early), "middle": list(middle), "late": list(late)}


def test_a_band_counts_decoder_layers_though_dense_ones_have_no_row():
    bands = parse_bands(["a=0-2", "3-5", "6"], np.array([1, 2, 5, 6]))
    rows = {name: np.flatnonzero(in_band).tolist() for name, in_band in bands.items()}
    assert rows == {"a": [0, 1], "3-5": [2], "6": [3]}
    assert describe(np.array([1, 2, 5, 6, 8])) == "1-2 5-6 8"


@pytest.mark.parametrize("texts", [
    ["a=3-4"], ["a=5-2"], ["a=5-7"], ["a=3"], ["a=x-y"], ["a=0-1,b=4-5"], ["a=1", "a=2"]])
def test_a_band_without_layers_or_with_a_name_that_is_taken_is_refused(texts):
    assert_refused(parse_bands, texts, np.array([1, 2, 5, 6]), names=["'a"])


# ----------------------------------------------------------------------------------- reading dumps

def test_a_dump_of_expert_ids_and_meta_alone_is_counted(tmp_path):
    path = save_dump(tmp_path / "a.npz", IDS.astype(np.uint8), "sw", num_experts=4)
    routing = load_routing(path)
    assert routing.counts.tolist() == routing.weight_sums.tolist() == [CAPTURED["counts"]]
    assert routing.num_tokens.tolist() == [3]
    assert (routing.top_k, routing.num_experts) == (2, 4)
    assert (routing.languages, routing.layers.tolist()) == (["sw"], [0, 1])
    assert (routing.paths, routing.revision) == ([path], None)


def test_expert_ids_give_the_counts_that_were_captured(dumps, tmp_path):
    captured = load_routing(dumps)
    paths = []
    for path, language in zip(dumps, captured.languages):
        with np.load(path) as file:
            selected, weight_sums = file["selected_experts"], file["weight_sums"]
        copy = tmp_path / f"{language}.npz"
        paths.append(save_dump(copy, selected, language, captured.num_experts))
        index = captured.languages.index(language)
        assert np.array_equal(captured.weight_sums[index], weight_sums)
    elsewhere = load_routing(paths)
    assert elsewhere.languages == captured.languages
    assert np.array_equal(elsewhere.counts, captured.counts)
    assert elsewhere.num_tokens.tolist() == captured.num_tokens.tolist()
    assert elsewhere.digests == captured.digests
    assert len(set(captured.digests)) == 3
    # the revision of the captured ones counts for both
    assert load_routing([paths[0], dumps[1]]).revision == captured.revision is not None


def test_counts_are_read_without_expert_ids(tmp_path, monkeypatch):
    path = save_captured(tmp_path / "a.npz")
    read = []
    get = np.lib.npyio.NpzFile.__getitem__

    def get_and_remember(file, name):
        read.append(name)
        return get(file, name)

    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", get_and_remember)
    load_routing(path)
    assert "counts" in read and "selected_experts" not in read


def test_segments_by_hand(tmp_path):
    path = save_captured(tmp_path / "a.npz")
    prompt, response, text = [load_routing(path, name) for name in ("prompt", "response", "text")]
    assert prompt.counts.tolist() == [[[2, 1, 0, 1], [1, 0, 2, 1]]]  # the first and the third
    assert response.counts.tolist() == [[[1, 1, 0, 0], [0, 1, 1, 0]]]  # the second
    assert text.counts.tolist() == [[[1, 1, 0, 0], [0, 0, 1, 1]]]  # the first
    assert [each.num_tokens.tolist() for each in (prompt, response, text)] == [[2], [1], [1]]


@pytest.mark.parametrize("dtype", ["int16", "uint64"])  # 2**64 - 1 is -1
def test_unrecorded_tokens_are_left_out_and_keep_their_positions(tmp_path, capsys, dtype):
    ids = np.insert(IDS, [1, 3], -1, axis=0)  # the second and the last of five tokens
    path = save_dump(
        tmp_path / "a.npz", ids.astype(dtype), num_experts=4, token_ids=[10, 0, 11, 12, 0],
        sequence_offsets=[0, 3, 5], prompt_lengths=[2, 1])
    assert load_routing(path).counts.tolist() == [CAPTURED["counts"]]
    assert "2 tokens" in capsys.readouterr().err
    captured = save_captured(tmp_path / "b.npz")
    for segment in ("prompt", "response"):
        counts = load_routing(path, segment).counts
        assert np.array_equal(counts, load_routing(captured, segment).counts)
    tokens = read_tokens(path)
    assert np.array_equal(tokens.selected_experts, IDS)
    assert tokens.token_ids.tolist() == [10, 11, 12]
    assert tokens.sequence.tolist() == [0, 0, 1]
    assert tokens.position.tolist() == [0, 2, 0]


@pytest.mark.parametrize("place, experts, token, layer", [
    ((7, 2), [4, 4], 7, 2),   # twice the same
    ((7, 2), [4, 32], 7, 2),  # of 32 experts
    ((9, 0), -1, 9, 0),       # unrecorded in one layer only
    (9, 0, 9, 0),             # a placeholder
    ((slice(20, 40), 1), 0, 20, 1),
])
def test_ids_that_are_not_top_k_different_experts_are_refused_by_token_and_layer(
        tmp_path, place, experts, token, layer):
    ids = random_ids()
    ids[place] = experts
    path = save_dump(tmp_path / "a.npz", ids, num_experts=32)
    assert_refused(load_routing, path, names=[
        "a.npz", f"token {token} ", f"row {layer} ", f"selected_experts[{token}] = -1",
        f"np.delete(selected_experts, {layer}, axis=1)"])


def test_placeholders_and_dense_layers_are_dropped_as_the_message_says(tmp_path):
    ids = random_ids()
    ids[:, 1] = 0
    ids[9] = 0
    selected_experts = np.delete(ids, 1, axis=1)
    selected_experts[9] = -1
    path = save_dump(tmp_path / "a.npz", selected_experts, num_experts=32, layers=[2, 4, 5])
    routing = load_routing(path)
    assert routing.num_tokens.tolist() == [39]
    assert routing.layers.tolist() == [2, 4, 5]


def test_a_label_names_a_language_anew(tmp_path):
    path = save_captured(tmp_path / "x=y.npz")
    assert load_routing(path).languages == ["aa"]  # a file that exists has no label
    assert load_routing([path, f"bb={path}"]).languages == ["aa", "bb"]
    assert_refused(load_routing, [path, path], names=["x=y.npz", "'aa'", "label="])


@pytest.mark.parametrize("meta, change, named", [
    ({"num_experts": 5}, {"counts": [[3, 2, 0, 1, 0], [1, 1, 3, 1, 0]]}, "num_experts 4 and 5"),
    ({"top_k": 1}, {"counts": [[3, 0, 0, 0], [1, 1, 1, 0]]}, "top_k 2 and 1"),
    ({}, {"layers": [3, 4]}, "layers 0-1 and 3-4"),
    ({"revision": "r2"}, {}, "revision r1 and r2"),
])
def test_dumps_of_different_models_are_refused(tmp_path, meta, change, named):
    first = save_captured(tmp_path / "a.npz", {"revision": "r1"})
    unknown = save_dump(tmp_path / "u.npz", IDS, num_experts=4)  # names no revision
    second = save_captured(tmp_path / "b.npz", {"language": "bb"} | meta, **change)
    assert_refused(load_routing, [first, second], names=["a.npz", "b.npz", named])
    assert load_routing([unknown, first]).revision == "r1"
    assert_refused(load_routing, [unknown, first, second], names=["b.npz", named])


DO_NOT_FIT = {  # values of one array of CAPTURED
    "counts": [
        [[3, 2, 0, 2], [1, 1, 3, 1]], [[3, 2, 0, 2], [1, 1, 3, 0]], [[3, 3, -1, 1], [1, 1, 3, 1]],
        [6, 6], [[3, 3], [3, 3]],
        np.array(CAPTURED["counts"], float), np.array(CAPTURED["counts"], str),
        np.full((2, 4), 2**64 - 1, np.uint64)],
    "layers": [[0, 0], [1, 0], [0], [0, 1, 2], 3, [0.0, 1.0], [[0, 1]]],
    "weight_sums": [np.full((2, 4), np.nan), [[6.0], [6.0]], np.array(CAPTURED["counts"], str)],
    "null_counts": [[[[7, -1, 0, 0], [6, 0, 0, 0]]], [[[6], [6]]], [[6, 0], [6, 0]], 3],
    "sequence_offsets": [
        None, [], [0, -3], [1, 3], [0.0, 3.0], [0, 5, 3], np.array([0, 5, 3], np.uint64)],
}
META_DOES_NOT_FIT = {
    "top_k": [None, "2", 0],
    "num_tokens": [10**40, "3", float("nan")],
    "num_experts": [5, [4], None, 10**12],
    "format": [3, [1]],
    "shard": ["1/2"],
    "language": [5, ["de"], None, ""],
}
IDS_DO_NOT_FIT = {  # values of one array of CAPTURED if counts are missing, or not asked for
    "selected_experts": [None, IDS[0], IDS.astype(float), IDS[:, :0], IDS[..., :0]],
    "layers": [[0, 1, 2]],
    "token_ids": [[1, 2], [[1], [2], [3]]],
    "sequence_offsets": [[], [0, 2], [0, -3], [0, 5, 3], np.array([0, 5, 3], np.uint64)],
    "prompt_lengths": [None, [1], [[1], [1]], [0.5, 1]],
    "text_spans": [None, [1, 2], [[0, 0.5], [0, 1]]],
}


def one_by_one(cases):
    return [(name, value) for name, values in cases.items() for value in values]


@pytest.mark.parametrize("name, value", one_by_one(DO_NOT_FIT))
def test_a_dump_whose_arrays_do_not_fit_is_refused(tmp_path, name, value):
    path = save_captured(tmp_path / "a.npz", **{name: value})
    assert_refused(load_routing, path, names=["a.npz", name])


@pytest.mark.parametrize("name, value", one_by_one(META_DOES_NOT_FIT))
def test_a_dump_whose_meta_does_not_fit_is_refused(tmp_path, name, value):
    path = save_captured(tmp_path / "a.npz", {name: value})
    assert_refused(load_routing, path, names=["a.npz", name.removeprefix("num_")])


@pytest.mark.parametrize("name, value", one_by_one(IDS_DO_NOT_FIT))
def test_expert_ids_whose_arrays_do_not_fit_are_refused(tmp_path, name, value):
    segment = {"prompt_lengths": "response", "text_spans": "text"}.get(name, "all")
    path = save_captured(tmp_path / "a.npz", counts=None, **{name: value})
    assert_refused(load_routing, path, segment, names=["a.npz", name])


@pytest.mark.parametrize("segment, change", [
    ("all", {"sequence_offsets": [0]}),
    ("all", {"counts": None, "selected_experts": IDS[:0], "sequence_offsets": [0]}),
    ("all", {"counts": None, "selected_experts": np.full_like(IDS, -1)}),
    ("response", {"prompt_lengths": [2, 1]}),
])
def test_a_dump_without_a_token_of_the_segment_is_refused(tmp_path, segment, change):
    path = save_captured(tmp_path / "a.npz", **change)
    assert_refused(load_routing, path, segment, names=["a.npz", "no tokens", segment])


def test_a_dump_whose_tokens_selected_nothing_is_refused(tmp_path):
    path = save_captured(tmp_path / "a.npz", {"top_k": 0}, counts=np.zeros((2, 4), int))
    assert_refused(load_routing, path, names=["a.npz", "top_k 0"])


def test_a_segment_that_does_not_exist_is_refused(tmp_path):
    path = save_captured(tmp_path / "a.npz")
    assert_refused(load_routing, path, "promt", names=["'promt'", "prompt, response, text"])


@pytest.mark.parametrize("version", [1, 2])
def test_both_formats_are_read(tmp_path, version):
    path = save_captured(tmp_path / "a.npz", {"format": version, "shard": "1/1"})
    assert load_routing(path).num_tokens.tolist() == [3]


@pytest.mark.parametrize("content", [
    {}, {"meta": "{"}, {"meta": "{}"}, {"meta": "[1]"}, {"meta": "null"}, {"meta": "[" * 100_000},
    {"meta": '{"num_experts": 4, "language": "a"}'}, b"", b"not a zip", b"PK\x03\x04cut off"])
def test_a_file_that_is_no_dump_is_refused(tmp_path, content):
    path = tmp_path / "a.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, other=[1], **content)
    assert_refused(load_routing, path, names=["a.npz"])


def test_a_path_that_is_no_file_is_refused(tmp_path):
    assert_refused(load_routing, [], names=["*.npz"])
    assert_refused(load_routing, tmp_path, names=[f"{tmp_path}/*.npz"])
    assert_refused(load_routing, tmp_path / "none.npz", names=["none.npz", "python capture.py"])


def test_damage_at_any_place_is_refused_or_harmless(tmp_path):
    whole = open(save_captured(tmp_path / "a.npz"), "rb").read()
    path = tmp_path / "b.npz"
    refused = 0
    for place in range(0, len(whole), 30):
        changed = whole[:place] + b"\xff" + whole[place + 1:]
        for damaged in (changed, whole[:place]):
            path.write_bytes(damaged)
            try:
                load_routing(path)
            except InputError as error:
                assert "b.npz" in str(error)
                refused += 1
    assert refused > 50


class MakesFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_executed(tmp_path):
    hidden = np.array([MakesFolder(tmp_path / "executed")], dtype=object)
    assert_refused(load_routing, save_captured(tmp_path / "a.npz", layers=hidden), names=["a.npz"])
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- selections and languages

CHOSEN = np.array([[0, 0.5, 0, 0], [0, 0, -2, 0]])


def test_a_selection_is_read_in_the_order_of_the_routings_layers(tmp_path):
    routing = load_routing(save_captured(tmp_path / "a.npz", {"revision": "r1"}, layers=[1, 5]))
    path = tmp_path / "s.npz"
    np.savez(path, selection=CHOSEN[::-1], layers=[5, 1], revision="r1")
    assert np.array_equal(load_selection(path, routing), CHOSEN)
    for revision in ("", "None"):  # unknown
        np.savez(path, selection=CHOSEN > 0, layers=[1, 5], revision=revision)
        assert load_selection(path, routing).tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    routing = load_routing(save_captured(tmp_path / "b.npz", layers=[1, 5]))  # names no revision
    np.savez(path, selection=CHOSEN, layers=[1, 5], revision="r1")
    assert np.array_equal(load_selection(path, routing), CHOSEN)


SELECTION_DOES_NOT_FIT = {
    "selection": [CHOSEN[:, :3], CHOSEN * np.nan, CHOSEN * 0, CHOSEN.astype(str)],
    "layers": [[0, 2], [0], [0, 0], [[0, 1]], ["0", "1"]],
    "another model": ["r2"],
}


@pytest.mark.parametrize("name, value", one_by_one(SELECTION_DOES_NOT_FIT))
def test_a_selection_that_does_not_fit_is_refused(tmp_path, name, value):
    routing = load_routing(save_captured(tmp_path / "a.npz", {"revision": "r1"}))
    array = name.replace("another model", "revision")
    np.savez(tmp_path / "s.npz", **{"selection": CHOSEN, "layers": [0, 1]} | {array: value})
    assert_refused(load_selection, tmp_path / "s.npz", routing, names=["s.npz", name])


def test_a_file_that_is_no_selection_is_refused(tmp_path):
    path = save_captured(tmp_path / "a.npz")
    routing = load_routing(path)
    assert_refused(load_selection, path, routing, names=["a.npz", "np.savez"])
    assert_refused(load_selection, tmp_path / "none.npz", routing, names=["none.npz", "np.savez"])


def test_languages_are_found_in_a_routing_or_refused(tmp_path):
    path = save_captured(tmp_path / "a.npz")
    routing = load_routing([path, f"bb={path}", f"cc={path}"])
    assert language_indices(["cc", "aa"], routing) == [2, 0]
    assert_refused(language_indices, ["aa", "zz"], routing, names=["'zz'", "python capture.py"])
    assert_refused(language_indices, ["aa", "aa"], routing, names=["twice"])


# by ISO 639-1 and as FLORES and Belebele name them
CODES = """
af:afr am:amh ar:arb as:asm az:azj be:bel bg:bul bn:ben bo:bod bs:bos ca:cat cs:ces cy:cym da:dan
de:deu el:ell en:eng es:spa et:est eu:eus fa:pes ff:fuv fi:fin fr:fra ga:gle gl:glg gu:guj ha:hau
he:heb hi:hin hr:hrv ht:hat hu:hun hy:hye id:ind ig:ibo is:isl it:ita ja:jpn jv:jav ka:kat kk:kaz
km:khm kn:kan ko:kor ku:kmr ky:kir lg:lug ln:lin lo:lao lt:lit lv:lvs mg:plt mi:mri mk:mkd ml:mal
mn:khk mr:mar ms:zsm mt:mlt my:mya nb:nob ne:npi nl:nld no:nob ny:nya om:gaz or:ory pa:pan pl:pol
ps:pbt pt:por ro:ron ru:rus rw:kin si:sin sk:slk sl:slv sn:sna so:som sq:als sr:srp st:sot su:sun
sv:swe sw:swh ta:tam te:tel tg:tgk th:tha tl:tgl tn:tsn tr:tur ts:tso tt:tat tw:twi ug:uig uk:ukr
ur:urd uz:uzn vi:vie wo:wol xh:xho yo:yor zh:zho zu:zul"""
BY_HAND = {
    "de": "Indo-European/Germanic Latn", "es": "Indo-European/Romance Latn",
    "ru": "Indo-European/Slavic Cyrl", "el": "Indo-European/Hellenic Grek",
    "hi": "Indo-European/Indo-Aryan Deva", "bn": "Indo-European/Indo-Aryan Beng",
    "fa": "Indo-European/Iranian Arab", "zh": "Sino-Tibetan/Sinitic Hans",
    "my": "Sino-Tibetan/Tibeto-Burman Mymr", "ar": "Afro-Asiatic/Semitic Arab",
    "sw": "Atlantic-Congo/Bantu Latn", "yo": "Atlantic-Congo/Volta-Niger Latn",
    "vi": "Austroasiatic/Vietic Latn", "id": "Austronesian/Malayo-Polynesian Latn",
    "fi": "Uralic/Finnic Latn", "hu": "Uralic/Hungarian Latn", "te": "Dravidian Telu",
    "ja": "Japonic Jpan", "ko": "Koreanic Hang", "th": "Tai-Kadai Thai", "eu": "Basque Latn",
    "tr": "Turkic Latn", "mn": "Mongolic Cyrl", "ka": "Kartvelian Geor",
    "lt": "Indo-European/Baltic Latn", "cy": "Indo-European/Celtic Latn",
    "sq": "Indo-European/Albanian Latn", "hy": "Indo-European/Armenian Armn",
    "ha": "Afro-Asiatic/Chadic Latn", "so": "Afro-Asiatic/Cushitic Latn",
    "tw": "Atlantic-Congo/Kwa Latn", "wo": "Atlantic-Congo/Senegambian Latn",
    "km": "Austroasiatic/Khmer Khmr", "ht": "Creole Latn",
    # a code may go on, with a region or a script of its own
    "de-AT": "Indo-European/Germanic Latn", "deu_Latn": "Indo-European/Germanic Latn",
    "zho_Hant": "Sino-Tibetan/Sinitic Hant", "cmn_Hans": "Sino-Tibetan/Sinitic Hans",
    "urd_Arab": "Indo-European/Indo-Aryan Arab",
    "xx": " ", "xx_Latn": " Latn",
}


def test_families_and_scripts_are_those_found_by_hand():
    labels = language_labels(list(BY_HAND))
    found = [f"{family} {script}" for family, script in zip(labels["families"], labels["scripts"])]
    assert dict(zip(BY_HAND, found)) == BY_HAND


def test_every_language_has_one_line_and_all_its_codes_are_on_it():
    codes = [code for line in analyze.LANGUAGES.strip().splitlines() for code in line.split()[2:]]
    assert len(codes) == len(set(codes))
    pairs = [pair.split(":") for pair in CODES.split()]
    short = language_labels([pair[0] for pair in pairs])
    long = language_labels([pair[1] for pair in pairs])
    assert (short["families"] == long["families"]).all()
    assert (short["scripts"] == long["scripts"]).all()
    assert (short["families"] != "").all()


def test_languages_are_ordered_by_family_and_unknown_ones_come_last_by_name():
    languages = ["yy", "zh", "xx", "fra_Latn", "sw", "de-AT", "es"]
    in_order = [languages[index] for index in language_order(languages)]
    assert in_order == ["sw", "de-AT", "es", "fra_Latn", "zh", "xx", "yy"]


# --------------------------------------------------- the published routing of Qwen3-30B-A3B

NAMES = "bn de en es fr ja sw zh".split()
PUBLISHED = [f"tests/data/qwen3-30b-a3b/{name}.npz" for name in NAMES]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What analyze.py prints and writes of the eight published dumps."""
    return run_analyze(tmp_path_factory.mktemp("published") / "a.npz", *PUBLISHED)


def test_the_published_routing_gives_the_published_figures(published):
    printed, result = published
    num_exclusive = dict(zip(NAMES, result["num_exclusive"]))
    assert (num_exclusive["sw"], num_exclusive["de"]) == (271, 48)
    assert result["band_layers"].tolist() == ["0-4", "22-26", "43-47"]  # the paper's
    assert result["mean_similarity"] == pytest.approx([0.776, 0.913, 0.598], abs=5e-4)
    assert re.search(r"^early +0-4 +0\.776 ", printed, re.MULTILINE)
    assert re.search(r"^sw +271 +207 +413$", printed, re.MULTILINE)
    routing = load_routing(PUBLISHED)
    sources = routing.activation_frequency[language_indices(["en", "zh"], routing)]
    assert shared_experts(language_shares(sources, 20), 0.7)[10:40].sum() == 420


def test_exclusive_experts_depend_on_which_languages_are_compared():
    frequency = load_routing(PUBLISHED).activation_frequency
    swahili = NAMES.index("sw")
    with_a_copy = np.concatenate([frequency, frequency[[swahili]]])
    assert expert_ownership(with_a_copy, 15, 0.4)["num_exclusive"][swahili] == 148


def test_counts_need_not_add_up_if_meta_says_that_they_are_inexact(tmp_path):
    routing = load_routing(PUBLISHED[0])
    assert (routing.counts.sum(-1) != routing.num_tokens * 8).any()
    with np.load(PUBLISHED[0]) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    twice = arrays | {"counts": arrays["counts"] * 2}
    np.savez(tmp_path / "off.npz", **twice, meta=json.dumps(meta))
    assert_refused(load_routing, tmp_path / "off.npz", names=["off.npz", "add up"])
    del meta["inexact"]
    np.savez(tmp_path / "bn.npz", **arrays, meta=json.dumps(meta))
    assert_refused(load_routing, tmp_path / "bn.npz", names=["bn.npz", "add up"])


# -------------------------------------------------------------------------------------- whole runs

ALL_FLAGS = ["--bootstrap", 3, "--parallel", "--vocabulary"]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Dumps of four languages with all arrays that analyze.py can read."""
    folder, rng = tmp_path_factory.mktemp("four"), np.random.default_rng(0)
    paths = []
    for seed, language in enumerate(("de", "en", "es", "sw")):
        paths.append(save_dump(
            folder / f"{language}.npz", random_ids(50, num_experts=16, seed=seed), language, 16,
            token_ids=rng.integers(0, 30, 50), sequence_offsets=range(0, 51, 5),
            prompt_lengths=np.full(10, 3),
            mean_probs=rng.dirichlet(np.ones(16), size=(10, 4)),
            null_counts=rng.multinomial(100, np.full(16, 1 / 16), size=(2, 4))))
    return paths


def test_a_table_by_hand(capsys):
    print_table("Title", {"": ["en", "deu"], "value": [0.5, np.float32(1.25)], "gone": None,
                          "n": np.array([3, 10])})
    assert capsys.readouterr().out == """
Title
     value   n
en   0.500   3
deu  1.250  10
"""


def test_cells_hold_intervals_if_there_are_any():
    result = {"a": np.array([0.5]), "b": np.array([[0.5, 0.25]])}
    assert analyze.with_interval(result, "a").tolist() == [0.5]
    assert analyze.with_interval(result, "b", column=1).tolist() == [0.25]
    result["interval_a"] = np.array([[0.4], [1.0]])
    result["interval_b"] = np.array([[[0.4, 0.1]], [[0.6, 0.3]]])
    assert analyze.with_interval(result, "a") == ["0.500 [.400 1.000]"]
    assert analyze.with_interval(result, "b", column=1) == ["0.250 [.100 .300]"]


def test_every_table_shows_what_is_written(four, tmp_path):
    printed, result = run_analyze(
        tmp_path / "a.npz", *four, "--bands", "low=0-1", "--threshold", 0.6, "--vocabulary")

    def assert_shown(title, row, **expected):
        cells = read_table(printed, title)[row]
        for heading, value in expected.items():
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            assert cells[heading.replace("_", " ")] == text, (title, heading)

    assert_shown("each band of layers", "low", layers="0-1",
                 similarity=result["mean_similarity"][0], null=result["null_mean_similarity"][0],
                 divergence=result["mean_divergence"][0], jaccard=result["mean_jaccard"][0])
    assert_shown("Layer by layer", "3", similarity=result["layer_similarity"][3],
                 null=result["null_layer_similarity"][3], entropy=result["layer_entropy"][3],
                 shared=result["layer_shared"][3], exclusive=result["layer_exclusive"][3],
                 sw=result["exclusive"][3, 3].sum())
    to_exclusive, to_shared, to_others = result["mean_reliance"][3]
    assert_shown("Fraction of each language's routing", "sw",
                 exclusive=to_exclusive, shared=to_shared, others=to_others)
    assert_shown("Number of experts", "sw", exclusive=result["num_exclusive"][3],
                 to_it_only=result["num_only"][3], null=result["null_num_exclusive"][3],
                 shared=result["num_shared"][3])
    assert_shown("over all tokens", "low", all=result["mean_similarity"][0],
                 common=result["mean_common_tokens"][0], own=result["mean_own_tokens"][0])
    assert_shown("Fraction of the row's tokens", "es", sw=result["common_tokens"][2, 3])
    assert_shown("Similarity of languages in the low layers", "es",
                 sw=result["band_similarity"][0, 2, 3])
    same, other, p, smallest_p, holm_p = result["family_tests"][0]
    assert_shown("Are related languages more similar", "family low", same=same, other=other, p=p,
                 smallest_p=smallest_p, Holm=holm_p)


def test_matrices_are_printed_in_the_order_of_languages(four, tmp_path):
    printed, _ = run_analyze(tmp_path / "a.npz", *four, "--vocabulary")
    table = read_table(printed, "Fraction of the row's tokens")
    assert list(table) == list(table["de"]) == ["sw", "de", "en", "es"]


def test_settings_and_inputs_are_written(four, tmp_path):
    _, result = run_analyze(tmp_path / "a.npz", *four, "--bands", "low=0-1", "--threshold", 0.6)
    assert (result["bands"].tolist(), result["band_layers"].tolist()) == (["low"], ["0-1"])
    meta = json.loads(str(result["meta"]))
    assert (meta["threshold"], meta["experts_per_language"]) == (0.6, 2)  # 15/128 of 16
    routing = load_routing(four)
    assert [each["language"] for each in meta["inputs"]] == routing.languages
    assert [each["digest"] for each in meta["inputs"]] == routing.digests
    assert [each["num_tokens"] for each in meta["inputs"]] == [50] * 4


def test_every_array_that_is_written_is_documented(four, tmp_path):
    _, result = run_analyze(tmp_path / "a.npz", *four, *ALL_FLAGS)
    documented = set(re.findall(r"\w+", analyze.save_analysis.__doc__))
    for name in result:
        figure = re.sub("^(interval|null)_", "", name)
        with_m = re.sub(f"(^|_)({'|'.join(analyze.MEASURES)})$", r"\1M", figure)
        assert {figure, with_m} & documented, name
    intervals = {name for name in result if name.startswith("interval_")}
    figures = set(analyze.SMOOTH + analyze.THRESHOLDED)
    assert intervals == {f"interval_{name}" for name in figures}


def test_no_printed_line_is_longer_than_a_hundred_columns(four, tmp_path):
    printed, _ = run_analyze(tmp_path / "a.npz", *four, *ALL_FLAGS)
    assert [line for line in printed.splitlines() if len(line) > 100] == []


def test_the_same_seed_gives_the_same_file(four, tmp_path):
    first, again, other = [
        run_analyze(tmp_path / "a.npz", *four, *ALL_FLAGS, "--seed", seed) for seed in (1, 1, 2)]
    assert first[0] == again[0] != other[0]
    for name, array in first[1].items():
        np.testing.assert_array_equal(array, again[1][name])


@pytest.mark.filterwarnings("error")
def test_odd_corpora_are_analyzed(tmp_path):
    one_token = save_dump(tmp_path / "one.npz", IDS[:1], "one", 4)
    same = [save_dump(tmp_path / f"{name}.npz", np.tile(IDS[:1], (9, 1, 1)), name, 4)
            for name in ("aa", "bb")]
    _, alone = run_analyze(tmp_path / "a.npz", one_token)
    assert np.isnan(alone["mean_similarity"]).all()  # no pair
    _, equal = run_analyze(tmp_path / "a.npz", *same, one_token)
    np.testing.assert_allclose(equal["similarity"], 1)


def test_more_than_twelve_languages_are_printed_without_a_column_for_each(tmp_path):
    paths = [save_dump(tmp_path / f"{i}.npz", IDS, f"l{i}", 4) for i in range(13)]
    for number in (12, 13):
        printed, _ = run_analyze(tmp_path / "a.npz", *paths[:number])
        assert (re.search(r"\bl0 +l1\b", printed) is not None) == (number == 12)
        assert ("are not printed" in printed) == (number == 13)


def test_what_to_know_about_a_comparison_is_noted(tmp_path):
    def notes(name, meta, threshold=0.6):
        first = save_captured(tmp_path / "a.npz", {"language": "de", "dtype": "float32"})
        second = save_captured(tmp_path / "b.npz", {"language": name, "dtype": "float32"} | meta)
        printed, _ = run_analyze(tmp_path / "o.npz", first, second, "--threshold", threshold)
        return re.findall("^note: .*", printed, re.MULTILINE)

    assert notes("es", {}) == []
    for note, arguments in {
        "dtype": ("es", {"dtype": "bfloat16"}),
        "instruction": ("es", {"instruction": "Think."}),
        "no expert can be shared": ("es", {}, 0.5),  # two shares cannot both be below .5
        "no family": ("bb", {}),
    }.items():
        assert [note in text for text in notes(*arguments)] == [True]


@pytest.mark.parametrize("arguments, named", [
    (["--bootstrap", "1"], "--bootstrap"),
    (["--bootstrap", "-1"], "--bootstrap"),
    (["--seed", "-1"], "--seed"),
    (["--figures", "README.md"], "README.md"),
    (["--parallel", "--segment", "prompt"], "--segment"),
    (["--experts-per-language", "4.5"], "experts_per_language"),
    (["--threshold", "1.5"], "threshold"),
    (["--bands", "a=0-9"], "a=0-9"),
])
def test_a_bad_argument_is_refused_and_nothing_is_written(four, tmp_path, arguments, named):
    assert_refused(run_analyze, tmp_path / "a.npz", *four, *arguments, names=[named])
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_analysis_is_overwritten(four, tmp_path):
    copy = tmp_path / "de.npz"
    copy.write_bytes(open(four[0], "rb").read())
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for path in (copy, mine, tmp_path, ""):
        before = copy.read_bytes(), mine.read_text()
        assert_refused(run, analyze, *four, "--out", path, names=[str(path), "--out"])
        assert (copy.read_bytes(), mine.read_text()) == before
    for threshold in (0.5, 0.6):
        _, result = run_analyze(tmp_path / "new/a.npz", *four, "--threshold", threshold)
        assert json.loads(str(result["meta"]))["threshold"] == threshold


def test_figures_are_drawn_or_what_to_install_is_named(four, tmp_path, monkeypatch):
    folder = tmp_path / "figures"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert_refused(run_analyze, tmp_path / "a.npz", *four, "--figures", folder,
                       names=["pip install matplotlib"])
    pytest.importorskip("matplotlib")
    printed, _ = run_analyze(tmp_path / "a.npz", *four, *ALL_FLAGS, "--figures", folder)
    for name in ("heatmaps.png", "layers.png"):
        assert (folder / name).stat().st_size > 10_000
        assert f"{folder}/{name}" in printed


def test_analyze_imports_numpy_and_tqdm_alone_and_for_figures_matplotlib():
    with open(analyze.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    assert packages == {"numpy", "tqdm", "matplotlib"}
