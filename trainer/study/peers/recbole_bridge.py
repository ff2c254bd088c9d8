"""Trains RecBole's general and sequential models as baselines, by our split, candidates and choice.

bridge.py says what a run's folder holds; recbole_peer.py is RecBole's side.
"""

import difflib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.data.format.dataset import Dataset
from trainer.errors import InputError
from trainer.study.peers.bridge import (
    PEERS,
    RANKS,
    RESULT,
    Peer,
    Result,
    environment_python,
    executable,
    run_peer,
)

__all__ = (
    "RANKS",
    "RECBOLE",
    "RESULT",
    "default_python",
    "recbole_models",
    "run_recbole",
)

_MAKE = "make it with `make peers`, or name another with --recbole-python"


def default_python() -> Path:
    """Of RecBole: $RECBOLE_PYTHON, or what `make peers` makes. It need not be there."""
    return environment_python("RECBOLE_PYTHON", ".venv-peers")


def recbole_models(python: str | Path) -> dict[str, str | None]:
    """RecBole's models in `python`'s environment: {name: None, or why it cannot be compared}.

    Raises InputError where there is no such environment, or no RecBole in it.
    """
    command = [
        executable("RecBole", python, _MAKE),
        str(PEERS / "recbole_models.py"),
    ]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise InputError(
            f"RecBole's environment: {python} cannot be run ({error.strerror}): {_MAKE}"
        ) from None
    models = None
    if done.returncode == 0:
        try:
            models = json.loads(done.stdout)["models"]
        except (ValueError, KeyError, TypeError):
            models = None
    if models is None:
        raise InputError(
            f"RecBole's environment: {python} has no RecBole: {_MAKE}"
        )
    return models


def run_recbole(
    dataset: Dataset,
    folder: str | Path,
    model: str,
    seed: int,
    python: str | Path,
    options: dict[str, Any] | None = None,
    epochs: int = 300,
    patience: int = 10,
    minutes: float = 0,
    say: Callable[[str], None] = print,
    *,
    evaluation_seed: int = 0,
    negatives: int = 99,
    min_users: int = 1,
    given: str | Path | None = None,
) -> Result:
    """Trains a model, leaves its test ranks in `folder`, and returns its result.

    run_peer (bridge.py) says what the parameters mean, and what is returned; here also recbole (its
    settings). model: RecBole's name, in any case of letters. python: of RecBole's environment.
    options: RecBole's settings over its defaults for the model ({"learning_rate": 0.01,
    "MAX_ITEM_LIST_LENGTH": 64}).

    Raises InputError as run_peer does, also for an unknown model (with near names), for one that
    needs what a log does not have, and for an option that RecBole does not know.
    """
    task = {
        "model": model,
        "seed": seed,
        "options": options or {},
        "epochs": epochs,
        "patience": patience,
        "minutes": minutes,
        "evaluation_seed": evaluation_seed,
        "negatives": negatives,
        "min_users": min_users,
    }
    return run_peer(
        RECBOLE,
        dataset,
        folder,
        python,
        task,
        say,
        given,
    )


def _spell(python: str | Path, model: str) -> str:
    """RecBole's spelling. Raises InputError where it has none, or it cannot be compared."""
    models = recbole_models(python)
    names = {name.lower(): name for name in models}
    if model.lower() not in names:
        near = difflib.get_close_matches(
            model.lower(),
            names,
            3,
        )
        hint = ""
        if near:
            hint = f": {' or '.join(names[name] for name in near)}?"
        raise InputError(f"RecBole has no model {model}{hint}")
    name = names[model.lower()]
    if models[name]:
        raise InputError(
            f"RecBole's {name} cannot be compared here: {models[name]}"
        )
    return name


RECBOLE = Peer("RecBole", PEERS / "recbole_peer.py", _MAKE, _spell)
