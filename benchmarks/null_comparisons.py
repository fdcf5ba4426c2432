"""How often comparisons claim a difference where there is none, how often intervals hold the true one, and how often
a true difference is seen.

    python benchmarks/null_comparisons.py [--repeats 1000]

Prints the tables of docs/eval.md. Models are made up: every item has a difficulty, and equal models answer with equal
chances. "bootstrap" is the percentile bootstrap of the paired mean, for comparison. Comparisons use 1,999 draws here
instead of 10,000, to save time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import verdicts as made

from eval import resampling
from eval.compare import compare
from eval.difference import SIGNIFICANT, difference, differences
from eval.results import ModelScores, TaskResult

CORE = (160, 150, 160, 150, 120, 120, 100, 100, 60)  # items of its tasks, but for prose
SIZES = (2, 3, 5, 8, 12, 20, 30, 50, 100, 200, 500)
Scores = np.ndarray
Kind = Callable[[np.random.Generator, int, int, float], Scores]


def right_or_wrong(rng: np.random.Generator, models: int, n: int, gain: float) -> Scores:
    """(model, item); the first model is right more often by `gain`."""
    easy = rng.beta(2, 2, n) * 0.8 + 0.1
    chances = np.tile(easy, (models, 1))
    chances[0] = np.clip(chances[0] + gain, 0, 1)
    return (rng.random((models, n)) < chances).astype(float)


def mostly_right(rng: np.random.Generator, models: int, n: int, gain: float) -> Scores:
    """The same at 95 %."""
    chances = np.full((models, n), 0.95)
    chances[0] += gain / 4
    return (rng.random((models, n)) < chances).astype(float)


def losses(rng: np.random.Generator, models: int, n: int, gain: float) -> Scores:
    """Skewed: log-normal, of one item alike."""
    return (
        -np.exp(0.5 * rng.standard_normal(n) + 0.2 * rng.standard_normal((models, n)))
        + gain * (np.arange(models) == 0)[:, None]
    )


def heavy(rng: np.random.Generator, models: int, n: int, gain: float) -> Scores:
    """Student's t with three degrees of freedom."""
    return rng.standard_t(3, (models, n)) + gain * (np.arange(models) == 0)[:, None]


KINDS: dict[str, Kind] = {
    "right or wrong": right_or_wrong,
    "95 % right": mostly_right,
    "skewed losses": losses,
    "heavy tails": heavy,
}


def bootstrap(steps: Scores, rng: np.random.Generator) -> float:
    """Two-sided p of the percentile bootstrap."""
    means = steps[rng.integers(0, len(steps), (1999, len(steps)))].mean(axis=1)
    return min(1.0, 2 * (min((means <= 0).sum(), (means >= 0).sum()) + 1) / 2000)


def as_models(scores: Scores, merges: int = 1) -> list[ModelScores]:
    """The first `merges` are merges of all others."""
    parents = [f"p{place}" for place in range(merges, len(scores))]
    names = [f"m{place}" for place in range(merges)] + parents
    return [
        made.model(name, [made.task("t", list(row))], parents if name.startswith("m") else ())
        for name, row in zip(names, scores, strict=True)
    ]


def pairs(repeats: int) -> None:
    """False claims of one pair, and coverage with and without a true gain."""
    print(
        "| items | " + " | ".join(f"{kind}: bootstrap, ours, interval holds 0, holds a gain" for kind in KINDS) + " |"
    )
    print("|---:|" + "---:|" * len(KINDS))
    for n in SIZES:
        cells = []
        for number, kind in enumerate(KINDS.values()):
            rng = np.random.default_rng([n, number])
            old = new = held = held_gain = 0
            gain = 0.1
            truth = float(np.mean([np.diff(kind(rng, 2, 2000, gain)[::-1], axis=0).mean() for _ in range(200)]))
            for _ in range(repeats):
                scores = kind(rng, 2, n, 0.0)
                found = difference(*as_models(scores), "t")
                old += bootstrap(scores[0] - scores[1], rng) < SIGNIFICANT
                new += found.significant
                held += found.low is None or found.low <= 0 <= found.high
                other = difference(*as_models(kind(rng, 2, n, gain)), "t")
                held_gain += other.low is None or other.low <= truth <= other.high
            cells.append(", ".join(f"{100 * count / repeats:.1f}" for count in (old, new, held, held_gain)))
        print(f"| {n} | " + " | ".join(cells) + " |", flush=True)


def families(repeats: int) -> None:
    """Claims about equal merges of equal parents."""
    print("| items | merges | parents | pair with the best parent | called worse | called better | any claim |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for n in (20, 100, 500):
        for merges, parents in ((1, 2), (1, 4), (3, 4), (5, 4)):
            rng = np.random.default_rng([n, merges, parents])
            alone = worse = better = claims = 0
            for _ in range(repeats):
                models = as_models(right_or_wrong(rng, merges + parents, n, 0.0), merges)
                gains = [merged.gains[-1] for merged in compare(made.results(models)).merges]
                alone += gains[0].best.p < SIGNIFICANT
                worse += gains[0].significant and gains[0].best.value < 0
                better += gains[0].significant and gains[0].best.value > 0
                claims += any(gain.significant for gain in gains)
            shares = " | ".join(f"{100 * count / repeats:.1f}" for count in (alone, worse, better, claims))
            print(f"| {n} | {merges} | {parents} | {shares} |", flush=True)


def power(repeats: int) -> None:
    """How often the mean of core's nine tasks of right-or-wrong items shows a true gain over one other model."""
    print("| items differ | gain of 2 points | 3 points | 5 points | 3 points, --quick |\n|---:|---:|---:|---:|---:|")
    for share in (0.05, 0.1, 0.15, 0.2, 0.3):
        cells = [_seen(share, gain, CORE, repeats) for gain in (0.02, 0.03, 0.05)]
        cells.append(_seen(share, 0.03, [min(n, 30) for n in CORE], repeats))
        print(f"| {share:.0%} | " + " | ".join(f"{100 * seen:.0f}" for seen in cells) + " |", flush=True)


def _seen(share: float, gain: float, sizes: Sequence[int], repeats: int) -> float:
    """`share`: of the items that only one of the two has right."""
    rng = np.random.default_rng([int(1000 * share), int(1000 * gain), len(sizes), sum(sizes)])
    seen = 0
    for _ in range(repeats):
        two: tuple[list[TaskResult], list[TaskResult]] = ([], [])
        for place, n in enumerate(sizes):
            one = rng.random(n) < share  # has only one of them right
            first = rng.random(n) < (share + gain) / (2 * share)
            both = rng.random(n) < 0.5
            rights = np.where(one, first, both), np.where(one, ~first, both)
            for tasks, right in zip(two, rights, strict=True):
                tasks.append(made.task(f"t{place}", [float(each) for each in right]))
        better, other = made.model("better", two[0]), made.model("other", two[1])
        (found,) = differences(better, [other], list(better.tasks))
        seen += found.significant and found.value > 0
    return seen / repeats


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    repeats = parser.parse_args(arguments).repeats
    resampling.DRAWS = 1999
    print(f"Per cent of {repeats:,} simulations; claims at 5 %, intervals at 95 %.\n")
    pairs(repeats)
    print()
    families(repeats)
    print()
    power(repeats)


if __name__ == "__main__":
    main()
