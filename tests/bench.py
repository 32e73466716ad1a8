"""
How fast, measured as ratios within one run on the same work. Nothing here is a test.

    python tests/bench.py                                              # small shape, CPU: a quarter of an hour on two cores
    python tests/bench.py --device cuda --shape qwen3-30b-a3b          # 61 GB of random weights, made on the GPU
    python tests/bench.py --only capture analyze

capture     the base model's bare forward against capture.py, with IDs and without, and against two other recorders
analyze     analyze.py as a whole process: a million tokens of IDs in each of 8 languages; 100 languages
generate    steered and masked generation against plain, and against continuous batching
cells       ablation cells: seconds beyond the evaluation itself
kernels     experts and attention implementations: speed, and whether the same experts are selected
growth      time and memory at 2, 4 and 8 times the tokens
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ablate  # noqa: E402
import capture  # noqa: E402
import common  # noqa: E402

SHAPES = {
    "qwen3-30b-a3b": dict(num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
                          num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144,
                          vocab_size=151936, max_position_embeddings=40960, dtype="bfloat16"),
    "small": dict(num_hidden_layers=8, hidden_size=256, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
                  num_experts=64, num_experts_per_tok=4, moe_intermediate_size=128, intermediate_size=512,
                  vocab_size=8192, max_position_embeddings=4096, dtype="float32"),
}
# tokens per MGSM problem with Qwen3's tokenizer and chat template; within a language, lengths are log-normal, sigma 0.4
MEAN_LENGTHS = {"bn": 270, "de": 94, "en": 73, "es": 90, "fr": 92, "ja": 93, "sw": 118, "zh": 78}


def build(shape, device):
    """A model of random weights, made where it runs."""
    sizes = SHAPES[shape] | {"num_local_experts": SHAPES[shape]["num_experts"]}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=getattr(torch, sizes["dtype"])).eval()
    model.generation_config.eos_token_id = None  # every response takes all its steps
    return model


def make_corpora(prompts, vocab, seed=0):
    """{language: (sequences of random ids, prompt_lengths)}."""
    rng, corpora = np.random.default_rng(seed), {}
    for language, mean in MEAN_LENGTHS.items():
        lengths = np.clip(rng.lognormal(np.log(mean) - 0.08, 0.4, prompts), 16, 2000).astype(int)
        corpora[language] = [rng.integers(3, vocab, n).astype(np.int32) for n in lengths], lengths.tolist()
    return corpora


def total(corpora):
    return sum(sum(lengths) for _, lengths in corpora.values())


# ------------------------------------------------------------------------------------------------------------- measuring

class Memory:
    """Peak GiB while a block runs: .device as the allocator has it, .host beyond what was there before (Linux)."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = self.top = self.anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.host = (self.top - self.start) / 2**30
        self.device = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")

    def watch(self):
        while not self.done.wait(0.02):
            self.top = max(self.top, self.anonymous())

    @staticmethod
    def anonymous():
        """Bytes that are the process's own: pages of files, which the system takes back as it likes, do not count."""
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def seconds(run, device):
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def in_turn(variants, rounds, device):
    """{name: (times, last result, memory)}; all in turn, A B C A B C, so that a machine's drift meets all alike."""
    measured = {name: ([], None, None) for name in variants}
    for name, run in variants.items():
        run()  # warm
    for _ in range(rounds):
        for name, run in variants.items():
            with Memory() as memory:
                took, result = seconds(run, device)
            measured[name] = measured[name][0] + [took], result, memory
    return measured


def ratio(base, other):
    """Median over rounds of how fast the other is, where the base is 1."""
    return np.median(np.array(base) / np.array(other))


# --------------------------------------------------------------------------------------------------------------- capture

@torch.inference_mode()
def bare(model, corpora, batches):
    """The decoder's forward over the same batches, nothing watched. Returns the share of padding."""
    sequences = [ids for texts, _ in corpora.values() for ids in texts]
    padded = 0
    for batch in batches:
        ids = common.right_padded([sequences[i] for i in batch]).to(model.device)
        model.get_decoder()(input_ids=ids, use_cache=False)
        padded += ids.numel()
    return 1 - total(corpora) / padded


def ours(model, corpora, batch_tokens, stats_only, folder):
    def on_disk(shape, dtype):
        return np.memmap(tempfile.TemporaryFile(dir=folder), dtype, "w+", shape=shape)
    dumps, padded = capture.capture(model, corpora, batch_tokens, stats_only, empty=on_disk)
    return padded / (padded + total(corpora)), dumps


@torch.inference_mode()
def expert_by_expert(model, corpora):
    """A recorder that waits for the device twice per expert, layer and batch, over sixteen prompts in file order, padded on
    the left, with one token generated: how the paper's records were made.
    """
    record, padded = {}, 0

    def on_router(layer, router_logits, routing_weights, selected_experts):
        for expert in selected_experts.unique().tolist():
            hits = selected_experts == expert
            tokens, gates = record.get((layer, expert), (0, 0.0))
            record[layer, expert] = tokens + hits.sum().item(), gates + (routing_weights * hits).sum().item()

    with common.record_routing(model, on_router):
        for texts, _ in corpora.values():
            for start in range(0, len(texts), 16):
                batch = texts[start:start + 16]
                longest = max(map(len, batch))
                ids = torch.tensor(np.stack([np.pad(ids, (longest - len(ids), 0)) for ids in batch]), dtype=torch.int64)
                mask = torch.arange(longest) >= torch.tensor([longest - len(ids) for ids in batch])[:, None]
                model.generate(input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device),
                               max_new_tokens=1, do_sample=False, pad_token_id=0)
                padded += ids.numel()
    return 1 - total(corpora) / padded


@torch.inference_mode()
def router_logits_then_topk(model, corpora, batches, top_k):
    """What transformers returns by itself, and a top-k behind it, kept on the device until the end."""
    sequences = [ids for texts, _ in corpora.values() for ids in texts]
    kept, padded = [], 0
    for batch in batches:
        ids = common.right_padded([sequences[i] for i in batch]).to(model.device)
        logits = model.get_decoder()(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
        kept.append(torch.stack([layer.topk(top_k, -1).indices for layer in logits]))
        padded += ids.numel()
    for ids in kept:
        ids.cpu()
    return 1 - total(corpora) / padded


def waits_inside(model, corpora, batch_tokens):
    """Whether anything makes the host wait for the GPU between the first decoder layer and the last; CUDA only."""
    blocks = model.get_decoder().layers
    handles = [blocks[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
               blocks[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))]
    try:
        capture.capture(model, corpora, batch_tokens)
        return "no"
    except RuntimeError as error:
        return f"yes: {common.first_line(error)}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for handle in handles:
            handle.remove()


def bench_capture(model, args):
    corpora = make_corpora(args.prompts, model.config.vocab_size)
    tokens = total(corpora)
    batches = common.length_batches([n for _, lengths in corpora.values() for n in lengths], args.batch_tokens)
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "bare forward": lambda: bare(model, corpora, batches),
            "capture.py": lambda: ours(model, corpora, args.batch_tokens, False, folder),
            "capture.py --stats-only": lambda: ours(model, corpora, args.batch_tokens, True, folder),
            "router logits, then top-k": lambda: router_logits_then_topk(model, corpora, batches, model.config.num_experts_per_tok),
            "expert by expert": lambda: expert_by_expert(model, corpora),
        }
        measured = in_turn(variants, args.rounds, args.device)
        print(f"\ncapture: {tokens:,} tokens of {len(corpora)} languages, {len(batches)} batches of up to {args.batch_tokens} tokens")
        print(f"{'':<26}{'tokens/s':>10}{'of bare':>9}{'padding':>9}{'GPU GiB':>9}{'host GiB':>10}{'dumps MB':>10}{'written in':>12}")
        for name, (times, result, memory) in measured.items():
            padding, dumps = result if isinstance(result, tuple) else (result, None)
            line = (f"{name:<26}{tokens / np.median(times):>10,.0f}{ratio(measured['bare forward'][0], times):>9.3f}{padding:>9.1%}"
                    f"{memory.device:>9.1f}{memory.host:>+10.2f}")
            if dumps:
                meta, paths = {"top_k": model.config.num_experts_per_tok}, {l: Path(folder, f"{l}.npz") for l in dumps}
                took, _ = seconds(lambda: [capture.save_dump(paths[l], dump, meta) for l, dump in dumps.items()], args.device)
                line += f"{sum(path.stat().st_size for path in paths.values()) / 1e6:>10.1f}{took:>10.2f} s"
                if name == "capture.py":
                    took, _ = seconds(lambda: [np.savez_compressed(path, **dumps[l]) for l, path in paths.items()], args.device)
                    squeezed = f"compressed, they would be {sum(p.stat().st_size for p in paths.values()) / 1e6:.1f} MB, written in {took:.2f} s"
            print(line)
        print(squeezed)
        if args.device == "cuda":
            print("does the host wait for the GPU within the layers?", waits_inside(model, corpora, args.batch_tokens))


# --------------------------------------------------------------------------------------------------------------- analyze

def fake_dump(path, language, tokens, with_ids, rng, shape=(48, 128), top_k=8):
    """A dump of random routing, in which every row adds up."""
    layers, num_experts = shape
    start = rng.random((1, layers, 1)) * num_experts  # neighbouring ids: top_k different ones, quickly drawn
    ids = ((start + rng.integers(0, num_experts, (tokens if with_ids else 1000, layers, 1)) + np.arange(top_k)) % num_experts).astype(np.uint8)
    counts = np.stack([np.bincount(ids[:, layer].ravel(), minlength=num_experts) for layer in range(layers)])
    sequences = len(ids) // 125
    dump = {"counts": counts, "weight_sums": counts / top_k, "layers": np.arange(layers, dtype=np.int32),
            "mean_probs": np.ones((sequences, layers, num_experts), np.float32), "prompt_lengths": np.full(sequences, 125),
            "sequence_offsets": np.arange(sequences + 1) * 125}
    if with_ids:
        dump |= {"selected_experts": ids, "token_ids": rng.integers(0, 150_000, len(ids)).astype(np.int32)}
    capture.save_dump(path, dump, {"language": language, "num_experts": num_experts, "top_k": top_k, "format": 1, "model": "random"})


def whole_process(command, rounds):
    """Median seconds and the largest resident GiB of a command; a small process starts it, whose own size does not count."""
    wrapper = ("import resource, subprocess, sys, time; start = time.perf_counter(); "
               "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
               "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)")
    runs = [subprocess.run([sys.executable, "-c", wrapper, *command], capture_output=True, text=True, check=True).stdout.split()
            for _ in range(rounds)]
    times, peaks = np.array(runs, float).T
    return np.median(times), peaks.max()


def bench_analyze(args):
    rng = np.random.default_rng(0)
    print(f"\nanalyze.py, whole process{'':<32}{'seconds':>8}{'GiB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, languages, tokens, with_ids in (("8 languages, a million tokens of IDs in each", 8, 1_000_000, True),
                                                  ("25 languages, no IDs", 25, 0, False), ("50 languages, no IDs", 50, 0, False),
                                                  ("100 languages, no IDs", 100, 0, False)):
            paths = [f"{folder}/{i:03}.npz" for i in range(languages)]
            for path in paths:
                fake_dump(Path(path), Path(path).stem, tokens, with_ids, rng)
            command = [sys.executable, str(ROOT / "analyze.py"), *paths, "--out", f"{folder}/analysis.npz"]
            print(f"{name:<57}{{:>8.2f}}{{:>8.2f}}".format(*whole_process(command, args.rounds)), flush=True)
        paths = [f"{folder}/{language}.npz" for language in MEAN_LENGTHS]
        for language, path in zip(MEAN_LENGTHS, paths):  # as much as 250 problems
            fake_dump(Path(path), language, 250 * MEAN_LENGTHS[language], True, rng)
        command = [sys.executable, str(ROOT / "analyze.py"), *paths, "--bootstrap", "1000", "--vocabulary", "--out", f"{folder}/analysis.npz"]
        print(f"{'8 languages, 1000 bootstrap draws, --vocabulary':<57}{{:>8.2f}}{{:>8.2f}}".format(*whole_process(command, 1)), flush=True)


# -------------------------------------------------------------------------------------------------------------- generate

def make_prompts(model, tokenizer, number):
    rng = np.random.default_rng(1)
    return [{"ids": rng.integers(3, 1000, int(n)).tolist()} for n in np.clip(rng.lognormal(4.4, 0.4, number), 16, 1000)]


def bench_generate(model, tokenizer, args):
    encoded, shape = make_prompts(model, tokenizer, args.responses), common.routing_shape(model)
    rng, num_experts = np.random.default_rng(0), model.config.num_experts  # boosts too small to change the work
    steered = list(shape)[len(shape) * 10 // 48:len(shape) * 40 // 48]
    masked = list(shape)[:max(1, len(shape) // 10)]
    edits = {
        "plain": None,
        f"masked in {len(masked)} of {len(shape)} layers": dict(masks={layer: [3, 5] for layer in masked}),
        "masked in all": dict(masks={layer: [3, 5] for layer in shape}),
        f"steered in {len(steered)} of {len(shape)} layers": dict(
            boosts={layer: np.where(rng.random(num_experts) < 0.15, 1e-9, 0) for layer in steered}, count_moved=False),
        "steered in all": dict(boosts={layer: np.where(rng.random(num_experts) < 0.15, 1e-9, 0) for layer in shape}, count_moved=False),
    }

    def run(edit):
        if edit is None:
            return common.generate(model, tokenizer, encoded, args.batch_tokens * 4, args.new_tokens)
        with common.edit_routing(model, **edit):
            return common.generate(model, tokenizer, encoded, args.batch_tokens * 4, args.new_tokens)

    measured = in_turn({name: lambda edit=edit: run(edit) for name, edit in edits.items()}, 3 * args.rounds, args.device)
    print(f"\ngenerate: {len(encoded)} prompts, {args.new_tokens} new tokens each{'':<14}{'tokens/s':>10}{'of plain':>10}")
    for name, (times, *_) in measured.items():
        print(f"{name:<54}{len(encoded) * args.new_tokens / np.median(times):>10,.0f}{ratio(measured['plain'][0], times):>10.3f}")

    # those ratios are as noisy as the machine; what an edit adds to a router's call is not
    step = np.median(measured["plain"][0]) / args.new_tokens / len(shape)
    hidden = torch.randn(len(encoded), model.config.hidden_size, device=model.device, dtype=model.dtype)
    router = next(iter(common.find_routers(model).values()))

    @torch.inference_mode()
    def calls(edit):
        with common.edit_routing(model, **edit) if edit else common.contextlib.nullcontext():
            for other in shape if edit else ():
                common.find_routers(model)[other](hidden)  # every edited router has to be called
            return min(seconds(lambda: [router(hidden) for _ in range(200)], args.device)[0] for _ in range(5)) / 200

    plain = calls(None)
    for name in ("masked in all", "steered in all"):
        extra = calls(edits[name]) - plain
        print(f"{f'a router call, {name}':<54}{1e6 * extra:>+8.0f} us, {extra / step:.2%} of a layer's step")

    edit = edits[f"steered in {len(steered)} of {len(shape)} layers"]
    for name, edit in (("plain", None), ("steered", edit)):
        print(f"{f'continuous batching, {name}':<54}" + continuous(model, encoded, edit, args, measured), flush=True)


def continuous(model, encoded, edit, args, measured):
    """tokens/s of model.generate_batch, its ratio to static batches, and how many responses are the same tokens."""
    def run():
        return model.generate_batch(inputs=[e["ids"] for e in encoded], max_new_tokens=args.new_tokens, do_sample=False,
                                    eos_token_id=-1, pad_token_id=0, progress_bar=False)
    try:
        with common.edit_routing(model, **edit) if edit else common.contextlib.nullcontext():
            took, results = min((seconds(run, args.device) for _ in range(2)), key=lambda pair: pair[0])
            same = 0
            for e, result in zip(encoded[:16], sorted(results.values(), key=lambda r: int(r.request_id.rpartition("_")[2]))):
                out = model.generate(torch.tensor([e["ids"]], device=model.device), max_new_tokens=args.new_tokens,
                                     do_sample=False, pad_token_id=0)
                same += out[0, len(e["ids"]):].tolist() == list(result.generated_tokens)
    except Exception as error:  # whatever it is, the other figures are to be had
        return f"  does not run here: {type(error).__name__}: {common.first_line(error)[:60]}"
    name = next(n for n in measured if n.startswith("steered" if edit else "plain"))
    speed = len(encoded) * args.new_tokens / took
    return (f"{speed:>10,.0f}{np.median(measured[name][0]) / took:>10.3f}  of static batches; "
            f"{same} of {len(encoded[:16])} responses the same as one by one")


# ----------------------------------------------------------------------------------------------------------------- cells

def bench_cells(args):
    """A grid on the tiny model through the same code as ablate.py: what is spent outside of the evaluations."""
    spent, loads, evaluate, load = [], [], common.evaluate, common.load_model
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "capture.py", "--out", folder, "--limit", "20"], cwd=ROOT, check=True, capture_output=True)
        languages = list(MEAN_LENGTHS)
        arguments = ["--routing", *[f"{folder}/{l}.npz" for l in languages], "--out", f"{folder}/cells.jsonl", "--limit", "20"]

        def timed(function, log):
            def run(*args, **kwargs):
                took, result = seconds(lambda: function(*args, **kwargs), None)
                log.append(took)
                return result
            return run

        common.evaluate, common.load_model = timed(evaluate, spent), timed(load, loads)
        argv, sys.argv, here = sys.argv, ["ablate.py", *arguments], os.getcwd()
        os.chdir(ROOT)
        try:
            with open(os.devnull, "w") as nothing, common.contextlib.redirect_stdout(nothing), common.contextlib.redirect_stderr(nothing):
                took, _ = seconds(ablate.main, None)
        finally:
            common.evaluate, common.load_model, sys.argv = evaluate, load, argv
            os.chdir(here)
    beyond = took - sum(spent) - sum(loads)
    print(f"\ncells: {len(spent)} evaluations of 20 problems, {len(loads)} model load, {sum(spent) / len(spent):.3f} s an evaluation, "
          f"{beyond / len(spent):.3f} s a cell beyond it")


# --------------------------------------------------------------------------------------------------- kernels and growth

def bench_kernels(model, tokenizer, args):
    """Prefill as in capture.py, and generation. batched_mm copies an expert's weights for every token, so it is for generation."""
    corpora = make_corpora(max(2, args.prompts // 16), model.config.vocab_size)
    batches = common.length_batches([n for _, lengths in corpora.values() for n in lengths], args.batch_tokens)
    encoded = make_prompts(model, tokenizer, args.responses)
    experts, attention = model.config._experts_implementation, model.config._attn_implementation
    print(f"\nkernels: tokens/s{'':<27}{'prefill':>10}{'of default':>12}{'generate':>10}{'of default':>12}  selections as by default")
    choices = [(f"default: {experts}, {attention}", experts, attention)]
    choices += [(f"experts {name}", name, attention) for name in ("eager", "grouped_mm", *(["batched_mm"] if args.device == "cuda" else []))
                if name != experts]  # on a CPU, batched_mm takes minutes
    choices += [(f"attention {name}", experts, name) for name in ("eager", "sdpa", "flash_attention_2") if name != attention]
    default = None
    for name, experts_name, attention_name in choices:
        try:
            model.set_experts_implementation(experts_name)
            model.set_attn_implementation(attention_name)
            runs = {"generate": lambda: common.generate(model, tokenizer, encoded, args.batch_tokens * 4, args.new_tokens)}
            if experts_name != "batched_mm":
                runs["prefill"] = lambda: bare(model, corpora, batches)
            times = {kind: measured[0] for kind, measured in in_turn(runs, args.rounds, args.device).items()}
            default = default or (times, capture.capture(model, corpora, args.batch_tokens)[0])
            line = f"{name:<44}" + "".join(
                f"{tokens / np.median(times[kind]):>10,.0f}{ratio(default[0][kind], times[kind]):>12.3f}" if kind in times else f"{'-':>10}{'':<12}"
                for kind, tokens in (("prefill", total(corpora)), ("generate", len(encoded) * args.new_tokens)))
            if "prefill" in times:
                dumps, _ = capture.capture(model, corpora, args.batch_tokens)
                line += f"{np.mean([(np.sort(d['selected_experts']) == np.sort(default[1][l]['selected_experts'])).mean() for l, d in dumps.items()]):>12.4%}"
            print(line, flush=True)
        except Exception as error:  # whatever it is, the other figures are to be had
            print(f"{name:<44}  does not run here: {type(error).__name__}: {common.first_line(error)[:60]}", flush=True)
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)


def bench_growth(model, args):
    print(f"\ngrowth{'':<18}{'tokens':>10}{'stats-only s':>14}{'host GiB':>10}{'with IDs s':>12}{'host GiB':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 2, 4, 8):
            corpora = make_corpora(max(2, args.prompts * times // 8), model.config.vocab_size)
            line = f"{f'x{times}':<24}{total(corpora):>10,}"
            for stats_only in (True, False):
                with Memory() as memory:
                    took, _ = seconds(lambda: ours(model, corpora, args.batch_tokens, stats_only, folder), args.device)
                line += f"{took:>{14 if stats_only else 12}.1f}{memory.host:>+10.3f}"
            print(line, flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["capture", "analyze", "generate", "cells", "kernels", "growth"]
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
    p.add_argument("--batch-tokens", type=int, default=capture.BATCH_TOKENS)
    p.add_argument("--prompts", type=int, help="per language (default: 250 on CUDA, 80 on the CPU)")
    p.add_argument("--responses", type=int, help="prompts that are answered (default: 256 on CUDA, 32 on the CPU)")
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.ERROR)
    args.prompts = args.prompts or (250 if args.device == "cuda" else 80)
    args.responses = args.responses or (256 if args.device == "cuda" else 32)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{time.strftime('%Y-%m-%d')}  {machine}  torch {torch.__version__}  transformers {transformers.__version__}  {args.shape}")
    if set(args.only) & {"capture", "generate", "kernels", "growth"}:
        took, model = seconds(lambda: build(args.shape, args.device), args.device)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {model.dtype}, made in {took:.0f} s")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/tiny_moe")
    for part in args.only:
        {"capture": lambda: bench_capture(model, args), "analyze": lambda: bench_analyze(args),
         "generate": lambda: bench_generate(model, tokenizer, args), "cells": lambda: bench_cells(args),
         "kernels": lambda: bench_kernels(model, tokenizer, args), "growth": lambda: bench_growth(model, args)}[part]()


if __name__ == "__main__":
    main()
