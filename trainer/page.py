"""What every page of ours is made with: Jinja2 templates that escape all that they are given, and Plotly's figures in them."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def template(file: Path):
    """A Jinja2 template, by the path of its file."""
    environment = Environment(loader=FileSystemLoader(file.parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(file.name)


def rendered(sections) -> list[dict]:
    """title, text and plot (HTML, None without a figure) of (title, text, figure). The page holds Plotly's library once."""
    library, found = True, []
    for place, (title, text, figure) in enumerate(sections):
        plot = None
        if figure is not None:
            form = {"config": {"displayModeBar": False}, "full_html": False, "div_id": f"plot{place}"}
            plot = Markup(figure.to_html(include_plotlyjs=library, **form))
            library = False
        found.append({"title": title, "text": text, "plot": plot})
    return found
