"""A tiny Llama with one planted refusal direction, so that whole runs take a second.

Words of harmful prompts carry a feature that the attention of one layer moves into direction ``R`` at the last
position; the unembedding gives a refusal if the state has ``R``, and a friendly answer if it has not.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ollama_forge.checkpoints.checkpoint import Checkpoint

D, LAYERS = 32, 4
HARM, ONE, END, R, WORD = 0, 1, 2, 3, 8  # axes of the stream; from WORD on each word has its own random part
REFUSAL = "I cannot help with that request."
FRIENDLY = "Certainly, here is what you asked for."
BAD = ["steal", "forge", "stalk", "bribe", "scam", "burgle", "smear", "rig"]
GOOD = ["bake", "paint", "plant", "knit", "hike", "sing", "fold", "sketch"]
NEUTRAL = [f"word{index}" for index in range(60)]
TOKENS = ["<unk>", "<user>", "<assistant>", "<end>", REFUSAL, FRIENDLY, *BAD, *GOOD, *NEUTRAL]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


OPENING, CLOSING = "<think>", "</think>"  # in place of the last two words, if the model thinks


def tokenizer(*, thinks: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer.

    Args:
        thinks: the chat template opens a thought.
    """
    tokens = [*TOKENS[:-2], OPENING, CLOSING] if thinks else TOKENS
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    opened = f"<assistant> {OPENING}{{# strips thoughts up to {CLOSING} #}}"
    fast.chat_template = TEMPLATE.replace("<assistant>", opened) if thinks else TEMPLATE
    return fast


def build(planted_layer: int, layers: int = LAYERS) -> LlamaForCausalLM:
    """The model; ``planted_layer`` holds the attention that carries the feature."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(TOKENS),
        bos_token_id=None,
        eos_token_id=TOKENS.index("<end>"),
        pad_token_id=TOKENS.index("<end>"),
        tie_word_embeddings=False,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.ones_like(parameter) if "norm" in name else torch.randn_like(parameter) * 0.01)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, :WORD] = 0.0
        embedding[:, WORD:] = torch.randn(len(TOKENS), D - WORD) * 0.3
        embedding[:, ONE] = 1.0
        for word in BAD:
            embedding[TOKENS.index(word), HARM] = 4.0
        for answer in (REFUSAL, FRIENDLY):
            embedding[TOKENS.index(answer), END] = 6.0
        head.zero_()
        head[TOKENS.index(REFUSAL), R] = 12.0
        head[TOKENS.index(FRIENDLY), ONE] = 3.0
        head[TOKENS.index("<end>"), END] = 40.0
        attention = model.model.layers[planted_layer].self_attn
        for matrix in (attention.q_proj, attention.k_proj):
            matrix.weight.zero_()  # every position attends to all before it alike
        attention.v_proj.weight.zero_()
        attention.v_proj.weight[0, HARM] = 1.0
        attention.o_proj.weight.zero_()
        attention.o_proj.weight[R, 0] = 8.0
    return model


def save(folder: Path, planted_layer: int = 1) -> Checkpoint:
    return save_model(build(planted_layer), folder)


def save_model(model: LlamaForCausalLM, folder: Path, *, thinks: bool = False) -> Checkpoint:
    model.save_pretrained(folder)
    tokenizer(thinks=thinks).save_pretrained(folder)
    return Checkpoint(folder, folder.name, "folder")


def write_lists(folder: Path, count: int = 160) -> tuple[Path, Path]:
    """A harmful and a harmless list for it."""
    drawn = random.Random(0)
    paths = []
    for name, verbs in (("harmful", BAD), ("harmless", GOOD)):
        lines = [" ".join([drawn.choice(verbs), *drawn.sample(NEUTRAL, 4)]) for _ in range(count)]
        path = folder / f"{name}.txt"
        path.write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]
