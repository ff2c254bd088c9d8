"""Where kernels come from, and what is said where they cannot be had."""

import logging

import pytest

from kernels import build


def test_what_cannot_be_built_says_why_and_leaves_nothing(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.Unavailable, match=r"false cannot build block\.cpp"):
        build.build("block")
    with caplog.at_level(logging.WARNING):
        reason = build.missing.__wrapped__("block", "all is slow")
    assert "cannot build" in reason and f"no compiled block, so all is slow: {reason}" in caplog.text
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
