"""What the model asks of the other ranks: reductions. It is handed one and knows no ranks itself."""

from collections.abc import Callable

from torch import Tensor


class Reduction:
    """One process: nothing to reduce. A run over several ranks hands in a subclass.

    The sums of section 4.3 and the users of section 4.4 are those of the global batch.
    """

    world_size = 1
    rank = 0

    def start_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Begins to sum `values` (no gradient) over all ranks.

        The function returned waits and gives the sum, the same bits on every rank.
        """
        return lambda: values

    def gather(self, values_B: Tensor) -> Tensor:
        """The `values_B` of all ranks, rank after rank, with gradients back to where they came from.

        Every rank gives the same shape.
        """
        return values_B

    def collect(self, values_CR: Tensor, place_C: Tensor, rows: int) -> Tensor:
        """`rows` rows, of which row place_C[i] is values_CR[i].

        Other rows are those of other ranks; rows that no rank gives are 0. With gradients back to
        the rank that a row came from. No two ranks give the same row; every rank may give another
        number.

        Example: rank 0 gives a row with place_C tensor([2]), rank 1 two with tensor([0, 3]). With
        rows 4 both get rank 1's first, zeros, rank 0's, and rank 1's second.
        """
        empty = values_CR.new_zeros(rows, values_CR.shape[1])
        return empty.index_copy(0, place_C, values_CR)
