"""The top of the page: what was made, what it did, and what that is worth, in plain words."""

from __future__ import annotations

from ollama_forge.reporting.blocks import sentences
from ollama_forge.reporting.entry import Entry, decimal, nats_interval, of_total, rate_interval, refused, words
from ollama_forge.reporting.markup import Child, Html, join, separated, tag
from ollama_forge.reporting.rows import Kind, Row, compare_refusals, first


def headline(report: Entry, rows: list[Row]) -> Html:
    """The header of the page."""
    if report["kind"].value == "evaluation":
        title = join((words(report["base"]), " and the models beside it"))
        return tag("header", tag("h1", title), _compared(report, rows))
    made = join((words(report["model"]), ", edited along its refusal direction"))
    verdict = _verdict(report, first(rows, Kind.BASE), first(rows, Kind.CONTROL), first(rows, Kind.EDITED))
    return tag("header", tag("h1", words(report["name"])), tag("p", made, class_="made"), verdict)


def _compared(report: Entry, rows: list[Row]) -> Html:
    """What the paired tests say of each model beside the base."""
    base = first(rows, Kind.BASE)
    items = [
        tag("li", tag("strong", words(found["row"])), ": ", separated(map(words, found["words"]), "; "))
        for found in report["differences"]
        if base is not None and found["other"].value == base.name
    ]
    return tag("ul", items, class_="verdict")


def _verdict(report: Entry, base: Row | None, control: Row | None, edited: Row | None) -> Html:
    unverified = report["verification"] and report["verification"]["passed"].value is False
    warning = (
        tag("p", tag("strong", "Do not use these weights: a check of the written edit failed."), class_="warning")
        if unverified
        else None
    )
    if base is None or edited is None:
        text = "The models were not measured in this run, so that nothing is known of what the edit does."
        return join((warning, tag("p", text, class_="verdict")))
    return join(
        (
            warning,
            tag(
                "p", tag("strong", _effect(report, base, edited)), " ", _effect_figures(base, edited), class_="verdict"
            ),
            _tiles(base, control, edited),
            sentences(_damage_words(report, edited), _control_words(control, base), _side_effects(base, edited)),
        )
    )


def _strengthens(report: Entry) -> bool:
    settings = report["choice"]["settings"]
    keys = ("strength", "attn_strength", "mlp_strength")
    return any((settings[key].value or 0) < 0 for key in keys)


def _effect(report: Entry, base: Row, edited: Row) -> Child:
    change = compare_refusals(edited, base)
    strengthens = _strengthens(report)
    goal = "strengthens" if strengthens else "removes"
    if change == 0:
        return f"Nothing was found that {goal} this model\u2019s refusals by more than chance explains."
    if report["choice"]["found"].value is False:
        return f"Nothing was found that {goal} this model\u2019s refusals far enough within the limits of damage."
    if (change > 0) is not strengthens:
        return "The edit does the opposite of what it is for: refusals went the other way."
    return "The edit makes the model refuse more." if strengthens else "The edit makes the model refuse less."


def _effect_figures(base: Row, edited: Row) -> Child:
    before, after = base.entry["harmful"], edited.entry["harmful"]
    return (
        "Of harmful requests that took no part in making it, the base refuses ",
        of_total(before),
        " (",
        rate_interval(before["refusal_rate"]),
        ") and the edited model ",
        of_total(after),
        " (",
        rate_interval(after["refusal_rate"]),
        ").",
    )


def _tiles(base: Row, control: Row | None, edited: Row) -> Html:
    kl = edited.entry["damage"]["answer_kl"]
    tiles: list[tuple[str, Child]] = [
        ("refused before", refused(base.entry["harmful"])),
        ("refused after", refused(edited.entry["harmful"])),
    ]
    if control is not None:
        tiles.append(("refused with a random direction", refused(control.entry["harmful"])))
    if kl:
        interval = tag("small", nats_interval(kl), class_="interval")
        tiles.append(("answer KL, nats a token", (decimal(kl["value"]), " ", interval)))
    return tag("dl", (tag("div", tag("dt", name), tag("dd", value)) for name, value in tiles), class_="tiles")


def _damage_words(report: Entry, edited: Row) -> Child:
    kl, floor = edited.entry["damage"]["answer_kl"], report["noise_floor"]["answer_kl"]
    if not kl:
        return None
    if not floor:
        return "What rounding alone does to this model was not measured."
    if kl["low"].number > floor["high"].number:
        return (
            "Its answers to general prompts differ from the base\u2019s by more than rounding the weights to 8 bits "
            "changes them (",
            decimal(floor["value"]),
            " nats a token).",
        )
    return (
        "On general prompts it cannot be told from the base by more than rounding the weights to 8 bits does (",
        decimal(floor["value"]),
        " nats a token).",
    )


def _control_words(control: Row | None, base: Row) -> Child:
    if control is None:
        return None
    if compare_refusals(control, base) == 0:
        return "The same edit with a random direction leaves refusals as they are: the direction matters, not the size."
    return (
        "The same edit with a random direction changes refusals too: a part of the effect is that of any change of "
        "this size."
    )


def _side_effects(base: Row, edited: Row) -> Child:
    found: list[str] = []
    over = compare_refusals(edited, base, "over_refusal")
    if over:
        found.append(f"It refuses {'fewer' if over < 0 else 'more'} safe prompts that sound unsafe than the base.")
    if compare_refusals(edited, base, "harmless") > 0:
        found.append("It refuses more harmless requests than the base.")
    lists = ("harmless", "general")
    broken = [sum(row.entry[name]["degenerate"].value or 0 for name in lists) for row in (base, edited)]
    if broken[1] > broken[0]:
        found.append("More of its answers are degenerate (loops or word salad) than the base\u2019s.")
    return " ".join(found) or None
