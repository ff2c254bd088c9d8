"""What README shows works as printed: commands parse, files and names are there, figures are ours."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import trainer
from launch.cli import COMMANDS
from trainer.config.load import load_config
from trainer.config.prepare import PrepareConfig

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "tutorial.md",
    ROOT / "docs" / "serve.md",
    ROOT / "docs" / "evaluate.md",
    ROOT / "docs" / "observe.md",
]
LONGEST_SENTENCE = 30  # words
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = re.compile(
    r"(?:syncrec (?P<name>[a-z]+)|(?:.* )?launch/(?P<script>[a-z]+)\.py)\s(?P<words>.*)"
)


def commands():
    """(page, command) of every command of ours, in fences, indented, or in the text."""
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            candidates = [line.strip()]
            candidates += re.findall(r"`([^`]+)`", line)
            for text in candidates:
                is_one = re.match(r"(syncrec|python launch/|deepspeed) ?", text)
                if is_one and COMMAND.fullmatch(text) and "…" not in text:
                    found.append((page.name, text))
    return found


def blocks(language=""):
    return re.findall(
        rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE
    )


def test_there_are_commands_to_look_at():
    shown = [text for page, text in commands() if page == "README.md"]
    assert len(shown) >= 6
    assert len(commands()) > 15


@pytest.mark.parametrize(("page", "text"), commands())
def test_a_command_parses_as_printed(page, text):
    match = COMMAND.fullmatch(text)
    name = match["name"] or match["script"]
    assert name in COMMANDS, text
    # What the page says beside a command stands behind several blanks.
    words = shlex.split(re.split(r"\s{3,}|\s+#", match["words"])[0])
    if name == "stack":
        assert words in (["install"], ["check"], ["torch"])
        return
    options = importlib.import_module(f"launch.{name}").parse(words)
    if name == "train":
        load_config(options.config, options.settings)
    if name == "study":
        load_config(options.base, [])


def test_make_has_what_is_made_and_the_environment_is_activated():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\S+)", README, re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)
    activation = README.index("source .venv/bin/activate")
    assert activation < README.index("syncrec prepare")


def test_linked_files_are_there():
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert len(links) > 8
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_python_is_python_and_its_names_are_ours():
    (code,) = blocks("python")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert node.module == "trainer"
            for alias in node.names:
                assert hasattr(trainer, alias.name)
        if isinstance(node, ast.Attribute) and node.attr != "by_domain":
            assert hasattr(trainer.Run, node.attr), node.attr


def test_the_log_has_the_columns_that_are_read_by_default():
    (header,) = [
        block.splitlines()[0]
        for block in blocks()
        if block.startswith("user_id,")
    ]
    config = PrepareConfig(inputs=("x",), output="y")
    assert header.split(",") == [
        config.user_column,
        config.item_column,
        config.domain_column,
        config.time_column,
    ]


def test_the_figures_are_those_of_the_record():
    records = ""
    for name in ("amazon4.md", "studies/kuairand1k.md"):
        file = ROOT / "docs/experiments" / name
        records += file.read_text(encoding="utf-8")
    figures = re.findall(r"0\.\d{4}", "".join(README.split("## Is it for")[1]))
    assert len(figures) == 16
    for figure in figures:
        assert figure in records


def test_the_first_command_is_on_the_first_screen():
    lines = README.splitlines()
    first = lines.index("```")
    assert first < 20


def test_no_sentence_is_long():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^[|#!].*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`]*`", "code", text)
    for paragraph in re.split(r"\n\s*\n|\n- ", text):
        for sentence in re.split(r"(?<=[.:])\s+", paragraph):
            words = sentence.split()
            assert len(words) <= LONGEST_SENTENCE, sentence
