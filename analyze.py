"""
Measure which experts of a Mixture-of-Experts model are exclusive to a language,
which are shared, and how similarly languages are routed, layer by layer.

    python analyze.py                     # the dumps that capture.py wrote
    python analyze.py routing/*.npz --bootstrap 1000 --figures figures
    python analyze.py tests/data/qwen3-30b-a3b/*.npz         # Qwen3-30B-A3B

reads   routing dumps, one .npz per language, as capture.py writes them
writes  analysis.npz, whose arrays are listed at save_analysis; with --figures
        two pictures

In each layer, a language keeps its N most frequent experts. Its share of an
expert is its frequency over the sum of those of all languages that keep it. An
expert is exclusive to a language whose share is above a threshold, and shared
if some language keeps it and all shares are below (arXiv 2601.14050). So both
depend on which languages are compared: name the dumps. Needs numpy and tqdm.
Takes a second; with 1000 bootstrap draws, seconds to a minute.
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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
DUMPS = [f"routing/{language}.npz" for language in "bn de en es fr ja sw zh".split()]
EXPERTS_PER_LANGUAGE = 15 / 128  # a language keeps its most frequent experts of each layer:
                                 # a number, or a fraction of all experts below 1. The paper keeps
                                 # 15 of 128 for MGSM and FLORES, and 32 for XQuAD
THRESHOLD = 0.4                  # an expert is exclusive above this share; XQuAD: 0.5
SEGMENT = "all"                  # tokens that count: all, prompt, response, or text, which is the
                                 # prompt without chat template and instruction
OUT = "analysis.npz"
NUM_HALVINGS = 20                # random halvings of each language for split-half similarity
NUM_PERMUTATIONS = 10_000        # random ones; up to 8 languages have all their permutations
MAX_PRINTED_LANGUAGES = 12       # with more, tables with a column per language are not printed

# Family/branch, script (ISO 15924), and the codes of languages: ISO 639-1, and as FLORES names
# them. Heat maps and printed matrices follow this order. Edit it to add a language.
LANGUAGES = """
Afro-Asiatic/Chadic             Latn  ha hau
Afro-Asiatic/Cushitic           Latn  om gaz so som
Afro-Asiatic/Semitic            Arab  ar ara arb
Afro-Asiatic/Semitic            Ethi  am amh
Afro-Asiatic/Semitic            Hebr  he heb
Afro-Asiatic/Semitic            Latn  mt mlt
Atlantic-Congo/Bantu            Latn  lg lug ln lin ny nya rw kin sn sna st sot
Atlantic-Congo/Bantu            Latn  sw swa swh tn tsn ts tso xh xho zu zul
Atlantic-Congo/Kwa              Latn  ak aka tw twi
Atlantic-Congo/Senegambian      Latn  ff fuv wo wol
Atlantic-Congo/Volta-Niger      Latn  ig ibo yo yor
Austroasiatic/Khmer             Khmr  km khm
Austroasiatic/Vietic            Latn  vi vie
Austronesian/Malayo-Polynesian  Latn  ceb fil tl tgl id ind jv jav mg plt mi mri ms msa zsm su sun
Basque                          Latn  eu eus
Creole                          Latn  ht hat
Dravidian                       Knda  kn kan
Dravidian                       Mlym  ml mal
Dravidian                       Taml  ta tam
Dravidian                       Telu  te tel
Indo-European/Albanian          Latn  sq als
Indo-European/Armenian          Armn  hy hye
Indo-European/Baltic            Latn  lt lit lv lvs
Indo-European/Celtic            Latn  cy cym ga gle
Indo-European/Germanic          Latn  af afr da dan de deu en eng is isl nl nld no nor nb nob sv swe
Indo-European/Romance           Latn  ca cat es spa fr fra gl glg it ita pt por ro ron
Indo-European/Hellenic          Grek  el ell
Indo-European/Slavic            Latn  bs bos cs ces hr hrv pl pol sk slk sl slv
Indo-European/Slavic            Cyrl  be bel bg bul mk mkd ru rus sr srp uk ukr
Indo-European/Iranian           Arab  fa pes ps pbt
Indo-European/Iranian           Cyrl  tg tgk
Indo-European/Iranian           Latn  ku kmr
Indo-European/Indo-Aryan        Arab  ur urd
Indo-European/Indo-Aryan        Beng  as asm bn ben
Indo-European/Indo-Aryan        Deva  hi hin mr mar ne npi
Indo-European/Indo-Aryan        Gujr  gu guj
Indo-European/Indo-Aryan        Guru  pa pan
Indo-European/Indo-Aryan        Orya  or ory
Indo-European/Indo-Aryan        Sinh  si sin
Japonic                         Jpan  ja jpn
Kartvelian                      Geor  ka kat
Koreanic                        Hang  ko kor
Mongolic                        Cyrl  mn khk
Sino-Tibetan/Sinitic            Hans  zh zho cmn
Sino-Tibetan/Sinitic            Hant  yue
Sino-Tibetan/Tibeto-Burman      Mymr  my mya
Sino-Tibetan/Tibeto-Burman      Tibt  bo bod
Tai-Kadai                       Laoo  lo lao
Tai-Kadai                       Thai  th tha
Turkic                          Arab  ug uig
Turkic                          Cyrl  kk kaz ky kir tt tat
Turkic                          Latn  az azj tr tur uz uzn
Uralic/Finnic                   Latn  et est fi fin
Uralic/Hungarian                Latn  hu hun
"""
# ------------------------------------------------------------------------------------------------

FORMATS = [1, 2]  # of the dumps that capture.py has written; both have the same arrays
SEGMENTS = {  # the array of a dump that says where each segment of a sequence lies
    "all": None,
    "prompt": "prompt_lengths",
    "response": "prompt_lengths",
    "text": "text_spans",
}
MEASURES = ["similarity", "divergence", "jaccard"]  # of two languages, see pair_measures

# Statistics that get a bootstrap interval, by how resampling biases them: see interval
SMOOTH = [
    "entropy", "layer_entropy",
    "layer_similarity", "mean_similarity", "band_similarity",
    "layer_divergence", "mean_divergence", "band_divergence",
    "layer_aligned", "mean_aligned",
]
THRESHOLDED = [
    "layer_jaccard", "mean_jaccard", "band_jaccard",
    "mean_reliance", "num_exclusive", "num_only", "num_shared",
    "layer_exclusive", "layer_shared",
]


class InputError(Exception):
    """Something that the user can fix; it is printed as one line, with exit status 1."""


# ---------------------------------------------------------------------------------- Reading dumps

@dataclass
class Routing:
    """How one model routed the tokens of L languages."""

    languages: list          # L names, in the order of the dumps
    layers: np.ndarray       # int (layers,), decoder layer of each row; dense layers are left out
    counts: np.ndarray       # int64 (L, layers, experts), tokens that selected the expert
    weight_sums: np.ndarray  # float64 (L, layers, experts), sum of the routing weights given to it
                             # (the counts, if a dump has no weights or a segment is counted)
    null_counts: np.ndarray  # int64 (draws, L, layers, experts), counts of random routers;
                             # 0 draws unless all dumps have some and all tokens are counted
    num_tokens: np.ndarray   # int (L,)
    top_k: int               # experts per token
    segment: str             # the tokens that were counted, see SEGMENTS
    paths: list              # L files
    meta: list               # L dictionaries, among others with capture.py's arguments

    @property
    def num_experts(self):
        return self.counts.shape[-1]

    @property
    def activation_frequency(self):
        """Fraction of the tokens that select each expert, (L, layers, experts).

        Each layer's row sums to top_k. Counts [3, 1] of 4 tokens -> [.75, .25]
        """
        return self.counts / self.num_tokens[:, None, None]

    @property
    def revision(self):
        """Hash or commit of the model; None if no dump names it: those of other engines do not."""
        for meta in self.meta:
            if meta.get("revision") is not None:
                return meta["revision"]
        return None

    @property
    def digests(self):
        """A hash of each language's counts, by which results name the data they were made from."""
        return [hashlib.sha256(counts.tobytes()).hexdigest()[:16] for counts in self.counts]

    @property
    def inputs(self):
        """One dictionary per language that says what was read, for the meta of results."""
        columns = zip(self.languages, self.paths, self.digests, self.num_tokens.tolist())
        return [{"language": language, "path": path, "digest": digest, "num_tokens": num_tokens}
                for language, path, digest, num_tokens in columns]


def load_routing(paths, segment="all"):
    """Read the dumps of several languages, one file each, into a Routing.

    paths    a path or a list of paths to .npz files: of capture.py, or with no more than
             selected_experts (tokens, layers, top_k) and meta, JSON with language and num_experts.
             "label=path" gives the language another name.
    segment  tokens to count, see SEGMENTS; any but "all" needs selected_experts

    InputError if a file is no whole dump, if the dumps are of different models, or if two are of
    the same language.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    if not paths:
        raise InputError("no dumps are named; give routing/*.npz, for example")
    dumps = [read_dump(path, segment) for path in tqdm(paths, "dumps", leave=False, delay=1)]
    check_same_model(dumps)

    num_draws = min(len(dump.null_counts) for dump in dumps)
    without = [dump.languages[0] for dump in dumps if len(dump.null_counts) == 0]
    if 0 < len(without) < len(dumps):
        print(f"note: null routers are left out, since there are none of {', '.join(without)}",
              file=sys.stderr)
    return Routing(
        languages=[dump.languages[0] for dump in dumps],
        layers=dumps[0].layers,
        counts=np.concatenate([dump.counts for dump in dumps]),
        weight_sums=np.concatenate([dump.weight_sums for dump in dumps]),
        null_counts=np.concatenate([dump.null_counts[:num_draws] for dump in dumps], axis=1),
        num_tokens=np.concatenate([dump.num_tokens for dump in dumps]),
        top_k=dumps[0].top_k,
        segment=segment,
        paths=[dump.paths[0] for dump in dumps],
        meta=[dump.meta[0] for dump in dumps],
    )


def check_same_model(dumps):
    """Raise InputError if dumps are of different models, or if two are of the same language."""
    for key in ("num_experts", "top_k", "layers", "revision"):
        known = [dump for dump in dumps if getattr(dump, key) is not None]
        for dump in known[1:]:
            first_value, value = getattr(known[0], key), getattr(dump, key)
            if not np.array_equal(first_value, value):
                if key == "layers":
                    first_value, value = describe(first_value), describe(value)
                raise InputError(f"{known[0].paths[0]} and {dump.paths[0]} are of different "
                                 f"models: {key} {first_value} and {value}")
    path_of = {}
    for dump in dumps:
        language, path = dump.languages[0], dump.paths[0]
        if language in path_of:
            raise InputError(f"{path_of[language]} and {path} are both of '{language}'; leave one "
                             f"out, or rename it: label={path}")
        path_of[language] = path


def read_dump(path, segment):
    """Read and check one dump; return it as a Routing of one language."""
    label, path = split_label(path)
    if not os.path.exists(path):
        raise InputError(f"no such dump: {path}; check the path, name the dumps that you have, or "
                         "run: python capture.py")
    optional = ["counts", "weight_sums", "null_counts", "layers", "sequence_offsets"]
    arrays = read_arrays(path, ["meta"], optional)
    meta = parse_meta(path, arrays["meta"])
    if segment == "all" and "counts" in arrays:
        counts = arrays["counts"]
        if counts.ndim != 2:
            raise InputError(f"{path}: counts is {counts.shape}, not (layers, experts)")
        weight_sums = arrays.get("weight_sums", counts)
        top_k = meta.get("top_k", 0)
        num_tokens = meta.get("num_tokens")
        if num_tokens is None:  # named by records of other software alone
            num_tokens = int(check_offsets(path, arrays.get("sequence_offsets"))[-1])
    else:
        tokens = read_tokens(path, segment)
        num_tokens, _, top_k = tokens.selected_experts.shape
        one_group = np.zeros(num_tokens, int)
        counts = count_by_group(tokens.selected_experts, one_group, 1, meta["num_experts"])[0]
        weight_sums = counts
        if tokens.num_unrecorded > 0:
            print(f"note: {path}: {tokens.num_unrecorded} tokens, whose experts are -1, are left "
                  "out", file=sys.stderr)
    layers = arrays.get("layers", np.arange(len(counts)))
    null_counts = arrays.get("null_counts")
    if null_counts is None or segment != "all":
        null_counts = np.zeros((0, *counts.shape), int)

    language = label or meta.get("language")
    check_counts(path, layers, counts, weight_sums, null_counts, meta)
    check_totals(path, language, segment, counts, num_tokens, top_k, meta)
    return Routing(
        languages=[language],
        layers=layers,
        counts=counts[None].astype(np.int64),
        weight_sums=weight_sums[None].astype(np.float64),
        null_counts=null_counts[:, None].astype(np.int64),
        num_tokens=np.array([num_tokens]),
        top_k=top_k,
        segment=segment,
        paths=[path],
        meta=[meta],
    )


def check_totals(path, language, segment, counts, num_tokens, top_k, meta):
    """Raise InputError unless a dump has a language and tokens, and counts of top_k for each."""
    if not isinstance(language, str) or language == "":
        raise InputError(f"{path} is of the language {language!r}; name it: de={path}")
    if num_tokens == 0:
        raise InputError(f"{path} holds no tokens of the segment '{segment}'")
    tolerance = 0
    if "inexact" in meta:  # counts of software that sums in low precision
        tolerance = 0.05 * num_tokens * top_k
    if top_k == 0 or (np.abs(counts.sum(1) - num_tokens * top_k) > tolerance).any():
        raise InputError(f"{path}: the counts of a layer do not add up to {num_tokens} tokens * "
                         f"top_k {top_k}; capture it again")


def split_label(path):
    """Split "bn=a/b.npz" into ("bn", "a/b.npz"); a path that exists as it is has no label."""
    label, equals, rest = str(path).partition("=")
    if equals and not os.path.exists(path):
        return label, rest
    return None, str(path)


def read_arrays(path, needed, optional=()):
    """Read arrays of an .npz file by name; return {name: array}.

    Optional arrays that the file lacks are left out; a needed one that it lacks is an InputError.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name the files in it: {path}/*.npz")
    names = [*needed, *optional]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names if name in file}
    except Exception as error:  # numpy raises every kind for a damaged file
        raise InputError(f"{path} is not a whole .npz file with arrays of numbers "
                         f"({type(error).__name__})") from error
    for name in needed:
        if name not in arrays:
            raise InputError(f"{path} holds no {name}; capture it again without --stats-only "
                             "(files that other software wrote may not have it)")
    return arrays


def parse_meta(path, text):
    """Parse the JSON meta of a dump; InputError if it is not one of a dump that can be read."""
    try:
        meta = json.loads(str(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"meta of {path} is not JSON: {error}") from error
    if not isinstance(meta, dict) or "num_experts" not in meta:
        raise InputError(f"{path} is not a routing dump, since its meta names no num_experts; give "
                         "an .npz of capture.py")
    for key in ("num_experts", "top_k", "num_tokens"):
        value = meta.get(key, 0)
        if not isinstance(value, int) or not 0 <= value < 2**53:
            raise InputError(f"meta of {path} names {key} {value}, which is no count")
    if meta["num_experts"] > 2**16:
        raise InputError(f"meta of {path} names more than {2**16} experts")
    if meta.get("format", FORMATS[-1]) not in FORMATS:
        raise InputError(f"{path} is of format {meta['format']}, not of {FORMATS}; use the "
                         "analyze.py that belongs to its capture.py")
    if meta.get("shard", "1/1") != "1/1":
        raise InputError(f"{path} is shard {meta['shard']} of a dump; capture it again as a whole")
    return meta


def check_counts(path, layers, counts, weight_sums, null_counts, meta):
    """Raise InputError unless the arrays of a dump have the right types, and fit each other."""
    if layers.ndim != 1 or layers.dtype.kind not in "iu":
        raise InputError(f"{path}: layers is {layers.dtype} {layers.shape}, not integers (layers,)")
    if len(layers) == 0 or (np.diff(layers.astype(np.int64)) <= 0).any():
        raise InputError(f"{path}: layers {layers.tolist()} do not ascend")
    shape = (len(layers), meta["num_experts"])
    for name, array, kinds, expected in (
        ("counts", counts, "iu", shape),
        ("weight_sums", weight_sums, "iuf", shape),
        ("null_counts", null_counts, "iu", null_counts.shape[:1] + shape),
    ):
        if array.dtype.kind not in kinds or array.shape != expected:
            raise InputError(f"{path}: {name} is {array.dtype} {array.shape}, but its layers and "
                             f"num_experts ask for numbers {expected}; capture it again")
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds NaN or infinite numbers; capture it again")
        if name != "weight_sums" and (array < 0).any():
            raise InputError(f"{path}: {name} holds negative numbers; capture it again")


def check_offsets(path, offsets):
    """Return sequence_offsets as int64 (sequences + 1,); InputError unless they rise from 0."""
    if offsets is None:
        raise InputError(f"{path} holds no sequence_offsets; capture it again")
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) == 0:
        raise InputError(f"{path}: sequence_offsets is {offsets.dtype} {offsets.shape}, not "
                         "integers (sequences + 1,)")
    offsets = offsets.astype(np.int64)  # differences of unsigned numbers would never be negative
    if offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise InputError(f"{path}: sequence_offsets do not rise from 0 to the number of tokens")
    return offsets


@dataclass
class Tokens:
    """The tokens of one dump, one sequence after the other."""

    selected_experts: np.ndarray  # int (tokens, layers, top_k)
    sequence: np.ndarray          # int (tokens,), the sequence that each token is in
    position: np.ndarray          # int (tokens,), its position in that sequence, from 0
    token_ids: np.ndarray         # int (tokens,); None if the dump has none
    num_unrecorded: int           # tokens left out, whose experts are -1


def read_tokens(path, segment="all"):
    """Read which experts each token of one dump selected; return Tokens.

    segment  tokens to keep, see SEGMENTS
    Inference engines mark tokens that they did not record by -1 for all experts; these are left
    out. InputError if the file lacks an array that this takes, or if its arrays do not fit.
    """
    if segment not in SEGMENTS:
        raise InputError(f"segment '{segment}' is none of {', '.join(SEGMENTS)}")
    bounds_name = SEGMENTS[segment]
    needed = ["meta", "selected_experts"]
    if bounds_name is not None:
        needed.append(bounds_name)
    arrays = read_arrays(path, needed, ["counts", "sequence_offsets", "token_ids"])
    meta = parse_meta(path, arrays["meta"])
    selected = arrays["selected_experts"]
    if selected.ndim != 3 or selected.dtype.kind not in "iu" or 0 in selected.shape[1:]:
        raise InputError(f"{path}: selected_experts is {selected.dtype} {selected.shape}, not "
                         "integers (tokens, layers, top_k)")
    if selected.dtype == np.uint64:
        selected = selected.astype(np.int64)  # where an engine stores -1 without a sign
    if "counts" not in arrays:  # not from capture.py
        check_selected_experts(path, selected, meta["num_experts"])
    token_ids = arrays.get("token_ids")
    if token_ids is not None and token_ids.shape != selected.shape[:1]:
        raise InputError(f"{path}: token_ids {token_ids.shape} do not fit selected_experts "
                         f"{selected.shape}")

    offsets = check_offsets(path, arrays.get("sequence_offsets", np.array([0, len(selected)])))
    if offsets[-1] != len(selected):
        raise InputError(f"{path}: sequence_offsets do not rise from 0 to the number of tokens, "
                         f"{len(selected)}")
    lengths = np.diff(offsets)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(selected)) - offsets[sequence]

    in_segment = find_segment(path, arrays, segment, sequence, position)
    recorded = selected[:, 0, 0] != -1
    keep = in_segment & recorded
    return Tokens(
        selected_experts=selected[keep],
        sequence=sequence[keep],
        position=position[keep],
        token_ids=None if token_ids is None else token_ids[keep],
        num_unrecorded=int((in_segment & ~recorded).sum()),
    )


def find_segment(path, arrays, segment, sequence, position):
    """Return which tokens of a dump are in a segment, bool (tokens,).

    arrays    of the dump, with the one that SEGMENTS names
    sequence  int (tokens,), the sequence of each token; position its position in the sequence
    """
    num_sequences = len(arrays.get("sequence_offsets", [0, len(sequence)])) - 1
    if segment == "all":
        return np.ones(len(sequence), bool)
    if segment == "text":
        text_spans = arrays["text_spans"]
        check_bounds(path, "text_spans", text_spans, (num_sequences, 2))
        start, stop = text_spans[sequence].T
        return (start <= position) & (position < stop)
    prompt_lengths = arrays["prompt_lengths"]
    check_bounds(path, "prompt_lengths", prompt_lengths, (num_sequences,))
    in_prompt = position < prompt_lengths[sequence]
    return in_prompt if segment == "prompt" else ~in_prompt


def check_bounds(path, name, bounds, shape):
    """Raise InputError unless bounds of segments are integers of the shape."""
    if bounds.shape != shape or bounds.dtype.kind not in "iu":
        raise InputError(f"{path}: {name} is {bounds.dtype} {bounds.shape}, not integers {shape}, "
                         "a row for each sequence")


def check_selected_experts(path, selected, num_experts):
    """Raise InputError unless each token has top_k different experts in range in each layer.

    selected  int (tokens, layers, top_k); tokens whose experts are all -1 are allowed
    """
    in_order = np.sort(selected, axis=-1)
    in_range = (in_order[..., 0] >= 0) & (in_order[..., -1] < num_experts)
    different = (in_order[..., 1:] != in_order[..., :-1]).all(-1)
    unrecorded = (selected == -1).all((1, 2))
    invalid = ~(in_range & different) & ~unrecorded[:, None]  # (tokens, layers)
    if invalid.any():
        token, layer = np.argwhere(invalid)[0]
        raise InputError(
            f"{path}: token {token} has in row {layer} of its layers the experts "
            f"{selected[token, layer].tolist()}, not {selected.shape[2]} different ones below "
            f"{num_experts}. Set placeholder tokens to -1: selected_experts[{token}] = -1; delete "
            f"the row of a dense layer: np.delete(selected_experts, {layer}, axis=1)")


def count_by_group(selected_experts, group, num_groups, num_experts):
    """Count how many tokens of each group selected each expert: int64 (groups, layers, experts).

    selected_experts (tokens, layers, top_k), group int (tokens,)
    InputError if an expert is out of range.
    """
    lowest, highest = selected_experts.min(initial=0), selected_experts.max(initial=0)
    if lowest < 0 or highest >= num_experts:
        raise InputError(f"selected_experts names experts {lowest} to {highest}, but there are "
                         f"{num_experts}; capture it again")
    num_layers = selected_experts.shape[1]
    counts = np.empty((num_groups, num_layers, num_experts), np.int64)
    for layer in range(num_layers):
        # One number for each pair of group and expert
        cells = group[:, None] * num_experts + selected_experts[:, layer].astype(np.int64)
        flat = np.bincount(cells.ravel(), minlength=num_groups * num_experts)
        counts[:, layer] = flat.reshape(num_groups, num_experts)
    return counts


def count_by_sequence(routing):
    """Count each sequence by itself: for each language float32 (sequences, layers, experts).

    Sequences without a token of the segment are left out. float32 is exact below 16.7 million.
    """
    results = []
    for language, path, counts in zip(routing.languages, routing.paths, routing.counts):
        tokens = read_tokens(path, routing.segment)
        present, group = np.unique(tokens.sequence, return_inverse=True)
        if len(present) < 2:
            raise InputError(f"{path} has one sequence of '{language}', but --bootstrap resamples "
                             "sequences; leave it out, or leave out --bootstrap")
        by_sequence = count_by_group(tokens.selected_experts, group, len(present),
                                     routing.num_experts)
        check_recount(path, by_sequence.sum(0), counts)
        results.append(by_sequence.astype(np.float32))
    return results


def check_recount(path, recount, counts):
    """Raise InputError if counting selected_experts gives other counts than those of the dump."""
    if not np.array_equal(recount, counts):
        raise InputError(f"{path}: selected_experts do not add up to counts; capture it again")


def read_mean_probs(routing):
    """Read mean router probabilities: for each language float (sequences, layers, experts).

    InputError unless all languages have the same number of sequences.
    """
    if routing.segment != "all":
        raise InputError("--parallel compares means over whole sequences; leave out --segment")
    results = []
    for path in routing.paths:
        mean_probs = read_arrays(path, ["mean_probs"])["mean_probs"]
        if mean_probs.shape[1:] != routing.counts.shape[1:]:
            raise InputError(f"{path}: mean_probs {mean_probs.shape} do not fit counts "
                             f"{routing.counts.shape[1:]}; capture it again")
        results.append(mean_probs)
    numbers = [len(mean_probs) for mean_probs in results]
    if len(set(numbers)) > 1:
        raise InputError("--parallel takes as many sequences in every language, but there are "
                         f"{numbers}; leave languages out, or leave out --parallel")
    return results


def language_indices(languages, routing):
    """Return the rows of languages in a routing's arrays; InputError if one is missing or twice."""
    if len(set(languages)) < len(languages):
        raise InputError(f"a language is named twice in {','.join(languages)}")
    for language in languages:
        if language not in routing.languages:
            raise InputError(
                f"no routing for '{language}' among the dumps of {', '.join(routing.languages)}; "
                "name one of these, label=path renames a dump, or run: python capture.py "
                f"--languages {language}")
    return [routing.languages.index(language) for language in languages]


def load_selection(path, routing):
    """Read experts that were selected in any way, for --selection of ablate.py and steer.py.

    path     .npz with `selection` (layers, experts), not 0 where an expert is selected; `layers`
             (layers,), the decoder layer of each row; and optionally `revision`, a str that must
             equal the routing's if both are known ("" and "None" are unknown)
    returns  float64 (layers, experts), rows in the order of routing.layers
    InputError if the file does not fit the routing, or selects nothing.
    """
    how = "write it with np.savez(path, selection=..., layers=routing.layers)"
    if not os.path.exists(path):
        raise InputError(f"no such selection: {path}; {how}")
    arrays = read_arrays(path, [], ["selection", "layers", "revision"])
    if "selection" not in arrays or "layers" not in arrays:
        raise InputError(f"{path} is no selection, with selection and layers; {how}")
    selection, layers = arrays["selection"], arrays["layers"]
    revision = str(arrays.get("revision", ""))

    if revision not in ("", "None") and routing.revision not in (None, revision):
        raise InputError(f"{path} was made with another model ({revision}) than the dumps "
                         f"({routing.revision}); select experts from these dumps")
    if layers.ndim != 1 or sorted(layers.tolist()) != sorted(routing.layers.tolist()):
        raise InputError(f"{path} is for other layers than the dumps, which have "
                         f"{describe(routing.layers)}; give a row for each, zeros if need be")
    if selection.shape != routing.counts.shape[1:] or selection.dtype.kind not in "biuf":
        raise InputError(f"{path}: selection is {selection.dtype} {selection.shape}, not numbers "
                         f"{routing.counts.shape[1:]}, a row for each layer; {how}")
    if not np.isfinite(selection).all() or not selection.any():
        raise InputError(f"{path}: selection is 0 everywhere, or holds NaN or infinite numbers; "
                         "give selected experts a number above 0, and others 0")
    row_of_layer = {layer: row for row, layer in enumerate(layers.tolist())}
    rows = [row_of_layer[layer] for layer in routing.layers.tolist()]
    return selection[rows].astype(np.float64)


# ------------------------------------------------ Exclusive and shared experts (arXiv 2601.14050)

def number_of_experts(experts_per_language, num_experts):
    """Convert experts_per_language to a number: 15 is 15; a fraction, 15/128, is 4 of 32 experts.
    """
    number = experts_per_language
    if 0 < number < 1:
        number = max(1, round(number * num_experts))
    if number not in range(1, num_experts + 1):
        raise InputError(f"experts_per_language {number:g} is neither a number from 1 to the "
                         f"{num_experts} experts nor a fraction of them below 1")
    return int(number)


def most_frequent(frequency, experts_per_language):
    """Return which experts are among the most frequent ones of their layer, as bool.

    frequency             (..., experts); what is returned has the same shape
    experts_per_language  a number, or a fraction of all experts: see number_of_experts
    Of equally frequent experts, those with the lower index come first.
    """
    number = number_of_experts(experts_per_language, frequency.shape[-1])
    order = np.argsort(-frequency, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1)  # the order of an order
    return rank < number


def language_shares(frequency, experts_per_language):
    """Return each language's share in the use of each expert, over the languages that keep it.

    frequency             (L, layers, experts), activation frequency
    experts_per_language  how many of its most frequent experts a language keeps in each layer: a
                          number, or a fraction of all experts
    returns               (L, layers, experts); an expert's shares sum to 1, or to 0 if no language
                          keeps it
    [[[.6, .4]], [[.2, .8]]] with 1 expert per language -> [[[1, 0]], [[0, 1]]]
    """
    kept = frequency * most_frequent(frequency, experts_per_language)
    total = kept.sum(0)
    return kept / np.where(total > 0, total, 1)


def exclusive_experts(share, threshold):
    """Return which experts are exclusive, their share being above the threshold: bool like share.

    share      (..., layers, experts) of language_shares; for several languages together, exclusive
               to them is exclusive_experts(share[rows].sum(0), threshold)
    threshold  between 0 and 1, else InputError; at .4, an expert can be exclusive to two languages
    """
    check_threshold(threshold)
    return share > threshold


def shared_experts(share, threshold):
    """Return which experts some language keeps while all shares are below the threshold, as bool.

    share      (L, layers, experts) of language_shares
    threshold  between 0 and 1, else InputError
    returns    (layers, experts)
    """
    check_threshold(threshold)
    return (share > 0).any(0) & (share < threshold).all(0)


def check_threshold(threshold):
    """Raise InputError unless a threshold lies between 0 and 1."""
    if not 0 < threshold < 1:
        raise InputError(f"threshold {threshold} is not between 0 and 1")


def expert_ownership(frequency, experts_per_language, threshold):
    """Find exclusive and shared experts, count them, and sum up the routing that goes to them.

    frequency (L, layers, experts) -> a dictionary of arrays, listed at save_analysis
    """
    share = language_shares(frequency, experts_per_language)
    exclusive = exclusive_experts(share, threshold)
    shared = shared_experts(share, threshold)
    exclusive_to_one = exclusive & (exclusive.sum(0) == 1)

    fraction = normalize(frequency)
    to_exclusive = (fraction * exclusive).sum(-1)
    to_shared = (fraction * shared).sum(-1)
    to_others = 1 - to_exclusive - to_shared
    reliance = np.stack([to_exclusive, to_shared, to_others], axis=-1)
    return {
        "share": share,
        "exclusive": exclusive,
        "shared": shared,
        "num_exclusive": exclusive.sum((1, 2)),
        "num_only": exclusive_to_one.sum((1, 2)),
        "num_shared": (shared & (share > 0)).sum((1, 2)),
        "layer_exclusive": exclusive.sum((0, 2)),
        "layer_shared": shared.sum(-1),
        "reliance": reliance,
        "mean_reliance": reliance.mean(1),
    }


# ------------------------------------------------------------- How similarly languages are routed

def normalize(counts):
    """Divide by the sum over the last axis. [1, 3] -> [.25, .75]; nan where the sum is 0."""
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(-1, keepdims=True)


def entropy_bits(p):
    """Return the Shannon entropy over the last axis, in bits. [.5, .5, 0] -> 1"""
    log_p = np.log2(np.maximum(p, np.finfo(p.dtype).tiny))
    return -(p * log_p).sum(-1)


def jensen_shannon(p, q):
    """Compare two distributions over the last axis: (similarity, divergence).

    The two do not sum to 1. p, q are float (..., experts), and each sums to 1.
    similarity  (...), 1 - Jensen-Shannon divergence in bits; 1 for equal distributions, 0 for
                disjoint ones
    divergence  (...), JSD / (log E - (H(p) + H(q)) / 2), the fraction of the largest JSD that two
                such entropies allow; 0 if they allow none (arXiv 2510.04694)
    [.5, .5, 0] and [0, .5, .5] -> .5 and .5 / (log2(3) - 1)
    """
    mean_entropy = (entropy_bits(p) + entropy_bits(q)) / 2
    jsd = entropy_bits((p + q) / 2) - mean_entropy
    largest = np.log2(p.shape[-1]) - mean_entropy
    divergence = np.divide(jsd, largest, out=np.zeros_like(jsd), where=largest > 1e-12)
    return 1 - jsd, divergence


def pair_measures(frequency, experts_per_language):
    """Compare every pair of languages: {measure: float (layers, L, L)}.

    frequency  (L, layers, experts)
    similarity, divergence  of the two routing distributions, see jensen_shannon
    jaccard                 of the two sets of most frequent experts
    """
    num_languages, num_layers, _ = frequency.shape
    p = normalize(frequency)
    kept = most_frequent(frequency, experts_per_language)
    result = {name: np.empty((num_layers, num_languages, num_languages)) for name in MEASURES}
    for i in range(num_languages):
        similarity, divergence = jensen_shannon(p[i], p)  # (L, layers)
        in_both = (kept[i] & kept).sum(-1)
        in_either = (kept[i] | kept).sum(-1)
        result["similarity"][:, i] = similarity.T
        result["divergence"][:, i] = divergence.T
        result["jaccard"][:, i] = (in_both / in_either).T
    return result


def aligned_divergence(mean_probs, bands):
    """Compare languages on parallel data, sequence by sequence, by divergence (arXiv 2510.04694).

    mean_probs  for each of L languages (sequences, layers, experts); sequence i means the same
    returns     a dictionary: divergence_aligned (layers, L, L), means over sequences; and means
                over pairs: sequence_aligned (sequences, layers), layer_aligned (layers,),
                mean_aligned (bands,)
    """
    num_languages = len(mean_probs)
    num_sequences, num_layers, _ = mean_probs[0].shape
    by_pair = np.zeros((num_layers, num_languages, num_languages))
    by_sequence = np.zeros((num_sequences, num_layers))
    pairs = list(itertools.combinations(range(num_languages), 2))
    for i, j in tqdm(pairs, "parallel", leave=False):
        p, q = mean_probs[i].astype(float), mean_probs[j].astype(float)
        _, divergence = jensen_shannon(p, q)  # (sequences, layers)
        by_pair[:, i, j] = divergence.mean(0)
        by_pair[:, j, i] = divergence.mean(0)
        by_sequence += divergence / len(pairs)
    by_layer = by_sequence.mean(0)
    return {
        "divergence_aligned": by_pair,
        "sequence_aligned": by_sequence,
        "layer_aligned": by_layer,
        "mean_aligned": band_means(by_layer, bands),
    }


def mean_over_pairs(matrix):
    """Return the mean over pairs of different languages, without nan: (..., L, L) -> (...).

    nan if there is no such pair.
    """
    i, j = np.triu_indices(matrix.shape[-1], k=1)
    pairs = matrix[..., i, j]
    known = np.isfinite(pairs)
    with np.errstate(invalid="ignore"):
        return np.where(known, pairs, 0).sum(-1) / known.sum(-1)


def band_means(values, bands):
    """Return the mean over the layers of each band: (layers, ...) -> (bands, ...)."""
    return np.stack([values[in_band].mean(0) for in_band in bands.values()])


def measure(frequency, bands, experts_per_language, threshold):
    """Compute all statistics that follow from activation frequencies alone.

    frequency (L, layers, experts) in any unit, since only ratios count within a layer
    -> a dictionary of arrays, listed at save_analysis: X is a statistic of each layer, layer_X its
    mean over languages or pairs, mean_X that over the layers of a band (or over all layers), and
    band_X the matrix of pairs of a band
    """
    result = {"frequency": frequency}
    result |= expert_ownership(frequency, experts_per_language, threshold)
    result |= pair_measures(frequency, experts_per_language)
    for name in MEASURES:
        result[f"layer_{name}"] = mean_over_pairs(result[name])
        result[f"mean_{name}"] = band_means(result[f"layer_{name}"], bands)
        result[f"band_{name}"] = band_means(result[name], bands)
    num_experts = frequency.shape[-1]
    result["entropy"] = entropy_bits(normalize(frequency)) / np.log2(num_experts)
    result["layer_entropy"] = result["entropy"].mean(0)
    return result


# ------------------------------------------------------------ Noise: split halves and resampling

def split_half_similarity(counts, bands, rng):
    """Compute how similar random halves of each language are: the ceiling that noise allows.

    counts   for each language (sequences, layers, experts)
    returns  a dictionary of means over NUM_HALVINGS: split_half (L, layers); over languages,
             layer_split_half (layers,) and mean_split_half (bands,)
    It is a low estimate of the ceiling, since a half has half of the data.
    """
    similarities = []
    for by_sequence in counts:
        of_language = []
        for _ in range(NUM_HALVINGS):
            first, second = np.array_split(rng.permutation(len(by_sequence)), 2)
            p = normalize(by_sequence[first].sum(0, dtype=float))
            q = normalize(by_sequence[second].sum(0, dtype=float))
            similarity, _ = jensen_shannon(p, q)
            of_language.append(similarity)
        similarities.append(np.mean(of_language, axis=0))
    split_half = np.array(similarities)
    by_layer = split_half.mean(0)
    return {
        "split_half": split_half,
        "layer_split_half": by_layer,
        "mean_split_half": band_means(by_layer, bands),
    }


def bootstrap(counts, result, bands, settings, num_draws, rng):
    """Compute 95 % intervals of the SMOOTH and THRESHOLDED statistics by resampling sequences.

    counts    for each language (sequences, layers, experts)
    result    the estimates, made with the same bands and settings; if it has sequence_aligned, the
              languages are parallel, and all of them draw the same sequences
    settings  experts_per_language and threshold
    returns   {"interval_" + statistic: (2, ...)}, see interval
    """
    aligned = result.get("sequence_aligned")
    if aligned is not None and any(len(by_sequence) != len(aligned) for by_sequence in counts):
        raise InputError("--parallel with --bootstrap takes dumps with tokens in every sequence")
    kinds = dict.fromkeys(SMOOTH, "smooth") | dict.fromkeys(THRESHOLDED, "thresholded")
    drawn = {name: [] for name in kinds if name in result}
    for _ in tqdm(range(num_draws), "bootstrap", leave=False):
        # How often each sequence of each language is drawn; counts are summed that often
        times = [rng.multinomial(len(c), np.full(len(c), 1 / len(c))) for c in counts]
        if aligned is not None:
            times = [times[0]] * len(counts)
        totals = [np.tensordot(t.astype(np.float32), c, axes=1) for t, c in zip(times, counts)]
        frequency = normalize(np.stack(totals).astype(float))
        draw = measure(frequency, bands, *settings)
        if aligned is not None:
            draw["layer_aligned"] = np.average(aligned, axis=0, weights=times[0])
            draw["mean_aligned"] = band_means(draw["layer_aligned"], bands)
        for name in drawn:
            drawn[name].append(draw[name])
    return {f"interval_{name}": interval(result[name], np.array(draws), kinds[name])
            for name, draws in drawn.items()}


def interval(estimate, drawn, kind):
    """Return the 95 % interval of an estimate from bootstrap draws: (2, ...), ci_low and ci_high.

    estimate  (...), float for fractions, int for numbers of experts
    drawn     (draws, ...)
    kind      "smooth" for similarity, divergence and entropy; "thresholded" for numbers of experts
              beyond a threshold, and what goes to them

    It is the estimate, 1.96 standard deviations of the draws to both sides, and stretched on one
    side by their bias, which is as large as the noise of the data itself. Coverage is simulated in
    tests/test_uncertainty.py.
    """
    half_width = 1.96 * drawn.std(0, ddof=1)
    bias = drawn.mean(0) - estimate
    if kind == "smooth":
        stretch = -bias  # draws are less similar, less even than the data; so is it than the truth
    elif kind == "thresholded":
        stretch = bias   # draws pass thresholds more, or less, often than the data, like the truth
    else:
        raise ValueError(f"kind '{kind}' is neither smooth nor thresholded")
    ci_low = estimate - half_width + np.minimum(stretch, 0)
    ci_high = estimate + half_width + np.maximum(stretch, 0)
    if estimate.dtype == float:  # a fraction; else a number of experts
        return np.clip([ci_low, ci_high], 0, 1)
    return np.clip([ci_low, ci_high], 0, np.inf)


# ------------------------------------------- Controls: vocabulary and the geometry of hidden states

def vocabulary_control(routing, bands):
    """Compare languages over the tokens that both of a pair have, and over those of one alone.

    If only tokens of one alone are routed differently, the words differ rather than the languages.
    returns  a dictionary: similarity_common_tokens, similarity_own_tokens (layers, L, L), nan
             without such tokens; their means over pairs, mean_common_tokens, mean_own_tokens
             (bands,); common_tokens (L, L), the fraction of the row's tokens whose IDs the column
             has
    """
    tokens = [read_tokens(path, routing.segment) for path in routing.paths]
    for path, each in zip(routing.paths, tokens):
        if each.token_ids is None:
            raise InputError(f"{path} holds no token_ids, which --vocabulary compares; capture it "
                             "again, or leave out --vocabulary")

    common, own = [], []  # counts of the row's tokens, (L, L, layers, experts)
    for i in tqdm(range(len(tokens)), "vocabulary", leave=False):
        token_ids = tokens[i].token_ids
        in_other = np.array([np.isin(token_ids, other.token_ids) for other in tokens])
        # Count once for every set of languages that have a token, then add up
        patterns, group = np.unique(in_other, axis=1, return_inverse=True)  # (L, patterns)
        counts = count_by_group(tokens[i].selected_experts, group.ravel(), patterns.shape[1],
                                routing.num_experts)
        check_recount(routing.paths[i], counts.sum(0), routing.counts[i])
        common.append(np.tensordot(patterns, counts, axes=1))
        own.append(np.tensordot(~patterns, counts, axes=1))

    result = {}
    for name, counts in (("common", np.array(common)), ("own", np.array(own))):
        p = normalize(counts)
        similarity, _ = jensen_shannon(p, p.swapaxes(0, 1))  # (L, L, layers)
        similarity = np.moveaxis(similarity, -1, 0)
        result[f"similarity_{name}_tokens"] = similarity
        result[f"mean_{name}_tokens"] = band_means(mean_over_pairs(similarity), bands)
    num_common = np.sum(common, axis=(2, 3))
    num_own = np.sum(own, axis=(2, 3))
    result["common_tokens"] = num_common / (num_common + num_own)
    return result


def null_routers(null_counts, bands, settings):
    """Compute the SMOOTH and THRESHOLDED statistics of random routers, means over their draws.

    null_counts  (draws, L, layers, experts) of capture.py --null-router: what random routers select
                 for the hidden states that the trained ones were given
    returns      {"null_" + statistic: an array of the same shape}
    Any router sends similar hidden states to similar experts (arXiv 2604.09780), so only what goes
    beyond this was learned by the router.
    """
    drawn = [measure(normalize(counts), bands, *settings) for counts in null_counts]
    names = [name for name in SMOOTH + THRESHOLDED if name in drawn[0]]
    return {f"null_{name}": np.mean([draw[name] for draw in drawn], axis=0) for name in names}


# -------------------------------------------------------------------- Language families and scripts

def parse_languages(text):
    """Parse lines of family, script and codes into {code: (family, script)}, in their order."""
    table = {}
    for line in text.strip().splitlines():
        family, script, *codes = line.split()
        for code in codes:
            table[code] = (family, script)
    return table


def language_code(language, table):
    """Return the code under which to look up a language: "deu_Latn" -> "deu", "de-AT" -> "de"."""
    if language in table:
        return language
    return re.split("[-_]", language)[0]


def language_labels(languages):
    """Look up the families and scripts of languages called "de", "de-AT" or "deu_Latn".

    returns  {"families": (L,), "scripts": (L,)}, str arrays such as "Indo-European/Germanic" and
             "Latn" from LANGUAGES; "" for languages that it does not have
    A code may name its own script: "zho_Hant" is Hant.
    """
    table = parse_languages(LANGUAGES)
    families, scripts = [], []
    for language in languages:
        family, script = table.get(language_code(language, table), ("", ""))
        named_script = re.search("[-_]([A-Z][a-z]{3})$", language)
        if named_script:
            script = named_script[1]
        families.append(family)
        scripts.append(script)
    return {"families": np.array(families), "scripts": np.array(scripts)}


def language_order(languages):
    """Return the indices that sort languages as LANGUAGES does; unknown ones come last, by name."""
    table = parse_languages(LANGUAGES)
    places = {code: place for place, code in enumerate(table)}

    def place_and_name(index):
        code = language_code(languages[index], table)
        return places.get(code, len(places)), languages[index]

    return sorted(range(len(languages)), key=place_and_name)


def permutations(n, rng):
    """Return permutations of n items, (permutations, n), with the identity first.

    Up to n = 8 these are all, else NUM_PERMUTATIONS random ones.
    """
    if n <= 8:
        return np.array(list(itertools.permutations(range(n))))
    return np.array([np.arange(n)] + [rng.permutation(n) for _ in range(NUM_PERMUTATIONS)])


def permutation_test(similarity, labels, rng):
    """Test whether languages with the same label are more similar than others.

    similarity  (rows, n, n), a test for each row
    labels      (n,)
    returns     (rows, 4): mean similarity of pairs with the same label, and of other pairs; p, the
                fraction of permutations of the labels that separate the two at least as much; and
                the smallest p that these labels allow; nan if no pair shares a label, or every one
    """
    i, j = np.triu_indices(len(labels), k=1)
    pairs = similarity[:, i, j].T  # (pairs, rows)
    observed = labels[i] == labels[j]  # (pairs,)
    if observed.all() or not observed.any():
        return np.full((len(similarity), 4), np.nan)

    # In batches, since 10,000 permutations of 200 languages, with 19,900 pairs, would not fit
    groups = np.unique(labels, return_inverse=True)[1]
    gaps, unchanged = [], []
    for shuffled in np.array_split(groups[permutations(len(groups), rng)], 50):
        same = shuffled[:, i] == shuffled[:, j]  # (permutations, pairs)
        mean_same = same @ pairs / observed.sum()  # every permutation has as many such pairs
        mean_other = ~same @ pairs / (~observed).sum()
        gaps.append(mean_same - mean_other)
        unchanged.append((same == observed).all(1))
    gaps = np.concatenate(gaps)  # (permutations, rows), the first is the observed labelling
    p = (gaps >= gaps[0] - 1e-12).mean(0)
    smallest_p = np.full(len(p), np.concatenate(unchanged).mean())
    return np.stack([pairs[observed].mean(0), pairs[~observed].mean(0), p, smallest_p], axis=1)


def holm(p):
    """Correct p values for the number of tests by Holm's method.

    [.01, .04, .03] -> [.03, .06, .06]
    """
    order = np.argsort(p)
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.minimum(corrected, 1)
    return result


def family_tests(result, rng):
    """Test by family, branch and script, in each band, whether related languages are more similar.

    result   with bands, families, scripts, and band_similarity (bands, L, L); languages without a
             label are left out
    returns  {"family_rows": (rows,), such as "branch early"; "family_tests": (rows, 5), the columns
             of permutation_test and Holm's p over all rows}; tests that these labels do not allow
             are left out
    """
    families = [branch.split("/")[0] for branch in result["families"]]
    labels = {
        "family": np.array(families),
        "branch": result["families"],
        "script": result["scripts"],
    }
    rows, tests = [], []
    for level, names in labels.items():
        known = np.flatnonzero(names != "")
        similarity = result["band_similarity"][:, known][:, :, known]
        rows += [f"{level} {band}" for band in result["bands"]]
        tests.append(permutation_test(similarity, names[known], rng))
    rows, tests = np.array(rows), np.concatenate(tests)
    possible = np.isfinite(tests[:, 2])
    rows, tests = rows[possible], tests[possible]
    return {"family_rows": rows, "family_tests": np.column_stack([tests, holm(tests[:, 2])])}


# -------------------------------------------------------------------------------- Bands of layers

def parse_bands(texts, layers):
    """Parse bands of decoder layers: ["early=0-4", ...] -> {"early": bool (layers,)}.

    texts    FIRST-LAST, inclusive, or NAME=FIRST-LAST; None gives the first, middle and last tenth
             of the layers, at least one each
    layers   int (layers,), the decoder layer of each row
    returns  which rows are in each band; InputError if a band holds no layer, or is named twice
    """
    if texts is None:
        tenth = max(1, round(len(layers) / 10))
        start = (len(layers) - tenth + 1) // 2
        middle = layers[start:start + tenth]
        texts = [f"early={layers[0]}-{layers[tenth - 1]}",
                 f"middle={middle[0]}-{middle[-1]}",
                 f"late={layers[-tenth]}-{layers[-1]}"]
    bands = {}
    for text in texts:
        match = re.fullmatch(r"(?:([^=,]+)=)?(\d+)(?:-(\d+))?", text)
        if match is None:
            raise InputError(f"band '{text}' is neither FIRST-LAST nor NAME=FIRST-LAST, as "
                             "middle=22-26")
        name = match[1] or text
        first = int(match[2])
        last = int(match[3] or first)
        if name in bands:
            raise InputError(f"two bands are named '{name}'")
        bands[name] = (layers >= first) & (layers <= last)
        if last > max(layers) or not bands[name].any():
            raise InputError(f"band '{text}' does not hold MoE layers of this model, which has "
                             f"{describe(layers)}")
    return bands


def describe(layers):
    """Write layers as ranges: [0, 1, 2, 5] -> "0-2 5"."""
    texts = []
    for run in np.split(layers, np.flatnonzero(np.diff(layers) != 1) + 1):
        if len(run) > 1:
            texts.append(f"{run[0]}-{run[-1]}")
        else:
            texts.append(str(run[0]))
    return " ".join(texts)


# ----------------------------------------------------------------------------------------- Tables

def print_table(title, columns):
    """Print a title and the table {heading: cells}, the first column left-aligned.

    Floats get three decimals, everything else is printed as it is. A column that is None is left
    out. Titles are wrapped at 100 columns.
    """
    aligned = []
    for heading, cells in columns.items():
        if cells is None:
            continue
        texts = [str(heading)]
        for cell in cells:
            if isinstance(cell, (float, np.floating)):
                texts.append(f"{cell:.3f}")
            else:
                texts.append(str(cell))
        width = max(len(text) for text in texts)
        if aligned:
            aligned.append([text.rjust(width) for text in texts])
        else:
            aligned.append([text.ljust(width) for text in texts])
    print()
    print(textwrap.fill(title, 100, break_on_hyphens=False))
    for row in zip(*aligned):
        print("  ".join(row))


def with_interval(result, name, column=None):
    """Return a statistic (rows,), or after a bootstrap texts such as "0.797 [.791 .803]".

    column  which column of a statistic (rows, columns)
    """
    values = result[name]
    intervals = result.get(f"interval_{name}")  # (2, rows) or (2, rows, columns)
    if column is not None:
        values = values[:, column]
        if intervals is not None:
            intervals = intervals[:, :, column]
    if intervals is None:
        return values
    cells = []
    for value, ci_low, ci_high in zip(values, *intervals):
        low_text = f"{ci_low:.3f}".lstrip("0")
        high_text = f"{ci_high:.3f}".lstrip("0")
        cells.append(f"{value:.3f} [{low_text} {high_text}]")
    return cells


def print_notes(routing, result, args):
    """Print what was compared, and what to know about it."""
    num_languages, num_layers, num_experts = routing.counts.shape
    tokens = [f"{language} {number:,}"
              for language, number in zip(routing.languages, routing.num_tokens)]
    notes = [
        f"{num_languages} languages  {num_layers} MoE layers  {num_experts} experts  top_k "
        f"{routing.top_k}  experts_per_language {args.experts_per_language}  threshold "
        f"{args.threshold}",
        "tokens  " + "  ".join(tokens),
    ]
    if num_languages > MAX_PRINTED_LANGUAGES:
        notes.append(f"note: with more than {MAX_PRINTED_LANGUAGES} languages, tables with a "
                     f"column per language are not printed; see {args.out}")
    for key in ("dtype", "chat_template", "chat_template_options", "tokenizer", "max_length",
                "limit"):
        values = {str(meta[key]) for meta in routing.meta if key in meta}
        if len(values) > 1:
            notes.append(f"note: the dumps were made with different settings of {key}: "
                         f"{', '.join(sorted(values))}")
    if len({bool(meta.get("instruction")) for meta in routing.meta}) > 1:
        notes.append("note: some dumps have an instruction appended to each prompt, others do not")
    if args.threshold * num_languages <= 1:
        notes.append(f"note: no expert can be shared: {num_languages} shares that sum to 1 cannot "
                     f"all be below {args.threshold}; raise --threshold")
    unknown = result["languages"][result["families"] == ""]
    if len(unknown):
        notes.append(f"note: no family is known of {', '.join(unknown)}; see LANGUAGES in "
                     "analyze.py")
    for note in notes:
        print(textwrap.fill(note, 100, break_on_hyphens=False))


def print_bands(result):
    title = "How similarly languages are routed in each band of layers, means over pairs"
    if "interval_mean_similarity" in result:
        title += (", with 95 % intervals. split-half: similarity of random halves of one language, "
                  "the ceiling that noise allows")
    if "null_mean_similarity" in result:
        title += ". null: similarity that random routers give"
    print_table(title, {
        "band": result["bands"],
        "layers": result["band_layers"],
        "similarity": with_interval(result, "mean_similarity"),
        "split-half": result.get("mean_split_half"),
        "null": result.get("null_mean_similarity"),
        "divergence": with_interval(result, "mean_divergence"),
        "jaccard": with_interval(result, "mean_jaccard"),
    })
    if "mean_aligned" in result:
        print_table("Divergence of languages over parallel sequences", {
            "band": result["bands"],
            "divergence": with_interval(result, "mean_aligned"),
        })


def print_layers(result):
    columns = {
        "layer": result["layers"],
        "similarity": with_interval(result, "layer_similarity"),
        "split-half": result.get("layer_split_half"),
        "null": result.get("null_layer_similarity"),
        "entropy": result["layer_entropy"],
        "shared": result["layer_shared"],
        "exclusive": result["layer_exclusive"],
        "null excl.": result.get("null_layer_exclusive"),
    }
    title = ("Layer by layer: similarity of languages, entropy of their routing (1 if all experts "
             "are used alike), number of shared and of exclusive experts")
    if len(result["languages"]) <= MAX_PRINTED_LANGUAGES:
        title += ", and exclusive ones of each language"
        num_exclusive = result["exclusive"].sum(-1)  # (L, layers)
        columns |= dict(zip(result["languages"], num_exclusive))
    print_table(title, columns)


def print_languages(result):
    print_table("Fraction of each language's routing to its exclusive experts, to shared ones, and "
                "to others", {
        "": result["languages"],
        "exclusive": with_interval(result, "mean_reliance", column=0),
        "shared": with_interval(result, "mean_reliance", column=1),
        "others": with_interval(result, "mean_reliance", column=2),
    })
    title = ("Number of experts that are exclusive to each language, of those that are exclusive "
             "to it only, and of shared experts that it keeps")
    if "null_num_exclusive" in result:
        title += ". null: exclusive experts of random routers"
    print_table(title, {
        "": result["languages"],
        "exclusive": result["num_exclusive"],
        "to it only": result["num_only"],
        "null": result.get("null_num_exclusive"),
        "shared": result["num_shared"],
    })


def print_vocabulary(result):
    print_table("Similarity over all tokens, over those that both languages of a pair have, and "
                "over others", {
        "band": result["bands"],
        "all": with_interval(result, "mean_similarity"),
        "common": result["mean_common_tokens"],
        "own": result["mean_own_tokens"],
    })
    print_matrix("Fraction of the row's tokens that the column has, too", result,
                 result["common_tokens"])


def print_families(result):
    same, other, p, smallest_p, holm_p = result["family_tests"].T
    print_table("Are related languages more similar? Mean similarity of pairs of the same family, "
                "branch or script, and of other pairs; p of a permutation test; the smallest p "
                "that these languages allow; p corrected for all rows (Holm). Languages of one "
                "branch often share a script", {
        "": result["family_rows"],
        "same": same,
        "other": other,
        "p": p,
        "smallest p": smallest_p,
        "Holm": holm_p,
    })


def print_matrix(title, result, matrix):
    """Print a matrix (L, L) in the order of LANGUAGES, unless there are too many languages."""
    order = language_order(result["languages"])
    names = result["languages"][order]
    if len(names) <= MAX_PRINTED_LANGUAGES:
        columns = dict(zip(names, matrix[order][:, order].T))
        print_table(title, {"": names} | columns)


def print_report(routing, result, args):
    """Print notes and all tables."""
    print_notes(routing, result, args)
    print_bands(result)
    print_layers(result)
    print_languages(result)
    if args.vocabulary:
        print_vocabulary(result)
    if len(result["family_rows"]) > 0:
        print_families(result)
    for band, matrix in zip(result["bands"], result["band_similarity"]):
        print_matrix(f"Similarity of languages in the {band} layers, by family", result, matrix)


# ---------------------------------------------------------------------------------------- Figures

def draw_layers(figure, result):
    """Draw similarity, entropy and numbers of experts over the layers, with bands and intervals."""
    panels = {
        "similarity (1 - JSD)": {
            "languages": "layer_similarity",
            "split halves of a language": "layer_split_half",
            "languages, random routers": "null_layer_similarity",
        },
        "routing entropy / log E": {"mean of languages": "layer_entropy"},
        "number of experts": {
            "exclusive": "layer_exclusive",
            "shared": "layer_shared",
            "exclusive, random routers": "null_layer_exclusive",
        },
    }
    layers = result["layers"]
    figure.set_size_inches(8, 7)
    axes = figure.subplots(len(panels), sharex=True)
    for axis, (title, lines) in zip(axes, panels.items()):
        for style, (label, name) in zip([".-", ".--", ".:"], lines.items()):
            if name in result:
                axis.plot(layers, result[name], style, label=label)
            if f"interval_{name}" in result:
                ci_low, ci_high = result[f"interval_{name}"]
                axis.fill_between(layers, ci_low, ci_high, alpha=0.25)
        axis.set_ylabel(title)
        axis.legend(fontsize="small")
    shade_bands(axes, result)
    axes[-1].set_xlabel("decoder layer")


def shade_bands(axes, result):
    """Shade each band of layers in all axes, and write its name above the first."""
    for band, text in zip(result["bands"], result["band_layers"]):
        for run in text.split(" "):  # "0-2 5", as of describe
            first, last = int(run.split("-")[0]), int(run.split("-")[-1])
            for axis in axes:
                axis.axvspan(first - 0.4, last + 0.4, color="0.9", zorder=0)
            axes[0].text((first + last) / 2, 1.02, band, ha="center",
                         transform=axes[0].get_xaxis_transform())


def draw_heatmaps(figure, result):
    """Draw the similarity of all pairs of languages, a panel for each band, in families."""
    order = language_order(result["languages"])
    names = result["languages"][order]
    families = [family.split("/")[0] for family in result["families"][order]]
    starts = [i for i in range(len(names)) if i == 0 or families[i] != families[i - 1]]
    matrices = result["band_similarity"][:, order][:, :, order]
    size = 2 + 0.22 * len(names)
    figure.set_size_inches(size * len(matrices) + 2, size)
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axis, band, matrix in zip(axes, result["bands"], matrices):
        image = axis.imshow(matrix, vmin=matrices.min(), vmax=1)
        axis.set_title(band)
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks([])
        for start in starts[1:]:
            axis.axhline(start - 0.5, color="white", linewidth=1)
            axis.axvline(start - 0.5, color="white", linewidth=1)
    labels = [f"{families[i]}  {names[i]}" if i in starts else names[i] for i in range(len(names))]
    axes[0].set_yticks(range(len(names)), labels)
    figure.colorbar(image, ax=axes, label="similarity (1 - JSD)")


def prepare_figures(folder):
    """Make a folder for pictures; InputError if that, or drawing them, is not possible."""
    if os.path.isfile(folder):
        raise InputError(f"{folder} is a file; --figures takes a folder")
    try:
        import matplotlib  # noqa: F401, only to see that it is installed
    except ImportError as error:
        raise InputError("--figures needs matplotlib; run: pip install matplotlib") from error
    os.makedirs(folder, exist_ok=True)


def save_figure(path, draw, *arguments):
    """Write the picture that draw(figure, *arguments) draws to a .png file."""
    from matplotlib.figure import Figure  # optional; prepare_figures has seen that it is installed

    figure = Figure(layout="constrained")
    draw(figure, *arguments)
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------------------- Files and arguments

@contextlib.contextmanager
def whole_file(path):
    """Open a binary file for writing that appears at the path only when it is complete.

    with whole_file("analysis.npz") as file: np.savez(file, **arrays)
    """
    os.makedirs(Path(path).parent, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_output(path):
    """Raise InputError if path is a folder, or a file that is not an earlier analysis.npz."""
    if str(path) == "" or os.path.isdir(path):
        raise InputError(f"--out '{path}' is no file; give one, such as analysis.npz")
    if not os.path.exists(path):
        return
    try:
        with np.load(path, allow_pickle=False) as file:
            is_analysis = "similarity" in file
    except Exception:  # numpy raises every kind for a file that is no .npz
        is_analysis = False
    if not is_analysis:
        raise InputError(f"{path} exists and was not written by analyze.py; move it away, or give "
                         "another --out")


def save_analysis(path, result, meta):
    """Write analysis.npz with these arrays, where L is the number of languages:

    languages, families, scripts (L,)                 names; family/branch and script, "" if unknown
    layers (layers,)                                  decoder layers
    bands, band_layers (bands,)                       names; decoder layers as "0-4"
    frequency, share (L, layers, experts)             fraction of tokens that select the expert; the
                                                      language's share in its use
    exclusive (L, layers, experts)                    is it exclusive to the language?
    shared (layers, experts)                          is it shared?
    num_exclusive, num_only, num_shared (L,)          exclusive experts; exclusive to no other
                                                      language; shared ones that the language keeps
    layer_exclusive, layer_shared (layers,)           experts; exclusive, summed over languages
    reliance (L, layers, 3), mean_reliance (L, 3)     fraction of the routing to exclusive, shared,
                                                      and other experts
    entropy (L, layers), layer_entropy (layers,)      of the routing, over log E; mean of languages
    M (layers, L, L)                                  M is similarity, divergence, and jaccard, of
                                                      all pairs of languages
    layer_M (layers,), mean_M (bands,)                means over pairs
    band_M (bands, L, L)                              means over the layers of a band
    family_rows (rows,), family_tests (rows, 5)       see family_tests
    divergence_aligned (layers, L, L), sequence_aligned (sequences, layers),
    layer_aligned (layers,), mean_aligned (bands,)    --parallel: see aligned_divergence
    split_half (L, layers), layer_split_half (layers,),
    mean_split_half (bands,)                          --bootstrap: see split_half_similarity
    interval_NAME (2, ...)                            --bootstrap: of SMOOTH and THRESHOLDED ones
    null_NAME                                         dumps with null_counts: see null_routers
    similarity_common_tokens, similarity_own_tokens (layers, L, L), mean_common_tokens,
    mean_own_tokens (bands,), common_tokens (L, L)    --vocabulary: see vocabulary_control
    meta                                              JSON: arguments, inputs with digests
    """
    text = json.dumps(meta, default=str)  # OUT may be a Path
    with whole_file(path) as file:
        np.savez(file, **result, meta=text)


def parse_arguments():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [DUMP ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("what is compared")
    group.add_argument("dumps", nargs="*", default=DUMPS, metavar="DUMP",
                       help="file, or label=file (default: those of routing/)")
    group.add_argument("--bands", nargs="+", metavar="BAND",
                       help="decoder layers, as middle=22-26 or 22-26 "
                            "(default: first, middle and last tenth)")
    group.add_argument("--experts-per-language", type=float, default=EXPERTS_PER_LANGUAGE,
                       metavar="N",
                       help="most frequent experts that a language keeps: a number, or a "
                            "fraction below 1 (default: %(default).3g)")
    group.add_argument("--threshold", type=float, default=THRESHOLD, metavar="SHARE",
                       help="experts are exclusive above it (default: %(default)s)")
    group.add_argument("--segment", default=SEGMENT, choices=list(SEGMENTS),
                       help="tokens that count; text: the prompt without chat template and "
                            "instruction (default: %(default)s)")

    group = parser.add_argument_group("output")
    group.add_argument("--out", default=OUT, metavar="FILE", help="(default: %(default)s)")
    group.add_argument("--figures", metavar="FOLDER",
                       help="write pictures, too; needs matplotlib")

    group = parser.add_argument_group("noise, and other explanations")
    group.add_argument("--bootstrap", type=int, default=0, metavar="N",
                       help="95 %% intervals of N draws, and split-half similarity")
    group.add_argument("--parallel", action="store_true",
                       help="sequence i means the same in all languages: compare them "
                            "sequence by sequence")
    group.add_argument("--vocabulary", action="store_true",
                       help="similarity over tokens that languages have in common, and others")
    group.add_argument("--seed", type=int, default=0, metavar="N",
                       help="of draws and permutations (default: %(default)s)")
    args = parser.parse_args()
    check_arguments(args)
    return args


def check_arguments(args):
    """Raise InputError if an argument is out of range, or if --figures cannot be drawn."""
    if args.bootstrap < 0 or args.bootstrap == 1:
        raise InputError("--bootstrap takes 2 draws or more")
    if args.seed < 0:
        raise InputError("--seed takes a number from 0 on")
    if args.figures:
        prepare_figures(args.figures)


# ------------------------------------------------------------------------------------------- Main

def main():
    args = parse_arguments()
    check_output(args.out)
    rng = np.random.default_rng(args.seed)

    # 1. Read how many tokens of each language selected each expert
    routing = load_routing(args.dumps, args.segment)
    args.experts_per_language = number_of_experts(args.experts_per_language, routing.num_experts)
    settings = (args.experts_per_language, args.threshold)
    bands = parse_bands(args.bands, routing.layers)
    result = {
        "languages": np.array(routing.languages),
        "layers": routing.layers,
        "bands": np.array(list(bands)),
        "band_layers": np.array([describe(routing.layers[rows]) for rows in bands.values()]),
    }
    result |= language_labels(routing.languages)

    # 2. Measure exclusive and shared experts, the similarity of languages, and that of families
    result |= measure(routing.activation_frequency, bands, *settings)
    if args.parallel:
        result |= aligned_divergence(read_mean_probs(routing), bands)
    result |= family_tests(result, rng)

    # 3. Noise and controls: sampling, the words, the geometry of hidden states
    if args.bootstrap > 0:
        counts = count_by_sequence(routing)
        result |= split_half_similarity(counts, bands, rng)
        result |= bootstrap(counts, result, bands, settings, args.bootstrap, rng)
    if args.vocabulary:
        result |= vocabulary_control(routing, bands)
    if len(routing.null_counts) > 0:
        result |= null_routers(routing.null_counts, bands, settings)

    # 4. Save everything, then print it
    save_analysis(args.out, result, vars(args) | {"inputs": routing.inputs})
    if args.figures:
        save_figure(f"{args.figures}/layers.png", draw_layers, result)
        save_figure(f"{args.figures}/heatmaps.png", draw_heatmaps, result)
    print_report(routing, result, args)
    print(f"\n{args.out}")
    if args.figures:
        print(f"{args.figures}/layers.png\n{args.figures}/heatmaps.png")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # for consoles that lack a letter
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has left; everything is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
