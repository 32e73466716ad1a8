"""
Which experts are a language's own, which are shared, how alike languages are routed, and what is noise.

    python analyze.py                                      # what capture.py wrote for the tiny model
    python analyze.py routing/*.npz --bootstrap 1000 --vocabulary --figures figures
    python analyze.py bn=mgsm_bn.json en=mgsm_en.json --bands early=0-4 middle=22-26 late=43-47
    python analyze.py --contrast math.npz chat.npz         # experts for ablate.py and steer.py

reads   routing dumps      .npz of capture.py, or .json of the paper's recorder; needs numpy, tqdm
writes  analysis.npz       the same figures as arrays, listed at save_analysis; --figures: pictures

Exclusive and shared experts are those of arXiv 2601.14050. All shares depend on which languages are
compared: name the dumps. Under a second; with a thousand bootstrap draws, half a minute.
"""

import argparse
import functools
import hashlib
import itertools
import json
import operator
import os
import re
import sys
import textwrap
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
DUMPS = [f"routing/{language}.npz" for language in "bn de en es fr ja sw zh".split()]
EXPERTS_PER_LANGUAGE = 15 / 128  # the most frequent ones: a part of all below 1 (the paper's), or a
                                 # number: the paper's 15 for MGSM and FLORES, 32 for XQuAD, of 128
THRESHOLD = 0.4        # an expert is exclusive to a language with more than this share; XQuAD: 0.5
REFERENCE = "en"       # with --scores: the similarity to this language is correlated with them
TAU = 0.4              # with --contrast: frequencies differ by more (arXiv 2510.04694)
OUT = "analysis.npz"
PRINT_LANGUAGES = 12   # tables as wide as the number of languages are printed up to so many
HALVINGS = 20          # random ways to split a language in two, for the floor
STABLE = 0.95          # a stable expert stays exclusive, or shared, in so many bootstrap draws
PERMUTATIONS = 10_000  # of labels or scores, at random; up to 8 languages, all there are
# ------------------------------------------------------------------------------------------------
MEASURES = ("similarity", "divergence", "jaccard", "cosine")  # of two languages: pair_measures
# family/branch of the most studied languages, by ISO 639-1 and FLORES codes; --families for others
FAMILIES = {
    "Afro-Asiatic/Chadic": "ha hau", "Afro-Asiatic/Cushitic": "gaz om so som",
    "Afro-Asiatic/Semitic": "am amh ar ara arb he heb mlt mt",
    "Atlantic-Congo/Bantu": "kin lg lin ln lug ny nya rw sn sna sot st sw swa swh tn ts tsn tso xh "
                            "xho zu zul",
    "Atlantic-Congo/Kwa": "ak aka tw twi", "Atlantic-Congo/Senegambian": "ff fuv wo wol",
    "Atlantic-Congo/Volta-Niger": "ibo ig yo yor", "Austroasiatic/Khmer": "khm km",
    "Austroasiatic/Vietic": "vi vie",
    "Austronesian/Malayo-Polynesian": "ceb fil id ind jav jv mg mi mri ms msa plt su sun tgl tl zsm",
    "Basque": "eu eus", "Creole": "hat ht", "Dravidian": "kan kn mal ml ta tam te tel",
    "Indo-European/Albanian": "als sq", "Indo-European/Armenian": "hy hye",
    "Indo-European/Baltic": "lit lt lv lvs", "Indo-European/Celtic": "cy cym ga gle",
    "Indo-European/Germanic": "af afr da dan de deu en eng is isl nb nl nld no nob nor sv swe",
    "Indo-European/Hellenic": "el ell",
    "Indo-European/Indo-Aryan": "as asm ben bn gu guj hi hin mar mr ne npi or ory pa pan si sin ur urd",
    "Indo-European/Iranian": "fa kmr ku pbt pes ps tg tgk",
    "Indo-European/Romance": "ca cat es fr fra gl glg it ita por pt ro ron spa",
    "Indo-European/Slavic": "be bel bg bos bs bul ces cs hr hrv mk mkd pl pol ru rus sk sl slk slv sr "
                            "srp uk ukr",
    "Japonic": "ja jpn", "Kartvelian": "ka kat", "Koreanic": "ko kor", "Mongolic": "khk mn",
    "Sino-Tibetan/Sinitic": "cmn yue zh zho", "Sino-Tibetan/Tibeto-Burman": "bo bod my mya",
    "Tai-Kadai": "lao lo th tha",
    "Turkic": "az azj kaz kir kk ky tat tr tt tur ug uig uz uzn",
    "Uralic/Finnic": "est et fi fin", "Uralic/Hungarian": "hu hun",
}


class InputError(ValueError):
    """Something the user can fix: printed as one line, exit status 1."""


# ---------------------------------------------------------------------------------- reading dumps

def load_languages(paths, part="all"):
    """Dumps of several languages that agree in layers, experts and top_k; shards are added up.

    Returns a list of dicts like load_routing's, one per language, in the order in which they are named.
    """
    shards = {}
    for path in tqdm(paths, desc="dumps", leave=False, disable=len(paths) < 20):
        dump = load_routing(path, part)
        shards.setdefault(dump["language"], []).append(dump)
    first, *others = [dump for group in shards.values() for dump in group]
    for dump in others:
        for key in ("num_experts", "top_k", "layers", "revision"):
            here, there = dump[key], first[key]
            if not np.array_equal(here, there) and here is not None is not there:
                raise InputError(f"{dump['path'][0]} and {first['path'][0]} have other {key} ({here}, "
                                 f"{there}): different models")
    return [add_shards(language, group) for language, group in shards.items()]


def load_routing(path, part="all"):
    """One dump as a dict: language, counts (layers, experts), num_tokens, num_experts, top_k, layers,
    revision, meta, and, one of each shard, path, digest, data_sha256.

    path  an .npz of capture.py; an .npz with only selected_experts (tokens, layers, top_k) and meta;
          a recorder's .json {"layer": {"expert": {"activation_tokens": n}, ..., "total_tokens": n}};
          or any of them as label=path
    part  "prompt" or "response" counts only those tokens of each sequence: takes selected_experts
    """
    label, path = split_label(path)
    if not os.path.isfile(path):
        raise InputError(f"{path} is a folder; name the dumps, as in {path}/*.npz" if os.path.isdir(path)
                         else f"no such dump: {path}; run: python capture.py")
    try:
        read = read_recorder_json(path) if path.endswith(".json") else read_dump(path, part)
        meta, counts, num_tokens, top_k, layers = read
        digest = dump_digest(path)
    except InputError:
        raise
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise InputError(f"{path} is not a whole routing dump; give an .npz of capture.py or the .json "
                         "of the paper's recorder") from error
    if num_tokens == 0:
        raise InputError(f"{path} holds no {'' if part == 'all' else part + ' '}tokens")
    return {"language": label or meta["language"], "counts": counts, "num_tokens": num_tokens,
            "num_experts": counts.shape[1], "top_k": top_k, "layers": layers, "meta": meta,
            "revision": meta.get("revision"), "path": [path], "digest": [digest],
            "data_sha256": [meta.get("data_sha256")]}


def split_label(path):
    """"bn=a/b.npz" -> ("bn", "a/b.npz"); a path that exists as it is has no label."""
    label, equals, rest = str(path).partition("=")
    return (label, rest) if equals and not os.path.exists(path) else (None, str(path))


def dump_digest(path):
    """What tells dumps apart. Of an .npz a hash of its table of contents, which has a checksum of each
    array: gigabytes of IDs need not be read for it.
    """
    if path.endswith(".json"):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    with ZipFile(path) as file:
        contents = [(entry.filename, entry.file_size, entry.CRC) for entry in file.infolist()]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def read_dump(path, part):
    """(meta, counts, num_tokens, top_k, layers) of an .npz, checked."""
    with np.load(path, allow_pickle=False) as file:
        meta, layers = json.loads(str(file["meta"])), file.get("layers")
        if meta.get("format", 1) != 1:
            raise InputError(f"{path} is of format {meta['format']}; this analyze.py reads format 1")
        if part == "all" and "counts" in file:
            counts, num_tokens, top_k = file["counts"], int(file["sequence_offsets"][-1]), meta["top_k"]
        else:
            selected, num_experts = read_tokens(path, part, f"--part {part}")[0], meta["num_experts"]
            if selected.max(initial=0) >= num_experts:
                raise InputError(f"{path}: expert ID {selected.max()}, but num_experts in its meta is "
                                 f"{num_experts}")
            num_tokens, _, top_k = selected.shape
            counts = grouped_counts(selected, np.zeros(num_tokens, int), 1, num_experts)[0]
    if not (counts.sum(1) == num_tokens * top_k).all():
        raise InputError(f"{path}: counts do not add up to {num_tokens} tokens * top_k {top_k}; capture "
                         "it again")
    return meta, counts, num_tokens, top_k, np.arange(len(counts)) if layers is None else layers


def read_recorder_json(path):
    """The same of the paper's recorder. It summed in bfloat16: the counts are near, and need not add up."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    layers = sorted(record, key=int)
    experts = sorted(record[layers[0]].keys() - {"total_tokens"}, key=int)
    counts = [[record[layer][expert]["activation_tokens"] for expert in experts] for layer in layers]
    num_tokens = {int(record[layer]["total_tokens"]) for layer in layers}
    if len(num_tokens) != 1:
        raise InputError(f"{path}: total_tokens differs between layers: {sorted(num_tokens)}")
    counts, num_tokens = np.array(counts, np.int64), num_tokens.pop()
    return ({"language": Path(path).stem}, counts, num_tokens,
            round(counts.sum() / len(layers) / max(num_tokens, 1)), np.array(layers, np.int32))


def read_tokens(path, part, flag):
    """(selected_experts (tokens, layers, top_k), token_ids (tokens,) or None, sequence of each token)."""
    if path.endswith(".json"):
        raise InputError(f"{path} is a recorder's, without single tokens, which {flag} needs")
    with np.load(path, allow_pickle=False) as file:
        if "selected_experts" not in file:
            raise InputError(f"{path} holds no selected_experts, which {flag} needs; capture without "
                             "--stats-only")
        selected, token_ids = file["selected_experts"], file.get("token_ids")
        offsets, prompt = file.get("sequence_offsets", [0, len(selected)]), file.get("prompt_lengths")
    sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if part == "all":
        return selected, token_ids, sequence
    if prompt is None:
        raise InputError(f"{path} holds no prompt_lengths, which --part {part} needs")
    in_prompt = np.arange(len(selected)) - offsets[sequence] < prompt[sequence]
    keep = in_prompt == (part == "prompt")
    return selected[keep], None if token_ids is None else token_ids[keep], sequence[keep]


def grouped_counts(selected_experts, group, num_groups, num_experts):
    """How many tokens of each group selected each expert: int64 (groups, layers, experts).

    selected_experts (tokens, layers, top_k), group (tokens,)
    """
    counts = [np.bincount((group[:, None] * num_experts + selected).ravel(),
                          minlength=num_groups * num_experts).reshape(num_groups, num_experts)
              for selected in selected_experts.swapaxes(0, 1)]
    return np.stack(counts, 1)


def add_shards(language, group):
    """The dumps of one language as one: a whole, or all shards of it, in order."""
    shards = {dump["meta"].get("shard", "1/1"): dump for dump in group}
    parts = [f"{i}/{len(group)}" for i in range(1, len(group) + 1)]
    if shards.keys() != set(parts) or len({dump["data_sha256"][0] for dump in group}) > 1:
        raise InputError(f"'{language}' has the dumps {', '.join(d['path'][0] for d in group)} (shards "
                         f"{', '.join(shards)}): not one whole, nor all the shards of one; label=path "
                         "tells languages apart")
    keys = ("counts", "num_tokens", "path", "digest", "data_sha256")
    return group[0] | {key: functools.reduce(operator.add, (shards[part][key] for part in parts))
                       for key in keys}


def sequence_counts(dump, part):
    """float32 (sequences, layers, experts) of a language; sequences without such tokens are left out."""
    counts = []
    for path in dump["path"]:
        selected, _, sequence = read_tokens(path, part, "--bootstrap")
        present, group = np.unique(sequence, return_inverse=True)
        counts.append(grouped_counts(selected, group, len(present), dump["num_experts"]))
    counts = np.concatenate(counts).astype(np.float32)
    if len(counts) < 2:
        raise InputError(f"'{dump['language']}' has one sequence; --bootstrap resamples sequences")
    return counts


def read_aligned(dumps, part):
    """mean_probs of each language, (sequences, layers, experts), as many in all."""
    if part != "all":
        raise InputError("--parallel takes means over whole sequences; leave out --part")
    probs = {}
    for dump in dumps:
        for path in dump["path"]:
            file = {} if path.endswith(".json") else np.load(path, allow_pickle=False)
            if "mean_probs" not in file:
                raise InputError(f"{path} holds no mean_probs, which --parallel needs")
            probs.setdefault(dump["language"], []).append(file["mean_probs"])
    probs = {language: np.concatenate(shards) for language, shards in probs.items()}
    if len({len(p) for p in probs.values()}) > 1:
        raise InputError("--parallel takes as many sequences in every language; there are "
                         f"{ {language: len(p) for language, p in probs.items()} }")
    return list(probs.values())


# ---------------------------------------------------------------- definitions (arXiv 2601.14050)

def activation_frequency(counts, num_tokens):
    """Part of the tokens that select each expert; a row sums to top_k.

    counts (..., layers, experts), num_tokens a number or (...) -> float64 (..., layers, experts)
    [[3, 1]] of 4 tokens -> [[.75, .25]]
    """
    return np.asarray(counts, np.float64) / np.asarray(num_tokens, np.float64)[..., None, None]


def number_of_experts(experts_per_language, num_experts):
    """experts_per_language as a number: 15 is 15; 15/128, being below 1, is 4 of 32 experts."""
    part = 0 < experts_per_language < 1
    number = max(1, round(experts_per_language * num_experts)) if part else experts_per_language
    if number not in range(1, num_experts + 1):
        raise InputError(f"experts_per_language {experts_per_language:g} is neither a number from 1 to "
                         f"the {num_experts} experts nor a part of them below 1")
    return int(number)


def most_frequent(frequency, experts_per_language):
    """bool (languages, layers, experts): each language's most frequent experts; of ties the lower index."""
    number = number_of_experts(experts_per_language, frequency.shape[-1])
    kept = np.zeros(frequency.shape, bool)
    order = np.argsort(-frequency, axis=-1, kind="stable")
    np.put_along_axis(kept, order[..., :number], True, -1)
    return kept


def language_shares(frequency, experts_per_language):
    """Each language's part in an expert's use, over the experts that rank among its most frequent.

    frequency (languages, layers, experts) -> (languages, layers, experts); sums over languages are 1,
    or 0 where no language keeps the expert. experts_per_language: a number, or a part below 1.
    [[[.6, .4]], [[.2, .8]]] with 1 expert each -> [[[1, 0]], [[0, 1]]]
    """
    kept = np.where(most_frequent(frequency, experts_per_language), frequency, 0)
    total = kept.sum(0)
    return np.divide(kept, total, out=np.zeros_like(kept), where=total > 0)


def exclusive_experts(share, threshold):
    """Experts of whose use a language has more than the threshold; bool like share (..., experts).

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


# --------------------------------------------------------------------------------------- measures

def entropy_bits(p):
    """Shannon entropy over the last axis, in bits. [.5, .5, 0] -> 1"""
    return -(p * np.log2(np.maximum(p, np.finfo(p.dtype).tiny))).sum(-1)


def jensen_shannon_similarity(p, q, mean_entropy=None):
    """1 - Jensen-Shannon divergence in bits, over the last axis: 1 is the same, 0 nothing in common.

    mean_entropy of p and q, where it is known. [.5, .5, 0] and [0, .5, .5] -> .5
    """
    if mean_entropy is None:
        mean_entropy = (entropy_bits(p) + entropy_bits(q)) / 2
    return 1 - entropy_bits((p + q) / 2) + mean_entropy


def normalized_divergence(similarity, mean_entropy, num_experts):
    """Jensen-Shannon divergence over the room that entropy leaves it, JSD / (log E - (H(p) + H(q)) / 2).

    arXiv 2510.04694. 0 is the same distribution, 1 the most by which two of such entropies can
    differ; two uniform distributions have no room and do not differ: 0. [1, 0] and [0, 1] -> 1
    """
    room = np.log2(num_experts) - mean_entropy
    return np.divide(1 - similarity, room, out=np.zeros_like(room), where=room > 1e-12)


def pair_measures(frequency, experts_per_language):
    """{measure: (layers, languages, languages)} of every pair, from frequency (languages, layers, experts).

    similarity  1 - Jensen-Shannon divergence, in bits, of the languages' parts of the routing
    divergence  the same divergence normalised by entropy; 0 is alike
    jaccard     of the sets of each language's most frequent experts
    cosine      of the frequencies
    """
    n, layers, num_experts = frequency.shape
    p = frequency / frequency.sum(-1, keepdims=True)
    entropy, similarity = entropy_bits(p), np.ones((layers, n, n))
    mean_entropy = (entropy.T[:, :, None] + entropy.T[:, None]) / 2
    for i in range(n - 1):
        others = jensen_shannon_similarity(p[i], p[i + 1:], mean_entropy[:, i, i + 1:].T).T
        similarity[:, i, i + 1:] = similarity[:, i + 1:, i] = others
    kept = most_frequent(frequency, experts_per_language).transpose(1, 0, 2).astype(np.float32)
    in_both = (kept @ kept.transpose(0, 2, 1)).astype(np.float64)
    unit = (frequency / np.linalg.norm(frequency, axis=-1, keepdims=True)).transpose(1, 0, 2)
    return {"similarity": similarity,
            "divergence": normalized_divergence(similarity, mean_entropy, num_experts),
            "jaccard": in_both / (2 * kept.sum(-1)[:, :1, None] - in_both),
            "cosine": unit @ unit.transpose(0, 2, 1)}


def aligned_divergence(mean_probs):
    """normalized_divergence averaged over aligned sequences, as 2510.04694 has it for parallel data.

    mean_probs: of each language (sequences, layers, experts) -> (layers, languages, languages), and
    the mean over pairs sequence by sequence (sequences, layers)
    """
    n, (sequences, layers, num_experts) = len(mean_probs), mean_probs[0].shape
    divergence, by_sequence = np.zeros((layers, n, n)), np.zeros((sequences, layers))
    pairs = list(itertools.combinations(range(n), 2))
    for i, j in tqdm(pairs, desc="parallel", unit="pair", leave=False):
        p, q = mean_probs[i].astype(np.float64), mean_probs[j].astype(np.float64)
        mean_entropy = (entropy_bits(p) + entropy_bits(q)) / 2
        similarity = jensen_shannon_similarity(p, q, mean_entropy)
        each = normalized_divergence(similarity, mean_entropy, num_experts)
        divergence[:, i, j] = divergence[:, j, i] = each.mean(0)
        by_sequence += each / len(pairs)
    return divergence, by_sequence


def mean_of_pairs(matrix):
    """Mean over pairs of different languages, nan left out: (..., n, n) -> (...); nan without any pair."""
    pairs = matrix[..., ~np.eye(matrix.shape[-1], dtype=bool)]
    number = (~np.isnan(pairs)).sum(-1)
    return np.divide(np.nansum(pairs, -1), number, out=np.full(number.shape, np.nan), where=number > 0)


def analyze(frequency, experts_per_language, threshold):
    """Everything that depends on frequency (languages, layers, experts) alone: see save_analysis."""
    share = language_shares(frequency, experts_per_language)
    exclusive, shared = exclusive_experts(share, threshold), shared_experts(share, threshold)
    p = frequency / frequency.sum(-1, keepdims=True)
    to_exclusive, to_shared = (p * exclusive).sum(-1), (p * shared).sum(-1)
    return pair_measures(frequency, experts_per_language) | {
        "frequency": frequency, "share": share, "exclusive": exclusive, "shared": shared,
        "entropy": entropy_bits(p) / np.log2(p.shape[-1]),
        "reliance": np.stack([to_exclusive, to_shared, 1 - to_exclusive - to_shared], -1),
        "most_used": p.max(-1), "active": (frequency > 0).sum(-1)}


def summarize(result, bands):
    """The figures that get an interval: means over bands and pairs, parts of the routing, numbers of experts."""
    exclusive, shared = result["exclusive"], result["shared"]
    summary = {
        "entropy": result["entropy"], "mean_entropy": result["entropy"].mean(0),
        "mean_reliance": result["reliance"].mean(1), "num_exclusive": exclusive.sum((1, 2)),
        "num_shared": (shared & (result["share"] > 0)).sum((1, 2)),
        "layer_exclusive": exclusive.sum((0, 2)), "layer_shared": shared.sum(-1)}
    for measure in MEASURES:
        summary[f"band_{measure}"] = band_means(result[measure], bands)
        summary[f"mean_{measure}"] = mean_of_pairs(summary[f"band_{measure}"])
        summary[f"layer_{measure}"] = mean_of_pairs(result[measure])
    return summary


def band_means(values, bands):
    """(layers, ...) -> (bands, ...)"""
    return np.stack([values[rows].mean(0) for rows in bands.values()])


def linkage_order(similarity):
    """Languages in the order of average-linkage clustering (UPGMA) of similarity (n, n), nearest ends joined."""
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


def vocabulary_control(dumps, part):
    """Similarity over only the tokens whose ids do not occur in the other language, and over only those that do.

    -> similarity_own_tokens, similarity_common_tokens (layers, languages, languages), nan without such
    tokens; common_tokens (languages, languages), the part of the row's tokens that the column has, too
    """
    def tokens(dump):
        read = [read_tokens(path, part, "--vocabulary") for path in dump["path"]]
        if any(ids is None for _, ids, _ in read):
            raise InputError(f"{', '.join(dump['path'])} holds no token_ids, which --vocabulary needs")
        return [np.concatenate(arrays) for arrays in list(zip(*read))[:2]]

    n, (layers, num_experts) = len(dumps), dumps[0]["counts"].shape
    vocabularies = [np.unique(tokens(dump)[1]) for dump in dumps]
    shared = np.zeros((n, n, layers, num_experts))  # selections of the row's tokens that both have
    for a, dump in enumerate(tqdm(dumps, desc="vocabulary", leave=False)):
        selected, ids = tokens(dump)
        in_other = np.array([np.isin(vocabularies[a], v) for v in vocabularies], np.float64)
        kind = np.searchsorted(vocabularies[a], ids)
        for layer in range(layers):  # one at a time: types of tokens times experts are many
            by_type = grouped_counts(selected[:, [layer]], kind, len(vocabularies[a]), num_experts)
            shared[a, :, layer] = in_other @ by_type[:, 0]
    every = shared[range(n), range(n)][:, None]
    result = {"common_tokens": shared.sum((2, 3)) / every.sum((2, 3))}
    for name, counts in (("own", every - shared), ("common", shared)):
        total = counts.sum(-1, keepdims=True)
        p = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
        similarity = jensen_shannon_similarity(p, p.swapaxes(0, 1))
        result[f"similarity_{name}_tokens"] = similarity.transpose(2, 0, 1)
    return result


def select_contrast(frequency_a, frequency_b, tau=TAU, top=None):
    """(difference, chosen), both (layers, experts): by how much more tokens of A than of B select an expert.

    top  the so many largest differences, whatever their sign: SteerMoE's risk difference, 2509.09660
    tau  else, the experts with a difference above tau: the task experts of arXiv 2510.04694
    """
    difference = frequency_a - frequency_b
    if top is None:
        return difference, difference > tau
    chosen = np.zeros(difference.size, bool)
    chosen[np.argsort(-np.abs(difference).ravel(), kind="stable")[:top]] = True
    return difference, chosen.reshape(difference.shape)


def load_selection(path, layers, num_experts):
    """What --contrast wrote: float64 (layers, experts), the difference of a selected expert, else 0."""
    differences = np.zeros((len(layers), num_experts))
    try:
        experts = json.loads(Path(path).read_text(encoding="utf-8"))["experts"]
        chosen = [(int(l), int(e), float(d)) for l, row in experts.items() for e, d in row.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no selection of experts; run: python analyze.py --contrast A.npz "
                         "B.npz") from error
    for layer, expert, difference in chosen:
        if layer not in layers or not 0 <= expert < num_experts:
            raise InputError(f"{path} names expert {expert} of layer {layer}; this model has "
                             f"{num_experts} experts in layers {describe(layers)}")
        differences[list(layers).index(layer), expert] = difference
    return differences


# ---------------------------------------------------------------------------------- what is noise

def split_half_floor(counts, experts_per_language, rng):
    """How alike a language is to itself: {measure: (layers,)} of two random halves of its sequences.

    counts (sequences, layers, experts); the mean over HALVINGS. A half has half of the data, so the
    whole is more like itself than this.
    """
    floors = []
    for _ in range(HALVINGS):
        order = np.array_split(rng.permutation(len(counts)), 2)
        halves = np.stack([counts[half].sum(0, dtype=np.float64) for half in order])
        floors.append(pair_measures(halves / halves.sum(-1, keepdims=True), experts_per_language))
    return {m: np.mean([floor[m][:, 0, 1] for floor in floors], 0) for m in MEASURES}


def bootstrap(counts, draws, experts_per_language, threshold, bands, rng, by_sequence=None):
    """95 % intervals of summarize()'s figures, and how often experts stay what they are, over draws of sequences.

    counts       of each language (sequences, layers, experts)
    by_sequence  aligned_divergence's: the languages are parallel, and the same sequences are drawn in all
    -> {figure: (low and high, ...)}, the part of the draws in which an expert is exclusive (languages,
    layers, experts) and is shared (layers, experts). Intervals are the estimate less the draws' bias,
    1.96 of their standard deviations to both sides (the normal bootstrap interval): two samples of few
    tokens look less alike than what they were taken from.
    """
    flat, drawn, exclusive, shared = [c.reshape(len(c), -1) for c in counts], [], 0, 0

    def figures(totals, weights):
        """Of one draw: totals (languages, layers * experts), weights of the parallel sequences."""
        totals = totals.reshape(len(counts), *counts[0].shape[1:])
        result = analyze(totals / totals.sum(-1, keepdims=True), experts_per_language, threshold)
        aligned = {} if by_sequence is None else summarize_aligned(by_sequence, bands, weights)
        return result, summarize(result, bands) | aligned

    for start in tqdm(range(0, draws, 50), desc="bootstrap", unit="50 draws", leave=False):
        number = min(50, draws - start)
        if by_sequence is None:
            weights = [resample(len(c), number, rng) for c in flat]
        else:
            weights = [resample(len(flat[0]), number, rng)] * len(flat)
        totals = np.stack([w @ c for w, c in zip(weights, flat)], 1, dtype=np.float64)
        for total, weight in zip(totals, weights[0]):
            result, summary = figures(total, weight)
            drawn.append(summary)
            exclusive, shared = exclusive + result["exclusive"], shared + result["shared"]
    whole = np.stack([c.sum(0, dtype=np.float64) for c in flat])
    estimate, intervals = figures(whole, np.ones(len(flat[0])))[1], {}
    for key, value in estimate.items():
        values = np.array([summary[key] for summary in drawn])
        middle, half = 2 * value - values.mean(0), 1.96 * values.std(0, ddof=1)
        most = np.inf if np.issubdtype(value.dtype, np.integer) else 1  # a number of experts, or a part
        intervals[key] = np.clip([middle - half, middle + half], 0, most)
    return intervals, exclusive / draws, shared / draws


def resample(n, draws, rng):
    """How often each of n sequences is drawn, float32 (draws, n), n with replacement."""
    return rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32)


def summarize_aligned(by_sequence, bands, weights):
    """Mean aligned divergence by layer and by band, of sequences with weights."""
    layers = weights @ by_sequence / len(by_sequence)
    return {"layer_aligned": layers, "mean_aligned": band_means(layers, bands)}


def permutations(n, rng):
    """(permutations, n), the identity first: all of them up to n = 8, else PERMUTATIONS random ones."""
    if n <= 8:
        return np.array(list(itertools.permutations(range(n))))
    return np.stack([np.arange(n)] + [rng.permutation(n) for _ in range(PERMUTATIONS)])


def family_test(similarity, labels, rng):
    """(mean similarity within groups, between groups, p): how often labels dealt out at random separate as well.

    similarity (n, n), labels a group for each of n languages. nan without a pair within, or between.
    """
    i, j = np.triu_indices(len(labels), 1)
    groups, values = np.unique(labels, return_inverse=True)[1], similarity[i, j]
    same = groups[i] == groups[j]
    if same.all() or not same.any():
        return np.nan, np.nan, np.nan
    gaps = []
    for dealt in np.array_split(groups[permutations(len(labels), rng)], 50):
        within = dealt[:, i] == dealt[:, j]
        gaps.append(within @ values / same.sum() - ~within @ values / (~same).sum())
    gaps = np.concatenate(gaps)
    return values[same].mean(), values[~same].mean(), np.mean(gaps >= gaps[0] - 1e-12)


def family_tests(band_similarity, families, rng):
    """family_test's three figures, (levels, bands, 3): of families and, where they differ, of branches.

    families (languages,) of "family/branch", or "" where none is known: those are left out.
    """
    known = np.array([bool(family) for family in families])
    branches = [family for family in families if family]
    levels = [[family.split("/")[0] for family in branches], branches]
    return np.array([[family_test(similarity[known][:, known], labels, rng)
                      for similarity in band_similarity] for labels in levels[:1 + (levels[0] != levels[1])]])


def rank_correlation(x, y, rng):
    """(Spearman's rho, two-sided permutation p) of two series; ties get their mean rank."""
    def centred_ranks(values):
        values = np.asarray(values, float)
        ranks = (values[:, None] > values).sum(1) + (values[:, None] == values).sum(1) / 2
        return (ranks - ranks.mean()) / max(np.linalg.norm(ranks - ranks.mean()), 1e-300)
    x, y = centred_ranks(x), centred_ranks(y)
    rho = y[permutations(len(y), rng)] @ x
    return rho[0], np.mean(np.abs(rho) >= abs(rho[0]) - 1e-12)


# ----------------------------------------------------------------------------------------- tables

def texts(result, key, *index, scale=1, digits=3):
    """["0.776 [.772 .781]", ...]: a series of figures and, after a bootstrap, their intervals."""
    series = [value[index] for value in (result[key], *result.get(f"interval_{key}", ()))]
    rows = [[f"{scale * value:.{digits}f}" for value in values] for values in zip(*series)]
    return [f"{value} [{' '.join(b.lstrip('0') for b in bounds)}]" if bounds else value
            for value, *bounds in rows]


def print_table(columns, first=9):
    """{title: cells} as wide as their widest entry, right-aligned but for the first column."""
    rows = [[str(cell) for cell in row] for row in (columns, *zip(*columns.values()))]
    widths = [max(map(len, column)) + 2 for column in zip(*rows)]
    for name, *cells in rows:
        print(f"{name:<{max(first, widths[0])}}" + "".join(map(str.rjust, cells, widths[1:])))


def print_wrapped(text):
    print(textwrap.fill(text, 100, subsequent_indent="        ", break_long_words=False,
                        break_on_hyphens=False))


def print_bands(result, bands, languages, layers):
    """Means over pairs; the matrix of every band, or of many languages their order alone."""
    described = [describe(layers[rows]) for rows in bands.values()]
    columns = {"band": bands, "layers": described, "similarity": texts(result, "mean_similarity")}
    print("\nmeans over pairs of languages" + (
        " [95 % interval]; floor: similarity of random halves of a language" if "band_floor" in result else "")
        + ("\nthe divergence is that of aligned sequences" if "mean_aligned" in result else ""))
    if "band_floor" in result:
        columns["floor"] = texts(result, "band_floor")
    columns |= {measure: texts(result, f"mean_{measure}") for measure in MEASURES[1:]}
    if "mean_aligned" in result:
        columns["divergence"] = texts(result, "mean_aligned")
    print_table(columns)
    few = len(languages) <= PRINT_LANGUAGES
    for band, rows, matrix, order in zip(bands, described, result["band_similarity"], result["order"]):
        print()
        print_wrapped(f"{'similarity' if few else 'languages'}, {band} (layers {rows}); in order of "
                      f"average linkage: {' '.join(languages[i] for i in order)}")
        if few:
            columns = {name: [f"{value:.2f}" for value in line] for name, line in zip(languages, matrix)}
            print_table({"": languages} | columns)


def print_layers(result, languages, layers):
    series = {"similarity": result["layer_similarity"], "floor": result.get("layer_floor"),
              "entropy": result["mean_entropy"], "shared": result["layer_shared"],
              "excl.": result["layer_exclusive"]}
    if len(languages) <= PRINT_LANGUAGES:
        series |= zip(languages, result["exclusive"].sum(-1))
    columns = {"layer": [*layers, "all"]}
    for title, values in series.items():
        if values is not None and values.dtype.kind == "f":
            columns[title] = [f"{value:.3f}" for value in (*values, values.mean())]
        elif values is not None:
            columns[title] = [*values, values.sum()]
    columns["similarity"][:-1] = texts(result, "layer_similarity")
    print()
    print_table(columns, first=7)


def print_languages(result, bands, languages):
    stable = "num_stable" in result
    print("\npart of the routing (%) to experts that are exclusive to the language, shared, or neither; "
          "number of experts" + (f"\n(stable in {STABLE:.0%} of draws)" if stable else "")
          + "; top: part (%) of the most used one, active: how many are in use, mean over layers")
    columns = {"": languages}
    for k, title in enumerate(("exclusive", "shared", "neither")):
        columns[title] = texts(result, "mean_reliance", slice(None), k, scale=100, digits=1)
    for k, key in enumerate(("num_exclusive", "num_shared")):
        columns[key.replace("num_", "n ")] = [f"{n} ({s})" for n, s in zip(result[key], result[
            "num_stable"][:, k])] if stable else result[key]
    columns["top"] = [f"{100 * value:.1f}" for value in result["most_used"].mean(1)]
    columns["active"] = [f"{value:.1f}" for value in result["active"].mean(1)]
    print_table(columns)
    if len(languages) > 1:
        print("\nnearest language, and its similarity")
        nearest = zip(bands, result["band_similarity"] - 2 * np.eye(len(languages)))
        print_table({"": languages} | {band: [f"{languages[line.argmax()]} {line.max():.2f}" for line in matrix]
                                       for band, matrix in nearest})


def print_vocabulary(result, bands):
    """Is it the words? Means over pairs and layers of a band, as far as a pair has such tokens."""
    print(f"\nsimilarity over tokens whose ids ({mean_of_pairs(result['common_tokens']):.1%} of them "
          "common to a pair, on average)")
    titles = {"are any": "", "are common": "_common_tokens", "are the language's own": "_own_tokens"}
    print_table({"band": bands} | {title: [
        f"{np.nanmean(mean_of_pairs(result[f'similarity{key}'][rows])):.3f}" for rows in bands.values()]
        for title, key in titles.items()})


def print_tests(result, bands, languages):
    rows = [(level, band, f"{same:.3f}", f"{other:.3f}", f"{p:.4f}")
            for level, tests in zip(("family", "branch"), result["family_tests"])
            for band, (same, other, p) in zip(bands, tests) if not np.isnan(p)]
    if rows:
        print("\nsimilarity of languages of the same family or branch, and of others; p: labels dealt "
              "out at random")
        print_table(dict(zip(("", "band", "same", "other", "p"), zip(*rows))))
    unknown = [language for language, family in zip(languages, result["families"]) if not family]
    if unknown:
        print_wrapped(f"note: no family known of {', '.join(unknown)}; see --families")
    if "score_correlation" in result:
        print(f"\nrank correlation of the similarity to {REFERENCE} with the scores")
        rho, p = result["score_correlation"].T
        print_table({"band": bands, "Spearman": [f"{r:+.3f}" for r in rho], "p": [f"{x:.4f}" for x in p]})


def report(result, dumps, bands, args):
    """All tables, and what to know about them."""
    languages, first = [dump["language"] for dump in dumps], dumps[0]
    print(f"{len(dumps)} languages  {len(first['layers'])} MoE layers  {first['num_experts']} experts  "
          f"top_k {first['top_k']}  experts_per_language {args.experts_per_language}  "
          f"threshold {args.threshold}")
    print_wrapped("tokens  " + "  ".join(f"{d['language']} {d['num_tokens']:,}" for d in dumps))
    if len(dumps) > PRINT_LANGUAGES:
        print(f"note: with more than {PRINT_LANGUAGES} languages, what is as wide as their number is in "
              f"{args.out} alone")
    if args.threshold * len(dumps) <= 1:
        print(f"note: shares add up to 1, so with {len(dumps)} languages none is shared at a threshold of "
              f"{args.threshold}; raise --threshold")
    print_bands(result, bands, languages, first["layers"])
    print_layers(result, languages, first["layers"])
    print_languages(result, bands, languages)
    if "common_tokens" in result and len(dumps) > 1:
        print_vocabulary(result, bands)
    print_tests(result, bands, languages)


# --------------------------------------------------------------------------------------- pictures

def import_matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("--figures needs matplotlib; run: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def draw_heatmaps(plt, result, languages, layers, bands):
    """Similarity of every pair, a panel per band, all in the linkage order of the mean over layers."""
    order, n = linkage_order(result["similarity"].mean(0)), len(languages)
    names, side = [languages[i] for i in order], max(3.2, 0.16 * n + 1.5)
    figure, axes = plt.subplots(1, len(bands), squeeze=False, layout="constrained",
                                figsize=(side * len(bands) + 1, side + 0.6))
    for axis, (band, rows), matrix in zip(axes[0], bands.items(), result["band_similarity"]):
        image = axis.imshow(matrix[np.ix_(order, order)], vmin=result["band_similarity"].min(), vmax=1,
                            cmap="cividis")
        axis.set_xticks(range(n), names, rotation=90 if n > 12 else 0, fontsize=9 if n <= 30 else 6)
        axis.set_yticks(range(n), names, fontsize=9 if n <= 30 else 6)
        axis.set_title(f"{band}, layers {describe(layers[rows])}")
    figure.colorbar(image, ax=axes[0], label="routing similarity, 1 - JSD", shrink=0.8)
    return figure


def draw_layers(plt, result, layers):
    """The profile over layers: similarity with its interval and floor, entropy, numbers of experts."""
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    lines = {"layer_similarity": (0, "pairs of languages", "#332288"),
             "layer_floor": (0, "floor: halves of one language", "#CC6677"),
             "mean_entropy": (1, "mean of languages", "#117733"),
             "layer_exclusive": (2, "exclusive, all languages", "#CC6677"),
             "layer_shared": (2, "shared", "#332288")}
    for key, (row, label, colour) in lines.items():
        if key in result:
            axes[row].plot(layers, result[key], color=colour, marker="o", markersize=3, label=label)
        if f"interval_{key}" in result:
            axes[row].fill_between(layers, *result[f"interval_{key}"], color=colour, alpha=0.25,
                                   linewidth=0, label="95 % interval")
    for axis, label in zip(axes, ("routing similarity, 1 - JSD", "routing entropy / log E", "experts")):
        axis.set_ylabel(label)
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    axes[2].set_xlabel("decoder layer")
    return figure


def draw_experts(plt, result, languages, layers):
    """Layers x experts, each coloured by the language it is exclusive to (of two, the larger share), or
    as shared; of many languages the first twenty by number are told apart.
    """
    owner = np.where(result["exclusive"], result["share"], 0).argmax(0)
    kind = np.where(result["exclusive"].any(0), owner + 2, result["shared"].astype(int))
    figure, axis = plt.subplots(layout="constrained", figsize=(
        min(14, max(7, kind.shape[1] * 0.075 + 3)), max(3, len(layers) * 0.13 + 1.4)))
    colours = ["#EEEEEE", "#000000", *plt.get_cmap("tab20")(np.arange(len(languages)) % 20)]
    axis.pcolormesh(np.arange(kind.shape[1]), np.arange(len(layers)), kind, vmin=0, vmax=len(colours) - 1,
                    cmap=plt.matplotlib.colors.ListedColormap(colours), edgecolors="white", linewidth=0.3)
    steps = np.unique(np.linspace(0, len(layers) - 1, 13).round().astype(int))
    axis.set_yticks(steps, layers[steps])
    axis.set_xlabel("expert")
    axis.set_ylabel("decoder layer")
    labels = ["neither", "shared", *languages]
    figure.legend(handles=[plt.Rectangle((0, 0), 1, 1, color=colours[k], label=f"{labels[k]} ({(kind == k).sum()})")
                           for k in (*range(2, len(labels)), 1, 0)][:22],
                  loc="outside right center", fontsize=8, title="exclusive to", frameon=False)
    return figure


def save_figures(plt, folder, result, languages, layers, bands):
    """heatmaps.png, layers.png and experts.png in a folder; returns their paths."""
    os.makedirs(folder, exist_ok=True)
    figures = {"heatmaps": draw_heatmaps(plt, result, languages, layers, bands),
               "layers": draw_layers(plt, result, layers),
               "experts": draw_experts(plt, result, languages, layers)}
    for name, figure in figures.items():
        figure.savefig(os.path.join(folder, f"{name}.png"), dpi=120)
        plt.close(figure)
    return [os.path.join(folder, f"{name}.png") for name in figures]


# ------------------------------------------------------------------------------------------- main

def parse_bands(texts, layers):
    """["early=0-4", ...] -> {"early": bool (layers,)}: the rows of decoder layers 0 to 4, both inclusive.

    None gives the first, middle and last tenth of the rows, at least one each. InputError if a band
    holds no MoE layer.
    """
    if texts is None:
        n, size = len(layers), max(1, round(len(layers) / 10))
        starts = {"early": 0, "middle": (n - size + 1) // 2, "late": n - size}
        return {name: np.isin(np.arange(n), range(first, first + size)) for name, first in starts.items()}
    bands = {}
    for text in texts:
        match = re.fullmatch(r"(?:(.+)=)?(\d+)(?:-(\d+))?", text)
        if not match:
            raise InputError(f"band '{text}' is neither FIRST-LAST nor NAME=FIRST-LAST, such as "
                             "middle=22-26")
        first, last = int(match[2]), int(match[3] or match[2])
        rows = (layers >= first) & (layers <= last)
        if last > max(layers) or not rows.any():
            raise InputError(f"band '{text}' does not hold MoE layers of this model, which has "
                             f"{describe(layers)}")
        bands[match[1] or text] = rows
    return bands


def describe(layers):
    """[0, 1, 2, 5] -> "0-2 5"."""
    runs = np.split(layers, np.flatnonzero(np.diff(layers) != 1) + 1)
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def read_families(path=None):
    """{code: family/branch} of a file with code, tab, family and optionally /branch, over FAMILIES."""
    table = {code: family for family, codes in FAMILIES.items() for code in codes.split()}
    lines = Path(path).read_text(encoding="utf-8").splitlines() if path else []
    for number, line in enumerate(lines, 1):
        code, _, family = line.strip().partition("\t")
        if not family.strip():
            raise InputError(f"{path}:{number}: not a code, a tab and a family, as "
                             "'de<tab>Indo-European/Germanic'")
        table[code] = family.strip()
    return table


def family_of(language, table):
    """"Indo-European/Germanic" for "de", "deu_Latn" or "de-AT"; "" if the table does not know it."""
    return table.get(language) or table.get(re.split("[-_]", language)[0], "")


def read_scores(path, languages, reference):
    """(indices, scores) of the languages of a JSON file {"de": 0.9, ...} that have a dump, but the reference."""
    try:
        scores = json.loads(Path(path).read_text(encoding="utf-8"))
        known = [i for i, name in enumerate(languages) if name in scores and name != reference]
        values = [float(scores[languages[i]]) for i in known]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a JSON object of language: score") from error
    if reference not in languages or len(known) < 4:
        raise InputError(f"--scores takes a dump of --reference '{reference}' and 4 other languages with "
                         f"scores; {path} has {len(known)} of the dumps' languages")
    return known, values


def write_whole(path, write):
    """write(file) to a temporary name, which becomes the final one when all is there."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def frequencies(dumps):
    """activation_frequency of each language: (languages, layers, experts)."""
    return activation_frequency([d["counts"] for d in dumps], [d["num_tokens"] for d in dumps])


def compute(dumps, bands, args, scores=None):
    """All arrays of analysis.npz but its names and meta: see save_analysis."""
    choice, rng = (args.experts_per_language, args.threshold), np.random.default_rng(args.seed)
    result, by_sequence = analyze(frequencies(dumps), *choice), None
    result |= summarize(result, bands)
    result["order"] = np.array([linkage_order(matrix) for matrix in result["band_similarity"]])
    if args.bootstrap:
        counts = [sequence_counts(dump, args.part) for dump in tqdm(dumps, desc="IDs", leave=False)]
    if args.parallel:
        result["divergence_aligned"], by_sequence = aligned_divergence(read_aligned(dumps, args.part))
        result |= summarize_aligned(by_sequence, bands, np.ones(len(by_sequence)))
    if args.bootstrap:
        floors = [split_half_floor(c, args.experts_per_language, rng) for c in counts]
        result |= {f"floor_{m}": np.stack([floor[m] for floor in floors]) for m in MEASURES}
        result["layer_floor"] = result["floor_similarity"].mean(0)
        result["band_floor"] = band_means(result["layer_floor"], bands)
        intervals, *stability = bootstrap(counts, args.bootstrap, *choice, bands, rng, by_sequence)
        result |= {f"interval_{key}": value for key, value in intervals.items()}
        result["exclusive_stability"], result["shared_stability"] = stability
        stable = [result[key] & (s >= STABLE) for key, s in zip(("exclusive", "shared"), stability)]
        stable[1] = stable[1] & (result["share"] > 0)
        result["num_stable"] = np.stack([chosen.sum((1, 2)) for chosen in stable], 1)
    if args.vocabulary:
        result |= vocabulary_control(dumps, args.part)
    languages, table = [dump["language"] for dump in dumps], read_families(args.families)
    families = result["families"] = np.array([family_of(language, table) for language in languages])
    result["family_tests"] = family_tests(result["band_similarity"], families,
                                          np.random.default_rng(args.seed))
    if scores:
        known, values = scores
        near, rng = result["band_similarity"][:, languages.index(args.reference)], np.random.default_rng(args.seed)
        result["score_correlation"] = np.array([rank_correlation(s[known], values, rng) for s in near])
    return result


def save_analysis(path, result, dumps, bands, args):
    """analysis.npz, of L languages in B bands; in parentheses the shape, and the flag that it takes.

    languages, families (L,), layers (layers,)        names, family/branch or "", decoder layers
    frequency, share, exclusive (L, layers, experts)  part of the tokens that select the expert; the
                                                      language's share of its use; is it exclusive?
    shared (layers, experts)                          is it shared?
    similarity, divergence, jaccard, cosine           (layers, L, L); band_... (B, L, L), mean_... of
                                                      pairs (B,), layer_... of pairs (layers,)
    divergence_aligned (layers, L, L), layer_aligned (layers,), mean_aligned (B,)         --parallel
    entropy (L, layers), mean_entropy (layers,)       of the routing over log E; mean of languages
    reliance (L, layers, 3), mean_reliance (L, 3)     routing to exclusive, shared, other experts
    most_used, active (L, layers)                     most used expert's part; experts used at all
    num_exclusive, num_shared (L,)                    experts exclusive to it; shared ones it keeps
    layer_exclusive, layer_shared (layers,)           experts, exclusive ones summed over languages
    order (B, L)                                      languages in average-linkage order
    interval_...                                      (2, ...), low and high                --bootstrap
    floor_... of each measure (L, layers), layer_floor (layers,), band_floor (B,)           --bootstrap
    exclusive_stability (L, layers, experts), shared_stability (layers, experts), part of draws, and
    num_stable (L, 2), exclusive and shared experts that are stable                         --bootstrap
    similarity_own_tokens, similarity_common_tokens (layers, L, L), common_tokens (L, L)   --vocabulary
    family_tests (1 or 2, B, 3)                       families, branches: within, between, p
    score_correlation (B, 2)                          Spearman's rho, p                        --scores
    meta                                              JSON: settings, bands, inputs with digests
    """
    layers, keys = dumps[0]["layers"], ("language", "path", "digest", "num_tokens")
    meta = vars(args) | {"bands": {band: layers[rows].tolist() for band, rows in bands.items()},
                         "inputs": [{key: dump[key] for key in keys} for dump in dumps]}
    names = {"languages": np.array([dump["language"] for dump in dumps]), "layers": layers,
             "meta": np.array(json.dumps(meta, ensure_ascii=False))}
    write_whole(path, lambda file: np.savez(file, **result, **names))


def run_contrast(args):
    """--contrast: the table of experts that tell two groups of tokens apart, and the file of them."""
    a, b = load_languages([f"{name}={split_label(path)[1]}" for name, path in zip("AB", args.contrast)],
                          args.part)
    frequency, layers = frequencies([a, b]), a["layers"]
    difference, chosen = select_contrast(*frequency, args.tau, args.top)
    if not chosen.any():
        raise InputError(f"no expert's frequency differs by more than {args.tau} (the most: "
                         f"{difference.max():.3f}); lower --tau, or give --top")
    how = f"the {args.top} largest differences" if args.top else f"difference above {args.tau}"
    experts = {int(layer): {int(e): round(float(row[e]), 6) for e in np.flatnonzero(c)}
               for layer, row, c in zip(layers, difference, chosen) if c.any()}
    inputs = {dump["language"]: {key: dump[key] for key in ("path", "digest", "num_tokens")}
              for dump in (a, b)}
    text = json.dumps({"experts": experts, "how": how} | inputs, indent=1)
    write_whole(args.selection, lambda file: file.write(text.encode()))
    for name, path, dump in zip("AB", args.contrast, (a, b)):
        print(f"{name} {path}  {dump['num_tokens']:,} tokens")
    print(f"{chosen.sum()} experts in layers {describe(layers[chosen.any(1)])}: {how}\n")
    strongest = np.argsort(-np.abs(np.where(chosen, difference, 0)).ravel(), kind="stable")
    rows, ids = np.unravel_index(strongest[:min(20, chosen.sum())], chosen.shape)
    in_a, in_b = ([f"{value:.3f}" for value in f[rows, ids]] for f in frequency)
    print_table({"layer": layers[rows], "expert": ids, "frequency in A": in_a, "in B": in_b,
                 "difference": [f"{value:+.3f}" for value in difference[rows, ids]]})
    print(f"\n{args.selection}")


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what is compared").add_argument
    add("dumps", nargs="*", default=DUMPS, metavar="DUMP", help="path, or label=path (default: routing/)")
    add("--bands", nargs="+", metavar="B", help="NAME=A-B, decoder layers, inclusive (default: the first, "
        "middle and last tenth)")
    add("--experts-per-language", type=float, default=EXPERTS_PER_LANGUAGE, metavar="N", help="the most "
        "frequent ones: a number, or a part below 1 (default: %(default).3g)")
    add("--threshold", type=float, default=THRESHOLD, metavar="T",
        help="exclusive above this share (default: %(default)s)")
    add("--part", choices=["all", "prompt", "response"], default="all", help="count only these tokens")
    add = p.add_argument_group("what is noise, and what else it could be").add_argument
    add("--bootstrap", type=int, default=0, metavar="N", help="intervals of N draws, and the floor; 1000")
    add("--parallel", action="store_true", help="sequence i says the same in all languages")
    add("--vocabulary", action="store_true", help="over common tokens, and over a language's own")
    add("--families", metavar="FILE", help="code, tab, family/branch; over the built-in table")
    add("--scores", metavar="FILE", help='JSON {"de": 0.9, ...}, correlated with the similarity to')
    add("--reference", default=REFERENCE, metavar="L", help="this language (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add = p.add_argument_group("what is written").add_argument
    add("--out", default=OUT, help="(default: %(default)s)")
    add("--figures", metavar="DIR", help="heatmaps.png, layers.png, experts.png; needs matplotlib")
    add = p.add_argument_group("instead: experts that tell two groups of tokens apart").add_argument
    add("--contrast", nargs=2, metavar=("A", "B"), help="two dumps")
    add("--tau", type=float, default=TAU, metavar="D", help="select where A has this much more (%(default)s)")
    add("--top", type=int, metavar="N", help="select the N largest differences, of either sign")
    add("--selection", default="selection.json", metavar="FILE", help="(default: %(default)s)")
    args = p.parse_args()
    for path in (args.selection if args.contrast else args.out, (args.figures or "").rstrip("/")):
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"no such folder: {os.path.dirname(path)}; make it, or give another place")
    if args.top is not None and (not args.contrast or args.top < 1):
        raise InputError("--top takes a number above 0, and --contrast A B")
    if args.figures and os.path.isfile(args.figures):
        raise InputError(f"{args.figures} is a file; --figures takes a folder")
    if args.bootstrap == 1 or args.bootstrap < 0:
        raise InputError("--bootstrap takes 2 draws or more; 1000 is usual")
    return args


def main():
    args = parse_arguments()
    if args.contrast:
        return run_contrast(args)
    plt = import_matplotlib() if args.figures else None
    read_families(args.families)
    dumps = load_languages(args.dumps, args.part)
    languages, layers = [dump["language"] for dump in dumps], dumps[0]["layers"]
    args.experts_per_language = number_of_experts(args.experts_per_language, dumps[0]["num_experts"])
    bands = parse_bands(args.bands, layers)
    scores = read_scores(args.scores, languages, args.reference) if args.scores else None
    result = compute(dumps, bands, args, scores)
    save_analysis(args.out, result, dumps, bands, args)
    written = [args.out]
    if plt:
        written += save_figures(plt, args.figures, result, languages, layers, bands)
    report(result, dumps, bands, args)
    print("\n" + ", ".join(written))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
