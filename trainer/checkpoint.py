"""The best model on disk: dense weights and table rows as safetensors, made visible by one atomic step.

    run/checkpoints/step-00001200/dense.safetensors, table-00000-of-00002.safetensors, …, model.json
    run/best.json        names the folder and says why it is the best

Table files name the rows that they hold, so any number of ranks can read them.
"""

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from embeddings.storage import load_shard, save_shard
from trainer.engine import full_state
from trainer.errors import InputError

BEST = "best.json"


def save_best(run: Path, engine, table, step, facts, ranks):
    """Called on all ranks. facts: what best.json says beside the folder. The best model before it goes when the new one
    stands."""
    name = f"checkpoints/step-{step:08d}"
    partial, final = run / f"{name}.partial", run / name
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_shard(table, partial)
    state = full_state(engine, keep=ranks.first)
    if ranks.first:
        save_file(state, partial / "dense.safetensors")
    dist.barrier()
    if ranks.first:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        write_json(run / BEST, {"folder": name, "step": step} | facts)
        for other in (run / "checkpoints").iterdir():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)
    dist.barrier()


def load_best(run: Path, model, table):
    """Fills model and table from the run's best checkpoint; returns what best.json says. Called on all ranks."""
    try:
        best = json.loads((run / BEST).read_text())
        folder = run / best["folder"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{run}: holds no finished model ({BEST} is missing or unreadable): train first") from None
    try:
        model.load_state_dict(load_file(folder / "dense.safetensors"))
        load_shard(table, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be read ({error}): copy the run again") from None
    except (RuntimeError, ValueError) as error:  # weights of other shapes or names; a table of other rows
        raise InputError(
            f"{folder}: its weights do not fit the run's model and dataset ({str(error).splitlines()[0]})"
        ) from None
    return best


def write_json(file: Path, value):
    """Written beside and moved over: a reader sees the old file or the new one."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, file)
