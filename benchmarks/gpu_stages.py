"""The stages of gpu_hour.py, in order of value: what each asks, its command, and what it says in a line.

A command is one that a person would give. Its tiny form has the same words, and some more that
make it small enough for a CPU: what no longer fits the code fails there first.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.reporting.run_log import read_records
from trainer.run_files import HEADLINE, METRICS_FILE, OPERATORS, PROFILE, REPORT

# One thread, and no device.
ON_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}
_MODEL = (
    "model.dim=16",
    "model.ffn_dim=16",
    "model.max_length=16",
    "model.experts=2",
    "model.cross_experts=1",
)
_TINY_PROFILE = ("items=2000", "users=4", "steps=2", "warmup=1", *_MODEL)
# bf16 products are timed only where the processor has them.
_TINY_STEPS = (
    *_TINY_PROFILE,
    "items=[2000]",
    "window=0.001",
    "precision=[fp32]",
)
_TINY_PARTS = (
    "precision=[fp32]",
    "items=2000",
    "users=4",
    "repeats=2",
    "warmup=1",
    "window=0.001",
    "memory_bytes=65536",
    "wire_bytes=65536",
    *_MODEL,
)
_TINY_RANKING = (
    "items=[2000]",
    "dim=[16]",
    "users=64",
    "fewer_users=32",
    "repeats=1",
    "window=0.001",
)
_TINY_RUN = (
    *_MODEL,
    "global_batch_size=32",
    "log.every=2",
    "evaluation.negatives=20",
    "negatives.shared=16",
)
_DEFAULT_LOSS = ("model.loss=sampled_softmax", "negatives.shared=1024")
_WIDE = ("model.dim=512", "model.ffn_dim=512", "model.heads=4")


@dataclass(frozen=True)
class Places:
    """Where stages read and write.

    output: what is to be kept. work: runs and a dataset, which may go. data: a prepared dataset;
    None: one is made in `work`.
    """

    output: Path
    work: Path
    data: Path | None

    @property
    def dataset(self) -> Path:
        return self.data or self.work / "data"

    @property
    def run(self) -> Path:
        return self.work / "run"


@dataclass(frozen=True)
class Stage:
    """What one process finds out.

    Attributes:
        name: of the stage, and of its files in the output.
        question: what it answers.
        command: its words.
        share: of the budget, after which it is ended.
        least: seconds below which it is not begun.
        headline: what came of it in a line, by its log; raises where that cannot be said.
        needs: stages without which it cannot go well.
        environment: variables of its own.
        keep: files of `work` that are copied to the output.
    """

    name: str
    question: str
    command: tuple[str, ...]
    share: float
    least: float
    headline: Callable[[str], str]
    needs: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    keep: tuple[Path, ...] = ()


def list_stages(places: Places, tiny: bool = False) -> list[Stage]:
    """All stages in order of value. tiny: in the form for a CPU."""
    forms = _Forms(places, tiny)
    return [
        forms.environment(),
        forms.device_tests(),
        *forms.dataset(),
        *forms.training(),
        forms.steps(
            "steps",
            "a step at r = 128 and 1,024 users, bf16 beside fp32",
            "precision=[bf16,fp32]",
            "users=1024",
        ),
        forms.profile(),
        forms.steps(
            "steps_4096",
            "the same with 4,096 users: is the host the limit?",
            "precision=[bf16]",
            "users=4096",
        ),
        forms.steps(
            "steps_512",
            "a step at r = 512 with 4 heads",
            "precision=[bf16]",
            "users=1024",
            *_WIDE,
        ),
        forms.steps(
            "steps_default_loss",
            "a step with the default loss, 1,024 shared negatives",
            "precision=[bf16]",
            "users=1024",
            *_DEFAULT_LOSS,
        ),
        forms.parts(),
        *forms.cached(),
        forms.ranking(),
        forms.steps(
            "steps_256",
            "a step of 256 users: what the host takes at least",
            "precision=[bf16]",
            "users=256",
        ),
        forms.loader(),
        forms.host_tests(),
    ]


class _Forms:
    """Makes stages, in their full or their tiny form."""

    def __init__(self, places: Places, tiny: bool):
        self._places = places
        self._tiny = tiny

    def environment(self) -> Stage:
        record = self._places.output / "environment.json"
        return Stage(
            "environment",
            "what the machine is and can do, and whether the stack answers on it",
            _python(
                "benchmarks/environment.py",
                "--json",
                record,
                *self._if_tiny("--short"),
            ),
            share=0.15,
            least=15,
            headline=lambda _: environment_headline(record),
        )

    def device_tests(self) -> Stage:
        return Stage(
            "device_tests",
            "is what runs on the device what runs on a CPU?",
            _pytest("--durations=6", "tests/unit/test_cuda.py"),
            share=0.25,
            least=30,
            headline=tests_headline,
        )

    def dataset(self) -> list[Stage]:
        """A dataset to train on, where none is given."""
        if self._places.data is not None:
            return []
        logs = self._places.work / "logs"
        users = 600 if self._tiny else 24_000
        sizes = ("--users", users, "--items", users * 2, "--domains", 9)
        streams = self._if_tiny("--streams", 2)
        return [
            Stage(
                "synthesize",
                "logs to train on, since there is no --data",
                _python("launch/synthesize.py", "--output", logs, *sizes),
                share=0.1,
                least=10,
                headline=last_line,
            ),
            Stage(
                "prepare",
                "a dataset of them",
                _python(
                    "launch/prepare.py",
                    "--input",
                    logs,
                    "--output",
                    self._places.dataset,
                    *streams,
                ),
                share=0.15,
                least=10,
                headline=last_line,
                needs=("synthesize",),
            ),
        ]

    def training(self) -> list[Stage]:
        """A run, its resumption under the profiler, and its evaluation among all items."""
        run = self._places.run
        first, last = (6, 10) if self._tiny else (300, 400)
        window = f"profile.steps={last - 3}-{last - 2}"
        common = ("model.precision=bf16", "evaluation.patience=0")
        record = self._places.output / "evaluate.json"
        profile = run / PROFILE / OPERATORS
        train = self._train("train", run, *common, f"max_steps={first}")
        resume = self._train(
            "resume", run, *common, f"max_steps={last}", window
        )
        evaluation = _python(
            "launch/evaluate.py",
            "--run",
            run,
            "--ranking",
            "full",
            "--skip-recency",
            "--record",
            record,
        )
        return [
            Stage(
                "train",
                "a training run in bf16 with validation, checkpoint and test",
                train,
                share=0.2,
                least=35,
                headline=lambda _: run_headline(run),
                needs=self._dataset_stages,
                keep=(run / METRICS_FILE, run / REPORT),
            ),
            Stage(
                "resume",
                "does the run go on, and what do the operators of a step take?",
                resume,
                share=0.15,
                least=25,
                headline=lambda _: run_headline(run),
                needs=("train",),
                keep=(run / METRICS_FILE, run / REPORT, profile),
            ),
            Stage(
                "evaluate",
                "its best model ranks among all items",
                evaluation,
                share=0.15,
                least=25,
                headline=lambda _: evaluation_headline(record),
                needs=("train",),
            ),
        ]

    def _train(self, name: str, run: Path, *settings: str) -> tuple[str, ...]:
        return _python(
            "launch/train.py",
            "--config",
            "amazon4",
            f"data={self._places.dataset}",
            f"run={run}",
            *settings,
            *self._if_tiny(*_TINY_RUN),
        )

    def steps(self, name: str, question: str, *settings: str) -> Stage:
        """Steps by train_step.py, of 10⁷ items."""
        record = self._places.output / f"{name}.json"
        return Stage(
            name,
            question,
            _python(
                "benchmarks/train_step.py",
                "--json",
                record,
                "systems=[ours]",
                "items=[10000000]",
                "steps=20",
                "window=0.005",
                *settings,
                *self._if_tiny(*_TINY_STEPS),
            ),
            share=0.15,
            least=30,
            headline=lambda _: steps_headline(record),
        )

    def profile(self) -> Stage:
        output = self._places.output
        record = output / "profile.json"
        return Stage(
            "profile",
            "kernels, launches and waits of a step, and where the device idles",
            _python(
                "benchmarks/step_profile.py",
                "--json",
                record,
                f"trace={output / 'profile.trace.json.gz'}",
                "precision=bf16",
                "items=10000000",
                "users=1024",
                *_DEFAULT_LOSS,
                *self._if_tiny(*_TINY_PROFILE, "negatives.shared=16"),
            ),
            share=0.15,
            least=25,
            headline=lambda _: profile_headline(record),
        )

    def parts(self) -> Stage:
        record = self._places.output / "parts.json"
        return Stage(
            "parts",
            "parts of a step beside what the device could do",
            _python(
                "benchmarks/parts.py",
                "--json",
                record,
                "precision=[bf16]",
                "items=10000000",
                "users=1024",
                "window=0.005",
                *self._if_tiny(*_TINY_PARTS),
            ),
            share=0.15,
            least=35,
            headline=lambda _: parts_headline(record),
        )

    def cached(self) -> list[Stage]:
        """Steps whose rows lie on the host, items drawn evenly and by Zipf's law."""
        placement = self._if_tiny("auto") or ("cached",)
        table = (f"table.placement={placement[0]}", "table.cache_share=0.1")
        stages = []
        for name, exponent in (("cached", 0.0), ("cached_skewed", 1.0)):
            stages.append(
                self.steps(
                    name,
                    "a step whose rows lie on the host, a tenth of them cached; items by "
                    f"popularity to the power of {exponent:g}",
                    "precision=[bf16]",
                    "users=1024",
                    f"exponent={exponent}",
                    *table,
                )
            )
        return stages

    def ranking(self) -> Stage:
        record = self._places.output / "ranking.json"
        return Stage(
            "ranking",
            "exact ranking among 10⁶ items, beside the product that it takes",
            _python(
                "benchmarks/ranking.py",
                "--json",
                record,
                "items=[1000000]",
                "dim=[64,128]",
                "window=0.02",
                *self._if_tiny(*_TINY_RANKING),
            ),
            share=0.15,
            least=30,
            headline=lambda _: ranking_headline(record),
        )

    def loader(self) -> Stage:
        run = self._places.work / "loader_run"
        steps = 4 if self._tiny else 60
        return Stage(
            "loader",
            "do the loaders keep up with steps of 1,024 users?",
            _python(
                "launch/train.py",
                "--config",
                "default",
                f"data={self._places.dataset}",
                f"run={run}",
                "model.precision=bf16",
                "global_batch_size=1024",
                "log.every=10",
                f"max_steps={steps}",
                "evaluation.every_epochs=1000",
                *self._if_tiny(*_TINY_RUN, "model.time_knots=4"),
            ),
            share=0.15,
            least=35,
            headline=lambda _: run_headline(run),
            needs=self._dataset_stages,
            keep=(run / METRICS_FILE,),
        )

    def host_tests(self) -> Stage:
        tests = ["tests/unit/embeddings", "tests/unit/trainer/training"]
        if self._tiny:
            tests = ["tests/unit/embeddings/test_row_scatter.py"]
        return Stage(
            "host_tests",
            "what runs on a CPU, with the versions that are installed here",
            _pytest(*tests),
            share=0.3,
            least=30,
            headline=tests_headline,
            environment=tuple(ON_CPU.items()),
        )

    @property
    def _dataset_stages(self) -> tuple[str, ...]:
        return () if self._places.data is not None else ("prepare",)

    def _if_tiny(self, *words: object) -> tuple[str, ...]:
        return tuple(map(str, words)) if self._tiny else ()


def _python(*words: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, words))


def _pytest(*words: str) -> tuple[str, ...]:
    own = ("-m", "pytest", "-p", "no:cacheprovider", "--timeout=120")
    return _python(*own, "--tb=short", "-rfE", *words)


def last_line(log: str) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def tests_headline(log: str) -> str:
    """pytest's last line."""
    found = re.findall(
        r"^=* ?(\d+ (?:passed|failed|skipped|error).*)$", log, re.M
    )
    return found[-1].strip("= ")


def environment_headline(record: Path) -> str:
    """The machine, and which probes failed."""
    content = json.loads(record.read_text(encoding="utf-8"))
    failed = [of["probe"] for of in content["results"] if "error" in of]
    facts = content["machine"]
    torch = facts["versions"].get("torch")
    line = f"{facts['device']}, {facts['processor']}, torch {torch}"
    return f"{line}; failed: {', '.join(failed)}" if failed else line


def run_headline(run: Path) -> str:
    """The run's newest figures."""
    records = read_records(run / METRICS_FILE)
    train = [record for record in records if record["kind"] == "train"]
    others = [record for record in records if record["kind"] != "train"]
    last = train[-1]
    parts = [
        f"{last['step']} steps",
        f"loss {last['loss']:.3f}",
        f"{statistics.median(of['users_per_second'] for of in train):,.0f} users/s",
        f"waiting for data {last['data_wait']:.0%}",
    ]
    if others:
        mean = others[-1]["mean"][HEADLINE]
        parts.append(f"{others[-1]['kind']} {HEADLINE} {mean:.4f}")
    return ", ".join(parts)


def evaluation_headline(record: Path) -> str:
    """The mean over domains."""
    content = json.loads(record.read_text(encoding="utf-8"))
    return f"{HEADLINE} {content['mean'][HEADLINE]:.4f} among all items"


def steps_headline(record: Path) -> str:
    """Tokens a second of each precision, and what of the products' rate that is."""
    content = json.loads(record.read_text(encoding="utf-8"))
    parts = []
    for of in content["results"]:
        parts.append(
            f"{of['precision']}: {1e3 * of['step_seconds']['median']:.2f} ms, "
            f"{of['tokens_per_second']:,.0f} tokens/s, "
            f"{of['operations_per_second'] / 1e12:.3g} TFLOP/s, "
            f"{of['matmul_share']:.0%} of the products' rate"
        )
    for of in content["not_run"]:
        parts.append(f"{of['precision']}: {of['reason']}")
    return "; ".join(parts)


def profile_headline(record: Path) -> str:
    """Kernels of a step, and how long the device idles."""
    content = json.loads(record.read_text(encoding="utf-8"))["result"]
    device = content["device"]
    line = (
        f"a step takes {1e3 * content['step_seconds']:.2f} ms, queued after "
        f"{1e3 * content['queued_seconds']:.2f} ms"
    )
    if device["idle_share"] is None:
        return line
    return (
        f"{line}; {device['kernels']:.0f} kernels, {device['waits']:.1f} waits, the device idles "
        f"{device['idle_share']:.0%}"
    )


def parts_headline(record: Path) -> str:
    """The table's update and the step beside their limits."""
    content = json.loads(record.read_text(encoding="utf-8"))
    shown = []
    for of in content["results"]:
        if of["part"] in ("table look-up", "table update", "step"):
            shown.append(
                f"{of['part']} {1e3 * of['seconds']['median']:.2f} ms, {of['share']:.0%}"
            )
    shown += [of["reason"] for of in content["not_run"]]
    return "; ".join(shown)


def ranking_headline(record: Path) -> str:
    """Users a second by width."""
    content = json.loads(record.read_text(encoding="utf-8"))
    shown = []
    for of in content["results"]:
        if of["system"] == "top_k":
            shown.append(
                f"r = {of['dim']}: {of['users_per_second']:,.0f} users/s, {of['share']:.0%} of the "
                "product's rate"
            )
    return "; ".join(shown)
