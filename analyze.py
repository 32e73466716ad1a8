"""
Which experts are a language's own, which are shared, and how alike languages are routed; what is structure, what noise.

    python analyze.py                                               # what capture.py wrote for the tiny model
    python analyze.py routing/*.npz --bootstrap 1000 --vocabulary --figures figures
    python analyze.py bn=records/mgsm_bn.json en=records/mgsm_en.json --bands early=0-4 middle=22-26 late=43-47
    python analyze.py --contrast math.npz chat.npz --tau 0.4        # experts for ablate.py and steer.py --selection

reads   routing dumps            .npz of capture.py, or the .json of the paper's recorder; numpy is all it needs
writes  analysis.npz             the same figures as arrays, described in the README; pictures with --figures

Exclusive and shared experts are those of arXiv 2601.14050. All shares depend on which languages are compared: name the
dumps. Takes under a second; eight languages with a thousand bootstrap draws, about half a minute.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
DUMPS = [f"routing/{language}.npz" for language in "bn de en es fr ja sw zh".split()]
EXPERTS_PER_LANGUAGE = None  # of the most frequent experts, how many count as a language's; None: 15/128 of the experts
THRESHOLD = 0.4              # an expert is exclusive to a language that has more than this share of its use
REFERENCE = "en"             # with --scores: similarity to this language is correlated with the scores
TAU = 0.4                    # with --contrast: select experts whose frequency differs by more (arXiv 2510.04694)
OUT = "analysis.npz"
PRINT_LANGUAGES = 12         # tables as wide as the number of languages are printed up to so many
HALVINGS = 20                # random ways to split a language in two, for the floor
STABLE = 0.95                # an expert is stable that stays exclusive, or shared, in so many of the bootstrap draws
PERMUTATIONS = 10_000        # of labels or scores, at random; up to 8 languages, all there are
# ---------------------------------------------------------------------------------------------------------------------
MEASURES = ("similarity", "divergence", "jaccard", "cosine")  # of two languages, see pair_measures
# language families as family/branch, by ISO 639-1 and 639-3 codes: those of FLORES-200 and their short forms
FAMILIES = {
    "Afro-Asiatic/Berber": "ber kab taq tzm", "Afro-Asiatic/Chadic": "ha hau", "Afro-Asiatic/Cushitic": "gaz om orm so som",
    "Afro-Asiatic/Semitic": "acm acq aeb ajp am amh apc ar ara arb ars ary arz he heb mlt mt ti tir",
    "Atlantic-Congo/Bantu": "bem cjk kam kg ki kik kin kmb kon lg lin ln lua lug nso nya ny rn run rw sn sna sot ss ssw st "
                            "sw swa swh tn ts tsn tso tum umb xh xho zu zul",
    "Atlantic-Congo/Gur": "kbp mos", "Atlantic-Congo/Kwa": "ak aka tw twi", "Atlantic-Congo/Senegambian": "ff fuv wo wol",
    "Atlantic-Congo/Ubangian": "sag sg", "Atlantic-Congo/Volta-Niger": "ee ewe fon ibo ig yo yor",
    "Austroasiatic/Khmer": "khm km", "Austroasiatic/Munda": "sat", "Austroasiatic/Vietic": "vi vie",
    "Austronesian/Malayo-Polynesian": "ace ban bjn bug ceb fij fil fj id ilo ind jav jv mg mi min mlg mri ms msa pag plt sm smo "
                                      "su sun tgl tl war zsm",
    "Aymaran": "ay ayr", "Basque": "eu eus", "Constructed": "eo epo", "Creole": "hat ht kea pap tpi",
    "Dravidian": "kan kn mal ml ta tam te tel",
    "Indo-European/Albanian": "als sq sqi", "Indo-European/Armenian": "hy hye",
    "Indo-European/Baltic": "lav lit lt ltg lv lvs", "Indo-European/Celtic": "br bre cy cym ga gd gla gle",
    "Indo-European/Germanic": "af afr da dan de deu en eng fao fo is isl lb li lim ltz nb nl nld nn nno no nob nor sv swe ydd yi "
                              "yid",
    "Indo-European/Hellenic": "el ell",
    "Indo-European/Indo-Aryan": "as asm awa ben bho bn gu guj hi hin hne kas ks mag mai mar mr ne nep npi or ori ory pa pan pnb "
                                "sa san sd si sin snd ur urd",
    "Indo-European/Iranian": "ckb fa fas kmr ku kur pbt pes prs ps pus tg tgk",
    "Indo-European/Romance": "ast ca cat es fr fra fur gl glg it ita lij lmo oc oci por pt ro ron sc scn spa srd vec",
    "Indo-European/Slavic": "be bel bg bos bs bul ces cs hbs hr hrv mk mkd pl pol ru rus sk sl slk slv sr srp szl uk ukr",
    "Japonic": "ja jpn", "Kartvelian": "ka kat", "Koreanic": "ko kor", "Mande": "bam bm dyu", "Mongolic": "khk mn mon",
    "Nilo-Saharan/Nilotic": "dik luo nus", "Nilo-Saharan/Saharan": "knc", "Quechuan": "qu que quy",
    "Sino-Tibetan/Sinitic": "cmn yue zh zho", "Sino-Tibetan/Tibeto-Burman": "bo bod dz dzo kac lus mni my mya",
    "Tai-Kadai": "lao lo shn th tha", "Tupian": "gn grn",
    "Turkic": "az azb aze azj ba bak crh kaz kir kk ky tat tk tr tt tuk tur ug uig uz uzb uzn",
    "Uralic/Finnic": "est et fi fin", "Uralic/Hungarian": "hu hun",
}


class InputError(ValueError):
    """Something the user can fix: printed as one line, exit status 1."""


# ------------------------------------------------------------------------------------------------------- reading dumps

def load_routing(path, part="all"):
    """One dump as a dict: language, counts (layers, experts), num_tokens, layers, top_k, num_experts, meta, digest.

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
        digest = dump_digest(path)
    except (OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a whole routing dump; give an .npz of capture.py or the .json of the paper's "
                         "recorder") from error
    if dump["num_tokens"] == 0:
        raise InputError(f"{path} holds no {'' if part == 'all' else part + ' '}tokens")
    return dump | {"language": label or dump["language"], "path": path, "digest": digest}


def split_label(path):
    """"bn=a/b.npz" -> ("bn", "a/b.npz"); a path that exists as it is has no label."""
    label, equals, rest = str(path).partition("=")
    return (label, rest) if equals and not os.path.exists(path) else (None, str(path))


def dump_digest(path):
    """What tells dumps apart: a hash of an .npz's table of contents, which has a checksum of each array; gigabytes of IDs
    need not be read for it.
    """
    if path.endswith(".json"):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    with ZipFile(path) as file:
        contents = [(entry.filename, entry.file_size, entry.CRC) for entry in file.infolist()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def read_dump(path, part):
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(str(file["meta"]))
        if meta.get("format", 1) != 1:
            raise InputError(f"{path} is of format {meta['format']}; this analyze.py reads format 1")
        if part != "all" or "counts" not in file:
            selected = read_tokens(path, part, f"--part {part}")[0]
            if selected.size and int(selected.max()) >= meta["num_experts"]:
                raise InputError(f"{path}: expert ID {selected.max()}, but num_experts in its meta is {meta['num_experts']}")
            counts = grouped_counts(selected, np.zeros(len(selected), int), 1, meta["num_experts"])[0].astype(np.int64)
            num_tokens, top_k = len(selected), selected.shape[2]
        else:
            counts, num_tokens, top_k = file["counts"], int(file["sequence_offsets"][-1]), meta["top_k"]
        if not (counts.sum(1) == num_tokens * top_k).all():
            raise InputError(f"{path}: counts do not add up to {num_tokens} tokens * top_k {top_k}; capture it again")
        layers = file["layers"] if "layers" in file else np.arange(len(counts), dtype=np.int32)
    return {"language": meta["language"], "counts": counts, "num_tokens": num_tokens, "layers": layers,
            "top_k": top_k, "num_experts": counts.shape[1], "meta": meta}


def read_tokens(path, part, wanted_by):
    """(selected_experts (tokens, layers, top_k), token_ids (tokens,) or None, sequence of each token) of one dump."""
    if path.endswith(".json"):
        raise InputError(f"{path} is a recorder's, without single tokens, which {wanted_by} needs")
    with np.load(path, allow_pickle=False) as file:
        if "selected_experts" not in file:
            raise InputError(f"{path} holds no selected_experts, which {wanted_by} needs; capture without --stats-only")
        selected = file["selected_experts"]
        token_ids = file["token_ids"] if "token_ids" in file else None
        offsets = file["sequence_offsets"] if "sequence_offsets" in file else np.array([0, len(selected)])
        sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        if part != "all":
            if "sequence_offsets" not in file or "prompt_lengths" not in file:
                raise InputError(f"{path} holds no prompt_lengths, which --part {part} needs")
            in_prompt = np.arange(len(selected)) - offsets[sequence] < file["prompt_lengths"][sequence]
            keep = in_prompt if part == "prompt" else ~in_prompt
            selected, sequence = selected[keep], sequence[keep]
            token_ids = None if token_ids is None else token_ids[keep]
    return selected, token_ids, sequence


def grouped_counts(selected_experts, group, num_groups, num_experts):
    """How many tokens of each group selected each expert: float32 (groups, layers, experts), of whole numbers.

    selected_experts (tokens, layers, top_k), group (tokens,)
    """
    layers = selected_experts.shape[1]
    counts = np.empty((num_groups, layers, num_experts), np.float32 if num_groups > 1 else np.float64)
    for layer in range(layers):
        cell = (group[:, None] * num_experts + selected_experts[:, layer]).ravel()
        counts[:, layer] = np.bincount(cell, minlength=num_groups * num_experts).reshape(num_groups, num_experts)
    return counts


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
    group = sorted(group, key=lambda dump: int(dump["meta"].get("shard", "1/1").split("/")[0]))
    parts = [dump["meta"].get("shard", "1/1") for dump in group]
    whole = {f"{i}/{len(group)}" for i in range(1, len(group) + 1)}
    if set(parts) != whole or len({dump["meta"].get("data_sha256") for dump in group}) > 1:
        raise InputError(f"'{language}' has the dumps {', '.join(d['path'] for d in group)} (shards {', '.join(parts)}): "
                         "not one whole, nor all the shards of one; label=path tells languages apart")
    return group[0] | {"counts": sum(dump["counts"] for dump in group), "path": [dump["path"] for dump in group],
                       "num_tokens": sum(dump["num_tokens"] for dump in group), "digest": [d["digest"] for d in group],
                       "data_sha256": [dump["meta"].get("data_sha256") for dump in group]}


def sequence_counts(dump, part):
    """Counts by sequence of a language, (sequences, layers, experts); sequences without such tokens are left out."""
    counts = []
    for path in dump["path"]:
        selected, _, sequence = read_tokens(path, part, "--bootstrap")
        present, group = np.unique(sequence, return_inverse=True)
        counts.append(grouped_counts(selected, group, len(present), dump["num_experts"]).astype(np.float32))
    counts = np.concatenate(counts)
    if len(counts) < 2:
        raise InputError(f"'{dump['language']}' has one sequence; --bootstrap resamples sequences")
    return counts


# --------------------------------------------------------------------------------------- definitions (arXiv 2601.14050)

def activation_frequency(counts, num_tokens):
    """Part of the tokens that select each expert.

    counts (..., layers, experts), num_tokens a number or (...) -> float64 (..., layers, experts); a row sums to top_k.
    [[3, 1]] of 4 tokens -> [[.75, .25]]
    """
    return np.asarray(counts, np.float64) / np.asarray(num_tokens, np.float64)[..., None, None]


def most_frequent(frequency, experts_per_language):
    """bool (languages, layers, experts): a language's most frequent experts; of equally frequent ones the lower index."""
    num_experts = frequency.shape[-1]
    if not 1 <= experts_per_language <= num_experts:
        raise InputError(f"experts_per_language {experts_per_language} is not between 1 and the {num_experts} experts")
    kept = np.zeros(frequency.shape, bool)
    np.put_along_axis(kept, np.argsort(-frequency, axis=-1, kind="stable")[..., :experts_per_language], True, -1)
    return kept


def language_shares(frequency, experts_per_language):
    """Each language's part in an expert's use, over the experts that rank among a language's most frequent.

    frequency (languages, layers, experts) -> (languages, layers, experts); sums over languages are 1, or 0 where no
    language keeps the expert. Of equally frequent experts the lower index is kept.
    [[[.6, .4]], [[.2, .8]]] with 1 expert each -> [[[1, 0]], [[0, 1]]]
    """
    kept = np.where(most_frequent(frequency, experts_per_language), frequency, 0)
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


# ------------------------------------------------------------------------------------------------ measures of two languages

def entropy_bits(p):
    """Shannon entropy over the last axis, in bits. [.5, .5, 0] -> 1"""
    return -(p * np.log2(np.maximum(p, np.finfo(p.dtype).tiny))).sum(-1)


def jensen_shannon_similarity(p, q):
    """1 - Jensen-Shannon divergence in bits, over the last axis: 1 is the same distribution, 0 is nothing in common.

    [.5, .5, 0] and [0, .5, .5] -> .5
    """
    return 1 - entropy_bits((p + q) / 2) + (entropy_bits(p) + entropy_bits(q)) / 2


def normalized_divergence(p, q):
    """Jensen-Shannon divergence over what entropy leaves room for, JSD / (log E - (H(p) + H(q)) / 2); arXiv 2510.04694.

    Over the last axis, of E experts. 0 is the same distribution, 1 the most that two of such entropies can differ; two
    uniform distributions have no room and do not differ: 0. [1, 0] and [0, 1] -> 1
    """
    room = np.log2(p.shape[-1]) - (entropy_bits(p) + entropy_bits(q)) / 2
    return np.divide(1 - jensen_shannon_similarity(p, q), room, out=np.zeros_like(room), where=room > 1e-12)


def pair_measures(frequency, experts_per_language):
    """{measure: (layers, languages, languages)} of every pair, from frequency (languages, layers, experts).

    similarity  1 - Jensen-Shannon divergence, in bits, of the languages' parts of the routing
    divergence  the same divergence normalised by entropy; 0 is alike
    jaccard     of the sets of each language's most frequent experts
    cosine      of the frequencies
    """
    n, layers, num_experts = frequency.shape
    p = frequency / frequency.sum(-1, keepdims=True)
    entropy = entropy_bits(p)
    similarity = np.ones((layers, n, n))
    for i in range(n - 1):
        mean = (entropy[i] + entropy[i + 1:]) / 2
        similarity[:, i, i + 1:] = similarity[:, i + 1:, i] = (1 - entropy_bits((p[i] + p[i + 1:]) / 2) + mean).T
    room = np.log2(num_experts) - (entropy.T[:, :, None] + entropy.T[:, None]) / 2
    kept = most_frequent(frequency, experts_per_language).transpose(1, 0, 2).astype(np.float32)
    common = kept @ kept.transpose(0, 2, 1)
    unit = (frequency / np.linalg.norm(frequency, axis=-1, keepdims=True)).transpose(1, 0, 2)
    return {
        "similarity": similarity,
        "divergence": np.divide(1 - similarity, room, out=np.zeros_like(room), where=room > 1e-12),
        "jaccard": (common / (2 * experts_per_language - common)).astype(np.float64),
        "cosine": unit @ unit.transpose(0, 2, 1),
    }


def aligned_divergence(mean_probs):
    """normalized_divergence averaged over aligned sequences, as 2510.04694 has it for parallel data.

    mean_probs: of each language (sequences, layers, experts) -> (layers, languages, languages), and the mean over pairs
    sequence by sequence (sequences, layers)
    """
    n, (sequences, layers, _) = len(mean_probs), mean_probs[0].shape
    divergence, by_sequence = np.zeros((layers, n, n)), np.zeros((sequences, layers))
    pairs = list(itertools.combinations(range(n), 2))
    for i, j in tqdm(pairs, desc="parallel", unit="pair", leave=False):
        each = normalized_divergence(mean_probs[i].astype(np.float64), mean_probs[j].astype(np.float64))
        divergence[:, i, j] = divergence[:, j, i] = each.mean(0)
        by_sequence += each / len(pairs)
    return divergence, by_sequence


def mean_off_diagonal(matrix):
    """Mean over the pairs of different languages: (..., n, n) -> (...); nan for one language."""
    n = matrix.shape[-1]
    return matrix[..., ~np.eye(n, dtype=bool)].mean(-1) if n > 1 else np.full(matrix.shape[:-2], np.nan)


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


# ------------------------------------------------------------------------------------------------------------ the figures

def analyze(frequency, experts_per_language, threshold):
    """Everything that depends on frequency (languages, layers, experts) alone, as arrays of analysis.npz."""
    share = language_shares(frequency, experts_per_language)
    exclusive, shared = exclusive_experts(share, threshold), shared_experts(share, threshold)
    p = frequency / frequency.sum(-1, keepdims=True)
    own, common = (p * exclusive).sum(-1), (p * shared).sum(-1)
    return pair_measures(frequency, experts_per_language) | {
        "frequency": frequency,
        "share": share,
        "exclusive": exclusive,
        "shared": shared,
        "entropy": entropy_bits(p) / np.log2(p.shape[-1]),
        "reliance": np.stack([own, common, 1 - own - common], -1),  # (languages, layers, 3)
        "most_used": p.max(-1),
        "active": (frequency > 0).sum(-1),
    }


def summarize(result, bands):
    """The figures that get an interval: means over bands and over pairs, parts of the routing, numbers of experts."""
    exclusive, shared = result["exclusive"], result["shared"] & (result["share"] > 0)
    summary = {
        "entropy": result["entropy"], "mean_entropy": result["entropy"].mean(0), "mean_reliance": result["reliance"].mean(1),
        "num_exclusive": exclusive.sum((1, 2)), "num_shared": shared.sum((1, 2)),
        "layer_exclusive": exclusive.sum((0, 2)), "layer_shared": result["shared"].sum(-1)}
    for measure in MEASURES:
        summary[f"band_{measure}"] = np.stack([result[measure][rows].mean(0) for rows in bands.values()])
        summary[f"mean_{measure}"] = mean_off_diagonal(summary[f"band_{measure}"])
        summary[f"layer_{measure}"] = mean_off_diagonal(result[measure])
    return summary


def split_half_floor(counts, experts_per_language, rng):
    """How alike a language is to itself: {measure: (layers,)} of two random halves of its sequences, the mean over HALVINGS.

    counts (sequences, layers, experts). A half has half of the data, so the whole is more like itself than this.
    """
    floors = []
    for _ in range(HALVINGS):
        order = rng.permutation(len(counts))
        halves = np.stack([counts[half].sum(0, dtype=np.float64) for half in np.array_split(order, 2)])
        floors.append(pair_measures(halves / halves.sum(-1, keepdims=True), experts_per_language))
    return {measure: np.mean([floor[measure][:, 0, 1] for floor in floors], 0) for measure in MEASURES}


def bootstrap(counts, draws, experts_per_language, threshold, bands, rng, by_sequence=None):
    """95 % intervals of summarize()'s figures, and how often each expert stays what it is, over draws of the sequences.

    counts       of each language (sequences, layers, experts)
    by_sequence  aligned_divergence's: the languages are parallel, so that the same sequences are drawn in all
    -> {key: (low and high, ...)}, part of the draws in which an expert is exclusive (languages, layers, experts), and is
    shared (layers, experts). Intervals are the estimate less the draws' bias, 1.96 of their standard deviations to both
    sides (the normal bootstrap interval): two samples of few tokens look less alike than what they were taken from.
    """
    cells = [c.reshape(len(c), -1) for c in counts]
    shape, drawn, exclusive, shared = counts[0].shape[1:], [], 0, 0

    def figures(totals, weights):
        result = analyze(totals / totals.sum(-1, keepdims=True), experts_per_language, threshold)
        summary = summarize(result, bands)
        if by_sequence is not None:
            summary["layer_aligned"] = weights @ by_sequence / len(by_sequence)
            summary["mean_aligned"] = np.array([summary["layer_aligned"][rows].mean() for rows in bands.values()])
        return result, summary

    with tqdm(total=draws, desc="bootstrap", unit="draw", leave=False) as progress:
        for start in range(0, draws, 50):
            n = min(50, draws - start)
            if by_sequence is None:
                weights = [resample(len(c), n, rng) for c in cells]
            else:
                weights = [resample(len(cells[0]), n, rng)] * len(cells)
            totals = np.stack([w @ c for w, c in zip(weights, cells)], 1, dtype=np.float64)
            for k, total in enumerate(totals.reshape(n, len(cells), *shape)):
                result, summary = figures(total, weights[0][k])
                drawn.append(summary)
                exclusive, shared = exclusive + result["exclusive"], shared + result["shared"]
                progress.update()
    estimate = figures(np.stack([c.sum(0, dtype=np.float64) for c in counts]), np.ones(len(counts[0])))[1]
    intervals = {}
    for key, value in estimate.items():
        draws_of = np.array([summary[key] for summary in drawn])
        middle, half = 2 * value - draws_of.mean(0), 1.96 * draws_of.std(0, ddof=1)
        most = np.inf if np.issubdtype(np.asarray(value).dtype, np.integer) else 1  # a number of experts, or a part
        intervals[key] = np.clip([middle - half, middle + half], 0, most)
    return intervals, exclusive / draws, shared / draws


def resample(n, draws, rng):
    """How often each of n sequences is drawn, float32 (draws, n), n with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32)


def vocabulary_control(dumps, part):
    """Similarity over only those tokens whose ids do not occur in the other language, and over only those that do.

    -> similarity_own_tokens, similarity_common_tokens (layers, languages, languages), nan where there are no such tokens;
    common_tokens (languages, languages), the part of the row's tokens whose ids occur in the column's language
    """
    def tokens(dump):
        routing = [read_tokens(path, part, "--vocabulary") for path in dump["path"]]
        if any(ids is None for _, ids, _ in routing):
            raise InputError(f"{', '.join(dump['path'])} holds no token_ids, which --vocabulary needs")
        return np.concatenate([selected for selected, *_ in routing]), np.concatenate([ids for _, ids, _ in routing])

    n, shape = len(dumps), dumps[0]["counts"].shape
    vocabularies = [np.unique(tokens(dump)[1]) for dump in dumps]
    common, every = np.zeros((n, n, *shape)), np.zeros((n, 1, *shape))
    for a, dump in enumerate(tqdm(dumps, desc="vocabulary", leave=False)):
        selected, ids = tokens(dump)
        in_other = np.array([np.isin(vocabularies[a], other) for other in vocabularies], np.float64)  # (languages, types)
        kind = np.searchsorted(vocabularies[a], ids)
        for layer in range(shape[0]):
            by_type = grouped_counts(selected[:, [layer]], kind, len(vocabularies[a]), shape[1])[:, 0]
            common[a, :, layer], every[a, 0, layer] = in_other @ by_type, by_type.sum(0, dtype=np.float64)
    result = {"common_tokens": (common.sum((2, 3)) / every.sum((2, 3)))}
    for name, counts in (("own", every - common), ("common", common)):
        total = counts.sum(-1, keepdims=True)
        p = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
        similarity = jensen_shannon_similarity(p, p.swapaxes(0, 1)).transpose(2, 0, 1)
        result[f"similarity_{name}_tokens"] = similarity
    return result


# ------------------------------------------------------------------------------------- families, order, scores, contrasts

def family_of(language, table):
    """"Indo-European/Germanic" for "de", "deu_Latn" or "de-AT"; None if the table does not know it."""
    return table.get(language) or table.get(re.split("[-_]", language)[0])


def read_families(path):
    """{code: family/branch} of a file with code, tab, family and optionally /branch, over what is built in."""
    table = {code: family for family, codes in FAMILIES.items() for code in codes.split()}
    if path is not None:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            code, tab, family = line.strip().partition("\t")
            if not tab or not family.strip():
                raise InputError(f"{path}:{number}: not a code, a tab and a family, as 'de<tab>Indo-European/Germanic'")
            table[code] = family.strip()
    return table


def permutations(n, rng):
    """(permutations, n), the identity first: all of them up to n = 8, else PERMUTATIONS random ones."""
    if n <= 8:
        return np.array(list(itertools.permutations(range(n))))
    return np.stack([np.arange(n)] + [rng.permutation(n) for _ in range(PERMUTATIONS)])


def family_test(similarity, labels, rng):
    """(mean similarity within groups, between groups, p): how often labels dealt out at random separate as well or better.

    similarity (n, n), labels a group for each of n languages. nan without a pair within, or a pair between.
    """
    i, j = np.triu_indices(len(labels), 1)
    groups, values = np.unique(labels, return_inverse=True)[1], similarity[i, j]
    same = groups[i] == groups[j]
    if same.all() or not same.any():
        return np.nan, np.nan, np.nan
    gap = []
    for dealt in np.array_split(groups[permutations(len(labels), rng)], 50):
        within = dealt[:, i] == dealt[:, j]
        gap = np.concatenate([gap, within @ values / same.sum() - ~within @ values / (~same).sum()])
    return values[same].mean(), values[~same].mean(), np.mean(gap >= gap[0] - 1e-12)


def linkage_order(similarity):
    """Languages in the order of average-linkage clustering (UPGMA) of similarity (n, n), nearest ends joined: indices."""
    near, clusters = similarity.astype(np.float64).copy(), [[i] for i in range(len(similarity))]
    np.fill_diagonal(near, -np.inf)
    for _ in range(len(clusters) - 1):
        a, b = sorted(divmod(int(near.argmax()), len(near)))
        first, second = clusters[a], clusters[b]
        # of the four ways to put them side by side, the one in which the most alike touch
        clusters[a] = max(([*x, *y] for x in (first, first[::-1]) for y in (second, second[::-1])),
                          key=lambda joined: similarity[joined[len(first) - 1], joined[len(first)]])
        near[a] = (len(first) * near[a] + len(second) * near[b]) / (len(first) + len(second))
        near[:, a] = near[a]
        near[a, a] = near[b] = near[:, b] = -np.inf
        clusters[b] = None
    return next(cluster for cluster in clusters if cluster)


def rank_correlation(x, y, rng):
    """(Spearman's rho, two-sided permutation p) of two series; ties get their mean rank."""
    def centred_ranks(values):
        values = np.asarray(values, float)
        ranks = (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2
        return (ranks - ranks.mean()) / max(np.linalg.norm(ranks - ranks.mean()), 1e-300)
    x, y = centred_ranks(x), centred_ranks(y)
    rho = y[permutations(len(y), rng)] @ x
    return rho[0], np.mean(np.abs(rho) >= abs(rho[0]) - 1e-12)


def select_contrast(frequency_a, frequency_b, tau=TAU, top=None):
    """(difference, chosen), both (layers, experts): by how much more tokens of A than of B select an expert.

    top  the so many largest differences, whatever their sign: SteerMoE's risk difference, arXiv 2509.09660
    tau  else, the experts with a difference above tau: the task experts of arXiv 2510.04694
    """
    difference = frequency_a - frequency_b
    if top is None:
        return difference, difference > tau
    chosen = np.zeros(difference.size, bool)
    chosen[np.argsort(-np.abs(difference).ravel(), kind="stable")[:top]] = True
    return difference, chosen.reshape(difference.shape)


def load_selection(path, layers, num_experts):
    """What --contrast wrote: float64 (layers, experts), an expert's difference where it is selected, else 0."""
    differences = np.zeros((len(layers), num_experts))
    try:
        experts = json.loads(Path(path).read_text(encoding="utf-8"))["experts"]
        chosen = [(int(layer), int(expert), float(d)) for layer, row in experts.items() for expert, d in row.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no selection of experts; run: python analyze.py --contrast A.npz B.npz") from error
    for layer, expert, difference in chosen:
        if layer not in layers or not 0 <= expert < num_experts:
            raise InputError(f"{path} names expert {expert} of layer {layer}; this model has {num_experts} experts in layers "
                             f"{describe(layers)}")
        differences[list(layers).index(layer), expert] = difference
    return differences


# --------------------------------------------------------------------------------------------------------------- output

def with_interval(summary, intervals, key, index, digits=3, scale=1):
    """"0.776 [.772 .781]": an estimate and, where there was a bootstrap, its interval."""
    text = f"{scale * summary[key][index]:.{digits}f}"
    if intervals:
        low, high = (f"{scale * bound[index]:.{digits}f}".replace("0.", ".", scale == 1) for bound in intervals[key])
        text += f" [{low} {high}]"
    return text


def print_wrapped(text):
    print(textwrap.fill(text, 100, subsequent_indent="        ", break_long_words=False, break_on_hyphens=False))


def print_table(titles, rows, first=9):
    """Columns as wide as their widest entry, right-aligned but for the first."""
    widths = [max(len(str(cell)) for cell in column) + 2 for column in zip(titles, *rows)]
    for row in (titles, *rows):
        print(f"{row[0]:<{max(first, widths[0])}}" + "".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])))


def print_tables(result, summary, intervals, languages, layers, bands):
    """Bands, pairs of languages, layers, languages. intervals as of bootstrap(), or {}."""
    few, rows_of = len(languages) <= PRINT_LANGUAGES, list(bands.values())
    aligned = {"divergence": "aligned"} if "mean_aligned" in summary else {}

    def floor(rows):
        return [f"{result['floor_similarity'][:, rows].mean():.3f}"] if intervals else []

    print("\nmeans over pairs of languages"
          + (" [95 % interval]; floor: similarity of random halves of a language" if intervals else "")
          + ("\nthe divergence is that of aligned sequences" if aligned else ""))
    table = []
    for b, (band, rows) in enumerate(bands.items()):
        similarity, *others = (with_interval(summary, intervals, f"mean_{aligned.get(m, m)}", b) for m in MEASURES)
        table.append([band, describe(layers[rows]), similarity, *floor(rows), *others])
    print_table(["band", "layers", "similarity", *(["floor"] if intervals else []), *MEASURES[1:]], table)

    for band, rows, matrix, order in zip(bands, rows_of, summary["band_similarity"], result["order"]):
        print()
        print_wrapped(f"{'similarity' if few else 'languages'}, {band} (layers {describe(layers[rows])}); in order of average "
                      f"linkage: {' '.join(languages[i] for i in order)}")
        if few:
            print_table(["", *languages], [[name, *(f"{value:.2f}" for value in line)] for name, line in zip(languages, matrix)])

    exclusive, table = result["exclusive"].sum(-1), []
    for row, layer in enumerate(layers):
        table.append([layer, with_interval(summary, intervals, "layer_similarity", row), *floor([row]),
                      f"{summary['mean_entropy'][row]:.3f}", summary["layer_shared"][row], summary["layer_exclusive"][row],
                      *(exclusive[:, row] if few else [])])
    table.append(["all", f"{summary['layer_similarity'].mean():.3f}", *floor(slice(None)), f"{result['entropy'].mean():.3f}",
                  summary["layer_shared"].sum(), exclusive.sum(), *(exclusive.sum(1) if few else [])])
    print()
    print_table(["layer", "similarity", *(["floor"] if intervals else []), "entropy", "shared", "excl.", *(languages if few else [])],
                table, first=7)

    print("\npart of the routing (%) to experts that are | experts, over all layers"
          + (f" (stable in {STABLE:.0%} of draws)" if intervals else "")
          + "\ntop: part (%) of the most used expert, active: experts in use; means over layers")
    table = []
    for i, language in enumerate(languages):
        parts = [with_interval(summary, intervals, "mean_reliance", (i, k), 1, 100) for k in range(3)]
        numbers = [summary["num_exclusive"][i], summary["num_shared"][i]]
        if intervals:
            own = result["exclusive"][i] & (result["exclusive_stability"][i] >= STABLE)
            common = result["shared"] & (result["share"][i] > 0) & (result["shared_stability"] >= STABLE)
            numbers = [f"{numbers[0]} ({own.sum()})", f"{numbers[1]} ({common.sum()})"]
        table.append([language, *parts, *numbers, f"{100 * result['most_used'][i].mean():.1f}", f"{result['active'][i].mean():.1f}"])
    print_table(["", "exclusive", "shared", "other", "exclusive", "shared", "top", "active"], table)

    if len(languages) > 1:
        print("\nnearest language, and its similarity")
        nearest = summary["band_similarity"] - 2 * np.eye(len(languages))
        print_table(["", *bands], [[language, *(f"{languages[line[i].argmax()]} {line[i].max():.2f}" for line in nearest)]
                                   for i, language in enumerate(languages)])


def print_vocabulary(result, bands, layers):
    """Is it the words? Means over pairs and layers of a band, as far as a pair has such tokens."""
    common = mean_off_diagonal(result["common_tokens"])
    print(f"\nsimilarity over tokens whose ids ({common:.1%} of them common to a pair, on average)")
    print_table(["band", "are any", "are common", "are the language's own"], [
        [band, *[f"{np.nanmean(mean_over_pairs(result[key][rows])):.3f}" for key in
                 ("similarity", "similarity_common_tokens", "similarity_own_tokens")]] for band, rows in bands.items()])
    absent = np.isnan(result["similarity_own_tokens"][0] + result["similarity_common_tokens"][0])
    np.fill_diagonal(absent, False)  # a language has no tokens of its own against itself
    if absent.any():
        print(f"note: {absent.sum() // 2} pairs have no common tokens, or none of their own, and are left out there")


def mean_over_pairs(matrix):
    """(layers, n, n) -> (layers,), over the pairs that are not nan."""
    return np.nanmean(matrix[:, ~np.eye(matrix.shape[-1], dtype=bool)], axis=1)


def families_of_bands(summary, languages, bands, table, rng):
    """Rows [level, band, within, between, p] for families and, where they differ, branches; and who has no family."""
    labels = [family_of(language, table) for language in languages]
    known = [i for i, label in enumerate(labels) if label]
    tests = []
    for level in ("family", "branch"):
        groups = [labels[i].split("/")[0] if level == "family" else labels[i] for i in known]
        if level == "branch" and groups == [label.split("/")[0] for label in groups]:
            continue
        for b, band in enumerate(bands):
            tests.append([level, band, *family_test(summary["band_similarity"][b][np.ix_(known, known)], groups, rng)])
    return tests, [languages[i] for i in range(len(languages)) if i not in known]


def read_scores(path, languages, reference):
    """The scores of a JSON file, by language: all but the reference that are in the dumps; InputError with fewer than 4."""
    try:
        there = json.loads(Path(path).read_text(encoding="utf-8"))
        scores = {str(language): float(score) for language, score in there.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a JSON object of language: score") from error
    if reference not in languages:
        raise InputError(f"--scores correlates with the similarity to '{reference}', which has no dump; change --reference")
    scores = {language: scores[language] for language in languages if language in scores and language != reference}
    if len(scores) < 4:
        raise InputError(f"{path} has scores of {len(scores)} languages beside '{reference}'; a rank correlation takes 4")
    return scores


def write_whole(path, write):
    """write(file) to a temporary name, which becomes the final one when all is there."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------------- pictures

# Paul Tol's "muted" colours, which colour-blind readers tell apart
COLOURS = ["#CC6677", "#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499"]
SHARED_COLOUR, OTHER_COLOUR = "#000000", "#EEEEEE"


def import_matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("--figures needs matplotlib; run: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def draw_heatmaps(plt, path, result, summary, languages, layers, bands):
    """Similarity of every pair, a panel per band, all in the linkage order of the mean over layers."""
    order = linkage_order(result["similarity"].mean(0))
    names, n = [languages[i] for i in order], len(languages)
    side = max(3.2, 0.16 * n + 1.5)
    figure, axes = plt.subplots(1, len(bands), squeeze=False, layout="constrained",
                                figsize=(side * len(bands) + 1, side + 0.6))
    low = summary["band_similarity"].min()
    for axis, (band, rows), matrix in zip(axes[0], bands.items(), summary["band_similarity"]):
        image = axis.imshow(matrix[np.ix_(order, order)], vmin=low, vmax=1, cmap="cividis")
        size = 9 if n <= 30 else 6
        axis.set_xticks(range(n), names, rotation=90 if n > 12 else 0, fontsize=size)
        axis.set_yticks(range(n), names, fontsize=size)
        axis.set_title(f"{band}, layers {describe(layers[rows])}")
        if n <= 12:
            for i, j in itertools.product(range(n), repeat=2):
                value = matrix[order[i], order[j]]
                axis.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7,
                          color="black" if value > (1 + low) / 2 else "white")
    figure.colorbar(image, ax=axes[0], label="routing similarity, 1 - JSD", shrink=0.8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_layers(plt, path, result, summary, intervals, layers):
    """The profile over layers: similarity with its interval and floor, entropy, exclusive and shared experts."""
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained",
                                                 gridspec_kw={"height_ratios": [3, 2, 2]})
    lines = [(top, "similarity", "pairs of languages", "#332288"), (middle, "entropy", "mean of languages", "#117733")]
    for axis, key, label, colour in lines:
        value = summary["layer_similarity" if key == "similarity" else "mean_entropy"]
        axis.plot(layers, value, color=colour, marker="o", markersize=3, label=label)
        if intervals:
            low, high = intervals["layer_similarity" if key == "similarity" else "mean_entropy"]
            axis.fill_between(layers, low, high, color=colour, alpha=0.25, linewidth=0, label="95 % interval")
    if intervals:
        top.plot(layers, result["floor_similarity"].mean(0), color="#CC6677", linestyle="--",
                 label="floor: halves of one language")
    top.set_ylabel("routing similarity, 1 - JSD")
    middle.set_ylabel("routing entropy / log E")
    for key, label, colour, style in (("layer_exclusive", "exclusive, all languages", "#CC6677", "-"),
                                      ("layer_shared", "shared", "#332288", "--")):
        bottom.plot(layers, summary[key], color=colour, linestyle=style, marker="o", markersize=3, label=label)
    bottom.set_ylabel("experts")
    bottom.set_xlabel("decoder layer")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axis in (top, middle, bottom):
        axis.legend(fontsize=8, frameon=False, loc="best")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_experts(plt, path, result, languages, layers):
    """Layers x experts, each coloured by the language it is exclusive to, or as shared."""
    exclusive = result["exclusive"]
    named = sorted(np.argsort(-exclusive.sum((1, 2)), kind="stable")[:len(COLOURS)])
    groups = [(f"{languages[i]} ({exclusive[i].sum()})", COLOURS[k], exclusive[i]) for k, i in enumerate(named)]
    rest = np.delete(exclusive, named, 0).any(0)
    if rest.any():
        groups.append((f"another language ({rest.sum()})", "#BBBBBB", rest))
    groups.append((f"shared ({result['shared'].sum()})", SHARED_COLOUR, result["shared"]))
    several = exclusive.sum(0) > 1  # below a threshold of a half, two languages can both have more than it
    if several.any():
        groups.append((f"two of them ({several.sum()})", "#777777", several))
    kind = np.zeros(exclusive.shape[1:], int)
    for k, (_, _, chosen) in enumerate(groups, 1):
        kind[chosen] = k
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    num_layers, num_experts = kind.shape
    size = min(14, max(7, num_experts * 0.075 + 3)), max(3, num_layers * 0.13 + 1.4)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    colours = ListedColormap([OTHER_COLOUR] + [colour for _, colour, _ in groups])
    axis.pcolormesh(np.arange(num_experts + 1) - 0.5, np.arange(num_layers + 1) - 0.5, kind, vmin=0, vmax=len(groups),
                    cmap=colours, edgecolors="white", linewidth=0.3)
    steps = np.unique(np.linspace(0, num_layers - 1, min(num_layers, 13)).round().astype(int))
    axis.set_yticks(steps, layers[steps])
    axis.set_xlabel("expert")
    axis.set_ylabel("decoder layer")
    handles = [Patch(color=colour, label=label) for label, colour, _ in groups]
    figure.legend(handles=handles + [Patch(color=OTHER_COLOUR, label="neither")], loc="outside right center", fontsize=8,
                  title="exclusive to", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------------ main

def run_contrast(args):
    """--contrast: the table of experts that tell two groups of tokens apart, and the file of them."""
    a, b = load_languages([f"A={split_label(args.contrast[0])[1]}", f"B={split_label(args.contrast[1])[1]}"], args.part)
    frequency = activation_frequency([a["counts"], b["counts"]], [a["num_tokens"], b["num_tokens"]])
    difference, chosen = select_contrast(*frequency, args.tau, args.top)
    layers = a["layers"]
    if not chosen.any():
        raise InputError(f"no expert's frequency differs by more than {args.tau} (the most: {difference.max():.3f}); lower "
                         "--tau, or give --top")
    how = f"the {args.top} largest differences" if args.top else f"difference above {args.tau}"
    print(f"A {args.contrast[0]}  {a['num_tokens']:,} tokens\nB {args.contrast[1]}  {b['num_tokens']:,} tokens\n"
          f"{chosen.sum()} experts in layers {describe(layers[chosen.any(1)])}: {how}\n")
    strongest = np.argsort(-np.abs(np.where(chosen, difference, 0)).ravel(), kind="stable")[:min(20, chosen.sum())]
    print_table(["layer", "expert", "frequency in A", "in B", "difference"], [
        [layers[l], e, f"{frequency[0, l, e]:.3f}", f"{frequency[1, l, e]:.3f}", f"{difference[l, e]:+.3f}"]
        for l, e in zip(*np.divmod(strongest, a["num_experts"]))])
    selection = {"experts": {int(layer): {int(e): round(float(row[e]), 6) for e in np.flatnonzero(c)}
                             for layer, row, c in zip(layers, difference, chosen) if c.any()},
                 "how": how, "A": {key: a[key] for key in ("path", "digest", "num_tokens")},
                 "B": {key: b[key] for key in ("path", "digest", "num_tokens")}}
    write_whole(args.selection, lambda file: file.write(json.dumps(selection, indent=1).encode()))
    print(f"\n{args.selection}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dumps", nargs="*", default=DUMPS, metavar="DUMP", help="path or label=path (default: the tiny model's)")
    p.add_argument("--experts-per-language", type=int, default=EXPERTS_PER_LANGUAGE, help="most frequent experts that are a "
                   "language's own or shared (default: 15/128 of the experts, the paper's)")
    p.add_argument("--threshold", type=float, default=THRESHOLD, help="an expert is exclusive above this share (default: %(default)s)")
    p.add_argument("--bands", nargs="+", metavar="NAME=A-B", help="decoder layers, inclusive (default: first, middle, last tenth)")
    p.add_argument("--part", choices=["all", "prompt", "response"], default="all", help="count only these tokens")
    p.add_argument("--parallel", action="store_true", help="sequence i says the same in all languages: the divergence is "
                   "averaged over sequences, and the bootstrap draws the same ones in all")
    p.add_argument("--bootstrap", type=int, default=0, metavar="N", help="intervals from N draws of sequences, and the floor; 1000")
    p.add_argument("--vocabulary", action="store_true", help="similarity over the tokens that two languages have in common, and "
                   "over the others")
    p.add_argument("--families", metavar="FILE", help="code, tab, family/branch; over the built-in table")
    p.add_argument("--scores", metavar="FILE", help='JSON {"de": 0.9, ...}: correlate with the similarity to --reference')
    p.add_argument("--reference", default=REFERENCE, help="(default: %(default)s)")
    p.add_argument("--figures", metavar="DIR", help="draw heatmaps.png, layers.png and experts.png there; needs matplotlib")
    p.add_argument("--seed", type=int, default=0, help="of the random draws (default: %(default)s)")
    p.add_argument("--out", default=OUT, help="(default: %(default)s)")
    p.add_argument("--contrast", nargs=2, metavar=("A", "B"), help="instead: experts that A's tokens select and B's do not")
    p.add_argument("--tau", type=float, default=TAU, help="of --contrast: select above this difference (default: %(default)s)")
    p.add_argument("--top", type=int, metavar="N", help="of --contrast: select the N largest differences of either sign instead")
    p.add_argument("--selection", default="selection.json", metavar="FILE", help="of --contrast (default: %(default)s)")
    args = p.parse_args()

    for path in (args.selection if args.contrast else args.out, (args.figures or "").rstrip("/")):
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"no such folder: {os.path.dirname(path)}; make it, or give another place")
    if args.top is not None and (not args.contrast or args.top < 1):
        raise InputError("--top takes a number above 0, and --contrast A B")
    if args.figures and os.path.isfile(args.figures):
        raise InputError(f"{args.figures} is a file; --figures takes a folder")
    if args.contrast:
        return run_contrast(args)
    if args.bootstrap and args.bootstrap < 2:
        raise InputError("--bootstrap takes 2 draws or more; 1000 is usual")
    plt = import_matplotlib() if args.figures else None
    table = read_families(args.families)
    dumps = load_languages(args.dumps, args.part)
    languages, layers = [dump["language"] for dump in dumps], dumps[0]["layers"]
    bands = parse_bands(args.bands, layers)
    scores = read_scores(args.scores, languages, args.reference) if args.scores else None
    experts_per_language = args.experts_per_language
    if experts_per_language is None:
        experts_per_language = default_experts_per_language(dumps[0]["num_experts"])
    rng = np.random.default_rng(args.seed)
    frequency = activation_frequency([dump["counts"] for dump in dumps], [dump["num_tokens"] for dump in dumps])
    result, intervals, by_sequence = analyze(frequency, experts_per_language, args.threshold), {}, None
    summary = summarize(result, bands)
    result["order"] = np.array([linkage_order(matrix) for matrix in summary["band_similarity"]])
    if args.bootstrap:
        counts = [sequence_counts(dump, args.part) for dump in tqdm(dumps, desc="reading IDs", leave=False)]
    if args.parallel:
        result["divergence_aligned"], by_sequence = aligned_divergence(read_aligned(dumps, args.part))
        summary["layer_aligned"] = by_sequence.mean(0)
        summary["mean_aligned"] = np.array([summary["layer_aligned"][rows].mean() for rows in bands.values()])
    if args.bootstrap:
        floors = [split_half_floor(c, experts_per_language, rng) for c in counts]
        result |= {f"floor_{measure}": np.stack([floor[measure] for floor in floors]) for measure in MEASURES}
        intervals, result["exclusive_stability"], result["shared_stability"] = bootstrap(
            counts, args.bootstrap, experts_per_language, args.threshold, bands, rng, by_sequence)
    if args.vocabulary:
        result |= vocabulary_control(dumps, args.part)

    print(f"{len(dumps)} languages  {len(layers)} MoE layers  {dumps[0]['num_experts']} experts  top_k {dumps[0]['top_k']}  "
          f"experts_per_language {experts_per_language}  threshold {args.threshold}")
    print_wrapped("tokens  " + "  ".join(f"{dump['language']} {dump['num_tokens']:,}" for dump in dumps))
    if len(dumps) > PRINT_LANGUAGES:
        print(f"note: with more than {PRINT_LANGUAGES} languages, what is as wide as their number is in {args.out} alone")
    if len(dumps) == 1:
        print("note: exclusive and shared are about several languages; one alone has all its experts to itself")
    if args.threshold * len(languages) <= 1:
        print(f"note: shares add up to 1, so with {len(languages)} languages none is shared at a threshold of {args.threshold}; "
              "raise --threshold")
    print_tables(result, summary, intervals, languages, layers, bands)
    if args.vocabulary and len(languages) > 1:
        print_vocabulary(result, bands, layers)
    tests, unknown = families_of_bands(summary, languages, bands, table, np.random.default_rng(args.seed))
    if any(not np.isnan(test[2]) for test in tests):
        print("\nsimilarity of languages of the same family or branch, and of others; p: labels dealt out at random")
        print_table(["", "band", "same", "other", "p"], [[level, band, f"{same:.3f}", f"{other:.3f}", f"{chance:.4f}"]
                                                        for level, band, same, other, chance in tests if not np.isnan(same)])
    if unknown:
        print(f"note: no family known of {', '.join(unknown)}; see --families")
    if scores:
        of, values = [languages.index(language) for language in scores], list(scores.values())
        rng = np.random.default_rng(args.seed)
        result["score_correlation"] = np.array([rank_correlation(similarity[of], values, rng) for similarity in
                                                summary["band_similarity"][:, languages.index(args.reference)]])
        print(f"\nrank correlation of the similarity to {args.reference} with the scores of {len(scores)} languages")
        print_table(["band", "Spearman", "p"], [[band, f"{rho:+.3f}", f"{chance:.4f}"]
                                                for band, (rho, chance) in zip(bands, result["score_correlation"])])

    meta = vars(args) | {"experts_per_language": experts_per_language,
                         "bands": {band: layers[rows].tolist() for band, rows in bands.items()},
                         "inputs": [{key: dump[key] for key in ("language", "path", "digest", "num_tokens")}
                                    for dump in dumps]}
    result |= summary | {f"interval_{key}": value for key, value in intervals.items()}
    result |= {"languages": np.array(languages), "layers": layers, "meta": np.array(json.dumps(meta, ensure_ascii=False)),
               "families": np.array([family_of(language, table) or "" for language in languages]),
               "family_tests": np.array([test[2:] for test in tests]).reshape(-1, len(bands), 3)}
    write_whole(args.out, lambda file: np.savez(file, **result))
    print(f"\n{args.out}")
    if plt:
        os.makedirs(args.figures, exist_ok=True)
        draw_heatmaps(plt, os.path.join(args.figures, "heatmaps.png"), result, summary, languages, layers, bands)
        draw_layers(plt, os.path.join(args.figures, "layers.png"), result, summary, intervals, layers)
        draw_experts(plt, os.path.join(args.figures, "experts.png"), result, languages, layers)
        print(", ".join(os.path.join(args.figures, f"{name}.png") for name in ("heatmaps", "layers", "experts")))


def read_aligned(dumps, part):
    """mean_probs of each language, (sequences, layers, experts), as many in all."""
    if part != "all":
        raise InputError("--parallel takes means over whole sequences; leave out --part")
    probs = []
    for dump in dumps:
        if any(path.endswith(".json") for path in dump["path"]):
            raise InputError(f"{', '.join(dump['path'])} is a recorder's, without single sequences, which --parallel needs")
        with_probs = [np.load(path, allow_pickle=False) for path in dump["path"]]
        if not all("mean_probs" in file for file in with_probs):
            raise InputError(f"{', '.join(dump['path'])} holds no mean_probs, which --parallel needs")
        probs.append(np.concatenate([file["mean_probs"] for file in with_probs]))
    numbers = {dump["language"]: len(p) for dump, p in zip(dumps, probs)}
    if len(set(numbers.values())) > 1:
        raise InputError(f"--parallel takes as many sequences in every language; there are {numbers}")
    return probs


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
