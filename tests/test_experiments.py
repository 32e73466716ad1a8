"""ablate.py and steer.py: the right experts, their controls, one load, rows that resume, and predictions that re-read."""

import json
import sys

import numpy as np
import pytest
import torch

import ablate
import analyze
import capture
import common
import steer

LANGUAGES = ["en", "sw", "zh"]


def run(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["capture.py", "--languages", ",".join(LANGUAGES), "--limit", "60", "--out", str(folder)])
        capture.main()
    return [str(folder / f"{language}.npz") for language in LANGUAGES]


def rows_of(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# -------------------------------------------------------------------------------------------------------------- controls

def test_a_random_control_has_as_many_experts_per_layer_of_those_in_use():
    masked = np.zeros((2, 8), bool)
    masked[0, [1, 2, 3]] = True
    used = np.array([[1, 1, 1, 1, 1, 1, 1, 0], [1] * 8], bool)
    draws = [ablate.random_control(masked, used, [7, seed]) for seed in range(20)]
    for control in draws:
        assert control.sum(1).tolist() == [3, 0] and not (control & ~used).any() and not (control & masked).any()
    assert len({control.tobytes() for control in draws}) > 3
    assert (ablate.random_control(masked, used, [7, 3]) == draws[3]).all()


def test_a_usage_matched_control_takes_the_closest_frequencies():
    frequency = np.array([[0.5, 0.3, 0.45, 0.29, 0.1, 0.02]])
    masked = np.array([[True, True, False, False, False, False]])
    candidates = np.array([[False, False, True, False, True, True]])  # expert 3 is exclusive, too
    control = ablate.usage_matched_control(masked, candidates, frequency)
    assert control.tolist() == [[False, False, True, False, True, False]]  # .45 for .5, then .1 for .3


def test_experts_exclusive_to_several_languages_sum_their_shares():
    share = np.array([[[0.3, 0.9, 0.2]], [[0.3, 0.0, 0.2]], [[0.4, 0.1, 0.6]]])
    assert ablate.exclusive_to(share, ["a", "b", "c"], "a+b", 0.5).tolist() == [[True, True, False]]
    assert ablate.exclusive_to(share, ["a", "b", "c"], "a", 0.5).tolist() == [[False, True, False]]


# ---------------------------------------------------------------------------------------------------------------- ablate

@pytest.fixture(scope="module")
def ablation(dumps, tmp_path_factory):
    """One run on two evaluation languages and two targets, with the number of model loads and what it printed."""
    out, loads, printed = tmp_path_factory.mktemp("results") / "ablate.jsonl", [], []
    arguments = ["--routing", *dumps, "--languages", "en,sw", "--targets", "sw,en+zh", "--bands", "a=0-2", "late=7-7",
                 "--limit", "12", "--control-seeds", "3", "--metrics", "prompt_nll", "accuracy", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablate.py", *arguments])
        patch.setattr("builtins.print", lambda *a, **k: printed.append(" ".join(map(str, a))))
        load = common.load_model
        patch.setattr(common, "load_model", lambda *a: loads.append(a) or load(*a))
        ablate.main()
    return out, arguments, loads, "\n".join(printed)


def test_the_grid_is_complete_from_one_load(ablation, dumps):
    out, _, loads, _ = ablation
    rows = rows_of(out)
    assert len(loads) == 1
    baselines = [r["settings"]["language"] for r in rows if r["cell"] == "baseline"]
    assert sorted(baselines) == ["en", "sw"]  # once per language
    # 2 bands x (2 targets x 2 languages + 2 own cells x (3 random + 1 matched)), less the masks without experts
    assert len({json.dumps(r["settings"], sort_keys=True) for r in rows}) == len(rows) <= 2 + 2 * (4 + 2 * 4)
    masked = [r for r in rows if r["settings"].get("experts") == "exclusive"]
    assert {(tuple(r["settings"]["band"]), r["settings"]["target"], r["settings"]["language"]) for r in masked} == {
        (band, target, language) for band in [(0, 1, 2), (7,)] for target in ("sw", "en+zh") for language in ("en", "sw")}
    for row in rows:
        assert row["settings"]["revision"] and row["arguments"]["max_new_tokens"] == 32
        if row["cell"] != "baseline":
            assert row["settings"]["dumps"]["sw"] == [analyze.dump_digest(str(dumps[1]))]
            assert set(row["interval"]) == set(row["scores"]) and len(row["scores"]["accuracy"]) == 12


def test_a_cell_is_what_masking_by_hand_gives(ablation, dumps):
    row = next(r for r in rows_of(ablation[0]) if r["cell"] == "a-exclusive-sw" and r["settings"]["language"] == "en")
    loaded = analyze.load_languages(dumps)
    frequency = np.array([d["counts"] / d["num_tokens"] for d in loaded])
    exclusive = analyze.exclusive_experts(analyze.language_shares(frequency, 4), 0.4)[1]
    masks = {layer: np.flatnonzero(exclusive[layer]).tolist() for layer in (0, 1, 2) if exclusive[layer].any()}
    assert row["experts"] == {str(layer): len(ids) for layer, ids in masks.items()}
    model, tokenizer = common.load_model("tests/tiny_moe", device="cpu")
    encoded = common.encode_examples(tokenizer, common.read_examples("tests/data/eval_en.tsv")[:12])
    with common.edit_routing(model, masks=masks):
        scores, *_ = common.evaluate(model, tokenizer, encoded, ["prompt_nll", "accuracy"], "en", max_new_tokens=32)
    plain, *_ = common.evaluate(model, tokenizer, encoded, ["prompt_nll", "accuracy"], "en", max_new_tokens=32)
    np.testing.assert_allclose(row["scores"]["prompt_nll"], scores["prompt_nll"], atol=1e-5)
    assert row["scores"]["accuracy"] == scores["accuracy"].tolist()
    assert row["change"]["prompt_nll"] == pytest.approx((scores["prompt_nll"] - plain["prompt_nll"]).mean(), abs=1e-5)
    assert row["change"]["prompt_nll"] != 0


def test_own_cells_have_random_and_usage_matched_controls(ablation):
    rows = rows_of(ablation[0])
    own = [r for r in rows if r["settings"].get("target") == "sw" and r["settings"]["language"] == "sw"
           and r["settings"]["band"] == [0, 1, 2]]
    kinds = {r["settings"]["experts"]: r["experts"] for r in own}
    assert set(kinds) == {"exclusive", "random-seed0", "random-seed1", "random-seed2", "usage-matched"}
    assert all(number == kinds["exclusive"] for number in kinds.values())  # as many, layer by layer


def test_running_again_evaluates_only_what_is_missing(ablation, monkeypatch, capsys):
    out, arguments, _, printed = ablation
    whole = out.read_text()
    evaluate, ran = common.evaluate, []
    monkeypatch.setattr(common, "evaluate", lambda *a: ran.append(1) or evaluate(*a))
    assert run(ablate, monkeypatch, capsys, *arguments).strip() == printed.strip() and not ran
    assert out.read_text() == whole
    out.write_text(whole[:-100])  # a kill while the last line was written
    assert run(ablate, monkeypatch, capsys, *arguments).strip() == printed.strip()
    assert len(ran) == 1 and len(rows_of(out)) == whole.count("\n")


def test_the_table_shows_the_change_and_the_control(ablation):
    out, _, _, printed = ablation
    rows = {(r["cell"], r["settings"]["language"]): r for r in rows_of(out)}
    assert "late (layers 7)  prompt_nll" in printed and "a (layers 0-2)  accuracy" in printed
    change = rows["a-exclusive-sw", "sw"]["change"]["prompt_nll"]
    random = np.mean([rows[f"a-random-seed{s}-sw", "sw"]["change"]["prompt_nll"] for s in range(3)])
    assert f"{change:>+8.3f}{random:>+8.3f} (" in printed


def test_another_draw_is_another_cell(dumps, monkeypatch, capsys, tmp_path):
    arguments = ["--routing", *dumps, "--languages", "sw", "--targets", "sw", "--experts", "random", "--bands", "all=0-7",
                 "--limit", 2, "--out", tmp_path / "r.jsonl"]
    run(ablate, monkeypatch, capsys, *arguments, "--control-seeds", 1)
    first = rows_of(tmp_path / "r.jsonl")
    run(ablate, monkeypatch, capsys, *arguments, "--control-seeds", 2)
    more = rows_of(tmp_path / "r.jsonl")
    assert more[:len(first)] == first and len(more) == len(first) + 1  # one control more, and nothing else anew
    monkeypatch.setattr(ablate, "random_control", lambda masked, used, seed: np.roll(masked, 1, 1))
    run(ablate, monkeypatch, capsys, *arguments, "--control-seeds", 2)
    assert len(rows_of(tmp_path / "r.jsonl")) > len(more)  # other experts are other cells


def test_predictions_are_captured_again_with_their_responses(ablation, monkeypatch, capsys, tmp_path):
    out = ablation[0]
    row = next(r for r in rows_of(out) if r["cell"] == "baseline" and r["settings"]["language"] == "en")
    predictions = rows_of(row["predictions"])
    assert set(predictions[0]) >= {"prompt", "response", "answer", "score"} and "=" in predictions[0]["response"]
    assert [p["score"] for p in predictions] == row["scores"]["accuracy"]
    run(capture, monkeypatch, capsys, "--data", out.with_suffix("") / "baseline" / "{lang}.jsonl", "--languages", "en", "--out", tmp_path)
    parts = {part: analyze.load_routing(str(tmp_path / "en.npz"), part) for part in ("prompt", "response", "all")}
    assert parts["response"]["num_tokens"] > 12 * 5
    assert (parts["prompt"]["counts"] + parts["response"]["counts"] == parts["all"]["counts"]).all()


@pytest.mark.parametrize("kind", ["shared", "random"])
def test_shared_and_random_experts_can_be_masked(dumps, monkeypatch, capsys, tmp_path, kind):
    out = tmp_path / "r.jsonl"
    printed = run(ablate, monkeypatch, capsys, "--routing", *dumps, "--languages", "en,sw", "--targets", "sw", "--experts", kind,
                  "--bands", "all=0-7", "--limit", 4, "--control-seeds", 2, "--out", out, "--threshold", 0.6)
    assert "all (layers 0-7)" in printed
    masked = [r for r in rows_of(out) if r["settings"].get("experts") == kind]
    assert {r["settings"]["language"] for r in masked} == {"en", "sw"} and sum(masked[0]["experts"].values()) > 0


def test_evaluating_on_the_captured_prompts_is_warned_of(dumps, monkeypatch, capsys, tmp_path):
    arguments = ["--routing", *dumps, "--languages", "sw", "--targets", "sw", "--bands", "a=0-0", "--limit", 2,
                 "--control-seeds", 1, "--out", tmp_path / "r.jsonl"]
    assert "warning" not in run(ablate, monkeypatch, capsys, *arguments)
    printed = run(ablate, monkeypatch, capsys, *arguments, "--data", "tests/data/routing_{lang}.tsv")
    assert "warning: tests/data/routing_sw.tsv is what the routing was captured on" in printed


@pytest.mark.parametrize("arguments, message", [
    (["--routing", "nowhere.npz"], "no such dump: nowhere.npz; run: python capture.py"),
    (["--targets", "fr"], "no routing for 'fr' among the dumps; run: python capture.py --languages fr"),
    (["--bands", "a=0-9"], "band 'a=0-9' does not hold MoE layers"),
    (["--threshold", "2"], "threshold 2.0 is not between"),
    (["--experts-per-language", "33"], "experts_per_language 33"),
    (["--experts-per-language", "0"], "experts_per_language 0"),
    (["--languages", "xx"], "no such file: tests/data/eval_xx.tsv"),
    (["--experts", "shared", "--experts-per-language", "32", "--threshold", "0.99", "--languages", "en"], "leaves fewer than top_k"),
    (["--top-p", "0.9"], "need a --temperature"),
])
def test_what_cannot_work_is_refused_before_the_weights_are_read(dumps, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--routing", *dumps, "--out", str(tmp_path / "r"), "--limit", "2", *arguments])
    monkeypatch.setattr(common, "load_model", lambda *a: pytest.fail("the weights were read"))
    with pytest.raises((common.InputError, analyze.InputError), match=message):
        ablate.main()


def test_dumps_of_another_model_are_refused(dumps, monkeypatch, tmp_path):
    with np.load(dumps[0], allow_pickle=False) as file:
        arrays = dict(file)
    arrays["meta"] = json.dumps(json.loads(str(arrays["meta"])) | {"revision": "0123", "model": "other/moe"})
    np.savez(tmp_path / "en.npz", **arrays)
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--routing", str(tmp_path / "en.npz"), "--out", str(tmp_path / "r")])
    with pytest.raises(common.InputError, match="captured on another model .other/moe"):
        ablate.main()


# ----------------------------------------------------------------------------------------------------------------- steer

def dump_of(language, counts):
    return {"language": language, "counts": np.array(counts), "num_tokens": 100, "layers": np.arange(len(counts)), "path": ""}


def test_coefficients_are_the_first_sources_share_in_what_the_sources_share():
    dumps = [dump_of("aa", [[60, 30, 10, 0], [50, 50, 0, 0]]), dump_of("xx", [[0, 0, 50, 50]] * 2),
             dump_of("bb", [[40, 0, 10, 50], [0, 50, 50, 0]])]
    # layer 0: aa keeps 0, 1 and bb keeps 3, 0; expert 0 has the shares .6 and .4. layer 1: expert 1, .5 and .5
    coefficients = steer.steering_coefficients(dumps, ["aa", "bb"], "0-1", experts_per_language=2, threshold=0.7)
    assert {layer: c.tolist() for layer, c in coefficients.items()} == {0: [0.6, 0, 0, 0], 1: [0, 0.5, 0, 0]}
    swapped = steer.steering_coefficients(dumps, ["bb", "aa"], "0-0", experts_per_language=2, threshold=0.7)
    assert {layer: c.tolist() for layer, c in swapped.items()} == {0: [0.4, 0, 0, 0]}
    with pytest.raises(common.InputError, match="share no expert"):
        steer.steering_coefficients(dumps, ["aa", "bb"], "0-0", experts_per_language=2, threshold=0.55)


def test_the_default_band_is_the_papers_part_of_the_depth():
    assert np.flatnonzero(steer.band_rows(None, np.arange(48))).tolist() == list(range(10, 40))
    assert np.flatnonzero(steer.band_rows(None, np.arange(8))).tolist() == [1, 2, 3, 4, 5, 6]
    assert steer.band_rows(None, np.arange(1)).any()


def test_random_coefficients_are_the_same_ones_on_other_experts():
    coefficients = {3: np.array([0.6, 0, 0, 0.5, 0, 0, 0, 0.2])}
    draws = [steer.random_coefficients(coefficients, seed)[3] for seed in range(10)]
    assert all(sorted(d) == sorted(coefficients[3]) for d in draws) and len({d.tobytes() for d in draws}) > 5


@pytest.fixture(scope="module")
def steering(dumps):
    model, tokenizer = common.load_model("tests/tiny_moe", device="cpu")
    return model, tokenizer, steer.steering_coefficients(analyze.load_languages(dumps), ["en", "zh"])


def test_two_lines_steer_a_model_in_a_notebook(steering):
    model, tokenizer, coefficients = steering
    batch = tokenizer("<bos><|user|>Anna has 14 apples.<|assistant|>", return_tensors="pt", return_token_type_ids=False)
    with steer.steer(model, coefficients, 0.5) as moved:
        model.generate(**batch, max_new_tokens=4)
    assert set(moved) == set(coefficients) and any(moved.values())


def test_moved_selections_are_counted_over_real_tokens(steering):
    model, tokenizer, coefficients = steering
    encoded = common.encode_examples(tokenizer, common.read_examples("tests/data/eval_sw.tsv")[:5])
    moved = steer.moved_selections(model, encoded, coefficients, 1.0, batch_tokens=150)
    new, total = dict.fromkeys(coefficients, 0), 0
    for e in encoded:  # one at a time, so without padding
        runs = []
        for strength in (0, 1.0):
            seen = {}
            with torch.inference_mode(), common.edit_routing(
                    model, boosts=steer.scaled(coefficients, strength), count_moved=False), common.record_routing(
                    model, lambda layer, *output: seen.__setitem__(layer, output[2].tolist())):
                model(torch.tensor([e["ids"]]))
            runs.append(seen)
        for layer in new:
            new[layer] += sum(len(set(b) - set(a)) for a, b in zip(runs[0][layer], runs[1][layer]))
        total += 2 * len(e["ids"])
    assert moved == {layer: pytest.approx(n / total, abs=2 / total) for layer, n in new.items()}
    assert max(moved.values()) > 0.05


def test_steer_reports_on_other_examples_than_it_chose_on(dumps, monkeypatch, capsys, tmp_path):
    out = tmp_path / "steer.jsonl"
    arguments = ["--routing", *dumps, "--languages", "sw,en", "--lambda", 0.2, 2.0, -1.0, "--limit", 20, "--control-seeds", 2,
                 "--metrics", "prompt_nll", "accuracy", "--control-bands", "0-0", "--out", out]
    printed = run(steer, monkeypatch, capsys, *arguments)
    rows = rows_of(out)
    scores = {(r["cell"], r["settings"]["language"]): np.array(r["scores"]["prompt_nll"]) for r in rows}
    gain = {strength: np.mean([(scores["baseline", l] - scores[f"shared-lambda{strength}", l])[::2].mean() for l in ("sw", "en")])
            for strength in (0.2, 2.0, -1.0)}
    best = max(gain, key=gain.get)
    assert f"chosen on the even examples: lambda {best}" in printed and "reported on the odd ones" in printed
    base, steered = scores["baseline", "sw"][1::2], scores[f"shared-lambda{best}", "sw"][1::2]
    assert f"sw       {base.mean():>9.3f}{steered.mean():>9.3f}{(steered - base).mean():>+9.3f}" in printed
    kinds = {(r["settings"].get("kind"), r["settings"].get("lambda")) for r in rows if r["cell"] != "baseline"}
    assert kinds == {("shared", 0.2), ("shared", 2.0), ("shared", -1.0), ("random-seed0", best), ("random-seed1", best),
                     ("band0-0", best)}
    for row in rows:
        if row["cell"] == f"random-seed0-lambda{best}":
            shared = next(r for r in rows if r["cell"] == f"shared-lambda{best}" and r["settings"]["language"] == row["settings"]["language"])
            assert row["experts"] == shared["experts"]  # as many in every layer
    assert run(steer, monkeypatch, capsys, *arguments) == printed and len(rows_of(out)) == len(rows)


@pytest.mark.parametrize("arguments, message", [
    (["--lambda", "1e-9"], "moves no selection"),
    (["--lambda", "nan"], "lambda must be a finite number"),
    (["--sources", "en,fr"], "no routing for 'fr'"),
    (["--sources", "en"], "takes two or more languages"),
    (["--limit", "3"], "takes 4 examples or more"),
    (["--band", "40-50"], "does not hold MoE layers"),
])
def test_steering_that_cannot_work_is_an_error(dumps, monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["steer.py", "--routing", *dumps, "--limit", "5", "--languages", "sw",
                                      "--out", str(tmp_path / "r"), *arguments])
    with pytest.raises((common.InputError, analyze.InputError), match=message):
        steer.main()


def test_sources_are_not_evaluated_unless_they_are_named(dumps, monkeypatch, capsys, tmp_path):
    printed = run(steer, monkeypatch, capsys, "--routing", *dumps, "--lambda", 0.5, "--limit", 2, "--control-seeds", 1,
                  "--metrics", "prompt_nll", "--out", tmp_path / "r.jsonl")
    assert {r["settings"]["language"] for r in rows_of(tmp_path / "r.jsonl")} == set("bn de es fr ja sw".split())
    assert "\ntogether " in printed


# ------------------------------------------------------------------------------------------------------------- selections

def test_a_contrast_is_masked_and_boosted(dumps, monkeypatch, capsys, tmp_path):
    selection, out = tmp_path / "selection.json", tmp_path / "results.jsonl"
    run(analyze, monkeypatch, capsys, "--contrast", dumps[2], dumps[0], "--top", 12, "--selection", selection)
    differences = analyze.load_selection(selection, np.arange(8), 32)
    zh, en = (analyze.load_routing(path) for path in (dumps[2], dumps[0]))
    assert (differences != 0).sum() == 12 and (differences > 0).any() and (differences < 0).any()
    np.testing.assert_allclose(differences[differences != 0],
                               (zh["counts"] / zh["num_tokens"] - en["counts"] / en["num_tokens"])[differences != 0], atol=1e-6)
    common_arguments = ["--routing", *dumps, "--selection", selection, "--languages", "en,zh", "--limit", 4, "--control-seeds", 1,
                        "--metrics", "prompt_nll", "--out", out]
    printed = run(ablate, monkeypatch, capsys, *common_arguments)  # by default in all of its layers
    assert "note:" not in printed
    rows = [r for r in rows_of(out) if r["settings"].get("experts") == "selection"]
    assert [r["settings"]["language"] for r in rows] == ["en", "zh"]  # both with their controls
    assert rows[0]["experts"] == {str(layer): int(n) for layer, n in enumerate((differences > 0).sum(1)) if n}
    assert "selection experts" in printed and printed.count("[") >= 4
    assert "experts that A's tokens select more lie outside of the bands" in run(
        ablate, monkeypatch, capsys, *common_arguments, "--bands", f"{np.flatnonzero((differences > 0).any(1))[0]}")
    with pytest.raises(common.InputError, match="leave out --targets"):
        run(ablate, monkeypatch, capsys, *common_arguments, "--targets", "en")
    printed = run(steer, monkeypatch, capsys, *common_arguments, "--rule", "soft", "--lambda", 0.5)
    assert f"12 experts of {selection}" in printed
    row = next(r for r in rows_of(out) if r["settings"].get("kind") == "selection")
    model, tokenizer = common.load_model("tests/tiny_moe", device="cpu")
    encoded = common.encode_examples(tokenizer, common.read_examples("tests/data/eval_en.tsv")[:4])
    with common.edit_routing(model, boosts={layer: 0.5 * np.sign(d) for layer, d in enumerate(differences) if d.any()}, rule="soft"):
        scores, *_ = common.evaluate(model, tokenizer, encoded, ["prompt_nll"], "en")
    np.testing.assert_allclose(row["scores"]["prompt_nll"], scores["prompt_nll"], atol=1e-5)


def test_a_selection_stays_in_its_band():
    selection = np.array([[0.5, 0, 0], [0, -0.6, 0.7], [0, 0, 0]])
    layers = np.array([1, 2, 3])
    assert {layer: c.tolist() for layer, c in steer.selection_coefficients(selection, layers).items()} == {1: [1, 0, 0], 2: [0, -1, 1]}
    assert list(steer.selection_coefficients(selection, layers, "2-3")) == [2]
    with pytest.raises(common.InputError, match="no experts in the band 3-3"):
        steer.selection_coefficients(selection, layers, "3-3")
