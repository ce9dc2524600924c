"""What the report shows beside the measurements: categories, separation, change per layer, and the card's table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ollama_forge.activations.residual import gather_residuals
from ollama_forge.directions.selection import d_prime
from ollama_forge.directions.separation import measure_separation
from ollama_forge.edits.card_table import measurement_lines
from ollama_forge.edits.edit_file import read_header
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.categories import by_category
from ollama_forge.evaluation.counts import Counts
from ollama_forge.files import read_json
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.thoughts import append_thoughts
from ollama_forge.pipeline import run
from ollama_forge.prompts.curated import curated_pairs
from ollama_forge.prompts.settings import PromptSettings
from ollama_forge.reporting.entry import Entry
from ollama_forge.reporting.in_ollama import in_ollama
from tests import made_report, planted
from tests.test_run import settings


def test_answers_are_divided_by_the_category_of_their_prompt() -> None:
    pairs = curated_pairs()
    first, other = pairs[0], next(pair for pair in pairs if pair.category != pairs[0].category)
    prompts = [first.harmful, "a line of the user", other.harmful, first.harmful.upper()]
    found = by_category(prompts, {"base": Counts("rrra"), "file": Counts("ad")})
    assert found[first.category] == {"base": Counts("ra"), "file": Counts("a")}
    assert found[other.category] == {"base": Counts("r"), "file": Counts("")}
    assert len(found) == 2


def test_separation_is_d_prime_of_held_out_prompts_at_each_layer_and_position(tmp_path: Path) -> None:
    checkpoint = planted.save(tmp_path / "model", planted_layer=2)
    harmful, harmless = planted.write_lists(tmp_path)
    split = PromptSettings(harmful=str(harmful), harmless=str(harmless)).load(32)
    model = ChatModel.load(checkpoint, LoadSettings(device="cpu", dtype="float32", batch_size=5))
    found = measure_separation(model, split.fit, split.select)
    assert found.layers == tuple(range(planted.LAYERS))
    assert found.positions == (-5, -4, -3, -2, -1)
    assert found.tokens == ("", "", "", "<end>", "<assistant>")
    best = [max(row) for row in found.d_prime]
    assert best[-1] > 5  # the planted direction is at the last position
    assert found.d_prime[-1][2] > found.d_prime[-1][1] + 3  # from the planted layer on
    fit, held_out = split.fit.first(32), split.select.first(64)
    lists = (fit.harmful, fit.harmless, held_out.harmful, held_out.harmless)
    ids = [append_thoughts(model, model.tokenizer.instructions_ids(prompts)) for prompts in lists]
    values = [gather_residuals(model, side, [2], position=-2, keep_samples=True) for side in ids]
    vector = (values[0].mean - values[1].mean)[0]
    projected = [side.samples[:, 0].double() @ vector for side in values[2:] if side.samples is not None]
    assert found.d_prime[-2][2] == pytest.approx(d_prime(*projected), rel=1e-3, abs=1e-3)


def test_separation_of_a_thinking_model_is_measured_at_the_thought_too(tmp_path: Path) -> None:
    checkpoint = planted.save_model(planted.build(2), tmp_path / "model", thinks=True)
    harmful, harmless = planted.write_lists(tmp_path)
    split = PromptSettings(harmful=str(harmful), harmless=str(harmless)).load(32)
    model = ChatModel.load(checkpoint, LoadSettings(device="cpu", dtype="float32"))
    found = measure_separation(model, split.fit, split.select)
    assert found.tokens[-2:] == (planted.OPENING, planted.CLOSING)
    assert found.at_thought[2] > found.at_thought[1] + 3  # from the planted layer on, as at the answer
    assert found.at_thought[2] == pytest.approx(found.d_prime[-2][2], rel=0.05)  # the same token, with the same past


def test_a_run_reports_what_the_page_shows(tmp_path: Path) -> None:
    made = run(settings(tmp_path))
    content = read_json(made.folder / "report.json")
    changes = {(entry["layer"], entry["role"]): entry["change"] for entry in content["layer_changes"]}
    changed = read_json(made.folder / "checkpoint" / "abliteration.json")["changed"]
    name = "model.layers.2.self_attn.o_proj.weight"
    assert changes[2, "o"] == pytest.approx(changed[name]["relative_change"], abs=2e-6)
    assert len(changes) == len(changed)
    assert content["machine"]["dtype"] == "float32"
    assert content["settings"]["prompts"]["harmful"] == "harmful.txt"
    assert str(tmp_path) not in json.dumps(content["settings"])
    assert content["separation"]["layers"] == list(range(planted.LAYERS))
    page = (made.folder / "report.html").read_text(encoding="utf-8")
    assert "makes the model refuse less" in page
    card = (made.folder / "checkpoint" / "README.md").read_text(encoding="utf-8")
    harmful = made.rows["edited"].harmful
    assert f"| edited | {harmful.refusal}/{harmful.total} (0% to" in card
    assert "base rounded to 8 bits" in card
    with pytest.raises(ForgeError, match="is not an edit file"):
        read_header(made.folder / "checkpoint" / "model.safetensors")


def test_the_card_quotes_the_measurements() -> None:
    content = made_report.made().to_json()
    lines = measurement_lines(content["measurements"], content["noise_floor"])
    edited = next(line for line in lines if line.startswith("| edited"))
    assert edited == (
        "| edited | 3/151 (1% to 6%) | 6/150 (2% to 8%) | 2/151 (0% to 5%) | 2/283 "
        "| 0.018 (0.015 to 0.023) | 0.030 (0.020 to 0.043) |"
    )
    assert any("the same edit with a random direction" in line for line in lines)
    assert not any("random" in line for line in measurement_lines({"base": content["measurements"]["base"]}, None))


def test_prompts_in_ollama_are_told_with_their_first_difference() -> None:
    difference = {"conversation": "two turns", "expected": "<a> one", "found": "<a> two"}
    prompts = {"owner": "the checkpoint", "compared": 7, "equal": 6, "with_tools": True, "difference": difference}
    made = {"prompts": {**prompts, "problem": ""}, "notes": ["a note"], "differences": []}
    page = in_ollama(Entry({"ollama": {"made": made}}))
    assert page is not None
    text = re.sub(r"<[^>]+>", "", page)
    assert "the chat template of the checkpoint in 6 of 7 conversations, one of them with a tool." in text
    assert "&lt;a&gt; one" in page
    assert "&lt;a&gt; two" in page
    assert "a note" in page
    silent = {**made, "prompts": {**prompts, "compared": 0, "problem": "no"}, "notes": []}
    told = in_ollama(Entry({"ollama": {"made": silent}})) or ""
    assert "Its prompts were not compared: no." in re.sub(r"<[^>]+>", "", told)
    assert in_ollama(Entry({"ollama": {"made": None}})) is None
    assert in_ollama(Entry({})) is None
