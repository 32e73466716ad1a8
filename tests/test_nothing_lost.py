"""Nothing silent, nothing lost: files of others, changed checkpoints, templates, hostile generation
settings, IDs from elsewhere, and routers that recording or editing does not reach."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import ablate
import analyze
import capture
import common
from common import InputError

TINY = "tests/tiny_moe"


def run(script, *arguments):
    """What a script prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()
    return printed.getvalue()


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routing")
    run(capture, "--languages", "en,sw", "--limit", 60, "--out", folder)
    return [str(folder / f"{language}.npz") for language in ("en", "sw")]


def ablation(dumps, *arguments):
    return run(ablate, "--routing", *dumps, "--limit", 4, "--languages", "en", "--targets", "en",
               "--bands", "7-7", "--control-seeds", 1, *arguments)


# -------------------------------------------------------------------------------- files of others

@pytest.mark.parametrize("content", [
    b"a\nmy last line", b"one line without an end", b"x\n", b'{"prompt": "a", "answer": "3"}\n',
    b'{"cell": "a", "settings": {}, "scores": {"m": [1]}}\n{"other": 1}', b'{"cell": "A1", "mine": 5}'])
def test_a_file_that_is_no_results_file_stays_as_it_is(dumps, tmp_path, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="is not a results file; move it away"):
        ablation(dumps, "--out", tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_bytes() == content


@pytest.mark.parametrize("arguments", [
    ["{en}", "--out", "{copy}"], ["--contrast", "{en}", "{copy}", "--top", 3, "--selection", "{copy}"],
    ["{en}", "--out", "README.md"]])
def test_an_output_that_is_an_input_or_something_else_is_refused(dumps, tmp_path, arguments):
    copy = shutil.copy(dumps[1], tmp_path / "copy.npz")
    before = open(copy, "rb").read(), open("README.md", "rb").read()
    with pytest.raises(analyze.InputError, match="is there, and not what this writes"):
        run(analyze, *(str(a).format(en=dumps[0], copy=copy) for a in arguments))
    assert (open(copy, "rb").read(), open("README.md", "rb").read()) == before


def test_a_folder_in_the_place_of_a_file_is_refused(dumps, tmp_path):
    with pytest.raises(InputError, match="is not a results file; move it away.*Is a directory"):
        ablation(dumps, "--out", tmp_path)
    with pytest.raises(analyze.InputError, match="is a folder; give a file"):
        run(analyze, dumps[0], "--out", tmp_path)
    (tmp_path / "r").write_text("mine")  # where predictions would go
    with pytest.raises(InputError, match="for the predictions, is a file"):
        ablation(dumps, "--out", tmp_path / "r.jsonl")


WRITER = """
import sys, common
for i in range(50):
    row = {"cell": "a", "settings": {"writer": sys.argv[2], "row": i}, "scores": "x" * 200_000}
    common.append_row(sys.argv[1], row)
    if not i % 10:
        assert len(common.load_rows(sys.argv[1])) > i
"""


@pytest.mark.skipif(common.fcntl is None, reason="no locks on this system")
def test_six_processes_share_a_results_file(tmp_path):
    path = tmp_path / "shared.jsonl"
    path.write_bytes(b'{"cell": "a", "settings": {"half"')  # which a kill left
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)])
               for n in range(6)]
    assert [writer.wait() for writer in writers] == [0] * 6
    rows = [json.loads(key) for key in common.load_rows(path)]
    assert sorted((row["writer"], row["row"]) for row in rows) == [
        (str(n), i) for n in range(6) for i in range(50)]


def test_runs_never_overwrite_each_others_predictions_nor_those_to_other_data(dumps, tmp_path):
    out, data = tmp_path / "r.jsonl", tmp_path / "en.tsv"
    lines = open("tests/data/eval_en.tsv", encoding="utf-8").readlines()
    data.write_text("".join(lines[:6]), encoding="utf-8")
    same = ("--data", data, "--metrics", "accuracy", "--out", out)
    ablation(dumps, *same)
    first = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*.jsonl")}
    ablation(dumps, *same, "--max-new-tokens", 3)
    assert all(path.read_bytes() == content for path, content in first.items())
    assert len(list((tmp_path / "r").rglob("*.jsonl"))) == 2 * len(first)
    data.write_text("".join(lines[6:12]), encoding="utf-8")
    with pytest.raises(InputError, match="holds answers to other data"):
        ablation(dumps, *same)
    data.write_text(lines[0].split("\t")[0] + "\t1\n" + "".join(lines[1:6]), encoding="utf-8")
    with pytest.raises(InputError, match="holds answers to other data"):  # to the same prompts
        ablation(dumps, *same)
    assert all(path.read_bytes() == content for path, content in first.items())


def test_two_captures_with_other_settings_do_not_overwrite_each_other(monkeypatch, tmp_path):
    load = capture.load_weights

    def meanwhile(*arguments, **options):  # another process
        monkeypatch.setattr(capture, "load_weights", load)
        run(capture, "--languages", "en", "--limit", 3, "--out", tmp_path)
        return load(*arguments, **options)
    monkeypatch.setattr(capture, "load_weights", meanwhile)
    with pytest.raises(InputError, match="with other settings .limit 3 there, 4 now"):
        run(capture, "--languages", "en", "--limit", 4, "--out", tmp_path)
    assert analyze.load_routing(str(tmp_path / "en.npz"))["limit"] == 3


def test_names_with_a_slash_lead_to_no_other_folder(dumps, tmp_path):
    ablation(dumps, "--bands", "/../x=7-7", "--metrics", "accuracy", "--max-new-tokens", 1,
             "--out", tmp_path / "o/r.jsonl")
    rows = common.load_rows(tmp_path / "o/r.jsonl").values()
    paths = {path for path in tmp_path.rglob("en.jsonl")}
    assert paths == {Path(row["predictions"]) for row in rows} and len(paths) == len(rows)
    assert {path.parent.parent for path in paths} == {tmp_path / "o/r"}


def test_prompts_of_tokens_that_the_model_does_not_know_are_refused(dumps, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "vocab_size", lambda config: 9)
    with pytest.raises(InputError, match="eval_en.tsv: not the tokens of this model, .* 0 to 8"):
        ablation(dumps, "--out", tmp_path / "r.jsonl")


def test_the_folder_of_dumps_may_be_a_path(monkeypatch, tmp_path):
    monkeypatch.setattr(capture, "OUT", tmp_path)
    run(capture, "--languages", "en,sw", "--limit", 20)
    monkeypatch.setattr(analyze, "OUT", tmp_path / "a.npz")  # which a selection names, too
    run(analyze, "--contrast", tmp_path / "sw.npz", tmp_path / "en.npz", "--top", 1,
        "--selection", tmp_path / "s.json")
    assert {path.name for path in tmp_path.iterdir()} == {"en.npz", "sw.npz", "s.json"}


def test_the_first_line_says_how_experts_are_masked(dumps, tmp_path):
    for how in ("reroute", "zero"):
        printed = ablation(dumps, "--how", how, "--out", tmp_path / "r.jsonl")
        assert re.match(rf"tests/tiny_moe  \d+ cells  {how}  exclusive experts ", printed)


def test_a_dump_made_with_other_options_of_the_model_is_another(monkeypatch, tmp_path):
    run(capture, "--languages", "en", "--limit", 3, "--out", tmp_path)
    monkeypatch.setattr(capture, "MODEL_OPTIONS", {"attn_implementation": "eager"})
    with pytest.raises(InputError, match="options None there, .'attn_implementation': 'eager'. now"):
        run(capture, "--languages", "en", "--limit", 3, "--out", tmp_path)


@pytest.mark.parametrize("command, files", [
    (["capture.py", "--limit", "3", "--out", "{}"], 8),
    (["analyze.py", "{en}", "{sw}", "--out", "{}/analysis.npz"], 1)])
def test_a_reader_that_leaves_loses_nothing(dumps, tmp_path, command, files):
    named = dict(zip(("en", "sw"), dumps))
    process = subprocess.Popen([sys.executable, *(a.format(tmp_path, **named) for a in command)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 0 and "Traceback" not in errors and "Broken" not in errors
    assert len(list(tmp_path.iterdir())) == files


def test_a_console_that_lacks_a_letter_loses_nothing(dumps, tmp_path):
    done = subprocess.run(
        [sys.executable, "analyze.py", f"bnß={dumps[0]}", dumps[1], "--out", tmp_path / "a.npz"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0 and r"bn\xdf" in done.stdout and "Traceback" not in done.stderr


# -------------------------------------------------------------------------------- another checkpoint

@pytest.fixture
def checkpoint(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder, change):
    weights = {name: w.clone() for name, w in load_file(folder / "model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def identity(folder):
    config, tokenizer, shape = common.load_config(str(folder))
    return common.checkpoint_id(str(folder), config, shape), common.tokenizer_id(tokenizer)


def test_a_change_of_config_or_of_one_routing_weight_is_another_checkpoint(checkpoint):
    first, tokenizer = identity(checkpoint)
    assert identity(checkpoint) == (first, tokenizer) == identity(TINY)
    change_weights(checkpoint, lambda w: w["model.layers.3.mlp.gate.weight"][17, 5].mul_(1.1))
    second, same = identity(checkpoint)
    change_config(checkpoint, norm_topk_prob=False)
    assert len({first, second, identity(checkpoint)[0]}) == 3 and same == tokenizer


def test_other_weights_are_seen_by_samples_and_those_of_bin_files_too(checkpoint):
    first = identity(checkpoint)[0]
    change_weights(checkpoint, lambda w: [
        w[name].add_(1e-6) for name in w if name.startswith("model.layers.1.mlp.experts")])
    assert identity(checkpoint)[0] != first
    (checkpoint / "more.bin").write_bytes(bytes(10**6))
    with_bin = identity(checkpoint)[0]
    (checkpoint / "more.bin").write_bytes(bytes(999_000) + b"x" * 1000)
    assert identity(checkpoint)[0] != with_bin


def test_another_chat_template_is_another_tokenizer(checkpoint, tmp_path):
    arguments = ("--model", checkpoint, "--languages", "en", "--limit", 3, "--out", tmp_path / "o")
    run(capture, *arguments)
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|user|>", "<|user|> "))
    with pytest.raises(InputError, match=r"other settings \(tokenizer .* there"):
        run(capture, *arguments)


@pytest.mark.parametrize("change, message", [
    (lambda folder: change_weights(folder, lambda w: w.pop("model.layers.3.mlp.gate.weight")),
     "1 are not in its files, as .*layers.3.mlp.gate.weight"),
    (lambda folder: change_config(folder, num_hidden_layers=9), "are not in its files, as"),
    (lambda folder: change_weights(folder, lambda w: w.update(
        {"model.layers.3.mlp.gate.weight": torch.zeros(32, 32)})), "cannot load the weights"),
    (lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:10**6]), "is not a whole .safetensors file"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"),
     "is not a whole .safetensors file"),
    (lambda folder: change_weights(folder, lambda w: w["model.norm.weight"].fill_(torch.nan)),
     "logits are NaN"),
    (lambda folder: change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
     "cannot load the weights .*(gptq|optimum|GPTQ)"),
])
def test_a_broken_checkpoint_is_one_line_and_writes_nothing(checkpoint, tmp_path, change, message):
    change(checkpoint)
    with pytest.raises(InputError, match=message) as error:
        run(capture, "--model", checkpoint, "--languages", "en", "--limit", 2,
            "--out", tmp_path / "o")
    assert "\n" not in str(error.value) and not list((tmp_path / "o").glob("*"))


@pytest.mark.parametrize("flag, value", [("device", "0"), ("device", "CPU"), ("device", "xyz"),
                                         ("dtype", "int8"), ("dtype", "float8_e4m3fn")])
def test_a_device_or_dtype_that_does_not_exist_is_one_line(tmp_path, flag, value):
    with pytest.raises(InputError, match=f"(--device |'){value}.*give ") as error:
        run(capture, f"--{flag}", value, "--languages", "en", "--limit", 2, "--out", tmp_path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------- the prompt is in its encoding

def encoded(tokenizer, prompt):
    return common.encode_example(tokenizer, {"prompt": prompt})


def with_template(template):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_wants_parts_gets_parts():
    plain = AutoTokenizer.from_pretrained(TINY)
    parts = with_template("{{ bos_token }}<|user|>{% for part in messages[0]['content'] %}"
                          "{{ part['text'] }}{% endfor %}<|assistant|>")
    for prompt in ("Anna has 14 apples.", "a"):
        assert encoded(parts, prompt) == encoded(plain, prompt)


@pytest.mark.parametrize("template", [
    "{{ bos_token }}hello", "{{ raise_exception('no') }}", "{{ messages[0]['content'] | upper }}",
    "{{ messages[0]['content'][:5] }}"])
def test_a_template_that_loses_the_prompt_is_refused_before_weights(checkpoint, tmp_path, template,
                                                                   monkeypatch):
    (checkpoint / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(capture, "load_weights", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="the chat template does not hold the prompt as it is"):
        run(capture, "--model", checkpoint, "--languages", "en", "--limit", 2, "--out", tmp_path / "o")


def test_a_template_may_trim_and_a_prompt_may_occur_in_it():
    tokenizer = with_template("<|user|>user: {{ messages[0]['content'] | trim }}<|assistant|>")
    for prompt in ("user", ": ", "  two \n", "<|assistant|>", "user: user"):
        text, start = common.rendered(tokenizer, prompt)
        assert text[:start] == "<|user|>user: " and text[start:] == prompt.strip() + "<|assistant|>"


def test_a_prompt_without_tokens_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    with pytest.raises(InputError, match="the prompt '' has no tokens"):
        common.encode_example(tokenizer, {"prompt": ""}, "never")


# ---------------------------------------------------------------------------------- greedy is greedy

HOSTILE = [dict(no_repeat_ngram_size=1), dict(num_beams=3, num_return_sequences=3),
           dict(return_dict_in_generate=True, output_logits=True), dict(stop_strings=["="]),
           dict(cache_implementation="static"), dict(do_sample=True, temperature=5.0),
           dict(repetition_penalty=3.0), dict(suppress_tokens=[5, 6, 7, 22, 23]), dict(max_length=3),
           dict(min_new_tokens=30), dict(forced_eos_token_id=2), dict(max_time=1e-4),
           dict(guidance_scale=3.0), dict(use_cache=False), dict(prompt_lookup_num_tokens=3)]


@pytest.mark.parametrize("settings", HOSTILE, ids=str)
def test_what_a_checkpoint_says_of_generation_changes_no_token(settings):
    model, tokenizer = common.load_model(TINY, device="cpu")
    encoded = common.encode_examples(tokenizer, common.read_examples("tests/data/eval_en.tsv")[:5])
    expected = common.generate(model, tokenizer, encoded, 400, max_new_tokens=24)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    hostile = model.generation_config
    assert common.generate(model, tokenizer, encoded, 400, max_new_tokens=24) == expected
    assert model.generation_config is hostile  # put back


def settings_of(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
        args = ablate.parse_arguments()
    return common.evaluation_settings(args, *common.load_config(TINY))


def test_a_temperature_of_0_is_greedy_and_one_alone_samples_from_everything():
    greedy = settings_of()["generation"]
    assert settings_of("--temperature", 0)["generation"] == greedy and not greedy["do_sample"]
    assert greedy["eos_token_id"] and greedy["pad_token_id"] is not None
    sampled = settings_of("--temperature", 0.7, "--seed", 3)["generation"]
    assert sampled == greedy | {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0,
                                "seed": 3}


@pytest.mark.parametrize("arguments", [
    ["--temperature", -1], ["--temperature", "nan"], ["--seed", -1], ["--seed", 10**30],
    ["--top-p", 0.5], ["--temperature", 0, "--top-k-sampling", 3]])
def test_sampling_that_cannot_be_is_refused(arguments):
    with pytest.raises(InputError, match="--(temperature|seed)"):
        settings_of(*arguments)


# ------------------------------------------------------------------------------- IDs from elsewhere

EXPERTS = 32


def some_ids(tokens=40, layers=4, top_k=2, seed=0):
    return np.argsort(np.random.default_rng(seed).random((tokens, layers, EXPERTS)))[..., :top_k]


def save(path, ids, **more):
    np.savez(path, selected_experts=ids, **more,
             meta=json.dumps({"language": "xx", "num_experts": EXPERTS}))
    return str(path)


@pytest.mark.parametrize("filling", [[-1, -1], [0, 0], [0, 1]])
def test_placeholders_are_dropped_and_everything_follows(tmp_path, capsys, filling):
    ids, token_ids = some_ids(), np.arange(40)
    placed = np.insert(ids, [5, 30, 30, 40], np.array(filling), 0)
    path = save(tmp_path / "a.npz", placed, token_ids=np.insert(token_ids, [5, 30, 30, 40], -7),
                sequence_offsets=[0, 12, 44], prompt_lengths=[6, 25])
    clean = save(tmp_path / "b.npz", ids, token_ids=token_ids, sequence_offsets=[0, 11, 40],
                 prompt_lengths=[5, 25])
    for part in ("all", "prompt", "response"):
        found, expected = (analyze.read_tokens({"path": [p], "part": part}, "token_ids")[:3]
                           for p in (path, clean))
        if part == "prompt":  # whose second one ended at a placeholder
            expected = [np.delete(x, slice(28, 30), 0) for x in expected]
        elif part == "response":
            continue
        for a, b in zip(found, expected):
            assert np.array_equal(a, b), part
    assert analyze.load_routing(path)["num_tokens"] == 40
    assert "left out 4 tokens and 0 layers that are placeholders" in capsys.readouterr().err


def test_a_layer_that_says_the_same_of_every_token_is_dense(tmp_path, capsys):
    ids = some_ids()
    ids[:, 1] = [3, 9]
    ids[38:] = -1  # also where tokens are placeholders
    dump = analyze.load_routing(save(tmp_path / "a.npz", ids, layers=[2, 3, 5, 8]))
    assert dump["layers"].tolist() == [2, 5, 8] and dump["num_tokens"] == 38
    assert "left out 2 tokens and 1 layers" in capsys.readouterr().err
    few = some_ids(15)
    few[:, 1] = [3, 9]  # of fifteen tokens that may be chance
    assert len(analyze.load_routing(save(tmp_path / "b.npz", few))["layers"]) == 4


@pytest.mark.parametrize("change, message", [
    (lambda ids: ids.__setitem__((7, 2), [4, 4]), r"token 7 has in layer 2 the experts \[4, 4\]"),
    (lambda ids: ids.__setitem__((7, 2), [4, 32]), r"token 7 has in layer 2 the experts \[4, 32\]"),
    (lambda ids: ids.__setitem__((slice(20, 40), 1), 0), r"token 20 has in layer 1 .*\[0, 0\]"),
    (lambda ids: ids.__setitem__((9, 0), -1), r"token 9 has in layer 0 the experts \[-1, -1\]"),
])
def test_a_mixture_that_no_placeholder_explains_is_refused_by_token_and_layer(
        tmp_path, change, message):
    ids = some_ids()
    change(ids)
    with pytest.raises(analyze.InputError, match=message):
        analyze.load_routing(save(tmp_path / "a.npz", ids))


@pytest.mark.parametrize("ids, more, message", [
    (some_ids()[0], {}, "not integers .tokens, layers, top_k"),
    (some_ids().astype(float), {}, "not integers .tokens, layers, top_k"),
    (some_ids(), {"layers": [0, 1, 2]}, "is not a whole routing dump"),
    (some_ids(), {"sequence_offsets": [0, 30]}, "do not go from 0 to the number of tokens"),
    (some_ids(), {"sequence_offsets": [0, 45, 40]}, "do not go from 0 to the number of tokens"),
])
def test_arrays_that_do_not_belong_together_are_refused(tmp_path, ids, more, message):
    with pytest.raises(analyze.InputError, match=message):
        analyze.load_routing(save(tmp_path / "a.npz", ids, **more))


@pytest.mark.parametrize("change, message", [
    (lambda ids: ids.__setitem__((3, 2), ids[3, 2, ::-1] * 0 + [77, 78]), "an expert beyond 31"),
    (lambda ids: ids.__setitem__((slice(3, 9), 2), [30, 31]), "do not add up to counts")])
def test_ids_that_contradict_the_counts_are_refused_when_they_are_read(
        dumps, tmp_path, change, message):
    arrays = dict(np.load(dumps[0], allow_pickle=False))
    change(arrays["selected_experts"])
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(analyze.InputError, match=message):
        run(analyze, tmp_path / "a.npz", dumps[1], "--bootstrap", 2, "--out", tmp_path / "b.npz")


def test_unsigned_ids_may_hold_placeholders(tmp_path):
    ids = some_ids().astype(np.uint64)
    ids[-3:] = 2**64 - 1  # which is -1
    assert analyze.load_routing(save(tmp_path / "a.npz", ids))["num_tokens"] == 37


def test_an_analysis_is_no_dump(dumps, tmp_path):
    run(analyze, *dumps, "--out", tmp_path / "a.npz")
    with pytest.raises(analyze.InputError, match="is what analyze.py writes; give the dumps"):
        analyze.load_routing(str(tmp_path / "a.npz"))


def test_a_recorders_layers_may_lack_experts_and_must_add_up(tmp_path):
    def write(rows):
        (tmp_path / "r.json").write_text(json.dumps({layer: {
            expert: {"activation_tokens": n} for expert, n in row.items()} | {"total_tokens": 100}
            for layer, row in rows.items()}))
        return str(tmp_path / "r.json")

    dump = analyze.load_routing(write({"0": {"0": 100, "3": 98}, "1": {"1": 100, "3": 100}}))
    assert dump["counts"].tolist() == [[100, 0, 0, 98], [0, 100, 0, 100]]
    with pytest.raises(analyze.InputError, match="do not add up to 100 tokens . top_k 2"):
        analyze.load_routing(write({"0": {"0": 100, "3": 80}, "1": {"1": 100, "3": 100}}))


def test_the_readmes_snippet_brings_ids_from_vllm_and_sglang(tmp_path, monkeypatch):
    snippet = re.search(r"    import base64.*?\n\n", open("README.md").read(), re.DOTALL)[0]
    ids = some_ids(30)
    vllm = [ids[:10].astype(np.int16), ids[10:].astype(np.int16)]
    names = {"routed": vllm, "token_ids": [list(range(10)), list(range(20))]}
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line[4:] for line in snippet.split("\n")), names)
    dump = analyze.load_routing("en.npz")
    assert dump["num_tokens"] == 30 and dump["language"] == "en"
    assert np.array_equal(np.load("en.npz")["sequence_offsets"], [0, 10, 30])
    text = base64.b64encode(ids[:10].astype(np.int32).tobytes()).decode()
    assert np.array_equal(names["from_sglang"](text, 4, 2), ids[:10])


def test_shards_of_other_settings_do_not_add_up(tmp_path):
    for shard, limit in (("1/2", 20), ("2/2", 21)):
        run(capture, "--languages", "en", "--limit", limit, "--shard", shard, "--out", tmp_path)
    with pytest.raises(analyze.InputError, match="not one whole"):
        analyze.load_languages([str(path) for path in sorted(tmp_path.iterdir())])
    (tmp_path / "i.json").write_text('{"en": "Think."}')
    for shard, more in (("1/2", []), ("2/2", ["--instruction", tmp_path / "i.json"])):
        run(capture, "--languages", "en", "--limit", 4, "--shard", shard, *more, "--out", tmp_path / "d")
    with pytest.raises(analyze.InputError, match="not one whole"):
        analyze.load_languages([str(path) for path in sorted((tmp_path / "d").iterdir())])


def test_dumps_that_were_made_otherwise_are_compared_with_a_note(dumps, tmp_path):
    run(capture, "--languages", "sw", "--limit", 9, "--dtype", "bfloat16", "--out", tmp_path)
    printed = run(analyze, dumps[0], tmp_path / "sw.npz", "--out", tmp_path / "a.npz")
    for other in ("dtype: bfloat16, float32", "limit: 60, 9"):
        assert f"note: the dumps were not made alike; {other}" in printed
    (tmp_path / "i.json").write_text('{"sw": "Fikiria."}')
    run(capture, "--languages", "sw", "--limit", 60, "--instruction", tmp_path / "i.json", "--out",
        tmp_path / "i")
    assert "note: some dumps have an instruction" in run(
        analyze, dumps[0], tmp_path / "i/sw.npz", "--out", tmp_path / "a.npz")
    assert "made alike" not in run(analyze, *dumps, "--out", tmp_path / "a.npz")


# ----------------------------------------------------------------------- a trial before the run

@pytest.fixture
def model():
    return common.load_model(TINY, device="cpu")[0]


IDS = list(range(5, 21))


def test_a_block_that_ignores_its_routers_answer_is_refused(model):
    block = model.model.layers[3].mlp
    common.try_model(model, IDS)

    def ignores(hidden):
        block.gate(hidden.flatten(0, -2))
        return hidden

    block.forward = ignores
    common.try_model(model, IDS, edits=False)  # recording works
    with pytest.raises(InputError, match="layer 3 cannot be edited: its router's answer is not used"):
        common.try_model(model, IDS)


def test_a_router_that_is_bypassed_in_decoding_is_refused(model):
    def decode():
        model(torch.tensor([IDS]))

    with pytest.raises(InputError, match=r"routers in layers \[0, 1, 2, 3, 4, 5, 6, 7\] are bypassed"):
        common.try_model(model, IDS, decode=decode)  # once instead of twice
    model.model.layers[2].mlp.forward = lambda hidden: hidden
    with pytest.raises(InputError, match=r"routers in layers \[2\] are bypassed"):
        common.try_model(model, IDS, edits=False)


def test_a_run_is_refused_before_its_baseline(dumps, tmp_path, monkeypatch):
    model = common.load_model(TINY, device="cpu")[0]

    def load(*arguments):
        model.model.layers[7].mlp.forward = lambda hidden: hidden
        return model

    monkeypatch.setattr(common, "load_weights", load)
    with pytest.raises((InputError, RuntimeError), match="bypassed"):
        ablation(dumps, "--out", tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


# ------------------------------------------------------------------------------------- the rest

def test_a_question_without_an_answer_is_answered_by_nothing():
    assert common.span_scores("", []) == (True, 1) and common.span_scores("x", []) == (False, 0)
    assert common.span_scores("", ["x"]) == (False, 0)


@pytest.mark.parametrize("answer, message", [
    ('["a", null]', "answer is a text or a number"), ('{"a": 1}', "answer is a text or a number"),
    ('"a", "response": ["a"]', "response or answer is a text or a number"),
    ('"a", "kind": ["span"]', "is no number, choice .* or span"),
    ('"a", "kind": "choice"', r"is no number, choice .a letter, as A. or span"),
    ('"unknown", "kind": "number"', "kind number of .'unknown'. is no number"),
    ('""', "prompts without an answer"),
    (r'"\ud83d"', "en.jsonl:1: .*surrogates not allowed"),
])
def test_an_answer_that_is_no_text_is_refused(dumps, tmp_path, answer, message):
    (tmp_path / "en.jsonl").write_text('{"prompt": "a", "answer": %s}\n' % answer)
    with pytest.raises(InputError, match=message):
        ablation(dumps, "--data", tmp_path / "en.jsonl", "--metrics", "accuracy",
                 "--out", tmp_path / "r.jsonl")


def test_half_a_surrogate_pair_in_an_instruction_is_refused(dumps, tmp_path):
    (tmp_path / "i.json").write_text(r'{"en": "\ud83d"}')
    with pytest.raises(InputError, match="i.json is not a JSON object .*surrogates not allowed"):
        ablation(dumps, "--instruction", tmp_path / "i.json", "--out", tmp_path / "r.jsonl")


@pytest.mark.parametrize("more", [
    '"context": "b", "answers": {"text": ["c"]}', '"choices": ["b", "c"]', '"text": "b"'])
def test_fields_that_would_not_be_read_are_refused(tmp_path, more):
    (tmp_path / "en.jsonl").write_text('{"question": "a", %s, "answer": 1}\n' % more)
    with pytest.raises(InputError, match='en.jsonl:1: .* beside a "question": put all that is asked'):
        common.read_examples(tmp_path / "en.jsonl")
    (tmp_path / "en.jsonl").write_text('{"prompt": "b a", "question": "a", %s, "answer": 1}\n' % more)
    assert common.read_examples(tmp_path / "en.jsonl")[0]["prompt"] == "b a"


def test_no_number_is_a_gold_nan():
    kinds = {text: common.answer_kind(text) for text in ("NaN", "Infinity", "1e5", "2,125", "-3")}
    assert list(kinds.values()) == ["span", "span", "number", "number", "number"]


def test_letters_go_as_far_as_the_answers():
    model, tokenizer = common.load_model(TINY, device="cpu")
    encoded = common.encode_examples(tokenizer, [
        {"prompt": "a", "answer": [letter], "kind": "choice"} for letter in "ABCDEF"])
    first = {tokenizer(letter)["input_ids"][0] for letter in "ABCDEF"}
    if len(first) == 6:
        found = common.from_logits(model, tokenizer, encoded, 99)
        assert sum(found["accuracy"]) == 1


def test_langdetect_knows_the_codes_of_flores_and_what_it_does_not_know_is_refused():
    pytest.importorskip("langdetect")
    text = "Der Apfel liegt auf dem Tisch, und die Katze schläft daneben auf dem Stuhl."
    assert common.in_language([text], "deu_Latn") == common.in_language([text], "de") == [True]
    with pytest.raises(InputError, match="langdetect does not know the language 'xx'"):
        common.in_language([text], "xx")


@pytest.mark.parametrize("arguments, message", [
    (["--bands", "a=0-1", "a=6-7"], "two bands are named 'a'"),
    (["--experts", "shared"], "--targets has no part in the shared experts"),
    (["--targets", "selection"], "no routing for 'selection'"),
])
def test_flags_that_contradict_each_other_are_refused(dumps, tmp_path, arguments, message):
    with pytest.raises((InputError, analyze.InputError), match=message):
        ablation(dumps, *arguments, "--out", tmp_path / "r.jsonl")


def test_one_problem_has_no_interval_and_no_verdict(dumps, tmp_path):
    printed = ablation(dumps, "--limit", 1, "--out", tmp_path / "r.jsonl")
    assert "nan" in printed and "0 of 1 rows are hurt" in printed


@pytest.mark.parametrize("chosen, message", [
    ({0: 0.5}, None), ({0: -0.5}, "A's tokens select no expert more"),
    (dict.fromkeys(range(28), 0.5), "others do not carry as much")])
def test_selections_that_are_small_negative_or_too_large(dumps, tmp_path, chosen, message):
    revision = analyze.load_routing(dumps[0])["revision"]
    (tmp_path / "s.json").write_text(json.dumps({"experts": {"7": chosen}, "revision": revision}))
    arguments = ("--routing", *dumps, "--limit", 4, "--languages", "en", "--control-seeds", 1,
                 "--selection", tmp_path / "s.json", "--out", tmp_path / "r.jsonl")
    if message and "no expert" in message:
        with pytest.raises(InputError, match=message):
            run(ablate, *arguments)
    else:
        printed = run(ablate, *arguments)
        assert ("others do not carry" in printed) == bool(message) and "selected (layers 7)" in printed
    other = json.dumps({"experts": {"7": chosen}, "revision": "another"})
    (tmp_path / "s.json").write_text(other)
    for arguments in (arguments, [a if a not in dumps else elsewhere(a, tmp_path) for a in arguments]):
        with pytest.raises(InputError, match=r"was made with another model \(another\)|no expert more"):
            run(ablate, *arguments)


def elsewhere(path, folder):
    """A dump's IDs, as from an engine that names no revision."""
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        path = folder / f"engine_{meta['language']}.npz"
        np.savez(path, selected_experts=file["selected_experts"], token_ids=file["token_ids"],
                 sequence_offsets=file["sequence_offsets"], meta=json.dumps(
                     {key: meta[key] for key in ("language", "num_experts")}))
    return path


def test_the_known_revision_counts_for_ids_from_elsewhere(dumps, tmp_path):
    both = analyze.load_languages([elsewhere(dumps[0], tmp_path), dumps[1]])
    assert both[0]["revision"] == both[1]["revision"] == analyze.load_routing(dumps[1])["revision"]
    alone, = analyze.load_languages([elsewhere(dumps[0], tmp_path)])
    assert alone["revision"] is None


def test_a_resumed_run_says_again_how_many_responses_were_cut(dumps, tmp_path):
    for _ in range(2):
        printed = ablation(dumps, "--metrics", "accuracy", "--max-new-tokens", 2,
                           "--out", tmp_path / "r.jsonl")
        assert re.search(r"\n(\d+) of \1 responses were cut at the limit; see --max-new-tokens: ",
                         printed)
