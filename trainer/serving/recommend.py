"""The best items of each domain for many users, by a finished run's best model, as partitioned Parquet.

    OUTPUT/domain=NAME/part-00000.parquet …   user_id, history (int32), rank (int32, from 1), item_id, score (float32)
    OUTPUT/recommend.json                     what it was made from, and what is there

A row is one recommendation; a user's rows stand together, best first, and a user is in one part. Ids have the types that they
came with. Of a domain that has fewer items left than `k` a user gets those that are left. `history` is how many interactions of
the user the model knows; a user without any gets what the model predicts at the start of a history (its SOS token, trained on
every user's first item). A domain's name stands in its folder's as Hive writes it.

It is made in stages that leave files (`Work`): the histories, then part after part, as many at once as give each rank users,
gathered to the first rank, which writes them while the next ones are scored. Killed, the same command goes on from the parts
that are there, at any number of ranks. OUTPUT is there whole or not at all; it lies on storage that all hosts see. A step's
users depend on the part alone, not on the number of ranks, so the model's sums are the same.
"""

import hashlib
import json
import os
import shutil
from concurrent import futures
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from embeddings.topk.ranking import ExactRanking, Excluded
from syncrec.batch.build import move
from trainer.checkpoint.best_model import best_model, open_run
from trainer.checkpoint.save import MANIFEST
from trainer.data.format.dataset import TICKS
from trainer.data.format.vocabulary import item_ids
from trainer.data.loading.stream import Reasons
from trainer.data.prepare.logs import reason
from trainer.distributed.agreement import by_the_first
from trainer.errors import InputError
from trainer.evaluation.sampled import query_of
from trainer.files.atomic import Patience, move_folder, patiently, write_json
from trainer.files.progress import Stages
from trainer.files.staged import Work, work_folder
from trainer.serving.user_histories import (
    Asked,
    AskedConfig,
    read_histories,
    write_histories,
)

RECORD = "recommend.json"
FORMAT_VERSION = 1
_QUOTED = {chr(code) for code in range(32)} | set(
    "\"#%'*/:=?\\{[]^\x7f"
)  # as Hive's FileUtils.escapePathName has them


@dataclass(frozen=True)
class RecommendConfig:
    """What is recommended. domains: names; none: all of the run's. keep_seen: items of the history are recommended too."""

    k: int = 10
    domains: tuple[str, ...] = ()
    keep_seen: bool = False
    batch_size: int = 512  # users of one rank at once

    def __post_init__(self):
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give at least 1")


def recommend(
    run,
    output,
    ranks,
    config: RecommendConfig,
    asked: AskedConfig,
    data=None,
    fresh=False,
) -> dict:
    """Writes the folder `output` and returns what its recommend.json says. Called on all ranks.

    Where an earlier call with the same run, users and options was killed, it goes on from the parts that it finished; fresh:
    begins anew. Where `output` is what this call would make, nothing is done. Raises InputError for whatever is wrong with the
    run, the logs, the users, a domain's name, or the folder; and, naming it, where something differs from the earlier call.
    """
    output = Path(output)
    run_config, dataset = open_run(run, data, of_all_domains=True, ranks=ranks)
    domains = _chosen(dataset, config.domains)
    facts = by_the_first(
        lambda: _facts(run, dataset, domains, config, asked), ranks.first
    )
    if (
        record := by_the_first(lambda: _finished(output, facts), ranks.first)
    ) is not None:
        return record
    model, table, best = best_model(run, run_config, dataset, ranks)
    with Stages(ranks.first) as stages:
        made = _Recommendations(output, ranks, stages, facts, fresh)
        try:
            asked_for = made.histories(
                asked, dataset, run_config.stream.damaged == "skip"
            )
            scorer = _Scorer(
                model,
                table,
                dataset,
                domains,
                config,
                run_config.model.max_length,
                ranks,
            )
            made.parts(scorer, asked_for, asked.part_users)
            return made.deliver(
                {**facts, "best_step": best["step"]}, asked_for, domains
            )
        finally:
            made.close()


def folder_of(domain: str) -> str:
    """domain=NAME, as Hive quotes what a folder's name cannot have."""
    return "domain=" + "".join(
        f"%{ord(letter):02X}" if letter in _QUOTED else letter for letter in domain
    )


def _chosen(dataset, names):
    """The numbers of the domains that are wanted, rising."""
    return sorted(
        {dataset.domain_number(name) for name in names} or range(len(dataset.domains))
    )


def _facts(run, dataset, domains, config, asked):
    """What the recommendations depend on, by the names of the options, as JSON has it."""
    try:
        best = Path(json.loads((Path(run) / "best.json").read_text())["folder"])
        if best.parent != Path("checkpoints"):
            raise ValueError(f"{best} is no checkpoint's name")
        model = hashlib.sha256((Path(run) / best / MANIFEST).read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        model = None  # loading it says what is wrong
    own = {
        "k": config.k,
        "domains": [dataset.domains[number].name for number in domains],
        "keep_seen": config.keep_seen,
    }
    facts = {
        "format_version": FORMAT_VERSION,
        "model": model,
        "dataset": dataset.fingerprint,
        **own,
        **asked.facts(),
    }
    return json.loads(json.dumps(facts))


def _finished(output, facts):
    """The record of a finished output that was made from the same."""
    try:
        record = json.loads((output / RECORD).read_text(encoding="utf-8"))
        if not record["made_from"].items() >= facts.items():
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shutil.rmtree(
        work_folder(output), ignore_errors=True
    )  # a kill may have come before it was taken away
    return record


class _Recommendations:
    """The stages on disk. What they write the first rank writes; every method is called on all ranks."""

    def __init__(self, output, ranks, stages, facts, fresh):
        self.ranks, self.stages, self.work = ranks, stages, None
        self.folder = work_folder(output)

        def begin():
            self.work = Work(output, facts, fresh, refuse=True)

        by_the_first(begin, ranks.first)

    def histories(self, config, dataset, skip_damaged) -> Asked:
        """Who is asked for, with their histories on disk."""

        def write():
            if not self.work.done("histories"):
                reasons = Reasons() if skip_damaged else None
                try:
                    with self.work.stage("histories") as folder:
                        threads = len(os.sched_getaffinity(0))
                        write_histories(
                            folder,
                            config,
                            dataset,
                            self.work.scratch,
                            self.stages,
                            threads,
                            reasons,
                        )
                except InputError:  # of the logs or users: it would be met again
                    self.work.discard()
                    raise
                except duckdb.OutOfMemoryException as error:
                    raise InputError(
                        f"memory {config.memory} is too little: give more with --memory ({reason(error)})"
                    ) from None
            return asdict(Asked.load(self.work.path("histories")))

        return Asked(**by_the_first(self._writing(write), self.ranks.first))

    def parts(self, scorer, asked: Asked, part_users):
        """Makes the parts that are not there."""
        count = -(-asked.users // part_users)
        done = by_the_first(
            lambda: [part for part in range(count) if self.work.done(_part(part))],
            self.ranks.first,
        )
        missing = sorted(set(range(count)) - set(done))
        groups = scorer.groups(missing, part_users)
        with self.stages("recommending", total=asked.users) as advance:
            advance(min(asked.users, (count - len(missing)) * part_users))
            written = None  # a future of the first rank, which writes a group while the next one is scored
            try:
                for group in groups:
                    sizes = [
                        min(part_users, asked.users - part * part_users)
                        for part in group
                    ]
                    reader = PartReader(self.folder / "histories", group)
                    top = scorer(sizes, reader, advance)
                    self._wait(written)
                    written = self._start_writing(group, scorer, reader, top)
                self._wait(written)
            finally:
                futures.wait([written] if written else [])

    def deliver(self, made_from, asked: Asked, domains) -> dict:
        """Puts the parts in their places; the record."""

        def move_all():
            whole = self.work.path("whole")
            if self.work.done("whole"):  # killed on the threshold
                record = json.loads((whole / RECORD).read_text(encoding="utf-8"))
                self.work.deliver("whole")
                return record
            rows = {}
            partial = self.work.folder / "whole.partial"
            partial.mkdir(exist_ok=True)
            parts = [
                part
                for part in (self.work.folder / "parts").iterdir()
                if part.name.isdecimal()
            ]
            for part in sorted(parts, key=lambda part: int(part.name)):
                for file in part.glob("domain=*/*.parquet"):
                    target = partial / file.relative_to(part)
                    target.parent.mkdir(exist_ok=True)
                    file.rename(target)  # was flushed with its part
            for name in made_from["domains"]:
                files = sorted((partial / folder_of(name)).glob("*.parquet"))
                rows[name] = sum(pq.read_metadata(file).num_rows for file in files)
            record = {"made_from": made_from, **asdict(asked), "rows": rows}
            write_json(partial / RECORD, record)
            move_folder(partial, whole)
            self.work.deliver("whole")
            return record

        return by_the_first(self._writing(move_all), self.ranks.first)

    def close(self):
        """Lets another process work here."""
        if self.work is not None:
            self.work.__exit__(None, None, None)

    def _start_writing(self, group, scorer, reader, top):
        """Writes a group's parts on the first rank."""
        if not self.ranks.first:
            return None

        def write():
            for place, part in enumerate(group):
                ids, lengths_B, _, _ = reader(place)
                self._write(
                    part,
                    scorer,
                    ids,
                    lengths_B,
                    [(number, *arrays[place]) for number, arrays in top],
                )

        pool = futures.ThreadPoolExecutor(1, thread_name_prefix="parts")
        written = pool.submit(self._writing(write))
        pool.shutdown(wait=False)
        return written

    def _wait(self, written):
        """Until the first rank has written what it was told to; raises what it raised, on all ranks."""
        by_the_first(lambda: written.result() if written else None, self.ranks.first)

    def _write(self, part, scorer, ids, lengths_B, top):
        with self.work.stage(_part(part)) as folder:
            for number, rows_Bk, scores_Bk in top:
                place = folder / folder_of(scorer.dataset.domains[number].name)
                place.mkdir()
                table = _table(
                    ids,
                    lengths_B,
                    rows_Bk,
                    scores_Bk,
                    scorer.item_ids(number),
                    scorer.dataset.domains[number],
                )
                pq.write_table(
                    table, place / f"part-{part:05d}.parquet", compression="zstd"
                )

    def _writing(self, work):
        """What the disk has against it becomes an InputError."""

        def guarded():
            try:
                return work()
            except (duckdb.IOException, OSError) as error:
                raise InputError(
                    f"{self.folder} cannot be written: {reason(error)}: make room, and the same command goes on"
                ) from None

        return guarded


def _part(part):
    return f"parts/{part:05d}"


def _table(ids, lengths_B, rows_Bk, scores_Bk, item_ids, domain):
    """One domain's rows of one part."""
    user, place = np.nonzero(rows_Bk >= 0)
    return pa.table(
        {
            "user_id": ids.take(pa.array(user)),
            "history": lengths_B[user].astype(np.int32),
            "rank": (place + 1).astype(np.int32),
            "item_id": item_ids.take(pa.array(rows_Bk[user, place] - domain.start)),
            "score": scores_Bk[user, place],
        }
    )


def _seen(histories_N, lengths_B):
    return Excluded(
        torch.from_numpy(histories_N.astype(np.int64)), torch.from_numpy(lengths_B)
    )


class _Scorer:
    """The top items of a part's users: computed by all ranks, gathered to the first."""

    def __init__(self, model, table, dataset, domains, config, max_length, ranks):
        self.model, self.table, self.dataset, self.config = (
            model,
            table,
            dataset,
            config,
        )
        self.max_length, self.ranks, self._item_ids = max_length, ranks, {}
        chosen = [(number, dataset.domains[number]) for number in domains]
        self.rankings = {
            number: ExactRanking(table, domain.start, domain.items)
            for number, domain in chosen
        }
        self.k = {number: min(config.k, domain.items) for number, domain in chosen}

    def item_ids(self, number):
        """Raw ids of a domain's items by place."""
        if number not in self._item_ids:
            self._item_ids[number] = item_ids(
                self.dataset, self.dataset.domains[number]
            )
        return self._item_ids[number]

    def groups(self, parts, part_users):
        """Parts that are scored together: so many that each rank has users, a step of `batch_size` users being one rank's."""
        steps = -(-part_users // self.config.batch_size)
        size = -(-self.ranks.world_size // steps)
        return [parts[begin : begin + size] for begin in range(0, len(parts), size)]

    @torch.no_grad()
    def __call__(self, sizes, reader, advance):
        """[(domain number, [(rows of M int32 (B, k), scores float32 (B, k)) of each part])] on the first rank; on the others
        arrays are empty.

        sizes: users of each part; reader: its `PartReader`. Whoever has fewer items left than k has −1 and −inf for the rest.
        advance: called with the users of each step.
        """
        size, world = self.config.batch_size, self.ranks.world_size
        # Which users are scored together depends on the part alone, and so the model's sums do.
        units = [
            (part, begin)
            for part, users in enumerate(sizes)
            for begin in range(0, users, size)
        ]
        steps = -(-len(units) // world)
        width = sum(self.k.values())
        rows_SBk = torch.full((steps, size, width), -1, dtype=torch.int32)
        scores_SBk = torch.full((steps, size, width), -torch.inf)
        for step in range(steps):
            now = units[step * world : (step + 1) * world]
            histories_N, ticks_N, own_B = (
                reader.users(*now[self.ranks.rank], size)
                if self.ranks.rank < len(now)
                else _NOBODY
            )
            y_BDR = self._outputs(histories_N, ticks_N, own_B)
            seen = None if self.config.keep_seen else _seen(histories_N, own_B)
            place = 0
            for number, ranking in self.rankings.items():
                k = self.k[number]
                found = ranking.top_k(y_BDR[:, number], k, seen)
                rows_SBk[step, : len(own_B), place : place + k] = (
                    found.rows_Bk.cpu().int()
                )
                scores_SBk[step, : len(own_B), place : place + k] = (
                    found.scores_Bk.cpu()
                )
                place += k
            advance(sum(min(size, sizes[part] - begin) for part, begin in now))
        rows_Uk, scores_Uk = (
            self._gathered(values, len(units)) for values in (rows_SBk, scores_SBk)
        )
        first_unit = np.cumsum([0, *(-(-users // size) for users in sizes)]) * size
        parts = [
            slice(first, first + users)
            for first, users in zip(first_unit, sizes, strict=False)
        ]
        ends = np.cumsum(list(self.k.values()))
        cut = [
            slice(end - k, end) for end, k in zip(ends, self.k.values(), strict=True)
        ]
        return [
            (number, [(rows_Uk[part, own], scores_Uk[part, own]) for part in parts])
            for number, own in zip(self.k, cut, strict=True)
        ]

    def _outputs(self, histories_N, ticks_N, lengths_B):
        """What each domain's items are scored with at the end of the dataset's time, (B, D, r); a rank without users takes part
        in the look-up."""
        lengths = lengths_B if len(lengths_B) else np.zeros(1, np.int64)
        now, both = np.full(len(lengths), TICKS), self.model.prediction is not None
        query = query_of(
            self.dataset,
            histories_N,
            ticks_N,
            lengths,
            now,
            self.max_length,
            np.zeros(0, np.int64),
            both,
        )
        query = move(query, self.ranks.device)
        return self.model(query, self.table(query.ids))[: len(lengths_B)]

    def _gathered(self, values_SBk, units):
        """All ranks' steps on the first rank, in the order of the users, each unit of them as long as a step: (U, …)."""
        world = self.ranks.world_size
        parts = (
            [torch.empty_like(values_SBk) for _ in range(world)]
            if self.ranks.first
            else None
        )
        dist.gather(values_SBk, parts, dst=0)
        if not self.ranks.first:
            return np.zeros((0, values_SBk.shape[2]), values_SBk.numpy().dtype)
        return torch.stack(parts, 1).flatten(0, 1)[:units].flatten(0, 1).numpy()


_NOBODY = np.zeros(0, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.int64)


class PartReader:
    """Histories of some parts, each read when it is asked for; the newest one is kept."""

    def __init__(self, folder, parts):
        self._folder, self._parts = folder, parts
        self._place, self._part = None, None

    def __call__(self, place):
        """What `read_histories` gives of the part in that place."""
        place_now, part = self._place, self._part
        if place_now != place:
            number = self._parts[place]
            # The first rank has written them, perhaps on another host.
            part = patiently(
                lambda: read_histories(self._folder, number), Patience(self._folder)
            )
            self._place, self._part = place, part
        return part

    def users(self, place, begin, count):
        """(rows, ticks, lengths) of some users of a part."""
        _, lengths_B, rows_N, ticks_N = self(place)
        end = begin + count
        first, last = int(lengths_B[:begin].sum()), int(lengths_B[:end].sum())
        return rows_N[first:last], ticks_N[first:last], lengths_B[begin:end]
