"""The problems that the tiny model is trained and scored on."""

import random
import re
from pathlib import Path

import make_tiny_moe
from common import read_examples


def equations_of(question):
    """Return the equations [(left, operator, right, result), ...] that solve an English problem.

    They are read from its sentences, without the code that wrote them.
    """
    first, *numbers = [int(number) for number in re.findall(r"\d+", question)]
    if "Each box" in question:
        return [(first, "*", numbers[0], first * numbers[0])]
    if "shares" in question:
        return [(first, "/", numbers[0], first // numbers[0])]
    _, *clauses = re.findall(r"[^.?]*\d[^.?]*", question.replace(" and ", ". "))
    total, equations = first, []
    for number, clause in zip(numbers, clauses):
        if re.search("loses|sells|gives|fewer", clause):
            equations.append((total, "-", number, total - number))
        else:
            equations.append((total, "+", number, total + number))
        total = equations[-1][-1]
    return equations


def equations_of_set(name):
    """Return the set of all equations that solve routing_en.tsv or eval_en.tsv."""
    equations = set()
    for example in read_examples(f"tests/data/{name}_en.tsv"):
        equations.update(equations_of(example["prompt"]))
    return equations


def test_the_answer_is_the_result_of_the_last_equation():
    for name in ("routing", "eval"):
        examples = read_examples(f"tests/data/{name}_en.tsv")
        assert len({example["prompt"] for example in examples}) == make_tiny_moe.PROBLEMS_PER_SET
        for example in examples:
            assert example["answer"] == [str(equations_of(example["prompt"])[-1][-1])]


def test_an_equation_is_in_one_set_only_and_held_out_ones_are_never_trained_on():
    rng = random.Random(5)
    trained = set()
    for _ in range(20000):
        for left, result in make_tiny_moe.draw_problem(rng, "train")["equations"]:
            trained.add((*left, result))
    routing, evaluation = equations_of_set("routing"), equations_of_set("eval")
    assert not routing & evaluation
    assert not trained & (routing | evaluation)
    for equations in (routing, evaluation, trained):
        assert {operator for _, operator, _, _ in equations} == set("+-*/")


def test_the_languages_tell_the_same_problems():
    for name in ("routing", "eval"):
        sets = [read_examples(f"tests/data/{name}_{language}.tsv")
                for language in make_tiny_moe.LANGUAGES]
        for parallel in zip(*sets, strict=True):
            numbers = {tuple(sorted(re.findall(r"\d+", each["prompt"]))) for each in parallel}
            assert len(numbers) == 1
            assert len({each["answer"][0] for each in parallel}) == 1


def test_the_data_is_what_its_script_makes(tmp_path):
    make_tiny_moe.write_data(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in Path("tests/data").glob("*.tsv"))
    for name in made:
        assert (tmp_path / name).read_bytes() == Path("tests/data", name).read_bytes()
