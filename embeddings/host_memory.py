"""Large memory on the host that a forked process does not get.

A page that two processes share is copied when one of them writes to it (copy on write). A table that
is updated would so be copied as a whole, page by page, for as long as a loader that was forked
lives. FBGEMM advises the same for memory that a device maps (`fbgemm::uvm_mem_advice_dont_fork`).
"""

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LEAST = 1 << 20  # bytes; what is smaller stays where PyTorch puts it


def unforked_zeros(
    *shape: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Zeros on the host in pages of their own, which take room when they are first written.

    A process that is forked does not have these pages. It ends (SIGSEGV) where it reads them.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LEAST:
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_DONTFORK"):  # Linux
        pages.madvise(mmap.MADV_DONTFORK)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class TableMemory(TorchFunctionMode):
    """Within it a module's large zeros on the host are `unforked_zeros`; `uniform_` draws nothing.

    TorchRec draws all rows when it makes a table. Whoever makes it fills it afterwards, so these
    numbers are never used.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.Tensor.uniform_:
            return args[0]
        if function is torch.zeros and _is_plain_on_cpu(kwargs):
            shape = args if isinstance(args[0], int) else tuple(args[0])
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            return unforked_zeros(*shape, dtype=dtype)
        return function(*args, **kwargs)


def _is_plain_on_cpu(kwargs: dict[str, Any]) -> bool:
    """Whether a factory's options are a device, the CPU, and a dtype at most."""
    if not kwargs.keys() <= {"device", "dtype"}:
        return False
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"
