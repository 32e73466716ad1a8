"""What the README shows as code runs: every Python block, and every line of its shell blocks.

They run in an empty folder beside tests/, on the tiny model. What takes long is shortened, by
SHORTER. Commands for a model or data that are not here are only parsed, and those that need a
network (NEED_NETWORK) or would run the tests again are left out.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import ablate
import analyze
import capture
import steer
from conftest import parse, run

README = Path("README.md").read_text(encoding="utf-8")
SCRIPTS = {"capture.py": capture, "analyze.py": analyze, "ablate.py": ablate, "steer.py": steer}
SHORTER = {
    "capture.py": ["--limit", "40"],
    "analyze.py": [],
    "ablate.py": ["--limit", "4", "--control-seeds", "2", "--languages", "en,sw"],
    "steer.py": ["--limit", "8", "--control-seeds", "2", "--languages", "sw,de"],
}
NEED_NETWORK = ("pip", "hf", "git")


def blocks(language):
    """Return the README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Return the commands of the shell blocks, each as a list of words."""
    found = []
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tests/, and what capture.py and analyze.py write for the tiny model."""
    path = tmp_path_factory.mktemp("readme")
    (path / "tests").symlink_to(Path("tests").resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        run(capture, *SHORTER["capture.py"])
        run(analyze)
    return path


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_runs(words, folder, monkeypatch):
    monkeypatch.chdir(folder)
    program, *arguments = words
    if program in NEED_NETWORK or arguments[:2] == ["-m", "pytest"]:
        pytest.skip("needs a network, or runs the tests")
    assert program == "python"
    if arguments[0] == "-c":
        check_conversion(arguments[1], monkeypatch)
    elif arguments[0] in SCRIPTS:
        script = SCRIPTS[arguments[0]]
        expanded = expand_patterns(arguments[1:])
        if "--model" in arguments:
            assert parse(script, *expanded).model.startswith("Qwen/")
        else:
            assert run(script, *expanded, *SHORTER[arguments[0]])
    else:
        assert Path(arguments[0]).is_file()


def expand_patterns(arguments):
    """Return arguments as a shell passes them: patterns that match files become these files."""
    expanded = []
    for argument in arguments:
        matches = sorted(str(path) for path in Path().glob(argument)) if "*" in argument else []
        expanded += matches or [argument]
    return expanded


def check_conversion(code, monkeypatch):
    """Run the line that converts PolyMath's .parquet files on one of that layout."""
    pandas = pytest.importorskip("pandas", reason="the README's line uses pandas")
    pytest.importorskip("pyarrow", reason="pandas reads .parquet by pyarrow")
    rows = [{"id": "low-en-0", "question": "How many?", "answer": "7"},
            {"id": "low-en-1", "question": "১৬টি?", "answer": r"\frac{1}{2}"}]
    Path("polymath/en").mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet("polymath/en/low.parquet")
    exec(code, {})
    from common import read_examples
    examples = read_examples("polymath/en/low.jsonl")
    assert [example["prompt"] for example in examples] == ["How many?", "১৬টি?"]
    assert [example["answer"] for example in examples] == [["7"], [r"\frac{1}{2}"]]


NOTEBOOK, ALL_RECIPES = blocks("python")
SETUP, *RECIPES = re.split(r"\n(?=# )", ALL_RECIPES)  # each begins with its title


def test_the_notebook_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    exec(NOTEBOOK, {})
    printed = capsys.readouterr().out
    assert printed.startswith("0 [[")          # the experts of layer 0
    assert "<|user|>Anna has 14 apples." in printed


@pytest.fixture(scope="module")
def setup(folder):
    """What the first block of the recipes defines."""
    names = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(SETUP, names)
    return names


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.split("\n")[0])
def test_every_recipe_runs_after_the_first_block_alone(recipe, setup, folder, monkeypatch):
    assert recipe.startswith("# ") and len(recipe.splitlines()) <= 12
    monkeypatch.chdir(folder)
    exec(recipe, dict(setup))


def run_recipe(title, setup):
    """Run the recipe whose title holds these words, and return what it defines."""
    (recipe,) = [recipe for recipe in RECIPES if title in recipe.split("\n")[0]]
    names = dict(setup)
    exec(recipe, names)
    return names


def test_the_selection_of_the_recipe_is_masked_and_boosted(folder, setup, monkeypatch):
    monkeypatch.chdir(folder)
    names = run_recipe("two kinds of text", setup)
    assert np.count_nonzero(names["selection"]) >= 10
    short = ["--limit", "4", "--control-seeds", "2", "--languages", "en"]
    run(ablate, "--selection", "selection.npz", *short, "--out", "a.jsonl")
    run(steer, "--selection", "selection.npz", *short, "--rule", "soft", "--lambda", "0.5",
        "--out", "s.jsonl")


def test_a_published_record_becomes_a_dump(tmp_path, setup, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = {"0": {"activation_tokens": 60, "gate_values_sum": 30.0},
             "3": {"activation_tokens": 40, "gate_values_sum": 9.0}, "total_tokens": 50}
    Path("record.json").write_text(setup["json"].dumps({"1": layer, "0": layer}))
    run_recipe("published .json", setup)["convert_record"]("record.json", "xx", 4, 2)
    routing = analyze.load_routing("xx.npz")
    assert routing.counts[0].tolist() == [[60, 0, 0, 40]] * 2
    assert routing.num_tokens.tolist() == [50]


def test_expert_ids_of_engines_become_a_dump(tmp_path, setup, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_recipe("Expert IDs", setup)
    ids = np.array([[[0, 1], [2, 3]], [[1, 2], [3, 0]], [[4, 5], [6, 7]]], np.int16)
    text = names["base64"].b64encode(ids.tobytes()).decode()
    assert np.array_equal(names["from_sglang"](text, 2, 2, np.int16), ids)
    names["save_ids"]("xx", 8, [ids[:2], ids[2:]])
    tokens = analyze.read_tokens("xx.npz")
    assert np.array_equal(tokens.selected_experts, ids)
    assert tokens.sequence.tolist() == [0, 0, 1]
    wrong = names["from_sglang"](text, 1, 3, np.int32)  # of the same size, but nonsense
    names["save_ids"]("yy", 8, [wrong])
    with pytest.raises(analyze.InputError, match="yy.npz"):
        analyze.load_routing("yy.npz")
