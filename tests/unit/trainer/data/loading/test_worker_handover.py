import re
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from syncrec.batch.build import build_batch
from syncrec.batch.views import map_tensors, move
from tests.unit.trainer.data.loading.test_stream import assert_same
from trainer.data.loading.stream import RankBatch
from trainer.data.loading.worker_handover import (
    BatchPacker,
    refuse_small_shared_memory,
    unpack,
)
from trainer.errors import InputError


@dataclass(frozen=True)
class Inner:
    flags: torch.Tensor
    name: str


@dataclass(frozen=True)
class Outer:
    ids: torch.Tensor
    empty: torch.Tensor
    square: torch.Tensor
    inner: Inner
    sizes: tuple[int, ...]


VALUE = Outer(
    ids=torch.arange(7)[::2],
    empty=torch.zeros(0, dtype=torch.float32),
    square=torch.rand(3, 5, dtype=torch.float64),
    inner=Inner(torch.tensor([True, False, True]), "inner"),
    sizes=(1, 2),
)


NARROW = replace(VALUE, ids=VALUE.ids.int())


def test_a_value_comes_back_as_it_was_but_for_the_width_of_integers():
    packed = BatchPacker()(VALUE)
    assert packed.piece.is_shared()
    assert_same(unpack(packed), NARROW)
    alone = BatchPacker(shared=False)(VALUE)
    assert not alone.piece.is_shared()
    assert_same(unpack(alone), NARROW)
    assert_same(move(NARROW, "cpu"), VALUE)


def test_a_value_without_any_number_comes_back():
    nothing = replace(
        VALUE,
        ids=VALUE.empty,
        square=VALUE.empty,
        inner=replace(VALUE.inner, flags=VALUE.empty),
    )
    assert_same(unpack(BatchPacker()(nothing)), nothing)


def test_its_tensors_share_one_piece_and_not_each_others_place():
    found = unpack(BatchPacker()(VALUE))
    tensors = [found.ids, found.square, found.inner.flags]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    found.ids.zero_()
    assert torch.equal(found.square, VALUE.square) and torch.equal(
        found.inner.flags, VALUE.inner.flags
    )


def test_the_first_tensor_of_a_batch_lies_at_the_first_byte_of_its_piece():
    """A pinned piece is kept until a copy from it is done only if a tensor at its first byte is among those copied."""
    batch = build_batch(
        np.arange(6),
        np.array([4, 2]),
        np.array([0, 1, 0, 1, 0, 0]),
        np.ones(2),
        [np.arange(3)] * 2,
        [6, 6],
        8,
    )
    fed = RankBatch(batch, np.arange(2), 0, ())
    packed = BatchPacker()(fed)
    first = []
    map_tensors(
        unpack(packed).batch,
        lambda tensor: first.append(tensor.data_ptr()) or tensor,
    )
    assert (
        first[0]
        == packed.piece.data_ptr()
        == unpack(packed).batch.distinct.data_ptr()
    )
    assert len(batch.distinct) and first.count(first[0]) == 1


def other(number):
    return replace(
        VALUE,
        ids=torch.full((4,), number),
        square=torch.full((3, 5), float(number), dtype=torch.float64),
    )


def where(tensor):
    return tensor.untyped_storage().data_ptr()


def test_a_piece_is_filled_again_only_when_every_tensor_in_it_is_gone():
    pack = BatchPacker()
    first = unpack(pack(other(0)))
    last, piece = first.square[1:], where(first.ids)
    del first
    second = unpack(pack(other(1)))
    assert where(second.ids) != piece and (last == 0).all()
    del last
    third = unpack(pack(other(2)))
    assert (
        where(third.ids) == piece
        and (second.ids == 1).all()
        and (third.ids == 2).all()
    )


def test_a_larger_value_gets_a_larger_piece():
    pack = BatchPacker()
    for size in (10, 10_000, 10, 20_000):
        value = replace(VALUE, square=torch.rand(size, dtype=torch.float64))
        assert torch.equal(unpack(pack(value)).square, value.square)
    assert len(pack._pieces) == 1


class Counted(torch.utils.data.IterableDataset):
    def __iter__(self):
        pack = BatchPacker()
        for number in range(200):
            yield pack(other(number))


@pytest.mark.ranks
def test_what_a_worker_sends_stays_as_it_is_while_it_is_held():
    """A slow and forgetful trainer: some values are kept for a while, the worker is always ahead."""
    held = []
    loader = torch.utils.data.DataLoader(
        Counted(), batch_size=None, num_workers=1, prefetch_factor=4
    )
    for number, packed in enumerate(loader):
        held.append((number, unpack(packed)))
        if number % 3:
            held.pop(len(held) // 2)
        assert all(
            (value.ids == kept).all() and (value.square == kept).all()
            for kept, value in held
        )
    assert number == 199


class Facts:
    f_blocks, f_bavail, f_frsize = (
        2**14,
        2**13,
        2**12,
    )  # 64 MiB, half of them free


def test_shared_memory_that_the_loaders_do_not_fit_into_is_refused_with_what_they_need(
    monkeypatch,
):
    monkeypatch.setattr(
        "trainer.data.loading.worker_handover.os.statvfs",
        lambda path: Facts if path == "/dev/shm" else None,
    )
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(InputError) as error:
        refuse_small_shared_memory(2**20, workers=2, prefetch=4, world_size=64)
    told = r"/dev/shm has 64\.0 MiB, 32\.0 MiB .* need 80\.0 MiB \(8 ranks x 10 batches x 1\.0 MiB\): .*--shm-size"
    assert re.search(told, str(error.value)) and error.value.one_rank
    for fits in ({"workers": 2, "prefetch": 3}, {"workers": 1, "prefetch": 6}):
        refuse_small_shared_memory(2**20, world_size=64, **fits)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    refuse_small_shared_memory(2**20, workers=2, prefetch=4, world_size=64)


def test_a_system_without_such_a_folder_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(
        "trainer.data.loading.worker_handover.SHARED_MEMORY", "/nowhere/at/all"
    )
    refuse_small_shared_memory(2**60, workers=2, prefetch=4, world_size=64)


FULL = """
from dataclasses import dataclass
import torch
from trainer.data.loading.worker_handover import BatchPacker
from trainer.errors import InputError
@dataclass(frozen=True)
class Value:
    tensor: torch.Tensor
try:
    BatchPacker()(Value(torch.zeros(10**6)))
except InputError as error:
    print(error)
"""


@pytest.mark.ranks
def test_full_shared_memory_is_said_in_a_line():
    """In a mount namespace of its own, with a small /dev/shm."""
    mount = [
        "unshare",
        "-m",
        "sh",
        "-c",
        'mount -t tmpfs -o size=64k none /dev/shm && exec "$0" "$@"',
    ]
    try:
        possible = (
            subprocess.run([*mount, "true"], capture_output=True).returncode
            == 0
        )
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("no mount namespaces here")
    ended = subprocess.run(
        [*mount, sys.executable, "-c", FULL], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(
        r"^/dev/shm has 64 KiB, .* not enough for one more batch of 4\.8 MiB .*--shm-size",
        ended.stdout,
    )
