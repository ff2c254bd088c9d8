"""How long does a single request take to an exported model?

    python benchmarks/serving.py          r = 64, T = 50 and r = 128, T = 128; 10⁵ and 10⁶ items
    python benchmarks/serving.py --short  10⁵ items, few requests

What launch/export.py writes, without a run: a SyNCRec at its start weights, exported, saved and
loaded; item vectors drawn from a normal distribution, in memory. A request is one user with as
many items as the model takes, in PyTorch, one after the other:

- encoder: one exported program, item vectors of the history in hand.
- encoder and top k: an answer. The cross-domain program, the domain's own for a fifth of the
  history, their mean (`model.prediction: both`), the product with all items' vectors, and the k
  best.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite
from syncrec.config import ModelConfig
from syncrec.export import UserEncoder, export_program
from syncrec.model import SyNCRec

_DOMAINS = 5


@dataclass(frozen=True)
class Settings:
    """settings/serving.yaml."""

    items: list[int]
    dim: list[int]
    max_length: list[int]
    threads: list[int]
    k: int
    requests: int
    warmup: int
    experts: int
    blocks: int
    time_knots: int

    def __post_init__(self):
        names = (
            "items",
            "dim",
            "max_length",
            "threads",
            "k",
            "requests",
            "warmup",
            "blocks",
        )
        suite.at_least(1, self, *names)
        suite.at_least(2, self, "experts", "time_knots")
        if len(self.dim) != len(self.max_length):
            raise ValueError(
                f"max_length has {len(self.max_length)} values, dim {len(self.dim)}: give "
                "one for each"
            )


def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("serving", Settings)
    record = suite.header("serving", settings, options) | {"results": []}
    for dim, longest in zip(settings.dim, settings.max_length, strict=True):
        record["results"] += suite.in_own_process(
            measure, settings, dim, longest
        )
    suite.save("serving", record, options)


@torch.no_grad()
def measure(settings: Settings, dim: int, longest: int) -> list[dict]:
    """Lines of one model's sizes."""
    torch.manual_seed(0)
    program, own = loaded(settings, dim, longest)
    history, part = (
        _history(items, dim) for items in (longest, max(1, longest // _DOMAINS))
    )

    def user():
        return torch.lerp(program(*history), own(*part), 0.5)

    lines = []
    for threads in settings.threads:
        torch.set_num_threads(threads)
        what = {"dim": dim, "max_length": longest, "threads": threads}
        timings = latencies(lambda: program(*history), settings)
        lines.append(what | {"part": "encoder", "items": None} | timings)
        for items in settings.items:
            matrix = torch.randn(items, dim)
            request = functools.partial(answer, user, (), matrix, settings.k)
            timings = latencies(request, settings)
            lines.append(
                what | {"part": "encoder and top k", "items": items} | timings
            )
    return lines


def _history(items, dim):
    """What the encoder is given of a user."""
    times = torch.arange(items, dtype=torch.float64).unsqueeze(0)
    return (
        torch.randn(1, items, dim),
        torch.tensor([items]),
        times,
        torch.full((1,), float(items), dtype=torch.float64),
    )


def loaded(settings: Settings, dim: int, longest: int) -> list:
    """A model's cross-domain program and a domain's own, as a service has them: exported,
    saved, loaded.
    """
    experts = {
        "experts": settings.experts,
        "cross_experts": (settings.experts + 1) // 2,
    }
    knots = settings.time_knots
    config = ModelConfig(
        dim=dim,
        ffn_dim=dim,
        max_length=longest,
        blocks=settings.blocks,
        time_knots=knots,
        **experts,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = SyNCRec(config, _DOMAINS).eval()
        file = Path(folder) / "encoder.pt2"
        programs = []
        for domain in (None, 0):
            torch.export.save(
                export_program(UserEncoder(model, (0.0, 200.0), domain)), file
            )
            programs.append(torch.export.load(file).module())
        return programs


def answer(
    program: Callable,
    history: tuple[torch.Tensor, ...],
    matrix: torch.Tensor,
    k: int,
) -> Any:
    """The k best items of one user."""
    return (matrix @ program(*history)[0]).topk(k)


def latencies(request: Callable[[], Any], settings: Settings) -> dict:
    """Seconds of a request: median, 99th percentile, and of all of them."""
    seconds = []
    for number in range(-settings.warmup, settings.requests):
        begin = time.perf_counter()
        request()
        if number >= 0:
            seconds.append(time.perf_counter() - begin)
    return {
        "median": float(np.median(seconds)),
        "p99": float(np.percentile(seconds, 99)),
        "seconds": seconds,
    }


def table(record: dict) -> str:
    """A line for each part and size."""
    rows = [
        {
            "": line["part"],
            "r": line["dim"],
            "T": line["max_length"],
            "items": "" if line["items"] is None else f"{line['items']:,}",
            "threads": line["threads"],
            "median ms": f"{1000 * line['median']:.2f}",
            "p99 ms": f"{1000 * line['p99']:.2f}",
        }
        for line in record["results"]
    ]
    return suite.markdown(rows)


if __name__ == "__main__":
    main()
