"""A trainer for SyNCRec: what a notebook and a script see.

    from trainer import prepare, fit, Run

Names are imported when they are first used: `import trainer.config` loads no PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.api import Run, fit, prepare
    from trainer.config.run import RunConfig
    from trainer.data.format.dataset import Dataset
    from trainer.errors import InputError
    from trainer.training.callbacks import Callback

__version__ = "0.2.0"
__all__ = [
    "Callback",
    "Dataset",
    "InputError",
    "Run",
    "RunConfig",
    "fit",
    "prepare",
]

_MODULE_OF = {
    "Callback": "trainer.training.callbacks",
    "Dataset": "trainer.data.format.dataset",
    "InputError": "trainer.errors",
    "Run": "trainer.api",
    "RunConfig": "trainer.config.run",
    "fit": "trainer.api",
    "prepare": "trainer.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
