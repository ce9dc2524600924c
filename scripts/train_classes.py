"""Fit the weights of ``evaluation/likeness.py`` to labelled openings, and measure the classifier.

    python scripts/train_classes.py                    # fit and write the weights
    python scripts/train_classes.py --cross-validate   # leave one part out; writes nothing
    python scripts/train_classes.py --cross-validate --by source

Two regressions with an L2 penalty: of prompts, whether models decline them, and of answers, which class they are.
In cross-validation, the weights for a part (a fifth of the prompts, or a source of openings) are fitted to the other
parts; the rules and the lists of words are the same throughout, so only the weights are cross-validated.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.functional import cross_entropy

from measure_agreement import is_held_out
from ollama_forge.evaluation.agreement import agreement
from ollama_forge.evaluation.likeness import CLASSES, WEIGHTS_FILE, all_features, harmfulness, prompt_features
from ollama_forge.evaluation.refusals import AnswerClass, behind_thought, classify, normalised
from ollama_forge.prompts.conversation import messages_of
from ollama_forge.prompts.settings import PromptSettings

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
FILES = ("fresh", "training", "varied", "models")  # of the last, the half that may be looked at
FEWEST = 2  # openings that a feature must occur in
PENALTY = 2.0
PROMPT_PENALTY = 1.0
LEAST = 0.02  # smaller weights are left out
PARTS = 5


@dataclass(frozen=True)
class Opening:
    prompt: str
    text: str
    label: AnswerClass
    source: str

    @property
    def part(self) -> str:
        """A fifth of all prompts, by hash."""
        return str(sha256(self.prompt.encode()).digest()[0] % PARTS)


def openings() -> list[Opening]:
    """All labelled openings with prompts that may be looked at."""
    found = []
    for name in FILES:
        for line in (DATA / f"labelled_openings_{name}.jsonl").read_text(encoding="utf-8").split("\n"):
            row = json.loads(line) if line else None
            if row is None or (name == "models" and is_held_out(row)):
                continue
            source = row["source"] if name == "training" else name
            if name == "models":
                source = "models, real" if row["source"] in ("demo", "demo-base", "edit") else "models, written"
            found.append(Opening(row["prompt"], row["text"], AnswerClass(row["label"]), source))
    return found


def fitted(rows: list[Opening]) -> dict[str, dict[str, object]]:
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
    of_two = regression(found, [int(text in declined) for text in texts], 2, PROMPT_PENALTY)
    of_prompts = {name: round(after - before, 2) for name, (before, after) in of_two.items()}
    found = []
    for row in rows:
        text, prompt = behind_thought(row.text), normalised(row.prompt)
        found.append(all_features(text, normalised(text), prompt, harmfulness(prompt, of_prompts)))
    of_answers = regression(found, [CLASSES.index(row.label) for row in rows], len(CLASSES), PENALTY)
    return {"prompt": of_prompts, "answer": of_answers}


def regression(
    found: Sequence[dict[str, float]], target: Sequence[int], classes: int, penalty: float
) -> dict[str, list[float]]:
    """The weights of a softmax regression with an L2 penalty, but those that are nearly zero; "" is the constant.

    The openings are fewer than the features, so it is fitted in the space that they span, which gives the same weights.
    """
    counts = Counter(name for each in found for name in each)
    names = sorted(name for name, count in counts.items() if count >= FEWEST)
    index = {name: number for number, name in enumerate(names)}
    table = torch.zeros(len(found), len(names), dtype=torch.float64)
    for row, each in zip(table, found, strict=True):
        for name, value in each.items():
            if name in index:
                row[index[name]] = value
    values, vectors = torch.linalg.eigh(table @ table.T)
    kept = values > 1e-9 * values.max()
    values, vectors = values[kept], vectors[:, kept]
    spanned = vectors * values.sqrt()
    wanted = torch.tensor(target)
    weight = torch.zeros(len(values), classes, dtype=torch.float64, requires_grad=True)
    constant = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, constant], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = cross_entropy(spanned @ weight + constant, wanted, reduction="sum") + penalty * (weight**2).sum()
        value.backward()
        return value

    optimiser.step(loss)
    weights = table.T @ (vectors / values.sqrt()) @ weight.detach()
    rows = {name: [round(value, 2) for value in each] for name, each in zip(names, weights.tolist(), strict=True)}
    kept_rows = {name: each for name, each in rows.items() if max(map(abs, each)) >= LEAST}
    return {"": [round(value, 2) for value in constant.tolist()], **kept_rows}


def cross_validate(rows: list[Opening], by: str, show: bool) -> None:
    """Print the agreement on each source, and on all, with the weights of the other parts."""
    pairs: dict[str, list[tuple[AnswerClass, AnswerClass]]] = {}
    for part in sorted({getattr(row, by) for row in rows}):
        found = fitted([row for row in rows if getattr(row, by) != part])
        with patch("ollama_forge.evaluation.likeness.weights", lambda found=found: (found["prompt"], found["answer"])):
            for row in rows:
                if getattr(row, by) == part:
                    said = classify(row.text, row.prompt)
                    pairs.setdefault(row.source, []).append((row.label, said))
                    if show and said is not row.label:
                        text = behind_thought(row.text)[:200].replace("\n", "\\n")
                        print(row.source, row.label, said, "|", row.prompt[-70:], "|", text)
    for source, each in {**pairs, "all": [pair for some in pairs.values() for pair in some]}.items():
        print(f"| {source} | {len(each):,} | {' | '.join(kappas(each))} |")
        wrong = Counter((a.value, b.value) for a, b in each if a is not b)
        print("   ", ", ".join(f"{a} as {b} {count}" for (a, b), count in wrong.most_common()), flush=True)


def kappas(pairs: list[tuple[AnswerClass, AnswerClass]]) -> list[str]:
    """Kappa of four classes, and of refusal or not, with intervals."""
    refusal = AnswerClass.REFUSAL
    two = [tuple(each if each is refusal else AnswerClass.ANSWER for each in pair) for pair in pairs]
    found = (agreement([label for label, _ in each], [said for _, said in each]).kappa for each in (pairs, two))
    return [f"{kappa.value:.2f} ({kappa.low:.2f} to {kappa.high:.2f})" for kappa in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cross-validate", action="store_true", help="measure, and write nothing")
    parser.add_argument("--by", choices=("part", "source"), default="part", help="what is left out at a time")
    parser.add_argument("--show", action="store_true", help="print each opening that is classified otherwise")
    arguments = parser.parse_args()
    rows = openings()
    if arguments.cross_validate:
        cross_validate(rows, arguments.by, arguments.show)
        return
    weights = fitted(rows)
    lines = [f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(row)}" for name, row in weights["answer"].items()]
    answer = ",\n".join(lines)
    prompt = json.dumps(weights["prompt"], ensure_ascii=False, indent=0)
    WEIGHTS_FILE.write_text(f'{{"prompt": {prompt},\n"answer": {{\n{answer}\n}}}}\n', encoding="utf-8")
    print(f"{WEIGHTS_FILE}: {sum(map(len, weights.values()))} features from {len(rows)} openings")


if __name__ == "__main__":
    main()
