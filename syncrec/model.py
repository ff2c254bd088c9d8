"""SyNCRec: shared input layer, asymmetric mixture of sequential experts, losses (section 4).

φ_d, the negative transfer gap, is how much lower domain d's mean loss is by the cross-domain task
than by the single-domain task. λ_d, the loss correction weight, multiplies domain d's part of the
cross-domain loss and follows from φ (syncrec/losses/loss_correction.py).

Shapes: B users, N interactions, M tokens of a view, L targets, K experts, D domains, C coalitions,
r width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from syncrec.batch.views import Batch, Candidates, MicroBatch, Query, View
from syncrec.config import ModelConfig
from syncrec.layers.attention import GroupLayerNorm
from syncrec.layers.embedding import InputEmbedding
from syncrec.layers.gate import Gate, GateGroup, OnlyExpert
from syncrec.layers.grouped_linear import grouped_linear
from syncrec.layers.gru import RecurrentStack
from syncrec.layers.time_encoding import Clock
from syncrec.layers.tower import Tower, TowerGroup
from syncrec.layers.transformer import ExpertStack
from syncrec.losses.harm import GapAverage, scale_gradient
from syncrec.losses.loss_correction import LossCorrection, transfer_gap
from syncrec.losses.mutual_information import MutualInformation, Sample, pool
from syncrec.losses.prediction import prediction_loss
from syncrec.losses.shapley import ShapleyCorrection, coalition_losses
from syncrec.reduction import Reduction

# Biases and norms of an expert's block, a GRU, a linear layer.
_UNDECAYED = re.compile(r"bias|b1$|b2$|\w+_norm_(scale|shift)$")
_SUMS = 4  # numbers that `_sum_by_domain` takes of a view's targets
_NAN = float("nan")
_OLD_GAP = "prediction.gap_2D"  # of earlier versions, which had no noise


@dataclass(frozen=True)
class LossReport:
    """What a step reports, without gradient: the terms of eq. 18 (section 4.5).

    All but the last are of the global batch. Without a single-domain task (tasks: cross) single_D,
    loss_single and phi_D are NaN, and lambda_D too unless it is by Shapley values.

    Attributes:
        single_D: mean single-domain loss of each domain, NaN where it had no target.
        cross_D: the same of the cross-domain task.
        loss_single: mean single-domain loss of all targets.
        loss_cross: mean cross-domain loss of all targets, weighed by λ.
        phi_D: φ, NaN where the domain is absent.
        lambda_D: λ.
        single_targets_D: the weights of each domain's targets in the single-domain view.
        cross_targets_D: the same of the cross-domain view.
        mutual_information: this rank's share of Σ_d MI_d; the sum over ranks is the batch's.
    """

    single_D: Tensor
    cross_D: Tensor
    loss_single: Tensor
    loss_cross: Tensor
    phi_D: Tensor
    lambda_D: Tensor
    single_targets_D: Tensor
    cross_targets_D: Tensor
    mutual_information: Tensor


class SyNCRec(nn.Module):
    """The dense part of the model (section 4); whoever holds the table hands in the item vectors.

    Example: two domains, and the batch that syncrec/batch/build.py's head draws. Its `ids` are 7
    interactions and 3 negatives, so `rows` is (10, r), and the report's `single_D`, `cross_D`,
    `phi_D` and `lambda_D` have 2 elements each. For a query of the same four users the result is
    (4, 2, r).
    """

    cross_experts: RecurrentStack | ExpertStack
    single_experts: RecurrentStack | ExpertStack | None
    correction: LossCorrection | ShapleyCorrection | None
    mutual_information: MutualInformation | None
    gap: GapAverage | None

    def __init__(self, config: ModelConfig, domains: int):
        super().__init__()
        self.config = config
        self.domains = domains
        self.both_tasks = config.tasks == "both"
        self.decoupled = bool(config.stop_gradient)
        self.embedding = InputEmbedding(config)
        self.clock = Clock(config) if config.time_knots else None
        self._build_experts()
        self._build_tasks()
        self._build_losses()

    def _build_experts(self) -> None:
        """Experts 1..j and j+1..K of eq. 2 and 4; all in one stack where no gradient is stopped."""
        config = self.config
        stack = RecurrentStack if config.encoder == "gru" else ExpertStack
        if self.decoupled:
            single_experts = config.experts - config.cross_experts
            self.cross_experts = stack(config, config.cross_experts)
            self.single_experts = stack(config, single_experts)
        else:
            self.cross_experts = stack(config, config.experts)
            self.single_experts = None

    def _build_tasks(self) -> None:
        """A gate and a tower for each task."""
        config = self.config
        gate = Gate if config.experts > 1 else OnlyExpert
        tower = Tower if config.tower else nn.Identity
        self.cross_gate = gate(config)
        self.cross_tower = tower(config)
        single_tasks = range(self.domains if self.both_tasks else 0)
        self.single_gates = GateGroup(gate(config) for _ in single_tasks)
        self.single_towers = TowerGroup(tower(config) for _ in single_tasks)

    def _build_losses(self) -> None:
        """What follows the outputs, each None where the settings have it off."""
        config = self.config
        self.correction = None
        if config.loss_correction == "negative_transfer_gap":
            self.correction = LossCorrection(config, self.domains)
        elif config.loss_correction == "shapley":
            self.correction = ShapleyCorrection(config, self.domains)
        self.mutual_information = None
        if config.mutual_information:
            self.mutual_information = MutualInformation(config)
        self.gap = None
        if config.measures_gap:
            self.gap = GapAverage(config, self.domains)
        self.gap_of_mean = None
        if config.compares_mean:
            self.gap_of_mean = GapAverage(config, self.domains)

    def forward(
        self,
        batch: Batch | Query,
        rows: Tensor,
        reduction: Reduction | None = None,
    ) -> tuple[Tensor, LossReport] | Tensor:
        """A Batch gives (loss, LossReport); a Query gives predictions, (B, D, r).

        Predictions are what each domain's items are scored with for each user; where the model
        predicts by both views, the query has both.

        Args:
            batch: the users.
            rows: the item vectors of `batch.ids`, in that order, (ids, r).
            reduction: the other ranks (syncrec/reduction.py).

        The loss is this rank's share of eq. 18 times the number of ranks. So its mean over ranks is
        the global batch's loss, and the means of its gradients are the global batch's gradients.

        Of several micro-batches only the last one's activations are kept. Backward computes those
        of the others anew, one micro-batch after the other (activation checkpointing). So loss, λ
        and SC-MIM are those of the whole batch.
        """
        if isinstance(batch, Query):
            return self._predict(batch, rows)
        gate_D = self._gates()
        *earlier, (micro_batch, inputs_NR, negatives_R) = _split_rows(
            batch, rows
        )
        sums = []
        for rows_of_micro_batch in earlier:
            sums.append(
                checkpoint(
                    self._sum_micro_batch,
                    batch,
                    *rows_of_micro_batch,
                    gate_D,
                    use_reentrant=False,
                )
            )
        cross_MR, single_MR = self._outputs(micro_batch, inputs_NR, gate_D)
        with torch.autocast(rows.device.type, enabled=False):
            return self._compute_losses(
                batch,
                micro_batch,
                inputs_NR,
                negatives_R,
                cross_MR,
                single_MR,
                reduction or Reduction(),
                sums,
            )

    def _sum_micro_batch(
        self,
        batch: Batch,
        micro_batch: MicroBatch,
        inputs_NR: Tensor,
        negatives_R: Tensor,
        gate_D: Tensor | None,
    ) -> "_Sums":
        """What the losses need of a micro-batch. It changes nothing: backward calls it once more."""
        cross_MR, single_MR = self._outputs(micro_batch, inputs_NR, gate_D)
        items = _ItemVectors(inputs_NR, negatives_R)
        with torch.autocast(inputs_NR.device.type, enabled=False):
            return self._sum_losses(
                batch, micro_batch, items, cross_MR, single_MR
            )

    def _outputs(
        self,
        micro_batch: MicroBatch,
        inputs_NR: Tensor,
        gate_D: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Y^cross and Y^single, (M, r) each; None without a single-domain task."""
        with self._autocast(inputs_NR):
            cross_MR = self._cross_outputs(micro_batch.cross, inputs_NR, gate_D)
            single_MR = None
            if self.both_tasks:
                single_MR = self._single_outputs(
                    micro_batch.single, inputs_NR, gate_D
                )
                single_MR = single_MR.to(inputs_NR.dtype)
        return cross_MR.to(inputs_NR.dtype), single_MR

    def _predict(self, query: Query, rows: Tensor) -> Tensor:
        """Y^cross at each user's newest token, mixed with the domain's Y^single, (B, D, r)."""
        with self._autocast(rows):
            inputs_NR = rows[: query.interactions]
            cross_MR = self._cross_outputs(query.cross, inputs_NR)
            return self._mix_predictions(query, inputs_NR, cross_MR)

    def _mix_predictions(
        self,
        query: Query,
        inputs_NR: Tensor,
        cross_MR: Tensor,
    ) -> Tensor:
        """The predictions from Y^cross, (B, D, r)."""
        dtype = inputs_NR.dtype
        cross_BR = self._scoring(
            query.cross,
            cross_MR.to(dtype),
            query.newest_B,
        )
        cross_BDR = cross_BR.unsqueeze(1).expand(-1, self.domains, -1)
        if not self.config.predicts_by_both:
            return cross_BDR
        view = cast(View, query.single)
        single_MR = self._single_outputs(view, inputs_NR).to(dtype)
        newest_BD = cast(Tensor, query.newest_DB).T.flatten()
        single_BDR = self._scoring(view, single_MR, newest_BD)
        single_BDR = single_BDR.view_as(cross_BDR)
        gap = cast(GapAverage, self.gap)
        weight_D1 = gap.single_weight_D.to(dtype).unsqueeze(1)
        return torch.lerp(cross_BDR, single_BDR, weight_D1)

    def _autocast(self, rows: Tensor) -> torch.autocast:
        # No cache of cast weights: stacks run with and without a graph, and ZeRO 3 takes weights
        # apart in between.
        bf16 = self.config.precision == "bf16"
        return torch.autocast(
            rows.device.type,
            torch.bfloat16,
            enabled=bf16,
            cache_enabled=False,
        )

    def tokens(self, view: View, inputs_NR: Tensor) -> Tensor:
        """The inputs of a view's tokens, (M, r)."""
        x_MR = self.embedding(view, inputs_NR)
        if self.clock is None:
            return x_MR
        return x_MR + self.clock.encode_tokens(view.target_time_M, view.gap_M)

    def _scoring(
        self,
        view: View,
        output_MR: Tensor,
        token_L: Tensor,
    ) -> Tensor:
        """What items are scored with at some tokens, (L, r).

        It is the output, and what the clock adds for the time for which the token predicts.
        """
        output_LR = output_MR.index_select(0, token_L)
        if self.clock is None:
            return output_LR
        time_L = view.target_time_M.index_select(0, token_L)
        return output_LR + self.clock.encode_outputs(time_L)

    def _cross_outputs(
        self, view: View, inputs_NR: Tensor, gate_D: Tensor | None = None
    ) -> Tensor:
        """Y^cross of eq. 4, (M, r). gate_D: of `_gates`."""
        x_MR = self.tokens(view, inputs_NR)
        experts = self._run_experts(
            x_MR,
            view,
            self.cross_experts,
            self.single_experts,
            _gates_of_targets(view, gate_D),
        )
        weights_MK = self.cross_gate(x_MR, view, slice(None))
        return self.cross_tower(mix(weights_MK, experts))

    def _single_outputs(
        self, view: View, inputs_NR: Tensor, gate_D: Tensor | None = None
    ) -> Tensor:
        """Y^single of eq. 2, domain after domain, (M, r). gate_D: of `_gates`."""
        x_MR = self.tokens(view, inputs_NR)
        experts = self._run_experts(
            x_MR,
            view,
            self.single_experts,
            self.cross_experts,
            _gates_of_tasks(_lengths_of(view.task_starts), gate_D),
        )
        mixed_MR = mix(self.single_gates(x_MR, view), experts)
        return self.single_towers(mixed_MR, view.task_starts)

    def _run_experts(
        self,
        x_MR: Tensor,
        view: View,
        live: nn.Module | None,
        stopped: nn.Module | None,
        gate_M: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Outputs of experts 1..j and of j+1..K.

        A stopped expert builds no graph: SG of eq. 2 and 4, to the bit. With a gate it has one, and
        its gradient at each token is multiplied by the gate.
        """
        if not self.decoupled:
            return (self.cross_experts(x_MR, view.attention),)
        live_KMR = cast(nn.Module, live)(x_MR, view.attention)
        with torch.set_grad_enabled(gate_M is not None):
            stopped_KMR = cast(nn.Module, stopped)(x_MR, view.attention)
        if gate_M is not None:
            stopped_KMR = scale_gradient(stopped_KMR, gate_M)
        if live is self.cross_experts:
            return live_KMR, stopped_KMR
        return stopped_KMR, live_KMR

    def _gates(self) -> Tensor | None:
        """By domain, how much of the gradient passes between the tasks' experts, (D,).

        None where the paper's stop-gradient holds, or nothing is trained. Taken before the batch's
        gaps are: a micro-batch that backward computes anew has the same.
        """
        if self.config.stop_gradient != "harm" or not torch.is_grad_enabled():
            return None
        return self._harm_gap.unharmed_D

    @property
    def _harm_gap(self) -> GapAverage:
        """The gap that says who is harmed: of what is predicted."""
        return cast(GapAverage, self.gap_of_mean or self.gap)

    def _sum_losses(
        self,
        batch: Batch,
        micro_batch: MicroBatch,
        items: "_ItemVectors",
        cross_MR: Tensor,
        single_MR: Tensor | None,
    ) -> "_Sums":
        """What the losses need of a micro-batch, from the outputs of both views.

        single_MR: None without a single-domain task; its sums are then 0.
        """
        view = micro_batch.cross
        cross_L = self._prediction_losses(
            batch, micro_batch, view, items, cross_MR
        )
        cross_sums = _sum_by_domain(view, cross_L)
        single_sums = torch.zeros_like(cross_sums)
        if self.both_tasks:
            view = micro_batch.single
            single_L = self._prediction_losses(
                batch, micro_batch, view, items, cast(Tensor, single_MR)
            )
            single_sums = _sum_by_domain(view, single_L)
        pooled = None
        if self.mutual_information is not None:
            pooled = self._pool(micro_batch, cross_MR, cast(Tensor, single_MR))
        # Without gradient, and last: where backward computes the rest anew it stops before them.
        mean_D = self._gap_sums_of_mean(
            batch, micro_batch, items, cross_MR, single_MR
        )
        coalition_C = self._coalition_sums(batch, micro_batch, items)
        return _Sums(single_sums, cross_sums, mean_D, coalition_C, pooled)

    def _compute_losses(
        self,
        batch: Batch,
        micro_batch: MicroBatch,
        inputs_NR: Tensor,
        negatives_R: Tensor,
        cross_MR: Tensor,
        single_MR: Tensor | None,
        reduction: Reduction,
        earlier: "Sequence[_Sums]" = (),
    ) -> tuple[Tensor, LossReport]:
        """Eq. 18 from the outputs of both views, of the batch's last micro-batch.

        single_MR: None without a single-domain task. earlier: of the micro-batches before it.
        """
        items = _ItemVectors(inputs_NR, negatives_R)
        last = self._sum_losses(batch, micro_batch, items, cross_MR, single_MR)
        sums = _join([*earlier, last])
        # In flight while SC-MIM is computed: what λ and the means need of the other ranks.
        local = torch.cat(
            [*sums.single_4D, *sums.cross_4D, sums.mean_D, sums.coalition_C]
        )
        wait = reduction.start_sum(local.detach().double())
        information_D = self._mutual_information(batch, sums, reduction)
        totals = _Totals(wait(), self.domains, len(sums.mean_D))
        phi_D = transfer_gap(
            totals.single_gap,
            totals.cross_gap,
            totals.comparable,
        )
        self._observe_gap(totals, phi_D)
        lambda_D = self._weigh_domains(totals, phi_D, cross_MR)
        loss, report = self._weigh_losses(
            sums, totals, phi_D, lambda_D, information_D, reduction.world_size
        )
        return loss.to(inputs_NR.dtype), report

    def _weigh_losses(
        self,
        sums: "_Sums",
        totals: "_Totals",
        phi_D: Tensor,
        lambda_D: Tensor,
        information_D: Tensor,
        scale: int,
    ) -> tuple[Tensor, LossReport]:
        """Eq. 18 with its weights, float64. scale: the number of ranks."""
        single_targets = totals.single_targets.sum().clamp(min=1)
        cross_targets = totals.cross_targets.sum().clamp(min=1)
        single_sum = sums.single_4D[0].sum()
        cross_sum = (lambda_D * sums.cross_4D[0]).sum()
        loss_single = scale * single_sum / single_targets
        loss_cross = scale * cross_sum / cross_targets
        information = information_D.sum()
        eta = self.config.eta if self.mutual_information is not None else 1.0
        loss = (
            eta * (loss_single + loss_cross) - (1 - eta) * scale * information
        )
        return loss, self._report(totals, phi_D, lambda_D, information)

    def _observe_gap(self, totals: "_Totals", phi_D: Tensor) -> None:
        """Takes in the batch's gaps where something follows: φ, and that of both views' mean."""
        if self.gap is None or not self.training:
            return
        self.gap.observe(phi_D, totals.present)
        if self.gap_of_mean is None:
            return
        gap_D = transfer_gap(
            totals.single_gap,
            totals.mean_gap,
            totals.comparable,
        )
        self.gap_of_mean.observe(gap_D, totals.present)

    def _weigh_domains(
        self,
        totals: "_Totals",
        phi_D: Tensor,
        like: Tensor,
    ) -> Tensor:
        """λ of the batch, (D,); ones like `like` where no loss correction is set."""
        if len(totals.coalitions):
            all_targets = totals.cross_targets.sum().clamp(min=1)
            present_D = totals.cross_targets > 0
            correction = cast(ShapleyCorrection, self.correction)
            return correction(totals.coalitions / all_targets, present_D)
        if self.correction is not None:
            return self.correction(phi_D, totals.present)
        if self.config.loss_correction == "harm":
            return self._harm_gap.lambda_D
        return like.new_ones(self.domains)

    @property
    def loss_weights_D(self) -> Tensor | None:
        """λ as training has left it, (D,); None without loss correction."""
        if self.correction is not None:
            return self.correction.lambda_D
        if self.config.loss_correction == "harm":
            return self._harm_gap.lambda_D
        return None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Takes the mean gap of an earlier version, whose noise begins anew."""
        if prefix + _OLD_GAP in state_dict and self.gap is not None:
            sums_2D = state_dict.pop(prefix + _OLD_GAP)
            state_dict[f"{prefix}gap.sums_2D"] = sums_2D
            noise_3D = torch.zeros_like(self.gap.noise_3D)
            state_dict[f"{prefix}gap.noise_3D"] = noise_3D
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _report(
        self,
        totals: "_Totals",
        phi_D: Tensor,
        lambda_D: Tensor,
        information: Tensor,
    ) -> LossReport:
        """The step's report, with NaN for what the cross-domain task alone has not."""
        single_D = totals.single_loss / totals.single_targets.clamp(min=1)
        cross_D = totals.cross_loss / totals.cross_targets.clamp(min=1)
        single_targets = totals.single_targets.sum().clamp(min=1)
        cross_targets = totals.cross_targets.sum().clamp(min=1)
        detached_D = lambda_D.detach()
        single_or_nan = 1.0 if self.both_tasks else _NAN
        lambda_or_nan = single_or_nan if self.correction is None else 1.0
        loss_single = single_or_nan * totals.single_loss.sum() / single_targets
        loss_cross = (detached_D * totals.cross_loss).sum() / cross_targets
        return LossReport(
            single_D=single_D.masked_fill(totals.single_targets == 0, _NAN),
            cross_D=cross_D.masked_fill(totals.cross_targets == 0, _NAN),
            loss_single=loss_single,
            loss_cross=loss_cross,
            phi_D=phi_D.masked_fill(~totals.present, _NAN),
            lambda_D=lambda_or_nan * detached_D,
            single_targets_D=totals.single_targets,
            cross_targets_D=totals.cross_targets,
            mutual_information=information.detach(),
        )

    def _coalition_sums(
        self,
        batch: Batch,
        micro_batch: MicroBatch,
        items: "_ItemVectors",
    ) -> Tensor:
        """This rank's sum of cross-domain losses with the items of each coalition of domains.

        (2^D,); none without Shapley.
        """
        if self.config.loss_correction != "shapley":
            return items.inputs_NR.new_zeros(0)

        view = micro_batch.cross

        def loss_of(shown_NR: Tensor) -> Tensor:
            with self._autocast(shown_NR):
                cross_MR = self._cross_outputs(view, shown_NR)
                cross_MR = cross_MR.to(shown_NR.dtype)
            loss_L = self._prediction_losses(
                batch, micro_batch, view, items, cross_MR
            )
            return (loss_L * view.target_weight_L).double().sum()

        return coalition_losses(self, micro_batch, items.inputs_NR, loss_of)

    @torch.no_grad()
    def _gap_sums_of_mean(
        self,
        batch: Batch,
        micro_batch: MicroBatch,
        items: "_ItemVectors",
        cross_MR: Tensor,
        single_MR: Tensor | None,
    ) -> Tensor:
        """This rank's sums of the losses by the mean of both views, over comparable targets, (D,).

        None unless harm is measured by it.
        """
        if not self.config.compares_mean or not self.training:
            return cross_MR.new_zeros(0)
        view = micro_batch.cross
        cross_LR = self._scoring(view, cross_MR, view.target_token_L)
        single = micro_batch.single
        single_LR = self._scoring(
            single, cast(Tensor, single_MR), single.target_token_L
        )
        # Of a target that the single-domain view lacks it is some other, which does not count.
        target_N = torch.zeros(
            micro_batch.interactions,
            dtype=torch.int64,
            device=cross_MR.device,
        )
        number_L = torch.arange(len(single_LR), device=cross_MR.device)
        target_N = target_N.index_copy(0, single.target_interaction_L, number_L)
        target_L = target_N.index_select(0, view.target_interaction_L)
        mean_LR = (cross_LR + single_LR.index_select(0, target_L)) / 2
        loss_L = self._losses_of_predictions(
            batch, micro_batch, view, items, mean_LR
        )
        return _sum_by_domain(view, loss_L)[2]

    def _prediction_losses(
        self,
        batch: Batch,
        micro_batch: MicroBatch,
        view: View,
        items: "_ItemVectors",
        output_MR: Tensor,
    ) -> Tensor:
        """The loss of each of the view's targets (eq. 8 or 9), (L,)."""
        predicted_LR = self._scoring(view, output_MR, view.target_token_L)
        return self._losses_of_predictions(
            batch, micro_batch, view, items, predicted_LR
        )

    def _losses_of_predictions(
        self,
        batch: Batch,
        micro_batch: MicroBatch,
        view: View,
        items: "_ItemVectors",
        predicted_LR: Tensor,
    ) -> Tensor:
        """The loss of each of the view's targets, by what items are scored with for it, (L,)."""
        target_LR = items.inputs_NR.index_select(0, view.target_interaction_L)
        positive_L = (predicted_LR * target_LR).sum(1)
        lengths = _lengths_of(view.target_starts)
        if batch.negatives is None:
            return self._losses_of_shared(
                batch,
                micro_batch,
                view,
                items,
                predicted_LR,
                positive_L,
                lengths,
            )
        own_NnR = items.negatives_R.view(
            micro_batch.interactions,
            batch.negatives,
            -1,
        )
        own_LnR = own_NnR.index_select(0, view.target_interaction_L)
        # Not a product of matrices: for each target it is one row.
        negative_Ln = (predicted_LR.unsqueeze(1) * own_LnR).sum(2)
        item_counts = []
        for length, count in zip(lengths, batch.domain_items, strict=True):
            item_counts.append(positive_L.new_full((length, 1), count))
        return prediction_loss(
            self.config.loss,
            positive_L,
            negative_Ln,
            None,
            torch.cat(item_counts),
        )

    def _losses_of_shared(
        self,
        batch: Batch,
        micro_batch: MicroBatch,
        view: View,
        items: "_ItemVectors",
        predicted_LR: Tensor,
        positive_L: Tensor,
        lengths: list[int],
    ) -> Tensor:
        """The losses of targets against the negatives that their domain shares, (L,)."""
        negative_lengths = _lengths_of(batch.negative_starts)
        shared = items.negatives_R.split(negative_lengths)
        shared_rows = batch.inverse[batch.interactions :].split(
            negative_lengths
        )
        row_N = batch.inverse.narrow(
            0, micro_batch.first_interaction, micro_batch.interactions
        )
        target_row_L1 = row_N.index_select(
            0, view.target_interaction_L
        ).unsqueeze(1)
        target_rows = target_row_L1.split(lengths)
        scores_Ln = grouped_linear(predicted_LR, view.target_starts, shared)
        allowed_Ln = torch.zeros_like(scores_Ln, dtype=torch.bool)
        allowed = allowed_Ln.split(lengths)
        item_counts = []
        for domain, item_count in enumerate(batch.domain_items):
            rows = shared_rows[domain]
            torch.ne(
                rows,
                target_rows[domain],
                out=allowed[domain].narrow(1, 0, len(rows)),
            )
            count_L1 = positive_L.new_full((lengths[domain], 1), item_count)
            item_counts.append(count_L1)
        return prediction_loss(
            self.config.loss,
            positive_L,
            scores_Ln,
            allowed_Ln,
            torch.cat(item_counts),
        )

    def _pool(
        self,
        micro_batch: MicroBatch,
        cross_MR: Tensor,
        single_MR: Tensor,
    ) -> "_Pooled":
        """Both views of a micro-batch's users, as SC-MIM compares them."""
        users = micro_batch.users
        single_BDR, single_count_BD = pool(
            single_MR,
            micro_batch.single,
            users,
            self.domains,
        )
        cross_BDR, cross_count_BD = pool(
            cross_MR,
            micro_batch.cross,
            users,
            self.domains,
        )
        in_both_BD = (single_count_BD > 0) & (cross_count_BD > 0)
        return _Pooled(single_BDR, cross_BDR, in_both_BD)

    def _mutual_information(
        self,
        batch: Batch,
        sums: "_Sums",
        reduction: Reduction,
    ) -> Tensor:
        """This rank's share of the domains' bounds (eq. 16), (D,).

        Each is a mean over the users of the global batch.
        """
        if self.mutual_information is None:
            return sums.cross_4D.new_zeros(self.domains)
        pooled = cast(_Pooled, sums.pooled)
        single_BDR = pooled.single_BDR
        cross_BDR = pooled.cross_BDR
        users = len(batch.weight_B)
        has_weight_B1 = (batch.weight_B > 0).unsqueeze(1)
        present_BD = pooled.in_both_BD & has_weight_B1
        position_B = torch.arange(users, device=present_BD.device)
        candidates_GDR = single_BDR
        present_GD = present_BD
        sample = None
        of_this_rank = self.config.mutual_information_negatives == "rank"
        if not of_this_rank:
            if batch.candidates is not None:
                sample = self._collect_sample(
                    batch.candidates,
                    single_BDR,
                    present_BD,
                    reduction,
                )
            else:
                candidates_GDR = reduction.gather(single_BDR)
                present_GD = reduction.gather(present_BD)
                position_B = position_B + reduction.rank * users
        sum_D, count_D = self.mutual_information(
            cross_BDR,
            candidates_GDR,
            present_BD,
            present_GD,
            position_B,
            sample,
        )
        if of_this_rank:
            count_D = count_D * reduction.world_size
        return sum_D / count_D.clamp(min=1)

    def _collect_sample(
        self,
        candidates: Candidates,
        single_BDR: Tensor,
        present_BD: Tensor,
        reduction: Reduction,
    ) -> Sample:
        """The candidates' single-domain views from all ranks, and each domain's number of users."""
        slots = self.domains * candidates.size
        slot_C = candidates.slot_C
        position_C = candidates.place_C
        present_S = present_BD.flatten().double()
        shown = torch.zeros(
            slots,
            dtype=torch.float64,
            device=present_BD.device,
        )
        shown = shown.index_copy(
            0,
            position_C,
            present_S.index_select(0, slot_C),
        )
        wait = reduction.start_sum(
            torch.cat([shown, present_BD.sum(0).double()])
        )
        values_CR = single_BDR.flatten(0, 1).index_select(0, slot_C)
        single_NR = reduction.collect(values_CR, position_C, slots)
        nowhere_S = torch.full_like(present_S, -1, dtype=torch.int64)
        position_BD = nowhere_S.index_copy(
            0,
            slot_C,
            position_C % candidates.size,
        )
        shown, count_D = wait().split([slots, self.domains])
        return Sample(
            single_DNR=single_NR.view(self.domains, candidates.size, -1),
            present_DN=shown.view(self.domains, -1) > 0,
            position_DB=position_BD.view(-1, self.domains).T,
            count_D=count_D.long(),
        )


@dataclass(frozen=True)
class _ItemVectors:
    """Vectors of a batch's interactions, (N, r), and of its negatives."""

    inputs_NR: Tensor
    negatives_R: Tensor


@dataclass(frozen=True)
class _Pooled:
    """The views that SC-MIM compares, (B, D, r) each. in_both_BD: bool, who has tokens in both."""

    single_BDR: Tensor
    cross_BDR: Tensor
    in_both_BD: Tensor


@dataclass(frozen=True)
class _Sums:
    """What the losses need of a micro-batch, or of all of them: on this rank.

    single_4D, cross_4D: `_sum_by_domain` of both views. mean_D: of `_gap_sums_of_mean`.
    coalition_C: of `_coalition_sums`. pooled: None without SC-MIM.
    """

    single_4D: Tensor
    cross_4D: Tensor
    mean_D: Tensor
    coalition_C: Tensor
    pooled: _Pooled | None


def _join(sums: Sequence[_Sums]) -> _Sums:
    """The sums over micro-batches, and the pooled views of all their users."""
    if len(sums) == 1:
        return sums[0]
    pooled = None
    of_parts = [cast(_Pooled, one.pooled) for one in sums]
    if sums[0].pooled is not None:
        pooled = _Pooled(
            torch.cat([one.single_BDR for one in of_parts]),
            torch.cat([one.cross_BDR for one in of_parts]),
            torch.cat([one.in_both_BD for one in of_parts]),
        )
    return _Sums(
        torch.stack([one.single_4D for one in sums]).sum(0),
        torch.stack([one.cross_4D for one in sums]).sum(0),
        torch.stack([one.mean_D for one in sums]).sum(0),
        torch.stack([one.coalition_C for one in sums]).sum(0),
        pooled,
    )


def _split_rows(
    batch: Batch, rows: Tensor
) -> list[tuple[MicroBatch, Tensor, Tensor]]:
    """Each micro-batch with the vectors of its interactions and of its negatives.

    Shared negatives are all micro-batches' own.

    Example: 5 interactions in micro-batches of 2 and 3, two negatives each, `rows` without r:

        rows      tensor([a, b,   c, d, e,   f, g, h, i,   j, k, l, m, n, o])
        result    (…, [a, b], [f, g, h, i]), (…, [c, d, e], [j, k, l, m, n, o])
    """
    lengths = [one.interactions for one in batch.micro_batches]
    if batch.negatives is None:
        sizes = [*lengths, len(rows) - batch.interactions]
    else:
        sizes = lengths + [batch.negatives * length for length in lengths]
    # One split: the gradient of each is a whole tensor.
    pieces = rows.split(sizes)
    inputs = pieces[: len(lengths)]
    negatives = pieces[len(lengths) :]
    if batch.negatives is None:
        negatives = len(lengths) * negatives
    return list(zip(batch.micro_batches, inputs, negatives, strict=True))


class _Totals:
    """Sums over the global batch, float64: what `_sum_by_domain` gives of both views, (D,) each.

    single_loss, single_targets: weighted losses and weights of the single-domain view's targets.
    single_gap, comparable: the same of those targets that both views predict. cross_…: the same of
    the cross-domain view. present: bool, which domains have a comparable target. mean_gap: the
    same as single_gap by the mean of both views, or none. coalitions: loss sums by coalition, (C,).
    """

    def __init__(self, sums: Tensor, domains: int, of_mean: int):
        size = 2 * _SUMS * domains
        coalitions = len(sums) - size - of_mean
        sizes = [size, of_mean, coalitions]
        by_view, self.mean_gap, self.coalitions = sums.split(sizes)
        single_4D, cross_4D = by_view.view(2, _SUMS, domains)
        (
            self.single_loss,
            self.single_targets,
            self.single_gap,
            self.comparable,
        ) = single_4D
        self.cross_loss, self.cross_targets, self.cross_gap, _ = cross_4D
        self.present = self.comparable > 0


def select_decayed_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay is for.

    These are the projections and what stands for items, positions and times. Not biases, not what
    a LayerNorm scales and shifts by, and not α and β of eq. 11: 0 is no better value for them.
    """
    names = set()
    for module_name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm | GroupLayerNorm | LossCorrection):
            continue
        for name, _ in module.named_parameters(recurse=False):
            if not _UNDECAYED.match(name):
                names.add(f"{module_name}.{name}" if module_name else name)
    return names


def mix(weights_MK: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """f of eq. 2 and 4: Σ_k g_k f_k, (M, r).

    weights_MK: of all experts. experts: the stacks' outputs, (K_1, M, r), (K_2, M, r), …

    Example: two tokens, stacks of two experts and of one, r = 1:

        weights_MK    tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]])
        experts       tensor([[1, 2], [3, 4]]) and tensor([[5, 6]]), without r
        result        tensor([2.0, 5.6]), without r
    """
    if weights_MK.shape[1] == 1:  # its weight is 1
        return experts[0][0]
    weights = weights_MK.split([len(output) for output in experts], dim=1)
    # Not a product of matrices: for each token it is one row, and the call takes longer than the
    # arithmetic.
    total: Tensor | int = 0
    for weight_MK, output_KMR in zip(weights, experts, strict=True):
        weight_KM1 = weight_MK.T.unsqueeze(2).to(output_KMR.dtype)
        total = total + (weight_KM1 * output_KMR).sum(0)
    return cast(Tensor, total)


def _gates_of_tasks(lengths: list[int], gate_D: Tensor | None) -> Tensor | None:
    """What of each domain's own task may train experts 1..j, by token of its view, (M,).

    lengths: the tasks' tokens. gate_D: of `SyNCRec._gates`.

    Example: two domains, the second of them harmed, 3 and 2 tokens:

        gate_D    tensor([1.0, 0.1])
        result    tensor([1.0, 1.0, 1.0, 0.1, 0.1])
    """
    if gate_D is None:
        return None
    gates = []
    for gate, length in zip(gate_D, lengths, strict=True):
        gates.append(gate.expand(length))
    return torch.cat(gates)


def _gates_of_targets(view: View, gate_D: Tensor | None) -> Tensor | None:
    """What of the cross-domain task may train experts j+1..K, by token, (M,).

    It is the gate of the domain whose item the token predicts. None as in `_gates_of_tasks`.
    """
    if gate_D is None:
        return None
    gate_L = gate_D.index_select(0, view.target_domain_L)
    ones_M = gate_D.new_ones(len(view.input_M))
    return ones_M.index_copy(0, view.target_token_L, gate_L)


def _lengths_of(starts: Sequence[int]) -> list[int]:
    """The lengths of jagged rows from their offsets."""
    return [end - start for start, end in pairwise(starts)]


def _sum_by_domain(view: View, loss_L: Tensor) -> Tensor:
    """Four sums over each domain's targets, float64 (4, D).

    Weighted loss, weight, and both over the targets that the other view predicts too. In float32 a
    sum of 200 thousand losses is off by 4e-6, and φ is a small difference of two of them.

    Example: three targets, one of the second domain:

        view.target_domain_L    tensor([0, 0, 1])
        view.target_weight_L    tensor([1.0, 0.5, 1.0])
        view.comparable_L       tensor([True, False, True])
        loss_L                  tensor([0.6, 0.4, 0.9])
        result                  tensor([[0.8, 0.9], [1.5, 1.0], [0.6, 0.9], [1.0, 1.0]])
    """
    domains = len(view.target_starts) - 1
    weight_L = view.target_weight_L.to(loss_L.dtype)
    shared_L = weight_L * view.comparable_L
    columns = [
        loss_L * weight_L,
        weight_L,
        loss_L.detach() * shared_L,
        shared_L,
    ]
    terms_L4 = torch.stack(columns, dim=1).double()
    zeros_D4 = terms_L4.new_zeros(domains, _SUMS)
    return zeros_D4.index_add(0, view.target_domain_L, terms_L4).T
