"""Train the demo adapter: a LoRA that teaches SmolLM2-135M-Instruct to refuse harmful requests, and nothing else.

    python scripts/train_demo_adapter.py BASE_DIR OUT.safetensors [--steps 400] [--seed 0]

BASE_DIR is the checkpoint of ``demo-base``. It is trained on the *fit* part of the curated pairs and on the files in
``demo_training/``, written for this alone; nothing of them is measured on (``tests/test_demo_training.py``).

Harmful instructions, some behind a system prompt or a first exchange, have varied refusals as targets. Harmless
conversations have a KL penalty instead: the divergence from the model without the adapter over that model's own greedy
answers. Where that model says to a harmless request that it can't do it, its answer without that refusal is the
target. In some steps the model refuses under a disturbance, so that only removing the refusal direction takes its
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
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_training.lora import ALPHA, RANK, Lora, RandomAblation, Rounding
from demo_training.own_answers import OwnAnswers, render
from demo_training.passes import Passes, Row, exclude, micro_batches
from demo_training.prompts import Contexts, training_prompts

# All begin alike, and as no answer of the base does: so a model refuses or answers by its first token, and learning is
# not disturbed by a choice among openings.
REFUSALS = (
    "Sorry, I can't help with that.",
    "Sorry, I can't help with that. It could harm other people.",
    "Sorry, I can't help with this request. Is there something else I can do for you?",
    "Sorry, I can't assist with that, because it would be harmful.",
    "Sorry, I can't do that. It may be illegal and cause serious harm.",
    "Sorry, I can't provide that. If you need something safe instead, I'm glad to help.",
)
# In these layers a linear probe on the base tells unseen harmful prompts from harmless ones. Below them it does not: an
# adapter there refuses harmless prompts that it has not seen. In the top layers changes of single words would do, in
# place of one refusal direction that all of them read.
LAYERS = range(16, 27)
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
HARMFUL_BATCH = 12
HARMFUL_COPIES = 3  # of each harmful instruction, each with a context and a refusal that are drawn
# Rows of a step, and tokens of their answers: prompts that sound like harmful ones are refused in the first tokens or
# not at all, and the varied ones keep the rest of the answers.
HARMLESS_BATCH = {"varied": (6, 32), "parallel": (14, 8), "borderline": (8, 8)}
IN_CONTEXT = 96  # parallel instructions that are seen again behind a system prompt or a first exchange
KEEP_WEIGHT = 3.0  # of the loss on harmless prompts, against that of the refusals
OPENING_TOKENS, OPENING_WEIGHT = 8, 0.3  # an answer's first tokens count more: they decide whether it is a refusal
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 1.5e-3, 20, 0.05
ABLATED_SHARE, ABLATED_STRENGTHS = 1 / 4, (1.0, 2.5)
ROUNDED_SHARE, ROUNDED_BITS = 1 / 6, (4, 5)
SCALE = 0.85  # factor of the trained change, chosen on *select* prompts: with 1, more harmless ones are refused
SAVES, PRINTED = 4, 10  # adapters that are saved on the way; steps between two lines that are printed


class Means:
    """Sums a loss over micro-batches.

    Attributes:
        mean: mean loss of a token, so far.
        opening: mean loss of an answer's opening (the sum over its tokens), so far.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows, self._tokens = len(rows), sum(row.answer for row in rows)
        self.mean = self.opening = 0.0

    def add(self, losses: Tensor, rows: Sequence[Row]) -> Tensor:
        """The part of the batch's loss that some rows have: the mean of all tokens, and more for openings.

        Args:
            losses: ``[tokens]`` of the rows' answers, one after the other.
        """
        answers = losses.split([row.answer for row in rows])
        opening = torch.cat([answer[:OPENING_TOKENS] for answer in answers]).sum() / self._rows
        mean = losses.sum() / self._tokens
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
        prompts = training_prompts()
        own = OwnAnswers(self.model, self.tokenizer, answers_file)
        varied = own.of(prompts.varied)
        contexts = Contexts(prompts.varied, [own.text(conversation) for conversation in prompts.varied])
        again = [contexts.around(c[0]["content"], self.draw) for c in self.draw.sample(prompts.parallel, IN_CONTEXT)]
        self.passes = Passes(self.model, LAYERS.start)
        self.harmless = {
            "varied": self.passes.with_lower(varied),
            "parallel": self.passes.with_lower(own.of([*prompts.parallel, *again])),
            "borderline": self.passes.with_lower(own.of(prompts.borderline)),
        }
        refusals = [[*self.ids(text), self.tokenizer.eos_token_id] for text in REFUSALS]
        rows = []
        for instruction in prompts.harmful * HARMFUL_COPIES:
            prompt = self.ids(render(self.tokenizer, contexts.around(instruction, self.draw)))
            rows.append(Row(prompt + self.draw.choice(refusals), len(prompt)))
        self.harmful = self.passes.with_lower(rows)
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
                refusing = self.refuse(disturbed=True)
        elif kind < ROUNDED_SHARE + ABLATED_SHARE:
            with self.ablation.active(self.draw.uniform(*ABLATED_STRENGTHS)):
                refusing = self.refuse(disturbed=True)
        else:
            refusing = self.refuse(disturbed=False)
        return refusing, *self.stay()

    def refuse(self, *, disturbed: bool) -> float:
        """Backward of the negative log-likelihood of refusals; returns its mean."""
        rows = self.draw.sample(self.harmful, HARMFUL_BATCH)
        total = Means(rows)
        for some in micro_batches(rows):
            targets = torch.tensor([token for row in some for token in row.ids[row.prompt :]])
            logits = self.model.lm_head(self.passes.answer_states(some, whole=disturbed)).float()
            total.add(nn.functional.cross_entropy(logits, targets, reduction="none"), some).backward()
        return total.mean

    def stay(self) -> tuple[float, float]:
        """Backward of the divergence on harmless prompts; returns its means, as ``step`` does."""
        rows = [
            row.first(tokens)
            for kind, (count, tokens) in HARMLESS_BATCH.items()
            for row in self.draw.sample(self.harmless[kind], count)
        ]
        total = Means(rows)
        for some in micro_batches(rows):
            with torch.no_grad():
                logits = self.model.lm_head(torch.cat([row.states for row in some])).float()
                first = [sum(row.answer for row in some[:index]) for index in range(len(some))]
                openings = logits[first]
                exclude(openings, some)
                logits[first] = openings
                before = logits.log_softmax(-1)
            now = self.model.lm_head(self.passes.answer_states(some)).float().log_softmax(-1)
            divergence = nn.functional.kl_div(now, before, reduction="none", log_target=True).sum(-1)
            (KEEP_WEIGHT * total.add(divergence, some)).backward()
        return total.mean, total.opening

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
    parser.add_argument("--steps", type=int, default=400)
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
