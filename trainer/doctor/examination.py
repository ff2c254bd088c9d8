"""The examination: every probe in turn, on all ranks."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.resume import list_versions, shared_settings
from trainer.config.run import RunConfig
from trainer.distributed.agreement import gather_json
from trainer.distributed.consensus import require_same_on_all_ranks
from trainer.distributed.process_group import Ranks
from trainer.doctor.data_probe import examine_data
from trainer.doctor.facts import (
    DataFacts,
    Examination,
    FolderFacts,
    Link,
    RankFacts,
)
from trainer.doctor.folder_probe import examine_folder
from trainer.doctor.network_probe import (
    measure_clocks,
    measure_collectives,
    measure_links,
)
from trainer.doctor.rank_probe import examine_rank
from trainer.errors import InputError


def examine(
    config: RunConfig,
    ranks: Ranks,
    need_gbit: float = 1.0,
    patience: float = 5.0,
) -> Examination:
    """Examines all ranks and hosts for a run of these settings. Collective.

    The result is whole on the first rank; others lack what only that one measures. need_gbit and
    patience: see `Examination`.
    """
    own = examine_rank(ranks)
    facts = _gather(own, RankFacts)
    leaders = {}
    for host, rank in Examination(facts).leaders.items():
        leaders[host] = rank.rank
    differences = _list_differences(config, own)
    clocks = measure_clocks(ranks, leaders)
    links = _gather_links(measure_links(ranks, leaders))
    collectives = measure_collectives(ranks)
    folder = None
    if config.run:
        leads_host = leaders[own.host] == ranks.rank
        folder = _gather(
            examine_folder(Path(config.run), ranks, leads_host, patience),
            FolderFacts,
        )
    data = None
    if config.data:
        data = _gather(examine_data(config, ranks), DataFacts)
    return Examination(
        facts,
        differences,
        data,
        folder,
        clocks,
        links,
        collectives,
        need_gbit,
        patience,
    )


def _list_differences(config: RunConfig, own: RankFacts) -> list[str]:
    """Sentences about what ranks have to have the same and do not. Collective.

    They are those with which a training would be refused:

        ["rank 1 on host1 has other versions (numpy 2.1, rank 0 on host0 has 2.2): give all …"]
    """
    cuda = str(torch.version.cuda)
    groups: list[dict[str, dict[str, Any]]] = [
        {"other versions": list_versions()},
        {"other settings": shared_settings(config)},
        {"another backend": {"backend": own.backend, "CUDA": cuda}},
        {"another device": {"device": own.device, "driver": own.driver}},
    ]
    differences = []
    for group in groups:
        try:
            require_same_on_all_ranks(group)
        except InputError as error:
            differences.append(str(error))
    return differences


def _gather(own: Any, kind: Callable[..., Any]) -> list[Any]:
    """All ranks' facts of one kind, in their order. Collective.

    rank 0   RankFacts(0, "host0")
    rank 1   RankFacts(1, "host1")    →    both, on both
    """
    gathered = []
    for values in gather_json(asdict(own)):
        gathered.append(kind(**values))
    return gathered


def _gather_links(own: list[Link]) -> list[Link]:
    """The links that all ranks measured. Collective.

    Of three hosts of a rank each, all ranks get three:

        rank 0   host0 – host1, host0 – host2
        rank 1   host1 – host2
        rank 2   none: the first of two hosts measures
    """
    links = []
    for rows in gather_json([asdict(link) for link in own]):
        for values in rows:
            links.append(Link(**values))
    return links
