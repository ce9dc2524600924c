"""Compare the prompts that Ollama renders for a model with those of a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ollama_forge.errors import ForgeError
from ollama_forge.ollama.client import Client
from ollama_forge.ollama.learned_template import Messages, without_dates
from ollama_forge.ollama.shown import Shown

_SYSTEM = {"role": "system", "content": "Answer in one sentence."}
_USER = {"role": "user", "content": "Which river is the longest?"}
_ASSISTANT = {"role": "assistant", "content": "The Nile."}
_AGAIN = {"role": "user", "content": "And the second longest?"}
_MARKED = {"role": "user", "content": ' What does this mean?\n\n    {{ x }} {% y %} "z"\n'}
CONVERSATIONS: Mapping[str, Messages] = {
    "a question": [_USER],
    "a system prompt": [_SYSTEM, _USER],
    "two turns": [_USER, _ASSISTANT, _AGAIN],
    "a system prompt and two turns": [_SYSTEM, _USER, _ASSISTANT, _AGAIN],
    "three turns": [_USER, _ASSISTANT, _AGAIN, _ASSISTANT, _USER],
    "braces and white space": [_MARKED],
}
TOOL = {  # the keys are in the order in which Ollama writes them
    "type": "function",
    "function": {
        "name": "get_length",
        "description": "The length of a river.",
        "parameters": {"type": "object", "required": ["river"], "properties": {"river": {"type": "string"}}},
    },
}
TOOLS = "a tool"
_AROUND = 60  # characters before and after a difference


class Prompts(Protocol):
    """Prompts to compare with."""

    @property
    def owner(self) -> str: ...

    @property
    def beginning(self) -> str: ...

    @property
    def takes_tools(self) -> bool: ...

    def render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> str: ...


@dataclass(frozen=True)
class ModelPrompts:
    """Prompts as Ollama renders them for another model."""

    client: Client
    model: Shown
    beginning: str = ""

    @property
    def owner(self) -> str:
        """The name of the model."""
        return self.model.name

    @property
    def takes_tools(self) -> bool:
        """Whether the model takes requests with tools."""
        return "tools" in self.model.capabilities

    def render(self, messages: Messages, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt.

        Raises:
            ForgeError: Ollama refuses the conversation or does not show prompts, or the model adds messages of its own.
        """
        if self.model.messages or (self.model.system and messages[0]["role"] != "system"):
            raise ForgeError(f"{self.owner} has messages of its own", "compare other conversations")
        text = self.client.rendered(self.owner, messages, tools)
        if text is None:
            raise ForgeError("this version of Ollama does not show its prompts", "update Ollama")
        return text


@dataclass(frozen=True)
class PromptDifference:
    """The first difference between two prompts.

    Attributes:
        conversation: a name of ``CONVERSATIONS``, or ``TOOLS``.
        expected, found: the prompts from shortly before the first character that differs to shortly after it; Ollama's
            reason in place of a prompt that it does not make.
    """

    conversation: str
    expected: str
    found: str


@dataclass(frozen=True)
class PromptCheck:
    """What comparing prompts gave.

    Attributes:
        owner: whose chat template the prompts are compared with.
        compared: number of conversations; 0 if none was compared, for which ``problem`` is the reason.
        equal: number of conversations whose prompts are equal.
        with_tools: whether one of the conversations has a tool.
        difference: the first difference.
        problem: why nothing was compared.
    """

    owner: str = ""
    compared: int = 0
    equal: int = 0
    with_tools: bool = False
    difference: PromptDifference | None = None
    problem: str = "not asked for"

    @property
    def differs(self) -> bool:
        """Whether a prompt differs."""
        return self.equal < self.compared

    def described(self) -> dict[str, Any]:
        """What ``report.json`` and ``--json`` say of it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Lines to print: how many prompts are equal, and the first difference side by side."""
        if not self.compared:
            return [f"prompts in Ollama: not compared ({self.problem})"]
        tools = " (one with a tool)" if self.with_tools else ""
        told = f"prompts in Ollama: as {self.owner}'s, {self.equal} of {self.compared}{tools}"
        if self.difference is None:
            return [told]
        return [
            f"warning: {told}; the first difference, with {self.difference.conversation}:",
            f"  {self.owner}: {self.difference.expected!r}",
            f"  Ollama: {self.difference.found!r}",
        ]


def check_prompts(client: Client, shown: Shown, prompts: Prompts) -> PromptCheck:
    """Let Ollama render conversations, and compare.

    A conversation that the chat template refuses, or whose system message it leaves out, is not compared: Ollama's
    server and the measurements each put it into the question in their own way.

    Args:
        shown: the model in Ollama; its system prompt and messages stand in its prompts.

    Raises:
        ForgeError: Ollama went away.
    """
    cases: list[tuple[str, Messages, list[Any]]] = [(name, each, []) for name, each in CONVERSATIONS.items()]
    if prompts.takes_tools:
        cases.append((TOOLS, CONVERSATIONS["a question"], [TOOL]))
    compared: list[str] = []
    equal = 0
    first: PromptDifference | None = None
    for name, messages, tools in cases:
        whole = _with_own(shown, messages)
        try:
            expected = prompts.render(whole, tools)
        except ForgeError:
            continue
        if any(each["role"] == "system" and each["content"].strip() not in expected for each in whole):
            continue
        compared.append(name)
        try:
            found = client.rendered(shown.name, messages, tools)
        except ForgeError as error:
            client.state().require()
            first = first or PromptDifference(name, expected[: 2 * _AROUND], error.message)
            continue
        if found is None:
            return PromptCheck(prompts.owner, problem="this version of Ollama does not show its prompts")
        difference = first_difference(expected, found.removeprefix(prompts.beginning))
        equal += difference is None
        if difference is not None:
            first = first or PromptDifference(name, *difference)
    problem = "" if compared else "the chat template refuses every conversation"
    return PromptCheck(prompts.owner, len(compared), equal, TOOLS in compared, first, problem)


def first_difference(expected: str, found: str) -> tuple[str, str] | None:
    """What stands around the first difference in both texts; None if only dates of these days differ."""
    if expected == found:
        return None
    expected, found = without_dates(expected), without_dates(found)
    if expected == found:
        return None
    pairs = zip(expected, found, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    start = max(place - _AROUND, 0)
    return expected[start : place + _AROUND], found[start : place + _AROUND]


def _with_own(shown: Shown, messages: Messages) -> Messages:
    """The conversation as Ollama hands it to the template, with the system prompt and the messages of the model."""
    system = [{"role": "system", "content": shown.system}] if shown.system and messages[0]["role"] != "system" else []
    own = [{"role": role, "content": content} for role, content in shown.messages]
    return [*system, *own, *messages]
