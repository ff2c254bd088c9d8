"""The score of a user vector and an item vector: exactly, and by a fast product of bounded error.

A pair's score is the dot product of its float32 vectors, products and sums in float64, summed in
halves, rounded to float32. What a float32 matrix product gives for the same pair depends in its
last bits on the shapes around it, and with them on the number of ranks. The score does not: float64
holds the product of two float32 numbers exactly, and the order of the sums is fixed.

Shapes: U users, N items, P pairs, V vectors, L and N any rows, r width.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_PAIRS = 4096  # scored at once: their float64 products stay in the cache
_ROUNDING = 2.0**-24
# Longer vectors, and those that are no numbers, are left out of the product, where they could
# overflow.
_TAME = 2.0**60


def exact_scores(
    left_LR: Tensor,
    left_P: Tensor,
    right_NR: Tensor,
    right_P: Tensor,
) -> Tensor:
    """The scores (P,), float32, of the pairs left_LR[left_P], right_NR[right_P].

    Takes memory for a few thousand pairs.

    Example: three pairs of two vectors and two others, r = 2:

        left_LR     tensor([[1.0, 0.0], [1.0, 2.0]])
        left_P      tensor([0, 1, 1])
        right_NR    tensor([[3.0, 1.0], [0.5, 0.5]])
        right_P     tensor([0, 0, 1])
        result      tensor([3.0, 5.0, 1.5])
    """
    scores_P = torch.empty(
        len(left_P),
        dtype=torch.float32,
        device=left_LR.device,
    )
    for begin in range(0, len(left_P), _PAIRS):
        pairs = slice(begin, begin + _PAIRS)
        left_CR = left_LR.index_select(0, left_P[pairs])
        right_CR = right_NR.index_select(0, right_P[pairs])
        terms = left_CR.double().mul_(right_CR)
        scores_P[pairs] = _sum_in_halves(terms)
    return scores_P


def _sum_in_halves(terms: Tensor) -> Tensor:
    """The sum of each row, (C,). terms: float64 (C, r).

    Example: a row a, b, c, d, e is summed as ((a + c) + e) + (b + d).
    """
    width = terms.shape[1]
    while width > 1:
        half = width // 2
        rest = terms[:, 2 * half :]
        terms = terms[:, :half] + terms[:, half : 2 * half]
        if rest.shape[1]:
            terms[:, :1] += rest
        width = half
    return terms[:, 0]


class Vectors:
    """Vectors, and what bounds the error of products with them.

    Attributes:
        vectors_VR: the vectors.
        wild_V: those that are too long for a product, or no numbers.
        any_wild: whether there is one.
        product_VR: what is multiplied: the vectors, wild ones as zeros.
        length_V: at least the length of each, float64; it says nothing of wild ones.
    """

    def __init__(self, vectors_VR: Tensor):
        length_V = vectors_VR.square().sum(1).sqrt()
        self.vectors_VR = vectors_VR
        self.wild_V = ~(length_V < _TAME)
        self.any_wild = bool(self.wild_V.any())
        self.product_VR = vectors_VR
        if self.any_wild:
            self.product_VR = vectors_VR.masked_fill(self.wild_V[:, None], 0)
        # Squares may vanish in float32: a vector's length is more by up to √r · 2⁻⁶³.
        vanished = vectors_VR.shape[1] * 2.0**-60
        tame_length_V = length_V.masked_fill(self.wild_V, 0).double()
        self.length_V = 1.001 * tame_length_V + vanished

    @property
    def longest(self) -> Tensor:
        """The length of the longest vector that is not wild, at least."""
        return self.length_V.max()


def product(
    users: Vectors,
    items: Vectors,
    out: Tensor,
    first: int = 0,
) -> Tensor:
    """Scores (U, N) of N items from the first on, as a matrix product gives them, into `out`.

    NaN where either is wild. To be called within `full_precision`.

    Example: two users, five items, the second of which is wild; first = 1, N = 3:

        out    tensor([[nan, 0.1, 0.5], [nan, 0.8, 0.3]])
    """
    columns = slice(first, first + out.shape[1])
    torch.mm(users.product_VR, items.product_VR[columns].T, out=out)
    if users.any_wild:
        out[users.wild_V] = torch.nan
    if items.any_wild:
        out[:, items.wild_V[columns]] = torch.nan
    return out


def error(users: Vectors, items: Vectors) -> Tensor:
    """How far a number of `product` may be from the score of its pair, at most: (U,), float64.

    γ_r |y| |m| for r terms in any order (Higham, Accuracy and Stability of Numerical Algorithms,
    3.1), the score's own rounding, and what may vanish below the least normal number.
    """
    terms = users.vectors_VR.shape[1]
    relative = 1.001 * (terms + 4) * _ROUNDING
    return relative * items.longest * users.length_V + terms * 2.0**-120


def below(values: Tensor) -> Tensor:
    """The float32 number before the nearest one to a float64.

    Example: 1.0 gives 1 − 2⁻²⁴, 0.0 gives −1e-45.
    """
    rounded = values.float()
    return torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))


def above(values: Tensor) -> Tensor:
    """The float32 number after the nearest one to a float64."""
    return -below(-values)


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """float32 products in float32: neither autocast's formats nor TF32, which `error` ignores."""
    before = torch.get_float32_matmul_precision()
    try:
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
