"""Options that several commands share, and their conversion to settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from ollama_forge.cli.completers import complete_ollama
from ollama_forge.directions.settings import DirectionSettings
from ollama_forge.edits.out_dtype import HELP as OUT_DTYPE_HELP
from ollama_forge.edits.out_dtype import OutDtype
from ollama_forge.edits.registry import METHODS, registered_method, settings_of
from ollama_forge.edits.settings import KERNELS, TARGET_SETS, EditSettings
from ollama_forge.errors import UsageError
from ollama_forge.prompts.settings import MAX_REPORT, MAX_SELECT, PromptSettings

if TYPE_CHECKING:
    from ollama_forge.cluster.protocol import Cluster
    from ollama_forge.models.chat_model import LoadSettings

F = TypeVar("F", bound=Callable[..., Any])


class CommaSeparated(click.ParamType[tuple[Any, ...]]):
    """A comma-separated list ``a,b`` (or ``a+b``) as a tuple; ``item_type`` converts each item."""

    def __init__(self, item_type: Callable[[str], Any], name: str) -> None:
        self.item_type, self.name = item_type, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            if isinstance(value, str):
                parts = [part.strip() for part in value.replace("+", ",").split(",")]
                return tuple(self.item_type(part) for part in parts if part)
            if any(isinstance(part, str) != (self.item_type is str) for part in value):
                raise ValueError
            return tuple(self.item_type(part) for part in value)  # a list in a config file
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a comma-separated list of {self.name}s", param, ctx)


class MemorySize(click.ParamType[Any]):
    """A size such as ``8GiB`` or ``24GB`` in bytes, or ``free``."""

    name = "size"
    _UNITS: ClassVar = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    _BINARY: ClassVar = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = str(value).strip().lower()
        if text == "free":
            return text
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?", text)
        if found is None:
            self.fail(f"{value!r} is no size such as 8GiB or 24GB, and not free", param, ctx)
        size = int(float(found[1]) * {**self._UNITS, **self._BINARY}[found[2] or ""])
        return size or self.fail("a size of 0 leaves no memory to use", param, ctx)


def _default(field: str) -> str:
    """The help text on a default, such as ``default 1; least squares 2``: other methods are named if they differ."""
    values = {
        name: getattr(entry if hasattr(entry, field) else entry.settings, field) for name, entry in METHODS.items()
    }
    usual = values[EditSettings.factors]
    others = [f"{name.replace('-', ' ')} {_format_default(value)}" for name, value in values.items() if value != usual]
    return "; ".join([f"default {_format_default(usual)}", *others])


def _format_default(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(_format_default(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def combined(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model_option = click.option(
    "--model",
    required=True,
    metavar="MODEL",
    help="Hub id, model folder, .gguf file, ollama:NAME, address in an object store (s3://bucket/folder), demo or "
    "demo-base.",
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Execute the Python code in the model's folder or repository if transformers has no class of its own for the "
    "model. That code can do anything that you can do: read it first.",
)
allow_partial_option = click.option(
    "--allow-partial",
    is_flag=True,
    help="Edit a model even if not all of its writers and readers are proven (see inspect). The unproven ones are left "
    "as they are, and the provenance and the model card name them.",
)
base_option = click.option(
    "--base",
    metavar="MODEL",
    help="Hugging Face release of a GGUF model: Hub id or folder. The edit is computed on it and applied to the file.",
)
keep_checkpoint_option = click.option(
    "--keep-checkpoint", is_flag=True, help="Also write the edited GGUF model as a bf16 checkpoint."
)
revision_option = click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id.")
adapter_option = click.option(
    "--adapter", metavar="ADAPTER", help="PEFT adapter to merge into the model first: a folder or Hub id."
)
keep_undo_option = click.option(
    "--keep-undo",
    is_flag=True,
    help="Also write <output>.undo, with which apply --undo gives the model back where it is no longer at hand.",
)
registration_options = combined(
    click.option(
        "--template-from",
        metavar="MODEL",
        shell_complete=complete_ollama,
        help="Ollama model to copy template, renderer, parser and stop strings from.",
    ),
    click.option(
        "--renderer",
        default="",
        metavar="NAME",
        help="Renderer of Ollama's that makes the prompts, by its name there.",
    ),
    click.option(
        "--parser",
        default="",
        metavar="NAME",
        help="Parser of Ollama's that reads the answers, by its name there.",
    ),
    click.option(
        "--parameter",
        multiple=True,
        metavar="K=V",
        help="Parameter of the model in Ollama, such as temperature=0.5; repeatable.",
    ),
)
ray_option = click.option(
    "--ray",
    metavar="auto|HOST:PORT",
    help="Share the work among the nodes of a Ray cluster (extra cluster): auto for the one that this machine is part "
    "of. See docs/scaling.md.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")

model_options = combined(
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    click.option(
        "--device-map",
        type=click.Choice(("auto", "balanced", "balanced_low_0", "sequential")),
        help="Share the model's layers among all CUDA devices, in the way that transformers calls so. "
        "CUDA_VISIBLE_DEVICES names some of them.",
    ),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        help="Type to compute in: auto, float32, bfloat16 or float16.",
    ),
    click.option("--system", metavar="TEXT", help="System prompt for every conversation."),
    click.option("--template-kwargs", metavar="JSON", default="{}", help="Arguments for the chat template."),
    click.option(
        "--allow-base-model",
        is_flag=True,
        help="Accept a model without a chat template; it gets the bare text.",
    ),
    trust_option,
)
talk_options = combined(revision_option, adapter_option, model_options)
bits_options = combined(
    click.option("--load-in-8bit", is_flag=True, help="Load the model in 8 bits (bitsandbytes)."),
    click.option("--load-in-4bit", is_flag=True, help="Load the model in 4 bits, NF4 (bitsandbytes)."),
)
limit_options = combined(
    click.option(
        "--max-answer-kl",
        type=float,
        default=0.06,
        show_default=True,
        help="Largest answer KL divergence on general prompts, in nats a token, of an edit that may be chosen.",
    ),
    click.option(
        "--max-kl",
        type=float,
        default=0.2,
        show_default=True,
        help="Largest first-token KL divergence on general prompts of an edit that may be chosen.",
    ),
)
few_refusals_option = click.option(
    "--allow-few-refusals",
    is_flag=True,
    help="Continue even if the base model refuses less than 20 % of harmful prompts.",
)
batch_size_option = click.option(
    "--batch-size",
    default="auto",
    show_default=True,
    help="Prompts per batch; auto halves it when memory runs out.",
)
memory_option = click.option(
    "--memory",
    type=MemorySize(),
    default="free",
    show_default=True,
    metavar="SIZE",
    help="Memory to use, such as 8GiB. If the model needs more, its layers are read from disk one after the other, "
    "each for all prompts at once.",
)
load_options = combined(talk_options, batch_size_option)
list_options = combined(
    click.option(
        "--harmful", metavar="FILE", help="Harmful instructions: .txt (one a line), .csv, .tsv, .json or .jsonl."
    ),
    click.option("--harmless", metavar="FILE", help="Harmless instructions, in the same formats."),
    click.option("--harmful-dir", metavar="DIR", help="Folder whose .txt files hold harmful instructions."),
    click.option("--harmless-dir", metavar="DIR", help="Folder whose .txt files hold harmless instructions."),
    click.option(
        "--column", metavar="NAME", help="Column or field with the instructions in .csv, .tsv, .json and .jsonl."
    ),
    click.option(
        "--seed",
        type=int,
        default=PromptSettings.seed,
        show_default=True,
        help="Seed for shuffling the instructions.",
    ),
)
prompt_options = combined(
    list_options,
    click.option(
        "--num-instructions",
        type=int,
        metavar="N",
        help=f"Number of harmful-harmless pairs to compute from ({_default('pairs')}). "
        "Least squares protects all general prompts beside them.",
    ),
)
max_measured_option = click.option(
    "--max-measured",
    type=int,
    metavar="N",
    help="Largest number of prompts of each list for choosing and for measuring "
    f"(default {MAX_SELECT} and {MAX_REPORT}; 0: all).",
)
direction_options = combined(
    click.option(
        "--method",
        default=DirectionSettings.method,
        show_default=True,
        help="Method that computes the direction: difference-of-means or projected.",
    ),
    click.option(
        "--layer-fracs",
        type=CommaSeparated(float, "number"),
        metavar="F,F,...",
        help=f"Candidate layers as fractions of the depth ({_default('layer_fracs')}).",
    ),
    click.option(
        "--num-directions",
        type=int,
        default=DirectionSettings.num_directions,
        show_default=True,
        help="Number of directions to edit out: 1, or 2 or 3 (singular vectors).",
    ),
    click.option("--per-layer-directions", is_flag=True, help="Compute one direction for each layer."),
    click.option(
        "--position",
        type=int,
        default=DirectionSettings.position,
        show_default=True,
        help="Token position to compute from, counted from the end of the prompt.",
    ),
)
factors_option = click.option(
    "--factors",
    type=click.Choice(tuple(METHODS)),
    default=None,
    help=f"How the edit is computed from the direction (default {EditSettings.factors}).",
)
edit_options = combined(
    click.option(
        "--targets",
        type=CommaSeparated(str, "name"),
        metavar="SETS",
        help=f"Matrices to edit: any of {', '.join(TARGET_SETS)} ({_default('targets')}).",
    ),
    click.option(
        "--strength",
        type=float,
        help="Strength of the edit: 1 removes the direction, between 0 and 1 weakens it, below 0 amplifies the "
        f"component along it (with least squares: strengthens refusal) ({_default('strength')}).",
    ),
    click.option("--attn-strength", type=float, help="Strength for attention matrices (default: --strength)."),
    click.option("--mlp-strength", type=float, help="Strength for MLP matrices (default: --strength)."),
    click.option(
        "--strength-kernel",
        metavar="NAME",
        help=f"How the strength varies over depth: {', '.join(KERNELS)} ({_default('strength_kernel')}).",
    ),
    click.option(
        "--skip-begin-layers",
        type=int,
        metavar="N",
        help=f"Number of first layers not to edit ({_default('skip_begin_layers')}).",
    ),
    click.option(
        "--skip-end-layers",
        type=int,
        metavar="N",
        help=f"Number of last layers not to edit ({_default('skip_end_layers')}).",
    ),
    click.option(
        "--norm-preserving/--no-norm-preserving",
        default=None,
        help=f"Restore the norms of columns or rows after the edit ({_default('norm_preserving')}).",
    ),
)
out_dtype_option = click.option(
    "--out-dtype",
    type=click.Choice([rule.value for rule in OutDtype]),
    default="auto",
    show_default=True,
    help=f"Storage types of the edited checkpoint. {OUT_DTYPE_HELP}",
)

shard_options = combined(
    click.option(
        "--workers",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="Shards of the checkpoint to edit at the same time. The bytes are the same; each worker needs memory for "
        "a few blocks of a matrix.",
    ),
    click.option(
        "--link",
        is_flag=True,
        help="Make shards that the edit leaves alone reflinks to the source's files, where the file system has them, "
        "else hard links: a later change of such a file changes both.",
    ),
)

LOAD_KEYS = (
    "device", "dtype", "batch_size", "system", "template_kwargs", "allow_base_model", "load_in_8bit",
    "load_in_4bit", "device_map", "trust_remote_code", "memory",
)  # fmt: skip
PROMPT_KEYS = (
    "harmful", "harmless", "harmful_dir", "harmless_dir", "column", "num_instructions", "max_measured", "seed",
)  # fmt: skip
EDIT_KEYS = (
    "targets", "strength", "attn_strength", "mlp_strength", "strength_kernel",
    "skip_begin_layers", "skip_end_layers", "norm_preserving",
)  # fmt: skip


@contextmanager
def cluster_of(options: dict[str, Any]) -> Iterator[Cluster | None]:
    """The cluster that ``--ray`` names; None without it.

    Raises:
        ForgeError: Ray is not installed, or there is no cluster.
    """
    if options["ray"] is None:
        yield None
        return
    from ollama_forge.cluster.ray_cluster import connected

    with connected(options["ray"]) as cluster:
        yield cluster


def load_settings(options: dict[str, Any]) -> LoadSettings:
    from ollama_forge.models.chat_model import LoadSettings, parse_template_kwargs

    batch = str(options.get("batch_size", "auto"))
    if batch != "auto" and (not batch.isdigit() or int(batch) < 1):
        raise UsageError(f"--batch-size {batch} is neither auto nor a positive number", "for example --batch-size 8")
    chosen = {key: options[key] for key in LOAD_KEYS if key in options}
    chosen["batch_size"] = batch if batch == "auto" else int(batch)
    chosen["template_kwargs"] = parse_template_kwargs(options["template_kwargs"])
    return LoadSettings(**chosen)


def prompt_settings(options: dict[str, Any]) -> PromptSettings:
    return PromptSettings(**{key: options[key] for key in PROMPT_KEYS if key in options})


def direction_settings(options: dict[str, Any]) -> DirectionSettings:
    """The settings of the direction.

    Raises:
        UsageError: a value is unknown, or two options exclude each other.
    """
    fractions = options["layer_fracs"]
    if fractions is not None and options["per_layer_directions"]:
        raise UsageError(
            "--layer-fracs chooses one layer, and --per-layer-directions computes every layer's direction",
            "leave out one of them",
        )
    if fractions is None:
        fractions = registered_method(options.get("factors") or EditSettings.factors).layer_fracs
    return DirectionSettings(
        method=options["method"],
        layer_fracs=fractions,
        num_directions=options["num_directions"],
        per_layer=options["per_layer_directions"],
        position=options["position"],
    )


def is_negative_strength_alone(options: dict[str, Any]) -> bool:
    """Whether a negative strength is the only option of an edit that was given."""
    given = [key for key in (*EDIT_KEYS, "factors") if options.get(key) is not None]
    return given == ["strength"] and options["strength"] < 0


def edit_settings(options: dict[str, Any]) -> EditSettings | None:
    """The settings of the edit; None if no option of an edit was given.

    Raises:
        UsageError: a value is unknown, or the method does not support it.
    """
    given = {key: options[key] for key in EDIT_KEYS if options.get(key) is not None}
    factors = options.get("factors")
    return None if factors is None and not given else settings_of(factors, given)
