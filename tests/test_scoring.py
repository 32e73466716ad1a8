"""Prompts are read and encoded, responses generated, and answers scored as a careful person would.

In the order of common.py: prompts, templates and spans, batches, scores from logits, generation,
numbers, spans, languages.
"""

import copy
import json
import sys
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import common
from common import (InputError, answer_kind, encode_example, encode_examples, find_data, generate,
                    last_number, length_batches, read_examples, run_batches, score_prompts,
                    score_responses, span_scores)
from conftest import TINY


def write(path, content):
    """Write a text or bytes, and return the path as text."""
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return str(path)


# ----------------------------------------------------------------------------------- finding files

def test_languages_are_what_the_pattern_matches(tmp_path):
    folder = tmp_path / "data[1]"  # brackets and the like stand for themselves
    folder.mkdir()
    for name in ("m_zh-Hans.tsv", "m_bn.tsv", "n_de.tsv", "m_bn.txt"):
        write(folder / name, "a\t1\n")
    pattern = str(folder / "m_{lang}.tsv")
    bn, zh = str(folder / "m_bn.tsv"), str(folder / "m_zh-Hans.tsv")
    assert list(find_data(pattern).items()) == [("bn", bn), ("zh-Hans", zh)]
    assert find_data(pattern, "zh-Hans") == {"zh-Hans": zh}
    assert list(find_data(pattern, "zh-Hans,bn")) == ["zh-Hans", "bn"]


def test_a_language_that_is_twice_in_a_pattern_is_the_same_text(tmp_path):
    for folder, name in (("bn", "bn"), ("de", "bn"), ("de", "de")):
        (tmp_path / folder).mkdir(exist_ok=True)
        write(tmp_path / folder / f"{name}.txt", "a\n")
    assert list(find_data(str(tmp_path / "{lang}/{lang}.txt"))) == ["bn", "de"]


def test_a_pattern_without_a_language_is_one_file(tmp_path):
    path = write(tmp_path / "n_de.tsv", "a\t1\n")
    assert find_data(path) == {"n_de": path}
    assert find_data(path, "de") == {"de": path}


@pytest.mark.parametrize("pattern, languages, fix", [
    ("x_{lang}.tsv", None, "no file matches .*x_{lang}.tsv"),
    ("m_{lang}.tsv", "de", "no such file: .*m_de.tsv"),
    ("m_{lang}.tsv", "bn,bn", "m_bn.tsv twice.* each language once"),
    ("m_bn.tsv", "bn,de", "m_bn.tsv twice.* put {lang} into --data"),
    ("m_{lang}.tsv", "../m_bn", "'../m_bn' .*letters"),
    ("m_{lang}.tsv", "", "'' .*letters"),
])
def test_bad_patterns_and_languages_are_refused(tmp_path, pattern, languages, fix):
    write(tmp_path / "m_bn.tsv", "a\t1\n")
    with pytest.raises(InputError, match=fix):
        find_data(str(tmp_path / pattern), languages)


# ----------------------------------------------------------------------------------- reading files

def test_a_tsv_line_is_a_question_and_behind_its_last_tab_the_answer(tmp_path):
    path = write(tmp_path / "a.tsv", "How many?\t2,125\nTab\tin it\tParis\r\n")
    assert read_examples(path) == [
        {"prompt": "How many?", "answer": ["2,125"], "kind": "number"},
        {"prompt": "Tab\tin it", "answer": ["Paris"], "kind": "span"},
    ]


def test_a_jsonl_row_names_its_parts(tmp_path):
    rows = [
        {"prompt": "p", "response": "r", "instruction": "i", "answer": 0},
        {"question": "q", "answer": [3.5, "7/2"], "response": None, "instruction": None},
        {"prompt": "q", "answer": "B", "kind": "choice"},
        {"prompt": "q", "answer": ["3", "three"]},
        {"prompt": "q", "answer": "3", "kind": "span"},
        {"text": "t\u2028x", "answer": None},
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_examples(path) == [
        {"prompt": "p", "instruction": "i", "response": "r", "answer": ["0"], "kind": "number"},
        {"prompt": "q", "answer": ["3.5", "7/2"], "kind": "number"},
        {"prompt": "q", "answer": ["B"], "kind": "choice"},
        {"prompt": "q", "answer": ["3", "three"], "kind": "span"},
        {"prompt": "q", "answer": ["3"], "kind": "span"},
        {"prompt": "t\u2028x"},
    ]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n"])
def test_a_prompt_keeps_its_spaces_and_the_last_one_too(tmp_path, end):
    text = write(tmp_path / "a.txt", f" one \n\ttwo\u2028x\x0cy  {end}")
    assert [each["prompt"] for each in read_examples(text)] == [" one ", "\ttwo\u2028x\x0cy  "]
    table = read_examples(write(tmp_path / "a.tsv", f" one \t 1 \n  two \t blue {end}"))
    assert [each["prompt"] for each in table] == [" one ", "  two "]
    assert [each["answer"] for each in table] == [[" 1 "], [" blue "]]
    assert [each["kind"] for each in table] == ["number", "span"]
    rows = write(tmp_path / "a.jsonl", '{"prompt": " one "}\n{"text": " two\\n"}' + end)
    assert [each["prompt"] for each in read_examples(rows)] == [" one ", " two\n"]


def test_a_txt_line_is_a_prompt_without_the_files_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\ntwo\n")
    assert read_examples(path) == [{"prompt": "one"}, {"prompt": "two"}]


BELEBELE = {"flores_passage": "P.", "question": "Q?", "correct_answer_num": "3",
            "mc_answer1": "w", "mc_answer2": "x", "mc_answer3": "y", "mc_answer4": "z"}


def test_a_row_of_belebele_becomes_a_question_with_options(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps(BELEBELE))
    assert read_examples(path) == [{
        "prompt": "P.\n\nQ?\nA. w\nB. x\nC. y\nD. z",
        "answer": ["C"],
        "kind": "choice",
    }]


def test_a_question_of_squad_stands_behind_its_paragraph(tmp_path):
    answers = [{"text": "Ada", "answer_start": 0}, {"text": "Ada L."}]
    questions = [{"question": "Who?", "id": "1", "answers": answers},
                 {"question": "When?", "answers": []}]
    squad = {"data": [{"paragraphs": [{"context": "Ada wrote.", "qas": questions}]}]}
    assert read_examples(write(tmp_path / "a.json", json.dumps(squad))) == [
        {"prompt": "Ada wrote.\n\nWho?", "answer": ["Ada", "Ada L."], "kind": "span"},
        {"prompt": "Ada wrote.\n\nWhen?", "answer": [], "kind": "span"},
    ]


@pytest.mark.parametrize("name, content, fix", [
    ("a.tsv", "one\t1\ntwo 2\n", "a.tsv:2: no tab"),
    ("a.tsv", "\t1\n", "a.tsv:1: an empty prompt"),
    ("a.txt", "one\n \ntwo\n", "a.txt:2: an empty prompt"),
    ("a.txt", "", "a.txt: no prompts"),
    ("a.txt", " \n \n", "a.txt:1: an empty prompt"),
    ("a.txt", b"\xff\xfe", "a.txt: not UTF-8; convert it"),
    ("a.csv", "a,b\n", "a.csv: cannot read .*give .tsv"),
    ("a.json", '{"data": []}', "a.json: no prompts"),
    ("a.json", '{"data": [{}]}', "a.json: .*SQuAD"),
    ("a.json", "[1]", "a.json: .*object"),
    ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl:2: not JSON"),
    ("a.jsonl", "[3]\n", "a.jsonl:1: .*object"),
    ("a.jsonl", '{"words": "a"}\n', 'a.jsonl:1: .* "prompt"'),
    ("a.jsonl", '{"prompt": 3}\n', 'a.jsonl:1: .* "prompt"'),
    ("a.jsonl", json.dumps(BELEBELE | {"correct_answer_num": "5"}), "a.jsonl:1: .*Belebele"),
    ("a.jsonl", json.dumps(BELEBELE | {"correct_answer_num": "0"}), "a.jsonl:1: .*Belebele"),
])
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, fix):
    with pytest.raises(InputError, match=fix) as error:
        read_examples(write(tmp_path / name, content))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more", [
    '"answer": ["a", null]', '"answer": {"a": 1}', '"answer": true', r'"answer": "\ud83d"',
    '"response": ["a"]', '"answer": "a", "kind": ["span"]', '"answer": "a", "kind": "choice"',
    '"answer": "unknown", "kind": "number"'])
def test_an_answer_that_cannot_be_compared_is_refused(tmp_path, more):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a", %s}\n' % more)
    with pytest.raises(InputError, match="a.jsonl:1: .*(text|number)"):
        read_examples(path)


@pytest.mark.parametrize("more", [
    '"context": "b", "answers": {"text": ["c"]}', '"choices": ["b", "c"]', '"text": "b"'])
def test_fields_that_would_be_ignored_are_refused(tmp_path, more):
    path = write(tmp_path / "a.jsonl", '{"question": "a", %s, "answer": 1}\n' % more)
    with pytest.raises(InputError, match='a.jsonl:1: .* put all that is asked into "prompt"'):
        read_examples(path)
    write(tmp_path / "a.jsonl", '{"prompt": "b a", "question": "a", %s, "answer": 1}\n' % more)
    assert read_examples(path)[0]["prompt"] == "b a"


@pytest.mark.parametrize("answers, kind", [
    (["2,125"], "number"), (["-3"], "number"), (["3.5"], "number"), (["1e5"], "number"),
    ([" 7 "], "number"), (["1/2", "0.5"], "number"), (["3", "three"], "span"), ([], "span"),
    (["NaN"], "span"), (["Infinity"], "span"), (["18 apples"], "span"), ([""], "span"),
])
def test_answers_are_numbers_if_there_is_nothing_else_in_them(answers, kind):
    assert answer_kind(answers) == kind


@pytest.mark.parametrize("metric, examples, fix", [
    ("accuracy", [{}], "a.txt has prompts without an answer.*--metrics prompt_nll"),
    ("answer_nll", [{"kind": "number"}, {}], "a.txt has prompts without an answer"),
    ("accuracy", [{"kind": "number"}, {"kind": "span"}], "a.txt mixes.* one kind"),
])
def test_a_metric_needs_its_answers(metric, examples, fix):
    with pytest.raises(InputError, match=fix):
        common.check_metrics([metric], examples, "a.txt", "en")
    common.check_metrics(["prompt_nll"], examples, "a.txt", "en")


# ------------------------------------------------------------------------------------ instructions

def test_every_prompt_of_a_language_gets_its_instruction(tmp_path):
    data = write(tmp_path / "de.txt", "eins\nzwei\ndrei\n")
    path = write(tmp_path / "i.json", '\ufeff{"en": "Be brief.", "de": "Antworte kurz."}')
    args = SimpleNamespace(limit=2, instruction=path)
    assert common.read_task(args, "de", data) == [
        {"prompt": "eins", "instruction": "Antworte kurz."},
        {"prompt": "zwei", "instruction": "Antworte kurz."},
    ]
    args = SimpleNamespace(limit=None, instruction=None)
    assert common.read_task(args, "de", data) == [{"prompt": p} for p in ("eins", "zwei", "drei")]


@pytest.mark.parametrize("content, fix", [
    ('{"de": "Antworte kurz."}', "has no instruction for 'en'"),
    ('{"en": 3}', "has no instruction for 'en'"),
    ("[1]", "is not {language: instruction}"),
    ("x", "is not {language: instruction}"),
    (r'{"en": "\ud83d"}', "is not {language: instruction}"),
    (b"\xff", "not UTF-8; convert it"),
])
def test_a_file_without_the_instruction_is_refused(tmp_path, content, fix):
    with pytest.raises(InputError, match=f"i.json:? {fix}"):
        common.read_instruction(write(tmp_path / "i.json", content), "en")


# ------------------------------------------------- chat templates, and the span of a prompt's text

CONTENT = "{{ messages[0]['content'] }}"
TRIMMED = "{{ messages[0]['content'] | trim }}"
PARTS = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
CHATML = "<|im_start|>system\nYou help the user.<|im_end|>\n<|im_start|>user\n"
TEMPLATES = {  # name: (what stands before a prompt, what stands for it, what stands behind it)
    "ChatML": (CHATML, CONTENT, "<|im_end|>\n<|im_start|>assistant"),
    "trimming": ("<|user|>user: ", TRIMMED, "<|assistant|>"),
    "parts": ("<|user|>", PARTS, "<|assistant|>"),
    "bare": ("", TRIMMED, ""),
    "none": ("", "", ""),
    "never": ("", "", ""),  # given as --chat-template, though the tokenizer has one
}
PROMPTS = ["Anna has 14 apples.", "user", "user: user", "You help the user.", ": ", "<|user|>",
           "  two \n", "১২ আপেল", "a"]


@pytest.fixture(scope="session")
def joining():
    """A tokenizer that joins a full stop with the line breaks after it, and adds <bos>."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    corpus = ["Who eats it? Anna.\n\nPut it there.\n\nThen go.\n\n"] * 99
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(params=["splitting", "joining"])
def tokenizer(request, tiny, joining):
    """One that never has the text of two words in a token, and one that does."""
    return copy.deepcopy(tiny[1] if request.param == "splitting" else joining)


def text_of(tokenizer, ids):
    """Return the text of token IDs with all its spaces and special tokens."""
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def bytes_in_tokens(tokenizer, ids, start, stop):
    """Return the first token that holds any of the bytes start to stop, and the one after the last.

    In byte-level tokens, a character stands for each byte.
    """
    inside = []
    first = 0
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        last = first + len(token)
        if first < stop and last > start:
            inside.append(i)
        first = last
    return inside[0], inside[-1] + 1


@pytest.mark.parametrize("instruction", [None, "user: put it into a box.\n"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_span_is_every_token_that_holds_text_of_the_prompt(tokenizer, name, instruction):
    before, content, after = TEMPLATES[name]
    tokenizer.chat_template = before + content + after
    if name == "never":
        tokenizer.chat_template = "<|user|>" + CONTENT
    if before == "":  # a template that adds nothing leaves special tokens to the tokenizer
        before = text_of(tokenizer, tokenizer("")["input_ids"])
    for prompt in PROMPTS:
        example, text = {"prompt": prompt}, prompt
        if instruction:
            example["instruction"] = instruction
            text = f"{prompt}\n\n{instruction}"
        if content == TRIMMED:
            text = text.strip()
        ids, span = encode_example(tokenizer, example, "never" if name == "never" else "auto")
        assert text_of(tokenizer, ids) == before + text + after
        start = len((before + text[:text.index(prompt.strip())]).encode())
        stop = start + len(prompt.strip().encode())
        assert span == bytes_in_tokens(tokenizer, ids, start, stop), prompt


def test_a_token_that_straddles_the_edge_of_the_prompt_belongs_to_it(joining):
    example = {"prompt": "Anna.", "instruction": "Put it there."}
    ids, (start, stop) = encode_example(joining, example)
    assert text_of(joining, ids[start:stop]) == "Anna.\n\n"


def test_the_turn_is_a_users_without_thinking_up_to_where_the_answer_starts(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = ("{{ messages[0]['role'] }}: " + CONTENT + " {{ messages | length }}"
                               " {{ add_generation_prompt }} {{ enable_thinking }}")
    assert common.rendered(tokenizer, "Hi") == ("user: Hi 1 True False", 6)


def test_without_offsets_the_span_is_what_lies_between_head_and_tail():
    class SlowTokenizer:
        """Tokens are characters, between <s> and </s> if there is no template."""
        is_fast, chat_template = False, "<u>" + CONTENT + "</u>"

        def apply_chat_template(self, messages, **options):
            return f"<u>{messages[0]['content']}</u>"

        def __call__(self, text, add_special_tokens):
            ids = [ord(character) for character in text]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    tokenizer = SlowTokenizer()
    ids, (start, stop) = encode_example(tokenizer, {"prompt": "a 1", "instruction": "c"})
    assert "".join(map(chr, ids)) == "<u>a 1\n\nc</u>"
    assert (start, stop) == (3, 6)
    assert encode_example(tokenizer, {"prompt": "ab"}, "never") == ([1, 97, 98, 2], (1, 3))


@pytest.mark.parametrize("template", [
    "{{ bos_token }}hello", "{{ raise_exception('no') }}", CONTENT + CONTENT,
    "{{ messages[0]['content'] | upper }}", "{{ messages[0]['content'][:5] }}"])
def test_a_template_that_does_not_hold_the_prompt_is_refused(tiny, template):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="'Anna has 14.*--chat-template never"):
        encode_example(tokenizer, {"prompt": "Anna has 14 apples."})


def test_a_prompt_without_tokens_is_refused(tiny):
    for chat_template in ("auto", "never"):
        with pytest.raises(InputError, match="no tokens"):
            encode_example(tiny[1], {"prompt": ""}, chat_template)


def test_answer_ids_are_those_of_the_first_answer_without_special_tokens(joining):
    examples = [{"prompt": "Anna", "answer": ["29", "thirty"], "kind": "span"}, {"prompt": "b"}]
    first, second = encode_examples(joining, examples)
    assert text_of(joining, first["answer_ids"]) == "29"
    assert second["answer_ids"] == []
    for example, encoded in zip(examples, (first, second)):
        ids, text_span = encode_example(joining, example)
        added = {"ids": ids, "text_span": text_span, "answer_ids": encoded["answer_ids"]}
        assert encoded == example | added


def test_too_long_a_prompt_is_refused(tiny):
    examples = [{"prompt": "a"}, {"prompt": "a b c d"}]
    longest = len(encode_examples(tiny[1], examples)[1]["ids"])
    encode_examples(tiny[1], examples, max_length=longest)
    with pytest.raises(InputError, match=f"prompt 2 has {longest} tokens.*--max-length"):
        encode_examples(tiny[1], examples, max_length=longest - 1)


def test_tokens_that_the_model_does_not_know_are_refused(tiny):
    config = tiny[0].config
    common.check_token_ids([[0, config.vocab_size - 1]], config, "a.npz")
    for unknown in (-1, config.vocab_size):
        with pytest.raises(InputError, match="a.npz: .* 0 to 1023"):
            common.check_token_ids([[0], [3, unknown, 5]], config, "a.npz")


# ----------------------------------------------------------------------------------------- batches

def test_batches_hold_sequences_of_similar_length_the_longest_first():
    lengths = [10, 51, 100, 80, 100, 50, 49, 90]
    assert length_batches(lengths, 300) == [[2, 4, 7], [3], [1, 5, 6], [0]]
    assert length_batches(lengths, 299) == [[2, 4], [7], [3], [1, 5, 6], [0]]
    assert length_batches(lengths, 300, fill=0.5) == [[2, 4, 7], [3, 1, 5], [6], [0]]
    assert length_batches(lengths, 50) == [[2], [4], [7], [3], [1], [5], [6], [0]]  # alone longer
    assert length_batches(lengths, 10**6, fill=0) == [[2, 4, 7, 3, 1, 5, 6, 0]]
    assert length_batches([], 300) == []


def test_a_batch_that_does_not_fit_is_halved_and_results_keep_the_order():
    sizes = []

    def run(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return [10 * i for i in batch]

    assert run_batches(run, [[5, 0, 3, 2, 1], [4]]) == [0, 10, 20, 30, 40, 50]
    assert sizes == [5, 2, 3, 1, 2, 1]


def test_one_sequence_that_does_not_fit_is_an_error():
    with pytest.raises(InputError, match="lower --max-length"):
        run_batches(Mock(side_effect=torch.OutOfMemoryError), [[0, 1]])


# -------------------------------------------------------------------------------- scores of prompts

def nats(model, ids):
    """Return each token's negative log-likelihood, one sequence at a time; the first has none."""
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    rest = [-log_probabilities[t - 1, ids[t]].item() for t in range(1, len(ids))]
    return [np.nan, *rest]


def test_nll_is_what_one_sequence_at_a_time_gives(tiny):
    model, tokenizer = tiny
    examples = []
    for language in ("de", "bn"):
        examples += read_examples(f"tests/data/eval_{language}.tsv")[:3]
    examples[1]["instruction"] = "Antworte kurz."
    examples[2] |= {"answer": ["B"], "kind": "choice"}  # with others beside it, it has no accuracy
    scores = score_prompts(model, tokenizer, encode_examples(tokenizer, examples), batch_tokens=150)
    assert set(scores) == {"prompt_nll", "answer_nll"}
    for i, example in enumerate(examples):
        own = tokenizer(example["prompt"])["input_ids"]
        text = f"<bos><|user|>{example['prompt']}<|assistant|>"
        if "instruction" in example:
            text = text.replace("<|assistant|>", f"\n\n{example['instruction']}<|assistant|>")
        prompt = tokenizer(text)["input_ids"]
        each = nats(model, prompt + tokenizer(example["answer"][0])["input_ids"])
        of_text = each[2:2 + len(own)]  # behind <bos> and <|user|>
        assert scores["prompt_nll"][i] == pytest.approx(np.mean(of_text), rel=1e-5)
        assert scores["answer_nll"][i] == pytest.approx(np.mean(each[len(prompt):]), rel=1e-5)


def test_a_first_token_that_nothing_precedes_does_not_count(tiny):
    model, tokenizer = tiny
    examples = [{"prompt": "Anna has 14 apples."}, {"prompt": "Anna"}]
    encoded = encode_examples(tokenizer, examples, chat_template="never")
    scores = score_prompts(model, tokenizer, encoded)
    assert scores["prompt_nll"][0] == pytest.approx(np.mean(nats(model, encoded[0]["ids"])[1:]))
    assert len(encoded[1]["ids"]) == 1 and np.isnan(scores["prompt_nll"][1])
    assert np.isnan(scores["answer_nll"]).all()


def most_probable(model, tokenizer, example, letters):
    """Return the letter whose token is most probable behind a prompt alone."""
    with torch.no_grad():
        logits = model(torch.tensor([example["ids"]])).logits[0, -1]
    return max(letters, key=lambda letter: logits[tokenizer(letter)["input_ids"][0]])


@pytest.mark.parametrize("golds, letters", [("AB", "ABCD"), ("ABCDEF", "ABCDEF")])
def test_a_letter_is_chosen_of_a_to_d_or_as_far_as_the_answers_go(tiny, golds, letters):
    model, tokenizer = tiny
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


def test_letters_that_start_with_the_same_token_are_refused():
    tokenizer = SimpleNamespace(encode=lambda letter, **options: [7, ord(letter)])
    with pytest.raises(InputError, match="ABCD"):
        common.letter_tokens(tokenizer, "ABCD")


def test_only_a_letter_is_chosen_without_a_response():
    metrics = ["prompt_nll", "accuracy", "language"]
    assert common.response_metrics(metrics, [{"kind": "choice"}]) == ["language"]
    for example in ({"kind": "number"}, {"kind": "span"}):
        assert common.response_metrics(metrics, [example]) == ["accuracy", "language"]


# -------------------------------------------------------------------------------------- generation

@pytest.fixture(scope="module")
def questions(tiny):
    """Encoded questions of different lengths; the last holds the padding token, as a prompt may."""
    examples = read_examples("tests/data/eval_en.tsv")[:8] + [{"prompt": "<pad> 9<pad>4 <pad>"}]
    return encode_examples(tiny[1], examples)


@pytest.mark.parametrize("max_new_tokens", [8, 24])
def test_generation_is_what_one_prompt_at_a_time_gives(tiny, questions, max_new_tokens):
    model, tokenizer = tiny
    expected, num_cut = [], 0
    for example in questions:
        ids = torch.tensor([example["ids"]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                max_new_tokens=max_new_tokens)
        response = output[0, len(example["ids"]):]
        expected.append(tokenizer.decode(response, skip_special_tokens=True))
        num_cut += tokenizer.eos_token_id not in response
    if max_new_tokens == 8:
        assert 0 < num_cut < len(questions)
    for batch_tokens in (200, 9999):
        found = generate(model, tokenizer, questions, batch_tokens, max_new_tokens=max_new_tokens)
        assert found == (expected, num_cut)


def test_without_a_token_that_ends_it_every_response_is_cut(tiny, questions):
    _, num_cut = generate(*tiny, questions, max_new_tokens=24, eos_token_id=None)
    assert num_cut == len(questions)


def test_sampling_repeats_with_its_seed(tiny, questions):
    settings = {"do_sample": True, "temperature": 3.0, "top_k": 50, "max_new_tokens": 8}
    first, again, other = [generate(*tiny, questions, 999, seed, **settings)[0]
                           for seed in (1, 1, 2)]
    assert first == again != other


HOSTILE = [dict(no_repeat_ngram_size=1), dict(num_beams=3, num_return_sequences=3),
           dict(return_dict_in_generate=True, output_logits=True), dict(stop_strings=["="]),
           dict(cache_implementation="static"), dict(do_sample=True, temperature=5.0),
           dict(repetition_penalty=3.0), dict(suppress_tokens=[5, 6, 7, 22, 23]),
           dict(max_length=3), dict(min_new_tokens=30), dict(forced_eos_token_id=2),
           dict(max_time=1e-4), dict(guidance_scale=3.0), dict(use_cache=False),
           dict(prompt_lookup_num_tokens=3)]


@pytest.mark.parametrize("settings", HOSTILE, ids=str)
def test_greedy_is_greedy_whatever_a_checkpoint_says(tiny, questions, monkeypatch, settings):
    model, tokenizer = tiny
    expected = generate(model, tokenizer, questions[:4], 400, max_new_tokens=12)
    hostile = copy.deepcopy(model.generation_config)
    for name, value in settings.items():
        setattr(hostile, name, value)
    monkeypatch.setattr(model, "generation_config", hostile)
    assert generate(model, tokenizer, questions[:4], 400, max_new_tokens=12) == expected
    assert model.generation_config is hostile  # put back


@pytest.mark.parametrize("setting, changes, expected", [
    ("pad_token_id", {"pad": 1023}, 1023), ("pad_token_id", {"pad": 0}, 0),
    ("pad_token_id", {"pad": 1024}, 2), ("pad_token_id", {"pad": None}, 2),  # the model knows 1,024
    ("pad_token_id", {"pad": None, "end": None, "tokenizer_end": None}, 0),
    ("eos_token_id", {"end": 0}, [0]), ("eos_token_id", {"end": [5, 6]}, [5, 6]),
    ("eos_token_id", {"end": None}, [3]),
    ("eos_token_id", {"end": None, "tokenizer_end": None}, None),
    ("max_new_tokens", {"limit": 32, "flag": 5}, 5), ("max_new_tokens", {"limit": 32}, 32),
    ("max_new_tokens", {}, common.MAX_NEW_TOKENS),
])
def test_limit_and_tokens_are_the_checkpoints_or_what_stands_in(setting, changes, expected):
    values = {"pad": 0, "end": 2, "tokenizer_end": 3, "limit": None, "flag": None} | changes
    checkpoint = SimpleNamespace(eos_token_id=values["end"], max_new_tokens=values["limit"])
    tokenizer = SimpleNamespace(pad_token_id=values["pad"], eos_token_id=values["tokenizer_end"])
    settings = common.generation_settings(checkpoint, tokenizer, 1024, values["flag"])
    assert settings[setting] == expected


def settings_of_flags(tiny, *flags):
    """Return the settings of generate() that flags of ablate.py and steer.py give."""
    parser = common.argument_parser("")
    common.add_model_arguments(parser, TINY, "data", "out", batch_tokens=9, max_length=9)
    common.add_scoring_arguments(parser, ["accuracy"], None)
    model, tokenizer = tiny
    return common.response_settings(parser.parse_args(map(str, flags)), model.config, tokenizer)


def test_a_temperature_of_0_is_greedy_and_one_alone_samples_from_everything(tiny):
    greedy = {"max_new_tokens": 32, "eos_token_id": [2], "pad_token_id": 0, "do_sample": False}
    assert settings_of_flags(tiny) == greedy | {"seed": 0}
    assert settings_of_flags(tiny, "--temperature", 0, "--seed", 3) == greedy | {"seed": 0}
    sampled = settings_of_flags(tiny, "--temperature", 0.7, "--seed", 3)
    assert sampled == greedy | {
        "do_sample": True, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "seed": 3}
    flags = ("--temperature", 0.7, "--top-p", 0.8, "--top-k-sampling", 20)
    assert settings_of_flags(tiny, *flags) == sampled | {"top_p": 0.8, "top_k": 20, "seed": 0}


@pytest.mark.parametrize("flags", [
    ["--temperature", -1], ["--temperature", "nan"], ["--seed", -1], ["--seed", 2**63],
    ["--top-p", 0.5], ["--temperature", 0, "--top-k-sampling", 3],
    ["--temperature", 1, "--top-p", 1.5], ["--temperature", 1, "--top-p", 0]])
def test_sampling_that_cannot_be_is_refused(tiny, flags):
    with pytest.raises(InputError, match="--(temperature|seed|top-p) "):
        settings_of_flags(tiny, *flags)


def test_the_tiny_model_answers_held_out_problems(tiny):
    """At least 85 % in its large languages, less in the two that it hardly saw."""
    model, tokenizer = tiny
    accuracy = {}
    for language in ("en", "zh", "bn", "sw"):
        examples = read_examples(f"tests/data/eval_{language}.tsv")
        encoded = encode_examples(tokenizer, examples)
        responses, _ = generate(model, tokenizer, encoded, max_new_tokens=32)
        scores = score_responses(responses, encoded, ["accuracy"], language)
        accuracy[language] = scores["accuracy"].mean()
    assert accuracy["en"] > 0.85 and accuracy["zh"] > 0.85
    assert 0.3 < accuracy["bn"] < accuracy["en"]
    assert 0.3 < accuracy["sw"] < accuracy["en"]


# ----------------------------------------------------------------------------------------- numbers

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
    "a text without digits has no number": [
        ("en", "NaN", None), ("en", "Infinity", None), ("en", "nothing", None), ("en", "", None)],
}


@pytest.mark.parametrize("claim", NUMBERS)
def test_the_number_that_a_text_gives_as_its_answer(claim):
    for language, text, number in NUMBERS[claim]:
        found = last_number(text, language)
        assert found == number, (language, text)
        assert found is None or isinstance(found, Fraction)


def test_an_absurd_number_takes_no_time():
    assert last_number("1e999999999") is not None
    assert last_number("so " + "7" * 5000 + "/" + "7" * 5000) == 1


def test_a_response_is_right_if_its_number_equals_a_right_answer():
    examples = [{"answer": ["2.125", "9"], "kind": "number"}] * 4
    responses = ["2,125", "2.125", "9,0", "none"]  # the language is that of the response alone
    scores = score_responses(responses, examples, ["accuracy"], "de")
    assert list(scores) == ["accuracy"]
    assert scores["accuracy"].tolist() == [0, 0, 1, 0]
    scores = score_responses(responses, examples, ["accuracy", "prompt_nll"], "en")
    assert scores["accuracy"].tolist() == [0, 1, 0, 0]


# ------------------------------------------------------------------------------------------- spans

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
    ("...", ["the"], None, False, False, 0), ("the", ["the"], "en", False, False, 0),
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


# --------------------------------------------------------------------------------------- languages

TEXTS = {
    "en": "The answer to the question is the number four.",
    "zh-cn": "这个问题的答案是四。因为二加二等于四。",
    "de": "Der Apfel liegt auf dem Tisch, und die Katze schläft daneben auf dem Stuhl.",
}


@pytest.fixture(params=["a stand-in", "langdetect"])
def langdetect(request, monkeypatch):
    """The package, and what stands in for it: it knows the texts above, and fails on others."""
    if request.param == "langdetect":
        return pytest.importorskip("langdetect")
    codes = {text: code for code, text in TEXTS.items()}
    stand_in = SimpleNamespace(
        DetectorFactory=SimpleNamespace(), LangDetectException=KeyError, detect=codes.__getitem__)
    monkeypatch.setitem(sys.modules, "langdetect", stand_in)
    return stand_in


@pytest.mark.parametrize("language, expected", [
    ("en", [1, 0, 0, 0]), ("eng_Latn", [1, 0, 0, 0]), ("deu_Latn", [0, 0, 1, 0]),
    ("zh-Hans", [0, 1, 0, 0]), ("zho_Hant", [0, 1, 0, 0]), ("zh", [0, 1, 0, 0])])
def test_a_response_in_the_language_is_found_by_any_of_its_codes(langdetect, language, expected):
    responses = [*TEXTS.values(), "14+9=23"]
    scores = score_responses(responses, [{}] * 4, ["language"], language)
    assert list(scores) == ["language"]
    assert scores["language"].tolist() == expected
    assert langdetect.DetectorFactory.seed == 0  # else it draws anew each time


def test_a_language_that_langdetect_does_not_know_is_refused_with_the_data(langdetect):
    with pytest.raises(InputError, match="'xx'; leave out this metric"):
        common.check_metrics(["language"], [{}], "a.txt", "xx")


def test_without_langdetect_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install langdetect"):
        common.check_metrics(["language"], [{}], "a.txt", "en")
