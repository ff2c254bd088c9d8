"""Inspection of a trained model: its gates, λ, and which items lie near each other.

A run leaves the result as `look.json` in its folder. Gates are averaged over the training parts of
the dataset's first users. Items are compared by the cosine of their vectors, as the greatest dot
products mostly are with popular items. Compared are the most popular items of each domain, up to a
number that bounds time and memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from syncrec.batch.build import build_batch, trim
from syncrec.batch.views import Batch, move
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset, Domain
from trainer.data.format.vocabulary import read_item_counts, read_item_ids
from trainer.data.loading.histories import Histories, UserHistories
from trainer.data.loading.stream import find_domains, select_training_part
from trainer.evaluation.domain_weights import relative_weights

if TYPE_CHECKING:
    from embeddings.table import ItemTable
    from syncrec.model import SyNCRec
    from trainer.distributed.process_group import Ranks

Gates = dict[str, dict[str, list[float]] | None]


@dataclass(frozen=True)
class InspectionConfig:
    """How much is inspected, so that it takes seconds whatever the size of the dataset."""

    users: int = 1024  # whose tokens the gates are averaged over
    items: int = 20_000  # of each domain, the most popular ones
    shown: int = 2  # items of each domain whose neighbours are shown
    neighbours: int = 5  # in each domain


@torch.no_grad()
def inspect_model(
    model: "SyNCRec",
    table: "ItemTable",
    dataset: Dataset,
    config: RunConfig,
    ranks: "Ranks",
    look: InspectionConfig | None = None,
) -> dict[str, Any]:
    """Inspects a model. Called on all ranks. Returns JSON values, by the domains' names:

    lambda    {domain: λ}, 1 where all domains weigh alike; None where the model has no loss
              correction
    gates     {"cross": {domain: [weight of each expert]}, "single": the same}: of the cross-domain
              gate by the domain of a token's item, of each domain's own gate over its view; None
              where there is no such gate. A domain without a token is left out.
    items     [{domain, item, nearest: {domain: [[item, cosine], …]}}], on the first rank alone
    """
    look = look or InspectionConfig()
    names = [domain.name for domain in dataset.domains]
    weights = None
    if model.loss_weights_D is not None:
        lambdas = model.loss_weights_D.tolist()
        by_domain = dict(zip(names, lambdas, strict=True))
        weights = relative_weights(by_domain)
    return {
        "lambda": weights,
        "gates": _mean_gates(model, table, dataset, config, ranks, look.users),
        "items": _nearest_items(table, dataset, ranks, look),
    }


def _mean_gates(
    model: "SyNCRec",
    table: "ItemTable",
    dataset: Dataset,
    config: RunConfig,
    ranks: "Ranks",
    most_users: int,
) -> Gates:
    """The mean weight of each expert by domain, as `inspect_model` returns it. Called on all ranks.

    most_users: the first users of the dataset, whose training parts are read.
    """
    users = min(most_users, dataset.users)
    batch, real = _training_batch(dataset, config, ranks, users)
    batch = move(batch, ranks.device)
    place_N = batch.inverse[: batch.interactions]
    distinct_rows = table(batch.distinct)
    rows_NR = distinct_rows.index_select(0, place_N)
    gates: Gates = {"cross": None, "single": None}
    if config.model.experts == 1:
        return gates
    model.eval()
    names = [domain.name for domain in dataset.domains]
    item_N = batch.distinct[place_N]
    input_domain = _input_domains(dataset, item_N)
    x_MR = model.tokens(batch.cross, rows_NR)
    weights_MK = model.cross_gate(x_MR, batch.cross, slice(None))
    domain_M = input_domain[batch.cross.input_M]
    sums_DK = real * _sum_by_domain(domain_M, weights_MK, len(names))
    single_sums_DK = None
    if model.both_tasks:
        weights_MK = _single_weights(model, batch, rows_NR)
        domain_M = _task_domains(batch.single.task_starts, weights_MK.device)
        single_sums_DK = real * _sum_by_domain(domain_M, weights_MK, len(names))
    gates["cross"] = _means_over_ranks(sums_DK, names)
    if single_sums_DK is not None:
        gates["single"] = _means_over_ranks(single_sums_DK, names)
    return gates


def _input_domains(dataset: Dataset, item_N: torch.Tensor) -> torch.Tensor:
    """The domain of each input, int64 (1 + N,): of SOS, the first input, one behind the last.

    Of three items of two domains, domain 1 from row 50:

        item_N         4    51    9
        domains    2   0    1     0
    """
    starts = torch.from_numpy(dataset.starts).to(item_N.device)
    of_sos = starts.new_tensor([len(dataset.domains)])
    begun_N = torch.searchsorted(starts, item_N, right=True)
    domain_N = begun_N - 1
    return torch.cat([of_sos, domain_N])


def _single_weights(
    model: "SyNCRec", batch: Batch, rows_NR: torch.Tensor
) -> torch.Tensor:
    """The weights of each domain's own gate over its view's tokens, (M, experts)."""
    x_MR = model.tokens(batch.single, rows_NR)
    edges = pairwise(batch.single.task_starts)
    weights = []
    for gate, (begin, end) in zip(model.single_gates, edges, strict=True):
        task = slice(begin, end)
        weights.append(gate(x_MR[task], batch.single, task))
    return torch.cat(weights)


def _task_domains(
    task_starts: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The domain of each token of the single-domain view, int64 (M,).

    task_starts: where each domain's tokens begin, and where the last ones end. (0, 3, 5) gives
    0 0 0 1 1.
    """
    edges = torch.tensor(task_starts, device=device)
    domains = torch.arange(len(task_starts) - 1, device=device)
    tokens_of_domains = edges.diff()
    return torch.repeat_interleave(domains, tokens_of_domains)


def _sum_by_domain(
    domain_M: torch.Tensor, weights_MK: torch.Tensor, domains: int
) -> torch.Tensor:
    """By domain the number of tokens and the sums of weights: float64 (D + 1, 1 + experts).

    The last line is of SOS, which belongs to no domain. Four tokens, two experts, two domains:

        domain_M      2           0           1           0
        weights_MK    0.5 0.5     0.9 0.1     0.2 0.8     0.7 0.3
        sums          [[2, 1.6, 0.4],
                       [1, 0.2, 0.8],
                       [1, 0.5, 0.5]]
    """
    total_DK = torch.zeros(
        domains + 1,
        1 + weights_MK.shape[1],
        dtype=torch.float64,
        device=weights_MK.device,
    )
    ones_M1 = torch.ones_like(weights_MK[:, :1])
    counted_MK = torch.cat([ones_M1, weights_MK], 1)
    return total_DK.index_add_(0, domain_M, counted_MK.double())


def _means_over_ranks(
    total_DK: torch.Tensor, names: list[str]
) -> dict[str, list[float]]:
    """The mean weight of each expert over all ranks' tokens, of domains that have a token.

    total_DK: as `_sum_by_domain` gives it, which becomes the sum over all ranks:

        total_DK    [[2, 1.6, 0.4],    {"Books": [0.8, 0.2],
                     [1, 0.2, 0.8],     "Toys": [0.2, 0.8]}
                     [1, 0.5, 0.5]]
    """
    dist.all_reduce(total_DK)
    means = {}
    lines = total_DK[: len(names)].tolist()
    for name, (count, *weights) in zip(names, lines, strict=True):
        if not count:
            continue
        rounded = []
        for weight in weights:
            mean = weight / count
            rounded.append(round(mean, 4))
        means[name] = rounded
    return means


def _training_batch(
    dataset: Dataset, config: RunConfig, ranks: "Ranks", users: int
) -> tuple[Batch, bool]:
    """This rank's share of the first users' training parts as a batch, and whether it has any.

    A rank without any looks an item up all the same.
    """
    histories = _read_users(dataset, config, ranks, users)
    _, lengths_B, place_N, _ = select_training_part(
        dataset, histories, config.stream.domain
    )
    items_N = histories.items_N[place_N]
    ticks_N = histories.ticks_N[place_N]
    lengths_B = lengths_B[lengths_B > 0]
    real = len(items_N) > 0
    if not real:
        items_N = np.zeros(1, np.int32)
        ticks_N = np.zeros(1, np.uint16)
        lengths_B = np.ones(1, np.int64)
    domain_N = find_domains(dataset, items_N)
    index_N = np.arange(len(items_N))
    kept_N, lengths_B, domain_N = trim(
        index_N,
        lengths_B,
        domain_N,
        config.model.max_length,
    )
    no_negatives = [np.zeros(0, np.int64) for _ in dataset.domains]
    items_of_domains = [domain.items for domain in dataset.domains]
    batch = build_batch(
        items_N[kept_N],
        lengths_B,
        domain_N,
        np.ones(len(lengths_B)),
        no_negatives,
        items_of_domains,
        config.model.max_length,
        ticks_N=ticks_N[kept_N],
    )
    return batch, real


def _read_users(
    dataset: Dataset, config: RunConfig, ranks: "Ranks", users: int
) -> UserHistories:
    """This rank's share of the first users. Of 10 users and three ranks:

    rank     0      1      2
    users    0–2    3–5    6–9
    """
    first = users * ranks.rank // ranks.world_size
    end = users * (ranks.rank + 1) // ranks.world_size
    report = None
    if config.stream.damaged == "skip":
        report = _ignore
    histories = Histories(
        dataset,
        blocks=1,
        verify=config.stream.verify,
        report=report,
    )
    user_B = np.arange(first, end)
    try:
        return histories.read(user_B)
    finally:
        histories.close()


def _ignore(_reason: str) -> None:
    """Training has said which users are skipped."""


@dataclass(frozen=True)
class _PopularItems:
    """The most popular items of a domain, most popular first; none on ranks other than the first.

    name: the domain's. vectors_KR: of length 1.
    """

    name: str
    ids: list[str]
    vectors_KR: torch.Tensor


def _nearest_items(
    table: "ItemTable", dataset: Dataset, ranks: "Ranks", look: InspectionConfig
) -> list[dict[str, Any]] | None:
    """The items nearest to the most popular ones of each domain. Called on all ranks."""
    popular = []
    for domain in dataset.domains:
        most_popular = _read_popular(
            table,
            dataset,
            domain,
            ranks,
            look.items,
        )
        popular.append(most_popular)
    if not ranks.first:
        return None
    items = []
    for own in popular:
        shown = min(look.shown, len(own.ids))
        for index in range(shown):
            nearest = {}
            for other in popular:
                near = _neighbours(own, index, other, look.neighbours)
                nearest[other.name] = near
            item = own.ids[index]
            items.append(
                {
                    "domain": own.name,
                    "item": item,
                    "nearest": nearest,
                }
            )
    return items


def _read_popular(
    table: "ItemTable",
    dataset: Dataset,
    domain: Domain,
    ranks: "Ranks",
    most: int,
) -> _PopularItems:
    """A domain's most popular items. Called on all ranks; the first one looks them up.

    Equally popular items are ordered by row. An item that training never met lies anywhere: it is
    left out. Of a domain that begins at row 50:

        counts     3  0  6  3
        place_K    2  0  3
        rows_K     52 50 53
    """
    counts_N = read_item_counts(dataset)
    domain_end = domain.start + domain.items
    counts = counts_N[domain.start : domain_end]
    descending = np.argsort(-counts, kind="stable")
    place_K = descending[:most]
    met_K = counts[place_K] > 0
    place_K = place_K[met_K]
    rows_K = torch.zeros(0, dtype=torch.int64)
    ids: list[str] = []
    if ranks.first:
        rows_K = torch.from_numpy(place_K + domain.start)
        all_names = read_item_ids(dataset, domain)
        names = all_names.take(place_K)
        ids = [str(name) for name in names.to_pylist()]
    vectors_KR = table(rows_K).float()
    vectors_KR = torch.nn.functional.normalize(vectors_KR, dim=1)
    return _PopularItems(domain.name, ids, vectors_KR)


def _neighbours(
    domain: _PopularItems, index: int, other: _PopularItems, most: int
) -> list[list[Any]]:
    """The `most` items of another domain, or of its own, that lie nearest to a domain's item."""
    cosines = other.vectors_KR @ domain.vectors_KR[index]
    if other is not domain:
        return _greatest(cosines, other.ids, most)
    cosines[index] = -torch.inf  # itself
    near = _greatest(cosines, other.ids, most + 1)
    return near[:most]


def _greatest(
    cosines: torch.Tensor, ids: list[str], most: int
) -> list[list[Any]]:
    """[[item, cosine], …] of the greatest cosines, without −inf. The two greatest:

    cosines    0.12      −inf       0.93            0.4
    ids        a1        a2         a3              a4        [["a3", 0.93], ["a4", 0.4]]
    """
    most = min(most, len(cosines))
    best = cosines.topk(most)
    indices = best.indices.tolist()
    values = best.values.tolist()
    near = []
    for index, value in zip(indices, values, strict=True):
        if value > -torch.inf:
            near.append([ids[index], round(value, 4)])
    return near
