"""A dump counts what the experts were given: every real token, once; and files are whole."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import analyze
import capture
from common import (InputError, encode_example, find_data, find_routers, length_batches, load_model,
                    read_examples)

TINY, DATA = "tests/tiny_moe", "tests/data/routing_{lang}.tsv"
STATISTICS = {"counts", "weight_sums", "mean_probs"}


@pytest.fixture(scope="module")
def tiny():
    # float64, so that no two experts are so close that another order of summation picks the other
    return load_model(TINY, dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def sequences(tiny):
    examples = read_examples(DATA.format(lang="sw"))[:8] + read_examples(DATA.format(lang="zh"))[:5]
    return [encode_example(tiny[1], e)[0] for e in examples]


def count_at_the_experts(model, sequences, num_experts):
    """The slow way: one sequence at a time through the whole model, counting what arrives at each
    experts module. For each sequence: counts and weight sums (layers, experts), and its IDs
    (tokens, layers, top_k).
    """
    layers = list(find_routers(model))
    counts = np.zeros((len(sequences), len(layers), num_experts), np.int64)
    weight_sums, ids, now = np.zeros(counts.shape), [[] for _ in sequences], {}

    def count(row):
        def hook(module, args):
            for experts, weights in zip(args[1].tolist(), args[2].tolist()):
                for expert, weight in zip(experts, weights):
                    counts[now["i"], row, expert] += 1
                    weight_sums[now["i"], row, expert] += weight
            ids[now["i"]].append(args[1].numpy())
        return hook

    handles = [model.model.layers[layer].mlp.experts.register_forward_pre_hook(count(row))
               for row, layer in enumerate(layers)]
    for now["i"], sequence in enumerate(sequences):
        with torch.no_grad():
            model(torch.tensor([sequence]))
    for handle in handles:
        handle.remove()
    return counts, weight_sums, [np.stack(of_layers, 1) for of_layers in ids]


def assert_same(one, other):
    """Selections to the bit; sums of weights and of probabilities up to the order of summation."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(other[key], value, rtol=1e-5, atol=1e-8, err_msg=key)
        else:
            assert np.array_equal(other[key], value), key


def test_counts_weights_and_ids_are_what_reaches_the_experts(tiny, sequences):
    counts, weight_sums, ids = count_at_the_experts(tiny[0], sequences, 32)
    arrays, padded = capture.capture(tiny[0], sequences, batch_tokens=10**6)
    assert set(arrays) == STATISTICS | {"selected_experts"} and padded > 0
    assert arrays["counts"].dtype == np.int64 and np.array_equal(arrays["counts"], counts)
    np.testing.assert_allclose(arrays["weight_sums"], weight_sums, rtol=1e-9, atol=1e-12)
    assert arrays["selected_experts"].dtype == np.uint8
    assert np.array_equal(arrays["selected_experts"], np.concatenate(ids))


def test_mean_probs_are_the_mean_over_a_sequence_of_the_routers_softmax(tiny, sequences):
    arrays, _ = capture.capture(tiny[0], sequences, batch_tokens=300)
    with torch.no_grad():
        states = tiny[0](torch.tensor([sequences[2]]), output_router_logits=True)
    assert len(states.router_logits) == 8
    for row, logits in enumerate(states.router_logits):
        expected = logits.softmax(-1).mean(0)
        np.testing.assert_allclose(arrays["mean_probs"][2, row], expected, rtol=1e-5)
    np.testing.assert_allclose(arrays["mean_probs"].sum(-1), 1, rtol=1e-5)


def test_null_routers_pick_by_random_rows_of_the_trained_ones_norms(tiny, sequences):
    model, inputs = tiny[0], {}
    arrays, _ = capture.capture(model, sequences, batch_tokens=300, null_draws=3)
    routers = find_routers(model)
    hooks = [router.register_forward_pre_hook(lambda _, args, layer=layer: inputs.update(
        {layer: args[0].reshape(-1, 64).float()})) for layer, router in routers.items()]
    for ids, found in zip(sequences, arrays["null_counts"]):
        with torch.no_grad():
            model(torch.tensor([ids]))  # alone, so without padding
        for layer, router in routers.items():
            rows = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(layer))
            norms = router.weight.detach().float().norm(dim=1)[:, None]
            for draw, weight in enumerate(rows / rows.norm(dim=-1, keepdim=True) * norms):
                picked = (inputs[layer] @ weight.T).topk(2).indices
                assert found[draw, layer].tolist() == picked.flatten().bincount(
                    minlength=32).tolist()
    for hook in hooks:
        hook.remove()
    plain, _ = capture.capture(model, sequences, batch_tokens=300)
    assert arrays.keys() - plain.keys() == {"null_counts"}
    assert_same(plain, {key: arrays[key] for key in plain})


def test_batches_and_padding_change_nothing(tiny, sequences):
    one_by_one, none = capture.capture(tiny[0], sequences, batch_tokens=1)
    in_batches, some = capture.capture(tiny[0], sequences, batch_tokens=10**6)
    assert none == 0 < some
    assert_same(one_by_one, in_batches)


def test_without_ids_the_statistics_are_those_with_ids(tiny, sequences):
    full, padded = capture.capture(tiny[0], sequences, batch_tokens=300)
    stats, as_padded = capture.capture(tiny[0], sequences, batch_tokens=300, stats_only=True)
    assert set(stats) == STATISTICS and padded == as_padded
    for key in stats:
        assert np.array_equal(full[key], stats[key]), key


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_said(tiny, capsys):
    text = "Anna has {} apples. Tom has 3 apples. How many apples do they have?"
    sequences = [tiny[1](text.format(n))["input_ids"] for n in range(2, 13)]
    assert list(map(len, sequences)) == [20] * 8 + [21] * 3  # 10, 11 and 12 have a token more
    whole, padded = capture.capture(tiny[0], sequences, batch_tokens=10**6)
    layer, tried = tiny[0].model.layers[5], []
    forward = layer.forward

    def small_device(hidden_states, *args, **kwargs):  # fails behind the fifth router
        tried.append(len(hidden_states))
        if len(hidden_states) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(hidden_states, *args, **kwargs)

    layer.forward = small_device
    try:
        halved, less = capture.capture(tiny[0], sequences, batch_tokens=10**6)
    finally:
        del layer.forward
    assert tried == [11, 5, 6, 2, 3, 3, 3]
    assert_same(whole, halved)
    # the longest lead: first beside all eight of the others, in the end beside two
    assert padded == 8 and less == 2
    said = "".join(capsys.readouterr())
    assert "out of memory on 11 sequences at once: halved" in said
    assert said.count("out of memory") == 3  # and those of 5 and 6


def test_ids_of_300_experts_go_exactly_from_the_router_to_the_analysis(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=300, num_experts_per_tok=4, moe_intermediate_size=4,
        max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for router in find_routers(model).values():
            router.weight.normal_()
    sequences = [torch.randint(0, 64, (n,)).tolist() for n in (40, 38, 7)]
    counts, _, ids = count_at_the_experts(model, sequences, 300)
    ids = np.concatenate(ids)
    assert (ids > 255).mean() > 0.05  # which eight bits would lose
    arrays, _ = capture.capture(model, sequences)
    dump = capture.as_dump(arrays, [0, 1], sequences, [30, 38, 7], [[0, 9]] * 3)
    capture.save_dump(tmp_path / "xx.npz", dump, {"language": "xx", "num_experts": 300, "top_k": 4})
    saved = load(tmp_path / "xx.npz")["selected_experts"]
    assert saved.dtype == np.uint16 and np.array_equal(saved, ids)
    by_counts = analyze.load_routing(str(tmp_path / "xx.npz"))
    assert by_counts["num_experts"] == 300 and np.array_equal(by_counts["counts"], counts.sum(0))
    by_ids = analyze.load_routing(str(tmp_path / "xx.npz"), part="response")
    # of the first sequence the last 10 tokens; the others are all prompt
    expected = np.stack([np.bincount(ids[30:40, row].ravel(), minlength=300) for row in (0, 1)])
    assert by_ids["num_tokens"] == 10 and np.array_equal(by_ids["counts"], expected)


# ---------------------------------------------------------------------------------------- batches

def test_a_batch_is_cut_where_its_shortest_falls_under_nine_tenths_or_its_tokens_run_out():
    # 90 is just nine tenths of 100, 46 more than that of 50; 89 and 44 are less; 3 * 100 is 300
    lengths = [10, 50, 95, 89, 100, 44, 46, 90]
    assert length_batches(lengths, 300) == [[4, 2, 7], [3], [1, 6], [5], [0]]
    assert length_batches(lengths, 299) == [[4, 2], [7, 3], [1, 6], [5], [0]]
    assert length_batches(lengths, 300, fill=0.4) == [[4, 2, 7], [3, 1, 6], [5], [0]]
    assert length_batches(lengths, 50) == [[4], [2], [7], [3], [1], [6], [5], [0]]
    assert length_batches(lengths, 10**6, fill=0) == [[4, 2, 7, 3, 1, 6, 5, 0]]


def test_batches_hold_every_sequence_once_and_could_not_take_the_next_one():
    lengths = np.random.default_rng(0).integers(5, 60, size=200).tolist()
    batches = length_batches(lengths, 400)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    for batch, after in zip(batches, batches[1:] + [None]):
        longest, shortest = lengths[batch[0]], lengths[batch[-1]]
        assert len(batch) * longest <= 400 and shortest >= 0.9 * longest
        too_many = (len(batch) + 1) * longest > 400
        assert after is None or too_many or lengths[after[0]] < 0.9 * longest


# ------------------------------------------------------------------------------------------ dumps

def test_a_dump_is_the_sum_over_sequences_and_where_each_begins():
    # two sequences of 2 and 1 tokens, one layer, two experts, top_k 1
    arrays = {"counts": np.array([[[2, 0]], [[0, 1]]]),
              "weight_sums": np.array([[[2.5, 0]], [[0, 1.5]]]),
              "mean_probs": np.array([[[0.75, 0.25]], [[0.5, 0.5]]], np.float32)}
    ids = np.array([0, 0, 1], np.uint8).reshape(3, 1, 1)
    corpus = [[7, 8], [9]], [2, 1], [(1, 2), (0, 1)]
    dump = capture.as_dump(arrays | {"selected_experts": ids}, [3], *corpus)
    expected = {"counts": [[2, 1]], "weight_sums": [[2.5, 1.5]],
                "mean_probs": [[[0.75, 0.25]], [[0.5, 0.5]]],
                "selected_experts": [[[0]], [[0]], [[1]]], "token_ids": [7, 8, 9], "layers": [3],
                "sequence_offsets": [0, 2, 3], "prompt_lengths": [2, 1], "text_spans": [[1, 2], [0, 1]]}
    assert {key: value.tolist() for key, value in dump.items()} == expected
    nulls = np.array([[[[2, 0]], [[1, 1]]], [[[1, 0]], [[0, 1]]]], np.int32)  # two draws
    without_ids = capture.as_dump(arrays | {"null_counts": nulls}, [3], *corpus)
    assert expected.keys() - without_ids.keys() == {"selected_experts", "token_ids"}
    assert without_ids["null_counts"].tolist() == [[[3, 0]], [[1, 2]]]
    assert without_ids["null_counts"].dtype == np.int64


def small_dump(**other):
    """Two tokens, the layers 2, 5 and 9, two experts, top_k 1."""
    return {"counts": np.array([[2, 0], [1, 1], [0, 2]]), "weight_sums": np.ones((3, 2)),
            "mean_probs": np.full((1, 3, 2), 0.5, np.float32), "sequence_offsets": np.array([0, 2]),
            "prompt_lengths": np.array([2]), "layers": np.array([2, 5, 9], np.int32)} | other


def test_a_dump_is_saved_as_it_is(tmp_path):
    capture.save_dump(tmp_path / "a.npz", small_dump(), {"top_k": 1, "language": "বাংলা"})
    saved = load(tmp_path / "a.npz")
    assert saved.pop("meta") == {"top_k": 1, "language": "বাংলা"}
    assert_same(small_dump(), saved)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_dump_that_fails_half_way_leaves_the_one_that_was_there(tmp_path):
    capture.save_dump(tmp_path / "a.npz", small_dump(), {"top_k": 1})
    before, unwritable = (tmp_path / "a.npz").read_bytes(), np.array([lambda: 0])
    with pytest.raises(Exception, match="pickle"):
        capture.save_dump(tmp_path / "a.npz", small_dump(token_ids=unwritable), {"top_k": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_bytes() == before


@pytest.mark.parametrize("row", range(3))
def test_rows_that_do_not_add_up_are_not_saved(tmp_path, row):
    counts = small_dump()["counts"]
    counts[row, 0] += 1
    with pytest.raises(RuntimeError, match="counts do not add up to 2"):
        capture.save_dump(tmp_path / "a.npz", small_dump(counts=counts), {"top_k": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_infinity_is_not_saved_and_names_the_layers(tmp_path, value):
    mean_probs = small_dump()["mean_probs"]
    mean_probs[0, [0, 2], 1] = value
    with pytest.raises(InputError, match=r"NaN or infinite in layers \[2, 9\]; try --dtype"):
        capture.save_dump(tmp_path / "a.npz", small_dump(mean_probs=mean_probs), {"top_k": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_routers_nan_is_not_saved(tiny, sequences, tmp_path):
    weight = find_routers(tiny[0])[3].weight
    before = weight.detach().clone()
    try:
        weight.data[0] = float("nan")
        arrays, _ = capture.capture(tiny[0], sequences[:2])
    finally:
        weight.data.copy_(before)
    dump = capture.as_dump(arrays, range(8), sequences[:2], [1, 1], [[0, 1]] * 2)
    with pytest.raises(InputError, match=r"NaN or infinite in layers \[3, 4, 5, 6, 7\]"):
        capture.save_dump(tmp_path / "xx.npz", dump, {"top_k": 2})
    assert list(tmp_path.iterdir()) == []


def test_a_dump_with_any_other_setting_is_refused_and_the_setting_named(tmp_path):
    meta = {"top_k": 1, "batch_tokens": 8192} | {name: "x" for name in capture.SETTINGS}
    path = tmp_path / "a.npz"
    assert not capture.is_done(path, meta, overwrite=False)
    capture.save_dump(path, small_dump(), meta)
    assert capture.is_done(path, meta, overwrite=False)
    assert capture.is_done(path, meta | {"batch_tokens": 1}, overwrite=False)  # changes no dump
    assert not capture.is_done(path, meta, overwrite=True)
    for name in ("format", "revision", "dtype", "data_sha256", "limit", "max_length",
                 "chat_template", "stats_only", "null_router", "shard"):
        message = rf"with other settings \({name} x there, 7 now\); add --overwrite"
        with pytest.raises(InputError, match=message):
            capture.is_done(path, meta | {name: 7}, overwrite=False)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short"])
def test_a_file_that_is_no_dump_is_not_taken_for_one_nor_replaced(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.npz is no routing dump; move it away"):
        capture.is_done(path, {}, overwrite=False)
    assert path.read_bytes() == content


# ------------------------------------------------------------------------------------- the script

def run(monkeypatch, capsys, *arguments):
    """capture.py as from the shell, in this process; returns what it printed."""
    monkeypatch.setattr(sys, "argv", ["capture.py", "--dtype", "float64", *map(str, arguments)])
    capture.main()
    return capsys.readouterr().out


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file) | {"meta": json.loads(str(file["meta"]))}


def test_less_than_7_in_100_tokens_of_the_data_are_padding(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, "--stats-only", "--dtype", "float32", "--out", tmp_path)
    assert len(find_data(DATA)) == len(list(tmp_path.iterdir())) == 8
    for path in tmp_path.iterdir():
        lengths = np.diff(load(path)["sequence_offsets"])
        padded = sum(lengths[batch].max() * len(batch) - lengths[batch].sum()
                     for batch in length_batches(lengths.tolist(), capture.BATCH_TOKENS))
        share = padded / (padded + lengths.sum())
        assert len(lengths) == 200 and 0 < share < 0.07
        assert f"{lengths.sum():,} tokens  {100 * share:.1f}% padding" in printed


def test_limit_and_shards_are_parts_of_the_same_dump(monkeypatch, capsys, tmp_path):
    fr = ("--languages", "fr", "--out", tmp_path)
    run(monkeypatch, capsys, *fr, "--limit", 9)
    whole = load(tmp_path / "fr.npz")
    run(monkeypatch, capsys, "--languages", "fr", "--limit", 4, "--out", tmp_path / "few")
    few = load(tmp_path / "few/fr.npz")["selected_experts"]
    assert np.array_equal(few, whole["selected_experts"][:whole["sequence_offsets"][4]])
    for shard in ("1/2", "2/2"):
        run(monkeypatch, capsys, *fr, "--limit", 9, "--shard", shard)
    shards = [load(tmp_path / f"fr.{i}of2.npz") for i in (1, 2)]
    for key in ("selected_experts", "token_ids", "prompt_lengths"):
        assert np.array_equal(np.concatenate([s[key] for s in shards]), whole[key]), key
    assert np.array_equal(shards[0]["counts"] + shards[1]["counts"], whole["counts"])
    added = analyze.load_languages([str(tmp_path / f"fr.{i}of2.npz") for i in (1, 2)])[0]
    assert np.array_equal(added["counts"], whole["counts"])
    assert added["num_tokens"] == len(whole["token_ids"])


def test_a_dump_has_the_documented_arrays_and_says_what_made_it(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, "--languages", "de,ja", "--limit", 3, "--out", tmp_path)
    dump = load(tmp_path / "ja.npz")
    tokens, n = len(dump["token_ids"]), 3
    kinds = {key: (value.dtype.name, value.shape) for key, value in dump.items() if key != "meta"}
    assert kinds == {
        "counts": ("int64", (8, 32)), "weight_sums": ("float64", (8, 32)),
        "mean_probs": ("float32", (n, 8, 32)), "selected_experts": ("uint8", (tokens, 8, 2)),
        "token_ids": ("int32", (tokens,)), "sequence_offsets": ("int64", (n + 1,)),
        "prompt_lengths": ("int64", (n,)), "text_spans": ("int64", (n, 2)),
        "layers": ("int32", (8,))}
    assert {"model", "revision", "dtype", "language", "top_k", "num_experts", "data", "data_sha256",
            "limit", "max_length", "batch_tokens", "chat_template", "stats_only", "shard", "format",
            "torch", "transformers"} <= set(dump["meta"])
    assert f"{tokens:,} tokens" in printed and str(tmp_path / "ja.npz") in printed


def test_the_chat_template_is_used_unless_never(monkeypatch, capsys, tmp_path):
    en = ("--languages", "en", "--limit", 1)
    run(monkeypatch, capsys, *en, "--out", tmp_path / "a")
    run(monkeypatch, capsys, *en, "--out", tmp_path / "b", "--chat-template", "never")
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    question = read_examples(DATA.format(lang="en"))[0]["prompt"]
    with_template, without = (load(tmp_path / f"{x}/en.npz")["token_ids"] for x in "ab")
    assert tokenizer.decode(with_template) == f"<bos><|user|>{question}<|assistant|>"
    assert tokenizer.decode(without) == question


def test_the_very_tokens_of_dumps_are_run_again(monkeypatch, capsys, tmp_path):
    data = tmp_path / "en.jsonl"
    data.write_text('{"prompt": "How many?", "response": "14+9=23"}\n{"prompt": "Why?"}\n')
    run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "a", "--null-router")
    first = load(tmp_path / "a/en.npz")
    run(monkeypatch, capsys, "--tokens", tmp_path / "a/{lang}.npz", "--out", tmp_path / "b")
    again = load(tmp_path / "b/en.npz")
    assert first.keys() - again.keys() == {"null_counts"}
    for key in again.keys() - {"meta"}:
        assert np.array_equal(first[key], again[key]), key
    assert first["null_counts"].shape == (5, 8, 32)
    assert (first["null_counts"].sum(-1) == 2 * len(first["token_ids"])).all()
    with pytest.raises(InputError, match="README.md is no whole dump with token_ids"):
        run(monkeypatch, capsys, "--tokens", "README.md", "--out", tmp_path / "c")
    run(monkeypatch, capsys, "--data", data, "--out", tmp_path / "d", "--shard", "1/2")
    with pytest.raises(InputError, match="it is a shard"):
        run(monkeypatch, capsys, "--tokens", tmp_path / "d/en.1of2.npz", "--out", tmp_path / "c")
    changed = {"token_ids": first["token_ids"][:-1], "text_spans": first["text_spans"] * 9,
               "sequence_offsets": first["sequence_offsets"][[0, 2]]}
    for key, value in changed.items():
        meta = json.dumps(first["meta"])
        np.savez(tmp_path / "broken.npz", **first | {key: value, "meta": meta})
        with pytest.raises(InputError, match="its sequences do not fit its tokens"):
            run(monkeypatch, capsys, "--tokens", tmp_path / "broken.npz", "--out", tmp_path / "c")
    for ids in (first["token_ids"] + 99_999, -1 - first["token_ids"]):
        np.savez(tmp_path / "other.npz", **first | {"token_ids": ids, "meta": meta})
        with pytest.raises(InputError, match="other.npz: not the tokens of this model, .* 0 to "):
            run(monkeypatch, capsys, "--tokens", tmp_path / "other.npz", "--out", tmp_path / "c")
    np.savez(tmp_path / "other.npz", **first | {"meta": json.dumps(first["meta"] | {"tokenizer": "x"})})
    assert "other.npz has the tokens of another tokenizer" in run(
        monkeypatch, capsys, "--tokens", tmp_path / "other.npz", "--out", tmp_path / "e")
    with pytest.raises(InputError, match="without --data"):
        run(monkeypatch, capsys, "--tokens", tmp_path / "a/{lang}.npz", "--limit", 1)


def test_responses_are_recorded_and_marked(monkeypatch, capsys, tmp_path):
    rows = [{"prompt": "Tom has 2 eggs.", "response": "2+3=5", "answer": "5"},
            {"text": "Tom has 4 eggs."}]
    (tmp_path / "xx.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(monkeypatch, capsys, "--data", tmp_path / "{lang}.jsonl", "--out", tmp_path)
    dump = load(tmp_path / "xx.npz")
    response = dump["token_ids"][dump["prompt_lengths"][0]:dump["sequence_offsets"][1]]
    assert AutoTokenizer.from_pretrained(TINY).decode(response) == "2+3=5"
    assert dump["prompt_lengths"][1] == np.diff(dump["sequence_offsets"])[1]


def test_a_cut_sequence_is_counted_and_reported(monkeypatch, capsys, tmp_path):
    printed = run(monkeypatch, capsys, "--languages", "bn", "--limit", 3, "--max-length", 12,
                  "--out", tmp_path)
    dump = load(tmp_path / "bn.npz")
    assert "bn       3 sequences were cut at 12 tokens" in printed
    assert dump["meta"]["truncated"] == 3 and dump["prompt_lengths"].tolist() == [12, 12, 12]
    assert dump["sequence_offsets"].tolist() == [0, 12, 24, 36]


def test_a_dump_of_the_same_settings_is_kept_and_of_others_an_error(monkeypatch, capsys, tmp_path):
    first = ["--languages", "es", "--limit", 2, "--out", tmp_path]
    run(monkeypatch, capsys, *first)
    made = os.stat(tmp_path / "es.npz").st_mtime_ns
    assert "there already" in run(monkeypatch, capsys, *first, "--batch-tokens", 100)
    assert os.stat(tmp_path / "es.npz").st_mtime_ns == made
    message = r"es.npz was made with other settings \(max_length 4096 there, 9 now\)"
    with pytest.raises(InputError, match=message):
        run(monkeypatch, capsys, *first, "--max-length", 9)
    assert os.stat(tmp_path / "es.npz").st_mtime_ns == made
    run(monkeypatch, capsys, *first, "--max-length", 9, "--overwrite")
    assert load(tmp_path / "es.npz")["meta"]["max_length"] == 9


def test_a_killed_run_leaves_whole_dumps_only_and_goes_on(monkeypatch, capsys, tmp_path):
    for language, number in (("bn", 5), ("de", 200)):  # long enough to be killed in the second
        rows = open(DATA.format(lang=language), encoding="utf-8").readlines()[:number]
        (tmp_path / f"{language}.tsv").write_text("".join(rows), encoding="utf-8")
    out = tmp_path / "out"
    same = ("--data", str(tmp_path / "{lang}.tsv"), "--out", str(out), "--dtype", "float64")
    slow = ("--batch-tokens", "1")
    process = subprocess.Popen([sys.executable, "capture.py", *same, *slow],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "bn.npz").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == ["bn.npz"]
    made, whole = os.stat(out / "bn.npz").st_mtime_ns, load(out / "bn.npz")
    assert (whole["counts"].sum(1) == 2 * len(whole["token_ids"])).all()
    printed = run(monkeypatch, capsys, *same)
    assert re.search("^bn +there already", printed, re.MULTILINE)
    assert sorted(path.name for path in out.iterdir()) == ["bn.npz", "de.npz"]
    assert os.stat(out / "bn.npz").st_mtime_ns == made
    de = load(out / "de.npz")
    assert len(de["prompt_lengths"]) == 200
    assert (de["counts"].sum(1) == 2 * len(de["token_ids"])).all()


def test_a_router_that_its_block_bypasses_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(tiny[0].model.layers[2].mlp, "forward", lambda hidden_states: hidden_states)
    with pytest.raises(InputError, match="1 routers were bypassed"):
        capture.capture(tiny[0], [[1, 2, 3]])
