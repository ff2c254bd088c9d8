"""The files of a batch of recommendations: written stage by stage, and resumed after a kill."""

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent import futures
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.serving import HistoriesConfig
from trainer.data.format.dataset import Dataset, Domain
from trainer.data.loading.stream import DamageLog
from trainer.data.logs.duckdb_groups import summarize_error
from trainer.distributed.agreement import run_on_first_rank
from trainer.distributed.process_group import Ranks
from trainer.errors import InputError
from trainer.files.atomic import move_folder, write_json
from trainer.files.progress import Stages
from trainer.files.staged import StagedOutput, work_folder
from trainer.serving.top_items import DomainTop, PartReader, Scorer
from trainer.serving.user_histories import (
    HistoryCounts,
    UserHistories,
    write_histories,
)

# Readers of folders pass over names that begin with _, so the rest is one table.
RECORD = "_recommend.json"
OLD_RECORD = "recommend.json"  # of version 0.2
# Letters that Hive's FileUtils.escapePathName quotes.
_QUOTED = {chr(code) for code in range(32)} | set("\"#%'*/:=?\\{[]^\x7f")


def hive_folder(domain: str) -> str:
    """domain=NAME, as Hive quotes what a folder's name cannot have."""
    folder = "domain="
    for letter in domain:
        if letter in _QUOTED:
            letter = f"%{ord(letter):02X}"
        folder += letter
    return folder


class RecommendationFiles:
    """The stages on disk. The first rank writes them; every method is called on all ranks."""

    def __init__(
        self,
        output: Path,
        ranks: Ranks,
        stages: Stages,
        made_from: dict[str, Any],
        fresh: bool,
    ) -> None:
        """made_from: what the recommendations depend on; an earlier call with other values is
        an InputError, unless `fresh`.
        """
        self.ranks = ranks
        self.stages = stages
        self.folder = work_folder(output)
        self._work: StagedOutput | None = None  # the first rank's

        def begin() -> None:
            self._work = StagedOutput(
                output,
                made_from,
                fresh,
                refuse=True,
            )

        run_on_first_rank(begin, ranks.first)

    def __enter__(self) -> "RecommendationFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._work is not None:
            # Another process may work here now.
            self._work.__exit__(None, None, None)

    @property
    def _staged(self) -> StagedOutput:
        """The stages' folder. Used on the first rank alone."""
        if self._work is None:
            raise RuntimeError("only the first rank has the stages' folder")
        return self._work

    def write_histories(
        self,
        config: HistoriesConfig,
        dataset: Dataset,
        skip_damaged: bool,
    ) -> HistoryCounts:
        """Writes the wanted users with their histories, unless an earlier call has."""

        def write() -> dict[str, int]:
            with self._disk_errors():
                if not self._staged.done("histories"):
                    self._write_histories(
                        config,
                        dataset,
                        skip_damaged,
                    )
                return asdict(
                    HistoryCounts.load(self._staged.path("histories"))
                )

        return HistoryCounts(**run_on_first_rank(write, self.ranks.first))

    def _write_histories(
        self,
        config: HistoriesConfig,
        dataset: Dataset,
        skip_damaged: bool,
    ) -> None:
        """Runs the stage. Called on the first rank."""
        report = DamageLog() if skip_damaged else None
        threads = len(os.sched_getaffinity(0))
        scratch = self._staged.scratch
        try:
            with self._staged.stage("histories") as folder:
                write_histories(
                    folder,
                    config,
                    dataset,
                    scratch,
                    self.stages,
                    threads,
                    report,
                )
        except InputError:  # of the logs or users: it would be met again
            self._staged.discard()
            raise
        except duckdb.OutOfMemoryException as error:
            raise InputError(
                f"memory {config.memory} is too little: give more with --memory "
                f"({summarize_error(error)})"
            ) from None

    def write_parts(
        self,
        scorer: Scorer,
        counts: HistoryCounts,
        part_users: int,
    ) -> None:
        """Scores and writes the parts that are not there."""
        parts = -(-counts.users // part_users)
        missing = run_on_first_rank(
            lambda: self._missing_parts(parts), self.ranks.first
        )
        with self.stages("recommending", total=counts.users) as advance:
            finished = parts - len(missing)
            advance(min(counts.users, finished * part_users))
            # The first rank writes a group while all ranks score the next one.
            writing = None
            try:
                for group in scorer.group_parts(missing, part_users):
                    sizes = [
                        min(part_users, counts.users - part * part_users)
                        for part in group
                    ]
                    reader = PartReader(self.folder / "histories", group)
                    tops = scorer.score_parts(
                        sizes,
                        reader,
                        advance,
                    )
                    self._wait(writing)
                    writing = self._start_writing(
                        group,
                        scorer,
                        reader,
                        tops,
                    )
                self._wait(writing)
            finally:
                if writing is not None:
                    futures.wait([writing])

    def _missing_parts(self, parts: int) -> list[int]:
        """The numbers of the parts that no call has finished, rising."""
        return [
            part for part in range(parts) if not self._staged.done(_stage(part))
        ]

    def _start_writing(
        self,
        group: list[int],
        scorer: Scorer,
        reader: PartReader,
        tops: list[list[DomainTop]],
    ) -> futures.Future | None:
        """Writes a group's parts, in a thread of the first rank; None on the others."""
        if not self.ranks.first:
            return None

        def write() -> None:
            with self._disk_errors():
                for place, part in enumerate(group):
                    self._write_part(
                        part,
                        scorer,
                        reader.read(place),
                        tops[place],
                    )

        pool = futures.ThreadPoolExecutor(1, thread_name_prefix="parts")
        writing = pool.submit(write)
        pool.shutdown(wait=False)
        return writing

    def _wait(self, writing: futures.Future | None) -> None:
        """Until the first rank has written; raises on all ranks what the thread raised."""

        def result() -> None:
            if writing is not None:
                writing.result()

        run_on_first_rank(result, self.ranks.first)

    def _write_part(
        self,
        part: int,
        scorer: Scorer,
        histories: UserHistories,
        tops: list[DomainTop],
    ) -> None:
        """Runs a part's stage. Called on the first rank."""
        with self._staged.stage(_stage(part)) as folder:
            for top in tops:
                domain = scorer.served.dataset.domains[top.domain]
                item_ids = scorer.item_ids(top.domain)
                table = _as_table(
                    histories,
                    top,
                    item_ids,
                    domain,
                )
                domain_folder = folder / hive_folder(domain.name)
                domain_folder.mkdir()
                file = domain_folder / f"part-{part:05d}.parquet"
                pq.write_table(
                    table,
                    file,
                    compression="zstd",
                )

    def deliver(
        self,
        made_from: dict[str, Any],
        counts: HistoryCounts,
    ) -> dict[str, Any]:
        """Moves the parts into the output, and returns its record."""

        def move() -> dict[str, Any]:
            with self._disk_errors():
                whole = self._staged.path("whole")
                # A call was killed on the threshold.
                if self._staged.done("whole"):
                    text = (whole / RECORD).read_text(encoding="utf-8")
                    record = json.loads(text)
                else:
                    record = self._collect_parts(made_from, counts)
                self._staged.deliver("whole")
                return record

        return run_on_first_rank(move, self.ranks.first)

    def _collect_parts(
        self,
        made_from: dict[str, Any],
        counts: HistoryCounts,
    ) -> dict[str, Any]:
        """Moves all parts into the stage `whole`, with the record of them."""
        partial = self._staged.folder / "whole.partial"
        partial.mkdir(exist_ok=True)
        # A call may have been killed after it moved some of the files.
        for part in sorted((self._staged.folder / "parts").iterdir()):
            if not part.name.isdecimal():
                continue
            for file in part.glob("domain=*/*.parquet"):
                target = partial / file.relative_to(part)
                target.parent.mkdir(exist_ok=True)
                file.rename(target)  # was flushed with its part
        rows = {}
        for name in made_from["domains"]:
            files = sorted((partial / hive_folder(name)).glob("*.parquet"))
            rows[name] = sum(pq.read_metadata(file).num_rows for file in files)
        record = {"made_from": made_from, **asdict(counts), "rows": rows}
        write_json(partial / RECORD, record)
        move_folder(partial, self._staged.path("whole"))
        return record

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns what the disk has against it into an InputError."""
        try:
            yield
        except (duckdb.IOException, OSError) as error:
            raise InputError(
                f"{self.folder} cannot be written: {summarize_error(error)}: make room, "
                "and the same command goes on"
            ) from None


def _stage(part: int) -> str:
    """The name of a part's stage."""
    return f"parts/{part:05d}"


def _as_table(
    histories: UserHistories,
    top: DomainTop,
    item_ids: pa.Array,
    domain: Domain,
) -> pa.Table:
    """One domain's rows of one part."""
    user_R, position_R = np.nonzero(top.rows_Bk >= 0)
    rows_R = top.rows_Bk[user_R, position_R]
    return pa.table(
        {
            "user_id": histories.ids.take(pa.array(user_R)),
            "history": histories.lengths_B[user_R].astype(np.int32),
            "rank": (position_R + 1).astype(np.int32),
            "item_id": item_ids.take(pa.array(rows_R - domain.start)),
            "score": top.scores_Bk[user_R, position_R],
        }
    )
