"""The cut of a dataset into shards and parts.

Users are numbered by a hash of their ids, so a range of numbers is a random part of them. A
part is the users of some consecutive shards, and can be made, or made again, without the
others.
"""

from dataclasses import dataclass

from trainer.data.prepare.ids import Ids

# A block of mean histories is not larger: a reader holds one a stream.
_BLOCK_INTERACTIONS = 1 << 17
# Streams where none are asked for: as many ranks can train. Of few users a stream would have next
# to none.
_STREAMS = 64
_FEWEST_STREAMS = 8
_STREAM_USERS = 16


@dataclass(frozen=True)
class Layout:
    """Which users are in which shard and part.

    Shard k has the users [k · users // shards, (k + 1) · users // shards).
    """

    users: int
    streams: int
    shards: int
    block_users: int
    parts: int

    @classmethod
    def of(
        cls,
        ids: Ids,
        streams: int | None,
        shard_users: int,
        block_users: int,
        part_interactions: int,
    ) -> "Layout":
        """Chooses the cut.

        Shards have `shard_users` at most. Their number is a multiple of `streams`, or of the
        users where there are fewer; None: 64, and no more than one for 16 users. Blocks have `block_users` at most, fewer where histories
        are long. Parts have about `part_interactions`, and one shard at least.
        """
        if streams is None:
            fitting_streams = ids.users // _STREAM_USERS
            streams = min(_STREAMS, max(_FEWEST_STREAMS, fitting_streams))
        streams = min(streams, ids.users)
        shards = streams * _divide_up(ids.users, streams * shard_users)
        fitting_users = _BLOCK_INTERACTIONS * ids.users // ids.interactions
        parts = min(shards, _divide_up(ids.interactions, part_interactions))
        return cls(
            users=ids.users,
            streams=streams,
            shards=shards,
            block_users=max(1, min(block_users, fitting_users)),
            parts=parts,
        )

    def first_user(self, shard: int) -> int:
        """Returns the first user of a shard, or for `shards` the number of users."""
        return shard * self.users // self.shards

    def shards_of(self, part: int) -> range:
        """Returns the shards of a part."""
        first = _divide_up(part * self.shards, self.parts)
        end = _divide_up((part + 1) * self.shards, self.parts)
        return range(first, end)

    def users_of(self, part: int) -> range:
        """Returns the users of a part."""
        shards = self.shards_of(part)
        return range(
            self.first_user(shards.start), self.first_user(shards.stop)
        )

    def part_sql(self, number: str, divide: str) -> str:
        """Returns SQL for the part of a user.

        number: SQL of the user's number. divide: the engine's whole division, `//` or `div`.
        """
        shard = f"(({number} + 1) * {self.shards} - 1) {divide} {self.users}"
        return f"({shard}) * {self.parts} {divide} {self.shards}"


def _divide_up(dividend: int, divisor: int) -> int:
    """Divides, and rounds up."""
    return -(-dividend // divisor)
