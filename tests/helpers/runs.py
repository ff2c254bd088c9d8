"""Small runs in this process: a trainer, its checkpoints, and everything that they have to hold."""

import contextlib
import copy
import functools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import deepspeed
import torch
import xxhash

from tests.helpers import PARTS
from tests.helpers.alone import group_of_one
from tests.helpers.made import draw_histories, write_dataset
from trainer.checkpoint import best_model
from trainer.checkpoint.layout import RunState
from trainer.checkpoint.save import Checkpoints
from trainer.checkpoint.zero_state import gather_optimizer_state, gather_state
from trainer.config.load import flatten_config, load_config, to_yaml
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.stream import TrainBatches
from trainer.distributed.process_group import Ranks
from trainer.files.atomic import write_json
from trainer.run_files import BEST, MANIFEST
from trainer.training.step import Trainer

SETTINGS = [
    *PARTS,
    "stream.workers=0",
    "global_batch_size=4",
    "model.dim=8",
    "model.ffn_dim=8",
    "model.max_length=8",
    "model.experts=2",
    "model.cross_experts=1",
    "model.blocks=1",
    "model.time_knots=6",
    "negatives.shared=8",
    # DeepSpeed's own takes gigabytes of address space, and keeps engines of stage 3: at some point no process can be forked.
    "deepspeed.zero_optimization.reduce_bucket_size=100000",
]
METRICS = '{"kind": "train", "step": 1}\n'


@contextlib.contextmanager
def rank_of_one():
    """This process as the only rank, as a launcher would describe it; one after the other may build engines."""
    before = dict(os.environ)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    deepspeed.utils.groups._WORLD_GROUP = (
        None  # DeepSpeed keeps the first one that it meets
    )
    try:
        with group_of_one():
            yield Ranks(0, 1, 0, torch.device("cpu"))
    finally:
        deepspeed.utils.groups._WORLD_GROUP = None
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def read_settings(*settings):
    """The configuration that they are, which takes longer to read than a step takes."""
    return load_config([], settings)


@contextlib.contextmanager
def records_read_once():
    """Within it a run's config.yaml of the same bytes is read once, which takes longer than a step takes."""
    read, known = best_model.load_recorded, {}

    def read_known(file):
        data = Path(file).read_bytes() if Path(file).is_file() else None
        if data is None:
            return read(file)
        if data not in known:
            known[data] = read(file)
        return copy.deepcopy(known[data])

    with mock.patch.object(best_model, "load_recorded", read_known):
        yield


class SmallRun:
    """A dataset and a run's folder, the configuration that goes with them, and trainers as the run would build them."""

    def __init__(self, folder, ranks, *settings, data=None):
        """data: another dataset than one that is drawn."""
        self.ranks, self.folder = ranks, folder / "run"
        if data is None:
            data = write_dataset(folder / "data", draw_histories(20))
        self.dataset = data
        self.config = self.configured(*settings)

    def copied(self, folder):
        """The same with a copy of the run's folder, for a test to spoil."""
        own = copy.copy(self)
        own.folder = folder
        shutil.copytree(self.folder, own.folder)
        return own

    def configured(self, *settings):
        return replace(
            copy.deepcopy(read_settings(*SETTINGS, *settings)),
            data=str(self.dataset.folder),
            run=str(self.folder),
        )

    def trainer(self, checkpoint=None, step=0, config=None):
        config = config or self.config
        plan = BatchSchedule(
            self.dataset,
            config.global_batch_size,
            self.ranks.world_size,
            config.seed,
        )
        return Trainer(config, self.ranks, self.dataset, plan, checkpoint, step)

    def checkpoints(self, keep=2, last=None, **facts):
        facts = {
            "config": flatten_config(self.config),
            "dataset": self.dataset.fingerprint,
        } | facts
        return Checkpoints(self.folder, keep, self.ranks, facts, last)

    def save(self, trainer, state, keep=2):
        """A whole checkpoint of the trainer; its folder."""
        writer = self.checkpoints(keep)
        writer.save(trainer.engine, trainer.table, state)
        writer.finish()
        return self.folder / "checkpoints" / f"step-{state.step:08d}"


def train(trainer, steps):
    """So many further steps on what the run would be fed."""
    config = trainer.config
    batches = TrainBatches(
        trainer.plan,
        trainer.ranks.rank,
        trainer.step,
        config.model.max_length,
        config.model.mutual_information_pooling,
        config.negatives,
        config.stream,
        config.model.mutual_information_candidates,
        config.accumulation,
    )
    for _, fed in zip(range(steps), batches, strict=False):
        trainer.train_step(fed.batch)
    return trainer


def finished_run(folder, ranks, *settings, data=None):
    """A SmallRun of three steps whose best model others can open."""
    run = SmallRun(
        folder, ranks, "optimizer.learning_rate=0.03", *settings, data=data
    )  # what begins at zero has to show
    run.save(train(run.trainer(), 3), RunState(step=3, best=best_of(3)))
    write_json(run.folder / BEST, best_of(3))
    (run.folder / "config.yaml").write_text(to_yaml(run.config))
    return run


def best_of(step, folder=None, value=0.5):
    """What RunState.best and best.json say of a checkpoint."""
    return {
        "folder": folder or f"checkpoints/step-{step:08d}",
        "step": step,
        "epoch": 0,
        "NDCG@10": value,
    }


def everything(trainer):
    """All that the next step depends on besides the step's number, copied: {name: tensor}."""
    _, table = trainer.table.shard()
    found = {
        f"dense {name}": value
        for name, value in gather_state(trainer.engine, True).items()
    }
    found |= {
        f"optimizer {name}": value
        for name, value in gather_optimizer_state(trainer.engine, True).items()
    }
    found |= {f"table {name}": value.clone() for name, value in table.items()}
    return found | {"table updates": torch.tensor(trainer.table.updates)}


def same(found, expected):
    """Equal to the bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def seal(folder, **entries):
    """Writes the manifest anew for the files as they are now: what an altered checkpoint looks like whose checksums hold.

    entries: over the manifest's own keys.
    """
    files = {}
    for file in sorted(folder.iterdir()):
        if file.name != MANIFEST:
            content = file.read_bytes()
            files[file.name] = {
                "bytes": len(content),
                "xxh3_128": xxhash.xxh3_128_hexdigest(content),
            }
    (folder / MANIFEST).write_text(
        json.dumps({"format_version": 1, "files": files} | entries)
    )


def edit_json(file, **changes):
    """Changes top-level keys of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(
        json.dumps(
            {key: value for key, value in content.items() if value is not None}
        )
    )
