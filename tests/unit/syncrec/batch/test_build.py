"""The packed views of a batch."""

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncrec.batch.attention_layout import build_attention_layout
from syncrec.batch.build import build_batch, build_query, trim
from syncrec.batch.views import move
from tests.helpers.histories import flatten, pack
from tests.helpers.reference import (
    NONE,
    SOS,
    History,
    cross_sequence,
    single_sequence,
)

DOMAINS = 4
DOMAIN_ITEMS = (500, 500, 500, 500)


def user(domains, weight=1, first=0):
    """A history whose items all differ, each with one negative of its own."""
    items = list(range(first, first + len(domains)))
    ticks = [100 * place for place in range(len(items))]
    return History(
        items, list(domains), weight, [[10_000 + item] for item in items], ticks
    )


@st.composite
def batches(draw):
    """(histories, T): users of up to 15 interactions, some without any, and views of 1 to 6 tokens."""
    histories, first = [], 100
    for _ in range(draw(st.integers(1, 6))):
        domains = draw(st.lists(st.integers(0, DOMAINS - 1), max_size=15))
        histories.append(user(domains, draw(st.integers(0, 1)), first))
        first += len(domains)
    if first == 100:
        histories.append(user([draw(st.integers(0, DOMAINS - 1))], 1, first))
    return histories, draw(st.integers(1, 6))


def build(histories, longest, pooling="mean", trimmed=True):
    if trimmed:
        return pack(histories, DOMAIN_ITEMS, longest, pooling)[0]
    return build_batch(*flatten(histories), DOMAIN_ITEMS, longest, pooling)


def unpacked(batch, view):
    """Everything a View says, in terms of items: its sequences of (input, position), its targets, its pools."""
    tokens = [
        SOS if place == 0 else batch.ids[place - 1].item()
        for place in view.input_M
    ]
    sequences = [[] for _ in range(view.sequences)]
    for token, position, sequence in zip(
        tokens, view.position_M.tolist(), view.sequence_M.tolist(), strict=True
    ):
        sequences[sequence].append((token, position))
    columns = (
        view.target_token_L,
        view.target_interaction_L,
        view.target_domain_L,
    )
    columns += (view.target_weight_L, view.comparable_L)
    targets = [
        (
            view.sequence_M[token].item(),
            tokens[token],
            batch.ids[interaction].item(),
            domain,
            weight,
            comparable,
        )
        for token, interaction, domain, weight, comparable in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]
    pools = sorted(
        zip(
            view.pool_slot.tolist(),
            [tokens[token] for token in view.pool_token],
            strict=True,
        )
    )
    return sequences, targets, pools, view.task_starts, view.target_starts


def items_of(history, tokens):
    """A reference sequence in terms of items: [(input, position)] and [(input, target)]."""
    named = [
        (SOS if given == SOS else history.items[given], step)
        for given, step in tokens
    ]
    inputs = [
        (item, len(named) - 1 - place) for place, (item, _) in enumerate(named)
    ]
    return inputs, [
        (item, history.items[step]) for item, step in named if step is not NONE
    ]


def test_figure_2():
    """x_1^A x_2^B x_3^A x_4^B x_5^A x_6^C x_7^C x_8^B, as printed."""
    a, b, c = 0, 1, 2
    items = np.array([101, 202, 103, 204, 105, 306, 307, 208])
    domains = np.array([a, b, a, b, a, c, c, b])
    batch = build_batch(
        items,
        np.array([8]),
        domains,
        np.array([1]),
        items[:, None] + 1000,
        (9, 9, 9),
        8,
    )
    assert batch.ids.tolist() == [*items, *(items + 1000)]
    assert (batch.interactions, batch.negatives, batch.domain_items) == (
        8,
        1,
        (9, 9, 9),
    )

    cross, single = batch.cross, batch.single
    assert cross.input_M.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]  # SOS, x_1 … x_7
    assert cross.position_M.tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert cross.task_starts == (0, 8)
    #                                            A: x_1 x_3 x_5  B: x_2 x_4 x_8  C: x_6 x_7
    assert cross.target_interaction_L.tolist() == [0, 2, 4, 1, 3, 7, 5, 6]
    assert cross.target_token_L.tolist() == [0, 2, 4, 1, 3, 7, 5, 6]

    #                                    SOS 1  3  5  SOS 2  4  SOS 6  7
    assert single.input_M.tolist() == [0, 1, 3, 5, 0, 2, 4, 0, 6, 7]
    assert single.position_M.tolist() == [3, 2, 1, 0, 2, 1, 0, 2, 1, 0]
    assert single.sequence_M.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert single.task_starts == (0, 4, 7, 10)
    # x_1 x_3 x_5 (PAD), x_2 x_4 x_8, x_6 x_7 (PAD)
    assert single.target_interaction_L.tolist() == [0, 2, 4, 1, 3, 7, 5, 6]
    assert single.target_token_L.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]

    for view in (cross, single):
        assert view.target_domain_L.tolist() == [a, a, a, b, b, b, c, c]
        assert view.target_starts == (0, 3, 6, 8)
        assert (
            view.comparable_L.all()
            and view.target_weight_L.tolist() == [1.0] * 8
        )
    assert cross.pool_slot.tolist() == [a, b, a, b, a, c, c]
    assert cross.pool_token.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert single.pool_slot.tolist() == [a, a, a, b, b, c, c]
    assert single.pool_token.tolist() == [1, 2, 3, 5, 6, 8, 9]


def test_figure_2_cut_to_three_tokens():
    history = user(
        [0, 1, 0, 1, 0, 2, 2, 1], first=1
    )  # items 1 … 8 are x_1 … x_8
    batch = build([history], 3)
    sequences, targets, _, _, _ = unpacked(batch, batch.cross)
    assert sequences == [[(5, 2), (6, 1), (7, 0)]]
    assert [(given, target) for _, given, target, *_ in targets] == [
        (7, 8),
        (5, 6),
        (6, 7),
    ]
    sequences, targets, _, _, _ = unpacked(batch, batch.single)
    assert sequences == [
        [(1, 2), (3, 1), (5, 0)],
        [(SOS, 2), (2, 1), (4, 0)],
        [(SOS, 2), (6, 1), (7, 0)],
    ]
    comparable = {
        target: comparable for *_, target, _, _, comparable in targets
    }
    assert comparable == {
        3: False,
        5: False,
        2: False,
        4: False,
        8: True,
        6: True,
        7: True,
    }


@given(batches())
def test_views_are_the_sequences_of_the_paper(drawn):
    histories, longest = drawn
    batch = build(histories, longest)
    cross = [cross_sequence(history, longest) for history in histories]
    single = [
        (d, place, tokens)
        for d in range(DOMAINS)
        for place, history in enumerate(histories)
        if (tokens := single_sequence(history, d, longest))
    ]
    predicted = [
        {
            (place, step)
            for place, tokens in enumerate(cross)
            for _, step in tokens
        },
        {
            (place, step)
            for _, place, tokens in single
            for _, step in tokens
            if step is not NONE
        },
    ]
    comparable = {
        histories[place].items[step]
        for place, step in predicted[0] & predicted[1]
    }
    domain_of = {
        item: d
        for history in histories
        for item, d in zip(history.items, history.domains, strict=True)
    }

    for view, expected in (
        (batch.cross, list(zip(histories, cross, strict=True))),
        (
            batch.single,
            [(histories[place], tokens) for _, place, tokens in single],
        ),
    ):
        sequences, targets, _, task_starts, target_starts = unpacked(
            batch, view
        )
        assert sequences == [
            items_of(history, tokens)[0] for history, tokens in expected
        ]
        expected_targets = [
            (
                place,
                given,
                target,
                domain_of[target],
                history.weight,
                target in comparable,
            )
            for place, (history, tokens) in enumerate(expected)
            for given, target in items_of(history, tokens)[1]
        ]
        assert sorted(targets) == sorted(expected_targets)
        domains = [domain for *_, domain, _, _ in targets]
        assert domains == sorted(domains)
        assert target_starts == tuple(
            sum(domain < d for domain in domains) for d in range(DOMAINS + 1)
        )
        assert task_starts[0] == 0 and task_starts[-1] == len(view.input_M)
    tokens_of_domain = [
        sum(len(tokens) for d, _, tokens in single if d == domain)
        for domain in range(DOMAINS)
    ]
    assert np.diff(batch.single.task_starts).tolist() == tokens_of_domain
    assert batch.weight_B.tolist() == [history.weight for history in histories]


@given(batches())
def test_every_cross_domain_target_is_comparable(drawn):
    """A domain's newest T items reach back at least as far as its share of the user's newest T."""
    histories, longest = drawn
    assert build(histories, longest).cross.comparable_L.all()


@given(batches(), st.sampled_from(["mean", "last"]))
def test_trim_changes_nothing_of_the_views(drawn, pooling):
    histories, longest = drawn
    whole, trimmed = (
        build(histories, longest, pooling, trimmed=False),
        build(histories, longest, pooling),
    )
    for name in ("cross", "single"):
        assert unpacked(whole, getattr(whole, name)) == unpacked(
            trimmed, getattr(trimmed, name)
        )
        assert (
            getattr(whole, name).attention.shapes
            == getattr(trimmed, name).attention.shapes
        )
    assert torch.equal(whole.weight_B, trimmed.weight_B)


@given(batches())
def test_trim_leaves_out_what_is_out_of_reach(drawn):
    """Only that: beyond the newest T + 1 of the user and beyond the newest T + 1 of the user's own in the domain."""
    histories, longest = drawn
    items_N, lengths_B, domain_N, _, _ = flatten(histories)
    kept = []
    for history in histories:
        for step, domain in enumerate(history.domains):
            newer_in_domain = history.domains[step + 1 :].count(domain)
            if (
                len(history.items) - 1 - step <= longest
                or newer_in_domain <= longest
            ):
                kept.append(history.items[step])
    kept_N, kept_lengths_B, kept_domain_N = trim(
        items_N, lengths_B, domain_N, longest
    )
    assert kept_N.tolist() == kept
    assert kept_lengths_B.tolist() == [
        len(set(history.items) & set(kept)) for history in histories
    ]
    assert kept_domain_N.tolist() == [
        domain_N[items_N == item][0] for item in kept
    ]


@given(batches(), st.sampled_from(["mean", "last"]))
def test_pools_hold_each_users_item_tokens_of_a_domain(drawn, pooling):
    """All of them or the newest, the same (user, domain) slots in both views, never SOS."""
    histories, longest = drawn
    batch = build(histories, longest, pooling)
    for name in ("cross", "single"):
        expected = []
        for place, history in enumerate(histories):
            for d in range(DOMAINS):
                sequence = (
                    cross_sequence(history, longest)
                    if name == "cross"
                    else single_sequence(history, d, longest)
                )
                steps = [
                    given
                    for given, _ in sequence
                    if given != SOS and history.domains[given] == d
                ]
                steps = steps[-1:] if pooling == "last" else steps
                expected += [
                    (place * DOMAINS + d, history.items[step]) for step in steps
                ]
        view = getattr(batch, name)
        assert unpacked(batch, view)[2] == sorted(expected)


@given(batches())
def test_own_negatives_stay_with_their_interaction(drawn):
    histories, longest = drawn
    batch = build(histories, longest)
    items_N, negatives_N = (
        batch.ids[: batch.interactions],
        batch.ids[batch.interactions :],
    )
    assert batch.negatives == 1 and batch.negative_starts == ()
    assert torch.equal(negatives_N, items_N + 10_000)


def test_shared_negatives_are_looked_up_by_domain():
    shared = [
        np.array([7, 8]),
        np.array([], np.int64),
        np.array([9, 9, 4]),
        np.array([1]),
    ]
    batch, _ = pack([user([0, 3, 0])], DOMAIN_ITEMS, 5, shared_negatives=shared)
    assert batch.negatives is None
    assert batch.ids[batch.interactions :].tolist() == [7, 8, 9, 9, 4, 1]
    assert batch.negative_starts == (0, 2, 2, 5, 6)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any))
def test_attention_layout_shows_each_token_in_one_slot(lengths):
    lengths_S = np.array(lengths)
    layout = build_attention_layout(lengths_S)
    tokens, slots = int(lengths_S.sum()), len(layout.pad_P)
    pad_P, unpad_M = layout.pad_P.numpy(), layout.unpad_M.numpy()
    assert slots == sum(
        sequences * length for sequences, length in layout.shapes
    )
    assert len(set(unpad_M.tolist())) == tokens == len(unpad_M)
    assert pad_P[unpad_M].tolist() == list(range(tokens))

    real_P = np.isin(np.arange(slots), unpad_M)
    starts, ends = np.cumsum(lengths_S) - lengths_S, np.cumsum(lengths_S)
    seen, begin = [], 0
    for sequences, length in layout.shapes:
        for slot in range(begin, begin + sequences * length, length):
            row, real = (
                pad_P[slot : slot + length],
                real_P[slot : slot + length],
            )
            sequence = int(np.searchsorted(ends, row[0], side="right"))
            # Whole, in order, real ones first.
            assert row[real].tolist() == list(
                range(starts[sequence], ends[sequence])
            )
            assert real.tolist() == sorted(real.tolist(), reverse=True)
            assert (row[~real] == ends[sequence] - 1).all()
            assert (
                lengths_S[sequence] > length - max(8, length // 4) - 1
            )  # no bucket mixes short and long
            seen.append(sequence)
        begin += sequences * length
    assert sorted(seen) == np.flatnonzero(lengths_S).tolist()


@given(batches(), st.lists(st.integers(0, 99), max_size=4))
def test_query_continues_whole_histories(drawn, extra):
    """SOS and every item, the newest T of them; a user without history asks with SOS alone."""
    histories, longest = drawn
    items_N, lengths_B, *_ = flatten(histories)
    query = build_query(items_N, lengths_B, longest, np.array(extra, np.int64))
    sequences, targets, pools, task_starts, _ = unpacked(query, query.cross)
    for history, sequence in zip(histories, sequences, strict=True):
        expected = [SOS, *history.items][-longest:]
        assert sequence == [
            (item, len(expected) - 1 - place)
            for place, item in enumerate(expected)
        ]
    assert (
        not targets
        and not pools
        and task_starts == (0, len(query.cross.input_M))
    )
    newest = query.newest_B.tolist()
    assert query.cross.sequence_M[newest].tolist() == list(
        range(len(histories))
    )
    assert not query.cross.position_M[newest].any()
    assert query.ids[query.interactions :].tolist() == extra
    assert query.interactions == sum(
        min(len(history.items), longest) for history in histories
    )


@given(batches(), st.integers(1, 4))
def test_micro_batches_are_batches_of_their_users(drawn, accumulation):
    """The same rows as of the whole batch; views as if a micro-batch's users were alone."""
    histories, longest = drawn
    whole = build(histories, longest)
    batch, _ = pack(histories, DOMAIN_ITEMS, longest, accumulation=accumulation)
    assert torch.equal(batch.distinct, whole.distinct)
    assert torch.equal(batch.inverse, whole.inverse)
    assert len(batch.micro_batches) == min(accumulation, len(histories))
    user, first = 0, 0
    for micro_batch in batch.micro_batches:
        users = histories[user : user + micro_batch.users]
        (alone,) = build(users, longest).micro_batches
        assert micro_batch.first_interaction == first
        assert micro_batch.interactions == alone.interactions
        assert_same_view(micro_batch.cross, alone.cross)
        assert_same_view(micro_batch.single, alone.single)
        user += micro_batch.users
        first += micro_batch.interactions
    assert (user, first) == (len(histories), batch.interactions)


def assert_same_view(one, other):
    for field in fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, torch.Tensor):
            assert torch.equal(left, right), field.name
        elif is_dataclass(left):
            assert_same_view(left, right)
        else:
            assert left == right, field.name


@pytest.mark.parametrize("kind", ["batch", "query"])
def test_move_takes_every_tensor_along(kind):
    histories = [user([0, 1, 0, 2]), user([3])]
    items_N, lengths_B, *_ = flatten(histories)
    value = (
        build(histories, 3)
        if kind == "batch"
        else build_query(items_N, lengths_B, 3, np.array([1]))
    )

    def check(before, after):
        assert type(before) is type(after)
        for field in fields(before):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if isinstance(old, torch.Tensor):
                wide = torch.int64 if old.dtype == torch.int32 else old.dtype
                assert (new.device.type, new.shape, new.dtype) == (
                    "meta",
                    old.shape,
                    wide,
                ), field.name
            elif is_dataclass(old):
                check(old, new)
            elif field.name == "micro_batches":
                for pair in zip(old, new, strict=True):
                    check(*pair)
            else:
                assert old == new

    check(value, move(value, "meta"))
