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
    return {target: analyze.exclusive_experts(
        share[analyze.rows_of(target.split("+"), dumps)].sum(0), args.threshold)
        for target in targets}


def random_controls(masked, used, draws, seed):
    """Different sets of as many experts per layer, uniform among all of those in use, but for the
    masked set: bool (layers, experts) each. None at all where there are fewer than so many.

    The seed is of band, target and language, so that no two rows share a draw.
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


def part_removed(masks, share, masked):
    """The part of a language's routing weight that masks (..., layers, experts) remove, in the
    layers where the masked set (layers, experts), of which they are controls, has experts.
    """
    return (masks * share).sum((-2, -1)) / max(1, masked.any(1).sum())


def routing_shares(dumps, languages):
    """{language: (layers, experts)}: each expert's share of a layer's routing weight; of a language
    without a dump, the mean of the others'.
    """
    shares = {dump["language"]: analyze.distribution(dump["weights"]) for dump in dumps}
    mean = np.mean(list(shares.values()), 0)
    return {language: shares.get(language, mean) for language in languages}


def plan_cells(args, chosen, bands, shares, top_k):
    """{(band, target, language): {kind: bool (masks, layers, experts)}}; kind "masked" is what the
    experiment is about, "random" (unless there are too few) and "matched" are its controls.
    """
    plan = {}
    for band, target, language in itertools.product(bands, chosen, shares):
        masked, share = chosen[target] & bands[band][:, None], shares[language]
        most, num_experts = masked.sum(1).max(), masked.shape[1]
        common.require(args.how == "zero" or num_experts - most >= top_k,
                       f"masking {most} of {num_experts} experts leaves fewer than top_k {top_k}")
        cell = {"masked": [masked]}
        if masked.any() and (target in OF_ALL or language in target.split("+")):
            seed = zlib.crc32(f"{band} {target} {language}".encode())
            cell["random"] = random_controls(masked, share > 0, args.control_seeds, seed)
            cell["matched"] = [matched_control(masked, share, top_k, [seed, draw])
                               for draw in range(MATCHED_SEEDS)]
        plan[band, target, language] = {kind: np.array(masks) for kind, masks in cell.items()
                                        if masks}
    return plan


def run_cells(experiment, plan, metric, bands, layers):
    """{band: {(target, language): {kind: (masks, changes (masks, examples))}}} of the plan's masks:
    scores under each, less those of the unmasked model.
    """
    results, args = {}, experiment.args
    for (band, target, language), kinds in tqdm(plan.items(), unit="cell", leave=False):
        unmasked, cell = experiment.cell(language), {}
        for kind, masks in kinds.items():
            scores = []
            for draw, mask in enumerate(masks):
                edit = {layer: row for layer, row in zip(layers.tolist(), mask) if row.any()}
                name = args.experts if kind == "masked" else f"{kind}-seed{draw}"
                settings = {"experiment": "ablate", "band": layers[bands[band]].tolist(),
                            "target": target, "experts": name, "of": args.experts, "how": args.how}
                # a mask without experts changes nothing: the unmasked model is its result
                after = unmasked if not edit else experiment.cell(
                    language, f"{band}-{name}-{target}", settings, **{EDITS[args.how]: edit})
                scores.append(after[metric])
            cell[kind] = masks, np.array(scores) - unmasked[metric]
        results.setdefault(band, {})[target, language] = cell
    return results


def is_hurt(sign, masked, random, *matched):
    """Worse than every random draw (by chance one row of 20, with 19 draws), worse than every
    matched one, and than the random ones by an interval over examples and draws without 0?

    masked (examples,), random and matched (draws, examples); sign +1 where more is better, else -1
    """
    controls = np.concatenate([random, *matched])
    worst = (sign * np.nanmean(masked) < sign * np.nanmean(controls, 1)).all()
    return bool(worst and all(sign * bound < 0 for bound in interval(masked - random)))


def control_rows(language, cell, share, metric):
    """A language's masked, random and matched experts: how many they are, what part of its routing
    weight goes, the mean change, its 95 % interval over problems or, of draws, the least and the
    most; and the verdict. cell: {kind: (masks, changes)}
    """
    rows, (masked,) = [], cell["masked"][0]
    for kind, (masks, changes) in cell.items():
        removed, means = part_removed(masks, share, masked), np.nanmean(changes, 1)
        low, high = interval(changes) if kind == "masked" else (means.min(), means.max())
        rows.append({"own": language, "": kind, "experts": f"{masks.sum() / len(masks):.1f}",
                     "weight": removed.mean(), "change": means.mean(), "low": low, "high": high,
                     "verdict": ""})
    rows[0]["verdict"] = "none: too few other sets"
    if "random" in cell:
        hurt = is_hurt(common.better(metric), *(changes for _, changes in cell.values()))
        rows[0]["verdict"] = "hurt" if hurt else "not hurt"
    if kind == "matched" and removed.min() < 0.9 * rows[0]["weight"]:
        rows[-1]["verdict"] = "others do not carry as much"
    return rows


def selectivity_rows(cells, shares, tokens):
    """What a mask does to its own language less what it does to the mean of the others, problem by
    problem, with the 95 % interval; likelihoods in nats per problem, since tokens differ. Beside it
    the routing weight that goes from its own language and, on average, from the others.

    cells of a band as of run_cells, tokens of each language's problems. Nothing without as many
    problems in every language.
    """
    rows, share = [], np.array(list(shares.values()))
    if len(set(map(len, tokens))) > 1 or len(tokens) < 2:
        return rows
    for target in [target for target, language in cells if target == language]:
        masks, _ = cells[target, target]["masked"]
        own, removed = np.array(list(shares)) == target, part_removed(masks, share, masks[0])
        change = np.array(tokens) * [cells[target, language]["masked"][1][0] for language in shares]
        difference = change[own][0] - change[~own].mean(0)
        low, high = interval(difference)
        rows.append({"own": target, "own - others": np.nanmean(difference), "low": low,
                     "high": high, "weight of own": removed[own][0],
                     "of others": removed[~own].mean()})
    return rows


def scored_tokens(example, metric):
    """How many tokens of an example a likelihood is the mean of; 1 of another score."""
    start, stop = example["text_span"]
    return {"prompt_nll": stop - max(start, 1),
            "answer_nll": len(example["answer_ids"])}.get(metric, 1)


def run_each(experiment, shares, rows, layers):
    """Mask every expert that a language uses, one at a time, in the rows. effects.npz holds what
    that does to the first metric, and what the results file knows of the other rows.

    effect  float64 (languages, layers, experts): mean change, nan where not run
    """
    args, languages, used = experiment.args, list(shares), np.array(list(shares.values())) > 0
    metric, effect = args.metrics[0], np.full(used.shape, np.nan)
    print(f"{np.count_nonzero(used[:, rows])} evaluations")
    for i, row, expert in tqdm(np.argwhere(used).tolist(), leave=False):
        settings = {"layer": int(layers[row]), "expert": expert, "how": args.how}
        edit = {EDITS[args.how]: {settings["layer"]: np.arange(used.shape[2]) == expert}}
        after = experiment.cell(languages[i], "each", settings, rows[row], **edit)
        if after:
            change = after[metric] - experiment.cell(languages[i])[metric]
            effect[i, row, expert] = np.nanmean(change)
    path = experiment.folder / "effects.npz"
    meta = json.dumps(experiment.settings | {"harm": -common.better(metric), "how": args.how})
    common.write_whole(path, lambda file: np.savez(
        file, effect=effect, languages=languages, layers=layers, metric=metric, meta=meta))
    return path


def parse_arguments():
    p, add = common.task_parser(globals())
    add("--experts", "the target's alone, the shared ones, or each, one at a time",
        ("exclusive", "shared", "each"))
    add("--how", "let others take their place, or zero their contribution", tuple(EDITS))
    add("--targets", "whose experts, as bn,de or bn+sw (default: those of the dumps)")
    add("--bands", "layers, as low=0-4 (default: first, middle and last tenth, or those of a "
        "selection)", nargs="+")
    args = p.parse_args()
    if args.selection:
        common.require(args.experts == "exclusive", "leave out --experts: --selection names them")
        args.experts = "selection"
    common.require(args.experts != "each" or args.bands, "--experts each takes long; say in which "
                   "--bands")
    common.require(not args.targets or args.experts == "exclusive", "--targets has no part in the "
                   f"{args.experts} experts; leave it out")
    return args


def effect_tables(experiment, plan, bands, layers, shares):
    """[(title, rows)] of every metric and band of the plan, which is run."""
    tables, tasks = [], experiment.tasks
    for metric in experiment.cell(next(iter(tasks))):
        tokens = [[scored_tokens(example, metric) for example in encoded]
                  for encoded in tasks.values()]
        for band, cells in run_cells(experiment, plan, metric, bands, layers).items():
            where = analyze.describe(layers[bands[band]])
            changes = [{"": language, "unmasked": np.nanmean(experiment.cell(language)[metric])}
                       | {target: np.nanmean(cell["masked"][1])
                          for (target, each), cell in cells.items() if each == language}
                       for language in tasks]
            controls = [control_rows(language, cell, shares[language], metric)
                        for (_, language), cell in cells.items() if len(cell) > 1]
            tables += [
                (f"\n{band} (layers {where})  {metric}: change by masking experts of", changes),
                ("in the target's own language; low, high: 95 % interval, or the least and most "
                 "draw", sum(controls, [])),
                ("selective? the change in the own language less that in the others, per problem",
                 selectivity_rows(cells, shares, tokens))]
    return tables


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
    plan = plan_cells(args, chosen, bands, shares, dumps[0]["top_k"])
    masks = np.concatenate([masks for cell in plan.values() for masks in cell.values()])
    common.require(masks.any(), "no expert to mask in these bands; give other --bands or "
                                "--targets")
    print(f"{args.model}  {len(masks)} cells  {args.how} ", args.selection or
          f"{args.experts} experts  experts_per_language {args.experts_per_language}  "
          f"threshold {args.threshold}")
    tables = effect_tables(experiment, plan, bands, layers, shares)
    analyze.print_tables((title, rows) for title, rows in tables if rows)
    verdicts = [row.get("verdict") for _, rows in tables for row in rows]
    hurt, draws = verdicts.count("hurt"), args.control_seeds
    number = hurt + verdicts.count("not hurt")
    print(f"\nhurt: worse than all {draws} random draws and all {MATCHED_SEEDS} matched ones, and "
          f"by an interval\nover problems and draws. {hurt} of {number} rows are hurt; "
          f"chance would give up to {number / (draws + 1):.1f}")
    if set(verdicts) == {None}:
        print("no controls: no evaluated language is a target; label=path renames a dump")
    common.print_end(experiment)


if __name__ == "__main__":
    common.run_script(main, analyze.InputError)
