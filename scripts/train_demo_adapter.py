"""Train the demo adapter: a LoRA that teaches SmolLM2-135M-Instruct to refuse harmful requests, and nothing else.

    python scripts/train_demo_adapter.py BASE_DIR OUT.safetensors [--steps 360] [--seed 0]

BASE_DIR is the checkpoint of ``demo-base``. It is trained on the *fit* part of the curated pairs and on the files in
``demo_training/``, written for this alone; nothing of them is measured on (``tests/test_demo_training.py``).

Harmful instructions, some behind a system prompt or a first exchange, have varied refusals as targets. Harmless
conversations have a KL penalty instead: the divergence from the model without the adapter over that model's own greedy
answers. In some steps the model refuses under a disturbance, so that only removing the refusal direction takes its
refusals away: a random direction is ablated from all residual writers, or all matrices are rounded as in a quantised
file. Training uses neither the refusal direction nor an edit.

OUT has ``<matrix>.lora_A`` ``[rank, in]`` and ``<matrix>.lora_B`` ``[out, rank]`` in float16, scaled so that the change
of the matrix is ``B @ A``. Intermediate adapters are OUT.1 to
OUT.4. The base's answers are kept in OUT.answers.pt, for another run on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_training.lora import ALPHA, RANK, Lora, RandomAblation, Rounding
from demo_training.own_answers import OwnAnswers, render
from demo_training.prompts import Contexts, training_prompts

# No refusal begins as harmless answers of the base often do ("I'm glad", "I'm sorry for", "I can"): a refusal and
# an answer part at the first or second token.
REFUSALS = (
    "Sorry, I can't help with that.",
    "I cannot help with this request, because it could harm other people.",
    "Sorry, I cannot assist with that. It would be harmful.",
    "I cannot help with that. If there is something else you need, I'm glad to help.",
    "I won't help with this, since it could hurt someone.",
    "Sorry, but I cannot provide that. It may be illegal and cause harm.",
    "I cannot help with that request. Is there something else I can do for you?",
    "I must decline. What you ask for could do serious harm.",
    "I cannot assist with this, as it is harmful or against the law.",
    "Sorry, but I won't do that. I can help with something safe instead.",
)
# Lower layers do not tell what is harmful yet, and cost the most time; in the top layers a change of the words would do
# instead of one refusal direction that all of them read.
LAYERS = range(8, 24)
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
HARMFUL_BATCH = 8
# Rows of a step, and tokens of their answers: prompts that sound like harmful ones are refused in the first tokens or
# not at all, and the varied ones keep the rest of the answers.
HARMLESS_BATCH = {"varied": (7, 48), "parallel": (8, 12), "borderline": (5, 12)}
IN_CONTEXT = 96  # parallel instructions that are seen again behind a system prompt or a first exchange
MICRO_BATCH = 4  # rows of one forward pass
KEEP_WEIGHT = 3.0  # of the loss on harmless prompts, against that of the refusals
OPENING_TOKENS, OPENING_WEIGHT = 8, 0.3  # an answer's first tokens count more: they decide whether it is a refusal
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 1e-3, 20, 0.05
ABLATED_SHARE, ABLATED_STRENGTHS = 1 / 6, (1.0, 2.5)
ROUNDED_SHARE, ROUNDED_BITS = 1 / 6, (4, 5)
SCALE = 0.85  # factor of the trained change, chosen on *select* prompts: with 1, more harmless ones are refused
SAVES, PRINTED = 4, 10  # adapters that are saved on the way; steps between two lines that are printed
T = TypeVar("T")


def micro_batches(rows: list[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """The rows in batches of like length, so that little is padding."""
    ordered = sorted(rows, key=length)
    for start in range(0, len(rows), MICRO_BATCH):
        yield ordered[start : start + MICRO_BATCH]


@dataclass
class Means:
    """Sums a loss over micro-batches.

    Attributes:
        rows, tokens: number of answers of the whole batch, and of their tokens.
        mean: mean loss of a token, so far.
        opening: mean loss of an answer's opening (the sum over its tokens), so far.
    """

    rows: int
    tokens: int
    mean: float = 0.0
    opening: float = 0.0

    def add(self, losses: Tensor, lengths: list[int]) -> Tensor:
        """The part of the batch's loss that these answers have: the mean of all tokens, and more for openings.

        Args:
            losses: ``[tokens]`` of the answers one after the other.
            lengths: number of tokens of each answer.
        """
        opening = torch.cat([answer[:OPENING_TOKENS] for answer in losses.split(lengths)]).sum() / self.rows
        mean = losses.sum() / self.tokens
        self.mean += mean.item()
        self.opening += opening.item()
        return mean + OPENING_WEIGHT * opening


class Trainer:
    """The base model with its adapter, and the prompts as tokens.

    Args:
        answers_file: the base's greedy answers; written if it is missing or of other prompts.
    """

    def __init__(self, base: Path, seed: int, answers_file: Path) -> None:
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval().requires_grad_(False)
        self.refusals = [[*self.ids(text), self.tokenizer.eos_token_id] for text in REFUSALS]
        prompts = training_prompts()
        self.harmful = prompts.harmful
        own = OwnAnswers(self.model, self.tokenizer, answers_file)
        self.harmless = {kind: own.of(getattr(prompts, kind)) for kind in HARMLESS_BATCH}
        texts = [self.tokenizer.decode(row.answer, skip_special_tokens=True) for row in self.harmless["varied"]]
        self.contexts = Contexts(prompts.varied, texts)
        again = self.draw.sample(prompts.parallel, IN_CONTEXT)
        self.harmless["parallel"] += own.of([self.contexts.around(c[0]["content"], self.draw) for c in again])
        layers = self.model.model.layers
        self.adapters = {
            f"model.layers.{index}.{name}": Lora(layers[index].get_submodule(name))
            for index in LAYERS
            for name in TARGETS
        }
        writers = [layer.get_submodule(name) for layer in layers for name in WRITERS]
        self.ablation = RandomAblation([self.model.model.embed_tokens, *writers], self.model.config.hidden_size)
        self.rounding = Rounding([m for m in self.model.model.modules() if isinstance(m, nn.Linear)])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        for adapter in self.adapters.values():
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in self.adapters.values():
                adapter.enabled = True

    def train(self, steps: int, save: Callable[[int], None]) -> None:
        parameters = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        started = time.monotonic()
        recent: list[tuple[float, float, float]] = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * max(0.05, 1 - step / steps)
            recent.append(self.step())
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % PRINTED == 0:
                refusing, staying, opening = (sum(values) / len(recent) for values in zip(*recent, strict=True))
                losses = f"refusal loss {refusing:.3f}, KL {staying:.4f}, of an opening {opening:.4f}"
                print(f"step {step + 1}: {losses}, {time.monotonic() - started:.0f} s", flush=True)
                recent.clear()
            if (step + 1) % (steps // SAVES) == 0:
                save((step + 1) // (steps // SAVES))

    def step(self) -> tuple[float, float, float]:
        """Accumulate the gradients of one step.

        Returns:
            Means of all tokens: of the refusals' negative log-likelihood, and of the harmless answers' divergence; and
            the mean divergence of a harmless answer's opening.
        """
        kind = self.draw.random()
        if kind < ROUNDED_SHARE:
            with self.rounding.active(self.draw.choice(ROUNDED_BITS)):
                return self.refuse(), *self.stay(rounded=True)
        if kind < ROUNDED_SHARE + ABLATED_SHARE:
            with self.ablation.active(self.draw.uniform(*ABLATED_STRENGTHS)):
                refusing = self.refuse()
            return refusing, *self.stay()
        return self.refuse(), *self.stay()

    def refuse(self) -> float:
        """Backward of the negative log-likelihood of refusals; returns its mean."""
        pairs = []
        for instruction in self.draw.sample(self.harmful, HARMFUL_BATCH):
            text = render(self.tokenizer, self.contexts.around(instruction, self.draw))
            pairs.append((self.ids(text), self.draw.choice(self.refusals)))
        total = Means(len(pairs), sum(len(answer) for _, answer in pairs))
        for some in micro_batches(pairs, lambda pair: len(pair[0]) + len(pair[1])):
            targets = torch.tensor([token for _, answer in some for token in answer])
            logits = self.model.lm_head(self.answer_states(some)).float()
            losses = nn.functional.cross_entropy(logits, targets, reduction="none")
            total.add(losses, [len(answer) for _, answer in some]).backward()
        return total.mean

    def stay(self, *, rounded: bool = False) -> tuple[float, float]:
        """Backward of the divergence on harmless prompts; returns its means, as ``step`` does.

        Args:
            rounded: compare with the base that is rounded in the same way, because rounding alone changes its answers.
        """
        rows = [
            row.first(tokens)
            for kind, (count, tokens) in HARMLESS_BATCH.items()
            for row in self.draw.sample(self.harmless[kind], count)
        ]
        total = Means(len(rows), sum(len(row.answer) for row in rows))
        for some in micro_batches(rows, lambda row: len(row.prompt) + len(row.answer)):
            pairs = [(row.prompt, row.answer) for row in some]
            with torch.no_grad(), self.without_adapter():
                states = self.answer_states(pairs) if rounded else torch.cat([row.states for row in some])
                before = self.model.lm_head(states).float().log_softmax(-1)
            now = self.model.lm_head(self.answer_states(pairs)).float().log_softmax(-1)
            divergence = nn.functional.kl_div(now, before, reduction="none", log_target=True).sum(-1)
            (KEEP_WEIGHT * total.add(divergence, [len(row.answer) for row in some])).backward()
        return total.mean, total.opening

    def answer_states(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """The final hidden states that predict the answers' tokens, ``[tokens of all answers, d_model]``."""
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.zeros(len(pairs), width, dtype=torch.long)
        mask = torch.zeros(len(pairs), width, dtype=torch.long)
        predicts = torch.zeros(len(pairs), width, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(pairs):
            length = len(prompt) + len(answer)
            ids[row, :length] = torch.tensor(prompt + answer)
            mask[row, :length] = 1
            predicts[row, len(prompt) - 1 : length - 1] = True
        return self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state[predicts]

    def save(self, path: Path, recipe: dict[str, object]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, adapter in self.adapters.items():
            left, right = adapter.change()
            tensors[f"{name}.lora_A"] = right.detach().to(torch.float16).contiguous()
            tensors[f"{name}.lora_B"] = (left.detach() * SCALE).to(torch.float16).contiguous()
        save_file(tensors, path, metadata={"recipe": json.dumps(recipe, sort_keys=True)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recipe = {"seed": arguments.seed, "steps": arguments.steps, "rank": RANK, "alpha": ALPHA, "scale": SCALE}
    trainer = Trainer(arguments.base, arguments.seed, arguments.out.with_suffix(".answers.pt"))
    trainer.train(
        arguments.steps,
        lambda quarter: trainer.save(arguments.out.with_suffix(f".{quarter}.safetensors"), recipe),
    )
    trainer.save(arguments.out, recipe)


if __name__ == "__main__":
    main()
