"""
Mask experts, layer band by layer band, and see which languages it hurts, against as many other experts.

    python ablate.py                                                          # the tiny model; after capture.py
    python ablate.py --model Qwen/Qwen3-30B-A3B --routing routing/*.npz --data 'data/mgsm_{lang}.tsv' \\
                     --bands early=0-4 middle=22-26 late=43-47 --metrics accuracy prompt_nll
    python ablate.py --selection selection.json                               # what analyze.py --contrast selected

reads   routing dumps, and evaluation data (.tsv, .jsonl, .json or .txt), best not what the dumps were captured on
writes  results/ablate.jsonl    one line per cell, with its settings and the scores of every example

Every cell is band x target x evaluation language: the experts exclusive to the target language (arXiv 2601.14050) are
never selected in the band. In the target's own language there are two controls, as many experts each: random ones among
those that the language uses at all, and those that it uses as often as the masked ones without their being exclusive.
A language counts as hurt if masking does worse than every random draw, and worse than the controls by an interval that
leaves out 0; it covers the examples and the random draws. One model load.
Takes about two minutes on the tiny model. A run that was stopped goes on where it stopped.
"""

import argparse
import sys
import zlib

import numpy as np
from tqdm import tqdm

import analyze
import common

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"             # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
ROUTING = analyze.DUMPS              # the dumps that the experts are chosen from
DATA = "tests/data/eval_{lang}.tsv"  # what is evaluated; {lang} stands for the language
EXPERTS_PER_LANGUAGE = None          # None: 15/128 of the experts, the paper's; 32 of 128 for XQuAD
THRESHOLD = 0.4                      # the paper's; 0.5 for XQuAD
METRICS = ["prompt_nll"]             # prompt_nll answer_nll accuracy language
CONTROL_SEEDS = 5                    # random draws; one alone would mislead
BATCH_TOKENS = 8192                  # per forward pass, padding included
MAX_LENGTH = 4096                    # tokens of a prompt
MAX_NEW_TOKENS = None                # tokens of a response; None: as the checkpoint's generation config says, or 512
OUT = "results/ablate.jsonl"
# ---------------------------------------------------------------------------------------------------------------------
OF_ALL = ("shared", "selection")     # targets that are no language: every language has its controls


def exclusive_to(share, languages, target, threshold):
    """bool (layers, experts): exclusive to a language, or to several together, as "bn+sw"."""
    return analyze.exclusive_experts(share[[languages.index(name) for name in target.split("+")]].sum(0), threshold)


def random_control(masked, used, seed):
    """As many other experts per layer as are masked, drawn from those in use. bool (layers, experts) each.

    seed is a list of integers: a draw for each language, target and band, so that no two controls share one.
    """
    rng = np.random.default_rng(seed)
    control = np.zeros_like(masked)
    for layer, n in enumerate(masked.sum(1)):
        candidates = np.flatnonzero(used[layer] & ~masked[layer])
        control[layer, rng.choice(candidates, min(n, len(candidates)), replace=False)] = True
    return control


def usage_matched_control(masked, candidates, frequency):
    """For each masked expert, the most used first, the candidate not yet taken whose frequency is closest.

    masked, candidates bool (layers, experts), frequency (layers, experts) in the language that is evaluated
    """
    control = np.zeros_like(masked)
    for layer in range(len(masked)):
        free = candidates[layer] & ~masked[layer]
        for expert in sorted(np.flatnonzero(masked[layer]), key=lambda e: -frequency[layer, e]):
            if free.any():
                distance = np.where(free, abs(frequency[layer] - frequency[layer, expert]), np.inf)
                control[layer, distance.argmin()] = True
                free[distance.argmin()] = False
    return control


def as_masks(chosen, layers):
    """bool (layers, experts) -> {decoder layer: expert ids}, as edit_routing takes it."""
    return {int(layer): np.flatnonzero(row).tolist() for layer, row in zip(layers, chosen) if row.any()}


def better(metric):
    """+1 where more of a metric is better, -1 where less is."""
    return -1 if metric.endswith(("nll", "per_byte")) else 1


def print_band(title, languages, targets, own, effects, metric):
    """The table of one band and metric. effects: {(target, language): (baseline, {cell name: scores})}, see main."""
    width = max(9, *(len(target) + 2 for target in targets))
    print(f"\n{title}  {metric}: change when experts are masked, of\n{'':<9}{'unmasked':>9}"
          + "".join(f"{target:>{width}}" for target in targets))
    for language in languages:
        line = f"{language:<9}{np.nanmean(effects[targets[0], language][0][metric]):>9.3f}" if (
            targets[0], language) in effects else f"{language:<9}"
        for target in targets:
            base, cells = effects[target, language]
            line += f"{np.nanmean(cells['masked'][metric] - base[metric]):>+{width}.3f}"
        print(line)
    if not own:
        print("no target's own language is evaluated, so there are no controls")
        return
    print("own      experts  change  random (least  most)    beyond random [95 %]     beyond matched [95 %]")
    for target, language in own:
        base, cells = effects[target, language]
        masked = cells["masked"][metric]
        random = np.array([scores[metric] for name, scores in cells.items() if name.startswith("random")])
        changes = np.nanmean(random - base[metric], 1)
        line = (f"{language:<9}{cells['experts']:>7}{np.nanmean(masked - base[metric]):>+8.3f}"
                f"{changes.mean():>+8.3f} ({changes.min():+.3f} {changes.max():+.3f})")
        hurt = better(metric) * np.nanmean(masked) < (better(metric) * np.nanmean(random, 1)).min()
        for control in (random, cells["matched"][metric][None]):
            low, high = common.bootstrap_interval(masked - control)
            hurt &= high < 0 if better(metric) > 0 else low > 0
            line += f"{np.nanmean(masked - control):>+8.3f} {f'[{low:+.3f} {high:+.3f}]':<16}"
        print(line + ("  hurt" if hurt else ""))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_task_arguments(
        p, model=MODEL, routing=ROUTING, data=DATA, experts_per_language=EXPERTS_PER_LANGUAGE, threshold=THRESHOLD,
        metrics=METRICS, control_seeds=CONTROL_SEEDS, out=OUT, batch_tokens=BATCH_TOKENS, max_length=MAX_LENGTH,
        max_new_tokens=MAX_NEW_TOKENS)
    p.add_argument("--targets", help="languages whose experts are masked, as bn,de or bn+sw (default: those of the dumps)")
    p.add_argument("--bands", nargs="+", metavar="NAME=A-B", help="decoder layers, inclusive (default: first, middle, last tenth)")
    p.add_argument("--experts", choices=["exclusive", "shared", "random"], default="exclusive", help="which are masked: "
                   "exclusive to the target; shared among all; as many random ones (default: %(default)s)")
    args = p.parse_args()

    dumps = analyze.load_languages(args.routing)
    if args.experts_per_language is None:
        args.experts_per_language = analyze.default_experts_per_language(dumps[0]["num_experts"])
    names, layers = [dump["language"] for dump in dumps], dumps[0]["layers"]
    bands = analyze.parse_bands(args.bands, layers)
    frequency = analyze.activation_frequency([dump["counts"] for dump in dumps], [dump["num_tokens"] for dump in dumps])
    share = analyze.language_shares(frequency, args.experts_per_language)
    if args.selection:
        if args.targets:
            raise common.InputError("--selection takes the place of languages' experts; leave out --targets")
        args.experts = "selection"
    targets = [args.experts] if args.experts in OF_ALL else args.targets.split(",") if args.targets else names
    for name in {name for target in targets for name in target.split("+")} - set(OF_ALL):
        if name not in names:
            raise common.InputError(f"no routing for '{name}' among the dumps; run: python capture.py --languages {name}")
    exclusive = {target: exclusive_to(share, names, target, args.threshold) for target in targets if target not in OF_ALL}
    exclusive["shared"] = analyze.shared_experts(share, args.threshold)
    if args.selection:  # of either sign, those that A's tokens select more
        chosen = exclusive["selection"] = analyze.load_selection(args.selection, layers, dumps[0]["num_experts"]) > 0
        if not args.bands:
            bands = {"selected": chosen.any(1)}
        outside = chosen.sum() - chosen[np.any(list(bands.values()), 0)].sum()
        if outside or not chosen.any():
            print(f"note: {outside} of the {chosen.sum()} experts that A's tokens select more lie outside of the bands")
    experiment = common.Experiment(args, dumps)

    plan = []  # (band, target, language, cell name, settings, masks)
    for band, rows in bands.items():
        for target in targets:
            for language in experiment.tasks:
                chosen = exclusive[target] & rows[:, None]
                of = names.index(language) if language in names else None
                source = frequency[of] if of is not None else frequency.mean(0)
                where = zlib.crc32(f"{band} {target} {language}".encode())
                if args.experts == "random":
                    used = frequency[[names.index(name) for name in target.split("+")]].sum(0) > 0
                    chosen = random_control(chosen, used, [zlib.crc32(f"{band} {target}".encode())])
                cells = [("masked", args.experts, chosen)]
                if is_own(target, language):
                    cells += [(f"random{seed}", f"random-seed{seed}", random_control(chosen, source > 0, [where, seed]))
                              for seed in range(args.control_seeds)]
                    cells += [("matched", "usage-matched", usage_matched_control(chosen, ~exclusive[target], source))]
                for key, kind, mask in cells:
                    settings = {"experiment": "ablate", "band": layers[rows].tolist(), "target": target, "experts": kind,
                                "of": args.experts}
                    plan.append((band, target, language, key, f"{band}-{kind}-{target}", settings, as_masks(mask, layers)))
    for *_, masks in plan:
        common.check_edit(masks, {}, "proportional", experiment.routers, experiment.shape)

    choice = "" if args.selection else f"experts_per_language {args.experts_per_language}  threshold {args.threshold}  "
    print(f"{args.model}  {len(plan)} cells  {args.experts} experts  {choice}"
          f"{', '.join(f'{band} {analyze.describe(layers[rows])}' for band, rows in bands.items())}")
    effects = {}
    for band, target, language, key, name, settings, masks in tqdm(plan, unit="cell", leave=False):
        base, cells = effects.setdefault(band, {}).setdefault(
            (target, language), (experiment.cell(language, "baseline"), {}))
        # a mask without experts changes nothing: the baseline is its result
        cells[key] = experiment.cell(language, name, settings, masks=masks) if masks else base
        if key == "masked":
            cells["experts"] = sum(map(len, masks.values()))
    own = [(target, language) for target in targets for language in experiment.tasks if is_own(target, language)]
    for metric in [metric for metric in (*args.metrics, "f1") if metric in base]:
        for band, rows in bands.items():
            print_band(f"{band} (layers {analyze.describe(layers[rows])})", experiment.tasks, targets, own, effects[band], metric)
    print(f"\n{args.out}")


def is_own(target, language):
    return target in OF_ALL or language in target.split("+")


if __name__ == "__main__":
    try:
        main()
    except (common.InputError, analyze.InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
