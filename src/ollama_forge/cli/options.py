"""Options that several commands share, and the frozen settings they turn into."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ollama_forge.directions.compute import DirectionSettings
    from ollama_forge.edits.settings import EditSettings
    from ollama_forge.models.chat_model import LoadSettings
    from ollama_forge.prompts.settings import PromptSettings

F = TypeVar("F", bound=Callable[..., Any])
FACTORS = ("orthogonal", "least-squares")
LEAST_SQUARES = "least-squares"


class CommaSeparated(click.ParamType[tuple[Any, ...]]):
    """``a,b`` (or ``a+b``) as a tuple of one type."""

    def __init__(self, kind: Callable[[str], Any], name: str) -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            if isinstance(value, str):
                return tuple(self.kind(part.strip()) for part in value.replace("+", ",").split(",") if part.strip())
            if any(isinstance(part, str) != (self.kind is str) for part in value):
                raise ValueError
            return tuple(self.kind(part) for part in value)  # a list of a config file
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a comma-separated list of {self.name}s", param, ctx)


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_option = click.option(
    "--model", required=True, metavar="MODEL", help="Hub id, model folder, .gguf file, demo or demo-base."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

load_options = _all(
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        help="Type of computing: auto, float32, bfloat16, float16.",
    ),
    click.option(
        "--batch-size",
        default="auto",
        show_default=True,
        help="Prompts at a time; auto halves on lack of memory.",
    ),
    click.option("--system", metavar="TEXT", help="System prompt, in computing and measuring alike."),
    click.option("--template-kwargs", metavar="JSON", default="{}", help="Arguments for the chat template."),
    click.option("--allow-base-model", is_flag=True, help="Accept a model without chat template; it gets bare text."),
    click.option("--load-in-8bit", is_flag=True, help="Compute the direction in 8 bits (bitsandbytes, CUDA)."),
)
prompt_options = _all(
    click.option("--harmful", metavar="FILE", help="Harmful instructions: .txt (one a line), .jsonl or .csv."),
    click.option("--harmless", metavar="FILE", help="Harmless instructions, likewise."),
    click.option("--harmful-dir", metavar="DIR", help="All .txt files of a folder as harmful instructions."),
    click.option("--harmless-dir", metavar="DIR", help="All .txt files of a folder as harmless instructions."),
    click.option("--column", metavar="NAME", help="Field of .jsonl and .csv lists."),
    click.option(
        "--num-instructions",
        type=int,
        metavar="N",
        help="Pairs to compute from (default 32; least squares 256).",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Order in which instructions are taken."),
)
direction_options = _all(
    click.option(
        "--method", default="difference-of-means", show_default=True, help="difference-of-means or projected."
    ),
    click.option(
        "--layer-fracs",
        type=CommaSeparated(float, "number"),
        metavar="F,F,...",
        help="Candidate layers as fractions of depth (default 0.4,0.5,0.6; least squares 0.7).",
    ),
    click.option("--num-directions", type=int, default=1, show_default=True, help="1, or 2 or 3 by singular vectors."),
    click.option("--per-layer-directions", is_flag=True, help="A direction for every layer."),
    click.option("--position", type=int, default=-1, show_default=True, help="Token position from the prompt's end."),
)
factors_option = click.option(
    "--factors",
    type=click.Choice(FACTORS),
    default=None,
    help="What is made of the direction (default orthogonal).",
)
edit_options = _all(
    click.option(
        "--targets",
        type=CommaSeparated(str, "name"),
        metavar="SETS",
        help="attention (default), writers, mlp, embedding; a,b for both.",
    ),
    click.option("--strength", type=float, help="1 removes, below 0 strengthens refusal (default 1; least squares 2)."),
    click.option("--attn-strength", type=float, help="Strength for attention's matrices."),
    click.option("--mlp-strength", type=float, help="Strength for the MLP's matrices."),
    click.option("--strength-kernel", metavar="NAME", help="Over depth: constant (default), linear-peak, gaussian."),
    click.option("--skip-begin-layers", type=int, metavar="N", help="First layers left alone (default 1)."),
    click.option("--skip-end-layers", type=int, metavar="N", help="Last layers left alone (default 1)."),
    click.option(
        "--norm-preserving/--no-norm-preserving",
        default=None,
        help="Give columns or rows their norms back (default on).",
    ),
)
out_dtype_option = click.option(
    "--out-dtype", default="bf16", show_default=True, help="bf16, or keep for each tensor's own."
)

LOAD_KEYS = ("device", "dtype", "batch_size", "system", "template_kwargs", "allow_base_model", "load_in_8bit")
PROMPT_KEYS = ("harmful", "harmless", "harmful_dir", "harmless_dir", "column", "num_instructions", "seed")
DIRECTION_KEYS = ("method", "layer_fracs", "num_directions", "per_layer_directions", "position")
EDIT_KEYS = (
    "targets", "strength", "attn_strength", "mlp_strength", "strength_kernel",
    "skip_begin_layers", "skip_end_layers", "norm_preserving",
)  # fmt: skip


def load_settings(options: dict[str, Any]) -> LoadSettings:
    from ollama_forge.errors import UsageError
    from ollama_forge.models.chat_model import LoadSettings, parse_template_kwargs

    batch = str(options["batch_size"])
    if batch != "auto" and (not batch.isdigit() or int(batch) < 1):
        raise UsageError(f"--batch-size {batch} is neither auto nor a positive number", "for example --batch-size 8")
    chosen = {key: options[key] for key in LOAD_KEYS}
    chosen["batch_size"] = batch if batch == "auto" else int(batch)
    chosen["template_kwargs"] = parse_template_kwargs(options["template_kwargs"])
    return LoadSettings(**chosen)


def prompt_settings(options: dict[str, Any]) -> PromptSettings:
    from ollama_forge.prompts.settings import PromptSettings

    return PromptSettings(**{key: options[key] for key in PROMPT_KEYS})


def direction_settings(options: dict[str, Any]) -> DirectionSettings:
    from ollama_forge.directions.compute import DirectionSettings
    from ollama_forge.edits.least_squares import DEFAULT_FRACTION

    default = (DEFAULT_FRACTION,) if options.get("factors") == LEAST_SQUARES else DirectionSettings().layer_fracs
    fractions = options["layer_fracs"]
    return DirectionSettings(
        method=options["method"],
        layer_fracs=default if fractions is None else fractions,
        num_directions=options["num_directions"],
        per_layer=options["per_layer_directions"],
        position=options["position"],
    )


def edit_settings(options: dict[str, Any]) -> EditSettings | None:
    """The edit asked for, or None where no option of an edit was given."""
    from ollama_forge.edits.least_squares import DEFAULT_STRENGTH
    from ollama_forge.edits.settings import EditSettings
    from ollama_forge.errors import UsageError

    given = {key: options[key] for key in EDIT_KEYS if options.get(key) is not None}
    factors = options.get("factors")
    if factors is None and not given:
        return None
    if factors == LEAST_SQUARES:
        if given.get("norm_preserving"):
            raise UsageError("least squares carries no norm rule", "leave out --norm-preserving")
        given = {"targets": ("writers",), "strength": DEFAULT_STRENGTH, **given, "norm_preserving": False}
    return EditSettings(factors=factors or "orthogonal", **given)
