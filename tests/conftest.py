"""What several test files share: running a script, the tiny model, and dumps of it."""

import contextlib
import io
import json
import re
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch

import analyze
import capture
import common

# The models here are too small for more threads, and threads that spin slow down what runs beside
torch.set_num_threads(1)

TINY = "tests/tiny_moe"
RouterOutput = namedtuple("RouterOutput", ["logits", "weights", "selected"])


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "vllm: needs vLLM; .ci/vllm makes an environment that has it")


@contextlib.contextmanager
def command_line(script, *arguments):
    """In the block, sys.argv is the script's command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        yield


def run(script, *arguments):
    """Run a script's main() with these arguments, and return what it prints."""
    with command_line(script, *arguments), contextlib.redirect_stdout(io.StringIO()) as printed:
        script.main()
    return printed.getvalue()


def run_analyze(out, *arguments):
    """Run analyze.py with --out; return what it prints, and the arrays that it writes there."""
    printed = run(analyze, *arguments, "--out", out)
    with np.load(out, allow_pickle=False) as file:
        return printed, dict(file)


def parse(script, *arguments):
    """Return the arguments that a script reads from its command line."""
    with command_line(script, *arguments):
        return script.parse_arguments()


def read_rows(path):
    """Return the rows of a .jsonl file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def save_dump(path, selected_experts, language="en", num_experts=8, **arrays):
    """Write a dump that holds no more than expert IDs (tokens, layers, top_k), and return its path.

    arrays  more arrays of the dump
    """
    meta = json.dumps({"language": language, "num_experts": num_experts})
    np.savez(path, selected_experts=selected_experts, meta=meta, **arrays)
    return str(path)


def read_table(printed, *title):
    """Return {first cell: {heading: cell}} of the printed table with all these words in its title.

    All columns but the first are right-aligned, so that a cell ends where its heading ends.
    """
    for block in printed.split("\n\n"):
        lines = block.split("\n")
        first_row = next((i for i, line in enumerate(lines) if "  " in line), 0)
        words = " ".join(lines[:first_row])
        if first_row > 0 and all(part in words for part in title):
            break
    else:
        raise AssertionError(f"no table has {title} in its title")
    headings = list(re.finditer(r"\S+(?: \S+)*", lines[first_row]))
    if lines[first_row].startswith(" "):  # the first column has no heading
        headings.insert(0, re.match("", lines[first_row]))
    table = {}
    for line in lines[first_row + 1:]:
        first = line.split("  ")[0]
        if len(line) != len(lines[first_row]):
            break  # text behind the table
        table[first] = {}
        for left, right in zip(headings, headings[1:]):
            start = max(left.end(), len(first))
            table[first][right[0]] = line[start:right.end()].strip()
    return table


def make_routing(counts, num_tokens=100, layers=None):
    """Return the Routing of counts by hand, {language: (layers, experts)}; weights equal them."""
    arrays = np.array(list(counts.values()))
    num_languages, num_layers, _ = arrays.shape
    if layers is None:
        layers = range(num_layers)
    return analyze.Routing(
        languages=list(counts),
        layers=np.array(layers),
        counts=arrays,
        weight_sums=arrays.astype(float),
        null_counts=np.zeros((0, *arrays.shape), int),
        num_tokens=np.full(num_languages, num_tokens),
        top_k=2,
        segment="all",
        paths=[f"{language}.npz" for language in counts],
        meta=[{} for _ in counts],
    )


def save_selection(path, selection, layers):
    """Write experts chosen by hand, for --selection, and return the path."""
    np.savez(path, selection=selection, layers=layers)
    return str(path)


def prompt_nll_one_by_one(tiny, language, limit, **edit):
    """Return the prompt_nll of a language's first problems under an edit, one prompt at a time."""
    model, tokenizer = tiny
    examples = common.read_examples(f"tests/data/eval_{language}.tsv")[:limit]
    scores = []
    with torch.no_grad(), common.edit_routing(model, **edit):
        for example in common.encode_examples(tokenizer, examples):
            ids, (start, stop) = example["ids"], example["text_span"]
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats = [-log_probabilities[t - 1, ids[t]].item() for t in range(start, stop)]
            scores.append(np.mean(nats))
    return scores


@torch.inference_mode()
def record(model, ids):
    """Return {layer: RouterOutput} of one forward pass, tensors (tokens, ...)."""
    recorded = {}

    def on_router(layer, *output):
        assert layer not in recorded
        recorded[layer] = RouterOutput(*[values.flatten(0, -2) for values in output])

    with common.record_routing(model, on_router):
        model(input_ids=ids, use_cache=False)
    return recorded


def most_selected(output, number=1):
    """Return the experts of a layer's RouterOutput that are selected most."""
    counts = output.selected.flatten().bincount()
    return counts.argsort(descending=True)[:number].tolist()


def is_untouched(model):
    """Return whether no router has a hook or a forward of its own."""
    return all("forward" not in vars(router) and not router._forward_hooks
               for router in common.find_routers(model).values())


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer) of the tiny model, on the CPU; tests leave it as it is."""
    return common.load_model(TINY, device="cpu")


@pytest.fixture(scope="session")
def dumps(tmp_path_factory):
    """Paths of dumps of the tiny model in English, Swahili and Chinese, 60 prompts each."""
    folder = tmp_path_factory.mktemp("routing")
    run(capture, "--languages", "en,sw,zh", "--limit", 60, "--out", folder)
    return [str(folder / f"{language}.npz") for language in ("en", "sw", "zh")]
