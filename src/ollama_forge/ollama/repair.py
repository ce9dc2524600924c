"""The forms in which Ollama can be given a chat template, tried one after the other until its prompts are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from ollama_forge.errors import ForgeError
from ollama_forge.ollama.chat_template import ChatTemplate, FileTemplate
from ollama_forge.ollama.prompt_check import PromptCheck
from ollama_forge.ollama.shown import Shown
from ollama_forge.ollama.template import TemplatePlan

# Ollama puts a form of its own in place of a chat template that differs from one it knows by fewer than 100 characters.
_COMMENT = (
    "{# This is the model's own chat template. Ollama replaces chat templates that resemble one of those it knows, and "
    "this comment keeps it from doing so. #}"
)
_NO_MEMORY = ("memory", "allocate")


@dataclass(frozen=True)
class Form:
    """One way to give Ollama a chat template.

    Attributes:
        plan: TEMPLATE, RENDERER, PARSER and stop parameters.
        jinja: the chat template that the file gets in place of its own, "" for none; None to leave the file as it is.
        note: what was done, for the user; "" for the form that was planned.
    """

    plan: TemplatePlan
    jinja: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Tried:
    """A model that Ollama made with one form.

    Attributes:
        recognised: Ollama's name for the chat template that it replaced by its own form; "" if it replaced none.
        sent: whether the file was uploaded.
        silence: why the model does not answer; "" if it does.
    """

    form: Form
    shown: Shown
    recognised: str = ""
    sent: bool = False
    silence: str = ""
    prompts: PromptCheck = field(default_factory=PromptCheck)

    @property
    def is_right(self) -> bool:
        """Whether the model answers, and no prompt is known to differ."""
        return not self.silence and not self.prompts.differs


def commented(text: str) -> str:
    """The chat template as Ollama takes it for none that it knows."""
    return f"{_COMMENT}{text}"


def silent(name: str, silence: str) -> ForgeError:
    """The failure of a model that does not answer, with Ollama's own reason."""
    return ForgeError(
        f"Ollama made {name}, but it does not answer: {silence}", "its log says more; nothing here was lost"
    )


def settle(first: Form, prompts: ChatTemplate | None, file: FileTemplate, attempt: Callable[[Form], Tried]) -> Tried:
    """Try forms until the model answers and its prompts are those of the chat template; else keep the best one.

    Args:
        first: the planned form.
        prompts: the chat template; None to try the planned form alone.
        file: what the GGUF file says of prompts.
        attempt: makes the model with a form. The last call makes the one that is kept.

    Raises:
        ForgeError: the model answers in no form.
    """
    tried = [attempt(first)]
    for form in _others(first, prompts, file, tried) if prompts is not None and not first.plan.chosen else ():
        tried.append(attempt(form))
    best = max(tried, key=lambda each: (not each.silence, each.prompts.equal))
    if best.silence:
        raise silent(best.shown.name, best.silence)
    return best if best is tried[-1] else attempt(best.form)


def _others(first: Form, prompts: ChatTemplate, file: FileTemplate, tried: Sequence[Tried]) -> Iterator[Form]:
    """The forms after the planned one, as long as none is right; they depend on what the ones before gave."""

    def go_on() -> bool:
        last = tried[-1]
        return not last.is_right and not any(word in last.silence for word in _NO_MEMORY)

    text = file.text if first.jinja is None else first.jinja
    learned = prompts.learned
    template = "" if learned is None else learned.go()
    written = replace(first.plan, source="", template=template, renderer="", parser="")
    if go_on() and template and not replace(file, text=text).does_more:
        yield Form(written, first.jinja, "Ollama renders prompts by a TEMPLATE that was learned from the chat template")
    by_file = bool(text) and not tried[0].shown.template and text == prompts.text
    if go_on() and not by_file and not all(each.silence for each in tried):
        note = "the file in Ollama has its chat template behind a comment, so that Ollama does not replace it"
        yield Form(replace(written, template=""), commented(prompts.text), note)
    if go_on() and template and all(each.silence for each in tried):
        lost = "; tools are lost" if prompts.takes_tools else ""
        note = f"Ollama cannot read the chat template: the file there has none, but a learned TEMPLATE{lost}"
        yield Form(written, "", note)
    if go_on() and (first.plan.spare_renderer or first.plan.spare_parser):
        plan = replace(first.plan, renderer=first.plan.spare_renderer, parser=first.plan.spare_parser, note="")
        yield Form(plan, first.jinja, f"Ollama renders prompts by the renderer and the parser of {plan.source}")
