"""The definitions of arXiv 2601.14050 worked by hand, and what analyze.py reads and refuses."""

import ast
import json
import sys

import numpy as np
import pytest

import analyze
from analyze import (InputError, activation_frequency, entropy_bits, exclusive_experts,
                     jensen_shannon, language_shares, load_languages, load_routing,
                     mean_of_pairs, number_of_experts, parse_bands, shared_experts)


def test_frequency_is_the_part_of_tokens_and_rows_sum_to_top_k():
    assert activation_frequency([[3, 1, 4]], 4).tolist() == [[0.75, 0.25, 1.0]]  # top_k 2
    two = activation_frequency([[[3, 1]], [[1, 9]]], [4, 10])
    assert two.tolist() == [[[0.75, 0.25]], [[0.1, 0.9]]]


def test_shares_keep_only_the_most_frequent_experts():
    # expert:             0    1    2
    frequency = np.array([[[0.6, 0.3, 0.1]], [[0.2, 0.3, 0.5]]])
    share = language_shares(frequency, 2)  # the first keeps 0 and 1, the second 2 and 1
    np.testing.assert_allclose(share, [[[1, 0.5, 0]], [[0, 0.5, 1]]])


def test_of_equally_frequent_experts_the_lower_index_is_kept():
    share = language_shares(np.array([[[0.25, 0.25, 0.25, 0.25]], [[0.1, 0.4, 0.1, 0.4]]]), 2)
    np.testing.assert_allclose(share[0] > 0, [[True, True, False, False]])
    np.testing.assert_allclose(share[1] > 0, [[False, True, False, True]])
    np.testing.assert_allclose(share[:, 0, 1], [0.25 / 0.65, 0.4 / 0.65])
    many = np.tile([0.1, 0.2], 64).reshape(1, 1, 128)  # of 64 tied ones the first 15, at 1, 3, ...
    assert np.flatnonzero(language_shares(many, 15)).tolist() == list(range(1, 30, 2))


def test_shares_of_kept_experts_sum_to_one_and_others_to_zero():
    frequency = np.random.default_rng(0).dirichlet(np.ones(16), size=(5, 3))
    total = language_shares(frequency, 4).sum(0)
    assert np.all(np.isclose(total, 1) | (total == 0)) and 0 < (total == 0).mean() < 1


def test_an_expert_that_is_never_used_is_nobodys():
    share = language_shares(np.array([[[1.0, 0.0]], [[1.0, 0.0]]]), 2)
    assert share[:, 0, 1].tolist() == [0, 0]
    assert not shared_experts(share, 0.6)[0, 1] and not exclusive_experts(share, 0.4)[:, 0, 1].any()


def test_exclusive_is_above_the_threshold_and_shared_below_it():
    share = np.array([[[0.7, 0.5, 0.4, 0.0]], [[0.3, 0.5, 0.3, 0.0]], [[0.0, 0.0, 0.3, 0.0]]])
    exclusive = exclusive_experts(share, 0.5).astype(int)
    assert exclusive.tolist() == [[[1, 0, 0, 0]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]]
    assert shared_experts(share, 0.5).astype(int).tolist() == [[0, 0, 1, 0]]  # .5 itself is neither
    together = exclusive_experts(share[[0, 1]].sum(0), 0.65)
    assert together.astype(int).tolist() == [[1, 1, 1, 0]]


def test_similarity_by_hand():
    half = np.array([0.5, 0.5, 0.0])
    assert entropy_bits(half) == 1 and entropy_bits(np.full(8, 1 / 8)) == 3
    assert jensen_shannon(half, half)[0] == pytest.approx(1)
    assert jensen_shannon(half, np.array([0, 0, 1.0]))[0] == pytest.approx(0)
    # middle (.25, .5, .25): entropy 1.5 bits; both have 1 bit; JSD = 1.5 - 1
    assert jensen_shannon(half, np.array([0, 0.5, 0.5]))[0] == pytest.approx(0.5)


def test_the_mean_of_pairs_leaves_out_a_language_with_itself_and_pairs_that_are_nan():
    matrix = np.array([[9, 1, 2], [1, 9, 6], [2, 6, 9.0]])
    assert mean_of_pairs(matrix) == 3
    matrix[0, 1] = matrix[1, 0] = np.nan
    assert mean_of_pairs(np.stack([matrix, matrix + 1])).tolist() == [4, 5]
    assert np.isnan(mean_of_pairs(np.ones((2, 1, 1)))).tolist() == [True, True]  # no pair


@pytest.mark.parametrize("n, early, middle, late", [
    (48, range(0, 5), range(22, 27), range(43, 48)),  # the paper's for Qwen3-30B-A3B
    (8, [0], [4], [7]),
    (1, [0], [0], [0]),
])
def test_default_bands_are_the_first_middle_and_last_tenth(n, early, middle, late):
    bands = parse_bands(None, np.arange(n))
    assert {name: np.flatnonzero(rows).tolist() for name, rows in bands.items()} == {
        "early": list(early), "middle": list(middle), "late": list(late)}


def test_a_band_counts_decoder_layers_and_skips_dense_ones():
    layers = np.array([1, 2, 5, 6])
    assert parse_bands(["a=0-2", "3-5"], layers)["a"].tolist() == [True, True, False, False]
    assert parse_bands(["a=0-2", "3-5"], layers)["3-5"].tolist() == [False, False, True, False]


@pytest.mark.parametrize("band", ["a=3-4", "a=5-2", "a=5-7", "a=3", "a=x-y", "a=0-1,b=4-5"])
def test_a_band_without_layers_is_refused(band):
    with pytest.raises(InputError, match=r"band 'a="):
        parse_bands([band], np.array([1, 2, 5, 6]))


@pytest.mark.parametrize("threshold", [0, 1, -1, float("nan")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(InputError, match="threshold"):
        shared_experts(np.zeros((2, 1, 4)), threshold)


@pytest.mark.parametrize("given, num_experts, number", [
    (15 / 128, 32, 4), (15 / 128, 128, 15), (0.5, 4, 2), (0.01, 4, 1), (15, 32, 15), (1, 4, 1),
    (32, 32, 32), (4.0, 32, 4)])
def test_experts_per_language_is_a_part_below_one_and_else_a_number(given, num_experts, number):
    assert number_of_experts(given, num_experts) == number
    frequency = np.random.default_rng(0).random((2, 3, num_experts))
    kept = language_shares(frequency, given) > 0
    assert (kept.sum(-1) == number).all()
    assert (analyze.most_frequent(frequency, given) == kept).all()


@pytest.mark.parametrize("given", [4.5, 33, 0, -0.5, float("nan")])
def test_experts_per_language_that_are_no_number_of_the_experts_are_refused(given):
    with pytest.raises(InputError, match=f"experts_per_language {given}"):
        number_of_experts(given, 32)
    with pytest.raises(InputError, match=f"experts_per_language {given}"):
        language_shares(np.zeros((2, 1, 32)), given)


# ---------------------------------------------------------------------------------------- reading

def write(path, selected, language="xx", num_experts=4, **more):
    meta = json.dumps({"language": language, "num_experts": num_experts} | more.pop("meta", {}))
    np.savez(path, selected_experts=np.array(selected, np.uint8), meta=meta, **more)
    return str(path)


IDS = [[[0, 1], [2, 3]], [[1, 0], [2, 1]], [[0, 3], [2, 0]]]  # 3 tokens, 2 layers, top_k 2


def run(monkeypatch, folder, *arguments):
    """analyze.py as from the shell in a folder, in this process; what it wrote."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["analyze.py", *arguments])
    analyze.main()
    with np.load("analysis.npz", allow_pickle=False) as file:
        return dict(file)


def test_a_dump_with_only_ids_and_meta_is_counted(tmp_path):
    dump = load_routing(write(tmp_path / "a.npz", IDS))
    assert dump["counts"].tolist() == [[3, 2, 0, 1], [1, 1, 3, 1]]
    assert [dump[key] for key in ("num_tokens", "top_k", "num_experts")] == [3, 2, 4]
    assert dump["language"] == "xx" and dump["revision"] is None
    assert dump["layers"].tolist() == [0, 1]


def test_a_label_renames_a_dump(tmp_path):
    assert load_routing("de=" + write(tmp_path / "a.npz", IDS))["language"] == "de"


def test_prompt_and_response_add_up_to_all(tmp_path):
    path = write(tmp_path / "a.npz", IDS, sequence_offsets=[0, 2, 3], prompt_lengths=[1, 1])
    prompt, response = load_routing(path, "prompt"), load_routing(path, "response")
    assert (prompt["num_tokens"], response["num_tokens"]) == (2, 1)
    assert response["counts"].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]  # only the second token
    assert (prompt["counts"] + response["counts"]).tolist() == load_routing(path)["counts"].tolist()


def test_recorder_json_is_read(tmp_path):
    counts = {"1": 20, "0": 40, "10": 0, "2": 19}
    layer = {expert: {"activation_tokens": n} for expert, n in counts.items()} | {"total_tokens": 40}
    path = tmp_path / "mgsm_sw.json"
    path.write_text(json.dumps({"10": layer, "2": layer}))
    dump = load_routing(str(path))
    gap = [0] * 7  # experts that no layer names are experts, too
    assert dump["counts"].tolist() == [[40, 20, 19, *gap, 0]] * 2
    assert dump["layers"].tolist() == [2, 10] and dump["top_k"] == 2
    assert dump["language"] == "mgsm_sw"


def test_shards_add_up_and_keep_their_sources_in_their_order(tmp_path):
    one = write(tmp_path / "1.npz", IDS[:1], meta={"shard": "1/2", "data_sha256": "d"})
    two = write(tmp_path / "2.npz", IDS[1:], meta={"shard": "2/2", "data_sha256": "d"})
    whole = load_languages([write(tmp_path / "w.npz", IDS, meta={"data_sha256": "d"})])[0]
    added = load_languages([two, one])[0]
    assert np.array_equal(added["counts"], whole["counts"])
    assert added["num_tokens"] == whole["num_tokens"]
    assert whole["path"] == [str(tmp_path / "w.npz")] and added["path"] == [one, two]
    assert whole["data_sha256"] == ["d"] and added["data_sha256"] == ["d", "d"]
    assert added["digest"] == [load_routing(path)["digest"][0] for path in (one, two)]


@pytest.mark.parametrize("shards", [["1/1", "1/1"], ["1/3", "2/3"], ["1/2", "1/2"], ["1/2"]])
def test_a_language_twice_or_shards_that_are_no_whole_are_refused(tmp_path, shards):
    paths = [write(tmp_path / f"{i}.npz", IDS, meta={"shard": s}) for i, s in enumerate(shards)]
    with pytest.raises(InputError, match="not one whole"):
        load_languages(paths)


@pytest.mark.parametrize("ids, change, other", [
    (IDS, dict(num_experts=5), "num_experts"),
    (IDS, dict(meta={"revision": "r2"}), "revision"),
    (IDS, dict(layers=np.array([3, 4])), "layers"),
    ([[[0], [2]]], dict(), "top_k"),
])
def test_dumps_of_different_models_are_refused(tmp_path, ids, change, other):
    first = write(tmp_path / "a.npz", IDS, "aa", meta={"revision": "r1"})
    second = write(tmp_path / "b.npz", ids, "bb", **change)
    with pytest.raises(InputError, match=rf"a\.npz and .*b\.npz have other {other}"):
        load_languages([first, second])


WHOLE = dict(counts=[[3, 2, 0, 1], [1, 1, 3, 1]], sequence_offsets=[0, 3], layers=[0, 1],
             meta={"top_k": 2})


@pytest.mark.parametrize("change", [
    {"counts": [[3, 2, 0, 2], [1, 1, 3, 1]]}, {"counts": [[3, 3, -1, 1], [1, 1, 3, 1]]},
    {"layers": [0, 0]}, {"layers": [0]}, {"weight_sums": np.full((2, 4), np.nan)},
    {"null_counts": [[[7, -1, 0, 0], [6, 0, 0, 0]]]}, {"null_counts": [[[6], [6]]]},
    {"weight_sums": [[6], [6]]}])
def test_a_dump_whose_figures_do_not_add_up_is_refused(tmp_path, change):
    assert load_routing(write(tmp_path / "a.npz", IDS, **WHOLE))["num_tokens"] == 3
    with pytest.raises(InputError, match="do not add up"):
        load_routing(write(tmp_path / "b.npz", IDS, **WHOLE | change))


def test_many_languages_are_printed_without_tables_of_names_alone(tmp_path, monkeypatch, capsys):
    paths = [write(tmp_path / f"{i}.npz", IDS, f"l{i}") for i in range(13)]
    monkeypatch.setattr(analyze, "OUT", tmp_path / "analysis.npz")  # a path, and no text
    for n in (12, 13):
        run(monkeypatch, tmp_path, *paths[:n], "--sensitivity")
        printed = capsys.readouterr().out
        assert ("what is as wide is in" in printed) == (n > 12)
        assert ("on exclusive experts than the column" in printed) == (n <= 12)
        assert "similarity, early; in order of average linkage: l" in printed


def test_ids_from_elsewhere_compare_with_captured_ones_and_must_fit(tmp_path):
    captured = write(tmp_path / "a.npz", IDS, "aa", meta={"revision": "r1"})
    assert len(load_languages([captured, write(tmp_path / "b.npz", IDS, "bb")])) == 2
    with pytest.raises(InputError, match=r"token 0 has in layer 1 the experts \[2, 3\]: neither"):
        load_routing(write(tmp_path / "c.npz", IDS, num_experts=3))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04cut off"])
def test_a_file_that_is_no_dump_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match="a.npz is not a whole routing dump"):
        load_routing(str(tmp_path / "a.npz"))


def test_pickles_are_never_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", meta=np.array({"a": 1}, dtype=object), counts=np.ones((1, 2)))
    with pytest.raises(InputError, match="is not a whole routing dump"):
        load_routing(str(tmp_path / "a.npz"))


def test_analysis_holds_what_is_printed(tmp_path, monkeypatch, capsys):
    rng, names = np.random.default_rng(0), ["aa", "bb", "cc"]
    for language in names:
        ids = np.stack([rng.permutation(16)[:2] for _ in range(50 * 4)]).reshape(50, 4, 2)
        write(tmp_path / f"{language}.npz", ids, language, 16)
    result = run(monkeypatch, tmp_path, "aa.npz", "bb.npz", "cc.npz", "--bands", "low=0-1",
                 "--threshold", "0.6")
    assert result["languages"].tolist() == names and result["layers"].tolist() == [0, 1, 2, 3]
    assert result["similarity"].shape == (4, 3, 3) and result["entropy"].shape == (3, 4)
    for key in ("frequency", "share", "exclusive"):
        assert result[key].shape == (3, 4, 16)
    assert result["shared"].shape == (4, 16)
    np.testing.assert_allclose(result["frequency"].sum(-1), 2)
    lines = capsys.readouterr().out.splitlines()
    shared, exclusive = result["shared"][3].sum(), result["exclusive"][:, 3]
    printed = next(line for line in lines if line.startswith("3  ")).split()
    assert printed[3:] == [str(n) for n in (shared, exclusive.sum(), *exclusive.sum(1))]
    assert (result["bands"], result["band_layers"]) == (["low"], ["0-1"])
    meta = json.loads(str(result["meta"]))
    assert [i["language"] for i in meta["inputs"]] == names
    assert len(meta["inputs"][0]["digest"][0]) == 16


@pytest.mark.parametrize("flag, number", [([], 2), (["0.25"], 4), (["3"], 3)])
def test_the_flag_for_experts_per_language_takes_a_part_or_a_number(tmp_path, monkeypatch, capsys,
                                                                    flag, number):
    ids = np.stack([np.random.default_rng(t).permutation(16)[:2] for t in range(50)])[:, None]
    write(tmp_path / "a.npz", ids, num_experts=16)
    flags = [part for value in flag for part in ("--experts-per-language", value)]
    result = run(monkeypatch, tmp_path, "a.npz", *flags)  # by default 15/128 of 16, 1.9
    assert (result["share"] > 0).sum() == number
    assert json.loads(str(result["meta"]))["experts_per_language"] == number
    assert f"experts_per_language {number} " in capsys.readouterr().out


def test_one_language_alone_is_analyzed(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path, write(tmp_path / "a.npz", IDS))
    assert "nan" in capsys.readouterr().out  # no pair to compare


def test_analyze_needs_nothing_but_numpy_and_tqdm_and_for_pictures_matplotlib():
    with open(analyze.__file__, encoding="utf-8") as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    assert packages == {"numpy", "tqdm", "matplotlib"}
