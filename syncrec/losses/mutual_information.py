"""SC-MIM: the single- and the cross-domain view of a user's domain belong together (section 4.4).

Shapes: B users of this rank, G users whose single-domain views stand as candidates, C of them in a chunk, N candidates of a
sample, D domains, r width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

_CHUNK = 2048  # candidates that are compared at once


@dataclass(frozen=True)
class Sample:
    """Candidates that stand for all users of the global batch, N a domain.

    single_DNR: their single-domain views. present_DN: bool, False where there is none. own_DB: this rank's users' places
    among them, −1 for who is none of them. count_D: how many users of the global batch have the domain.
    """

    single_DNR: torch.Tensor
    present_DN: torch.Tensor
    own_DB: torch.Tensor
    count_D: torch.Tensor


class MutualInformation(nn.Module):
    """InfoNCE between both views, per domain (eq. 14 to 17)."""

    def __init__(self, config):
        super().__init__()
        self.similarity = config.mutual_information_similarity
        self.temperature = config.mutual_information_temperature
        self.others_only = config.mutual_information_denominator == "others"
        self.weight = nn.Parameter(torch.empty(config.dim, config.dim))  # W^H of eq. 17
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(
        self, cross_BDR, single_GDR, present_BD, present_GD, own_B, sample=None
    ):
        """Σ over this rank's users of ρ(single, cross) − log Σ_û exp ρ(single_û, cross), for each domain.

        present: bool, user has tokens of the domain in both views; own_B: this rank's users' places among the G.
        Returns (sums_D, count_D): count_D is the number of users summed, known on every rank from present_GD alone:
        it is that of all G users.

        sample: the candidates are these, and the G are this rank's users. Then Σ_û over the others is estimated by theirs
        among the sample, times the number of others in the batch over that in the sample; count_D is the sample's.
        """
        projected_BDR = cross_BDR @ self.weight.T
        if self.similarity == "cosine":
            projected_BDR = F.normalize(projected_BDR, dim=-1)
            single_GDR = F.normalize(single_GDR, dim=-1)
        if sample is not None:
            return self._against_sample(
                projected_BDR, single_GDR, present_BD, own_B, sample
            )
        count_D = present_GD.sum(0)
        enough_D = (
            count_D > 1
        )  # a user alone in a domain has nothing to be told apart from
        counted_DB = present_BD.T & enough_D.unsqueeze(1)
        if len(single_GDR) <= _CHUNK:
            bound_DB = self._whole(
                projected_BDR, single_GDR, counted_DB, present_GD, own_B
            )
        else:
            own_DB = own_B.expand(len(counted_DB), -1) if self.others_only else None
            sum_DB = self._log_sum_exp(
                projected_BDR, single_GDR.transpose(0, 1), present_GD.T, own_DB
            )
            bound_DB = self._positive(projected_BDR, single_GDR, own_B) - sum_DB
        return torch.where(counted_DB, bound_DB, 0).sum(1), count_D * enough_D

    def _whole(self, projected_BDR, single_GDR, counted_DB, present_GD, own_B):
        """The bounds, with all similarities at once: (D, B)."""
        rho_DBG = self._rho(torch.einsum("bdr,gdr->dbg", projected_BDR, single_GDR))
        positive_DB = rho_DBG.gather(
            2, own_B.view(1, -1, 1).expand(len(rho_DBG), -1, 1)
        ).squeeze(2)
        candidates_DBG = present_GD.T.unsqueeze(1).expand_as(rho_DBG)
        if self.others_only:
            own = torch.zeros_like(candidates_DBG[0]).scatter_(
                1, own_B.unsqueeze(1), True
            )
            candidates_DBG = candidates_DBG & ~own
        # Rows that are not counted get candidates all the same: the logarithm of an empty sum has no gradient.
        candidates_DBG = candidates_DBG | ~counted_DB.unsqueeze(2)
        return positive_DB - rho_DBG.masked_fill(
            ~candidates_DBG, float("-inf")
        ).logsumexp(2)

    def _against_sample(self, projected_BDR, single_BDR, present_BD, own_B, sample):
        shown_DNR = (
            F.normalize(sample.single_DNR, dim=-1)
            if self.similarity == "cosine"
            else sample.single_DNR
        )
        positive_DB = self._positive(projected_BDR, single_BDR, own_B)
        others_DB = sample.present_DN.sum(1, keepdim=True) - (sample.own_DB >= 0).long()
        enough_D = sample.count_D > 1
        counted_DB = present_BD.T & enough_D.unsqueeze(1) & (others_DB > 0)
        sum_DB = self._log_sum_exp(
            projected_BDR, shown_DNR, sample.present_DN, sample.own_DB
        )
        others_of_batch_D1 = (sample.count_D - 1).clamp(min=1).unsqueeze(1)
        scale_DB = others_of_batch_D1.to(sum_DB.dtype) / others_DB.clamp(min=1)
        sum_DB = sum_DB + scale_DB.log()
        if not self.others_only:
            sum_DB = torch.logaddexp(sum_DB, positive_DB)
        return torch.where(counted_DB, positive_DB - sum_DB, 0).sum(
            1
        ), sample.count_D * enough_D

    def _positive(self, projected_BDR, single_GDR, own_B):
        """ρ of a user's own two views, (D, B)."""
        return self._rho((projected_BDR * single_GDR.index_select(0, own_B)).sum(2).T)

    def _rho(self, product):
        return (
            product if self.similarity == "cosine" else torch.sigmoid(product)
        ) / self.temperature

    def _log_sum_exp(self, projected_BDR, shown_DGR, present_DG, left_out_DB):
        sigmoid = self.similarity == "sigmoid"
        return _LogSumExp.apply(
            projected_BDR.transpose(0, 1),
            shown_DGR,
            present_DG,
            left_out_DB,
            sigmoid,
            self.temperature,
        )


class _LogSumExp(torch.autograd.Function):
    """log Σ_g exp ρ(shown_g, asked) over the candidates that are present, (D, B); −∞ where there is none.

    asked_DBR: projected cross-domain views. left_out_DB: the place of a candidate that a user's sum leaves out, −1: none;
    None: no user's does. By chunks of candidates, forward and anew in backward: what is kept is the inputs and the sums.
    """

    @staticmethod
    def forward(
        ctx, asked_DBR, shown_DGR, present_DG, left_out_DB, sigmoid, temperature
    ):
        largest_DB = asked_DBR.new_full(asked_DBR.shape[:2], float("-inf"))
        total_DB = torch.zeros_like(largest_DB)
        for chunk in _chunks(present_DG):
            rho_DBC = asked_DBR @ shown_DGR[:, chunk].transpose(1, 2)
            if sigmoid:
                rho_DBC.sigmoid_()
            rho_DBC.div_(temperature).masked_fill_(
                _absent(present_DG, left_out_DB, chunk), float("-inf")
            )
            larger_DB = torch.maximum(largest_DB, rho_DBC.amax(2))
            origin_DB = larger_DB.masked_fill(larger_DB == float("-inf"), 0)
            total_DB = total_DB * (largest_DB - origin_DB).exp() + rho_DBC.sub_(
                origin_DB.unsqueeze(2)
            ).exp_().sum(2)
            largest_DB = larger_DB
        sum_DB = largest_DB + total_DB.log()
        ctx.save_for_backward(asked_DBR, shown_DGR, present_DG, left_out_DB, sum_DB)
        ctx.sigmoid = sigmoid
        ctx.temperature = temperature
        return sum_DB

    @staticmethod
    def backward(ctx, grad_DB):
        asked_DBR, shown_DGR, present_DG, left_out_DB, sum_DB = ctx.saved_tensors
        asked_grad_DBR = torch.zeros_like(asked_DBR)
        shown_grad_DGR = torch.empty_like(shown_DGR)
        origin_DB1 = sum_DB.masked_fill(sum_DB == float("-inf"), 0).unsqueeze(2)
        grad_DB1 = grad_DB.unsqueeze(2) / ctx.temperature
        for chunk in _chunks(present_DG):
            shown_DCR = shown_DGR[:, chunk]
            product_DBC = asked_DBR @ shown_DCR.transpose(1, 2)
            if ctx.sigmoid:
                product_DBC.sigmoid_()
            share_DBC = (product_DBC / ctx.temperature).sub_(origin_DB1)
            share_DBC.masked_fill_(
                _absent(present_DG, left_out_DB, chunk), float("-inf")
            ).exp_().mul_(grad_DB1)
            if ctx.sigmoid:
                share_DBC.mul_(product_DBC).mul_(product_DBC.neg_().add_(1))
            asked_grad_DBR += share_DBC @ shown_DCR
            shown_grad_DGR[:, chunk] = share_DBC.transpose(1, 2) @ asked_DBR
        return asked_grad_DBR, shown_grad_DGR, None, None, None, None


def _chunks(present_DG):
    candidates = present_DG.shape[1]
    return [
        slice(first, min(first + _CHUNK, candidates))
        for first in range(0, candidates, _CHUNK)
    ]


def _absent(present_DG, left_out_DB, chunk):
    """Which candidates of a chunk do not count for a user: (D, B or 1, C)."""
    absent_D1C = ~present_DG[:, chunk].unsqueeze(1)
    if left_out_DB is None:
        return absent_D1C
    place_C = torch.arange(chunk.start, chunk.stop, device=present_DG.device)
    return absent_D1C | (left_out_DB.unsqueeze(2) == place_C)


def pool(output_MR, view, users, domains):
    """The mean of each (user, domain)'s tokens: (B, D, r) and how many tokens there were (B, D)."""
    slots = users * domains
    count = torch.zeros(slots, dtype=output_MR.dtype, device=output_MR.device)
    count = count.index_add(
        0, view.pool_slot, torch.ones_like(view.pool_slot, dtype=count.dtype)
    )
    total = torch.zeros(
        slots, output_MR.shape[1], dtype=output_MR.dtype, device=output_MR.device
    )
    total = total.index_add(0, view.pool_slot, output_MR[view.pool_token])
    mean = total / count.clamp(min=1).unsqueeze(1)
    return mean.view(users, domains, -1), count.view(users, domains)
