"""The options that select and size the instruction lists.

What reads the lists is imported where it is needed: every command imports this module for the defaults of its options.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.prompts.split import PromptSplit

DEFAULT_PAIRS = 32
MAX_SEED = 2**31  # numpy, which Optuna draws with, takes no larger one than 2**32 - 1; workers add to it
MAX_SELECT, MAX_REPORT = 256, 512  # prompts per side; 512 give a refusal rate to within 5 percentage points


@dataclass(frozen=True)
class PromptSettings:
    """The user's lists (files or folders; default: the curated lists), the sizes of the parts, and the seed.

    Attributes:
        num_instructions: pairs in the fit part; None for the method's default (32 for a direction, 256 for least
            squares).
        max_measured: maximum number of prompts per side in the select part and in the report part; None for 256 and
            512, 0 for no limit.
    """

    harmful: str | None = None
    harmless: str | None = None
    harmful_dir: str | None = None
    harmless_dir: str | None = None
    column: str | None = None
    num_instructions: int | None = None
    max_measured: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_instructions is not None and self.num_instructions < 1:
            raise UsageError(f"--num-instructions {self.num_instructions} is less than 1", "32 is the default")
        if self.max_measured is not None and self.max_measured < 0:
            raise UsageError(f"--max-measured {self.max_measured} is less than 0", "0 means no limit")
        if not 0 <= self.seed < MAX_SEED:
            raise UsageError(f"--seed {self.seed} is not between 0 and {MAX_SEED - 1:,}", "0 is the default")
        for side in ("harmful", "harmless"):
            if getattr(self, side) and getattr(self, f"{side}_dir"):
                raise UsageError(f"both --{side} and --{side}-dir are given", "give one of them")

    def load(self, default_pairs: int) -> PromptSplit:
        """Read and split the lists. The fit part holds ``num_instructions`` pairs, by default ``default_pairs``.

        Without lists from the user, the curated pairs are used, followed by downloaded lines if the curated pairs are
        too few. If the curated lists are not installed, the downloaded lists are used alone.

        Raises:
            ForgeError: a list cannot be read, or its content does not match its file name's suffix.
            UsageError: ``column`` is given without a list; one of the user's lists has fewer than 8 distinct lines, in
                total or in the fit part; or both lists contain the same line.
        """
        from ollama_forge.prompts.curated import curated_are_installed
        from ollama_forge.prompts.language import count_not_english
        from ollama_forge.prompts.split import curated_fit_pairs, split_prompts
        from ollama_forge.prompts.upstream import cached_lists

        if self.column is not None and not self.harmful and not self.harmless:
            raise UsageError("--column is for --harmful and --harmless", "leave it out, or give a list")
        pairs = self.num_instructions or default_pairs
        has_lists = self.harmful or self.harmless or self.harmful_dir or self.harmless_dir
        curated = curated_are_installed()
        downloaded, notes = (None, ()) if has_lists or (curated and pairs <= curated_fit_pairs()) else cached_lists()
        harmful, harmless = self._side(self.harmful, self.harmful_dir), self._side(self.harmless, self.harmless_dir)
        for side, lines in (("harmful", harmful), ("harmless", harmless)):
            foreign = count_not_english(lines or ())
            if lines and 2 * foreign > len(lines):
                notes += (
                    f"{foreign:,} of your {len(lines):,} {side} lines are not English: "
                    "refusals are recognised in some languages alone (docs/refusals.md)",
                )
        if downloaded is not None and not curated:
            harmful, harmless, downloaded = list(downloaded.harmful), list(downloaded.harmless), None
            notes += ("the curated lists are not installed: only the downloaded lists are used",)
        max_select = MAX_SELECT if self.max_measured is None else self.max_measured or None
        max_report = MAX_REPORT if self.max_measured is None else self.max_measured or None
        split = split_prompts(
            harmful,
            harmless,
            num_instructions=pairs,
            note_below=self.num_instructions or DEFAULT_PAIRS,
            seed=self.seed,
            downloaded=downloaded,
            max_select=max_select,
            max_report=max_report,
        )
        split = split.with_conversations(max_select=max_select, max_report=max_report)
        return replace(split, notes=notes + split.notes)

    def _side(self, file: str | None, folder: str | None) -> list[str] | None:
        from ollama_forge.prompts.sources import read_folder, read_instructions

        if folder:
            return read_folder(Path(folder))
        return read_instructions(Path(file), self.column) if file else None
