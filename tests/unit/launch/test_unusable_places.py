"""An output folder that cannot be made is one line and status 2, in every command."""

import errno
import importlib
import os
import sys

import pytest

from trainer.errors import InputError, exit_on_input_error, explain_os_error

LOG = "user_id,item_id,domain,timestamp\nu,i,d,1\nu,j,d,2\nu,k,d,3\n"
COMMANDS = {
    "prepare": ["--input", "{log}", "--output", "{place}"],
    "synthesize": ["--output", "{place}", "--users", "5", "--processes", "1"],
    "demo": ["--output", "{place}"],
    "retrain": ["folder={place}", "name=1", "input=[{log}]"],
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("below", ["file", "long"])
def test_a_place_that_cannot_be_made(
    name, below, tmp_path, monkeypatch, capsys
):
    log = tmp_path / "log.csv"
    log.write_text(LOG)
    place = log / "out"
    if below == "long":
        place = tmp_path / ("x" * 300) / "out"
    words = []
    for word in COMMANDS[name]:
        words.append(word.format(log=log, place=place))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as exit_request:
        importlib.import_module(f"launch.{name}").main()
    errors = capsys.readouterr().err.splitlines()
    assert exit_request.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert str(place) in errors[0] or str(place.parent) in errors[0]
    assert sorted(tmp_path.iterdir()) == [log]


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "give a place"),
        (errno.EACCES, "give a place"),
        (errno.EPERM, "give a place"),
        (errno.ENOTDIR, "give a place"),
        (errno.ENAMETOOLONG, "give a place"),
    ],
)
def test_what_no_command_has_foreseen_is_one_line_too(number, way_out, capsys):
    @exit_on_input_error
    def main():
        raise OSError(number, os.strerror(number), "/data/out")

    with pytest.raises(SystemExit) as exit_request:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_request.value.code == InputError.status
    assert line.startswith(
        f"error: /data/out: {os.strerror(number)}: {way_out}"
    )


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EBADF, errno.ECHILD])
def test_a_fault_of_the_program_keeps_its_trace(number):
    assert explain_os_error(OSError(number, os.strerror(number), "/f")) is None
    assert explain_os_error(OSError("no number")) is None
