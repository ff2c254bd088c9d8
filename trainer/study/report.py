"""A study's report: `report.html` with its plots, and the same tables as `report.md`."""

from pathlib import Path

import plotly.graph_objects as go

from trainer.config.study import OURS
from trainer.files.atomic import write_text
from trainer.reporting import plots
from trainer.reporting.console import (
    escape_name,
    format_signed,
    split_sentence,
)
from trainer.reporting.html import (
    Section,
    page_title,
    render_sections,
    render_table_page,
)
from trainer.reporting.run_log import read_records
from trainer.run_files import HEADLINE, METRICS_FILE, REPORT
from trainer.study.results import RANKINGS, paired_difference
from trainer.study.runner import Study, SweepResult
from trainer.study.tables import (
    RANKED,
    format_p,
    make_tables,
    mean_metric,
    sentence_on_domains,
)

_MOST_NAMES = 12  # of runs, in a sentence


def write_study(
    folder: Path,
    study: Study,
) -> Path:
    """Writes both, and returns the page's path."""
    tables = make_tables(study)
    title = page_title(folder)
    lead = _lead(study)
    page = render_table_page(
        title,
        "study",
        lead,
        tables,
        _sections(study),
        study.failed,
    )
    lines = [f"# {title}", "", *lead, ""]
    for name, why in study.failed.items():
        lines.append(f"{name} is not in the tables: {why}\n")
    for table in tables:
        lines += [f"## {table.title}", "", table.text, "", table.markdown(), ""]
    write_text(folder / "report.md", "\n".join(lines))
    write_text(folder / REPORT, page)
    return folder / REPORT


def _lead(study: Study) -> list[str]:
    """Sentences."""
    dataset = study.dataset
    names = []
    for domain in dataset.domains:
        name = escape_name(domain.name)
        names.append(f"{name} ({domain.items:,} items)")
    seeds = "one seed"
    if len(study.config.seeds) > 1:
        seeds = f"{len(study.config.seeds)} seeds"
    held_out = "The newest item of a user is the test item, the one before it validation"
    if study.split is not None:
        held_out = split_sentence(study.split, "test")
    lines = [
        f"{dataset.users:,} users, "
        f"{dataset.interactions:,} interactions; "
        f"domains: {', '.join(names)}. "
        f"{seeds.capitalize()}. {held_out}; epochs and settings are chosen by "
        "validation alone."
    ]
    if OURS in study.results and len(study.results) > 1:
        for ranking in RANKINGS:
            lines.append(_compare_with_best(study, ranking))
    on_domains = sentence_on_domains(study).strip()
    if on_domains:
        lines.append(on_domains)
    return lines + _warning(study)


def _compare_with_best(
    study: Study,
    ranking: str,
) -> str:
    """A sentence: SyNCRec beside the best of the others, and whether that may be chance."""
    means = {}
    for name, results in study.results.items():
        means[name] = mean_metric(study, results, ranking)
    ours = means.pop(study.ours)
    best = max(means, key=means.__getitem__)
    mean_of_best = means[best]
    share = format_signed(ours / mean_of_best - 1, "+.1%")
    our_results = study.results[study.ours]
    difference = paired_difference(
        our_results,
        study.results[best],
        ranking,
        domains=study.counted,
    )
    chance = f"p {format_p(difference.p)}"
    if not difference.is_significant:
        chance += ", which may be chance"
    our_users = our_results.over_users(ranking, HEADLINE).mean()
    best_users = study.results[best].over_users(ranking, HEADLINE).mean()
    return (
        f"Among {RANKED[ranking]} "
        f"{study.ours} has a mean {HEADLINE} of {ours:.4f}; "
        f"the best of the others is {escape_name(best)} "
        f"with {mean_of_best:.4f} ({study.ours}: {share}, {chance}). Over users: "
        f"{our_users:.4f} and {best_users:.4f}."
    )


def _warning(study: Study) -> list[str]:
    """Which runs had not converged, in a sentence; none where all had."""
    names = []
    for runs in study.unconverged.values():
        names += [escape_name(name) for name in runs]
    if not names:
        return []
    shown = ", ".join(names[:_MOST_NAMES])
    if len(names) > _MOST_NAMES:
        shown += f" and {len(names) - _MOST_NAMES} more"
    return [
        f"Warning: not converged. The best epoch was the last one of {shown}: with more epochs "
        "they might be better, and the order of the systems another."
    ]


def _sections(study: Study) -> list[dict]:
    """Plots, with a title and a sentence each."""
    sections: list[Section] = [
        (
            f"{HEADLINE} of all systems",
            "Higher is better. Mean over domains; the whiskers are the least and the largest seed.",
            _plot_systems(study),
        )
    ]
    for key, points in study.sweeps.items():
        sections.append(
            (
                f"{OURS} by {key}",
                f"Higher is better. Mean {HEADLINE} over domains, first seed.",
                _plot_sweep(study, key, points),
            )
        )
    if study.example:
        sections += _transfer_sections(study, study.example)
    return render_sections(sections)


def _transfer_sections(
    study: Study,
    run: Path,
) -> list[Section]:
    """How a run of SyNCRec weighed its domains."""
    train = []
    for record in read_records(run / METRICS_FILE):
        if record["kind"] == "train":
            train.append(record)
    domains = plots.assign_styles(
        [domain.name for domain in study.dataset.domains]
    )
    return [
        (
            f"λ by domain in a run of {OURS}",
            "The weight of each domain in the cross-domain loss; the dotted line is 1, where all "
            "weigh alike. A λ below it holds back a domain that the others harm.",
            plots.weight_plot(train, domains),
        ),
        (
            "φ, the negative transfer gap",
            "Single-domain minus cross-domain loss over the same targets. Above 0 is good: the "
            "other domains help. Below 0, in the shade, they harm the prediction.",
            plots.gap_plot(train, domains),
        ),
    ]


def _plot_systems(study: Study) -> go.Figure | None:
    """Bars: a system's mean over seeds, with the least and the largest seed."""
    if not study.results:
        return None
    figure = go.Figure()
    labels = []
    for name in study.results:
        (style,) = plots.assign_styles([name])
        labels.append(style.label)
    domains = len(study.dataset.domains)
    styles = plots.assign_styles(list(RANKINGS))
    for ranking, style in zip(RANKINGS, styles, strict=True):
        means = []
        above = []
        below = []
        seeds = 0
        for results in study.results.values():
            mean_SD = results.by_domain(
                ranking,
                HEADLINE,
                domains,
            )
            mean_S = mean_SD[:, study.counted].mean(axis=1)
            mean = float(mean_S.mean())
            means.append(mean)
            above.append(float(mean_S.max()) - mean)
            below.append(mean - float(mean_S.min()))
            seeds = max(seeds, len(mean_S))
        spread = {
            "type": "data",
            "symmetric": False,
            "array": above,
            "arrayminus": below,
            "visible": seeds > 1,
        }
        figure.add_bar(
            x=labels,
            y=means,
            error_y=spread,
            name=RANKED[ranking],
            marker_color=style.colour,
        )
    figure.update_traces(yhoverformat=".4f")
    plots.finish_figure(figure, 420, f"mean {HEADLINE}")
    return figure.update_xaxes(
        title=None,
        tickformat=None,
        showgrid=False,
    )


def _plot_sweep(
    study: Study,
    key: str,
    points: list[SweepResult],
) -> go.Figure | None:
    """Lines over a setting's values: the mean metric by ranking; None of a single value."""
    if len(points) < 2:
        return None
    figure = go.Figure()
    values = [str(point.value) for point in points]
    styles = plots.assign_styles(list(RANKINGS))
    for ranking, style in zip(RANKINGS, styles, strict=True):
        figure.add_scatter(
            x=values,
            y=[mean_metric(study, point.results, ranking) for point in points],
            name=RANKED[ranking],
            line=style.line,
        )
    figure.update_traces(mode="lines+markers", yhoverformat=".4f")
    plots.finish_figure(figure, 320, f"mean {HEADLINE}")
    return figure.update_xaxes(
        title_text=key,
        tickformat=None,
        type="category",
    )
