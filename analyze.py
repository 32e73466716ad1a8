"""
Which experts are a language's own, which are shared, and how alike languages are routed, layer by layer.

    python analyze.py                                               # what capture.py wrote for the tiny model
    python analyze.py routing/*.npz --bands early=0-4 middle=22-26 late=43-47
    python analyze.py bn=records/mgsm_bn.json en=records/mgsm_en.json

reads   routing dumps            .npz of capture.py, or the .json of the paper's recorder; numpy is all it needs
writes  analysis.npz             the same figures as arrays, described in the README

The definitions are those of arXiv 2601.14050. All shares depend on which languages are compared: name the dumps.
Takes about a second.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
DUMPS = [f"routing/{language}.npz" for language in "bn de en es fr ja sw zh".split()]
EXPERTS_PER_LANGUAGE = None  # of the most frequent experts, how many count as a language's; None: 15/128 of the experts
THRESHOLD = 0.4              # an expert is exclusive to a language that has more than this share of its use
OUT = "analysis.npz"
PRINT_LANGUAGES = 12         # tables as wide as the number of languages are printed up to so many
# ---------------------------------------------------------------------------------------------------------------------


class InputError(ValueError):
    """Something the user can fix: printed as one line, exit status 1."""


# ------------------------------------------------------------------------------------------------------- reading dumps

def load_routing(path, part="all"):
    """One dump as a dict: language, counts (layers, experts), num_tokens, layers, top_k, num_experts, meta, sha256.

    path  an .npz of capture.py; an .npz with only selected_experts (tokens, layers, top_k) and meta; a recorder's
          .json {"layer": {"expert": {"activation_tokens": n}, ..., "total_tokens": n}}; or any of them as label=path
    part  "prompt" or "response" counts only those tokens of each sequence, which takes selected_experts
    """
    label, path = split_label(path)
    if not os.path.isfile(path):
        raise InputError(f"{path} is a folder; name the dumps, as in {path}/*.npz" if os.path.isdir(path) else
                         f"no such dump: {path}; run: python capture.py")
    try:
        dump = read_recorder_json(path) if path.endswith(".json") else read_dump(path, part)
    except (OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a whole routing dump; give an .npz of capture.py or the .json of the paper's recorder"
                         ) from error
    if dump["num_tokens"] == 0:
        raise InputError(f"{path} holds no {'' if part == 'all' else part + ' '}tokens")
    return dump | {"language": label or dump["language"], "path": path,
                   "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def split_label(path):
    """"bn=a/b.npz" -> ("bn", "a/b.npz"); a path that exists as it is has no label."""
    label, equals, rest = str(path).partition("=")
    return (label, rest) if equals and not os.path.exists(path) else (None, str(path))


def read_dump(path, part):
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        if meta.get("format", 1) != 1:
            raise InputError(f"{path} is of format {meta['format']}; this analyze.py reads format 1")
        offsets = file["sequence_offsets"] if "sequence_offsets" in file else None
        if part != "all" or "counts" not in file:
            selected = file["selected_experts"] if "selected_experts" in file else None
            if selected is None:
                raise InputError(f"{path} holds no selected_experts, which --part {part} needs; "
                                 "capture without --stats-only")
            if part != "all":
                if offsets is None or "prompt_lengths" not in file:
                    raise InputError(f"{path} holds no prompt_lengths, which --part {part} needs")
                position = np.arange(len(selected)) - np.repeat(offsets[:-1], np.diff(offsets))
                in_prompt = position < np.repeat(file["prompt_lengths"], np.diff(offsets))
                selected = selected[in_prompt if part == "prompt" else ~in_prompt]
            if selected.size and int(selected.max()) >= meta["num_experts"]:
                raise InputError(f"{path}: expert ID {selected.max()}, but num_experts in its meta is {meta['num_experts']}")
            counts, num_tokens = count_experts(selected, meta["num_experts"]), len(selected)
            top_k = selected.shape[2]
        else:
            counts, num_tokens, top_k = file["counts"], int(offsets[-1]), meta["top_k"]
        if not (counts.sum(1) == num_tokens * top_k).all():
            raise InputError(f"{path}: counts do not add up to {num_tokens} tokens * top_k {top_k}; capture it again")
        layers = file["layers"] if "layers" in file else np.arange(len(counts), dtype=np.int32)
    return {"language": meta["language"], "counts": counts, "num_tokens": num_tokens, "layers": layers,
            "top_k": top_k, "num_experts": counts.shape[1], "meta": meta}


def count_experts(selected_experts, num_experts):
    """(tokens, layers, top_k) expert IDs -> int64 (layers, experts), how many tokens selected each."""
    layers = selected_experts.shape[1]
    return np.stack([np.bincount(selected_experts[:, layer].ravel(), minlength=num_experts) for layer in range(layers)]
                    ).astype(np.int64).reshape(layers, num_experts)


def read_recorder_json(path):
    """The paper's recorder summed in bfloat16: its counts are near, not exact, and need not add up to whole tokens."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    layers = sorted(record, key=int)
    num_tokens = {record[layer]["total_tokens"] for layer in layers}
    if len(num_tokens) != 1:
        raise InputError(f"{path}: total_tokens differs between layers: {sorted(num_tokens)}")
    experts = sorted((e for e in record[layers[0]] if e != "total_tokens"), key=int)
    counts = np.array([[record[layer][e]["activation_tokens"] for e in experts] for layer in layers], np.int64)
    num_tokens = int(num_tokens.pop())
    return {"language": Path(path).stem, "counts": counts, "num_tokens": num_tokens,
            "layers": np.array([int(layer) for layer in layers], np.int32), "num_experts": len(experts),
            "top_k": round(counts.sum() / len(layers) / max(num_tokens, 1)), "meta": {"recorder": "json"}}


def load_languages(paths, part="all"):
    """Dumps of several languages that agree in layers, experts and top_k; shards of a language are added up.

    Returns a list of dicts like load_routing's, one per language, in the order in which they are named.
    """
    shards = {}
    for path in tqdm(paths, desc="dumps", leave=False, disable=len(paths) < 20):
        dump = load_routing(path, part)
        shards.setdefault(dump["language"], []).append(dump)
    first = next(iter(shards.values()))[0]
    for dump in (d for group in shards.values() for d in group):
        for key in ("num_experts", "top_k"):
            if dump[key] != first[key]:
                raise InputError(f"{dump['path']} has {key} {dump[key]}, {first['path']} has {first[key]}: other models")
        if not np.array_equal(dump["layers"], first["layers"]):
            raise InputError(f"{dump['path']} and {first['path']} have other layers: other models")
        if len({d["meta"]["revision"] for d in (dump, first) if "revision" in d["meta"]}) > 1:
            raise InputError(f"{dump['path']} and {first['path']} come from different models "
                             f"({dump['meta'].get('model')}, {first['meta'].get('model')})")
    return [add_shards(language, group) for language, group in shards.items()]


def add_shards(language, group):
    parts = [dump["meta"].get("shard", "1/1") for dump in group]
    whole = {f"{i}/{len(group)}" for i in range(1, len(group) + 1)}
    if set(parts) != whole or len({dump["meta"].get("data_sha256") for dump in group}) > 1:
        raise InputError(f"'{language}' has the dumps {', '.join(d['path'] for d in group)} (shards {', '.join(parts)}): "
                         "not one whole, nor all the shards of one; label=path tells languages apart")
    return group[0] | {"counts": sum(dump["counts"] for dump in group), "path": [dump["path"] for dump in group],
                       "num_tokens": sum(dump["num_tokens"] for dump in group), "sha256": [d["sha256"] for d in group],
                       "data_sha256": [dump["meta"].get("data_sha256") for dump in group]}


# --------------------------------------------------------------------------------------- definitions (arXiv 2601.14050)

def activation_frequency(counts, num_tokens):
    """Part of the tokens that select each expert.

    counts (..., layers, experts), num_tokens a number or (...) -> float64 (..., layers, experts); a row sums to top_k.
    [[3, 1]] of 4 tokens -> [[.75, .25]]
    """
    return np.asarray(counts, np.float64) / np.asarray(num_tokens, np.float64)[..., None, None]


def language_shares(frequency, experts_per_language):
    """Each language's part in an expert's use, over the experts that rank among a language's most frequent.

    frequency (languages, layers, experts) -> (languages, layers, experts); sums over languages are 1, or 0 where no
    language keeps the expert. Of equally frequent experts the lower index is kept.
    [[[.6, .4]], [[.2, .8]]] with 1 expert each -> [[[1, 0]], [[0, 1]]]
    """
    num_experts = frequency.shape[-1]
    if not 1 <= experts_per_language <= num_experts:
        raise InputError(f"experts_per_language {experts_per_language} is not between 1 and the {num_experts} experts")
    order = np.argsort(-frequency, axis=-1, kind="stable")[..., :experts_per_language]
    kept = np.zeros_like(frequency)
    np.put_along_axis(kept, order, np.take_along_axis(frequency, order, -1), -1)
    total = kept.sum(0)
    return np.divide(kept, total, out=np.zeros_like(kept), where=total > 0)


def exclusive_experts(share, threshold):
    """Experts of whose use a language has more than the threshold. share -> bool, both (languages, layers, experts).

    For several languages together: exclusive_experts(share[targets].sum(0), threshold).
    """
    return share > check_threshold(threshold)


def shared_experts(share, threshold):
    """Experts that some language keeps and of whose use each has less than the threshold.

    share (languages, layers, experts) -> bool (layers, experts)
    """
    return (share > 0).any(0) & (share < check_threshold(threshold)).all(0)


def check_threshold(threshold):
    if not 0 < threshold < 1:
        raise InputError(f"threshold {threshold} is not between 0 and 1")
    return threshold


def default_experts_per_language(num_experts):
    """The paper's 15 of 128, to scale."""
    return max(1, round(num_experts * 15 / 128))


def jensen_shannon_similarity(p, q):
    """1 - Jensen-Shannon divergence in bits, over the last axis: 1 is the same distribution, 0 is nothing in common.

    [.5, .5, 0] and [0, .5, .5] -> .5
    """
    middle = (p + q) / 2
    return 1 - entropy_bits(middle) + (entropy_bits(p) + entropy_bits(q)) / 2


def entropy_bits(p):
    return -(p * np.log2(p, out=np.zeros_like(p), where=p > 0)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------- bands

def parse_bands(texts, layers):
    """["early=0-4", ...] -> {"early": bool (layers,)}: the rows of the decoder layers 0 to 4, both inclusive.

    None gives the first, middle and last tenth of the rows, at least one each. InputError if a band holds no MoE layer.
    """
    if texts is None:
        n, size = len(layers), max(1, round(len(layers) / 10))
        starts = {"early": 0, "middle": (n - size + 1) // 2, "late": n - size}
        return {name: (np.arange(n) >= start) & (np.arange(n) < start + size) for name, start in starts.items()}
    bands = {}
    for text in texts:
        match = re.fullmatch(r"(?:(.+)=)?(\d+)(?:-(\d+))?", text)
        if not match:
            raise InputError(f"band '{text}' is neither FIRST-LAST nor NAME=FIRST-LAST, such as middle=22-26")
        first, last = int(match[2]), int(match[3] or match[2])
        rows = (layers >= first) & (layers <= last)
        if first > last or last > max(layers) or not rows.any():
            raise InputError(f"band '{text}' does not hold MoE layers of this model, which has {describe(layers)}")
        bands[match[1] or text] = rows
    return bands


def describe(layers):
    """[0, 1, 2, 5] -> "0-2 5"."""
    runs = np.split(layers, np.flatnonzero(np.diff(layers) != 1) + 1)
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# --------------------------------------------------------------------------------------------------------------- output

def analyze(frequency, experts_per_language, threshold):
    """Everything that depends on layers, from frequency (languages, layers, experts), as the arrays of analysis.npz."""
    share = language_shares(frequency, experts_per_language)
    p = frequency / frequency.sum(-1, keepdims=True)
    similarity = np.stack([jensen_shannon_similarity(p, q) for q in p], 1)  # (languages, languages, layers)
    return {
        "frequency": frequency,
        "share": share,
        "exclusive": exclusive_experts(share, threshold),
        "shared": shared_experts(share, threshold),
        "similarity": similarity.transpose(2, 0, 1),
        "entropy": entropy_bits(p) / np.log2(p.shape[-1]),
    }


def mean_off_diagonal(matrix):
    """Mean over the pairs of different languages: (..., n, n) -> (...); nan for one language."""
    n = matrix.shape[-1]
    return matrix[..., ~np.eye(n, dtype=bool)].mean(-1) if n > 1 else np.full(matrix.shape[:-2], np.nan)


def print_tables(result, languages, layers, bands):
    few = len(languages) <= PRINT_LANGUAGES
    width = max(6, max(map(len, languages)) + 1) if few else 6
    similarity, exclusive, shared = result["similarity"], result["exclusive"], result["shared"]
    names = "".join(f"{name:>{width}}" for name in languages)
    for band, rows in bands.items():
        matrix = similarity[rows].mean(0)
        print(f"\nrouting similarity, {band} (layers {describe(layers[rows])}), 1 - JSD; "
              f"mean of pairs {mean_off_diagonal(matrix):.3f}")
        if few:
            print(" " * 8 + names)
            for language, line in zip(languages, matrix):
                print(f"{language:<8}" + "".join(f"{value:>{width}.2f}" for value in line))

    print("\nlayer  similarity  entropy  shared" + ("  exclusive to" + names[2:] if few else "  exclusive"))
    for row, layer in enumerate(layers):
        counts = exclusive[:, row].sum(-1) if few else [exclusive[:, row].sum()]
        print(f"{layer:>5}{mean_off_diagonal(similarity[row]):>12.3f}{result['entropy'][:, row].mean():>9.3f}"
              f"{shared[row].sum():>8}" + " " * (12 if few else 0) + "".join(f"{n:>{width if few else 11}}" for n in counts))
    totals = exclusive.sum((1, 2)) if few else [exclusive.sum()]
    print(f"{'all':>5}{mean_off_diagonal(similarity).mean():>12.3f}{result['entropy'].mean():>9.3f}"
          f"{shared.sum():>8}" + " " * (12 if few else 0) + "".join(f"{n:>{width if few else 11}}" for n in totals))

    print(f"\npart of the routing (%) that goes to experts that are\n{'':<8}{'exclusive':>10}{'shared':>8}{'other':>8}   "
          "nearest language  " + "  ".join(f"{band:<14}" for band in bands))
    p = result["frequency"] / result["frequency"].sum(-1, keepdims=True)
    for i, language in enumerate(languages):
        own = 100 * (p[i] * exclusive[i]).sum(-1).mean()
        common = 100 * (p[i] * shared).sum(-1).mean()
        nearest = []
        for rows in bands.values():
            others = similarity[rows, i].mean(0)
            others[i] = -1
            nearest.append(f"{languages[others.argmax()]} {others.max():.2f}" if len(languages) > 1 else "-")
        print(f"{language:<8}{own:>10.1f}{common:>8.1f}{100 - own - common:>8.1f}   {'':<18}"
              + "  ".join(f"{text:<14}" for text in nearest))


def save_analysis(path, result, **more):
    """Write the arrays under their final name only when they are whole."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **result, **more)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dumps", nargs="*", default=DUMPS, metavar="DUMP", help="path or label=path (default: routing/ of the tiny model)")
    p.add_argument("--experts-per-language", type=int, default=EXPERTS_PER_LANGUAGE, help="most frequent experts that are a "
                   "language's own or shared (default: 15/128 of the experts, the paper's)")
    p.add_argument("--threshold", type=float, default=THRESHOLD, help="share above which an expert is exclusive (default: %(default)s)")
    p.add_argument("--bands", nargs="+", metavar="NAME=A-B", help="decoder layers, inclusive (default: first, middle and last tenth)")
    p.add_argument("--part", choices=["all", "prompt", "response"], default="all", help="count only these tokens")
    p.add_argument("--out", default=OUT, help="(default: %(default)s)")
    args = p.parse_args()

    dumps = load_languages(args.dumps, args.part)
    languages, layers = [dump["language"] for dump in dumps], dumps[0]["layers"]
    bands = parse_bands(args.bands, layers)
    experts_per_language = args.experts_per_language
    if experts_per_language is None:
        experts_per_language = default_experts_per_language(dumps[0]["num_experts"])
    if not os.path.isdir(os.path.dirname(args.out) or "."):
        raise InputError(f"no such folder: {os.path.dirname(args.out)}; make it, or give another --out")
    frequency = activation_frequency([dump["counts"] for dump in dumps], [dump["num_tokens"] for dump in dumps])
    result = analyze(frequency, experts_per_language, args.threshold)

    print(f"{len(dumps)} languages  {len(layers)} MoE layers  {dumps[0]['num_experts']} experts  top_k {dumps[0]['top_k']}  "
          f"experts_per_language {experts_per_language}  threshold {args.threshold}")
    print("tokens  " + "  ".join(f"{dump['language']} {dump['num_tokens']:,}" for dump in dumps))
    if args.threshold * len(languages) <= 1:
        print(f"note: shares add up to 1, so with {len(languages)} languages none is shared at a threshold of {args.threshold}; "
              "raise --threshold")
    print_tables(result, languages, layers, bands)
    meta = vars(args) | {"experts_per_language": experts_per_language,
                         "bands": {band: layers[rows].tolist() for band, rows in bands.items()},
                         "inputs": [{key: dump[key] for key in ("language", "path", "sha256", "num_tokens")} for dump in dumps]}
    save_analysis(args.out, result, languages=np.array(languages), layers=layers,
                  meta=np.array(json.dumps(meta, ensure_ascii=False)))
    print(f"\n{args.out}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
