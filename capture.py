"""
Record which experts the routers select for every token, language by language.

    python capture.py                                 # the tiny model in tests/
    python capture.py --model Qwen/Qwen3-30B-A3B --data 'mgsm/{lang}.tsv'
    python capture.py --null-router       # and what random routers would select

reads   mgsm/<lang>.tsv      prompts, a file per language
writes  routing/<lang>.npz   its routing dump; then: python analyze.py

One forward pass over the prompts; nothing is generated. Prompts may come with
responses, as those that ablate.py and steer.py write. A dump that was made with
the same settings is kept, so a stopped run goes on where it stopped. The tiny
model takes a few seconds, a 30B model about the time of a forward pass. With
several GPUs, start a process for each with its own --languages.
"""

import contextlib
import functools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

from common import (
    MODEL_OPTIONS, InputError, add_model_arguments, argument_parser, check_model, check_token_ids,
    checkpoint_id, dtype_name, encode_example, file_hash, find_data, find_routers, length_batches,
    load_config, load_weights, max_positions, padded_batch, print_now, read_task, record_routing,
    routing_shape, run_batches, run_script, short_hash, tokenizer_id, whole_file)

# ------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"                # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
DATA = "tests/data/routing_{lang}.tsv"  # {lang} stands for the language
OUT = "routing"                         # folder of the dumps
BATCH_TOKENS = 8192                     # tokens per forward pass; lower it if memory runs out
MAX_LENGTH = 4096                       # tokens; longer sequences are cut, and that is printed
NULL_DRAWS = 5                          # --null-router: random routers of every layer, to see
                                        # how alike languages would be without what was learned
# ------------------------------------------------------------------------------------------------

FORMAT = 2  # version of the dump
# A dump that is there is kept if all of these are the same; else it is an error
SETTINGS = ("format", "revision", "dtype", "options", "sequences", "stats_only", "null_router")
# If sequences, a hash, differ, one of these says why
SEQUENCE_SETTINGS = ("tokenizer", "data_sha256", "limit", "max_length", "chat_template",
                     "chat_template_options", "instruction")


@torch.inference_mode()
def capture(model, sequences, batch_tokens=BATCH_TOKENS, stats_only=False, null_draws=0):
    """Run sequences, lists of token IDs, and return how they were routed.

    Returns (arrays, number of padding tokens that were run along). The arrays are
    counts            int64 (sequences, layers, experts), tokens that selected the expert
    weight_sums       float64 (sequences, layers, experts), sum of the routing weights given to it
    mean_probs        float32 (sequences, layers, experts), mean of softmax(router_logits)
    null_counts       int32 (sequences, null_draws, layers, experts), counts of random routers;
                      only with null_draws
    selected_experts  uint8 or uint16 (tokens, layers, top_k), one sequence after the other;
                      not with stats_only
    """
    lengths = [len(ids) for ids in sequences]
    with tqdm(total=sum(lengths), unit="tok", unit_scale=True, leave=False) as progress:
        recorder = BatchRecorder(model, sequences, stats_only, null_draws, progress)
        with recorder.hooks():
            results = run_batches(recorder.run, length_batches(lengths, batch_tokens))

    # (sequences, layers, 3 + null_draws, experts)
    all_sums = np.stack([sums for sums, _ in results])
    arrays = {
        "counts": all_sums[:, :, 0].astype(np.int64),
        "weight_sums": all_sums[:, :, 1].astype(np.float64),
        "mean_probs": all_sums[:, :, 2].astype(np.float32),
    }
    if null_draws:
        arrays["null_counts"] = all_sums[:, :, 3:].swapaxes(1, 2).astype(np.int32)
    if not stats_only:
        arrays["selected_experts"] = np.concatenate([selected for _, selected in results])
    return arrays, recorder.num_padding


class BatchRecorder:
    """Runs batches of sequences, and sums the routing of each over its tokens.

        with recorder.hooks():
            recorder.run([0, 1])  # the sequences of these indices

    A layer is summed as soon as its router has run, so that no layer's logits have to be kept.
    Nothing waits for the device before all layers have run.
    """

    def __init__(self, model, sequences, stats_only, null_draws, progress):
        self.model = model
        self.sequences = sequences
        self.stats_only = stats_only
        self.progress = progress
        self.layers, self.num_experts, self.top_k = one_shape(routing_shape(model))
        self.null_routers = draw_null_routers(model, null_draws, self.num_experts)
        self.num_padding = 0
        # Of the batch that is being run
        self.is_real = None      # bool (batch, tokens, 1), False for padding
        self.null_selected = {}  # {layer: list of (batch, tokens, experts), one for each draw};
                                 # filled before a router is called, and emptied after it
        self.sums = {}           # {layer: (batch, 3 + draws, experts)}
        self.selected = {}       # {layer: int16 (batch, tokens, top_k)}

    @contextlib.contextmanager
    def hooks(self):
        """In the block, record what the model's routers do."""
        routers = find_routers(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(record_routing(self.model, self.on_router))
            for layer in self.null_routers:
                hook = functools.partial(self.before_router, layer)
                stack.enter_context(routers[layer].register_forward_pre_hook(hook))
            yield

    def run(self, batch):
        """Return (sums, selected_experts) for each sequence of a batch, a list of indices.

        sums              (layers, 3 + draws, experts), see sum_over_tokens
        selected_experts  uint8 or uint16 (tokens, layers, top_k), or None with stats_only
        """
        ids = padded_batch(self.model, self.sequences, batch)  # (batch, longest)
        lengths = [len(self.sequences[i]) for i in batch]
        positions = torch.arange(ids.shape[1])[:, None]
        is_real = positions < torch.tensor(lengths)[:, None, None]
        self.is_real = is_real.to(ids.device)
        self.sums, self.selected = {}, {}
        self.model.get_decoder()(input_ids=ids, use_cache=False)
        bypassed = set(self.layers) - self.sums.keys()
        if bypassed:
            raise InputError(f"the routers in layers {sorted(bypassed)} were bypassed")

        self.num_padding += ids.numel() - sum(lengths)
        self.progress.update(sum(lengths))
        sums = self.fetch(self.sums)
        if self.stats_only:
            return [(sums_of_sequence, None) for sums_of_sequence in sums]
        selected = self.fetch(self.selected)  # (batch, layers, longest, top_k)
        selected = selected.astype(np.uint8 if self.num_experts <= 256 else np.uint16)
        results = []
        for row, length in enumerate(lengths):
            results.append((sums[row], selected[row, :, :length].swapaxes(0, 1)))
        return results

    def fetch(self, tensors):
        """Return {layer: (batch, ...)} as one array (batch, layers, ...), in a single transfer."""
        return torch.stack([tensors[layer] for layer in self.layers], dim=1).cpu().numpy()

    def before_router(self, layer, router, args):
        """Select experts by null routers for the hidden states that a router is given."""
        selected = select_by_null_routers(args[0], self.null_routers[layer], self.top_k)
        self.null_selected[layer] = [self.by_sequence(draw) for draw in selected]

    def on_router(self, layer, router_logits, routing_weights, selected_experts):
        """Sum what a router returned over the real tokens of each sequence."""
        selected_experts = self.by_sequence(selected_experts)
        self.sums[layer] = sum_over_tokens(
            self.is_real, self.by_sequence(router_logits), self.by_sequence(routing_weights),
            selected_experts, self.null_selected.pop(layer, []))
        if not self.stats_only:
            self.selected[layer] = selected_experts.short()  # half of what has to be fetched

    def by_sequence(self, values):
        """Return values as (batch, tokens, ...): some families' are (batch * tokens, ...).

        They go to one device, where a model is spread over several.
        """
        batch, tokens, _ = self.is_real.shape
        return values.to(self.is_real.device).reshape(batch, tokens, -1)


def sum_over_tokens(is_real, router_logits, routing_weights, selected_experts, null_selected):
    """Return (batch, 3 + draws, experts), sums over the real tokens of each sequence.

    is_real           bool (batch, tokens, 1), False for padding
    router_logits     (batch, tokens, experts)
    routing_weights   (batch, tokens, top_k)
    selected_experts  (batch, tokens, top_k)
    null_selected     list of (batch, tokens, experts) of 0 and 1, one for each draw

    The sums are, in this order: selections, routing weights, softmax(router_logits) divided by
    the number of tokens (so that their sum is the mean), and each draw's selections.
    """
    weights = routing_weights.to(torch.promote_types(routing_weights.dtype, torch.float32))
    zeros = torch.zeros_like(router_logits, dtype=weights.dtype)
    selected = zeros.scatter(-1, selected_experts, 1.0)
    weight_of_expert = zeros.scatter(-1, selected_experts, weights)
    num_tokens = is_real.sum(1, keepdim=True)
    part_of_mean = router_logits.softmax(-1, dtype=torch.float32) / num_tokens
    summands = [selected, weight_of_expert, part_of_mean, *null_selected]
    return torch.stack([(values * is_real).sum(1) for values in summands], dim=1)


def draw_null_routers(model, num_draws, num_experts):
    """Return {layer: random linear routers (draws, experts, hidden_size)}; {} without draws.

    Their rows have random directions and the norms of the trained router's rows. The layer is the
    seed, so that they are the same in every run.
    """
    if num_draws == 0:
        return {}
    null_routers = {}
    for layer, router in find_routers(model).items():
        # The largest parameter is the weight; others are biases
        weight = max(router.parameters(), key=torch.numel)  # (experts, hidden_size)
        weight = weight[:num_experts].float()  # Inkling has always-on experts in further rows
        norms = weight.norm(dim=1, keepdim=True)
        generator = torch.Generator().manual_seed(layer)
        directions = F.normalize(torch.randn(num_draws, *weight.shape, generator=generator), dim=-1)
        null_routers[layer] = directions.to(norms.device) * norms
    return null_routers


def select_by_null_routers(hidden_states, null_router, top_k):
    """Return 1 where a random router selects an expert for a token and 0 elsewhere.

    hidden_states (..., hidden_size), null_router (draws, experts, hidden_size)
    -> tuple of draws tensors (..., experts)
    """
    logits = torch.einsum("...h,deh->...de", hidden_states.float(), null_router)
    selected_experts = logits.topk(top_k).indices
    selected = torch.zeros_like(logits).scatter(-1, selected_experts, 1.0)
    return selected.unbind(-2)


def one_shape(shape):
    """Return ([decoder layers], num_experts, top_k) of a routing_shape.

    Raises an InputError if layers differ: a dump holds one num_experts and one top_k.
    """
    sizes = set(shape.values())
    if len(sizes) > 1:
        raise InputError(f"layers differ in (num_experts, top_k): {sorted(sizes)}; a dump cannot "
                         "hold that")
    num_experts, top_k = sizes.pop()
    return list(shape), num_experts, top_k


# ---------------------------------------------------------------------------------------- prompts

@dataclass
class Corpus:
    """The sequences of one language, cut to the maximum length."""

    sequences: list       # lists of token IDs: a prompt, and its response if there is one
    prompt_lengths: list  # tokens of each prompt
    text_spans: list      # (start, stop): the tokens of the prompt's own text, without template
    num_cut: int          # sequences that were longer


def encode_corpus(tokenizer, examples, args, max_length):
    """Return the Corpus of a language's examples."""
    corpus = Corpus(sequences=[], prompt_lengths=[], text_spans=[], num_cut=0)
    for example in examples:
        prompt_ids, (start, stop) = encode_example(
            tokenizer, example, args.chat_template, args.chat_template_options)
        response_ids = tokenizer(
            example.get("response", ""), add_special_tokens=False)["input_ids"]
        ids = prompt_ids + response_ids
        corpus.sequences.append(ids[:max_length])
        corpus.prompt_lengths.append(min(len(prompt_ids), max_length))
        corpus.text_spans.append((min(start, max_length), min(stop, max_length)))
        if len(ids) > max_length:
            corpus.num_cut += 1
    return corpus


def plan_dumps(args, config, tokenizer, shape):
    """Return [(Corpus, meta, path)] of the dumps that have to be made, one for each language.

    Prints which dumps are kept, and how many sequences are cut.
    """
    max_length = min(args.max_length, max_positions(config))
    meta_of_all = model_meta(args, config, tokenizer, shape)
    plan = []
    for language, data in find_data(args.data, args.languages).items():
        path = Path(args.out, f"{language}.npz")
        examples = read_task(args, language, data)
        meta = meta_of_all | {
            "language": language,
            "data": data,
            "data_sha256": file_hash(data),
            "instruction": examples[0].get("instruction"),
        }
        corpus = encode_corpus(tokenizer, examples, args, max_length)
        check_token_ids(corpus.sequences, config, data)
        meta["sequences"] = short_hash([corpus.sequences, corpus.prompt_lengths, corpus.text_spans])
        meta["truncated"] = corpus.num_cut
        if path.exists() and not args.overwrite:
            check_settings(path, meta)
            print_now(f"{language:<8} kept  {path}")
            continue
        if corpus.num_cut:
            print_now(f"{language:<8} {corpus.num_cut} sequences are cut at {max_length} tokens; "
                      "see --max-length")
        plan.append((corpus, meta, path))
    return plan


# ------------------------------------------------------------------------------------------ dumps

def model_meta(args, config, tokenizer, shape):
    """Return what the dumps of all languages record of model, arguments and versions."""
    _, num_experts, top_k = one_shape(shape)
    return vars(args) | {
        "format": FORMAT,
        "revision": checkpoint_id(args.model, config, shape),
        "tokenizer": tokenizer_id(tokenizer),
        "quantization": str(getattr(config, "quantization_config", None)),
        "dtype": dtype_name(args.dtype, config),
        "options": MODEL_OPTIONS or None,
        "num_experts": num_experts,
        "top_k": top_k,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def check_settings(path, meta):
    """Raise an InputError if the dump that is there was made with other settings."""
    made_with = read_meta(path)
    different = [key for key in SETTINGS if made_with.get(key) != meta[key]]
    if "sequences" in different:
        reasons = [key for key in SEQUENCE_SETTINGS if made_with.get(key) != meta[key]]
        if reasons:
            different.remove("sequences")
        different = reasons + different
    if different:
        details = [f"{key} {made_with.get(key)} there, {meta[key]} now" for key in different]
        raise InputError(f"{path} was made with other settings ({'; '.join(details)}); add "
                         "--overwrite or another --out")


def read_meta(path):
    """Return the meta of a dump as a dictionary."""
    not_a_dump = f"{path} is not a routing dump; move it away or add --overwrite"
    try:
        with np.load(path, allow_pickle=False) as file:
            text = str(file["meta"])
    except Exception as error:  # for a damaged file, numpy raises any kind
        raise InputError(not_a_dump) from error
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise InputError(not_a_dump) from error
    if not isinstance(meta, dict):
        raise InputError(not_a_dump)
    return meta


def make_dump(arrays, layers, corpus):
    """Return what an .npz file holds, besides meta.

    counts, weight_sums, null_counts  those of capture(), summed over sequences
    mean_probs                        by sequence, so that parallel sequences can be compared
    selected_experts, token_ids       by token; not with --stats-only
    layers, sequence_offsets, prompt_lengths, text_spans
                                      decoder layers; the sequences, and what lies where in them
    """
    lengths = [len(ids) for ids in corpus.sequences]
    dump = arrays | {
        "layers": np.array(layers, np.int32),
        "sequence_offsets": np.cumsum([0, *lengths]),
        "prompt_lengths": np.array(corpus.prompt_lengths),
        "text_spans": np.array(corpus.text_spans),
    }
    for key in ("counts", "weight_sums", "null_counts"):
        if key in arrays:
            dump[key] = arrays[key].sum(0)
    if "selected_experts" in arrays:
        dump["token_ids"] = np.concatenate(corpus.sequences).astype(np.int32)
    return dump


def save_dump(path, dump, meta):
    """Write a dump, whole or not at all.

    Raises an InputError if router logits were no finite numbers, and a RuntimeError unless every
    token was counted top_k times in every layer.
    """
    is_finite = np.isfinite(dump["mean_probs"]).all((0, 2))
    if not is_finite.all():
        broken = dump["layers"][~is_finite].tolist()
        raise InputError(f"router logits are NaN or infinite in layers {broken}; try --dtype "
                         "float32")
    num_selections = dump["sequence_offsets"][-1] * meta["top_k"]
    if not (dump["counts"].sum(1) == num_selections).all():
        raise RuntimeError(f"{path}: counts do not add up to {num_selections}, tokens * top_k")
    # Not compressed: that would save a third, take ten times as long, and make reading one array
    # of many as slow as reading all
    with whole_file(path) as file:
        np.savez(file, **dump, meta=json.dumps(meta, default=str))


# ----------------------------------------------------------------------------------------- script

def parse_arguments():
    parser = argument_parser(__doc__)
    add_model_arguments(parser, model=MODEL, data=DATA, out=OUT, batch_tokens=BATCH_TOKENS,
                        max_length=MAX_LENGTH)
    add = parser.add_argument_group("what is captured").add_argument
    add("--stats-only", action="store_true", help="no expert IDs token by token: small dumps")
    add("--null-router", action="store_const", const=NULL_DRAWS, default=0,
        help=f"also count what {NULL_DRAWS} random routers select")
    add("--overwrite", action="store_true", help="replace dumps that have other settings")
    args = parser.parse_args()
    if os.path.isfile(args.out):
        raise InputError(f"{args.out} is a file; --out takes a folder")
    return args


def main():
    args = parse_arguments()

    # 1. Read model config, prompts and dumps that are there, before any weights
    config, tokenizer, shape = load_config(args.model)
    layers, num_experts, top_k = one_shape(shape)
    plan = plan_dumps(args, config, tokenizer, shape)
    if not plan:
        return
    Path(args.out).mkdir(parents=True, exist_ok=True)

    # 2. Load the model, and check on one prompt that its routers can be recorded
    model = load_weights(args.model, config, args.dtype, args.device)
    first_corpus, meta, _ = plan[0]
    check_model(model, first_corpus.sequences[0], edits=False)
    print_now(f"{args.model}  {len(layers)} MoE layers  {num_experts} experts  top_k {top_k}  "
              f"{meta['dtype']}")

    # 3. Run each language's sequences, and save its dump
    for corpus, meta, path in plan:
        started = time.perf_counter()
        arrays, num_padding = capture(model, corpus.sequences, args.batch_tokens,
                                      stats_only=args.stats_only, null_draws=args.null_router)
        seconds = time.perf_counter() - started
        if path.exists() and not args.overwrite:  # another process wrote it: with other settings?
            check_settings(path, meta)
        save_dump(path, make_dump(arrays, layers, corpus), meta)
        num_tokens = sum(len(ids) for ids in corpus.sequences)
        padding = num_padding / (num_padding + num_tokens)
        print_now(f"{meta['language']:<8} {len(corpus.sequences):>6} sequences {num_tokens:>10,} "
                  f"tokens  {padding:.1%} padding  {num_tokens / seconds:>7,.0f} tokens/s  {path}")


if __name__ == "__main__":
    run_script(main)
