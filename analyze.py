"""
Which experts are a language's own, which are shared, how alike languages are routed; what is noise.

    python analyze.py                                     # what capture.py wrote for the tiny model
    python analyze.py routing/*.npz --bootstrap 1000 --vocabulary --figures figures
    python analyze.py tests/data/qwen3-30b-a3b/*.npz --leave-one-out --sensitivity    # 30B
    python analyze.py --contrast math.npz chat.npz        # experts for ablate.py and steer.py
    python analyze.py --agreement bf16.npz fp32.npz       # of two dumps of the same tokens

reads   routing dumps      .npz of capture.py, or .json of the paper's recorder; needs numpy, tqdm
writes  analysis.npz       the same figures as arrays, listed at save_analysis; --figures: pictures

Exclusive and shared experts are those of arXiv 2601.14050. All shares depend on which languages are
compared: name the dumps. Under a second; with a thousand bootstrap draws, seconds to a minute.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import textwrap
from collections import ChainMap
from pathlib import Path

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
GRID_EXPERTS = (1 / 20, 10 / 128, 15 / 128, 20 / 128, 25 / 128, 1 / 4, 1 / 3)  # --sensitivity
GRID_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
STABLE = 0.95          # a stable expert stays exclusive, or shared, in so many bootstrap draws
PERMUTATIONS = 10_000  # of labels or scores, at random; up to 8 languages, all there are
# ------------------------------------------------------------------------------------------------
PARTS = "all prompt response text".split()  # of a sequence
ONE_MODEL = "num_experts top_k layers revision".split()  # in which dumps must agree
MADE_WITH = "dtype chat_template tokenizer max_length limit".split()  # in which dumps should agree
ADD_UP = "counts weights null_counts num_tokens path digest data_sha256".split()  # of shards
MEASURES = "similarity divergence jaccard cosine".split()  # of two languages: pair_measures
SUMMARIZED = ("entropy mean_entropy mean_reliance num_exclusive num_only num_shared "
              "layer_exclusive layer_shared").split()  # beside them, what gets an interval


def by_code(text):
    """{code: label} of lines of a label and its codes."""
    return {code: label for label, *codes in map(str.split, text.splitlines()) for code in codes}


# family/branch: ISO 639-1 and FLORES codes of the most studied languages; --families for others
FAMILIES = by_code("""\
Afro-Asiatic/Chadic ha hau
Afro-Asiatic/Cushitic gaz om so som
Afro-Asiatic/Semitic am amh ar ara arb he heb mlt mt
Atlantic-Congo/Bantu kin lg lin ln lug ny nya rw sn sna sot st sw swa swh tn ts tsn tso xh xho zu \
    zul
Atlantic-Congo/Kwa ak aka tw twi
Atlantic-Congo/Senegambian ff fuv wo wol
Atlantic-Congo/Volta-Niger ibo ig yo yor
Austroasiatic/Khmer khm km
Austroasiatic/Vietic vi vie
Austronesian/Malayo-Polynesian ceb fil id ind jav jv mg mi mri ms msa plt su sun tgl tl zsm
Basque eu eus
Creole hat ht
Dravidian kan kn mal ml ta tam te tel
Indo-European/Albanian als sq
Indo-European/Armenian hy hye
Indo-European/Baltic lit lt lv lvs
Indo-European/Celtic cy cym ga gle
Indo-European/Germanic af afr da dan de deu en eng is isl nb nl nld no nob nor sv swe
Indo-European/Hellenic el ell
Indo-European/Indo-Aryan as asm ben bn gu guj hi hin mar mr ne npi or ory pa pan si sin ur urd
Indo-European/Iranian fa kmr ku pbt pes ps tg tgk
Indo-European/Romance ca cat es fr fra gl glg it ita por pt ro ron spa
Indo-European/Slavic be bel bg bos bs bul ces cs hr hrv mk mkd pl pol ru rus sk sl slk slv sr srp \
    uk ukr
Japonic ja jpn
Kartvelian ka kat
Koreanic ko kor
Mongolic khk mn
Sino-Tibetan/Sinitic cmn yue zh zho
Sino-Tibetan/Tibeto-Burman bo bod my mya
Tai-Kadai lao lo th tha
Turkic az azj kaz kir kk ky tat tr tt tur ug uig uz uzn
Uralic/Finnic est et fi fin
Uralic/Hungarian hu hun
""")


# by ISO 15924, as FLORES names them; the other languages write Latn
SCRIPTS = dict.fromkeys(FAMILIES, "Latn") | by_code("""\
Arab ar ara arb fa pbt pes ps ug uig ur urd
Armn hy hye
Beng as asm ben bn
Cyrl be bel bg bul kaz khk kir kk ky mk mkd mn ru rus sr srp tat tg tgk tt uk ukr
Deva hi hin mar mr ne npi
Ethi am amh
Geor ka kat
Grek el ell
Gujr gu guj
Guru pa pan
Hang ko kor
Hans cmn zh zho
Hant yue
Hebr he heb
Jpan ja jpn
Khmr khm km
Knda kan kn
Laoo lao lo
Mlym mal ml
Mymr my mya
Orya or ory
Sinh si sin
Taml ta tam
Telu te tel
Thai th tha
Tibt bo bod
""")


class InputError(Exception):
    """Something the user can fix: printed as one line, exit status 1."""


def require(condition, message):
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def explained(message):
    """What goes wrong in the block, whatever a broken file can raise, becomes an InputError."""
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        raise InputError(message) from error


# ---------------------------------------------------------------------------------- reading dumps

def load_languages(paths, part="all"):
    """Dumps of several languages that agree in layers, experts and top_k; shards are added up.

    Returns a list of dicts like load_routing's, one per language, in the order in which they are
    named.
    """
    dumps = [load_routing(path, part) for path in tqdm(paths, "dumps", leave=False, delay=1)]
    for key in ONE_MODEL:  # the last is the revision, which IDs from elsewhere do not name
        found = {str(dump[key]): dump["path"][0] for dump in dumps if dump[key] is not None}
        require(len(found) < 2, f"{' and '.join(found.values())} have other {key} "
                                f"({', '.join(found)}): different models")
    languages = {}
    for dump in dumps:
        languages.setdefault(dump["language"], []).append(dump)
    return [add_shards(shards) | {"revision": max(found, default=None)}
            for shards in languages.values()]


def load_routing(path, part="all"):
    """One dump as a dict: its meta; part, num_tokens, layers, counts and weights (layers, experts),
    null_counts (draws, layers, experts); and, for each shard, path, digest, data_sha256.

    path  an .npz of capture.py, or with selected_experts (tokens, layers, top_k) and meta; the
          .json of a recorder, see read_recorder; or any of them as label=path
    part  all, or the prompt, response or text of each sequence, which takes selected_experts; text
          is the prompt's own, without chat template and instruction
    """
    label, path = split_label(path)
    require(os.path.isfile(path), f"no such dump: {path}; run: python capture.py (of a folder, "
                                  "name the dumps: routing/*.npz)")
    with explained(f"{path} is not a whole routing dump; give an .npz of capture.py or the .json "
                   "of the paper's recorder"):
        file = open_dump(path)
        meta = file["meta"]
        if part == "all" and "counts" in file:
            counts, top_k = file["counts"], meta["top_k"]
            num_tokens = int(meta.get("num_tokens") or file["sequence_offsets"][-1])
            weights = file.get("weight_sums", counts)
        else:
            selected, *_ = read_tokens({"path": [path], "part": part})
            num_tokens, _, top_k = selected.shape
            weights = counts = grouped_counts(selected, np.zeros(num_tokens, int), 1,
                                              meta["num_experts"])[0]
        require(num_tokens, f"{path} holds no tokens ({part})")
        layers = file.get("layers", np.arange(len(counts)))
        null_counts = file.get("null_counts", np.empty(0))
        require(len({*layers.tolist()}) == len(layers) == len(counts) and counts.min() >= 0
                and weights.shape == counts.shape and np.isfinite(weights).all()
                and null_counts.shape[1:] in ((), counts.shape) and not np.any(null_counts < 0)
                and np.allclose(counts.sum(1), num_tokens * top_k, 0.05 * ("inexact" in meta), 0),
                f"{path}: the counts and weights of {len(layers)} layers do not add up to "
                f"{num_tokens} tokens * top_k {top_k}; capture it again")
        if "left_out" in file:
            print(f"note: {path}: no weights; left out {file['left_out']}", file=sys.stderr)
        language = label or meta.get("language")
        require(isinstance(language, str) and language,
                f"{path}: language {language}; name it: de={path}")
        return {"revision": None} | meta | {
            "language": language, "layers": layers, "counts": counts, "weights": weights,
            "num_tokens": num_tokens, "top_k": top_k, "num_experts": counts.shape[1],
            "null_counts": null_counts, "path": [path], "part": part,
            "digest": [hashlib.sha256(counts.tobytes()).hexdigest()[:16]],
            "data_sha256": [meta.get("data_sha256")]}


def split_label(path):
    """"bn=a/b.npz" -> ("bn", "a/b.npz"); a path that exists as it is has no label."""
    label, equals, rest = str(path).partition("=")
    return (label, rest) if equals and not os.path.exists(path) else (None, str(path))


def read_json(path):
    return json.loads(Path(path).read_bytes())


class Dump(ChainMap):
    """The arrays of a dump, each read when it is asked for, and meta, or meta's; InputError if one
    is not there.
    """

    def __missing__(self, key):
        raise InputError(f"{self['path']} holds no {key}; capture it again with --overwrite, not "
                         "with --stats-only; of a recorder's or an engine's dump it is not known")


def open_dump(path):
    """A Dump; of a file without counts with what real_ids says."""
    if path.endswith(".json"):
        return Dump(read_recorder(path))
    file = np.load(path, allow_pickle=False)
    require("similarity" not in file, f"{path} is what analyze.py writes; give the dumps")
    file = Dump({"path": path}, file)
    file["meta"] = Dump({"path": f"meta of {path}"}, json.loads(str(file["meta"])))
    return file if "counts" in file else file | real_ids(file)


def read_recorder(path):
    """A recorder's .json as a dump: {"layer": {"expert": {"activation_tokens": n}, ...,
    "total_tokens": n}}. It summed in bfloat16: its counts are near, and need not add up to whole
    tokens. An expert that a layer lacks was not selected there.
    """
    layers, rows = zip(*sorted((int(layer), row) for layer, row in read_json(path).items()))
    num_tokens, = {int(row.pop("total_tokens")) for row in rows}
    counts = np.zeros((len(rows), 1 + max(int(expert) for row in rows for expert in row)), int)
    for counts_of_layer, row in zip(counts, rows):
        for expert, cell in row.items():
            counts_of_layer[int(expert)] = cell["activation_tokens"]
    return {"path": path, "counts": counts, "layers": np.array(layers, np.int32), "meta": {
        "language": Path(path).stem, "num_tokens": num_tokens, "inexact": "summed in bfloat16",
        "top_k": round(counts.sum(1).mean() / max(num_tokens, 1))}}


def real_ids(file):
    """Of a dump from elsewhere, without the layers that are dense (16 tokens or more say the same):
    selected_experts, all -1 where its engine filled a token in (with -1, or in every layer with
    zeros or arange(top_k)), layers, sequence_offsets, and what is left_out. InputError where the
    rest is not top_k different experts.
    """
    ids, num_experts, path = file["selected_experts"], file["meta"]["num_experts"], file["path"]
    require(ids.ndim == 3 and ids.dtype.kind in "iu", f"{path}: selected_experts is {ids.dtype} "
            f"{ids.shape}, not integers (tokens, layers, top_k)")
    ids = ids.astype(np.int64)
    # with one layer, or one expert a token, zeros and arange may be meant
    fillings = [[-1], [0], np.arange(ids.shape[2])][:3 if min(ids.shape[1:]) > 1 else 1]
    layers = np.ones(ids.shape[1], bool)
    for _ in range(2):  # a dense layer may say something else of a placeholder
        tokens = ~np.any([(ids[:, layers] == filling).all((1, 2)) for filling in fillings], 0)
        if tokens.sum() >= 16:
            layers = (ids[tokens] != ids[tokens][0]).any((0, 2))
    # in order, different experts rise from above -1 to below num_experts
    bad = (np.diff(np.sort(ids), prepend=-1, append=num_experts) < 1).any(-1)
    for token, layer in np.argwhere(bad & tokens[:, None] & layers)[:1]:
        raise InputError(f"{path}: token {token} has in layer {layer} the experts "
                         f"{ids[token, layer].tolist()}: neither {ids.shape[2]} different ones of "
                         f"{num_experts} nor a known placeholder")
    ids[~tokens] = -1
    return {"selected_experts": ids[:, layers],
            "layers": file.get("layers", np.arange(len(layers)))[layers],
            "sequence_offsets": file.get("sequence_offsets", [0, len(ids)]),
            "left_out": f"{(~tokens).sum()} tokens and {(~layers).sum()} layers that are "
                        "placeholders"}


def read_tokens(dump, *keys):
    """selected_experts and other arrays with a row for each token, of the dump's part and no
    placeholder, and each token's sequence and position in it (tokens,).
    """
    shards, num_sequences, part = [], 0, dump["part"]
    for file in map(open_dump, dump["path"]):
        arrays = [file[key] for key in ("selected_experts", *keys)]
        lengths = np.diff(file["sequence_offsets"])
        require(lengths.dtype.kind in "iu" and lengths.min(initial=0) >= 0
                and {lengths.sum()} == set(map(len, arrays)),
                f"{file['path']}: sequence_offsets do not go from 0 to the number of tokens")
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(sequence)) - np.searchsorted(sequence, sequence)
        tokens = arrays[0][:, 0, 0] >= 0
        if part == "text":
            start, stop = file["text_spans"][sequence].T
            tokens &= (start <= position) & (position < stop)
        elif part != "all":
            tokens &= (position < file["prompt_lengths"][sequence]) == (part == "prompt")
        shards.append([array[tokens] for array in (*arrays, num_sequences + sequence, position)])
        num_sequences += len(lengths)
    return list(map(np.concatenate, zip(*shards)))


def grouped_counts(selected_experts, group, num_groups, num_experts):
    """How many tokens of each group selected each expert: int64 (groups, layers, experts).

    selected_experts (tokens, layers, top_k), group (tokens,)
    """
    require(selected_experts.max(initial=0) < num_experts,
            f"selected_experts has an expert beyond {num_experts - 1}; capture it again")
    cells = group[:, None] * num_experts
    return np.stack([np.bincount((cells + selected).ravel(), minlength=num_groups * num_experts)
                     .reshape(num_groups, num_experts)
                     for selected in selected_experts.swapaxes(0, 1)], 1)


def add_shards(dumps):
    """The dumps of one language as one: a whole, or all shards of it, in order."""
    shards = {dump.get("shard", "1/1"): dump for dump in dumps}
    names = [f"{i + 1}/{len(dumps)}" for i in range(len(dumps))]
    same = ("data_sha256", "null_router", "instruction", "max_new_tokens", *MADE_WITH)
    made = {str([dump.get(key) for key in same]) for dump in dumps}
    require(shards.keys() == set(names) and len(made) == 1,
            f"'{dumps[0]['language']}' has the dumps {', '.join(d['path'][0] for d in dumps)} "
            f"(shards {', '.join(shards)}): not one whole, nor all the shards of one; label=path "
            "tells languages apart")
    whole, *others = [shards[name] for name in names]
    for shard in others:
        whole |= {key: whole[key] + shard[key] for key in ADD_UP}
    return whole


def sequence_counts(dump):
    """float32 (sequences, layers, experts) of a language, but for sequences without such tokens."""
    selected, sequence, _ = read_tokens(dump)
    present, group = np.unique(sequence, return_inverse=True)
    require(len(present) > 1, f"'{dump['language']}' has one sequence; --bootstrap resamples "
                              "sequences")
    counts = grouped_counts(selected, group, len(present), dump["num_experts"])
    require(np.array_equal(counts.sum(0), dump["counts"]), f"{', '.join(dump['path'])}: "
            "selected_experts do not add up to counts; capture it again")
    return counts.astype(np.float32)


def read_aligned(dumps):
    """mean_probs of each language, (sequences, layers, experts), as many in all."""
    require(dumps[0]["part"] == "all",
            "--parallel takes means over whole sequences; leave out --part")
    probs = [np.concatenate([open_dump(path)["mean_probs"] for path in dump["path"]])
             for dump in dumps]
    numbers = list(map(len, probs))
    require(len(set(numbers)) == 1, "--parallel takes as many sequences in every language; there "
                                    f"are {numbers}")
    return probs


# ---------------------------------------------------------------- definitions (arXiv 2601.14050)

def activation_frequency(counts, num_tokens):
    """Part of the tokens that select each expert; a row sums to top_k.

    counts (..., layers, experts), num_tokens a number or (...) -> float64 (..., layers, experts)
    [[3, 1]] of 4 tokens -> [[.75, .25]]
    """
    return np.asarray(counts) / np.asarray(num_tokens)[..., None, None]


def frequencies(dumps):
    """activation_frequency of each language: (languages, layers, experts)."""
    return activation_frequency([d["counts"] for d in dumps], [d["num_tokens"] for d in dumps])


def number_of_experts(experts_per_language, num_experts):
    """experts_per_language as a number: 15 is 15; 15/128, being below 1, is 4 of 32 experts."""
    number = experts_per_language
    if 0 < number < 1:
        number = max(1, round(number * num_experts))
    require(number in range(1, num_experts + 1), f"experts_per_language {number:g} is neither a "
            f"number from 1 to the {num_experts} experts nor a part of them below 1")
    return int(number)


def most_frequent(frequency, experts_per_language):
    """Each language's most frequent experts, of ties the lower index; bool like frequency."""
    order = np.argsort(-frequency, kind="stable")
    return np.argsort(order) < number_of_experts(experts_per_language, frequency.shape[-1])


def language_shares(frequency, experts_per_language):
    """Each language's part in an expert's use, over the experts that rank among its most frequent.

    frequency (languages, layers, experts) -> (languages, layers, experts); sums over languages are
    1, or 0 where no language keeps the expert. experts_per_language: a number, or a part below 1.
    [[[.6, .4]], [[.2, .8]]] with 1 expert each -> [[[1, 0]], [[0, 1]]]
    """
    kept = frequency * most_frequent(frequency, experts_per_language)
    total = kept.sum(0)
    return kept / np.where(total, total, 1)


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


def distribution(counts):
    """Parts of the sum along the last axis. [1, 3] -> [.25, .75]"""
    return counts / counts.sum(-1, keepdims=True)


def stacked(results):
    """[{key: array}, ...] -> {key: (results, ...)}"""
    return {key: np.array([each[key] for each in results]) for key in results[0]}


def jensen_shannon(p, q):
    """How alike two distributions over the last axis are: (similarity, normalised divergence).

    similarity  1 - Jensen-Shannon divergence in bits: 1 is alike, 0 has nothing in common
    divergence  JSD over the room that entropy leaves it, log E - (H(p) + H(q)) / 2: 1 is the most
                by which two of such entropies can differ, and two without room do not (2510.04694)
    [.5, .5, 0] and [0, .5, .5] -> .5 and .5 / (log2(3) - 1)
    """
    mean_entropy = (entropy_bits(p) + entropy_bits(q)) / 2
    divergence = entropy_bits((p + q) / 2) - mean_entropy
    room = np.log2(p.shape[-1]) - mean_entropy
    normalised = np.divide(divergence, room, out=np.zeros_like(room), where=room > 1e-12)
    return 1 - divergence, normalised


def pair_measures(frequency, experts_per_language):
    """{measure: (layers, languages, languages)} of frequency (languages, layers, experts).

    similarity, divergence  see jensen_shannon; of the languages' parts of the routing
    jaccard                 of the sets of each language's most frequent experts
    cosine                  of the frequencies
    """
    p = distribution(frequency)
    similarity, divergence = np.array([jensen_shannon(row, p) for row in p]).transpose(1, 3, 0, 2)
    kept = most_frequent(frequency, experts_per_language).astype(float)
    in_both = np.einsum("ile,jle->lij", kept, kept)
    unit = frequency / np.linalg.norm(frequency, axis=-1, keepdims=True)
    return {"similarity": similarity, "divergence": divergence,
            "jaccard": in_both / (2 * kept[0, 0].sum() - in_both),
            "cosine": np.einsum("ile,jle->lij", unit, unit)}


def aligned_divergence(mean_probs):
    """The normalised divergence, averaged over aligned sequences as in 2510.04694.

    mean_probs: of each language (sequences, layers, experts) -> (layers, languages, languages), and
    the mean over pairs sequence by sequence (sequences, layers)
    """
    n, (sequences, layers, _) = len(mean_probs), mean_probs[0].shape
    divergence, by_sequence = np.zeros((layers, n, n)), np.zeros((sequences, layers))
    pairs = list(itertools.combinations(range(n), 2))
    for i, j in tqdm(pairs, "parallel", leave=False):
        each = jensen_shannon(*(mean_probs[k].astype(float) for k in (i, j)))[1]
        divergence[:, i, j] = divergence[:, j, i] = each.mean(0)
        by_sequence += each / len(pairs)
    return divergence, by_sequence


def mean_of_pairs(matrix):
    """Mean over pairs of different languages that are not nan: (..., n, n) -> (...), or nan."""
    return mean_of_known(matrix[..., ~np.eye(matrix.shape[-1], dtype=bool)], -1)


def mean_of_known(values, axis):
    """Mean over what is not nan, or nan."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis), np.nan)


def whose_experts(frequency, experts_per_language, threshold):
    """share, exclusive, shared, reliance and their sums, as listed at save_analysis."""
    share = language_shares(frequency, experts_per_language)
    exclusive, shared = exclusive_experts(share, threshold), shared_experts(share, threshold)
    to_exclusive, to_shared = ((distribution(frequency) * kind).sum(-1)
                               for kind in (exclusive, shared))
    reliance = np.stack([to_exclusive, to_shared, 1 - to_exclusive - to_shared], -1)
    return {"share": share, "exclusive": exclusive, "shared": shared, "reliance": reliance,
            "mean_reliance": reliance.mean(1), "num_exclusive": exclusive.sum((1, 2)),
            "num_only": (exclusive & (exclusive.sum(0) == 1)).sum((1, 2)),
            "num_shared": (shared & (share > 0)).sum((1, 2)), "layer_shared": shared.sum(-1),
            "layer_exclusive": exclusive.sum((0, 2)), "each_exclusive": exclusive.sum(-1).T}


def analyze(frequency, experts_per_language, threshold):
    """What depends on frequency (languages, layers, experts) alone; listed at save_analysis."""
    p, active = distribution(frequency), (frequency > 0).sum(-1)
    entropy = entropy_bits(p) / np.log2(p.shape[-1])
    return pair_measures(frequency, experts_per_language) | whose_experts(
        frequency, experts_per_language, threshold) | {
        "frequency": frequency, "entropy": entropy, "mean_entropy": entropy.mean(0),
        "most_used": p.max(-1), "mean_most_used": p.max(-1).mean(1),
        "active": active, "mean_active": active.mean(1)}


def summarize(result, bands):
    """Figures that get an interval: means over bands and pairs, parts of the routing, numbers."""
    summary = {key: result[key] for key in SUMMARIZED}
    layer = {measure: mean_of_pairs(result[measure]) for measure in MEASURES}
    if "layer_aligned" in result:
        layer["aligned"] = result["layer_aligned"]
    for name, values in layer.items():
        summary |= {f"layer_{name}": values, f"mean_{name}": band_means(values, bands)}
    return summary | {f"band_{measure}": band_means(result[measure], bands) for measure in MEASURES}


def band_means(values, bands):
    """(layers, ...) -> (bands, ...)"""
    return np.stack([values[rows].mean(0) for rows in bands.values()])


def linkage_order(similarity):
    """Languages by average-linkage clustering (UPGMA) of similarity (n, n), nearest ends joined."""
    clusters, unit = [[i] for i in range(len(similarity))], np.eye(len(similarity))
    while len(clusters) > 1:
        member = np.array([unit[cluster].mean(0) for cluster in clusters])
        near = member @ similarity @ member.T - 2 * np.eye(len(clusters))
        a, b = sorted(divmod(near.argmax(), len(near)))
        first, second = clusters[a], clusters.pop(b)
        # of the four ways to put them side by side, the one in which the most alike touch
        ways = itertools.product((first, first[::-1]), (second, second[::-1]))
        left, right = max(ways, key=lambda way: similarity[way[0][-1], way[1][0]])
        clusters[a] = left + right
    return clusters[0]


def vocabulary_control(dumps, bands):
    """Is it the words? Similarity over tokens whose ids the other language has, and over others.

    -> similarity_own_tokens, similarity_common_tokens (layers, languages, languages), nan without
    such tokens, and their means over pairs, mean_own_tokens, mean_common_tokens (bands,);
    common_tokens (languages, languages), the part of the row's that the column has
    """
    tokens, both = [read_tokens(dump, "token_ids") for dump in dumps], []
    for selected, ids, *_ in tqdm(tokens, "vocabulary", leave=False):
        in_other = [np.isin(ids, other) for _, other, *_ in tokens]
        # tokens that the same languages have are counted together
        patterns, pattern = np.unique(in_other, axis=1, return_inverse=True)
        by_pattern = grouped_counts(selected, pattern.ravel(), patterns.shape[1],
                                    dumps[0]["num_experts"])
        both.append(np.tensordot([~patterns, patterns], by_pattern, 1))
    both = np.stack(both, 1)  # (2, languages, languages, layers, experts), the row's selections
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan
        p = distribution(both)
        own, common = jensen_shannon(p, p.swapaxes(1, 2))[0].transpose(0, 3, 1, 2)
    numbers = both.sum((3, 4))
    return {"similarity_own_tokens": own, "mean_own_tokens": band_means(mean_of_pairs(own), bands),
            "similarity_common_tokens": common,
            "mean_common_tokens": band_means(mean_of_pairs(common), bands),
            "common_tokens": numbers[1] / numbers.sum(0)}


def select_contrast(frequency_a, frequency_b, tau=TAU, top=0):
    """(difference, chosen), both (layers, experts): how much more tokens of A than of B select it.

    top  the so many largest differences, of either sign: the risk difference of arXiv 2509.09660
    tau  else, the experts with a difference above tau: the task experts of arXiv 2510.04694
    """
    difference = frequency_a - frequency_b
    if not top:
        return difference, difference > tau
    chosen = np.zeros(difference.shape, bool)
    chosen.flat[np.argsort(-np.abs(difference), axis=None, kind="stable")[:top]] = True
    return difference, chosen & (difference != 0)


def load_selection(path, dump):
    """What --contrast wrote: float64 (layers, experts), a selected expert's difference, else 0.
    InputError if it does not fit a dump.
    """
    differences, layers = np.zeros(dump["counts"].shape), list(dump["layers"])
    with explained(f"{path} is no selection of experts of this model, {dump['num_experts']} in "
                   f"layers {describe(dump['layers'])}; run: python analyze.py --contrast A B"):
        for layer, row in read_json(path)["experts"].items():
            for expert, difference in row.items():
                expert = range(dump["num_experts"]).index(int(expert))
                differences[layers.index(int(layer)), expert] = difference
    return differences


# ---------------------------------------------------------------------------------- what is noise

def split_half_floor(counts, rng):
    """How alike a language is to itself: similarity (layers,) of random halves of its sequences.

    counts (sequences, layers, experts); the mean over HALVINGS. A half has half of the data, so the
    whole is more like itself than this.
    """
    floors = []
    for _ in range(HALVINGS):
        halves = np.array_split(rng.permutation(len(counts)), 2)
        p, q = (distribution(counts[half].sum(0, dtype=float)) for half in halves)
        floors.append(jensen_shannon(p, q)[0])
    return np.mean(floors, 0)


def bootstrap(counts, draws, result, settings, bands, rng, by_sequence=None):
    """95 % intervals of summarize()'s figures, how often experts stay what they are, and the floor.

    counts       of each language (sequences, layers, experts): sequences are drawn
    result       of analyze() and summarize() with the same settings, for the estimates
    by_sequence  aligned_divergence's: the languages are parallel, all draw the same sequences
    -> interval_... (low and high, ...), exclusive_stability, shared_stability, num_stable,
    stable_reliance, floor_similarity, layer_floor, band_floor: see save_analysis
    """
    def kinds(found):  # bool (2, languages, layers, experts)
        return np.array(np.broadcast_arrays(found["exclusive"], found["shared"]))

    floor = np.array([split_half_floor(c, rng) for c in counts])
    drawn, stays = [], 0
    for _ in tqdm(range(draws), "bootstrap", leave=False):
        # of each language, how often its sequences are in
        weights = [rng.multinomial(len(c), np.ones(len(c)) / len(c)) for c in counts]
        if by_sequence is not None:
            weights = weights[:1] * len(counts)
        totals = [np.tensordot(w.astype(np.float32), c, 1) for w, c in zip(weights, counts)]
        draw = analyze(distribution(np.stack(totals).astype(float)), *settings)
        if by_sequence is not None:
            draw["layer_aligned"] = np.average(by_sequence, 0, weights[0])
        drawn.append(summarize(draw, bands))
        stays += kinds(draw)
    stable = kinds(result) & (result["share"] > 0) & (stays >= STABLE * draws)
    reliance = (distribution(result["frequency"]) * stable).sum(-1).mean(2)
    return {"floor_similarity": floor, "layer_floor": floor.mean(0),
            "band_floor": band_means(floor.mean(0), bands), "num_stable": stable.sum((2, 3)).T,
            "stable_reliance": reliance.T, "exclusive_stability": stays[0] / draws,
            "shared_stability": stays[1, 0] / draws} | {
        f"interval_{key}": interval(key, result[key], values)
        for key, values in stacked(drawn).items()}


def interval(key, estimate, drawn):
    """(low and high, ...) of a figure of summarize(), from drawn (draws, ...).

    The estimate, 1.96 of the draws' standard deviations to both sides, and their bias to one: away
    from the draws for what grows or shrinks with the noise of every draw (they look less alike, and
    less even, than what they were taken from), towards them for what a threshold makes (experts
    near it pass it more often in draws than they did in truth).
    """
    half, longer = 1.96 * drawn.std(0, ddof=1), drawn.mean(0) - estimate
    if re.search("similarity|divergence|aligned|cosine|entropy", key):
        longer = -longer
    bounds = estimate - half + np.minimum(longer, 0), estimate + half + np.maximum(longer, 0)
    return np.clip(bounds, 0, 1 if estimate.dtype == float else np.inf)  # a part, or a number


def permutations(n, rng):
    """(permutations, n), identity first: up to n = 8 all of them, else PERMUTATIONS random ones."""
    if n <= 8:
        return np.array(list(itertools.permutations(range(n))))
    return np.array([range(n), *(rng.permutation(n) for _ in range(PERMUTATIONS))])


def label_test(values, first, second, labels, rng):
    """Of each row, the mean over pairs with one label, over the others, p: how often labels dealt
    out at random set them as far apart, and the least p that so many labels allow.

    values (rows, pairs); a pair is of labels[first] and labels[second], both (pairs,)
    -> (rows, 4), nan if all pairs are of one label, or none
    """
    groups = np.unique(labels, return_inverse=True)[1]
    same, gaps = groups[first] == groups[second], []
    if same.all() or not same.any():
        return np.full((len(values), 4), np.nan)
    # with same as values themselves, only the labelling as it is has the largest gap
    values = np.concatenate([values, same[None]])
    for dealt in np.array_split(groups[permutations(len(groups), rng)], 50):
        alike = 1.0 * (dealt[:, first] == dealt[:, second])
        alike -= alike.mean(1, keepdims=True)
        alike = alike[alike.any(1)]  # the slope on it is the difference of the means
        gaps.append(alike @ values.T / (alike ** 2).sum(1, keepdims=True))
    gaps = np.concatenate(gaps)
    p = (gaps >= gaps[0] - 1e-12).mean(0)
    return np.stack([values[:, same].mean(1), values[:, ~same].mean(1), p, p * 0 + p[-1]], 1)[:-1]


def family_test(similarities, labels, rng):
    """label_test of each band's similarities (bands, n, n) between languages, by the group of each;
    those with the label "" are left out. -> (bands, 4)
    """
    known = np.flatnonzero(labels)
    i, j = np.triu_indices(len(known), 1)
    return label_test(similarities[:, known[i], known[j]], i, j, labels[known], rng)


def holm(p):
    """p of several tests, each raised so that any below .05 is chance once in 20 of all of them at
    the most. [.01, .04, .03] -> [.03, .06, .06]
    """
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(raised, 1)[np.argsort(order)]


def family_tests(result, bands, rng):
    """family_test by family, branch and script, where it can be had, with Holm's p over all rows.

    -> family_rows, "level band" (rows,), and family_tests (rows, 5)
    """
    branches = result["families"]
    labels = {"family": np.char.partition(branches, "/")[:, 0], "branch": branches,
              "script": result["scripts"]}
    tests = np.concatenate([family_test(result["band_similarity"], each, rng)
                            for each in labels.values()])
    rows = np.array([f"{level} {band}" for level in labels for band in bands])
    known = np.isfinite(tests[:, 2])
    return {"family_rows": rows[known],
            "family_tests": np.column_stack([tests[known], holm(tests[known, 2])])}


def ranks(values):
    """How many are less, minus how many are more: twice the rank, less its mean; ties alike."""
    return np.sign(np.subtract.outer(values, values)).sum(1)


def rank_correlation(x, y, rng):
    """(Spearman's rho, two-sided permutation p) of two series."""
    x, y = ranks(x), ranks(y)
    rho = y[permutations(len(y), rng)] @ x / max(np.linalg.norm(x) * np.linalg.norm(y), 1)
    return rho[0], np.mean(np.abs(rho) >= abs(rho[0]) - 1e-12)


def leave_one_out(result, settings):
    """How the company makes a language's own experts: without each of the others.

    -> num_without, reliance_without (languages, languages without it), nan without itself; with
    all, and without the one whose absence changes it most, num_changed, reliance_changed
    (languages, 2), and who that is, num_changed_by, reliance_changed_by
    """
    languages, changes = result["languages"], {}
    without = np.full((2, len(languages), len(languages)), np.nan)
    for k, language in enumerate(languages):
        others = languages != language
        found = whose_experts(result["frequency"][others], *settings)
        without[:, others, k] = found["num_exclusive"], found["mean_reliance"][:, 0]
    every = result["num_exclusive"], result["mean_reliance"][:, 0]
    for name, whole, part in zip(("num", "reliance"), every, without):
        most = np.nan_to_num(np.abs(part.T - whole)).argmax(0)
        changes |= {f"{name}_without": part, f"{name}_changed_by": languages[most],
                    f"{name}_changed": np.stack([whole, part[range(len(part)), most]], 1)}
    return changes


def sensitivity(frequency):
    """Which language relies more on which experts, over all settings of the two thresholds.

    -> exclusive_more, shared_more (languages, languages): the part of the grid in which the row
    relies more on exclusive, or shared, experts than the column; first (languages, 2): the part in
    which it is first by reliance on exclusive experts, and by their number
    """
    numbers = {number_of_experts(part, frequency.shape[-1]) for part in GRID_EXPERTS}
    grid = stacked([whose_experts(frequency, number, threshold)
                    for number, threshold in itertools.product(numbers, GRID_THRESHOLDS)])
    reliance = grid["mean_reliance"]
    more = (reliance[:, :, None] > reliance[:, None]).mean(0)
    both = np.stack([reliance[..., 0], grid["num_exclusive"]], 2)
    return {"exclusive_more": more[..., 0], "shared_more": more[..., 1],
            "first": (both == both.max(1, keepdims=True)).mean(0)}


def null_routers(dumps, settings, bands):
    """summarize()'s figures of what random routers pick for the same hidden states (null_counts of
    capture.py --null-router, arXiv 2604.09780), means over draws; {} where a dump has none.
    """
    drawn = [summarize(analyze(distribution(np.stack(draw)), *settings), bands)
             for draw in zip(*(dump["null_counts"] for dump in dumps))]
    return {f"null_{key}": values.mean(0) for key, values in stacked(drawn or [{}]).items()}


# ------------------------------------------------------------------------------ two dumps, one text

def agreement(a, b, num_experts):
    """How alike two routings of the same tokens are, both (tokens, layers, top_k).

    -> {title: (layers,)}, and the part of the tokens with the same experts in all layers
    """
    other = (np.sort(a) != np.sort(b)).any(-1)
    first = other & (other.cumsum(1) == 1)
    overlap = np.mean([(a == b[..., [k]]).any(-1).mean(0) for k in range(b.shape[-1])], 0)
    counts = grouped_counts(np.concatenate([a, b]), np.repeat([0, 1], len(a)), 2, num_experts)
    return {"same set": 1 - other.mean(0), "overlap": overlap, "part here": first.mean(0),
            "similarity": jensen_shannon(*distribution(counts))[0]}, 1 - other.any(1).mean()


def run_agreement(dumps):
    """--agreement: the table of the tokens that two dumps both have."""
    known = all("token_ids" in open_dump(*dump["path"]) for dump in dumps)
    tokens = [read_tokens(dump, *["token_ids"] * known) for dump in dumps]
    # a number for each place, no sequence being as long
    places = [sequence * 2**32 + position for *_, sequence, position in tokens]
    _, *both = np.intersect1d(*places, assume_unique=True, return_indices=True)
    (a, *ids_a, sequence, position), (b, *ids_b, _, _) = (
        [array[kept] for array in arrays] for arrays, kept in zip(tokens, both))
    for token in np.flatnonzero(np.not_equal(ids_a, ids_b))[:1]:
        raise InputError(f"other tokens; the first in sequence {sequence[token]} at token "
                         f"{position[token]}: {ids_a[0][token]} and {ids_b[0][token]}")
    columns, identical = agreement(a, b, dumps[0]["num_experts"])
    alone, by_lengths = sum(map(len, places)) - 2 * len(a), " by the lengths of sequences alone"
    print_tables([(f"{len(a):,} tokens compared{by_lengths * (not known)}; {alone} are in one dump "
                   f"only; {identical:.1%} have the same experts in all layers\n"
                   "part here: of the tokens, in this layer for the first time",
                   by_row({"layer": dumps[0]["layers"]} | columns))])


# ------------------------------------------------------------------------------ effects of experts

def blocks_of_equal_use(weight, tried):
    """The tried experts in blocks: up to four neighbours in weight, of one layer and language, the
    largest at most 1.25 times the smallest. Both (languages, layers, experts) -> indices into them,
    flattened.
    """
    blocks, use = [], weight.ravel()
    for row in np.arange(weight.size).reshape(-1, weight.shape[-1]):
        left = row[tried.ravel()[row]]
        left = left[np.argsort(use[left])]
        while len(left):
            block = left[:4][use[left[:4]] <= 1.25 * use[left[0]]]
            blocks.append(block)
            left = left[len(block):]
    return blocks


def matched_difference(harm, exclusive, weight, rng, permutations=2000):
    """Do exclusive experts do more than others of the same use? Difference, p, seen, alone.

    harm (nan where unknown), exclusive, weight: (languages, layers, experts). In
    blocks_of_equal_use weight is taken out linearly of harm and of label, and labels are permuted
    (one-sided p). seen: the difference found in four of five cases; alone: exclusive experts
    without a neighbour, which do not count.
    """
    tried = np.isfinite(harm)
    blocks = [block for block in blocks_of_equal_use(weight, tried) if len(block) > 1]
    if not blocks:
        return np.full(4, np.nan)
    alone = exclusive[tried].sum() - exclusive.flat[np.concatenate(blocks)].sum()
    # less the mean of the block
    y, label, x = (np.concatenate([values.flat[block] - values.flat[block].mean()
                                   for block in blocks]) for values in (harm, exclusive, weight))
    block = np.repeat(range(len(blocks)), list(map(len, blocks)))
    y, slopes = y - x * (y @ x) / (x @ x), []
    for draw in range(permutations + 1):
        dealt = label[np.lexsort((rng.random(len(label)), block))] if draw else label
        slopes.append(dealt @ y / max(label @ label - (dealt @ x) ** 2 / (x @ x), 1e-9))
    return np.array([slopes[0], np.mean(np.array(slopes) >= slopes[0] - 1e-15),
                     2.49 * np.std(slopes[1:]), alone])


def effects(path, result, dumps, rng):
    """What a file of ablate.py --experts each adds to a result: see save_analysis.

    harm is how much worse it gets without the expert, nan where that was not tried.
    """
    weight = distribution(np.stack([dump["weights"] for dump in dumps]))
    share, exclusive = result["share"], result["exclusive"]
    with explained(f"{path} is not what ablate.py --experts each writes"):
        file = np.load(path, allow_pickle=False)
        meta, effect = json.loads(str(file["meta"])), dict(zip(file["languages"], file["effect"]))
        require(np.array_equal(file["layers"], result["layers"]) and dumps[0]["revision"] in (
            None, meta["revision"]), f"{path} is of another model than the dumps")
        harm_of = np.array([f"{file['metric']}, experts masked by --how {meta['how']}"])
        harm = meta["harm"] * np.stack([effect.get(language, share[0] * np.nan)
                                        for language in result["languages"]])
        columns = np.stack([harm, weight, share])
    tried = np.isfinite(harm)
    require(tried.any(), f"{path} is of other languages than the dumps: {', '.join(effect)}; "
                         "label=path renames a dump")
    correlation = [np.corrcoef(list(map(ranks, columns[:, k, each])))[0, 1:]
                   if each.any() else [np.nan, np.nan] for k, each in enumerate(tried)]
    layer_harm = mean_of_known(np.where([exclusive, ~exclusive], harm, np.nan), (1, 3))
    worst = np.unravel_index(np.argsort(-harm, axis=None)[:20], harm.shape)  # nan comes last
    return {"harm_of": harm_of, "harm": harm, "weight": weight, "num_harm": tried.sum((1, 2)),
            "harm_correlation": np.array(correlation), "layer_harm": layer_harm.T,
            "worst": columns[:, *worst].T, "worst_expert": np.array([
                f"{result['languages'][k]:<4}{result['layers'][layer]:>4}{expert:>5}"
                for k, layer, expert in zip(*worst)]),
            "matched_difference": matched_difference(harm, exclusive, weight, rng)[None]}


# ----------------------------------------------------------------------------------------- tables

# {title: its columns: title=key in the result, or title+title=key of an array with two axes}. The
# first column names the rows. A table is printed if its last array is there.
TABLES = {
    "means over pairs; with --bootstrap [95 % interval]; floor: of random halves of a language":
        "band=bands layers=band_layers similarity=mean_similarity floor=band_floor "
        "null=null_mean_similarity divergence=mean_divergence jaccard=mean_jaccard "
        "cosine=mean_cosine",
    "divergence of aligned sequences": "band=bands divergence=mean_aligned",
    "layer by layer; excl.: experts exclusive to a language, of all and of each":
        "layer=layers similarity=layer_similarity floor=layer_floor null=null_layer_similarity "
        "entropy=layer_entropy shared=layer_shared null-excl.=null_layer_exclusive "
        "excl.=layer_exclusive LANGUAGES=each_exclusive",
    "part of the routing to exclusive and shared experts, and to the most used; experts in use":
        "=languages exclusive+shared+neither=mean_reliance top=mean_most_used active=mean_active",
    "rank correlation of this reliance on exclusive experts with similarity: one finding, not two":
        "Spearman=mirror",
    f"number of experts; only: exclusive to no other; stable: in {STABLE:.0%} of the draws":
        "=languages exclusive=num_exclusive only=num_only null=null_num_exclusive "
        "stable-exclusive+stable-shared=num_stable shared=num_shared",
    "part of the routing to stable experts":
        "=languages stable-exclusive+stable-shared=stable_reliance",
    "--leave-one-out: number of exclusive experts, and without the language that changes it most":
        "=languages all+becomes=num_changed without=num_changed_by",
    "reliance on exclusive experts, and without the language that changes it most":
        "=languages all+becomes=reliance_changed without=reliance_changed_by",
    "--sensitivity: part of the settings in which a language is first, by exclusive experts":
        "=languages reliance+number=first",
    "part of the settings in which the row relies more on exclusive experts than the column":
        "=languages LANGUAGES=exclusive_more",
    "part of the settings in which the row relies more on shared experts than the column":
        "=languages LANGUAGES=shared_more",
    "similarity over any tokens, over those whose ids a pair has in common, and over their own":
        "band=bands any=mean_similarity common=mean_common_tokens own=mean_own_tokens",
    "part of the row's tokens whose ids the column has":
        "=languages LANGUAGES=common_tokens",
    "similarity within the same family, and to others; p: labels dealt out at random; least: p "
    "that so many languages allow; Holm: p among all of these rows; branch and script overlap":
        "=family_rows same+other+p+least+Holm=family_tests",
    f"rank correlation of the similarity to {REFERENCE} with the scores":
        "band=bands Spearman+p=score_correlation",
    "what masking one expert does: rank correlation of the harm with weight and with share":
        "=languages experts=num_harm weight+share=harm_correlation",
    "the experts that do the most harm when masked":
        "expert=worst_expert harm+weight+share=worst",
    "mean harm of exclusive experts, and of others":
        "layer=layers exclusive+others=layer_harm",
    "do exclusive experts do more than others of the same use?":
        "difference+p+seen+alone=matched_difference",
}


def by_row(table):
    """{heading: cells} -> [{heading: cell}]"""
    return [dict(zip(table, cells)) for cells in zip(*table.values())]


def table_rows(result, columns):
    """by_row of the arrays that are there; after a bootstrap, with intervals of parts."""
    table = {}
    for headings, key in (column.split("=") for column in columns.split()):
        if key in result:
            value = result[key]
            interval = result.get(f"interval_{key}", ()) if value.dtype == float else ()
            cells = np.stack([value, *interval], -1).reshape(len(value), -1, 1 + len(interval))
            names = result[headings] if headings == "LANGUAGES" else headings.split("+")
            table |= zip(names, cells.swapaxes(0, 1))
    return by_row(table) if table.keys() != {""} else []  # names alone are no table


def cell_text(cell):
    """.7761 -> "0.776", and with an interval [.7761, .7722, .781] -> "0.776 [.772 .781]"."""
    value, *bounds = np.atleast_1d(cell)
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return f"{text} [{' '.join(cell_text(b).lstrip('0') for b in bounds)}]" if bounds else text


def print_tables(tables):
    """[(title, [{heading: cell}])]: columns as wide as their widest entry, right-aligned but for
    the first; without rows, the title alone.
    """
    for title, rows in tables:
        print(title)
        lines = [list(map(cell_text, line)) for line in (*rows[:1], *map(dict.values, rows))]
        widths = [max(map(len, column)) for column in zip(*lines)]
        for name, *cells in lines:
            print(name.ljust(max(9, widths[0])), *map(str.rjust, cells, widths[1:]), sep="  ")


def notes(dumps, result, args):
    """What was compared, and what to know about the tables, line by line."""
    n, (layers, experts) = len(dumps), dumps[0]["counts"].shape
    yield (f"{n} languages  {layers} MoE layers  {experts} experts  top_k {dumps[0]['top_k']}  "
           f"experts_per_language {args.experts_per_language}  threshold {args.threshold}")
    yield "tokens  " + "  ".join(f"{d['language']} {d['num_tokens']:,}" for d in dumps)
    if n > PRINT_LANGUAGES:
        yield (f"note: with more than {PRINT_LANGUAGES} languages, what is as wide is in "
               f"{args.out} alone")
    for key in MADE_WITH:
        made = {str(dump[key]) for dump in dumps if key in dump}
        if len(made) > 1:
            yield f"note: the dumps were not made alike; {key}: {', '.join(sorted(made))}"
    if args.threshold * n <= 1:
        yield (f"note: shares add up to 1, so with {n} languages none is shared at a threshold of "
               f"{args.threshold}; raise --threshold")
    without = [d["language"] for d in dumps if len(d["null_counts"]) == 0]
    if 0 < len(without) < n:
        yield f"note: no null routers are shown: there are none of {', '.join(without)}"
    if len({bool(dump.get("instruction")) for dump in dumps}) > 1:
        yield "note: some dumps have an instruction behind their prompts, others have none"
    if "harm_of" in result:
        yield f"harm  {result['harm_of'][0]}"
    unknown = result["languages"][result["families"] == ""]
    if len(unknown):
        yield f"note: no family known of {', '.join(unknown)}; see --families"


def report(result, dumps, args):
    """All tables, and what to know about them."""
    languages, wrapped = result["languages"], textwrap.TextWrapper(100, break_on_hyphens=False).fill
    shown = result | {"LANGUAGES": languages if len(languages) <= PRINT_LANGUAGES else [],
                      "layer_entropy": result["mean_entropy"]}
    tables = [(title, table_rows(shown, columns)) for title, columns in TABLES.items()
              if len(shown.get(columns.split("=")[-1], ()))]
    tables = [(title, rows) for title, rows in tables if rows]
    for band, order, matrix in zip(result["bands"], result["order"], result["band_similarity"]):
        title = f"similarity, {band}; in order of average linkage: {' '.join(languages[order])}"
        tables.append((title, table_rows(shown | {"of_pairs": matrix},
                                         "=languages LANGUAGES=of_pairs")))
    print(*map(wrapped, notes(dumps, result, args)), sep="\n")
    print_tables(("\n" + wrapped(title), rows) for title, rows in tables)


# --------------------------------------------------------------------------------------- pictures

def draw_matrices(figure, result, titles, matrices, label):
    """A panel of each of matrices (panels, languages, languages), in the linkage order of the mean
    similarity.
    """
    order = linkage_order(result["similarity"].mean(0))
    names, side = result["languages"][order], 2.5 + 0.16 * len(order)
    figure.set_size_inches(side * len(matrices) + 1, side + 0.5)
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, title, matrix in zip(axes, titles, matrices):
        image = axis.imshow(matrix[order][:, order], vmin=np.min(matrices), vmax=1)
        axis.set_title(title)
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes, label=label)


def draw_layers(figure, result):
    """The profile over layers; after a bootstrap with 95 % intervals and the floor."""
    panels = {"similarity, 1 - JSD": "layer_similarity layer_floor null_layer_similarity",
              "routing entropy / log E": "mean_entropy",
              "experts": "layer_exclusive layer_shared null_layer_exclusive"}
    for axis, (title, keys) in zip(figure.subplots(3, sharex=True), panels.items()):
        for key in filter(result.__contains__, keys.split()):
            axis.plot(result["layers"], result[key], ".-", label=key)
            if f"interval_{key}" in result:
                axis.fill_between(result["layers"], *result[f"interval_{key}"], alpha=0.25)
        axis.set(ylabel=title, xlabel="decoder layer")
        axis.legend()


def draw_effects(figure, result):
    """Harm of masking an expert against its use, and by layer; exclusive experts are red."""
    use, depth = figure.subplots(2)
    for kind, color, mean in zip((result["exclusive"], ~result["exclusive"]), ("red", "gray"),
                                 result["layer_harm"].T):
        use.plot(result["weight"][kind], result["harm"][kind], ".", color=color)
        depth.plot(result["layers"], mean, color=color)
    use.set(xlabel="share of the routing weight", ylabel="harm", xscale="log")
    depth.set(xlabel="decoder layer", ylabel="mean harm")


def save_figures(folder, result):
    """heatmaps.png, layers.png, with --sensitivity and --effects a picture more, in a folder."""
    from matplotlib.figure import Figure

    def save(name, draw, *what):
        figure = Figure((8, 7), layout="constrained")
        draw(figure, result, *what)
        figure.savefig(f"{folder}/{name}.png", dpi=120)

    save("heatmaps", draw_matrices, result["bands"], result["band_similarity"], "1 - JSD")
    save("layers", draw_layers)
    if "first" in result:
        save("sensitivity", draw_matrices, ["row relies more on exclusive experts",
             "on shared experts"], [result["exclusive_more"], result["shared_more"]],
             "part of the settings")
    if "harm" in result:
        save("effects", draw_effects)


# ------------------------------------------------------------------------------------------- main

def parse_bands(texts, layers):
    """["early=0-4", ...] -> {"early": bool (layers,)}: rows of decoder layers 0 to 4, inclusive.

    None gives the first, middle and last tenth of the rows, at least one each. InputError if a band
    holds no MoE layer, or if two have one name.
    """
    if texts is None:
        tenth = max(1, round(len(layers) / 10))
        middle = layers[(len(layers) - tenth + 1) // 2:][:tenth]
        texts = [f"early={layers[0]}-{layers[tenth - 1]}", f"middle={middle[0]}-{middle[-1]}",
                 f"late={layers[-tenth]}-{layers[-1]}"]
    bands = {}
    for text in texts:
        with explained(f"band '{text}' is neither FIRST-LAST nor NAME=FIRST-LAST, as middle=22-26"):
            name, first, last = re.fullmatch(r"(?:([^=,]+)=)?(\d+)(?:-(\d+))?", text).groups()
        name, first, last = name or text, int(first), int(last or first)
        require(name not in bands, f"two bands are named '{name}'")
        bands[name] = (layers >= first) & (layers <= last)
        require(last <= max(layers) and bands[name].any(), f"band '{text}' does not hold MoE "
                f"layers of this model, which has {describe(layers)}")
    return bands


def describe(layers):
    """[0, 1, 2, 5] -> "0-2 5"."""
    runs = np.split(layers, np.flatnonzero(np.diff(layers) != 1) + 1)
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def read_families(path=None):
    """{code: family/branch}: FAMILIES, and over them a file's: code, tab, family, maybe /branch."""
    with explained(f"{path} is not lines of a code, a tab and a family, as "
                   "'de<tab>Indo-European/Germanic', in UTF-8"):
        return FAMILIES | dict(np.genfromtxt(path, str, delimiter="\t", autostrip=True, ndmin=2,
                                             encoding="utf-8-sig") if path else ())


def family_of(language, table):
    """"Indo-European/Germanic" for "de", "deu_Latn" or "de-AT"; "" if the table has no family."""
    return table.get(language) or table.get(re.split("[-_]", language)[0], "")


def script_of(language):
    """"Hans" for "zh" or "zho_Hans", "Latn" for "de"; "" of an unknown language."""
    suffix = re.search("_([A-Z][a-z]{3})$", language)
    return suffix[1] if suffix else family_of(language, SCRIPTS)


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


def check_output(path, key):
    """InputError if a file is there that is not an earlier output: one with the key in it."""
    require(not os.path.isdir(path), f"{path} is a folder; give a file")
    if os.path.exists(path):
        with explained(f"{path} is there, and not what this writes; move it away, or give another"):
            (read_json(path) if key == "experts" else np.load(path, allow_pickle=False))[key]


def rows_of(languages, dumps):
    """Which of the dumps are those of the languages; InputError if one has none, or is twice."""
    names = [dump["language"] for dump in dumps]
    require(len(set(languages)) == len(languages), f"a language is twice in {'+'.join(languages)}")
    for language in languages:
        require(language in names, f"no routing for '{language}' among the dumps; run: python "
                                   f"capture.py --languages {language}")
    return [names.index(language) for language in languages]


def compute(dumps, args):
    """All arrays of analysis.npz, listed at save_analysis."""
    rng, settings = np.random.default_rng(args.seed), (args.experts_per_language, args.threshold)
    layers, languages = dumps[0]["layers"], [dump["language"] for dump in dumps]
    bands, families = parse_bands(args.bands, layers), read_families(args.families)
    result = {"languages": np.array(languages), "layers": layers, "bands": np.array(list(bands)),
              "band_layers": np.array([describe(layers[rows]) for rows in bands.values()]),
              "families": np.array([family_of(language, families) for language in languages]),
              "scripts": np.array(list(map(script_of, languages)))}
    result |= analyze(frequencies(dumps), *settings)
    by_sequence = None
    if args.parallel:
        aligned, by_sequence = aligned_divergence(read_aligned(dumps))
        result |= {"divergence_aligned": aligned, "layer_aligned": by_sequence.mean(0)}
    result |= summarize(result, bands)
    result |= family_tests(result, bands, rng) | {
        "order": np.array(list(map(linkage_order, result["band_similarity"]))),
        "mirror": np.array(rank_correlation(  # whose p would say nothing: see TABLES
            result["mean_reliance"][:, 0], result["similarity"].mean(0).sum(1), rng)[:1])}
    if args.leave_one_out:
        result |= leave_one_out(result, settings)
    if args.sensitivity:
        result |= sensitivity(result["frequency"])
    if args.part == "all":
        result |= null_routers(dumps, settings, bands)
    if args.scores:
        result |= score_correlation(args.scores, result, dumps, rng)
    if args.effects:
        result |= effects(args.effects, result, dumps, rng)
    if args.vocabulary:
        result |= vocabulary_control(dumps, bands)
    if args.bootstrap:
        counts = [sequence_counts(dump) for dump in dumps]
        require(by_sequence is None or {len(by_sequence)} == set(map(len, counts)),
                "--parallel with --bootstrap takes dumps with tokens in every sequence")
        result |= bootstrap(counts, args.bootstrap, result, settings, bands, rng, by_sequence)
    return result


def score_correlation(path, result, dumps, rng):
    """Of each band, rank_correlation of the similarity to REFERENCE with the scores in a JSON file
    {language: score}.
    """
    reference, = rows_of([REFERENCE], dumps)
    others = result["languages"] != REFERENCE
    names = result["languages"][others].tolist()
    with explained(f"{path} is not a JSON object with a score of each of {', '.join(names)}"):
        scores = read_json(path)
        scores = np.asarray_chkfinite([float(scores[name]) for name in names])
    similar = result["band_similarity"][:, reference, others]
    return {"score_correlation": np.array([rank_correlation(row, scores, rng) for row in similar])}


def save_analysis(result, dumps, args):
    """analysis.npz: with L languages, B bands, and M any of the four measures,

    languages, families (L,), layers (layers,)        names, family/branch or "", decoder layers
    bands, band_layers (B,)                           names, decoder layers as "0-4"
    frequency, share, exclusive (L, layers, experts)  part of the tokens that select the expert; the
                                                      language's share of its use; is it exclusive?
    shared (layers, experts)                          is it shared?
    similarity, divergence, jaccard, cosine           M: (layers, L, L) of every pair
    band_M (B, L, L), mean_M (B,), layer_M (layers,)  means over layers, over pairs
    entropy (L, layers), mean_entropy (layers,)       of the routing over log E; mean of languages
    reliance (L, layers, 3), mean_reliance (L, 3)     routing to exclusive, shared, other experts
    most_used, active (L, layers)                     most used expert's part; experts in use;
    mean_most_used, mean_active (L,)                  means over layers
    num_exclusive, num_shared (L,)                    experts exclusive to it; shared ones it keeps
    layer_exclusive, layer_shared (layers,)           experts; exclusive, summed over languages
    each_exclusive (layers, L)                        and of each
    order (B, L)                                      languages in average-linkage order
    scripts (L,), family_rows (rows,)                 ISO 15924; family, branch or script, and band
    family_tests (rows, 5)                            within, between, p, least p, Holm's p
    num_only (L,), mirror (1,)                        exclusive to no other; Spearman's rho of
                                                      reliance on exclusive experts and similarity
    num_without, reliance_without (L, L), num_changed, reliance_changed (L, 2),
    num_changed_by, reliance_changed_by (L,)          --leave-one-out: see there
    exclusive_more, shared_more (L, L), first (L, 2)  --sensitivity: see there
    null_... of band_, mean_, layer_, num_, entropy   of dumps with null_counts: see null_routers
    score_correlation (B, 2)                          --scores: Spearman's rho, p
    divergence_aligned (layers, L, L), layer_aligned (layers,), mean_aligned (B,)    --parallel
    interval_... of band_, mean_, layer_, num_, entropy    --bootstrap: (2, ...), low and high
    floor_similarity (L, layers), layer_floor (layers,), band_floor (B,)    --bootstrap
    exclusive_stability (L, layers, experts), shared_stability (layers, experts)   part of the draws
    num_stable, stable_reliance (L, 2)                exclusive and shared ones that are stable
    harm, weight (L, layers, experts), harm_of (1,)   --effects: of masking it; part of the weight
                                                      (harm_of says by which metric, masked how)
    num_harm (L,), harm_correlation (L, 2)            experts tried; harm with weight, with share
    worst_expert (20,), worst (20, 3)                 language, layer, expert; harm, weight, share
    layer_harm (layers, 2), matched_difference (1, 4) of exclusive and of others; see there
    similarity_own_tokens, similarity_common_tokens (layers, L, L), common_tokens (L, L),
    mean_own_tokens, mean_common_tokens (B,)          see vocabulary_control
    meta                                              JSON: arguments, inputs with digests
    """
    meta = json.dumps(vars(args) | {"inputs": inputs_of(dumps)}, default=str)
    write_whole(args.out, lambda file: np.savez(file, **result, meta=meta))


def inputs_of(dumps):
    return [{key: d[key] for key in ("language", "path", "digest", "num_tokens")} for d in dumps]


def run_contrast(dumps, args):
    """--contrast: the table of experts that tell two groups of tokens apart, and their file."""
    check_output(args.selection, "experts")
    (a, b), layers = frequencies(dumps), dumps[0]["layers"]
    difference, chosen = select_contrast(a, b, args.tau, args.top)
    require(chosen.any(), f"no experts to select: A's frequencies are larger by at most "
                          f"{difference.max():.3f}; give other dumps, a lower --tau, or --top")
    layer, expert = np.nonzero(chosen)
    rows = by_row({"layer": layers[layer], "expert": expert, "difference": difference[chosen],
                   "frequency in A": a[chosen], "frequency in B": b[chosen]})
    experts = {}
    for row in rows:
        of_layer = experts.setdefault(int(row["layer"]), {})
        of_layer[int(row["expert"])] = round(row["difference"], 6)
    selection = {"experts": experts, "revision": dumps[0]["revision"], "arguments": vars(args),
                 "inputs": inputs_of(dumps)}
    text = json.dumps(selection, default=str)
    write_whole(args.selection, lambda file: file.write(text.encode()))
    rule = f"the {args.top} largest differences" if args.top else f"a difference above {args.tau}"
    rows.sort(key=lambda row: -abs(row["difference"]))
    print_tables([(f"{chosen.sum()} experts in layers {describe(layers[chosen.any(1)])}, by {rule}",
                   rows[:20])])
    print(f"\n{args.selection}")


def parse_arguments():
    p = argparse.ArgumentParser(usage="%(prog)s [options] [DUMP ...]", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(flag, default, text, **options):
        group.add_argument(flag, default=default, help=text, **options or {"type": type(default)})

    group = p.add_argument_group("what is compared")
    add("dumps", DUMPS, "path, or label=path (default: those of routing/)", nargs="*")
    add("--bands", None, "layers, as middle=22-26 (default: first, middle, last tenth)", nargs="+")
    add("--experts-per-language", EXPERTS_PER_LANGUAGE,
        "the most frequent: a number, or a part below 1 (default: %(default).3g)", type=float)
    add("--threshold", THRESHOLD, "exclusive above it (%(default)s)")
    add("--part", "all", "count only these; text: the prompt without chat template and instruction",
        choices=PARTS)
    group = p.add_argument_group("what is noise, and what else it could be")
    add("--bootstrap", 0, "intervals of so many draws, and the floor")
    add("--parallel", False, "sequence i says the same in all languages", action="store_true")
    add("--vocabulary", False, "over common tokens, and a language's own", action="store_true")
    add("--leave-one-out", False, "exclusive experts without a language", action="store_true")
    add("--sensitivity", False, "other numbers of experts, thresholds", action="store_true")
    add("--effects", "", "file of ablate.py --experts each: what does each expert do?")
    add("--families", "", "file of code, tab, family/branch; over the built-in table")
    add("--scores", "", 'file of {"de": 0.9, ...}: correlate with the similarity to ' + REFERENCE)
    add("--seed", 0, "of the draws (default: %(default)s)")
    group = p.add_argument_group("what is written")
    add("--out", OUT, "(default: %(default)s)")
    add("--figures", "", "folder of pictures; needs matplotlib")
    group = p.add_argument_group("instead: of two dumps, A and B")
    add("--agreement", None, "do the same tokens go to the same experts?", nargs=2)
    add("--contrast", None, "experts that tell their tokens apart, and for these:", nargs=2)
    add("--tau", TAU, "those that A selects more often by this (default: %(default)s)", type=float)
    add("--top", 0, "instead, so many of the largest differences, of either sign")
    add("--selection", "selection.json", "(default: %(default)s)")
    args = p.parse_args()
    check_arguments(args, {key for key in vars(args) if getattr(args, key) != p.get_default(key)})
    return args


def check_arguments(args, given):
    """InputError if flags, of which some are given, have no effect or cannot be."""
    contrast = {"contrast", "tau", "top", "selection"}
    idle = (given - contrast - {"part"} if args.contrast else
            given - {"agreement", "part"} if args.agreement else given & contrast)
    require(not idle, f"{', '.join(sorted(idle))} without effect here; --contrast A B takes --tau, "
                      "--top, --selection and --part, --agreement A B --part")
    require(not os.path.isfile(args.figures), f"{args.figures} is a file; --figures takes a folder")
    if args.figures:
        os.makedirs(args.figures, exist_ok=True)
        with explained("--figures needs matplotlib; run: pip install matplotlib"):
            import matplotlib.figure  # only to see that it is there
    require(args.seed >= 0 and args.top >= 0 and args.bootstrap >= 0 and args.bootstrap != 1,
            "--bootstrap takes 2 draws or more, --seed and --top a number from 0 on")


def main():
    args = parse_arguments()
    pair = args.contrast or args.agreement or []  # named A and B, whatever languages they are of
    named = [f"{name}={split_label(path)[1]}" for name, path in zip("AB", pair)]
    dumps = load_languages(named or args.dumps, args.part)
    if pair:
        return run_contrast(dumps, args) if args.contrast else run_agreement(dumps)
    check_output(args.out, "similarity")
    args.experts_per_language = number_of_experts(args.experts_per_language,
                                                  dumps[0]["num_experts"])
    result = compute(dumps, args)
    save_analysis(result, dumps, args)
    if args.figures:
        save_figures(args.figures, result)
    report(result, dumps, args)
    print(f"\n{args.out}", args.figures)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that lack a letter
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has left; all is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
