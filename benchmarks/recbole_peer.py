"""How fast does SASRec train here, beside RecBole's, how well does it rank, and what does full
SyNCRec cost and gain?

    make peers                                    RecBole's environment, .venv-peers
    python benchmarks/recbole_peer.py          its log lies beside the project; takes hours
    python benchmarks/recbole_peer.py parts=[speed]
    python benchmarks/recbole_peer.py --short  a small synthetic log: does it run?

Ours is what a person starts: `launch/train.py` with `launch/configs/sasrec.yaml` (SyNCRec:
`amazon4.yaml`), worker processes and all. RecBole is its own trainer and loader, in an
environment of its own (`recbole_sasrec.py`), with the same split, length, width, blocks, heads
and inner width. Both use all cores, one after the other.

- interactions/s: interactions predicted in an epoch, each counted once, by the time: RecBole's
  samples (it makes one of every prefix of a history), our targets of the cross-domain view.
  Windows of training steps, without validation.
- NDCG@10: the test item among 99 drawn from its domain, the same for all systems, at the epoch
  that was best by such a list for the validation item. RecBole's scores are ranked by our code;
  ours go through `launch/evaluate.py --candidates`.
- RecBole "by users" is its model, loss and Adam fed whole users, where all prefixes of a user
  share one pass (`recbole_sasrec.quality_by_user`): its own training takes too long to be
  trained to the end.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# Run as a file, Python looks beside the file; the installed project leaves benchmarks out.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import suite
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.format.dataset import USERS, Dataset
from trainer.data.prepare.pipeline import prepare
from trainer.data.synthetic import synthesize_logs
from trainer.errors import InputError, exit_on_input_error
from trainer.evaluation.sampled import PositionCounts, make_evaluation_record
from trainer.files.atomic import write_json
from trainer.reporting.run_log import read_records
from trainer.run_files import HEADLINE, METRICS_FILE
from trainer.study.peers import dataset_export as handing
from trainer.study.peers.interface import SPLITS

ROOT = Path(__file__).resolve().parents[1]
SASREC = "SASRec"
SYNCREC = "SyNCRec"
PRESETS = {SASREC: "sasrec", SYNCREC: "amazon4"}
_LENGTH = 64  # T of both presets
_DEFAULT_BATCH = 2048  # RecBole's


@dataclass(frozen=True)
class Settings:
    """settings/recbole_peer.yaml."""

    log: str
    users: int
    python: str
    folder: str
    parts: list[Literal["speed", "quality"]]
    users_per_step: list[int]
    batches: list[int]
    losses: list[Literal["CE", "BPR"]]
    warmup: int
    window: int
    windows: int
    our_steps: int
    our_window: int
    seeds: dict[str, list[int]]
    epochs: int
    quality_losses: list[Literal["CE", "BPR"]]
    quality_batch: int
    minutes: float
    own_minutes: float
    patience: int
    sasrec: list[str]
    syncrec: list[str]
    recbole: dict[str, Any]

    def __post_init__(self):
        counted = (
            "users_per_step",
            "batches",
            "warmup",
            "window",
            "windows",
            "our_window",
            "quality_batch",
            "patience",
        )
        suite.at_least(1, self, *counted)
        suite.at_least(3 * self.our_window, self, "our_steps")
        suite.existing(self.folder)
        if not self.log and self.users < 1:
            raise ValueError(
                "give log=FILE.parquet, or users=… of a synthetic log"
            )
        if not (ROOT / self.python).is_file():
            raise ValueError(
                f"python is {self.python}, which is not there: make peers"
            )


@exit_on_input_error
def main() -> None:
    """Measures, prints, writes."""
    settings, options = suite.settings("recbole_peer", Settings)
    record = suite.header("recbole_peer", settings, options)
    with suite.scratch("", "peer-") as temporary:
        work = Work(settings, Path(settings.folder or temporary))
        record |= {"dataset": work.facts(), "speed": [], "quality": []}
        for part in settings.parts:
            for result in {"speed": speeds, "quality": qualities}[part](work):
                record[part].append(result)
                print(
                    json.dumps(
                        {
                            key: value
                            for key, value in result.items()
                            if not isinstance(value, dict | list)
                        }
                    ),
                    flush=True,
                )
        suite.save("recbole_peer", record, options)


class Work:
    """The folder: the prepared dataset, what RecBole is given, runs, and what was found so far."""

    def __init__(self, settings: Settings, folder: Path):
        self.settings = settings
        self.folder = folder.resolve()
        self.given = folder.resolve() / "given"
        if not (self.folder / "data" / "dataset.json").is_file():
            log = ROOT / settings.log
            if not settings.log:
                log = self.folder / "logs"
                synthesize_logs(
                    log,
                    SyntheticConfig(
                        users=settings.users,
                        items=2000,
                        domains=4,
                        mean_length=30,
                    ),
                )
            prepare(
                PrepareConfig(
                    inputs=(str(log),), output=str(self.folder / "data")
                )
            )
        self.dataset = Dataset.load(self.folder / "data")
        if not self.given.is_dir():
            partial = self.folder / "given.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            hand_over(self.dataset, partial)
            partial.rename(self.given)

    def facts(self) -> dict:
        """What the record says of the dataset. predicted: of an epoch, by us."""
        lengths_U = self.dataset.lengths.sum(1, dtype=np.int64)
        return {
            "users": self.dataset.users,
            "interactions": self.dataset.interactions,
            "items": sum(domain.items for domain in self.dataset.domains),
            "domains": len(self.dataset.domains),
            "predicted_per_epoch": int(np.minimum(lengths_U, _LENGTH).sum()),
            "looked_up_per_epoch": int(
                np.minimum(self.dataset.lengths, _LENGTH + 1).sum(
                    dtype=np.int64
                )
            ),
            "fingerprint": self.dataset.fingerprint,
        }

    def once(self, name: str, task: Any, function: Callable[[], Any]) -> Any:
        """`function()`, or what it returned in an earlier call with the same task."""
        return suite.once(self.folder / f"{name}.json", task, function)

    def peer(self, name: str, task: dict) -> dict:
        """What recbole_sasrec.py finds for a task."""

        def run():
            file = self.folder / f"{name}.task.json"
            write_json(file, task)
            script = ROOT / "benchmarks" / "recbole_sasrec.py"
            command = [ROOT / self.settings.python, script, self.given, file]
            return json.loads(
                output(command, self.folder / f"{name}.log", self.folder)
            )  # it leaves folders where it runs

        return self.once(name, task, run)

    def train(self, name: str, system: str, *arguments: str) -> list[dict]:
        """The records of a run of ours, by `launch/train.py`; its folder is `name`."""
        preset = f"launch/configs/{PRESETS[system]}.yaml"
        arguments = [
            f"--config={preset}",
            *getattr(self.settings, system.lower()),
            *arguments,
        ]
        arguments += [
            "checkpoint.every_epochs=0",
            "checkpoint.every_minutes=0",
            "log.tensorboard=false",
        ]

        def run():
            shutil.rmtree(self.folder / name, ignore_errors=True)
            where = [f"data={self.dataset.folder}", f"run={self.folder / name}"]
            output(
                [sys.executable, "launch/train.py", *arguments, *where],
                self.folder / f"{name}.log",
            )
            return read_records(self.folder / name / METRICS_FILE)

        return self.once(name, [*arguments, (ROOT / preset).read_text()], run)


def output(command: list[str], log: Path, folder: Path = ROOT) -> str:
    """The last line of a command's standard output; what else it says goes to a file, whose end
    is shown where it fails.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(log, "w") as errors:
        done = subprocess.run(
            list(map(str, command)),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    if done.returncode:
        sys.exit(
            f"error: {log.stem} ended with status {done.returncode}:\n{log.read_text()[-2000:]}"
        )
    return done.stdout.splitlines()[-1]


def hand_over(dataset: Dataset, folder: Path) -> None:
    """What `recbole_sasrec.py` reads; and the test candidates as raw ids, for
    `launch/evaluate.py`.
    """
    handed = handing.export_dataset(dataset, folder)
    if any((handed.load(f"candidates-{split}") < 0).any() for split in SPLITS):
        raise InputError(
            "a domain has too few items for 99 candidates that a user never touched: take "
            "another log"
        )
    raw = np.zeros(dataset.num_embeddings, object)
    for domain in dataset.domains:
        vocabulary = pq.read_table(
            dataset.local(domain.vocabulary), columns=["item_id", "row"]
        )
        raw[vocabulary["row"].to_numpy()] = vocabulary["item_id"].to_pylist()
    people = pq.read_table(
        dataset.local(USERS), columns=["user_id", "user"]
    ).sort_by("user")["user_id"]
    test_UC = handed.load("candidates-test")
    named = raw[test_UC]
    columns = {
        "user_id": people.take(pa.array(handed.user_U)),
        "domain": [
            dataset.domains[domain].name
            for domain in dataset.domain_of(test_UC[:, 0])
        ],
        "positive": list(named[:, 0]),
        "negatives": [list(others) for others in named[:, 1:]],
    }
    pq.write_table(pa.table(columns), folder / "candidates-test.parquet")


def speeds(work: Work):
    """Entries of the record's `speed`."""
    settings = work.settings
    facts = work.facts()
    for system in PRESETS:
        for users in settings.users_per_step:
            arguments = [
                f"global_batch_size={users}",
                f"max_steps={settings.our_steps}",
                f"log.every={settings.our_window}",
            ]
            records = work.train(
                f"speed-{system}-{users}",
                system,
                *arguments,
                "epochs=1000",
                "evaluation.every_epochs=1000",
            )
            # Looked-up interactions come in the log; those outside the newest T of the merged
            # history are not predicted.
            share = facts["predicted_per_epoch"] / facts["looked_up_per_epoch"]
            # The first two windows hold start-up and the loader's measuring of its workers.
            windows = [
                record["tokens_per_second"] * share
                for record in records
                if record["kind"] == "train"
            ][2:]
            predicted = users * facts["predicted_per_epoch"] / facts["users"]
            yield {
                "system": system,
                "loss": "sampled softmax",
                "predicted_per_step": predicted,
                "users_per_step": users,
                "interactions_per_second": suite.spread(windows),
                "memory_bytes": max(
                    record["memory_gb"]
                    for record in records
                    if record["kind"] == "train"
                )
                * 2**30,
            }
    for loss in settings.losses:
        for batch in settings.batches:
            window = settings.window * max(1, _DEFAULT_BATCH // batch)
            task = {
                "kind": "speed",
                "options": {**options(settings, loss, batch)},
                "warm_up": settings.warmup,
            }
            found = work.peer(
                f"speed-RecBole-{loss}-{batch}",
                task | {"window": window, "windows": settings.windows},
            )
            windows = found.pop("interactions_per_second")
            yield {
                "system": "RecBole SASRec",
                "loss": loss,
                "predicted_per_step": batch,
                "interactions_per_second": suite.spread(windows),
                **found,
            }


def options(settings: Settings, loss: str, batch: int) -> dict:
    """RecBole's settings."""
    return {
        "MAX_ITEM_LIST_LENGTH": _LENGTH,
        "loss_type": loss,
        "train_batch_size": batch,
        **settings.recbole,
    }


def qualities(work: Work):
    """Entries of the record's `quality`."""
    for system in PRESETS:
        for seed in work.settings.seeds.get(system, []):
            yield our_quality(work, system, seed)
    task = {
        "kind": "quality_by_user",
        "minutes": work.settings.minutes,
        "patience": work.settings.patience,
    }
    for loss in work.settings.quality_losses:
        yield peer_quality(work, f"RecBole-{loss}", "by users", loss, task)
    if work.settings.own_minutes:
        loss = work.settings.losses[0]
        yield peer_quality(
            work,
            f"RecBole-own-{loss}",
            "its own",
            loss,
            {"kind": "quality", "minutes": work.settings.own_minutes},
        )


def our_quality(work: Work, system: str, seed: int) -> dict:
    """One run to the end, and its best model on the given candidates."""
    name = f"quality-{system}-{seed}"
    epochs = [f"epochs={work.settings.epochs}"] if work.settings.epochs else []
    records = work.train(name, system, f"seed={seed}", *epochs)
    validations = [
        record for record in records if record["kind"] == "validation"
    ]
    command = [
        "launch/evaluate.py",
        "--json",
        "--run",
        work.folder / name,
        "--data",
        work.dataset.folder,
    ]
    command += ["--candidates", work.given / "candidates-test.parquet"]
    log = work.folder / f"{name}-test.log"
    test = work.once(
        f"{name}-test",
        validations,
        lambda: json.loads(output([sys.executable, *command], log)),
    )
    return {
        "system": system,
        "training": "its own",
        "loss": "sampled softmax",
        "seed": seed,
        "epochs": [
            {
                "epoch": record["epoch"],
                "seconds": record["seconds"],
                "validation": record["mean"][HEADLINE],
            }
            for record in validations
        ],
        "best_epoch": test["epoch"],
        "best_seconds": next(
            record["seconds"]
            for record in validations
            if record["epoch"] == test["epoch"]
        ),
        "mean": test["mean"],
        "domains": test["domains"],
        "popularity": test["popularity_mean"],
    }


def peer_quality(
    work: Work, name: str, training: str, loss: str, task: dict
) -> dict:
    """RecBole's training, ranked by our code."""
    task |= {
        "options": options(work.settings, loss, work.settings.quality_batch),
        "output": name,
    }
    found = work.peer(f"quality-{name}", task)
    for epoch in found["epochs"]:
        for split in SPLITS:
            scores_UC = np.load(
                work.given / name / f"{split}-{epoch['epoch']}.npy",
                allow_pickle=False,
            )
            epoch[split] = ranked(work, split, scores_UC)
    best = max(
        found["epochs"], key=lambda epoch: epoch["validation"]["mean"][HEADLINE]
    )
    test = best["test"]
    by_epoch = [
        epoch | {split: epoch[split]["mean"][HEADLINE] for split in SPLITS}
        for epoch in found.pop("epochs")
    ]
    return {
        "system": "RecBole SASRec",
        "training": training,
        "loss": loss,
        "epochs": by_epoch,
        "best_epoch": best["epoch"],
        "best_seconds": best["seconds"],
        "mean": test["mean"],
        "domains": test["domains"],
        **found,
    }


def ranked(work: Work, split: str, scores_UC: np.ndarray) -> dict:
    """The evaluation record of scores, the held-out item's first; a tie counts against it."""
    candidates_UC = np.load(
        work.given / f"candidates-{split}.npy", allow_pickle=False
    )
    rank_U = (~(scores_UC[:, :1] > scores_UC)).sum(1)
    histogram = np.zeros(
        (2, len(work.dataset.domains), scores_UC.shape[1]), np.int64
    )
    np.add.at(
        histogram[0],
        (work.dataset.domain_of(candidates_UC[:, 0]), rank_U - 1),
        1,
    )
    return make_evaluation_record(
        split, work.dataset, PositionCounts(histogram)
    )


def table(record: dict) -> str:
    """Speed, then quality."""
    return "\n\n".join(
        filter(
            None,
            [speed_table(record["speed"]), quality_table(record["quality"])],
        )
    )


def speed_table(results: list[dict]) -> str:
    """A line a case; against RecBole's fastest, and its default."""
    fastest = None
    default_rate = None
    for result in results:
        if result["system"] in PRESETS:
            continue
        median = result["interactions_per_second"]["median"]
        fastest = max(fastest or median, median)
        is_default = result["predicted_per_step"] == _DEFAULT_BATCH
        if result["loss"] == "CE" and is_default and default_rate is None:
            default_rate = median
    rows = []
    for result in results:
        rate = result["interactions_per_second"]
        times_fastest = ""
        if fastest:
            times_fastest = f"{rate['median'] / fastest:.1f}"
        times_default = ""
        if default_rate:
            times_default = f"{rate['median'] / default_rate:.1f}"
        rows.append(
            {
                "system": result["system"],
                "loss": result["loss"],
                "predicted a step": f"{result['predicted_per_step']:,.0f}",
                "interactions/s": f"{rate['median']:,.0f} ({rate['min']:,.0f} – "
                f"{rate['max']:,.0f})",
                "times RecBole's fastest": times_fastest,
                "times its default": times_default,
            }
        )
    return suite.markdown(rows)


def quality_table(results: list[dict]) -> str:
    """A line a system and training; the mean over seeds, and the least and largest of them."""
    groups = {}
    for result in results:
        groups.setdefault(
            (result["system"], result["training"], result["loss"]), []
        ).append(result)
    rows = []
    for (system, training, loss), group in groups.items():
        cells = {}
        for metric in (HEADLINE, "HR@10", "MRR"):
            values = [result["mean"][metric] for result in group]
            spread = (
                f" ({min(values):.4f} – {max(values):.4f})"
                if len(values) > 1
                else ""
            )
            cells[f"test {metric}"] = f"{np.mean(values):.4f}{spread}"
        ended = group[0].get("stopped", "patience")
        rows.append(
            {
                "system": system,
                "training": training,
                "loss": loss,
                "seeds": len(group),
                "best epoch": ", ".join(
                    str(result["best_epoch"] + 1) for result in group
                ),
                "of": ", ".join(str(len(result["epochs"])) for result in group)
                + f" ({ended})",
                **cells,
            }
        )
    return suite.markdown(rows)


if __name__ == "__main__":
    main()
