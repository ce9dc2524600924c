"""What it costs to let damage decide between edits that a test cannot tell apart, on made-up edits with known rates.

    python benchmarks/choice_rules.py

Twelve edits have an answer KL between 0.008 and 0.035 and a true rate of failure that falls with it (7 % at 0.02) but
differs by chance from edit to edit. A rule sees on which of a number of prompts each edit fails; the failures of two
edits correlate as those of neighbouring edits do. Its *loss* is the true score of its choice (rate of failure plus
answer KL) less that of the best edit, in percentage points, mean over draws. The rules:

- *least score*: by which ``run`` goes on from edit to edit.
- *damage breaks ties*: of the edits whose failures an exact McNemar test does not tell from those of the edit with the
  least score (p above 0.05, or above 0.5, as in ``run`` at the end), the one with the least damage.
- *paired score*: the one with the least damage whose score is at most half of a standard error above the least one,
  the error being that of the difference, prompt by prompt.

Bound: at 64 prompts and more, the choice of ``run`` loses at most half a point more than the least score.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ollama_forge.evaluation.paired import mcnemar

EDITS, DRAWS = 12, 500
PROMPTS, SPREADS = (16, 64, 99, 256), (0.01, 0.02, 0.04)
CORRELATION = 0.8

Fails = NDArray[np.bool_]  # [prompts, edits]
Damage = NDArray[np.float64]  # [edits]
ChooseOne = Callable[[Fails, Damage], int]


def least_score(fails: Fails, kl: Damage) -> int:
    return int((fails.mean(0) + kl).argmin())


def damage_breaks_ties(fails: Fails, kl: Damage, *, level: float) -> int:
    least = least_score(fails, kl)
    wanted = fails[:, least]
    tied = [edit for edit in range(len(kl)) if mcnemar(fails[:, edit].tolist(), wanted.tolist()) > level]
    return min([least, *tied], key=lambda edit: kl[edit])


def paired_score(fails: Fails, kl: Damage, *, errors: float) -> int:
    least = least_score(fails, kl)
    change = fails.astype(float) - fails[:, [least]]
    above = change.mean(0) + kl - kl[least]
    tied = np.flatnonzero(above <= errors * change.std(0) / len(fails) ** 0.5)
    return int(min([least, *tied], key=lambda edit: kl[edit]))


RULES: dict[str, ChooseOne] = {
    "least score": least_score,
    "damage breaks ties, p > 0.5": partial(damage_breaks_ties, level=0.5),
    "damage breaks ties, p > 0.05": partial(damage_breaks_ties, level=0.05),
    "paired score": partial(paired_score, errors=0.5),
}


def losses(prompts: int, spread: float) -> dict[str, float]:
    """The mean loss of each rule, in percentage points.

    Args:
        prompts: number of prompts that a rule sees.
        spread: standard deviation of the rates of failure about their mean at an answer KL.
    """
    random, total = np.random.default_rng(0), dict.fromkeys(RULES, 0.0)
    for _ in range(DRAWS):
        kl = random.uniform(0.008, 0.035, EDITS)
        rate = np.clip(0.07 - (kl - 0.02) + random.normal(0, spread, EDITS), 0.004, 0.6)
        common, own = random.normal(size=(prompts, 1)), random.normal(size=(prompts, EDITS))
        difficulty = CORRELATION**0.5 * common + (1 - CORRELATION) ** 0.5 * own
        fails = difficulty > [NormalDist().inv_cdf(1 - value) for value in rate]
        score = rate + kl
        for name, choose in RULES.items():
            total[name] += 100 * float(score[choose(fails, kl)] - score.min()) / DRAWS
    return total


def main() -> int:
    print("prompts, spread:", ", ".join(RULES))
    good = True
    for prompts, spread in product(PROMPTS, SPREADS):
        found = losses(prompts, spread)
        within = prompts < 64 or found["damage breaks ties, p > 0.5"] <= found["least score"] + 0.5
        good &= within
        values = ", ".join(f"{loss:.2f}" for loss in found.values())
        print("ok  " if within else "MISS", f"{prompts}, {spread}: {values}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
