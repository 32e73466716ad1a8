"""
Record which experts the routers pick for every token of every language.

    python capture.py                                              # the tiny model in tests/
    python capture.py --model Qwen/Qwen3-30B-A3B --data 'data/mgsm_{lang}.tsv'
    python capture.py --null-router                                # and what random routers pick
    python capture.py --tokens 'routing/{lang}.npz' --dtype bfloat16 --out routing/bf16

reads   data/mgsm_<lang>.tsv     prompts, one file per language (.tsv, .jsonl, .json or .txt)
writes  routing/<lang>.npz       the routing dump of each language; then: python analyze.py

One forward pass over the prompts; nothing is generated. A dump that is there already is kept, so a
run that was stopped goes on where it stopped. The tiny model takes a few seconds; a 30B model,
about its bare prefill time.
"""

import argparse
import contextlib
import functools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from common import (argument_parser, check_tokens, checkpoint_id, count, dtype_name, encode_example,
                    explained, file_hash, find_data, find_routers, length_batches, load_config,
                    load_weights, max_positions, MODEL_OPTIONS, padded_batch, read_task,
                    record_routing, require, route, routing_shape, run_batches, run_script,
                    tokenizer_id, try_model, vllm_version, VLLMEngine, write_whole)

# ------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"                # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
DATA = "tests/data/routing_{lang}.tsv"  # {lang} stands for the language
OUT = "routing"                         # folder of the dumps
BATCH_TOKENS = 8192                     # per forward pass; lower it if memory runs out
MAX_LENGTH = 4096                       # tokens; a longer sequence is cut, and that is reported
NULL_DRAWS = 5                          # random routers of every layer, with --null-router
# ------------------------------------------------------------------------------------------------
FORMAT = 1  # of the dump
# a dump that was made with other ones of these is another dump
SETTINGS = ("format", "revision", "tokenizer", "dtype", "data_sha256", "limit", "max_length",
            "chat_template", "instruction", "stats_only", "null_router", "shard", "vllm",
            "max_new_tokens", "options")


@torch.inference_mode()
def capture(model, sequences, batch_tokens=BATCH_TOKENS, stats_only=False, null_draws=0):
    """Where the routers send every token of sequences (lists of ids), and how many were padded.

    counts, weight_sums, mean_probs  (sequences, layers, experts): selections, weights given with
                                     them, mean softmax(router_logits)
    null_counts                      (sequences, null_draws, layers, experts), if there are draws
    selected_experts                 (tokens, layers, top_k), one sequence after the other
    """
    layers, num_experts, top_k = one_shape(routing_shape(model))
    lengths, kept = list(map(len, sequences)), 0 if stats_only else top_k  # IDs of a token
    routing, real = {}, None  # of a batch: what each layer adds, and which tokens are no padding

    def on_router(layer, *answer):  # to one device, where a model is spread over several
        answer = [x.to(real.device).reshape(*real.shape[:2], -1)
                  for x in (*answer, *null_choices.pop(layer, ()))]
        routing[layer] = sums_over(real, *answer), answer[2][..., :kept].short()

    def run(batch):
        nonlocal real
        ids = padded_batch(model, sequences, batch)
        length = torch.tensor([[[lengths[i]]] for i in batch])
        real = (torch.arange(ids.shape[1])[:, None] < length).to(ids.device)
        routing.clear()
        model.get_decoder()(input_ids=ids, use_cache=False)
        require(len(routing) == len(layers), f"{len(layers) - len(routing)} routers were bypassed")
        # what leaves the device does so once per batch, all layers in one: (batch, layers, ...)
        sums, chosen = (torch.stack(x, 1).cpu().numpy()
                        for x in zip(*(routing[layer] for layer in layers)))
        chosen = chosen.astype(np.uint8 if num_experts <= 256 else np.uint16)
        progress.update(sum(lengths[i] for i in batch))
        return zip([ids.shape[1] - lengths[i] for i in batch], sums,
                   [experts[:, :lengths[i]].swapaxes(0, 1) for i, experts in zip(batch, chosen)])

    with (null_routing(model, null_draws, num_experts, top_k) as null_choices,
          record_routing(model, on_router),
          tqdm(total=sum(lengths), unit="tok", unit_scale=True, leave=False) as progress):
        padding, sums, selected = zip(*run_batches(run, length_batches(lengths, batch_tokens)))
    counts, weight_sums, mean_probs, *null_counts = np.moveaxis(sums, 2, 0)
    arrays = {"counts": counts.astype(np.int64), "weight_sums": weight_sums.astype(float),
              "mean_probs": mean_probs.astype(np.float32)}
    if null_draws:
        arrays["null_counts"] = np.stack(null_counts, 1).astype(np.int32)
    if not stats_only:
        arrays["selected_experts"] = np.concatenate(selected)
    return arrays, sum(padding)


def record(model, sequences, batch_tokens, max_new_tokens=None, **options):
    """(sequences, arrays, padding) of capture(); of a VLLMEngine selected_experts alone, and of the
    sequences with responses of max_new_tokens, but for their last.
    """
    if isinstance(model, VLLMEngine):
        sequences, selected = route(model, sequences, max_new_tokens=max_new_tokens or 1)
        return sequences, {"selected_experts": selected}, 0
    return sequences, *capture(model, sequences, batch_tokens, **options)


def sums_over(real, router_logits, routing_weights, selected_experts, *more):
    """Over real tokens selections, weights, mean probabilities, and more: (batch, each, experts).

    All (batch, tokens, experts or top_k), real (batch, tokens, 1). No step waits for the device.
    """
    weights = routing_weights.to(torch.promote_types(routing_weights.dtype, torch.float32))
    none = torch.zeros_like(router_logits, dtype=weights.dtype)
    chosen = none.scatter(-1, selected_experts, 1.0)
    given = none.scatter(-1, selected_experts, weights)
    probs = router_logits.softmax(-1, dtype=torch.float32) / real.sum(1, keepdim=True)
    return torch.stack([(each * real).sum(1) for each in (chosen, given, probs, *more)], 1)


@contextlib.contextmanager
def null_routing(model, draws, num_experts, top_k):
    """Inside the block, a dict of what random routers select for the hidden states that a layer's
    router was given last: {layer: of each draw 0 or 1 (tokens, experts)}; empty without draws.

    They are linear, of random rows that have the norms of the trained one's; the same ones in every
    run, since a layer is the seed of its draws.
    """
    choices = {}

    def hook(layer, rows, router, args):
        logits = torch.einsum("...h,deh->...de", args[0].float(), rows)
        choices[layer] = torch.zeros_like(logits).scatter(
            -1, logits.topk(top_k).indices, 1.0).unbind(-2)

    with contextlib.ExitStack() as hooks:
        for layer, router in find_routers(model).items() if draws else ():
            trained = max(router.parameters(), key=torch.numel)  # (experts, hidden size)
            trained = trained[:num_experts].float()  # Inkling: always-on ones, too
            seeded, norms = torch.Generator().manual_seed(layer), trained.norm(dim=1, keepdim=True)
            rows = F.normalize(torch.randn(draws, *trained.shape, generator=seeded), dim=-1)
            hooks.enter_context(router.register_forward_pre_hook(
                functools.partial(hook, layer, rows.to(norms.device) * norms)))
        yield choices


def one_shape(shape):
    """([decoder layers], num_experts, top_k) of a routing_shape: a dump holds one of each."""
    kinds = set(shape.values())
    require(len(kinds) == 1, f"layers differ in (num_experts, top_k): {sorted(kinds)}; a dump "
                             "cannot hold that")
    return list(shape), *kinds.pop()


def as_dump(arrays, layers, sequences, prompt_lengths, text_spans):
    """What was recorded for one language's sequences, as the arrays of its dump."""
    totals = {key: arrays[key].sum(0) for key in ("counts", "weight_sums", "null_counts")
              if key in arrays}
    dump = arrays | totals | {
        "sequence_offsets": np.cumsum([0, *map(len, sequences)]),
        "prompt_lengths": np.array(prompt_lengths), "text_spans": np.array(text_spans),
        "layers": np.array(layers, np.int32)}
    if "selected_experts" in arrays:
        dump["token_ids"] = np.concatenate(sequences).astype(np.int32)
    return dump


def save_dump(path, dump, meta):
    """Write a dump, whole or not at all. Every token must be counted top_k times in every layer."""
    if "mean_probs" in dump:  # vLLM tells IDs alone
        broken = dump["layers"][~np.isfinite(dump["mean_probs"]).all((0, 2))].tolist()
        require(not broken, f"router logits are NaN or infinite in layers {broken}; try --dtype "
                            "float32")
    selections = dump["sequence_offsets"][-1] * meta["top_k"]
    counted = dump["counts"].sum(1) if "counts" in dump else dump["selected_experts"][:, 0].size
    if not np.all(counted == selections):
        raise RuntimeError(f"{path}: counts do not add up to {selections}, tokens * top_k")
    # not compressed: that saves a third, takes ten times as long, and reading could skip nothing
    write_whole(path, lambda file: np.savez(file, **dump, meta=json.dumps(meta, default=str)))


def is_done(path, meta, overwrite):
    """Whether the dump is there with the same settings; InputError says which are others."""
    if overwrite or not path.exists():
        return False
    with (explained(f"{path} is no routing dump; move it away or add --overwrite"),
          np.load(path, allow_pickle=False) as file):
        made = json.loads(str(file["meta"]))
        differ = [f"{key} {made.get(key)} there, {meta[key]} now"
                  for key in SETTINGS if made.get(key) != meta[key]]
    require(not differ, f"{path} was made with other settings ({'; '.join(differ)}); add "
                        "--overwrite or another --out")
    return True


def plan_dumps(args, config, tokenizer, shape):
    """[(columns of read_corpus, meta, path of the dump)] of those that are not there yet."""
    (index, parts), plan, (_, num_experts, top_k) = args.shard, [], one_shape(shape)
    revision, tokenizer_hash = checkpoint_id(args.model, config, shape), tokenizer_id(tokenizer)
    longest = min(args.max_length, max_positions(config) - (args.engine == "vllm"))  # it adds one
    for language, data in find_data(args.tokens or args.data, args.languages).items():
        path = Path(args.out, f"{language}{f'.{index}of{parts}' * (parts > 1)}.npz")
        examples = [] if args.tokens else read_task(args, language, data)
        meta = vars(args) | {
            "format": FORMAT, "revision": revision, "tokenizer": tokenizer_hash,
            "quantization": str(getattr(config, "quantization_config", None)),
            "num_experts": num_experts, "top_k": top_k, "dtype": dtype_name(args.dtype, config),
            "shard": f"{index}/{parts}", "language": language, "data": data,
            "instruction": examples[0].get("instruction") if examples else None,
            "data_sha256": file_hash(data), "transformers": transformers.__version__,
            "torch": torch.__version__,
            "vllm": vllm_version(config) if args.engine == "vllm" else None,
            "options": MODEL_OPTIONS or None}
        if is_done(path, meta, args.overwrite):
            print(f"{language:<8} there already  {path}")
            continue
        corpus = read_tokens(data, tokenizer_hash) if args.tokens else read_corpus(
            tokenizer, examples, args.chat_template)
        first, last = (len(corpus) * part // parts for part in (index - 1, index))
        require(first < last, f"{data}: fewer prompts than shards; lower N of --shard I/{parts}")
        corpus = corpus[first:last]
        check_tokens([ids for ids, *_ in corpus], config, data)
        meta["truncated"] = sum(len(ids) > longest for ids, *_ in corpus)
        if meta["truncated"]:
            print(f"{language:<8} {meta['truncated']} sequences were cut at {longest} tokens; see "
                  "--max-length")
        columns = zip(*((ids[:longest], min(prompt, longest), np.minimum(span, longest))
                        for ids, prompt, span in corpus))
        plan.append((list(columns), meta, path))
    return plan


def read_corpus(tokenizer, examples, chat_template):
    """[(ids of prompt and response, tokens of the prompt, where in them its own text lies)]"""
    corpus = []
    for example in examples:
        prompt, span = encode_example(tokenizer, example, chat_template)
        ids = prompt + tokenizer(example.get("response", ""), add_special_tokens=False)["input_ids"]
        corpus.append((ids, len(prompt), span))
    return corpus


def read_tokens(path, tokenizer_hash):
    """read_corpus of the very tokens of a whole dump."""
    with (explained(f"{path} is no whole dump with token_ids and text_spans; --tokens takes one"),
          np.load(path, allow_pickle=False) as file):
        offsets, ids, prompts, spans = (file[key] for key in (
            "sequence_offsets", "token_ids", "prompt_lengths", "text_spans"))
        made = json.loads(str(file["meta"]))
        require(made.get("shard", "1/1") == "1/1", "it is a shard")
        if made.get("tokenizer", tokenizer_hash) != tokenizer_hash:
            print(f"note: {path} has the tokens of another tokenizer, or chat template")
        sequences = [part.tolist() for part in np.split(ids, offsets[1:-1])]
        lengths = list(map(len, sequences))
        require(ids.dtype.kind in "iu" and lengths == np.diff(offsets).tolist() and 0 not in lengths
                and len(lengths) == len(prompts) == len(spans) and (prompts <= lengths).all()
                and (spans <= prompts[:, None]).all(), "its sequences do not fit its tokens")
        return list(zip(sequences, prompts.tolist(), spans))


def parse_shard(text):
    """"2/4" -> (2, 4): the second of four parts."""
    index, _, parts = text.partition("/")
    if not (index.isdigit() and parts.isdigit() and 1 <= int(index) <= int(parts)):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 1 <= I <= N")
    return int(index), int(parts)


def parse_arguments():
    p = argument_parser(__doc__, model=MODEL, data=DATA, out=OUT, batch_tokens=BATCH_TOKENS,
                        max_length=MAX_LENGTH)
    add = p.add_argument_group("what is captured").add_argument
    add("--tokens", metavar="DUMP", help="instead, the very tokens of dumps, as 'a/{lang}.npz'")
    add("--shard", type=parse_shard, default=(1, 1), metavar="I/N", help="part I of N of each one")
    add("--stats-only", action="store_true", help="no expert IDs token by token: small dumps")
    add("--null-router", action="store_const", const=NULL_DRAWS, default=0,
        help="count what random routers pick, too")
    add("--max-new-tokens", type=count, help="of responses that vLLM gives, recorded as well")
    add("--overwrite", action="store_true", help="replace dumps that were made with other settings")
    args = p.parse_args()
    require(not os.path.isfile(args.out), f"{args.out} is a file; --out takes a folder")
    require(not args.tokens or (args.data, args.limit, args.instruction, args.chat_template) == (
        DATA, None, None, "auto"), "--tokens runs dumps as they are, without --data, --limit, "
            "--instruction and --chat-template")
    require(args.engine == "vllm" or not args.max_new_tokens,
            "--max-new-tokens needs --engine vllm")
    require(args.engine != "vllm" or not (args.stats_only or args.null_router),
            "--engine vllm gives IDs alone, without --stats-only and --null-router")
    return args


def main():
    args = parse_arguments()
    config, tokenizer, shape = load_config(args.model)
    layers, num_experts, top_k = one_shape(shape)
    plan = plan_dumps(args, config, tokenizer, shape)
    if not plan:
        return
    Path(args.out).mkdir(parents=True, exist_ok=True)
    dtype = dtype_name(args.dtype, config)
    if args.engine == "vllm":
        model = VLLMEngine(args.model, shape, dtype, **args.engine_options)
    else:
        model = load_weights(args.model, config, args.dtype, args.device)
        try_model(model, plan[0][0][0][0], edits=False)
    print(f"{args.model}  {len(layers)} MoE layers  {num_experts} experts  top_k {top_k}  {dtype}")
    for (prompts, *rest), meta, path in plan:
        started = time.perf_counter()
        sequences, arrays, padded = record(
            model, prompts, args.batch_tokens, args.max_new_tokens, stats_only=args.stats_only,
            null_draws=args.null_router)
        tokens, seconds = sum(map(len, sequences)), time.perf_counter() - started
        is_done(path, meta, args.overwrite)  # another run may have written it meanwhile
        save_dump(path, as_dump(arrays, layers, sequences, *rest), meta)
        print(f"{meta['language']:<8} {len(sequences):>6} sequences {tokens:>10,} tokens  "
              f"{padded / (padded + tokens):.1%} padding  {tokens / seconds:>7,.0f} tokens/s  "
              f"{path}")


if __name__ == "__main__":
    run_script(main)
