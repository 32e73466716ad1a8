"""
What a user of the scripts relies on: bad input ends in one line, before anything takes long, and
nothing is lost. Our own mistakes end in a traceback.
"""

import ast
import contextlib
import io
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

import ablate
import analyze
import capture
import common
import steer
from common import InputError, append_row, bootstrap_interval, load_results
from conftest import TINY, command_line, parse, read_rows, run, save_dump

FILES = ("common", "capture", "analyze", "ablate", "steer")
SCRIPTS = (capture, analyze, ablate, steer)


def exit_of(script, *arguments):
    """Run a script as the command line does, and return what it exits with; None at its end."""
    with command_line(script, *arguments):
        try:
            runpy.run_path(f"{script.__name__}.py", run_name="__main__")
        except SystemExit as stop:
            return stop.code


def process(*command, **options):
    """Run a script as a process of its own, and return it when it has ended."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          env=environment, **options)


def contents(folder):
    """Return {path: bytes} of all files in a folder, and {path: None} of its folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def small_ablation(dumps, out, *flags):
    """Return the arguments of eight evaluations of four English prompts with ablate.py."""
    return ("--routing", *dumps, "--limit", 4, "--languages", "en", "--targets", "en",
            "--bands", "7-7", "--control-seeds", 1, "--out", out, *flags)


def small_steering(dumps, out, *flags):
    """Return the arguments of a short run of steer.py on four Swahili prompts."""
    return ("--routing", *dumps, "--limit", 4, "--languages", "sw", "--lambda", 0.3, 0.5,
            "--control-seeds", 1, "--metrics", "prompt_nll", "--out", out, *flags)


@pytest.fixture
def no_weights(monkeypatch):
    """Let the test fail if ablate.py or steer.py, or capture.py by exit_of, reads weights."""
    monkeypatch.setattr(common, "load_weights", lambda *args: pytest.fail("weights were read"))


# -------------------------------------------------------------------------------------- bad input

def save_as_dump(path, language, **meta):
    """Write a dump that has the sizes of the tiny model, and all experts selected alike."""
    experts = np.arange(32).reshape(16, 1, 2)
    selected_experts = np.repeat(experts, 8, axis=1)
    meta = {"language": language, "num_experts": 32} | meta
    np.savez(path, selected_experts=selected_experts, meta=json.dumps(meta))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of files that are bad, but for tiny_*.npz."""
    folder = tmp_path_factory.mktemp("place")
    LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=64).save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder / "dense")
    (folder / "bare").mkdir()
    shutil.copy(f"{TINY}/config.json", folder / "bare")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Übung\n".encode("latin-1"))
    (folder / "malformed.tsv").write_text("How many?\t3\nno answer here\n")
    (folder / "list.jsonl").write_text('[{"prompt": "a"}]\n')
    (folder / "long.tsv").write_text("apples " * 3000 + "\t1\n")
    (folder / "unanswered.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "instruction.json").write_text('{"de": "Denke nach."}')
    (folder / "mine").write_text("where responses would go")
    for language in ("en", "sw", "zh"):
        save_as_dump(folder / f"tiny_{language}.npz", language)
    save_as_dump(folder / "other_weights.npz", "en", revision="0123")
    other_size = np.tile([[1, 0]], (15, 2, 1))
    save_dump(folder / "other_size.npz", other_size)
    save_dump(folder / "one_layer.npz", other_size[:, :1], "sw")
    (folder / "text.npz").write_text("hello")
    np.savez(folder / "selection.npz", selection=np.eye(8, 32), layers=range(8))
    np.savez(folder / "nothing.npz", selection=np.zeros((8, 32)), layers=range(8))
    np.savez(folder / "suppressed.npz", selection=-np.eye(8, 32), layers=range(8))
    return folder


BAD_INPUT = [  # script, arguments with {} for the folder, what the line names: a file, and the fix
    (capture, "--model no/where", "'no/where'.* folder .*hub"),
    (capture, "--model {}/dense", "dense model"),
    (capture, "--model {}/bare", "bare'.*tokenizer files"),
    (capture, "--data {}/none.tsv", "none.tsv"),
    (capture, "--data {}/empty.txt", "empty.txt.*no prompts"),
    (capture, "--data {}/latin.txt", "latin.txt.*convert it"),
    (capture, "--data {}/malformed.tsv", "malformed.tsv:2.*no tab"),
    (capture, "--data {}/list.jsonl", "list.jsonl:1.*{...}"),
    (capture, "--data {}/text.npz", "text.npz.*give .tsv"),
    (capture, "--data {}/{lang}.tsvx", "tsvx.*{lang}"),
    (capture, "--data {}/long.tsv --languages en,sw", "long.tsv.*{lang}"),
    (capture, "--languages en,en", "'en,en'.* once"),
    (capture, "--languages ../en", "'../en'.*letters"),
    (capture, "--instruction {}/instruction.json", "instruction.json.*'bn'"),
    (capture, "--out {}/empty.txt", "empty.txt.*folder"),
    (capture, "--dtype int8", "'int8'.*give auto"),
    (capture, "--languages en --out {}/empty.txt/a", "empty.txt"),
    (analyze, "{}/none.npz", "none.npz.*run: python capture.py"),
    (analyze, "{}/text.npz", "text.npz"),
    (analyze, "{}/other_size.npz {}/one_layer.npz", "size.npz .*layer.npz .*different models"),
    (analyze, "{}/tiny_en.npz {}/other_weights.npz", "tiny_en.npz .*weights.npz .*label="),
    (analyze, "{}/tiny_en.npz --bands 7-9", "'7-9'.* 0-7"),
    (analyze, "{}/tiny_en.npz --out {}/tiny_sw.npz", "tiny_sw.npz.*--out"),
    (ablate, "--routing {}/none.npz", "none.npz.*run: python capture.py"),
    (ablate, "--routing {}/other_size.npz", r"other_size.npz.*\(8, 2\).*\(32, 2\).*another model"),
    (ablate, "--routing {}/other_weights.npz", r"other_weights.npz.*0123.*capture"),
    (ablate, "--data {}/none.tsv", "none.tsv"),
    (ablate, "--data {}/long.tsv", "2048.*take it out"),
    (ablate, "--data {}/unanswered.jsonl --metrics accuracy", "unanswered.jsonl.*prompt_nll"),
    (ablate, "--instruction {}/instruction.json", "instruction.json.*'en'"),
    (ablate, "--model {}/dense", "dense model"),
    (ablate, "--dtype float7", "'float7'.*give auto"),
    (ablate, "--bands 0-9", "'0-9'.* 0-7"),
    (ablate, "--bands early", "'early'.*middle=22-26"),
    (ablate, "--bands a=0-1 a=6-7", "'a'"),
    (ablate, "--threshold 2", "threshold 2.0 .*between 0 and 1"),
    (ablate, "--experts-per-language 0", "0 .*1 to the 32"),
    (ablate, "--experts-per-language 4.5", "4.5 .*1 to the 32"),
    (ablate, "--targets fr", "'fr'.*capture.py --languages fr"),
    (ablate, "--targets en --experts shared", "--targets .*shared.*leave it out"),
    (ablate, "--targets en --selection {}/selection.npz", "--targets .*selection.*leave it out"),
    (ablate, "--selection {}/selection.npz --experts shared", "leave out --experts"),
    (ablate, "--selection {}/none.npz", "none.npz.*np.savez"),
    (ablate, "--selection {}/tiny_en.npz", "tiny_en.npz.*np.savez"),
    (ablate, "--selection {}/nothing.npz", "nothing.npz.*above 0"),
    (ablate, "--selection {}/suppressed.npz", "suppressed.npz.*above 0"),
    (ablate, "--experts shared --experts-per-language 32 --threshold .9", "32 experts.*top_k 2"),
    (ablate, "--experts shared --threshold .1", "no expert to mask.*--bands"),
    (ablate, "--top-p 0.9", "--top-p .*--temperature"),
    (ablate, "--temperature 0 --top-k-sampling 3", "--top-k-sampling .*--temperature"),
    (ablate, "--temperature .7 --top-p 3", "--top-p .*1"),
    (ablate, "--temperature -1", "--temperature .*0"),
    (ablate, "--seed -1", "--seed .*0"),
    (ablate, '--engine-options {"seed":1}', "--engine-options .*--engine vllm"),
    (ablate, "--out {}/latin.txt", "latin.txt.*--out"),
    (ablate, "--out {}/tiny_en.npz", "tiny_en.npz.*--out"),
    (ablate, "--out {}", "--out .*results/run.jsonl"),
    (ablate, "--out=", "--out '' .*results/run.jsonl"),
    (ablate, "--out {}/mine.jsonl", "place[^/]*/mine, .*--out"),
    (ablate, "--out {}/empty.txt/a.jsonl", "empty.txt"),
    (steer, "--sources en,fr", "'fr'.*capture.py --languages fr"),
    (steer, "--sources en", "--sources .*two or more"),
    (steer, "--sources en,zh,en", "en,zh,en"),
    (steer, "--sources en,sw --selection {}/selection.npz", "leave out --sources"),
    (steer, "--band 40-50", "'40-50'.* 0-7"),
    (steer, "--control-bands 40-50", "'40-50'.* 0-7"),
    (steer, "--threshold .1", "no expert to boost.*--threshold"),
    (steer, "--lambda inf", "lambda .*finite"),
    (steer, "--lambda .1 .1", "twice"),
    (steer, "--lambda 1 2 --limit 3", "4 examples.*--limit"),
]


@pytest.mark.parametrize("script, arguments, line", BAD_INPUT,
                         ids=[f"{script.__name__} {flags}" for script, flags, _ in BAD_INPUT])
def test_bad_input_is_one_line_before_weights_are_read_and_changes_no_file(
        script, arguments, line, place, no_weights, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = [argument.replace("{}", str(place)) for argument in arguments.split()]
    if script in (ablate, steer):
        routing = [place / f"tiny_{language}.npz" for language in ("en", "sw", "zh")]
        arguments = ["--routing", *routing, "--languages", "en", "--limit", 2, *arguments]
    if not any(str(argument).startswith("--out") for argument in arguments):
        arguments += ["--out", place / "out"]
    before = contents(place)
    error = exit_of(script, *arguments)
    assert isinstance(error, str)
    assert re.search(f"^error: .*{line}", error)
    assert "\n" not in error
    assert contents(place) == before
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("script", [capture, ablate, steer])
@pytest.mark.parametrize("flags", [
    ["--limit", 0], ["--limit", "few"], ["--batch-tokens", -5], ["--chat-template", "always"]])
def test_values_that_a_flag_does_not_take_are_refused_by_its_name(script, flags, capsys):
    assert exit_of(script, *flags) == 2
    assert f"argument {flags[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--engine-options", "--chat-template-options"])
@pytest.mark.parametrize("options", ["[1]", "3", "max_model_len=9"])
def test_options_are_a_json_object(flag, options, capsys):
    assert exit_of(ablate, flag, options) == 2
    assert f"argument {flag}: " in capsys.readouterr().err


def test_an_error_is_one_line_on_stderr_and_status_1(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    done = process("analyze.py", tmp_path / "cut.npz")
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch("error: .*cut.npz.*\n", done.stderr)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_page(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_of(script, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 75
    assert max(map(len, lines)) <= 80


def test_nothing_runs_remote_code_or_reads_pickles():
    for name in FILES:
        text = Path(f"{name}.py").read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text
        assert "pickle.load" not in text
        assert "torch.load" not in text
        assert "eval(" not in text.replace(".eval()", "")
        assert text.count("np.load(") == text.count(", allow_pickle=False)")


# ----------------------------------------------------------------------------------- our mistakes

@pytest.mark.parametrize("name, function", [
    ("common", "apply_template"), ("capture", "make_dump"), ("analyze", "parse_meta"),
    ("ablate", "take_weight"), ("steer", "coefficients_of_band")])
def test_a_name_that_does_not_exist_is_a_traceback_and_not_a_message_about_data(
        name, function, dumps, tmp_path):
    for script in FILES:
        shutil.copy(f"{script}.py", tmp_path)
    path = tmp_path / f"{name}.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    (definition,) = [node for node in ast.parse("\n".join(lines)).body
                     if isinstance(node, ast.FunctionDef) and node.name == function]
    behind_docstring = definition.body[1].lineno - 1
    lines.insert(behind_docstring, "    data_that_nobody_named")
    path.write_text("\n".join(lines), encoding="utf-8")
    arguments = {
        "common": ("capture.py", "--languages", "en", "--limit", 2, "--out", tmp_path / "o"),
        "capture": ("capture.py", "--languages", "en", "--limit", 2, "--out", tmp_path / "o"),
        "analyze": ("analyze.py", *dumps, "--out", tmp_path / "a.npz"),
        "ablate": ("ablate.py", *small_ablation(dumps, tmp_path / "a.jsonl")),
        "steer": ("steer.py", *small_steering(dumps, tmp_path / "s.jsonl")),
    }
    script, *flags = arguments[name]
    done = process(tmp_path / script, *flags)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "NameError: name 'data_that_nobody_named' is not defined" in done.stderr
    assert "error: " not in done.stderr


def test_no_except_that_would_catch_a_typing_error_stands_around_code_of_ours():
    trees = {name: ast.parse(Path(f"{name}.py").read_text(encoding="utf-8")) for name in FILES}
    ours = set(FILES)
    for tree in trees.values():
        ours |= {node.name for node in tree.body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Try) and any(map(catches_typing_errors, node.handlers)):
                for statement in node.body:
                    named = {each.id for each in ast.walk(statement) if isinstance(each, ast.Name)}
                    assert not named & ours, f"{name}.py:{statement.lineno}"


def catches_typing_errors(handler):
    """Return whether an except clause catches what a wrong name raises."""
    if handler.type is None:
        return True
    names = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
    return bool(names & {"BaseException", "Exception", "NameError", "AttributeError", "TypeError"})


# -------------------------------------------------------------------------------- files of others

@pytest.mark.parametrize("content", [
    b"a\nmy last line",
    b"one line without an end",
    b"x\n",
    b'{"prompt": "a", "answer": "3"}\n',
    b'{"cell": "A1", "mine": 5}',
    b'{"cell": "A1", "mine": 5}\n{"cell": "a", "set',
    b'{"cell": "a", "settings": {}, "scores": {"m": [1]}}\n{"other": 1}',
    b'{"cell": "a", "settings": {}, "scores": {"m": [1]}}\n\xff\n',
    bytes(range(256)) * 40,
])
def test_a_file_that_is_not_a_results_file_stays_as_it_is(tmp_path, content):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match="mine.jsonl .*--out"):
        load_results(path)
    assert path.read_bytes() == content


def test_responses_go_beside_the_results_file_whatever_its_name_and_those_of_its_rows(
        dumps, tmp_path):
    flags = ("--metrics", "accuracy", "--max-new-tokens", 1)
    for out, folder in (("noext", "noext.predictions"), ("r.jsonl", "r")):
        run(ablate, *small_ablation(dumps, tmp_path / out, *flags, "--bands", "/../x=7-7"))
        paths = set((tmp_path / folder).rglob("*.jsonl"))
        rows = read_rows(tmp_path / out)
        assert {Path(row["predictions"]) for row in rows} == paths
        assert len(paths) == len(rows) == 8
        assert {path.parent.parent for path in paths} == {tmp_path / folder}
    assert {path.name for path in tmp_path.iterdir()} == {
        "noext", "noext.predictions", "r.jsonl", "r"}


def test_responses_of_other_settings_or_to_other_data_are_never_overwritten(dumps, tmp_path):
    data = tmp_path / "en.tsv"
    with open("tests/data/eval_en.tsv", encoding="utf-8") as file:
        lines = file.readlines()

    def ablation(*flags):
        run(ablate, *small_ablation(dumps, tmp_path / "r.jsonl", "--data", data, "--metrics",
                                    "accuracy", "--max-new-tokens", 2, *flags))

    data.write_text("".join(lines[:4]), encoding="utf-8")
    ablation()
    first = contents(tmp_path / "r")
    for flags in (["--max-new-tokens", 3], ["--limit", 3], ["--how", "zero"]):
        ablation(*flags)
    assert first.items() < contents(tmp_path / "r").items()
    everything = contents(tmp_path / "r")
    same_prompts = lines[0].split("\t")[0] + "\t1\n" + "".join(lines[1:4])
    for text in ("".join(lines[4:8]), same_prompts):
        data.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="en.jsonl .*--out"):
            ablation()
    assert contents(tmp_path / "r") == everything


def test_responses_to_other_tokens_are_never_overwritten(checkpoint, dumps, tmp_path):
    arguments = small_ablation(dumps, tmp_path / "r.jsonl", "--model", checkpoint, "--metrics",
                               "accuracy", "--max-new-tokens", 2)
    run(ablate, *arguments)
    before = contents(tmp_path / "r")
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "<|assistant|>"))
    with pytest.raises(InputError, match="en.jsonl .*--out"):
        run(ablate, *arguments)
    assert contents(tmp_path / "r") == before


# ---------------------------------------------------------------------------------- whole files

@pytest.mark.parametrize("whole_file", [common.whole_file, analyze.whole_file])
def test_a_file_is_there_whole_or_as_it_was(whole_file, tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError, match="half way"):
        with whole_file(path) as file:
            file.write(b"half of the new")
            file.flush()
            raise RuntimeError("half way")
    assert contents(tmp_path / "new") == {path: b"old"}


def test_two_processes_that_write_one_file_leave_one_of_both(tmp_path, monkeypatch):
    for whole_file in (common.whole_file, analyze.whole_file):
        with whole_file(tmp_path / "a") as file:
            file.write(b"first")
            monkeypatch.setattr(os, "getpid", lambda: 123456789)
            with whole_file(tmp_path / "a") as another:
                another.write(b"second")
            monkeypatch.undo()
        assert contents(tmp_path) == {tmp_path / "a": b"first"}


ROWS = [{"cell": "ünedited", "settings": {"a": number}, "scores": {"m": [number, 0.5]}}
        for number in range(3)]


def test_rows_are_found_by_their_settings(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    assert load_results(path) == {}
    for row in ROWS:
        append_row(path, row)
    assert list(load_results(path).values()) == ROWS
    assert load_results(path)[common.settings_key({"a": 2})] == ROWS[2]
    assert common.settings_key({"a": 1, "b": 2}) == common.settings_key({"b": 2, "a": 1})


def test_a_kill_at_any_moment_costs_the_last_row_only(tmp_path):
    path = tmp_path / "r.jsonl"
    for row in ROWS[:2]:
        append_row(path, row)
    first_two = path.read_bytes()
    append_row(path, ROWS[2])
    whole = path.read_bytes()
    for length in range(len(first_two), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert list(load_results(path).values()) == ROWS[:2]
        assert path.read_bytes() == first_two
        append_row(path, ROWS[2])
        assert path.read_bytes() == whole


def test_a_last_row_that_lacks_only_its_end_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    for number, row in enumerate(ROWS):
        assert len(load_results(path)) == number
        append_row(path, row)
        path.write_bytes(path.read_bytes()[:-1])  # as an editor may leave it
    assert list(load_results(path).values()) == ROWS


@contextlib.contextmanager
def disk_full_at(size):
    """In the block, no file can grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("script, written", [(capture, "en.npz"), (analyze, "a.npz")])
def test_a_full_disk_leaves_no_half_file_and_the_same_command_goes_on(
        script, written, dumps, tmp_path, capsys):
    arguments = ["--languages", "en", "--limit", 20, "--out", tmp_path]
    if script is analyze:
        arguments = [*dumps, "--out", tmp_path / "a.npz"]
    with disk_full_at(4096):
        error = exit_of(script, *arguments)
    assert re.fullmatch(r"error: .*File too large.*", error)
    assert contents(tmp_path) == {}
    assert exit_of(script, *arguments) is None
    assert [path.name for path in contents(tmp_path)] == [written]


@pytest.mark.parametrize("script, small", [(ablate, small_ablation), (steer, small_steering)])
def test_an_experiment_goes_on_where_a_full_disk_stopped_it(
        script, small, dumps, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    printed = run(script, *small(dumps, out))
    whole = out.read_bytes()
    out.unlink()
    with disk_full_at(len(whole) - 100):
        error = exit_of(script, *small(dumps, out))
    assert re.fullmatch(r"error: .*File too large.*", error)
    assert whole.startswith(out.read_bytes()) and not out.read_bytes().endswith(b"\n")
    assert run(script, *small(dumps, out)) == printed
    assert out.read_bytes() == whole


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupt_is_one_line_and_leaves_no_half_file(script, dumps, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    small = {
        capture: ("--languages", "en", "--limit", 2, "--out", tmp_path),
        analyze: (*dumps, "--out", tmp_path / "a.npz"),
        ablate: small_ablation(dumps, tmp_path / "a.jsonl"),
        steer: small_steering(dumps, tmp_path / "s.jsonl"),
    }
    monkeypatch.setattr(np, "savez", interrupt)
    monkeypatch.setattr(common, "append_row", interrupt)
    line = exit_of(script, *small[script])
    assert re.match("interrupted", line)
    assert script is analyze or "the same command goes on" in line
    assert contents(tmp_path) == {}


# --------------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("script, small, flags", [
    (ablate, small_ablation, ["--metrics", "accuracy", "prompt_nll", "--max-new-tokens", 2]),
    (ablate, small_ablation, ["--how", "zero"]),
    (steer, small_steering, []),
])
def test_what_the_results_file_holds_is_not_run_again_and_needs_no_weights(
        script, small, flags, dumps, tmp_path, monkeypatch):
    out = tmp_path / "r.jsonl"
    printed = run(script, *small(dumps, out), *flags)
    before = contents(tmp_path)
    monkeypatch.setattr(common, "load_weights", lambda *args: pytest.fail("weights were read"))
    assert run(script, *small(dumps, out), *flags) == printed
    assert contents(tmp_path) == before
    assert ("32 of 32 responses were cut" in printed) == ("accuracy" in flags)
    assert ("  zero  " in printed) == ("zero" in flags)


@pytest.mark.parametrize("script, small", [(ablate, small_ablation), (steer, small_steering)])
def test_only_the_row_that_a_kill_cut_short_is_run_again(
        script, small, dumps, tmp_path, monkeypatch):
    out = tmp_path / "r.jsonl"
    arguments = small(dumps, out, "--metrics", "accuracy", "--max-new-tokens", 1)
    printed = run(script, *arguments)
    before = contents(tmp_path)
    out.write_bytes(out.read_bytes()[:-100])
    appended = []
    monkeypatch.setattr(
        common, "append_row", lambda *args: appended.append(args) or append_row(*args))
    assert run(script, *arguments) == printed
    assert len(appended) == 1
    assert contents(tmp_path) == before


@pytest.fixture
def scored(monkeypatch):
    """Let evaluations count up instead of running a model. Returns the list of those that ran."""
    ran = []

    def score(evaluator, language, edit, predictions):
        ran.append(language)
        return {"scores": {"prompt_nll": [float(len(ran))]}}

    monkeypatch.setattr(common.Evaluator, "score", score)
    return ran


def evaluate(dumps, out, *flags):
    """Return the scores of Swahili unedited, masked and boosted."""
    args = parse(ablate, "--languages", "sw", "--limit", 2, "--out", out, *flags)
    evaluator = common.Evaluator(args, analyze.load_routing(dumps))
    boost = {"boosts": {1: np.ones(32)}, "rule": "soft"}
    rows = [
        evaluator.evaluate("sw"),
        evaluator.evaluate("sw", "masked", {"masks": {1: [3]}}, {"target": "en"}),
        evaluator.evaluate("sw", "boosted", boost, {"target": "en"}),
    ]
    return [row["scores"]["prompt_nll"].tolist() for row in rows]


def test_an_evaluation_is_run_again_under_every_other_setting(dumps, tmp_path, scored, monkeypatch):
    out, data = tmp_path / "r.jsonl", tmp_path / "sw.tsv"
    (tmp_path / "i.json").write_text('{"sw": "Fikiria."}')
    problems = Path("tests/data/eval_sw.tsv").read_text(encoding="utf-8")
    data.write_text("1 + 1?\t2\n" + problems, encoding="utf-8")
    assert evaluate(dumps, out) == [[1], [2], [3]]
    assert evaluate(dumps, out, "--batch-tokens", 9999, "--max-length", 999) == [[1], [2], [3]]
    for flags in (["--limit", 3], ["--metrics", "answer_nll"], ["--dtype", "float64"],
                  ["--chat-template", "never"], ["--instruction", tmp_path / "i.json"],
                  ["--score", "contains"], ["--max-new-tokens", 7], ["--temperature", 1],
                  ["--temperature", 1, "--seed", 1], ["--data", data]):
        number = len(scored)
        assert evaluate(dumps, out, *flags) == [[number + 1], [number + 2], [number + 3]]
    (tmp_path / "i.json").write_text('{"sw": "Fikiria kwanza."}')
    number = len(scored)
    assert evaluate(dumps, out, "--instruction", tmp_path / "i.json")[0] == [number + 1]
    monkeypatch.setattr(common, "MODEL_OPTIONS", {"attn_implementation": "eager"})
    number = len(scored)
    assert evaluate(dumps, out) == [[number + 1], [number + 2], [number + 3]]


def test_settings_that_lead_to_the_same_tokens_are_one_evaluation(
        checkpoint, dumps, tmp_path, scored, monkeypatch):
    out, data = tmp_path / "r.jsonl", tmp_path / "{lang}.tsv"
    for language in ("sw", "zh"):
        shutil.copy("tests/data/eval_sw.tsv", tmp_path / f"{language}.tsv")
    assert evaluate(dumps, out) == [[1], [2], [3]]
    assert [row["prompts"]["data"] for row in read_rows(out)] == [ablate.DATA] * 3
    unused = '{"unused": 1}'
    for flags in (["--data", data], ["--chat-template-options", unused], ["--model", checkpoint]):
        assert evaluate(dumps, out, *flags) == [[1], [2], [3]]
    template = checkpoint / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y %f') }}{{ unused }}{{ messages[0]['content'] }}")
    for _ in range(2):  # at another microsecond
        assert evaluate(dumps, out, "--model", checkpoint) == [[4], [5], [6]]
    assert evaluate(dumps, out, "--model", checkpoint, "--chat-template-options", unused)[0] == [7]
    monkeypatch.setattr(common, "TEMPLATE_DATE", "2027-01-01")
    assert evaluate(dumps, out, "--model", checkpoint)[0] == [10]


def test_how_experts_are_chosen_belongs_to_the_edited_model_alone(dumps, tmp_path, scored):
    out = tmp_path / "r.jsonl"
    evaluate(dumps, out)
    assert evaluate(dumps, out, "--threshold", 0.6) == [[1], [4], [5]]
    assert evaluate(dumps, out, "--experts-per-language", 5) == [[1], [6], [7]]
    assert evaluate(dumps[:2], out) == [[1], [8], [9]]


def test_every_other_edit_is_another_evaluation(dumps, tmp_path, scored):
    args = parse(ablate, "--languages", "sw", "--limit", 2, "--out", tmp_path / "r.jsonl")
    evaluator = common.Evaluator(args, analyze.load_routing(dumps))
    almost = np.ones(32)
    almost[7] += 1e-9
    edits = [
        {"masks": {1: [3]}}, {"masks": {1: [4]}}, {"masks": {2: [3]}}, {"zeroed": {1: [3]}},
        {"boosts": {1: np.ones(32)}}, {"boosts": {1: np.ones(32)}, "rule": "soft"},
        {"boosts": {1: almost}},
    ]
    for _ in range(2):
        for number, edit in enumerate(edits, start=1):
            row = evaluator.evaluate("sw", "edited", edit, {"condition": "a"})
            assert row["scores"]["prompt_nll"] == [number]
    row = evaluator.evaluate("sw", "edited", edits[0], {"condition": "b"})
    assert row["scores"]["prompt_nll"] == [len(edits) + 1]


# ------------------------------------------------------------------------------------ checkpoints

@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny model."""
    return shutil.copytree(TINY, tmp_path / "model")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def scale_tensor(folder, name, factor):
    """Save a checkpoint again with a tensor times a factor; without it if the factor is None."""
    path = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    if factor is None:
        del tensors[name]
    else:
        tensors[name] *= factor
    save_file(tensors, path, metadata={"format": "pt"})


ROUTER = "model.layers.3.mlp.gate.weight"


@pytest.mark.parametrize("change", [
    lambda folder: change_config(folder, norm_topk_prob=False),
    lambda folder: scale_tensor(folder, ROUTER, 1.1),
], ids=["config", "router"])
def test_dumps_of_a_checkpoint_that_has_changed_are_refused(
        change, checkpoint, dumps, tmp_path, no_weights):
    arguments = small_ablation(dumps, tmp_path / "r.jsonl", "--model", checkpoint)
    with pytest.raises(pytest.fail.Exception, match="weights were read"):  # it is the same so far
        run(ablate, *arguments)
    change(checkpoint)
    with pytest.raises(InputError, match="en.npz.*captured on another model.*again"):
        run(ablate, *arguments)


def test_another_chat_template_is_another_evaluation(checkpoint, dumps, tmp_path, scored):
    out = tmp_path / "r.jsonl"
    assert evaluate(dumps, out, "--model", checkpoint) == evaluate(dumps, out) == [[1], [2], [3]]
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "<|user|> "))
    assert evaluate(dumps, out, "--model", checkpoint) == [[4], [5], [6]]


@pytest.mark.parametrize("damage, line", [
    (lambda folder: scale_tensor(folder, ROUTER, None), f"model'.*{ROUTER}"),
    (lambda folder: scale_tensor(folder, "model.norm.weight", np.nan), "NaN.*--dtype float32"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "model.safetensors"),
    (lambda folder: change_config(
        folder, quantization_config={"quant_method": "gptq", "bits": 4}), "model'"),
], ids=["no router", "nan", "cut short", "quantised"])
def test_a_broken_checkpoint_is_one_line_and_makes_no_row(
        damage, line, checkpoint, dumps, tmp_path, monkeypatch):
    damage(checkpoint)
    monkeypatch.setattr(common, "check_routing", lambda *args: None)  # dumps are of the whole one
    error = exit_of(ablate, *small_ablation(dumps, tmp_path / "r.jsonl", "--model", checkpoint))
    assert re.search(f"^error: .*{line}", error)
    assert "\n" not in error
    assert not (tmp_path / "r.jsonl").exists()


def test_a_router_that_is_bypassed_makes_no_row(dumps, tmp_path, monkeypatch):
    load_weights = common.load_weights

    def load_bypassed(*args):
        model = load_weights(*args)
        model.model.layers[7].mlp.forward = lambda hidden_states: hidden_states
        return model

    monkeypatch.setattr(common, "load_weights", load_bypassed)
    with pytest.raises(InputError, match=r"layers \[7\] are bypassed"):
        run(ablate, *small_ablation(dumps, tmp_path / "r.jsonl"))
    assert not (tmp_path / "r.jsonl").exists()


def test_scoring_the_captured_prompts_is_warned_of(dumps, tmp_path, scored, capsys):
    evaluate(dumps, tmp_path / "r.jsonl")
    assert capsys.readouterr().out == ""
    evaluate(dumps, tmp_path / "r.jsonl", "--data", "tests/data/routing_{lang}.tsv")
    assert re.fullmatch("warning: .*sw.*\n", capsys.readouterr().out)


def test_tokens_that_the_model_does_not_know_are_refused(dumps, tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr(common, "vocab_size", lambda config: 9)
    with pytest.raises(InputError, match="eval_en.tsv: .* 0 to 8"):
        run(ablate, *small_ablation(dumps, tmp_path / "r.jsonl"))


@pytest.mark.parametrize("language, is_noted", [
    ("de", False), ("deu_Latn", False), ("zh-Hans", False), ("cmn_Hans", False), ("german", True),
    ("mgsm_de", True), ("DE", True)])
def test_languages_that_are_not_called_by_a_code_are_noted(capsys, language, is_noted):
    common.note_unknown_codes(["en", language])
    printed = capsys.readouterr().out
    assert bool(re.fullmatch(f"note: '{language}' is not a code .*\n", printed)) == is_noted
    assert bool(printed) == is_noted


@pytest.mark.parametrize("language", ["zh", "zh-Hans", "zho_Hant", "cmn_Hans"])
def test_every_code_of_chinese_is_chinese(language):
    assert common.base_language(language) == "zh"
    assert common.span_words("北京 市", language) == ["北", "京", "市"]
    assert common.last_number("2.125", language) < 3
    assert analyze.language_labels([language])["families"] == ["Sino-Tibetan/Sinitic"]


def test_an_unusual_name_of_a_language_is_noted_and_nothing_worse(dumps, tmp_path, scored, capsys):
    shutil.copy("tests/data/eval_de.tsv", tmp_path / "german.tsv")
    args = parse(ablate, "--data", tmp_path / "{lang}.tsv", "--out", tmp_path / "r.jsonl")
    evaluator = common.Evaluator(args, analyze.load_routing(dumps))
    assert evaluator.evaluate("german")["scores"]["prompt_nll"] == [1]
    assert capsys.readouterr().out.startswith("note: 'german' is not a code")


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("prompts, scored_prompts", [(["Anna", "Tom has 4."], [1]), (["Tom"], [])])
def test_scores_that_are_not_known_are_null_in_strict_json(
        dumps, tmp_path, prompts, scored_prompts):
    data = tmp_path / "en.tsv"
    data.write_text("".join(f"{prompt}\t4\n" for prompt in prompts))
    run(ablate, *small_ablation(dumps, tmp_path / "r.jsonl", "--data", data, "--metrics",
                                "prompt_nll", "answer_nll", "--chat-template", "never"))
    for line in (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line, parse_constant=lambda constant: pytest.fail(constant))
        scores = row["scores"]["prompt_nll"]  # a first token that nothing precedes has none
        assert [i for i, score in enumerate(scores) if score is not None] == scored_prompts
        known = [scores[i] for i in scored_prompts]
        assert row["mean"]["prompt_nll"] == (pytest.approx(known[0]) if known else None)
        assert None not in row["scores"]["answer_nll"]
        assert row["mean"]["answer_nll"] > 0


def test_batches_hold_prompts_of_one_length_where_padding_matters(dumps, tmp_path, monkeypatch):
    batches, is_edited = [], []
    length_batches = common.length_batches

    def record_batches(lengths, batch_tokens, fill):
        batches.append({len({lengths[i] for i in batch})
                        for batch in length_batches(lengths, batch_tokens, fill)})
        return length_batches(lengths, batch_tokens, fill)

    def say_that_it_matters(model, ids, generation):
        is_edited.append(any("forward" in vars(router)
                             for router in common.find_routers(model).values()))
        return True

    arguments = ("--metrics", "accuracy", "--max-new-tokens", 1)
    monkeypatch.setattr(common, "length_batches", record_batches)
    printed = run(ablate, *small_ablation(dumps, tmp_path / "r.jsonl", *arguments))
    assert "padding" not in printed
    assert len(batches) == 8 and {1} not in batches
    batches.clear()
    rows = (tmp_path / "r.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_bytes(rows[0])  # goes on with an edited model
    monkeypatch.setattr(common, "padding_changes_logits", say_that_it_matters)
    printed = run(ablate, *small_ablation(dumps, tmp_path / "r.jsonl", *arguments))
    assert printed.count("note: padding changes this model's logits, so batches hold prompts") == 1
    assert batches == [{1}] * 7
    assert is_edited == [False]


# ------------------------------------------------------------------------------- devices and dtypes

@pytest.mark.parametrize("device", ["0", "CPU", "xyz", "cuda:99"])
def test_a_device_that_cannot_be_used_is_one_line(device, tmp_path):
    arguments = ("--device", device, "--languages", "en", "--limit", 2, "--out", tmp_path)
    error = exit_of(capture, *arguments)
    assert re.search(f"^error: .*--device {device}.* give cpu, cuda", error)
    assert "\n" not in error


def test_a_model_that_does_not_fit_on_its_devices_is_refused(tmp_path, monkeypatch):
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained

    def spill(*args, **options):
        options.pop("device_map", None)
        model, report = from_pretrained(*args, **options)
        model.model.layers[7].to("meta")  # as accelerate does with layers on CPU or disk
        return model, report

    monkeypatch.setattr(transformers.utils, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", spill)
    with pytest.raises(InputError, match="tiny_moe' does not fit on --device cpu.*--dtype"):
        common.load_model(TINY, device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_is_one_of_the_model_and_of_the_dump(dtype, tmp_path):
    run(capture, "--dtype", dtype, "--languages", "en", "--limit", 2, "--out", tmp_path)
    assert analyze.load_routing(tmp_path / "en.npz").meta[0]["dtype"] == dtype
    model, _ = common.load_model(TINY, dtype=dtype, device="cpu")
    assert model.dtype == getattr(torch, dtype)


# -------------------------------------------------------------------------------------- consoles

@pytest.mark.parametrize("script, flags, files", [
    ("capture.py", ["--limit", 2, "--out", "{}"], 8),
    ("analyze.py", ["{en}", "{sw}", "--out", "{}/a.npz"], 1)])
def test_a_reader_that_leaves_loses_nothing(script, flags, files, dumps, tmp_path):
    flags = [str(flag).format(tmp_path, en=dumps[0], sw=dumps[1]) for flag in flags]
    child = subprocess.Popen([sys.executable, script, *flags], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    child.stdout.readline()
    child.stdout.close()
    errors = child.stderr.read().decode()
    assert child.wait() == 0
    assert "Traceback" not in errors
    assert "Broken" not in errors
    assert len(contents(tmp_path)) == files


class ClosedPipe(io.TextIOWrapper):
    """A console whose reader, such as head, has left."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8")

    def write(self, text):
        raise BrokenPipeError

    def fileno(self):
        return os.open(os.devnull, os.O_WRONLY)


@pytest.mark.parametrize("script, small", [(ablate, small_ablation), (steer, small_steering)])
def test_an_experiment_runs_to_its_end_without_a_reader(
        script, small, dumps, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    assert exit_of(script, *small(dumps, tmp_path / "without.jsonl")) is None
    monkeypatch.undo()
    run(script, *small(dumps, tmp_path / "with.jsonl"))
    assert read_rows(tmp_path / "without.jsonl") == read_rows(tmp_path / "with.jsonl")


@pytest.mark.parametrize("script", [capture, analyze, ablate])
def test_a_console_that_lacks_a_letter_loses_nothing(script, dumps, tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    shutil.copy("tests/data/eval_en.tsv", tmp_path / "ß.tsv")
    data = ("--data", tmp_path / "{lang}.tsv", "--languages", "ß", "--limit", 2)
    arguments = {
        capture: (*data, "--out", tmp_path / "o"),
        analyze: (f"ß={dumps[0]}", dumps[1], "--out", tmp_path / "o" / "a.npz"),
        ablate: ("--routing", *dumps, *data, "--targets", "en", "--bands", "7",
                 "--out", tmp_path / "o" / "r.jsonl"),
    }
    assert exit_of(script, *arguments[script]) is None
    console.flush()
    assert rb"\xdf" in console.buffer.getvalue()
    assert len(contents(tmp_path / "o")) == 1


# -------------------------------------------------------------------------------------- constants

def test_constants_may_be_paths(dumps, tmp_path, monkeypatch):
    for script in (capture, ablate, steer):
        monkeypatch.setattr(script, "MODEL", Path(TINY))
        monkeypatch.setattr(script, "DATA", Path("tests/data/eval_{lang}.tsv"))
        monkeypatch.setattr(script, "OUT", tmp_path / script.__name__)
    for script in (ablate, steer):
        monkeypatch.setattr(script, "ROUTING", [Path(path) for path in dumps])
    monkeypatch.setattr(analyze, "DUMPS", Path(dumps[0]))
    monkeypatch.setattr(analyze, "OUT", tmp_path / "analyze")
    run(capture, "--languages", "en", "--limit", 2)
    run(analyze)
    run(ablate, "--languages", "en", "--limit", 2, "--targets", "en", "--bands", "7",
        "--metrics", "accuracy", "--max-new-tokens", 1)
    run(steer, "--languages", "sw", "--limit", 2, "--lambda", 0.5)
    assert {path.name for path in tmp_path.iterdir()} == {
        "capture", "analyze", "ablate", "ablate.predictions", "steer", "steer.predictions"}


def test_experts_per_language_may_be_a_whole_number_or_a_fraction(monkeypatch, capsys):
    for script in (analyze, ablate, steer):
        for value in (4, 0.3):
            monkeypatch.setattr(script, "EXPERTS_PER_LANGUAGE", value)
            assert parse(script).experts_per_language == value
            assert parse(script, "--experts-per-language", ".5").experts_per_language == 0.5
            with pytest.raises(SystemExit):
                parse(script, "--help")
            assert str(value) in capsys.readouterr().out


def test_lambdas_may_be_one_number_a_list_or_an_array(monkeypatch):
    for value, expected in ((0.5, [0.5]), ((1, 2), [1, 2]), (np.linspace(0, 1, 3), [0, 0.5, 1])):
        monkeypatch.setattr(steer, "LAMBDAS", value)
        assert parse(steer).lambdas == expected
        assert parse(steer, "--lambda", 3, 4).lambdas == [3, 4]


@pytest.mark.parametrize("script, small", [(ablate, small_ablation), (steer, small_steering)])
@pytest.mark.parametrize("metrics", ["prompt_nll", ["perplexity"]])
def test_metrics_that_are_no_list_of_metrics_are_named(
        script, small, metrics, dumps, tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr(script, "METRICS", metrics)
    arguments = [*small(dumps, tmp_path / "r.jsonl")]
    if "--metrics" in arguments:
        place = arguments.index("--metrics")
        del arguments[place:place + 2]
    with pytest.raises(InputError, match="METRICS .*prompt_nll"):
        run(script, *arguments)


# ------------------------------------------------------------------------------------- intervals

def test_the_interval_of_a_constant_is_the_constant():
    assert bootstrap_interval(np.full(40, 0.25)) == pytest.approx((0.25, 0.25))


def test_the_interval_of_noise_is_that_of_the_normal_approximation():
    noise = np.random.default_rng(0).normal(0.3, 1, 400)
    ci_low, ci_high = bootstrap_interval(noise)
    assert ci_low == pytest.approx(noise.mean() - 1.96 * noise.std() / 20, abs=0.007)
    assert ci_high == pytest.approx(noise.mean() + 1.96 * noise.std() / 20, abs=0.007)
    # Of two control draws that are 1 apart, the choice of draws is the larger doubt
    ci_low, ci_high = bootstrap_interval(np.stack([noise, noise + 1]))
    assert 0.9 < ci_high - ci_low < 1.3


def test_examples_without_a_score_are_left_out_and_one_example_has_no_interval():
    changes = np.random.default_rng(1).normal(size=30)
    with_gaps = np.insert(changes, [0, 7, 30], np.nan)
    assert bootstrap_interval(with_gaps) == bootstrap_interval(changes)
    draws = np.stack([with_gaps, np.arange(33)])  # without a score in one of two draws
    assert bootstrap_interval(draws) == bootstrap_interval(draws[:, ~np.isnan(with_gaps)])
    assert np.isnan(bootstrap_interval(np.array([1.0]))).all()
    assert np.isnan(bootstrap_interval(np.array([1.0, np.nan]))).all()


def test_the_summary_says_which_results_to_doubt_and_where_they_are(capsys):
    sw = {"settings": {"language": "sw"}}
    sw["scores"] = {}
    rows = [sw | {"cut_responses": 1, "empty_responses": 4},
            sw | {"cut_responses": 0, "empty_responses": 1}, sw,
            sw | {"zeroed": {"0": 0.0, "7": 0.0}}, sw | {"zeroed": {"0": 0.0, "7": 0.1}}]
    evaluator = SimpleNamespace(used=dict(enumerate(rows)), tasks={"sw": range(4)},
                                args=SimpleNamespace(out="r.jsonl"))
    common.Evaluator.print_summary(evaluator)
    printed = capsys.readouterr().out
    assert "1 of 8 responses were cut" in printed
    assert "warning: that is more than a tenth" in printed
    assert re.search("warning: 5 of 8 responses are empty.*--chat-template", printed)
    assert "no prompt selected what was zeroed in 1 of 2 rows" in printed
    assert printed.endswith("\nr.jsonl\n")
    evaluator.tasks = {"sw": range(5)}  # one in ten, or half of them, is no warning
    common.Evaluator.print_summary(evaluator)
    assert "warning: " not in capsys.readouterr().out


def test_changes_and_ranges_are_written_with_three_decimals():
    assert common.change_text(0.0124, -0.003, 0.0271) == "+0.012 [-0.003 +0.027]"
    assert common.range_text([0.034, 0.01, 0.02]) == "0.010..0.034"
    assert common.range_text([]) == "-"
