"""What does a rank send in a step: counted at a few real ranks, and reckoned for many?

    python benchmarks/messages.py            two minutes
    python benchmarks/messages.py --short    two ranks

The ranks are processes that train on batches drawn before (`scaling_rank.py`); every collective of
their steps is noted (`traffic.py`). Counted are collectives, bytes and messages: what a rank hands
to other ranks, one after the other, by the algorithm that gloo uses for much data. The same formula
that is held against the counts then says what many ranks send. On CUDA, NCCL chooses trees or rings
by itself: bytes are alike, messages are fewer.
"""

import os
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite, traffic
from benchmarks.groups import Group

# Sums over ranks in a step, where a sample of users stands for all: the candidates' vectors, their
# gradients, and which of them there are.
_OF_SAMPLE = {"SC-MIM": 1, "SC-MIM gradients": 1, "φ, λ and means": 2}
_AGREEMENT = "agreement of its own, until 2026-11"  # now it travels with "clip, check, signals"


@dataclass(frozen=True)
class Settings:
    """settings/messages.yaml. step: what the ranks are told over settings/scaling.yaml."""

    ranks: list[int]
    reckoned: list[int]
    users: int
    reckoned_users: int
    exponent: float
    step: list[str]

    def __post_init__(self):
        suite.at_least(2, self, "ranks", "reckoned")
        suite.at_least(1, self, "users", "reckoned_users")


def main() -> None:
    """Counts, reckons, prints, writes."""
    settings, options = suite.settings("messages", Settings)
    record = suite.header("messages", settings, options)
    record["counted"] = [counted(settings, ranks) for ranks in settings.ranks]
    record["reckoned"] = [
        reckoned(settings, record["counted"][-1], ranks)
        for ranks in settings.reckoned
    ]
    suite.save("messages", record, options)


def counted(settings: Settings, ranks: int) -> dict:
    """What a rank sends in a step, the mean over ranks and batches: {"ranks", "model", "rows",
    "parts"}.
    """
    cores = sorted(os.sched_getaffinity(0))
    arguments = [
        *settings.step,
        f"users=[{settings.users}]",
        f"volume_users={settings.users}",
    ]
    with suite.scratch("") as folder:
        group = Group(
            Path(folder),
            f"{ranks} ranks",
            [cores[rank % len(cores)] for rank in range(ranks)],
            arguments,
        )
        try:
            group.hear()
            model = group.ask("model")[0]
            volumes = group.ask(
                "volume", users=settings.users, exponent=settings.exponent
            )
            answers = group.ask(
                "calls", users=settings.users, exponent=settings.exponent
            )
        finally:
            group.end()
    parts = defaultdict(
        lambda: {"collectives": 0.0, "bytes": 0.0, "messages": 0.0}
    )
    steps = [step for answer in answers for step in answer["calls"]]
    for step in steps:
        for call in step:
            part = parts[call["part"]]
            part["collectives"] += 1 / len(steps)
            part["bytes"] += call["sent"] / len(steps)
            part["messages"] += traffic.messages(call["kind"], ranks) / len(
                steps
            )
            part["kind"] = call["kind"]
    rows = {
        name: statistics.mean(volume[name] for volume in volumes)
        for name in volumes[0]
    }
    expected = formula(settings, model, ranks, settings.users, rows["foreign"])
    for name, part in parts.items():
        part["formula"] = expected.get(name, 0.0)
    return {"ranks": ranks, "model": model, "rows": rows, "parts": dict(parts)}


def reckoned(settings: Settings, counted: dict, ranks: int) -> dict:
    """What a rank of so many would send in a step with `reckoned_users` users each, by formula."""
    rows = counted["rows"]["asked"] / settings.users * settings.reckoned_users
    sampled = (
        0 < counted["model"]["candidates"] < ranks * settings.reckoned_users
    )
    foreign = rows * (ranks - 1) / ranks
    expected = formula(
        settings, counted["model"], ranks, settings.reckoned_users, foreign
    )
    parts = {}
    for name, part in counted["parts"].items():
        collectives = part["collectives"]
        kind = part["kind"]
        if sampled and name in _OF_SAMPLE:
            collectives = _OF_SAMPLE[name]
            kind = "all_reduce"
        parts[name] = {
            "collectives": collectives,
            "bytes": expected.get(name, 0.0),
            "messages": collectives * traffic.messages(kind, ranks),
        }
    return {"ranks": ranks, "rows": rows, "parts": parts}


def formula(
    settings: Settings, model: dict, ranks: int, users: int, foreign: float
) -> dict:
    """`traffic.expected` of these ranks."""
    return traffic.expected(
        ranks,
        model["dim"],
        model["domains"],
        users,
        model["weights"],
        model["zero_stage"],
        foreign,
        model["candidates"],
        model["communication"],
    )


def table(record: dict) -> str:
    """Bytes and messages by part, counted, then reckoned."""
    users = record["settings"]["users"]
    many = record["settings"]["reckoned_users"]
    return "\n\n".join(
        [
            f"Counted, {users} users a rank; in brackets by formula:",
            suite.markdown(_rows(record["counted"], _counted_bytes)),
            f"Reckoned, {many} users a rank:",
            suite.markdown(_rows(record["reckoned"], _reckoned_bytes)),
        ]
    )


def _rows(columns, shown_bytes):
    names = list(
        dict.fromkeys(name for column in columns for name in column["parts"])
    )
    rows = []
    for name in names:
        row = {
            "part": name,
            "collectives": f"{columns[0]['parts'][name]['collectives']:.0f}",
        }
        for column in columns:
            part = column["parts"][name]
            row[f"bytes, {column['ranks']} ranks"] = shown_bytes(part)
            row[f"messages, {column['ranks']}"] = f"{part['messages']:,.0f}"
        rows.append(row)
    total = {
        "part": "all",
        "collectives": f"{_sum(columns[0], 'collectives'):.0f}",
    }
    before = {"part": _AGREEMENT, "collectives": "1"}
    for column in columns:
        total[f"bytes, {column['ranks']} ranks"] = (
            f"{_sum(column, 'bytes'):,.0f}"
        )
        total[f"messages, {column['ranks']}"] = (
            f"{_sum(column, 'messages'):,.0f}"
        )
        sent = traffic.sent("all_reduce", 4 * 4, column["ranks"])
        before[f"bytes, {column['ranks']} ranks"] = f"{sent:,.0f}"
        before[f"messages, {column['ranks']}"] = (
            f"{traffic.messages('all_reduce', column['ranks']):,.0f}"
        )
    return [*rows, total, before]


def _sum(column, what):
    return sum(part[what] for part in column["parts"].values())


def _counted_bytes(part):
    return f"{part['bytes']:,.0f} ({part['formula']:,.0f})"


def _reckoned_bytes(part):
    return f"{part['bytes']:,.0f}"


if __name__ == "__main__":
    main()
