"""The tool call formats of model families, a row each; the most specific stand first.

To add a family, write a row: the texts of its chat template that no other row's family has, and its forms, which
``readers`` and ``parameters`` make from the tags around a call. Then put a template into
``tests/data/chat_templates.toml``.
"""

from __future__ import annotations

import re
from functools import partial

from ollama_forge.serving.tools.base import ToolFamily
from ollama_forge.serving.tools.parameters import parameters_between
from ollama_forge.serving.tools.payloads import gemma_call, keyed_calls
from ollama_forge.serving.tools.readers import (
    bare,
    each_between,
    json_between,
    mistral,
    named_before,
    tag_before,
    text_between,
)

_TOOL_CALL = ("<tool_call>", "</tool_call>")
_FUNCTION, _PARAMETER = ("<function={name}>", "</function>"), ("<parameter={key}>", "</parameter>")
_FIRST = bare(only_first=True)  # calls without tags, from models that left the tags out


def _kimi_name(head: str) -> str:
    """The tool in an id like ``functions.name:0``."""
    return re.sub(r"^functions\.|:\d+$", "", head.strip())


FAMILIES: tuple[ToolFamily, ...] = (
    ToolFamily(
        "seed-oss",
        template_marks=(("<seed:tool_call>",),),
        forms=(*parameters_between(_FUNCTION, _PARAMETER, block=("<seed:tool_call>", "</seed:tool_call>")), *_FIRST),
    ),
    ToolFamily(
        "qwen-coder",  # Qwen3-Coder, Qwen3.5, Nemotron 3
        template_marks=(("<function=", "<parameter="),),
        forms=(*parameters_between(_FUNCTION, _PARAMETER, block=_TOOL_CALL, padded=True), *_FIRST),
    ),
    ToolFamily(
        "glm",  # GLM-4.5 and later
        template_marks=(("<arg_key>", "<arg_value>"),),
        forms=(
            *parameters_between(
                ("<tool_call>{name}", "</tool_call>"),
                ("<arg_key>{key}</arg_key>{space}<arg_value>", "</arg_value>"),
            ),
            *_FIRST,
        ),
    ),
    ToolFamily(
        "minimax",  # MiniMax-M2
        template_marks=(("<minimax:tool_call>",),),
        forms=(
            *parameters_between(
                ('<invoke name="{name}">', "</invoke>"),
                ('<parameter name="{key}">', "</parameter>"),
                block=("<minimax:tool_call>", "</minimax:tool_call>"),
            ),
            *_FIRST,
        ),
    ),
    ToolFamily(
        "deepseek-dsml",  # DeepSeek V3.2
        template_marks=(("｜DSML｜",),),
        forms=(
            *parameters_between(
                ('<｜DSML｜invoke name="{name}">', "</｜DSML｜invoke>"),
                ('<｜DSML｜parameter name="{key}" string="{string}">', "</｜DSML｜parameter>"),
                block=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
            ),
            *_FIRST,
        ),
    ),
    ToolFamily(
        "deepseek",  # DeepSeek V3, V3.1 and R1
        template_marks=(("tool▁call",),),
        forms=(
            *each_between(
                ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
                ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
                named_before("<｜tool▁sep｜>"),
            ),
            *_FIRST,
        ),
    ),
    ToolFamily(
        "kimi",  # Kimi K2
        template_marks=(("<|tool_call_argument_begin|>",),),
        forms=(
            *each_between(
                ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
                ("<|tool_call_begin|>", "<|tool_call_end|>"),
                named_before("<|tool_call_argument_begin|>", _kimi_name),
            ),
            *_FIRST,
        ),
    ),
    ToolFamily(
        "mistral",
        template_marks=(("[TOOL_CALLS]",),),
        forms=(mistral("[TOOL_CALLS]"), *_FIRST),
    ),
    ToolFamily(
        "lfm2",  # LFM2, and MiniCPM 3 with its Python in a code block
        template_marks=(("<|tool_list_start|>",), ("<|tool_call_start|>",)),
        forms=(text_between("<|tool_call_start|>", "<|tool_call_end|>"), *_FIRST),
    ),
    ToolFamily(
        "olmo",  # Olmo 3
        template_marks=(("<function_calls>",), ("<functions>", "<|im_start|>environment")),
        forms=(text_between("<function_calls>", "</function_calls>"), *_FIRST),
    ),
    ToolFamily(
        "command",  # Command R7B, Command A, Command R
        template_marks=(("<|START_ACTION|>",), ("<|CHATBOT_TOKEN|>", "Action:")),
        forms=(
            json_between("<|START_ACTION|>", "<|END_ACTION|>"),
            json_between("Action: ```json", "```"),
            *_FIRST,
        ),
        answer_tags=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    ToolFamily(
        "nemotron",
        template_marks=(("<TOOLCALL>",),),
        forms=(json_between("<TOOLCALL>", "</TOOLCALL>"), *_FIRST),
    ),
    ToolFamily(
        "granite",  # Granite 3 and 4
        template_marks=(("<|start_of_role|>",),),
        forms=(json_between("<|tool_call|>"), json_between(*_TOOL_CALL), *_FIRST),
        answer_tags=("<response>", "</response>"),
    ),
    ToolFamily(
        "phi",  # Phi-4 mini
        template_marks=(("<|tool|>", "<|/tool|>"),),
        forms=(json_between("<|tool_call|>", "<|/tool_call|>"), json_between("functools"), *_FIRST),
    ),
    ToolFamily(
        "hunyuan",
        template_marks=(("<tool_calls>", "</tool_calls>"),),
        forms=(json_between("<tool_calls>", "</tool_calls>"), json_between(*_TOOL_CALL), *_FIRST),
        answer_tags=("<answer>", "</answer>"),
    ),
    ToolFamily(
        "apertus",
        template_marks=(("<|tools_prefix|>",),),
        forms=(json_between("<|tools_prefix|>", "<|tools_suffix|>", keyed_calls), *_FIRST),
    ),
    ToolFamily(
        "gemma-4",
        template_marks=(("<|tool_call>",),),
        forms=(text_between("<|tool_call>", "<tool_call|>", partial(gemma_call, quote='<|"|>')), *_FIRST),
    ),
    ToolFamily(
        "function-gemma",
        template_marks=(("<start_function_call>",),),
        forms=(
            text_between("<start_function_call>", "<end_function_call>", partial(gemma_call, quote="<escape>")),
            *_FIRST,
        ),
    ),
    ToolFamily(
        "gemma",  # Gemma 2 and 3 have no format of their own
        template_marks=(("<start_of_turn>",), ("tool_code",)),
        forms=(text_between("```tool_code", "```"), *bare(only_first=False)),
    ),
    ToolFamily(
        "llama-4",
        template_marks=(("<|header_start|>",),),
        forms=(text_between("<|python_start|>", "<|python_end|>"), tag_before("<|python_tag|>"), *_FIRST),
    ),
    ToolFamily(
        "llama",  # Llama 3
        template_marks=(("<|python_tag|>",), ("Environment: ipython",)),
        forms=(
            tag_before("<|python_tag|>"),
            text_between("<function=", "</function>", named_before(">")),
            *_FIRST,
        ),
    ),
    ToolFamily(
        "hermes",  # Hermes, Qwen and many others
        template_marks=((_TOOL_CALL[0],),),
        forms=(json_between(*_TOOL_CALL), *_FIRST),
    ),
    ToolFamily(
        "plain",  # for templates of no other family
        template_marks=((),),
        forms=bare(only_first=False),
    ),
)


def family_of(template: str) -> ToolFamily:
    """The tool call format of a chat template; plain JSON if it has no other."""
    return next(family for family in FAMILIES if family.matches(template))
