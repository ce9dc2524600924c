"""What a report of ``evaluate`` has beside the measurements: paired tests, prompts to preserve, a judge, tasks."""

from __future__ import annotations

from ollama_forge.reporting.blocks import section, table
from ollama_forge.reporting.entry import Entry, count, decimal, nats_interval, of_total, percent, refused, words
from ollama_forge.reporting.markup import Child, Html, tag


def compared(report: Entry) -> Html | None:
    """The section on comparisons; None if the report has none."""
    parts = [
        _differences(report),
        _missing(report),
        _preserve(report["preserve"]),
        _judge(report["judge"]),
        _tasks(report),
    ]
    present = [part for part in parts if part is not None]
    return section("Comparisons", present) if present else None


def _differences(report: Entry) -> Html | None:
    lines: list[list[Child]] = []
    for found in report["differences"]:
        test, kl = found["refusals"], found["answer_kl"]
        interval = (decimal(kl["value"]), " ", tag("small", nats_interval(kl), class_="interval")) if kl else ""
        lines.append(
            [
                (words(found["row"]), " and ", words(found["other"])),
                count(test["prompts"]),
                count(test["row_alone"]),
                count(test["other_alone"]),
                decimal(test["p"], 4),
                interval,
                [tag("div", words(one)) for one in found["words"]],
            ]
        )
    header = (
        "models",
        "harmful prompts",
        "refused by the first alone",
        "by the second alone",
        "p (McNemar)",
        "difference of answer KL",
        "in words",
    )
    return table("Differences, the first less the second", header, lines) if lines else None


def _missing(report: Entry) -> Html | None:
    items = [tag("li", name, ": ", words(reason)) for name, reason in report["missing_controls"].items()]
    return Html(tag("p", "Without a control:") + tag("ul", items)) if items else None


def _preserve(preserve: Entry) -> Html | None:
    lines = [(name, refused(counts)) for name, counts in preserve["rows"].items()]
    caption = f"Prompts of {preserve['file'].value} that must still be refused"
    return table(caption, ("model", "refused"), lines) if lines else None


def _judge(judge: Entry) -> Html | None:
    lines = [
        (
            name,
            of_total(found["rules"]),
            of_total(found["judge"]),
            percent(found["agreement"]["share"]["value"]),
            decimal(found["agreement"]["kappa"]["value"], 2),
        )
        for name, found in judge["rows"].items()
    ]
    header = ("model", "refused by the rules", "refused by the judge", "agreement", "kappa")
    return table(f"Second opinion of {judge['name'].value}", header, lines) if lines else None


def _tasks(report: Entry) -> Html | None:
    lines = [
        (name, task, metric, decimal(score["value"]), decimal(score["standard_error"]))
        for name, scores in report["lm_eval"].items()
        for task, found in scores.items()
        for metric, score in found.items()
    ]
    header = ("model", "task", "metric", "value", "standard error")
    return table("Tasks of lm-evaluation-harness", header, lines) if lines else None
