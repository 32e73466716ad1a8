"""
Record which experts the routers pick for every token of every language.

    python capture.py                                                                # the tiny model in tests/
    python capture.py --model Qwen/Qwen3-30B-A3B --data 'data/mgsm_{lang}.tsv'

reads   data/mgsm_<lang>.tsv     prompts, one file per language (.tsv, .jsonl, .json or .txt)
writes  routing/<lang>.npz       the routing dump of the language, described in the README; then: python analyze.py

One forward pass over the prompts, nothing is generated. A dump that is there already is kept, so a run that was stopped
goes on where it stopped. The tiny model takes a few seconds; a 30B model on one GPU, about its bare prefill time.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import transformers
from tqdm import tqdm

from common import (InputError, add_model_arguments, checkpoint_id, dtype_name, encode_prompt, find_data, length_batches,
                    load_config, load_model, max_positions, positive, read_examples, record_routing, right_padded,
                    routing_shape, run_batches)

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"                # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
DATA = "tests/data/routing_{lang}.tsv"  # {lang} stands for the language
OUT = "routing"                         # folder of the dumps
BATCH_TOKENS = 8192                     # per forward pass, padding included; lower it if memory runs out
POOL_TOKENS = 2**18                     # languages are batched together up to so many tokens; a killed run loses no more
MAX_LENGTH = 4096                       # tokens; a longer sequence is cut, and that is reported
# ---------------------------------------------------------------------------------------------------------------------
FORMAT = 1  # of the dump
# a dump that was made with other ones of these is another dump
SETTINGS = ("format", "revision", "dtype", "data_sha256", "limit", "max_length", "chat_template", "stats_only", "shard")


@torch.inference_mode()
def capture(model, corpora, batch_tokens=BATCH_TOKENS, stats_only=False, progress=None, empty=np.empty):
    """Routing of the token sequences of several languages: ({language: arrays of its dump}, number of padded tokens).

    corpora {language: (sequences, prompt_lengths)}, sequences being lists of ids. All are batched together by length, for
    little padding. It stands on the right and needs no attention mask: attention is causal, so what comes later cannot
    reach a real token; the rows of padding are then left out. What is summed is summed on the device, in int64 and
    float64; what leaves the device does so once per batch, and is put away while the next batch runs.
    empty(shape, dtype) makes the arrays that grow with the sequences.
    """
    layers, num_experts, top_k = one_shape(routing_shape(model))
    row_of = {layer: row for row, layer in enumerate(layers)}
    device, shape = model.device, (len(layers), num_experts)
    on_cuda = device.type == "cuda"  # where copies run beside the work
    id_type = (torch.uint8, np.uint8) if num_experts <= 256 else (torch.int16, np.uint16)
    dumps, sequences = {}, []  # of each sequence: the number of its language, where its mean_probs and its IDs go, its ids
    for number, (language, (texts, prompt_lengths)) in enumerate(corpora.items()):
        offsets = np.cumsum([0] + [len(ids) for ids in texts])
        dump = dumps[language] = {
            "mean_probs": empty((len(texts), *shape), np.float32), "sequence_offsets": offsets.astype(np.int64),
            "prompt_lengths": np.array(prompt_lengths, np.int64), "layers": np.array(layers, np.int32)}
        if not stats_only:
            dump |= {"selected_experts": empty((offsets[-1], len(layers), top_k), id_type[1]),
                     "token_ids": np.concatenate(texts).astype(np.int32)}
        for mean_probs, start, ids in zip(dump["mean_probs"], offsets, texts):
            selected = None if stats_only else dump["selected_experts"][start:start + len(ids)]
            sequences.append((number, mean_probs, selected, ids))
    counts = torch.zeros(len(dumps) * len(layers) * num_experts, dtype=torch.int64, device=device)
    weight_sums = torch.zeros_like(counts, dtype=torch.float64)
    cell = torch.arange(len(layers), device=device)[:, None, None] * num_experts  # of counts: a layer's first
    one, padded, now, on_its_way = torch.ones_like(counts[:1]), 0, {}, []

    def on_router(layer, router_logits, routing_weights, selected_experts):
        """One layer of the batch at hand. It only launches work: no step in here waits for the device."""
        row = row_of[layer]
        now["selected"][row] = selected_experts.reshape(-1, top_k)
        now["weights"][row] = routing_weights.reshape(-1, top_k)
        probs = router_logits.reshape(len(now["real"]), -1, num_experts).softmax(-1, dtype=torch.float32)
        # onto the device of the tallies, where a model is spread over several
        now["mean_probs"][row] = (now["real"] @ probs.to(device)).squeeze(1)
        now["seen"].add(row)

    def send(tensor):
        return (tensor.pin_memory() if on_cuda else tensor).to(device, non_blocking=on_cuda)

    def run(batch):
        nonlocal padded
        lengths = torch.tensor([len(sequences[i][3]) for i in batch])
        ids = right_padded([sequences[i][3] for i in batch])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        # with the number of real tokens known on this side, no index waits for the device
        keep = real.flatten().nonzero().squeeze(1)
        language = torch.tensor([sequences[i][0] for i in batch]).repeat_interleave(lengths)
        num_padded, (ids, keep, language) = ids.numel() - len(keep), map(send, (ids, keep, language))
        now.update(seen=set(), real=send((real / lengths[:, None])[:, None]),  # a product with it is the mean over real tokens
                   mean_probs=torch.empty(len(layers), len(batch), num_experts, device=device),
                   selected=torch.empty(len(layers), ids.numel(), top_k, dtype=id_type[0], device=device),
                   weights=torch.empty(len(layers), ids.numel(), top_k, device=device,
                                       dtype=torch.promote_types(model.dtype, torch.float32)))
        model.get_decoder()(input_ids=ids, use_cache=False)
        if len(now["seen"]) != len(layers):
            raise RuntimeError(f"only {len(now['seen'])} of {len(layers)} routers were called")
        chosen, weights = now["selected"][:, keep], now["weights"][:, keep].double().flatten()
        cells = (chosen.long() + cell + language[:, None] * len(layers) * num_experts).flatten()
        leaving = [tensor.transpose(0, 1).contiguous() for tensor in (now["mean_probs"], chosen)[:1 if stats_only else 2]]
        # only now: a batch that does not fit into memory is run again in halves
        counts.scatter_add_(0, cells, one.expand(len(cells)))
        weight_sums.scatter_add_(0, cells, weights)
        arriving = [tensor.to("cpu", non_blocking=on_cuda) for tensor in leaving]  # into pinned memory
        ready = torch.cuda.current_stream(device).record_event() if on_cuda else None
        store()
        on_its_way.append((batch, ready, *arriving))
        padded += num_padded
        if progress is not None:
            progress.update(len(keep))

    def store():
        """Put away what the batch before this one has sent."""
        while on_its_way:
            batch, ready, means, *selected = on_its_way.pop()
            if ready is not None:
                ready.synchronize()
            start = 0
            for i, mean in zip(batch, means.numpy()):
                _, mean_probs, ids, tokens = sequences[i]
                mean_probs[:] = mean
                if selected:
                    ids[:] = selected[0][start:start + len(tokens)].numpy().view(id_type[1])
                    start += len(tokens)

    with record_routing(model, on_router):
        run_batches(run, length_batches([len(ids) for *_, ids in sequences], batch_tokens))
    store()
    for number, dump in enumerate(dumps.values()):
        finite = np.isfinite(dump["mean_probs"]).all(axis=(0, 2))
        if not finite.all():
            raise InputError("router logits are NaN or infinite in layers "
                             f"{[layer for layer, ok in zip(layers, finite) if not ok]}; try --dtype float32")
        dump["counts"] = counts.view(-1, *shape)[number].cpu().numpy()
        dump["weight_sums"] = weight_sums.view(-1, *shape)[number].cpu().numpy()
    return dumps, padded


def pools(lengths, pool_tokens):
    """Cut {language: tokens} into lists of languages that are captured together: up to pool_tokens, or one language."""
    together = []
    for language, tokens in lengths.items():
        if not together or sum(lengths[other] for other in together[-1]) + tokens > pool_tokens:
            together.append([])
        together[-1].append(language)
    return together


def one_shape(shape):
    """([decoder layers], num_experts, top_k) of routing_shape's answer; a dump holds one num_experts and one top_k."""
    kinds = set(shape.values())
    if len(kinds) > 1:
        raise InputError(f"layers differ in (num_experts, top_k): {sorted(kinds)}; a dump cannot hold that")
    return list(shape), *kinds.pop()


def save_dump(path, dump, meta):
    """Write a dump under its final name only when it is whole. Every token must be counted top_k times in every layer."""
    num_tokens = int(dump["sequence_offsets"][-1])
    if not (dump["counts"].sum(1) == num_tokens * meta["top_k"]).all():
        raise RuntimeError(f"{path}: counts do not add up to {num_tokens} tokens * top_k {meta['top_k']}; not saved")
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            # not compressed: that saves a third, takes ten times as long to write, and reading could skip nothing
            np.savez(file, **dump, meta=np.array(json.dumps(meta, ensure_ascii=False)))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_done(path, meta, overwrite):
    """Whether the dump is there with the same settings; with other settings, InputError says which."""
    if overwrite or not path.exists():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            there = json.loads(str(file["meta"]))
    except (ValueError, KeyError, OSError, EOFError, BadZipFile) as error:
        raise InputError(f"{path} is not a routing dump; move it away or add --overwrite") from error
    differ = [f"{key} {there.get(key)} there, {meta[key]} now" for key in SETTINGS if there.get(key) != meta[key]]
    if differ:
        raise InputError(f"{path} was made with other settings ({'; '.join(differ)}); add --overwrite or another --out")
    return True


def parse_shard(text):
    """"2/4" -> (2, 4): the second of four parts."""
    try:
        index, parts = (int(n) for n in text.split("/"))
        assert 1 <= index <= parts
    except (ValueError, AssertionError):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with 1 <= I <= N") from None
    return index, parts


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=MODEL, help="folder or hub id (default: %(default)s)")
    p.add_argument("--data", default=DATA, help="prompts; {lang} stands for the language (default: %(default)s)")
    p.add_argument("--languages", help="bn,de (default: every file that --data matches)")
    p.add_argument("--out", type=Path, default=Path(OUT), help="folder of the dumps (default: %(default)s)")
    p.add_argument("--batch-tokens", type=positive, default=BATCH_TOKENS, help="per forward pass (default: %(default)s)")
    p.add_argument("--pool-tokens", type=positive, default=POOL_TOKENS, help="languages are batched, and written, together up to "
                   "so many tokens (default: %(default)s)")
    p.add_argument("--max-length", type=positive, default=MAX_LENGTH, help="cut longer sequences (default: %(default)s)")
    p.add_argument("--limit", type=positive, help="only the first N prompts of each language")
    add_model_arguments(p)
    p.add_argument("--stats-only", action="store_true", help="no expert IDs token by token: small dumps")
    p.add_argument("--shard", type=parse_shard, default=(1, 1), metavar="I/N", help="only part I of N of each language")
    p.add_argument("--overwrite", action="store_true", help="replace dumps that were made with other settings")
    args = p.parse_args()

    files = find_data(args.data, args.languages)
    config, tokenizer, skeleton = load_config(args.model)
    layers, num_experts, top_k = one_shape(routing_shape(skeleton))
    index, parts = args.shard
    todo = {}
    for language, path in files.items():
        examples = read_examples(path)[:args.limit]
        examples = examples[len(examples) * (index - 1) // parts:len(examples) * index // parts]
        if not examples:
            raise InputError(f"{path}: fewer prompts than shards; lower N of --shard {index}/{parts}")
        meta = {
            "format": FORMAT, "language": language, "model": args.model, "revision": checkpoint_id(args.model, config),
            "num_experts": num_experts, "top_k": top_k, "data_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
            **vars(args), "data": path, "out": str(args.out), "shard": f"{index}/{parts}",
            "dtype": dtype_name(args.dtype, config),
            "transformers": transformers.__version__, "torch": torch.__version__,
        }
        dump_path = args.out / (f"{language}.npz" if parts == 1 else f"{language}.{index}of{parts}.npz")
        if is_done(dump_path, meta, args.overwrite):
            print(f"{language:<8} there already  {dump_path}")
        else:
            todo[language] = examples, meta, dump_path
    if not todo:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    model, _ = load_model(args.model, args.dtype, args.device, args.experts_implementation, args.attn_implementation)
    longest = min(args.max_length, max_positions(config))

    def on_disk(shape, dtype):
        """An array in a file without a name, so that memory does not grow with the corpus, and a kill leaves nothing."""
        file = tempfile.TemporaryFile(dir=args.out)
        if hasattr(os, "posix_fallocate"):  # else a full disk would be met by a write, which kills without a word
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "w+", shape=shape)

    print(f"{args.model}  {len(layers)} MoE layers  {num_experts} experts  top_k {top_k}  {model.dtype}  {model.device}")
    corpora = {}
    for language, (examples, meta, _) in todo.items():
        prompts = [encode_prompt(tokenizer, e["prompt"], args.chat_template) for e in examples]
        sequences = [ids + tokenizer(e["response"], add_special_tokens=False)["input_ids"] if "response" in e else ids
                     for ids, e in zip(prompts, examples)]
        meta["truncated"] = sum(len(s) > longest for s in sequences)
        corpora[language] = [np.array(s[:longest], np.int32) for s in sequences], [min(len(p), longest) for p in prompts]
    num_tokens = {language: sum(map(len, sequences)) for language, (sequences, _) in corpora.items()}
    for pool in pools(num_tokens, args.pool_tokens):
        total, started = sum(num_tokens[language] for language in pool), time.perf_counter()
        with tqdm(total=total, desc=" ".join(pool), unit="tok", unit_scale=True, leave=False) as progress:
            dumps, padded = capture(model, {language: corpora[language] for language in pool}, args.batch_tokens,
                                    args.stats_only, progress, on_disk)
        seconds = time.perf_counter() - started
        for language in pool:
            _, meta, dump_path = todo[language]
            save_dump(dump_path, dumps[language], meta)
            print(f"{language:<8} {len(corpora[language][0]):>6} sequences {num_tokens[language]:>10,} tokens  {dump_path}")
            if meta["truncated"]:
                print(f"{language:<8} {meta['truncated']} sequences were cut at {longest} tokens; see --max-length")
        print(f"{'':<8} {total:,} tokens, {padded / (padded + total):.1%} padding, {total / seconds:,.0f} tokens/s")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
