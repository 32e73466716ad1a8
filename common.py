"""
What capture.py, ablate.py and steer.py share: a model, its routers, prompts, answers and scores.

    model, tokenizer = load_model("Qwen/Qwen3-30B-A3B", dtype="auto", device="cuda")
    with record_routing(model, lambda layer, router_logits, routing_weights, selected_experts: ...):
        model(**batch)
    with edit_routing(model, masks={12: [3, 40]}):
        model.generate(**batch)

Works for Mixture-of-Experts models of transformers whose routers return (router_logits, routing_weights,
selected_experts), as they do from 5.6.0 on. The routers are found by what the model classes declare.
"""

import argparse
import contextlib
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
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


class InputError(ValueError):
    """Something the user can fix: the scripts print it as one line and exit with status 1."""


# ------------------------------------------------------------------------------------------------------------ the model

def load_config(name):
    """A checkpoint's config and tokenizer, and its model on the meta device, without weights.

    name is a folder or a hub id. InputError if it is neither, if the model is dense, or if its routers are unknown.
    """
    if tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 6):
        raise InputError(f"transformers {transformers.__version__} has other routers; run: pip install 'transformers>=5.6'")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"no model '{name}': neither a folder with a config.json, nor to be had from the hub "
                         f"({first_line(error)})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if not tokenizer("a 1")["input_ids"]:  # without its files, some families get an empty one
            raise OSError("its files are missing")
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load a tokenizer for model '{name}': {first_line(error)}") from error
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"model '{name}' cannot be built as a causal language model: {first_line(error)}") from error
    find_routers(skeleton)
    return config, tokenizer, skeleton


def load_model(name, dtype="auto", device=None, experts_implementation=None, attn_implementation=None):
    """(model, tokenizer), ready for inference. Refuses a dense or unknown model before reading its weights.

    dtype  "auto" (the checkpoint's own), "float32", "bfloat16", ...
    device "cuda", "cpu", ..., or "auto" to spread the layers over all GPUs; None is CUDA where there is one
    experts_implementation, attn_implementation: those of transformers; None is its own choice
    """
    config, tokenizer, _ = load_config(name)
    dtype_name(dtype, config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("there is no CUDA device; leave out --device, or give cpu")
    try:
        import accelerate  # noqa: F401  puts weights on the device as they are read
        placement = {"device_map": device}
    except ImportError as error:
        if device == "auto":
            raise InputError("--device auto spreads a model over several GPUs; run: pip install accelerate") from error
        placement = {}
    if dtype == "float64":  # grouped_mm knows no float64
        experts_implementation = experts_implementation or "eager"
    given = {"experts_implementation": experts_implementation, "attn_implementation": attn_implementation}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=dtype, **placement,
                                                     **{key: value for key, value in given.items() if value})
    except OSError as error:
        raise InputError(f"cannot load the weights of model '{name}': {first_line(error)}") from error
    except (ValueError, ImportError) as error:
        if any(given.values()):
            how = ", ".join(f"{key} {value}" for key, value in given.items() if value)
            raise InputError(f"model '{name}' does not run with {how}: {first_line(error)}") from error
        raise
    return (model if placement else model.to(device)).eval(), tokenizer


def checkpoint_id(name, config):
    """What tells two checkpoints of one name apart: the hub's commit, or a hash over a folder's weight files.

    Of each file the size and the first and last MiB count, so that 60 GB need not be read.
    """
    if not os.path.isdir(name):
        return getattr(config, "_commit_hash", None) or "unknown"
    digest = hashlib.sha256()
    for path in sorted(Path(name).glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(f"{path.name} {size}".encode() + file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def first_line(error):
    return str(error).strip().split("\n")[0]


# ---------------------------------------------------------------------------------------------------------- the routers

def find_routers(model):
    """{decoder layer: router module}, in layer order, of a model's text decoder; dense layers have none.

    A router is a module of a class that the model's classes name as the source of their router_logits
    (PreTrainedModel._can_record_outputs). InputError if there is none, or one whose answers we cannot read.
    """
    return {layer: router for layer, (router, *_) in probe_routers(model).items()}


def routing_shape(model):
    """{decoder layer: (num_experts, top_k)}, as the routers themselves have it; also on the meta device, weightless."""
    return {layer: (router_logits.shape[-1], selected_experts.shape[-1])
            for layer, (_, router_logits, selected_experts) in probe_routers(model).items()}


def probe_routers(model):
    """{decoder layer: (router, router_logits, selected_experts)}, what each router returns for two tokens of zeros."""
    decoder, family = model.get_decoder(), type(model).__name__
    declared = set()
    for owner in model.modules():
        recorders = (getattr(owner, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            declared.add(getattr(recorder, "target_class", recorder))
    found = {}
    for name, router in decoder.named_modules():
        if type(router) not in declared:
            continue
        layer = re.search(r"(?:^|\.)(\d+)\.", name)
        if layer is None or int(layer[1]) in found:
            raise InputError(f"{family} is not supported: {type(router).__name__} routes more than the experts of a layer")
        block = decoder.get_submodule(name.rpartition(".")[0])
        zeros = next(router.parameters()).new_zeros(2, model.config.get_text_config().hidden_size)
        for hidden in (zeros[None], zeros):  # a family takes either or both
            with contextlib.suppress(TypeError, ValueError, RuntimeError, AttributeError, IndexError):
                probe = probe_router(router, block, hidden)
                break
        else:
            raise InputError(f"{family} is not supported: its {type(router).__name__} does not map hidden states to "
                             "(router_logits, routing_weights, selected_experts) of its experts")
        found[int(layer[1])] = router, *probe
    if not found:
        raise InputError(f"{family} has no routers that transformers declares: a dense model, or a family that is not supported")
    return dict(sorted(found.items()))


@torch.no_grad()
def probe_router(router, block, hidden):
    """(router_logits, selected_experts) for hidden states; an exception if they are not what we take them for."""
    # some blocks hand their router a bias of their own: it has the name of the router's parameter
    given = {name: getattr(block, name) for name in inspect.signature(type(router).forward).parameters if hasattr(block, name)}
    # the class's forward: the router as it is, under no edit and no hook
    router_logits, routing_weights, selected_experts = read_router(router, type(router).forward(router, hidden, **given))
    if routing_weights.shape != selected_experts.shape or selected_experts.is_floating_point():
        raise ValueError("no selections")
    # Zaya has one class more than experts, to skip them all, and reports it as expert 0
    num_experts = getattr(getattr(block, "experts", None), "num_experts", router_logits.shape[-1])
    if num_experts != router_logits.shape[-1]:
        raise ValueError("a class that is no expert")
    return router_logits, selected_experts


def read_router(router, output):
    """What a router returned, as (router_logits, routing_weights, selected_experts); more items are not ours."""
    if not isinstance(output, tuple):
        raise ValueError("one tensor")
    if len(output) == 2:  # Llama 4: scores of all experts, 0 where an expert is not selected, and logits
        scores, router_logits = output
        if scores.shape != router_logits.shape:
            raise ValueError("neither logits, weights and selections nor scores and logits")
        return router_logits, *scores.topk(router.top_k, -1)
    return output[:3]


@contextlib.contextmanager
def record_routing(model, on_router):
    """Inside the block, every router call is followed by on_router(layer, router_logits, routing_weights,
    selected_experts): the tensors the model goes on with, (tokens, num_experts), (tokens, top_k), (tokens, top_k).

    layer is the decoder layer. Padding is in there: the caller knows which tokens are real.
    """
    handles = []
    try:
        for layer, (router, zeros, _) in probe_routers(model).items():
            # Gemma 4 gives probabilities for logits; their log is as good as logits
            log = bool((zeros > 0).all() and torch.allclose(zeros.float().sum(-1), torch.ones_like(zeros[..., 0]).float()))

            def hook(module, args, output, layer=layer, log=log):
                router_logits, routing_weights, selected_experts = read_router(module, output)
                on_router(layer, router_logits.log() if log else router_logits, routing_weights, selected_experts)
            handles.append(router.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


RULES = ("proportional", "soft", "hard")
CHOICES = {torch.topk, torch.max, torch.argmax, torch.sort, torch.Tensor.topk, torch.Tensor.max, torch.Tensor.argmax,
           torch.Tensor.sort}


def boost_logits(router_logits, boost, rule="proportional"):
    """Router logits z (tokens, num_experts) after a boost b (num_experts,); b = 0 leaves an expert's logit as it is.

    proportional  z + b * |z|                                      arXiv 2601.14050
    soft          z + b * std(z), over a token's experts           arXiv 2510.04694
    hard          just above max(z) where b > 0, just below min(z) where b < 0, whatever its size     the same
    """
    if rule == "proportional":
        return torch.addcmul(router_logits, boost, router_logits.abs())
    if rule == "soft":
        return router_logits + boost * router_logits.std(-1, keepdim=True)
    if rule == "hard":
        top, bottom = router_logits.amax(-1, keepdim=True), router_logits.amin(-1, keepdim=True)
        # a hundredth, relative above 1, is the least step that bfloat16 never rounds away
        top, bottom = top + 0.01 * top.abs().clamp(min=1), bottom - 0.01 * bottom.abs().clamp(min=1)
        return torch.where(boost > 0, top, torch.where(boost < 0, bottom, router_logits))
    raise InputError(f"rule '{rule}' is none of {', '.join(RULES)}")


class EditedScoring(TorchFunctionMode):
    """While a router's own forward runs, its logits are edited, and masked experts are kept out of every choice.

    The router goes on to score the edited logits as its family does. A mask has to reach the choice as well as the
    logits: a bias that is added to sigmoid scores could bring a masked expert back.
    """

    def __init__(self, router, num_experts, masked, boost, rule):
        super().__init__()
        self.num_experts, self.masked, self.boost, self.rule = num_experts, masked, boost, rule
        # Inkling scores its always-on experts along with the others, behind them
        self.width = getattr(router, "n_total_experts", num_experts)
        self.edits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            out = func(*args, **kwargs)
            if out.shape[-1] != self.width:
                return out
            self.edits += 1
            if self.width == self.num_experts:
                return self.edited(out)
            return torch.cat([self.edited(out[..., :self.num_experts]), out[..., self.num_experts:]], -1)
        if self.masked is not None and func in CHOICES:
            scores = args[0]  # (..., num_experts), or (..., groups, experts of a group) where a router limits groups
            if scores.shape[-1] == self.num_experts:
                args = (scores.masked_fill(self.masked, -math.inf), *args[1:])
            elif scores.dim() > 2 and scores.shape[-2] * scores.shape[-1] == self.num_experts:
                args = (scores.masked_fill(self.masked.view(scores.shape[-2:]), -math.inf), *args[1:])
        return func(*args, **kwargs)

    def edited(self, router_logits):
        if self.boost is not None:  # in float32 at least, and back, so that a zero boost changes no bit
            wide = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
            router_logits = boost_logits(wide, self.boost.to(wide.dtype), self.rule).to(router_logits.dtype)
        if self.masked is not None:
            router_logits = router_logits.masked_fill(self.masked, max(-1e9, torch.finfo(router_logits.dtype).min))
        return router_logits


@contextlib.contextmanager
def edit_routing(model, masks=None, boosts=None, rule="proportional", count_moved=True):
    """Inside the block, routers score edited logits; afterwards, also after an exception, the model is what it was.

    masks   {decoder layer: expert ids}: never selected
    boosts  {decoder layer: (num_experts,) floats}, lambda included; see boost_logits for the rule
    Yields a dict that on leaving holds {layer: part of the selections that the boosts moved there, given the same
    hidden states}; to know it, each boosted router runs twice, which count_moved=False saves.

    The edit proves itself. InputError before anything runs: a layer without a router, an expert that is not there, a
    mask that leaves fewer than top_k. RuntimeError: logits that are not computed as expected, a masked expert that was
    selected, a block in which no edited router ran. A warning: boosts that moved no selection at all.
    """
    masks = {layer: ids for layer, ids in (masks or {}).items() if len(ids)}
    boosts = boosts or {}
    routers, shape = find_routers(model), routing_shape(model)
    check_edit(masks, boosts, rule, routers, shape)
    moved, proofs, before = {}, {}, {}
    try:
        for layer in sorted(masks.keys() | boosts.keys()):
            router = routers[layer]
            before[layer] = router.__dict__.get("forward")
            router.forward, proofs[layer] = edited_forward(
                router, shape[layer][0], masks.get(layer), boosts.get(layer), rule, count_moved)
        yield moved
    finally:
        for layer, forward in before.items():
            if forward is None:
                del routers[layer].forward
            else:
                routers[layer].forward = forward
    for layer, proof in proofs.items():
        if not proof["selections"]:
            raise RuntimeError(f"layer {layer}: its router was edited but never called; the edit did not take hold")
        if proof["mask"] is not None and (proof["mask"] & proof["selected"]).any():
            experts = (proof["mask"] & proof["selected"]).nonzero().flatten().tolist()
            raise RuntimeError(f"layer {layer}: the experts {experts} were masked and yet selected")
    if boosts and count_moved:
        moved |= {layer: int(proofs[layer]["moved"]) / proofs[layer]["selections"] for layer in boosts}
        if not any(moved.values()):
            warnings.warn("the boosts moved no selection in any layer")


def edited_forward(router, num_experts, mask, boost, rule, count_moved):
    """A router's forward under the edit, and the tallies that prove it, which stay on the device until they are read."""
    original, parameter = router.forward, next(router.parameters())
    device = parameter.device
    if mask is not None:
        mask = torch.zeros(num_experts, dtype=torch.bool, device=device).index_fill_(
            0, torch.as_tensor(list(mask), device=device), True)
    if boost is not None:
        boost = torch.as_tensor(np.asarray(boost, np.float64)).to(device, torch.promote_types(parameter.dtype, torch.float32))
    scoring = EditedScoring(router, num_experts, mask, boost, rule)
    proof = {"selections": 0, "mask": mask, "selected": torch.zeros(num_experts, dtype=torch.bool, device=device),
             "moved": torch.zeros((), dtype=torch.int64, device=device)}

    def forward(*args, **kwargs):
        scoring.edits = 0
        with scoring:
            output = original(*args, **kwargs)
        if scoring.edits != 1:
            raise RuntimeError(f"{type(router).__name__} computes its logits in a way that cannot be edited "
                               f"({scoring.edits} linear maps to {num_experts} experts)")
        selected = read_router(router, output)[2]
        proof["selections"] += selected.numel()
        if mask is not None:
            proof["selected"].index_fill_(0, selected.flatten(), True)
        if boost is not None and count_moved:
            plain = read_router(router, original(*args, **kwargs))[2]
            proof["moved"].add_((selected[..., :, None] != plain[..., None, :]).all(-1).sum())
        return output

    return forward, proof


def check_edit(masks, boosts, rule, routers, shape):
    """InputError if an edit does not fit a model, whose find_routers and routing_shape are given."""
    for layer in masks.keys() | boosts.keys():
        if layer not in shape:
            raise InputError(f"layer {layer} has no router; MoE layers are {list(shape)}")
        num_experts, top_k = shape[layer]
        ids = {int(e) for e in masks.get(layer, ())}
        if not all(0 <= e < num_experts for e in ids):
            raise InputError(f"layer {layer} has the experts 0 to {num_experts - 1}; the mask names {sorted(ids)}")
        if num_experts - len(ids) < top_k:
            raise InputError(f"layer {layer}: masking {len(ids)} of {num_experts} experts leaves fewer than top_k {top_k}")
        groups = getattr(routers[layer], "num_group", None) or 1
        if groups > 1 and ids:  # the router may settle on the groups that are left with the fewest experts
            left = sorted(num_experts // groups - sum(e * groups // num_experts == g for e in ids) for g in range(groups))
            if sum(left[:routers[layer].topk_group]) < top_k:
                raise InputError(f"layer {layer}: the router chooses within {routers[layer].topk_group} of {groups} groups, "
                                 f"and the mask leaves some such choice fewer than top_k {top_k} experts")
        if layer in boosts:
            boost = np.asarray(boosts[layer])
            if boost.shape != (num_experts,) or not np.isfinite(boost).all():
                raise InputError(f"layer {layer}: a boost is {num_experts} finite numbers, one per expert")
    if rule not in RULES:
        raise InputError(f"rule '{rule}' is none of {', '.join(RULES)}")


# ---------------------------------------------------------------------------------------------------------- the prompts

def find_data(pattern, languages=None):
    """{language: path} of the files that a pattern such as 'data/mgsm_{lang}.tsv' names.

    languages: the wanted ones, as a list or "bn,de"; by default all that have a file. Without {lang} in the pattern it
    is one file, called by the one language given or else by its stem.
    """
    wanted = languages.split(",") if isinstance(languages, str) else languages
    if wanted and len(set(wanted)) < len(wanted):
        raise InputError(f"a language is named twice in: {','.join(wanted)}")
    if "{lang}" not in pattern:
        if wanted and len(wanted) > 1:
            raise InputError(f"'{pattern}' is one file but {len(wanted)} languages are named; put {{lang}} into --data")
        files = {(wanted or [Path(pattern).stem])[0]: pattern}
    elif wanted:
        files = {language: pattern.replace("{lang}", language) for language in wanted}
    else:
        name = re.compile(re.escape(pattern).replace(re.escape("{lang}"), "([^/]+)", 1).replace(re.escape("{lang}"), r"\1"))
        paths = sorted(glob.glob(glob.escape(pattern).replace("{lang}", "*")))
        files = {match[1]: path for path in paths if (match := name.fullmatch(path))}
        if not files:
            raise InputError(f"no file matches '{pattern}' ({{lang}} stands for a language)")
    for language, path in files.items():
        if not re.fullmatch(r"\w[\w.-]*", language):
            raise InputError(f"'{language}' cannot name a file: a language is letters, digits, '_', '-' and '.'")
        if not os.path.isfile(path):
            raise InputError(f"no such file: {path} (for language '{language}')")
    return files


def read_examples(path):
    """[{"prompt": str, "response": str?, "answer": str or [str, ...]?, "kind": str?}] from a prompts file.

    .tsv    question, tab, answer (MGSM); no header
    .jsonl  "prompt", "question" or "text"; optionally "response" and "answer"; or the rows of Belebele
    .json   SQuAD and XQuAD
    .txt    one prompt per line
    The kind of an answer chooses its score: "number", "choice" (a letter) or "span" (any of several texts).
    InputError names the file and line that cannot be read.
    """
    suffix = Path(path).suffix
    if suffix not in (".tsv", ".jsonl", ".json", ".txt"):
        raise InputError(f"{path}: cannot read '{suffix}'; give .tsv, .jsonl, .json or .txt")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error
    read_line = {".tsv": read_tsv_line, ".jsonl": read_json_line, ".txt": lambda line: {"prompt": line}}.get(suffix)
    if suffix == ".json":
        examples = read_squad(text, path)
    else:
        lines = text.rstrip().split("\n") if text.strip() else []
        examples = []
        for number, line in enumerate(lines, 1):
            try:
                examples.append(read_line(line.removesuffix("\r")))
            except (ValueError, KeyError, IndexError) as error:
                raise InputError(f"{path}:{number}: {error}") from error
            if not examples[-1]["prompt"].strip():
                raise InputError(f"{path}:{number}: an empty prompt")
    if not examples:
        raise InputError(f"{path}: no prompts in it")
    return examples


def read_tsv_line(line):
    prompt, tab, answer = line.rpartition("\t")
    if not tab:
        raise ValueError("no tab between question and answer" if line.strip() else "an empty line")
    return {"prompt": prompt, "answer": answer, "kind": answer_kind(answer)}


def read_json_line(line):
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "flores_passage" in row:
        missing = [k for k in ("question", "correct_answer_num", *(f"mc_answer{i}" for i in "1234")) if k not in row]
        if missing or str(row["correct_answer_num"]) not in "1234":
            raise ValueError(f"a Belebele row without {missing or 'a correct_answer_num of 1 to 4'}")
        options = "\n".join(f"{letter}. {row[f'mc_answer{i}']}" for i, letter in enumerate("ABCD", 1))
        return {"prompt": f"{row['flores_passage']}\n\n{row['question']}\n{options}\n\nAnswer with A, B, C or D.",
                "answer": "ABCD"[int(row["correct_answer_num"]) - 1], "kind": "choice"}
    key = next((k for k in ("prompt", "question", "text") if isinstance(row.get(k), str)), None)
    if key is None:
        raise ValueError('no "prompt", "question" or "text" with a string')
    example = {"prompt": row[key]}
    if row.get("response") is not None:
        example["response"] = str(row["response"])
    if row.get("answer") is not None:
        answer = row["answer"] if isinstance(row["answer"], list) else str(row["answer"])
        example |= {"answer": answer, "kind": row.get("kind") or answer_kind(answer)}
    return example


def read_squad(text, path):
    """SQuAD's layout: data, paragraphs, qas. Every question becomes a prompt behind its paragraph."""
    try:
        return [{"prompt": f"{paragraph['context']}\n\n{qa['question']}\n\nAnswer with words from the text.",
                 "answer": [answer["text"] for answer in qa["answers"]], "kind": "span"}
                for article in json.loads(text)["data"] for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: not in SQuAD's layout (no {error})") from error


def answer_kind(answer):
    """"number" if there is nothing but a number in it, else "span"."""
    try:
        Decimal(plain_digits(str(answer)).replace(",", ""))
        return "number"
    except ArithmeticError:
        return "span"


def encode_prompt(tokenizer, prompt, chat_template="auto"):
    """Token ids of a prompt as a user's turn, thinking off, up to where the model's answer starts.

    Without a chat template in the tokenizer, or with chat_template "never": the bare text.
    """
    if chat_template == "auto" and tokenizer.chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True,
                                             enable_thinking=False, tokenize=True, return_dict=False)
    return tokenizer(prompt)["input_ids"]


def length_batches(lengths, batch_tokens, overhead=200):
    """Cut sequences into batches, similar lengths together: lists of indices, longest first.

    A batch takes at most batch_tokens with its padding, or one sequence if that alone is longer. Of all such cuts it is
    the cheapest, where a batch costs its tokens, padding included, and an overhead of so many more. The longest come
    first, so that a batch that does not fit into memory fails at the start.
    """
    order = np.argsort(lengths, kind="stable")
    size = np.asarray(lengths, np.int64)[order]
    cost, start = np.zeros(len(size) + 1), np.zeros(len(size) + 1, int)
    for stop in range(1, len(size) + 1):  # the cheapest cut of the shortest ones, of which the last batch is start:stop
        longest = max(1, size[stop - 1])
        first = max(0, stop - max(1, batch_tokens // longest))
        costs = cost[first:stop] + np.arange(stop - first, 0, -1) * longest + overhead
        start[stop] = first + costs.argmin()
        cost[stop] = costs.min()
    batches, stop = [], len(size)
    while stop:
        batches.append(order[start[stop]:stop][::-1].tolist())
        stop = start[stop]
    return batches


def run_batches(run, batches):
    """run(batch) for each batch; one that does not fit into memory is halved, which is said once."""
    todo, said = list(batches), False
    while todo:
        batch = todo.pop(0)
        try:
            run(batch)
            continue
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise InputError("out of memory on a single sequence; lower --max-length, or give --device auto") from error
        torch.cuda.empty_cache()
        if not said:
            tqdm.write(f"out of memory on {len(batch)} sequences at once: halving such batches; --batch-tokens sets their size")
            said = True
        todo[:0] = batch[:len(batch) // 2], batch[len(batch) // 2:]


# ------------------------------------------------------------------------------------------------------------ the scores

MAX_NEW_TOKENS = 512  # of a response, where neither flag nor checkpoint says
METRICS = ("prompt_nll", "answer_nll", "accuracy", "language")
COMMA_DECIMAL = set("cs da de el es fi fr id it nb nl pl pt ru sv tr uk vi "
                    "ces dan deu ell spa fin fra ind ita nob nld pol por rus swe tur ukr vie".split())
NO_SPACES = set("ja km lo my th yue zh jpn khm lao mya tha zho".split())


def base_language(language):
    """"zh-Hans" -> "zh", "ben_Beng" -> "ben"."""
    return re.split("[-_]", language or "")[0]


def plain_digits(text):
    """Every script's digits, minus signs and separators as ASCII: "−২,১২৫" -> "-2,125"; no-break spaces as \x1f."""
    text = "".join(c if (digit := unicodedata.decimal(c, None)) is None else str(digit) for c in text)
    return text.translate(str.maketrans("−–－﹣，٬．٫\u00a0\u202f\u2009", "----,,..\x1f\x1f\x1f"))


def last_number(text, language=None):
    """The last number in the last \\boxed{} of a text, or else in the text, as an exact Decimal; None if there is none.

    Separators of thousands go: "2,125", "1,00,000", and "2.125" or "2 125" in languages that write a decimal comma. A
    minus counts unless a digit, a Latin letter or a parenthesis stands before it: "14-9" ends in 9.
    """
    text = plain_digits(text)
    boxed = re.findall(r"\\boxed\s*{((?:[^{}]|{[^{}]*})*)}", text)
    if boxed:
        text = boxed[-1].replace("{,}", ",")
    thousands, decimal = ("[.,' \x1f]", "[.,]") if base_language(language) in COMMA_DECIMAL else ("[,'\x1f]", "[.]")
    numbers = re.findall(rf"((?<![0-9A-Za-z)])- ?[$€£¥৳]?)?(\d{{1,3}}(?:{thousands}\d{{3}})+(?!\d)|\d{{1,2}}(?:,\d\d)+,\d{{3}}(?!\d)|\d+)"
                         rf"(?:{decimal}(\d+))?", text)
    if not numbers:
        return None
    sign, whole, fraction = numbers[-1]
    return Decimal(f"{'-' if sign else ''}{re.sub('[^0-9]', '', whole)}.{fraction or 0}")


def span_scores(prediction, golds, language=None):
    """(exact match, F1) of SQuAD, the best over the golds; by character for languages without spaces.

    An empty prediction scores 0, whatever the gold.
    """
    def units(text):
        text = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P") and c not in string.punctuation)
        if base_language(language) in NO_SPACES:
            return [c for c in text if not c.isspace()]
        return [word for word in text.split() if word not in ("a", "an", "the")]

    said, best = units(prediction), (0.0, 0.0)
    for gold in map(units, golds):
        common = sum(min(said.count(unit), gold.count(unit)) for unit in set(said))
        if said and common:
            best = max(best[0], float(said == gold)), max(best[1], 2 * common / (len(said) + len(gold)))
    return best


def in_language(responses, language):
    """1 for each response that langdetect finds to be in the language, else 0; Chinese variants count as zh."""
    try:
        import langdetect
    except ImportError as error:
        raise InputError("the metric 'language' needs langdetect; run: pip install langdetect") from error
    langdetect.DetectorFactory.seed = 0
    found = []
    for response in responses:
        try:
            found.append(float(base_language(langdetect.detect(response)) == base_language(language)))
        except langdetect.LangDetectException:  # nothing but digits, say
            found.append(0.0)
    return found


def encode_examples(tokenizer, examples, chat_template="auto", max_length=4096):
    """Examples with their token ids: "ids" of the prompt, "own" the (start, stop) of the user's text within the chat
    template, "answer_ids" of the (first) gold answer. Too long prompts are refused, for half a question has no answer.
    """
    # what the template puts around the text is what two texts have in common
    one, other = (encode_prompt(tokenizer, text, chat_template) for text in ("a", "1"))
    before = next(i for i, (x, y) in enumerate(zip(one, other)) if x != y)
    after = next(i for i, (x, y) in enumerate(zip(one[::-1], other[::-1])) if x != y)
    encoded = []
    for number, example in enumerate(examples, 1):
        ids = encode_prompt(tokenizer, example["prompt"], chat_template)
        if len(ids) > max_length:
            raise InputError(f"prompt {number} has {len(ids)} tokens, more than {max_length}; take it out, or raise --max-length "
                             "as far as the model's positions go")
        encoded.append(example | {"ids": ids, "own": (before, len(ids) - after)})
        if "answer" in example:
            gold = example["answer"] if isinstance(example["answer"], str) else example["answer"][0]
            encoded[-1]["answer_ids"] = tokenizer(gold, add_special_tokens=False)["input_ids"]
    return encoded


def right_padded(sequences):
    """(sequences, longest) int64. With causal attention what stands behind a token cannot reach it: no mask."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, :len(sequence)] = torch.as_tensor(sequence)
    return ids


@torch.inference_mode()
def negative_log_likelihood(model, encoded, batch_tokens):
    """Nats per token and bits per byte of each prompt's own text, and of its gold answer given the prompt.

    -> {"prompt_nll", "prompt_bits_per_byte", "answer_nll", "answer_bits_per_byte"}: float64 (examples,), nan where
    there is no answer. One forward pass gives all. A first token that nothing precedes is not scored.
    """
    sequences = [e["ids"] + e.get("answer_ids", []) for e in encoded]
    result = {f"{part}_{unit}": np.full(len(encoded), np.nan) for part in ("prompt", "answer")
              for unit in ("nll", "bits_per_byte")}

    def run(batch):
        ids = right_padded([sequences[i] for i in batch]).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(logits.device), reduction="none")
        nll = nll.view(len(batch), -1).double().cpu().numpy()
        for row, i in enumerate(batch):
            e = encoded[i]
            gold = e.get("answer", "") if isinstance(e.get("answer", ""), str) else e["answer"][0]
            for part, (start, stop), text in (("prompt", e["own"], e["prompt"]),
                                              ("answer", (len(e["ids"]), len(sequences[i])), gold)):
                if stop > max(start, 1):
                    own = nll[row, max(start, 1) - 1:stop - 1]
                    if not np.isfinite(own).all():
                        raise InputError("the model's logits are NaN or infinite; try --dtype float32")
                    result[f"{part}_nll"][i] = own.mean()
                    result[f"{part}_bits_per_byte"][i] = own.sum() / math.log(2) / len(text.encode())

    run_batches(run, length_batches([len(s) for s in sequences], batch_tokens))
    return result


@torch.inference_mode()
def choose_letters(model, tokenizer, encoded, batch_tokens, letters="ABCD"):
    """The letter with the highest probability as the first token of the answer, for each prompt; no generation."""
    first = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in letters]
    if len(set(first)) < len(letters):
        raise InputError(f"this tokenizer does not tell the letters {letters} apart by their first token")
    chosen = [""] * len(encoded)

    def run(batch):
        logits = model(input_ids=right_padded([encoded[i]["ids"] for i in batch]).to(model.device), use_cache=False).logits
        ends = torch.tensor([len(encoded[i]["ids"]) - 1 for i in batch], device=logits.device)
        best = logits[torch.arange(len(batch), device=logits.device), ends][:, first].argmax(-1).tolist()
        for i, letter in zip(batch, best):
            chosen[i] = letters[letter]

    run_batches(run, length_batches([len(e["ids"]) for e in encoded], batch_tokens))
    return chosen


@torch.inference_mode()
def generate(model, tokenizer, encoded, batch_tokens, max_new_tokens, sampling=None, seed=0):
    """The model's response to each prompt, as text, and how many were cut off at max_new_tokens. Padding stands on the left;
    greedy unless sampling is given, as {"temperature": .7, "top_p": .8, "top_k": 20}. The same seed draws the same.
    """
    torch.manual_seed(seed)
    how = {"do_sample": True, **sampling} if sampling else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([tokenizer.eos_token_id] if ends is None else ends if isinstance(ends, list) else [ends])
    responses, cut = [""] * len(encoded), 0
    lengths = [len(e["ids"]) for e in encoded]

    def run(batch):
        nonlocal cut
        longest = max(lengths[i] for i in batch)
        ids = torch.tensor([[pad] * (longest - lengths[i]) + encoded[i]["ids"] for i in batch])
        mask = torch.arange(longest) >= torch.tensor([longest - lengths[i] for i in batch])[:, None]
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device),
                             max_new_tokens=max_new_tokens, pad_token_id=pad, **how)
        cut += int((~torch.isin(out[:, longest:].cpu(), ends).any(1)).sum()) if out.shape[1] == longest + max_new_tokens else 0
        for i, text in zip(batch, tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)):
            responses[i] = text

    # as few batches as there can be: each takes max_new_tokens steps
    run_batches(run, length_batches([n + max_new_tokens for n in lengths], batch_tokens, overhead=10**9))
    return responses, cut


def evaluate(model, tokenizer, encoded, metrics, language, batch_tokens=8192, max_new_tokens=512, sampling=None, seed=0):
    """Scores of each example, {metric: float64 (examples,)}, the responses (None where none were generated), and how
    many of them were cut off at max_new_tokens.

    accuracy is 1 or 0: the number, the letter, or the exact span; spans have f1 beside it. See METRICS.
    """
    scores, responses, cut = {}, None, 0
    if any(metric.endswith("_nll") for metric in metrics):
        likelihood = negative_log_likelihood(model, encoded, batch_tokens)
        for part in ("prompt", "answer"):
            if f"{part}_nll" in metrics:
                scores |= {name: values for name, values in likelihood.items() if name.startswith(part)}
    kinds = {e.get("kind") for e in encoded}
    if "accuracy" in metrics and kinds == {"choice"}:
        chosen = choose_letters(model, tokenizer, encoded, batch_tokens)
        scores["accuracy"] = np.array([float(c == e["answer"]) for c, e in zip(chosen, encoded)])
    elif "accuracy" in metrics or "language" in metrics:
        responses, cut = generate(model, tokenizer, encoded, batch_tokens, max_new_tokens, sampling, seed)
        if "accuracy" in metrics and kinds == {"number"}:
            scores["accuracy"] = np.array([float(last_number(r, language) == last_number(e["answer"]))
                                           for r, e in zip(responses, encoded)])
        elif "accuracy" in metrics:
            golds = [e["answer"] if isinstance(e["answer"], list) else [e["answer"]] for e in encoded]
            scores["accuracy"], scores["f1"] = np.array(
                [span_scores(r, g, language) for r, g in zip(responses, golds)]).T
        if "language" in metrics:
            scores["language"] = np.array(in_language(responses, language))
    return scores, responses, cut


def check_metrics(metrics, encoded, path):
    """InputError if a file's examples cannot give the metrics that are asked for."""
    kinds = {e.get("kind") for e in encoded}
    if {"accuracy", "answer_nll"} & set(metrics) and None in kinds:
        raise InputError(f"{path} has prompts without an answer; --metrics prompt_nll needs none")
    if "accuracy" in metrics and len(kinds) > 1:
        raise InputError(f"{path} mixes kinds of answers: {', '.join(sorted(kinds))}")
    if "language" in metrics:
        in_language([], None)  # is langdetect there?


# -------------------------------------------------------------------------------------------------- effects and results

def bootstrap_interval(differences, draws=2000, seed=0):
    """95 % percentile interval of the mean of paired differences, by resampling the examples.

    differences (examples,), or (controls, examples) where there are several controls: those are resampled, too.
    """
    differences = np.atleast_2d(np.asarray(differences, np.float64))
    differences = differences[:, ~np.isnan(differences).any(0)]
    rng = np.random.default_rng(seed)
    picks = rng.integers(differences.shape[1], size=(draws, differences.shape[1]))
    means = np.stack([control[picks].mean(1) for control in differences], 1)  # (draws, controls)
    means = np.take_along_axis(means, rng.integers(len(differences), size=means.shape), 1).mean(1)
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]


def mcnemar_p(before, after):
    """(fixed, broken, exact two-sided p) of right/wrong scores before and after: could the changes be coin flips?"""
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    fixed, broken = int((~before & after).sum()), int((before & ~after).sum())
    n = fixed + broken
    tail = sum(math.comb(n, k) for k in range(min(fixed, broken) + 1)) / 2**n
    return fixed, broken, min(1.0, 2 * tail)


def load_rows(path):
    """{settings as JSON: row} of a results file. A last line that a kill cut short is taken off the file."""
    if not os.path.exists(path):
        return {}
    whole = Path(path).read_bytes()
    if not whole.endswith(b"\n"):
        whole = whole[:whole.rfind(b"\n") + 1]
        temporary = Path(f"{path}.tmp")
        temporary.write_bytes(whole)
        os.replace(temporary, path)
    try:
        rows = [json.loads(line) for line in whole.decode().splitlines()]
        return {json.dumps(row["settings"], sort_keys=True): row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a results file; move it away or give another --out") from error


def append_row(path, row):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def save_predictions(path, encoded, responses, score):
    """JSONL with prompt, response, answer and score, which capture.py reads again; whole or not there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": e["prompt"], "response": r, "answer": e.get("answer"), "kind": e.get("kind"), "score": s}
            for e, r, s in zip(encoded, responses, score)]
    temporary = Path(f"{path}.tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------- what the experiments share

def positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def add_model_arguments(p):
    """The flags of all scripts that run a model."""
    p.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, ...")
    p.add_argument("--device", help="cuda, cpu, auto (all GPUs; needs accelerate); default: CUDA where there is one")
    p.add_argument("--experts-implementation", metavar="NAME", help="eager, grouped_mm, ... (default: transformers' choice)")
    p.add_argument("--attn-implementation", metavar="NAME", help="eager, sdpa, flash_attention_2, ... (default: likewise)")
    p.add_argument("--chat-template", choices=["auto", "never"], default="auto", help="never: the bare text")


def add_task_arguments(p, **defaults):
    """The flags that ablate.py and steer.py have in common; a script's constants are their defaults."""
    def add(flag, **options):
        name = flag[2:].replace("-", "_")
        p.add_argument(flag, **options, **({"default": defaults[name]} if name in defaults else {}))
    add("--model", help="folder or hub id (default: %(default)s)")
    add("--routing", nargs="+", metavar="DUMP", help="dumps that the experts are chosen from, path or label=path")
    add("--data", help="what is evaluated; {lang} stands for the language (default: %(default)s)")
    add("--selection", metavar="FILE", help="experts that analyze.py --contrast selected, instead of languages' experts")
    add("--languages", help="evaluate these, as bn,de (default: every file that --data matches)")
    add("--experts-per-language", type=int, help="most frequent experts that count as a language's "
        "(default: a part of the experts, see the constants)")
    add("--threshold", type=float, help="share above which an expert is exclusive (default: %(default)s)")
    add("--metrics", nargs="+", choices=METRICS, help="(default: %(default)s)")
    add("--control-seeds", type=positive, metavar="N", help="random controls (default: %(default)s draws)")
    add("--limit", type=positive, help="only the first N examples of each language")
    add("--out", help="results, a line of JSON per cell; cells that are there are not run again (default: %(default)s)")
    add("--batch-tokens", type=positive, help="tokens per forward pass (default: %(default)s)")
    add("--max-length", type=positive, help="refuse longer prompts (default: %(default)s tokens)")
    add("--max-new-tokens", type=positive, help=f"of a response (default: the checkpoint's generation config, or {MAX_NEW_TOKENS})")
    add("--temperature", type=float, help="sample; the paper: 0.7 with --top-p 0.8 --top-k-sampling 20 (default: greedy)")
    add("--top-p", type=float, help="with --temperature")
    add("--top-k-sampling", type=positive, help="with --temperature")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add_model_arguments(p)


class Experiment:
    """A model, its tasks and a results file: what one run of ablate.py or steer.py evaluates its cells with.

    Everything is checked before the weights are read, which happens when the first cell needs them. A cell that the
    results file holds with the same settings is not run again.
    """

    def __init__(self, args, dumps):
        self.args, self.model = args, None
        config, self.tokenizer, skeleton = load_config(args.model)
        self.routers, self.shape = find_routers(skeleton), routing_shape(skeleton)
        self.rows = load_rows(args.out)
        if args.max_new_tokens is None:
            with contextlib.suppress(OSError):
                args.max_new_tokens = GenerationConfig.from_pretrained(args.model).max_new_tokens
            args.max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k_sampling}
        self.sampling = {key: value for key, value in sampling.items() if value is not None}
        if self.sampling and not args.temperature:
            raise InputError("--top-p and --top-k-sampling need a --temperature")
        self.settings = {
            "revision": checkpoint_id(args.model, config), "dtype": dtype_name(args.dtype, config), "limit": args.limit,
            "metrics": args.metrics, "chat_template": args.chat_template, "max_new_tokens": args.max_new_tokens,
            "sampling": self.sampling | {"seed": args.seed} if self.sampling else "greedy"}
        self.choice = {"experts_per_language": args.experts_per_language, "threshold": args.threshold,
                       "dumps": {dump["language"]: dump["digest"] for dump in dumps}}
        check_dumps(dumps, self.shape, self.settings["revision"])
        self.tasks = {}
        captured = {sha for dump in dumps for sha in dump["data_sha256"]}
        for language, path in find_data(args.data, args.languages).items():
            encoded = encode_examples(self.tokenizer, read_examples(path)[:args.limit], args.chat_template,
                                      min(args.max_length, max_positions(config)))
            check_metrics(args.metrics, encoded, path)
            sha = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            if sha in captured:
                print(f"warning: {path} is what the routing was captured on: experts are chosen on what they are judged by")
            self.tasks[language] = encoded, sha

    def load(self):
        if self.model is None:
            self.model, _ = load_model(self.args.model, self.args.dtype, self.args.device,
                                       self.args.experts_implementation, self.args.attn_implementation)

    def cell(self, language, name, how=None, **edit):
        """Scores {metric: (examples,)} of a language under edit_routing(**edit); without an edit, the baseline.

        how says how the experts were chosen, and a hash of the edit goes with them; name, as in
        "early-exclusive-bn", is the folder of predictions.
        """
        encoded, sha = self.tasks[language]
        settings = {"language": language, "data_sha256": sha, **self.settings}
        if edit:
            exact = json.dumps(edit, sort_keys=True, default=np.ndarray.tolist).encode()
            settings |= {**how, **self.choice, "edit": hashlib.sha256(exact).hexdigest()[:16]}
        row = self.rows.get(json.dumps(settings, sort_keys=True))
        if row is None:
            self.load()
            with edit_routing(self.model, **edit, count_moved=False) if edit else contextlib.nullcontext():
                scores, responses, cut = evaluate(
                    self.model, self.tokenizer, encoded, self.args.metrics, language, self.args.batch_tokens,
                    self.args.max_new_tokens, self.sampling, self.args.seed)
            row = {"cell": name, "settings": settings, "arguments": vars(self.args),
                   "mean": {metric: float(np.nanmean(s)) for metric, s in scores.items()}}
            if edit:
                row["experts"] = {layer: len(ids) for layer, ids in edit.get("masks", {}).items()} or {
                    layer: int(np.count_nonzero(boost)) for layer, boost in edit["boosts"].items()}
                base = self.cell(language, "baseline")
                row["change"] = {metric: float(np.nanmean(s - base[metric])) for metric, s in scores.items()}
                row["interval"] = {metric: bootstrap_interval(s - base[metric]) for metric, s in scores.items()}
            if responses is not None:
                row["predictions"] = str(Path(self.args.out).with_suffix("") / name / f"{language}.jsonl")
                save_predictions(row["predictions"], encoded, responses, scores.get("accuracy", [None] * len(encoded)))
                row["cut_responses"] = cut
                if cut and not edit:
                    tqdm.write(f"{language}: {cut} of {len(encoded)} responses were cut at {self.args.max_new_tokens} tokens; "
                               "see --max-new-tokens")
            row["scores"] = {metric: np.round(s, 6).tolist() for metric, s in scores.items()}
            Path(self.args.out).parent.mkdir(parents=True, exist_ok=True)
            append_row(self.args.out, row)
            self.rows[json.dumps(settings, sort_keys=True)] = row
        return {metric: np.array(values) for metric, values in row["scores"].items()}


def dtype_name(dtype, config):
    """What "auto" stands for: the dtype that a checkpoint's config names. InputError if it is no dtype."""
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"'{dtype}' is not a dtype; give auto, float32, bfloat16, float16 or float64")
    return str(config.dtype).removeprefix("torch.") if dtype == "auto" else dtype


def max_positions(config):
    """How many tokens the model was made for; no limit where its config names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def check_dumps(dumps, shape, revision):
    """InputError if dumps (as analyze.load_languages returns them) were not captured on this model."""
    for dump in dumps:
        if list(dump["layers"]) != list(shape) or {(dump["num_experts"], dump["top_k"])} != set(shape.values()):
            raise InputError(f"{', '.join(dump['path'])} has {len(dump['layers'])} layers of {dump['num_experts']} experts, top_k "
                             f"{dump['top_k']}; the model has {len(shape)} of " +
                             " and ".join(f"{e} experts, top_k {k}" for e, k in sorted(set(shape.values()))) + ": another model")
        if dump["meta"].get("revision", revision) != revision:  # IDs from elsewhere name no revision
            raise InputError(f"{', '.join(dump['path'])} was captured on another model ({dump['meta'].get('model')}, "
                             f"{dump['meta']['revision']}); capture it again on this one ({revision})")
