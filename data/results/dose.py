"""How strongly does each rule select, by one reference model? The table of dose.md.

    python -m data.results.dose REFERENCE [RUN ...]      # finished runs; a minute or two each

The rules of masking.py ask the reference model. A RUN chooses as it did at the end of its training,
by its own model, teacher or means. The exact entropies of the reference say how hard all that is.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np

from data.corpus import load_text, with_ends
from data.files import UserError, load_tensors, run_script
from data.flags import flag_parser
from data.inspection import (
    DIAGNOSIS_SEED, exact_entropy, neighbour, standardise, strategies_of, watch,
)
from data.machine import Machine
from data.metrics import spearman
from data.runs import read_config
from data.tokenizer import N_SPECIAL
from data.vocabulary import VocabularyMean
from masking import Strategy, draw, mask_count, unmasked
from model import forward_flops, load
from train import make_strategy

RATES = (0.15, 0.30)  # masked shares for which the rules are compared
COLUMNS = {"dose": "+.2f", "neighbour": ".2f", "rank_correlation": ".2f", "flops": ".2f"}


def rules_of(model):
    """{name: Strategy}, of which each asks this model."""
    return strategies_of(model) | {
        f"high-unmasked, pool {pool}": Strategy(model, unmasked, pool=pool) for pool in (2, 3, 4)}


def own_strategy(run, tokenizer):
    """-> (what a finished run chose by, as it was at its end; the shape of its model). UserError
    where that is not known."""
    (model, own), config = load(run), read_config(run)
    if own.sha256 != tokenizer.sha256:
        raise UserError(f"{run} has another tokenizer than the reference")
    flags = Namespace(**config["flags"])
    teacher = load(flags.teacher)[0] if flags.teacher else None
    strategy = make_strategy(flags, None, model, teacher)
    if isinstance(strategy.reads, VocabularyMean):
        if not (Path(run) / "checkpoint.pt").exists():
            raise UserError(f"{run}: its means are in its checkpoint.pt, which is gone")
        strategy.reads.load_state(load_tensors(Path(run) / "checkpoint.pt")["means"])
    return strategy, model.shape


def report_doses(model, tokens, strategies, shapes=None):
    """Compare strategies on tokens (B, T) -> a dict per strategy: rule, and for each of RATES its
    dose, neighbour, rank_correlation (Spearman of its entropies with the exact ones, within a row)
    and flops (of an update, over those of random masking). None: its pool is above a row. `shapes`:
    of the models that are trained by them, where that is not `model`.

    The last rule, `exact`, takes the highest exact entropies: the largest dose there is. It costs a
    forward per token.
    """
    exact = exact_entropy(model, tokens)
    deviations = standardise(exact)
    noise = draw(DIAGNOSIS_SEED, 0, *tokens.shape).to(tokens.device)
    look_up = Strategy(reads=lambda model, tokens, places: exact.gather(1, places))
    T, shortest = tokens.shape[1], (tokens >= N_SPECIAL).sum(1).min().item()
    reports = []
    for rule, strategy in {**strategies, "exact": look_up}.items():
        report = {"rule": rule, **{name: [None] * len(RATES) for name in COLUMNS}}
        reports.append(report)
        for i, rate in enumerate(RATES):
            k = mask_count(rate, T)
            candidates = strategy.pool * k
            if candidates > shortest:
                continue
            positions, seen = watch(strategy, tokens, k, noise)
            trained, asked = (shapes or {}).get(rule, model.shape), strategy.model
            scored = forward_flops(asked.shape, T, candidates or T - 2) if asked else 0
            if rule == "exact":
                scored = (T - 2) * forward_flops(model.shape, T, 1)
            if deviations is not None:
                report["dose"][i] = deviations.gather(1, positions).mean().item()
            report["neighbour"][i] = neighbour(positions)
            if strategy.reads:
                both = seen.isfinite() & exact.isfinite()
                report["rank_correlation"][i] = np.mean([
                    spearman(a[where], b[where]) for a, b, where in zip(seen, exact, both)]).item()
            report["flops"][i] = 1 + scored / (3 * forward_flops(trained, T, k))
    return reports


def print_doses(reports):
    """Print what report_doses returns as a Markdown table."""
    heads = [f"{name.replace('_', ' ')}, {rate:.0%}" for rate in RATES for name in COLUMNS]
    print("| rule |", " | ".join(heads), "|\n|---|" + "---|" * len(heads))
    for report in reports:
        cells = ["-" if report[name][i] is None else format(report[name][i], form)
                 for i in range(len(RATES)) for name, form in COLUMNS.items()]
        print(f"| {report['rule']} |", " | ".join(cells), "|")


def main():
    parser = flag_parser("python -m data.results.dose REFERENCE [RUN ...] [--blocks N]", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs, the reference first")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks (default 64)")
    args = parser.parse_args()
    reference, *others = args.runs
    model, tokenizer = load(reference)
    config = read_config(reference)
    flags = Namespace(**{**config["flags"], "out": reference, "device": "cpu", "threads": 0})
    text = load_text(flags, config, Machine(flags))
    tokens = with_ends(text.valid[:max(1, args.blocks)])
    own = {run: own_strategy(run, tokenizer) for run in others}
    rules = rules_of(model) | {run: strategy for run, (strategy, _) in own.items()}
    print(f"{reference}: dose (deviations above the row's mean of exact entropies; - on the "
          f"plateau), right neighbours, rank correlation with exact entropies, FLOPs over random "
          f"masking; {len(tokens)} held-out blocks")
    print_doses(report_doses(model, tokens, rules, {run: shape for run, (_, shape) in own.items()}))


if __name__ == "__main__":
    run_script(main)
