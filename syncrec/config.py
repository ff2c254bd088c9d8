"""What the model is, as values: every reading of the paper that measures differently is one of these."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """SyNCRec's architecture and losses (section 4 of the paper). Equations are the paper's."""

    dim: int = 128  # r, the width of item vectors and of everything else
    max_length: int = 128  # T, tokens kept of a sequence
    tasks: Literal["both", "cross"] = (
        "both"  # cross: the cross-domain task alone; with one expert and no tower, SASRec
    )
    time_knots: int = 0  # of the vectors of time (syncrec/layers/time_encoding.py), from the logs' first time to the last; 0: order alone
    experts: int = 5  # K
    cross_experts: int = 3  # j: experts 1..j learn from the cross-domain task, the others from the single-domain tasks
    stop_gradient: Literal["on", "off"] = (
        "on"  # off: every expert learns from both (the paper's variant C)
    )
    encoder: Literal["transformer", "gru"] = (
        "transformer"  # what an expert is; gru: GRU4Rec's, without positions
    )
    blocks: int = 2  # attention blocks of an expert, or its GRU's layers
    heads: int = 1
    ffn_dim: int = 128  # inner width of a Transformer's and a tower's feed-forward network (eq. 7 has r)
    norm: Literal["post", "pre"] = (
        "post"  # a Transformer's LayerNorm after the residual sum, or before each sub-layer
    )
    dropout: float = 0.1
    tower: Literal["on", "off"] = (
        "on"  # off: what the experts give, mixed, is the output
    )
    gate: Literal["token", "sequence"] = (
        "token"  # sequence: eq. 3 literally; it sees later items
    )
    loss: Literal["bpr_probability", "bpr", "bce", "sampled_softmax"] = (
        "sampled_softmax"  # bpr_probability: eq. 8, 9
    )
    # shapley: CGRec's, 2^D more forward passes a step (syncrec/losses/shapley.py); none: variant A.
    loss_correction: Literal["negative_transfer_gap", "shapley", "none"] = (
        "negative_transfer_gap"
    )
    correction_temperature: float = 1.0  # δ of eq. 11, and of shapley's softmax
    correction_total: Literal["one", "domains"] = (
        "one"  # Σ λ; one: eq. 11. domains: D, so that equal weights are all 1
    )
    learn_scales: bool = True  # α and β of eq. 11
    # What a domain's items are scored with. cross: Y^cross, as in the paper; both: the mean of Y^cross and the domain's own
    # Y^single, weighed by its negative transfer gap
    prediction: Literal["cross", "both"] = "both"
    prediction_temperature: float = 0.3  # of that weight, in the loss's units
    mutual_information: Literal["on", "off"] = "on"  # off: variant B
    mutual_information_pooling: Literal["mean", "last"] = "mean"
    mutual_information_similarity: Literal["sigmoid", "cosine"] = (
        "sigmoid"  # sigmoid: eq. 17
    )
    mutual_information_temperature: float = 1.0
    # Whom a user is told apart from. A number: the users of all ranks, where there are more that many of each domain, drawn
    # by the seed and standing for all; memory then does not grow with the ranks. global: all of them; rank: those of one's own
    mutual_information_negatives: int | str = 4096
    mutual_information_denominator: Literal["all", "others"] = (
        "all"  # all: eq. 14 and 15, others: eq. 16 as printed
    )
    eta: float = 0.9  # η of eq. 18
    precision: Literal["fp32", "bf16"] = (
        "fp32"  # bf16: matrix products by autocast; weights, losses and λ stay fp32
    )
    kernel: Literal["auto", "fused", "plain"] = (
        "auto"  # of the experts on a CPU: fused where a C++ compiler is at hand
    )
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("dim", "max_length", "experts", "blocks", "heads", "ffn_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}: give at least 1"
                )
        if self.dim % self.heads:
            raise ValueError(
                f"model.dim {self.dim} is not divisible by model.heads {self.heads}"
            )
        if self.stop_gradient == "on" and not 0 < self.cross_experts < self.experts:
            raise ValueError(
                f"model.cross_experts is {self.cross_experts}: with stop_gradient on, both tasks need experts of their "
                f"own, so give 1 to {self.experts - 1} (model.experts - 1)"
            )
        if self.encoder == "gru":
            for name, unused in (("heads", 1), ("norm", "post")):
                if getattr(self, name) != unused:
                    raise ValueError(
                        f"model.{name} is {getattr(self, name)}: model.encoder=gru has none, leave it at {unused}"
                    )
            if self.kernel == "fused":
                raise ValueError(
                    "model.kernel is fused: it is for attention, and model.encoder=gru has none; use auto"
                )
        if self.tasks == "cross":
            for name, only in (
                ("stop_gradient", "off"),
                ("loss_correction", "none"),
                ("mutual_information", "off"),
            ):
                if getattr(self, name) not in (only, "shapley"):
                    raise ValueError(
                        f"model.{name} is {getattr(self, name)}: with model.tasks=cross there is no single-domain task, so "
                        f"set model.{name}={only}"
                    )
        negatives = self.mutual_information_negatives
        if (
            negatives not in ("global", "rank")
            if isinstance(negatives, str)
            else negatives < 2
        ):
            raise ValueError(
                f"model.mutual_information_negatives is {negatives}: give global, rank, or a number of users, at least 2"
            )
        if self.time_knots < 0 or self.time_knots == 1:
            raise ValueError(
                f"model.time_knots is {self.time_knots}: give 0 (times are not looked at), or 2 and more"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"model.dropout is {self.dropout}: give 0 or more, and less than 1"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"model.eta is {self.eta}: give 0 to 1")
        for name in (
            "correction_temperature",
            "prediction_temperature",
            "mutual_information_temperature",
            "init_std",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)}: give more than 0"
                )

    @property
    def mutual_information_candidates(self) -> int:
        """The users a domain that stand for more of them in SC-MIM; 0: nobody stands for others."""
        negatives = self.mutual_information_negatives
        return (
            negatives
            if isinstance(negatives, int) and self.mutual_information == "on"
            else 0
        )

    @property
    def predicts_by_both(self) -> bool:
        """Whether both views make a prediction: without the single-domain task there is but one."""
        return self.prediction == "both" and self.tasks == "both"
