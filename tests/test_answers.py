"""Answers are scored as a careful person would: kinds of right answers, numbers, spans, languages.

In this order: rows and kinds, letters, thinking, numbers, mathematics, spans, languages, metrics.
"""

import copy
import json
import sys
import time
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from common import (InputError, answer_kind, encode_examples, final_answer, generate, last_number,
                    read_examples, score_prompts, score_response, score_responses, span_scores)
from test_scoring import write

NEEDS_MATH = "math-verify, which compares formulas, is optional"
NEEDS_LANGID = "py3langid, which detects languages, is optional"


def read_row(tmp_path, **row):
    """Return the example of a .jsonl file with this row."""
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "p"} | row))
    return read_examples(path)[0]


# ----------------------------------------------------------------------------------- rows and kinds

@pytest.mark.parametrize("row", [
    {"answer": ["a", None]}, {"answer": {"a": 1}}, {"answer": True}, {"answer": "\ud83d"},
    {"response": ["a"]}, {"answer": "a", "kind": ["span"]}, {"answer": "a", "kind": "choice"},
    {"answer": "unknown", "kind": "number"}, {"answer": " ", "kind": "math"}])
def test_an_answer_that_cannot_be_compared_is_refused(tmp_path, row):
    with pytest.raises(InputError, match="a.jsonl:1: .*(text|number)"):
        read_row(tmp_path, **row)


@pytest.mark.parametrize("more", [
    {"context": "b", "answers": {"text": ["c"]}}, {"choices": ["b", "c"]}, {"text": "b"},
    {"A": "b", "B": "c"}, {"opa": "b", "opb": "c"}, {"mc1_targets": {}, "options": ["b"]},
    {"Passage": "b"}, {"support": "b"}, {"sol1": "b"}, {"ending0": "b"}, {"distractor1": "b"},
    {"article": "b"}, {"lesson_context": "b"}])
def test_fields_that_would_be_ignored_are_refused(tmp_path, more):
    row = {"question": "a", "answer": 1, **more}
    with pytest.raises(InputError, match='a.jsonl:1: .* put all that is asked into "prompt"'):
        read_row(tmp_path, prompt=None, **row)
    assert read_row(tmp_path, **row | {"prompt": "b a"})["prompt"] == "b a"
    empty = {key: None for key in more}
    assert read_row(tmp_path, prompt=None, **row | empty)["prompt"] == "a"


def test_a_text_with_options_is_refused_only_if_it_is_a_question(tmp_path):
    row = {"prompt": None, "text": "a", "options": ["b"]}
    assert read_row(tmp_path, **row)["prompt"] == "a"
    with pytest.raises(InputError, match="options"):
        read_row(tmp_path, **row, answer=3)


KINDS = {
    "number": ["2,125", "-3", "3.5", "1e5", " 7 ", "$18", "18$", "$18$", r"\$2,125.50", "50%",
               r"18\%", "-$5", "−5", "+5", "1/2", "3 1/2", "½", "2½", r"\frac{1}{2}", r"\frac12",
               r"-\dfrac{1}{2}", r"3\frac{1}{2}", "2{,}125", r"10,\!800", "১২", "١٢", "٣٫٥", "２",
               "27万", "€ 20"],
    "math": [r"\sqrt{3}", "2^{10}", "2^{20}3^{10}", r"\frac{\sqrt{5}}{5}", "[2,3)",
             r"\frac{\pi}{3}", "10^3", "10³", r"60^\circ", "90°", "(x+1)^2", "x=2", "x = 2",
             "p - q", "6 - 5i", "3×4", "3 * 4", "$x$", "|x|", "(3, 4)", "π/2", "√2", "<5",
             r"\text{Evelyn}", r"5 \text{ cm}", "4210_{5}", r"3 \pm 2 \sqrt{2}", "১২^2",
             r"\sqrt{x+1}", r"(-\infty, 2)"],
    "span": ["24–10", "24-10", "$100 million", "1/3 of it", "18 apples", "2:3", "4:30",
             "2005-10-12", "10/12/2005", "NaN", "Infinity", "", "C++", "A+", "N/A", "A/B", "n/a",
             "M*A*S*H", "F-16", "50+", "5%0", "(1990)", "Paris", "北京", "এবং = x", "2,3", "5 m",
             "km/h"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_an_answer_is_a_number_only_if_nothing_of_it_is_lost(kind):
    for answer in KINDS[kind]:
        assert answer_kind([answer]) == kind, answer


@pytest.mark.parametrize("answers, kind", [
    (["1/2", "0.5"], "number"), (["3", r"\sqrt{9}"], "math"), (["3", "three"], "span"),
    ([r"\sqrt{9}", "three"], "span"), ([], "span")])
def test_several_answers_have_the_kind_that_suits_all(answers, kind):
    assert answer_kind(answers) == kind


def test_gsm8ks_rationale_is_no_part_of_the_number(tmp_path):
    example = read_row(tmp_path, answer="He sold 48/2 = <<48/2=24>>24 clips.\n#### 1,072")
    assert (example["answer"], example["kind"]) == (["1,072"], "number")


@pytest.mark.parametrize("letter", ["A", "b", " C ", "(A)", "D.", "E)", "x"])
def test_a_lone_letter_without_options_is_refused(tmp_path, letter):
    with pytest.raises(InputError, match='a.jsonl:1: .*could be a choice or a text.* "kind"'):
        read_row(tmp_path, answer=letter)
    with pytest.raises(InputError, match="a.tsv:1: .*could be a choice or a text"):
        read_examples(write(tmp_path / "a.tsv", f"p\t{letter}\n"))
    assert read_row(tmp_path, answer=letter, kind="span")["answer"] == [letter]


# ------------------------------------------------------------------------------------------ letters

GLOBAL_MMLU = {"question": "Q?", "option_a": "w", "option_b": "x", "option_c": "y", "option_d": 0,
               "answer": "D", "subject": "s"}
MMLU_PROX = {"question": "Q?", "answer": "C", "answer_index": 2, "option_0": "w", "option_1": "N/A",
             "option_2": "y", "option_3": "N/A", "option_4": None, "option_5": ""}


@pytest.mark.parametrize("row, prompt", [
    (GLOBAL_MMLU, "Q?\nA. w\nB. x\nC. y\nD. 0"), (MMLU_PROX, "Q?\nA. w\nB. N/A\nC. y")])
def test_a_row_with_options_becomes_a_choice(tmp_path, row, prompt):
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    expected = {"prompt": prompt, "answer": [row["answer"]], "kind": "choice"}
    assert read_examples(path) == [expected]
    write(tmp_path / "a.jsonl", json.dumps(row | {"instruction": "i", "response": "r"}))
    assert read_examples(path) == [expected | {"instruction": "i", "response": "r"}]
    write(tmp_path / "a.jsonl", json.dumps(row | {"prompt": "my own", "kind": "choice"}))
    assert read_examples(path)[0]["prompt"] == "my own"
    for answer in ("E", "", None, 3):
        write(tmp_path / "a.jsonl", json.dumps(row | {"answer": answer}))
        with pytest.raises(InputError, match="a.jsonl:1: not a question with options"):
            read_examples(path)


def most_probable(model, tokenizer, example, letters):
    """Return the letter whose token is most probable behind a prompt alone."""
    with torch.no_grad():
        logits = model(torch.tensor([example["ids"]])).logits[0, -1]
    return max(letters, key=lambda letter: logits[tokenizer(letter)["input_ids"][0]])


@pytest.mark.parametrize("golds, letters", [("AB", "ABCD"), ("ABCDEF", "ABCDEF")])
def test_a_letter_is_chosen_of_a_to_d_or_as_far_as_the_answers_go(tiny, golds, letters):
    model, tokenizer = tiny  # which has no token of " A"
    prompts = [example["prompt"] for example in read_examples("tests/data/eval_en.tsv")[:12]]
    examples = [{"prompt": prompt, "answer": [gold, "B"], "kind": "choice"}
                for prompt in prompts for gold in golds]
    encoded = encode_examples(tokenizer, examples)
    chosen = [most_probable(model, tokenizer, example, letters) for example in encoded]
    assert len(set(chosen)) > 1
    assert ("E" in chosen) == ("E" in golds)  # it is the most probable of A to F, mostly
    accuracy = score_prompts(model, tokenizer, encoded, batch_tokens=200)["accuracy"]
    expected = [letter in each["answer"] for letter, each in zip(chosen, examples)]
    assert accuracy.tolist() == expected


@pytest.mark.parametrize("vocabulary, forms", [
    ("A B ĠA ĠB", [[0, 1], [2, 3]]), ("A B ▁A ▁B", [[0, 1], [2, 3]]), ("A B ĠA", [[0, 1]]),
    ("ĠB ▁A ▁B", [[1, 2]]), ("x", [[65, 66]])])
def test_a_letter_has_the_forms_that_are_one_token_for_all_letters(vocabulary, forms):
    tokens = {token: i for i, token in enumerate(vocabulary.split())}
    tokenizer = SimpleNamespace(get_vocab=lambda: tokens,
                                encode=lambda letter, **options: [ord(letter), 7])
    assert common.letter_tokens(tokenizer, "AB") == forms


def test_letters_that_start_with_the_same_token_are_refused():
    tokenizer = SimpleNamespace(get_vocab=dict, encode=lambda letter, **options: [7, ord(letter)])
    with pytest.raises(InputError, match="ABCD"):
        common.letter_tokens(tokenizer, "ABCD")


def test_the_larger_logit_of_a_letters_forms_counts(monkeypatch):
    tokens = {token: i for i, token in enumerate("A B C D ĠA ĠB ĠC ĠD".split())}
    logits = torch.tensor([[[3.0, 2, 1, 0, 0, 9, 0, 0], [0.0] * 8]])
    monkeypatch.setattr(common, "padded_batch", lambda *arguments: None)
    monkeypatch.setattr(common, "compute_logits", lambda model, ids: logits)
    example = {"ids": [0], "answer_ids": [1], "text_span": (0, 1)}
    example |= {"answer": ["B"], "kind": "choice"}
    tokenizer = SimpleNamespace(get_vocab=lambda: tokens)
    assert score_prompts(None, tokenizer, [example])["accuracy"].tolist() == [1]
    logits[0, 0, 0] = 10
    assert score_prompts(None, tokenizer, [example])["accuracy"].tolist() == [0]


# ----------------------------------------------------------------------------------------- thinking

RESPONSES = [  # response, whether the prompt has started to think, answer
    (r"Is it \boxed{17}? No.</think>The answer is 18.", False, "The answer is 18."),
    (r"Is it \boxed{17}? No.</think>The answer is 18.", True, "The answer is 18."),
    ("<think>First 9*2", False, None), ("First 9*2", True, None), ("It is 18.", False, "It is 18."),
    ("<think>a</think>b<think>c</think> 18", False, "18"), ("", True, None), ("", False, ""),
    ("<think>a</think>b <think>c", False, None), ("<think>\n\n</think>\n\n18\n", False, "18"),
    ("<|START_THINKING|>17<|END_THINKING|>18", False, "18"),
    ("<|channel|>analysis<|message|>17<|end|><|start|>assistant<|channel|>final<|message|>18", True,
     "18"),
    ("<|channel|>final<|message|>18", True, "18"), ("<|channel|>analysis<|message|>17", True, None),
    ("<|channel|>commentary<|message|>17", True, None), ("<|think|>17<|content|>18", True, "18"),
    ("<think>17</think>\n<answer>\n18\n</answer>", False, "18"),
    ("17[/THINK]19</think>18", False, "18"), ("</think><response>18</response>", True, "18"),
    ("<answer>", False, "<answer>"),
]


@pytest.mark.parametrize("response, in_thinking, answer", RESPONSES)
def test_the_answer_is_what_stands_behind_the_last_end_of_thinking(response, in_thinking, answer):
    assert final_answer(response, in_thinking) == answer


@pytest.mark.parametrize("start, end", common.THINKING_MARKERS)
def test_every_familys_thinking_is_taken_off(start, end):
    assert final_answer(f"{start}17{end}18") == "18"
    assert final_answer(f"17{end}18", in_thinking=True) == "18"
    assert final_answer(f"{start}17") is None
    assert final_answer(f"{start}17{end}18{start}19") is None
    assert common.ends_in_thinking(f"<|user|>Hi<|assistant|>{start}\n")
    assert not common.ends_in_thinking(f"<|user|>{start}Hi<|assistant|>")
    assert not common.ends_in_thinking(f"Hi<|assistant|>{start}\n\n{end}\n\n")


def test_thinking_counts_in_no_score():
    pytest.importorskip("py3langid", reason=NEEDS_LANGID)
    number = {"answer": ["18"], "kind": "number"}
    assert score_response(r"Is it \boxed{17}? No.</think>The answer is 18.", number) == 1
    assert score_response("<think>First 9*2", number | {"answer": ["2"]}) == 0
    assert score_response("It is 18.", number | {"in_thinking": True}) == 0
    span = {"answer": ["Paris"], "kind": "span"}
    responses = ["<think>Is it Rome?</think>\n\nParis.", "<think>Paris"]
    scores = score_responses(responses, [span] * 2, ["accuracy"], "en")
    assert scores["accuracy"].tolist() == scores["f1"].tolist() == [1, 0]
    responses = ["The user wants the answer in German.</think>Die Antwort ist 29.",
                 "Der Nutzer fragt nach einer Zahl.</think>The answer is 29.", "<think>Die Antwort"]
    scores = score_responses(responses, [number] * 3, ["language"], "de")
    np.testing.assert_array_equal(scores["language"], [1, 0, np.nan])


def test_markers_that_are_special_tokens_are_decoded_and_no_others(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    markers = ["<|START_THINKING|>", "<|END_THINKING|>", "<|channel|>", "<|message|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*markers, "<|return|>"]})
    text = "<|START_THINKING|>17<|END_THINKING|>18<pad><|return|><eos>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert common.decode_response(tokenizer, ids) == "<|START_THINKING|>17<|END_THINKING|>18"
    text = "<|channel|>final<|message|>18<|return|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert final_answer(common.decode_response(tokenizer, ids)) == "18"


def test_thinking_that_does_not_end_counts_as_cut(tiny):
    model, tokenizer = tiny
    encoded = encode_examples(tokenizer, read_examples("tests/data/eval_en.tsv")[:4])
    _, num_cut = generate(model, tokenizer, encoded, max_new_tokens=32)
    assert num_cut == 0
    thinking = [example | {"in_thinking": True} for example in encoded]
    _, num_cut = generate(model, tokenizer, thinking, max_new_tokens=32)
    assert num_cut == 4


@pytest.mark.parametrize("end", ["<think>\n", "<|start|>assistant", "<|begin|>assistant"])
def test_a_letter_cannot_follow_a_prompt_that_ends_in_thinking(tiny, end):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{{ messages[0]['content'] }}" + end
    choices = [{"prompt": "Hi", "answer": ["A"], "kind": "choice"}]
    encoded = encode_examples(tokenizer, choices)
    with pytest.raises(InputError, match="a.txt: no letter .*--chat-template-options"):
        common.check_metrics(["accuracy"], encoded, "a.txt", "en")
    common.check_metrics(["answer_nll"], encoded, "a.txt", "en")
    common.check_metrics(["accuracy"], encode_examples(tiny[1], choices), "a.txt", "en")


# ------------------------------------------------------------------------------------------ numbers

NUMBERS = {  # claim: (language, text, number)
    "the last box that holds anything is the answer": [
        ("en", r"First 7, so \boxed{12}, not 13.", 12), ("en", r"\boxed{7} or \boxed{18}", 18),
        ("en", r"\boxed{18}; \boxed{} 5", 18), ("en", r"\boxed{}. It is 18", 18),
        ("en", r"\boxed{x}, 5", None), ("en", r"5 or \boxed{x}", None),
        ("en", r"\boxed{ 18 } and 3 more steps", 18), ("en", r"\boxed {18}", 18)],
    "LaTeX around a number does not count": [
        ("en", r"\boxed{\text{18}}", 18), ("en", r"\boxed{\mathbf{18}}", 18),
        ("en", r"\boxed{18 \text{ dollars}}", 18), ("en", r"\boxed{18\text{ m}^2}", 18),
        ("en", r"\boxed{18^\circ}", 18), ("en", r"\boxed{18^{\circ}}", 18),
        ("en", r"\boxed{\$18}", 18), ("en", r"\boxed{18\%}", 18), ("en", r"\boxed{x=18}", 18),
        ("en", r"\boxed{18.}", 18), ("en", r"$\boxed{18}$", 18), ("en", r"\boxed{-\$18}", -18),
        ("en", r"\boxed{\underline{18}}", 18), ("en", r"\boxed{18\,\text{km}}", 18),
        ("en", r"\boxed{\text{Total: } 18}", 18)],
    "a fraction is exact": [
        ("en", r"\boxed{\frac{1}{2}}", Fraction(1, 2)), ("en", r"\boxed{\dfrac{36}{2}}", 18),
        ("en", r"\boxed{\mathbf{\frac{3}{4}}} of 5", Fraction(3, 4)), ("en", "18/0", 18),
        ("en", r"\boxed{-\frac{1}{2}}", Fraction(-1, 2)), ("en", "It is 3/4", Fraction(3, 4)),
        ("en", "It is 3 / 4", Fraction(3, 4)), ("en", "0.1", Fraction(1, 10))],
    "a separator of thousands joins, in every language": [
        ("en", "She has $2,125 left. The answer is 2,125.", 2125), ("zh", "共2,125元", 2125),
        ("en", r"\boxed{2{,}125}", 2125), ("en", r"\boxed{1} then \boxed{\$2{,}125}", 2125),
        ("en", r"\boxed{2\,125}", 2125), ("en", r"2\!125", 2125), ("en", "2'125", 2125),
        ("sw", "2\u00a0125", 2125), ("fr", "Elle a 2\u202f125 pommes", 2125),
        ("fr", "2\u2009125", 2125), (None, "114,200", 114200), ("de", "2,125", 2125),
        ("en", "1,00,000", 100000), ("bn", "উত্তর: ১,০০,০০০ টাকা", 100000),
        ("en", "3, 5 and 18", 18), ("en", "1,2,3", 3), ("en", "in 2 125 g packs", 125)],
    "a comma is decimal where the language has it so": [
        ("de", "Der Gewinn beträgt 2.125 Euro.", 2125), ("en", "2.125", Fraction(2125, 1000)),
        ("fr", "2 125 euros", 2125), ("de", "12,50", Fraction(25, 2)), ("ro", "1.234 lei", 1234),
        ("de", "Das sind 3,5 Liter.", Fraction(7, 2)), ("deu_Latn", "3,5", Fraction(7, 2)),
        ("hun_Latn", "12,50", Fraction(25, 2)), ("isl_Latn", "2,5", Fraction(5, 2)),
        ("es", "Gana 1.234,50 dólares", Fraction(2469, 2)), ("de", "0.125", Fraction(1, 8)),
        ("es", "0,500", Fraction(1, 2)), ("de", "1.234.567,89", Fraction(123456789, 100)),
        ("en", "1,234,567.89", Fraction(123456789, 100)), ("en", "0.5", Fraction(1, 2)),
        ("en", "12,34,567.50", Fraction(2469135, 2)), ("en", "It costs $3.50.", Fraction(7, 2))],
    "a minus is a sign unless it subtracts": [
        ("en", "It fell to -7 degrees.", -7), ("en", "He lost -$5", -5), ("en", "$-18", -18),
        ("fr", "Il reste −4", -4), ("en", "so x = -5.", -5), ("en", "14-9=5", 5),
        ("en", "14-9", 9), ("en", "14 - 9", 9), ("en", "(3)-4", 4)],
    "digits of every script are digits": [
        ("bn", "তিনি ৯ × ২ = ১৮ ডলার পান।", 18), ("bn", "২,১২৫ টাকা", 2125), ("te", "౧౮", 18),
        ("ar", "الجواب ٢٬١٢٥", 2125), ("ar", "٣٫٥", Fraction(7, 2)), ("th", "๑๘ บาท", 18),
        ("ja", "答えは１２５個です。", 125), ("ja", "答えは２，１２５円です。", 2125),
        ("zh", "小明有3个，小红有－12个", -12), ("zh", "所以，她每天赚18美元。", 18)],
    "a currency or an exponent belongs to its number": [
        ("en", "₹500", 500), ("en", "€ 20", 20), ("en", "1e5", 100000), ("en", "1E5", 100000),
        ("en", "2.5e-1", Fraction(1, 4))],
    "LaTeX of every form is read": [
        ("en", r"\boxed{10,\!800}", 10800), ("en", r"11,\! 111,\! 100", 11111100),
        ("en", r"\frac12", Fraction(1, 2)), ("en", r"\frac{3}4", Fraction(3, 4)),
        ("en", r"\cfrac{3}{4}", Fraction(3, 4)), ("en", r"\frac{10^3}{2}", 500),
        ("en", r"\boxed{{18}}. That is 3 more", 18), ("en", r"\boxed{\boxed{18}} 3", 18),
        ("en", r"\left(\frac{1}{2}\right)", Fraction(1, 2)), ("en", r"\boxed{18 and 3", 3),
        ("en", r"so -\mathbf{5}", -5), ("en", r"so -\frac{1}{2}", Fraction(-1, 2))],
    "a mixed number is one number": [
        ("en", r"\boxed{3\frac{1}{2}}", Fraction(7, 2)), ("en", "2½", Fraction(5, 2)),
        ("en", "3 1/2", Fraction(7, 2)), ("en", "½", Fraction(1, 2)), ("en", "2 ½", Fraction(5, 2)),
        ("en", r"\boxed{-3\frac{1}{2}}", Fraction(-7, 2)), ("en", "so -½", Fraction(-1, 2))],
    "a number may start with its point": [
        ("en", ".5", Fraction(1, 2)), ("de", ",5", Fraction(1, 2)), ("en", "a.5", 5),
        ("de", "Das sind ,5 Liter", Fraction(1, 2)), ("en", "so -.5", Fraction(-1, 2))],
    "powers are computed": [
        ("en", r"\boxed{10^3}", 1000), ("en", r"1.5 \times 10^3", 1500), ("en", "10³", 1000),
        ("en", "1.5 × 10³ m", 1500), ("en", "1.5*10^{3}", 1500),
        ("en", "10^{-2}", Fraction(1, 100)), ("en", "2^{10}", 1024), ("en", "0^0", 0)],
    "the exponent of a unit or of a letter is none of the number": [
        ("en", r"\boxed{18 m2}", 18), ("en", r"\boxed{18 cm^2}", 18), ("en", "18 cm²", 18),
        ("en", r"18 \text{ cm}^{2}", 18), ("en", "x^2 = 16", 16)],
    "units of Chinese, Japanese and Korean numbers multiply": [
        ("ja", "27万6000円", 276000), ("zh", "1.8万元", 18000), ("ko", "27만 6000원", 276000),
        ("zh", "2万5千", 25000), ("ja", "5千万円", 5 * 10**7), ("zh", "1,234万", 12340000),
        ("zh", "３億", 3 * 10**8), ("zh", "有3个,1万", 10000)],
    "characters that only look like such units do not": [
        ("zh", "3千克", 3), ("zh", "5千米", 5), ("ko", "3만큼", 3), ("zh", "2万\n3. 完", 3)],
    "a currency behind a number does not join the next one": [
        ("en", "9$ 18 times", 18), ("en", "$9$ $18$", 18), ("en", "$9$$2$", 2), ("en", "1$2", 2),
        ("en", "14$ - 9$", 9), ("en", "18€", 18)],
    "a dash between words and a number is no sign": [
        ("de", "Antwort – 18", 18), ("en", "Answer - $18", 18), ("en", "So:\n- 18 dollars", 18),
        ("en", "50% - 20%", 20), ("en", r"\boxed{- 18}", -18), ("en", "x = - 18", -18)],
    "a text without digits has no number": [
        ("en", "NaN", None), ("en", "Infinity", None), ("en", "nothing", None), ("en", "", None)],
}


@pytest.mark.parametrize("claim", NUMBERS)
def test_the_number_that_a_text_gives_as_its_answer(claim):
    for language, text, number in NUMBERS[claim]:
        found = last_number(text, language)
        assert found == number, (language, text)
        assert found is None or isinstance(found, Fraction)


def test_absurd_numbers_have_values():
    assert last_number("1e999999999") is not None
    assert last_number("so " + "7" * 5000 + "/" + "7" * 5000) == 1
    assert last_number("7" * 5000 + "^999") is not None


LONG = ["7" * 10000, "1." + "7" * 9990 + "^999", "1,1" * 3000, "1,,1" * 2500, "11," * 3300 + "1",
        "1 " + " " * 9990, "1^" + " " * 9990, "^ {" * 3000, "a " * 5000, "$ " * 5000, "- " * 5000,
        r"\boxed{" * 1400, "{" * 10000, r"\frac{" * 1600, r"\text{a" * 1400 + "}" * 1400,
        "1万" * 5000, "1" + " " * 9990 + "*", "(," * 5000, "|a" * 5000, "a-" * 5000,
        "½" * 9990, "1⁰" * 5000, "<think>" * 1400, "√(" * 5000, "\\" * 10000, "1.2" * 3300]


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_a_long_text_takes_no_time(text):
    started = time.process_time()
    for language in ("en", "de"):
        last_number(text, language)
    answer_kind([text])
    final_answer(text)
    span_scores(text, ["10"], "zh", score="contains")
    common.plain_formula(text)
    assert time.process_time() - started < 1  # a tenth, where nothing is quadratic


def test_a_response_is_right_if_its_number_equals_a_right_answer():
    examples = [{"answer": ["2.125", "9"], "kind": "number"}] * 4
    responses = ["2,125", "2.125", "9,0", "none"]  # the language is that of the response alone
    scores = score_responses(responses, examples, ["accuracy"], "de")
    assert list(scores) == ["accuracy"]
    assert scores["accuracy"].tolist() == [0, 0, 1, 0]
    scores = score_responses(responses, examples, ["accuracy", "prompt_nll"], "en")
    assert scores["accuracy"].tolist() == [0, 1, 0, 0]
    assert [score_response(response, examples[0], "en") for response in responses] == [0, 1, 0, 0]


# -------------------------------------------------------------------------------------- mathematics

@pytest.mark.parametrize("gold, response, right", [
    (r"\sqrt{7}", r"\boxed{7}", False), (r"\sqrt{7}", r"\boxed{\sqrt{7}}", True),
    (r"-\frac{\sqrt{5}}{5}", r"\boxed{-1/\sqrt 5}", True), ("2^{10}", r"\boxed{1024}", True),
    ("2^{20}3^{10}", r"\boxed{2^{20} \cdot 3^{10}}", True), ("[2,3)", r"\boxed{(2,3)}", False),
    ("[2,3)", r"\boxed{[2,3)}", True), (r"\frac{\pi}{3}", r"\boxed{\pi/3}", True),
    ("x=2", r"\boxed{2}", True), ("(x+1)^2", r"\boxed{x^2+2x+1}", True), ("10³", "1000", True),
    (r"60^\circ", r"\boxed{60^{\circ}}", True), ("١٢^2", r"\boxed{১৪৪}", True),
    (r"\sqrt{3}", r"The answer is $\sqrt{3}$.", True), (r"\sqrt{3}", r"\sqrt{3}", True),
    (r"\sqrt{3}", "√3", True), ("√3", r"\boxed{\sqrt3}", True), (r"\sqrt{3}", "none", False),
    (r"\sqrt{3}", r"\boxed{\sqrt{3}}</think>\boxed{3}", False), (r"\sqrt{3}", "", False),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", True), ("$x$", r"\boxed{$x$}", True),
    ("−√2", r"\boxed{-\sqrt{2}}", True)])
def test_formulas_are_compared_by_what_they_mean(gold, response, right):
    pytest.importorskip("math_verify", reason=NEEDS_MATH)
    assert score_response(response, {"answer": [gold], "kind": "math"}) == right


def test_numbers_and_formulas_may_stand_in_one_file():
    pytest.importorskip("math_verify", reason=NEEDS_MATH)
    examples = [{"answer": [r"\sqrt{9}", "4"], "kind": "math"},
                {"answer": ["18"], "kind": "number"}]
    common.check_metrics(["accuracy"], examples, "a.txt", "en")
    scores = score_responses([r"\boxed{3}", "18 apples"], examples, ["accuracy"], "en")
    assert list(scores) == ["accuracy"] and scores["accuracy"].tolist() == [1, 1]
    assert score_responses(["4", "3"], examples, ["accuracy"], "en")["accuracy"].tolist() == [1, 0]


def test_without_math_verify_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install 'math-verify") as error:
        common.check_metrics(["accuracy"], [{"kind": "math"}], "a.txt", "en")
    assert "\n" not in str(error.value)
    common.check_metrics(["answer_nll"], [{"kind": "math"}], "a.txt", "en")


# -------------------------------------------------------------------------------------------- spans

@pytest.mark.parametrize("prediction, golds, language, exact, contains, f1", [
    ("The Eiffel Tower!", ["eiffel tower"], "en", True, True, 1),
    ("a fox or an owl", ["“the fox”, or owl"], "en", True, True, 1),
    ("It was Ada Lovelace.", ["Ada Lovelace"], "en", False, True, 2 * 2 / (4 + 2)),
    ("Lovelace Ada", ["Ada Lovelace"], "en", False, False, 1),
    ("in the old town", ["town hall", "old town", "x"], "en", False, True, 2 * 2 / (3 + 2)),
    ("one or two", ["three", "two"], "en", False, True, 2 * 1 / (3 + 1)),
    ("go go go", ["go go"], "en", False, True, 2 * 2 / (3 + 2)),
    ("14", ["4"], "en", False, False, 0),  # whole words
    ("it costs $5", ["5"], "en", False, True, 2 * 1 / (3 + 1)),
    ("U.S.A.", ["usa"], "en", True, True, 1),
    ("北京市", ["北京"], "zh", False, True, 2 * 2 / (3 + 2)),  # by character
    ("กรุงเทพ", ["กรุง เทพ"], "tha_Thai", True, True, 1),
    ("a das", ["das"], "zh", False, True, 2 * 3 / (4 + 3)),
    ("", ["x"], "en", False, False, 0), ("", [""], None, False, False, 0),
    ("...", ["the"], None, False, False, 0), ("the", ["the"], "en", True, True, 1),
    ("A.", ["a"], "en", True, True, 1), ("The The", ["The The"], "en", True, True, 1),
    ("I saw The The live", ["The The"], "en", False, True, 0),
    ("x", ["..."], "en", False, False, 0),
    ("a cat", ["the cat"], "en", True, True, 1), ("an", ["the"], "en", False, False, 0),
    ("Zu\u0308rich", ["Z\u00fcrich"], "de", True, True, 1),
    ("Pittsburgh Steelers'ı", ["Pittsburgh Steelers"], "tr", False, True, 0.5),
    ("six-time champion", ["six"], "en", False, True, 0),
    ("won 24–10", ["10"], "en", False, True, 0), ("2,010 men", ["10"], "en", False, False, 0),
    ("10000 men", ["10,000"], "en", False, True, 2 * 1 / (2 + 1)),
    ("2010年", ["10"], "zh", False, False, 2 * 2 / (5 + 2)),
    ("2010年10月", ["10"], "zh", False, True, 2 * 2 / (8 + 2)),
    ("5、10、15", ["10"], "zh", False, True, 2 * 2 / (5 + 2)),
    ("3.10", ["10"], "ja", False, False, 2 * 2 / (3 + 2)),
    ("北 京、上海", ["北京"], "zh", False, True, 2 * 2 / (4 + 2)),
    ("", [], "en", True, True, 1), ("x", [], "en", False, False, 0),  # SQuAD's unanswerable ones
])
def test_spans_are_scored_as_squad_does(prediction, golds, language, exact, contains, f1):
    assert span_scores(prediction, golds, language) == (exact, pytest.approx(f1))
    found = span_scores(prediction, golds, language, score="contains")
    assert found == (contains, pytest.approx(f1))


def test_a_span_has_its_f1_beside_it():
    examples = [{"answer": ["Ada L.", "Ada"], "kind": "span"}] * 2
    responses = ["Ada!", "Ada and Bob"]
    scores = score_responses(responses, examples, ["accuracy"], "en")
    assert list(scores) == ["accuracy", "f1"]
    assert scores["accuracy"].tolist() == [1, 0]
    assert scores["f1"].tolist() == [1, 2 * 1 / (3 + 1)]
    scores = score_responses(responses, examples, ["accuracy"], "en", score="contains")
    assert scores["accuracy"].tolist() == [1, 1]



def test_a_generated_letter_is_right_alone():
    example = {"answer": ["B"], "kind": "choice"}
    for response in ("B", " (B).\n", "**B**", r"\boxed{B}", "<think>A</think>B"):
        assert score_response(response, example) == 1
    for response in ("C", "A B", ""):
        assert score_response(response, example) == 0


# ---------------------------------------------------------------------------------------- languages

LANGUAGES = ["de", "zh", "bn", "sw", "fr", "es", "ru", "ja", "th", "te"]
SHORT_ANSWERS = {
    "de": ["Die Antwort ist 29.", "Der Hund", "Nein", r"\text{Die Antwort}"],
    "zh": [r"答案是 \boxed{29}", "北京", "東京"], "sw": ["Jibu ni 29.", "Ndiyo"],
    "fr": ["La réponse est 29."], "es": ["La respuesta es 29."], "ru": ["Ответ: 29.", "Москва"],
    "ja": ["答えは29です。", "東京です"], "bn": ["উত্তর হল ২৯"], "te": ["జవాబు 29"],
    "th": ["คำตอบคือ 29"], "en": ["The answer is 29.", "29 apples", "New York City"],
}


@pytest.mark.parametrize("language", SHORT_ANSWERS)
def test_a_short_answer_is_in_its_language_and_in_no_other(language):
    pytest.importorskip("py3langid", reason=NEEDS_LANGID)
    responses = SHORT_ANSWERS[language]
    for candidates in (LANGUAGES, []):
        assert common.language_scores(responses, language, candidates) == [1.0] * len(responses)
    for other in {*LANGUAGES, "en"} - {language}:
        assert common.language_scores(responses, other, LANGUAGES) == [0.0] * len(responses)


def test_a_language_that_was_not_expected_is_none_of_the_expected_ones():
    pytest.importorskip("py3langid", reason=NEEDS_LANGID)
    responses = ["北京", "Москва", "উত্তর হল ২৯", "Jibu ni 29."]
    for language in ("de", "en", "te"):
        assert common.language_scores(responses, language, []) == [0.0] * 4


def test_a_response_without_letters_or_evidence_is_in_no_known_language():
    pytest.importorskip("py3langid", reason=NEEDS_LANGID)
    responses = ["29", "", None, r"\boxed{29}", r"$18 = 9 \times 2$", "x", "Paris", "29 km", "!"]
    assert np.isnan(common.language_scores(responses, "de", LANGUAGES)).all()
    assert np.isnan(common.language_scores(["29", "Paris"], "en", [])).all()


@pytest.mark.parametrize("language, expected", [
    ("en", [1, 0, 0]), ("eng_Latn", [1, 0, 0]), ("deu_Latn", [0, 0, 1]), ("zh-Hans", [0, 1, 0]),
    ("zho_Hant", [0, 1, 0]), ("zh", [0, 1, 0])])
def test_a_language_is_known_by_any_of_its_codes(language, expected):
    pytest.importorskip("py3langid", reason=NEEDS_LANGID)
    responses = ["The answer is four.", "这个问题的答案是四。", "Der Apfel liegt auf dem Tisch."]
    scores = score_responses(responses, [{}] * 3, ["language"], language, languages=["deu_Latn"])
    assert list(scores) == ["language"]
    assert scores["language"].tolist() == expected


def test_of_expected_languages_the_most_probable_one_is_detected():
    nats = {"de": -20.0, "en": -25.0, "fr": -30.0, "zz": -18.0, "zh": -99.0}
    score = common.language_score
    assert score(nats, "de", {"en", "fr"}) == 1
    assert score(nats, "en", {"de", "fr"}) == 0
    assert np.isnan(score(nats | {"en": -20.5}, "de", {"en"}))   # within a nat
    assert score(nats | {"en": -20.5}, "fr", {"de", "en"}) == 0  # it is one of the two others
    assert score(nats | {"zz": -9.0}, "de", {"en"}) == 0         # far better than the expected ones
    assert score(nats, "en", set()) == 1
    assert np.isnan(score(dict.fromkeys(nats, -9.0), "en", set()))


def test_a_language_that_is_not_known_is_refused_with_the_data():
    pytest.importorskip("py3langid", reason=NEEDS_LANGID)
    for language, languages in (("xx", []), ("en", ["de", "xx"])):
        with pytest.raises(InputError, match="'xx'.*; leave out this metric"):
            common.check_metrics(["language"], [{}], "a.txt", language, languages)
    common.check_metrics(["language"], [{}], "a.txt", "deu_Latn", ["zho_Hant"])


def test_without_py3langid_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install py3langid") as error:
        common.check_metrics(["language"], [{}], "a.txt", "en")
    assert "\n" not in str(error.value)
    common.check_metrics(["prompt_nll"], [{}], "a.txt", "en")


def test_how_many_responses_have_no_language_is_printed(capsys):
    rows = {"de": {"scores": {"language": [1, None, 0]}}, "bn": {"scores": {"language": [None, 1]}},
            "en": {"scores": {"accuracy": [1]}}}
    evaluator = SimpleNamespace(used=rows, tasks={}, args=SimpleNamespace(out="out"))
    common.Evaluator.print_summary(evaluator)
    assert "2 of 5 responses have no language" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ metrics

@pytest.mark.parametrize("metric, examples, fix", [
    ("accuracy", [{}], "a.txt has prompts without an answer.*--metrics prompt_nll"),
    ("answer_nll", [{"kind": "number"}, {}], "a.txt has prompts without an answer"),
    ("accuracy", [{"kind": "number"}, {"kind": "span"}], 'a.txt mixes.* one kind.* "kind"'),
    ("accuracy", [{"kind": "math"}, {"kind": "choice"}], "a.txt mixes.* one kind"),
])
def test_a_metric_needs_its_answers(metric, examples, fix):
    with pytest.raises(InputError, match=fix):
        common.check_metrics([metric], examples, "a.txt", "en")
    common.check_metrics(["prompt_nll"], examples, "a.txt", "en")


def test_only_a_letter_is_chosen_without_a_response():
    metrics = ["prompt_nll", "accuracy", "language"]
    assert common.response_metrics(metrics, [{"kind": "choice"}]) == ["language"]
    for kind in ("number", "math", "span"):
        assert common.response_metrics(metrics, [{"kind": kind}]) == ["accuracy", "language"]
