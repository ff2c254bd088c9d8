"""One retraining in words: a day's report.md."""

from typing import Any

from trainer.reporting.console import format_number as decimal
from trainer.retraining.arrivals_report import describe_arrivals


def changes_report(result: dict[str, Any]) -> str:
    """What changed with a day, Markdown. result: the content of its retrain.json."""
    lines = [f"# Retraining {result['name']}", ""]
    lines += _outcome(result)
    lines += _notes(result.get("notes", []))
    lines += _carried(result)
    lines += _metrics(result["domains"])
    lines += describe_arrivals(result)
    if result["extension"]:
        lines += _logs(result["extension"])
    if result["drift"]:
        lines += _drift(result["drift"])
    lines += _time(result["seconds"])
    return "\n".join(lines)


def _outcome(result: dict[str, Any]) -> list[str]:
    """Whether the day's model serves, or why not."""
    if result["published"]:
        return [f"Published as version {result['published']}.", ""]
    lines = [
        "**Not published.** Yesterday's model goes on serving. Against it speaks:",
        "",
    ]
    for reason in result["reasons"]:
        lines.append(f"- {reason}")
    lines += ["", after_refusal(result["name"]), ""]
    return lines


def after_refusal(name: str) -> str:
    """What becomes of a refused day's logs."""
    return (
        "Its logs come along with the next day. If they are spoiled, start that one with "
        f"`leave_out=[{name}]`, and give them again under another name once they are right."
    )


def describe_carried(record: dict[str, Any]) -> list[str]:
    """Sentences on the logs of refused days. record: a plan, or a day's retrain.json."""
    lines = []
    carried = record.get("carried", [])
    left_out = record.get("left_out", [])
    if carried:
        names = ", ".join(carried)
        lines.append(
            f"The logs of {names} come along: refused days; leave_out=[{names}] leaves "
            "them out."
        )
    if left_out:
        lines.append(
            f"The logs of {', '.join(left_out)} are left out, as asked: refused days."
        )
    return lines


def _notes(notes: list[str]) -> list[str]:
    """What was seen, and not held against the day's model."""
    if not notes:
        return []
    return ["Not held against it:", "", *(f"- {note}" for note in notes), ""]


def _carried(result: dict[str, Any]) -> list[str]:
    """Which logs of refused days the dataset has."""
    lines = describe_carried(result)
    return [" ".join(lines), ""] if lines else []


def _metrics(domains: dict[str, dict[str, Any]]) -> list[str]:
    """Both models' figures by domain, with the confidence interval of their difference."""
    lines = [
        "## NDCG@10 on the newest held-out items",
        "",
        "| domain | users | candidate | current | 95 % | when published |",
        "|---|---:|---:|---:|---|---:|",
    ]
    for name, figures in domains.items():
        difference = figures["difference"] or {}
        interval = difference.get("interval")
        between = "–"
        if interval is not None:
            low, high = interval
            between = f"{low:+.4f} to {high:+.4f}"
        users = f"{figures['users']:,}"
        if not figures["newest"]:
            users += " (all)"
        cells = [
            name,
            users,
            decimal(figures["candidate"]),
            decimal(figures["current"]),
            between,
            decimal(figures["when_published"]),
        ]
        lines.append(_row(cells))
    return lines


def _logs(extension: dict[str, Any]) -> list[str]:
    """What came, and what became of the dataset."""
    users = extension["users"]
    arrived = extension["arrived"]
    delivered_before = extension["delivered_before"]
    late = extension["late"]
    before_window = extension["before_window"]
    came = (
        f"{arrived:,} rows came; "
        f"{delivered_before:,} had come before, "
        f"{late:,} were late, "
        f"{before_window:,} older than the window. "
        f"{users['before']:,} users became {users['now']:,}."
    )
    if extension["laid_out_anew"]:
        came += " Domains were laid out anew."
    lines = [
        "",
        "## Logs",
        "",
        came,
        "",
        "| domain | items | new | retired | interactions | before |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    columns = ("items", "new", "retired", "interactions", "interactions_before")
    for name, counts in extension["domains"].items():
        cells = [name]
        for column in columns:
            cells.append(f"{counts[column]:,}")
        lines.append(_row(cells))
    return lines


def _drift(drift: dict[str, dict[str, Any]]) -> list[str]:
    """Cosines of items' vectors with those of the model before, by domain."""
    lines = [
        "",
        "## How far item vectors moved",
        "",
        "| domain | items in both | mean cosine | lowest 5 % |",
        "|---|---:|---:|---:|",
    ]
    for name, cosines in drift.items():
        cells = [
            name,
            f"{cosines['items']:,}",
            f"{cosines['mean']:.3f}",
            f"{cosines['p5']:.3f}",
        ]
        lines.append(_row(cells))
    return lines


def _time(seconds: dict[str, float]) -> list[str]:
    """Seconds of each stage."""
    stages = []
    for stage, spent in seconds.items():
        stages.append(f"{stage} {spent:,.0f} s")
    return [
        "",
        f"Time: {', '.join(stages)}.",
        "",
    ]


def _row(cells: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
