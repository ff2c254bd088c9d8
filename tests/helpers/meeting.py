"""Started with two real ranks: one after the other, what goes wrong where they do not have the
same, or see it late.

python meeting.py FOLDER

FOLDER has copy0 and copy1, datasets of the same logs with other seeds, and host0 and host1, both
the first one. Leaves FOLDER/rank0.json and rank1.json: by the case, what came of it on that rank.
"""

import contextlib
import functools
import gc
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch.distributed as dist

import trainer.checkpoint.resume
import trainer.files.atomic
from tests.helpers.late import Late
from tests.helpers.stages import SETTINGS
from trainer.checkpoint.best_model import open_run
from trainer.checkpoint.layout import list_checkpoints
from trainer.checkpoint.load import find_best, verify_checkpoint
from trainer.checkpoint.resume import find_start
from trainer.config.load import load_config
from trainer.data.format.dataset import Dataset
from trainer.distributed import process_group
from trainer.distributed.process_exit import run_script
from trainer.errors import InputError
from trainer.retraining.publish import find_newest_users
from trainer.training.loop import train

NEVER = 3600.0
# Three checkpoints, of steps 1 to 3; the best one is that of step 3, after the only validation.
STEPS = [
    "max_steps=3",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    "evaluation.negatives=5",
    "timeout_minutes=2",
]
TABLE_1 = "*/table-00001-of-00002.safetensors"
NEWEST = "*/checkpoints/step-00000003*"


class Meeting:
    """The cases; each is a method, which both ranks call."""

    def __init__(self, folder, ranks):
        self.folder, self.ranks, self.rank = folder, ranks, ranks.rank

    def config(self, data, run, *settings):
        return load_config(
            [],
            [
                *SETTINGS,
                *STEPS,
                f"data={self.folder / data}",
                f"run={self.folder / run}",
                *settings,
            ],
        )

    def train(self, data, run, *settings):
        train(self.config(data, run, *settings), self.ranks)
        return [folder.name for folder in list_checkpoints(self.folder / run)]

    def copied(self, name):
        """A copy of the run `whole`, and where both ranks' begins."""
        if self.ranks.first:
            shutil.copytree(self.folder / "whole", self.folder / name)
        dist.barrier()
        return self.folder / name

    def start(self, run):
        """The checkpoint that is gone on from."""
        config = self.config("host0", run)
        folder, state = find_start(
            self.folder / run, config, Dataset.load(config.data), self.ranks
        )
        return [folder.name, state.step]

    @contextlib.contextmanager
    def late(self, rank, pattern, seconds, how="absent", patience=20.0):
        """Within it a rank sees files late, and all wait so long for them; the rank has to have
        looked in vain."""
        late = Late(pattern, seconds, how)
        seen = late.seen() if self.rank == rank else contextlib.nullcontext()
        with (
            mock.patch.object(trainer.files.atomic, "LATENESS", patience),
            seen,
        ):
            yield
        assert self.rank != rank or late.looks

    def case_equal(self):
        return self.train(f"host{self.rank}", "whole")

    def case_another_dataset(self):
        return self.train(f"copy{self.rank}", "refused")

    def case_other_settings(self):
        return self.train(
            "host0",
            "refused",
            f"model.eta=0.{self.rank + 5}",
            f"seed={self.rank}",
        )

    def case_other_versions(self):
        real = importlib.metadata.version

        def version(name):
            return (
                "0.9" if self.rank == 1 and name == "torchrec" else real(name)
            )

        fresh = functools.cache(
            trainer.checkpoint.resume.list_versions.__wrapped__
        )
        with (
            mock.patch.object(importlib.metadata, "version", version),
            mock.patch.object(
                trainer.checkpoint.resume, "list_versions", fresh
            ),
        ):
            return self.train("host0", "refused")

    def case_no_dataset(self):
        return self.train("host0" if self.rank == 0 else "nowhere", "refused")

    def case_no_dataset_anywhere(self):
        return self.train("nowhere", "refused")

    def case_a_fault(self):
        with mock.patch.object(
            Dataset,
            "load",
            side_effect=ZeroDivisionError("by the test")
            if self.rank == 1
            else None,
        ):
            try:
                return self.train("host0", "refused")
            except ZeroDivisionError as error:
                return f"raised {error}"

    def case_evaluation_of_another_dataset(self):
        open_run(self.folder / "whole", self.folder / f"copy{self.rank}")

    def case_evaluation(self):
        _, dataset = open_run(
            self.folder / "whole", self.folder / f"host{self.rank}"
        )
        folder, best, _ = find_best(self.folder / "whole", self.ranks)
        return [folder.name, best["step"], dataset.users]

    def case_no_newest_checkpoint(self):
        for rank in (0, 1):
            run = self.copied(f"apart{rank}")
            if rank == 1 and self.rank == 1:
                shutil.rmtree(run / "checkpoints" / "step-00000003")
        with mock.patch.object(trainer.files.atomic, "LATENESS", 0.5):
            return self.start(f"apart{self.rank}")

    def case_another_newest_checkpoint(self):
        for rank in (0, 1):
            run = self.copied(f"other{rank}")
            if rank == 1 and self.rank == 1:
                manifest = run / "checkpoints/step-00000003/manifest.json"
                manifest.write_text(manifest.read_text().replace("{", "{ ", 1))
        with mock.patch.object(trainer.files.atomic, "LATENESS", 0.5):
            return self.start(f"other{self.rank}")

    def case_late_parts(self):
        with self.late(0, TABLE_1, 1.5):
            names = self.train("host0", "late-parts")
        verify_checkpoint(list_checkpoints(self.folder / "late-parts")[-1])
        return names

    def case_short_parts(self):
        with self.late(0, TABLE_1, 1.5, "short"):
            return self.train("host0", "short-parts", "max_steps=1")

    def case_parts_that_never_come(self):
        with self.late(0, TABLE_1, NEVER, patience=1.0):
            return self.train("host0", "no-parts")

    def case_after_parts_that_never_came(self):
        assert (self.folder / "no-parts" / "config.yaml").is_file()
        return self.train("host0", "no-parts")

    def case_a_late_newest(self):
        self.copied("late-newest")
        with self.late(1, NEWEST, 1.5):
            return self.start("late-newest")

    def case_a_late_listing(self):
        """The first rank's: the checkpoint is not in it, and opened by its name it is there."""
        self.copied("late-listing")
        listed = Late(NEWEST, NEVER, "unlisted")
        with listed.seen() if self.ranks.first else contextlib.nullcontext():
            found = self.start("late-listing")
        assert listed.looks or not self.ranks.first
        return found

    def case_short_attributes(self):
        self.copied("short")
        with self.late(1, "*/step-00000003/dense.safetensors", 1.5, "short"):
            return self.start("short")

    def case_stale_handles(self):
        self.copied("stale")
        with self.late(1, NEWEST, 1.5, "stale"):
            return self.start("stale")

    def case_a_late_best(self):
        with self.late(1, NEWEST, 1.5):
            folder, best, facts = find_best(self.folder / "whole", self.ranks)
        return [folder.name, best["step"], facts["state"].step]

    def case_a_file_too_many(self):
        run = self.copied("more")
        if self.ranks.first:
            (run / "checkpoints/step-00000003/.nfs0001").write_text("")
            (
                run
                / "checkpoints/step-00000003/table-00002-of-00003.safetensors"
            ).write_text("of another number of ranks")
        dist.barrier()
        before = self.start("more")
        return [before, self.train("host0", "more")]

    def case_late_newest_users(self):
        """What a published model is judged by."""
        folder = self.folder / "extended"
        if self.ranks.first:
            shutil.copytree(self.folder / "copy0", folder)
            (folder / "extension").mkdir()
            np.save(folder / "extension" / "users.npy", np.arange(7))
        dist.barrier()
        with self.late(1, "*/extension/users.npy", 1.5):
            extended, came_U = find_newest_users(Dataset.load(folder))
        return [extended, int(came_U.sum())]


def main():
    """All cases, or those that are named."""
    folder, *names = (
        word for word in sys.argv[1:] if not word.startswith("--local_rank")
    )
    found = {}
    trainer.files.atomic.is_shared = lambda folder: True
    trainer.files.atomic.LATENESS = 5.0
    with process_group.join_process_group(timeout_minutes=2) as ranks:
        meeting = Meeting(Path(folder), ranks)
        for name in names or [
            name for name in vars(Meeting) if name.startswith("case_")
        ]:
            try:
                found[name.removeprefix("case_")] = getattr(meeting, name)()
            except InputError as error:
                found[name.removeprefix("case_")] = {
                    "status": error.status,
                    "says": str(error),
                }
            dist.barrier()
            gc.collect()
        (Path(folder) / f"rank{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
