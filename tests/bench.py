"""
How fast, measured as ratios within one run on the same work. Nothing here is a test.

    python tests/bench.py                          # small shape, CPU: a quarter of an hour, two cores
    python tests/bench.py --device cuda --shape qwen3-30b-a3b    # 61 GB of random weights, on the GPU
    python tests/bench.py --only capture analyze

capture     the base model's bare forward against capture.py, with IDs and without, and against two
            other recorders
analyze     analyze.py as a whole process: a million tokens of IDs in 8 languages; 100 languages
generate    steered and masked generation against plain, and against continuous batching
engine      plain and edited generation by transformers' static batches, by its generate_batch, and by
            vLLM where it is installed (.ci/vllm): one process each
cells       ablation cells: seconds beyond the evaluation itself
kernels     experts and attention implementations: speed, and whether the same experts are selected
growth      time and memory at 2, 4 and 8 times the tokens
"""

import argparse
import contextlib
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
    "qwen3-30b-a3b": dict(
        num_hidden_layers=48, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        intermediate_size=6144, vocab_size=151936, max_position_embeddings=40960, dtype="bfloat16"),
    "small": dict(
        num_hidden_layers=8, hidden_size=256, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32, num_experts=64, num_experts_per_tok=4, moe_intermediate_size=128,
        intermediate_size=512, vocab_size=8192, max_position_embeddings=4096, dtype="float32"),
}
# tokens per MGSM problem with Qwen3's tokenizer and chat template; within a language, lengths are
# log-normal, sigma 0.4
MEAN_LENGTHS = {"bn": 270, "de": 94, "en": 73, "es": 90, "fr": 92, "ja": 93, "sw": 118, "zh": 78}


def first_line(error):
    return str(error).partition("\n")[0]


def build(shape, device):
    """A model of random weights, made where it runs."""
    sizes = SHAPES[shape] | {"num_local_experts": SHAPES[shape]["num_experts"]}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            Qwen3MoeConfig(**sizes), dtype=getattr(torch, sizes["dtype"])).eval()
    model.generation_config.eos_token_id = None  # every response takes all its steps
    return model


def make_corpora(prompts, vocab, seed=0):
    """{language: (sequences of random ids, prompt_lengths)}."""
    rng, corpora = np.random.default_rng(seed), {}
    for language, mean in MEAN_LENGTHS.items():
        lengths = np.clip(rng.lognormal(np.log(mean) - 0.08, 0.4, prompts), 16, 2000).astype(int)
        sequences = [rng.integers(3, vocab, n).astype(np.int32) for n in lengths]
        corpora[language] = sequences, lengths.tolist()
    return corpora


def together(corpora):
    """All sequences, one language after the other."""
    return [ids for sequences, _ in corpora.values() for ids in sequences]


def batches_of(corpora, batch_tokens):
    return common.length_batches([len(ids) for ids in together(corpora)], batch_tokens)


def total(corpora):
    return sum(sum(lengths) for _, lengths in corpora.values())


# --------------------------------------------------------------------------------------- measuring

class Memory:
    """Peak GiB while a block runs: .device as the allocator has it, .host beyond the start (Linux)."""

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
        self.device = (torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available()
                       else float("nan"))

    def watch(self):
        while not self.done.wait(0.02):
            self.top = max(self.top, self.anonymous())

    @staticmethod
    def anonymous():
        """Bytes of the process's own: pages of files, which the system may take back, do not count."""
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def seconds(run, device):
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def in_turn(variants, rounds, device):
    """{name: (times, last result, memory)}; in turn, A B C A B C: a machine's drift meets all alike."""
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


# ----------------------------------------------------------------------------------------- capture

@torch.inference_mode()
def bare(model, corpora, batches):
    """The decoder's forward over the same batches, nothing watched. Returns the share of padding."""
    sequences, padded = together(corpora), 0
    for batch in batches:
        ids = common.right_padded([sequences[i] for i in batch]).to(model.device)
        model.get_decoder()(input_ids=ids, use_cache=False)
        padded += ids.numel()
    return 1 - total(corpora) / padded


def ours(model, corpora, batch_tokens, stats_only=False, null_draws=0):
    arrays, padded = capture.capture(model, together(corpora), batch_tokens, stats_only, null_draws)
    return padded / (padded + total(corpora)), arrays


@torch.inference_mode()
def expert_by_expert(model, corpora):
    """A recorder that waits for the device twice per expert, layer and batch, over sixteen prompts in
    file order, padded on the left, with one token generated: how the paper's records were made.
    """
    record, padded = {}, 0

    def on_router(layer, router_logits, routing_weights, selected_experts):
        for expert in selected_experts.unique().tolist():
            hits = selected_experts == expert
            tokens, gates = record.get((layer, expert), (0, 0.0))
            record[layer, expert] = (tokens + hits.sum().item(),
                                     gates + (routing_weights * hits).sum().item())

    with common.record_routing(model, on_router):
        for texts, _ in corpora.values():
            for start in range(0, len(texts), 16):
                batch = texts[start:start + 16]
                padding = [max(map(len, batch)) - len(ids) for ids in batch]
                ids = torch.tensor(np.stack([np.pad(ids, (n, 0)) for ids, n in zip(batch, padding)]),
                                   dtype=torch.int64, device=model.device)
                mask = torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]
                model.generate(input_ids=ids, attention_mask=mask.long().to(model.device),
                               max_new_tokens=1, do_sample=False, pad_token_id=0)
                padded += ids.numel()
    return 1 - total(corpora) / padded


@torch.inference_mode()
def router_logits_then_topk(model, corpora, batches, top_k):
    """What transformers returns by itself, and a top-k behind it, kept on the device until the end."""
    sequences, kept, padded = together(corpora), [], 0
    for batch in batches:
        ids = common.right_padded([sequences[i] for i in batch]).to(model.device)
        output = model.get_decoder()(input_ids=ids, use_cache=False, output_router_logits=True)
        kept.append(torch.stack([layer.topk(top_k, -1).indices for layer in output.router_logits]))
        padded += ids.numel()
    for ids in kept:
        ids.cpu()
    return 1 - total(corpora) / padded


def waits_inside(model, corpora, batch_tokens):
    """Whether anything makes the host wait for the GPU between the first decoder layer and the last."""
    blocks, mode = model.get_decoder().layers, torch.cuda.set_sync_debug_mode
    handles = [blocks[0].register_forward_pre_hook(lambda *_: mode("error")),
               blocks[-1].register_forward_hook(lambda *_: mode("default"))]
    try:
        capture.capture(model, together(corpora), batch_tokens, null_draws=capture.NULL_DRAWS)
        return "no"
    except RuntimeError as error:
        return f"yes: {first_line(error)}"
    finally:
        mode("default")
        for handle in handles:
            handle.remove()


def bench_capture(model, args):
    corpora = make_corpora(args.prompts, model.config.vocab_size)
    top_k = model.config.num_experts_per_tok
    tokens, batches = total(corpora), batches_of(corpora, args.batch_tokens)
    measured = in_turn({
        "bare forward": lambda: bare(model, corpora, batches),
        "capture.py": lambda: ours(model, corpora, args.batch_tokens),
        "capture.py --stats-only": lambda: ours(model, corpora, args.batch_tokens, True),
        "capture.py --null-router": lambda: ours(model, corpora, args.batch_tokens,
                                                 null_draws=capture.NULL_DRAWS),
        "router logits, then top-k": lambda: router_logits_then_topk(model, corpora, batches, top_k),
        "expert by expert": lambda: expert_by_expert(model, corpora),
    }, args.rounds, args.device)
    print(f"\ncapture: {tokens:,} tokens of {len(corpora)} languages, {len(batches)} batches of up to "
          f"{args.batch_tokens} tokens\n{'':<26}{'tokens/s':>10}{'of bare':>9}{'padding':>9}"
          f"{'GPU GiB':>9}{'host GiB':>10}{'dump MB':>10}{'written in':>12}")
    for name, (times, result, memory) in measured.items():
        padding, arrays = result if isinstance(result, tuple) else (result, None)
        line = (f"{name:<26}{tokens / np.median(times):>10,.0f}"
                f"{ratio(measured['bare forward'][0], times):>9.3f}{padding:>9.1%}"
                f"{memory.device:>9.1f}{memory.host:>+10.2f}")
        if arrays:
            dump = as_one(arrays, corpora, list(common.routing_shape(model)))
            size, took = written(dump, lambda *dump: capture.save_dump(*dump, {"top_k": top_k}))
            line += f"{size:>10.1f}{took:>10.2f} s"
            if name == "capture.py":
                size, took = written(dump, lambda path, dump: np.savez_compressed(path, **dump))
                squeezed = f"compressed, they would be {size:.1f} MB, written in {took:.2f} s"
        print(line)
    print(squeezed)
    if args.device == "cuda":
        print("does the host wait for the GPU within the layers?",
              waits_inside(model, corpora, args.batch_tokens))


def as_one(arrays, corpora, layers):
    """What capture returned for all languages, {language: (sequences, prompt_lengths)}, as a dump."""
    prompt_lengths = [n for _, lengths in corpora.values() for n in lengths]
    spans = [(0, n) for n in prompt_lengths]
    return capture.as_dump(arrays, layers, together(corpora), prompt_lengths, spans)


def written(dump, save):
    """(MB, seconds) of save(path, dump)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "all.npz")
        took, _ = seconds(lambda: save(path, dump), None)
        return path.stat().st_size / 1e6, took


# ----------------------------------------------------------------------------------------- analyze

def fake_dump(path, language, tokens, with_ids, rng, shape=(48, 128), top_k=8):
    """A dump of random routing, in which every row adds up."""
    layers, num_experts = shape
    # neighbouring ids: top_k different ones, quickly drawn
    first = rng.integers(0, num_experts, (tokens if with_ids else 1000, layers, 1), np.int16)
    ids = ((first + np.arange(top_k, dtype=np.int16)) % num_experts).astype(np.uint8)
    counts = [np.bincount(ids[:, layer].ravel(), minlength=num_experts) for layer in range(layers)]
    counts, sequences = np.stack(counts), len(ids) // 125
    dump = {"counts": counts, "weight_sums": counts / top_k, "layers": np.arange(layers),
            "mean_probs": np.ones((sequences, layers, num_experts), np.float32),
            "prompt_lengths": np.full(sequences, 125),
            "sequence_offsets": np.arange(sequences + 1) * 125}
    if with_ids:
        token_ids = rng.integers(0, 150_000, len(ids)).astype(np.int32)
        dump |= {"selected_experts": ids, "token_ids": token_ids}
    capture.save_dump(path, dump, {"language": language, "num_experts": num_experts, "top_k": top_k,
                                   "format": 1, "model": "random"})


def whole_process(command, rounds):
    """Median seconds and largest resident GiB of a command, without the process that starts it."""
    wrapper = ("import resource, subprocess, sys, time; start = time.perf_counter(); "
               "subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True); "
               "print(time.perf_counter() - start, "
               "resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)")
    runs = [subprocess.run([sys.executable, "-c", wrapper, *command], capture_output=True, text=True,
                           check=True) for _ in range(rounds)]
    times, peaks = np.array([run.stdout.split() for run in runs], float).T
    return np.median(times), peaks.max()


def bench_analyze(args):
    rng = np.random.default_rng(0)
    print(f"\nanalyze.py, whole process{'':<32}{'seconds':>8}{'GiB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        def measure(name, tokens, rounds, *flags):
            """tokens {language: how many, with their IDs; 0: no IDs}"""
            paths = [f"{folder}/{language}.npz" for language in tokens]
            for path, (language, number) in zip(paths, tokens.items()):
                fake_dump(Path(path), language, number, number > 0, rng)
            command = [sys.executable, str(ROOT / "analyze.py"), *paths, *flags,
                       "--out", f"{folder}/analysis.npz"]
            took, peak = whole_process(command, rounds)
            print(f"{name:<57}{took:>8.2f}{peak:>8.2f}", flush=True)

        measure("8 languages, a million tokens of IDs in each",
                dict.fromkeys(MEAN_LENGTHS, 1_000_000), args.rounds)
        for number in (25, 50, 100):
            measure(f"{number} languages, no IDs", {f"{i:03}": 0 for i in range(number)}, args.rounds)
        measure("8 languages, 1000 bootstrap draws, --vocabulary",  # as much as 250 problems
                {language: 250 * mean for language, mean in MEAN_LENGTHS.items()}, 1,
                "--bootstrap", "1000", "--vocabulary")


# ---------------------------------------------------------------------------------------- generate

def make_prompts(number):
    rng = np.random.default_rng(1)
    return [{"ids": rng.integers(3, 1000, int(n)).tolist()}
            for n in np.clip(rng.lognormal(4.4, 0.4, number), 16, 1000)]


def edited(model, edit):
    return common.edit_routing(model, **edit) if edit else contextlib.nullcontext()


def bench_generate(model, tokenizer, args):
    encoded, shape = make_prompts(args.responses), common.routing_shape(model)
    rng, num_experts = np.random.default_rng(0), model.config.num_experts

    def masked(layers):
        return {"masks": {layer: [3, 5] for layer in layers}}

    def steered(layers):  # boosts too small to change the work
        boosts = {layer: np.where(rng.random(num_experts) < 0.15, 1e-9, 0) for layer in layers}
        return {"boosts": boosts, "count_moved": False}

    tenth = list(shape)[:max(1, len(shape) // 10)]
    band = list(shape)[len(shape) * 10 // 48:len(shape) * 40 // 48]
    in_band = f"steered in {len(band)} of {len(shape)} layers"
    edits = {"plain": {}, f"masked in {len(tenth)} of {len(shape)} layers": masked(tenth),
             "masked in all": masked(shape), in_band: steered(band), "steered in all": steered(shape)}

    def run(edit):
        with edited(model, edit):
            return common.generate(model, tokenizer, encoded, args.batch_tokens * 4,
                                   max_new_tokens=args.new_tokens)

    measured = in_turn({name: lambda edit=edit: run(edit) for name, edit in edits.items()},
                       3 * args.rounds, args.device)
    print(f"\ngenerate: {len(encoded)} prompts, {args.new_tokens} new tokens each{'':<14}"
          f"{'tokens/s':>10}{'of plain':>10}")
    for name, (times, *_) in measured.items():
        print(f"{name:<54}{len(encoded) * args.new_tokens / np.median(times):>10,.0f}"
              f"{ratio(measured['plain'][0], times):>10.3f}")

    # those ratios are as noisy as the machine; what an edit adds to a router's call is not
    step = np.median(measured["plain"][0]) / args.new_tokens / len(shape)
    hidden = torch.randn(len(encoded), model.config.hidden_size, device=model.device,
                         dtype=model.dtype)
    routers = common.find_routers(model)
    router = next(iter(routers.values()))

    @torch.inference_mode()
    def call(edit):
        with edited(model, edit):
            for other in routers.values():  # every edited router has to be called
                other(hidden)
            return min(seconds(lambda: [router(hidden) for _ in range(200)], args.device)[0]
                       for _ in range(5)) / 200

    plain = call({})
    for name in ("masked in all", "steered in all"):
        extra = call(edits[name]) - plain
        print(f"{f'a router call, {name}':<54}{1e6 * extra:>+8.0f} us, {extra / step:.2%} of a layer's "
              "step")
    for name, key in (("plain", "plain"), ("steered", in_band)):
        print(f"{f'continuous batching, {name}':<54}"
              + continuous(model, encoded, edits[key], args, measured[key][0]), flush=True)


def continuous(model, encoded, edit, args, static):
    """tokens/s of model.generate_batch, its ratio to static batches, how many responses are the same."""
    def run():
        return model.generate_batch(
            inputs=[e["ids"] for e in encoded], max_new_tokens=args.new_tokens, do_sample=False,
            eos_token_id=-1, pad_token_id=0, progress_bar=False)

    def number(result):
        return int(result.request_id.rpartition("_")[2])

    try:
        with edited(model, edit):
            runs = [seconds(run, args.device) for _ in range(2)]
            took, results = min(runs, key=lambda pair: pair[0])
            same = 0
            for e, result in zip(encoded[:16], sorted(results.values(), key=number)):
                out = model.generate(torch.tensor([e["ids"]], device=model.device), do_sample=False,
                                     max_new_tokens=args.new_tokens, pad_token_id=0)
                same += out[0, len(e["ids"]):].tolist() == list(result.generated_tokens)
    except Exception as error:  # whatever it is, the other figures are to be had
        return f"  does not run here: {type(error).__name__}: {first_line(error)[:60]}"
    return (f"{len(encoded) * args.new_tokens / took:>10,.0f}{np.median(static) / took:>10.3f}"
            f"  of static batches; {same} of {len(encoded[:16])} responses the same as one by one")


# ------------------------------------------------------------------------------------------ engine

ENGINES = ("static batches", "generate_batch", "vllm")


def bench_engine(args):
    """One process for each engine, which prints its line: none finds another's memory or threads."""
    print(f"\nengine: tokens/s of {args.responses} prompts, {args.new_tokens} new tokens each; IDs are "
          f"returned by vLLM\n{'':<18}{'plain':>10}{'masked':>10}{'steered':>10}", flush=True)
    for engine in ENGINES:
        command = [sys.executable, __file__, "--only", "engine", "--engine", engine]
        for name in ("device", "shape", "batch_tokens", "responses", "new_tokens", "rounds"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(engine)]
        print(*lines or [f"{engine:<18}  does not run here: {done.stderr.strip()[-200:]}"], flush=True)


def run_engine(args):
    """The line of one engine: the same prompts, plain, masked in a tenth of the layers, steered in the
    paper's band.
    """
    encoded = make_prompts(args.responses)
    if args.engine == "vllm":
        model, shape = random_vllm(args.shape)
    else:
        model = build(args.shape, args.device)
        shape = common.routing_shape(model)
    layers, (num_experts, _) = list(shape), next(iter(shape.values()))
    boost = np.where(np.random.default_rng(0).random(num_experts) < 0.15, 1e-9, 0)
    edits = {"plain": {}, "masked": {"masks": {l: [3, 5] for l in layers[:-(-len(layers) // 10)]}},
             "steered": {"boosts": {l: boost for l in layers[len(layers) * 10 // 48:
                                                             len(layers) * 40 // 48]}}}

    def run(edit):
        if args.engine == "vllm":
            with common.edit_routing(model, **edit, count_moved=False):
                # a token that random prompts and responses hardly reach, since one has to end them
                return common.complete(model, [e["ids"] for e in encoded],
                                       max_new_tokens=args.new_tokens, eos_token_id=[2])
        with common.edit_routing(model, **edit, count_moved=False):
            if args.engine == "static batches":
                return common.generate(model, AutoTokenizer.from_pretrained(ROOT / "tests/tiny_moe"),
                                       encoded, args.batch_tokens * 4, max_new_tokens=args.new_tokens)
            return model.generate_batch(
                inputs=[e["ids"] for e in encoded], max_new_tokens=args.new_tokens, do_sample=False,
                eos_token_id=-1, pad_token_id=0, progress_bar=False)

    measured = in_turn({name: lambda edit=edit: run(edit) for name, edit in edits.items()},
                       args.rounds, args.device)
    tokens = {name: sum(len(answer.token_ids) for answer in result) if args.engine == "vllm" else
              len(encoded) * args.new_tokens for name, (_, result, _) in measured.items()}
    print(f"{args.engine:<18}" + "".join(f"{tokens[name] / np.median(times):>10,.0f}"
                                         for name, (times, *_) in measured.items()))


def random_vllm(shape):
    """(a VLLMEngine of a shape with random weights, its routing_shape): those of build for the small
    one; vLLM's own for the large one, which are written nowhere.
    """
    sizes = SHAPES[shape] | {"num_local_experts": SHAPES[shape]["num_experts"]}
    config = Qwen3MoeConfig(**sizes, architectures=["Qwen3MoeForCausalLM"])
    with torch.device("meta"):
        layers = common.routing_shape(AutoModelForCausalLM.from_config(config))
    with tempfile.TemporaryDirectory() as folder:
        (build(shape, "cpu") if shape == "small" else config).save_pretrained(folder)
        return common.VLLMEngine(
            folder, layers, sizes["dtype"], load_format="auto" if shape == "small" else "dummy",
            skip_tokenizer_init=True, max_model_len=2048,
            enable_prefix_caching=False), layers  # the prompts come again in every round


# ------------------------------------------------------------------------------------------- cells

def bench_cells(args):
    """A grid on the tiny model through ablate.py itself: what is spent outside of the evaluations."""
    spent, loads, argv, here = [], [], sys.argv, os.getcwd()
    evaluate, load = common.evaluate, common.load_weights

    def timed(function, log):
        def run(*args, **kwargs):
            took, result = seconds(lambda: function(*args, **kwargs), None)
            log.append(took)
            return result
        return run

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        subprocess.run([sys.executable, "capture.py", "--out", folder, "--limit", "20"], cwd=ROOT,
                       check=True, capture_output=True)
        paths = [f"{folder}/{language}.npz" for language in MEAN_LENGTHS]
        common.evaluate, common.load_weights = timed(evaluate, spent), timed(load, loads)
        sys.argv = ["ablate.py", "--routing", *paths, "--out", f"{folder}/cells.jsonl", "--limit", "20"]
        os.chdir(ROOT)
        try:
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                took, _ = seconds(ablate.main, None)
        finally:
            common.evaluate, common.load_weights, sys.argv = evaluate, load, argv
            os.chdir(here)
    beyond = took - sum(spent) - sum(loads)
    print(f"\ncells: {len(spent)} evaluations of 20 problems, {len(loads)} model load, "
          f"{sum(spent) / len(spent):.3f} s an evaluation, {beyond / len(spent):.3f} s a cell beyond it")


# ------------------------------------------------------------------------------ kernels and growth

def bench_kernels(model, tokenizer, args):
    """Prefill as in capture.py, and generation, for which alone batched_mm is: it copies weights."""
    corpora = make_corpora(max(2, args.prompts // 16), model.config.vocab_size)
    batches, encoded = batches_of(corpora, args.batch_tokens), make_prompts(args.responses)
    experts, attention = model.config._experts_implementation, model.config._attn_implementation
    print(f"\nkernels: tokens/s{'':<27}{'prefill':>10}{'of default':>12}{'generate':>10}"
          f"{'of default':>12}  selections as by default")
    others = ["eager", "grouped_mm"] + ["batched_mm"] * (args.device == "cuda")  # minutes on a CPU
    choices = [(f"default: {experts}, {attention}", experts, attention)]
    choices += [(f"experts {name}", name, attention) for name in others if name != experts]
    choices += [(f"attention {name}", experts, name)
                for name in ("eager", "sdpa", "flash_attention_2") if name != attention]

    def selections():
        arrays, _ = capture.capture(model, together(corpora), args.batch_tokens)
        return np.sort(arrays["selected_experts"])

    runs = {"prefill": lambda: bare(model, corpora, batches),
            "generate": lambda: common.generate(model, tokenizer, encoded, args.batch_tokens * 4,
                                                max_new_tokens=args.new_tokens)}
    tokens = {"prefill": total(corpora), "generate": len(encoded) * args.new_tokens}
    default = None
    for name, experts_name, attention_name in choices:
        try:
            model.set_experts_implementation(experts_name)
            model.set_attn_implementation(attention_name)
            kinds = ["generate"] if experts_name == "batched_mm" else ["generate", "prefill"]
            measured = in_turn({kind: runs[kind] for kind in kinds}, args.rounds, args.device)
            default, line = default or (measured, selections()), f"{name:<44}"
            for kind in runs:
                if kind in measured:
                    times = measured[kind][0]
                    line += (f"{tokens[kind] / np.median(times):>10,.0f}"
                             f"{ratio(default[0][kind][0], times):>12.3f}")
                else:
                    line += f"{'-':>10}{'':<12}"
            if "prefill" in measured:
                line += f"{(selections() == default[1]).mean():>12.4%}"
            print(line, flush=True)
        except Exception as error:  # whatever it is, the other figures are to be had
            print(f"{name:<44}  does not run here: {type(error).__name__}: "
                  f"{first_line(error)[:60]}", flush=True)
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)


def bench_growth(model, args):
    print(f"\ngrowth{'':<18}{'tokens':>10}{'stats-only s':>14}{'host GiB':>10}{'with IDs s':>12}"
          f"{'host GiB':>10}")
    for times in (1, 2, 4, 8):
        corpora = make_corpora(max(2, args.prompts * times // 8), model.config.vocab_size)
        line = f"{f'x{times}':<24}{total(corpora):>10,}"
        for stats_only in (True, False):
            with Memory() as memory:
                took, _ = seconds(lambda: ours(model, corpora, args.batch_tokens, stats_only),
                                  args.device)
            line += f"{took:>{14 if stats_only else 12}.1f}{memory.host:>+10.3f}"
        print(line, flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["capture", "analyze", "generate", "engine", "cells", "kernels", "growth"]
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
    p.add_argument("--batch-tokens", type=int, default=capture.BATCH_TOKENS)
    p.add_argument("--prompts", type=int, help="per language (default: 250 on CUDA, 80 on the CPU)")
    p.add_argument("--responses", type=int, help="prompts answered (default: 256; 32 on the CPU)")
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # bench_engine's, for itself
    args = p.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.ERROR)
    args.prompts = args.prompts or (250 if args.device == "cuda" else 80)
    args.responses = args.responses or (256 if args.device == "cuda" else 32)
    if args.engine:
        return run_engine(args)
    machine = (torch.cuda.get_device_name() if args.device == "cuda" else
               f"{torch.get_num_threads()} CPU threads")
    print(f"{time.strftime('%Y-%m-%d')}  {machine}  torch {torch.__version__}  "
          f"transformers {transformers.__version__}  {args.shape}")
    if set(args.only) & {"capture", "generate", "kernels", "growth"}:
        took, model = seconds(lambda: build(args.shape, args.device), args.device)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {model.dtype}, "
              f"made in {took:.0f} s")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tests/tiny_moe")
    run = {"capture": lambda: bench_capture(model, args), "analyze": lambda: bench_analyze(args),
           "generate": lambda: bench_generate(model, tokenizer, args),
           "engine": lambda: bench_engine(args), "cells": lambda: bench_cells(args),
           "growth": lambda: bench_growth(model, args),
           "kernels": lambda: bench_kernels(model, tokenizer, args)}
    for part in args.only:
        run[part]()


if __name__ == "__main__":
    main()
