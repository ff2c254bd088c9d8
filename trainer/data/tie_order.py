"""The order of a user's events that have the same time.

Where times are days, most of a user's newest events are equal in time, and leave-one-out tests
one of them. An order that an id decides (the alphabet, the numbers) would choose which domain is
tested, and a model could learn it. `hash` orders them by 64 random bits instead, of

    the user    MD5 of seed and id
    the time
    the item    MD5 of domain and id
    how many equal events of the user stand before it

so that the order says nothing, differs from user to user and from day to day, and follows from
what the log says alone: neither from its files nor from numbers that change as a dataset is
extended. `file` is the order of the rows in the logs, for those who know that it means something.

An example, two users whose events are in the order of their items before:

    number_N   0 0 0 0 | 1 1 1
    time_N     5 5 5 9 | 5 5 7
    rows_N     2 8 8 1 | 2 8 3     becomes, say, 8 2 8 1 | 8 2 3
"""

from collections.abc import Callable, Iterator

import numpy as np

from trainer.config.prepare import TIE_ORDERS
from trainer.data.counter_rng import RandomStream, random_bits
from trainer.data.prepare.ids import HASH_DIGITS

HASH, FILE = TIE_ORDERS
_CHUNK = 1 << 20  # events whose bits are in memory at once

# Of the events at some positions (T,): the keys of their users and of their items, int64 (T,).
KeysOf = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def user_key_sql(seed: int, user: str) -> str:
    """Returns DuckDB's SQL for a user's key, BIGINT: by it users are numbered, too.

    user: SQL of the id, whose text counts.
    """
    return _key_sql(f"'{seed}:' || {user}")


def item_key_sql(domain: str, item: str) -> str:
    """Returns DuckDB's SQL for an item's key, BIGINT. domain, item: SQL of name and id."""
    return _key_sql(f"md5({domain}) || {item}")


def _key_sql(text: str) -> str:
    return f"('0x' || substr(md5({text}), 1, {HASH_DIGITS}))::BIGINT"


def break_ties(
    number_N: np.ndarray,
    time_N: np.ndarray,
    rows_N: np.ndarray,
    keys_of: KeysOf,
) -> None:
    """Orders a user's events at the same time by `hash`: changes `rows_N`, of the items, alone.

    number_N, time_N: of the users and times in the logs' unit, by which the events are sorted;
    within them equal items stand together. Times are as exact as the logs'.
    keys_of: the keys of the events at some positions, as `rows_N` has them when it is called.
    """
    tied_T = _find_ties(number_N, time_N)
    for chunk in _chunks(tied_T, number_N, time_N):
        user_key, item_key = keys_of(chunk)
        time = time_N[chunk]
        begins = _changes(number_N[chunk], time)
        order = _order(begins, user_key, time, item_key)
        rows_N[chunk] = rows_N[chunk[order]]


def _find_ties(number_N: np.ndarray, time_N: np.ndarray) -> np.ndarray:
    """Returns the positions of events with the user and time of a neighbour, int64 (T,)."""
    begins_N = _changes(number_N, time_N)
    is_tied_N = ~begins_N
    is_tied_N[:-1] |= ~begins_N[1:]
    return np.flatnonzero(is_tied_N)


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Returns where a column differs from the event before, bool; true for the first event."""
    changes = np.ones(len(columns[0]), bool)
    changes[1:] = False
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    return changes


def _chunks(
    tied_T: np.ndarray, number_N: np.ndarray, time_N: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields the positions in chunks that leave equal times together."""
    begin = 0
    while begin < len(tied_T):
        end = begin + _CHUNK
        while end < len(tied_T):
            before = tied_T[end - 1]
            here = tied_T[end]
            is_same_user = number_N[here] == number_N[before]
            if not (is_same_user and time_N[here] == time_N[before]):
                break
            end += 1
        yield tied_T[begin:end]
        begin = end


def _order(
    begins_C: np.ndarray,
    user_key_C: np.ndarray,
    time_C: np.ndarray,
    item_key_C: np.ndarray,
) -> np.ndarray:
    """Returns the order of tied events, int64 (C,).

    begins_C: where a tie begins.
    """
    place_C = np.arange(len(begins_C))
    # Of the events of one item in a tie the first is 0, the next 1, …
    is_first_C = begins_C | _changes(item_key_C)
    first_C = np.maximum.accumulate(np.where(is_first_C, place_C, 0))
    occurrence_C = place_C - first_C
    # As floats, since another file can make floats of all times; without negative zeros.
    time_bits_C = (time_C.astype(np.float64) + 0.0).view(np.uint64)
    bits_C = random_bits(
        user_key_C,  # of the seed, too
        RandomStream.TIME_TIES,
        time_bits_C,
        item_key_C,
        occurrence_C,
    )
    tie_C = np.cumsum(begins_C)
    return np.lexsort((bits_C, tie_C))
