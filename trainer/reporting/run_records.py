"""A run's records, as its report needs them: by kind, the best validation, the end of the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.reporting import plots
from trainer.reporting.run_log import read_records
from trainer.run_files import HEADLINE

LAST_SHARE = 0.2  # of the steps: what "at the end" means

Record = dict[str, Any]


@dataclass(frozen=True)
class RunRecords:
    """A run's records by kind. best: the best validation so far; test: the last test."""

    every: list[Record]
    train: list[Record]
    validations: list[Record]
    best: Record | None
    test: Record | None

    @classmethod
    def read(cls, file: Path) -> "RunRecords":
        """Reads a metrics.jsonl."""
        records = read_records(file)
        train = plots.with_relative_weights(_of_kind(records, "train"))
        validations = _of_kind(records, "validation")
        tests = _of_kind(records, "test")
        best = max(
            validations,
            key=_mean_ndcg,
            default=None,
        )
        test = tests[-1] if tests else None
        return cls(records, train, validations, best, test)

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 without any."""
        return max((record["step"] for record in self.every), default=0)

    @property
    def at_end(self) -> list[Record]:
        """The train records of the last LAST_SHARE of the steps; the last one at least."""
        if not self.train:
            return []
        last = self.train[-1]["step"]
        begin = last - LAST_SHARE * (last - self.train[0]["step"])
        return [record for record in self.train if record["step"] >= begin]

    @property
    def final(self) -> Record | None:
        """The record whose figures the page shows: of the test, or of the best validation."""
        return self.test or self.best

    def domain_names(self) -> list[str]:
        """All domains that occur in a record, in their order."""
        names: dict[str, None] = {}
        fields = (
            "single_by_domain",
            "cross_by_domain",
            "lambda",
            "phi",
            "domains",
        )
        for record in self.every:
            for field in fields:
                by_domain = record.get(field) or {}
                names |= dict.fromkeys(by_domain)
        return list(names)

    def seconds(self) -> float:
        """Seconds over all records; a clock that goes back was started anew by a resume.

        seconds of the records    10    20    5    15
        total                     10    20    25   35
        """
        total = 0.0
        before = 0.0
        for record in self.every:
            now = record.get("seconds")
            if now is None:
                continue
            if now >= before:
                total += now - before
            else:
                total += now
            before = now
        return total


def _of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _mean_ndcg(record: Record) -> float:
    """The key by which the best validation is chosen."""
    value = record["mean"].get(HEADLINE)
    if value is None:
        return -1.0
    return value
