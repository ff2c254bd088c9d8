import contextlib
import dataclasses
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import trainer.data.synthetic
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.prepare.pipeline import prepare
from trainer.data.synthetic import (
    Events,
    draw_lengths,
    generate_events,
    synthesize_logs,
)
from trainer.errors import InputError


def fields(events):
    return {
        field.name: getattr(events, field.name)
        for field in dataclasses.fields(Events)
    }


def test_any_slice_of_users_can_be_made_on_its_own():
    config = SyntheticConfig(users=500, domains=5, seed=3)
    whole = fields(generate_events(config, 0, 500))
    part = fields(generate_events(config, 123, 321))
    mine = (whole["user"] >= 123) & (whole["user"] < 321)
    for name, values in part.items():
        np.testing.assert_array_equal(values, whole[name][mine])
    assert len(generate_events(config, 7, 7).user) == 0


def test_another_seed_or_user_gives_other_events():
    one, other = (
        fields(generate_events(SyntheticConfig(seed=seed), 0, 1))
        for seed in (0, 1)
    )
    assert not np.array_equal(one["item"][:3], other["item"][:3])


@pytest.mark.parametrize("mean_length", [1, 1.5, 40, 300])
def test_lengths_have_the_mean_that_was_asked_for(mean_length):
    lengths = draw_lengths(SyntheticConfig(mean_length=mean_length), 0, 100_000)
    assert lengths.min() == 1
    assert lengths.mean() == pytest.approx(mean_length, rel=0.02)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.6])
def test_events_stay_within_their_domain_and_time_rises(exponent):
    config = SyntheticConfig(
        users=300, items=1003, domains=5, exponent=exponent
    )
    events = generate_events(config, 0, 300)
    assert set(events.domain) == set(range(5))
    assert sum(config.domain_items) == 1003 and config.domain_items.min() >= 200
    assert (events.item >= 0).all() and (
        events.item < config.domain_items[events.domain]
    ).all()
    assert (np.diff(events.time)[np.diff(events.user) == 0] > 0).all()
    np.testing.assert_allclose(
        np.bincount(events.domain) / len(events.domain),
        config.shares,
        atol=0.03,
    )
    assert (
        config.names[-1] == "ads"
        and config.shares[-1] == pytest.approx(0.45)
        and config.shares.sum() == pytest.approx(1)
    )


def test_popularity_falls_as_a_power_law():
    config = SyntheticConfig(
        users=4000, items=2000, domains=1, topics=2, on_topic=0.0, exponent=1.0
    )
    counts = np.bincount(generate_events(config, 0, 4000).item, minlength=2000)
    # P(rank in [a, b)) = log((b + 1) / (a + 1)) / log(n + 1): equal masses for equal ratios.
    for a, b in ((0, 1), (1, 3), (3, 7), (99, 199)):
        wanted = np.log((b + 1) / (a + 1)) / np.log(2001)
        assert counts[a:b].sum() / counts.sum() == pytest.approx(
            wanted, rel=0.05
        )


def shares_by_season(fashion_days):
    """How often each item of a topic came up in each season of 91 days, (4, items): a year's shares."""
    config = SyntheticConfig(
        users=4000,
        items=400,
        domains=1,
        topics=4,
        on_topic=0.999,  # what is off topic has no fashion
        fashion_days=fashion_days,
    )
    events = generate_events(config, 0, 4000)
    assert (events.item < 400).all()
    season = (events.time - events.time.min()) // (91 * 86400)
    counts = np.zeros((4, 400))
    own = (events.item % 4 == 0) & (season < 4)
    np.add.at(counts, (season[own], events.item[own]), 1)
    return counts / counts.sum(1, keepdims=True)


def test_what_is_popular_changes_with_the_fashion():
    """Of a season's popularity nothing is left two seasons later; without fashion all of it is.

    A fashion may go on from one season into the next.
    """
    lasting = shares_by_season(0)
    fading = shares_by_season(30)
    for season in range(2):
        now, later = lasting[season], lasting[season + 2]
        best = now.argmax()
        assert later[best] > 0.8 * now[best]
        now, later = fading[season], fading[season + 2]
        best = now.argmax()
        assert later[best] < 0.4 * now[best]


def test_the_truth_but_for_the_items_is_that_without_fashion():
    config = SyntheticConfig(users=300, items=400, domains=3, topics=4)
    without = generate_events(config, 0, 300)
    fading = dataclasses.replace(config, fashion_days=20)
    found = generate_events(fading, 0, 300)
    for name in ("user", "domain", "time", "topic"):
        np.testing.assert_array_equal(
            getattr(found, name), getattr(without, name)
        )
    assert (found.item != without.item).mean() > 0.3


@pytest.fixture(scope="module")
def truth():
    """Events of the default truth, and the index of the user's event before each: in the same domain, in any related one."""
    config = SyntheticConfig(users=3000, items=6400)
    events = generate_events(config, 0, 3000)
    same, related = np.full(len(events.user), -1), np.full(len(events.user), -1)
    last, user = {}, None
    for index, domain in enumerate(events.domain.tolist()):
        if events.user[index] != user:
            last, user = {}, events.user[index]
        same[index] = last.get(domain, -1)
        related[index] = max(
            (at for name, at in last.items() if name < config.related),
            default=-1,
        )
        last[domain] = index
    return config, events, same, related


def repeats(events, of, before):
    """How often the item's topic is that of the event before, among the events that have one."""
    topic = events.item % 32
    of = of & (before >= 0)
    return (topic[of] == topic[before[of]]).mean()


def test_related_domains_reveal_one_anothers_topic(truth):
    config, events, same, related = truth
    for domain in range(config.related):
        mine = events.domain == domain
        # The last related event is nearer than the domain's own last one, so it tells more; both beat chance.
        assert (
            repeats(events, mine, related)
            > repeats(events, mine, same) + 0.08
            > 10 / config.topics
        )


def test_the_unrelated_domain_knows_itself_and_nothing_else(truth):
    config, events, same, related = truth
    unrelated = events.domain == config.related
    assert repeats(events, unrelated, same) > 0.7
    assert repeats(events, unrelated, related) == pytest.approx(
        1 / config.topics, abs=0.02
    )


def test_every_topic_and_item_comes_up():
    config = SyntheticConfig(users=3000, items=400, domains=4, exponent=0.5)
    events = generate_events(config, 0, 3000)
    for domain in range(4):
        assert len(np.unique(events.item[events.domain == domain])) == 100
    assert len(np.unique(events.topic)) == 32


@pytest.mark.parametrize(
    ("domains", "names", "related"),
    [
        (1, ["shop"], 1),
        (2, ["shop", "video"], 2),
        (3, ["shop", "video", "ads"], 2),
        (
            11,
            [
                "shop",
                "video",
                "navi",
                "coupon",
                "music",
                "books",
                "games",
                "travel",
                "news",
                "domain9",
                "ads",
            ],
            10,
        ),
        (
            9,
            [
                "shop",
                "video",
                "navi",
                "coupon",
                "music",
                "books",
                "games",
                "travel",
                "ads",
            ],
            8,
        ),
    ],
)
def test_domains_have_names_and_one_is_unrelated_from_three_on(
    domains, names, related
):
    config = SyntheticConfig(domains=domains)
    assert list(config.names) == names and config.related == related
    assert len(config.shares) == len(
        config.domain_items
    ) == domains and config.shares.sum() == pytest.approx(1)
    assert SyntheticConfig(domains=3, unrelated_share=0).names == (
        "shop",
        "video",
        "navi",
    )
    assert SyntheticConfig(domains=9, unrelated_share=0).names[-1] == "news"


def test_files_hold_the_events_and_the_truth(tmp_path, monkeypatch):
    config = SyntheticConfig(users=700, mean_length=10, seed=5)
    monkeypatch.setattr(trainer.data.synthetic, "_CHUNK_EVENTS", 1000)
    monkeypatch.setattr(trainer.data.synthetic, "_ROW_GROUP_CHUNKS", 2)
    monkeypatch.setattr(trainer.data.synthetic, "_FILE_EVENTS", 3000)
    count = synthesize_logs(tmp_path / "logs", config, processes=1)
    truth_file, *parts = sorted((tmp_path / "logs").iterdir())
    assert truth_file.name == "_truth.json"
    assert [path.name for path in parts] == [
        f"part-0000{number}.parquet" for number in range(3)
    ]
    table = pq.ParquetDataset(parts).read()
    events = generate_events(config, 0, 700)
    assert len(table) == count == len(events.user)
    np.testing.assert_array_equal(table["user_id"], events.user)
    np.testing.assert_array_equal(table["item_id"], events.item)
    np.testing.assert_array_equal(table["timestamp"], events.time)
    assert table["domain"].to_pylist() == [
        config.names[domain] for domain in events.domain
    ]
    truth = json.loads((tmp_path / "logs/_truth.json").read_text())
    assert truth["related"] == ["shop", "video", "navi"] and truth[
        "unrelated"
    ] == ["ads"]
    assert SyntheticConfig(**truth["config"]) == config
    assert (truth["first_user"], truth["last_user"], truth["interactions"]) == (
        0,
        700,
        count,
    )
    assert [pq.ParquetFile(part).num_row_groups for part in parts] == [2, 2, 1]

    dataset = prepare(
        PrepareConfig((str(tmp_path / "logs"),), str(tmp_path / "dataset"))
    )
    assert (dataset.users, dataset.interactions) == (700, count)
    assert [domain.name for domain in dataset.domains] == sorted(config.names)


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.ranks
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, monkeypatch):
    config = SyntheticConfig(users=2000, mean_length=10, seed=5)
    monkeypatch.setattr(trainer.data.synthetic, "_FILE_EVENTS", 4000)
    counts = {
        processes: synthesize_logs(
            tmp_path / str(processes), config, processes=processes
        )
        for processes in (1, 2, 3)
    }
    one = folder_bytes(tmp_path / "1")
    assert len(one) == 6 and counts[1] == counts[2] == counts[3]
    assert one == folder_bytes(tmp_path / "2") == folder_bytes(tmp_path / "3")


def test_slices_of_users_tile_the_whole(tmp_path, monkeypatch):
    config = SyntheticConfig(users=500, mean_length=10)
    monkeypatch.setattr(trainer.data.synthetic, "_FILE_EVENTS", 1500)
    whole = synthesize_logs(tmp_path / "whole", config, processes=1)
    tables, counts = [], []
    for first, last in ((0, 123), (123, 124), (124, None)):
        folder = tmp_path / str(first)
        counts.append(synthesize_logs(folder, config, first, last, processes=1))
        tables += [
            pq.read_table(path) for path in sorted(folder.glob("*.parquet"))
        ]
        truth = json.loads((folder / "_truth.json").read_text())
        assert (
            truth["first_user"],
            truth["last_user"],
            truth["interactions"],
        ) == (
            first,
            last or 500,
            counts[-1],
        )
        assert SyntheticConfig(**truth["config"]) == config
    assert sum(counts) == whole
    expected = pq.ParquetDataset(
        sorted((tmp_path / "whole").glob("*.parquet"))
    ).read()
    for name in expected.column_names:
        assert [
            value for table in tables for value in table[name].to_pylist()
        ] == expected[name].to_pylist()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (dict(first_user=-1), "first_user -1"),
        (dict(first_user=10), "first_user 10"),
        (dict(first_user=3, last_user=3), "last_user 3"),
        (dict(last_user=11), "last_user 11"),
        (dict(processes=0), "processes is 0"),
    ],
)
def test_users_or_processes_that_make_no_sense_are_named(
    tmp_path, given, named
):
    with pytest.raises(InputError, match=named):
        synthesize_logs(tmp_path / "logs", SyntheticConfig(users=10), **given)
    assert list(tmp_path.iterdir()) == []


ROOT = Path(__file__).parents[4]


@contextlib.contextmanager
def started(output, *arguments, **options):
    """launch/synthesize.py with two files or more for two processes, as a process."""
    command = [
        sys.executable,
        "launch/synthesize.py",
        "--output",
        output,
        "--mean-length",
        50,
        "--processes",
        2,
        *arguments,
    ]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def writers(pid):
    """The processes of a run that write its files."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists(),
    reason="needs /proc to find the processes",
)


@pytest.mark.ranks
@linux
def test_a_killed_process_ends_the_whole_with_one_line_and_leaves_nothing(
    tmp_path,
):
    with started(tmp_path / "logs", "--users", 50_000_000) as run:
        until(lambda: len(list(tmp_path.glob(".logs.*/folder/*.parquet"))) == 2)
        killed, other = writers(run.pid)
        os.kill(killed, signal.SIGKILL)
        out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (2, "")
    assert (
        err.startswith("error: a process that was writing ended by signal 9")
        and err.count("\n") == 1
    )
    assert (
        list(tmp_path.iterdir()) == [] and not Path(f"/proc/{other}").exists()
    )


@pytest.mark.ranks
@linux
def test_processes_end_when_the_one_that_started_them_is_gone(tmp_path):
    with started(tmp_path / "logs", "--users", 50_000_000) as run:
        until(lambda: len(list(tmp_path.glob(".logs.*/folder/*.parquet"))) == 2)
        children = writers(run.pid)
        run.kill()
        _, err = run.communicate(timeout=120)  # until nobody holds the pipe
        until(
            lambda: (
                not any(Path(f"/proc/{child}").exists() for child in children)
            )
        )
    assert len(children) == 2 and err == ""


@pytest.mark.ranks
def test_a_process_that_cannot_write_ends_the_whole_with_one_line_and_leaves_nothing(
    tmp_path,
):
    resource = pytest.importorskip("resource")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    with started(
        tmp_path / "logs", "--users", 1_000_000, preexec_fn=limit
    ) as run:
        out, err = run.communicate(timeout=120)
    assert (run.returncode, out) == (2, "")
    assert (
        err.startswith("error: output ")
        and "cannot be written" in err
        and err.count("\n") == 1
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ranks
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_for_terminals(tmp_path, terminal):
    reader, writer = pty.openpty() if terminal else os.pipe()
    users = 200_000 if terminal else 2_000
    with started(tmp_path / "logs", "--users", users, stderr=writer) as run:
        os.close(writer)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(reader, 4096):
                shown += part
        out, _ = run.communicate(timeout=120)
    os.close(reader)
    assert run.returncode == 0 and f"{users:,} users in 4 domains" in out
    if terminal:
        assert b"writing logs" in shown
    else:  # on a slow machine a line from time to time, and nothing is drawn anew
        told = rb"(writing logs: \d+ % after \d+ s\n)*"
        assert re.fullmatch(told, shown)


@pytest.mark.parametrize(
    "bad",
    [
        dict(users=0),
        dict(domains=0),
        dict(items=127),
        dict(mean_length=0.5),
        dict(mean_length=float("nan")),
        dict(seed=-1),
        dict(topics=1),
        dict(interest_drift=1.0),
        dict(unrelated_share=-0.1),
        dict(on_topic=float("nan")),
        dict(exponent=-1),
        dict(fashion_days=-1),
        dict(fashion_days=float("nan")),
        dict(hours=0),
    ],
)
def test_a_config_that_makes_no_sense_is_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        SyntheticConfig(**bad)


def test_an_output_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(InputError, match="already holds something"):
        synthesize_logs(tmp_path, SyntheticConfig(users=1))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
