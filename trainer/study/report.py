"""A study's report: `report.html` with its plots, and the same tables as `report.md`."""

from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from trainer.files.atomic import write_text
from trainer.reporting import plots
from trainer.reporting.html import rendered, table_page
from trainer.reporting.run_log import HEADLINE, METRICS_FILE, printable, read_records
from trainer.study.baselines import OURS
from trainer.study.results import RANKINGS
from trainer.study.tables import RANKED, mean, signed, tables


def write_study(folder: Path, study) -> Path:
    """Writes both, and returns the page's path."""
    made, title = tables(study), folder.resolve().name
    page = table_page(
        title, "study", _lead(study), made, _sections(study), study.failed
    )
    lines = [f"# {title}", "", *_lead(study), ""]
    lines += [
        f"{name} is not in the tables: {why}\n" for name, why in study.failed.items()
    ]
    for table in made:
        lines += [f"## {table.title}", "", table.text, "", table.markdown(), ""]
    write_text(folder / "report.md", "\n".join(lines))
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _lead(study):
    """Sentences."""
    dataset, config = study.dataset, study.config
    domains = ", ".join(
        f"{printable(domain.name)} ({domain.items:,} items)"
        for domain in dataset.domains
    )
    seeds = f"{len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    lines = [
        f"{dataset.users:,} users, {dataset.interactions:,} interactions; domains: {domains}. {seeds.capitalize()}. The newest "
        "item of a user is the test item, the one before it validation; epochs and settings are chosen by validation alone."
    ]
    if OURS in study.found and len(study.found) > 1:
        for ranking in RANKINGS:
            figures = {
                name: mean(found, ranking) for name, found in study.found.items()
            }
            own = figures.pop(OURS)
            best = max(figures, key=figures.get)
            share = signed(own / figures[best] - 1, "+.1%")
            first = f"Among {RANKED[ranking]} {OURS} has a mean {HEADLINE} of {own:.4f}"
            lines.append(
                f"{first}; the best of the others is {printable(best)} with {figures[best]:.4f} ({OURS}: {share})."
            )
    return lines


def _sections(study):
    """Plots, with a title and a sentence."""
    found = [
        (
            f"{HEADLINE} of all systems",
            "Mean over domains; the whiskers are the least and the largest seed.",
            _bars(study),
        )
    ]
    for key, values in study.sweeps.items():
        found.append(
            (
                f"{OURS} by {key}",
                f"Mean {HEADLINE} over domains, first seed.",
                _lines(key, values),
            )
        )
    if study.example:
        train = [
            record
            for record in read_records(study.example / METRICS_FILE)
            if record["kind"] == "train"
        ]
        domains = plots.styles([domain.name for domain in study.dataset.domains])
        found.append(
            (
                f"λ by domain in a run of {OURS}",
                "What the losses weigh.",
                plots.weight_plot(train, domains),
            )
        )
        text = "Single-domain minus cross-domain loss over the same targets; below 0 the other domains harm the prediction."
        found.append(
            ("φ, the negative transfer gap", text, plots.gap_plot(train, domains))
        )
    return rendered(section for section in found if section[2] is not None)


def _bars(study):
    if not study.found:
        return None
    figure = go.Figure()
    for ranking, style in zip(RANKINGS, plots.styles(list(RANKINGS)), strict=True):
        by_seed = {
            name: np.nanmean(
                found.by_domain(ranking, HEADLINE, len(study.dataset.domains)), axis=1
            )
            for name, found in study.found.items()
        }
        means = [float(of.mean()) for of in by_seed.values()]
        spread = {
            "type": "data",
            "symmetric": False,
            "array": [float(of.max() - of.mean()) for of in by_seed.values()],
            "arrayminus": [float(of.mean() - of.min()) for of in by_seed.values()],
            "visible": any(len(of) > 1 for of in by_seed.values()),
        }
        labels = [plots.styles([name])[0].label for name in by_seed]
        figure.add_bar(
            x=labels,
            y=means,
            error_y=spread,
            name=RANKED[ranking],
            marker_color=style.colour,
        )
    figure.update_traces(yhoverformat=".4f")
    return plots.finished(figure, 420).update_xaxes(
        title=None, tickformat=None, showgrid=False
    )


def _lines(key, values):
    figure = go.Figure()
    for ranking, style in zip(RANKINGS, plots.styles(list(RANKINGS)), strict=True):
        heights = [mean(found, ranking) for _, found in values]
        figure.add_scatter(
            x=[str(value) for value, _ in values],
            y=heights,
            name=RANKED[ranking],
            line=style.line,
        )
    figure.update_traces(mode="lines+markers", yhoverformat=".4f")
    return plots.finished(figure, 320).update_xaxes(
        title=key, tickformat=None, type="category"
    )
