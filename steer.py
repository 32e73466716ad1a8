"""
Boost experts that dominant languages share, and see whether others gain by it.

    python steer.py                           # the tiny model; after capture.py
    python steer.py --model Qwen/Qwen3-30B-A3B --data 'mgsm/{lang}.tsv' \\
        --sources en,zh --band 10-39 --lambda 0.022 \\
        --experts-per-language 20 --threshold 0.7
    python steer.py --selection selection.npz --rule soft --lambda 0.5

reads   routing dumps, and evaluation data other than the dumps' own
writes  results/steer.jsonl    a row per language and boost
        results/steer/         responses, where a metric needs any

In the band, router_logits += lambda * c * |router_logits| for the experts that
the source languages share, with c the first source's share (arXiv 2601.14050).
The best of several lambdas is chosen on every other example and reported on the
rest. Controls boost as many random experts per layer with the same
coefficients. One model load; a minute on the tiny model. A stopped run goes on
where it stopped. In a notebook, with a model of common.load_model:

    routing = analyze.load_routing(["routing/en.npz", "routing/zh.npz"])
    coefficients = steering_coefficients(routing, ["en", "zh"])
    with steer(model, coefficients, 0.5):
        model.generate(**batch)
"""

import itertools
import math

import numpy as np
from tqdm import tqdm

import analyze
from common import (
    RIGHT_OR_WRONG, RULES, Evaluator, InputError, add_expert_arguments, add_model_arguments,
    add_scoring_arguments, argument_parser, bootstrap_interval, change_text, edit_routing,
    metric_sign, print_now, range_text, run_script)

# ------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"             # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
ROUTING = analyze.DUMPS              # the dumps that the experts are chosen from
DATA = "tests/data/eval_{lang}.tsv"  # what is scored; {lang} stands for the language
SEGMENT = "all"                      # tokens of the dumps that count: all prompt response text
SOURCES = "en,zh"                    # the first gives coefficients; shares are among these alone
LAMBDAS = [0.1, 0.3, 1.0]            # the paper, on a 30B model: 0.022 for en,zh, 0.034 for zh,en
RULE = "proportional"                # or soft or hard: see common.boost_logits
BAND = None                          # layers, as "10-39"; None: PAPER_BAND
PAPER_BAND = (10 / 48, 40 / 48)      # fractions of the depth
EXPERTS_PER_LANGUAGE = 5 / 16        # a fraction below 1, or a number; the paper: 20 of 128
THRESHOLD = 0.7                      # the paper's for steering
METRICS = ["accuracy", "prompt_nll"] # the first chooses lambda; answer_nll language
CONTROL_SEEDS = 5                    # random draws; one alone would mislead
BATCH_TOKENS = 16384                 # tokens per forward pass, padding included
MAX_LENGTH = 4096                    # tokens of a prompt
MAX_NEW_TOKENS = None                # tokens of a response; None: the checkpoint's limit
OUT = "results/steer.jsonl"
# ------------------------------------------------------------------------------------------------


# ----------------------------------------------------------------------------------- coefficients

def steering_coefficients(routing, sources, band=None, experts_per_language=EXPERTS_PER_LANGUAGE,
                          threshold=THRESHOLD):
    """Return {decoder layer: float64 (num_experts,)}: the first source's share in what they share.

    routing  of analyze.load_routing; other languages than the sources do not matter
    sources  two or more languages
    band     decoder layers "10-39", inclusive; by default the paper's fraction of the depth
    Raises an InputError if no expert is shared in the band. Source: arXiv 2601.14050.
    """
    rows = analyze.language_indices(sources, routing)
    share = analyze.language_shares(routing.activation_frequency[rows], experts_per_language)
    shared = analyze.shared_experts(share, threshold)
    coefficients = np.where(shared, share[0], 0)
    return coefficients_of_band(coefficients, routing.layers, band or paper_band(routing.layers))


def paper_band(layers):
    """Return the paper's fraction of the depth as a band: "10-39" of 48 layers."""
    start, stop = PAPER_BAND
    first = layers[int(start * len(layers))]
    last = layers[math.ceil(stop * len(layers)) - 1]
    return f"{first}-{last}"


def coefficients_of_band(coefficients, layers, band):
    """Return {decoder layer: (num_experts,)} of the layers in a band that have a coefficient.

    coefficients  float64 (layers, experts)
    band          decoder layers, "10-39"
    Raises an InputError if no layer has any.
    """
    (in_band,) = analyze.parse_bands([band], layers).values()
    rows = in_band & coefficients.any(1)
    if not rows.any():
        raise InputError(f"no expert to boost in the layers {band}; give another --band; without a "
                         "selection, a higher --threshold or --experts-per-language may help")
    return dict(zip(layers[rows].tolist(), coefficients[rows]))


def choose_coefficients(args, routing, band):
    """Return steering_coefficients of the sources, or those of a selection.

    A selection boosts the experts above 0 (with 1) and suppresses those below 0 (with -1); without
    a band it concerns all layers.
    """
    if args.selection:
        layers = routing.layers
        selection = analyze.load_selection(args.selection, routing)
        return coefficients_of_band(
            np.sign(selection), layers, band or f"{layers[0]}-{layers[-1]}")
    return steering_coefficients(
        routing, args.sources, band, args.experts_per_language, args.threshold)


def random_coefficients(coefficients, seed):
    """Return the same coefficients in every layer, on experts drawn at random."""
    rng = np.random.default_rng(seed)
    return {layer: rng.permutation(of_layer) for layer, of_layer in coefficients.items()}


def scaled(coefficients, strength):
    """Return coefficients times a strength, the paper's lambda: the boosts of edit_routing."""
    return {layer: strength * np.asarray(of_layer) for layer, of_layer in coefficients.items()}


def steer(model, coefficients, strength, rule=RULE):
    """In a with block, boost experts by their coefficients times a strength; see edit_routing."""
    return edit_routing(model, boosts=scaled(coefficients, strength), rule=rule)


# ----------------------------------------------------------------------------------------- scores

def boost_settings(args, condition, coefficients, strength):
    """Return what names a boost in the results: (name, edit, settings), as of Evaluator.evaluate.

    condition  "shared", "selection", "random0", "band 0-7", ...
    """
    name = f"{condition}-lambda{strength}"
    edit = {"boosts": scaled(coefficients, strength), "rule": args.rule}
    settings = {
        "experiment": "steer",
        "sources": args.sources,
        "condition": condition,
        "lambda": strength,
        "rule": args.rule,
        "band": sorted(coefficients),
    }
    return name, edit, settings


def score_boost(evaluator, languages, condition, coefficients, strength):
    """Return {language: row of Evaluator.evaluate} under coefficients times a strength."""
    name, edit, settings = boost_settings(evaluator.args, condition, coefficients, strength)
    return {language: evaluator.evaluate(language, name, edit, settings)
            for language in tqdm(languages, name, leave=False)}


def mean_changed_selections(evaluator, languages, condition, coefficients, strength):
    """Return {layer: fraction of the selections that a boost changes}, mean over languages.

    It is counted on 20 prompts of each language, given the same hidden states: what the boost
    changes in lower layers does not count.
    """
    name, edit, settings = boost_settings(evaluator.args, condition, coefficients, strength)
    by_language = [evaluator.changed_selections(language, name, edit, settings)
                   for language in tqdm(languages, f"{name} selections", leave=False)]
    return {layer: np.mean([changed[layer] for changed in by_language])
            for layer in by_language[0]}


def mean_gain(metric, unsteered, steered, examples):
    """Return the mean gain over languages on some of the examples: above 0 is better.

    unsteered, steered  {language: row of Evaluator.evaluate}
    examples            slice of the examples
    """
    changes = []
    for language in unsteered:
        change = steered[language]["scores"][metric] - unsteered[language]["scores"][metric]
        changes.append(np.nanmean(change[examples]))
    return metric_sign(metric) * np.mean(changes)


def split_examples(num_lambdas):
    """Return (choosing, reporting), slices of examples.

    A lambda that is chosen on the examples on which it is reported looks better than it is: with
    several, the even examples choose and the odd ones report.
    """
    if num_lambdas == 1:
        return slice(None), slice(None)
    return slice(0, None, 2), slice(1, None, 2)


# ------------------------------------------------------------------------------------- statistics

def sign_flip_p(changes, seed=0):
    """Return the two-sided p of the mean of changes (problems,), if their signs were chance.

    It is exact up to 12 changes that are not 0, else from 10,000 random flips. For answers that are
    right or wrong it is McNemar's exact test.
    """
    values = changes[(changes != 0) & ~np.isnan(changes)]
    if len(values) <= 12:
        signs = np.array(list(itertools.product([1, -1], repeat=len(values))))
    else:
        signs = np.random.default_rng(seed).choice([1, -1], (10_001, len(values)))
        signs[0] = 1  # the signs as they are, so that p is never 0
    return np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)


def change_interval(metric, changes):
    """Return the 95 % interval (ci_low, ci_high) of a mean change.

    changes  (languages, examples); example i is the same problem in each language, so that problems
             are resampled, and not answers

    Where no answer that is right or wrong changed, resampling would give no width: there it is the
    rule of three, -3/n to 3/n for n problems, at most -1 to 1.
    """
    of_problems = changes.mean(0)
    n = np.isfinite(of_problems).sum()
    if metric in RIGHT_OR_WRONG and n > 0 and not np.nan_to_num(changes).any():
        return -min(1, 3 / n), min(1, 3 / n)
    return bootstrap_interval(of_problems)


def language_effect(metric, examples, unsteered, steered, language):
    """Return (change, ci_low, ci_high) of a language's mean score on some of the examples."""
    before = unsteered[language]["scores"][metric][examples]
    changes = steered[language]["scores"][metric][examples] - before
    return np.nanmean(changes), *change_interval(metric, changes[None])


def related_languages(languages, sources):
    """Return the languages of the first source's family, but for the sources themselves."""
    if not sources:
        return []
    labels = analyze.language_labels([sources[0], *languages])
    source_family, *families = [family.split("/")[0] for family in labels["families"]]
    if source_family == "":
        return []
    return [language for language, family in zip(languages, families)
            if family == source_family and language not in sources]


# ----------------------------------------------------------------------------------------- tables

def lambda_columns(metric, changed, gains):
    """Return the columns of the table of lambdas.

    changed  {lambda: {layer: fraction of the selections that the boost changes}}
    gains    {lambda: gain on the choosing examples}, of those that change any
    """
    columns = {"lambda": [], f"gain of {metric}": [], "selections changed (%)": [],
               "by layer (%)": []}
    for strength, by_layer in changed.items():
        fractions = 100 * np.array(list(by_layer.values()))
        gain = "left out"
        if strength in gains:
            gain = f"{gains[strength]:+.4f}"
        columns["lambda"].append(str(strength))
        columns[f"gain of {metric}"].append(gain)
        columns["selections changed (%)"].append(fractions.mean())
        columns["by layer (%)"].append(range_text(fractions))
    return columns


def print_choice(metric, changed, gains, best, changed_by_random):
    """Print what each lambda changes and gains, which is the best, and what random experts change.

    changed_by_random  fractions of selections, one for each random draw
    """
    analyze.print_table("what each lambda gains, and how many selections it changes, given the "
                        "same hidden states", lambda_columns(metric, changed, gains))
    equal = [strength for strength in gains if gains[strength] == gains[best]]
    if len(equal) > 1:
        print(f"the gains of lambda {', '.join(map(str, equal))} are equal; the first is taken")
    split = ""
    if len(gains) > 1:
        split = ", chosen on the even examples and reported on the odd ones"
    print(f"lambda {best}{split}")
    by_random = np.mean(changed_by_random)
    print(f"with it, random experts change {100 * by_random:.3f} % of the selections")
    if by_random < np.mean(list(changed[best].values())) / 2:
        print("warning: that is less than half as many, so they are no fair control")


def effect_row(metric, languages, examples, unsteered, steered, random, bands):
    """Return one row of the effect table, of one language or of several with the same problems.

    examples            slice of the examples that count
    unsteered, steered  {language: row of Evaluator.evaluate}
    random              [{language: row}, ...], one for each draw
    bands               {band: {language: row}}
    """
    def scores(rows):  # (languages, examples)
        return np.array([rows[language]["scores"][metric][examples] for language in languages])

    before, after = scores(unsteered), scores(steered)
    changes = after - before
    change = np.nanmean(changes.mean(0))
    row = {
        "before": np.nanmean(before.mean(0)),
        "after": np.nanmean(after.mean(0)),
        "change [95 % interval]": change_text(change, *change_interval(metric, changes)),
    }
    if metric in RIGHT_OR_WRONG:
        row["p"] = sign_flip_p(changes.mean(0))
        row["fixed"] = (changes > 0).sum()
        row["broken"] = (changes < 0).sum()
    row["random"] = range_text([np.nanmean((scores(rows) - before).mean(0)) for rows in random])
    for band, rows in bands.items():
        row[f"layers {band}"] = f"{np.nanmean((scores(rows) - before).mean(0)):+.3f}"
    return row


def effect_columns(metric, examples, unsteered, steered, random, bands, related):
    """Return the columns of the effect table: a row for each language, and one for all of them.

    The row "all" is there if the languages have equally many examples: the same problems.
    """
    groups = {language: [language] for language in unsteered}
    numbers = {len(row["scores"][metric]) for row in unsteered.values()}
    if len(unsteered) > 1 and len(numbers) == 1:
        groups["all"] = list(unsteered)
    columns = {"language": list(groups), "related": None}
    if related:
        columns["related"] = ["yes" if name in related else "" for name in groups]
    rows = [effect_row(metric, languages, examples, unsteered, steered, random, bands)
            for languages in groups.values()]
    for heading in rows[0]:
        columns[heading] = [row[heading] for row in rows]
    return columns


def print_related(metric, examples, unsteered, steered, related, sources):
    """Print the mean changes of languages related to the first source, and of the others.

    A source itself counts to neither.
    """
    others = [language for language in unsteered if language not in [*related, *sources]]
    for kind, languages in (("related", related), ("other", others)):
        if related and languages:
            mean = np.mean([np.nanmean(steered[language]["scores"][metric][examples]
                                       - unsteered[language]["scores"][metric][examples])
                            for language in languages])
            print(f"mean change in {kind} languages ({', '.join(languages)}): {mean:+.3f}")


def draw_effects(figure, metric, gains, best, random_gains, effects):
    """Draw the gain by lambda beside that of random experts, and each language's change.

    gains         {lambda: gain on the choosing examples}
    random_gains  gains of the random draws with the best lambda
    effects       {language: (change, ci_low, ci_high)} on the reporting examples
    """
    figure.set_size_inches(8, 3.5)
    left, right = figure.subplots(1, 2)
    left.plot(list(gains), list(gains.values()), "o-", label="steered experts")
    left.vlines(best, min(random_gains), max(random_gains), colors="0.5", linewidth=4,
                label=f"{len(random_gains)} draws of random experts")
    left.axhline(0, color="black", linewidth=0.5)
    left.set_xscale("symlog", linthresh=min(abs(strength) for strength in gains))
    left.set_xlabel("lambda")
    left.set_ylabel(f"gain of {metric}")
    left.legend(fontsize="small")
    change, ci_low, ci_high = np.array(list(effects.values())).T
    right.errorbar(range(len(effects)), change, [change - ci_low, ci_high - change], fmt="o",
                   capsize=3)
    right.axhline(0, color="black", linewidth=0.5)
    right.set_xticks(range(len(effects)), effects)
    right.set_ylabel(f"change of {metric} with lambda {best}")


# ----------------------------------------------------------------------------------------- script

def scored_languages(args, tasks):
    """Return the languages to score: the sources are left out, unless languages are named."""
    others = [language for language in tasks if language not in args.sources]
    if args.languages or not others:
        return list(tasks)
    return others


def parse_arguments():
    parser = argument_parser(__doc__)
    add_model_arguments(parser, model=MODEL, data=DATA, out=OUT, batch_tokens=BATCH_TOKENS,
                        max_length=MAX_LENGTH)
    add_scoring_arguments(parser, metrics=METRICS, max_new_tokens=MAX_NEW_TOKENS)
    add = add_expert_arguments(
        parser, routing=ROUTING, segments=analyze.SEGMENTS, segment=SEGMENT,
        experts_per_language=EXPERTS_PER_LANGUAGE, threshold=THRESHOLD,
        control_seeds=CONTROL_SEEDS)
    add("--sources", default=SOURCES, metavar="LANGUAGES",
        help="whose shared experts (default: %(default)s)")
    add("--band", default=BAND, help="layers: 10-39 (default: the paper's part of the depth)")
    add("--control-bands", nargs="+", default=[], metavar="BAND",
        help="steer these with the same lambda: 0-7 40-47")
    add("--lambda", type=float, nargs="+", default=LAMBDAS, dest="lambdas", metavar="L",
        help="strengths (default: %(default)s)")
    add("--rule", choices=RULES, default=RULE, help="(default: %(default)s)")
    add("--figures", metavar="FOLDER", help="write effects.png; needs matplotlib")
    args = parser.parse_args()
    if args.figures:
        analyze.prepare_figures(args.figures)
    args.lambdas = np.ravel(args.lambdas).tolist()  # LAMBDAS may be one number
    check_arguments(args)
    args.sources = [] if args.selection else args.sources.split(",")
    if not args.selection and len(args.sources) < 2:
        raise InputError("--sources takes two or more languages, as en,zh")
    return args


def check_arguments(args):
    """Raise an InputError if flags contradict each other, or are out of range."""
    if args.selection and args.sources != SOURCES:
        raise InputError("leave out --sources: --selection names the experts")
    if not all(abs(strength) < 1e30 for strength in args.lambdas):
        raise InputError(f"lambda must be a finite number below 1e30, not {args.lambdas}")
    if len(set(args.lambdas)) < len(args.lambdas):
        raise InputError(f"a lambda is given twice: {args.lambdas}")


def main():
    args = parse_arguments()

    # 1. Choose experts and coefficients: what the sources share, in the band
    routing = analyze.load_routing(args.routing, args.segment)
    args.experts_per_language = analyze.number_of_experts(
        args.experts_per_language, routing.num_experts)
    condition = "selection" if args.selection else "shared"
    coefficients = choose_coefficients(args, routing, args.band)
    band_controls = {band: choose_coefficients(args, routing, band)
                     for band in args.control_bands}
    random_controls = [random_coefficients(coefficients, seed)
                       for seed in range(args.control_seeds)]

    # 2. Check model, data and results file; weights are read when the first score is needed
    evaluator = Evaluator(args, routing, sources=args.sources)
    languages = scored_languages(args, evaluator.tasks)
    fewest = min(len(evaluator.tasks[language]) for language in languages)
    if len(args.lambdas) > 1 and fewest < 4:
        raise InputError("choosing among several lambdas takes 4 examples or more; raise --limit "
                         "or give one --lambda")
    num_boosted = sum(np.count_nonzero(of_layer) for of_layer in coefficients.values())
    print_now(f"{args.model}  {num_boosted} experts  rule {args.rule}  "
              f"{args.selection or 'shared by ' + ','.join(args.sources)}  "
              f"experts_per_language {args.experts_per_language}  threshold {args.threshold}")

    # 3. Leave out lambdas that change no selection
    changed = {
        strength: mean_changed_selections(evaluator, languages, condition, coefficients, strength)
        for strength in args.lambdas}
    candidates = [strength for strength in changed if any(changed[strength].values())]
    if not candidates:
        raise InputError("no lambda changes any selection; take larger ones")

    # 4. Score every language unsteered and with every lambda, and choose the best lambda
    unsteered = {language: evaluator.evaluate(language)
                 for language in tqdm(languages, "unsteered", leave=False)}
    steered = {strength: score_boost(evaluator, languages, condition, coefficients, strength)
               for strength in candidates}
    choosing_metric = args.metrics[0]
    choosing, reporting = split_examples(len(candidates))
    gains = {strength: mean_gain(choosing_metric, unsteered, steered[strength], choosing)
             for strength in candidates}
    best = max(gains, key=gains.get)

    # 5. Score the controls with this lambda: random experts, and other bands of layers
    random, changed_by_random = [], []
    for seed, control in enumerate(random_controls):
        name = f"random{seed}"
        random.append(score_boost(evaluator, languages, name, control, best))
        by_layer = mean_changed_selections(evaluator, languages, name, control, best)
        changed_by_random.append(np.mean(list(by_layer.values())))
    bands = {band: score_boost(evaluator, languages, f"band {band}", control, best)
             for band, control in band_controls.items()}

    # 6. Print the choice of lambda, and metric by metric its effect on the other examples
    if args.figures:
        random_gains = [mean_gain(choosing_metric, unsteered, rows, choosing) for rows in random]
        effects = {language: language_effect(choosing_metric, reporting, unsteered, steered[best],
                                             language)
                   for language in languages}
        analyze.save_figure(f"{args.figures}/effects.png", draw_effects, choosing_metric, gains,
                            best, random_gains, effects)
    print_choice(choosing_metric, changed, gains, best, changed_by_random)
    related = related_languages(languages, args.sources)
    for metric in unsteered[languages[0]]["scores"]:  # --metrics, and f1 where there is one
        analyze.print_table(
            f"{metric} without and with steering by lambda {best}; random: change under random "
            "experts (min..max)",
            effect_columns(metric, reporting, unsteered, steered[best], random, bands, related))
        print_related(metric, reporting, unsteered, steered[best], related, args.sources)
    evaluator.print_summary()


if __name__ == "__main__":
    run_script(main, analyze.InputError)
