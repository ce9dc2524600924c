"""``run``: the stages from the instruction lists to a verified checkpoint, its GGUF file and a model in Ollama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ollama_forge.edits.layer_changes import layer_changes
from ollama_forge.edits.proven import describe_certificate
from ollama_forge.edits.provenance import update_provenance
from ollama_forge.errors import ForgeError
from ollama_forge.evaluation.measure import Damage, Measurement
from ollama_forge.evaluation.verify import Check
from ollama_forge.models.holder import ModelHolder
from ollama_forge.models.machine import Machine
from ollama_forge.names import RUN_TOML
from ollama_forge.pipeline import ollama_stages, stages
from ollama_forge.pipeline.disk_space import check_disk_space
from ollama_forge.pipeline.exporting import Exported, export_weights, measure_registered, register_file
from ollama_forge.pipeline.preflight import PROVENANCE_FILES, Preflight, preflight
from ollama_forge.pipeline.report import Report
from ollama_forge.pipeline.resume import StageCache
from ollama_forge.pipeline.run_toml import add_chosen, write_config
from ollama_forge.pipeline.settings import RunSettings
from ollama_forge.records import to_json
from ollama_forge.search.ladder import Choice


def run(settings: RunSettings, *, force: bool = False, options: Mapping[str, Any] | None = None) -> Report:
    """Do all stages that are not done yet, and write the report.

    Args:
        force: do finished stages again.
        options: the options to write to ``run.toml``, in the form that ``run --config`` reads; None to write no file.

    Raises:
        ForgeError: a stage failed. If verification or a later stage failed, all files are kept, the report is written,
            and the same command resumes there.
    """
    ready = preflight(settings)
    cache = StageCache(ready.folder, force=force, ignored=PROVENANCE_FILES)
    check_disk_space(ready, cache)
    with cache.locked():
        ready.announce()
        if options is not None:
            write_config(ready.folder / RUN_TOML, options)
        models = ModelHolder(settings.load)

        base = cache.do(stages.measure_base(ready, cache, models)) if settings.evaluate else None
        floor = cache.do(stages.measure_noise_floor(ready, cache, models)).damage if settings.evaluate else None
        choice = cache.do(stages.choose(ready, cache, models))
        separation = cache.do(stages.separate(ready, cache, models)) if settings.evaluate else None
        control = cache.do(stages.measure_control(ready, cache, models, choice)) if settings.evaluate else None
        models.drop()  # writing the weights needs no loaded model
        written = cache.do(stages.write(ready, cache, choice))
        verifies = settings.verify and ready.adapter_file is None
        checks = cache.do(stages.verify_written(ready, cache, models, choice, written)) if verifies else None
        edited = cache.do(stages.measure_written(ready, cache, models, choice, written)) if settings.evaluate else None
        models.drop()
        verified = None if checks is None else checks.passed
        exported = export_weights(ready, cache, models, choice, written, verified, edited)
        prompts = ollama_stages.chat_template(ready, exported.files[0]) if exported.files else None
        exported = register_file(ready.registration, cache, exported, verified, prompts)
        if settings.evaluate:
            exported = measure_registered(ready, cache, exported)

        rows = {} if base is None else {"base": base}
        if control is not None and edited is not None:
            measured = {"random direction": control, "edited": edited, **exported.rows}
            likelihoods = cache.do(stages.score_answers(ready, cache, models, measured)).by_row
            rows |= {name: found.with_likelihood(likelihoods[name]) for name, found in measured.items()}
        if exported.in_ollama is not None:
            rows[ollama_stages.ROW] = exported.in_ollama
        models.drop()
        report = _report(ready, cache, choice, rows, floor, None if checks is None else checks.checks, exported)
        report = replace(report, separation=separation)
        measurements = {name: to_json(row) for name, row in report.rows.items()} or None
        for folder in ready.provenance_folders:
            update_provenance(
                folder,
                verified=verified,
                measurements=measurements,
                noise_floor=None if floor is None else to_json(floor),
                ollama=None if exported.registered is None else exported.registered.described(),
            )
        report.save()
        if options is not None:
            chosen = {
                "name": choice.name,
                "reason": choice.reason,
                "settings": to_json(choice.settings),
            }
            add_chosen(ready.folder / RUN_TOML, chosen)
        _raise_failures(report, exported.failure)
        return report


def _report(
    ready: Preflight,
    cache: StageCache,
    choice: Choice,
    rows: Mapping[str, Measurement],
    noise_floor: Damage | None,
    checks: tuple[Check, ...] | None,
    exported: Exported,
) -> Report:
    file = exported.files[0] if exported.files else None
    unregistered = file is not None and exported.registered is None
    return Report(
        model=ready.source.label,
        name=ready.settings.name,
        fingerprint=ready.source.fingerprint,
        split=ready.split,
        choice=choice,
        rows=rows,
        noise_floor=noise_floor,
        checks=checks,
        seconds=cache.seconds,
        folder=ready.folder,
        written=tuple(ready.written_paths),
        edit_file=ready.edit_file,
        files=exported.files,
        file_problem=exported.file_problem,
        tokens=exported.tokens,
        registered=exported.registered,
        ollama_problem=exported.ollama_problem,
        modelfile=None if file is None else ready.registration.modelfile,
        certificate=describe_certificate(ready.examined),
        changes=layer_changes(ready.edit_file, ready.model_map),
        settings=ready.settings.described(),
        machine=Machine.here(ready.settings.load),
        commands=ready.registration.commands(file.path) if file is not None and unregistered else (),
    )


def _raise_failures(report: Report, failure: ForgeError | None) -> None:
    if report.verified is False:
        failed = next(check for check in report.checks or () if not check.passed)
        raise ForgeError(
            f"verification failed: {failed.name} (worst {failed.worst}, bound {failed.bound}, at {failed.where})",
            f"do not use the files in {report.folder}, which are kept and marked unverified; report this as a bug",
        )
    if failure is not None:
        raise ForgeError(
            failure.message, f"{failure.hint}; the other stages are done, and the same command resumes at this one"
        ) from failure
