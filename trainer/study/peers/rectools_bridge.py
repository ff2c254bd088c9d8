"""Trains RecTools' SASRec as a peer, by our split, candidates and choice of the epoch.

bridge.py says what a run's folder holds; rectools_peer.py is RecTools' side. With the layers of LiGR
and a sampled softmax it is eSASRec (Tikhonovich et al., RecSys 2025, arXiv 2508.06450).
"""

from pathlib import Path

from trainer.errors import InputError
from trainer.study.peers.bridge import PEERS, Peer, environment_python

_MODEL = "SASRec"
_MAKE = "make it with `make peers`, or name another with RECTOOLS_PYTHON"


def default_rectools_python() -> Path:
    """Of RecTools: $RECTOOLS_PYTHON, or what `make peers` makes. It need not be there."""
    return environment_python("RECTOOLS_PYTHON", ".venv-rectools")


def _spell(python: str | Path, model: str) -> str:
    """RecTools' spelling. Raises InputError for a model that is not compared here."""
    if model.lower() != _MODEL.lower():
        raise InputError(
            f"RecTools' {model} is not compared here: give {_MODEL}"
        )
    return _MODEL


RECTOOLS = Peer("RecTools", PEERS / "rectools_peer.py", _MAKE, _spell)
