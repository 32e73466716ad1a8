"""Answers are read, and scored, as a careful person would; hand-made cases in each language."""

import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from common import (InputError, bootstrap_interval, encode_examples, last_number, load_model,
                    load_rows, read_examples, span_scores)


@pytest.mark.parametrize("language, text, number", [
    ("bn", "জেনেট প্রতিদিন ১৬ - ৩ - ৪ = ৯টি ডিম বিক্রি করেন। তিনি ৯ × ২ = ১৮ ডলার পান।", "18"),
    ("bn", "উত্তর: ১,০০,০০০ টাকা", "100000"),
    ("de", "Sie verdient 9 * 2 = 18 Dollar am Tag.", "18"),
    ("de", "Der Gewinn beträgt 2.125 Euro.", "2125"),
    ("de", "Das sind 3,5 Liter.", "3.5"),
    ("en", "She has $2,125 left. The answer is 2,125.", "2125"),
    ("en", "It costs $3.50.", "3.5"),
    ("en", "The temperature fell to -7 degrees.", "-7"),
    ("en", "14-9", "9"),
    ("en", "He lost -$5", "-5"),
    ("es", "Gana 1.234,50 dólares", "1234.5"),
    ("fr", "Elle a 2\u202f125 pommes", "2125"),
    ("fr", "Il reste −4", "-4"),
    ("ja", "答えは１２５個です。", "125"),
    ("ja", "答えは２，１２５円です。", "2125"),
    ("sw", "Jibu ni 18.", "18"),
    ("zh", "所以，她每天赚18美元。", "18"),
    ("zh", "小明有3个，小红有－12个", "-12"),
    ("ar", "الجواب ٢٬١٢٥", "2125"),
    (None, "114,200", "114200"),  # a gold answer of MGSM
    ("en", r"First 7, so \boxed{12}, not 13.", "12"),
    ("en", r"\boxed{1} then \boxed{\$2{,}125}", "2125"),
])
def test_the_last_number_is_read_in_every_language(language, text, number):
    assert last_number(text, language) == Fraction(number)


def test_no_number_is_none_and_equality_is_exact():
    assert last_number("nothing") is None and last_number(r"5 or \boxed{x}") is None
    assert last_number("18.0") == last_number("18") != last_number("18.01")


def test_spans_are_scored_as_squad_does():
    assert span_scores("The Eiffel Tower!", ["eiffel tower"], "en") == (1, 1)
    exact, f1 = span_scores("in the old town", ["old town", "town hall"], "en")  # in old town
    assert exact == 0 and f1 == pytest.approx(2 * 2 / (3 + 2))
    assert span_scores("北京市", ["北京"], "zh") == (0, pytest.approx(2 * 2 / 5))  # by character
    assert span_scores("กรุงเทพ", ["กรุงเทพ"], "th") == (1, 1)


def test_an_empty_prediction_scores_zero():
    assert span_scores("", ["x"]) == span_scores("", [""]) == span_scores("...", ["the"]) == (0, 0)


def test_belebele_rows_become_a_question_with_options(tmp_path):
    row = {"flores_passage": "P.", "question": "Q?", "correct_answer_num": "3", "mc_answer1": "w",
           "mc_answer2": "x", "mc_answer3": "y", "mc_answer4": "z"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    example = read_examples(str(tmp_path / "a.jsonl"))[0]
    assert example["prompt"] == "P.\n\nQ?\nA. w\nB. x\nC. y\nD. z"
    assert (example["answer"], example["kind"]) == (["C"], "choice")
    (tmp_path / "b.jsonl").write_text(json.dumps(row | {"correct_answer_num": "5"}))
    with pytest.raises(InputError, match=r"b\.jsonl:1: no mc_answer5"):
        read_examples(str(tmp_path / "b.jsonl"))


def test_squad_questions_come_behind_their_paragraph(tmp_path):
    answers = [{"text": "Ada", "answer_start": 0}, {"text": "Ada L."}]
    question = {"question": "Who?", "id": "1", "answers": answers}
    paragraph = {"context": "Ada wrote.", "qas": [question]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    assert read_examples(str(tmp_path / "a.json")) == [{
        "prompt": "Ada wrote.\n\nWho?",
        "answer": ["Ada", "Ada L."], "kind": "span"}]
    (tmp_path / "b.json").write_text('{"data": [{}]}')
    with pytest.raises(InputError, match="SQuAD"):
        read_examples(str(tmp_path / "b.json"))


# ------------------------------------------------------------------------------------- on a model

@pytest.fixture(scope="module")
def tiny():
    return load_model("tests/tiny_moe", dtype="float64", device="cpu")


def nats(model, ids):
    """Of each token but the first, one sequence at a time."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [-log_probs[t - 1, ids[t]].item() for t in range(1, len(ids))]


def test_examples_are_encoded_with_the_span_of_the_users_text(tiny):
    prompt, answer = "Anna has 14 apples.", ["29", "thirty"]
    e, = encode_examples(tiny[1], [{"prompt": prompt, "answer": answer, "kind": "span"}])
    assert e["ids"] == tiny[1](f"<bos><|user|>{prompt}<|assistant|>")["input_ids"]
    start, stop = e["text_span"]
    assert tiny[1].decode(e["ids"][start:stop]) == prompt
    assert tiny[1].decode(e["answer_ids"]) == "29" and e["answer"] == answer


def test_nll_is_what_one_sequence_at_a_time_gives(tiny):
    model, tokenizer = tiny
    examples = [example for language in ("de", "bn")
                for example in read_examples(f"tests/data/eval_{language}.tsv")[:3]]
    encoded = encode_examples(tokenizer, examples)
    result = common.from_logits(model, tokenizer, encoded, batch_tokens=150)
    for i, e in enumerate(examples):
        prompt = tokenizer(f"<bos><|user|>{e['prompt']}<|assistant|>")["input_ids"]
        each = nats(model, prompt + tokenizer(e["answer"][0])["input_ids"])
        # neither <bos>, <|user|> nor <|assistant|>
        assert result["prompt_nll"][i] == pytest.approx(np.mean(each[1:len(prompt) - 2]))
        assert result["answer_nll"][i] == pytest.approx(np.mean(each[len(prompt) - 1:]))


def test_logits_that_are_no_numbers_stop_the_run(tiny):
    model, tokenizer = tiny
    weight = model.model.norm.weight
    before = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(InputError, match="logits are NaN"):
            encoded = encode_examples(tokenizer, [{"prompt": "Anna has 14 apples."}])
            common.from_logits(model, tokenizer, encoded, 100)
    finally:
        weight.data.copy_(before)


def test_nll_without_a_chat_template_skips_what_nothing_precedes(tiny):
    model, tokenizer = tiny
    encoded = encode_examples(tokenizer, [{"prompt": "Anna has 14 apples."}], chat_template="never")
    result = common.from_logits(model, tokenizer, encoded, 100)
    each = nats(model, tokenizer("Anna has 14 apples.")["input_ids"])
    assert result["prompt_nll"][0] == pytest.approx(np.mean(each))
    assert np.isnan(result["answer_nll"][0])
    single = [encoded[0] | {"ids": [7], "text_span": (0, 1)}]  # nothing precedes its only token
    assert np.isnan(common.from_logits(model, tokenizer, single, 100)["prompt_nll"][0])


def test_padding_is_a_token_that_the_model_knows(tiny):
    checkpoint, size = tiny[0].generation_config, common.vocab_size(tiny[0].config)
    end = checkpoint.eos_token_id
    for pad, expected in ((size - 1, size - 1), (size, end), (None, end)):
        tokenizer = SimpleNamespace(pad_token_id=pad, eos_token_id=end)
        settings = common.generation_settings(checkpoint, tokenizer, size)
        assert settings["pad_token_id"] == expected


def test_generation_is_what_one_prompt_at_a_time_gives(tiny):
    model, tokenizer = tiny
    encoded = encode_examples(tokenizer, read_examples("tests/data/eval_en.tsv")[:6])
    together, _ = common.generate(model, tokenizer, encoded, 200, max_new_tokens=24)
    for e, response in zip(encoded, together):
        out = model.generate(torch.tensor([e["ids"]]), max_new_tokens=24, do_sample=False)
        assert tokenizer.decode(out[0, len(e["ids"]):], skip_special_tokens=True) == response


def test_sampling_repeats_with_its_seed(tiny):
    encoded = encode_examples(tiny[1], read_examples("tests/data/eval_sw.tsv")[:8])
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 50, "max_new_tokens": 8}
    draw = [common.generate(*tiny, encoded, 999, seed, **settings)[0] for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_responses_that_are_cut_off_are_counted(tiny):
    encoded = encode_examples(tiny[1], read_examples("tests/data/eval_en.tsv")[:4])
    assert common.generate(*tiny, encoded, 999, max_new_tokens=2)[1] == 4
    assert common.generate(*tiny, encoded, 999, max_new_tokens=32)[1] == 0


def test_a_letter_is_chosen_by_its_probability(tiny):
    model, tokenizer = tiny
    prompts = ("How many?", "Anna", "9 + 4")
    encoded = {gold: encode_examples(tokenizer, [
        {"prompt": prompt, "answer": [gold], "kind": "choice"} for prompt in prompts])
        for gold in "ABCD"}
    letters = [tokenizer(letter)["input_ids"][0] for letter in "ABCD"]
    expected = []
    for e in encoded["A"]:
        with torch.no_grad():
            logits = model(torch.tensor([e["ids"]])).logits[0, -1]
        expected.append("ABCD"[logits[letters].argmax()])
    for gold in encoded:
        scores, responses, _ = common.evaluate(
            model, tokenizer, encoded[gold], ["accuracy"], "en", batch_tokens=20)
        assert scores["accuracy"].tolist() == [letter == gold for letter in expected]
        assert responses is None


def test_a_span_is_scored_by_exact_match_and_f1_beside_it(tiny, monkeypatch):
    model, tokenizer = tiny
    examples = [{"prompt": "Who?", "answer": ["Ada L.", "Ada"], "kind": "span"}] * 2
    said = ["Ada!", "Ada and Bob"], 1
    monkeypatch.setattr(common, "generate", lambda *arguments: said)
    scores, responses, cut = common.evaluate(
        model, tokenizer, encode_examples(tokenizer, examples), ["accuracy"], "en")
    assert (responses, cut) == said and list(scores) == ["accuracy", "f1"]
    assert scores["accuracy"].tolist() == [1, 0]
    assert scores["f1"] == pytest.approx([1, 2 * 1 / (3 + 1)])


def test_the_tiny_model_answers_held_out_problems():
    """At least 85 % in its large languages, less in the two that it hardly saw."""
    model, tokenizer = load_model("tests/tiny_moe", device="cpu")
    right = {}
    for language in ("en", "zh", "bn", "sw"):
        encoded = encode_examples(tokenizer, read_examples(f"tests/data/eval_{language}.tsv"))
        scores, *_ = common.evaluate(model, tokenizer, encoded, ["accuracy"], language,
                                     max_new_tokens=32)
        right[language] = scores["accuracy"].mean()
    assert right["en"] > 0.85 and right["zh"] > 0.85
    assert 0.3 < right["bn"] < right["en"] and 0.3 < right["sw"] < right["en"]


def test_too_long_a_prompt_is_refused(tiny):
    with pytest.raises(InputError, match="prompt 2 has .* tokens, more than 20"):
        encode_examples(tiny[1], [{"prompt": "a"}, {"prompt": "a b c d " * 20}], max_length=20)


def test_a_metric_needs_its_answers(tiny):
    encoded = encode_examples(tiny[1], [{"prompt": "a"}])
    with pytest.raises(InputError, match="x.txt has prompts without an answer"):
        common.check_metrics(["accuracy"], encoded, "x.txt", "en")
    common.check_metrics(["prompt_nll"], encoded, "x.txt", "en")


def test_langdetect_finds_the_language_or_says_what_to_install():
    try:
        import langdetect  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pip install langdetect"):
            common.in_language(["hello"], "en")
        return
    texts = ["The answer to the question is the number four.",
             "这个问题的答案是四。因为二加二等于四。", "14+9=23"]
    assert common.in_language(texts, "en") == [1, 0, 0]
    assert common.in_language(texts, "zh-Hans")[1] == 1


# ------------------------------------------------------------------------- statistics and results

def test_bootstrap_interval_of_a_constant_is_the_constant_and_of_noise_holds_its_mean():
    assert bootstrap_interval([0.25] * 40) == pytest.approx([0.25, 0.25])
    noise = np.random.default_rng(0).normal(0.3, 1, 400)
    low, high = bootstrap_interval(noise)
    assert low < noise.mean() < high
    # the normal approximation
    assert high - low == pytest.approx(2 * 1.96 * noise.std() / 20, rel=0.1)
    # of two controls, a nat apart, the choice is the larger doubt
    several = bootstrap_interval([noise, noise + 1])
    assert several[1] - several[0] > 0.9


def test_a_results_line_that_a_kill_cut_short_is_taken_off_by_the_next_one(tmp_path):
    path = tmp_path / "r.jsonl"
    common.append_row(path, {"cell": "a", "settings": {"a": 1}, "scores": {"m": [2]}})
    with open(path, "a") as file:
        file.write('{"cell": "b", "settings": {"a": 2}, "me')
    cut = path.read_bytes()
    assert list(load_rows(path)) == ['{"a": 1}'] and path.read_bytes() == cut
    common.append_row(path, {"cell": "b", "settings": {"a": 2}, "scores": {"m": [2]}})
    assert list(load_rows(path)) == ['{"a": 1}', '{"a": 2}']


def test_a_whole_last_line_without_an_end_is_kept(tmp_path):
    path = tmp_path / "r.jsonl"
    for a in (1, 2, 3):
        assert len(load_rows(path)) == a - 1
        common.append_row(path, {"cell": "a", "settings": {"a": a}, "scores": {"m": [2]}})
        path.write_bytes(path.read_bytes()[:-1])  # as an editor may
    assert list(load_rows(path)) == ['{"a": 1}', '{"a": 2}', '{"a": 3}']


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    common.write_whole(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError("no space left")
    with pytest.raises(OSError, match="no space left"):
        common.write_whole(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
