"""Where kernels come from, and what is said where they cannot be had."""

import logging
import os
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from syncrec_kernels import build

pytestmark = pytest.mark.ranks  # they start processes


def test_what_cannot_be_built_says_why_and_leaves_nothing(
    monkeypatch, tmp_path, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(
        build.Unavailable, match=r"false cannot build block\.cpp"
    ):
        build.build("block")
    with caplog.at_level(logging.WARNING):
        reason = build.why_unavailable.__wrapped__("block", "all is slow")
    assert (
        "cannot build" in reason
        and f"no compiled block, so all is slow: {reason}" in caplog.text
    )
    assert not list(tmp_path.rglob("*.so"))


def test_a_library_is_built_anew_when_a_header_changes(monkeypatch, tmp_path):
    """What is found under its name is taken as it is."""
    for name in ("one.cpp", "shared.h"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(build, "__file__", str(tmp_path / "build.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build.build("one")
    assert build.build("one") == first and first.exists()
    (tmp_path / "shared.h").write_text("// another\n")
    assert build.build("one") != first


@pytest.fixture
def empty_source(monkeypatch, tmp_path):
    """The kernel `one`, of an empty source, and a cache of its own."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "one.cpp").write_text("")
    monkeypatch.setattr(
        build, "__file__", str(tmp_path / "source" / "build.py")
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path


def test_builders_of_one_number_do_not_disturb_each_other(
    empty_source, monkeypatch
):
    """Two hosts or containers that share a home have the same process numbers."""
    real, both, outputs = subprocess.run, Barrier(2, timeout=60), []

    def at_once(command, **options):
        outputs.append(command[command.index("-o") + 1])
        both.wait()  # both have begun before one of them is done
        done = real(command, **options)
        both.wait()
        return done

    monkeypatch.setattr(subprocess, "run", at_once)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with ThreadPoolExecutor(2) as hosts:
        first, second = (
            host.result()
            for host in [hosts.submit(build.build, "one") for _ in range(2)]
        )
    assert first == second and first.is_file() and len(set(outputs)) == 2
    assert [file.name for file in first.parent.iterdir()] == [first.name]
    assert stat.S_IMODE(first.stat().st_mode) == 0o755


@pytest.mark.parametrize("how", ["a file in its place", "no room"])
def test_a_cache_that_cannot_be_written_is_done_without(
    empty_source, monkeypatch, how
):
    cache = empty_source / "cache"
    if how == "a file in its place":
        cache.write_text("")
    else:
        real = tempfile.TemporaryFile

        def full(*args, dir=None, **kwargs):
            if str(dir).startswith(str(cache)):
                raise OSError(28, os.strerror(28))
            return real(*args, dir=dir, **kwargs)

        monkeypatch.setattr(tempfile, "TemporaryFile", full)
    library = build.build("one")
    assert (
        library.parent == empty_source / "temporary" / f"syncrec-{os.getuid()}"
    )
    assert (
        library.is_file()
        and stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    )
    written = library.stat().st_mtime_ns
    assert (
        build.build("one") == library and library.stat().st_mtime_ns == written
    )


def test_a_folder_into_which_others_may_write_is_no_place_for_a_library(
    empty_source,
):
    (empty_source / "cache").write_text("")
    folder = empty_source / "temporary" / f"syncrec-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(build.Unavailable, match="others may write in it"):
        build.build("one")
    folder.rmdir()
    folder.symlink_to(empty_source / "source")
    with pytest.raises(build.Unavailable, match="another user's"):
        build.build("one")
    assert not list(Path(empty_source).rglob("*.so"))


def test_a_kernel_that_is_not_for_this_processor_is_not_read_on(
    empty_source, monkeypatch
):
    """Every process finds that out for itself."""
    (empty_source / "source" / "one.cpp").write_text(
        '#error not this one\n#include "nowhere.h"\n'
    )
    real, said = subprocess.run, []

    def run(command, **options):
        done = real(command, **options)
        said.append(done.stderr)
        return done

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(build.Unavailable, match="#error not this one"):
        build.build("one")
    assert "nowhere.h" not in said[0]
