"""SC-MIM: the single- and the cross-domain view of a user's domain belong together (section 4.4).

Shapes: B users of this rank, G users whose single-domain views stand as candidates, D domains, r width.
"""

import torch
import torch.nn.functional as F
from torch import nn


class MutualInformation(nn.Module):
    """InfoNCE between both views, per domain (eq. 14 to 17)."""

    def __init__(self, config):
        super().__init__()
        self.similarity = config.mutual_information_similarity
        self.temperature = config.mutual_information_temperature
        self.others_only = config.mutual_information_denominator == "others"
        self.weight = nn.Parameter(torch.empty(config.dim, config.dim))  # W^H of eq. 17
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(self, cross_BDR, single_GDR, present_BD, present_GD, own_B):
        """Σ over this rank's users of ρ(single, cross) − log Σ_û exp ρ(single_û, cross), for each domain.

        present: bool, user has tokens of the domain in both views; own_B: this rank's users' places among the G.
        Returns (sums_D, count_D): count_D is the number of users summed, known on every rank from present_GD alone:
        it is that of all G users.
        """
        enough_D = present_GD.sum(0) > 1  # a user alone in a domain has nothing to be told apart from
        if self.similarity == "cosine":
            projected = F.normalize(cross_BDR @ self.weight.T, dim=-1)
            rho_DBG = torch.einsum("bdr,gdr->dbg", projected, F.normalize(single_GDR, dim=-1))
        else:
            rho_DBG = torch.sigmoid(torch.einsum("bdr,gdr->dbg", cross_BDR @ self.weight.T, single_GDR))
        rho_DBG = rho_DBG / self.temperature
        positive_DB = rho_DBG.gather(2, own_B.view(1, -1, 1).expand(len(rho_DBG), -1, 1)).squeeze(2)
        candidates_DBG = present_GD.T.unsqueeze(1).expand_as(rho_DBG)
        if self.others_only:
            own = torch.zeros_like(candidates_DBG[0]).scatter_(1, own_B.unsqueeze(1), True)
            candidates_DBG = candidates_DBG & ~own
        counted_DB = present_BD.T & enough_D.unsqueeze(1)
        # Rows that are not counted get candidates all the same: the logarithm of an empty sum has no gradient.
        candidates_DBG = candidates_DBG | ~counted_DB.unsqueeze(2)
        bound_DB = positive_DB - rho_DBG.masked_fill(~candidates_DBG, float("-inf")).logsumexp(2)
        return (bound_DB * counted_DB).sum(1), present_GD.sum(0) * enough_D


def pool(output_MR, view, users, domains):
    """The mean of each (user, domain)'s tokens: (B, D, r) and how many tokens there were (B, D)."""
    slots = users * domains
    count = torch.zeros(slots, dtype=output_MR.dtype, device=output_MR.device)
    count = count.index_add(0, view.pool_slot, torch.ones_like(view.pool_slot, dtype=count.dtype))
    total = torch.zeros(slots, output_MR.shape[1], dtype=output_MR.dtype, device=output_MR.device)
    total = total.index_add(0, view.pool_slot, output_MR[view.pool_token])
    mean = total / count.clamp(min=1).unsqueeze(1)
    return mean.view(users, domains, -1), count.view(users, domains)
