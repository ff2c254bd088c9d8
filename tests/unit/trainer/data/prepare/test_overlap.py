"""Which users the domains share."""

import json

import numpy as np
import pytest

from tests.unit.trainer.data.prepare.test_pipeline import run, some_rows, write
from trainer.data.prepare.overlap import Overlap, count_overlap
from trainer.reporting.command_tables import dataset_notes


def test_users_are_counted_by_domains_and_by_pairs():
    counts_UD = np.array([[3, 1], [0, 1], [3, 0], [0, 2]])
    assert count_overlap(counts_UD).tolist() == [[2, 1], [1, 3], [3, 1]]


@pytest.mark.parametrize("parts", [1, 4])
def test_the_overlap_of_a_log(tmp_path, monkeypatch, parts):
    """Counted from all interactions, held-out ones too."""
    if parts > 1:
        monkeypatch.setattr("trainer.data.prepare.pipeline._EVENT_BYTES", 10**7)
    rows = [
        (f"u{user}", item, domain, time)
        for user, item, domain, time in some_rows()
    ]
    rows += [("alone", item, "news", item) for item in range(4)]
    dataset = run(
        tmp_path / "out", write(tmp_path / "log.csv", rows), processes=1
    )
    overlap = Overlap.load(dataset.folder)
    domains_of = {}
    for user, _, domain, _ in rows:
        domains_of.setdefault(user, set()).add(domain)
    counts = [len(domains) for domains in domains_of.values()]
    assert overlap.users_by_domains == tuple(
        counts.count(number) for number in range(1, 5)
    )
    for one, other, users in overlap.shared_users:
        assert users == sum(
            {one, other} <= domains for domains in domains_of.values()
        )
    assert len(overlap.shared_users) == 3
    notes = dataset_notes(dataset)
    assert any(note.startswith("news shares no user") for note in notes)
    assert any(note.startswith("users: 1 in 1 domain") for note in notes)


def test_disjoint_domains_are_said_to_have_nothing_to_learn(tmp_path):
    rows = [
        (user, item, "ab"[user % 2], item)
        for user in range(6)
        for item in range(4)
    ]
    dataset = run(tmp_path / "out", write(tmp_path / "log.csv", rows))
    assert Overlap.load(dataset.folder).is_disjoint
    assert dataset_notes(dataset)[-1] == (
        "no user is in two domains: the domains have nothing to learn from one another"
    )


def test_a_dataset_of_an_earlier_version_says_nothing(tmp_path):
    rows = [(1, item, "a", item) for item in range(4)]
    dataset = run(tmp_path / "out", write(tmp_path / "log.csv", rows))
    assert dataset_notes(dataset) == []  # one domain
    (dataset.folder / "overlap.json").unlink()
    assert Overlap.load(dataset.folder) is None
    assert dataset_notes(dataset) == []
    assert json.loads((dataset.folder / "dataset.json").read_text())
