"""A dump counts what the experts were given: every real token, once, whatever the batching; and files are whole."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import analyze
import capture
from common import encode_prompt, find_routers, length_batches, load_model, read_examples

TINY, DATA = "tests/tiny_moe", "tests/data/routing_{lang}.tsv"


@pytest.fixture(scope="module")
def tiny():
    # float64, so that no two experts are so close that another order of summation picks the other
    return load_model(TINY, dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def sequences(tiny):
    examples = read_examples(DATA.format(lang="sw"))[:8] + read_examples(DATA.format(lang="zh"))[:5]
    return [encode_prompt(tiny[1], e["prompt"]) for e in examples]


def arrays(model, sequences, **options):
    dumps, padded = capture.capture(model, {"xx": (sequences, [len(s) for s in sequences])}, **options)
    return dumps["xx"], padded


def count_at_the_experts(model, sequences):
    """The slow way: one sequence at a time through the whole model, counting what arrives at each experts module."""
    routers = find_routers(model)
    counts = np.zeros((len(routers), 32), np.int64)
    weight_sums = np.zeros((len(routers), 32))
    ids = []

    def count(row):
        def hook(module, args):
            for experts, weights in zip(args[1].tolist(), args[2].tolist()):
                for expert, weight in zip(experts, weights):
                    counts[row, expert] += 1
                    weight_sums[row, expert] += weight
            ids[-1].append(args[1].numpy())
        return hook

    handles = [model.model.layers[layer].mlp.experts.register_forward_pre_hook(count(row))
               for row, layer in enumerate(routers)]
    for sequence in sequences:
        ids.append([])
        with torch.no_grad():
            model(torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    return counts, weight_sums, [np.stack(layers, 1) for layers in ids]


def test_counts_weights_and_ids_are_what_reaches_the_experts(tiny, sequences):
    counts, weight_sums, ids = count_at_the_experts(tiny[0], sequences)
    dump, padded = arrays(tiny[0], sequences, batch_tokens=300)
    assert padded > 0
    assert np.array_equal(dump["counts"], counts) and dump["counts"].dtype == np.int64
    np.testing.assert_allclose(dump["weight_sums"], weight_sums, rtol=1e-9)
    assert np.array_equal(dump["selected_experts"], np.concatenate(ids)) and dump["selected_experts"].dtype == np.uint8
    assert np.array_equal(dump["token_ids"], np.concatenate(sequences))
    assert np.array_equal(np.diff(dump["sequence_offsets"]), [len(s) for s in sequences])


def test_mean_probs_are_the_mean_over_a_sequence_of_the_routers_softmax(tiny, sequences):
    dump, _ = arrays(tiny[0], sequences, batch_tokens=300)
    model = tiny[0]
    with torch.no_grad():
        states = model(torch.tensor([sequences[2]]), output_router_logits=True)
    for row, logits in enumerate(states.router_logits):
        np.testing.assert_allclose(dump["mean_probs"][2, row], logits.softmax(-1).mean(0).numpy(), rtol=1e-5)
    np.testing.assert_allclose(dump["mean_probs"].sum(-1), 1, rtol=1e-5)


def test_batching_and_padding_change_nothing(tiny, sequences):
    one_by_one, _ = arrays(tiny[0], sequences, batch_tokens=1)
    for batch_tokens in (150, 10**6):
        dump, _ = arrays(tiny[0], sequences, batch_tokens=batch_tokens)
        for key in ("counts", "selected_experts", "token_ids", "sequence_offsets"):
            assert np.array_equal(dump[key], one_by_one[key]), key
        np.testing.assert_allclose(dump["mean_probs"], one_by_one["mean_probs"], rtol=1e-5)


def test_stats_only_has_the_statistics_of_the_full_dump_and_no_ids(tiny, sequences):
    full, _ = arrays(tiny[0], sequences, batch_tokens=300)
    stats, _ = arrays(tiny[0], sequences, batch_tokens=300, stats_only=True)
    assert set(full) - set(stats) == {"selected_experts", "token_ids"}
    for key in stats:
        assert np.array_equal(full[key], stats[key]), key


def test_a_routers_nan_stops_the_run_and_names_the_layer(tiny, sequences):
    weight = find_routers(tiny[0])[3].weight
    before = weight.detach().clone()
    try:
        weight.data[0] = float("nan")
        with pytest.raises(capture.InputError, match=r"NaN or infinite in layers \[3, 4"):
            arrays(tiny[0], sequences[:2])
    finally:
        weight.data.copy_(before)


def test_languages_in_one_pool_have_the_dumps_that_they_have_alone(tiny, sequences):
    corpora = {"sw": (sequences[:8], [3] * 8), "zh": (sequences[8:], [4] * 5)}
    pooled, _ = capture.capture(tiny[0], corpora, batch_tokens=10**6)
    for language, (own, prompt_lengths) in corpora.items():
        alone = capture.capture(tiny[0], {language: (own, prompt_lengths)}, batch_tokens=1)[0][language]
        assert set(alone) == set(pooled[language])
        for key, value in alone.items():
            np.testing.assert_allclose(pooled[language][key], value, rtol=1e-5, err_msg=key)


def test_arrays_in_a_file_hold_what_arrays_in_memory_do(tiny, sequences, tmp_path):
    def on_disk(shape, dtype):
        return np.memmap(tmp_path / f"{len(list(tmp_path.iterdir()))}", dtype, "w+", shape=shape)
    in_memory, _ = arrays(tiny[0], sequences, batch_tokens=300)
    in_a_file, _ = arrays(tiny[0], sequences, batch_tokens=300, empty=on_disk)
    assert len(list(tmp_path.iterdir())) == 2
    for key, value in in_memory.items():
        assert np.array_equal(in_a_file[key], value), key


def test_pools_take_languages_in_order_up_to_their_size():
    lengths = {"a": 5, "b": 4, "c": 2, "d": 30, "e": 1}
    assert capture.pools(lengths, 9) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert capture.pools(lengths, 10**6) == [list("abcde")] and capture.pools(lengths, 1) == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_of_all_cuts_into_batches_the_cheapest_is_taken():
    rng = np.random.default_rng(0)
    for overhead in (0, 20, 10**6):
        lengths = rng.integers(5, 60, size=9).tolist()
        batches = length_batches(lengths, 100, overhead)
        cost = sum(len(b) * max(lengths[i] for i in b) + overhead for b in batches)
        ordered, cheapest = sorted(lengths), np.inf
        for cuts in itertools.product([False, True], repeat=8):  # all of them
            parts = np.split(ordered, 1 + np.flatnonzero(cuts))
            if all(len(p) == 1 or len(p) * max(p) <= 100 for p in parts):
                cheapest = min(cheapest, sum(len(p) * max(p) + overhead for p in parts))
        assert cost == cheapest


def test_batches_hold_every_sequence_once_within_the_budget():
    lengths = [5, 90, 7, 7, 30, 120, 2]
    batches = length_batches(lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 100 for b in batches)
    assert batches[0] == [5]  # the longest first, alone


# ---------------------------------------------------------------------------------------------------------- the script

def run(monkeypatch, capsys, *arguments):
    """capture.py as from the shell, in this process; returns what it printed."""
    monkeypatch.setattr(sys, "argv", ["capture.py", "--dtype", "float64", *map(str, arguments)])
    capture.main()
    return capsys.readouterr().out


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file) | {"meta": json.loads(str(file["meta"]))}


def test_limit_and_shards_are_parts_of_the_same_dump(monkeypatch, capsys, tmp_path):
    run(monkeypatch, capsys, "--languages", "fr", "--limit", 9, "--out", tmp_path)
    whole = load(tmp_path / "fr.npz")
    run(monkeypatch, capsys, "--languages", "fr", "--limit", 4, "--out", tmp_path / "few")
    few = load(tmp_path / "few/fr.npz")
    assert np.array_equal(few["selected_experts"], whole["selected_experts"][:whole["sequence_offsets"][4]])
    for shard in ("1/2", "2/2"):
        run(monkeypatch, capsys, "--languages", "fr", "--limit", 9, "--out", tmp_path, "--shard", shard)
    shards = [load(tmp_path / f"fr.{i}of2.npz") for i in (1, 2)]
    for key in ("selected_experts", "token_ids", "prompt_lengths"):
        assert np.array_equal(np.concatenate([s[key] for s in shards]), whole[key]), key
    assert np.array_equal(shards[0]["counts"] + shards[1]["counts"], whole["counts"])
    added = analyze.load_languages([str(tmp_path / f"fr.{i}of2.npz") for i in (1, 2)])[0]
    assert np.array_equal(added["counts"], whole["counts"]) and added["num_tokens"] == len(whole["token_ids"])


def test_a_dump_has_the_documented_arrays_and_says_what_made_it(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, "--languages", "de,ja", "--limit", 3, "--out", tmp_path)
    dump = load(tmp_path / "ja.npz")
    tokens, n = len(dump["token_ids"]), 3
    kinds = {key: (value.dtype.name, value.shape) for key, value in dump.items() if key != "meta"}
    assert kinds == {
        "counts": ("int64", (8, 32)), "weight_sums": ("float64", (8, 32)), "mean_probs": ("float32", (n, 8, 32)),
        "selected_experts": ("uint8", (tokens, 8, 2)), "token_ids": ("int32", (tokens,)),
        "sequence_offsets": ("int64", (n + 1,)), "prompt_lengths": ("int64", (n,)), "layers": ("int32", (8,))}
    assert {"model", "revision", "dtype", "language", "top_k", "num_experts", "data", "data_sha256", "limit", "max_length",
            "batch_tokens", "chat_template", "stats_only", "shard", "format", "torch", "transformers"} <= set(dump["meta"])
    assert f"{tokens:,} tokens" in printed and str(tmp_path / "ja.npz") in printed


def test_the_chat_template_is_used_unless_never(monkeypatch, capsys, tmp_path):
    run(monkeypatch, capsys, "--languages", "en", "--limit", 1, "--out", tmp_path / "a")
    run(monkeypatch, capsys, "--languages", "en", "--limit", 1, "--out", tmp_path / "b", "--chat-template", "never")
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    question = read_examples(DATA.format(lang="en"))[0]["prompt"]
    assert tokenizer.decode(load(tmp_path / "a/en.npz")["token_ids"]) == f"<bos><|user|>{question}<|assistant|>"
    assert tokenizer.decode(load(tmp_path / "b/en.npz")["token_ids"]) == question


def test_responses_are_recorded_and_marked(monkeypatch, capsys, tmp_path):
    rows = [{"prompt": "Tom has 2 eggs.", "response": "2+3=5", "answer": "5"}, {"text": "Tom has 4 eggs."}]
    (tmp_path / "xx.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(monkeypatch, capsys, "--data", tmp_path / "{lang}.jsonl", "--out", tmp_path)
    dump = load(tmp_path / "xx.npz")
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    response = dump["token_ids"][dump["prompt_lengths"][0]:dump["sequence_offsets"][1]]
    assert tokenizer.decode(response) == "2+3=5"
    assert dump["prompt_lengths"][1] == np.diff(dump["sequence_offsets"])[1]


def test_a_cut_sequence_is_counted_and_reported(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, "--languages", "bn", "--limit", 3, "--max-length", 12, "--out", tmp_path)
    dump = load(tmp_path / "bn.npz")
    assert "bn       3 sequences were cut at 12 tokens" in printed and dump["meta"]["truncated"] == 3
    assert np.diff(dump["sequence_offsets"]).tolist() == [12, 12, 12]


def test_a_dump_with_the_same_settings_is_kept_and_with_others_is_an_error(monkeypatch, capsys, tmp_path):
    first = ["--languages", "es", "--limit", 2, "--out", tmp_path]
    run(monkeypatch, capsys, *first)
    made = os.stat(tmp_path / "es.npz").st_mtime_ns
    assert "there already" in run(monkeypatch, capsys, *first, "--batch-tokens", 100)
    assert os.stat(tmp_path / "es.npz").st_mtime_ns == made
    with pytest.raises(capture.InputError, match=r"es.npz was made with other settings \(max_length 4096 there, 9 now\)"):
        run(monkeypatch, capsys, *first, "--max-length", 9)
    run(monkeypatch, capsys, *first, "--max-length", 9, "--overwrite")
    assert load(tmp_path / "es.npz")["meta"]["max_length"] == 9


def test_rows_that_do_not_add_up_are_not_saved(tmp_path):
    dump = {"counts": np.array([[2, 1]]), "sequence_offsets": np.array([0, 2])}
    with pytest.raises(RuntimeError, match="do not add up"):
        capture.save_dump(tmp_path / "a.npz", dump, {"top_k": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_whole_files_and_goes_on(tmp_path):
    command = [sys.executable, "capture.py", "--out", str(tmp_path), "--batch-tokens", "64", "--languages", "bn,de", "--limit", "120",
               "--pool-tokens", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "bn.npz").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [p.name for p in tmp_path.glob("*.npz")] == ["bn.npz"]
    whole = load(tmp_path / "bn.npz")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "bn       there already" in again.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bn.npz", "de.npz"]
    assert np.array_equal(load(tmp_path / "bn.npz")["counts"], whole["counts"])
