"""The score of a user vector and an item vector: exactly, and by a fast product whose error is bounded.

A pair's score is the dot product of its float32 vectors, products and sums in float64, summed in halves, rounded to float32.
What a float32 matrix product gives for the same pair depends in its last bits on the shapes around it, and with them on the
number of ranks; this does not: float64 holds the product of two float32 numbers exactly, and the order of the sums is fixed.
"""

import contextlib

import torch

_PAIRS = 4096  # scored at once: their float64 products stay in the cache
_ROUNDING = 2.0**-24
_TAME = (
    2.0**60
)  # longer vectors, and those that are no numbers, are left out of the product, where they could overflow


def exact_scores(left_LR, left_P, right_NR, right_P):
    """The scores (P,), float32, of the pairs left_LR[left_P], right_NR[right_P]. Memory for a few thousand pairs."""
    found_P = torch.empty(len(left_P), dtype=torch.float32, device=left_LR.device)
    for pairs in range(0, len(left_P), _PAIRS):
        here = slice(pairs, pairs + _PAIRS)
        terms = (
            left_LR.index_select(0, left_P[here])
            .double()
            .mul_(right_NR.index_select(0, right_P[here]))
        )
        while (width := terms.shape[1]) > 1:
            half = width // 2
            rest = terms[:, 2 * half :]
            terms = terms[:, :half] + terms[:, half : 2 * half]
            if rest.shape[1]:
                terms[:, :1] += rest
        found_P[here] = terms[:, 0]
    return found_P


class Vectors:
    """Vectors of one side of a product: `product_VR` are those that take part in it, and zeros for the wild ones.

    wild_V: too long to be multiplied in float32, or with entries that are no finite numbers. length_V: of each vector, float64,
    at least what it is; what a wild one has there says nothing. longest: the greatest of those that take part.
    """

    def __init__(self, vectors_VR):
        length_V = vectors_VR.square().sum(1).sqrt()
        self.vectors_VR, self.wild_V = vectors_VR, ~(length_V < _TAME)
        self.any_wild = bool(self.wild_V.any())
        self.product_VR = (
            vectors_VR.masked_fill(self.wild_V[:, None], 0)
            if self.any_wild
            else vectors_VR
        )
        # Squares may vanish in float32: a vector's length is more by up to √r · 2⁻⁶³.
        self.length_V = (
            1.001 * length_V.masked_fill(self.wild_V, 0).double()
            + vectors_VR.shape[1] * 2.0**-60
        )

    @property
    def longest(self):
        return self.length_V.max()


def product(users, items, out, first=0):
    """Scores (U, N) of N items from the first on as a matrix product gives them, into `out`; NaN where either is wild.

    To be called within `full_precision`.
    """
    here = slice(first, first + out.shape[1])
    torch.mm(users.product_VR, items.product_VR[here].T, out=out)
    if users.any_wild:
        out[users.wild_V] = torch.nan
    if items.any_wild:
        out[:, items.wild_V[here]] = torch.nan
    return out


def error(users, items):
    """How far a number of `product` may be from the score of its pair, at most: (U,), float64.

    γ_r |y| |m| for r terms in any order (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), the score's own rounding
    and what may vanish below the least normal number.
    """
    terms = users.vectors_VR.shape[1]
    return (
        1.001 * (terms + 4) * _ROUNDING * items.longest * users.length_V
        + terms * 2.0**-120
    )


def below(values):
    """The float32 number before the nearest one to a float64."""
    rounded = values.float()
    return torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))


def above(values):
    return -below(-values)


@contextlib.contextmanager
def full_precision(device_type):
    """float32 products in float32: neither autocast's formats nor TF32, which the bound does not know."""
    before = torch.get_float32_matmul_precision()
    try:
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
