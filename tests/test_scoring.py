"""Prompts are read and encoded, scored by their logits, and responses generated.

In the order of common.py: prompts, templates and spans, batches, scores from logits, generation.
How answers are scored is in test_answers.py.
"""

import copy
import json
import os
import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedTokenizerFast

import common
from capture import capture
from common import (InputError, encode_example, encode_examples, find_data, generate,
                    length_batches, read_examples, run_batches, score_prompts, score_responses)
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


@pytest.mark.parametrize("pattern", ["data/m_{lang}.tsv", r"data\m_{lang}.tsv"])
def test_languages_are_found_where_paths_have_backslashes(monkeypatch, pattern):
    monkeypatch.setattr(os, "sep", "\\")
    found = [r"data\m_zh-Hans.tsv", r"data\m_bn.tsv", r"data\m_a\b.tsv"]
    monkeypatch.setattr(common.glob, "glob", lambda pattern: found)
    assert common.matching_languages(pattern) == ["bn", "zh-Hans"]


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


@pytest.mark.parametrize("name", ["a.txt", "eng.dev", "eng_Latn.devtest"])
def test_a_txt_line_is_a_prompt_without_the_files_byte_order_mark(tmp_path, name):
    path = write(tmp_path / name, "\ufeffone\ntwo\n")
    assert read_examples(path) == [{"prompt": "one"}, {"prompt": "two"}]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_error_for_a_table_holds_the_command_that_converts_it(tmp_path, monkeypatch, suffix):
    path = write(tmp_path / f"m_bn.{suffix}", b"\xff")
    with pytest.raises(InputError, match="convert it to .jsonl") as error:
        read_examples(path)
    pandas = Mock()
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    exec(re.search('python -c "(.*)"$', str(error.value))[1])
    read = getattr(pandas, f"read_{suffix}")
    read.assert_called_once_with(path)
    read.return_value.to_json.assert_called_once_with(
        "m_bn.jsonl", orient="records", lines=True, force_ascii=False)


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
    ("a.csv", "a,b\n", "a.csv: .*convert it"),
    ("a.md", "one\n", "a.md: cannot read '.md'; give .tsv.* renamed to .txt"),
    ("a", "one\n", "a: cannot read ''; give .tsv.* renamed to .txt"),
    ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "a.json: .* renamed to .jsonl"),
    ("a.json", '{"prompt": "a"}\n', "a.json: .* renamed to .jsonl"),
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


def test_options_of_a_template_are_those_given_and_no_others(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = CONTENT + " {{ enable_thinking }} {{ reasoning_effort }}"
    assert common.rendered(tokenizer, "Hi")[0] == "Hi False "
    options = {"reasoning_effort": "low"}
    assert common.rendered(tokenizer, "Hi", options=options)[0] == "Hi  low"
    expected = tokenizer("Hi  low")["input_ids"]
    assert encode_example(tokenizer, {"prompt": "Hi"}, options=options)[0] == expected
    assert encode_examples(tokenizer, [{"prompt": "Hi"}], options=options)[0]["ids"] == expected


REFUSE = ("{% if enable_thinking is false %}"
          "{{ raise_exception('Disabling thinking is not supported.\\nSee there.') }}{% endif %}")


@pytest.mark.parametrize("template", [
    REFUSE + CONTENT, "{{ '<u>' + messages[0]['content'] }}" + REFUSE, PARTS + REFUSE])
def test_a_template_that_raises_gives_its_own_reason(tiny, template):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="Disabling thinking is not supported.; .*--chat-template-"
                                         "options, or --chat-template never") as error:
        encode_example(tokenizer, {"prompt": "Hi"})
    assert "\n" not in str(error.value)
    assert common.rendered(tokenizer, "Hi", options={})[0].endswith("Hi")


@pytest.mark.parametrize("template", [
    "{{ strftime_now('%d %b %Y') }} ",
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }} "])
def test_today_is_always_the_same_day_in_a_template(tiny, monkeypatch, template):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = template + CONTENT
    assert common.rendered(tokenizer, "Hi")[0] == "01 Jan 2026 Hi"
    monkeypatch.setattr(common, "TEMPLATE_DATE", "2031-02-03")
    assert common.rendered(tokenizer, "Hi")[0] == "03 Feb 2031 Hi"
    by_option = common.rendered(tokenizer, "Hi", options={"date_string": "today"})[0]
    assert by_option == ("today Hi" if "date_string" in template else "03 Feb 2031 Hi")
    messages = [{"role": "user", "content": "Hi"}]  # outside, today is today
    assert "2031" not in tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("prompt", ["Anna.", "Anna.<eos>"])
def test_an_end_that_the_tokenizer_appends_to_a_bare_prompt_is_dropped(joining, prompt):
    tokenizer = copy.deepcopy(joining)
    plain = encode_example(tokenizer, {"prompt": prompt})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    for chat_template in ("auto", "never"):  # it has no template, so that both are bare
        assert encode_example(tokenizer, {"prompt": prompt}, chat_template) == plain
    assert text_of(tokenizer, plain[0]) == f"<bos>{prompt}"


def test_without_offsets_the_span_is_what_lies_between_head_and_tail():
    class SlowTokenizer:  # without is_fast, as some are
        """Tokens are characters, between <s> and </s> if there is no template."""
        chat_template, eos_token_id = "<u>" + CONTENT + "</u>", 2

        def apply_chat_template(self, messages, **options):
            return f"<u>{messages[0]['content']}</u>"

        def __call__(self, text, add_special_tokens):
            ids = [ord(character) for character in text]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    tokenizer = SlowTokenizer()
    ids, (start, stop) = encode_example(tokenizer, {"prompt": "a 1", "instruction": "c"})
    assert "".join(map(chr, ids)) == "<u>a 1\n\nc</u>"
    assert (start, stop) == (3, 6)
    assert encode_example(tokenizer, {"prompt": "ab"}, "never") == ([1, 97, 98], (1, 3))


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
        added = {"ids": ids, "text_span": text_span, "answer_ids": encoded["answer_ids"],
                 "in_thinking": False}
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


class NoDoubleOnDevice(TorchFunctionMode):
    """Fails where a tensor of float64 is made that does not come from a call of cpu()."""

    def __init__(self):
        super().__init__()
        self.on_host = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.Tensor.cpu:
            output = output.clone()  # on this machine, cpu() does nothing
        is_double = isinstance(output, torch.Tensor) and output.dtype == torch.float64
        if is_double:
            assert any(args[0] is tensor for tensor in self.on_host), func
        if is_double or func is torch.Tensor.cpu:
            self.on_host.append(output)
        return output


def test_devices_without_float64_score_and_capture(tiny):
    model, tokenizer = tiny
    examples = encode_examples(tokenizer, read_examples("tests/data/eval_en.tsv")[:2])
    expected = score_prompts(model, tokenizer, examples)
    generation = {"pad_token_id": 0, "eos_token_id": None}
    with NoDoubleOnDevice() as mode:
        scores = score_prompts(model, tokenizer, examples)
        assert len(mode.on_host) > 0
        capture(model, [example["ids"] for example in examples])
        common.padding_changes_logits(model, examples[0]["ids"], generation)
    assert scores["prompt_nll"].tolist() == expected["prompt_nll"].tolist()


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


SAMPLING = {"do_sample": True, "temperature": 3.0, "top_k": 50, "max_new_tokens": 8}


def test_sampling_repeats_with_its_seed(tiny, questions):
    first, again, other = [generate(*tiny, questions, 999, seed, **SAMPLING)[0]
                           for seed in (1, 1, 2)]
    assert first == again != other


def test_samples_of_a_prompt_do_not_depend_on_its_batch(tiny, questions, monkeypatch):
    model, tokenizer = tiny
    expected, _ = generate(model, tokenizer, questions, batch_tokens=9999, seed=5, **SAMPLING)
    assert len(set(expected)) == len(questions)
    for batch_tokens in (1, 150):
        found, _ = generate(model, tokenizer, questions, batch_tokens, seed=5, **SAMPLING)
        assert found == expected
    assert generate(model, tokenizer, questions[:3], seed=5, **SAMPLING)[0] == expected[:3]
    sizes, generate_batch = [], model.generate

    def fail_on_four(input_ids, **arguments):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError
        return generate_batch(input_ids=input_ids, **arguments)

    monkeypatch.setattr(model, "generate", fail_on_four)
    assert generate(model, tokenizer, questions, 9999, seed=5, **SAMPLING)[0] == expected
    assert sizes == [9, 4, 2, 2, 5, 2, 3]


def probabilities_by_hand(logits, temperature, top_k, top_p):
    """Return the probabilities (vocabulary,) of sampling from logits, in float64."""
    probabilities = np.exp(np.array(logits) / temperature)
    descending = np.argsort(-probabilities)
    probabilities[descending[top_k or len(logits):]] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities[descending]) - probabilities[descending]
    probabilities[descending[before >= top_p]] = 0  # the most probable ones that reach top_p stay
    return probabilities / probabilities.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.8), (0.7, 5, 0.8), (1.0, 99, 1.0)])
def test_tokens_are_sampled_with_their_probabilities(temperature, top_k, top_p):
    logits = [1.0, -0.5, 2.0, 0.3, -3.0, 1.7, 0.0, -1.0]
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampler = common.PromptSampler(range(20000), "cpu", settings)  # each prompt has its seed
    sampled = sampler(None, torch.tensor(logits).expand(20000, -1)).argmax(-1)
    frequencies = sampled.bincount(minlength=len(logits)).numpy() / 20000
    expected = probabilities_by_hand(logits, **settings)
    standard_error = np.sqrt(expected * (1 - expected) / 20000)
    assert (np.abs(frequencies - expected) <= 4 * standard_error).all()
    again = sampler(None, torch.tensor(logits).expand(20000, -1)).argmax(-1)
    assert (sampled == again).float().mean() < 0.8  # the next token has noise of its own


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
    greedy = {"max_new_tokens": 32, "eos_token_id": [2], "pad_token_id": 0, "do_sample": False,
              "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    assert settings_of_flags(tiny) == greedy
    assert settings_of_flags(tiny, "--temperature", 0, "--seed", 3) == greedy
    sampled = settings_of_flags(tiny, "--temperature", 0.7, "--seed", 3)
    assert sampled == greedy | {"do_sample": True, "temperature": 0.7, "seed": 3}
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
