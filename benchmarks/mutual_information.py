"""What SC-MIM's loss takes on one rank, forward and backward: bytes and seconds, as one matrix,
in chunks, and from a sample.

Bytes are the most that is live at one moment, inputs and their gradients included, counted at
each operation; on any device they are the same. Those of a larger batch are reckoned from them
where this machine cannot hold it.

    python benchmarks/mutual_information.py            bytes at a few sizes, and at 64 and 512 ranks
    python benchmarks/mutual_information.py --seconds  seconds of small batches as well
"""

import argparse
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from syncrec.config import ModelConfig
from syncrec.losses import mutual_information
from syncrec.losses.mutual_information import MutualInformation, Sample

DOMAINS = 5
WIDTH = 128
GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations within it have made and that still live;
    `peak`: the most at once.
    """

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key, size):
        self._known.discard(key)
        self.live -= size


def drawn(
    users: int, everyone: int, dim: int = WIDTH, domains: int = DOMAINS
) -> tuple[torch.Tensor, ...]:
    """Views of a rank's users and of all, and who is present: (cross_BDR, single_GDR,
    present_BD, present_GD, own_B).
    """
    generator = torch.Generator().manual_seed(1)
    cross_BDR = torch.randn(
        users, domains, dim, generator=generator
    ).requires_grad_()
    single_GDR = torch.randn(
        everyone, domains, dim, generator=generator
    ).requires_grad_()
    present_GD = torch.rand(everyone, domains, generator=generator) < 0.6
    return (
        cross_BDR,
        single_GDR,
        present_GD[:users],
        present_GD,
        torch.arange(users),
    )


def against_all(users: int, everyone: int, **shape: int) -> tuple:
    """A function that makes one forward and backward pass with all users as candidates."""
    module = MutualInformation(ModelConfig(dim=shape.get("dim", WIDTH)))
    given = drawn(users, everyone, **shape)

    def step():
        sums_D, count_D = module(*given)
        (sums_D / count_D.clamp(min=1)).sum().backward()

    return step, given[:2]


def against_sample(users: int, everyone: int, size: int, **shape: int) -> tuple:
    """The same with a sample of so many candidates a domain."""
    module = MutualInformation(ModelConfig(dim=shape.get("dim", WIDTH)))
    cross_BDR, single_GDR, present_BD, present_GD, own_B = drawn(
        users, max(users, size), **shape
    )
    chosen = (
        single_GDR.detach()[:size].transpose(0, 1).contiguous().requires_grad_()
    )
    own_DB = torch.where(own_B < size, own_B, -1).expand(chosen.shape[0], -1)
    count_D = torch.full((chosen.shape[0],), int(0.6 * everyone))
    sample = Sample(chosen, present_GD[:size].T, own_DB, count_D)
    single_BDR = single_GDR.detach()[:users].clone().requires_grad_()

    def step():
        sums_D, counts_D = module(
            cross_BDR, single_BDR, present_BD, present_BD, own_B, sample
        )
        (sums_D / counts_D.clamp(min=1)).sum().backward()

    return step, (cross_BDR, single_BDR, chosen)


def peak_bytes(made: tuple) -> int:
    """The most bytes that live at once in one pass; made: (step, inputs)."""
    step, inputs = made
    counter = LiveBytes()
    for tensor in inputs:
        counter.count(tensor)
    with counter:
        step()
    return counter.peak


def in_one_matrix(function: Callable[[], Any]) -> Any:
    """What a function gives where all candidates fit into one chunk."""
    chunk = mutual_information._CHUNK
    mutual_information._CHUNK = sys.maxsize
    try:
        return function()
    finally:
        mutual_information._CHUNK = chunk


def seconds(made: tuple, repeats: int = 30) -> float:
    """The median of a pass's seconds."""
    step, _ = made
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    return median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--users", type=int, default=1024, help="users a rank")
    parser.add_argument(
        "--sample", type=int, default=4096, help="candidates a domain"
    )
    parser.add_argument(
        "--seconds",
        action="store_true",
        help="measure seconds of small batches too",
    )
    arguments = parser.parse_args()
    users = arguments.users
    print(
        f"{DOMAINS} domains, r = {WIDTH}, {users} users a rank; GiB on a rank at once, "
        "forward and backward"
    )
    print(
        f"{'ranks':>6} {'one matrix':>12} {'chunks':>12} {f'sample {arguments.sample}':>14}"
    )
    ways = {
        "matrix": lambda everyone: in_one_matrix(
            lambda: peak_bytes(against_all(users, everyone))
        ),
        "chunks": lambda everyone: peak_bytes(against_all(users, everyone)),
    }
    sizes = (4 * users, 8 * users)
    measured = {
        name: [way(everyone) for everyone in sizes]
        for name, way in ways.items()
    }
    for ranks in (4, 8, 64, 512):
        line = {}
        for name, (low, high) in measured.items():
            a_user = (high - low) / (sizes[1] - sizes[0])  # by which both grow
            line[name] = low + a_user * (ranks * users - sizes[0])
        sampled = peak_bytes(
            against_sample(users, ranks * users, arguments.sample)
        )
        note = (
            ""
            if ranks <= 8
            else "   the first two reckoned from those of 4 and 8 ranks"
        )
        print(
            f"{ranks:>6} {line['matrix'] / GIB:>12.3f} {line['chunks'] / GIB:>12.3f} "
            f"{sampled / GIB:>14.3f}{note}"
        )
    if arguments.seconds:
        print(f"{'users':>6} {'one matrix ms':>14} {'as run ms':>10}")
        for count in (32, 256):
            first = in_one_matrix(
                lambda count=count: seconds(against_all(count, count))
            )
            print(
                f"{count:>6} {1e3 * first:>14.2f} {1e3 * seconds(against_all(count, count)):>10.2f}"
            )


if __name__ == "__main__":
    main()
