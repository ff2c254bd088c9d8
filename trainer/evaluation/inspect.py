"""What a trained model looks like inside: its gates, λ, and which items lie near each other. `look.json` in a run's folder.

Gates are averaged over the training parts of the dataset's first users. Items are compared by the cosine of their vectors, as
the greatest dot products mostly are with popular items; compared are the most popular items of each domain, up to a number
that bounds time and memory.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from syncrec.batch.build import build_batch, move, trim
from trainer.data.format.vocabulary import item_counts, item_ids
from trainer.data.loading.histories import Histories
from trainer.data.loading.stream import domains_of, training_part


@dataclass(frozen=True)
class LookConfig:
    """How much is looked at."""

    users: int = 1024  # whose tokens the gates are averaged over
    items: int = 20_000  # of each domain, the most popular ones
    shown: int = 2  # items of each domain whose neighbours are shown
    neighbours: int = 5  # in each domain


@torch.no_grad()
def look_at(model, table, dataset, config, ranks, look=None) -> dict:
    """Called on all ranks. JSON values, by the domains' names:

    lambda: {domain: λ}, None where it is 1. gates: {"cross": {domain: [weight of each expert]}, "single": the same}: of the
    cross-domain gate by the domain of a token's item, of each domain's own gate over its view; None where there is no such
    gate. A domain without a token is left out. items: [{domain, item, nearest: {domain: [[item, cosine], …]}}], on the first
    rank alone.
    """
    look = look or LookConfig()
    names = [domain.name for domain in dataset.domains]
    correction = model.correction
    return {
        "lambda": None
        if correction is None
        else dict(zip(names, correction.lambda_D.tolist(), strict=True)),
        "gates": _gates(model, table, dataset, config, ranks, look.users, names),
        "items": _neighbours(table, dataset, ranks, look),
    }


def _gates(model, table, dataset, config, ranks, users, names):
    batch, some = _batch(dataset, config, ranks, min(users, dataset.users))
    batch = move(batch, ranks.device)
    rows_NR = table(batch.distinct).index_select(0, batch.place[: batch.interactions])
    if config.model.experts == 1:
        return {"cross": None, "single": None}
    model.eval()
    domains = len(names)
    item_N = batch.distinct[batch.place[: batch.interactions]]
    starts = torch.from_numpy(dataset.starts).to(item_N.device)
    # SOS, the first input, belongs to no domain: to one behind the last.
    of_input = torch.cat(
        [
            starts.new_tensor([domains]),
            torch.searchsorted(starts, item_N, right=True) - 1,
        ]
    )

    def sums(of_token, weights_MK):
        total = torch.zeros(
            domains + 1,
            1 + config.model.experts,
            dtype=torch.float64,
            device=weights_MK.device,
        )
        return some * total.index_add_(
            0,
            of_token,
            torch.cat([torch.ones_like(weights_MK[:, :1]), weights_MK], 1).double(),
        )

    views = {
        "cross": sums(
            of_input[batch.cross.input_M], _cross_weights(model, batch.cross, rows_NR)
        ),
        "single": None,
    }
    if model.both_tasks:
        x_MR, edges = model.tokens(batch.single, rows_NR), batch.single.task_starts
        tasks = [slice(begin, end) for begin, end in pairwise(edges)]
        weights = [
            gate(x_MR[task], batch.single, task)
            for gate, task in zip(model.single_gates, tasks, strict=True)
        ]
        lengths = torch.tensor(
            [task.stop - task.start for task in tasks], device=x_MR.device
        )
        of_token = torch.repeat_interleave(
            torch.arange(domains, device=x_MR.device), lengths
        )
        views["single"] = sums(of_token, torch.cat(weights))
    return {
        view: None if total is None else _means(total, names)
        for view, total in views.items()
    }


def _cross_weights(model, view, rows_NR):
    return model.cross_gate(model.tokens(view, rows_NR), view, slice(None))


def _means(total, names):
    dist.all_reduce(total)
    counted = zip(names, total[: len(names)].tolist(), strict=True)
    return {
        name: [round(weight / count, 4) for weight in weights]
        for name, (count, *weights) in counted
        if count
    }


def _batch(dataset, config, ranks, users):
    """The first users' training parts, of which each rank has some, and whether it has; without any it looks an item up all the
    same."""
    first, last = (
        users * place // ranks.world_size for place in (ranks.rank, ranks.rank + 1)
    )
    skips = (lambda _: None) if config.stream.damaged == "skip" else None
    histories = Histories(dataset, blocks=1, verify=config.stream.verify, report=skips)
    try:
        found = histories.read(np.arange(first, last))
    finally:
        histories.close()
    _, lengths_B, place_N, _ = training_part(dataset, found, config.stream.domain)
    items_N, ticks_N, lengths_B = (
        found.items_N[place_N],
        found.ticks_N[place_N],
        lengths_B[lengths_B > 0],
    )
    some = len(items_N) > 0
    if not some:
        items_N, ticks_N, lengths_B = (
            np.zeros(1, np.int32),
            np.zeros(1, np.uint16),
            np.ones(1, np.int64),
        )
    domain_N = domains_of(dataset, items_N)
    kept_N, lengths_B, domain_N = trim(
        np.arange(len(items_N)), lengths_B, domain_N, config.model.max_length
    )
    none = [np.zeros(0, np.int64) for _ in dataset.domains]
    items_D = [domain.items for domain in dataset.domains]
    given = (
        items_N[kept_N],
        lengths_B,
        domain_N,
        np.ones(len(lengths_B)),
        none,
        items_D,
        config.model.max_length,
    )
    return build_batch(*given, ticks_N=ticks_N[kept_N]), some


def _neighbours(table, dataset, ranks, look):
    """Of the most popular items of each domain, equally popular ones by row. An item that training never met lies anywhere: it
    is left out."""
    counts = item_counts(dataset)
    popular, ids, vectors = [], [], []
    for domain in dataset.domains:
        own = counts[domain.start : domain.start + domain.items]
        places = np.argsort(-own, kind="stable")[: look.items]
        places = places[own[places] > 0]
        wanted = (
            torch.from_numpy(places + domain.start)
            if ranks.first
            else torch.zeros(0, dtype=torch.int64)
        )
        vectors.append(torch.nn.functional.normalize(table(wanted).float(), dim=1))
        popular.append(places[: look.shown])
        if ranks.first:
            ids.append(
                [
                    str(item)
                    for item in item_ids(dataset, domain).take(places).to_pylist()
                ]
            )
    if not ranks.first:
        return None
    found = []
    for number, domain in enumerate(dataset.domains):
        for place in range(len(popular[number])):
            nearest = {}
            for other, its_domain in enumerate(dataset.domains):
                cosines = vectors[other] @ vectors[number][place]
                if other == number:
                    cosines[place] = -torch.inf  # itself
                best = cosines.topk(
                    min(look.neighbours + (other == number), len(cosines))
                )
                pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                near = [
                    [ids[other][index], round(value, 4)]
                    for index, value in pairs
                    if value > -torch.inf
                ]
                nearest[its_domain.name] = near[: look.neighbours]
            found.append(
                {"domain": domain.name, "item": ids[number][place], "nearest": nearest}
            )
    return found
