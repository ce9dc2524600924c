"""``--out-dtype``: the storage type of each tensor of the edited checkpoint. Imports no torch, for ``--help``."""

from __future__ import annotations

from enum import StrEnum

from ollama_forge.errors import UsageError

FLOAT_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors -> config.json
UNPACKED = "BF16"  # the type that a packed tensor is decoded to


class OutDtype(StrEnum):
    """The rules for storage types. A packed tensor stores groups of values with a shared scale (FP8, MXFP4, GGUF).

    A GGUF source is decoded to bf16 before it is edited, so that its tensors are bf16 under every rule.
    """

    AUTO = "auto"
    KEEP = "keep"
    BF16 = "bf16"

    @classmethod
    def parse(cls, name: str) -> OutDtype:
        """The rule with this name.

        Raises:
            UsageError: the name is unknown.
        """
        try:
            return cls(name)
        except ValueError:
            raise UsageError(f"unknown --out-dtype {name!r}", f"one of {', '.join(cls)}") from None

    @property
    def keeps_packed(self) -> bool:
        """Whether packed tensors stay packed, if the edit changes none that is of a form that is only read."""
        return self is OutDtype.KEEP

    def storage_type(self, source: str) -> str:
        """The output storage type of a tensor that is not packed and has the storage type ``source``."""
        return "BF16" if self is OutDtype.BF16 and source in FLOAT_NAMES else source


HELP = (
    "auto: float tensors keep their type, packed tensors (GGUF, FP8, MXFP4, 4 bits) become bf16. "
    "keep: like auto, but FP8 and MXFP4 tensors keep their form, and other packed tensors if none of them is edited. "
    "bf16: all float tensors and packed tensors become bf16."
)
