"""HTML pages: Jinja2 templates, which escape all that they are given, tables and Plotly's figures.

A page is one file that asks for nothing. Plotly's JavaScript stands in it compressed: its basic
bundle (lines and bars), a ninth of the whole in size. `assets/page.js` unpacks it, draws the
figures in the reader's light or dark colours, and puts legends below on a narrow screen.

    assets/plotly-basic-4.1.1.min.js.gz    npm's plotly.js-basic-dist-min, by gzip -9 -n
"""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from trainer.reporting.colours import DARK_COLOURS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ASSETS = Path(__file__).with_name("assets")
LIBRARY = ASSETS / "plotly-basic-4.1.1.min.js.gz"


@dataclass(frozen=True)
class Cell:
    """A cell of a table. sense: "better", "worse", "best" (of its column) or nothing."""

    text: str
    sense: str = ""


@dataclass(frozen=True)
class Table:
    """A table. columns: their heads; rows: of cells, the first one names the row.

    totals: how many of the last rows are of means or sums. words: the columns that hold words.
    """

    title: str
    text: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    totals: int = 0
    words: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table as Markdown: the best of a column is bold; signs say the rest.

        | system | NDCG@10 |
        | --- | ---: |
        | SyNCRec | **0.3500** |
        | SASRec | 0.3100 |
        """
        rule = ["---"] + ["---:"] * (len(self.columns) - 1)
        lines = [_markdown_line(self.columns), _markdown_line(rule)]
        for row in self.rows:
            lines.append(_markdown_line([_markdown_cell(cell) for cell in row]))
        return "\n".join(lines)


def _markdown_cell(cell: Cell) -> str:
    if cell.sense == "best":
        return f"**{cell.text}**"
    return cell.text


def _markdown_line(texts: list[str]) -> str:
    escaped = [text.replace("|", "\\|") for text in texts]
    return f"| {' | '.join(escaped)} |"


@dataclass(frozen=True)
class Chart:
    """One of several figures side by side, below each other where there is no room."""

    figure: "Figure"
    caption: str = ""


# title, a sentence, and a figure, several, or None where there is nothing to draw
Section = tuple[str, str, "Figure | list[Chart] | None"]


def render_table_page(
    name: str,
    kind: str,
    lead: list[str],
    tables: list[Table],
    sections: list[dict[str, Any]],
    failed: dict[str, str],
) -> str:
    """A page of sentences, a plot, tables, more plots.

    sections: as `render_sections` gives them. failed: {run: why it is in none of the tables}.
    """
    return render_page(
        "tables.html.jinja",
        name=name,
        kind=kind,
        lead=lead,
        tables=tables,
        sections=sections,
        failed=failed,
    )


def render_page(
    template: str, sections: list[dict[str, Any]], **content: Any
) -> str:
    """A whole page. template: a file of `assets`; sections: as `render_sections` gives them.

    Plotly's library is in the page only where a section has a chart.
    """
    page = _load_template(template)
    library = None
    if sections:
        library = Markup(_encoded_library())
    return page.render(
        sections=sections,
        library=library,
        dark_colours=_script_json(DARK_COLOURS),
        **content,
    )


def page_title(folder: Path) -> str:
    """The name of a folder, with its parent's where the name is but a number.

    runs/shop    shop
    studies/1    studies/1
    """
    folder = folder.resolve()
    if folder.name.isdigit() and folder.parent.name:
        return f"{folder.parent.name}/{folder.name}"
    return folder.name


@cache
def _load_template(name: str) -> Template:
    """A Jinja2 template of `assets`."""
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


@cache
def _encoded_library() -> str:
    """Plotly's library as it stands in a page: gzip, as base64."""
    return base64.b64encode(LIBRARY.read_bytes()).decode("ascii")


def _script_json(value: Mapping[str, Any]) -> Markup:
    """JSON for a script element: nothing in it ends the element."""
    return _escape_script(json.dumps(value))


def _escape_script(text: str) -> Markup:
    return Markup(text.replace("<", "\\u003c"))


def render_sections(sections: Iterable[Section]) -> list[dict[str, Any]]:
    """title, text and charts (caption, height, JSON) of the sections that have a figure."""
    pages = []
    for title, text, figure in sections:
        if figure is None or figure == []:
            continue
        charts = figure
        if not isinstance(figure, list):
            charts = [Chart(figure)]
        rendered = []
        for chart in charts:
            rendered.append(
                {
                    "caption": chart.caption,
                    "height": chart.figure.layout.height,
                    "json": _escape_script(chart.figure.to_json()),
                }
            )
        pages.append({"title": title, "text": text, "charts": rendered})
    return pages
