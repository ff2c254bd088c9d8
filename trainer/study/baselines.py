"""The systems of a study's table: SyNCRec, its ablations and its baselines, as settings over one base.

An ablation is SyNCRec without one part, or with those of the paper that the base leaves out; one
that changes nothing over the base is not run. A baseline is another published model. Those of RecBole
are named by the study's own settings (trainer/study/peers).
"""

from dataclasses import dataclass

from trainer.config.study import ALL_PARTS, OURS, SINGLE_DOMAIN

# Baselines that are not trained: their names in tables, by their keys in an evaluation's record.
UNTRAINED = {"popularity": "popularity", "recency": "recency popularity"}
_WITH_RECENCY = " + recency"

_UNCORRECTED = (
    "model.stop_gradient=off",
    "model.loss_correction=none",
    "model.mutual_information=off",
)
_ALL_PARTS = (
    "model.stop_gradient=on",
    "model.loss_correction=negative_transfer_gap",
    "model.mutual_information=on",
)
_CROSS_TASK = ("model.tasks=cross", *_UNCORRECTED)
_ONE_EXPERT = (*_CROSS_TASK, "model.experts=1", "model.tower=off")
_UNTIMED = ("model.time_knots=0",)
# 1 would weigh all alike: the values are differences of losses. 0.05 is CGRec's own.
_SHAPLEY = (
    "model.loss_correction=shapley",
    "model.correction_temperature=0.05",
)
_GRU = (
    "model.encoder=gru",
    "model.blocks=1",
    "model.heads=1",
    "model.kernel=auto",
)


@dataclass(frozen=True)
class System:
    """A system that is trained under a name.

    settings: over the base, `key=value` as launch/train.py takes them. by_domain: a model of each
    domain alone. ablation: SyNCRec but for its parts. work: how long a run takes, about, beside
    one of SyNCRec.
    """

    name: str
    about: str
    settings: tuple[str, ...] = ()
    by_domain: bool = False
    ablation: bool = False
    work: float = 1.0


_SYSTEMS = (
    System(
        name=OURS,
        about="the base itself",
    ),
    System(
        name="w/o LC-NTG",
        about="domains' losses weigh alike",
        settings=("model.loss_correction=none",),
        ablation=True,
    ),
    System(
        name="w/o SC-MIM",
        about="no mutual information of both views",
        settings=("model.mutual_information=off",),
        ablation=True,
    ),
    System(
        name="w/o stop-gradient",
        about="every expert learns from both tasks",
        settings=("model.stop_gradient=off",),
        ablation=True,
    ),
    System(
        name=ALL_PARTS,
        about="the paper's stop-gradient, LC-NTG and SC-MIM, whether or not a domain is harmed",
        settings=_ALL_PARTS,
        ablation=True,
    ),
    System(
        name=SINGLE_DOMAIN,
        about="the same experts, gate and tower for each domain by itself",
        settings=_CROSS_TASK,
        by_domain=True,
        work=0.3,
    ),
    System(
        name="w/o time",
        about="the order of interactions alone, as in the paper",
        settings=_UNTIMED,
        ablation=True,
    ),
    System(
        name="CDSR",
        about="the same experts, gate and tower over the merged history, nothing corrected",
        settings=_CROSS_TASK,
        work=0.4,
    ),
    System(
        name="MMoE",
        about="the same experts for both tasks, a gate and a tower for each, nothing "
        "decoupled or corrected",
        settings=(*_UNCORRECTED, *_UNTIMED),
    ),
    System(
        name="MMoE, timed",
        about="the same, told when",
        settings=_UNCORRECTED,
    ),
    System(
        name="CGRec",
        about="domains' losses by their Shapley values",
        settings=(*_SHAPLEY, *_UNTIMED),
        work=3.0,
    ),
    System(
        name="SASRec",
        about="one expert, no tower, over the merged history",
        settings=(*_ONE_EXPERT, *_UNTIMED),
        work=0.2,
    ),
    System(
        name="SASRec, timed",
        about="the same, told when",
        settings=_ONE_EXPERT,
        work=0.2,
    ),
    System(
        name="GRU4Rec",
        about="one GRU, no tower, over the merged history",
        settings=(*_ONE_EXPERT, *_UNTIMED, *_GRU),
        work=0.2,
    ),
)
SYSTEMS = {system.name: system for system in _SYSTEMS}


def name_with_recency(name: str) -> str:
    """What a system is called whose scores have the recency term (trainer/evaluation/recency)."""
    return f"{name}{_WITH_RECENCY}"


def has_recency(name: str) -> bool:
    """Whether a name is that of a system with the recency term."""
    return name.endswith(_WITH_RECENCY)
