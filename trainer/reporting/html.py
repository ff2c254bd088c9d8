"""HTML pages: Jinja2 templates, which escape all that they are given, tables and Plotly's figures."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Cell:
    """A cell of a table. sense: "better", "worse", "best" (of its column) or nothing."""

    text: str
    sense: str = ""


@dataclass(frozen=True)
class Table:
    """A table. columns: their heads; rows: of cells, the first one names the row."""

    title: str
    text: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)

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


def render_table_page(
    name: str,
    kind: str,
    lead: list[str],
    tables: list[Table],
    sections: list[dict[str, Any]],
    failed: dict[str, str],
) -> str:
    """A page of sentences, a plot, tables, more plots.

    sections: as `rendered` gives them. failed: {run: why it is in none of the tables}.
    """
    page = load_template(Path(__file__).with_name("tables.html.jinja"))
    return page.render(
        name=name,
        kind=kind,
        lead=lead,
        tables=tables,
        sections=sections,
        failed=failed,
    )


def load_template(file: Path) -> Template:
    """A Jinja2 template, by the path of its file."""
    environment = Environment(
        loader=FileSystemLoader(file.parent),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(file.name)


def render_sections(
    sections: Iterable[tuple[str, str, "Figure | None"]],
) -> list[dict[str, Any]]:
    """title, text and plot (HTML, None without a figure) of (title, text, figure).

    The page holds Plotly's library once.
    """
    library = True
    pages = []
    for number, (title, text, figure) in enumerate(sections):
        plot = None
        if figure is not None:
            html = figure.to_html(
                include_plotlyjs=library,
                config={"displayModeBar": False},
                full_html=False,
                div_id=f"plot{number}",
            )
            plot = Markup(html)
            library = False
        pages.append(
            {
                "title": title,
                "text": text,
                "plot": plot,
            }
        )
    return pages
