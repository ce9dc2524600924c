"""The tool call formats of model families, a row each; the most specific stand first."""

from __future__ import annotations

from functools import partial

from ollama_forge.serving.tools import readers
from ollama_forge.serving.tools.base import ToolFamily
from ollama_forge.serving.tools.payloads import gemma_call, xml_call

_TOOL_CALL = ("<tool_call>", "</tool_call>")
_FUNCTION_CALL = ("<start_function_call>", "<end_function_call>")  # FunctionGemma
_GEMMA_4 = ("<|tool_call>", "<tool_call|>")
_PLAIN_OPENERS = ("```", "{", "[")

FAMILIES: tuple[ToolFamily, ...] = (
    ToolFamily(
        "qwen-coder",
        template_marks=(("<function=", "<parameter="),),
        openers=(_TOOL_CALL[0],),
        markers="".join(_TOOL_CALL),
        read=readers.tagged(*_TOOL_CALL, xml_call),
    ),
    ToolFamily(
        "mistral",
        template_marks=((readers.TOOL_CALLS,),),
        openers=(readers.TOOL_CALLS,),
        markers=f"{readers.TOOL_CALLS}[ARGS][CALL_ID]",
        read=readers.mistral,
    ),
    ToolFamily(
        "deepseek",
        template_marks=(("tool▁call",),),
        openers=(readers.CALLS_BEGIN, readers.CALL_BEGIN),
        markers=readers.CALLS_BEGIN
        + readers.CALLS_END
        + readers.CALL_BEGIN
        + readers.CALL_SEPARATOR
        + readers.CALL_END,
        read=readers.deepseek,
    ),
    ToolFamily(
        "gemma",
        template_marks=(("<start_of_turn>",), ("tool_code",), (_FUNCTION_CALL[0],), (_GEMMA_4[0],)),
        openers=(*_PLAIN_OPENERS, _FUNCTION_CALL[0], _GEMMA_4[0]),
        markers="".join((*_FUNCTION_CALL, "<escape>", *_GEMMA_4, '<|"|>')),
        read=readers.gemma(
            {
                _FUNCTION_CALL[0]: readers.tagged(*_FUNCTION_CALL, partial(gemma_call, quote="<escape>")),
                _GEMMA_4[0]: readers.tagged(*_GEMMA_4, partial(gemma_call, quote='<|"|>')),
            }
        ),
    ),
    ToolFamily(
        "llama",
        template_marks=((readers.PYTHON_TAG,), ("Environment: ipython",)),
        openers=(readers.PYTHON_TAG, "{", "["),
        markers=readers.PYTHON_TAG,
        read=readers.llama,
    ),
    ToolFamily(  # Hermes, Qwen and many others
        "hermes",
        template_marks=((_TOOL_CALL[0],),),
        openers=(_TOOL_CALL[0],),
        markers="".join(_TOOL_CALL),
        read=readers.tagged_json(*_TOOL_CALL),
    ),
    ToolFamily(  # for templates of no other family
        "plain",
        template_marks=((),),
        openers=_PLAIN_OPENERS,
        markers="",
        read=readers.plain_json,
    ),
)


def family_of(template: str) -> ToolFamily:
    """The tool call format of a chat template; plain JSON if it has no other."""
    return next(family for family in FAMILIES if family.matches(template))
