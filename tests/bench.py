"""
Measure how fast the scripts are, as ratios within one run on the same work. Nothing here is a test.

    python tests/bench.py                                      # small shape, CPU: ten minutes
    python tests/bench.py --device cuda --shape qwen3-30b-a3b  # 61 GB of random weights, on a GPU
    python tests/bench.py --only capture analyze

capture  capture.py against a bare forward pass, and against a recorder of the paper's kind
analyze  analyze.py as whole processes: a million tokens of IDs in 8 languages; 100 languages
cells    ablate.py: seconds per cell beyond the evaluation itself
engine   generation, plain and edited, by static batches and generate_batch of transformers and,
         where it is installed (.ci/vllm), by vLLM: a process each
"""

import argparse
import functools
import io
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ablate  # noqa: E402
import capture  # noqa: E402
import common  # noqa: E402
from analyze import print_table  # noqa: E402

# ------------------------------------------------------------------------------------------------
SHAPES = {  # as far as they differ from the defaults of Qwen3MoeConfig
    "small": {
        "num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": 64, "num_experts_per_tok": 4,
        "moe_intermediate_size": 128, "vocab_size": 8192, "dtype": "float32"},
    "qwen3-30b-a3b": {"num_hidden_layers": 48, "head_dim": 128, "dtype": "bfloat16"},
}
# Mean number of tokens of an MGSM problem with Qwen3's tokenizer and chat template
MEAN_LENGTHS = {"bn": 270, "de": 94, "en": 73, "es": 90, "fr": 92, "ja": 93, "sw": 118, "zh": 78}
ENGINES = ("static batches", "generate_batch", "vllm")
# ------------------------------------------------------------------------------------------------


def build_model(shape, device):
    """Return a model of random weights, made where it runs."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SHAPES[shape])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()


def draw_prompts(num_prompts):
    """Return lists of random token IDs, num_prompts of each language, one after the other."""
    rng = np.random.default_rng(0)
    means = np.repeat(list(MEAN_LENGTHS.values()), num_prompts)
    lengths = rng.lognormal(np.log(means) - 0.08, 0.4).clip(16, 1000).astype(int)
    return [rng.integers(3, 8192, length).tolist() for length in lengths]


def timed(run, device="cpu"):
    """Return the seconds that run() takes, and what it returns."""
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure_in_turn(variants, rounds, device):
    """Return {name: seconds (rounds,)} of functions without arguments, {name: function}.

    They run in turn, A B C A B C, so that a machine that becomes slower meets all alike.
    """
    for run in variants.values():
        run()  # the first run is slower
    seconds = {name: np.zeros(rounds) for name in variants}
    for i in range(rounds):
        for name, run in variants.items():
            seconds[name][i], _ = timed(run, device)
    return seconds


# ----------------------------------------------------------------------------------------- capture

@torch.inference_mode()
def run_bare(model, prompts, batch_tokens):
    """Run the decoder over the batches of capture.py."""
    for batch in common.length_batches([len(ids) for ids in prompts], batch_tokens):
        ids = common.padded_batch(model, prompts, batch)
        model.get_decoder()(input_ids=ids, use_cache=False)


@torch.inference_mode()
def record_expert_by_expert(model, prompts):
    """Record as the paper's records were made.

    Sixteen prompts as they come, padded on the left, one token generated, and the device is waited
    for twice per expert, layer and batch.
    """
    counts, weight_sums = Counter(), Counter()

    def on_router(layer, router_logits, routing_weights, selected_experts):
        for expert in selected_experts.unique().tolist():
            is_expert = selected_experts == expert
            counts[layer, expert] += is_expert.sum().item()
            weight_sums[layer, expert] += (routing_weights * is_expert).sum().item()

    with common.record_routing(model, on_router):
        for start in range(0, len(prompts), 16):
            batch = range(start, min(start + 16, len(prompts)))
            ids = common.padded_batch(model, prompts, batch, fill=-1, side="left")
            model.generate(
                input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), max_new_tokens=1,
                do_sample=False, pad_token_id=0)


def host_waits(model, prompts, batch_tokens):
    """Return what makes the host wait for the GPU between the first decoder layer and the last."""
    layers = model.get_decoder().layers
    set_mode = torch.cuda.set_sync_debug_mode
    handles = [layers[0].register_forward_pre_hook(lambda *_: set_mode("error")),
               layers[-1].register_forward_hook(lambda *_: set_mode("default"))]
    try:
        capture.capture(model, prompts, batch_tokens, null_draws=capture.NULL_DRAWS)
        return "nothing"
    except RuntimeError as error:
        return common.first_line(error)
    finally:
        set_mode("default")
        for handle in handles:
            handle.remove()


def bench_capture(args):
    """Print the speed of capture.py in relation to a bare forward pass."""
    model = build_model(args.shape, args.device)
    prompts = draw_prompts(args.prompts)
    run_capture = functools.partial(capture.capture, model, prompts, args.batch_tokens)
    seconds = measure_in_turn({
        "bare forward": lambda: run_bare(model, prompts, args.batch_tokens),
        "capture.py": run_capture,
        "capture.py --stats-only": lambda: run_capture(stats_only=True),
        "capture.py --null-router": lambda: run_capture(null_draws=capture.NULL_DRAWS),
        "expert by expert": lambda: record_expert_by_expert(model, prompts),
    }, args.rounds, args.device)
    num_tokens = sum(len(ids) for ids in prompts)
    print_table(f"capture: {num_tokens:,} tokens of {len(prompts)} prompts", {
        "": list(seconds),
        "tokens/s": [f"{num_tokens / np.median(times):,.0f}" for times in seconds.values()],
        "of bare": [np.median(seconds["bare forward"] / times) for times in seconds.values()],
    })
    if args.device == "cuda":
        print("what makes the host wait for the GPU within the layers: "
              + host_waits(model, prompts, args.batch_tokens))


# ----------------------------------------------------------------------------------------- analyze

def save_random_dump(path, language, num_tokens):
    """Save a dump of random routing, of the size of Qwen3-30B-A3B."""
    layers, num_experts, top_k = 48, 128, 8
    num_sequences = num_tokens // 125
    rng = np.random.default_rng(num_tokens)
    # Neighbours of a random expert: top_k different ones that are quickly drawn
    first = rng.integers(0, num_experts, (num_sequences * 125, layers, 1), np.int16)
    selected = ((first + np.arange(top_k, dtype=np.int16)) % num_experts).astype(np.uint8)
    counts = np.array([np.bincount(selected[:, layer].ravel(), minlength=num_experts)
                       for layer in range(layers)])
    dump = {
        "selected_experts": selected,
        "token_ids": rng.integers(0, 150_000, len(selected)).astype(np.int32),
        "counts": counts,
        "weight_sums": counts / top_k,
        "mean_probs": np.ones((num_sequences, layers, num_experts), np.float32),
        "layers": np.arange(layers),
        "prompt_lengths": np.full(num_sequences, 125),
        "sequence_offsets": np.arange(num_sequences + 1) * 125,
    }
    capture.save_dump(path, dump, {"language": language, "num_experts": num_experts,
                                   "top_k": top_k, "format": capture.FORMAT, "model": "random"})


def time_analyze(num_tokens, rounds, *flags):
    """Return the median seconds of analyze.py for dumps of {language: number of tokens}."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{language}.npz" for language in num_tokens]
        for path, language in zip(paths, num_tokens):
            save_random_dump(path, language, num_tokens[language])
        command = [sys.executable, "analyze.py", *paths, *flags, "--out", f"{folder}/analysis.npz"]
        run = functools.partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True)
        return np.median([timed(run)[0] for _ in range(rounds)])


def bench_analyze(args):
    """Print the seconds of whole processes of analyze.py."""
    hundred = dict.fromkeys([f"{i:03}" for i in range(100)], 1000)
    mgsm = {language: 250 * mean for language, mean in MEAN_LENGTHS.items()}
    seconds = {
        "8 languages, a million tokens counted from their IDs":
            time_analyze(dict.fromkeys(MEAN_LENGTHS, 10**6), args.rounds, "--segment", "prompt"),
        "100 languages, without reading IDs": time_analyze(hundred, args.rounds),
        "8 languages, 250 problems, bootstrap and vocabulary":
            time_analyze(mgsm, 1, "--bootstrap", "1000", "--vocabulary"),
    }
    print_table("analyze.py processes", {"": list(seconds), "seconds": list(seconds.values())})


# ------------------------------------------------------------------------------------------- cells

def bench_cells(args):
    """Print what ablate.py spends outside of the evaluations, on the tiny model."""
    seconds = {"score_prompts": [], "load_weights": [], "check_model": []}

    def run_timed(name, function, *arguments, **options):
        took, result = timed(lambda: function(*arguments, **options))
        seconds[name].append(took)
        return result

    functions = {name: functools.partial(run_timed, name, getattr(common, name))
                 for name in seconds}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        with patch.object(sys, "argv", ["capture.py", "--out", folder, "--limit", "20"]):
            capture.main()
        paths = [f"{folder}/{language}.npz" for language in MEAN_LENGTHS]
        argv = ["ablate.py", "--routing", *paths, "--limit", "20", "--out", f"{folder}/out.jsonl"]
        with patch.object(sys, "argv", argv), patch.multiple(common, **functions):
            took, _ = timed(ablate.main)
    num_cells = len(seconds["score_prompts"])
    beyond = took - sum(sum(times) for times in seconds.values())
    evaluation = np.mean(seconds["score_prompts"])
    print(f"\ncells: {num_cells} evaluations of 20 problems, {evaluation:.3f} s each, and "
          f"{beyond / num_cells:.4f} s beyond it, without the load of the model")


# ------------------------------------------------------------------------------------------ engine

def load_engine(args):
    """Return the model that an engine runs, and its routing_shape."""
    skeleton = build_model(args.shape, "meta")
    routing_shape = common.routing_shape(skeleton)
    if args.engine != "vllm":
        return build_model(args.shape, args.device), routing_shape
    with tempfile.TemporaryDirectory() as folder:
        skeleton.config.architectures = [type(skeleton).__name__]
        skeleton.config.save_pretrained(folder)
        # Dummy weights are random. No prefix cache, since the prompts come again in every round.
        engine = common.VLLMEngine(
            folder, routing_shape, load_format="dummy", max_model_len=2048,
            skip_tokenizer_init=True, enable_prefix_caching=False,
            gpu_memory_utilization=0.9 if args.device == "cuda" else 0.3)
    return engine, routing_shape


def generate(args, model, prompts, edit):
    """Generate a response of args.new_tokens tokens to each prompt, under an edit."""
    if args.engine == "vllm":
        with model.edit_routing(**edit, count_changes=False):
            # One token has to end responses; random ones hardly ever reach it
            model.complete(prompts, max_new_tokens=args.new_tokens, eos_token_id=[2])
        return
    with common.edit_routing(model, **edit, count_changes=False):
        if args.engine == "generate_batch":
            model.generate_batch(
                inputs=prompts, max_new_tokens=args.new_tokens, do_sample=False, eos_token_id=-1,
                pad_token_id=0, progress_bar=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained("tests/tiny_moe")
            common.generate(
                model, tokenizer, [{"ids": ids} for ids in prompts], 4 * args.batch_tokens,
                max_new_tokens=args.new_tokens, eos_token_id=None)


def run_engine(args):
    """Print the tokens/s of one engine: plain, masked in a tenth of the layers, and steered."""
    model, routing_shape = load_engine(args)
    layers = list(routing_shape)
    num_experts, _ = routing_shape[layers[0]]
    paper_band = layers[len(layers) * 10 // 48:len(layers) * 40 // 48]
    boost = np.where(np.arange(num_experts) % 7 == 0, 1e-9, 0)  # changes no response
    edits = {
        "plain": {},
        "masked": {"masks": {layer: [3, 5] for layer in layers[:max(1, len(layers) // 10)]}},
        "steered": {"boosts": dict.fromkeys(paper_band, boost)},
    }
    prompts = draw_prompts(args.responses)
    variants = {name: functools.partial(generate, args, model, prompts, edit)
                for name, edit in edits.items()}
    seconds = measure_in_turn(variants, args.rounds, args.device)
    num_tokens = len(prompts) * args.new_tokens
    print("tokens/s", *[f"{num_tokens / np.median(times):,.0f}" for times in seconds.values()])


def bench_engine(args):
    """Print the tokens/s of every engine: a process each, so that none finds another's memory."""
    rows = []
    for engine in ENGINES:
        command = [sys.executable, "tests/bench.py", *sys.argv[1:], "--engine", engine]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("tokens/s")]
        if lines:
            rows.append([engine, *lines[0].split()[1:], ""])
        else:
            _, _, error = done.stderr.strip().rpartition("\n")
            rows.append([engine, "-", "-", "-", f"does not run here: {error[:50]}"])
    headings = ["", "plain", "masked", "steered", "note"]
    print_table(f"engine: tokens/s, {args.new_tokens} new tokens for each of "
                f"{args.responses * len(MEAN_LENGTHS)} prompts", dict(zip(headings, zip(*rows))))


PARTS = {"capture": bench_capture, "analyze": bench_analyze, "cells": bench_cells,
         "engine": bench_engine}


def main():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shape", choices=SHAPES, default="small", help="of random models (%(default)s)")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    add("--batch-tokens", type=int, default=capture.BATCH_TOKENS)
    add("--prompts", type=int, default=80, help="to capture, per language (%(default)s)")
    add("--responses", type=int, default=4, help="to generate, per language (%(default)s)")
    add("--new-tokens", type=int, default=32, help="of a response (%(default)s)")
    add("--rounds", type=int, default=3, help="of each variant (%(default)s)")
    add("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # of a process of bench_engine
    args = parser.parse_args()
    os.chdir(ROOT)  # the scripts' default paths are relative to it
    if args.engine:
        run_engine(args)
        return
    on_gpu = args.device == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    print(f"{time.strftime('%Y-%m-%d')}  {machine}  torch {torch.__version__}  "
          f"transformers {transformers.__version__}  {args.shape}")
    for part in args.only:
        PARTS[part](args)


if __name__ == "__main__":
    main()
