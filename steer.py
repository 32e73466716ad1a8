"""
Boost the experts that dominant languages share, and see whether others answer better, against random ones.

    python steer.py                                        # the tiny model; after capture.py
    python steer.py --model Qwen/Qwen3-30B-A3B --data 'data/mgsm_{lang}.tsv' --sources en,zh \\
                    --band 10-39 --lambda 0.022 --experts-per-language 20 --threshold 0.7
    python steer.py --selection selection.json --rule soft --lambda 0.5

reads   routing dumps, and evaluation data, best not what the dumps were captured on
writes  results/steer.jsonl     a line per cell: settings, scores of every example, their mean

In the band, router_logits += lambda * c * |router_logits| for the experts that the source languages
share, with c the first source's share in the expert (arXiv 2601.14050). Of several lambdas the best
is chosen on every other example and reported on the rest. Controls boost as many random experts per
layer with the same coefficients. One model load; a minute and a half on the tiny model. A run that
was stopped goes on where it stopped. In a notebook:

    dumps = analyze.load_languages(["routing/en.npz", "routing/zh.npz"])
    with steer(model, steering_coefficients(dumps, ["en", "zh"]), 0.5): model.generate(**batch)
"""

import argparse
import collections
import math
import sys

import numpy as np
import torch
from tqdm import tqdm

import analyze
import common

# ------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"             # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
ROUTING = analyze.DUMPS              # the dumps that the experts are chosen from
DATA = "tests/data/eval_{lang}.tsv"  # what is evaluated; {lang} stands for the language
SOURCES = "en,zh"                    # the first gives the coefficients; shares are among them alone
LAMBDAS = [0.1, 0.3, 1.0]            # the paper, at its size: 0.022 for en,zh and 0.034 for zh,en
RULE = "proportional"                # soft, hard
EXPERTS_PER_LANGUAGE = 5 / 16        # a part below 1, or a number; the paper: 20 of 128
THRESHOLD = 0.7                      # the paper's for steering
METRICS = ["accuracy", "prompt_nll"] # the first chooses lambda: prompt_nll answer_nll accuracy language
CONTROL_SEEDS = 5                    # random draws; one alone would mislead
BATCH_TOKENS = 16384                 # per forward pass, padding included
MAX_LENGTH = 4096                    # tokens of a prompt
MAX_NEW_TOKENS = None                # of a response; None: the checkpoint's generation config, or 512
OUT = "results/steer.jsonl"
# ------------------------------------------------------------------------------------------------


def steering_coefficients(dumps, sources, band=None, experts_per_language=EXPERTS_PER_LANGUAGE,
                          threshold=THRESHOLD):
    """{decoder layer: float64 (num_experts,)}: the first source's share in what the sources share, else 0.

    dumps  of analyze.load_languages; those of other languages than the sources are not looked at
    band   decoder layers "10-39", inclusive; by default from 10/48 to 40/48 of the depth, the paper's
    InputError if no expert is shared in the band.
    """
    by_language, layers = {dump["language"]: dump for dump in dumps}, dumps[0]["layers"]
    for source in sources:
        if source not in by_language:
            raise common.InputError(f"no routing for '{source}' among the dumps; run: python capture.py "
                                    f"--languages {source}")
    frequency = analyze.frequencies([by_language[source] for source in sources])
    share = analyze.language_shares(frequency, experts_per_language)
    shared = analyze.shared_experts(share, threshold)
    return in_band(np.where(shared, share[0], 0), layers, band_rows(band, layers),
                   f"{','.join(sources)} share no expert in this band; raise --threshold or "
                   "--experts-per-language")


def selection_coefficients(selection, layers, band=None):
    """{decoder layer: float64 (num_experts,)}: 1 for a selected expert that A's tokens select more, -1 for B's.

    selection  analyze.load_selection's (layers, experts); band "A-B", by default all of its layers
    """
    rows = band_rows(band, layers) if band else np.ones(len(layers), bool)
    return in_band(np.sign(selection), layers, rows, f"the selection has no experts in the band {band}")


def in_band(coefficients, layers, rows, message):
    """(layers, experts) -> {decoder layer: (num_experts,)} of the rows that have any; else InputError."""
    found = {int(layer): row for layer, row, inside in zip(layers, coefficients, rows) if inside and row.any()}
    if not found:
        raise common.InputError(message)
    return found


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


def scaled(coefficients, strength):
    return {layer: strength * c for layer, c in coefficients.items()}


def steer(model, coefficients, strength, rule=RULE, **options):
    """edit_routing with every coefficient times the strength (the paper's lambda)."""
    return common.edit_routing(model, boosts=scaled(coefficients, strength), rule=rule, **options)


@torch.inference_mode()
def selections(model, sequences, batch_tokens):
    """{layer: (tokens, top_k)}: the experts selected for all tokens of the sequences, batch by batch."""
    found = collections.defaultdict(list)
    for batch in common.length_batches([len(s) for s in sequences], batch_tokens):
        ids = common.right_padded([sequences[i] for i in batch]).to(model.device)
        real = torch.cat([torch.arange(ids.shape[1]) < len(sequences[i]) for i in batch])

        def on_router(layer, router_logits, routing_weights, selected_experts):
            found[layer].append(selected_experts.flatten(0, -2).cpu()[real])

        with common.record_routing(model, on_router):
            model.get_decoder()(input_ids=ids, use_cache=False)
    return {layer: torch.cat(selected) for layer, selected in found.items()}


def moved_selections(model, sequences, coefficients, strength, rule=RULE, batch_tokens=BATCH_TOKENS):
    """{steered layer: part of the sequences' expert selections that steering changes}.

    Against the same model unsteered: what reaches a layer has been steered below it, too.
    """
    before = selections(model, sequences, batch_tokens)
    with steer(model, coefficients, strength, rule, count_moved=False):
        after = selections(model, sequences, batch_tokens)
    return {layer: int(common.number_moved(before[layer], after[layer])) / after[layer].numel()
            for layer in coefficients}


def choose_lambda(base, steered, metric):
    """(best, {lambda: gain}): mean gain over languages in a metric, the most being best.

    base {language: scores (examples,)}, steered {lambda: {language: ...}}; less is better for nats
    """
    gains = {strength: np.mean([common.better(metric) * np.nanmean(scores[l] - base[l]) for l in base])
             for strength, scores in steered.items()}
    return max(gains, key=gains.get), gains


def mcnemar_p(before, after):
    """(fixed, broken, exact two-sided p) of right/wrong scores: could the changes be coin flips?"""
    before, after = np.asarray(before, bool), np.asarray(after, bool)
    fixed, broken = int((~before & after).sum()), int((before & ~after).sum())
    n = fixed + broken
    tail = sum(math.comb(n, k) for k in range(min(fixed, broken) + 1)) / 2**n
    return fixed, broken, min(1.0, 2 * tail)


def effect(base, scores, controls):
    """An effect in numbers: mean before and after, change (mean, low, high), random (each draw's change),
    and fixed, broken, p of right/wrong scores.

    base, scores and each of controls: (problems,), or (languages, problems) of languages together,
    where the interval resamples problems, not answers. McNemar's p takes the answers to one problem
    as independent, which parallel ones are not quite.
    """
    before, after, *draws = (np.atleast_2d(x).mean(0) for x in (base, scores, *controls))
    return {"before": np.nanmean(before), "after": np.nanmean(after),
            "change": common.mean_change(after, before),
            "random": [np.nanmean(draw - before) for draw in draws], "mcnemar": mcnemar_p(base, scores)}


def print_effects(effects, metric):
    """A line for each of {name: effect}."""
    for name, e in effects.items():
        line = f"{name:<9}{e['before']:>9.3f}{e['after']:>9.3f} {common.change_text(*e['change'])}"
        if e["random"]:
            line += f"{np.mean(e['random']):>+8.3f} ({min(e['random']):+.3f} {max(e['random']):+.3f})"
        if metric in common.RIGHT_OR_WRONG:
            fixed, broken, p = e["mcnemar"]
            line = f"{line:<77}{fixed:>6}{broken:>8}{p:>7.3f}"
        print(line)


def effects_by_language(base, scores, controls):
    """{language: effect}, and "together" where all have as many problems; each {language: (problems,)}."""
    effects = {l: effect(base[l], scores[l], [c[l] for c in controls]) for l in base}
    if len({len(values) for values in base.values()}) == 1 < len(base):
        base, scores, *controls = (np.array(list(x.values())) for x in (base, scores, *controls))
        effects["together"] = effect(base, scores, controls)
    return effects


def choose_coefficients(args, dumps):
    """{name: coefficients}: "shared" or "selection" for the experiment, "band0-7", ... for its controls."""
    layers, bands = dumps[0]["layers"], [args.band, *args.control_bands]
    if args.selection:
        selection = analyze.load_selection(args.selection, layers, dumps[0]["num_experts"])
        found = [selection_coefficients(selection, layers, band) for band in bands]
    else:
        found = [steering_coefficients(dumps, args.sources.split(","), band, args.experts_per_language,
                                       args.threshold) for band in bands]
    names = ["selection" if args.selection else "shared", *(f"band{band}" for band in args.control_bands)]
    return dict(zip(names, found))


def run_cells(experiment, languages, name, strength, coefficients):
    """{language: {metric: scores (examples,)}} under the boosts."""
    args = experiment.args
    settings = {"experiment": "steer", "kind": name, "lambda": strength, "rule": args.rule,
                "sources": [] if args.selection else args.sources.split(","), "band": sorted(coefficients)}
    return {language: experiment.cell(language, f"{name}-lambda{strength}", settings, rule=args.rule,
                                      boosts=scaled(coefficients, strength))
            for language in tqdm(languages, desc=f"{name} {strength}", leave=False)}


def of_metric(results, metric, part):
    """{language: scores (examples,)} of one metric and a part of the examples."""
    return {language: scores[metric][part] for language, scores in results.items()}


def print_moved(experiment, languages, coefficients):
    """What part of the selections each lambda moves; InputError if one moves none."""
    args, tasks = experiment.args, experiment.tasks
    prompts = [e["ids"] for language in languages for e in tasks[language][0][:20]]
    for strength in args.lambdas:
        moved = moved_selections(experiment.model, prompts, coefficients, strength, args.rule,
                                 args.batch_tokens)
        print(f"lambda {strength}: selections moved (%), by layer  "
              + "  ".join(f"{layer}: {100 * part:.1f}" for layer, part in moved.items()))
        if not any(moved.values()):
            raise common.InputError(f"lambda {strength} moves no selection in any layer; take a larger one")


def parse_arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = common.add_task_arguments(p)
    add("--sources", help="languages whose shared experts are boosted (default: %(default)s)")
    add("--band", metavar="A-B", help="decoder layers, inclusive (default: 10/48 to 40/48 of the depth)")
    add("--control-bands", nargs="+", default=[], metavar="A-B", help="steer these, too: 0-7 40-47")
    add("--lambda", dest="lambdas", type=float, nargs="+", metavar="L", help="strengths; negative ones "
        "suppress (default: %(default)s)")
    add("--rule", choices=common.RULES, help="see common.boost_logits (default: %(default)s)")
    args = common.parse_task_arguments(p, sys.modules[__name__])
    if not np.isfinite(args.lambdas).all():
        raise common.InputError(f"lambda must be a finite number, not {args.lambdas}")
    if len(set(args.sources.split(","))) < 2 and not args.selection:
        raise common.InputError(f"--sources takes two or more languages, as {SOURCES}, for experts to be "
                                "shared")
    return args


def prepare(args):
    """(experiment, evaluated languages, {name: coefficients}), all checked; the first name is steered."""
    dumps, sources = analyze.load_languages(args.routing), args.sources.split(",")
    num_experts = dumps[0]["num_experts"]
    args.experts_per_language = analyze.number_of_experts(args.experts_per_language, num_experts)
    coefficients = choose_coefficients(args, dumps)
    experiment = common.Experiment(
        args, [dump for dump in dumps if args.selection or dump["language"] in sources])
    # the sources give; unless named, only other languages are evaluated
    giving = [] if args.languages or args.selection else sources
    languages = [l for l in experiment.tasks if l not in giving] or list(experiment.tasks)
    if len(args.lambdas) > 1 and min(len(experiment.tasks[l][0]) for l in languages) < 4:
        raise common.InputError("choosing among several lambdas takes 4 examples or more; raise --limit "
                                "or give one --lambda")
    return experiment, languages, coefficients


def main():
    args = parse_arguments()
    experiment, languages, coefficients = prepare(args)
    (name, boosted), *others = coefficients.items()
    number = {name: sum(map(np.count_nonzero, c.values())) for name, c in coefficients.items()}
    print(f"{args.model}  {number[name]} experts " + (f"of {args.selection}" if args.selection else
          f"shared by {args.sources}  experts_per_language {args.experts_per_language}  threshold "
          f"{args.threshold}") + f"  rule {args.rule}")
    print_moved(experiment, languages, boosted)

    base = {language: experiment.cell(language) for language in languages}
    steered = {strength: run_cells(experiment, languages, name, strength, boosted)
               for strength in args.lambdas}
    # of several lambdas, even examples choose and odd ones report
    parts = (slice(0, None, 2), slice(1, None, 2)) if len(steered) > 1 else (slice(None), slice(None))
    metric = args.metrics[0]
    best, gains = choose_lambda(of_metric(base, metric, parts[0]), {
        strength: of_metric(scores, metric, parts[0]) for strength, scores in steered.items()}, metric)
    draws = [run_cells(experiment, languages, f"random-seed{seed}", best, random_coefficients(boosted, seed))
             for seed in range(args.control_seeds)]
    bands = {name: run_cells(experiment, languages, name, best, c) for name, c in others}

    if len(steered) > 1:
        print(f"\nchosen on the even examples: lambda {best}  (mean change of {metric}: " + ", ".join(
            f"{strength} {common.better(metric) * gain:+.4f}" for strength, gain in gains.items())
            + "); reported on the odd ones")
    for metric in base[languages[0]]:
        print(f"\n{metric}, lambda {best}\n{'':<9}{'unsteered':>9}{'steered':>9}  change 95 % interval"
              "     random (least  most)" + ("  fixed  broken      p" if metric in common.RIGHT_OR_WRONG else ""))
        for name, scores in {"": steered[best], **bands}.items():
            if name:
                print(f"control {name}, {number[name]} experts")
            before, after, *controls = (of_metric(results, metric, parts[1])
                                        for results in (base, scores, *(() if name else draws)))
            print_effects(effects_by_language(before, after, controls), metric)
    print(f"\n{args.out}")


if __name__ == "__main__":
    common.run_script(main, analyze.InputError)
