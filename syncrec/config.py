"""What the model is, as values: every reading of the paper that measures differently is one."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal


def _setting(default: Any, help: str, on_warm_start: bool = False) -> Any:
    """A field of ModelConfig. on_warm_start: a run that warm-starts may have another value.

    No setting of the model may change when a run is resumed.
    """
    metadata = {
        "help": help,
        "on_resume": False,
        "on_warm_start": on_warm_start,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """SyNCRec's architecture and losses (section 4 of the paper). Equations are the paper's.

    Raises ValueError for a value that no model has, and for values that exclude each other.
    """

    dim: int = _setting(
        128, "r, the width of item vectors and of everything else"
    )
    max_length: int = _setting(128, "T, tokens kept of a sequence")
    tasks: Literal["both", "cross"] = _setting(
        "both",
        "cross: the cross-domain task alone; with one expert and no tower, SASRec",
    )
    time_knots: int = _setting(
        128,
        "knots of the vectors of time, from the logs' first time to the last; 1: the time between "
        "interactions alone; 0: order alone",
        on_warm_start=True,
    )
    experts: int = _setting(5, "K")
    cross_experts: int = _setting(
        3,
        "j: experts 1..j learn from the cross-domain task, the others from the single-domain tasks",
    )
    stop_gradient: bool | str = _setting(
        True,
        "whether experts learn from one task alone; off: from both (the paper's variant C); harm: "
        "from both, as far as a domain is not harmed",
    )
    encoder: Literal["transformer", "gru"] = _setting(
        "transformer", "what an expert is; gru: GRU4Rec's, without positions"
    )
    blocks: int = _setting(
        2, "attention blocks of an expert, or its GRU's layers"
    )
    heads: int = _setting(1, "heads of an expert's attention")
    ffn_dim: int = _setting(
        128,
        "inner width of a Transformer's and a tower's feed-forward network (eq. 7 has r)",
    )
    norm: Literal["post", "pre"] = _setting(
        "post",
        "a Transformer's LayerNorm after the residual sum, or before each sub-layer",
    )
    dropout: float = _setting(
        0.1,
        "share of elements that dropout clears",
        on_warm_start=True,
    )
    tower: bool = _setting(
        True, "false: what the experts give, mixed, is the output"
    )
    gate: Literal["token", "sequence"] = _setting(
        "token", "sequence: eq. 3 literally; it sees later items"
    )
    loss: Literal["bpr_probability", "bpr", "bce", "sampled_softmax"] = (
        _setting(
            "sampled_softmax",
            "next-item loss; bpr_probability: eq. 8, 9",
            on_warm_start=True,
        )
    )
    loss_correction: Literal[
        "negative_transfer_gap", "harm", "shapley", "none"
    ] = _setting(
        "negative_transfer_gap",
        "where λ comes from; harm: 1, and less where a domain is harmed; shapley: CGRec's, 2^D more "
        "forward passes a step; none: variant A",
    )
    harm_temperature: float = _setting(
        0.1,
        "of what follows from harm, in the loss's units: this much harm divides it by e",
        on_warm_start=True,
    )
    correction_temperature: float = _setting(
        1.0,
        "δ of eq. 11, and of shapley's softmax",
        on_warm_start=True,
    )
    correction_total: Literal["one", "domains"] = _setting(
        "domains",
        "Σ λ; domains: D, so that equal weights are all 1; one: eq. 11",
    )
    learn_scales: bool = _setting(
        False,
        "whether α and β of eq. 11 learn",
        on_warm_start=True,
    )
    prediction: Literal["cross", "both"] = _setting(
        "both",
        "what a domain's items are scored with; cross: Y^cross, as in the paper; both: the mean of "
        "Y^cross and the domain's own Y^single, weighed by its negative transfer gap",
    )
    prediction_temperature: float = _setting(
        0.3,
        "of that weight, in the loss's units",
        on_warm_start=True,
    )
    mutual_information: bool = _setting(False, "SC-MIM; false: variant B")
    mutual_information_pooling: Literal["mean", "last"] = _setting(
        "mean",
        "which of a domain's tokens stand for it in SC-MIM",
        on_warm_start=True,
    )
    mutual_information_similarity: Literal["sigmoid", "cosine"] = _setting(
        "sigmoid",
        "sigmoid: eq. 17",
        on_warm_start=True,
    )
    mutual_information_temperature: float = _setting(
        1.0,
        "what SC-MIM's similarities are divided by",
        on_warm_start=True,
    )
    mutual_information_negatives: int | str = _setting(
        4096,
        "whom a user is told apart from; a number: the users of all ranks, where there are more, "
        "that many of each domain, drawn by the seed and standing for all, so that memory does not "
        "grow with the ranks; global: all of them; rank: those of one's own",
        on_warm_start=True,
    )
    mutual_information_denominator: Literal["all", "others"] = _setting(
        "all",
        "all: eq. 14 and 15, others: eq. 16 as printed",
        on_warm_start=True,
    )
    eta: float = _setting(0.9, "η of eq. 18", on_warm_start=True)
    precision: Literal["fp32", "bf16"] = _setting(
        "fp32",
        "bf16: matrix products by autocast; weights, losses and λ stay fp32",
        on_warm_start=True,
    )
    kernel: Literal["auto", "fused", "plain"] = _setting(
        "auto",
        "of the experts on a CPU; auto: fused where a C++ compiler is at hand",
        on_warm_start=True,
    )
    init_std: float = _setting(
        0.02,
        "standard deviation of first embeddings",
        on_warm_start=True,
    )

    def __post_init__(self) -> None:
        self._check_stop_gradient()
        self._check_switches()
        self._check_sizes()
        if self.encoder == "gru":
            self._check_gru()
        if self.tasks == "cross":
            self._check_cross_task()
        self._check_negatives()
        self._check_numbers()

    def _check_stop_gradient(self) -> None:
        """The words on and off are the booleans; harm stays a word."""
        booleans = {"on": True, "off": False, "true": True, "false": False}
        value = self.stop_gradient
        if isinstance(value, str) and value.lower() in booleans:
            boolean = booleans[value.lower()]
            object.__setattr__(self, "stop_gradient", boolean)
        elif not isinstance(value, bool) and value != "harm":
            raise ValueError(
                f"model.stop_gradient is {value}: give on, off or harm"
            )

    def _check_switches(self) -> None:
        for name in (
            "tower",
            "learn_scales",
            "mutual_information",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"model.{name} is {value}: give true or false")

    def _check_sizes(self) -> None:
        for name in (
            "dim",
            "max_length",
            "experts",
            "blocks",
            "heads",
            "ffn_dim",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"model.{name} is {value}: give at least 1")
        if self.dim % self.heads:
            raise ValueError(
                f"model.dim {self.dim} is not divisible by model.heads {self.heads}"
            )
        if self.stop_gradient and not 0 < self.cross_experts < self.experts:
            raise ValueError(
                f"model.cross_experts is {self.cross_experts}: with stop_gradient on, both "
                f"tasks need experts of their own, so give 1 to {self.experts - 1} "
                "(model.experts - 1)"
            )

    def _check_gru(self) -> None:
        """Settings that are for attention alone have their defaults."""
        for name, default in (("heads", 1), ("norm", "post")):
            value = getattr(self, name)
            if value != default:
                raise ValueError(
                    f"model.{name} is {value}: model.encoder=gru has none, leave it at {default}"
                )
        if self.kernel == "fused":
            raise ValueError(
                "model.kernel is fused: it is for attention, and model.encoder=gru has none; "
                "use auto"
            )

    def _check_cross_task(self) -> None:
        """What needs the single-domain tasks is switched off without them."""
        stop_gradient = self.stop_gradient
        if isinstance(stop_gradient, bool):
            stop_gradient = "on" if stop_gradient else "off"
        values = {
            "stop_gradient": stop_gradient,
            "loss_correction": self.loss_correction,
            "mutual_information": "on" if self.mutual_information else "off",
        }
        for name, value in values.items():
            if value not in ("off", "none", "shapley"):
                allowed = "none" if name == "loss_correction" else "off"
                raise ValueError(
                    f"model.{name} is {value}: with model.tasks=cross there is no "
                    f"single-domain task, so set model.{name}={allowed}"
                )

    def _check_negatives(self) -> None:
        negatives = self.mutual_information_negatives
        if isinstance(negatives, str):
            valid = negatives in ("global", "rank")
        else:
            valid = negatives >= 2
        if not valid:
            raise ValueError(
                f"model.mutual_information_negatives is {negatives}: give global, rank, or a "
                "number of users, at least 2"
            )

    def _check_numbers(self) -> None:
        if self.time_knots < 0:
            raise ValueError(
                f"model.time_knots is {self.time_knots}: give 0 (times are not looked at), 1 (the "
                "time between interactions alone), or more"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"model.dropout is {self.dropout}: give 0 or more, and less than 1"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"model.eta is {self.eta}: give 0 to 1")
        for name in (
            "correction_temperature",
            "harm_temperature",
            "prediction_temperature",
            "mutual_information_temperature",
            "init_std",
        ):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"model.{name} is {value}: give more than 0")

    @property
    def mutual_information_candidates(self) -> int:
        """The users a domain that stand for more of them in SC-MIM; 0: nobody stands for others."""
        negatives = self.mutual_information_negatives
        if isinstance(negatives, int) and self.mutual_information:
            return negatives
        return 0

    @property
    def predicts_by_both(self) -> bool:
        """Whether both views make a prediction: without the single-domain task there is but one."""
        return self.prediction != "cross" and self.tasks == "both"

    @property
    def compares_mean(self) -> bool:
        """Whether harm is of the mean of both views, and not of the cross-domain view alone."""
        return self.predicts_by_both and self.follows_harm

    @property
    def follows_harm(self) -> bool:
        """Whether a loss or a gradient is corrected where a domain is harmed."""
        return "harm" in (self.loss_correction, self.stop_gradient)

    @property
    def measures_gap(self) -> bool:
        """Whether anything follows from the mean gap of earlier batches."""
        return self.predicts_by_both or self.follows_harm
