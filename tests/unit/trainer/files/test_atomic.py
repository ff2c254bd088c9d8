"""What gets its name by a rename is on disk by then; what is late is looked for again."""

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainer.files.atomic
import trainer.retraining.publish
from tests.helpers.runs import finished_run, rank_of_one
from trainer.config.prepare import PrepareConfig
from trainer.config.retraining import PublishConfig
from trainer.config.serving import (
    ExportConfig,
    HistoriesConfig,
    RecommendConfig,
)
from trainer.data.prepare.pipeline import prepare
from trainer.evaluation.user_ranks import UserRanks, write_ranks
from trainer.files.atomic import (
    Patience,
    flush_tree,
    is_transient,
    retry_patiently,
    write_text,
)
from trainer.files.staged import StagedOutput, new_output_folder, staged_folder
from trainer.retraining.publish import publish
from trainer.serving.export import export_run
from trainer.serving.recommend import recommend


class Disk:
    """Knows which files are on disk as they are now, and what was moved that was not."""

    def __init__(self, monkeypatch, root):
        self.root, self.flushed, self.torn, self.moved = str(root), {}, [], []
        fsync = os.fsync

        def flushing(handle):
            path = os.readlink(f"/proc/self/fd/{handle}")
            self.flushed[path] = self.state(path)
            return fsync(handle)

        monkeypatch.setattr(os, "fsync", flushing)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self.moving(getattr(os, name)))

    def state(self, path):
        facts = os.stat(path)
        return (
            facts.st_ino
            if os.path.isdir(path)
            else (facts.st_ino, facts.st_size, facts.st_mtime_ns)
        )

    def moving(self, real):
        def moved(source, target, **options):
            source, target = os.path.abspath(source), os.path.abspath(target)
            if source.startswith(self.root):
                self.check(source)
                self.moved.append(os.path.relpath(target, self.root))
            real(source, target, **options)
            for path in [
                path
                for path in self.flushed
                if path == source or path.startswith(source + "/")
            ]:
                self.flushed[target + path[len(source) :]] = self.flushed.pop(
                    path
                )

        return moved

    def check(self, source):
        """Notes each file and folder that is moved, or lies in what is moved, and is not on
        disk."""
        paths = [source]
        for place, folders, names in os.walk(source):
            paths += [os.path.join(place, name) for name in (*folders, *names)]
        for path in paths:
            if self.flushed.get(path) != self.state(path):
                self.torn.append(os.path.relpath(path, self.root))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with rank_of_one() as ranks:
        own = ["model.prediction=cross", "model.time_knots=0"]
        yield finished_run(tmp_path_factory.mktemp("finished"), ranks, *own)


@pytest.fixture
def disk(monkeypatch, tmp_path, finished):
    return Disk(monkeypatch, tmp_path)


def a_text(folder, run):
    write_text(folder / "best.json", "{}")


def a_stage(folder, run):
    with staged_folder(folder / "stage") as partial:
        (partial / "below").mkdir()
        (partial / "below" / "file").write_text("1")


def a_new_folder(folder, run):
    with new_output_folder(folder / "logs") as (partial, _):
        (partial / "file").write_text("1")


def a_delivery(folder, run):
    with StagedOutput(folder / "output", {"made": "from"}) as work:
        with work.stage("dataset") as partial:
            (partial / "file").write_text("1")
        work.deliver("dataset")


def ranks_of_users(folder, run):
    columns = np.ones((4, 3), np.int32)
    write_ranks(folder / "ranks.parquet", UserRanks(*columns))


def a_dataset(folder, run):
    columns = {
        "user_id": [1, 1, 2, 2],
        "item_id": [1, 2, 3, 4],
        "timestamp": [1, 2, 3, 4],
    }
    columns["domain"] = ["a", "b", "a", "b"]
    pq.write_table(pa.table(columns), folder / "log.parquet")
    prepare(
        PrepareConfig(
            inputs=(str(folder / "log.parquet"),),
            output=str(folder / "data"),
            streams=1,
        )
    )


def an_export(folder, run):
    export_run(run.folder, folder / "model", run.ranks, ExportConfig())


def a_version(folder, run):
    publish(run.folder, folder / "published", run.ranks, PublishConfig())


def recommendations(folder, run):
    recommend(
        run.folder,
        folder / "top",
        run.ranks,
        RecommendConfig(k=2),
        HistoriesConfig(),
    )


MADE = {
    a_text: "best.json",
    a_stage: "stage",
    a_new_folder: "logs",
    a_delivery: "output",
    ranks_of_users: "ranks.parquet",
    a_dataset: "data",
    an_export: "model",
    a_version: "published/current.json",
    recommendations: "top",
}


@pytest.mark.ranks
@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_all_of_it_is_on_disk_before_it_has_its_name(
    disk, finished, tmp_path, make
):
    make(tmp_path, finished)
    assert disk.torn == []
    assert MADE[make] in disk.moved
    assert (
        str((tmp_path / MADE[make]).parent) in disk.flushed
    )  # and so is the name


def test_a_file_that_is_not_flushed_is_seen(disk, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("1")
    flush_tree(tmp_path / "folder")
    (tmp_path / "folder" / "file").write_text("22")
    (tmp_path / "folder").rename(tmp_path / "named")
    assert disk.torn == ["folder/file"]


def late(times, number):
    """Something to read that fails so many times first."""
    left = [times]

    def read():
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), "file")
        return "read"

    return read, left


PASSING = (errno.ENOENT, errno.ESTALE, errno.EIO)
LASTING = (errno.EACCES, errno.ENOSPC, errno.EISDIR, errno.EROFS, errno.EDQUOT)


@given(st.integers(0, 5), st.sampled_from(PASSING))
def test_what_passes_is_tried_again(times, number):
    read, left = late(times, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.files.atomic, "LATENESS", 60.0)
        patch.setattr(trainer.files.atomic, "PAUSE", 0.0)
        patch.setattr(trainer.files.atomic, "is_shared", lambda folder: True)
        assert retry_patiently(read, Patience(Path())) == "read" and left == [0]


@given(st.sampled_from(LASTING))
def test_what_lasts_is_not(number):
    read, left = late(3, number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.files.atomic, "LATENESS", 60.0)
        patch.setattr(trainer.files.atomic, "is_shared", lambda folder: True)
        with pytest.raises(OSError, match=r"file"):
            retry_patiently(read, Patience(Path()))
    assert left == [2] and not is_transient(number)


@pytest.mark.parametrize(("lateness", "shared"), [(0.0, True), (3600.0, False)])
def test_once_time_is_up_nothing_is_late_and_on_a_hosts_own_disk_nothing_ever_is(
    monkeypatch, lateness, shared
):
    monkeypatch.setattr(trainer.files.atomic, "LATENESS", lateness)
    monkeypatch.setattr(
        trainer.files.atomic, "is_shared", lambda folder: shared
    )
    read, left = late(3, errno.ENOENT)
    with pytest.raises(FileNotFoundError):
        retry_patiently(read, Patience(Path()))
    assert left == [2]
    assert retry_patiently(late(0, errno.ENOENT)[0], Patience(Path())) == "read"


MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:5 / /proc rw - proc proc rw
40 22 0:40 / /mnt/shared rw - nfs4 server:/export rw
41 40 0:41 / /mnt/shared/own\\040disk rw - xfs /dev/sdb rw
42 22 0:42 / /lustre rw shared:7 - lustre mgs:/fs rw
43 22 0:43 / /bucket rw - fuse.s3fs s3fs rw
44 22 0:44 / /lustre rw - tmpfs none rw
"""


@pytest.mark.parametrize(
    ("folder", "shared"),
    [
        ("/", False),
        ("/mnt", False),
        ("/mnt/shared", True),
        ("/mnt/shared/run/that is/not there", True),
        ("/mnt/shared2", False),
        ("/mnt/shared/own disk/run", False),
        ("/mnt/shared/own", True),
        ("/bucket/run", True),
        ("/lustre/run", False),  # what was mounted last is what one sees
    ],
)
def test_which_folders_other_hosts_may_write_in(monkeypatch, folder, shared):
    monkeypatch.setattr(Path, "read_text", lambda file, **_: MOUNTS)
    assert trainer.files.atomic.is_shared(Path(folder)) == shared


def test_where_nobody_knows_a_folder_is_shared(monkeypatch, tmp_path):
    def none(file, **_):
        raise FileNotFoundError

    assert not trainer.files.atomic.is_shared(tmp_path)
    monkeypatch.setattr(Path, "read_text", none)
    assert trainer.files.atomic.is_shared(tmp_path)


def test_a_text_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(os, "fsync", full)
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    write_text(Path(tmp_path / "file"), "new")
    assert (tmp_path / "file").read_text() == "new"
