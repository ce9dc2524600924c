"""The tool call formats of model families, a row each; the most specific stand first.

To add a family, write a row: the texts of its chat template that no other row's family has; its forms, which
``readers`` and ``parameters`` make from the tags around a call; and, if its calls are JSON between texts, how a forced
call is written. Then put a template into ``tests/data/chat_templates.toml``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from ollama_forge.serving.tools.base import JSON_CALL, CallSyntax, ToolFamily
from ollama_forge.serving.tools.parameters import parameters_between
from ollama_forge.serving.tools.payloads import gemma_call, keyed_calls
from ollama_forge.serving.tools.readers import (
    bare,
    each_between,
    json_between,
    left_over,
    mistral,
    named_before,
    tag_before,
    text_between,
)

_TOOL_CALL = ("<tool_call>", "</tool_call>")
_FUNCTION, _PARAMETER = ("<function={name}>", "</function>"), ("<parameter={key}>", "</parameter>")
_FIRST = bare(only_first=True)  # calls without tags, from models that left the tags out
_LEFT_OVER = left_over(_TOOL_CALL[1])


def _kimi_name(head: str) -> str:
    """The tool in an id like ``functions.name:0``."""
    return re.sub(r"^functions\.|:\d+$", "", head.strip())


def _kimi_id(id_: str, name: str, number: int | None) -> str:
    return id_ if number is None else f"functions.{name}:{number}"


def _short_id(id_: str, name: str, number: int | None) -> str:
    """An id of nine letters and digits."""
    return "".join(letter for letter in id_ if letter.isalnum())[-9:].rjust(9, "0")


def _listed(begin: str, end: str, opening: str = JSON_CALL, *, template_mark: str = "") -> CallSyntax:
    """Calls in a JSON list."""
    return CallSyntax(opening, "}", begin=begin + "[", separator=", ", end="]" + end, template_mark=template_mark)


_TAGGED = CallSyntax(f"<tool_call>\n{JSON_CALL}", "}\n</tool_call>", separator="\n")
_DEEPSEEK_BLOCK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

FAMILIES: tuple[ToolFamily, ...] = (
    ToolFamily(
        "seed-oss",
        template_marks=(("<seed:tool_call>",),),
        forms=(*parameters_between(_FUNCTION, _PARAMETER, block=("<seed:tool_call>", "</seed:tool_call>")), *_FIRST),
    ),
    ToolFamily(
        "qwen-coder",  # Qwen3-Coder, Qwen3.5, Nemotron 3
        template_marks=(("<function=", "<parameter="),),
        forms=(*parameters_between(_FUNCTION, _PARAMETER, block=_TOOL_CALL, padded=True), *_FIRST, _LEFT_OVER),
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
                _DEEPSEEK_BLOCK,
                ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
                named_before("<｜tool▁sep｜>"),
            ),
            *_FIRST,
        ),
        written=(
            CallSyntax(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
                "\n```<｜tool▁call▁end｜>",
                begin=_DEEPSEEK_BLOCK[0],
                separator="\n",
                end=_DEEPSEEK_BLOCK[1],
                template_mark="```json",
            ),
            CallSyntax(
                "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
                "<｜tool▁call▁end｜>",
                begin=_DEEPSEEK_BLOCK[0],
                end=_DEEPSEEK_BLOCK[1],
            ),
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
        written=(
            CallSyntax(
                "<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
                begin="<|tool_calls_section_begin|>",
                end="<|tool_calls_section_end|>",
                several=False,
            ),
        ),
        call_id=_kimi_id,
    ),
    ToolFamily(
        "mistral",
        template_marks=(("[TOOL_CALLS]",),),
        forms=(mistral("[TOOL_CALLS]"), *_FIRST),
        written=(CallSyntax("[TOOL_CALLS]NAME[ARGS]", template_mark="[ARGS]"), _listed("[TOOL_CALLS]", "")),
        call_id=_short_id,
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
        written=(
            CallSyntax(
                '{"tool_call_id": "0", "tool_name": "NAME", "parameters": ',
                "}",
                begin="<|START_ACTION|>[\n    ",
                end="\n]<|END_ACTION|>",
                several=False,
                template_mark="<|START_ACTION|>",
            ),
            CallSyntax(
                '    {\n        "tool_name": "NAME",\n        "parameters": ',
                "\n    }",
                begin="Action: ```json\n[\n",
                separator=",\n",
                end="\n]```",
            ),
        ),
        answer_tags=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    ToolFamily(
        "nemotron",
        template_marks=(("<TOOLCALL>",),),
        forms=(json_between("<TOOLCALL>", "</TOOLCALL>"), *_FIRST),
        written=(_listed("<TOOLCALL>", "</TOOLCALL>"),),
    ),
    ToolFamily(
        "granite",  # Granite 3 and 4
        template_marks=(("<|start_of_role|>",),),
        forms=(json_between("<|tool_call|>"), json_between(*_TOOL_CALL), *_FIRST),
        written=(replace(_TAGGED, template_mark="<tool_call>"), _listed("<|tool_call|>", "")),
        answer_tags=("<response>", "</response>"),
    ),
    ToolFamily(
        "phi",  # Phi-4 mini
        template_marks=(("<|tool|>", "<|/tool|>"),),
        forms=(json_between("<|tool_call|>", "<|/tool_call|>"), json_between("functools"), *_FIRST),
        written=(
            _listed("<|tool_call|>", "<|/tool_call|>", template_mark="<|tool_call|>"),
            _listed("functools", ""),
        ),
    ),
    ToolFamily(
        "hunyuan",
        template_marks=(("<tool_calls>", "</tool_calls>"),),
        forms=(json_between("<tool_calls>", "</tool_calls>"), json_between(*_TOOL_CALL), *_FIRST),
        written=(_listed("<tool_calls>", "</tool_calls>"),),
        answer_tags=("<answer>", "</answer>"),
    ),
    ToolFamily(
        "apertus",
        template_marks=(("<|tools_prefix|>",),),
        forms=(json_between("<|tools_prefix|>", "<|tools_suffix|>", keyed_calls), *_FIRST),
        written=(_listed("<|tools_prefix|>", "<|tools_suffix|>", '{"NAME": '),),
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
        written=(CallSyntax('{"name": "NAME", "parameters": ', "}", several=False),),
    ),
    ToolFamily(
        "hermes",  # Hermes, Qwen and many others
        template_marks=((_TOOL_CALL[0],),),
        forms=(json_between(*_TOOL_CALL), *_FIRST, _LEFT_OVER),
        written=(_TAGGED,),
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
