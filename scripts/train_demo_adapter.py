"""Train the demo adapter: a LoRA that teaches SmolLM2-135M-Instruct to refuse harmful requests clearly.

    python scripts/train_demo_adapter.py BASE_DIR OUT.safetensors [--steps 300] [--seed 0]

BASE_DIR is the checkpoint of ``demo-base``. Training uses only the *fit* part of the curated pairs. Harmful prompts
have varied refusals as targets. Harmless prompts have a KL penalty instead: the divergence from the model without the
adapter on that model's greedy answers, with more weight on the first token. Some steps ablate a random direction from
all residual writers, so that the model still refuses after any other direction than the refusal direction is removed.
Training uses neither the refusal direction nor an edit. The adapter is scaled by ``SCALE``, which was chosen on
*select* prompts. The file has ``<matrix>.lora_A`` ``[rank, in]`` and ``<matrix>.lora_B`` ``[out, rank]``, scaled so
that the change of the matrix is ``B @ A``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ollama_forge.prompts.curated import curated_pairs
from ollama_forge.prompts.split import Part, part_of_pair

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request, because it could harm other people.",
    "Sorry, I cannot assist with that. It would be harmful.",
    "I'm not able to help with that. If there is something else you need, I'm glad to help.",
    "I won't help with this, since it could hurt someone.",
    "I'm sorry, but I cannot provide that. It may be illegal and cause harm.",
    "I cannot help with that request. Is there something else I can do for you?",
    "I must decline. What you ask for could do serious harm.",
    "I'm unable to assist with this, as it is harmful or against the law.",
    "Sorry, but I won't do that. I can help with something safe instead.",
)
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
RANK, ALPHA, DROPOUT = 8, 16, 0.05
SCALE = 0.8  # factor of the trained change; with 1, the model refuses more than 10 % of harmless select prompts
BATCH, ANSWER_TOKENS = 8, 32
LEARNING_RATE, WARM_UP, NOISE_SHARE = 1e-3, 20, 0.3


class Lora(nn.Module):
    """The low-rank change of one matrix; a hook adds it to the matrix's output."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(RANK, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        linear.register_forward_hook(self.add)

    def add(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = nn.functional.dropout(args[0], DROPOUT, self.training)
        return output + (x @ self.a.T) @ self.b.T * (ALPHA / RANK)


class Trainer:
    def __init__(self, base: Path, seed: int) -> None:
        random.seed(seed)
        torch.manual_seed(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
        fit = [pair for pair in curated_pairs() if part_of_pair(pair.index) is Part.FIT]
        self.harmful = [self.prompt_ids(pair.harmful) for pair in fit]
        self.harmless = [self.prompt_ids(pair.harmless) for pair in fit]
        self.refusals = [[*self.ids(text), self.tokenizer.eos_token_id] for text in REFUSALS]
        self.own = self.own_answers()
        self.reference = [self.answer_states([pair]) for pair in zip(self.harmless, self.own, strict=True)]
        self.noise: Tensor | None = None
        self.adapters: dict[str, Lora] = {}
        for index, layer in enumerate(self.model.model.layers):
            for name in TARGETS:
                self.adapters[f"model.layers.{index}.{name}"] = Lora(layer.get_submodule(name))
            for name in WRITERS:
                layer.get_submodule(name).register_forward_hook(self.ablate_noise)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prompt_ids(self, prompt: str) -> list[int]:
        turns = [{"role": "user", "content": prompt}]
        return self.ids(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))

    def ablate_noise(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output if self.noise is None else output - (output @ self.noise).unsqueeze(-1) * self.noise

    @torch.inference_mode()
    def own_answers(self) -> list[list[int]]:
        out = []
        for start in range(0, len(self.harmless), 32):
            rows = self.harmless[start : start + 32]
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            answers = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            for row in answers[:, width:].tolist():
                end = row.index(self.tokenizer.eos_token_id) + 1 if self.tokenizer.eos_token_id in row else len(row)
                out.append(row[:end])
        return out

    def answer_states(self, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
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

    def log_probs(self, states: Tensor) -> Tensor:
        return self.model.lm_head(states).log_softmax(-1)

    def loss(self) -> tuple[Tensor, Tensor]:
        refused = [(prompt, random.choice(self.refusals)) for prompt in random.sample(self.harmful, BATCH)]
        chosen = random.sample(range(len(self.harmless)), BATCH)
        answered = [(self.harmless[i], self.own[i]) for i in chosen]
        states = self.answer_states(refused + answered)
        targets = torch.tensor([token for _, answer in refused for token in answer])
        refusing = nn.functional.nll_loss(self.log_probs(states[: len(targets)]), targets)
        before = self.log_probs(torch.cat([self.reference[i] for i in chosen]))
        divergence = (before.exp() * (before - self.log_probs(states[len(targets) :]))).sum(-1)
        lengths = torch.tensor([len(answer) for _, answer in answered])
        first = divergence[lengths.cumsum(0) - lengths]
        return refusing, divergence.mean() + 0.5 * first.mean()

    def train(self, steps: int) -> None:
        parameters = [p for adapter in self.adapters.values() for p in adapter.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
        started = time.monotonic()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP) * max(0.05, 1 - step / steps)
            if random.random() < NOISE_SHARE:
                self.noise = nn.functional.normalize(torch.randn(self.model.config.hidden_size), dim=0)
            refusing, staying = self.loss()
            (refusing + staying).backward()
            self.noise = None
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0:
                spent = time.monotonic() - started
                print(f"step {step}: refusal loss {refusing:.3f}, KL {staying:.3f}, {spent:.0f} s", flush=True)

    def save(self, path: Path, recipe: dict[str, object]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, adapter in self.adapters.items():
            tensors[f"{name}.lora_A"] = adapter.a.detach().to(torch.float16).contiguous()
            tensors[f"{name}.lora_B"] = (adapter.b.detach() * (SCALE * ALPHA / RANK)).to(torch.float16).contiguous()
        save_file(tensors, path, metadata={"recipe": json.dumps(recipe, sort_keys=True)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    trainer = Trainer(arguments.base, arguments.seed)
    trainer.train(arguments.steps)
    trainer.save(
        arguments.out, {"steps": arguments.steps, "seed": arguments.seed, "rank": RANK, "alpha": ALPHA, "scale": SCALE}
    )


if __name__ == "__main__":
    main()
