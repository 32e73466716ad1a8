"""
Boost the experts that dominant languages share, and see whether other languages answer better, against random experts.

    python steer.py                                                           # the tiny model; after capture.py
    python steer.py --model Qwen/Qwen3-30B-A3B --routing routing/*.npz --data 'data/mgsm_{lang}.tsv' \\
                    --sources en,zh --band 10-39 --lambda 0.022 --experts-per-language 20 --threshold 0.7
    python steer.py --selection selection.json --rule soft --lambda 0.5       # what analyze.py --contrast selected

reads   routing dumps, and evaluation data (.tsv, .jsonl, .json or .txt), best not what the dumps were captured on
writes  results/steer.jsonl     one line per cell, with its settings and the scores of every example

In the band, router_logits += lambda * c * |router_logits| for the experts that the source languages share, with c the
first source's share in the expert (arXiv 2601.14050). Of several lambdas the best is chosen on every other example and
reported on the rest. Controls boost as many random experts per layer with the same coefficients. One model load.
Takes about a minute and a half on the tiny model. A run that was stopped goes on where it stopped. In a notebook:

    coefficients = steering_coefficients(analyze.load_languages(["routing/en.npz", "routing/zh.npz"]), ["en", "zh"])
    with steer(model, coefficients, 0.5): model.generate(**batch)
"""

import argparse
import sys

import numpy as np
import torch
from tqdm import tqdm

import analyze
import common

# ---------------------------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"             # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
ROUTING = analyze.DUMPS              # the dumps that the experts are chosen from
DATA = "tests/data/eval_{lang}.tsv"  # what is evaluated; {lang} stands for the language
SOURCES = "en,zh"                    # the first gives the coefficients; shares are among the sources alone
LAMBDAS = [0.1, 0.3, 1.0]            # the paper, at its size: 0.022 for en,zh and 0.034 for zh,en
RULE = "proportional"                # soft, hard
EXPERTS_PER_LANGUAGE = None          # None: 5/16 of the experts, 10 of the tiny model's 32; the paper: 20 of 128
THRESHOLD = 0.7                      # the paper's for steering
METRICS = ["accuracy", "prompt_nll"] # of these; by the first the lambda is chosen: prompt_nll answer_nll accuracy language
CONTROL_SEEDS = 5                    # random draws; one alone would mislead
BATCH_TOKENS = 16384                 # per forward pass, padding included
MAX_LENGTH = 4096                    # tokens of a prompt
MAX_NEW_TOKENS = None                # tokens of a response; None: as the checkpoint's generation config says, or 512
OUT = "results/steer.jsonl"
# ---------------------------------------------------------------------------------------------------------------------
RIGHT_OR_WRONG = ("accuracy", "language")  # metrics that McNemar's test is for


def steering_coefficients(dumps, sources, band=None, experts_per_language=None, threshold=THRESHOLD):
    """{decoder layer: float64 (num_experts,)}: the first source's share in each expert that the sources share, else 0.

    dumps    of analyze.load_languages; those of other languages than the sources are not looked at
    band     decoder layers "10-39", both inclusive; by default from 10/48 to 40/48 of the depth, the paper's
    InputError if no expert is shared in the band.
    """
    by_language = {dump["language"]: dump for dump in dumps}
    for source in sources:
        if source not in by_language:
            raise common.InputError(f"no routing for '{source}' among the dumps; run: python capture.py --languages {source}")
    chosen, layers = [by_language[source] for source in sources], dumps[0]["layers"]
    frequency = analyze.activation_frequency([d["counts"] for d in chosen], [d["num_tokens"] for d in chosen])
    share = analyze.language_shares(
        frequency, default_experts_per_language(frequency.shape[-1]) if experts_per_language is None else experts_per_language)
    shared = analyze.shared_experts(share, threshold) & band_rows(band, layers)[:, None]
    if not shared.any():
        raise common.InputError(f"{','.join(sources)} share no expert in this band; raise --threshold or --experts-per-language")
    return {int(layer): np.where(row, share[0, i], 0.0) for i, (layer, row) in enumerate(zip(layers, shared)) if row.any()}


def selection_coefficients(selection, layers, band=None):
    """{decoder layer: float64 (num_experts,)}: 1 for a selected expert that A's tokens select more, -1 for one that B's do.

    selection  analyze.load_selection's (layers, experts); band "A-B", by default all of its layers
    """
    rows = band_rows(band, layers) if band else np.ones(len(layers), bool)
    coefficients = {int(layer): np.sign(row) for layer, row, inside in zip(layers, selection, rows) if inside and row.any()}
    if not coefficients:
        raise common.InputError(f"the selection has no experts in the band {band}")
    return coefficients


def default_experts_per_language(num_experts):
    return max(1, num_experts * 5 // 16)


def band_rows(band, layers):
    """bool (layers,) of "10-39", or of the paper's part of the depth."""
    if band:
        return next(iter(analyze.parse_bands([band], layers).values()))
    position = np.arange(len(layers))
    return (position >= len(layers) * 10 // 48) & (position < -(-len(layers) * 40 // 48))


def random_coefficients(coefficients, seed):
    """The same coefficients in every layer, on experts drawn at random."""
    rng = np.random.default_rng(seed)
    return {layer: rng.permutation(c) for layer, c in coefficients.items()}


def steer(model, coefficients, strength, rule=RULE, **options):
    """edit_routing with every coefficient times the strength (the paper's lambda)."""
    return common.edit_routing(model, boosts=scaled(coefficients, strength), rule=rule, **options)


def scaled(coefficients, strength):
    return {layer: strength * c for layer, c in coefficients.items()}


@torch.inference_mode()
def moved_selections(model, encoded, coefficients, strength, rule=RULE, batch_tokens=BATCH_TOKENS):
    """{steered layer: part of the prompts' expert selections that steering changes}, over real tokens.

    Against the same model unsteered on the same prompts: what reaches a layer has been steered below it, too.
    """
    decoder, moved, total = model.get_decoder(), dict.fromkeys(coefficients, 0), 0
    sequences = [e["ids"] for e in encoded]
    for batch in common.length_batches([len(s) for s in sequences], batch_tokens):
        ids = common.right_padded([sequences[i] for i in batch]).to(model.device)
        real = torch.cat([torch.arange(ids.shape[1]) < len(sequences[i]) for i in batch]).nonzero().squeeze(1)
        plain, steered = {}, {}
        with common.record_routing(model, lambda layer, *output: plain.__setitem__(layer, output[2])):
            decoder(input_ids=ids, use_cache=False)
        with steer(model, coefficients, strength, rule, count_moved=False):
            with common.record_routing(model, lambda layer, *output: steered.__setitem__(layer, output[2])):
                decoder(input_ids=ids, use_cache=False)
        for layer in moved:
            before, after = (x[layer].flatten(0, -2)[real.to(x[layer].device)] for x in (plain, steered))
            moved[layer] += int((after[:, :, None] != before[:, None, :]).all(-1).sum())
        total += len(real)
    top_k = next(iter(plain.values())).shape[-1]
    return {layer: n / (total * top_k) for layer, n in moved.items()}


def effect_line(name, base, scores, controls, metric):
    """One line: unsteered and steered score, change with its interval, the random experts' change, what was fixed."""
    change = scores - base
    low, high = common.bootstrap_interval(change)
    line = (f"{name:<9}{np.nanmean(base):>9.3f}{np.nanmean(scores):>9.3f}{np.nanmean(change):>+9.3f} "
            f"{f'[{low:+.3f} {high:+.3f}]':<17}")
    if controls:
        random = np.array([np.nanmean(control - base) for control in controls])
        line += f"{random.mean():>+7.3f} ({random.min():+.3f} {random.max():+.3f})"
    else:
        line += " " * 23
    if metric in RIGHT_OR_WRONG:
        line += "{:>8}{:>8}{:>7.3f}".format(*common.mcnemar_p(base, scores))
    return line


def pooled_line(base, scores, controls, metric):
    """All languages together, each argument (languages, problems): the interval resamples problems, not answers.

    McNemar's p takes the answers to one problem as independent of each other, which parallel ones are not quite.
    """
    line = effect_line("together", base.mean(0), scores.mean(0), [control.mean(0) for control in controls], "")
    if metric in RIGHT_OR_WRONG:
        line += "{:>8}{:>8}{:>7.3f}".format(*common.mcnemar_p(base.ravel(), scores.ravel()))
    return line


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_task_arguments(
        p, model=MODEL, routing=ROUTING, data=DATA, experts_per_language=EXPERTS_PER_LANGUAGE, threshold=THRESHOLD,
        metrics=METRICS, control_seeds=CONTROL_SEEDS, out=OUT, batch_tokens=BATCH_TOKENS, max_length=MAX_LENGTH,
        max_new_tokens=MAX_NEW_TOKENS)
    p.add_argument("--sources", default=SOURCES, help="languages whose shared experts are boosted (default: %(default)s)")
    p.add_argument("--band", help="decoder layers A-B, inclusive (default: 10/48 to 40/48 of the depth, the paper's)")
    p.add_argument("--lambda", dest="lambdas", type=float, nargs="+", default=LAMBDAS, help="strengths; negative ones "
                   "suppress (default: %(default)s)")
    p.add_argument("--rule", choices=common.RULES, default=RULE, help="see common.boost_logits (default: %(default)s)")
    p.add_argument("--control-bands", nargs="+", default=[], metavar="A-B", help="steer these bands too, as controls: 0-7 40-47")
    args = p.parse_args()

    if not np.isfinite(args.lambdas).all():
        raise common.InputError(f"lambda must be a finite number, not {args.lambdas}")
    sources, dumps = args.sources.split(","), analyze.load_languages(args.routing)
    if len(set(sources)) < 2 and not args.selection:
        raise common.InputError(f"--sources takes two or more languages, as {SOURCES}, for experts to be shared")
    if args.experts_per_language is None:
        args.experts_per_language = default_experts_per_language(dumps[0]["num_experts"])
    choice = dict(experts_per_language=args.experts_per_language, threshold=args.threshold)
    if args.selection:
        sources, layers = [], dumps[0]["layers"]
        selection = analyze.load_selection(args.selection, layers, dumps[0]["num_experts"])
        coefficients = selection_coefficients(selection, layers, args.band)
        others = {band: selection_coefficients(selection, layers, band) for band in args.control_bands}
    else:
        coefficients = steering_coefficients(dumps, sources, args.band, **choice)
        others = {band: steering_coefficients(dumps, sources, band, **choice) for band in args.control_bands}
    experiment = common.Experiment(args, [dump for dump in dumps if args.selection or dump["language"] in sources])
    # the sources give; unless named, only other languages are evaluated
    languages = [l for l in experiment.tasks if args.languages or l not in sources] or list(experiment.tasks)
    if len(args.lambdas) > 1 and min(len(experiment.tasks[l][0]) for l in languages) < 4:
        raise common.InputError("choosing among several lambdas takes 4 examples or more; raise --limit or give one --lambda")

    number = sum(np.count_nonzero(c) for c in coefficients.values())
    origin = f"of {args.selection}" if args.selection else (
        f"shared by {args.sources}  experts_per_language {args.experts_per_language}  threshold {args.threshold}")
    print(f"{args.model}  {number} experts {origin}  rule {args.rule}")
    experiment.load()
    prompts = [e for language in languages for e in experiment.tasks[language][0][:20]]
    for strength in args.lambdas:
        moved = moved_selections(experiment.model, prompts, coefficients, strength, args.rule, args.batch_tokens)
        print(f"lambda {strength}: selections moved (%), by layer  " + "  ".join(f"{l}: {100 * m:.1f}" for l, m in moved.items()))
        if not any(moved.values()):
            raise common.InputError(f"lambda {strength} moves no selection in any layer; take a larger one")

    kind = "selection" if args.selection else "shared"

    def run(name, strength, boosted):
        settings = {"experiment": "steer", "kind": name, "sources": sources, "lambda": strength, "rule": args.rule,
                    "band": sorted(boosted)}
        scores = {}
        for language in languages:
            scores[language] = experiment.cell(language, f"{name}-lambda{strength}", settings,
                                               boosts=scaled(boosted, strength), rule=args.rule)
            progress.update()
        return scores

    cells = len(languages) * (1 + len(args.lambdas) + args.control_seeds + len(others))
    with tqdm(total=cells, unit="cell", leave=False) as progress:
        base = {}
        for language in languages:
            base[language] = experiment.cell(language, "baseline")
            progress.update()
        steered = {strength: run(kind, strength, coefficients) for strength in args.lambdas}
        metric = args.metrics[0]
        # with several lambdas, even examples choose and odd ones report
        chooses, reports = (slice(0, None, 2), slice(1, None, 2)) if len(args.lambdas) > 1 else (slice(None), slice(None))
        sign = -1 if metric.endswith(("nll", "per_byte")) else 1
        gain = {strength: np.mean([sign * np.nanmean((scores[l][metric] - base[l][metric])[chooses]) for l in languages])
                for strength, scores in steered.items()}
        best = max(gain, key=gain.get)
        controls = [run(f"random-seed{seed}", best, random_coefficients(coefficients, seed)) for seed in range(args.control_seeds)]
        bands = {band: run(f"band{band}", best, c) for band, c in others.items()}

    if len(args.lambdas) > 1:
        print("\nchosen on the even examples: lambda", best, " (mean change of", metric + ":",
              ", ".join(f"{strength} {sign * g:+.4f}" for strength, g in gain.items()) + "); reported on the odd ones")
    for metric in [metric for metric in (*args.metrics, "f1") if metric in base[languages[0]]]:
        print(f"\n{metric}, lambda {best}\n{'':<9}{'unsteered':>9}{'steered':>9}{'change':>9} {'95 % interval':<18}"
              f"{'random (least  most)':<23}" + (f"{'fixed':>8}{'broken':>8}{'p':>7}" if metric in RIGHT_OR_WRONG else ""))
        for band, scores in {None: steered[best], **bands}.items():
            against = () if band else controls
            if band:
                print(f"control band {band}, {sum(np.count_nonzero(c) for c in others[band].values())} experts")
            for language in languages:
                print(effect_line(language, base[language][metric][reports], scores[language][metric][reports],
                                  [c[language][metric][reports] for c in against], metric))
            if len({len(base[language][metric]) for language in languages}) == 1 < len(languages):
                together = [np.array([s[language][metric][reports] for language in languages]) for s in (base, scores, *against)]
                print(pooled_line(*together[:2], together[2:], metric))
    print(f"\n{args.out}")


if __name__ == "__main__":
    try:
        main()
    except (common.InputError, analyze.InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")
