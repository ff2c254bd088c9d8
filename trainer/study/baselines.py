"""What stands in a study's table: SyNCRec, the same without one part, and its opponents, as settings over one base."""

from dataclasses import dataclass

OURS, ALONE, POPULARITY = "SyNCRec", "SDSR", "popularity"
_SHARED = (
    "model.stop_gradient=off",
    "model.loss_correction=none",
    "model.mutual_information=off",
)
_CROSS = ("model.tasks=cross", *_SHARED)
_ONE = (*_CROSS, "model.experts=1", "model.tower=off")
_UNTIMED = ("model.time_knots=0",)
# 1 would weigh all alike: the values are differences of losses. 0.05 is CGRec's own.
_SHAPLEY = ("model.loss_correction=shapley", "model.correction_temperature=0.05")
_GRU = ("model.encoder=gru", "model.blocks=1", "model.heads=1", "model.kernel=auto")


@dataclass(frozen=True)
class System:
    """What is trained under a name.

    settings: over the base, `key=value` as launch/train.py takes them. by_domain: a model of each domain alone. variant:
    SyNCRec without one part. work: of a run, about, beside SyNCRec's.
    """

    name: str
    about: str
    settings: tuple[str, ...] = ()
    by_domain: bool = False
    variant: bool = False
    work: float = 1.0


SYSTEMS = {
    system.name: system
    for system in (
        System(OURS, "the base itself"),
        System(
            "w/o LC-NTG",
            "domains' losses weigh alike",
            ("model.loss_correction=none",),
            variant=True,
        ),
        System(
            "w/o SC-MIM",
            "no mutual information of both views",
            ("model.mutual_information=off",),
            variant=True,
        ),
        System(
            "w/o stop-gradient",
            "every expert learns from both tasks",
            ("model.stop_gradient=off",),
            variant=True,
        ),
        System(
            ALONE,
            "the same experts, gate and tower for each domain by itself",
            _CROSS,
            by_domain=True,
            work=0.3,
        ),
        System(
            "w/o time",
            "the order of interactions alone, as in the paper",
            _UNTIMED,
            variant=True,
        ),
        System(
            "CDSR",
            "the same experts, gate and tower over the merged history, nothing corrected",
            _CROSS,
            work=0.4,
        ),
        System(
            "MMoE",
            "the same experts for both tasks, a gate and a tower for each, nothing decoupled or corrected",
            (*_SHARED, *_UNTIMED),
        ),
        System("MMoE, timed", "the same, told when", _SHARED),
        System(
            "CGRec",
            "domains' losses by their Shapley values",
            (*_SHAPLEY, *_UNTIMED),
            work=3.0,
        ),
        System(
            "SASRec",
            "one expert, no tower, over the merged history",
            (*_ONE, *_UNTIMED),
            work=0.2,
        ),
        System("SASRec, timed", "the same, told when", _ONE, work=0.2),
        System(
            "GRU4Rec",
            "one GRU, no tower, over the merged history",
            (*_ONE, *_UNTIMED, *_GRU),
            work=0.2,
        ),
    )
}
