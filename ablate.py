"""
Mask experts, layer band by layer band, and see which languages it hurts, against as many others.

    python ablate.py                                       # the tiny model; after capture.py
    python ablate.py --model Qwen/Qwen3-30B-A3B --data 'data/mgsm_{lang}.tsv' \\
                     --bands early=0-4 middle=22-26 late=43-47 --metrics accuracy prompt_nll
    python ablate.py --selection selection.json            # what analyze.py --contrast selected

reads   routing dumps, and evaluation data, best not what the dumps were captured on
writes  results/ablate.jsonl    a line per cell: settings, scores of every example, their mean

A cell is band x target x evaluation language: the experts exclusive to the target (arXiv
2601.14050) are never selected in the band. In the target's own language there are controls, as many
experts each: random ones among those that the language uses at all, and those that it uses as
often as the masked ones without their being exclusive. A language is hurt if it does worse than
with every random draw, and worse than with the controls by intervals, over examples and draws, that
leave out 0. One model load; two minutes on the tiny model. A stopped run goes on where it stopped.
"""

import itertools
import sys
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
CONTROL_SEEDS = 5                    # random draws; one alone would mislead
BATCH_TOKENS = 8192                  # per forward pass, padding included
MAX_LENGTH = 4096                    # tokens of a prompt
MAX_NEW_TOKENS = None                # of a response; None: the checkpoint's generation config
OUT = "results/ablate.jsonl"
# ------------------------------------------------------------------------------------------------
OF_ALL = ("shared", "selection")     # targets that are no language: every language has its controls


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


def random_control(masked, used, seed):
    """As many other experts per layer as are masked, of those in use; all bool (layers, experts).

    seed is a list of integers: of band, target and language, so that no two controls share a draw.
    """
    rng, control = np.random.default_rng(seed), np.zeros_like(masked)
    for layer, n in enumerate(masked.sum(1)):
        candidates = np.flatnonzero(used[layer] & ~masked[layer])
        control[layer, rng.choice(candidates, min(n, len(candidates)), replace=False)] = True
    return control


def usage_matched_control(masked, candidates, frequency):
    """For each masked expert, the most used first, the free candidate of closest frequency.

    masked, candidates bool (layers, experts), frequency (layers, experts) in the language evaluated
    """
    control, free = np.zeros_like(masked), candidates & ~masked
    for layer, row in enumerate(masked):
        for expert in sorted(np.flatnonzero(row), key=lambda e: -frequency[layer, e]):
            if free[layer].any():
                distance = abs(frequency[layer] - frequency[layer, expert])
                closest = np.where(free[layer], distance, np.inf).argmin()
                control[layer, closest], free[layer, closest] = True, False
    return control


def plan_cells(args, chosen, bands, dumps, languages):
    """{(band, target, language): {kind: bool (layers, experts) to mask}}; kind "masked" is what the
    experiment is about, "random-seed0", ... and "usage-matched" are its controls.
    """
    frequencies, plan = analyze.frequencies(dumps), {}
    by_language = {dump["language"]: rows for dump, rows in zip(dumps, frequencies)}
    for band, target, language in itertools.product(bands, chosen, languages):
        masked, of_target = chosen[target] & bands[band][:, None], target.split("+")
        if args.experts == "random":
            used = frequencies[analyze.rows_of(of_target, dumps)].any(0)
            masked = random_control(masked, used, [zlib.crc32(f"{band} {target}".encode())])
        cell = plan[band, target, language] = {"masked": masked}
        if target in OF_ALL or language in of_target:
            frequency = by_language.get(language, frequencies.mean(0))
            seed = zlib.crc32(f"{band} {target} {language}".encode())
            for draw in range(args.control_seeds):
                cell[f"random-seed{draw}"] = random_control(masked, frequency > 0, [seed, draw])
            cell["usage-matched"] = usage_matched_control(masked, ~chosen[target], frequency)
    return plan


def as_masks(chosen, layers):
    """bool (layers, experts) -> {decoder layer: bool (experts,)}, as edit_routing takes it."""
    return {layer: row for layer, row in zip(layers.tolist(), chosen) if row.any()}


def run_cells(experiment, plan, bands, layers):
    """plan with {metric: scores (examples,)} for every mask, and for "unmasked" beside them."""
    results, experts = {}, experiment.args.experts
    for (band, target, language), masks in tqdm(plan.items(), unit="cell", leave=False):
        cell = results[band, target, language] = {"unmasked": experiment.cell(language)}
        for kind, mask in masks.items():
            name = experts if kind == "masked" else kind
            settings = {"experiment": "ablate", "band": layers[bands[band]].tolist(),
                        "target": target, "experts": name, "of": experts}
            # a mask without experts changes nothing: the unmasked model is its result
            cell[kind] = cell["unmasked"] if not mask.any() else experiment.cell(
                language, f"{band}-{name}-{target}", settings, masks=as_masks(mask, layers))
    return results


def is_hurt(masked, random, matched, sign):
    """Worse than every random draw, and than both controls by intervals that leave out 0?

    masked, matched (examples,), random (draws, examples); sign +1 where more is better, else -1
    """
    worst = (sign * np.nanmean(masked) < sign * np.nanmean(random, 1)).all()
    bounds = interval(masked - random) + interval(masked - matched)
    return bool(worst and all(sign * bound < 0 for bound in bounds))


def change_rows(results, metric):
    """For each language, its mean score and what masking each target's experts changes in it."""
    rows = {}
    for (_, target, language), cell in results.items():
        base = cell["unmasked"][metric]
        row = rows.setdefault(language, {"": language, "unmasked": np.nanmean(base)})
        row[target] = np.nanmean(cell["masked"][metric] - base)
    return list(rows.values())


def control_rows(results, plan, metric):
    """For each language with controls, the effect of masking its own experts beside theirs."""
    rows, sign = [], common.better(metric)
    for key, cell in results.items():
        if "usage-matched" in cell:
            scores = {kind: values[metric] for kind, values in cell.items()}
            masked, matched = scores["masked"], scores["usage-matched"]
            random = np.array([scores[kind] for kind in cell if kind.startswith("random")])
            numbers = [mask.sum() for mask in plan[key].values()]
            rows.append({"own": key[2], "experts": numbers[0]}
                        | common.effect(scores["unmasked"], masked, random)
                        | {f"beyond {name}": "[{:+.3f} {:+.3f}]".format(*interval(masked - other))
                           for name, other in (("random", random), ("matched", matched))}
                        | {"": "too few others for controls" if numbers[0] > min(numbers) else
                           "hurt" * is_hurt(masked, random, matched, sign)})
    return rows


def parse_arguments():
    p = common.argument_parser(__doc__)
    add = common.add_task_arguments(p)
    add("--experts", choices=["exclusive", "shared", "random"], default="exclusive",
        help="exclusive to the target; shared by all; or random, as many (default: %(default)s)")
    add("--targets", help="whose experts, as bn,de or bn+sw (default: those of the dumps)")
    add("--bands", nargs="+", metavar="NAME=A-B", help="decoder layers, inclusive (default: first, "
        "middle and last tenth; those of a selection)")
    args = common.parse_task_arguments(p, sys.modules[__name__])
    if args.selection:
        args.experts = "selection"
    common.require(args.experts not in OF_ALL or not args.targets, f"--targets has no part in the "
                   f"{args.experts} experts; leave it out")
    return args


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
    plan = plan_cells(args, chosen, bands, dumps, experiment.tasks)
    for mask in itertools.chain(*map(dict.values, plan.values())):
        common.check_edit(as_masks(mask, layers), {}, "proportional", experiment.shape)
    print(f"{args.model}  {sum(map(len, plan.values()))} cells  {args.experts} experts  "
          f"experts_per_language {args.experts_per_language}  threshold {args.threshold}")
    results = run_cells(experiment, plan, bands, layers)
    for metric, band in itertools.product(next(iter(results.values()))["unmasked"], bands):
        print(f"\n{band} (layers {analyze.describe(layers[bands[band]])})  {metric}: change when "
              "experts are masked, of")
        of_band = {key: cell for key, cell in results.items() if key[0] == band}
        analyze.print_rows(change_rows(of_band, metric))
        print("in the target's own language, beside random and usage-matched experts")
        analyze.print_rows(control_rows(of_band, plan, metric))
    common.print_end(experiment)


if __name__ == "__main__":
    common.run_script(main, analyze.InputError)
