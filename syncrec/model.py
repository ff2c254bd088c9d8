"""SyNCRec: shared input layer, asymmetric mixture of sequential experts, losses (section 4 of the paper).

Shapes: B users, N interactions, M tokens of a view, L targets, K experts, D domains, r width.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from syncrec.batch.build import Query
from syncrec.layers.attention import GroupLayerNorm
from syncrec.layers.embedding import Gate, InputEmbedding, OnlyExpert, Tower
from syncrec.layers.gru import RecurrentStack
from syncrec.layers.time_encoding import Clock
from syncrec.layers.transformer import ExpertStack
from syncrec.losses.loss_correction import LossCorrection, PredictionMix, transfer_gap
from syncrec.losses.mutual_information import MutualInformation, Sample, pool
from syncrec.losses.prediction import prediction_loss
from syncrec.losses.shapley import ShapleyCorrection, coalition_losses
from syncrec.reduction import Reduction

_UNDECAYED = re.compile(
    r"bias|b1$|b2$|\w+_norm_(scale|shift)$"
)  # of an expert's block, a GRU, a linear layer


@dataclass(frozen=True)
class LossReport:
    """What a step has to show, without gradient. All but the last are of the global batch.

    single_D, cross_D: mean losses by domain, NaN where it had no target; phi_D, NaN where absent; lambda_D. Without a
    single-domain task (tasks: cross) single_D, loss_single and phi_D are NaN, and lambda_D too unless by Shapley values.
    single_targets_D, cross_targets_D: the weights of each domain's targets in the two views.
    mutual_information: this rank's share of Σ_d MI_d; the sum over ranks is the batch's.
    """

    single_D: torch.Tensor
    cross_D: torch.Tensor
    loss_single: torch.Tensor
    loss_cross: torch.Tensor
    phi_D: torch.Tensor
    lambda_D: torch.Tensor
    single_targets_D: torch.Tensor
    cross_targets_D: torch.Tensor
    mutual_information: torch.Tensor


class SyNCRec(nn.Module):
    """The dense part of the model; the item vectors are handed in by whoever holds the table."""

    def __init__(self, config, domains):
        super().__init__()
        self.config, self.domains = config, domains
        self.both_tasks = config.tasks == "both"
        self.decoupled = config.stop_gradient
        self.embedding = InputEmbedding(config)
        self.clock = Clock(config) if config.time_knots else None
        # Experts 1..j and j+1..K of eq. 2 and 4: each stack has its backward in one of the views only.
        stack = RecurrentStack if config.encoder == "gru" else ExpertStack
        self.cross_experts = stack(
            config, config.cross_experts if self.decoupled else config.experts
        )
        self.single_experts = (
            stack(config, config.experts - config.cross_experts)
            if self.decoupled
            else None
        )
        gate = Gate if config.experts > 1 else OnlyExpert
        tower = Tower if config.tower else nn.Identity
        self.cross_gate, self.cross_tower = gate(config), tower(config)
        single_tasks = range(domains if self.both_tasks else 0)
        self.single_gates = nn.ModuleList(gate(config) for _ in single_tasks)
        self.single_towers = nn.ModuleList(tower(config) for _ in single_tasks)
        correction = {
            "negative_transfer_gap": LossCorrection,
            "shapley": ShapleyCorrection,
        }.get(config.loss_correction)
        self.correction = (
            correction(config, domains) if correction is not None else None
        )
        self.mutual_information = (
            MutualInformation(config) if config.mutual_information else None
        )
        self.prediction = (
            PredictionMix(config, domains) if config.predicts_by_both else None
        )

    def forward(self, batch, rows, reduction=None):
        """A Batch gives (loss, LossReport); a Query, with both views where the model predicts by both, what each domain's items
        are scored with for each user, (B, D, r).

        rows: the item vectors of `batch.ids`, in that order, (ids, r). reduction: the other ranks (syncrec.reduction).
        The loss is this rank's share of eq. 18 times the number of ranks: its mean over ranks is the global batch's loss,
        and so are the means of its gradients.
        """
        with self._autocast(rows):
            inputs_NR, negatives_R = rows.split(
                [batch.interactions, len(rows) - batch.interactions]
            )
            cross_MR = self._cross_outputs(batch.cross, inputs_NR)
            if isinstance(batch, Query):
                return self._predictions(batch, inputs_NR, cross_MR)
            single_MR = (
                self._single_outputs(batch.single, inputs_NR)
                if self.both_tasks
                else None
            )
        with torch.autocast(rows.device.type, enabled=False):
            cross_MR, single_MR = (
                cross_MR.to(rows.dtype),
                single_MR.to(rows.dtype) if self.both_tasks else None,
            )
            return self._losses(
                batch,
                inputs_NR,
                negatives_R,
                cross_MR,
                single_MR,
                reduction or Reduction(),
            )

    def _predictions(self, query, inputs_NR, cross_MR):
        cross_BR = self._scoring(
            query.cross, cross_MR.to(inputs_NR.dtype), query.newest_B
        )
        cross_BDR = cross_BR.unsqueeze(1).expand(-1, self.domains, -1)
        if self.prediction is None:
            return cross_BDR
        single_MR = self._single_outputs(query.single, inputs_NR).to(inputs_NR.dtype)
        single_BDR = self._scoring(
            query.single, single_MR, query.newest_DB.T.flatten()
        ).view_as(cross_BDR)
        return torch.lerp(
            cross_BDR,
            single_BDR,
            self.prediction.own_D.to(inputs_NR.dtype).unsqueeze(1),
        )

    def _autocast(self, rows):
        # No cache of cast weights: stacks run with and without a graph, and ZeRO 3 takes weights apart in between.
        bf16 = self.config.precision == "bf16"
        return torch.autocast(
            rows.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False
        )

    def tokens(self, view, inputs_NR):
        """The inputs of a view's tokens, (M, r)."""
        x_MR = self.embedding(view, inputs_NR)
        return (
            x_MR
            if self.clock is None
            else x_MR + self.clock.added_to_tokens(view.target_time_M, view.gap_M)
        )

    def _scoring(self, view, output_MR, token_L):
        """What items are scored with at some tokens: the output, and the time for which it predicts, (L, r)."""
        output_LR = output_MR.index_select(0, token_L)
        if self.clock is None:
            return output_LR
        return output_LR + self.clock.added_to_outputs(
            view.target_time_M.index_select(0, token_L)
        )

    def _cross_outputs(self, view, inputs_NR):
        """Y^cross of eq. 4, (M, r)."""
        x_MR = self.tokens(view, inputs_NR)
        experts = self._run_experts(x_MR, view, self.cross_experts, self.single_experts)
        return self.cross_tower(mix(self.cross_gate(x_MR, view, slice(None)), experts))

    def _single_outputs(self, view, inputs_NR):
        """Y^single of eq. 2, domain after domain, (M, r)."""
        x_MR = self.tokens(view, inputs_NR)
        experts = self._run_experts(x_MR, view, self.single_experts, self.cross_experts)
        starts = view.task_starts
        lengths = [end - start for start, end in pairwise(starts)]
        tasks = [slice(start, end) for start, end in pairwise(starts)]
        weights = [
            gate(x, view, task)
            for gate, x, task in zip(
                self.single_gates, x_MR.split(lengths), tasks, strict=True
            )
        ]
        mixed = mix(torch.cat(weights), experts).split(lengths)
        return torch.cat(
            [
                tower(mixed_MR)
                for tower, mixed_MR in zip(self.single_towers, mixed, strict=True)
            ]
        )

    def _run_experts(self, x_MR, view, live, stopped):
        """Outputs of experts 1..j and of j+1..K. A stopped expert builds no graph: SG of eq. 2 and 4, to the bit."""
        if not self.decoupled:
            return (self.cross_experts(x_MR, view.attention),)
        live_KMR = live(x_MR, view.attention)
        with torch.no_grad():
            stopped_KMR = stopped(x_MR, view.attention)
        return (
            (live_KMR, stopped_KMR)
            if live is self.cross_experts
            else (stopped_KMR, live_KMR)
        )

    def _losses(self, batch, inputs_NR, negatives_R, cross_MR, single_MR, reduction):
        """Eq. 18 from the outputs of both views. single_MR: None without a single-domain task; its sums are then 0."""
        cross_sums = _sums(
            batch.cross,
            self._prediction_losses(
                batch, batch.cross, inputs_NR, negatives_R, cross_MR
            ),
        )
        single_sums = torch.zeros_like(cross_sums)
        if self.both_tasks:
            single_L = self._prediction_losses(
                batch, batch.single, inputs_NR, negatives_R, single_MR
            )
            single_sums = _sums(batch.single, single_L)
        coalition_C = self._coalition_sums(batch, inputs_NR, negatives_R)
        # In flight while SC-MIM is computed: what λ and the means need of the other ranks.
        wait = reduction.start_sum(
            torch.cat([*single_sums, *cross_sums, coalition_C]).detach().double()
        )
        information_D = self._mutual_information(batch, single_MR, cross_MR, reduction)
        totals, coalition_C = wait().split([8 * self.domains, len(coalition_C)])
        single_4D, cross_4D = totals.view(2, 4, self.domains)
        (
            (single_D, single_count_D, single_gap_D, gap_count_D),
            (cross_D, cross_count_D, cross_gap_D, _),
        ) = single_4D, cross_4D

        phi_D, present_D = (
            transfer_gap(single_gap_D, cross_gap_D, gap_count_D),
            gap_count_D > 0,
        )
        if self.prediction is not None and self.training:
            self.prediction.observe(phi_D, present_D)
        lambda_D = cross_MR.new_ones(self.domains)
        if len(coalition_C):
            lambda_D = self.correction(
                coalition_C / cross_count_D.sum().clamp(min=1), cross_count_D > 0
            )
        elif self.correction is not None:
            lambda_D = self.correction(phi_D, present_D)
        scale, dtype = reduction.world_size, cross_MR.dtype
        loss_single = (
            scale * single_sums[0].sum() / single_count_D.sum().clamp(min=1).to(dtype)
        )
        loss_cross = (
            scale
            * (lambda_D.to(dtype) * cross_sums[0]).sum()
            / cross_count_D.sum().clamp(min=1).to(dtype)
        )
        information = information_D.sum()
        eta = self.config.eta if self.mutual_information is not None else 1.0
        loss = eta * (loss_single + loss_cross) - (1 - eta) * scale * information

        means = (
            single_D / single_count_D.clamp(min=1),
            cross_D / cross_count_D.clamp(min=1),
        )
        nan = float("nan")
        known = (
            1.0 if self.both_tasks else nan
        )  # what the cross-domain task alone has not
        return loss, LossReport(
            single_D=means[0].masked_fill(single_count_D == 0, nan),
            cross_D=means[1].masked_fill(cross_count_D == 0, nan),
            loss_single=known * single_D.sum() / single_count_D.sum().clamp(min=1),
            loss_cross=(lambda_D.detach() * cross_D).sum()
            / cross_count_D.sum().clamp(min=1),
            phi_D=phi_D.masked_fill(~present_D, nan),
            lambda_D=(known if self.correction is None else 1.0) * lambda_D.detach(),
            single_targets_D=single_count_D,
            cross_targets_D=cross_count_D,
            mutual_information=information.detach(),
        )

    def _coalition_sums(self, batch, inputs_NR, negatives_R):
        """This rank's sum of cross-domain losses with the items of each coalition of domains, (2^D,); none without Shapley."""
        if self.config.loss_correction != "shapley":
            return inputs_NR.new_zeros(0)

        def loss_of(shown_NR):
            with self._autocast(shown_NR):
                cross_MR = self._cross_outputs(batch.cross, shown_NR).to(shown_NR.dtype)
            loss_L = self._prediction_losses(
                batch, batch.cross, inputs_NR, negatives_R, cross_MR
            )
            return (loss_L * batch.cross.target_weight_L).sum()

        return coalition_losses(self, batch, inputs_NR, loss_of)

    def _prediction_losses(self, batch, view, inputs_NR, negatives_R, output_MR):
        """The loss of each of the view's targets (eq. 8 or 9), (L,)."""
        predicted_LR = self._scoring(view, output_MR, view.target_token_L)
        positive_L = (
            predicted_LR * inputs_NR.index_select(0, view.target_interaction_L)
        ).sum(1)
        starts = view.target_starts
        lengths = [end - start for start, end in pairwise(starts)]
        if batch.negatives is not None:
            own_NnR = negatives_R.view(batch.interactions, batch.negatives, -1)
            own_LnR = own_NnR.index_select(0, view.target_interaction_L)
            # Not a product of matrices: for each target it is one row.
            negative_Ln = (predicted_LR.unsqueeze(1) * own_LnR).sum(2)
            sized = zip(lengths, batch.domain_items, strict=True)
            items_L1 = torch.cat(
                [positive_L.new_full((length, 1), items) for length, items in sized]
            )
            return prediction_loss(
                self.config.loss, positive_L, negative_Ln, None, items_L1
            )
        starts = batch.negative_starts
        shared = negatives_R.split([end - start for start, end in pairwise(starts)])
        shared_places = batch.place[batch.interactions :].split(
            [len(rows) for rows in shared]
        )
        target_places = batch.place.index_select(0, view.target_interaction_L).split(
            lengths
        )
        losses = []
        for domain, (y_LR, positive) in enumerate(
            zip(predicted_LR.split(lengths), positive_L.split(lengths), strict=True)
        ):
            scores, allowed = (
                y_LR @ shared[domain].T,
                shared_places[domain] != target_places[domain].unsqueeze(1),
            )
            losses.append(
                prediction_loss(
                    self.config.loss,
                    positive,
                    scores,
                    allowed,
                    batch.domain_items[domain],
                )
            )
        return torch.cat(losses)

    def _mutual_information(self, batch, single_MR, cross_MR, reduction):
        """This rank's share of the domains' bounds (eq. 16), each a mean over the users of the global batch, (D,)."""
        if self.mutual_information is None:
            return cross_MR.new_zeros(self.domains)
        users = len(batch.weight_B)
        single_BDR, single_count_BD = pool(single_MR, batch.single, users, self.domains)
        cross_BDR, cross_count_BD = pool(cross_MR, batch.cross, users, self.domains)
        present_BD = (
            (single_count_BD > 0)
            & (cross_count_BD > 0)
            & (batch.weight_B > 0).unsqueeze(1)
        )
        own_B = torch.arange(users, device=present_BD.device)
        single_GDR = single_BDR
        present_GD = present_BD
        sample = None
        if self.config.mutual_information_negatives != "rank":
            if batch.candidates is not None:
                sample = self._sample(
                    batch.candidates, single_BDR, present_BD, reduction
                )
            else:
                single_GDR = reduction.gather(single_BDR)
                present_GD = reduction.gather(present_BD)
                own_B = own_B + reduction.rank * users
        sum_D, count_D = self.mutual_information(
            cross_BDR, single_GDR, present_BD, present_GD, own_B, sample
        )
        if self.config.mutual_information_negatives == "rank":
            count_D = count_D * reduction.world_size
        return sum_D / count_D.clamp(min=1)

    def _sample(self, candidates, single_BDR, present_BD, reduction):
        """The candidates' single-domain views from all ranks, and how many users of the global batch have each domain."""
        slots = self.domains * candidates.size
        slot_C = candidates.slot_C
        place_C = candidates.place_C
        present_S = present_BD.flatten().double()
        shown = torch.zeros(slots, dtype=torch.float64, device=present_BD.device)
        shown = shown.index_copy(0, place_C, present_S.index_select(0, slot_C))
        wait = reduction.start_sum(torch.cat([shown, present_BD.sum(0).double()]))
        values_CR = single_BDR.flatten(0, 1).index_select(0, slot_C)
        single_DNR = reduction.collect(values_CR, place_C, slots).view(
            self.domains, candidates.size, -1
        )
        own_BD = torch.full_like(present_S, -1, dtype=torch.int64).index_copy(
            0, slot_C, place_C % candidates.size
        )
        shown, count_D = wait().split([slots, self.domains])
        return Sample(
            single_DNR=single_DNR,
            present_DN=shown.view(self.domains, -1) > 0,
            own_DB=own_BD.view(-1, self.domains).T,
            count_D=count_D.long(),
        )


def decayed_names(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay is for: the projections and what stands for items, positions and times.

    Not biases, not what a LayerNorm scales and shifts by, and not α and β of eq. 11: 0 is no better value for them.
    """
    names = set()
    for module_name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | GroupLayerNorm | LossCorrection):
            continue
        for name, _ in module.named_parameters(recurse=False):
            if not _UNDECAYED.match(name):
                names.add(f"{module_name}.{name}" if module_name else name)
    return names


def mix(weights_MK, experts):
    """f of eq. 2 and 4: Σ_k g_k f_k. weights_MK: (M, K); experts: the stacks' outputs, (K_1, M, r), (K_2, M, r), …"""
    if weights_MK.shape[1] == 1:  # its weight is 1
        return experts[0][0]
    weights = weights_MK.split([len(output) for output in experts], dim=1)
    # Not a product of matrices: for each token it is one row, and the call takes longer than the arithmetic.
    return sum(
        (w.T.unsqueeze(2).to(y.dtype) * y).sum(0)
        for w, y in zip(weights, experts, strict=True)
    )


def _sums(view, loss_L):
    """By domain: weighted loss sum, weight, and both over the targets that the other view predicts too: four (D,)."""
    domains = len(view.target_starts) - 1
    weight_L = view.target_weight_L.to(loss_L.dtype)
    shared_L = weight_L * view.comparable_L
    stacked_L4 = torch.stack(
        [loss_L * weight_L, weight_L, loss_L.detach() * shared_L, shared_L], dim=1
    )
    return (
        stacked_L4.new_zeros(domains, 4)
        .index_add(0, view.target_domain_L, stacked_L4)
        .T
    )
