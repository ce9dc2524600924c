"""How the edit was chosen: the separation of layers, the probes, and the edits that were tried on select prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ollama_forge.reporting.axes import Scale, x_axis, y_axis
from ollama_forge.reporting.blocks import WIDTH, figure, figures, section, table
from ollama_forge.reporting.entry import Entry, count, decimal, general, refused, words
from ollama_forge.reporting.marks import SERIES, legend, line, mark, rule, whisker
from ollama_forge.reporting.markup import Child, Html, join, tag

_LEFT, _RIGHT = 46.0, WIDTH - 14.0
_PANEL = 150.0  # height of a panel


def choosing(report: Entry) -> Html | None:
    """The section on the choice of the edit; None if the report has no choice."""
    choice = report["choice"]
    if not choice:
        return None
    return section(
        "Choice of the edit",
        tag("p", tag("strong", words(choice["name"])), ": ", words(choice["reason"]), "."),
        _compared(choice),
        figures(_front(report), _strengths(report), _probes(choice), _separation(report)),
        _trials(choice),
    )


def _compared(choice: Entry) -> Html | None:
    """The comparison with the edit that the ladder alone would choose."""
    compared = choice["compared"]
    if not compared:
        return None
    kl = compared["answer_kl"]
    return tag(
        "p",
        *(
            "Without the search, ",
            words(compared["other"]),
            " would have been chosen. On the select prompts this edit ",
        ),
        *(
            "fails on ",
            count(compared["failures"]),
            " harmful prompts, that one on ",
            count(compared["others_failures"]),
        ),
        *(
            " (McNemar's p ",
            decimal(compared["p"]),
            "); its answer KL less that one's is ",
            decimal(kl["value"]),
            " (95 %: ",
        ),
        *(decimal(kl["low"]), " to ", decimal(kl["high"]), ")."),
    )


def _share(trial: Entry) -> float:
    return trial["harmful"]["refusal_rate"]["value"].number if trial["harmful"]["total"].value else math.nan


def _trials(choice: Entry) -> Html | None:
    if not choice["trials"]:
        return None

    bounded = any(trial["harmless"]["total"].value for trial in choice["trials"])

    def cells(trial: Entry) -> list[Child]:
        chosen = tag("em", " (chosen)") if trial["name"].value == choice["name"].value else None
        harmful, harmless = trial["harmful"], trial["harmless"]
        return [
            (words(trial["name"]), chosen),
            refused(harmful),
            *([refused(harmless)] if bounded else []),
            count(harmful["deflection"]),
            count(harmful["degenerate"]),
            decimal(trial["answer_kl"]),
            decimal(trial["first_token_kl"]),
            words(trial["ended_early"]) if trial["ended_early"] else "no",
        ]

    counted = ("refused", *(["harmless refused"] if bounded else []), "deflected", "degenerate")
    header = ("edit", *counted, "answer KL", "first-token KL", "ended early")
    lines = [cells(trial) for trial in choice["trials"]]
    return table("Edits tried on select prompts, at most 64 tokens an answer", header, lines)


def _front(report: Entry) -> Html | None:
    """Refusals against damage of the edits tried, with the best of each damage and the pick."""
    choice = report["choice"]
    trials = [trial for trial in choice["trials"] if not math.isnan(_share(trial))]
    if not trials:
        return None
    limit = report["settings"]["max_answer_kl"].number
    top = 34.0
    x = Scale.of([*(trial["answer_kl"].number for trial in trials), limit], _LEFT, _RIGHT)
    y = Scale.shares(top + 230, top)
    base = choice["base"]["harmful"]["refusal_rate"]["value"].number
    drawn: list[Child] = [
        x_axis(x, y.start, "answer KL, nats a token"),
        y_axis(y, _LEFT, "refused, %", share=True, grid_to=_RIGHT),
    ]
    if not math.isnan(limit):
        drawn.append(rule(x(limit), x(limit), top, y.start, "limit", (x(limit) - 4, top + 10), "end"))
    strengthens = choice["settings"]["strength"].number < 0
    drawn.append(line(2, [(x(kl), y(share)) for kl, share in _steps(trials, base, strengthens=strengthens)]))
    drawn.append(mark(0, x(0), y(base), hollow=True))
    for trial in trials:
        at = x(trial["answer_kl"].number), y(_share(trial))
        rate = trial["harmful"]["refusal_rate"]
        drawn.append(whisker(2, at[0], at[0], y(rate["low"].number), y(rate["high"].number)))
        drawn.append(mark(2, *at, hollow=bool(trial["ended_early"])))
        if trial["name"].value == choice["name"].value:
            drawn.append(tag("circle", cx=at[0], cy=at[1], r=9.0, class_="ring"))
            side = at[0] > (_LEFT + _RIGHT) / 2
            drawn.append(
                tag("text", "chosen", x=at[0] + (-13 if side else 13), y=at[1] - 9,
                    text_anchor="end" if side else "start", class_="name")
            )  # fmt: skip
    return figure(
        "Refusals against damage",
        "Each edit tried as a point: the further left, the less damage; "
        + ("the further up, the more is refused." if strengthens else "the further down, the fewer refusals are left."),
        drawn,
        y.start + 42,
        figures=_points_table("Refusals against damage", trials, choice),
        caption="On select prompts. The line joins the edits that no other beats on both axes.",
        legend=legend([(0, "base", True), (2, "edit", False), (2, "ended early", True)]),
    )


def _steps(trials: Sequence[Entry], base: float, *, strengthens: bool) -> list[tuple[float, float]]:
    """The corners of the front of complete trials, from the base to the edit with the fewest refusals (or the most)."""
    complete = [(trial["answer_kl"].number, _share(trial)) for trial in trials if not trial["ended_early"]]
    corners, best = [(0.0, base)], base
    for kl, share in sorted(complete):
        if (share > best) if strengthens else (share < best):
            corners += [(kl, best), (kl, share)]
            best = share
    return corners


def _points_table(title: str, trials: Sequence[Entry], choice: Entry) -> Html:
    lines: list[list[Child]] = [["base", refused(choice["base"]["harmful"]), ""]]
    lines += [[words(trial["name"]), refused(trial["harmful"]), decimal(trial["answer_kl"])] for trial in trials]
    return table(title, ("edit", "refused", "answer KL"), lines)


def _strengths(report: Entry) -> Html | None:
    """Refusals and damage over the strength, a line for each direction and method tried at several strengths."""
    groups: dict[str, list[Entry]] = {}
    for trial in report["choice"]["trials"]:
        groups.setdefault(str(trial["name"].value).rsplit(", strength", 1)[0], []).append(trial)
    several = [name for name, found in groups.items() if len({one["settings"]["strength"].value for one in found}) > 1]
    if not several:
        return None
    largest = sorted(several, key=lambda name: -len(groups[name]))[: SERIES - 1]
    chosen = {name: sorted(groups[name], key=lambda trial: trial["settings"]["strength"].number) for name in largest}
    trials = [trial for found in chosen.values() for trial in found]
    x = Scale.of([trial["settings"]["strength"].number for trial in trials], _LEFT, _RIGHT, zero=False)
    upper = Scale.shares(34.0 + _PANEL, 34.0)
    lower = Scale.of([trial["answer_kl"].number for trial in trials], 72.0 + 2 * _PANEL, 72.0 + _PANEL, most_ticks=5)
    drawn: list[Child] = [
        y_axis(upper, _LEFT, "refused, %", share=True, grid_to=_RIGHT),
        y_axis(lower, _LEFT, "answer KL, nats a token", grid_to=_RIGHT),
        x_axis(x, lower.start, "strength"),
    ]
    for series, found in enumerate(chosen.values(), start=1):
        at = [(x(trial["settings"]["strength"].number), trial) for trial in found]
        shares = [(place, upper(_share(trial)), trial) for place, trial in at]
        kls = [(place, lower(trial["answer_kl"].number), trial) for place, trial in at]
        for points in (shares, kls):
            drawn.append(line(series, [(place, y) for place, y, _ in points]))
            drawn += [mark(series, place, y, hollow=bool(trial["ended_early"])) for place, y, trial in points if y == y]
    header = ("edit", "strength", "refused", "answer KL")
    lines = [
        (words(trial["name"]), general(trial["settings"]["strength"]), refused(trial["harmful"]),
         decimal(trial["answer_kl"]))
        for trial in trials
    ]  # fmt: skip
    title = "Strength against refusals and damage"
    return figure(
        title,
        "Two panels over the strength of the edit: the share refused above, the damage below.",
        drawn,
        lower.start + 42,
        figures=table(title, header, lines),
        caption="On select prompts. Hollow marks are trials that were ended early, after fewer prompts.",
        legend=legend([(series, name, False) for series, name in enumerate(chosen, start=1)]),
    )


def _probes(choice: Entry) -> Html | None:
    """What the ablation of each proposed layer's direction does."""
    probes = list(choice["probes"])
    if len(probes) < 2:
        return None
    moments = list(dict.fromkeys(_moment(probe) for probe in probes))
    layers = [probe["layer"].number for probe in probes]
    x = Scale.of_layers(int(max(layers)), _LEFT, _RIGHT, first=int(min(layers)))
    upper = Scale.of([probe["refusal"].number for probe in probes], 34.0 + _PANEL, 34.0, most_ticks=5)
    lower = Scale.of([probe["answer_kl"].number for probe in probes], 72.0 + 2 * _PANEL, 72.0 + _PANEL, most_ticks=5)
    drawn: list[Child] = [
        y_axis(upper, _LEFT, "refusal openings, share of the base\u2019s probability", grid_to=_RIGHT),
        y_axis(lower, _LEFT, "answer KL, nats a token", grid_to=_RIGHT),
        x_axis(x, lower.start, "layer of the direction"),
    ]
    series = {moment: 2 - place for place, moment in enumerate(moments)}
    for scale, key in ((upper, "refusal"), (lower, "answer_kl")):
        for moment, number in series.items():
            of_moment = [probe for probe in probes if _moment(probe) == moment]
            points = [(x(probe["layer"].number), scale(probe[key].number)) for probe in of_moment]
            drawn += [line(number, points), *(mark(number, *point) for point in points)]
    title = "What removing each layer\u2019s direction does"
    several = len(moments) > 1
    lines = [
        (count(probe["layer"]), *([words(probe["moment"])] if several else []), decimal(probe["refusal"], 4),
         decimal(probe["answer_kl"]))
        for probe in probes
    ]  # fmt: skip
    return figure(
        title,
        "Two panels over the layer: how probable the base\u2019s refusals stay, and the damage.",
        drawn,
        lower.start + 42,
        figures=table(title, ("layer", *(["before the"] if several else []), "probability left", "answer KL"), lines),
        caption="Probes on a few prompts, without generating answers. They rank the layers that are tried.",
        legend=legend(
            [(number, f"before the {moment}", False) for moment, number in series.items()] if several else []
        ),
    )


def _moment(probe: Entry) -> str:
    """What a probed direction is found before."""
    return str(probe["moment"].value)


def _separation(report: Entry) -> Html | None:
    """How well each layer and position separates held-out prompts."""
    found = report["separation"]
    if not found:
        return None
    rows = list(found["d_prime"])
    names = [_position_name(found, place) for place in range(len(rows))]
    if found["at_thought"]:
        rows.append(found["at_thought"])
        names.append(join("at the thought"))
    x = Scale.of_layers(len(rows[0].value) - 1, _LEFT, _RIGHT)
    y = Scale.of([value.number for row in rows for value in row], 34.0 + 230, 34.0)
    drawn: list[Child] = [
        x_axis(x, y.start, "layer"),
        y_axis(y, _LEFT, "d\u2032", grid_to=_RIGHT),
    ]
    layer = _layer_of(str(report["choice"]["direction"].value))
    series = [(place + 1) % SERIES for place in range(len(rows))]
    for number, row in zip(series, rows, strict=True):
        points = [(x(place), y(value.number)) for place, value in enumerate(row)]
        drawn += [line(number, points), *(mark(number, *point) for point in points[:: 1 + len(points) // 12])]
    if not math.isnan(layer):
        drawn.append(rule(x(layer), x(layer), y.end, y.start, "chosen", (x(layer) + 4, y.end + 10)))
    title = "Separation by layer and position"
    lines = [
        (count(found["layers"][place]), *(decimal(row[place], 1) for row in rows))
        for place in range(len(rows[0].value))
    ]
    return figure(
        title,
        "For each layer and each of the last token positions, how far apart harmful and harmless prompts lie.",
        drawn,
        y.start + 42,
        figures=table(title, ("layer", *names), lines),
        caption=(
            "d\u2032: the distance between harmful and harmless select prompts along the difference of means of fit "
            "prompts, in standard deviations. Prompts: ",
            count(found["prompts"]["harmful"]),
            " harmful, ",
            count(found["prompts"]["harmless"]),
            " harmless. Most layers separate well; that alone does not make an edit good.",
        ),
        legend=legend([(number, name, False) for number, name in zip(series, names, strict=True)]),
    )


def _position_name(found: Entry, place: int) -> Html:
    token = found["tokens"][place]
    name = words(token) if str(token.value or "").strip() else "\u21b5" if token.value == "\n" else "(varies)"
    return join((decimal(found["positions"][place], 0), " ", name))


def _layer_of(direction: str) -> float:
    """The layer that the name of a direction states; NaN if it states none."""
    match = re.fullmatch(r"layer ([0-9]+)( at the thought)?", direction)
    return math.nan if match is None else float(match[1])
