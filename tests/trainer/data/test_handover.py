from dataclasses import dataclass, replace

import torch

from tests.trainer.data.test_stream import assert_same
from trainer.data.handover import pack, unpack


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


def test_a_value_comes_back_as_it_was():
    packed = pack(VALUE)
    assert packed.buffer.is_shared()
    assert_same(unpack(packed), VALUE)


def test_a_value_without_any_number_comes_back():
    nothing = replace(VALUE, ids=VALUE.empty, square=VALUE.empty, inner=replace(VALUE.inner, flags=VALUE.empty))
    assert_same(unpack(pack(nothing)), nothing)


def test_its_tensors_share_one_piece_and_not_each_others_place():
    found = unpack(pack(VALUE))
    tensors = [found.ids, found.square, found.inner.flags]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    found.ids.zero_()
    assert torch.equal(found.square, VALUE.square) and torch.equal(found.inner.flags, VALUE.inner.flags)
