"""`report.html`: a run on one page, readable with no network.

It is drawn from the run's `metrics.jsonl`, `config.yaml` and `status.json`, and from the inspection
of the best model and rankings among all items, where the run's folder has them. So it can be drawn
at any time: while the run trains, and after it has stopped or failed.

Plotly's JavaScript stands in the page, whose content security policy forbids every request. All
words from outside (domain names, titles, the config) are escaped: by Jinja2 in the page, by
`plots.assign_styles` in the plots, as Plotly reads some HTML in labels.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import InputError
from trainer.evaluation.domain_weights import relative_weights
from trainer.evaluation.evaluation import Evaluation
from trainer.files.atomic import write_text
from trainer.reporting import plots
from trainer.reporting.console import (
    escape_name,
    format_duration,
    format_number,
    format_ratio,
    format_signed,
)
from trainer.reporting.html import (
    Chart,
    Section,
    Table,
    page_title,
    render_page,
    render_sections,
)
from trainer.reporting.run_log import (
    count_skipped_users,
    median_over_steps,
    skipped_sentence,
)
from trainer.reporting.run_records import Record, RunRecords
from trainer.reporting.run_status import RunStatus
from trainer.reporting.run_tables import (
    final_table,
    full_ranking_tables,
    gates_table,
    groups_tables,
    nearest_items,
    transfer_table,
)
from trainer.run_files import CONFIG, FULL, HEADLINE, LOOK, METRICS_FILE, REPORT


def write_report(folder: Path, has_ended: bool = False) -> Path:
    """Writes `folder/report.html` from what the run has logged so far and returns its path.

    A run without evaluations, without λ or with a torn last line gives a page that says so in place
    of those parts. has_ended: no process trains the run any more. Raises InputError when the folder
    has no metrics.jsonl.
    """
    folder = Path(folder)
    file = folder / METRICS_FILE
    if not file.is_file():
        raise InputError(
            f"{file}: not found; name the folder of a run that has started to train"
        )
    records = RunRecords.read(file)
    domains = plots.assign_styles(records.domain_names())
    look = _read_json(folder / LOOK) or {}
    titles = look.get("titles") or {}
    sections = _sections(records, domains)
    tables = _transfer_tables(records, look)
    groups = []
    for ranking in _read_full_rankings(folder):
        tables += full_ranking_tables(ranking)
        groups += groups_tables(ranking)
    text = render_page(
        "report.html.jinja",
        name=page_title(folder),
        kind="training report",
        state=_state(folder, has_ended),
        cards=_cards(records),
        skipped=_skipped(records.train),
        findings=_findings(records),
        final=final_table(records.final, domains),
        tables=tables,
        groups=groups,
        sections=render_sections(sections),
        absent=_absent(sections),
        level=_level_sentence(records.train),
        gates=gates_table(look.get("gates") or {}),
        nearest=nearest_items(look.get("items") or [], titles),
        titled=bool(titles),
        thinning=_thinning(len(records.train), len(domains)),
        config=_config_text(folder),
    )
    path = folder / REPORT
    write_text(path, text)
    return path


def _state(folder: Path, has_ended: bool) -> dict[str, Any] | None:
    """The sentence on what state the run is in; None for a run that keeps no such file."""
    status = RunStatus.read(folder)
    if status is None:
        return None
    return status.describe(has_ended)


def _skipped(train: list[Record]) -> str | None:
    """The sentence on users who were skipped in training, None without any."""
    users = count_skipped_users(train)
    if not users:
        return None
    return skipped_sentence(users)


def _config_text(folder: Path) -> str | None:
    config = folder / CONFIG
    if not config.is_file():
        return None
    return config.read_text(encoding="utf-8", errors="replace")


def _sections(records: RunRecords, domains: list[plots.Style]) -> list[Section]:
    """The plots in order, each with a title and a sentence; None in place of a plot that is empty."""
    return [
        *_transfer_sections(records.train, domains),
        *_validation_sections(records, domains),
        *_speed_sections(records.train),
    ]


def _transfer_sections(
    train: list[Record], domains: list[plots.Style]
) -> list[Section]:
    """Losses, λ and φ: what each domain gives the others."""
    return [
        (
            "Loss and its parts",
            "The loss that is minimised, and its single-domain and cross-domain parts. Lower is "
            "better; still falling at the end: train longer.",
            plots.loss_plot(train),
        ),
        (
            "Mutual information",
            "Its part of the loss, on a scale of its own. Lower is better: a user's histories in "
            "one domain and in all domains then tell more of one another.",
            plots.information_plot(train) or [],  # a run may have none
        ),
        (
            "λ by domain",
            "The weight of each domain in the cross-domain loss; the dotted line is 1, where all "
            "weigh alike. A λ below it holds back a domain that the others harm.",
            plots.weight_plot(train, domains),
        ),
        (
            "φ by domain: the negative transfer gap",
            "Single-domain minus cross-domain loss over the same targets. Above 0 is good: the "
            "other domains help. Below 0, in the shade, they harm the prediction.",
            plots.gap_plot(train, domains),
        ),
        (
            "Single-domain and cross-domain loss by domain",
            "Grey: predicted from the domain's own history. Coloured: from the history over all "
            "domains. Coloured below grey is good.",
            plots.pairs_plot(train, domains) or None,
        ),
    ]


def _validation_sections(
    records: RunRecords, domains: list[plots.Style]
) -> list[Section]:
    """Validations over the steps."""
    mean = "The thick line is the mean; the" if len(domains) > 1 else "The"
    return [
        (
            f"Validation {HEADLINE} by domain",
            f"Higher is better. {mean} dotted upright marks the best step, whose model is kept. "
            "At the right edge: the run had not converged.",
            plots.validation_plot(records.validations, records.best, domains),
        ),
    ]


def _speed_sections(train: list[Record]) -> list[Section]:
    """How fast the run was, and what the optimizer did."""
    return [
        (
            "Speed",
            "Users trained per second over all ranks: higher is better. Waiting for data: good "
            "near 0; above a tenth, loading is the bottleneck (stream.workers). Memory in use.",
            _panels(train, plots.SPEED),
        ),
        (
            "Optimisation",
            "The norm of the gradient before clipping: good where it is steady, a rise without "
            "end diverges. The learning rate, and the scales α and β of the λ update, where they "
            "change.",
            _panels(train, plots.OPTIMISATION),
        ),
    ]


def _panels(
    train: list[Record], panels: tuple[plots.Panel, ...]
) -> list[Chart] | None:
    """Small plots, none where all is level; None where nothing is logged."""
    charts, level = plots.panels_plot(train, panels)
    if not charts and not level:
        return None
    return charts


def _level_sentence(train: list[Record]) -> str | None:
    """The same throughout: learning rate 0.001, α 1, β 1."""
    levels = []
    for panels in (plots.SPEED, plots.OPTIMISATION):
        _, level = plots.panels_plot(train, panels)
        levels += level
    if not levels:
        return None
    return f"The same throughout: {', '.join(levels)}."


def _absent(sections: list[Section]) -> str | None:
    """The sentence on the plots that are not there."""
    titles = [title for title, _, figure in sections if figure is None]
    if not titles:
        return None
    return (
        "Not drawn, as fewer than two steps have logged it: "
        f"{'; '.join(titles)}."
    )


def _thinning(lines: int, domains: int) -> str:
    """The sentence below the plots that says how they were drawn. lines: of the train log."""
    text = (
        "Bold lines are moving means over the faint lines of the logged figures"
    )
    size = -(-lines // plots.points_per_line(domains))
    end = "."
    if size > 1:
        end = f", whose points are means of up to {size} log lines."
    return f"{text}{end} Drag to zoom, double-click to go back, click a name to hide it."


def _cards(records: RunRecords) -> list[tuple[str, str, str]]:
    """The headline figures: (title, figure, note) each.

    Test NDCG@10            Best validation NDCG@10    Duration     Users per second
    0.2500                  0.1300                     0:00:30      1,000
    mean, ×2.50 popularity  mean, at step 30           30 steps     median, 25.0% waiting …
    """
    steps = records.last_step
    clock = format_duration(records.seconds())
    return [
        _test_card(records.test),
        _validation_card(records.best),
        ("Duration", clock, f"{steps:,} steps"),
        _speed_card(records.train),
    ]


def _test_card(test: Record | None) -> tuple[str, str, str]:
    """The mean test metric, and how many times the baselines' it is."""
    title = f"Test {HEADLINE}"
    if not test:
        return title, "–", "no test yet"
    evaluation = Evaluation.from_record(test)
    mean = evaluation.mean_ndcg
    notes = ["mean"]
    baselines = {
        "popularity": evaluation.popularity_mean_ndcg,
        "recency": evaluation.recency_mean_ndcg,
    }
    for name, baseline in baselines.items():
        ratio = format_ratio(mean, baseline)
        if ratio != "–":
            notes.append(f"{ratio} {name}")
    return title, format_number(mean), ", ".join(notes)


def _validation_card(best: Record | None) -> tuple[str, str, str]:
    """The mean metric of the best validation, and its step."""
    title = f"Best validation {HEADLINE}"
    if not best:
        return title, "–", "no validation yet"
    evaluation = Evaluation.from_record(best)
    return (
        title,
        format_number(evaluation.mean_ndcg),
        f"mean, at step {evaluation.step:,}",
    )


def _speed_card(train: list[Record]) -> tuple[str, str, str]:
    """The median speed, and the median share of the time spent waiting for data."""
    speed = median_over_steps(train, "users_per_second")
    wait = median_over_steps(train, "data_wait")
    note = "median"
    if wait is not None:
        note = f"median, {wait:.1%} waiting for data"
    return "Users per second", format_number(speed, ",.0f"), note


def _findings(records: RunRecords) -> list[str]:
    """Sentences on how the run ended: negative transfer, the smallest λ, convergence, a lost loss."""
    names = records.domain_names()
    gaps = _mean_by_domain(records.at_end, "phi", names)
    weights = _mean_by_domain(records.at_end, "lambda", names)
    sentences = [
        *_gap_sentences(gaps, names),
        *_weight_sentences(weights),
        *_convergence_sentences(records),
    ]
    lost = []
    for record in records.train:
        if record.get("loss") is None:
            lost.append(record["step"])
    if lost:
        count = f"{len(lost):,} of {len(records.train):,} train lines"
        sentences.append(
            f"The loss was not a finite number in {count}, first at step {lost[0]:,}."
        )
    return sentences


def _gap_sentences(gaps: dict[str, float], names: list[str]) -> list[str]:
    """Where transfer was negative. gaps: mean φ by domain.

    1 of 2 domains ended with negative transfer: Toys (φ −0.250).
    No φ was logged at the end for Music.
    """
    if not gaps:
        return []
    sentences = []
    negative = []
    for name, gap in gaps.items():
        if gap < 0:
            negative.append(f"{escape_name(name)} (φ {format_signed(gap)})")
    if negative:
        domains = "domains" if len(gaps) > 1 else "domain"
        count = f"{len(negative)} of {len(gaps)} {domains}"
        listed = ", ".join(negative)
        sentences.append(f"{count} ended with negative transfer: {listed}.")
    else:
        sentences.append(
            "No domain ended with negative transfer: no mean φ is below 0."
        )
    absent = []
    for name in names:
        if name not in gaps:
            absent.append(escape_name(name))
    if absent:
        listed = ", ".join(absent)
        sentences.append(f"No φ was logged at the end for {listed}.")
    return sentences


def _convergence_sentences(records: RunRecords) -> list[str]:
    """Whether the run had converged, as far as its validations tell."""
    validations = records.validations
    if records.test is None or records.best is None or len(validations) < 2:
        return []
    last = max(record["step"] for record in validations)
    if records.best["step"] < last:
        return []
    return [
        "The best validation was the last one: the run had not converged, and more epochs may "
        "give a better model."
    ]


def _weight_sentences(weights: dict[str, float]) -> list[str]:
    """Which domain had the smallest weight. weights: mean λ by domain, 1 for all alike.

    Smallest λ: Toys with 0.375 (1: all alike).
    """
    if len(weights) < 2:
        return []
    name = min(weights, key=weights.__getitem__)
    smallest = weights[name]
    return [
        f"Smallest λ: {escape_name(name)} with {smallest:.3f} (1: all alike)."
    ]


def _mean_by_domain(
    records: list[Record], field: str, names: list[str]
) -> dict[str, float]:
    """The mean of a field by domain, of domains that have a figure. Of two records' "phi":

    {"Books": 0.1, "Toys": null}
    {"Books": 0.3}
    means {"Books": 0.2}
    """
    means = {}
    for name in names:
        values = plots.series(records, field, name)
        if np.isfinite(values).any():
            means[name] = float(np.nanmean(values))
    return means


def _transfer_tables(records: RunRecords, look: Record) -> list[Table]:
    """φ and λ by domain, where the run has logged any."""
    names = records.domain_names()
    users = {}
    if records.final is not None:
        for row in Evaluation.from_record(records.final).by_domain:
            users[row.name] = row.users
    table = transfer_table(
        _mean_by_domain(records.at_end, "phi", names),
        _mean_by_domain(records.at_end, "lambda", names),
        relative_weights(look.get("lambda")),
        users,
    )
    return [] if table is None else [table]


def _read_json(file: Path) -> Record | None:
    """A record, or None where it cannot be read: the rest of the page is still good."""
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text)
    except (OSError, ValueError):
        return None


def _read_full_rankings(folder: Path) -> list[Record]:
    """The records of the rankings among all items that the run has, by split."""
    records = []
    for file in sorted(folder.glob(f"{FULL}-*.json")):
        record = _read_json(file)
        if record:
            records.append(record)
    return records


def update_report(run: Path) -> None:
    """Writes the run's report anew. One that cannot be written stays as it was, which is said."""
    from trainer.distributed.run_lock import lock_run_folder

    if not (run / METRICS_FILE).is_file():
        return
    try:
        with lock_run_folder(run):
            write_report(run, has_ended=True)
    except InputError as error:
        print(
            f"{error}: its report stays as it was",
            file=sys.stderr,
            flush=True,
        )
    except OSError as error:
        print(
            f"{run}: cannot be written ({error.strerror}): its report stays as it was",
            file=sys.stderr,
            flush=True,
        )
