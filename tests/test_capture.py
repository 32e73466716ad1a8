"""A dump counts what the experts were given: every real token, once. And dumps are whole."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import capture
import common
from common import (
    InputError, encode_example, find_routers, length_batches, load_config, load_model,
    read_examples)
from conftest import TINY, parse, run

DATA = "tests/data/routing_{lang}.tsv"
SUMS = {"counts", "weight_sums", "mean_probs"}


@pytest.fixture(scope="module")
def model():
    """The tiny model in float64, where the order of a sum does not change a selection."""
    return load_model(TINY, dtype="float64", device="cpu")[0]


@pytest.fixture(scope="module")
def sequences(tiny):
    examples = read_examples(DATA.format(lang="sw"))[:8] + read_examples(DATA.format(lang="zh"))[:5]
    return [encode_example(tiny[1], example)[0] for example in examples]


def load(path):
    """Return the arrays of a dump, and its meta as a dictionary."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file) | {"meta": json.loads(str(file["meta"]))}


def assert_same(arrays, others):
    """Assert that integers are equal, and floats up to the order of their sums."""
    assert arrays.keys() == others.keys()
    for key in arrays:
        if arrays[key].dtype.kind == "f":
            np.testing.assert_allclose(arrays[key], others[key], rtol=1e-5, atol=1e-8, err_msg=key)
        else:
            assert np.array_equal(arrays[key], others[key]), key


# ------------------------------------------------------------------------------ what is captured

def count_at_experts(model, sequences, num_experts):
    """Count what arrives at the experts, the slow way: token by token, one sequence at a time.

    Returns counts and weight sums (sequences, layers, experts) and, for each sequence, the expert
    IDs (tokens, layers, top_k).
    """
    layers = list(find_routers(model))
    counts = np.zeros((len(sequences), len(layers), num_experts), np.int64)
    weight_sums = np.zeros(counts.shape)
    all_ids = []
    for i, sequence in enumerate(sequences):
        given = {}
        handles = []
        for layer in layers:
            def keep_arguments(experts, args, layer=layer):
                given[layer] = args[1].tolist(), args[2].tolist()
            experts = model.model.layers[layer].mlp.experts
            handles.append(experts.register_forward_pre_hook(keep_arguments))
        with torch.no_grad():
            model(torch.tensor([sequence]))
        for handle in handles:
            handle.remove()
        for row, layer in enumerate(layers):
            for experts, weights in zip(*given[layer]):
                for expert, weight in zip(experts, weights):
                    counts[i, row, expert] += 1
                    weight_sums[i, row, expert] += weight
        all_ids.append(np.stack([given[layer][0] for layer in layers], axis=1))
    return counts, weight_sums, all_ids


def test_counts_weights_and_ids_are_what_the_experts_are_given(model, sequences):
    counts, weight_sums, ids = count_at_experts(model, sequences, num_experts=32)
    arrays, num_padding = capture.capture(model, sequences, batch_tokens=10**6)
    assert num_padding > 0
    assert arrays.keys() == SUMS | {"selected_experts"}
    assert np.array_equal(arrays["counts"], counts)
    assert np.array_equal(arrays["selected_experts"], np.concatenate(ids))
    np.testing.assert_allclose(arrays["weight_sums"], weight_sums, rtol=1e-9, atol=1e-12)


def test_weights_in_bfloat16_are_summed_in_float32(sequences):
    model, _ = load_model(TINY, dtype="bfloat16", device="cpu")
    _, weight_sums, _ = count_at_experts(model, sequences[:2], num_experts=32)
    arrays, _ = capture.capture(model, sequences[:2], batch_tokens=1)
    np.testing.assert_allclose(arrays["weight_sums"], weight_sums, rtol=1e-5)


def test_mean_probs_are_the_mean_over_a_sequence_of_the_routers_softmax(model, sequences):
    arrays, _ = capture.capture(model, sequences, batch_tokens=300)
    with torch.no_grad():
        output = model(torch.tensor([sequences[2]]), output_router_logits=True)
    expected = [logits.softmax(-1).mean(0) for logits in output.router_logits]
    np.testing.assert_allclose(arrays["mean_probs"][2], np.stack(expected), rtol=1e-5)
    np.testing.assert_allclose(arrays["mean_probs"].sum(-1), 1, rtol=1e-5)


def test_null_routers_have_random_rows_with_the_norms_of_the_trained_ones(model, sequences):
    arrays, _ = capture.capture(model, sequences, batch_tokens=300, null_draws=3)
    states = {}
    handles = []
    for layer, router in find_routers(model).items():
        def keep_states(router, args, layer=layer):
            states[layer] = args[0].reshape(-1, 64).float()
        handles.append(router.register_forward_pre_hook(keep_states))
    for sequence, null_counts in zip(sequences, arrays["null_counts"]):
        with torch.no_grad():
            model(torch.tensor([sequence]))  # alone, so without padding
        for layer, router in find_routers(model).items():
            norms = router.weight.detach().float().norm(dim=1)
            rows = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(layer))
            for draw in range(3):
                weight = rows[draw] / rows[draw].norm(dim=1)[:, None] * norms[:, None]
                selected = (states[layer] @ weight.T).topk(2).indices
                expected = np.bincount(selected.flatten(), minlength=32)
                assert np.array_equal(null_counts[draw, layer], expected)
    for handle in handles:
        handle.remove()
    plain, _ = capture.capture(model, sequences, batch_tokens=300)
    del arrays["null_counts"]
    assert_same(arrays, plain)  # the rest is as without them


def test_batches_and_padding_change_nothing(model, sequences):
    single, no_padding = capture.capture(model, sequences, batch_tokens=1)
    batched, num_padding = capture.capture(model, sequences, batch_tokens=10**6)
    assert no_padding == 0 < num_padding
    assert_same(single, batched)


def test_without_ids_the_sums_are_those_with_ids(model, sequences):
    full, _ = capture.capture(model, sequences, batch_tokens=300)
    sums, _ = capture.capture(model, sequences, batch_tokens=300, stats_only=True)
    del full["selected_experts"]
    assert_same(full, sums)


def test_a_batch_that_does_not_fit_into_memory_is_halved(model, tiny, monkeypatch, capsys):
    text = "Anna has {} apples. Tom has 3 apples. How many apples do they have?"
    sequences = [tiny[1](text.format(number))["input_ids"] for number in range(2, 13)]
    assert [len(ids) for ids in sequences] == [20] * 8 + [21] * 3  # "10" has a token more than "9"
    whole, num_padding = capture.capture(model, sequences, batch_tokens=10**6)
    layer = model.model.layers[5]
    forward = layer.forward
    batch_sizes = []

    def fail_on_four(hidden_states, *args, **kwargs):  # behind five routers
        batch_sizes.append(len(hidden_states))
        if len(hidden_states) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", fail_on_four)
    halved, num_padding_halved = capture.capture(model, sequences, batch_tokens=10**6)
    assert batch_sizes == [11, 5, 2, 3, 6, 3, 3]
    assert_same(whole, halved)
    # The longest come first: eight are padded in one batch, and two when three are run together
    assert num_padding == 8
    assert num_padding_halved == 2
    assert "".join(capsys.readouterr()).count("--batch-tokens") == 3  # batches of 11, 5 and 6


def test_ids_of_more_than_256_experts_are_exact():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=300, num_experts_per_tok=4, moe_intermediate_size=4,
        max_position_embeddings=64)).double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for router in find_routers(model).values():
            router.weight.normal_()
    sequences = [torch.randint(0, 64, (length,)).tolist() for length in (40, 38, 7)]
    _, _, ids = count_at_experts(model, sequences, num_experts=300)
    arrays, _ = capture.capture(model, sequences)
    assert (np.concatenate(ids) > 255).any()
    assert np.array_equal(arrays["selected_experts"], np.concatenate(ids))
    assert arrays["selected_experts"].dtype == np.uint16


def test_a_router_that_its_block_bypasses_is_an_error(model, monkeypatch):
    block = model.model.layers[2].mlp
    forward = block.forward
    batches = []

    def bypass_in_second_batch(hidden_states):
        batches.append(hidden_states)
        return forward(hidden_states) if len(batches) == 1 else hidden_states

    monkeypatch.setattr(block, "forward", bypass_in_second_batch)
    with pytest.raises(InputError, match=r"layers \[2\] were bypassed"):
        capture.capture(model, [[1, 2, 3], [4, 5, 6]], batch_tokens=1)


def test_layers_of_two_shapes_do_not_fit_into_a_dump():
    assert capture.one_shape({0: (8, 2), 2: (8, 2)}) == ([0, 2], 8, 2)
    for other in ((6, 2), (8, 3)):
        with pytest.raises(InputError, match="a dump cannot hold that"):
            capture.one_shape({0: (8, 2), 2: other})


# ------------------------------------------------------------------------------------------ dumps

def test_a_dump_is_summed_over_sequences_and_says_where_each_begins():
    # Two sequences of 2 and 1 tokens, one layer, two experts, top_k 1, two null routers
    arrays = {
        "counts": np.array([[[2, 0]], [[0, 1]]]),
        "weight_sums": np.array([[[2.5, 0]], [[0, 1.5]]]),
        "mean_probs": np.array([[[0.75, 0.25]], [[0.5, 0.5]]], np.float32),
        "null_counts": np.array([[[[2, 0]], [[1, 1]]], [[[1, 0]], [[0, 1]]]], np.int32),
        "selected_experts": np.array([0, 0, 1], np.uint8).reshape(3, 1, 1),
    }
    corpus = capture.Corpus([[7, 8], [9]], prompt_lengths=[2, 1], text_spans=[(1, 2), (0, 1)],
                            num_cut=0)
    expected = {
        "counts": [[2, 1]],
        "weight_sums": [[2.5, 1.5]],
        "mean_probs": [[[0.75, 0.25]], [[0.5, 0.5]]],
        "null_counts": [[[3, 0]], [[1, 2]]],
        "selected_experts": [[[0]], [[0]], [[1]]],
        "token_ids": [7, 8, 9],
        "layers": [3],
        "sequence_offsets": [0, 2, 3],
        "prompt_lengths": [2, 1],
        "text_spans": [[1, 2], [0, 1]],
    }
    dump = capture.make_dump(arrays, [3], corpus)
    assert {key: values.tolist() for key, values in dump.items()} == expected
    del arrays["selected_experts"]
    without_ids = capture.make_dump(arrays, [3], corpus)
    assert expected.keys() - without_ids.keys() == {"selected_experts", "token_ids"}


def small_dump(**arrays):
    """Return a dump of two tokens, the layers 2, 5 and 9, two experts, top_k 1."""
    return {"counts": np.array([[2, 0], [1, 1], [0, 2]]), "weight_sums": np.ones((3, 2)),
            "mean_probs": np.full((1, 3, 2), 0.5, np.float32), "layers": np.array([2, 5, 9]),
            "sequence_offsets": np.array([0, 2]), "prompt_lengths": np.array([2])} | arrays


def test_a_dump_is_saved_as_it_is(tmp_path):
    capture.save_dump(tmp_path / "a.npz", small_dump(), {"top_k": 1, "language": "বাংলা"})
    saved = load(tmp_path / "a.npz")
    assert saved.pop("meta") == {"top_k": 1, "language": "বাংলা"}
    assert_same(small_dump(), saved)
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize("row", range(3))
def test_counts_that_do_not_add_up_are_not_saved(tmp_path, row):
    dump = small_dump()
    dump["counts"][row, 0] += 1
    dump["counts"][row - 1, 0] -= 1  # all in all, they would add up
    with pytest.raises(RuntimeError, match="do not add up to 2"):
        capture.save_dump(tmp_path / "a.npz", dump, {"top_k": 1})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_or_infinite_logits_are_not_saved_and_their_layers_named(tmp_path, value):
    dump = small_dump()
    dump["mean_probs"][0, [0, 2], 1] = value
    with pytest.raises(InputError, match=r"layers \[2, 9\]; try --dtype float32"):
        capture.save_dump(tmp_path / "a.npz", dump, {"top_k": 1})
    assert os.listdir(tmp_path) == []


def test_nan_in_a_router_reaches_mean_probs(model, monkeypatch):
    router = find_routers(model)[3]
    monkeypatch.setattr(router, "weight", torch.nn.Parameter(router.weight * torch.nan))
    arrays, _ = capture.capture(model, [[5, 6, 7]])
    is_nan = np.isnan(arrays["mean_probs"]).any((0, 2))
    assert is_nan.tolist() == [False] * 3 + [True] * 5


# -------------------------------------------------------------------------------- kept, or refused

@pytest.fixture
def dump_with_settings(tmp_path):
    """The path and meta of a dump with the value x of every setting."""
    meta = {"top_k": 1} | dict.fromkeys((*capture.SETTINGS, *capture.SEQUENCE_SETTINGS), "x")
    capture.save_dump(tmp_path / "a.npz", small_dump(), meta)
    return tmp_path / "a.npz", meta


@pytest.mark.parametrize("setting", [
    "format", "revision", "dtype", "options", "sequences", "stats_only", "null_router"])
def test_a_dump_with_another_setting_is_refused_and_the_setting_named(dump_with_settings, setting):
    path, meta = dump_with_settings
    with pytest.raises(InputError, match=rf"a.npz .*\({setting} x there, y now\).*--overwrite"):
        capture.check_settings(path, meta | {setting: "y"})


@pytest.mark.parametrize("setting", [
    "tokenizer", "data_sha256", "limit", "max_length", "chat_template", "chat_template_options",
    "instruction"])
def test_a_setting_of_prompts_counts_if_token_ids_differ_and_is_then_named(
        dump_with_settings, setting):
    path, meta = dump_with_settings
    capture.check_settings(path, meta | {setting: "y"})
    other = {"sequences": "y", "dtype": "y"}
    with pytest.raises(InputError, match=rf"\({setting} x there, y now; dtype x there, y now\)"):
        capture.check_settings(path, meta | other | {setting: "y"})


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut short", "no meta", "[1]", "x"])
def test_a_file_that_is_not_a_dump_stays_as_it_is(tmp_path, content):
    path = tmp_path / "en.npz"
    if content == "no meta":
        np.savez(path, counts=np.ones(3))
    elif isinstance(content, str):
        np.savez(path, meta=content)
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(InputError, match="en.npz .*--overwrite"):
        run(capture, "--languages", "en", "--limit", 1, "--out", tmp_path)
    assert path.read_bytes() == before


def test_a_dump_with_the_same_settings_is_kept(tmp_path, monkeypatch):
    arguments = ("--languages", "es", "--limit", 2, "--out", tmp_path)
    run(capture, *arguments)
    made_at = os.stat(tmp_path / "es.npz").st_mtime_ns
    run(capture, *arguments, "--batch-tokens", 100)
    for change in (["--max-length", 9], ["--null-router"], ["--stats-only"], ["--limit", 1],
                   ["--chat-template", "never"], ["--dtype", "bfloat16"]):
        with pytest.raises(InputError, match="es.npz .*--overwrite"):
            run(capture, *arguments, *change)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "MODEL_OPTIONS", {"attn_implementation": "eager"})
        with pytest.raises(InputError, match="es.npz .*options.*--overwrite"):
            run(capture, *arguments)
    assert os.stat(tmp_path / "es.npz").st_mtime_ns == made_at
    run(capture, *arguments, "--max-length", 9, "--overwrite")
    assert load(tmp_path / "es.npz")["meta"]["max_length"] == 9


def test_settings_that_lead_to_the_same_tokens_are_the_same(tmp_path):
    data = shutil.copy(DATA.format(lang="es"), tmp_path / "es.tsv")
    run(capture, "--data", data, "--limit", 300, "--stats-only", "--out", tmp_path)
    made_at = os.stat(tmp_path / "es.npz").st_mtime_ns
    with open(data, "a", encoding="utf-8") as file:
        file.write("1 + 1?\t2\n")
    for flags in (["--limit", 200], ["--limit", 200, "--max-length", 999],
                  ["--limit", 200, "--chat-template-options", '{"unused": 1}']):
        run(capture, "--data", data, "--stats-only", "--out", tmp_path, *flags)
        assert os.stat(tmp_path / "es.npz").st_mtime_ns == made_at
    with pytest.raises(InputError, match="data_sha256 .* there, .* now"):
        run(capture, "--data", data, "--limit", 300, "--stats-only", "--out", tmp_path)


def test_prompts_that_change_by_the_second_are_made_on_one_date(checkpoint, tmp_path, monkeypatch):
    template = checkpoint / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y %S.%f') }} {{ messages[0]['content'] }}")
    arguments = ("--model", checkpoint, "--languages", "en", "--limit", 2, "--out")
    for folder in ("first", "second", "first"):  # the last one is kept
        run(capture, *arguments, tmp_path / folder)
    first, second = (load(tmp_path / folder / "en.npz") for folder in ("first", "second"))
    assert first["meta"]["sequences"] == second["meta"]["sequences"]
    assert np.array_equal(first["token_ids"], second["token_ids"])
    assert "01 Jan 2026 00.000000" in AutoTokenizer.from_pretrained(TINY).decode(first["token_ids"])
    monkeypatch.setattr(common, "TEMPLATE_DATE", "2027-01-01")
    with pytest.raises(InputError, match="en.npz .*sequences .* there, .* now"):
        run(capture, *arguments, tmp_path / "first")


def test_prompts_that_change_at_random_are_other_prompts(checkpoint, tmp_path, monkeypatch):
    template = checkpoint / "chat_template.jinja"
    template.write_text("{{ range(9) | random }} {{ messages[0]['content'] }}")
    arguments = ("--model", checkpoint, "--languages", "en", "--limit", 2, "--out", tmp_path / "o")
    monkeypatch.setattr("random.choice", lambda values: values[3])
    run(capture, *arguments)
    run(capture, *arguments)
    monkeypatch.setattr("random.choice", lambda values: values[4])
    with pytest.raises(InputError, match=r"en.npz .*\(sequences .* there, .* now\).*--overwrite"):
        run(capture, *arguments)


def test_options_of_the_chat_template_replace_those_of_the_constant(checkpoint, tmp_path):
    template = checkpoint / "chat_template.jinja"
    template.write_text("{{ enable_thinking }} {{ level }} {{ messages[0]['content'] }}")
    arguments = ("--model", checkpoint, "--languages", "en", "--limit", 1, "--out", tmp_path / "o")
    run(capture, *arguments)
    by_default = load(tmp_path / "o" / "en.npz")
    options = ("--chat-template-options", '{"level": 7}')
    with pytest.raises(InputError, match="chat_template_options .*False.* there, .*7.* now"):
        run(capture, *arguments, *options)
    run(capture, *arguments, *options, "--overwrite")
    by_flag = load(tmp_path / "o" / "en.npz")
    question = read_examples(DATA.format(lang="en"))[0]["prompt"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert tokenizer.decode(by_default["token_ids"]) == f"False  {question}"
    assert tokenizer.decode(by_flag["token_ids"]) == f" 7 {question}"


def test_a_dump_that_another_process_wrote_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    load_weights = capture.load_weights

    def run_another(*arguments):
        monkeypatch.setattr(capture, "load_weights", load_weights)
        run(capture, "--languages", "en", "--limit", 3, "--out", tmp_path)
        return load_weights(*arguments)

    monkeypatch.setattr(capture, "load_weights", run_another)
    with pytest.raises(InputError, match="en.npz .*limit 3 there, 4 now"):
        run(capture, "--languages", "en", "--limit", 4, "--out", tmp_path)
    assert load(tmp_path / "en.npz")["meta"]["limit"] == 3


def test_a_stopped_run_goes_on_with_the_languages_that_are_left(tmp_path, monkeypatch):
    arguments = ("--languages", "bn,de", "--limit", 2, "--out", tmp_path)
    capture_sequences = capture.capture

    def stop_at_second(*args, **options):
        if os.listdir(tmp_path):
            raise KeyboardInterrupt
        return capture_sequences(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(capture, "capture", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            run(capture, *arguments)
    assert os.listdir(tmp_path) == ["bn.npz"]
    made_at = os.stat(tmp_path / "bn.npz").st_mtime_ns
    run(capture, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["bn.npz", "de.npz"]
    assert os.stat(tmp_path / "bn.npz").st_mtime_ns == made_at


# ------------------------------------------------------------------------------------- the script

def test_a_dump_has_the_documented_arrays_and_says_what_made_it(tmp_path, tiny):
    run(capture, "--languages", "de,ja", "--limit", 3, "--null-router", "--out", tmp_path)
    dump = load(tmp_path / "ja.npz")
    meta = dump.pop("meta")
    num_tokens = len(dump["token_ids"])
    assert {key: (array.dtype.name, array.shape) for key, array in dump.items()} == {
        "counts": ("int64", (8, 32)),
        "weight_sums": ("float64", (8, 32)),
        "mean_probs": ("float32", (3, 8, 32)),
        "null_counts": ("int64", (5, 8, 32)),
        "selected_experts": ("uint8", (num_tokens, 8, 2)),
        "token_ids": ("int32", (num_tokens,)),
        "sequence_offsets": ("int64", (4,)),
        "prompt_lengths": ("int64", (3,)),
        "text_spans": ("int64", (3, 2)),
        "layers": ("int32", (8,)),
    }
    assert (dump["null_counts"].sum(-1) == 2 * num_tokens).all()
    assert meta["format"] == 2
    assert meta["revision"] == checkpoint_id(TINY)
    assert meta["tokenizer"] == common.tokenizer_id(tiny[1])
    assert meta["data_sha256"] == common.file_hash(DATA.format(lang="ja"))
    assert meta["language"] == "ja"
    assert meta["num_experts"] == 32
    assert meta["top_k"] == 2
    assert meta["dtype"] == "float32"
    assert meta["truncated"] == 0
    assert meta.keys() > {"model", "data", "batch_tokens", "torch", "transformers", "quantization"}
    assert sorted(os.listdir(tmp_path)) == ["de.npz", "ja.npz"]


def test_less_than_7_in_100_tokens_of_the_data_are_padding(tmp_path):
    printed = run(capture, "--stats-only", "--out", tmp_path).splitlines()
    assert printed[0].startswith("tests/tiny_moe  8 MoE layers  32 experts  top_k 2")
    assert len(printed) == 1 + len(os.listdir(tmp_path)) == 9
    for line in printed[1:]:
        dump = load(line.split()[-1])
        assert "selected_experts" not in dump
        lengths = np.diff(dump["sequence_offsets"])
        num_padding = 0
        for batch in length_batches(lengths.tolist(), capture.BATCH_TOKENS):
            num_padding += lengths[batch].max() * len(batch) - lengths[batch].sum()
        padding = num_padding / (num_padding + lengths.sum())
        assert len(lengths) == 200
        assert 0 < padding < 0.07
        assert f"{lengths.sum():,} tokens  {padding:.1%} padding" in line


def test_the_prompts_own_text_is_routed_alike_with_and_without_an_instruction(tmp_path, tiny):
    tokenizer = tiny[1]
    (tmp_path / "i.json").write_text('{"en": "Put the answer into a box.", "de": "Antworte kurz."}')
    arguments = ("--languages", "en", "--limit", 5, "--dtype", "float64")
    run(capture, *arguments, "--out", tmp_path / "plain")
    run(capture, *arguments, "--out", tmp_path / "with", "--instruction", tmp_path / "i.json")
    run(capture, *arguments, "--out", tmp_path / "never", "--chat-template", "never")
    plain, instructed, never = (load(tmp_path / folder / "en.npz")
                                for folder in ("plain", "with", "never"))
    assert instructed["meta"]["instruction"] == "Put the answer into a box."
    for i, example in enumerate(read_examples(DATA.format(lang="en"))[:5]):
        prompt = example["prompt"]
        whole_texts, own_texts, own_experts = [], [], []
        for dump in (plain, instructed, never):
            begin, end = dump["sequence_offsets"][i:i + 2]
            start, stop = begin + dump["text_spans"][i]
            whole_texts.append(tokenizer.decode(dump["token_ids"][begin:end]))
            own_texts.append(tokenizer.decode(dump["token_ids"][start:stop]))
            own_experts.append(dump["selected_experts"][start:stop])
        assert own_texts == [prompt] * 3
        assert whole_texts == [
            f"<bos><|user|>{prompt}<|assistant|>",
            f"<bos><|user|>{prompt}\n\nPut the answer into a box.<|assistant|>", prompt]
        # What follows a token cannot change its routing
        assert np.array_equal(own_experts[0], own_experts[1])
    with pytest.raises(InputError, match="en.npz .*instruction.*--overwrite"):
        run(capture, *arguments, "--out", tmp_path / "with")


def test_responses_of_an_earlier_run_are_captured_behind_their_prompts(tmp_path, tiny):
    rows = [{"prompt": "Tom has 2 eggs.", "instruction": "Add 3.", "response": "2+3=5"},
            {"text": "Tom has 4 eggs."}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "xx.jsonl").write_text("\n".join(lines))
    run(capture, "--data", tmp_path / "{lang}.jsonl", "--out", tmp_path)
    dump = load(tmp_path / "xx.npz")
    decoded = [tiny[1].decode(ids) for ids in np.split(dump["token_ids"], dump["sequence_offsets"])]
    assert decoded[1:-1] == ["<bos><|user|>Tom has 2 eggs.\n\nAdd 3.<|assistant|>2+3=5",
                             "<bos><|user|>Tom has 4 eggs.<|assistant|>"]
    first, second = dump["prompt_lengths"]
    assert tiny[1].decode(dump["token_ids"][first:dump["sequence_offsets"][1]]) == "2+3=5"
    assert second == np.diff(dump["sequence_offsets"])[1]


def test_a_response_has_no_special_tokens_and_a_sequence_of_the_maximum_length_is_not_cut():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    examples = [{"prompt": "Tom has 2 eggs.", "response": "2+3=5"}]
    args = parse(capture, "--chat-template", "never")
    corpus = capture.encode_corpus(tokenizer, examples, args, max_length=99)
    assert tokenizer.decode(corpus.sequences[0]) == "<bos>Tom has 2 eggs.2+3=5"
    length = len(corpus.sequences[0])
    assert capture.encode_corpus(tokenizer, examples, args, max_length=length) == corpus
    assert capture.encode_corpus(tokenizer, examples, args, max_length=length - 1).num_cut == 1


@pytest.mark.parametrize("max_length, max_positions", [(8, 2048), (4096, 8)])
def test_a_longer_sequence_is_cut_and_that_is_printed(tmp_path, monkeypatch, max_length,
                                                      max_positions):
    monkeypatch.setattr(capture, "max_positions", lambda config: max_positions)
    printed = run(capture, "--languages", "bn", "--limit", 3, "--max-length", max_length,
                  "--out", tmp_path)
    dump = load(tmp_path / "bn.npz")
    assert "--max-length" in printed
    assert dump["meta"]["truncated"] == 3
    assert dump["prompt_lengths"].tolist() == [8, 8, 8]
    assert dump["sequence_offsets"].tolist() == [0, 8, 16, 24]
    assert dump["text_spans"].tolist() == [[2, 8]] * 3


def test_a_template_without_the_prompt_is_refused_before_weights_are_read(
        checkpoint, tmp_path, monkeypatch):
    (checkpoint / "chat_template.jinja").write_text("{{ bos_token }}hello")
    monkeypatch.setattr(capture, "load_weights", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="--chat-template never"):
        run(capture, "--model", checkpoint, "--languages", "en", "--out", tmp_path / "o")


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "vocab_size", lambda config: 9)
    with pytest.raises(InputError, match="routing_en.tsv: .* 0 to 8"):
        run(capture, "--languages", "en", "--out", tmp_path)


# ------------------------------------------------------------------------------------ checkpoints

@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny model."""
    return shutil.copytree(TINY, tmp_path / "model")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensor(folder, name, change):
    """Save a checkpoint again with change(tensor) for a tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def checkpoint_id(folder):
    config, _, shape = load_config(str(folder))
    return common.checkpoint_id(str(folder), config, shape)


ROUTER = "model.layers.3.mlp.gate.weight"


def test_a_change_of_config_or_weights_is_another_checkpoint(checkpoint):
    def change_one_weight(weight):
        weight[17, 5] = 0.1
        return weight

    ids = [checkpoint_id(TINY)]
    assert checkpoint_id(checkpoint) == ids[0]
    change_tensor(checkpoint, ROUTER, change_one_weight)
    ids.append(checkpoint_id(checkpoint))
    change_config(checkpoint, norm_topk_prob=False)
    ids.append(checkpoint_id(checkpoint))
    # Of weights other than routers', samples are read
    change_tensor(checkpoint, "model.embed_tokens.weight", lambda weight: weight * 1.1)
    ids.append(checkpoint_id(checkpoint))
    for content in (bytes(10**6), bytes(999_000) + b"x" * 1000):
        (checkpoint / "more.bin").write_bytes(content)
        ids.append(checkpoint_id(checkpoint))
    assert len(set(ids)) == 6


def test_a_model_with_nan_logits_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    def load_broken(*args):
        model = common.load_weights(*args)
        model.model.norm.weight.data[3] = torch.nan
        return model

    monkeypatch.setattr(capture, "load_weights", load_broken)
    with pytest.raises(InputError, match="NaN; try --dtype float32"):
        run(capture, "--languages", "en", "--limit", 2, "--out", tmp_path)
    assert os.listdir(tmp_path) == []
