"""Files that the product reads and writes are UTF-8 whatever the locale: no text is opened without an encoding."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import style

ROOT = Path(__file__).resolve().parents[2]
_TEXT_METHODS = {"read_text": 0, "write_text": 1}  # where the encoding stands
# They write ASCII by themselves, or hand the mode on.
_NO_TEXT = {"os.open", "tarfile.open", "safe_open", "opener"}


def opened_without_encoding(source: str) -> Iterator[int]:
    """The lines of calls that open text in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg for keyword in node.keywords}
        if "encoding" in keywords:
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        by_position = _TEXT_METHODS.get(last)
        if (
            (by_position is not None and len(node.args) <= by_position)
            or (last in ("open", "fdopen") and _opens_text(name, node))
            or (
                keywords & {"text", "universal_newlines"}
                and last
                in (
                    "run",
                    "Popen",
                    "check_output",
                )
            )
        ):
            yield node.lineno


def _opens_text(name: str, node: ast.Call) -> bool:
    """Whether a call of open(file, mode) or file.open(mode) is of text."""
    if name in _NO_TEXT:
        return False
    if name in ("open", "os.fdopen"):
        modes = node.args[1:2]
    else:
        modes = node.args[:1]
    modes += [word.value for word in node.keywords if word.arg == "mode"]
    if not modes:
        return name == "open"
    mode = modes[0]
    is_mode = isinstance(mode, ast.Constant) and isinstance(mode.value, str)
    return (
        is_mode and "b" not in mode.value and set(mode.value) <= set("rwax+t")
    )


FILES = sorted(
    file for name in style.PRODUCT for file in (ROOT / name).rglob("*.py")
)


@pytest.mark.parametrize(
    "file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES]
)
def test_text_is_opened_with_an_encoding(file):
    source = file.read_text(encoding="utf-8")
    assert list(opened_without_encoding(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "open(file)",
        "open(file, 'w')",
        "file.open('a')",
        "file.read_text()",
        "file.write_text(text)",
        "os.fdopen(1, 'w')",
        "subprocess.run(words, text=True)",
    ],
)
def test_the_locale_is_seen(source):
    assert list(opened_without_encoding(source)) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "open(file, 'rb')",
        "file.open('rb')",
        "file.read_text('utf-8')",
        "file.write_text(text, encoding='utf-8')",
        "tar.open(name)",
        "Run.open('runs/1')",
    ],
)
def test_other_calls_are_left_alone(source):
    assert list(opened_without_encoding(source)) == []
