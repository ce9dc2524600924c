"""Fit the weights of ``evaluation/deflections.py`` to labelled openings, and measure the classifier.

    python scripts/train_deflections.py                    # fit and write the weights
    python scripts/train_deflections.py --cross-validate   # leave one source out; writes nothing

Two logistic regressions with an L2 penalty: of prompts, whether models decline them, and of answers, whether they are
deflections. In cross-validation, the weights for one source are fitted to the other sources; the rules and the lists of
words are the same throughout, so only the weights are cross-validated.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ollama_forge.evaluation.agreement import agreement
from ollama_forge.evaluation.deflections import WEIGHTS_FILE, features, harmfulness, prompt_features
from ollama_forge.evaluation.refusals import AnswerClass, behind_thought, classify, normalised
from ollama_forge.prompts.conversation import messages_of
from ollama_forge.prompts.settings import PromptSettings

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
FILES = ("labelled_openings_fresh.jsonl", "labelled_openings_training.jsonl")
FEWEST = 2  # openings that a feature must occur in
PENALTY = 0.5
CLASSES = (AnswerClass.ANSWER, AnswerClass.DEFLECTION)


@dataclass(frozen=True)
class Opening:
    prompt: str
    text: str
    label: AnswerClass
    source: str


def openings() -> list[Opening]:
    """All labelled openings with prompts; a file without sources is one source."""
    found = []
    for name in FILES:
        for line in (DATA / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            source = row["source"] if name == FILES[1] else "fresh"
            found.append(Opening(row["prompt"], row["text"], AnswerClass(row["label"]), source))
    return found


def fitted(rows: list[Opening]) -> dict[str, dict[str, float]]:
    """The weights that fit openings best: those of prompts, and with them those of answers."""
    prompts = PromptSettings().load(256)
    parts = (prompts.fit, prompts.select)  # what is measured is not fitted to
    declined = {row.prompt for row in rows if row.label in (AnswerClass.REFUSAL, AnswerClass.DEFLECTION)}
    declined |= {prompt for part in parts for prompt in part.harmful}
    answered = {prompt for part in parts for prompt in part.harmless}
    answered |= {row.prompt for row in rows if row.label is AnswerClass.ANSWER}
    answered |= {messages_of(prompt)[-1]["content"] for part in parts for prompt in part.general}
    texts = [*sorted(declined), *sorted(answered - declined)]
    found = [prompt_features(normalised(text)) for text in texts]
    of_prompts = regression(found, [float(text in declined) for text in texts])
    rows = [row for row in rows if row.label in CLASSES]
    found = []
    for row in rows:
        prompt = normalised(row.prompt)
        found.append(features(normalised(behind_thought(row.text)), prompt, harmfulness(prompt, of_prompts)))
    return {"prompt": of_prompts, "answer": regression(found, [float(row.label is CLASSES[1]) for row in rows])}


def regression(found: list[dict[str, float]], target: list[float]) -> dict[str, float]:
    """The weights of a logistic regression with an L2 penalty, but those that round to zero; "" is the constant."""
    counts = Counter(name for each in found for name in each)
    names = sorted(name for name, count in counts.items() if count >= FEWEST)
    index = {name: number for number, name in enumerate(names)}
    table = torch.zeros(len(found), len(names), dtype=torch.float64)
    for row, each in zip(table, found, strict=True):
        for name, value in each.items():
            if name in index:
                row[index[name]] = value
    wanted = torch.tensor(target, dtype=torch.float64)
    weight = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    constant = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, constant], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        odds = table @ weight + constant
        value = binary_cross_entropy_with_logits(odds, wanted, reduction="sum") + PENALTY * (weight**2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    rounded = {name: round(value, 2) for name, value in zip(names, weight.tolist(), strict=True)}
    return {"": round(constant.item(), 2), **{name: value for name, value in rounded.items() if value}}


def cross_validate(rows: list[Opening], show: bool) -> None:
    """Print the agreement on each source, and on all, with the weights of the others."""
    pairs: dict[str, list[tuple[AnswerClass, AnswerClass]]] = {}
    for source in sorted({row.source for row in rows}):
        weights = fitted([row for row in rows if row.source != source])
        with patch("ollama_forge.evaluation.deflections.weights", lambda weights=weights: weights):
            for row in rows:
                if row.source == source:
                    said = classify(row.text, row.prompt)
                    pairs.setdefault(source, []).append((row.label, said))
                    if show and said is not row.label:
                        print(source, row.label, said, "|", row.prompt[-70:], "|", row.text[:200].replace("\n", "\\n"))
    for source, found in {**pairs, "all": [pair for each in pairs.values() for pair in each]}.items():
        print(f"{source}: {len(found)} openings, {report(found)}")
        wrong = Counter((a.value, b.value) for a, b in found if a is not b)
        print("   ", ", ".join(f"{a} as {b} {count}" for (a, b), count in wrong.most_common()))


def report(pairs: list[tuple[AnswerClass, AnswerClass]]) -> str:
    """Kappa for four classes and for two, with intervals."""
    refusal = AnswerClass.REFUSAL
    two = [tuple(each if each is refusal else AnswerClass.ANSWER for each in pair) for pair in pairs]
    texts = []
    for name, each in (("four", pairs), ("two", two)):
        kappa = agreement([label for label, _ in each], [said for _, said in each]).kappa
        texts.append(f"{name} classes {kappa.value:.2f} ({kappa.low:.2f} to {kappa.high:.2f})")
    return "kappa " + ", ".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cross-validate", action="store_true", help="measure, and write nothing")
    parser.add_argument("--show", action="store_true", help="print each opening that is classified otherwise")
    arguments = parser.parse_args()
    rows = openings()
    if arguments.cross_validate:
        cross_validate(rows, arguments.show)
        return
    weights = fitted(rows)
    WEIGHTS_FILE.write_text(json.dumps(weights, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    print(f"{WEIGHTS_FILE}: {sum(map(len, weights.values()))} weights from {len(rows)} openings")


if __name__ == "__main__":
    main()
