"""The ``options`` of requests to Ollama's API."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)

from ollama_forge.serving.engine.base import SamplingParams
from ollama_forge.serving.parameters import sampling_of, usable
from ollama_forge.serving.requests import BadRequest

_INT64 = (1 << 63) - 1
_LARGEST = 3.4e38


def _option_error(info: ValidationInfo, kind: str) -> BadRequest:
    return BadRequest(f'option "{info.field_name}" must be of type {kind}', 500)


def _option_integer(value: Any, info: ValidationInfo) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _option_error(info, "integer")
    return max(-_INT64, min(int(value), _INT64))


def _option_number(value: Any, info: ValidationInfo) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _option_error(info, "float32")
    return float(max(-_LARGEST, min(value, _LARGEST)))


def _in_range(value: int, info: ValidationInfo) -> Any:
    name = str(info.field_name)
    return usable({name: value})[name]


def _option_flag(value: Any, info: ValidationInfo) -> bool:
    if not isinstance(value, bool):
        raise _option_error(info, "boolean")
    return value


def _option_texts(value: Any, info: ValidationInfo) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _option_error(info, "array")
    if not all(isinstance(text, str) for text in value):
        raise BadRequest(f'option "{info.field_name}" must be of an array of strings', 500)
    return tuple(text for text in value if text)


_Integer = Annotated[int, BeforeValidator(_option_integer)]
_Number = Annotated[float, BeforeValidator(_option_number)]
_Limit = Annotated[_Integer, AfterValidator(_in_range)]
_Flag = Annotated[bool, BeforeValidator(_option_flag)]
_StopTexts = Annotated[
    tuple[str, ...],
    BeforeValidator(_option_texts),
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
]


class Options(BaseModel):
    """The options of a request. A number outside its range becomes the nearest in it.

    Unknown names and null are ignored. A value of the wrong type gives status 500.
    """

    model_config = ConfigDict(frozen=True)

    num_predict: _Limit = -1
    num_ctx: _Limit | None = None
    stop: _StopTexts = ()
    seed: _Integer | None = None
    temperature: _Number = 0.8
    top_k: _Integer = 40
    top_p: _Number = 0.9
    min_p: _Number = 0.0
    typical_p: _Number = 1.0
    repeat_penalty: _Number = 1.0
    repeat_last_n: _Integer = 64
    presence_penalty: _Number = 0.0
    frequency_penalty: _Number = 0.0
    abliteration_strength: _Number | None = None  # Ollama has no such option; see docs/serving.md
    # Settings of Ollama's runner have no effect here; a value of the wrong type is rejected as Ollama does.
    num_keep: _Integer | None = None
    num_batch: _Integer | None = None
    num_gpu: _Integer | None = None
    main_gpu: _Integer | None = None
    num_thread: _Integer | None = None
    use_mmap: _Flag | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Options:
        """Read the options.

        Raises:
            BadRequest: a value has the wrong type (status 500).
        """
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise error.errors()[0]["ctx"]["error"] from None

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(**sampling_of(usable(self.model_dump(exclude_none=True))))
