"""FAISS indices of an export: one for each domain, by inner product.

domain-N/index.faiss    of items.npy; with the recency term each vector has its offset behind it
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer.errors import InputError
from trainer.serving.item_offsets import OFFSETS

if TYPE_CHECKING:
    import faiss

INDEX = "index.faiss"
ITEMS = "items.npy"
_BLOCK = 65536  # vectors added at once, and of the sample that trains an index


def write_index(folder: Path, name: str) -> None:
    """Writes a FAISS index of a domain's vectors. Raises InputError."""
    import faiss

    vectors = _Vectors(folder)
    index = make_index(name, vectors.width)
    count = vectors.count
    try:
        if not index.is_trained:
            # Evenly spread: the first items are no sample of all.
            places = np.linspace(0, count - 1, min(count, _BLOCK))
            index.train(vectors.read(places.astype(np.int64)))
        for first in range(0, count, _BLOCK):
            index.add(vectors.read(slice(first, first + _BLOCK)))
        faiss.write_index(index, str(folder / INDEX))
    except RuntimeError as error:
        raise InputError(
            f"FAISS cannot make {name!r} of {count} items: {_last_line(error)}: "
            "name another index"
        ) from None


class _Vectors:
    """A domain's item vectors, with their offsets behind them where it has some."""

    def __init__(self, folder: Path) -> None:
        self._items = np.load(
            folder / ITEMS,
            mmap_mode="r",
            allow_pickle=False,
        )
        self._offsets = None
        if (folder / OFFSETS).exists():
            self._offsets = np.load(folder / OFFSETS, allow_pickle=False)

    @property
    def count(self) -> int:
        return len(self._items)

    @property
    def width(self) -> int:
        return self._items.shape[1] + (self._offsets is not None)

    def read(self, places: slice | np.ndarray) -> np.ndarray:
        """Some vectors, float32."""
        block = np.asarray(self._items[places], np.float32)
        if self._offsets is not None:
            block = np.column_stack([block, self._offsets[places]])
        return np.ascontiguousarray(block, np.float32)


def make_index(name: str, width: int) -> "faiss.Index":
    """An empty FAISS index, by inner product. Raises InputError."""
    try:
        import faiss
    except ImportError:
        raise InputError(
            "--faiss needs FAISS: pip install 'syncrec-trainer[index]', or leave "
            "--faiss out"
        ) from None
    try:
        return faiss.index_factory(
            width,
            name,
            faiss.METRIC_INNER_PRODUCT,
        )
    except RuntimeError as error:
        raise InputError(
            f"--faiss {name}: FAISS knows no such index ({_last_line(error)}): Flat and "
            "HNSW32 are two"
        ) from None


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1][:200]
