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
    frequency = analyze.frequencies(dumps)[analyze.rows_of(sources, dumps)]
    share = analyze.language_shares(frequency, experts_per_language)
    shared = analyze.shared_experts(share, threshold)
    return in_band(np.where(shared, share[0], 0), dumps[0]["layers"], band)


def in_band(coefficients, layers, band, part=PAPER_BAND):
    """(layers, experts) -> {decoder layer: (num_experts,)} of the band's rows that have any;
    without a band, of a part of the depth.
    """
    first, last = (edge * len(layers) for edge in part)
    band = band or f"{layers[int(first)]}-{layers[math.ceil(last) - 1]}"
    rows, = analyze.parse_bands([band], layers).values()
    rows = rows & coefficients.any(1)
    common.require(rows.any(), f"no expert to boost in the layers {band}; give another --band, or "
                               "raise --threshold or --experts-per-language")
    return dict(zip(layers[rows].tolist(), coefficients[rows]))


def choose_coefficients(args, dumps, sources, band):
    """steering_coefficients of the sources, or 1 for what a selection's A selects more, -1 for
    what B does; that without a band in all layers.
    """
    if not args.selection:
        return steering_coefficients(dumps, sources, band, args.experts_per_language,
                                     args.threshold)
    selection = analyze.load_selection(args.selection, dumps[0])
    return in_band(np.sign(selection), dumps[0]["layers"], band, part=(0, 1))


def random_coefficients(coefficients, seed):
    """The same coefficients in every layer, on experts drawn at random."""
    rng = np.random.default_rng(seed)
    return {layer: rng.permutation(c) for layer, c in coefficients.items()}


def scaled(coefficients, strength):
    return {layer: strength * np.asarray(c) for layer, c in coefficients.items()}


def steer(model, coefficients, strength, rule=RULE, **options):
    """edit_routing with every coefficient times the strength (the paper's lambda)."""
    return common.edit_routing(model, boosts=scaled(coefficients, strength), rule=rule, **options)


def moved_selections(experiment, sequences, coefficients, strength):
    """(steered layers,): the part of the sequences' expert selections that steering changes there.

    Against the same model unsteered: what reaches a layer has been steered below it, too.
    """
    args, model = experiment.args, experiment.engine or experiment.model
    before = record(model, sequences, args.batch_tokens)[1]["selected_experts"]
    with steer(model, coefficients, strength, args.rule, count_moved=False):
        after = record(model, sequences, args.batch_tokens)[1]["selected_experts"]
    steered = [layer in coefficients for layer in experiment.shape]
    return common.newly_selected(before, after)[:, steered].mean((0, 2))


def lambda_gains(scores, lambdas, metric):
    """{lambda: mean gain over languages}: less nats or more of another metric are a gain.

    scores of run_arms, an arm for each lambda. Of several, even examples choose, and odd ones are
    left to report on.
    """
    step = min(len(lambdas), 2)
    return {strength: common.better(metric) * np.mean([
        np.nanmean((each[arm] - each[0])[::step]) for each in scores.values()])
        for arm, strength in enumerate(lambdas, 1)}


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


def effect_rows(metric, scores, part):
    """An effect for each language, and for all "together" where they have as many problems: means
    before and after, the paired change with its 95 % interval, and the changes by random draws.

    scores of run_arms, steered first, of whose examples a part counts. Of all together, problems
    are resampled, and their signs flipped, not answers. "seen" is the smallest change that so many
    problems would show (p < .05) in four of five cases.
    """
    # (before, after and draws; languages; examples)
    cells = {language: each[:, None, part] for language, each in scores.items()}
    if len({cell.shape for cell in cells.values()}) == 1 < len(cells):
        cells["together"] = np.concatenate(list(cells.values()), 1)
    rows = []
    for name, cell in cells.items():
        before, after, *_ = problems = cell.mean(1)
        difference, answers = after - before, cell[1] - cell[0]
        change, *draws = np.nanmean(problems[1:] - before, 1)
        n, spread = np.isfinite(difference).sum(), np.nanstd(difference)
        low, high = common.bootstrap_interval(difference)
        if metric in common.RIGHT_OR_WRONG and not answers.any():  # the rule of three
            low, high, spread = -min(1, 3 / n), min(1, 3 / n), np.sqrt(3 / n)
        row = {"": name, "before": np.nanmean(before), "after": np.nanmean(after),
               "change": change, "low": low, "high": high}
        if draws:
            row |= {"random": np.mean(draws), "least": min(draws), "most": max(draws)}
        if metric in common.RIGHT_OR_WRONG:
            row |= {"fixed": (answers > 0).sum(), "broken": (answers < 0).sum(),
                    "p": sign_flip_p(difference)}
        rows.append(row | {"seen": 2.8 * spread / np.sqrt(n)})
    return rows


def run_arms(experiment, group, arms, lambdas, metric):
    """{language: scores (1 + arms * lambdas, examples)}: unsteered, then under each arm, (name,
    coefficients), times each lambda.
    """
    args, scores = experiment.args, {}
    for language in group["languages"]:
        cells = [experiment.cell(language)]
        steered = list(itertools.product(arms, lambdas))
        for (name, coefficients), strength in tqdm(steered, desc=language, leave=False):
            settings = {"experiment": "steer", "kind": name, "lambda": strength, "rule": args.rule,
                        "sources": group["sources"], "band": sorted(coefficients),
                        "dumps": {l: experiment.choice["dumps"][l] for l in group["sources"]}}
            cells.append(experiment.cell(language, f"{name}-lambda{strength}", settings,
                                         boosts=scaled(coefficients, strength), rule=args.rule))
        scores[language] = np.array([cell[metric] for cell in cells])
    return scores


def parse_arguments():
    p, add = common.task_parser(globals())
    add("--sources", "whose shared experts, or several groups, each for itself (%(default)s)",
        nargs="+")
    add("--band", "layers, as 10-39 (default: the paper's part)")
    add("--control-bands", "steer these, too: 0-7 40-47", nargs="+", default=[])
    add("--lambda", "strengths (default: %(default)s)", float, nargs="+", dest="lambdas")
    add("--rule", f"of {', '.join(common.RULES)} (default: %(default)s)", choices=common.RULES)
    args = p.parse_args()
    common.require(not args.selection or args.sources == SOURCES,
                   "leave out --sources: --selection names the experts")
    args.sources = [[]] if args.selection else [group.split(",") for group in args.sources]
    args.lambdas = np.ravel(args.lambdas).tolist()  # of a constant that is one number, too
    common.require(np.all(np.abs(args.lambdas) < 1e30),
                   f"lambda must be a finite number below 1e30, not {args.lambdas}")
    common.require(args.selection or min(map(len, args.sources)) > 1
                   and len(set(map(tuple, args.sources))) == len(args.sources), "--sources takes "
                   "two or more different languages, as en,zh, or several such groups")
    return args


def prepare(args):
    """(experiment, groups), checked before weights are read. A group: its sources, the languages
    that it is evaluated in, and its arms, (name, {decoder layer: (num_experts,)}), in lists of what
    is compared: what is steered with the random draws, and each control band.
    """
    dumps, groups = analyze.load_languages(args.routing, args.part), []
    args.experts_per_language = analyze.number_of_experts(args.experts_per_language,
                                                          dumps[0]["num_experts"])
    experiment = common.Experiment(args, [dump for dump in dumps if args.selection
                                          or dump["language"] in sum(args.sources, [])])
    for sources in args.sources:
        boosted = choose_coefficients(args, dumps, sources, args.band)
        arms = [[("selection" if args.selection else "shared", boosted)]]
        arms[0] += [(f"random-seed{seed}", random_coefficients(boosted, seed))
                    for seed in range(args.control_seeds)]
        arms += [[(f"band{band}", choose_coefficients(args, dumps, sources, band))]
                 for band in args.control_bands]
        # the sources give; unless named, only other languages are evaluated
        own = [] if args.languages and len(args.sources) == 1 else sources
        languages = [l for l in experiment.tasks if l not in own] or list(experiment.tasks)
        groups.append({"sources": sources, "languages": languages, "arms": arms})
    fewest = min(map(len, experiment.tasks.values()))
    common.require(len(args.lambdas) == 1 or fewest >= 4, "choosing among several lambdas takes 4 "
                   "examples or more; raise --limit or give one --lambda")
    return experiment, groups


def choose_lambda(experiment, group):
    """(the best of the lambdas that move any selection, the examples to report it on, a table): of
    several, it is chosen on the even ones. The table says what they move, and random draws do.
    """
    metric, ((_, boosted), *draws) = experiment.args.metrics[0], group["arms"][0]
    prompts = [e["ids"] for language in group["languages"]
               for e in experiment.tasks[language][:20]]
    moved = {strength: moved_selections(experiment, prompts, boosted, strength)
             for strength in experiment.args.lambdas}
    lambdas = [strength for strength in moved if moved[strength].any()]
    common.require(lambdas, "no lambda moves any selection; take larger ones")
    scores = run_arms(experiment, group, group["arms"][0][:1], lambdas, metric)
    gains = lambda_gains(scores, lambdas, metric)
    best, step = max(gains, key=gains.get), min(len(lambdas), 2)
    drawn = {name: moved_selections(experiment, prompts, each, best) for name, each in draws}
    chosen = ", chosen on the even examples, reported on the odd ones" * (step - 1)
    title = f"lambda {best}{chosen}; gain of {metric}, selections moved (%), and by layer"
    if np.mean(list(drawn.values())) < moved[best].mean() / 2:
        title += "\nrandom draws move less than half as much: no fair control"
    gains = dict.fromkeys(moved, "left out") | {l: f"{gain:.4f}" for l, gain in gains.items()}
    rows = [{"": str(each), "gain": gains.get(each, ""), "moved": 100 * parts.mean()}
            | dict(zip(boosted, 100 * parts)) for each, parts in (moved | drawn).items()]
    return best, slice(step - 1, None, step), (title, rows)


def effect_tables(experiment, group, best, part):
    """{metric: [(title, rows)]}: steered by the best lambda beside random draws, on a part of the
    examples, and then each control band.
    """
    tables, note = {}, ", beside random experts; seen: the smallest change that would be"
    for metric in experiment.cell(group["languages"][0]):
        tables[metric] = [
            (f"\n{metric}, lambda {best}, {arms[0][0]}{note * (len(arms) > 1)}", effect_rows(
                metric, run_arms(experiment, group, arms, [best], metric), part))
            for arms in group["arms"]]
    return tables


def related_test(gains, sources, languages, rng):
    """analyze.label_test: do languages of a source's family gain more?

    gains (groups, languages), nan where there is none; centred by group and by language. sources:
    the first of each group, who are among the languages.
    """
    group, target = np.nonzero(~np.isnan(gains))
    dummies = np.hstack([np.eye(len(sources))[group], np.eye(len(languages))[target]])
    values = gains[group, target]
    values = values - dummies @ np.linalg.lstsq(dummies, values)[0]
    families = [analyze.family_of(language, analyze.FAMILIES).split("/")[0] or language
                for language in languages]
    source = np.array([languages.index(source) for source in sources])[group]
    return analyze.label_test(values[None], source, target, families, rng)[0]


def group_tables(groups, effects):
    """(title, rows), for each metric: the gain of each target by group of sources, and whether
    languages related to the sources gain more. effects: effect_tables of each group.
    """
    names = [",".join(group["sources"]) for group in groups]
    sources = [group["sources"][0] for group in groups]
    languages = list(dict.fromkeys(sum([*(group["languages"] for group in groups), sources], [])))
    for metric in effects[0]:
        changes = [{row[""]: row["change"] for row in tables[metric][0][1]} for tables in effects]
        gains = common.better(metric) * np.array([[change.get(l, np.nan) for l in languages]
                                                  for change in changes])
        yield (f"gain of each language in {metric}, by the sources of steering",
               [{"": l} | dict(zip(names, row)) for l, row in zip(languages, gains.T)
                if not np.isnan(row).all()])
        related, others, p, least = related_test(gains, sources, languages,
                                                 np.random.default_rng(0))
        yield ("whether related languages gain more cannot be tested with these" if np.isnan(p) else
               f"languages of the first source's family gain {related - others:+.4f} more, "
               f"p {p:.3f} (at best {least:.3f} with these languages)\n", [])


def main():
    args = parse_arguments()
    (experiment, groups), effects = prepare(args), []
    for group in groups:
        number = sum(map(np.count_nonzero, group["arms"][0][0][1].values()))
        print(f"{args.model}  {number} experts  "
              f"rule {args.rule} ", args.selection or f"shared by {','.join(group['sources'])}  "
              f"experts_per_language {args.experts_per_language}  threshold {args.threshold}")
        best, part, table = choose_lambda(experiment, group)
        effects.append(effect_tables(experiment, group, best, part))
        analyze.print_tables([table, *sum(effects[-1].values(), [])])
        print()
    if len(groups) > 1:
        analyze.print_tables(group_tables(groups, effects))
    common.print_end(experiment)


if __name__ == "__main__":
    common.run_script(main, analyze.InputError)
