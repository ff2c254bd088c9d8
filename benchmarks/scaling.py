"""What do two ranks get done that one does not, what goes over the wire, and what would 8 to
512 GPUs do?

    python benchmarks/scaling.py          some minutes; two hosts need root, `ip` and `tc`
    python benchmarks/scaling.py --short  few steps: does it run?
    python benchmarks/scaling.py optimizer.zero_stage=1

Timed is the trainer's own step, by ranks that are processes of one thread on one core each: one
rank; two that have nothing to do with each other, which is what the cores, caches and memory
give when both are busy; two of one run (gloo over the loopback); two on hosts of their own,
network namespaces joined by a cable, without limit and limited by `tc`. All are started at the
beginning and wait. They take turns, a few steps each, for several rounds, so that the machine's
changes of speed meet all alike, and ratios are taken within a round. A step of two ranks ends
with the later. Steps in which other processes took more than `quiet` of a core are tried again,
`tries` times at most, and the quietest count.

Bytes are counted by `traffic.py`: by formula, by call, and those that left through the hosts'
interfaces. The model of a step's time is trainer/planning/step_model.py's, fitted on the medians.
"""

import math
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import chart, namespaces, suite, traffic
from benchmarks.groups import HOSTS, ONE, TWIN, Groups
from embeddings.config import TableConfig
from syncrec.config import ModelConfig
from trainer.config.negatives import NegativesConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.planning import step_model

if TYPE_CHECKING:
    from benchmarks.groups import Group


@dataclass(frozen=True)
class Settings:
    """settings/scaling.yaml."""

    items: int
    domains: int
    users: list[int]
    shortest: int
    steps: int
    rounds: int
    quiet: float
    tries: int
    gbit: list[float]
    exponents: list[float]
    volume_users: int
    model: ModelConfig
    table: TableConfig
    negatives: NegativesConfig
    optimizer: OptimizerConfig
    deepspeed: dict[str, Any]
    cluster: step_model.Cluster

    def __post_init__(self):
        suite.at_least(
            1,
            self,
            "users",
            "shortest",
            "steps",
            "rounds",
            "tries",
            "volume_users",
        )
        suite.at_least(2 * self.domains, self, "items")
        if self.table.group_size:
            raise ValueError(
                "table.group_size: what is counted here is one copy of the table"
            )


def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("scaling", Settings)
    arguments = ["--short"] * options.short + list(options.given)
    record = suite.header("scaling", settings, options)
    if reason := namespaces.why_no_limit():
        record["not_run"] = [{"case": HOSTS, "reason": reason}]
    with Groups(arguments, hosts=not reason) as groups:
        record["links"] = groups.links(settings)
        record["steps"] = steps(groups, settings)
        record["waits"] = waits(groups, settings)
        record["model"] = groups.pair.ask("model")[0]
        record["volume"] = volumes(groups, settings, record["model"])
    record["fit"] = fitted(record)
    record["predictions"] = predictions(settings, record)
    suite.save("scaling", record, options)
    if options.json:
        options.json.with_suffix(".svg").write_text(
            picture(record), encoding="utf-8"
        )


def steps(groups: Groups, settings: Settings) -> list[dict]:
    """Timed steps: [{case, gbit, ranks, users, tokens (of a rank), seconds (spread of the
    steps), rounds (medians of each), others (cores that other processes took, the mean)}].
    """
    cases = groups.cases(settings)
    timed = defaultdict(list)
    for turn in range(settings.rounds):
        for users in settings.users:
            for name, group, gbit in cases if turn % 2 == 0 else cases[::-1]:
                groups.limit(gbit)
                together = [group, groups.twin] if name == TWIN else [group]
                found = quietest(together, users, settings)
                timed[name, users].append(found)
                median = statistics.median(found["seconds"])
                others = found["others"]
                print(
                    f"round {turn + 1}, {name}, {users} users a rank: {median:.3f} s, "
                    f"others {others:.2f} cores",
                    flush=True,
                )
    return [
        {
            "case": name,
            "gbit": gbit,
            "ranks": len(group.ranks),
            "users": users,
            "tokens": timed[name, users][0]["tokens"],
            "seconds": suite.spread(
                [
                    seconds
                    for of_round in timed[name, users]
                    for seconds in of_round["seconds"]
                ]
            ),
            "rounds": [
                statistics.median(of_round["seconds"])
                for of_round in timed[name, users]
            ],
            "others": statistics.mean(
                of_round["others"] for of_round in timed[name, users]
            ),
        }
        for users in settings.users
        for name, group, gbit in cases
    ]


def quietest(together: "list[Group]", users: int, settings: Settings) -> dict:
    """Steps of these groups at the same time: {"seconds" (of each step, the later rank's),
    "tokens", "others"}.
    """
    tried = []
    while len(tried) < settings.tries and (
        not tried or tried[-1]["others"] > settings.quiet
    ):
        begin = time.perf_counter()
        busy = _busy()
        for group in together:
            group.tell("steps", users=users, steps=settings.steps)
        answers = [answer for group in together for answer in group.hear()]
        others = (
            _busy()
            - busy
            - sum(answer["processor_seconds"] for answer in answers)
        )
        tried.append(
            {
                "seconds": [
                    max(of_ranks)
                    for of_ranks in zip(
                        *(answer["seconds"] for answer in answers), strict=True
                    )
                ],
                "tokens": answers[0]["tokens"],
                "others": max(0.0, others / (time.perf_counter() - begin)),
            }
        )
    return min(tried, key=lambda steps: steps["others"])


def _busy():
    """Seconds that all cores together were busy so far: with processes, the kernel, interrupts."""
    user, nice, system, _, _, interrupt, soft_interrupt = map(
        int, Path("/proc/stat").read_text().split()[1:8]
    )
    return (user + nice + system + interrupt + soft_interrupt) / os.sysconf(
        "SC_CLK_TCK"
    )


def waits(groups: Groups, settings: Settings) -> dict:
    """Where the time of a step goes: {case: {"step", "waited" (for the later rank), "parts":
    {part: seconds}}}; medians over steps of the mean over ranks. Ranks meet before each
    collective, and none is overlapped.
    """
    found = {}
    for name, group, gbit in groups.cases(settings)[2:]:
        groups.limit(gbit)
        answers = group.ask("calls", users=settings.volume_users, meet=True)
        of_steps = defaultdict(list)
        for step in range(len(answers[0]["calls"])):
            parts = defaultdict(float)
            for answer in answers:
                for call in answer["calls"][step]:
                    parts["waited"] += call["waited"] / len(answers)
                    parts[call["part"]] += call["seconds"] / len(answers)
                parts["step"] += answer["seconds"][step] / len(answers)
            for part, seconds in parts.items():
                of_steps[part].append(seconds)
        medians = {
            part: statistics.median(seconds)
            for part, seconds in of_steps.items()
        }
        found[name] = {
            "step": medians.pop("step"),
            "waited": medians.pop("waited"),
            "parts": medians,
        }
    return found


def volumes(groups: Groups, settings: Settings, model: dict) -> list[dict]:
    """Bytes that a rank sends in a step, the mean over ranks and batches, for each popularity:
    [{exponent, rows…, "parts": {part: {"calls", "expected", "called", "wire"}}, "least",
    "expected", "called", "wire"}]. Counted on the hosts' cable, where there are hosts.
    """
    groups.limit(None)
    group = groups.apart or groups.pair
    interfaces = (
        [interface for _, interface, _ in groups.hosts]
        if groups.hosts
        else None
    )
    world = len(group.ranks)
    dim = settings.model.dim
    found = []
    for exponent in settings.exponents:
        about = {"users": settings.volume_users, "exponent": exponent}
        of_ranks = group.ask("volume", **about)
        rows = {
            name: statistics.mean(rank[name] for rank in of_ranks)
            for name in of_ranks[0]
        }
        expected = traffic.expected(
            world,
            dim,
            settings.domains,
            settings.volume_users,
            model["weights"],
            model["zero_stage"],
            rows["foreign"],
            communication=model["communication"],
        )
        answers = group.ask("calls", **about, interface=interfaces)
        parts = _volumes_of_parts(
            expected, answers, on_wire=interfaces is not None
        )
        found.append(
            {
                "exponent": exponent,
                "users": settings.volume_users,
                **rows,
                "parts": parts,
                "least": traffic.least(
                    world, dim, model["weights"], rows["distinct_foreign"]
                ),
                **{
                    way: sum(part[way] for part in parts.values())
                    if interfaces or way != "wire"
                    else None
                    for way in ("expected", "called", "wire")
                },
            }
        )
    return found


def _volumes_of_parts(expected, answers, on_wire):
    """What each part of a step sends, the mean over ranks and batches: expected, called, on the
    wire.
    """
    parts = {}
    for part, sent in expected.items():
        parts[part] = {"calls": 0, "expected": sent, "called": 0.0, "wire": 0.0}
    share = 1 / len(answers) / len(answers[0]["calls"])  # of a rank and a batch
    for answer in answers:
        for of_step in answer["calls"]:
            for call in of_step:
                nothing = {
                    "calls": 0,
                    "expected": 0.0,
                    "called": 0.0,
                    "wire": 0.0,
                }
                part = parts.setdefault(call["part"], nothing)
                part["calls"] += share
                part["called"] += share * call["sent"]
                part["wire"] += share * (call["wire"] or 0)
    if not on_wire:
        for part in parts.values():
            part["wire"] = None
    return parts


def points(record: dict) -> list[tuple]:
    """What the model is fitted on: [(step of the record, step_model.Point)]."""
    counted = record["volume"][0]
    messages = sum(part["calls"] for part in counted["parts"].values())
    found = []
    for step in record["steps"]:
        if step["case"] == TWIN:
            continue
        settings = record["settings"]
        model = record["model"]
        sent = traffic.expected(
            step["ranks"],
            settings["model"]["dim"],
            settings["domains"],
            step["users"],
            model["weights"],
            model["zero_stage"],
            counted["foreign"] / counted["users"] * step["users"],
            communication=model["communication"],
        )
        point = step_model.Point(
            tokens=step["tokens"],
            messages=messages if step["ranks"] > 1 else 0,
            bytes=sum(sent.values()),
            bandwidth=step["gbit"] * 1e9 / 8 if step["gbit"] else math.inf,
            seconds=step["seconds"]["median"],
        )
        found.append((step, point))
    return found


def fitted(record: dict) -> dict | None:
    """The model's parameters, and what it says of each step: fitted on all, and on all others."""
    of_steps = points(record)
    measured = [point for _, point in of_steps]
    if len(measured) <= len(step_model.PARAMETERS):
        return None
    parameters = step_model.fit(measured)
    return {
        "parameters": parameters,
        "points": [
            {
                "case": step["case"],
                "users": step["users"],
                "bytes": point.bytes,
                "measured": point.seconds,
                "predicted": step_model.predict(parameters, point),
                "left_out": left_out,
            }
            for (step, point), left_out in zip(
                of_steps, step_model.left_out(measured), strict=True
            )
        ],
    }


def predictions(settings: Settings, record: dict) -> list[dict]:
    """[{tokens_per_second, between_gbit, gpus, global_negatives, parts, seconds, efficiency}]:
    nothing overlapped.
    """
    counted = record["volume"][0]
    cluster = settings.cluster
    tokens = (
        record["steps"][0]["tokens"]
        / record["steps"][0]["users"]
        * cluster.users
    )
    rows = counted["distinct"] / counted["users"] * cluster.users
    found = []
    for rate in cluster.tokens_per_second:
        for gbit in cluster.between_gbit:
            for everyone in (True, False):
                for gpus in cluster.gpus:
                    load = step_model.Load(
                        tokens=tokens,
                        users=cluster.users,
                        rows=rows,
                        global_negatives=everyone,
                        **record["model"],
                    )
                    parts = step_model.cluster_step(
                        load, cluster, gpus, gbit, rate
                    )
                    found.append(
                        {
                            "tokens_per_second": rate,
                            "between_gbit": gbit,
                            "gpus": gpus,
                            "global_negatives": everyone,
                            "parts": parts,
                            "seconds": sum(parts.values()),
                            "efficiency": tokens / rate / sum(parts.values()),
                        }
                    )
    return found


def table(record: dict) -> str:
    """Times, where they go, bytes, the model, and what it says of GPUs."""
    parts = [
        _times(record),
        _waits(record),
        _bytes(record),
        _model(record),
        _clusters(record),
    ]
    parts += [
        f"Not run ({case['case']}): {case['reason']}."
        for case in record.get("not_run", [])
    ]
    return "\n\n".join(filter(None, parts))


def ratios(record: dict, case: str, users: int, of: int = 1) -> dict | None:
    """How the time of one rank on `of` · users compares with the case's on as many a rank, by
    round: `suite.spread`.
    """
    rounds = {
        (step["case"], step["users"]): step["rounds"]
        for step in record["steps"]
    }
    if (ONE, of * users) not in rounds:
        return None
    return suite.spread(
        [
            one / own
            for one, own in zip(
                rounds[ONE, of * users], rounds[case, users], strict=True
            )
        ]
    )


def _times(record):
    rows = []
    for step in record["steps"]:
        weak = step["case"] != ONE and ratios(
            record, step["case"], step["users"]
        )
        strong = step["ranks"] > 1 and ratios(
            record, step["case"], step["users"], 2
        )
        ranks = 1 if step["case"] == ONE else 2
        rate = step["tokens"] * ranks / step["seconds"]["median"]
        rows.append(
            {
                "case": step["case"],
                "users a rank": step["users"],
                "step s (min – max)": suite.shown(step["seconds"]),
                "tokens/s": f"{rate:,.0f}",
                "% of twice one rank": suite.shown(
                    {key: 100 * weak[key] for key in ("median", "min", "max")},
                    0,
                )
                if weak
                else "",
                "times one rank on all users": suite.shown(strong, 2)
                if strong
                else "",
                "other processes, cores": f"{step['others']:.2f}",
            }
        )
    links = [
        f"{case} {(link['all_reduce'] * 8 / 1e9):.1f} Gbit/s, {1e6 * link['latency']:.0f} µs"
        for case, link in record["links"].items()
    ]
    return (
        suite.markdown(rows)
        + f"\n\nAn all-reduce that does nothing else: {'; '.join(links)}."
    )


def _waits(record):
    parts = list(
        dict.fromkeys(
            part
            for found in record["waits"].values()
            for part in found["parts"]
        )
    )
    rows = []
    for part in [
        "whole step",
        "wait for the later rank",
        *parts,
        "all collectives",
    ]:
        row = {"ms of a step": part}
        for case, found in record["waits"].items():
            seconds = {
                "whole step": found["step"],
                "wait for the later rank": found["waited"],
                **found["parts"],
            }
            seconds["all collectives"] = sum(found["parts"].values())
            row[case] = f"{1e3 * seconds[part]:.1f}" if part in seconds else ""
        rows.append(row)
    return suite.markdown(rows)


def _bytes(record):
    by_part = record["volume"][0]
    rows = [
        {
            "bytes that a rank sends in a step": name,
            "collectives": f"{part['calls']:.0f}",
            "by formula": f"{part['expected']:,.0f}",
            "by call": f"{part['called']:,.0f}",
            "on the wire": f"{part['wire']:,.0f}"
            if part["wire"] is not None
            else "",
        }
        for name, part in by_part["parts"].items()
    ]
    sums = [
        {
            "popularity's exponent": f"{counted['exponent']:g}",
            "rows used": f"{counted['used']:,.0f}",
            "asked for": f"{counted['asked']:,.0f}",
            "at others": f"{counted['foreign']:,.0f}",
            "distinct, at others": f"{counted['distinct_foreign']:,.0f}",
            "least, MB": f"{counted['least'] / 1e6:.3f}",
            "by formula": f"{counted['expected'] / 1e6:.3f}",
            "by call": f"{counted['called'] / 1e6:.3f}",
            "on the wire": f"{counted['wire'] / 1e6:.3f}"
            if counted["wire"] is not None
            else "",
            "times least": f"{(counted['wire'] or counted['called']) / counted['least']:.2f}",
        }
        for counted in record["volume"]
    ]
    return (
        f"{suite.markdown(sums)}\n\nBy collective, exponent "
        f"{by_part['exponent']:g}:\n\n{suite.markdown(rows)}"
    )


def _model(record):
    if record["fit"] is None:
        return ""
    fit = record["fit"]["parameters"]
    rows = [
        {
            "case": point["case"],
            "users a rank": point["users"],
            "MB sent": f"{point['bytes'] / 1e6:.2f}",
            "measured s": f"{point['measured']:.3f}",
            "predicted": f"{point['predicted']:.3f}",
            "error": f"{100 * (point['predicted'] / point['measured'] - 1):+.1f} %",
            "left out": f"{100 * (point['left_out'] / point['measured'] - 1):+.1f} %",
        }
        for point in record["fit"]["points"]
    ]
    return (
        f"Fitted: {1e3 * fit['fixed']:.1f} ms a step, {1e6 * fit['per_token']:.1f} µs a token, "
        f"{1e6 * fit['per_message']:.0f} µs a collective, {1e9 * fit['per_byte']:.2f} ns a byte, "
        f"{100 * fit['exposed']:.0f} % of the cable's time not hidden.\n\n"
        + suite.markdown(rows)
    )


def _clusters(record):
    """The smallest, the middle and the largest number of GPUs; for faster GPUs the middle one."""
    gpus = record["settings"]["cluster"]["gpus"]
    rows = []
    key = ("tokens_per_second", "between_gbit", "gpus")
    own = {
        tuple(found[name] for name in key): found
        for found in record["predictions"]
        if not found["global_negatives"]
    }
    for found in record["predictions"]:
        first = (
            found["tokens_per_second"]
            == record["predictions"][0]["tokens_per_second"]
        )
        shown = (
            (gpus[0], gpus[len(gpus) // 2], gpus[-1])
            if first
            else (gpus[len(gpus) // 2],)
        )
        if not found["global_negatives"] or found["gpus"] not in shown:
            continue
        parts = found["parts"]
        within = own[tuple(found[name] for name in key)]["efficiency"]
        rows.append(
            {
                "tokens/s of a GPU alone": f"{found['tokens_per_second'] / 1e6:g} million",
                "Gbit/s of a host": f"{found['between_gbit']:g}",
                "GPUs": found["gpus"],
                "step ms": f"{1e3 * found['seconds']:.2f}",
                "of that many alone": f"{100 * found['efficiency']:.0f} %",
                **{
                    part: f"{100 * seconds / found['seconds']:.0f} %"
                    for part, seconds in parts.items()
                },
                "SC-MIM within ranks: of that many alone": f"{100 * within:.0f} %",
            }
        )
    return "![](results/scaling.svg)\n\n" + suite.markdown(rows)


def picture(record: dict) -> str:
    """The predictions as SVG: efficiency by network, and where the time goes on one of them."""
    cluster = record["settings"]["cluster"]
    rate = cluster["tokens_per_second"][0]
    places = [str(gpus) for gpus in cluster["gpus"]]

    def of(gbit, everyone):
        return [
            found
            for found in record["predictions"]
            if (
                found["tokens_per_second"],
                found["between_gbit"],
                found["global_negatives"],
            )
            == (rate, gbit, everyone)
        ]

    lines, dashed = (
        {
            f"{gbit:g} Gbit/s": [
                100 * found["efficiency"] for found in of(gbit, everyone)
            ]
            for gbit in cluster["between_gbit"]
        }
        for everyone in (True, False)
    )
    middle = cluster["between_gbit"][len(cluster["between_gbit"]) // 2]
    shown = of(middle, True)
    stacks = {
        part: [1e3 * found["parts"][part] for found in shown]
        for part in shown[0]["parts"]
    }
    title = f"{rate / 1e6:g} million tokens/s a GPU, by a host's network"
    gpus = f"GPUs, {cluster['per_host']} a host"
    alone = "% of as many GPUs alone; dashed: SC-MIM within ranks"
    return chart.svg(
        [
            chart.Panel(
                f"Predicted: {title}",
                places,
                lines,
                gpus,
                alone,
                dashed=dashed,
                top=100,
            ),
            chart.Panel(
                f"Predicted: a step at {middle:g} Gbit/s a host",
                places,
                stacks,
                gpus,
                "ms",
                stacked=True,
            ),
        ]
    )


if __name__ == "__main__":
    main()
