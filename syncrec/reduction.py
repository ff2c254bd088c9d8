"""What the model asks of the other ranks. It knows no ranks: it is handed one of these."""

import torch


class Reduction:
    """One process: nothing to reduce. A run over several ranks hands in a subclass."""

    world_size = 1
    rank = 0

    def start_sum(self, values: torch.Tensor):
        """Begins to sum `values` (no gradient) over all ranks; the function returned waits and gives the sum, the same
        bits on every rank."""
        return lambda: values

    def gather(self, values_B: torch.Tensor) -> torch.Tensor:
        """The `values_B` of all ranks, rank after rank, with gradients back to the rank that they came from.

        Every rank gives the same shape.
        """
        return values_B

    def collect(
        self, values_CR: torch.Tensor, place_C: torch.Tensor, rows: int
    ) -> torch.Tensor:
        """`rows` rows, of which row place_C[i] is values_CR[i], and others are those of other ranks; rows that no rank gives
        are 0. With gradients back to the rank that a row came from.

        No two ranks give the same row; every rank may give another number.
        """
        return values_CR.new_zeros(rows, values_CR.shape[1]).index_copy(
            0, place_C, values_CR
        )
