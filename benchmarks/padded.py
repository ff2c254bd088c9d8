"""The same model as people write it without packing: what our step is timed against.

Every user is a row of T slots, right-padded, in D + 1 views (0: cross-domain, d + 1: domain d);
each expert is a module of its own that runs on all of them; SG of eq. 2 and 4 is `.detach()` on
what was computed with a graph; the item matrix is an `nn.Embedding` with dense gradients. It is
kept fair: right padding lets attention take the kernel without a mask, a stopped expert's graph
is dropped and not run backward, losses are computed where there is a target, and rows are
looked up three times a step (inputs, targets, negatives), not in every view anew. Losses, λ,
SC-MIM, gate and tower are our modules: what differs is what surrounds them. It follows the
default readings (`gate: token`, `mutual_information_pooling: mean`, one rank).

Shapes: V = D + 1 views, B users, T slots, K experts, D domains, L targets, n negatives, r width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from syncrec.layers.gate import Gate
from syncrec.layers.tower import Tower
from syncrec.losses.loss_correction import LossCorrection, transfer_gap
from syncrec.losses.mutual_information import MutualInformation
from syncrec.losses.prediction import prediction_loss

if TYPE_CHECKING:
    from syncrec.config import ModelConfig
    from syncrec.model import SyNCRec


# rows of the padded item matrix: row x of M is row x + 2 here
_PAD = 0
_SOS = 1
_FIRST_ITEM = 2


@dataclass(frozen=True)
class PaddedBatch:
    """Users of one step. Items are rows of the padded matrix; 0 where there is none.

    input_VBT, position_VBT (distance from the newest token), input_domain_VBT (D: none),
    target_VBT, target_domain_VBT; comparable_VBT: the other view has the target too. negatives:
    how many each target has of its own, in negative_VBTn, or None where they are shared_D, D
    tensors. domain_items: items of each domain.
    """

    input_VBT: torch.Tensor
    position_VBT: torch.Tensor
    input_domain_VBT: torch.Tensor
    target_VBT: torch.Tensor
    target_domain_VBT: torch.Tensor
    comparable_VBT: torch.Tensor
    negatives: int | None
    negative_VBTn: torch.Tensor
    shared_D: tuple[torch.Tensor, ...]
    weight_B: torch.Tensor
    domain_items: tuple[int, ...]


def pad_batch(
    items_N: np.ndarray,
    lengths_B: np.ndarray,
    domain_N: np.ndarray,
    weight_B: np.ndarray,
    negatives: np.ndarray | list[np.ndarray],
    domain_items: list[int],
    max_length: int,
) -> PaddedBatch:
    """The padded views of some users; arguments as for `syncrec.batch.build.build_batch`."""
    domains = len(domain_items)
    users = len(lengths_B)
    own = None if isinstance(negatives, list) else negatives.shape[1]
    shape = (domains + 1, users, max_length)
    # interactions; given: −1 SOS, −2 PAD; predicted: −1 none
    given = np.full(shape, -2)
    predicted = np.full(shape, -1)
    position = np.zeros(shape, np.int64)
    for user, end in enumerate(np.cumsum(lengths_B)):
        history = np.arange(end - lengths_B[user], end)
        for view in range(domains + 1):
            steps = history[domain_N[history] == view - 1] if view else history
            if len(steps) == 0:
                continue
            inputs = np.append(-1, steps[steps != end - 1])[-max_length:]
            targets = np.append(steps, -1)[
                : len(steps) + (steps[-1] != end - 1)
            ][-max_length:]
            given[view, user, : len(inputs)] = inputs
            predicted[view, user, : len(targets)] = targets
            position[view, user, : len(inputs)] = np.arange(len(inputs))[::-1]
    in_both = np.zeros((2, len(items_N)), bool)
    in_both[0, predicted[0][predicted[0] >= 0]] = True
    in_both[1, predicted[1:][predicted[1:] >= 0]] = True

    def pick(values_N, place, none):
        """Values of the interactions named by `place`, `none` where it is below 0."""
        picked = values_N[np.maximum(place, 0)]
        return torch.from_numpy(
            np.where(
                (place >= 0).reshape(
                    place.shape + (1,) * (picked.ndim - place.ndim)
                ),
                picked,
                none,
            )
        )

    inputs_VBT = pick(items_N + _FIRST_ITEM, given, _PAD)
    inputs_VBT[torch.from_numpy(given == -1)] = _SOS
    return PaddedBatch(
        input_VBT=inputs_VBT,
        position_VBT=torch.from_numpy(position),
        input_domain_VBT=pick(domain_N, given, domains),
        target_VBT=pick(items_N + _FIRST_ITEM, predicted, _PAD),
        target_domain_VBT=pick(domain_N, predicted, domains),
        comparable_VBT=pick(in_both.all(axis=0), predicted, False),
        negatives=own,
        negative_VBTn=torch.zeros(0)
        if own is None
        else pick(negatives + _FIRST_ITEM, predicted, _PAD),
        shared_D=tuple(
            torch.from_numpy(rows + _FIRST_ITEM) for rows in negatives
        )
        if own is None
        else (),
        weight_B=torch.from_numpy(np.asarray(weight_B, np.float32)),
        domain_items=tuple(int(items) for items in domain_items),
    )


class PaddedSyNCRec(nn.Module):
    """Model and item matrix in one module, as one optimizer gets them."""

    def __init__(
        self,
        config: "ModelConfig",
        domains: int,
        rows: int,
        plain: bool = False,
    ):
        """rows: of M, without PAD and SOS. plain: each view reads the item matrix for itself,
        as a loop over domains does.
        """
        super().__init__()
        if (
            config.gate != "token"
            or config.mutual_information_pooling != "mean"
            or config.stop_gradient is not True
        ):
            raise ValueError(
                "the padded model has the default readings only: gate token, pooling mean, "
                "stop_gradient on"
            )
        if config.encoder != "transformer" or config.loss_correction in (
            "shapley",
            "harm",
        ):
            raise ValueError(
                "the padded model has Transformers and LC-NTG only: no encoder gru, no "
                "loss_correction shapley or harm"
            )
        self.config = config
        self.domains = domains
        self.plain = plain
        self.items = nn.Embedding(
            rows + _FIRST_ITEM, config.dim, padding_idx=_PAD
        )
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.experts = nn.ModuleList(
            PaddedExpert(config) for _ in range(config.experts)
        )
        self.gates = nn.ModuleList(Gate(config) for _ in range(domains + 1))
        self.towers = nn.ModuleList(Tower(config) for _ in range(domains + 1))
        self.correction = (
            LossCorrection(config, domains)
            if config.loss_correction != "none"
            else None
        )
        self.mutual_information = (
            MutualInformation(config) if config.mutual_information else None
        )
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=config.init_std)

    def forward(self, batch: PaddedBatch) -> tuple:
        """The loss of eq. 18 and what it is made of: single-domain and cross-domain mean
        losses, (D,) each, and λ, (D,).
        """
        x_VBTR = self._rows(
            batch.input_VBT, [1] * (self.domains + 1)
        ) + self.positions(batch.position_VBT)
        x_VBTR = F.dropout(x_VBTR, self.config.dropout, self.training)
        y_VBTR = torch.stack(
            [self._view(view, x_BTR) for view, x_BTR in enumerate(x_VBTR)]
        )
        return self._losses(batch, y_VBTR)

    def _rows(self, ids, views):
        """Vectors of ids whose first dimension has the views one after the other, so many each."""
        return (
            torch.cat([self.items(own) for own in ids.split(views)])
            if self.plain
            else self.items(ids)
        )

    def _view(self, view, x_BTR):
        """Eq. 4 for view 0, eq. 2 for the others."""
        weights_BTK = self.gates[view](x_BTR, None, None)
        mixed_BTR = 0
        for k, expert in enumerate(self.experts):
            y_BTR = expert(x_BTR)
            if (k < self.config.cross_experts) == (view > 0):
                y_BTR = y_BTR.detach()
            mixed_BTR = mixed_BTR + weights_BTK[..., k : k + 1] * y_BTR
        return self.towers[view](mixed_BTR)

    def _losses(self, batch, y_VBTR):
        config = self.config
        present_VBT = batch.target_VBT > 0
        view_L, user_L, _ = present_VBT.nonzero(as_tuple=True)
        domain_L = batch.target_domain_VBT[present_VBT]
        views = view_L.bincount(minlength=self.domains + 1).tolist()
        loss_L = self._prediction_losses(
            batch, present_VBT, views, domain_L, y_VBTR[present_VBT]
        )
        weight_L = batch.weight_B.to(loss_L.dtype)[user_L]
        shared_L = weight_L * batch.comparable_VBT[present_VBT]

        def by_domain(values_L, single):
            chosen = (view_L > 0) == single
            return values_L.new_zeros(self.domains).index_add(
                0, domain_L[chosen], values_L[chosen]
            )

        single_D = by_domain(loss_L * weight_L, True)
        cross_D = by_domain(loss_L * weight_L, False)
        single_count_D = by_domain(weight_L, True)
        cross_count_D = by_domain(weight_L, False)
        gap_count_D = by_domain(shared_L, True)
        lambda_D = torch.ones_like(cross_D)
        if self.correction is not None:
            gap_L = loss_L.detach() * shared_L
            phi_D = transfer_gap(
                by_domain(gap_L, True), by_domain(gap_L, False), gap_count_D
            )
            lambda_D = self.correction(phi_D, gap_count_D > 0)
        loss_single = single_D.sum() / single_count_D.sum().clamp(min=1)
        loss_cross = (lambda_D * cross_D).sum() / cross_count_D.sum().clamp(
            min=1
        )
        loss = loss_single + loss_cross
        if self.mutual_information is not None:
            loss = config.eta * loss - (1 - config.eta) * self._information(
                batch, y_VBTR
            )
        means = (
            single_D / single_count_D.clamp(min=1),
            cross_D / cross_count_D.clamp(min=1),
        )
        return loss, (means[0].detach(), means[1].detach(), lambda_D.detach())

    def _prediction_losses(self, batch, present_VBT, views, domain_L, y_LR):
        """Eq. 8 or 9 for each target of both kinds of view, (L,)."""
        target_L = batch.target_VBT[present_VBT]
        positive_L = (y_LR * self._rows(target_L, views)).sum(1)
        if batch.negatives is None:
            shared_D = self.items(torch.cat(batch.shared_D)).split(
                [len(rows) for rows in batch.shared_D]
            )
        else:
            scores_Ln = torch.einsum(
                "lr,lnr->ln",
                y_LR,
                self._rows(batch.negative_VBTn[present_VBT], views),
            )
        loss_L = torch.zeros_like(positive_L)
        for d, items in enumerate(batch.domain_items):
            of_d = (domain_L == d).nonzero().squeeze(1)
            if batch.negatives is None:
                scores = y_LR[of_d] @ shared_D[d].T
                allowed = batch.shared_D[d] != target_L[of_d].unsqueeze(1)
            else:
                scores = scores_Ln[of_d]
                allowed = None
            loss_L = loss_L.index_add(
                0,
                of_d,
                prediction_loss(
                    self.config.loss, positive_L[of_d], scores, allowed, items
                ),
            )
        return loss_L

    def _information(self, batch, y_VBTR):
        """Σ_d MI_d of eq. 16, each a mean over users."""
        token_DBT = batch.input_domain_VBT[0] == torch.arange(
            self.domains, device=y_VBTR.device
        ).view(-1, 1, 1)
        cross_BDR, cross_count_BD = _pool(
            token_DBT, y_VBTR[:1].expand(self.domains, -1, -1, -1)
        )
        single_BDR, single_count_BD = _pool(
            batch.input_domain_VBT[1:] < self.domains, y_VBTR[1:]
        )
        present_BD = (
            (single_count_BD > 0)
            & (cross_count_BD > 0)
            & (batch.weight_B > 0).unsqueeze(1)
        )
        own_B = torch.arange(len(present_BD), device=y_VBTR.device)
        sum_D, count_D = self.mutual_information(
            cross_BDR, single_BDR, present_BD, present_BD, own_B
        )
        return (sum_D / count_D.clamp(min=1)).sum()


class PaddedExpert(nn.Module):
    """f_TRM of eq. 5 to 7."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.blocks = nn.ModuleList(
            PaddedBlock(config) for _ in range(config.blocks)
        )
        self.last_norm = (
            nn.LayerNorm(config.dim) if config.norm == "pre" else nn.Identity()
        )

    def forward(self, x_BTR: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x_BTR = block(x_BTR)
        return self.last_norm(x_BTR)


class PaddedBlock(nn.Module):
    """Causal self-attention and feed-forward network, each with residual, dropout and LayerNorm."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.pre_norm = config.norm == "pre"
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.inner = nn.Linear(config.dim, config.ffn_dim)
        self.outer = nn.Linear(config.ffn_dim, config.dim)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)

    def forward(self, x_BTR: torch.Tensor) -> torch.Tensor:
        x_BTR = self._around(self.attention_norm, self._attend, x_BTR)
        return self._around(
            self.ffn_norm,
            lambda y_BTR: self.outer(F.gelu(self.inner(y_BTR))),
            x_BTR,
        )

    def _around(self, norm, layer, x_BTR):
        if self.pre_norm:
            return x_BTR + F.dropout(
                layer(norm(x_BTR)), self.dropout, self.training
            )
        return norm(
            x_BTR + F.dropout(layer(x_BTR), self.dropout, self.training)
        )

    def _attend(self, x_BTR):
        # Right-padded: a real token never sees a padded one, so the causal mask is all that is
        # needed.
        query, key, value = (
            self.qkv(x_BTR)
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        return self.out(
            F.scaled_dot_product_attention(query, key, value, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )


def copy_weights(
    packed: "SyNCRec", table_MR: torch.Tensor, padded: PaddedSyNCRec
) -> None:
    """Gives a `PaddedSyNCRec` the weights and λ of a packed `SyNCRec` and the item matrix M,
    (rows, r).
    """
    with torch.no_grad():
        padded.items.weight.copy_(
            torch.cat(
                [
                    torch.zeros_like(table_MR[:1]),
                    packed.embedding.start,
                    table_MR,
                ]
            )
        )
        padded.positions.weight.copy_(packed.embedding.positions)
        stacked = [
            (stack, k)
            for stack in (packed.cross_experts, packed.single_experts)
            for k in range(stack.experts)
        ]
        for (stack, k), expert in zip(stacked, padded.experts, strict=True):
            for given, block in zip(stack.blocks, expert.blocks, strict=True):
                linears = block.qkv, block.out, block.inner, block.outer
                for linear, weight in zip(
                    linears,
                    (given.qkv, given.out, given.w1, given.w2),
                    strict=True,
                ):
                    linear.weight.copy_(weight[k].T)
                block.inner.bias.copy_(given.b1[k, 0])
                block.outer.bias.copy_(given.b2[k, 0])
                _copy_norm(
                    given.attention_norm_scale,
                    given.attention_norm_shift,
                    k,
                    block.attention_norm,
                )
                _copy_norm(
                    given.ffn_norm_scale,
                    given.ffn_norm_shift,
                    k,
                    block.ffn_norm,
                )
            if padded.config.norm == "pre":
                _copy_norm(
                    stack.last_norm.scale,
                    stack.last_norm.shift,
                    k,
                    expert.last_norm,
                )
        for gate, given in zip(
            padded.gates, [packed.cross_gate, *packed.single_gates], strict=True
        ):
            gate.load_state_dict(given.state_dict())
        for tower, given in zip(
            padded.towers,
            [packed.cross_tower, *packed.single_towers],
            strict=True,
        ):
            tower.load_state_dict(given.state_dict())
    for name in ("correction", "mutual_information"):
        if getattr(padded, name) is not None:
            getattr(padded, name).load_state_dict(
                getattr(packed, name).state_dict()
            )


def _copy_norm(scale_K1R, shift_K1R, k, norm):
    norm.weight.copy_(scale_K1R[k, 0])
    norm.bias.copy_(shift_K1R[k, 0])


def _pool(counted_DBT, y_DBTR):
    """The mean over each row's counted slots, (B, D, r), and their number, (B, D)."""
    counted = counted_DBT.to(y_DBTR.dtype)
    count_BD = counted.sum(2).T
    return torch.einsum("dbt,dbtr->bdr", counted, y_DBTR) / count_BD.clamp(
        min=1
    ).unsqueeze(-1), count_BD
