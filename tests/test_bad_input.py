"""
Bad input and bad luck, as a user meets them: one line that names the fix, a non-zero exit, nothing
lost or half-written.
"""

import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

import common
from common import InputError, checkpoint_id, load_model, run_batches

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TINY = {"layers": 8, "num_experts": 32, "revision": checkpoint_id("tests/tiny_moe", None, {0: (32, 2)})}


def process(name, *arguments, **options):
    return subprocess.run([sys.executable, name, *map(str, arguments)], capture_output=True,
                          text=True, env=ENVIRONMENT, **options)


def in_process(monkeypatch, name, *arguments):
    """What the script exits with, run as the command line runs it; None if it goes through."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as stop:
        return stop.code


def dump(path, language, layers=2, num_experts=8, tokens=40, top_k=2, **meta):
    """A dump of random routing, written as capture.py writes one."""
    rng = np.random.default_rng(list(language.encode()))
    ids = np.array([rng.permutation(num_experts)[:top_k] for _ in range(tokens * layers)], np.uint8)
    ids = ids.reshape(tokens, layers, top_k)
    counts = [np.bincount(ids[:, layer].ravel(), minlength=num_experts) for layer in range(layers)]
    meta = {"language": language, "num_experts": num_experts, "top_k": top_k, "format": 1,
            "shard": "1/1"} | meta
    np.savez(path, counts=np.stack(counts), selected_experts=ids, sequence_offsets=[0, tokens],
             prompt_lengths=[tokens], layers=np.arange(layers), meta=json.dumps(meta))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that is wrong."""
    p = tmp_path_factory.mktemp("bad")
    LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=64).save_pretrained(p / "dense")
    AutoTokenizer.from_pretrained("tests/tiny_moe").save_pretrained(p / "dense")
    (p / "bare").mkdir()
    (p / "bare/config.json").write_text(Path("tests/tiny_moe/config.json").read_text())
    (p / "empty.txt").write_text("")
    (p / "latin.txt").write_bytes("Übung\n".encode("latin-1"))
    (p / "malformed.tsv").write_text("How many?\t3\nno answer here\n")
    (p / "blank.txt").write_text("one\n \ntwo\n")
    (p / "list.jsonl").write_text('[{"prompt": "a"}]\n')
    (p / "long.txt").write_text("apples " * 3000 + "\n")
    dump(p / "en.npz", "en"), dump(p / "sw.npz", "sw"), dump(p / "one.npz", "one", tokens=1)
    dump(p / "wide.npz", "wide", num_experts=16), dump(p / "deep.npz", "deep", layers=3)
    dump(p / "top1.npz", "top", top_k=1)
    dump(p / "a.npz", "xx", revision="a"), dump(p / "b.npz", "yy", revision="b")
    dump(p / "part.npz", "part", shard="1/3")
    for language in ("en", "sw", "zh"):
        dump(p / f"tiny_{language}.npz", language, **TINY)
    dump(p / "tiny_old.npz", "en", **TINY | {"revision": "0123", "model": "other/moe"})
    (p / "cut.npz").write_bytes((p / "en.npz").read_bytes()[:900])
    (p / "text.npz").write_text("hello")
    np.savez(p / "nothing.npz", counts=np.ones((1, 2)))
    np.savez(p / "pickle.npz", counts=np.ones((1, 2)), meta=np.array({"a": 1}, dtype=object))
    same = np.tile(np.array([1, 0], dtype=np.uint8), (15, 2, 1))  # 16 would look like a dense layer
    for language in ("aa", "bb"):
        np.savez(p / f"same_{language}.npz", selected_experts=same,
                 meta=json.dumps({"language": language, "num_experts": 8}))
    return p


ABLATE = "--routing {}/tiny_en.npz {}/tiny_sw.npz {}/tiny_zh.npz --languages en --limit 2 "
ABLATE, STEER = ABLATE + "--out {}/o ", ABLATE + "--out {}/o --lambda 0.5 "
CASES = {  # name: (script, arguments, where {} is the folder; what matches the one line)
    "no such model": ("capture", "--model no/where", "no model 'no/where': neither a folder .*hub"),
    "dense": ("capture", "--model {}/dense", "LlamaForCausalLM has no routers .*: a dense model"),
    "no tokenizer": ("capture", "--model {}/bare", "cannot load a tokenizer for model"),
    "no prompts file": ("capture", "--data {}/none.tsv", "no such file: .*none.tsv"),
    "empty": ("capture", "--data {}/empty.txt", "empty.txt:1: an empty prompt"),
    "not UTF-8": ("capture", "--data {}/latin.txt", "latin.txt: not UTF-8; convert it"),
    "malformed": ("capture", "--data {}/malformed.tsv", "malformed.tsv:2: no tab between"),
    "empty prompt": ("capture", "--data {}/blank.txt", "blank.txt:2: an empty prompt"),
    "unreadable": ("capture", "--data {}/one.npz", "cannot read '.npz'; give .tsv"),
    "a list of prompts": ("capture", "--data {}/list.jsonl", r"list.jsonl:1: .*: no object, as {"),
    "no match": ("capture", "--data {}/{lang}.tsvx", "no file matches .*{lang} stands for"),
    "one file": ("capture", "--data {}/long.txt --languages en,sw", "put {lang} into --data"),
    "language twice": ("capture", "--languages en,en", "'en,en' names a file twice; .* once"),
    "unsafe label": ("capture", "--languages ../en", "'../en' cannot name a file: .* letters"),
    "no dtype": ("capture", "--dtype float7 --out {}/o", "'float7' is not a dtype; give auto"),
    "a file for a folder": ("capture", "--out {}/empty.txt", "is a file; --out takes a folder"),
    "no name": ("ablate", ABLATE + "--out=", "--out is empty; give a file"),
    "unwritable": ("capture", "--out /proc/here", r"\[Errno .*/proc/here"),
    "no npz": ("analyze", "{}/text.npz", "text.npz is not a whole routing dump; give"),
    "pickles": ("analyze", "{}/pickle.npz", "pickle.npz is not a whole routing dump; give"),
    "no meta": ("analyze", "{}/nothing.npz", "nothing.npz holds no meta"),
    "equal dumps": ("analyze", "--contrast {}/en.npz {}/en.npz --top 3 --selection {}/new.json",
                    "no experts to select: A's frequencies are larger by at most 0.000"),
    "contrast and out": ("analyze", "--contrast {}/en.npz {}/sw.npz --out {}/o",
                         "out without effect here"),
    "agreement and seed": ("analyze", "--agreement {}/en.npz {}/sw.npz --seed 1 --part text",
                           "seed without effect here"),
    "selection and experts": ("ablate", ABLATE + "--selection {}/s.json --experts shared",
                              "leave out --experts: --selection"),
    "selection and sources": ("steer", STEER + "--selection {}/s.json --sources en,sw",
                              "leave out --sources: --selection"),
    "group twice": ("steer", STEER + "--sources en,zh en,zh", "--sources takes two or more different"),
    "tokens and data": ("capture", "--tokens {}/{lang}.npz --data x.tsv", "without --data, --limit"),
    "a folder": ("analyze", "{}", "no such dump: .*of a folder, name the dumps: .*npz"),
    "other experts": ("analyze", "{}/en.npz {}/wide.npz", r"num_experts \(8, 16\): different m"),
    "other layers": ("analyze", "{}/en.npz {}/deep.npz", "deep.npz .*layers .*: different models"),
    "other top_k": ("analyze", "{}/en.npz {}/top1.npz", r"top_k \(2, 1\): different models"),
    "other revision": ("analyze", "{}/en.npz {}/a.npz {}/b.npz", r"revision \(a, b\): different models"),
    "twice": ("analyze", "{}/en.npz {}/en.npz", "not one whole, nor all the shards .* label=path"),
    "shard missing": ("analyze", "{}/part.npz", r"\(shards 1/3\): not one whole"),
    "no lengths": ("analyze", "{}/same_aa.npz --part response", "no prompt_lengths; capture it again"),
    "no response": ("analyze", "{}/en.npz --part response", "en.npz holds no tokens .response."),
    "reversed": ("analyze", "{}/en.npz --bands a=1-0", "'a=1-0' does not hold MoE layers .* 0-1"),
    "no dump": ("ablate", "--routing {}/none.npz", "no such dump: .*; run: python capture.py"),
    "other sizes": ("ablate", ABLATE + "--routing {}/en.npz", r"\(8, 2\).*\(32, 2\).*: another model"),
    "other weights": ("ablate", ABLATE + "--routing {}/tiny_old.npz",
                      r"on another model \(other/moe, 0123\); capture it again"),
    "band": ("ablate", ABLATE + "--bands a=0-9", "'a=0-9' does not hold MoE layers .* 0-7"),
    "no band": ("ablate", ABLATE + "--bands early", "'early' is neither .*, as middle"),
    "threshold": ("ablate", ABLATE + "--threshold 2", "threshold 2.0 is not between 0 and 1"),
    "too many": ("ablate", ABLATE + "--experts-per-language 33", "33 is neither .* 1 to the 32"),
    "too few": ("ablate", ABLATE + "--experts-per-language 0", "0 is neither .* 1 to the 32"),
    "no examples": ("ablate", ABLATE + "--languages xx", "no such file: tests/data/eval_xx.tsv"),
    "masks all": ("ablate", ABLATE + "--experts shared --experts-per-language 32 --threshold 0.99",
                  "masking 3[0-9] of 32 experts leaves fewer than top_k 2"),
    "long prompt": ("ablate", ABLATE + "--data {}/long.txt --max-length 99999",
                    "prompt 1 has [0-9]+ tokens, more than 2048; take it out"),
    "greedy top_p": ("ablate", ABLATE + "--top-p 0.9", "--top-p, up to 1, .* need a --temperature"),
    "top_p above 1": ("ablate", ABLATE + "--temperature .7 --top-p 3", "--top-p, up to 1"),
    "no results": ("ablate", ABLATE + "--out {}/blank.txt", "is not a results file; move it away"),
    "no source": ("steer", STEER + "--sources en,fr", "no routing for 'fr' .*; run: python"),
    "one source": ("steer", STEER + "--sources en", "--sources takes two or more different languages"),
    "few examples": ("steer", STEER + "--lambda 1 2", "takes 4 examples or more; raise --limit"),
    "steered band": ("steer", STEER + "--band 40-50", "'40-50' does not hold MoE layers .* 0-7"),
    "infinite": ("steer", STEER + "--lambda inf", "lambda must be a finite number"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_fix_before_any_weights_are_read(case, place, monkeypatch):
    name, arguments, line = CASES[case]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(common, "load_weights", lambda *a, **k: pytest.fail("weights were read"))
    before = sorted(place.rglob("*"))
    said = in_process(monkeypatch, f"{name}.py", *arguments.replace("{}", str(place)).split())
    assert isinstance(said, str) and re.match(f"error: .*{line}", said) and "\n" not in said
    assert sorted(place.rglob("*")) == before  # nothing half-written


@pytest.mark.parametrize("name", ["capture", "analyze", "ablate", "steer"])
def test_help_is_a_page(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert in_process(monkeypatch, f"{name}.py", "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) <= 70


def check_outcome(outcome, line):
    """One line on stderr, beside progress bars, and status 1."""
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr
    errors = [text for text in outcome.stderr.splitlines() if "error" in text.lower()]
    assert len(errors) == 1 and re.match(f"error: .*{line}", errors[0].rpartition("\r")[2])


def test_an_error_is_one_line_on_stderr_and_status_1(place):
    outcome = process("analyze.py", place / "cut.npz")
    check_outcome(outcome, "cut.npz is not a whole routing dump; give")
    assert outcome.stdout == ""


def test_a_prompt_longer_than_the_models_positions_is_cut_and_reported(
        place, monkeypatch, capsys, tmp_path):
    assert not in_process(monkeypatch, "capture.py", "--data", place / "long.txt",
                          "--max-length", 99999, "--out", tmp_path)
    assert "1 sequences were cut at 2048 tokens" in capsys.readouterr().out
    with np.load(tmp_path / "long.npz", allow_pickle=False) as file:  # a corpus of one sequence
        assert file["sequence_offsets"].tolist() == [0, 2048]
    assert not in_process(monkeypatch, "analyze.py", tmp_path / "long.npz",
                          "--out", tmp_path / "a.npz")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dumps, shown", [
    (["same_aa.npz", "same_bb.npz"], "1.00"),  # all experts identical
    (["en.npz", "sw.npz", "one.npz"], "one 1"),  # a language with one token
    (["en.npz"], "1 languages"),
])
def test_odd_corpora_are_analyzed(place, monkeypatch, capsys, tmp_path, dumps, shown):
    assert not in_process(monkeypatch, "analyze.py", *(place / d for d in dumps),
                          "--out", tmp_path / "a.npz")
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("script, written", [("capture.py", "en.npz"), ("analyze.py", "a.npz")])
def test_a_full_disk_leaves_no_partial_file_and_running_again_goes_on(
        script, written, place, monkeypatch, tmp_path):
    command = [script, place / "tiny_en.npz", "--out", tmp_path / "a.npz"]
    if script == "capture.py":
        command = [script, "--languages", "en", "--limit", 20, "--out", tmp_path]
    full = process(*command, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (4096, 4096)))
    check_outcome(full, r"\[Errno \d+\] File too large")
    assert list(tmp_path.iterdir()) == []
    assert not in_process(monkeypatch, *command)
    assert [file.name for file in tmp_path.iterdir()] == [written]


def test_an_interrupt_says_how_to_go_on_and_leaves_whole_files(tmp_path):
    running = subprocess.Popen(
        [sys.executable, "capture.py", "--limit", "80", "--batch-tokens", "40", "--out", str(tmp_path)],
        # a shell's & has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*.npz")):
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate()
    assert running.returncode == 1 and "Traceback" not in errors
    assert "interrupted; the same command goes on from here" in errors
    files = list(tmp_path.iterdir())
    assert len(files) < 8 and {file.suffix for file in files} == {".npz"}
    for path in files:
        with np.load(path, allow_pickle=False) as file:
            assert file["counts"].sum() == 8 * 2 * len(file["token_ids"])


def test_one_sequence_that_does_not_fit_is_an_error():
    def run(batch):
        raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(InputError, match="out of memory on a single sequence; lower --max-length"):
        run_batches(run, [[0, 1]])


def test_nothing_trusts_remote_code_or_pickles():
    for name in ("capture.py", "analyze.py", "ablate.py", "steer.py", "common.py"):
        text = open(name, encoding="utf-8").read()
        assert "trust_remote_code=True" not in text and "pickle.load" not in text
        assert "eval(" not in text.replace(".eval()", "")
        assert text.count("np.load(") == text.count("allow_pickle=False)")
