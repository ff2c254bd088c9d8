"""SC-MIM: the single- and the cross-domain view of a user's domain belong together (section 4.4).

Shapes: B users of this rank, G users whose single-domain views stand as candidates, C of them in a
chunk, N candidates of a sample, D domains, M packed tokens, r width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncrec.batch.views import View
from syncrec.config import ModelConfig

_CHUNK = 2048  # candidates that are compared at once


@dataclass(frozen=True)
class Sample:
    """Candidates that stand for all users of the global batch, N a domain.

    Attributes:
        single_DNR: their single-domain views.
        present_DN: bool, False where there is no candidate.
        position_DB: this rank's users' positions among them, −1 for who is none of them.
        count_D: how many users of the global batch have the domain.

    Example: two domains, up to three candidates each, four users on this rank:

        present_DN     tensor([[True, True, True], [True, False, False]])
        position_DB    tensor([[-1, 2, 0, -1], [-1, -1, -1, 0]])
        count_D        tensor([7, 1])
    """

    single_DNR: Tensor
    present_DN: Tensor
    position_DB: Tensor
    count_D: Tensor


class MutualInformation(nn.Module):
    """InfoNCE between both views, per domain (section 4.4, eq. 14 to 17)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.similarity = config.mutual_information_similarity
        self.temperature = config.mutual_information_temperature
        self.others_only = config.mutual_information_denominator == "others"
        # W^H of eq. 17.
        self.weight = nn.Parameter(torch.empty(config.dim, config.dim))
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(
        self,
        cross_BDR: Tensor,
        single_GDR: Tensor,
        present_BD: Tensor,
        present_GD: Tensor,
        position_B: Tensor,
        sample: Sample | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Σ over this rank's users of ρ(single, cross) − log Σ_û exp ρ(single_û, cross), by domain.

        Args:
            cross_BDR: the cross-domain views of this rank's users.
            single_GDR: the single-domain views of the candidates.
            present_BD: bool, whether a user has tokens of the domain in both views.
            present_GD: the same of the candidates.
            position_B: this rank's users' positions among the G.
            sample: the candidates are these, and the G are this rank's users. Then Σ_û over the
                others is estimated by theirs among the sample, times the number of others in the
                batch over that in the sample.

        Returns (sums_D, count_D): count_D is the number of users summed, over all G users. Every
        rank knows it from present_GD alone, or from the sample.
        """
        projected_BDR = cross_BDR @ self.weight.T
        if self.similarity == "cosine":
            projected_BDR = F.normalize(projected_BDR, dim=-1)
            single_GDR = F.normalize(single_GDR, dim=-1)
        if sample is not None:
            return self._compare_with_sample(
                projected_BDR,
                single_GDR,
                present_BD,
                position_B,
                sample,
            )
        count_D = present_GD.sum(0)
        # A user alone in a domain has nothing to be told apart from.
        enough_D = count_D > 1
        counted_DB = present_BD.T & enough_D.unsqueeze(1)
        if len(single_GDR) <= _CHUNK:
            bound_DB = self._compare_at_once(
                projected_BDR,
                single_GDR,
                counted_DB,
                present_GD,
                position_B,
            )
        else:
            bound_DB = self._compare_by_chunks(
                projected_BDR,
                single_GDR,
                present_GD,
                position_B,
            )
        bound_DB = torch.where(counted_DB, bound_DB, 0)
        return bound_DB.sum(1), count_D * enough_D

    def _compare_by_chunks(
        self,
        projected_BDR: Tensor,
        single_GDR: Tensor,
        present_GD: Tensor,
        position_B: Tensor,
    ) -> Tensor:
        """The bounds, with some candidates' similarities at a time: (D, B)."""
        left_out_DB = None
        if self.others_only:
            domains = present_GD.shape[1]
            left_out_DB = position_B.expand(domains, -1)
        single_DGR = single_GDR.transpose(0, 1)
        sum_DB = self._log_sum_exp(
            projected_BDR,
            single_DGR,
            present_GD.T,
            left_out_DB,
        )
        positive_DB = self._rho_of_positives(
            projected_BDR,
            single_GDR,
            position_B,
        )
        return positive_DB - sum_DB

    def _compare_at_once(
        self,
        projected_BDR: Tensor,
        single_GDR: Tensor,
        counted_DB: Tensor,
        present_GD: Tensor,
        position_B: Tensor,
    ) -> Tensor:
        """The bounds, with all similarities at once: (D, B)."""
        rho_DBG = self._rho(
            torch.einsum("bdr,gdr->dbg", projected_BDR, single_GDR)
        )
        position_DB1 = position_B.view(1, -1, 1).expand(len(rho_DBG), -1, 1)
        positive_DB = rho_DBG.gather(2, position_DB1).squeeze(2)
        candidates_DBG = present_GD.T.unsqueeze(1).expand_as(rho_DBG)
        if self.others_only:
            none_BG = torch.zeros_like(candidates_DBG[0])
            self_BG = none_BG.scatter_(1, position_B.unsqueeze(1), True)
            candidates_DBG = candidates_DBG & ~self_BG
        # Rows that are not counted get candidates all the same: the logarithm of an empty sum has
        # no gradient.
        candidates_DBG = candidates_DBG | ~counted_DB.unsqueeze(2)
        compared_DBG = rho_DBG.masked_fill(~candidates_DBG, float("-inf"))
        return positive_DB - compared_DBG.logsumexp(2)

    def _compare_with_sample(
        self,
        projected_BDR: Tensor,
        single_BDR: Tensor,
        present_BD: Tensor,
        position_B: Tensor,
        sample: Sample,
    ) -> tuple[Tensor, Tensor]:
        """`forward` with the candidates of a sample."""
        candidates_DNR = sample.single_DNR
        if self.similarity == "cosine":
            candidates_DNR = F.normalize(candidates_DNR, dim=-1)
        positive_DB = self._rho_of_positives(
            projected_BDR,
            single_BDR,
            position_B,
        )
        candidates_D1 = sample.present_DN.sum(1, keepdim=True)
        others_DB = candidates_D1 - (sample.position_DB >= 0).long()
        enough_D = sample.count_D > 1
        counted_DB = present_BD.T & enough_D.unsqueeze(1) & (others_DB > 0)
        sum_DB = self._log_sum_exp(
            projected_BDR,
            candidates_DNR,
            sample.present_DN,
            sample.position_DB,
        )
        others_of_batch_D1 = (sample.count_D - 1).clamp(min=1).unsqueeze(1)
        scale_DB = others_of_batch_D1.to(sum_DB.dtype) / others_DB.clamp(min=1)
        sum_DB = sum_DB + scale_DB.log()
        if not self.others_only:
            sum_DB = torch.logaddexp(sum_DB, positive_DB)
        bound_DB = torch.where(counted_DB, positive_DB - sum_DB, 0)
        return bound_DB.sum(1), sample.count_D * enough_D

    def _rho_of_positives(
        self,
        projected_BDR: Tensor,
        single_GDR: Tensor,
        position_B: Tensor,
    ) -> Tensor:
        """ρ of a user's own two views, (D, B)."""
        single_BDR = single_GDR.index_select(0, position_B)
        return self._rho((projected_BDR * single_BDR).sum(2).T)

    def _rho(self, product: Tensor) -> Tensor:
        """ρ of eq. 17 from products of vectors."""
        if self.similarity != "cosine":
            product = torch.sigmoid(product)
        return product / self.temperature

    def _log_sum_exp(
        self,
        projected_BDR: Tensor,
        candidates_DGR: Tensor,
        present_DG: Tensor,
        left_out_DB: Tensor | None,
    ) -> Tensor:
        """See `_LogSumExp`."""
        return _LogSumExp.apply(
            projected_BDR.transpose(0, 1),
            candidates_DGR,
            present_DG,
            left_out_DB,
            self.similarity == "sigmoid",
            self.temperature,
        )


class _LogSumExp(torch.autograd.Function):
    """log Σ_g exp ρ(candidate_g, query) over the candidates that are present, (D, B).

    −∞ where there is none. query_DBR: projected cross-domain views. left_out_DB: the position of a
    candidate that a user's sum leaves out, −1: none; None: no user's does. By chunks of candidates,
    forward and anew in backward: saved are the inputs and the sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_DBR: Tensor,
        candidates_DGR: Tensor,
        present_DG: Tensor,
        left_out_DB: Tensor | None,
        sigmoid: bool,
        temperature: float,
    ) -> Tensor:
        largest_DB = query_DBR.new_full(query_DBR.shape[:2], float("-inf"))
        total_DB = torch.zeros_like(largest_DB)
        for chunk in _cut_chunks(present_DG):
            rho_DBC = query_DBR @ candidates_DGR[:, chunk].transpose(1, 2)
            if sigmoid:
                rho_DBC.sigmoid_()
            absent_DBC = _find_absent(present_DG, left_out_DB, chunk)
            rho_DBC.div_(temperature).masked_fill_(absent_DBC, float("-inf"))
            del absent_DBC
            larger_DB = torch.maximum(largest_DB, rho_DBC.amax(2))
            origin_DB = larger_DB.masked_fill(larger_DB == float("-inf"), 0)
            total_DB = total_DB * (largest_DB - origin_DB).exp()
            total_DB = total_DB + rho_DBC.sub_(
                origin_DB.unsqueeze(2)
            ).exp_().sum(2)
            largest_DB = larger_DB
        sum_DB = largest_DB + total_DB.log()
        ctx.save_for_backward(
            query_DBR,
            candidates_DGR,
            present_DG,
            left_out_DB,
            sum_DB,
        )
        ctx.sigmoid = sigmoid
        ctx.temperature = temperature
        return sum_DB

    @staticmethod
    def backward(ctx: Any, grad_DB: Tensor) -> tuple[Tensor | None, ...]:
        query_DBR, candidates_DGR, present_DG, left_out_DB, sum_DB = (
            ctx.saved_tensors
        )
        query_grad_DBR = torch.zeros_like(query_DBR)
        candidates_grad_DGR = torch.empty_like(candidates_DGR)
        origin_DB1 = sum_DB.masked_fill(sum_DB == float("-inf"), 0).unsqueeze(2)
        grad_DB1 = grad_DB.unsqueeze(2) / ctx.temperature
        for chunk in _cut_chunks(present_DG):
            chunk_DCR = candidates_DGR[:, chunk]
            product_DBC = query_DBR @ chunk_DCR.transpose(1, 2)
            if ctx.sigmoid:
                product_DBC.sigmoid_()
            share_DBC = (product_DBC / ctx.temperature).sub_(origin_DB1)
            absent_DBC = _find_absent(present_DG, left_out_DB, chunk)
            share_DBC.masked_fill_(absent_DBC, float("-inf")).exp_().mul_(
                grad_DB1
            )
            del absent_DBC
            if ctx.sigmoid:
                share_DBC.mul_(product_DBC)
                share_DBC.mul_(product_DBC.neg_().add_(1))
            query_grad_DBR += share_DBC @ chunk_DCR
            candidates_grad_DGR[:, chunk] = (
                share_DBC.transpose(1, 2) @ query_DBR
            )
        return query_grad_DBR, candidates_grad_DGR, None, None, None, None


def _cut_chunks(present_DG: Tensor) -> list[slice]:
    """The candidates, `_CHUNK` at a time."""
    candidates = present_DG.shape[1]
    chunks = []
    for first in range(0, candidates, _CHUNK):
        chunks.append(slice(first, min(first + _CHUNK, candidates)))
    return chunks


def _find_absent(
    present_DG: Tensor,
    left_out_DB: Tensor | None,
    chunk: slice,
) -> Tensor:
    """Which candidates of a chunk do not count for a user: (D, B or 1, C)."""
    absent_D1C = ~present_DG[:, chunk].unsqueeze(1)
    if left_out_DB is None:
        return absent_D1C
    position_C = torch.arange(chunk.start, chunk.stop, device=present_DG.device)
    return absent_D1C | (left_out_DB.unsqueeze(2) == position_C)


def pool(
    output_MR: Tensor,
    view: View,
    users: int,
    domains: int,
) -> tuple[Tensor, Tensor]:
    """The mean of each user's tokens of each domain: (B, D, r), and how many there were (B, D).

    Example: two domains, four users, a cross-domain view of seven tokens. The first user has two
    items of domain 0 and one of domain 1 as inputs, the last user one of domain 0:

        view.pool_token    tensor([1, 2, 3, 6])
        view.pool_slot     tensor([0, 1, 0, 6])      user · 2 + domain
        counts             tensor([[2, 1], [0, 0], [0, 0], [1, 0]])
    """
    slots = users * domains
    dtype = output_MR.dtype
    count = torch.zeros(
        slots,
        dtype=dtype,
        device=output_MR.device,
    )
    ones = torch.ones_like(view.pool_slot, dtype=dtype)
    count = count.index_add(0, view.pool_slot, ones)
    width = output_MR.shape[1]
    total = torch.zeros(
        slots,
        width,
        dtype=dtype,
        device=output_MR.device,
    )
    total = total.index_add(0, view.pool_slot, output_MR[view.pool_token])
    mean = total / count.clamp(min=1).unsqueeze(1)
    return mean.view(users, domains, -1), count.view(users, domains)
