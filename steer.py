"""
Boost the experts that dominant languages share: do others gain, and more than by random experts?

    python steer.py                                        # the tiny model; after capture.py
    python steer.py --model Qwen/Qwen3-30B-A3B --data 'data/mgsm_{lang}.tsv' --sources en,zh \\
                    --band 10-39 --lambda 0.022 --experts-per-language 20 --threshold 0.7
    python steer.py --selection selection.json --rule soft --lambda 0.5

reads   routing dumps, and evaluation data, best not what the dumps were captured on
writes  results/steer.jsonl     a line per cell: settings, scores of every example, their mean

In the band, router_logits += lambda * c * |router_logits| for the experts that the source languages
share, with c the first source's share in the expert (arXiv 2601.14050). Of several lambdas the best
is chosen on every other example and reported on the rest. Controls boost as many random experts per
layer with the same coefficients. --sources en,zh zh,en fr,es steers by each group, and asks whether
languages of a source's family gain more. One model load; a minute on the tiny model. A stopped run
goes on where it stopped. In a notebook, with model, tokenizer = common.load_model("..."):

    dumps = analyze.load_languages(["routing/en.npz", "routing/zh.npz"])
    with steer(model, steering_coefficients(dumps, ["en", "zh"]), 0.5): model.generate(**batch)
"""

import itertools
import math

import numpy as np
from tqdm import tqdm

import analyze
import common
from capture import record

# ------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"             # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
ROUTING = analyze.DUMPS              # the dumps that the experts are chosen from
DATA = "tests/data/eval_{lang}.tsv"  # what is evaluated; {lang} stands for the language
SOURCES = ["en,zh"]                  # the first gives the coefficients; shares are among them alone
LAMBDAS = [0.1, 0.3, 1.0]            # the paper, at its size: 0.022 for en,zh and 0.034 for zh,en
RULE = "proportional"                # soft, hard
EXPERTS_PER_LANGUAGE = 5 / 16        # a part below 1, or a number; the paper: 20 of 128
THRESHOLD = 0.7                      # the paper's for steering
METRICS = ["accuracy", "prompt_nll"] # the first chooses lambda; answer_nll language
CONTROL_SEEDS = 5                    # random draws; one alone would mislead
BATCH_TOKENS = 16384                 # per forward pass, padding included
MAX_LENGTH = 4096                    # tokens of a prompt
MAX_NEW_TOKENS = None                # of a response; None: the checkpoint's generation config
OUT = "results/steer.jsonl"
PAPER_BAND = 10 / 48, 40 / 48        # of the depth, steered unless --band says otherwise
# ------------------------------------------------------------------------------------------------


def steering_coefficients(dumps, sources, band=None, experts_per_language=EXPERTS_PER_LANGUAGE,
                          threshold=THRESHOLD):
    """{decoder layer: float64 (num_experts,)}: the first source's share in what the sources share.

    dumps  of analyze.load_languages; of other languages than the sources they do not matter
    band   decoder layers "10-39", inclusive; by default the paper's part of the depth
    InputError if no expert is shared in the band.
    """
    frequency, layers = analyze.frequencies(dumps), dumps[0]["layers"]
    share = analyze.language_shares(frequency[analyze.rows_of(sources, dumps)],
                                    experts_per_language)
    coefficients = np.where(analyze.shared_experts(share, threshold), share[0], 0)
    first, last = (part * len(layers) for part in PAPER_BAND)
    band = band or f"{layers[int(first)]}-{layers[math.ceil(last) - 1]}"
    return in_band(coefficients, layers, band,
                   f"{','.join(sources)} share no expert in this band; raise --threshold or "
                   "--experts-per-language")


def selection_coefficients(selection, layers, band=None):
    """{decoder layer: float64 (num_experts,)}: 1 for what A's tokens select more, -1 for B's.

    selection  analyze.load_selection's (layers, experts); band "A-B", by default all of its layers
    """
    return in_band(np.sign(selection), layers, band or f"{layers[0]}-{layers[-1]}",
                   f"the selection has no experts in {band}")


def in_band(coefficients, layers, band, message):
    """(layers, experts) -> {decoder layer: (num_experts,)} of the band's rows that have any."""
    rows = analyze.parse_bands([band], layers)[band] & coefficients.any(1)
    common.require(rows.any(), message)
    return dict(zip(layers[rows].tolist(), coefficients[rows]))


def random_coefficients(coefficients, seed):
    """The same coefficients in every layer, on experts drawn at random."""
    rng = np.random.default_rng(seed)
    return {layer: rng.permutation(c) for layer, c in coefficients.items()}


def scaled(coefficients, strength):
    return {layer: strength * c for layer, c in coefficients.items()}


def steer(model, coefficients, strength, rule=RULE, **options):
    """edit_routing with every coefficient times the strength (the paper's lambda)."""
    return common.edit_either(model, boosts=scaled(coefficients, strength), rule=rule, **options)


def moved_selections(model, sequences, coefficients, strength, rule=RULE,
                     batch_tokens=BATCH_TOKENS):
    """{steered layer: part of the sequences' expert selections that steering changes}.

    Against the same model unsteered: what reaches a layer has been steered below it, too.
    """
    before = record(model, sequences, batch_tokens)[1]["selected_experts"]
    with steer(model, coefficients, strength, rule, count_moved=False):
        after = record(model, sequences, batch_tokens)[1]["selected_experts"]
    moved = common.newly_selected(before, after).mean((0, 2))
    shape = getattr(model, "shape", None) or common.routing_shape(model)
    return {layer: part for layer, part in zip(shape, moved.tolist()) if layer in coefficients}


def choose_lambda(base, steered, metric):
    """(best, {lambda: mean gain over languages}): less nats or more of another metric are a gain.

    base {language: scores (examples,)}, steered {lambda: {language: scores}}. Of several lambdas,
    even examples choose, and odd ones are left to report on.
    """
    gains, step = {}, min(len(steered), 2)
    for strength, scores in steered.items():
        change = np.mean([np.nanmean((scores[l] - base[l])[::step]) for l in base])
        gains[strength] = common.better(metric) * change
    return max(gains, key=gains.get), gains


def sign_flip_p(differences, seed=0):
    """Two-sided p of a mean of differences (problems,) whose signs could as well be others: exact
    up to 12 that are not 0, else by 10,000 random flips. Of right-or-wrong answers, McNemar's test.
    """
    values = differences[(differences != 0) & ~np.isnan(differences)]
    signs = np.array(list(itertools.product([1, -1], repeat=min(len(values), 12))))
    if len(values) > 12:  # the identity is one of them: p is never 0
        signs = np.random.default_rng(seed).choice([1, -1], (10_001, len(values)))
        signs[0] = 1
    return np.mean(np.abs(signs @ values) >= abs(values.sum()) - 1e-12)


def effect_rows(metric, part, base, scores, draws=()):
    """An effect for each language, and for all "together" where they have as many problems: means
    before and after, the paired change with its 95 % interval, and the changes by random draws.

    base, scores and each of draws: {language: scores (examples,)}, of which a part counts. Of all
    together, problems are resampled, and their signs flipped, not answers. "seen" is the smallest
    change that so many problems would show (p < .05) in four of five cases.
    """
    # (before, after and draws; languages; examples)
    cells = {l: np.array([[x[l][part]] for x in (base, scores, *draws)]) for l in base}
    if len({cell.shape for cell in cells.values()}) == 1 < len(cells):
        cells["together"] = np.concatenate(list(cells.values()), 1)
    rows = []
    for name, cell in cells.items():
        before, after, *controls = cell.mean(1)
        difference, changes = after - before, [np.nanmean(each - before) for each in controls]
        n, spread = np.isfinite(difference).sum(), np.nanstd(difference)
        low, high = common.bootstrap_interval(difference)
        counts = {}
        if metric in common.RIGHT_OR_WRONG:
            counts = {"fixed": (cell[1] > cell[0]).sum(), "broken": (cell[1] < cell[0]).sum(),
                      "p": sign_flip_p(difference)}
            if (cell[0] == cell[1]).all():  # the rule of three
                low, high, spread = -min(1, 3 / n), min(1, 3 / n), np.sqrt(3 / n)
        rows.append({"": name, "before": np.nanmean(before), "after": np.nanmean(after),
                     "change": np.nanmean(difference), "low": low, "high": high} | (
                         {"random": np.mean(changes), "least": min(changes), "most": max(changes)}
                         if changes else {}) | counts | {"seen": 2.8 * spread / np.sqrt(n)})
    return rows


def choose_coefficients(args, dumps, sources):
    """A group: its sources, the kind of its experts ("shared" or "selection"), the boosted ones and
    as controls random draws and {"band0-7": ...}, each {decoder layer: (num_experts,)}.
    """
    def coefficients(band):
        if args.selection:
            selection = analyze.load_selection(args.selection, dumps[0])
            return selection_coefficients(selection, dumps[0]["layers"], band)
        return steering_coefficients(dumps, sources, band, args.experts_per_language,
                                     args.threshold)

    boosted = coefficients(args.band)
    return {"sources": sources, "kind": "selection" if args.selection else "shared",
            "boosted": boosted, "draws": [random_coefficients(boosted, seed)
                                          for seed in range(args.control_seeds)],
            "bands": {f"band{band}": coefficients(band) for band in args.control_bands}}


def run_cells(experiment, group, name="baseline", strength=0, coefficients=None):
    """{metric: {language: scores (examples,)}} under the boosts, or of the unsteered model."""
    args, edit, settings = experiment.args, {}, {}
    if coefficients:
        settings = {"experiment": "steer", "kind": name, "lambda": strength, "rule": args.rule,
                    "sources": group["sources"], "band": sorted(coefficients),
                    "dumps": {l: experiment.choice["dumps"][l] for l in group["sources"]}}
        edit = {"boosts": scaled(coefficients, strength), "rule": args.rule}
        name = f"{name}-lambda{strength}"
    cells = {language: experiment.cell(language, name, settings, **edit)
             for language in tqdm(group["languages"], desc=name, leave=False)}
    return {metric: {language: cell[metric] for language, cell in cells.items()}
            for metric in cells[group["languages"][0]]}


def run_all(experiment, group, lambdas):
    """({lambda: gain}, unsteered, steered, [random draws], {control band: ...}), as of run_cells:
    steered by the best of the lambdas, which is chosen on the even examples if there are several.
    """
    metric, base = experiment.args.metrics[0], run_cells(experiment, group)
    steered = {strength: run_cells(experiment, group, group["kind"], strength, group["boosted"])
               for strength in lambdas}
    best, gains = choose_lambda(base[metric], {l: s[metric] for l, s in steered.items()}, metric)
    draws = [run_cells(experiment, group, f"random-seed{seed}", best, coefficients)
             for seed, coefficients in enumerate(group["draws"])]
    return gains, base, steered[best], draws, {
        name: run_cells(experiment, group, name, best, coefficients)
        for name, coefficients in group["bands"].items()}


def parse_arguments():
    p, add = common.task_parser(globals())
    add("--sources", "whose shared experts, or several groups, each for itself (%(default)s)",
        nargs="+")
    add("--band", "layers, as 10-39 (default: the paper's part)")
    add("--control-bands", "steer these, too: 0-7 40-47", nargs="+", default=[])
    add("--lambda", "strengths (default: %(default)s)", float, nargs="+", dest="lambdas")
    add("--rule", f"of {', '.join(common.RULES)} (default: %(default)s)", choices=common.RULES)
    args = p.parse_args()
    args.sources = [[]] if args.selection else [group.split(",") for group in args.sources]
    common.require(np.isfinite(args.lambdas).all(),
                   f"lambda must be a finite number, not {args.lambdas}")
    common.require(args.selection or all(len(set(group)) == len(group) > 1
                                         for group in args.sources), "--sources takes two or more "
                   f"different languages, as {SOURCES[0]}, or several such groups")
    return args


def prepare(args):
    """(experiment, groups of choose_coefficients with the languages that each is evaluated in),
    checked before weights are read.
    """
    dumps = analyze.load_languages(args.routing, args.part)
    args.experts_per_language = analyze.number_of_experts(args.experts_per_language,
                                                          dumps[0]["num_experts"])
    groups = [choose_coefficients(args, dumps, sources) for sources in args.sources]
    experiment = common.Experiment(args, [dump for dump in dumps if args.selection
                                          or dump["language"] in sum(args.sources, [])])
    for group in groups:  # the sources give; unless named, only other languages are evaluated
        own = [] if args.languages and len(groups) == 1 else group["sources"]
        group["languages"] = ([l for l in experiment.tasks if l not in own]
                              or list(experiment.tasks))
    fewest = min(len(encoded) for encoded, _ in experiment.tasks.values())
    common.require(len(args.lambdas) == 1 or fewest >= 4, "choosing among several lambdas takes 4 "
                   "examples or more; raise --limit or give one --lambda")
    return experiment, groups


def moved_by(experiment, group, coefficients, strength):
    """moved_selections of each language's first prompts."""
    prompts = [e["ids"] for language in group["languages"]
               for e in experiment.tasks[language][0][:20]]
    return moved_selections(experiment.engine or experiment.model, prompts, coefficients, strength,
                            experiment.args.rule, experiment.args.batch_tokens)


def print_moved(moved):
    """{lambda: {layer: part of the selections that it moves}}, a line each."""
    for strength, parts in moved.items():
        print(f"lambda {strength}: selections moved (%), by layer  "
              + "  ".join(f"{layer}: {100 * part:.1f}" for layer, part in parts.items())
              + "  left out: it moves none" * (not any(parts.values())))


def print_draws(moved, by_draws):
    """What the random draws move beside what the shared experts move: is it a fair control?"""
    shared, *draws = (np.mean(list(parts.values())) for parts in (moved, *by_draws))
    print(f"selections moved: {shared:.2%}; by random draws {np.mean(draws):.2%} "
          f"({min(draws):.2%} to {max(draws):.2%})"
          + "; less than half as much: no fair control" * bool(np.mean(draws) < shared / 2))


def effect_tables(gains, base, steered, draws, others):
    """([(title, rows)] for each metric, with those in the control bands, and {metric: {language:
    gain}}, where more is better), of run_all's results.
    """
    best, part, tables, changes = max(gains, key=gains.get), slice(None), [], {}
    if len(gains) > 1:
        part = slice(1, None, 2)
        tables = [(f"\nchosen on the even examples: lambda {best}; reported on the odd ones (mean "
                   f"gain of {next(iter(base))}: "
                   + ", ".join(f"{l} {g:+.4f}" for l, g in gains.items()) + ")", [])]
    for metric in base:
        rows = effect_rows(metric, part, base[metric], steered[metric],
                           [draw[metric] for draw in draws])
        changes[metric] = {row[""]: row["change"] * common.better(metric) for row in rows}
        tables.append((f"\n{metric}, lambda {best}, beside random experts; seen: the smallest "
                       "change that would be", rows))
        tables += [(f"control {name}", effect_rows(metric, part, base[metric], cells[metric]))
                   for name, cells in others.items()]
    return tables, changes


def related_test(gains, sources, languages, rng):
    """Do languages of a source's family gain more? (mean gain of related less unrelated pairs, p,
    the smallest p that these languages allow).

    gains (groups, languages), nan in a group's own; centred by group and by language. sources: of
    each group the first. p by dealing families out at random, as analyze.family_test; nan if all
    pairs are related, or none.
    """
    group, target = np.nonzero(~np.isnan(gains))
    dummies = np.hstack([np.eye(len(sources))[group], np.eye(len(languages))[target]])
    values = gains[group, target]
    values = values - dummies @ np.linalg.lstsq(dummies, values)[0]
    table, names = analyze.read_families(), list(dict.fromkeys([*languages, *sources]))
    families = [analyze.family_of(name, table).split("/")[0] or name for name in names]
    dealt = np.unique(families, return_inverse=True)[1][analyze.permutations(len(names), rng)]
    first, second = ([names.index(each[i]) for i in place]
                     for each, place in ((sources, group), (languages, target)))
    related = dealt[:, first] == dealt[:, second]
    mixed = related.any(1) & ~related.all(1)
    if not mixed[0]:
        return np.full(3, np.nan)
    related = related[mixed]
    gaps = (related @ values / related.sum(1)) - (~related @ values / (~related).sum(1))
    return gaps[0], np.mean(gaps >= gaps[0] - 1e-12), 1 / len(np.unique(related, axis=0))


def group_tables(groups, changes):
    """[(title, rows)] for each metric: the gain of each target by group of sources, and whether
    languages related to the sources gain more.
    """
    names = [",".join(group["sources"]) for group in groups]
    languages = list(dict.fromkeys(l for group in groups for l in group["languages"]))
    tables = []
    for metric in changes[0]:
        gains = np.array([[np.nan if l in group["sources"] else change[metric].get(l, np.nan)
                           for l in languages] for group, change in zip(groups, changes)])
        tables.append((f"gain of each language in {metric}, by the sources of steering",
                       [{"": l} | dict(zip(names, row)) for l, row in zip(languages, gains.T)]))
        gap, p, least = related_test(gains, [group["sources"][0] for group in groups], languages,
                                     np.random.default_rng(0))
        tables.append((f"languages of the first source's family gain {gap:+.4f} more, p {p:.3f} "
                       f"(at best {least:.3f} with these languages)\n", []))
    return tables


def main():
    args = parse_arguments()
    (experiment, groups), changes = prepare(args), []
    for group in groups:
        number = sum(map(np.count_nonzero, group["boosted"].values()))
        print(f"{args.model}  {number} experts  "
              f"{args.selection or 'shared by ' + ','.join(group['sources'])}  rule {args.rule}  "
              f"experts_per_language {args.experts_per_language}  threshold {args.threshold}")
        moved = {strength: moved_by(experiment, group, group["boosted"], strength)
                 for strength in args.lambdas}
        print_moved(moved)
        lambdas = [strength for strength in moved if any(moved[strength].values())]
        common.require(lambdas, "no lambda moves any selection; take larger ones")
        results = run_all(experiment, group, lambdas)
        best = max(results[0], key=results[0].get)
        print_draws(moved[best], [moved_by(experiment, group, draw, best)
                                  for draw in group["draws"]])
        tables, gains = effect_tables(*results)
        analyze.print_tables(tables)
        changes.append(gains)
        print()
    if len(groups) > 1:
        analyze.print_tables(group_tables(groups, changes))
    common.print_end(experiment)


if __name__ == "__main__":
    common.run_script(main, analyze.InputError)
