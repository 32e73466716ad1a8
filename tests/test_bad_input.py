"""Bad input and bad luck, as a user meets them: one line that names the fix, a non-zero exit, nothing lost or half-written."""

import concurrent.futures
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

import capture
from common import InputError, load_model, run_batches

ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def script(name, *arguments, **options):
    return subprocess.run([sys.executable, name, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, **options)


def dump(path, language, layers=2, num_experts=8, tokens=40, top_k=2, **meta):
    """A dump of random routing, written as capture.py writes one."""
    rng = np.random.default_rng(len(language))
    ids = np.array([rng.permutation(num_experts)[:top_k] for _ in range(tokens * layers)], np.uint8).reshape(tokens, layers, top_k)
    counts = np.stack([np.bincount(ids[:, l].ravel(), minlength=num_experts) for l in range(layers)])
    np.savez(path, counts=counts, selected_experts=ids, sequence_offsets=np.array([0, tokens]), prompt_lengths=[tokens],
             layers=np.arange(layers, dtype=np.int32), meta=json.dumps(
                 {"language": language, "num_experts": num_experts, "top_k": top_k, "format": 1, "shard": "1/1"} | meta))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that is wrong."""
    p = tmp_path_factory.mktemp("bad")
    LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64).save_pretrained(p / "dense")
    AutoTokenizer.from_pretrained("tests/tiny_moe").save_pretrained(p / "dense")
    (p / "bare").mkdir()
    (p / "bare/config.json").write_text(open("tests/tiny_moe/config.json").read())
    (p / "empty.txt").write_text("")
    (p / "latin.txt").write_bytes("Übung\n".encode("latin-1"))
    (p / "malformed.tsv").write_text("How many?\t3\nno answer here\n")
    (p / "blank.txt").write_text("one\n \ntwo\n")
    (p / "long.txt").write_text("apples " * 3000 + "\n")
    dump(p / "en.npz", "en"), dump(p / "sw.npz", "sw"), dump(p / "wide.npz", "wide", num_experts=16)
    dump(p / "part.npz", "part", shard="1/3"), dump(p / "new.npz", "new", format=2), dump(p / "other.npz", "xx", revision="b")
    dump(p / "first.npz", "yy", revision="a"), dump(p / "one.npz", "one", tokens=1)
    dump(p / "deep.npz", "deep", layers=3)
    (p / "cut.npz").write_bytes((p / "en.npz").read_bytes()[:900])
    (p / "text.npz").write_text("hello")
    np.savez(p / "pickle.npz", counts=np.ones((1, 2)), meta=np.array({"language": "en"}, dtype=object))
    same = np.tile(np.arange(2, dtype=np.uint8), (30, 2, 1))
    for language in ("aa", "bb"):
        np.savez(p / f"same_{language}.npz", selected_experts=same, meta=json.dumps({"language": language, "num_experts": 8}))
    return p


DATA = "tests/data/eval_{lang}.tsv"
CASES = {  # name: (script, arguments, {} is the folder; what the one line says)
    "no such model": ("capture.py", "--model no/where", "no model 'no/where': neither a folder"),
    "dense": ("capture.py", "--model {}/dense", "LlamaForCausalLM has no routers that transformers declares: a dense model"),
    "no tokenizer": ("capture.py", "--model {}/bare", "cannot load a tokenizer for model"),
    "no prompts file": ("capture.py", "--data {}/none.tsv", "no such file: "),
    "empty": ("capture.py", "--data {}/empty.txt", "empty.txt: no prompts in it"),
    "not UTF-8": ("capture.py", "--data {}/latin.txt", "latin.txt: not UTF-8 at byte 0; convert it"),
    "malformed": ("capture.py", "--data {}/malformed.tsv", "malformed.tsv:2: no tab between question and answer"),
    "empty prompt": ("capture.py", "--data {}/blank.txt", "blank.txt:2: an empty prompt"),
    "no match": ("capture.py", "--data {}/{lang}.tsvx", "no file matches"),
    "language twice": ("capture.py", "--languages en,en", "a language is named twice"),
    "unsafe label": ("capture.py", "--languages ../en", "'../en' cannot name a file"),
    "no dtype": ("capture.py", "--dtype float7 --out {}/o", "'float7' is not a dtype"),
    "unwritable": ("capture.py", "--out /proc/here", "error: [Errno"),
    "truncated dump": ("analyze.py", "{}/cut.npz", "cut.npz is not a whole routing dump; give"),
    "no npz": ("analyze.py", "{}/text.npz", "text.npz is not a whole routing dump; give"),
    "pickles": ("analyze.py", "{}/pickle.npz", "pickle.npz is not a whole routing dump; give"),
    "new format": ("analyze.py", "{}/new.npz", "new.npz is of format 2; this analyze.py reads format 1"),
    "a folder": ("analyze.py", "{}", "is a folder; name the dumps, as in"),
    "other experts": ("analyze.py", "{}/en.npz {}/wide.npz", "has num_experts 16"),
    "other layers": ("analyze.py", "{}/en.npz {}/deep.npz", "have other layers: other models"),
    "other top_k": ("analyze.py", "{}/en.npz {}/k.npz", "no such dump: "),
    "another model": ("analyze.py", "{}/first.npz {}/other.npz", "come from different models"),
    "twice": ("analyze.py", "{}/en.npz {}/en.npz", "not one whole, nor all the shards of one"),
    "shard missing": ("analyze.py", "{}/part.npz", "(shards 1/3): not one whole"),
    "part without lengths": ("analyze.py", "{}/same_aa.npz --part response", "holds no prompt_lengths"),
    "no response": ("analyze.py", "{}/en.npz --part response", "holds no response tokens"),
    "reversed band": ("analyze.py", "{}/en.npz --bands a=1-0", "band 'a=1-0' does not hold MoE layers of this model"),
    "no folder": ("analyze.py", "{}/en.npz --out {}/none/a.npz", "no such folder: "),
    "dumps of another model": ("ablate.py", "--routing {}/en.npz {}/sw.npz --data " + DATA, "another model"),
    "no dump": ("ablate.py", "--routing {}/nothing.npz", "no such dump: "),
    "no source": ("steer.py", "--routing {}/en.npz {}/sw.npz --sources en,zh", "no routing for 'zh' among the dumps; run:"),
    "lambda": ("steer.py", "--routing {}/en.npz {}/sw.npz --sources en,sw --lambda nan", "lambda must be a finite number"),
}


@pytest.fixture(scope="module")
def outcomes(place):
    def run(case):
        name, arguments, _ = CASES[case]
        return script(name, *arguments.replace("{}", str(place)).split())
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES)))


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_fix(case, outcomes, place):
    outcome, line = outcomes[case], CASES[case][2]
    assert outcome.returncode == 1
    errors = [l for l in outcome.stderr.splitlines() if l.startswith("error: ")]
    assert len(errors) == 1 and line.removeprefix("error: ") in errors[0] and "Traceback" not in outcome.stderr
    assert "Loading weights" not in outcome.stderr  # nothing expensive came first
    assert not list(place.glob("**/*.tmp")) and not (place / "o").exists()


def test_a_prompt_longer_than_the_models_positions_is_cut_and_reported(place, tmp_path):
    outcome = script("capture.py", "--data", place / "long.txt", "--max-length", 99999, "--out", tmp_path)
    assert outcome.returncode == 0 and "1 sequences were cut at 2048 tokens" in outcome.stdout
    with np.load(tmp_path / "long.npz", allow_pickle=False) as file:  # a corpus of one sequence
        assert file["sequence_offsets"].tolist() == [0, 2048]
    assert script("analyze.py", tmp_path / "long.npz", "--out", tmp_path / "a.npz").returncode == 0


@pytest.mark.parametrize("dumps, shown", [
    (["same_aa.npz", "same_bb.npz"], "1.00"),  # all experts identical
    (["en.npz", "sw.npz", "one.npz"], "one 1"),  # a language with one token
    (["en.npz"], "1 languages"),
])
def test_odd_corpora_are_analyzed(place, tmp_path, dumps, shown):
    outcome = script("analyze.py", *(place / d for d in dumps), "--out", tmp_path / "a.npz")
    assert outcome.returncode == 0 and shown in outcome.stdout and "Warning" not in outcome.stderr, outcome.stderr


def test_a_full_disk_leaves_no_partial_file_and_running_again_goes_on(tmp_path):
    command = ["capture.py", "--languages", "en", "--limit", 20, "--out", tmp_path]
    full = script(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert full.returncode == 1 and "error: " in full.stderr and "Traceback" not in full.stderr
    assert list(tmp_path.iterdir()) == []
    assert script(*command).returncode == 0 and [f.name for f in tmp_path.iterdir()] == ["en.npz"]


def test_an_interrupt_says_how_to_go_on_and_leaves_whole_files(tmp_path):
    process = subprocess.Popen([sys.executable, "capture.py", "--batch-tokens", "40", "--pool-tokens", "1", "--out", str(tmp_path)],
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & has it ignored
                               env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*.npz")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 1 and "interrupted; the same command goes on from here" in errors and "Traceback" not in errors
    assert {f.suffix for f in tmp_path.iterdir()} == {".npz"}
    for path in tmp_path.iterdir():
        with np.load(path, allow_pickle=False) as file:
            assert file["counts"].sum() == 8 * 2 * len(file["token_ids"])


# ---------------------------------------------------------------------------------------------------------- in a process

def test_a_batch_that_does_not_fit_into_memory_is_halved_and_said_once(capsys):
    model, tokenizer = load_model("tests/tiny_moe", dtype="float64", device="cpu")
    sequences = [tokenizer(f"Anna has {n} apples.")["input_ids"] for n in range(2, 13)]
    corpora = {"xx": (sequences, [1] * 11)}
    whole = capture.capture(model, corpora, batch_tokens=10**6)[0]["xx"]
    forward, tried = model.model.layers[5].forward, []

    def small_device(hidden_states, *args, **kwargs):  # fails in the sixth layer, when five have been counted
        tried.append(len(hidden_states))
        if len(hidden_states) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(hidden_states, *args, **kwargs)

    model.model.layers[5].forward = small_device
    halved = capture.capture(model, corpora, batch_tokens=10**6)[0]["xx"]
    assert tried == [11, 5, 2, 3, 6, 3, 3]
    for key in ("counts", "selected_experts", "token_ids"):
        assert np.array_equal(halved[key], whole[key]), key
    np.testing.assert_allclose(halved["weight_sums"], whole["weight_sums"])
    said = capsys.readouterr()
    assert (said.out + said.err).count("out of memory on 11 sequences at once: halving") == 1


def test_one_sequence_that_does_not_fit_is_an_error():
    def run(batch):
        raise torch.OutOfMemoryError("out of memory")
    with pytest.raises(InputError, match="out of memory on a single sequence; lower --max-length"):
        run_batches(run, [[0, 1]])


def test_transformers_before_5_6_is_refused(monkeypatch):
    for version in ("4.57.1", "5.5.4"):
        monkeypatch.setattr("common.transformers.__version__", version)
        with pytest.raises(InputError, match=f"transformers {version} has other routers; run: pip install"):
            load_model("tests/tiny_moe")


def test_nothing_trusts_remote_code_or_pickles():
    for name in ("capture.py", "analyze.py", "ablate.py", "steer.py", "common.py"):
        text = open(name, encoding="utf-8").read()
        assert "trust_remote_code=True" not in text and "pickle.load" not in text and "eval(" not in text.replace(".eval()", "")
        assert text.count("np.load(") == text.count("allow_pickle=False)")
