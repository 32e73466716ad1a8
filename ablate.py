"""
Mask experts, layer band by layer band, and see which languages it hurts, against as many others.

    python ablate.py                                       # the tiny model; after capture.py
    python ablate.py --model Qwen/Qwen3-30B-A3B --data 'data/mgsm_{lang}.tsv' \\
                     --bands early=0-4 middle=22-26 late=43-47 --metrics accuracy prompt_nll
    python ablate.py --selection selection.json            # what analyze.py --contrast selected
    python ablate.py --experts each --bands all=0-7 --limit 24     # then: analyze.py --effects

reads   routing dumps, and evaluation data, best not what the dumps were captured on
writes  results/ablate.jsonl    a line per cell: settings, scores of every example, their mean
        results/ablate/         predictions, and of --experts each effects.npz

A cell is band x target x evaluation language: the experts exclusive to the target (arXiv
2601.14050) are never selected in the band (--how zero: selected, without a contribution). In the
target's own language there are controls: as many experts drawn from those that the language uses at
all, and others that carry as much of its routing weight. A language is hurt if it does worse than
with every draw of both, and by an interval over problems and random draws that leaves out 0. One
model load; three minutes on the tiny model. A stopped run goes on where it stopped.
"""

import itertools
import json
import math
import zlib

import numpy as np
from tqdm import tqdm

import analyze
import common
from common import bootstrap_interval as interval

# ------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"             # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
ROUTING = analyze.DUMPS              # the dumps that the experts are chosen from
DATA = "tests/data/eval_{lang}.tsv"  # what is evaluated; {lang} stands for the language
EXPERTS_PER_LANGUAGE = 15 / 128      # a part below 1, or a number; the paper: 15, XQuAD 32, of 128
THRESHOLD = 0.4                      # the paper's; XQuAD 0.5
METRICS = ["prompt_nll"]             # prompt_nll answer_nll accuracy language
CONTROL_SEEDS = 19                   # random draws; by chance, one row in 20 is beyond all
MATCHED_SEEDS = 5                    # draws of others that carry as much routing weight
BATCH_TOKENS = 8192                  # per forward pass, padding included
MAX_LENGTH = 4096                    # tokens of a prompt
MAX_NEW_TOKENS = None                # of a response; None: the checkpoint's generation config
OUT = "results/ablate.jsonl"
# ------------------------------------------------------------------------------------------------
EDITS = {"reroute": "masks", "zero": "zeroed"}  # of edit_routing
OF_ALL = ("shared", "selection")     # targets that are no language: all languages have controls


def choose_experts(args, dumps):
    """{target: bool (layers, experts)}: exclusive to a language, or to several as "bn+sw"; what all
    share; or what a file selects.
    """
    if args.selection:  # of either sign, those that A's tokens select more
        selection = analyze.load_selection(args.selection, dumps[0]) > 0
        common.require(selection.any(), f"{args.selection}: A's tokens select no expert more")
        return {"selection": selection}
    share = analyze.language_shares(analyze.frequencies(dumps), args.experts_per_language)
    if args.experts == "shared":
        return {"shared": analyze.shared_experts(share, args.threshold)}
    targets = args.targets.split(",") if args.targets else [dump["language"] for dump in dumps]
    rows = {target: analyze.rows_of(target.split("+"), dumps) for target in targets}
    return {target: analyze.exclusive_experts(share[rows[target]].sum(0), args.threshold)
            for target in targets}


def random_controls(masked, used, draws, seed):
    """Different sets of as many experts per layer, uniform among all of those in use, but for the
    masked set: bool (layers, experts) each. None at all where there are fewer than so many.

    seed is a list of integers: of band, target and language, so that no two rows share a draw.
    """
    rng, sets, numbers = np.random.default_rng(seed), {masked.tobytes(): masked}, masked.sum(1)
    if math.prod(map(math.comb, used.sum(1).tolist(), numbers.tolist())) <= draws:
        return []
    while len(sets) <= draws:
        order = np.argsort(np.where(used, rng.random(used.shape), 2))  # those in use come first
        control = np.argsort(order) < numbers[:, None]
        sets[control.tobytes()] = control
    return list(sets.values())[1:]


def matched_control(masked, share, top_k, seed):
    """Other experts that carry as much of a language's routing weight, to a tenth, in every layer.

    share (layers, experts) of each layer's weight. Drawn in proportion to it, so that top_k experts
    stay; where 100 draws do not reach as much, the one that carries the most.
    """
    rng, control = np.random.default_rng(seed), np.zeros_like(masked)
    for layer, (row, shares) in enumerate(zip(masked, share)):
        wanted, most, others = shares[row].sum(), 0, np.flatnonzero(~row & (shares > 0))
        for _ in range(100):
            drawn, total = np.zeros_like(row), 0
            # a random order, in which an expert comes next in proportion to its share
            order = others[np.argsort(rng.exponential(size=len(others)) / shares[others])]
            for expert in order[:len(row) - top_k]:
                if total < 0.9 * wanted and total + shares[expert] <= 1.1 * wanted:
                    drawn[expert], total = True, total + shares[expert]
            if total > most:
                most, control[layer] = total, drawn
            if most >= 0.9 * wanted:
                break
    return control


def part_removed(masked, share, of=None):
    """The part of a language's routing weight that masking removes, in the layers with a mask, or
    where another set, of which this is a control, has one.
    """
    return share[masked].sum() / max(1, (masked if of is None else of).any(1).sum())


def routing_shares(dumps, languages):
    """{language: (layers, experts)}: each expert's share of a layer's routing weight; of a language
    without a dump, the mean of the others'.
    """
    shares = {dump["language"]: analyze.distribution(dump["weights"]) for dump in dumps}
    mean = np.mean(list(shares.values()), 0)
    return {language: shares.get(language, mean) for language in languages}


def plan_cells(args, chosen, bands, dumps, shares):
    """{(band, target, language): {kind: [bool (layers, experts) to mask]}}; kind "masked" is what
    the experiment is about, "random" and "matched" are its controls.
    """
    plan = {}
    for band, target, language in itertools.product(bands, chosen, shares):
        masked, of_target = chosen[target] & bands[band][:, None], target.split("+")
        share, top_k = shares[language], dumps[0]["top_k"]
        if args.experts == "random" and masked.any():
            used = np.any([dumps[i]["counts"] for i in analyze.rows_of(of_target, dumps)], 0)
            drawn = random_controls(masked, used, 1, [zlib.crc32(f"{band} {target}".encode())])
            common.require(drawn, f"{target} uses too few experts in {band} to draw as many others")
            masked, = drawn
        cell = plan[band, target, language] = {"masked": [masked]}
        if masked.any() and (target in OF_ALL or language in of_target):
            seed = zlib.crc32(f"{band} {target} {language}".encode())
            cell["random"] = random_controls(masked, share > 0, args.control_seeds, [seed])
            cell["matched"] = [matched_control(masked, share, top_k, [seed, draw])
                               for draw in range(MATCHED_SEEDS)]
    return plan


def as_masks(chosen, layers):
    """bool (layers, experts) -> {decoder layer: bool (experts,)}, as edit_routing takes it."""
    return {layer: row for layer, row in zip(layers.tolist(), chosen) if row.any()}


def run_cells(experiment, plan, bands, layers):
    """plan with {metric: scores (examples,)} for every mask, and for "unmasked" beside them."""
    results, args = {}, experiment.args
    for (band, target, language), kinds in tqdm(plan.items(), unit="cell", leave=False):
        unmasked = experiment.cell(language)
        cell = results[band, target, language] = {"unmasked": [unmasked]}
        for kind, masks in kinds.items():
            cell[kind] = []
            for draw, mask in enumerate(masks):
                name = args.experts if kind == "masked" else f"{kind}-seed{draw}"
                settings = {"experiment": "ablate", "band": layers[bands[band]].tolist(),
                            "target": target, "experts": name, "of": args.experts, "how": args.how}
                # a mask without experts changes nothing: the unmasked model is its result
                cell[kind].append(unmasked if not mask.any() else experiment.cell(
                    language, f"{band}-{name}-{target}", settings,
                    **{EDITS[args.how]: as_masks(mask, layers)}))
    return results


def changes(cell, kind, metric):
    """What the masks of a kind change in a cell's scores: (masks, examples)."""
    return np.array([each[metric] - cell["unmasked"][0][metric] for each in cell[kind]])


def is_hurt(masked, random, matched, sign):
    """Worse than every random draw (by chance one row of 20, with 19 draws), worse than every
    matched one, and than the random ones by an interval over examples and draws without 0?

    masked (examples,), random and matched (draws, examples); sign +1 where more is better, else -1
    """
    controls = np.concatenate([random, matched])
    worst = (sign * np.nanmean(masked) < sign * np.nanmean(controls, 1)).all()
    return bool(worst and all(sign * bound < 0 for bound in interval(masked - random)))


def change_rows(results, metric):
    """For each language, its mean score and what masking each target's experts changes in it."""
    rows = {}
    for (_, target, language), cell in results.items():
        unmasked = np.nanmean(cell["unmasked"][0][metric])
        row = rows.setdefault(language, {"": language, "unmasked": unmasked})
        row[target] = np.nanmean(changes(cell, "masked", metric))
    return list(rows.values())


def control_rows(results, plan, metric, shares):
    """For each language with controls three rows: masked, random and matched experts, how many they
    are, what part of its routing weight goes, the mean change, and its 95 % interval over problems
    or, of draws, the least and the most; and the verdict. Rows, and all verdicts.
    """
    rows, verdicts = [], []
    for key, masks in plan.items():
        if key not in results or len(masks) == 1:
            continue
        masked, share, verdict = masks["masked"][0], shares[key[2]], "none: too few other sets"
        drawn = {kind: changes(results[key], kind, metric) for kind in masks if masks[kind]}
        if "random" in drawn:
            verdicts.append(is_hurt(*drawn["masked"], drawn["random"], drawn["matched"],
                                    common.better(metric)))
            verdict = "hurt" * verdicts[-1]
        for kind, change in drawn.items():
            removed = [part_removed(mask, share, masked) for mask in masks[kind]]
            means = np.nanmean(change, 1)
            low, high = interval(*change) if kind == "masked" else (means.min(), means.max())
            experts = np.sum(masks[kind]) / len(means)
            rows.append({"own": key[2], "": kind, "experts": f"{experts:.1f}",
                         "weight": np.mean(removed), "change": means.mean(), "low": low,
                         "high": high, "verdict": verdict * (kind == "masked")})
        if min(removed) < 0.9 * part_removed(masked, share):
            rows[-1]["verdict"] = "others do not carry as much"
    return rows, verdicts


def selectivity_rows(results, plan, metric, shares, tokens):
    """What a mask does to its own language less what it does to the mean of the others, problem by
    problem, with the 95 % interval; likelihoods in nats per problem, since tokens differ. Beside it
    the routing weight that goes from its own language and, on average, from the others.

    tokens {language: (problems,)}, 1 where scores are no likelihoods. Nothing without as many
    problems in every language.
    """
    rows, names = [], list(tokens)
    if len(set(map(len, tokens.values()))) > 1 or len(names) < 2:
        return rows
    for band, target in [key[:2] for key in results if key[1] == key[2]]:
        mask, = plan[band, target, target]["masked"]
        change = {language: changes(results[band, target, language], "masked", metric)[0]
                  * tokens[language] for language in names}
        weight = {language: part_removed(mask, shares[language]) for language in names}
        own, own_weight = change.pop(target), weight.pop(target)
        difference = own - np.mean(list(change.values()), 0)
        low, high = interval(difference)
        rows.append({"own": target, "own - others": np.nanmean(difference), "low": low,
                     "high": high, "weight of own": own_weight,
                     "of others": np.mean(list(weight.values()))})
    return rows


def scored_tokens(tasks, metric):
    """{language: how many tokens of each problem a likelihood is the mean of, or 1}."""
    def count(example):
        start, stop = example["text_span"]
        return {"prompt_nll": stop - max(start, 1),
                "answer_nll": len(example["answer_ids"])}.get(metric, 1)

    return {language: np.array(list(map(count, encoded)))
            for language, (encoded, _) in tasks.items()}


def run_each(experiment, shares, rows, layers):
    """Mask every expert that a language uses, one at a time, in the rows. effects.npz holds what
    that does to the first metric, and what the results file knows of the other rows.

    effect  float64 (languages, layers, experts): mean change, nan where not run
    """
    args, used = experiment.args, np.stack(list(shares.values()))
    how, metric = args.how, args.metrics[0]
    effect, number = np.full(used.shape, np.nan), np.count_nonzero(used[:, rows])
    print(f"{number} evaluations")
    with tqdm(total=number, leave=False) as progress:
        for (i, row, expert), language in ((place, list(shares)[place[0]])
                                           for place in np.argwhere(used).tolist()):
            layer, base = int(layers[row]), experiment.cell(language)
            settings = {"layer": layer, "expert": expert, "how": how}
            edit = {EDITS[how]: {layer: np.arange(used.shape[2]) == expert}}
            after = experiment.cell(language, "each", settings, rows[row], **edit)
            if after:
                effect[i, row, expert] = np.nanmean(after[metric] - base[metric])
                progress.update(rows[row])
    path = common.predictions_folder(args.out) / "effects.npz"
    meta = json.dumps(experiment.settings | {"harm": -common.better(metric), "how": how})
    common.write_whole(path, lambda file: np.savez(
        file, effect=effect, languages=list(shares), layers=layers, metric=metric, meta=meta))
    return path


def parse_arguments():
    p, add = common.task_parser(globals())
    add("--experts", "the target's alone, what all share, as many random ones, or each",
        ("exclusive", "shared", "random", "each"))
    add("--how", "let others take their place, or zero their contribution", tuple(EDITS))
    add("--targets", "whose experts, as bn,de or bn+sw (default: those of the dumps)")
    add("--bands", "layers, as low=0-4 (default: first, middle and last tenth, or those of a "
        "selection)", nargs="+")
    args = p.parse_args()
    if args.selection:
        args.experts = "selection"
    common.require(args.experts != "each" or args.bands, "--experts each takes long; say in which "
                   "--bands")
    common.require(not args.targets or args.experts in ("exclusive", "random"), "--targets has no "
                   f"part in the {args.experts} experts; leave it out")
    return args


def effect_tables(results, plan, bands, shares, tasks):
    """[(title, rows)] of every metric and band, and the verdicts. bands: {band: its layers}"""
    tables, verdicts = [], []
    for metric, band in itertools.product(next(iter(results.values()))["unmasked"][0], bands):
        of_band = {key: cell for key, cell in results.items() if key[0] == band}
        rows, found = control_rows(of_band, plan, metric, shares)
        verdicts += found
        tables += [
            (f"\n{band} (layers {bands[band]})  {metric}: change when experts are masked, of",
             change_rows(of_band, metric)),
            ("in the target's own language; low, high: 95 % interval, or the least and most draw",
             rows),
            ("selective? the change in the own language less that in the others, per problem",
             selectivity_rows(of_band, plan, metric, shares, scored_tokens(tasks, metric)))]
    return tables, verdicts


def main():
    args = parse_arguments()
    dumps = analyze.load_languages(args.routing, args.part)
    args.experts_per_language = analyze.number_of_experts(args.experts_per_language,
                                                          dumps[0]["num_experts"])
    layers, chosen = dumps[0]["layers"], choose_experts(args, dumps)
    bands = analyze.parse_bands(args.bands, layers)
    if args.selection and not args.bands:
        bands = {"selected": chosen["selection"].any(1)}
    experiment = common.Experiment(args, dumps)
    shares = routing_shares(dumps, experiment.tasks)
    if args.experts == "each":
        return print(run_each(experiment, shares, np.any(list(bands.values()), 0), layers))
    plan = plan_cells(args, chosen, bands, dumps, shares)
    masks = [mask for cell in plan.values() for kind in cell.values() for mask in kind]
    common.require(np.any(masks), "no expert to mask in these bands; give other --bands or "
                                  "--targets")
    for mask in masks if args.how == "reroute" else ():
        common.check_edit(as_masks(mask, layers), {}, "proportional", experiment.shape, {})
    print(f"{args.model}  {len(masks)} cells  {args.experts} experts  "
          f"experts_per_language {args.experts_per_language}  threshold {args.threshold}")
    results = run_cells(experiment, plan, bands, layers)
    named = {band: analyze.describe(layers[rows]) for band, rows in bands.items()}
    tables, verdicts = effect_tables(results, plan, named, shares, experiment.tasks)
    analyze.print_tables(tables)
    number, draws = len(verdicts), args.control_seeds
    print(f"\nhurt: worse than all {draws} random draws and all {MATCHED_SEEDS} matched ones, and "
          f"by an interval\nover problems and draws. {sum(verdicts)} of {number} rows are hurt; "
          f"chance would give up to {number / (draws + 1):.1f}")
    common.print_end(experiment)


if __name__ == "__main__":
    common.run_script(main, analyze.InputError)
