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


def require(condition, message):
    if not condition:
        raise InputError(message)


# ---------------------------------------------------------------------------------- reading dumps

def load_languages(paths, part="all"):
    """Dumps of several languages that agree in layers, experts and top_k; shards are added up.

    Returns a list of dicts like load_routing's, one per language, in the order in which they are
    named.
    """
    shards = {}
    for path in tqdm(paths, desc="dumps", leave=False, disable=len(paths) < 20):
        dump = load_routing(path, part)
        shards.setdefault(dump["language"], []).append(dump)
    first, *others = itertools.chain(*shards.values())
    for dump, key in itertools.product(others, ("num_experts", "top_k", "layers", "revision")):
        here, there = dump[key], first[key]
        require(here is None or there is None or np.array_equal(here, there),
                f"{dump['path'][0]} and {first['path'][0]} have other {key} ({here}, {there}): "
                "different models")
    return [add_shards(language, group) for language, group in shards.items()]


def load_routing(path, part="all"):
    """One dump as a dict: language, counts (layers, experts), num_tokens, num_experts, top_k, layers,
    revision, meta, and, with an entry for each shard, path, digest, data_sha256.

    path  an .npz of capture.py; an .npz with only selected_experts (tokens, layers, top_k) and meta;
          a recorder's .json {"layer": {"expert": {"activation_tokens": n}, ..., "total_tokens": n}};
          or any of them as label=path
    part  "prompt" or "response" counts only those tokens of each sequence: takes selected_experts
    """
    label, path = split_label(path)
    require(not os.path.isdir(path), f"{path} is a folder; name the dumps, as in {path}/*.npz")
    require(os.path.isfile(path), f"no such dump: {path}; run: python capture.py")
    try:
        dump = read_recorder_json(path) if path.endswith(".json") else read_dump(path, part)
        dump["digest"] = [dump_digest(path)]
    except InputError:
        raise
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise InputError(f"{path} is not a whole routing dump; give an .npz of capture.py or the .json "
                         "of the paper's recorder") from error
    require(dump["num_tokens"], f"{path} holds no {'' if part == 'all' else part + ' '}tokens")
    meta = dump["meta"]
    return dump | {"language": label or meta["language"], "num_experts": dump["counts"].shape[1],
                   "revision": meta.get("revision"), "data_sha256": [meta.get("data_sha256")],
                   "path": [path]}


def split_label(path):
    """"bn=a/b.npz" -> ("bn", "a/b.npz"); a path that exists as it is has no label."""
    label, equals, rest = str(path).partition("=")
    return (label, rest) if equals and not os.path.exists(path) else (None, str(path))


def dump_digest(path):
    """What tells dumps apart. Of an .npz a hash of its table of contents, which has a checksum of each
    array: gigabytes of IDs need not be read for it.
    """
    if path.endswith(".json"):
        content = Path(path).read_bytes()
    else:
        with ZipFile(path) as file:
            entries = [(entry.filename, entry.file_size, entry.CRC) for entry in file.infolist()]
        content = json.dumps(entries).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def read_dump(path, part):
    with np.load(path, allow_pickle=False) as file:
        meta, layers = json.loads(str(file["meta"])), file.get("layers")
        require(meta.get("format", 1) == 1, f"{path} is of format {meta.get('format')}; this analyze.py "
                                            "reads format 1")
        if part == "all" and "counts" in file:
            counts, num_tokens, top_k = file["counts"], int(file["sequence_offsets"][-1]), meta["top_k"]
        else:
            selected = read_tokens(path, part, f"--part {part}")[0]
            num_tokens, _, top_k = selected.shape
            require(selected.max(initial=0) < meta["num_experts"], f"{path}: expert ID "
                    f"{selected.max(initial=0)}, but num_experts in its meta is {meta['num_experts']}")
            counts = grouped_counts(selected, np.zeros(num_tokens, int), 1, meta["num_experts"])[0]
    require((counts.sum(1) == num_tokens * top_k).all(), f"{path}: counts do not add up to {num_tokens} "
            f"tokens * top_k {top_k}; capture it again")
    return {"meta": meta, "counts": counts, "num_tokens": num_tokens, "top_k": top_k,
            "layers": np.arange(len(counts)) if layers is None else layers}


def read_recorder_json(path):
    """The paper's recorder summed in bfloat16: the counts are near, and need not add up to whole tokens."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    layers = sorted(record, key=int)
    experts = sorted(record[layers[0]].keys() - {"total_tokens"}, key=int)
    counts = np.array([[record[layer][expert]["activation_tokens"] for expert in experts]
                       for layer in layers], np.int64)
    totals = {int(record[layer]["total_tokens"]) for layer in layers}
    require(len(totals) == 1, f"{path}: total_tokens differs between layers: {sorted(totals)}")
    top_k = round(counts.sum() / len(layers) / max(*totals, 1))
    return {"meta": {"language": Path(path).stem}, "counts": counts, "num_tokens": totals.pop(),
            "top_k": top_k, "layers": np.array(layers, np.int32)}


def read_tokens(path, part, flag):
    """(selected_experts (tokens, layers, top_k), token_ids (tokens,) or None, sequence of each token)."""
    require(not path.endswith(".json"), f"{path} is a recorder's, without single tokens, which {flag} "
                                        "needs")
    with np.load(path, allow_pickle=False) as file:
        require("selected_experts" in file, f"{path} holds no selected_experts, which {flag} needs; "
                                            "capture without --stats-only")
        selected, token_ids = file["selected_experts"], file.get("token_ids")
        offsets, prompt = file.get("sequence_offsets", [0, len(selected)]), file.get("prompt_lengths")
    sequence = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if part == "all":
        return selected, token_ids, sequence
    require(prompt is not None, f"{path} holds no prompt_lengths, which --part {part} needs")
    keep = (np.arange(len(selected)) - offsets[sequence] < prompt[sequence]) == (part == "prompt")
    return selected[keep], None if token_ids is None else token_ids[keep], sequence[keep]


def grouped_counts(selected_experts, group, num_groups, num_experts):
    """How many tokens of each group selected each expert: int64 (groups, layers, experts).

    selected_experts (tokens, layers, top_k), group (tokens,)
    """
    cells = num_groups * num_experts
    counts = [np.bincount((group[:, None] * num_experts + selected).ravel(), minlength=cells)
              for selected in selected_experts.swapaxes(0, 1)]
    return np.stack(counts).reshape(-1, num_groups, num_experts).swapaxes(0, 1)


def add_shards(language, group):
    """The dumps of one language as one: a whole, or all shards of it, in order."""
    shards = {dump["meta"].get("shard", "1/1"): dump for dump in group}
    parts = [f"{i}/{len(group)}" for i in range(1, len(group) + 1)]
    require(shards.keys() == set(parts) and len({dump["data_sha256"][0] for dump in group}) == 1,
            f"'{language}' has the dumps {', '.join(dump['path'][0] for dump in group)} (shards "
            f"{', '.join(shards)}): not one whole, nor all the shards of one; label=path tells "
            "languages apart")
    whole = shards[parts[0]]
    for part in parts[1:]:
        whole = whole | {key: whole[key] + shards[part][key]
                         for key in ("counts", "num_tokens", "path", "digest", "data_sha256")}
    return whole


def all_tokens(dump, part, flag):
    """read_tokens of all shards of a language as one."""
    shards, first = [read_tokens(path, part, flag) for path in dump["path"]], 0
    for selected, token_ids, sequence in shards:
        sequence += first
        first = sequence.max(initial=first - 1) + 1
    require(flag != "--vocabulary" or all(ids is not None for _, ids, _ in shards),
            f"{', '.join(dump['path'])} holds no token_ids, which {flag} needs")
    return [np.concatenate(arrays) if arrays[0] is not None else None for arrays in zip(*shards)]


def sequence_counts(dump, part):
    """float32 (sequences, layers, experts) of a language; sequences without such tokens are left out."""
    selected, _, sequence = all_tokens(dump, part, "--bootstrap")
    present, group = np.unique(sequence, return_inverse=True)
    require(len(present) > 1, f"'{dump['language']}' has one sequence; --bootstrap resamples sequences")
    return grouped_counts(selected, group, len(present), dump["num_experts"]).astype(np.float32)


def read_aligned(dumps, part):
    """mean_probs of each language, (sequences, layers, experts), as many in all."""
    require(part == "all", "--parallel takes means over whole sequences; leave out --part")
    probs = []
    for dump in dumps:
        files = [{} if path.endswith(".json") else np.load(path, allow_pickle=False)
                 for path in dump["path"]]
        require(all("mean_probs" in file for file in files),
                f"{', '.join(dump['path'])} holds no mean_probs, which --parallel needs")
        probs.append(np.concatenate([file["mean_probs"] for file in files]))
    require(len({len(p) for p in probs}) == 1, "--parallel takes as many sequences in every language; "
            f"there are {[len(p) for p in probs]}")
    return probs


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
    require(number in range(1, num_experts + 1), f"experts_per_language {experts_per_language:g} is "
            f"neither a number from 1 to the {num_experts} experts nor a part of them below 1")
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
    require(0 < threshold < 1, f"threshold {threshold} is not between 0 and 1")
    return threshold


# --------------------------------------------------------------------------------------- measures

def entropy_bits(p):
    """Shannon entropy over the last axis, in bits. [.5, .5, 0] -> 1"""
    return -(p * np.log2(np.maximum(p, np.finfo(p.dtype).tiny))).sum(-1)


def jensen_shannon_similarity(p, q, mean_entropy=None):
    """1 - Jensen-Shannon divergence in bits, over the last axis: 1 is alike, 0 nothing in common.

    mean_entropy of p and q, where it is known. [.5, .5, 0] and [0, .5, .5] -> .5
    """
    if mean_entropy is None:
        mean_entropy = (entropy_bits(p) + entropy_bits(q)) / 2
    return 1 - entropy_bits((p + q) / 2) + mean_entropy


def normalized_divergence(similarity, mean_entropy, num_experts):
    """The divergence over the room that entropy leaves it, JSD / (log E - (H(p) + H(q)) / 2).

    arXiv 2510.04694. 0 is the same distribution, 1 the most by which two of such entropies can
    differ; two uniform ones have no room and do not differ: 0. [1, 0] and [0, 1] -> 1
    """
    room = np.log2(num_experts) - mean_entropy
    return np.divide(1 - similarity, room, out=np.zeros_like(room), where=room > 1e-12)


def pair_measures(frequency, experts_per_language):
    """{measure: (layers, languages, languages)} of frequency (languages, layers, experts).

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
    kept = most_frequent(frequency, experts_per_language).swapaxes(0, 1).astype(np.float64)
    in_both = kept @ kept.swapaxes(1, 2)
    unit = (frequency / np.linalg.norm(frequency, axis=-1, keepdims=True)).swapaxes(0, 1)
    return {"similarity": similarity,
            "divergence": normalized_divergence(similarity, mean_entropy, num_experts),
            "jaccard": in_both / (2 * kept[0, 0].sum() - in_both),
            "cosine": unit @ unit.swapaxes(1, 2)}


def aligned_divergence(mean_probs):
    """normalized_divergence averaged over aligned sequences, as 2510.04694 has it for parallel data.

    mean_probs: of each language (sequences, layers, experts) -> (layers, languages, languages), and
    the mean over pairs sequence by sequence (sequences, layers)
    """
    n, (sequences, layers, num_experts) = len(mean_probs), mean_probs[0].shape
    divergence, by_sequence = np.zeros((layers, n, n)), np.zeros((sequences, layers))
    pairs = list(itertools.combinations(range(n), 2))
    for i, j in tqdm(pairs, desc="parallel", unit="pair", leave=False):
        p, q = (mean_probs[k].astype(np.float64) for k in (i, j))
        mean_entropy = (entropy_bits(p) + entropy_bits(q)) / 2
        similarity = jensen_shannon_similarity(p, q, mean_entropy)
        each = normalized_divergence(similarity, mean_entropy, num_experts)
        divergence[:, i, j] = divergence[:, j, i] = each.mean(0)
        by_sequence += each / len(pairs)
    return divergence, by_sequence


def mean_of_pairs(matrix):
    """Mean over pairs of different languages that are not nan: (..., n, n) -> (...), or nan."""
    pairs = matrix[..., ~np.eye(matrix.shape[-1], dtype=bool)]
    number = (~np.isnan(pairs)).sum(-1)
    return np.where(number, np.nansum(pairs, -1) / np.maximum(number, 1), np.nan)


def analyze(frequency, experts_per_language, threshold):
    """What depends on frequency (languages, layers, experts) alone; listed at save_analysis."""
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
    """The figures that get an interval: means over bands and pairs, parts of the routing, numbers."""
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
    """Languages by average-linkage clustering (UPGMA) of similarity (n, n), nearest ends joined."""
    clusters = [[i] for i in range(len(similarity))]
    while len(clusters) > 1:
        member = np.stack([np.isin(range(len(similarity)), c) / len(c) for c in clusters])
        near = member @ similarity @ member.T - 2 * np.eye(len(clusters))
        a, b = sorted(divmod(int(near.argmax()), len(near)))
        first, second = clusters[a], clusters.pop(b)
        # of the four ways to put them side by side, the one in which the most alike touch
        clusters[a] = max((x + y for x in (first, first[::-1]) for y in (second, second[::-1])),
                          key=lambda order: similarity[order[len(first) - 1], order[len(first)]])
    return clusters[0]


def vocabulary_control(tokens, num_experts):
    """Is it the words? Similarity over tokens whose ids the other language has, too, and over others.

    tokens  all_tokens of each language
    -> similarity_own_tokens, similarity_common_tokens (layers, languages, languages), nan without
    such tokens; common_tokens (languages, languages), the part of the row's that the column has
    """
    n, layers = len(tokens), tokens[0][0].shape[1]
    vocabularies = [np.unique(ids) for _, ids, _ in tokens]
    both = np.zeros((n, n, layers, num_experts))  # selections of the row's tokens that both have
    for a, (selected, ids, _) in enumerate(tqdm(tokens, desc="vocabulary", leave=False)):
        in_other = np.array([np.isin(vocabularies[a], v) for v in vocabularies], np.float64)
        kind, kinds = np.searchsorted(vocabularies[a], ids), len(vocabularies[a])
        for layer in range(layers):  # kinds of tokens times experts are many: a layer at a time
            by_kind = grouped_counts(selected[:, [layer]], kind, kinds, num_experts)[:, 0]
            both[a, :, layer] = in_other @ by_kind
    every = both[range(n), range(n)][:, None]
    result = {"common_tokens": both.sum((2, 3)) / every.sum((2, 3))}
    for name, counts in (("own", every - both), ("common", both)):
        total = counts.sum(-1, keepdims=True)
        p = np.where(total, counts / np.maximum(total, 1), np.nan)
        similarity = jensen_shannon_similarity(p, p.swapaxes(0, 1))
        result[f"similarity_{name}_tokens"] = similarity.transpose(2, 0, 1)
    return result


def select_contrast(frequency_a, frequency_b, tau=TAU, top=None):
    """(difference, chosen), both (layers, experts): how much more tokens of A than of B select it.

    top  the so many largest differences, of either sign: the risk difference of arXiv 2509.09660
    tau  else, the experts with a difference above tau: the task experts of arXiv 2510.04694
    """
    difference = frequency_a - frequency_b
    if top is None:
        return difference, difference > tau
    chosen = np.zeros(difference.size, bool)
    chosen[np.argsort(-np.abs(difference).ravel(), kind="stable")[:top]] = True
    return difference, chosen.reshape(difference.shape)


def load_selection(path, layers, num_experts):
    """What --contrast wrote: float64 (layers, experts), a selected expert's difference, else 0."""
    differences, rows = np.zeros((len(layers), num_experts)), list(layers)
    try:
        for layer, row in json.loads(Path(path).read_text(encoding="utf-8"))["experts"].items():
            for expert, difference in row.items():
                expert = range(num_experts).index(int(expert))
                differences[rows.index(int(layer)), expert] = difference
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no selection of experts of this model, {num_experts} in layers "
                         f"{describe(layers)} ({error}); run: python analyze.py --contrast A.npz "
                         "B.npz") from error
    return differences


# ---------------------------------------------------------------------------------- what is noise

def split_half_floor(counts, experts_per_language, rng):
    """How alike a language is to itself: {measure: (layers,)} of random halves of its sequences.

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
    """95 % intervals of summarize()'s figures, and how often experts stay what they are.

    counts       of each language (sequences, layers, experts): sequences are drawn
    by_sequence  aligned_divergence's: the languages are parallel, all draw the same sequences
    -> {figure: (low and high, ...)}, the part of the draws in which an expert is exclusive
    (languages, layers, experts), and in which it is shared (layers, experts). Intervals are the
    estimate less the draws' bias, 1.96 of their standard deviations to both sides (the normal
    bootstrap interval): samples of few tokens look less alike than what they were taken from.
    """
    drawn, exclusive, shared = [], 0, 0

    def figures(totals, weights):
        totals = totals.reshape(len(counts), *counts[0].shape[1:])
        result = analyze(totals / totals.sum(-1, keepdims=True), experts_per_language, threshold)
        aligned = {} if by_sequence is None else summarize_aligned(by_sequence, bands, weights)
        return result, summarize(result, bands) | aligned

    for start in tqdm(range(0, draws, 50), desc="bootstrap", unit="50 draws", leave=False):
        n = min(50, draws - start)
        weights = [resample(len(c), n, rng) for c in counts[:1 if by_sequence is not None else None]]
        weights *= len(counts) // len(weights)
        totals = [w @ c.reshape(len(c), -1) for w, c in zip(weights, counts)]
        for total, weight in zip(np.stack(totals, 1, dtype=np.float64), weights[0]):
            result, summary = figures(total, weight)
            drawn.append(summary)
            exclusive, shared = exclusive + result["exclusive"], shared + result["shared"]
    whole, intervals = np.stack([c.sum(0, dtype=np.float64) for c in counts]), {}
    for key, value in figures(whole, np.ones(len(counts[0])))[1].items():
        values = np.array([summary[key] for summary in drawn])
        middle, half = 2 * value - values.mean(0), 1.96 * values.std(0, ddof=1)
        most = 1 if value.dtype.kind == "f" else np.inf  # a part, or a number of experts
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
    """(permutations, n), the identity first: up to n = 8 all of them, else PERMUTATIONS random ones."""
    if n <= 8:
        return np.array(list(itertools.permutations(range(n))))
    return np.stack([np.arange(n)] + [rng.permutation(n) for _ in range(PERMUTATIONS)])


def family_test(similarity, labels, rng):
    """(mean similarity within groups, between, p): how often labels dealt out at random do as well.

    similarity (n, n), labels a group of each language. nan without a pair within, or between.
    """
    i, j = np.triu_indices(len(labels), 1)
    groups, values = np.unique(labels, return_inverse=True)[1], similarity[i, j]
    same = groups[i] == groups[j]
    if same.all() or not same.any():
        return np.nan, np.nan, np.nan
    dealt = groups[permutations(len(labels), rng)]
    # the number of pairs within groups being the same, the gap grows with their sum
    sums = [(part[:, i] == part[:, j]) @ values for part in np.array_split(dealt, 50)]
    p = np.mean(np.concatenate(sums) >= values[same].sum() - 1e-12)
    return values[same].mean(), values[~same].mean(), p


def family_tests(similarities, families, rng):
    """family_test of similarities (bands, n, n): (levels, bands, 3), by family and, if other, branch.

    families: "family/branch" of each language, or "" where none is known: those are left out.
    """
    known = [family != "" for family in families]
    branches = [family for family in families if family]
    levels = [[family.split("/")[0] for family in branches], branches]
    if levels[0] == levels[1]:
        levels.pop()
    return np.array([[family_test(similarity[known][:, known], labels, rng)
                      for similarity in similarities] for labels in levels])


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


def print_bands(result, bands):
    """Means over pairs; the matrix of every band, or of many languages their order alone."""
    languages, floor, aligned = result["languages"], "band_floor" in result, "mean_aligned" in result
    layers = [describe(result["layers"][rows]) for rows in bands.values()]
    print("\nmeans over pairs of languages" + " [95 % interval]; floor: similarity of random halves "
          "of a language" * floor + "\nthe divergence is that of aligned sequences" * aligned)
    columns = {"band": bands, "layers": layers, "similarity": texts(result, "mean_similarity")}
    if floor:
        columns["floor"] = texts(result, "band_floor")
    columns |= {measure: texts(result, f"mean_{measure}") for measure in MEASURES[1:]}
    if aligned:
        columns["divergence"] = texts(result, "mean_aligned")
    print_table(columns)
    few = len(languages) <= PRINT_LANGUAGES
    for i, band in enumerate(bands):
        print()
        print_wrapped(f"{'similarity' if few else 'languages'}, {band} (layers {layers[i]}); in order "
                      f"of average linkage: {' '.join(languages[result['order'][i]])}")
        if few:
            columns = {"": languages}
            for language, values in zip(languages, result["band_similarity"][i]):
                columns[language] = [f"{value:.2f}" for value in values]
            print_table(columns)


def print_layers(result):
    series = {"similarity": result["layer_similarity"], "floor": result.get("layer_floor"),
              "entropy": result["mean_entropy"], "shared": result["layer_shared"],
              "excl.": result["layer_exclusive"]}
    if len(result["languages"]) <= PRINT_LANGUAGES:
        series |= zip(result["languages"], result["exclusive"].sum(-1))
    columns = {"layer": [*result["layers"], "all"]}
    for title, values in series.items():
        if values is not None and values.dtype.kind == "f":
            columns[title] = [f"{value:.3f}" for value in (*values, values.mean())]
        elif values is not None:
            columns[title] = [*values, values.sum()]
    columns["similarity"][:-1] = texts(result, "layer_similarity")
    print()
    print_table(columns, first=7)


def print_languages(result, bands):
    languages, stable = result["languages"], "num_stable" in result
    print("\npart of the routing (%) to experts that are exclusive to the language, shared, neither; "
          "n: experts" + f", and how many are stable in {STABLE:.0%} of draws" * stable
          + "\ntop: part (%) of the most used expert, active: experts in use; means over layers")
    columns = {"": languages}
    for k, kind in enumerate(("exclusive", "shared", "neither")):
        columns[kind] = texts(result, "mean_reliance", slice(None), k, scale=100, digits=1)
    for k, kind in enumerate(("exclusive", "shared")):
        columns[f"n {kind}"] = number = result[f"num_{kind}"]
        if stable:
            columns[f"n {kind}"] = [f"{n} ({s})" for n, s in zip(number, result["num_stable"][:, k])]
    columns["top"] = [f"{100 * value:.1f}" for value in result["most_used"].mean(1)]
    columns["active"] = [f"{value:.1f}" for value in result["active"].mean(1)]
    print_table(columns)
    if len(languages) > 1:
        print("\nnearest language, and its similarity")
        columns = {"": languages}
        for band, matrix in zip(bands, result["band_similarity"] - 2 * np.eye(len(languages))):
            columns[band] = [f"{languages[row.argmax()]} {row.max():.2f}" for row in matrix]
        print_table(columns)


def print_vocabulary(result, bands):
    print(f"\nsimilarity over tokens whose ids ({mean_of_pairs(result['common_tokens']):.1%} of them "
          "common to a pair, on average)")
    columns = {"band": bands}
    for title, key in {"are any": "similarity", "are common": "similarity_common_tokens",
                       "are the language's own": "similarity_own_tokens"}.items():
        means = mean_of_pairs(result[key])
        columns[title] = [f"{np.nanmean(means[rows]):.3f}" for rows in bands.values()]
    print_table(columns)


def print_tests(result, bands):
    rows = [(level, band, f"{same:.3f}", f"{other:.3f}", f"{p:.4f}")
            for level, tests in zip(("family", "branch"), result["family_tests"])
            for band, (same, other, p) in zip(bands, tests) if not np.isnan(p)]
    if rows:
        print("\nsimilarity of languages of the same family or branch, and of others; p: labels "
              "dealt out at random")
        print_table(dict(zip(("", "band", "same", "other", "p"), zip(*rows))))
    if (result["families"] == "").any():
        unknown = result["languages"][result["families"] == ""]
        print_wrapped(f"note: no family known of {', '.join(unknown)}; see --families")
    if "score_correlation" in result:
        print(f"\nrank correlation of the similarity to {REFERENCE} with the scores")
        rho, p = result["score_correlation"].T
        print_table({"band": bands, "Spearman": [f"{value:+.3f}" for value in rho],
                     "p": [f"{value:.4f}" for value in p]})


def report(result, dumps, bands, args):
    """All tables, and what to know about them."""
    n, first = len(dumps), dumps[0]
    print(f"{n} languages  {len(first['layers'])} MoE layers  {first['num_experts']} experts  top_k "
          f"{first['top_k']}  experts_per_language {args.experts_per_language}  threshold "
          f"{args.threshold}")
    print_wrapped("tokens  " + "  ".join(f"{d['language']} {d['num_tokens']:,}" for d in dumps))
    if n > PRINT_LANGUAGES:
        print(f"note: with more than {PRINT_LANGUAGES} languages, what is as wide as their number is "
              f"in {args.out} alone")
    if args.threshold * n <= 1:
        print(f"note: shares add up to 1, so with {n} languages none is shared at a threshold of "
              f"{args.threshold}; raise --threshold")
    print_bands(result, bands)
    print_layers(result)
    print_languages(result, bands)
    if "common_tokens" in result and n > 1:
        print_vocabulary(result, bands)
    print_tests(result, bands)


# --------------------------------------------------------------------------------------- pictures

COLOURS = ("#332288", "#CC6677", "#117733")  # of Paul Tol's, which colour-blind readers tell apart


def import_matplotlib():
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("--figures needs matplotlib; run: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def draw_heatmaps(plt, result, bands):
    """Similarity of every pair, a panel per band, in the linkage order of the mean over layers."""
    order = linkage_order(result["similarity"].mean(0))
    names, n = result["languages"][order], len(order)
    side, low = max(3.2, 0.16 * n + 1.5), result["band_similarity"].min()
    figure, axes = plt.subplots(1, len(bands), squeeze=False, layout="constrained",
                                figsize=(side * len(bands) + 1, side + 0.6))
    for axis, (band, rows), matrix in zip(axes[0], bands.items(), result["band_similarity"]):
        image = axis.imshow(matrix[np.ix_(order, order)], vmin=low, vmax=1, cmap="cividis")
        axis.set_xticks(range(n), names, rotation=90, fontsize=9 if n <= 30 else 6)
        axis.set_yticks(range(n), names, fontsize=9 if n <= 30 else 6)
        axis.set_title(f"{band}, layers {describe(result['layers'][rows])}")
    figure.colorbar(image, ax=axes[0], label="routing similarity, 1 - JSD", shrink=0.8)
    return figure


def draw_layers(plt, result, bands):
    """The profile over layers: similarity with interval and floor, entropy, numbers of experts."""
    figure, axes = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for row, colour, key, label in ((0, 0, "layer_similarity", "pairs of languages"),
                                    (0, 1, "layer_floor", "floor: halves of one language"),
                                    (1, 2, "mean_entropy", "mean of languages"),
                                    (2, 1, "layer_exclusive", "exclusive, all languages"),
                                    (2, 0, "layer_shared", "shared")):
        style = {"color": COLOURS[colour], "label": label}
        if key in result:
            axes[row].plot(result["layers"], result[key], marker="o", markersize=3, **style)
        if f"interval_{key}" in result:
            style["label"] = "95 % interval"
            axes[row].fill_between(result["layers"], *result[f"interval_{key}"], alpha=0.25, **style)
    for axis, label in zip(axes, ("similarity, 1 - JSD", "routing entropy / log E", "experts")):
        axis.set_ylabel(label)
        axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.3)
    axes[2].set_xlabel("decoder layer")
    return figure


def draw_experts(plt, result, bands):
    """Layers x experts, coloured by the language it is exclusive to (of two, the larger share), or
    as shared; twenty colours, which repeat.
    """
    exclusive, layers = result["exclusive"], result["layers"]
    owner = np.where(exclusive, result["share"], 0).argmax(0)
    kind = np.where(exclusive.any(0), owner + 2, result["shared"])
    labels = ["neither", "shared", *result["languages"]]
    colours = ["#EEEEEE", "#000000", *plt.get_cmap("tab20")(np.arange(len(labels) - 2) % 20)]
    figure, axis = plt.subplots(layout="constrained", figsize=(
        min(14, max(7, kind.shape[1] * 0.075 + 3)), max(3, len(layers) * 0.13 + 1.4)))
    axis.pcolormesh(kind, vmin=0, vmax=len(labels) - 1, edgecolors="white", linewidth=0.3,
                    cmap=plt.matplotlib.colors.ListedColormap(colours))
    axis.set_yticks(np.arange(0, len(layers), 4) + 0.5, layers[::4])
    axis.set_xlabel("expert")
    axis.set_ylabel("decoder layer")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=f"{label} ({(kind == k).sum()})")
               for k, (colour, label) in enumerate(zip(colours, labels))]
    figure.legend(handles=handles[:22], loc="outside right center", fontsize=8, frameon=False)
    return figure


def save_figures(folder, result, bands):
    """heatmaps.png, layers.png and experts.png in a folder; returns their paths."""
    plt, paths = import_matplotlib(), []
    os.makedirs(folder, exist_ok=True)
    for draw in (draw_heatmaps, draw_layers, draw_experts):
        paths.append(os.path.join(folder, f"{draw.__name__.removeprefix('draw_')}.png"))
        figure = draw(plt, result, bands)
        figure.savefig(paths[-1], dpi=120)
        plt.close(figure)
    return paths


# ------------------------------------------------------------------------------------------- main

def parse_bands(texts, layers):
    """["early=0-4", ...] -> {"early": bool (layers,)}: the rows of decoder layers 0 to 4, inclusive.

    None gives the first, middle and last tenth of the rows, at least one each. InputError if a band
    holds no MoE layer.
    """
    if texts is None:
        rows, size = np.arange(len(layers)), max(1, round(len(layers) / 10))
        starts = {"early": 0, "middle": (len(layers) - size + 1) // 2, "late": len(layers) - size}
        return {name: (rows >= start) & (rows < start + size) for name, start in starts.items()}
    bands = {}
    for text in texts:
        match = re.fullmatch(r"(?:(.+)=)?(\d+)(?:-(\d+))?", text)
        require(match, f"band '{text}' is neither FIRST-LAST nor NAME=FIRST-LAST, as middle=22-26")
        first, last = int(match[2]), int(match[3] or match[2])
        rows = bands[match[1] or text] = (layers >= first) & (layers <= last)
        require(last <= max(layers) and rows.any(), f"band '{text}' does not hold MoE layers of this "
                                                    f"model, which has {describe(layers)}")
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
        require(family.strip(), f"{path}:{number}: not a code, a tab and a family, as "
                                "'de<tab>Indo-European/Germanic'")
        table[code] = family.strip()
    return table


def family_of(language, table):
    """"Indo-European/Germanic" for "de", "deu_Latn" or "de-AT"; "" if the table does not know it."""
    return table.get(language) or table.get(re.split("[-_]", language)[0], "")


def read_scores(path, languages):
    """(indices, scores) of the languages, but REFERENCE, that a JSON file has {language: score} of."""
    try:
        scores = json.loads(Path(path).read_text(encoding="utf-8"))
        known = [i for i, name in enumerate(languages) if name in scores and name != REFERENCE]
        values = [float(scores[languages[i]]) for i in known]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a JSON object of language: score") from error
    require(REFERENCE in languages and len(known) > 3, f"--scores takes a dump of '{REFERENCE}' (see "
            f"REFERENCE) and 4 others with scores; {path} has {len(known)} of the dumps' languages")
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


def compute(dumps, bands, args):
    """All arrays of analysis.npz, listed at save_analysis."""
    languages, choice = [d["language"] for d in dumps], (args.experts_per_language, args.threshold)
    families, rng = read_families(args.families), np.random.default_rng(args.seed)
    scores = read_scores(args.scores, languages) if args.scores else None
    result, by_sequence = analyze(frequencies(dumps), *choice), None
    result |= summarize(result, bands)
    similarities = result["band_similarity"]
    result |= {"languages": np.array(languages), "layers": dumps[0]["layers"],
               "order": np.array([linkage_order(matrix) for matrix in similarities]),
               "families": np.array([family_of(language, families) for language in languages])}
    result["family_tests"] = family_tests(similarities, result["families"],
                                          np.random.default_rng(args.seed))
    if scores:
        order = np.random.default_rng(args.seed)
        result["score_correlation"] = np.array([
            rank_correlation(similarity[languages.index(REFERENCE), scores[0]], scores[1], order)
            for similarity in similarities])
    if args.parallel:
        aligned, by_sequence = aligned_divergence(read_aligned(dumps, args.part))
        result |= summarize_aligned(by_sequence, bands, np.ones(len(by_sequence)))
        result["divergence_aligned"] = aligned
    if args.bootstrap:
        counts = [sequence_counts(dump, args.part) for dump in dumps]
        floors = [split_half_floor(c, choice[0], rng) for c in counts]
        result |= {f"floor_{m}": np.stack([floor[m] for floor in floors]) for m in MEASURES}
        result["layer_floor"] = result["floor_similarity"].mean(0)
        result["band_floor"] = band_means(result["layer_floor"], bands)
        intervals, *stability = bootstrap(counts, args.bootstrap, *choice, bands, rng, by_sequence)
        result |= {f"interval_{key}": value for key, value in intervals.items()}
        result["exclusive_stability"], result["shared_stability"] = stability
        exclusive, shared = (result[kind] & (result[f"{kind}_stability"] >= STABLE)
                             for kind in ("exclusive", "shared"))
        stable = exclusive, shared & (result["share"] > 0)
        result["num_stable"] = np.stack([experts.sum((1, 2)) for experts in stable], 1)
    if args.vocabulary:
        tokens = [all_tokens(dump, args.part, "--vocabulary") for dump in dumps]
        result |= vocabulary_control(tokens, dumps[0]["num_experts"])
    return result


def save_analysis(path, result, dumps, bands, args):
    """analysis.npz: with L languages, B bands, and M any of the four measures,

    languages, families (L,), layers (layers,)        names, family/branch or "", decoder layers
    frequency, share, exclusive (L, layers, experts)  part of the tokens that select the expert; the
                                                      language's share of its use; is it exclusive?
    shared (layers, experts)                          is it shared?
    similarity, divergence, jaccard, cosine           M: (layers, L, L) of every pair
    band_M (B, L, L), mean_M (B,), layer_M (layers,)  means over layers, over pairs
    entropy (L, layers), mean_entropy (layers,)       of the routing over log E; mean of languages
    reliance (L, layers, 3), mean_reliance (L, 3)     routing to exclusive, shared, other experts
    most_used, active (L, layers)                     most used expert's part; experts in use
    num_exclusive, num_shared (L,)                    experts exclusive to it; shared ones it keeps
    layer_exclusive, layer_shared (layers,)           experts; exclusive, summed over languages
    order (B, L)                                      languages in average-linkage order
    family_tests (1 or 2, B, 3)                       families, branches: within, between, p
    score_correlation (B, 2)                          --scores: Spearman's rho, p
    divergence_aligned (layers, L, L), layer_aligned (layers,), mean_aligned (B,)    --parallel
    interval_... of band_, mean_, layer_, num_, entropy    --bootstrap: (2, ...), low and high
    floor_M (L, layers), layer_floor (layers,), band_floor (B,)    --bootstrap: of similarity
    exclusive_stability (L, layers, experts), shared_stability (layers, experts)    part of the draws
    num_stable (L, 2)                                 exclusive and shared ones that are stable
    similarity_own_tokens, similarity_common_tokens (layers, L, L), common_tokens (L, L)  --vocabulary
    meta                                              JSON: arguments, bands, inputs with digests
    """
    meta = vars(args) | {"inputs": inputs_of(dumps), "bands": {
        band: result["layers"][rows].tolist() for band, rows in bands.items()}}
    write_whole(path, lambda file: np.savez(file, **result, meta=json.dumps(meta)))


def inputs_of(dumps):
    return [{key: d[key] for key in ("language", "path", "digest", "num_tokens")} for d in dumps]


def run_contrast(args):
    """--contrast: the table of experts that tell two groups of tokens apart, and the file of them."""
    paths = [split_label(path)[1] for path in args.contrast]
    dumps = load_languages([f"A={paths[0]}", f"B={paths[1]}"], args.part)
    frequency, layers = frequencies(dumps), dumps[0]["layers"]
    difference, chosen = select_contrast(*frequency, args.tau, args.top)
    require(chosen.any(), f"no expert's frequency differs by more than {args.tau} (the most: "
                          f"{difference.max():.3f}); lower --tau, or give --top")
    selected = np.where(chosen, difference, 0).round(6)
    experts = {int(layer): {int(e): row[e] for e in np.flatnonzero(row)}
               for layer, row in zip(layers, selected) if row.any()}
    text = json.dumps({"experts": experts, "arguments": vars(args), "inputs": inputs_of(dumps)})
    write_whole(args.selection, lambda file: file.write(text.encode()))
    for dump in dumps:
        print(f"{dump['language']} {dump['path'][0]}  {dump['num_tokens']:,} tokens")
    print(f"{chosen.sum()} experts in layers {describe(layers[chosen.any(1)])}: "
          f"{f'the {args.top} largest differences' if args.top else f'difference above {args.tau}'}\n")
    strongest = np.argsort(-np.abs(selected).ravel(), kind="stable")[:min(20, chosen.sum())]
    rows, ids = np.unravel_index(strongest, chosen.shape)
    columns = {"layer": layers[rows], "expert": ids,
               "difference": [f"{value:+.3f}" for value in difference[rows, ids]]}
    for name, values in zip("AB", frequency):
        columns[f"frequency in {name}"] = [f"{value:.3f}" for value in values[rows, ids]]
    print_table(columns)
    print(f"\n{args.selection}")


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("what is compared").add_argument
    add("dumps", nargs="*", default=DUMPS, help="path, or label=path (default: those of routing/)")
    add("--bands", nargs="+", metavar="NAME=A-B", help="decoder layers, inclusive (default: the "
        "first, middle and last tenth)")
    add("--experts-per-language", type=float, default=EXPERTS_PER_LANGUAGE, metavar="N",
        help="the most frequent: a number, or a part below 1 (default: %(default).3g)")
    add("--threshold", type=float, default=THRESHOLD, help="exclusive above it (%(default)s)")
    add("--part", choices=["all", "prompt", "response"], default="all", help="count only these")
    add = p.add_argument_group("what is noise, and what else it could be").add_argument
    add("--bootstrap", type=int, default=0, metavar="N", help="intervals of N draws, and the floor")
    add("--parallel", action="store_true", help="sequence i says the same in all languages")
    add("--vocabulary", action="store_true", help="over common tokens, and over a language's own")
    add("--families", metavar="FILE", help="code, tab, family/branch; over the built-in table")
    add("--scores", metavar="FILE", help='JSON {"de": 0.9, ...}: correlate with the similarity to '
        f"{REFERENCE}")
    add("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    add = p.add_argument_group("what is written").add_argument
    add("--out", default=OUT, help="(default: %(default)s)")
    add("--figures", metavar="DIR", help="heatmaps.png, layers.png, experts.png; needs matplotlib")
    add = p.add_argument_group("instead: experts that tell two groups of tokens apart").add_argument
    add("--contrast", nargs=2, metavar=("A", "B"), help="two dumps")
    add("--tau", type=float, default=TAU, help="where A has this much more (default: %(default)s)")
    add("--top", type=int, metavar="N", help="the N largest differences, of either sign")
    add("--selection", default="selection.json", metavar="FILE", help="(default: %(default)s)")
    args = p.parse_args()
    for path in (args.selection if args.contrast else args.out, (args.figures or "").rstrip("/")):
        folder = os.path.dirname(path) or "."
        require(os.path.isdir(folder), f"no such folder: {folder}; make it, or give another place")
    require(args.top is None or args.contrast and args.top > 0,
            "--top takes a number above 0, and --contrast A B")
    require(not os.path.isfile(args.figures or ""), f"{args.figures} is a file; --figures takes a folder")
    require(args.bootstrap == 0 or args.bootstrap > 1, "--bootstrap takes 2 draws or more")
    return args


def main():
    args = parse_arguments()
    if args.contrast:
        return run_contrast(args)
    if args.figures:
        import_matplotlib()  # or say that it is missing
    dumps = load_languages(args.dumps, args.part)
    args.experts_per_language = number_of_experts(args.experts_per_language, dumps[0]["num_experts"])
    bands = parse_bands(args.bands, dumps[0]["layers"])
    result = compute(dumps, bands, args)
    save_analysis(args.out, result, dumps, bands, args)
    pictures = save_figures(args.figures, result, bands) if args.figures else []
    report(result, dumps, bands, args)
    print("\n" + ", ".join([args.out, *pictures]))


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
