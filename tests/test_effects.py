"""Every expert masked by itself: what is collected, joined with the routing, and tested."""

import contextlib
import io
import json
import sys

import numpy as np
import pytest

import ablate
import analyze
import capture
from common import InputError


def run(script, *arguments):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def each(tmp_path_factory):
    """(dumps, folder of effects.npz): two layers of two languages, in two runs."""
    place = tmp_path_factory.mktemp("each")
    run(capture, "--languages", "en,sw", "--limit", 60, "--out", place)
    dumps = [str(place / f"{language}.npz") for language in ("en", "sw")]
    for languages, band in (("en", "a=7-7"), ("en,sw", "a=0-0")):
        run(ablate, "--experts", "each", "--routing", *dumps, "--languages", languages, "--bands", band,
            "--limit", 4, "--out", place / "r.jsonl")
    return dumps, place


def test_effects_are_collected_from_all_runs_of_equal_settings(each):
    dumps, place = each
    with np.load(place / "r/effects.npz", allow_pickle=False) as file:
        effect, languages, meta = file["effect"], file["languages"].tolist(), json.loads(str(file["meta"]))
    assert languages == ["en", "sw"] and effect.shape == (2, 8, 32) and meta["harm"] == 1
    counts = [analyze.load_routing(path)["counts"] for path in dumps]
    for k, layers in enumerate([[0, 7], [0]]):
        assert (np.isfinite(effect[k]).any(1).nonzero()[0] == layers).all()
        assert (np.isfinite(effect[k][layers]) == (counts[k][layers] > 0)).all()
    rows = [json.loads(line) for line in open(place / "r.jsonl")]
    assert {tuple(r["experts"].values()) for r in rows if r["cell"] == "each"} == {(1,)}
    base, = (r for r in rows if r["cell"] == "baseline" and r["settings"]["language"] == "sw")
    row = next(r for r in rows if r["cell"] == "each" and r["settings"]["language"] == "sw")
    at = row["settings"]["layer"], row["settings"]["expert"]
    assert effect[(1, *at)] == pytest.approx(np.mean(row["scores"]["prompt_nll"])
                                             - np.mean(base["scores"]["prompt_nll"]), abs=1e-6)


def test_each_needs_bands_and_effects_need_the_same_model(each, tmp_path):
    dumps, place = each
    with pytest.raises(InputError, match="say in which --bands"):
        run(ablate, "--experts", "each", "--routing", *dumps, "--out", tmp_path / "r.jsonl")
    with np.load(place / "r/effects.npz", allow_pickle=False) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"])) | {"revision": "another"}
    np.savez(tmp_path / "other.npz", **arrays | {"meta": json.dumps(meta)})
    np.savez(tmp_path / "fewer.npz", **arrays | {"effect": arrays["effect"][:, :, :31]})
    for path in (tmp_path / "other.npz", tmp_path / "fewer.npz", dumps[0]):
        with pytest.raises(analyze.InputError, match="another model|is not what ablate.py"):
            run(analyze, *dumps, "--effects", path, "--out", tmp_path / "a.npz")


def mean_ranks(values):
    return [((values < x).sum() + (values <= x).sum()) / 2 for x in values]


def test_effects_are_joined_with_the_routing(each, tmp_path):
    pytest.importorskip("matplotlib")
    dumps, place = each
    printed = run(analyze, *dumps, "--effects", place / "r/effects.npz", "--out", tmp_path / "a.npz",
                  "--figures", tmp_path / "f")
    assert "\nharm  prompt_nll, experts masked by --how reroute\n" in printed
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        harm, weight, result = file["harm"], file["weight"], dict(file)
    both = np.isfinite(harm[1])
    rho = np.corrcoef(*(mean_ranks(x[1][both]) for x in (harm, weight)))[0, 1]
    line = next(line for line in printed.split("what masking one expert does")[1].split("\n")
                if line.startswith("sw "))
    assert line.split()[1:3] == [str(both.sum()), f"{rho:.3f}"]
    worst = np.unravel_index(np.nanargmax(harm[1]), harm[1].shape)
    assert any(line.split()[:3] == ["sw", str(worst[0]), str(worst[1])] for line in printed.split("\n"))
    own = result["exclusive"] & np.isfinite(harm)
    assert f"{harm[:, 0][own[:, 0]].mean():.3f}" in printed
    assert (tmp_path / "f/effects.png").exists()


def world(rng, planted=0.0, shape=(4, 5, 32)):
    """Experts whose harm grows with their use; the most used ones are exclusive, as it is."""
    weight = rng.dirichlet(np.full(shape[2], 0.7), shape[:2])
    exclusive = weight > np.quantile(weight, 0.85) * rng.lognormal(0, 0.5, shape)
    harm = weight * rng.lognormal(0, 0.5, shape) + rng.normal(0, 0.005, shape) + planted * exclusive
    return harm, exclusive, weight


def test_use_alone_is_not_found_to_be_exclusivity_and_what_is_planted_is():
    found = {0.0: 0, 0.05: 0}
    for planted in found:
        for seed in range(30):
            rng = np.random.default_rng(seed)
            result = analyze.matched_difference(*world(rng, planted), rng, 200)
            found[planted] += result[1] < 0.05
            assert result[2] > 0 and result[3] >= 0  # seen, alone
    assert found[0.0] <= 5 and found[0.05] >= 28


def test_neighbours_in_use_are_at_most_four_and_alike():
    weight = np.array([[[0.10, 0.11, 0.12, 0.124, 0.125, 0.3, 0.9]]])
    harm, exclusive = np.array([[[0, 1, 0, 1.0, 0, 5, 9]]]), np.zeros((1, 1, 7), bool)
    exclusive[0, 0, [1, 3, 5, 6]] = True  # the two most used ones have no neighbour
    result = analyze.matched_difference(harm, exclusive, weight, np.random.default_rng(0), 200)
    assert result[3] == 2 and result[0] > 0.9  # alone, difference
    blocks = analyze.blocks_of_equal_use(weight, np.isfinite(harm))
    assert [block.tolist() for block in blocks] == [[0, 1, 2, 3], [4], [5], [6]]
