"""Prompts with instructions, where their own text lies, and answers as models write them."""

import contextlib
import io
import json
import sys
from fractions import Fraction

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import ablate
import analyze
import capture
import common
from common import InputError, answer_kind, encode_example, last_number, span_scores

TINY = "tests/tiny_moe"


def run(script, *arguments):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.main()
    return printed.getvalue()


# ----------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("language, text, number", [
    # boxes, the last that holds anything
    ("en", r"\boxed{\text{18}}", 18), ("en", r"\boxed{\mathbf{18}}", 18),
    ("en", r"\boxed{18 \text{ dollars}}", 18), ("en", r"\boxed{18\text{ m}^2}", 18),
    ("en", r"\boxed{18^\circ}", 18), ("en", r"\boxed{18^{\circ}}", 18),
    ("en", r"\boxed{\$18}", 18), ("en", r"\boxed{18\%}", 18), ("en", r"\boxed{x=18}", 18),
    ("en", r"\boxed{18.}", 18), ("en", r"\boxed{ 18 } and 3 more steps", 18),
    ("en", r"\boxed{7} or \boxed{18}; \boxed{} 5", 18), ("en", r"\boxed{}. It is 18", 18),
    ("en", r"$\boxed{18}$", 18), ("en", r"\boxed {18}", 18), ("en", r"\boxed{\underline{18}}", 18),
    ("en", r"\boxed{-18}", -18), ("en", r"\boxed{18\,\text{km}}", 18),
    ("en", r"\boxed{\text{Total: } 18}", 18), ("en", r"\boxed{x}, 5", None),
    # fractions
    ("en", r"\boxed{\frac{1}{2}}", Fraction(1, 2)), ("en", r"\boxed{\dfrac{36}{2}}", 18),
    ("en", r"\boxed{\mathbf{\frac{3}{4}}}", Fraction(3, 4)), ("en", "It is 3/4", Fraction(3, 4)),
    ("en", r"\boxed{-\frac{1}{2}}", Fraction(-1, 2)), ("en", "0.5", Fraction(1, 2)),
    ("en", "18/0", 18),
    # separators
    ("en", r"\boxed{2{,}125}", 2125), ("en", r"\boxed{2\,125}", 2125), ("en", r"2\!125", None),
    ("fr", "2\u202f125", 2125), ("fr", "2\u2009125", 2125), ("sw", "2\u00a0125", 2125),
    ("fr", "2 125 euros", 2125), ("en", "in 2 125 g packs", 125), ("bn", "১,০০,০০০", 100000),
    ("en", "1,00,000", 100000), ("en", "12,34,567.50", Fraction("1234567.5")),
    ("de", "0.125", Fraction("0.125")), ("es", "0,500", Fraction(1, 2)),
    ("de", "2.125", 2125), ("en", "2.125", Fraction("2.125")), ("de", "12,50", Fraction("12.5")),
    ("de", "1.234.567,89", Fraction("1234567.89")), ("en", "1,234,567.89", Fraction("1234567.89")),
    ("es", "1.234,5", Fraction("1234.5")), ("de", "2,125", 2125), ("en", "2'125", 2125),
    ("en", "3, 5 and 18", 18), ("zh", "共2,125元", 2125), ("ja", "２，１２５円", 2125),
    ("en", "1,2,3", 3), ("deu_Latn", "3,5 Liter", Fraction("3.5")),
    # signs and scripts
    ("en", "-$18", -18), ("en", "$-18", -18), ("en", r"\boxed{-\$18}", -18), ("en", "−5", -5),
    ("en", "14-9=5", 5), ("en", "14-9", 9), ("en", "14 - 9", 9), ("en", "so x = -5.", -5),
    ("en", "(3)-4", 4), ("zh", "－１２個", -12), ("bn", "২,১২৫ টাকা", 2125), ("th", "๑๘ บาท", 18),
    ("te", "౧౮", 18), ("ar", "٢٬١٢٥", 2125), ("ar", "٣٫٥", Fraction("3.5")), ("en", "₹500", 500),
    ("en", "€ 20", 20), ("en", "1e5", 100000), ("en", "1E5", 100000),
    ("ro", "1.234 lei", 1234), ("hun_Latn", "12,50", Fraction(25, 2)), ("isl_Latn", "2,5", Fraction(5, 2)), ("en", "2.5e-1", Fraction(1, 4)),
    # none
    ("en", "NaN", None), ("en", "Infinity", None), ("en", "no number here", None), ("en", "", None),
])
def test_what_an_answer_means(language, text, number):
    if text == r"2\!125":  # a negative thin space joins, too
        number = 2125
    found = last_number(text, language)
    assert found == number and (found is None or isinstance(found, Fraction))


def test_an_absurd_exponent_takes_no_time():
    assert last_number("1e999999999") is not None
    assert last_number("so " + "7" * 5000 + "/" + "7" * 5000) == 1  # int() would refuse it


@pytest.mark.parametrize("gold, kind", [
    ("2,125", "number"), ("-3", "number"), ("18", "number"), ("3.5", "number"), ("1e5", "number"),
    (" 7 ", "number"), ("1/2", "number"), ("NaN", "span"), ("Infinity", "span"), ("18 apples", "span"),
    ("", "span"), ("Paris", "span")])
def test_a_gold_is_a_number_if_there_is_nothing_else_in_it(gold, kind):
    assert answer_kind(gold) == kind


def test_a_gold_that_is_no_number_among_numbers_is_an_error(tmp_path):
    (tmp_path / "en.jsonl").write_text('{"prompt": "a", "answer": "NaN"}\n{"prompt": "b", "answer": 3}\n')
    run(capture, "--languages", "en", "--limit", 40, "--out", tmp_path)
    with pytest.raises(InputError, match="mixes kinds of answers"):
        run(ablate, "--routing", tmp_path / "en.npz", "--data", tmp_path / "en.jsonl", "--metrics",
            "accuracy", "--out", tmp_path / "r.jsonl")


# ------------------------------------------------------------------------------------------- spans

@pytest.mark.parametrize("said, golds, language, exact, contains", [
    ("It was Ada Lovelace.", ["Ada Lovelace"], "en", False, True),
    ("ada lovelace", ["Ada Lovelace"], "en", True, True),
    ("14", ["4"], "en", False, False), ("the 4 of them", ["4"], "en", False, True),
    ("在北京市", ["北京"], "zh", False, True), ("", ["x"], "en", False, False),
    ("x", [], "en", False, False), ("", [], "en", True, True), ("the", ["the"], "en", False, False),
    ("Lovelace Ada", ["Ada Lovelace"], "en", False, False),
    ("one or two", ["three", "two"], "en", False, True)])
def test_contains_asks_for_a_gold_in_whole_words(said, golds, language, exact, contains):
    assert span_scores(said, golds, language)[0] == exact
    assert span_scores(said, golds, language, "contains")[0] == contains
    assert span_scores(said, golds, language)[1] == span_scores(said, golds, language, "contains")[1]


# ------------------------------------------------------------------------------------ instructions

@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps({"en": "Put the answer into a box.", "de": "Antworte kurz."}))
    return path


def test_an_instruction_stands_behind_the_prompt_and_is_part_of_the_settings(instructions, tmp_path):
    tokenizer, out = AutoTokenizer.from_pretrained(TINY), tmp_path / "out"
    arguments = ("--languages", "en,de", "--limit", 3, "--out", out)
    run(capture, *arguments, "--instruction", instructions)
    with np.load(out / "en.npz") as file:
        meta, first = json.loads(str(file["meta"])), file["token_ids"][:file["sequence_offsets"][1]]
    prompt = common.read_examples("tests/data/routing_en.tsv")[0]["prompt"]
    whole = f"<bos><|user|>{prompt}\n\nPut the answer into a box.<|assistant|>"
    assert first.tolist() == tokenizer(whole)["input_ids"]
    assert meta["instruction"] == "Put the answer into a box."
    with pytest.raises(InputError, match="other settings .instruction Put the answer"):
        run(capture, *arguments)


@pytest.mark.parametrize("content, message", [
    ('{"de": "Antworte kurz."}', "has no instruction for 'en'"), ("[1]", "is not a JSON object"),
    ("x", "is not a JSON object"), ('{"en": 3}', "has no instruction for 'en'")])
def test_a_language_without_an_instruction_is_named(tmp_path, content, message):
    (tmp_path / "i.json").write_text(content)
    with pytest.raises(InputError, match=message):
        run(capture, "--languages", "en", "--instruction", tmp_path / "i.json", "--out", tmp_path)


def test_predictions_give_the_sequence_that_was_generated(instructions, tmp_path):
    run(capture, "--languages", "en", "--limit", 60, "--out", tmp_path)
    run(ablate, "--routing", tmp_path / "en.npz", "--languages", "en", "--limit", 2, "--bands", "7-7",
        "--instruction", instructions, "--metrics", "accuracy", "--control-seeds", 1,
        "--out", tmp_path / "r.jsonl")
    row = json.loads(open(tmp_path / "r.jsonl").readline())
    with_instruction, without = (
        common.encode_example(AutoTokenizer.from_pretrained(TINY), e)[0] for e in (
            common.read_examples(row["predictions"])[0],
            common.read_examples("tests/data/eval_en.tsv")[0]))
    assert len(with_instruction) > len(without)
    run(capture, "--data", row["predictions"].replace("en.jsonl", "{lang}.jsonl"), "--out",
        tmp_path / "again")
    with np.load(tmp_path / "again/en.npz") as file:
        assert file["token_ids"][:file["prompt_lengths"][0]].tolist() == with_instruction
        assert file["sequence_offsets"][1] > file["prompt_lengths"][0]  # and the response


# ----------------------------------------------------------------------------- the prompt's own text

TEMPLATES = {
    "ChatML": "<|im_start|>system\nYou help the user.<|im_end|>\n<|im_start|>user\n"
              "{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n",
    "trimming": "<|user|>{{ messages[0]['content'] | trim }}<|assistant|>",
    "parts": "<|user|>{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
             "<|assistant|>",
    "none": None}


@pytest.fixture(scope="module")
def joining():
    """A tokenizer that joins a full stop with the line breaks after it, in 400 of the ids."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<bos>", "<eos>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["Who eats it? Anna.\n\nPut it there.\n\nThen go.\n\n"] * 99, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(params=["splitting", "joining"])
def tokenizer(request, joining):
    return AutoTokenizer.from_pretrained(TINY) if request.param == "splitting" else joining


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", ["Anna has 14 apples.", "user", "You help the user.", "  two \n",
                                    "১২ আপেল", "a"])
@pytest.mark.parametrize("instruction", [None, "user: put it into a box."])
def test_the_span_holds_the_prompts_own_text(tokenizer, template, prompt, instruction):
    tokenizer.chat_template = TEMPLATES[template]
    ids, (start, stop) = encode_example(tokenizer, {"prompt": prompt, "instruction": instruction})
    assert tokenizer.decode(ids[start:stop]).strip().startswith(prompt.strip())
    for less in (ids[start + 1:stop], ids[start:stop - 1]):  # and no token more
        assert prompt.strip() not in tokenizer.decode(less)


@pytest.mark.parametrize("template", ["ChatML", "none"])
def test_an_instruction_changes_no_token_of_the_text_before_its_last(tokenizer, template):
    tokenizer.chat_template = TEMPLATES[template]
    spans = []
    for instruction in (None, "Put it there."):
        ids, (start, stop) = encode_example(
            tokenizer, {"prompt": "Who eats it? Anna.", "instruction": instruction})
        spans.append((start, ids[start:stop - 1]))
    assert spans[0] == spans[1] and len(spans[0][1]) > 3


def test_the_joining_tokenizer_joins(joining):
    joining.chat_template = None
    plain, with_instruction = (encode_example(joining, {"prompt": "Anna.", "instruction": i})
                               for i in (None, "Put it there."))
    last = [ids[span[1] - 1] for ids, span in (plain, with_instruction)]
    assert last[0] != last[1] and joining.decode([last[1]]).endswith("\n\n")


def test_without_offsets_the_span_is_what_lies_between_head_and_tail():
    class Slow:  # a tokenizer of characters that knows no offsets
        is_fast, chat_template = False, TEMPLATES["ChatML"]
        apply_chat_template = staticmethod(
            lambda messages, **_: f"<u>{messages[0]['content']}</u>")

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

    ids, (start, stop) = encode_example(Slow(), {"prompt": "a b", "instruction": "c"})
    assert "".join(map(chr, ids)) == "<u>a b\n\nc</u>" and (start, stop) == (3, 6)


def test_part_text_counts_the_text_alone_whatever_stands_around_it(instructions, tmp_path):
    common_arguments = ("--languages", "en,de", "--limit", 20)
    run(capture, *common_arguments, "--out", tmp_path / "plain")
    run(capture, *common_arguments, "--instruction", instructions, "--out", tmp_path / "with")
    run(capture, *common_arguments, "--chat-template", "never", "--out", tmp_path / "never")
    for language in ("en", "de"):
        whole, text, instructed = (
            analyze.load_routing(str(tmp_path / folder / f"{language}.npz"), part)
            for folder, part in (("plain", "all"), ("plain", "text"), ("with", "text")))
        assert whole["num_tokens"] == text["num_tokens"] + 3 * 20  # bos, user, assistant
        # what follows a token cannot change its routing
        assert text["num_tokens"] == instructed["num_tokens"]
        assert np.array_equal(text["counts"], instructed["counts"])
        never = analyze.load_routing(str(tmp_path / "never" / f"{language}.npz"), "text")
        assert never["num_tokens"] == text["num_tokens"]
    printed = run(analyze, tmp_path / "plain/en.npz", tmp_path / "plain/de.npz", "--part", "text",
                  "--out", tmp_path / "a.npz")
    assert f"en {text['num_tokens']:,}" in printed or "tokens  en" in printed


def test_a_dump_without_spans_is_told_to_be_captured_again(tmp_path):
    run(capture, "--languages", "en", "--limit", 3, "--out", tmp_path)
    with np.load(tmp_path / "en.npz") as file:
        arrays = {key: file[key] for key in file if key != "text_spans"}
    np.savez(tmp_path / "en.npz", **arrays)
    with pytest.raises(analyze.InputError, match="holds no text_spans.*capture it again with --overw"):
        analyze.load_routing(str(tmp_path / "en.npz"), "text")


def test_spans_are_cut_with_the_sequence(tmp_path):
    run(capture, "--languages", "en", "--limit", 3, "--max-length", 8, "--out", tmp_path)
    with np.load(tmp_path / "en.npz") as file:
        assert file["text_spans"].tolist() == [[2, 8]] * 3 and file["text_spans"].dtype == np.int64


def test_experts_are_chosen_from_the_part_that_is_asked_for(tmp_path):
    run(capture, "--languages", "en,sw", "--limit", 60, "--out", tmp_path)
    digests = []
    for part in ("all", "text"):
        run(ablate, "--routing", tmp_path / "en.npz", tmp_path / "sw.npz", "--languages", "en",
            "--limit", 2, "--bands", "7-7", "--control-seeds", 1, "--part", part,
            "--out", tmp_path / f"{part}.jsonl")
        row = json.loads(open(tmp_path / f"{part}.jsonl").readlines()[-1])
        digests.append(row["settings"]["dumps"])
        assert row["settings"]["part"] == part
    assert digests[0] != digests[1]
