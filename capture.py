"""
Record which experts the routers pick for every token of every language.

    python capture.py                                                                # the tiny model in tests/
    python capture.py --model Qwen/Qwen3-30B-A3B --data 'data/mgsm_{lang}.tsv'

reads   data/mgsm_<lang>.tsv     prompts, one file per language (.tsv, .jsonl or .txt)
writes  routing/<lang>.npz       the routing dump of the language, described in the README; then: python analyze.py

One forward pass over the prompts, nothing is generated. A dump that is there already is kept, so a run that was stopped
goes on where it stopped. The tiny model takes a few seconds; a 30B model on one GPU, about its bare prefill time.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import transformers
from tqdm import tqdm

from common import (InputError, checkpoint_id, dtype_name, encode_prompt, find_data, length_batches, load_config,
                    load_model, max_positions, positive, read_examples, record_routing, right_padded, routing_shape, run_batches)

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"                # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
DATA = "tests/data/routing_{lang}.tsv"  # {lang} stands for the language
OUT = "routing"                         # folder of the dumps
BATCH_TOKENS = 8192                     # per forward pass, padding included; lower it if memory runs out
MAX_LENGTH = 4096                       # tokens; a longer sequence is cut, and that is reported
# ---------------------------------------------------------------------------------------------------------------------
FORMAT = 1  # of the dump
# a dump that was made with other ones of these is another dump
SETTINGS = ("format", "revision", "dtype", "data_sha256", "limit", "max_length", "chat_template", "stats_only", "shard")


@torch.inference_mode()
def capture(model, sequences, prompt_lengths, batch_tokens=BATCH_TOKENS, stats_only=False, progress=None):
    """The routing of token sequences (lists of ids) through a model, as the arrays of a dump, and the padded tokens.

    Padding stands on the right and needs no attention mask: attention is causal, so what comes later cannot reach a
    real token; the rows of padding are then left out. What is summed is summed on the device, in int64 and float64.
    """
    layers, num_experts, top_k = one_shape(routing_shape(model))
    row_of = {layer: row for row, layer in enumerate(layers)}
    device = model.device
    lengths = [len(s) for s in sequences]
    offsets = np.cumsum([0] + lengths)
    shape = len(layers), num_experts
    counts = torch.zeros(shape, dtype=torch.int64, device=device)
    weight_sums = torch.zeros(shape, dtype=torch.float64, device=device)
    mean_probs = np.empty((len(sequences), *shape), np.float32)
    id_type = (torch.uint8, np.uint8) if num_experts <= 256 else (torch.int16, np.uint16)
    selected = None if stats_only else np.empty((offsets[-1], len(layers), top_k), id_type[1])
    padded, now = 0, {}

    def on_router(layer, router_logits, routing_weights, selected_experts):
        """One layer of the batch at hand, of which now has the positions of the real tokens, and the tallies."""
        row = row_of[layer]
        # onto the device of the tallies, where a model is spread over several
        router_logits, routing_weights, selected_experts = (
            t.to(device) for t in (router_logits, routing_weights, selected_experts))
        chosen = selected_experts.reshape(-1, top_k)[now["keep"]]
        weights = routing_weights.reshape(-1, top_k)[now["keep"]].flatten().double()
        now["counts"][row].scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        now["weight_sums"][row].scatter_add_(0, chosen.flatten(), weights)
        probabilities = router_logits.reshape(*now["real"].shape, num_experts).float().softmax(-1)
        now["probs"][:, row] = (probabilities * now["real"][:, :, None]).sum(1, dtype=torch.float64)
        if not stats_only:
            now["ids"][:, row] = chosen.to(id_type[0])

    def run(batch):
        nonlocal padded
        ids = right_padded([sequences[i] for i in batch], device)
        real = torch.arange(ids.shape[1]) < torch.tensor([lengths[i] for i in batch])[:, None]
        # with the number of real tokens known on this side, no step in a layer waits for the device
        keep = real.flatten().nonzero().squeeze(1)
        now.update(keep=keep.to(device), real=real.to(device, torch.float32), counts=torch.zeros_like(counts),
                   weight_sums=torch.zeros_like(weight_sums), ids=None if stats_only else torch.empty(
                       len(keep), len(layers), top_k, dtype=id_type[0], device=device),
                   probs=torch.empty(len(batch), *shape, dtype=torch.float64, device=device))
        model.get_decoder()(input_ids=ids, use_cache=False)
        counts.add_(now["counts"])  # only now: a batch that does not fit into memory is run again in halves
        weight_sums.add_(now["weight_sums"])
        mean_probs[batch] = (now["probs"] / now["real"].sum(1, dtype=torch.float64)[:, None, None]).cpu().numpy()
        if not stats_only:
            rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in batch])
            selected[rows] = now["ids"].cpu().numpy().view(id_type[1])
        padded += ids.numel() - len(keep)
        if progress is not None:
            progress.update(len(keep))

    with record_routing(model, on_router):
        run_batches(run, length_batches(lengths, batch_tokens))
    finite = np.isfinite(mean_probs).all(axis=(0, 2))
    if not finite.all():
        raise InputError(f"router logits are NaN or infinite in layers {[l for l, ok in zip(layers, finite) if not ok]}; "
                         "try --dtype float32")
    dump = {
        "counts": counts.cpu().numpy(),
        "weight_sums": weight_sums.cpu().numpy(),
        "mean_probs": mean_probs,
        "sequence_offsets": offsets.astype(np.int64),
        "prompt_lengths": np.array(prompt_lengths, np.int64),
        "layers": np.array(layers, np.int32),
    }
    if not stats_only:
        dump |= {"selected_experts": selected, "token_ids": np.concatenate(sequences).astype(np.int32)}
    return dump, padded


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
    p.add_argument("--batch-tokens", type=positive, default=BATCH_TOKENS, help="tokens per forward pass (default: %(default)s)")
    p.add_argument("--max-length", type=positive, default=MAX_LENGTH, help="cut longer sequences (default: %(default)s)")
    p.add_argument("--limit", type=positive, help="only the first N prompts of each language")
    p.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, ...")
    p.add_argument("--device", help="cuda, cpu, auto (all GPUs; needs accelerate); default: CUDA where there is one")
    p.add_argument("--chat-template", choices=["auto", "never"], default="auto", help="never: the bare text")
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
    model, _ = load_model(args.model, args.dtype, args.device)
    longest = min(args.max_length, max_positions(config))
    print(f"{args.model}  {len(layers)} MoE layers  {num_experts} experts  top_k {top_k}  {model.dtype}  {model.device}")
    for language, (examples, meta, dump_path) in todo.items():
        prompts = [encode_prompt(tokenizer, e["prompt"], args.chat_template) for e in examples]
        sequences = [ids + tokenizer(e["response"], add_special_tokens=False)["input_ids"] if "response" in e else ids
                     for ids, e in zip(prompts, examples)]
        meta["truncated"] = sum(len(s) > longest for s in sequences)
        sequences = [s[:longest] for s in sequences]
        num_tokens = sum(len(s) for s in sequences)
        started = time.perf_counter()
        with tqdm(total=num_tokens, desc=language, unit="tok", unit_scale=True, leave=False) as progress:
            dump, padded = capture(model, sequences, [min(len(p), longest) for p in prompts],
                                   args.batch_tokens, args.stats_only, progress)
        seconds = time.perf_counter() - started
        save_dump(dump_path, dump, meta)
        print(f"{language:<8} {len(sequences):>6} sequences {num_tokens:>10,} tokens {padded / (padded + num_tokens):>6.1%} padding "
              f"{num_tokens / seconds:>9,.0f} tokens/s  {dump_path}")
        if meta["truncated"]:
            print(f"{language:<8} {meta['truncated']} sequences were cut at {longest} tokens; see --max-length")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
