"""What every page of ours is made with: Jinja2 templates that escape all that they are given, tables, and Plotly's figures."""

from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """sense: "better", "worse", "best" (of its column) or nothing."""

    text: str
    sense: str = ""


@dataclass(frozen=True)
class Table:
    """columns: their heads; rows: of cells, the first one names the row."""

    title: str
    text: str
    columns: list[str]
    rows: list[list[Cell]] = field(default_factory=list)

    def markdown(self) -> str:
        """The same as Markdown: the best of a column is bold; signs say the rest."""
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1)]
        lines += [
            [f"**{cell.text}**" if cell.sense == "best" else cell.text for cell in row]
            for row in self.rows
        ]
        return "\n".join(
            "| " + " | ".join(text.replace("|", "\\|") for text in line) + " |"
            for line in lines
        )


def table_page(
    name: str,
    kind: str,
    lead: list[str],
    tables: list[Table],
    sections: list[dict],
    failed: dict[str, str],
) -> str:
    """A page of sentences, a plot, tables, more plots. failed: {run: why it is in none of the tables}."""
    page = template(Path(__file__).with_name("tables.html.jinja"))
    return page.render(
        name=name, kind=kind, lead=lead, tables=tables, sections=sections, failed=failed
    )


def template(file: Path):
    """A Jinja2 template, by the path of its file."""
    environment = Environment(
        loader=FileSystemLoader(file.parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(file.name)


def rendered(sections) -> list[dict]:
    """title, text and plot (HTML, None without a figure) of (title, text, figure). The page holds Plotly's library once."""
    library, found = True, []
    for place, (title, text, figure) in enumerate(sections):
        plot = None
        if figure is not None:
            form = {
                "config": {"displayModeBar": False},
                "full_html": False,
                "div_id": f"plot{place}",
            }
            plot = Markup(figure.to_html(include_plotlyjs=library, **form))
            library = False
        found.append({"title": title, "text": text, "plot": plot})
    return found
