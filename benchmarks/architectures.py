"""Learn and certify every causal LM and image-text-to-text type of the installed transformers.

    python benchmarks/architectures.py [--only TYPE...] [--seconds N]

Each type's config is the default of its class, completed by ``class_defaults.py`` where that is not a valid config. The
types run in a worker process, which is replaced when it crashes or needs more than N seconds (default 120) for a type.
Without ``--only``, writes ``docs/architectures.md``.

Bounds, without ``--only``: writers of 155 causal LM types and readers of 150 are proven, and both of the types named in
``FAMILIES`` and ``WRAPPERS``. With it, all given types are proven.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from class_defaults import NOT_CHAT, class_config, with_counts

WRITERS, READERS = 155, 150
_FAMILIES = """llama llama4 mistral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5 qwen3_5_moe
gemma gemma2 gemma3 gemma4 gpt_oss deepseek_v2 deepseek_v3 glm4 glm4_moe phi phi3 phimoe granite granitemoe
granitemoehybrid lfm2 lfm2_moe nemotron_h falcon_h1 jamba bamba cohere cohere2 olmo2 olmo3 olmoe exaone4 smollm3
hunyuan_v1_dense hunyuan_v1_moe minimax_m2 ernie4_5 ernie4_5_moe seed_oss kimi_linear apertus arcee starcoder2 stablelm
gpt_neox falcon gpt2"""
FAMILIES = _FAMILIES.split()
WRAPPERS = ["mistral3", "qwen2_5_vl", "qwen3_vl", "gemma3", "llama4", "llava"]
PAGE = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"


@dataclass(frozen=True)
class Type:
    """A type, and one of the classes that load its checkpoints."""

    name: str
    model_class: str
    causal: bool
    wrapper: bool


@dataclass(frozen=True)
class Row:
    """What came of a type: ``tier`` is proven, partial, refused, or "no twin"; leaks are the largest ones."""

    name: str
    model_class: str
    tier: str
    seconds: float
    writers: int = 0
    readers: int = 0
    writers_proven: bool = False
    readers_proven: bool = False
    writer_leak: float | None = None
    reader_leak: float | None = None
    note: str = ""


def all_types() -> list[Type]:
    """Every type of both kinds; one whose classes for both kinds differ is there twice."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as WRAPPER,
    )

    types = [Type(name, model, True, WRAPPER.get(name) == model) for name, model in CAUSAL.items()]
    return types + [Type(name, model, False, True) for name, model in WRAPPER.items() if CAUSAL.get(name) != model]


# ---- the worker


def examine(one: Type) -> Row:
    """Build the twin of a type, learn it, and certify it."""
    from ollama_forge.errors import ForgeError, first_line

    start, stage = time.perf_counter(), "no twin"
    try:
        twin = default_twin(one)
        stage = "refused"
        return certified(one, twin, start)
    except ForgeError as error:
        note = error.message
    except Exception as error:  # a fault in one type must not end the run
        stage, note = "error", f"{type(error).__name__}: {first_line(error)}"
    return Row(one.name, one.model_class, stage, time.perf_counter() - start, note=note)


def certified(one: Type, twin: Any, start: float) -> Row:
    from ollama_forge.architectures.certificate.certificate import EditKind
    from ollama_forge.architectures.learn import learn_from
    from ollama_forge.architectures.names.bind import bind_checkpoint
    from ollama_forge.architectures.twin.build import save_twin
    from ollama_forge.checkpoints.checkpoint import Checkpoint
    from ollama_forge.edits.certify import certify_twin
    from ollama_forge.edits.proven import Examined

    learned = learn_from(twin)
    with tempfile.TemporaryDirectory() as folder:
        save_twin(twin, Path(folder))
        checkpoint = Checkpoint(Path(folder), one.name, "folder")
        model_map = bind_checkpoint(learned, checkpoint)
        certificate = certify_twin(twin, checkpoint, model_map)
    examined = Examined(model_map, certificate)
    alone = ["its text model is loaded alone: the whole class does not run on text"] if twin.text_alone else []
    reasons = [*examined.reasons, *map(str, learned.gaps), *alone]
    return Row(
        one.name,
        one.model_class,
        str(examined.tier),
        time.perf_counter() - start,
        writers=sum(role.writes for role in learned.roles),
        readers=sum(not role.writes for role in learned.roles),
        writers_proven=certificate.proves(EditKind.WRITERS),
        readers_proven=certificate.proves(EditKind.READERS),
        writer_leak=max((leak.after for leak in certificate.writers), default=None),
        reader_leak=max((leak.after for leak in certificate.readers), default=None),
        note=reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "") if reasons else "",
    )


def default_twin(one: Type) -> Any:
    """The twin of the default config of a type, else of that config with counts for all heads and experts."""
    from ollama_forge.architectures.twin.build import build_twin
    from ollama_forge.errors import ForgeError, error_line

    try:
        config = class_config(one.name) | {"architectures": [one.model_class]}
    except Exception as error:  # the class's own checks
        raise ForgeError(
            f"the default config of its class is not valid: {error_line(error)}", "add to EXTRA"
        ) from error
    try:
        return build_twin(config)
    except ForgeError as refusal:
        filled = with_counts(config)
        if filled == config:
            raise
        try:
            return build_twin(filled)
        except ForgeError:
            raise refusal from None


def work() -> None:
    """Answer each type on stdin with its row on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    for line in sys.stdin:
        row = examine(Type(**json.loads(line)))
        print(json.dumps(asdict(row)), file=answers, flush=True)


# ---- the run


class Worker:
    """A process that examines types; it is started when it is needed."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None

    def examine(self, one: Type) -> Row:
        if self.process is None:
            command = [sys.executable, __file__, "--worker"]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        start = time.perf_counter()
        self.process.stdin.write(json.dumps(asdict(one)) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], self.seconds)
        answer = self.process.stdout.readline() if ready else ""
        if answer:
            return Row(**json.loads(answer))
        self.close()
        note = "the process crashed" if ready else f"not done after {self.seconds:.0f} seconds"
        return Row(one.name, one.model_class, "error", time.perf_counter() - start, note=note)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def examine_all(types: list[Type], seconds: float) -> Iterator[Row]:
    worker = Worker(seconds)
    try:
        for one in types:
            row = worker.examine(one)
            writers, readers = leak_text(row.writer_leak), leak_text(row.reader_leak)
            print(
                f"{row.name} ({row.model_class}): {row.tier}, {row.writers} writers {writers}, "
                f"{row.readers} readers {readers}, {row.seconds:.1f} s {row.note}",
                flush=True,
            )
            yield row
    finally:
        worker.close()


def checks(types: list[Type], rows: list[Row]) -> list[tuple[str, bool]]:
    """The bounds of a whole run, and whether each is kept."""
    proven = {(row.name, row.model_class) for row in rows if row.tier == "proven"}
    causal = {(one.name, one.model_class) for one in types if one.causal}
    wrappers = {(one.name, one.model_class) for one in types if one.wrapper}
    writers = sum(row.writers_proven for row in rows if (row.name, row.model_class) in causal)
    readers = sum(row.readers_proven for row in rows if (row.name, row.model_class) in causal)
    lost = [name for name in FAMILIES if name not in {name for name, _ in proven & causal}]
    lost += [f"{name} (wrapper)" for name in WRAPPERS if name not in {name for name, _ in proven & wrappers}]
    return [
        (f"writers of {writers} of {len(causal)} causal LM types proven (at least {WRITERS})", writers >= WRITERS),
        (f"readers of {readers} of {len(causal)} causal LM types proven (at least {READERS})", readers >= READERS),
        (f"named families not proven: {', '.join(lost) or 'none'}", not lost),
    ]


def leak_text(leak: float | None) -> str:
    return "" if leak is None else f"{leak:.0e}"


def page(types: list[Type], rows: list[Row]) -> str:
    """The content of docs/architectures.md."""
    from transformers import __version__

    def count(kind: str) -> str:
        chosen = [row for one, row in zip(types, rows, strict=True) if getattr(one, kind)]
        both = sum(row.tier == "proven" for row in chosen)
        writers, readers = sum(row.writers_proven for row in chosen), sum(row.readers_proven for row in chosen)
        return f"{both} of {len(chosen)} proven (writers {writers}, readers {readers})"

    others = Counter(NOT_CHAT[name] for name in {one.name for one in types} if name in NOT_CHAT)
    listed = ", ".join(f"{number} {what}" for what, number in others.most_common())
    lines = [
        "# Architectures",
        "",
        f"`benchmarks/architectures.py` wrote this page with transformers {__version__}. "
        "Each row is the twin of a type's default config.",
        "",
        f"Causal LMs: {count('causal')}. Image-text-to-text: {count('wrapper')}. "
        f"{others.total()} of the {len({one.name for one in types})} types are no chat models (marked *): {listed}.",
        "",
        "A leak is what an edit at full strength left along the direction: writers, the largest `|r.h| / |h|` at any "
        "layer; readers, the largest effect of a nudge along `r` relative to what the block adds.",
        "",
        "| type | class | tier | writers | readers | leak of writers | of readers | seconds | why not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.name, row.model_class)):
        cells = [
            row.name + ("*" if row.name in NOT_CHAT else ""),
            row.model_class,
            row.tier,
            str(row.writers or ""),
            str(row.readers or ""),
            leak_text(row.writer_leak),
            leak_text(row.reader_leak),
            f"{row.seconds:.1f}",
            row.note.replace("|", "\\|"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="examine these types alone")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="N", help="time limit for a type")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    types = [one for one in all_types() if not options.only or one.name in options.only]
    rows = list(examine_all(types, options.seconds))
    if options.only:
        bounds = [(f"{row.name} ({row.model_class}) is {row.tier}", row.tier == "proven") for row in rows]
    else:
        PAGE.write_text(page(types, rows), encoding="utf-8")
        bounds = checks(types, rows)
    for text, kept in bounds:
        print(f"{'pass' if kept else 'FAIL'}: {text}")
    return 0 if all(kept for _, kept in bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
