"""
Mask a language's exclusive experts in a band of layers: is it hurt, and more
than by control experts?

    python ablate.py                          # the tiny model; after capture.py
    python ablate.py --model Qwen/Qwen3-30B-A3B --data 'mgsm/{lang}.tsv' \\
        --bands early=0-4 middle=22-26 late=43-47 --metrics accuracy prompt_nll
    python ablate.py --experts shared              # those that languages share
    python ablate.py --selection selection.npz     # chosen in any other way

reads   routing dumps, and evaluation data other than the dumps' own
writes  results/ablate.jsonl    a row per band, target, language and mask
        results/ablate/         responses, where a metric needs any

In each band the experts exclusive to a target language (arXiv 2601.14050) are
never selected, and every language is scored. In the target's own language there
are two controls: random draws of as many experts that the language uses, and
matched draws of other experts that carry as much of its routing weight. A
language is hurt if it does worse than under every draw of both, and if two 95 %
intervals lie on the side of harm: that of its change, and that of the
difference to the random draws. One model load; three minutes on the tiny model.
A stopped run goes on where it stopped.
"""

import itertools
import math
import zlib
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import analyze
from common import (
    Evaluator, InputError, add_expert_arguments, add_model_arguments, add_scoring_arguments,
    argument_parser, bootstrap_interval, change_text, metric_sign, print_now, range_text,
    run_script)

# ------------------------------------------------------------------------------------------------
MODEL = "tests/tiny_moe"             # a folder, or a hub id such as Qwen/Qwen3-30B-A3B
ROUTING = analyze.DUMPS              # the dumps that the experts are chosen from
DATA = "tests/data/eval_{lang}.tsv"  # what is scored; {lang} stands for the language
SEGMENT = "all"                      # tokens of the dumps that count: all prompt response text
EXPERTS_PER_LANGUAGE = 15 / 128      # a fraction below 1, or a number; the paper: 15, XQuAD 32
THRESHOLD = 0.4                      # the paper's; XQuAD 0.5
METRICS = ["prompt_nll"]             # prompt_nll answer_nll accuracy language
CONTROL_SEEDS = 19                   # random draws; by chance, one row in 20 is beyond all
MATCHED_SEEDS = 5                    # draws of others that carry as much routing weight
BATCH_TOKENS = 8192                  # tokens per forward pass, padding included
MAX_LENGTH = 4096                    # tokens of a prompt
MAX_NEW_TOKENS = None                # tokens of a response; None: the checkpoint's limit
OUT = "results/ablate.jsonl"
# ------------------------------------------------------------------------------------------------
EDIT_ARGUMENT = {"reroute": "masks", "zero": "zeroed"}  # of common.edit_routing, by --how
NOT_A_LANGUAGE = ("shared", "selection")  # targets whose experts count as every language's own
MATCH_TOLERANCE = 0.1  # matched controls carry 0.9 to 1.1 of the weight that is masked
MATCH_TRIES = 100      # draws of a matched control in a layer


# ---------------------------------------------------------------------------------------- experts

def choose_experts(args, routing):
    """Return {target: bool (layers, experts)}: the experts to mask.

    A target is a language, or several as "bn+sw", and has its exclusive experts. With --experts
    shared there is one target, "shared"; with --selection one, "selection".
    """
    if args.selection:
        selected = analyze.load_selection(args.selection, routing) > 0
        if not selected.any():
            raise InputError(f"{args.selection} holds no value above 0, so there is no expert to "
                             "mask")
        return {"selection": selected}
    share = analyze.language_shares(routing.activation_frequency, args.experts_per_language)
    if args.experts == "shared":
        return {"shared": analyze.shared_experts(share, args.threshold)}
    targets = routing.languages
    if args.targets:
        targets = args.targets.split(",")
    experts = {}
    for target in targets:
        rows = analyze.language_indices(target.split("+"), routing)
        experts[target] = analyze.exclusive_experts(share[rows].sum(0), args.threshold)
    return experts


def own_languages(target, languages):
    """Return those of the scored languages whose own experts a target's experts are.

    Shared or selected experts count as every language's own.
    """
    if target in NOT_A_LANGUAGE:
        return list(languages)
    return [language for language in languages if language in target.split("+")]


def routing_weights(routing, languages):
    """Return {language: float64 (layers, experts)}: fractions of each layer's routing weight.

    A language without a dump gets the mean of the others.
    """
    fractions = analyze.normalize(routing.weight_sums)
    of_dumps = dict(zip(routing.languages, fractions))
    mean = fractions.mean(0)
    return {language: of_dumps.get(language, mean) for language in languages}


# --------------------------------------------------------------------------------------- controls

def random_controls(masked, used, num_draws, seed):
    """Draw different sets of as many experts per layer, uniformly from those that are in use.

    masked, used  bool (layers, experts)
    Returns bool (draws, layers, experts), without the masked set itself; no draws at all if there
    are only num_draws such sets, or fewer.
    """
    per_layer = masked.sum(1)
    num_sets = [math.comb(n, k) for n, k in zip(used.sum(1).tolist(), per_layer.tolist())]
    if math.prod(num_sets) <= num_draws:
        return np.empty((0, *masked.shape), bool)
    rng = np.random.default_rng(seed)
    controls = {}  # by their bytes, so that a set is drawn once
    while len(controls) < num_draws:
        # Experts in random order, those in use first; the first ones are the control
        order = np.argsort(np.where(used, rng.random(used.shape), 2))
        control = np.argsort(order) < per_layer[:, None]
        if not (control == masked).all():
            controls[control.tobytes()] = control
    return np.array(list(controls.values()))


def matched_control(masked, weights, top_k, seed):
    """Draw other experts that carry as much routing weight, to a tenth, in every layer.

    masked bool (layers, experts), weights float64 (layers, experts) -> bool (layers, experts)

    An expert is drawn in proportion to its weight, and top_k experts are always left. Where
    MATCH_TRIES draws do not reach the weight, the one that carries the most is taken.
    """
    rng = np.random.default_rng(seed)
    control = np.zeros_like(masked)
    num_experts = masked.shape[1]
    for layer in range(len(masked)):
        wanted = weights[layer, masked[layer]].sum()
        others = np.flatnonzero(~masked[layer] & (weights[layer] > 0))
        most = 0
        for _ in range(MATCH_TRIES):
            # Sorting by exponential noise over weight draws without replacement, by weight
            waiting = rng.exponential(size=len(others)) / weights[layer, others]
            order = others[np.argsort(waiting)][:num_experts - top_k]
            drawn, total = take_weight(order, weights[layer], wanted)
            if total > most:
                most = total
                control[layer] = np.isin(range(num_experts), drawn)
            if most >= (1 - MATCH_TOLERANCE) * wanted:
                break
    return control


def take_weight(order, weights, wanted):
    """Take experts in order until they carry a weight, to MATCH_TOLERANCE, and none that exceed it.

    Returns their indices, and the weight that they carry.
    """
    least, most = (1 - MATCH_TOLERANCE) * wanted, (1 + MATCH_TOLERANCE) * wanted
    drawn, total = [], 0
    for expert in order:
        if total < least and total + weights[expert] <= most:
            drawn.append(expert)
            total += weights[expert]
    return drawn, total


def draw_controls(masked, weights, in_band, num_draws, top_k, name):
    """Return the control masks {"random": ..., "matched": ...}, bool (draws, layers, experts).

    masked   bool (layers, experts), none outside of the band
    weights  float64 (layers, experts), the language's fractions of the routing weight
    in_band  bool (layers,)
    name     of the cell; its hash is the seed, so that each cell has draws of its own
    """
    seed = zlib.crc32(name.encode())
    masked_in_band, weights_in_band = masked[in_band], weights[in_band]
    random = random_controls(masked_in_band, weights_in_band > 0, num_draws, seed)
    matched = [matched_control(masked_in_band, weights_in_band, top_k, [seed, draw])
               for draw in range(MATCHED_SEEDS)]
    matched = [draw for draw in matched if draw.any()]  # none, if any other expert weighs more
    controls = {}
    for condition, draws in (("random", random), ("matched", matched)):
        controls[condition] = np.zeros((len(draws), *masked.shape), bool)
        if len(draws):
            controls[condition][:, in_band] = draws
    return controls


# ------------------------------------------------------------------------------------------ cells

@dataclass
class Cell:
    """The experts of a target, masked in a band, and what that changes in the scores of a language.

    Condition "masked" is the experiment, one mask. If the experts are the language's own, "random"
    and "matched" are its controls, a mask for each draw.
    """
    band: str
    target: str
    language: str
    masks: dict           # {condition: bool (draws, layers, experts)}
    changes: dict = None  # once it is run, {condition: {metric: float64 (draws, examples)}}

    @property
    def masked(self):
        """The masked experts, bool (layers, experts)."""
        return self.masks["masked"][0]

    @property
    def has_controls(self):
        """Whether controls were drawn: some experts are masked, and they are the language's own."""
        return "random" in self.masks


def plan_cells(args, experts, bands, weights, top_k):
    """Return a Cell for each band, target and language, with all of its masks.

    weights  {language: routing_weights}, of the languages that are scored
    """
    cells = []
    languages = list(weights)
    for band, target, language in itertools.product(bands, experts, languages):
        masked = experts[target] & bands[band][:, None]
        masks = {"masked": masked[None]}
        if masked.any() and language in own_languages(target, languages):
            masks |= draw_controls(masked, weights[language], bands[band], args.control_seeds,
                                   top_k, f"{band} {target} {language}")
        cells.append(Cell(band, target, language, masks))
    return cells


def check_masks(cells, how, top_k):
    """Raise an InputError if nothing is masked, or if fewer than top_k experts are left."""
    most = max(cell.masked.sum(1).max() for cell in cells)
    num_experts = cells[0].masked.shape[1]
    if most == 0:
        raise InputError("no expert to mask in these bands; give other --bands or --targets")
    if how == "reroute" and num_experts - most < top_k:
        raise InputError(
            f"masking {most} of {num_experts} experts leaves fewer than top_k {top_k}")


def run_cell(evaluator, cell, layers):
    """Return the changes of a Cell: scores under each of its masks, less those without a mask."""
    args = evaluator.args
    unmasked = evaluator.evaluate(cell.language)["scores"]  # of the results file by now
    changes = {}
    for condition, masks in cell.masks.items():
        changes[condition] = {metric: np.zeros((len(masks), len(unmasked[metric])))
                              for metric in unmasked}
        for draw, mask in enumerate(masks):
            masked_layers = {int(layer): row for layer, row in zip(layers, mask) if row.any()}
            if not masked_layers:
                continue  # a mask without experts changes nothing
            settings = {
                "experiment": "ablate",
                "experts": args.experts,
                "target": cell.target,
                "band": cell.band,
                "condition": condition,
                "draw": draw,
                "how": args.how,
            }
            name = f"{cell.band}-{cell.target}-{condition}{draw}"
            edit = {EDIT_ARGUMENT[args.how]: masked_layers}
            scores = evaluator.evaluate(cell.language, name, edit, settings)["scores"]
            for metric in unmasked:
                changes[condition][metric][draw] = scores[metric] - unmasked[metric]
    return changes


# ----------------------------------------------------------------------------------------- tables

def is_hurt(sign, changes, random_changes, matched_changes):
    """Return whether masking does harm, and more of it than every control.

    sign             +1 where a higher score is better, else -1
    changes          (examples,), of the score by the mask
    random_changes   (draws, examples), by random controls; to be worse than all n is chance in one
                     of n + 1 cases
    matched_changes  (draws, examples), by matched controls

    Harm has to be larger than under each draw; and the 95 % intervals of the change, and of its
    difference to the random draws, have to lie on the side of harm.
    """
    # Times sign, what is below 0 is harm
    controls = sign * np.concatenate([random_changes, matched_changes])
    is_worst = sign * np.nanmean(changes) < np.nanmean(controls, axis=1).min()
    _, change_ci_high = bootstrap_interval(sign * changes)
    _, difference_ci_high = bootstrap_interval(sign * (changes - random_changes))
    return bool(is_worst and change_ci_high < 0 and difference_ci_high < 0)


def weight_removed(masks, weights, masked):
    """Return the routing weight that masks carry, a mean over the layers with masked experts.

    masks (..., layers, experts), weights and masked (layers, experts) -> (...); a layer's weight
    is 1
    """
    num_layers = masked.any(1).sum()
    return (masks * weights).sum((-2, -1)) / num_layers


def verdict(metric, cell, weights):
    """Return "hurt", "not hurt" or "none", and what is to be known about the controls."""
    changes = {condition: of_draws[metric] for condition, of_draws in cell.changes.items()}
    if len(changes["random"]) == 0:
        return "none: too few other sets"
    text = "not hurt"
    if is_hurt(metric_sign(metric), changes["masked"][0], changes["random"], changes["matched"]):
        text = "hurt"
    wanted = weight_removed(cell.masked, weights, cell.masked)
    carried = weight_removed(cell.masks["matched"], weights, cell.masked)
    if len(carried) == 0 or (carried < (1 - MATCH_TOLERANCE) * wanted).any():
        text += "; matched carry less"
    return text


def effect_columns(metric, cells, weights):
    """Return the columns of a table with a row for each language whose own experts are masked.

    cells  of one band
    """
    columns = {"language": [], "experts": [], "weight removed": [], "change [95 % interval]": [],
               "others": [], "random": [], "matched": [], "verdict": []}
    for cell in cells:
        if not cell.has_controls:
            continue
        name = cell.language
        if cell.target != cell.language:
            name = f"{cell.target} in {cell.language}"
        weight = weights[cell.language]
        changes = {condition: draws[metric] for condition, draws in cell.changes.items()}
        masked = changes["masked"][0]
        others = [np.nanmean(other.changes["masked"][metric]) for other in cells
                  if other.target == cell.target and not other.has_controls]
        columns["language"].append(name)
        columns["experts"].append(cell.masked.sum())
        columns["weight removed"].append(weight_removed(cell.masked, weight, cell.masked))
        columns["change [95 % interval]"].append(
            change_text(np.nanmean(masked), *bootstrap_interval(masked)))
        columns["others"].append(f"{np.mean(others):+.3f}" if others else "-")
        columns["random"].append(range_text(np.nanmean(changes["random"], axis=1)))
        columns["matched"].append(range_text(np.nanmean(changes["matched"], axis=1)))
        columns["verdict"].append(verdict(metric, cell, weight))
    return columns


def change_columns(metric, cells, unmasked):
    """Return the columns of a table of languages by targets: the score, and each mask's change.

    cells     of one band
    unmasked  {language: row of Evaluator.evaluate}
    """
    columns = {
        "language": list(unmasked),
        "unmasked": [np.nanmean(row["scores"][metric]) for row in unmasked.values()],
    }
    for target in dict.fromkeys(cell.target for cell in cells):
        changes = {cell.language: cell.changes["masked"][metric] for cell in cells
                   if cell.target == target}
        columns[target] = [f"{np.nanmean(changes[language]):+.3f}" for language in unmasked]
    return columns


def print_effects(cells, metrics, bands, layers, weights, unmasked):
    """Print two tables for each metric and band, and return all verdicts."""
    verdicts = []
    for metric, band in itertools.product(metrics, bands):
        in_band = [cell for cell in cells if cell.band == band]
        where = f"{band} (layers {analyze.describe(layers[bands[band]])})"
        effects = effect_columns(metric, in_band, weights)
        verdicts += effects["verdict"]
        if effects["verdict"]:
            analyze.print_table(
                f"{metric}, {where}: change in the language whose own experts are masked, in the "
                "other languages, and in that language under random and matched controls "
                "(min..max)", effects)
        analyze.print_table(
            f"{metric}, {where}: change in each language (row) by masking the experts of each "
            "target (column)", change_columns(metric, in_band, unmasked))
    return verdicts


def draw_changes(figure, cells, metric, bands, weights):
    """Draw the change in each language by masking each target's experts, a panel for each band.

    Cells of a language whose own experts are masked are outlined; those that are hurt have a star.
    """
    figure.set_size_inches(4.5 * len(bands), 4.5)
    axes = figure.subplots(1, len(bands), squeeze=False)[0]
    targets = list(dict.fromkeys(cell.target for cell in cells))
    languages = list(weights)
    means = {(cell.band, cell.language, cell.target): np.nanmean(cell.changes["masked"][metric])
             for cell in cells}
    largest = max(abs(mean) for mean in means.values())
    for axis, band in zip(axes, bands):
        matrix = [[means[band, language, target] for target in targets] for language in languages]
        image = axis.imshow(matrix, cmap="PuOr", vmin=-largest, vmax=largest)
        axis.set_title(f"{band} layers")
        axis.set_xticks(range(len(targets)), targets, rotation=90)
        axis.set_yticks(range(len(languages)), languages)
        axis.set_xlabel("experts masked")
        for cell in cells:
            if cell.band != band or not cell.has_controls:
                continue
            x, y = targets.index(cell.target), languages.index(cell.language)
            axis.plot([x - .5, x + .5, x + .5, x - .5, x - .5],
                      [y - .5, y - .5, y + .5, y + .5, y - .5], color="black")
            if verdict(metric, cell, weights[cell.language]).startswith("hurt"):
                is_dark = abs(means[band, cell.language, cell.target]) > largest / 2
                axis.text(x, y, "*", ha="center", va="center", fontsize="large",
                          color="white" if is_dark else "black")
    axes[0].set_ylabel("language scored")
    figure.colorbar(image, ax=axes, label=f"change of {metric} (* hurt)")


def print_verdicts(verdicts, num_draws):
    """Print what "hurt" means, how many rows are, and how many chance would give."""
    if not verdicts:
        print("\nno controls: no scored language is a target; label=path renames a dump")
        return
    judged = [each for each in verdicts if not each.startswith("none")]
    hurt = [each for each in judged if each.startswith("hurt")]
    print(f"\nhurt: worse than under all {num_draws} random and all {MATCHED_SEEDS} matched draws, "
          "and the 95 % intervals of the\nchange and of its difference to the random draws lie on "
          f"the side of harm. {len(hurt)} of {len(judged)} rows are hurt;\nchance would give up to "
          f"{len(judged) / (num_draws + 1):.1f}.")


# ----------------------------------------------------------------------------------------- script

def parse_arguments():
    parser = argument_parser(__doc__)
    add_model_arguments(parser, model=MODEL, data=DATA, out=OUT, batch_tokens=BATCH_TOKENS,
                        max_length=MAX_LENGTH)
    add_scoring_arguments(parser, metrics=METRICS, max_new_tokens=MAX_NEW_TOKENS)
    add = add_expert_arguments(
        parser, routing=ROUTING, segments=analyze.SEGMENTS, segment=SEGMENT,
        experts_per_language=EXPERTS_PER_LANGUAGE, threshold=THRESHOLD,
        control_seeds=CONTROL_SEEDS)
    add("--experts", choices=("exclusive", "shared"), default="exclusive",
        help="the target's own, or those of all")
    add("--how", choices=tuple(EDIT_ARGUMENT), default="reroute",
        help="let others take their place, or zero their contribution (default: %(default)s)")
    add("--targets", metavar="LANGUAGES",
        help="whose experts: bn,de or bn+sw (default: those of all dumps)")
    add("--bands", nargs="+", metavar="BAND",
        help="layers: low=0-4 (default: first, middle and last tenth, or a selection's)")
    add("--figures", metavar="FOLDER", help="write changes.png; needs matplotlib")
    args = parser.parse_args()
    if args.figures:
        analyze.prepare_figures(args.figures)
    if args.selection and args.experts == "shared":
        raise InputError("leave out --experts: --selection names them")
    if args.selection:
        args.experts = "selection"
    if args.targets and args.experts != "exclusive":
        raise InputError(f"--targets has no part in the {args.experts} experts; leave it out")
    return args


def main():
    args = parse_arguments()

    # 1. Choose the experts of each target, and the bands of layers
    routing = analyze.load_routing(args.routing, args.segment)
    args.experts_per_language = analyze.number_of_experts(
        args.experts_per_language, routing.num_experts)
    experts = choose_experts(args, routing)
    bands = analyze.parse_bands(args.bands, routing.layers)
    if args.selection and not args.bands:
        bands = {"selected": experts["selection"].any(1)}

    # 2. Check model, data and results file; weights are read when the first score is needed
    evaluator = Evaluator(args, routing)

    # 3. Plan the masks: a target's experts in every language, and controls in its own
    weights = routing_weights(routing, evaluator.tasks)
    cells = plan_cells(args, experts, bands, weights, routing.top_k)
    check_masks(cells, args.how, routing.top_k)

    # 4. Score every language without a mask, and under each of them
    print_now(f"{args.model}  {args.how}  {args.selection or args.experts} experts  "
              f"experts_per_language {args.experts_per_language}  threshold {args.threshold}")
    unmasked = {language: evaluator.evaluate(language)
                for language in tqdm(evaluator.tasks, "unmasked", leave=False)}
    for cell in tqdm(cells, "masked", unit="cell", leave=False):
        cell.changes = run_cell(evaluator, cell, routing.layers)

    # 5. Print, for each metric and band, effects beside those of controls, and all changes
    metrics = list(cells[0].changes["masked"])  # those of --metrics, and f1 where there is one
    if args.figures:
        analyze.save_figure(f"{args.figures}/changes.png", draw_changes, cells, metrics[0], bands,
                            weights)
    verdicts = print_effects(cells, metrics, bands, routing.layers, weights, unmasked)
    print_verdicts(verdicts, args.control_seeds)
    evaluator.print_summary()


if __name__ == "__main__":
    run_script(main, analyze.InputError)
