"""Deterministic sums on CUDA: what `deterministic: true` asks of PyTorch, FBGEMM and cuBLAS.

On a CPU every sum of a step has one order anyhow, and nothing changes. On CUDA several sums of a
step are made by atomic additions, in the order in which threads arrive (docs/cuda.md lists them).
Each has a second way of one order, which is slower.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from trainer.errors import InputError

_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# With any other PyTorch refuses a product on CUDA.
_WORKSPACES = (
    ":4096:8",
    ":16:8",
)


@contextlib.contextmanager
def use_deterministic_sums(enabled: bool) -> Iterator[None]:
    """Within it every operation has one order of sums, where `enabled`.

        with deterministic_sums(config.deterministic):
            train(config)

    An operation that has none raises RuntimeError. To be entered before the first matrix product:
    cuBLAS reads its setting then. Raises InputError where the environment asks for another
    workspace than a deterministic cuBLAS has.
    """
    if not enabled:
        yield
        return
    workspace_before = os.environ.get(_VARIABLE)
    if workspace_before is not None and workspace_before not in _WORKSPACES:
        choices = " or ".join(_WORKSPACES)
        raise InputError(
            f"{_VARIABLE} is {workspace_before}: deterministic=true needs {choices}; "
            "leave it unset"
        )
    os.environ.setdefault(_VARIABLE, _WORKSPACES[0])
    enabled_before = torch.are_deterministic_algorithms_enabled()
    warns_before = torch.is_deterministic_algorithms_warn_only_enabled()
    # Any: torch gives this module a class of its own, whose property no type checker sees.
    deterministic: Any = torch.utils.deterministic
    fills_before = deterministic.fill_uninitialized_memory
    # Nothing here reads memory that it has not written, and the table would be written once more.
    deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(
            enabled_before, warn_only=warns_before
        )
        deterministic.fill_uninitialized_memory = fills_before
        if workspace_before is None:
            os.environ.pop(_VARIABLE, None)
