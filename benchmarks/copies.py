"""What does the step model say of one copy of the table on all ranks, and of one on each host?

    python benchmarks/copies.py                 some seconds; nothing is measured
    python benchmarks/copies.py gpus=512 communication=bf16

The GPUs, hosts and network are those of `settings/scaling.yaml`, none of which has been measured. A
copy a host pays where the ranks' batches have the same rows, which is by the number of items and by
how popular they are (`exponent`, as `traffic.py` draws them): a step's distinct rows of all ranks are
what replicas tell each other.

Shapes: N items.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite
from benchmarks.scaling import Settings as ScalingSettings
from trainer.config.run import RunConfig
from trainer.planning import step_model, traffic
from trainer.planning.trial import count_weights


@dataclass(frozen=True)
class Settings:
    """settings/copies.yaml."""

    gpus: int
    items: list[int]
    exponents: list[float]
    between_gbit: list[float]
    tokens_per_second: float
    communication: str

    def __post_init__(self):
        suite.at_least(1, self, "items")
        suite.at_least(2, self, "gpus")


def main() -> None:
    """Predicts, prints, writes."""
    settings, options = suite.settings("copies", Settings)
    record = suite.header("copies", settings, options)
    record["predictions"] = predictions(settings)
    suite.save("copies", record, options)


def predictions(settings: Settings) -> list[dict]:
    """[{items, exponent, rows (of a rank, a host, all), gbit, one, two}]: of a step with one copy
    and with a copy a host, {parts, seconds, efficiency, leaving (bytes of a host to others)}.
    """
    scaling, _ = suite.settings("scaling", ScalingSettings, [])
    cluster = scaling.cluster
    length = (scaling.shortest + scaling.model.max_length) / 2
    weights = count_weights(RunConfig(model=scaling.model), scaling.domains)
    found = []
    for items in settings.items:
        for exponent in settings.exponents:
            uses = length * cluster.users
            rows = {}
            for name, ranks in (
                ("rank", 1),
                ("host", cluster.per_host),
                ("all", settings.gpus),
            ):
                rows[name] = distinct(items, exponent, uses * ranks)
            load = step_model.Load(
                tokens=uses,
                users=cluster.users,
                rows=rows["rank"],
                domains=scaling.domains,
                dim=scaling.model.dim,
                weights=weights,
                zero_stage=0,
                global_negatives=False,
                communication=settings.communication,
            )
            copies = traffic.Copies(cluster.per_host, rows["host"], rows["all"])
            for gbit in settings.between_gbit:
                case = {"items": items, "exponent": exponent, "rows": rows}
                case["gbit"] = gbit
                for name, of_case in (
                    ("one", load),
                    ("two", replace(load, copies=copies)),
                ):
                    case[name] = predicted(settings, cluster, of_case, gbit)
                found.append(case)
    return found


def distinct(items: int, exponent: float, uses: float) -> float:
    """Expected distinct rows of so many interactions by Zipf's law and as many uniform negatives."""
    share_N = np.arange(1, items + 1, dtype=np.float64) ** -exponent
    share_N /= share_N.sum()
    missed_N = np.exp(-uses * share_N - uses / items)
    return float((1 - missed_N).sum())


def predicted(settings, cluster, load, gbit) -> dict:
    """A step's parts, and what leaves a host for its table."""
    gpus = settings.gpus
    rate = settings.tokens_per_second
    parts = step_model.cluster_step(load, cluster, gpus, gbit, rate)
    seconds = sum(parts.values())
    # All that passes the cable for rows takes as long as it has bytes.
    exchange = parts["copies"] if load.copies else parts["rows"]
    return {
        "parts": parts,
        "seconds": seconds,
        "efficiency": load.tokens / rate / seconds,
        "leaving": exchange * gbit * 1e9 / 8,
    }


def table(record: dict) -> str:
    """A line a case."""
    rows = []
    for case in record["predictions"]:
        counts = case["rows"]
        row = {
            "items": f"{case['items']:,}",
            "exponent": f"{case['exponent']:g}",
            "rows of a rank": f"{counts['rank']:,.0f}",
            "of all over those of a rank": f"{counts['all'] / counts['rank']:.1f}",
            "Gbit/s of a host": f"{case['gbit']:g}",
        }
        for name, shown in (("one", "one copy"), ("two", "a copy a host")):
            step = case[name]
            row[f"{shown}: leaves a host, MB"] = f"{step['leaving'] / 1e6:,.0f}"
            row[f"{shown}: step ms"] = f"{1e3 * step['seconds']:.1f}"
            row[f"{shown}: of that many alone"] = f"{step['efficiency']:.0%}"
        rows.append(row)
    return suite.markdown(rows)


if __name__ == "__main__":
    main()
