"""``--out-dtype``: the storage type of each tensor of the edited checkpoint. Imports no torch: ``--help`` reads it."""

from __future__ import annotations

from enum import StrEnum

from ollama_forge.errors import UsageError

FLOAT_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # as config.json writes them
UNPACKED = "BF16"  # what a packed tensor is decoded to


class OutDtype(StrEnum):
    """The rules. A packed tensor is one whose values share a scale by blocks (MXFP4; a GGUF file's types).

    A GGUF source is decoded to bf16 before anything else reads it, so its packed tensors are bf16 under every rule.
    """

    AUTO = "auto"
    KEEP = "keep"
    BF16 = "bf16"

    @classmethod
    def parse(cls, name: str) -> OutDtype:
        """The rule of that name.

        Raises:
            UsageError: there is no such rule.
        """
        try:
            return cls(name)
        except ValueError:
            raise UsageError(f"unknown --out-dtype {name!r}", f"one of {', '.join(cls)}") from None

    @property
    def keeps_packed(self) -> bool:
        """Whether packed tensors stay packed where none of their kind is edited."""
        return self is OutDtype.KEEP

    def storage_type(self, source: str) -> str:
        """The storage type written for a tensor that is stored plainly (not packed) as ``source``."""
        return "BF16" if self is OutDtype.BF16 and source in FLOAT_NAMES else source


HELP = (
    "auto: float tensors keep their own type, packed ones (GGUF, MXFP4) become bf16. "
    "keep: packed tensors that are not edited stay packed too. bf16: all floats become bf16."
)
