"""Personalization: whether a held-out item is ranked higher for its own user than for another's.

Logs whose items have been mixed up keep their popularity. A model that knows what is popular when
ranks them nearly as well as before. But such a model cannot tell one user's item from another's.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from trainer.config.run import RunConfig
from trainer.data.counter_rng import RandomStream, permutation, random_bits
from trainer.data.format.dataset import Dataset
from trainer.distributed.process_group import sum_over_ranks
from trainer.evaluation.evaluation import MODEL
from trainer.evaluation.metrics import metric_values
from trainer.evaluation.sampled import (
    Candidates,
    Model,
    Positions,
    evaluate_split,
)
from trainer.run_files import HEADLINE

if TYPE_CHECKING:
    from embeddings.table import ItemTable
    from trainer.distributed.process_group import Ranks

_MOST = 20_000  # users; a hundred rows are kept of each


class UserSample:
    """A random sample of the users that are ranked, with what their test item was ranked among.

    It sees the users that ranking visits, so that nobody is ranked a second time. At most _MOST
    users are held: those with the smallest random keys.
    """

    def __init__(self, config: RunConfig, wanted_U: np.ndarray):
        """wanted_U: bool, whether a user may be chosen."""
        self.seed = config.seed
        self.wanted_U = wanted_U
        self._width = 1 + config.evaluation.negatives
        self._key_K = np.zeros(0, np.uint64)
        self._user_K3 = np.zeros((0, 3), np.int64)  # user, domain, position
        self._rows_KC = np.zeros((0, self._width), np.int64)

    def visit(
        self,
        candidates: Candidates,
        positions: Positions,
        _scores_C: np.ndarray | None = None,
    ) -> None:
        """Adds one step's users. `rank_candidates` calls it.

        With two places in the sample, and users 7 and 12 in it, user 40 takes the place of 12:

            user    key    in the sample before    after
            7       11     yes                     yes
            12      85     yes                     no
            40      30     no                      yes
        """
        (chosen,) = np.nonzero(candidates.user_B >= 0)
        wanted_B = self.wanted_U[candidates.user_B[chosen]]
        chosen = chosen[wanted_B]
        user_B = candidates.user_B[chosen]
        key_B = random_bits(
            self.seed,
            RandomStream.PERSONALIZATION_SAMPLE,
            user_B,
        )
        if len(self._key_K) == _MOST:
            smaller_B = key_B < self._key_K[-1]
            chosen = chosen[smaller_B]
            key_B = key_B[smaller_B]
        if not len(chosen):
            return
        columns = [
            candidates.user_B[chosen],
            candidates.domain_B[chosen],
            positions[MODEL][chosen],
        ]
        user_B3 = np.stack(columns, axis=1)
        user_K3 = np.concatenate([self._user_K3, user_B3])
        rows_BC = self._padded_rows(candidates, chosen)
        rows_KC = np.concatenate([self._rows_KC, rows_BC])
        # The keys depend on the seed and the user alone.
        key_K = np.append(self._key_K, key_B)
        order = np.argsort(key_K, kind="stable")[:_MOST]
        self._key_K = key_K[order]
        self._user_K3 = user_K3[order]
        self._rows_KC = rows_KC[order]

    def _padded_rows(
        self, candidates: Candidates, chosen: np.ndarray
    ) -> np.ndarray:
        """The candidates of the chosen users, int64 (B, C), −1 behind shorter lists.

        Three users, of whom the first and the last are chosen:

            counts_B    3         3           2
            rows_C      4 9 2     51 60 55    58 52
            chosen      [0, 2]
            rows_BC     [[4, 9, 2],
                         [58, 52, −1]]
        """
        shape = (len(chosen), self._width)
        rows_BC = np.full(shape, -1, np.int64)
        ends_B = np.cumsum(candidates.counts_B)
        starts_B = ends_B - candidates.counts_B
        for line, user in enumerate(chosen):
            count = candidates.counts_B[user]
            begin = starts_B[user]
            end = begin + count
            rows_BC[line, :count] = candidates.rows_C[begin:end]
        return rows_BC

    def gathered(self) -> tuple[np.ndarray, ...]:
        """The sample over all ranks, by user. Called on all ranks.

        Returns users, domains, positions, int64 (K,), and candidates, int64 (K, C), the user's own
        item first. Three users:

            user_K        7           12         40
            domain_K      1           0          1
            position_K    2           1          3
            rows_KC       58 52 61    4 9 −1     51 60 55
        """
        begin, total = self._place_among_ranks()
        key_K, user_K3 = self._gather_users(begin, total)
        chosen = np.argsort(key_K, kind="stable")[:_MOST]
        user_K = user_K3[chosen, 0]
        by_user = np.argsort(user_K)
        chosen = chosen[by_user]
        rows_KC = self._gather_rows(begin, chosen)
        user_K, domain_K, position_K = user_K3[chosen].T
        return user_K, domain_K, position_K, rows_KC

    def _place_among_ranks(self) -> tuple[int, int]:
        """Where this rank's users begin among all ranks' users, and how many all have.

        rank             0         1         2
        users            5         3         4
        begin, total     0, 12     5, 12     8, 12
        """
        rank = dist.get_rank()
        world_size = dist.get_world_size()
        counts_W = torch.zeros(world_size, dtype=torch.int64)
        counts_W[rank] = len(self._key_K)
        dist.all_reduce(counts_W)
        begin = counts_W[:rank].sum()
        total = counts_W.sum()
        return int(begin), int(total)

    def _gather_users(
        self, begin: int, total: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """All ranks' keys, uint64 (total,), and users, domains and positions, int64 (total, 3).

        Each line is one rank's: the others add 0 to it. Two ranks, the second from line 2 on:

            key_K    user_K3
            11       7  1 2      the first rank's
            85       12 0 1
            30       40 1 3      the second rank's
        """
        end = begin + len(self._key_K)
        table_K4 = torch.zeros(total, 4, dtype=torch.int64)
        signed_key_K = self._key_K.view(np.int64)
        table_K4[begin:end, 0] = torch.from_numpy(signed_key_K)
        table_K4[begin:end, 1:] = torch.from_numpy(self._user_K3)
        dist.all_reduce(table_K4)
        key_K = table_K4[:, 0].numpy()
        user_K3 = table_K4[:, 1:].numpy()
        return key_K.astype(np.uint64), user_K3

    def _gather_rows(self, begin: int, chosen: np.ndarray) -> np.ndarray:
        """The candidates of the chosen ones of all ranks' users, int64 (chosen, C).

        begin: where this rank's users begin among all ranks' users. Here it is 2, and the rank
        has two users:

            chosen     [3, 0, 2]
            mine       [0, 2]       lines that this rank fills
            my_rows    of its users 1 and 0
        """
        end = begin + len(self._key_K)
        mine_K = (chosen >= begin) & (chosen < end)
        (mine,) = np.nonzero(mine_K)
        my_users = chosen[mine] - begin
        my_rows = self._rows_KC[my_users]
        rows_KC = torch.zeros(len(chosen), self._width, dtype=torch.int64)
        rows_KC[torch.from_numpy(mine)] = torch.from_numpy(my_rows)
        dist.all_reduce(rows_KC)
        return rows_KC.numpy()


class OwnItemGain(NamedTuple):
    """How much higher NDCG@10 of held-out items is for their own users than for others' users.

    value: the mean over users. error: its standard error, None of one user. users: of the domain.
    """

    value: float
    error: float | None
    users: int


def measure_personalization(
    model: Model,
    table: "ItemTable",
    config: RunConfig,
    dataset: Dataset,
    ranks: "Ranks",
    drawn: UserSample,
    least: int,
) -> list[OwnItemGain | None]:
    """NDCG@10 of test items for their own users, less that of the same items for others' users.

    By domain, over the same drawn candidates. Called on all ranks. drawn: has seen these users
    ranked by the model. None for a domain where fewer than `least` of them are left.
    """
    user_K, domain_K, position_K, rows_KC = drawn.gathered()
    exchanged: dict[int, tuple[int, np.ndarray]] = {}
    domains = range(len(dataset.domains))
    for number in domains:
        (members,) = np.nonzero(domain_K == number)
        if len(members) < max(2, least):
            continue
        order = permutation(
            len(members),
            config.seed,
            RandomStream.PERSONALIZATION_EXCHANGE,
            number,
        )
        exchanged |= _exchange(user_K, rows_KC, members[order], number)
    other_position_K = np.zeros(len(user_K), np.int64)

    def visit(
        candidates: Candidates, positions: Positions, _scores_C: np.ndarray
    ) -> None:
        real = candidates.user_B >= 0
        place_B = np.searchsorted(user_K, candidates.user_B[real])
        other_position_K[place_B] = positions[MODEL][real]

    evaluate_split(
        model,
        table,
        dataset,
        ranks,
        config,
        "test",
        candidates=exchanged,
        visit=visit,
    )
    other_position_K = sum_over_ranks(other_position_K)
    gains = []
    for number in domains:
        of_domain_K = (domain_K == number) & (other_position_K > 0)
        own_B = position_K[of_domain_K]
        others_B = other_position_K[of_domain_K]
        gains.append(_mean_gain(own_B, others_B))
    return gains


def _mean_gain(own_B: np.ndarray, others_B: np.ndarray) -> OwnItemGain | None:
    """The gain of a domain's users, None without any.

    own_B, others_B: the positions of their own items, and of those that they were given:

        own_B       1    1    3
        others_B    1    3    7
        gain        0    0.5  0.17    value 0.22, error 0.15
    """
    if not len(own_B):
        return None
    gain_B = metric_values(HEADLINE, own_B) - metric_values(HEADLINE, others_B)
    error = None
    if len(gain_B) > 1:
        error = float(np.std(gain_B, ddof=1) / np.sqrt(len(gain_B)))
    return OwnItemGain(float(gain_B.mean()), error, len(gain_B))


def _exchange(
    user_K: np.ndarray, rows_KC: np.ndarray, members: np.ndarray, domain: int
) -> dict[int, Any]:
    """Each member's candidates with the item of the member before it in place of the own item.

    user_K, rows_KC: of the sample. members: int64, the sample's users of one domain, in a drawn
    order. Three members and what they are ranked with:

        member     own item    negatives    ranked with
        0          4           9 2          7 9 2          the item of member 2
        1          5           4 8          4 8            the item of member 0, once
        2          7           1 3          5 1 3          the item of member 1

    Returns {user: (domain, rows)}, the other's item first.
    """
    exchanged = {}
    members_before = np.roll(members, 1)
    for member, other in zip(members, members_before, strict=True):
        padded = rows_KC[member]
        candidates = padded[padded >= 0]
        item = rows_KC[other, 0]
        negatives = candidates[1:]
        negatives = negatives[negatives != item]
        rows = np.append(item, negatives)
        user = int(user_K[member])
        exchanged[user] = (domain, rows)
    return exchanged
