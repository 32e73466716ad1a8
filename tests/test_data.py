"""Finding and reading prompts, and the problems the tiny model is trained and judged on."""

import itertools
import random
import re
from pathlib import Path

import pytest

import make_tiny_moe as tiny
from common import InputError, find_data, read_examples


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_tsv_jsonl_and_txt_are_read(tmp_path):
    assert read_examples(write(tmp_path / "a.tsv", "How many?\t2,125\nTab\tin it\t-3\r\n")) == [
        {"prompt": "How many?", "answer": ["2,125"], "kind": "number"},
        {"prompt": "Tab\tin it", "answer": ["-3"], "kind": "number"}]
    text = write(tmp_path / "a.txt", "one\ntwo\n\n")
    assert read_examples(text) == [{"prompt": "one"}, {"prompt": "two"}]
    rows = ('{"prompt": "p", "response": "r", "answer": 5}\n'
            '{"question": "q"}\n{"text": "t\\u2028x"}\n')
    assert read_examples(write(tmp_path / "a.jsonl", rows)) == [
        {"prompt": "p", "response": "r", "answer": ["5"], "kind": "number"}, {"prompt": "q"},
        {"prompt": "t\u2028x"}]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n"])
def test_spaces_at_the_edges_of_a_line_stay_on_the_last_line_too(tmp_path, end):
    text = write(tmp_path / "a.txt", f" one \n\ttwo  {end}")
    assert [e["prompt"] for e in read_examples(text)] == [" one ", "\ttwo  "]
    table = read_examples(write(tmp_path / "a.tsv", f" one \t 1 \n  two \t blue {end}"))
    assert [(e["prompt"], e["answer"]) for e in table] == [(" one ", [" 1 "]), ("  two ", [" blue "])]
    assert [e["kind"] for e in table] == ["number", "span"]
    rows = '{"prompt": " one "}\n{"text": " two\\n"}'
    rows = read_examples(write(tmp_path / "a.jsonl", rows + end))
    assert rows == [{"prompt": " one "}, {"prompt": " two\n"}]


@pytest.mark.parametrize("name, text, message", [
    ("a.tsv", "one\t1\ntwo 2\n", r"a\.tsv:2: no tab"),
    ("a.tsv", "\t1\n", r"a\.tsv:1: an empty prompt"),
    ("a.txt", "one\n \ntwo\n", r"a\.txt:2: an empty prompt"),
    ("a.txt", "", r"a\.txt:1: an empty prompt"),
    ("a.json", '{"data": []}', r"a\.json: no prompts"),
    ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
    ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
    ("a.jsonl", '{"words": "a"}\n', r'a\.jsonl:1: an empty prompt, or no "prompt"'),
    ("a.csv", "a,b\n", r"a\.csv: cannot read '\.csv'"),
])
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, text, message):
    with pytest.raises(InputError, match=message):
        read_examples(write(tmp_path / name, text))


def test_languages_are_what_the_pattern_matches(tmp_path):
    for name in ("m_bn.tsv", "m_zh-Hans.tsv", "n_de.tsv"):
        write(tmp_path / name, "a\t1\n")
    pattern = str(tmp_path / "m_{lang}.tsv")
    assert list(find_data(pattern)) == ["bn", "zh-Hans"]
    assert list(find_data(pattern, "zh-Hans")) == ["zh-Hans"]
    assert find_data(pattern, "zh-Hans,bn")["bn"] == str(tmp_path / "m_bn.tsv")
    one = str(tmp_path / "n_de.tsv")
    assert find_data(one) == {"n_de": one} and find_data(one, "de") == {"de": one}


@pytest.mark.parametrize("pattern, languages, message", [
    ("x_{lang}.tsv", None, "no file matches"),
    ("m_{lang}.tsv", "de", "no such file: .*m_de.tsv"),
    ("m_{lang}.tsv", "bn,bn", "names a file twice"),
    ("m_{lang}.tsv", "../m_bn", "cannot name a file"),
    ("m_bn.tsv", "bn,de", "names a file twice; put {lang} into --data"),
])
def test_bad_patterns_and_languages_are_refused(tmp_path, pattern, languages, message):
    write(tmp_path / "m_bn.tsv", "a\t1\n")
    with pytest.raises(InputError, match=message):
        find_data(str(tmp_path / pattern), languages)


def solve(question):
    """An English problem of the tiny model's data, from its sentences: [(left, operator, right,
    result), ...].
    """
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if "Each box" in question:
        return [(numbers[0], "*", numbers[1], numbers[0] * numbers[1])]
    if "shares" in question:
        return [(numbers[0], "/", numbers[1], numbers[0] // numbers[1])]
    total, steps = numbers[0], []
    clauses = re.findall(r"[^.?]*\d[^.?]*", question.replace(" and ", ". "))[1:]
    for number, clause in zip(numbers[1:], clauses):
        sign = -1 if re.search("loses|sells|gives|fewer", clause) else 1
        steps.append((total, "+" if sign > 0 else "-", number, total + sign * number))
        total += sign * number
    return steps


def test_held_out_equations_are_in_one_set_only_and_never_trained_on():
    seen = {}
    for name in ("routing", "eval"):
        examples = read_examples(f"tests/data/{name}_en.tsv")
        assert len({e["prompt"] for e in examples}) == tiny.PROBLEMS_PER_SET
        steps = [solve(e["prompt"]) for e in examples]
        assert [[str(s[-1][-1])] for s in steps] == [e["answer"] for e in examples]
        seen[name] = {step for s in steps for step in s}
    rng = random.Random(5)
    problems = [tiny.draw_problem(rng, "train") for _ in range(20000)]
    equations = itertools.chain.from_iterable(problem["equations"] for problem in problems)
    seen["train"] = {(*left, result) for left, result in equations}
    assert not seen["routing"] & seen["eval"]
    assert not seen["train"] & (seen["routing"] | seen["eval"])
    for equations in seen.values():
        assert {operator for _, operator, *_ in equations} == set("+-*/")


def test_the_languages_tell_the_same_problems():
    for name in ("routing", "eval"):
        sets = [read_examples(f"tests/data/{name}_{language}.tsv") for language in tiny.LANGUAGES]
        for parallel in zip(*sets):
            numbers = {tuple(sorted(re.findall(r"\d+", e["prompt"]))) for e in parallel}
            assert len(numbers) == len({e["answer"][0] for e in parallel}) == 1


def test_the_data_is_what_its_script_makes(tmp_path):
    tiny.write_data(tmp_path)
    for language in tiny.LANGUAGES:
        for name in (f"routing_{language}.tsv", f"eval_{language}.tsv"):
            assert (tmp_path / name).read_bytes() == Path(f"tests/data/{name}").read_bytes()
