"""``run``: from instruction lists to an edited, verified, measured checkpoint and its GGUF file, resumable."""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors

from ollama_forge import __version__
from ollama_forge.architectures.described import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.checkpoints.resolve import resolve
from ollama_forge.directions.compute import DirectionSettings, FitStats, gather_fit_stats
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import check_output, edit_file, output_size, stamp, write_checkpoint
from ollama_forge.edits.factors import Given
from ollama_forge.edits.hooks import hooked
from ollama_forge.edits.least_squares import MAX_PAIRS, plan_least_squares
from ollama_forge.edits.orthogonal import plan_orthogonal
from ollama_forge.edits.plan import EditPlan, vector_reader
from ollama_forge.edits.settings import EditSettings
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import Measurement, measure
from ollama_forge.evaluation.report import Report
from ollama_forge.evaluation.verify import Check, verify
from ollama_forge.export.exporter import Exported, Exporter, ExportJob, ExportSettings
from ollama_forge.files import sha256_file, sha256_json, write_bytes
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.names import run_folder
from ollama_forge.ollama.registering import InOllama, OllamaSettings, Registrar
from ollama_forge.progress import say, status
from ollama_forge.prompts.settings import DEFAULT_PAIRS, PromptSettings
from ollama_forge.prompts.split import PromptSplit
from ollama_forge.resume import Stages
from ollama_forge.search.ladder import Candidate, Choice, climb, settings_from_json
from ollama_forge.search.trials import ASKED, Workbench


@dataclass(frozen=True)
class RunSettings:
    """Everything ``run`` can be told; ``run.toml`` holds it.

    Attributes:
        edit: the edit to make; None for the documented default, from which a ladder is climbed if ``escalate``.
        max_kl: first-token KL (nats) up to which a rung may be chosen.
    """

    model: str
    name: str
    output_dir: str | None = None
    revision: str | None = None
    prompts: PromptSettings = field(default_factory=PromptSettings)
    load: LoadSettings = field(default_factory=LoadSettings)
    direction: DirectionSettings = field(default_factory=DirectionSettings)
    edit: EditSettings | None = None
    escalate: bool = True
    max_kl: float = 0.2
    out_dtype: str = "bf16"
    evaluate: bool = True
    verify: bool = True
    export: ExportSettings = field(default_factory=ExportSettings)
    ollama: OllamaSettings = field(default_factory=OllamaSettings)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) if self.output_dir else run_folder(self.name)


def run(settings: RunSettings, *, force: bool = False) -> Report:
    """Do all stages that are not done yet.

    Raises:
        ForgeError: anything that can be expected to go wrong; a failed verification among it (the files stay, marked).
    """
    return _Run(settings, force).run()


class _Run:
    def __init__(self, settings: RunSettings, force: bool) -> None:
        self.settings = settings
        self.folder = settings.folder
        self.checkpoint_folder = self.folder / "checkpoint"
        self.source: Checkpoint = resolve(settings.model, settings.revision)
        self.map = map_checkpoint(self.source)
        self.read = vector_reader(self.source.tensors)
        self.split: PromptSplit = settings.prompts.load(MAX_PAIRS)
        needed = output_size(self.source, settings.out_dtype)
        check_output(self.checkpoint_folder, needed)
        self.exporter = Exporter(self.source, settings.model, settings.name, self.folder, settings.export)
        self.exporter.check_room(0 if self.checkpoint_folder.exists() else needed)
        self.registrar = Registrar(self.source, settings.name, self.folder, settings.ollama)
        self.stages = Stages(self.folder, force=force)
        self._model: ChatModel | None = None
        self._loaded_as: str | None = None
        self.times: dict[str, float] = {}

    # -- models and shared inputs ---------------------------------------------------------------------------------

    def model(self, *, computing: bool = False) -> ChatModel:
        """The base model, loaded once (under ``--load-in-8bit`` again in bf16 for all but computing)."""
        load = self.settings.load
        eight = load.load_in_8bit and computing
        kind = "8bit" if eight else "full"
        if self._model is None or self._loaded_as != kind:
            self.drop_model()
            wanted = load if eight or not load.load_in_8bit else replace(load, load_in_8bit=False, dtype="bfloat16")
            with status(f"loading {self.source.label}"):
                self._model = ChatModel.load(self.source, wanted)
            self._loaded_as = kind
        return self._model

    def drop_model(self) -> None:
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What every measurement depends on."""
        return {
            "version": __version__,
            "fingerprint": self.source.fingerprint,
            "lists": self.split.hashes(),
            "load": asdict(self.settings.load),
        }

    def run(self) -> Report:
        settings = self.settings
        for note in self.split.notes:
            say(f"note: {note}")
        self.exporter.announce()
        if not self.exporter.problem:
            self.registrar.announce()
        base = self.timed("base", self.measure_base) if settings.evaluate else None
        chosen = self.timed("choose", self.choose)
        control = self.timed("control", lambda: self.measure_control(chosen)) if settings.evaluate else None
        self.drop_model()  # weights are written without a model in memory
        applied = self.timed("checkpoint", lambda: self.write(chosen))
        self.drop_model()
        checks = self.timed("verify", lambda: self.check(chosen, applied)) if settings.verify else None
        final = self.timed("measure", lambda: self.measure_written(applied)) if settings.evaluate else None
        self.drop_model()
        sound = all(check["passed"] for check in checks or [])
        exported = self.export(chosen, applied) if sound else Exported(problem="the checkpoint failed verification")
        in_ollama = InOllama(problem="there is no GGUF file")
        if exported.file is not None:
            in_ollama = self.registrar.run(self.stages, exported.file.path, self.timed)
        rows = {"base": base, "random direction": control, "edited": final}
        report = self.report(chosen, rows, checks, exported, in_ollama)
        stamp(
            self.checkpoint_folder,
            verified=None if checks is None else report.verified,
            measurements={name: row.to_json() for name, row in report.rows.items()} or None,
        )
        report.save()
        if not sound:
            failed = next(check for check in report.checks or [] if not check.passed)
            raise ForgeError(
                f"verification failed: {failed.name} (worst {failed.worst}, bound {failed.bound}, at {failed.where})",
                f"the files in {self.folder} are kept and marked unverified; please report this",
            )
        failure = exported.failure or in_ollama.failure
        if failure is not None:
            raise ForgeError(
                failure.message, f"{failure.hint}; all else is done, and the same command goes on from there"
            ) from failure
        return report

    def report(
        self, chosen: dict[str, Any], rows: dict[str, Any], checks: Any, exported: Exported, in_ollama: InOllama
    ) -> Report:
        return Report(
            model=self.source.label,
            name=self.settings.name,
            fingerprint=self.source.fingerprint,
            prompts={
                part: {side: len(lines) for side, lines in asdict(getattr(self.split, part)).items()}
                for part in ("fit", "select", "report")
            },
            lists=self.split.hashes(),
            notes=list(self.split.notes),
            choice=chosen,
            rows={
                **{name: Measurement.from_json(row) for name, row in rows.items() if row is not None},
                **exported.rows,
            },
            checks=None if checks is None else [Check(**check) for check in checks],
            seconds=self.times,
            folder=self.folder,
            file=exported.file,
            file_problem=exported.problem,
            tokens=exported.tokens,
            ollama=in_ollama.to_json(),
            modelfile=in_ollama.modelfile,
            to_type=in_ollama.commands,
        )

    def timed(self, name: str, work: Any) -> Any:
        started = time.monotonic()
        result = work()
        self.times[name] = round(time.monotonic() - started, 2)
        return result

    # -- stages ---------------------------------------------------------------------------------------------------

    def measure_base(self) -> Any:
        first_file = self.stages.path("base-first.safetensors")

        def work() -> Any:
            say("measuring the base model on report prompts")
            row, first = measure(self.model(), self.split.report, None, "base model")
            write_bytes(first_file, save_safetensors({"first": first}))
            return row.to_json()

        return self.stages.run("base", self.inputs, [first_file], work)

    @property
    def pairs(self) -> int:
        return self.settings.prompts.num_instructions or DEFAULT_PAIRS

    def workbench(self) -> Workbench:
        pairs = MAX_PAIRS if self.settings.edit and self.settings.edit.factors == "least-squares" else self.pairs
        pairs = self.settings.prompts.num_instructions or pairs
        stats: FitStats | None = None
        if self.settings.load.load_in_8bit:  # that model is for computing alone; trying needs weights in bf16
            model = self.model(computing=True)
            layers, position = range(self.map.n_layers), self.settings.direction.position
            stats = gather_fit_stats(model, self.split.fit.first(pairs), layers, position, keep_samples=True)
            del model
        return Workbench(
            self.model(),
            self.split,
            self.settings.direction,
            self.read,
            pairs=pairs,
            stats=stats,
            fingerprint=self.source.fingerprint,
            seed=self.settings.prompts.seed,
        )

    def choose(self) -> Any:
        """Choose the edit; leaves the directions and factors of the choice and of its control on disk."""
        settings = self.settings
        files = [self.folder / "refusal.pt", self.folder / "refusal.json", self.stages.path("control.pt")]

        def work() -> Any:
            bench = self.workbench()
            default = Candidate("the edit asked for", ASKED, settings.edit or EditSettings())
            if settings.edit is None:
                default = replace(default, name="the documented default")
            if settings.edit is not None or not settings.escalate:
                choice = Choice(default, "asked for" if settings.edit else "the documented default, not escalated", ())
            else:
                say("trying edits on select prompts")
                base_first = bench.base_first()
                choice = climb(
                    lambda candidate, bound: bench.try_on_select(base_first, settings.max_kl, candidate, bound),
                    default,
                    lambda: bench.ladder(default.settings),
                    settings.max_kl,
                )
            say(f"chosen: {choice.candidate.name} ({choice.reason})")
            self.keep(bench, choice.candidate)
            return choice.to_json()

        inputs = {
            **self.inputs,
            "direction": asdict(settings.direction),
            "pairs": self.pairs,
            "seed": settings.prompts.seed,
            "edit": None if settings.edit is None else settings.edit.to_json(),
            "escalate": settings.escalate,
            "max_kl": settings.max_kl,
        }
        return self.stages.run("choose", inputs, files, work)

    def keep(self, bench: Workbench, candidate: Candidate) -> None:
        """Write what the later stages make plans of."""
        control = bench.control(candidate)
        for each, path in (
            (candidate, self.folder / "refusal.pt"),
            (control, self.stages.path("control.pt")),
        ):
            bench.plan(each)
            bench.direction(each.direction).save(path)
            if each.direction in bench.factors:
                factors = bench.factors[each.direction]
                tensors = {
                    f"{name}.{side}": getattr(given, side).clone() for name, given in factors.items() for side in "LK"
                }
                write_bytes(self.stages.path(f"{path.stem}.factors"), save_safetensors(tensors))

    def plan(self, chosen: dict[str, Any], *, control: bool = False) -> tuple[EditPlan, RefusalDirection]:
        """The chosen edit, or its control, from what ``keep`` wrote."""
        settings = settings_from_json(chosen["settings"])
        path = self.stages.path("control.pt") if control else self.folder / "refusal.pt"
        direction = RefusalDirection.load(path, self.map.d_model, self.map.n_layers)
        if settings.factors == "orthogonal":
            return plan_orthogonal(self.map, direction, settings, self.read), direction
        tensors = load_file(self.stages.path(f"{path.stem}.factors"))
        names = {name[:-2] for name in tensors}
        factors = {name: Given(tensors[f"{name}.L"], tensors[f"{name}.K"]) for name in names}
        return plan_least_squares(self.map, factors, settings, direction.layer), direction

    def base_first(self) -> torch.Tensor:
        return load_file(self.stages.path("base-first.safetensors"))["first"]

    def measure_control(self, chosen: dict[str, Any]) -> Any:
        def work() -> Any:
            say("measuring the control, a random direction in the same places, on report prompts")
            model = self.model()
            with hooked(model, self.plan(chosen, control=True)[0]):
                return measure(model, self.split.report, self.base_first(), "control")[0].to_json()

        return self.stages.run("control", {**self.inputs, "choice": chosen}, [], work)

    def write(self, chosen: dict[str, Any]) -> Any:
        def work() -> Any:
            plan, direction = self.plan(chosen)
            with status("writing the checkpoint"):
                applied = write_checkpoint(
                    self.source,
                    self.map,
                    plan,
                    self.checkpoint_folder,
                    settings=settings_from_json(chosen["settings"]),
                    out_dtype=self.settings.out_dtype,
                    direction=direction,
                    provenance={"lists": self.split.hashes(), "choice": chosen["reason"]},
                )
            return {"matrices": {name: record.result_sha256 for name, record in applied.record.matrices.items()}}

        inputs = {
            "version": __version__,
            "fingerprint": self.source.fingerprint,
            "choice": chosen,
            "direction": sha256_file(self.folder / "refusal.pt"),
            "out_dtype": self.settings.out_dtype,
        }
        files = [self.checkpoint_folder / "config.json", edit_file(self.checkpoint_folder)]
        return self.stages.run("checkpoint", inputs, files, work)

    @cached_property
    def written(self) -> Checkpoint:
        return Checkpoint(self.checkpoint_folder, str(self.checkpoint_folder), "folder")

    def written_model(self) -> ChatModel:
        if self._loaded_as != "written" or self._model is None:
            self.drop_model()
            load = replace(self.settings.load, load_in_8bit=False)
            with status("loading the written checkpoint"):
                self._model = ChatModel.load(self.written, load)
            self._loaded_as = "written"
        return self._model

    def check(self, chosen: dict[str, Any], applied: dict[str, Any]) -> Any:
        def work() -> Any:
            plan, direction = self.plan(chosen)
            with status("verifying the written checkpoint"):
                checks = verify(self.source, self.written, self.written_model(), plan, direction)
            return [check.to_json() for check in checks]

        return self.stages.run("verify", {**self.inputs, "checkpoint": applied}, [], work)

    def measure_written(self, applied: dict[str, Any]) -> Any:
        def work() -> Any:
            say("measuring the written checkpoint on report prompts")
            return measure(self.written_model(), self.split.report, self.base_first(), "edited")[0].to_json()

        return self.stages.run("measure", {**self.inputs, "checkpoint": applied}, [], work)

    def export(self, chosen: dict[str, Any], applied: dict[str, Any]) -> Exported:
        """The GGUF file of the written checkpoint, checked and measured as far as that can be done here."""
        provenance = {
            "source": self.source.folder.name if self.source.kind == "folder" else self.source.label,
            "source_fingerprint": self.source.fingerprint,
            "edit": {"name": chosen["name"], "settings": chosen["settings"]},
            "lists": self.split.hashes(),
            "checkpoint": sha256_json(applied),
        }
        first = self.base_first() if self.settings.evaluate else None
        job = ExportJob(self.stages, self.written, provenance, self.split.report, first, self.settings.load)
        return self.exporter.run(job, self.timed)
