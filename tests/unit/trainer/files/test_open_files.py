"""Files that cannot be read: which errors are the file's, and which this machine's."""

import errno
import os

import pytest

from trainer.files.open_files import TooManyOpenFiles, explain_unreadable


def error_of(number):
    return OSError(number, os.strerror(number), "/data/f")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_lack_of_descriptors_is_said(number):
    refusal = explain_unreadable("/data/f", error_of(number), "prepare again")
    assert isinstance(refusal, TooManyOpenFiles)
    assert "prepare again" not in str(refusal)


@pytest.mark.parametrize(
    "number",
    [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOMEM, errno.ETIMEDOUT],
)
def test_a_disk_that_is_away_is_no_fault_of_the_file(number):
    refusal = str(
        explain_unreadable("/data/f", error_of(number), "prepare again")
    )
    assert refusal.startswith("/data/f cannot be read (")
    assert "disk or mount" in refusal and "prepare again" not in refusal


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_right_that_is_missing_is_named(number):
    refusal = str(
        explain_unreadable("/data/f", error_of(number), "prepare again")
    )
    assert "right to read" in refusal and "prepare again" not in refusal


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EISDIR, errno.EINVAL])
def test_a_file_at_fault_is_made_again(number):
    refusal = str(
        explain_unreadable("/data/f", error_of(number), "prepare again")
    )
    assert refusal.endswith("prepare again")
