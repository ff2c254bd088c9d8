"""Where a run begins: in an empty folder, or from the newest whole checkpoint of the same run."""

import shutil
import sys
from dataclasses import fields
from pathlib import Path

from trainer.checkpoint import BEST, Damaged, RunState, checkpoints, newest, verify, write_json
from trainer.config import RunConfig, flat
from trainer.control import agree
from trainer.data.source import SourceConfig, shown
from trainer.errors import InputError
from trainer.log import METRICS_FILE
from trainer.run_lock import LOCK

# What may differ when a run goes on: it changes where things lie, how fast they go, or how far, not what a step does.
MAY_CHANGE = (
    "data",
    "run",
    "timeout_minutes",
    "deterministic",
    "epochs",
    "max_steps",
    "log",
    "checkpoint",
    "table.placement",
    "table.cache_share",
    "table.device_share",
    "stream.workers",
    "stream.prefetch",
    "stream.verify",
    "stream.damaged",
    *(f"stream.{field.name}" for field in fields(SourceConfig)),
    "evaluation.batch_size",
    "evaluation.every_epochs",
    "evaluation.patience",
    "optimizer.zero_stage",
    "deepspeed.zero_optimization",
)
_MOVES_THE_RATE = ("epochs", "max_steps")  # where the schedule falls towards the last step
_SHOWN = 12


def run_folder(folder, fresh=False) -> Path:
    """The run's folder: new, empty, or of a run that can go on. Raises InputError where it is none of them.

    fresh: it must not hold anything.
    """
    if not folder:
        raise InputError("run=DIR is missing: the folder that gets everything this run writes")
    run = Path(folder)
    try:
        if not run.exists() or (run.is_dir() and all(entry.name == LOCK for entry in run.iterdir())):
            return run
    except OSError as error:
        raise InputError(f"{run}: cannot be read ({error.strerror}): give another folder as run=DIR") from None
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: already holds something that is no run; give a new folder as run=DIR")
    if fresh:
        raise InputError(f"{run}: already holds a run; give a new folder as run=DIR, or leave out --fresh to go on with it")
    return run


def find_start(run: Path, config: RunConfig, dataset, ranks, accept_changes=False):
    """(checkpoint folder, RunState) to go on from; (None, RunState()) for the beginning. Called on all ranks.

    accept_changes: go on though the dataset or a setting that decides what is computed has changed. Raises InputError where
    they have, with a list, and where there are checkpoints and none of them is whole.
    """

    def say(text):
        print(f"rank {ranks.rank}: {text}", file=sys.stderr, flush=True)

    folder, facts = newest(run, ranks, say)
    if folder is None:
        if found := checkpoints(run):
            raise InputError(
                f"{run}: none of its {len(found)} checkpoints is whole: copy the run again, or give a new folder as run=DIR"
            )
        return None, RunState()
    changed = differences(facts, config, dataset.fingerprint)
    if changed and not accept_changes:
        more = f"; and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise InputError(
            f"{run}: its checkpoint was made otherwise: {'; '.join(changed[:_SHOWN])}{more}: put it back, give a new folder as "
            "run=DIR, or go on with --accept-changes"
        )
    if changed and ranks.first:
        say(f"goes on though it was made otherwise: {'; '.join(changed)}")
    _look_at_best(run, folder, facts["state"], ranks, say)
    return folder, facts["state"]


def _look_at_best(run, folder, state, ranks, say):
    """best.json as it was when the checkpoint was written; no best where that model is not whole any more."""
    if state.best is not None and run / state.best["folder"] != folder:
        damage = None
        try:
            verify(run / state.best["folder"], ranks.rank, ranks.world_size)
        except (Damaged, OSError) as error:
            damage = error
            say(f"{error}: the best model so far is lost, the next validation begins anew")
        if agree(trouble=damage is not None).trouble:
            state.best, state.since_best = None, 0
    if ranks.first:
        if state.best is not None:
            write_json(run / BEST, state.best)
        else:
            (run / BEST).unlink(missing_ok=True)


def differences(facts, config: RunConfig, fingerprint):
    """What is not as it was when the checkpoint was written, and may not change silently: a list of texts."""
    found = [] if facts["dataset"] == fingerprint else [f"the dataset {shown(config.data)} has other contents"]
    before, now = facts["config"], flat(config)
    may_change = MAY_CHANGE if config.optimizer.schedule == "constant" else set(MAY_CHANGE) - set(_MOVES_THE_RATE)
    for key in sorted(before.keys() | now.keys()):
        allowed = any(key == name or key.startswith(f"{name}.") for name in may_change)
        if not allowed and before.get(key) != now.get(key):
            found.append(f"{key} was {shown_value(before, key)}, is {shown_value(now, key)}")
    return found


def shown_value(values, key):
    """A setting as a message has it."""
    if key not in values:
        return "not set"
    return "".join(letter if letter.isprintable() else " " for letter in str(values[key])[:80])


def leave_nothing(run: Path):
    """Takes away what a run that could not begin has written, and nothing else; a checkpoint or a model stays."""
    if checkpoints(run) or (run / BEST).exists() or not run.is_dir():
        return
    for name in ("config.yaml", METRICS_FILE):
        (run / name).unlink(missing_ok=True)
    for name in ("tensorboard", "checkpoints"):
        shutil.rmtree(run / name, ignore_errors=True)
    if all(entry.name == LOCK for entry in run.iterdir()):
        (run / LOCK).unlink(missing_ok=True)
        run.rmdir()
