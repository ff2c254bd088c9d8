"""Log lines that are too wide for the console go on below, cut between figures and never in one."""

import re
import textwrap

from rich.cells import cell_len
from rich.text import Text

SECTION = "  │  "
WIDTH_IN_A_PIPE = 100
INDENT = " " * 9  # below the step, beside the clock
# Behind a comma, or where two blanks stand before the next figure.
_CUT = re.compile(r"(?<=, )(?=\S)|(?<=\S)(?=  +\S)")


def fold_line(line: Text, width: int) -> Text:
    """A log line of at most `width` columns a row, where its figures allow it.

    A section that does not fit beside the one before begins a row of its own.

        0:03:20  step  50/100  epoch 0  loss 2.5000  │  λ φ Books 0.500 -0.125, Toys 0.500 -0.125

    in 60 columns:

        0:03:20  step  50/100  epoch 0  loss 2.5000
                 λ φ Books 0.500 -0.125, Toys 0.500 -0.125
    """
    if line.cell_len <= width:
        return line
    rows = [Text()]
    for section in line.split(SECTION):
        is_first = not rows[0].cell_len
        with_separator = len(SECTION) + section.cell_len
        if is_first or rows[-1].cell_len + with_separator <= width:
            separator = Text("" if is_first else SECTION, "dim")
        else:
            rows.append(Text(INDENT))
            separator = Text()
        rows[-1].append_text(separator)
        _append_section(rows, section, width)
    return Text("\n").join(rows)


def wrap_message(line: str, width: int) -> str:
    """A message in rows of at most `width` columns, cut between words; a long path stays whole."""
    return textwrap.fill(
        line,
        width,
        subsequent_indent=INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def _append_section(rows: list[Text], section: Text, width: int) -> None:
    """Appends a section's figures to the last row, and to further ones where it is full."""
    cuts = [match.start() for match in _CUT.finditer(section.plain)]
    for figure in section.divide(cuts):
        columns = cell_len(figure.plain.rstrip())
        if rows[-1].cell_len + columns > width:
            rows[-1].rstrip()
            rows.append(Text(INDENT))
            begin = len(figure.plain) - len(figure.plain.lstrip())
            figure = figure[begin:]
        rows[-1].append_text(figure)
