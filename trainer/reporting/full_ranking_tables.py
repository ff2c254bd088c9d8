"""A full ranking on the console: tables of its record, which fit 80 columns, 100 with recency."""

from typing import Any

from rich.table import Table
from rich.text import Text

from trainer.evaluation.evaluation import (
    RECENCY,
    WITH_RECENCY,
    DomainFigures,
    Evaluation,
)
from trainer.reporting.console import (
    escape_name,
    evaluation_table,
    format_number,
    intervals_by_metric,
    metric_cells,
    new_table,
    recency_sentence,
    sentence_on_mean,
    split_sentences,
    stacked_header,
)

# The record has more, 80 columns have not.
METRICS = ("HR@10", "NDCG@10", "MRR")


def full_tables(record: dict[str, Any]) -> list[Table]:
    """All tables of a full ranking's record.

    The figures by domain with intervals, beside popularity's; the breakdowns by groups of users;
    what is recommended; and the figures among drawn candidates.
    """
    tables = [
        _domain_table(record),
        _breakdown_table(record),
        _recommendation_table(record),
    ]
    if record.get("sampled"):
        table = evaluation_table(record["sampled"])
        table.title = f"{record['kind'].capitalize()} among drawn candidates"
        tables.append(table)
    return tables


def interval(bounds: list[float] | None) -> str:
    """A 95 % confidence interval, or a dash where there is none."""
    if bounds is None:
        return "–"
    low, high = bounds
    return f"{low:.3f} {high:.3f}"


def headline(record: dict[str, Any]) -> str:
    """The metric that is compared with popularity's."""
    return record["difference"]["metric"]


def _table_of(
    title: str, columns: list[str], caption: str | Text | None = None
) -> Table:
    """A table without rows.

    columns: the first one has words, which may wrap; the others have figures, which may not.
    caption: a sentence below the table.
    """
    table = new_table(title, caption)
    first, *others = columns
    table.add_column(
        stacked_header(first),
        overflow="fold",
        min_width=9,
        vertical="bottom",
    )
    for column in others:
        header = stacked_header(column)
        table.add_column(
            header,
            justify="right",
            no_wrap=True,
            vertical="bottom",
        )
    return table


def _domain_table(record: dict[str, Any]) -> Table:
    """The figures by domain, with 95 % confidence intervals, and the difference to popularity.

    Where there is recency popularity, the difference is to that.

                                                    NDCG  popular
                         HR    NDCG                  @10     NDCG    difference
    domain     users    @10     @10     MRR     interval      @10      interval
    ───────────────────────────────────────────────────────────────────────────
    Books        204 0.4118  0.2008  0.1741  0.161 0.242   0.1951  -0.051 0.057

    mean         204 0.4118  0.2008  0.1741  0.161 0.242   0.1951  -0.051 0.057
    """
    evaluation = Evaluation.from_record(record)
    metric = headline(record)
    columns = [
        "domain",
        "users",
        *METRICS,
        f"{metric} interval",
        f"popular {metric}",
    ]
    if evaluation.has_recency:
        columns.append(f"recent {metric}")
    columns.append("difference interval")
    if evaluation.has_compared(WITH_RECENCY):
        columns.append(f"with recency {metric}")
    split = evaluation.kind.capitalize()
    table = _table_of(
        f"{split} at step {evaluation.step:,} among all items of the domain",
        columns,
        _caption(evaluation),
    )
    differences = record.get("recency_difference", record["difference"])
    for row in evaluation.by_domain:
        difference = differences["domains"][row.name]
        cells = _domain_cells(evaluation, row, metric, difference)
        table.add_row(Text(escape_name(row.name)), *cells)
    table.add_section()
    by_domain, over_users = evaluation.mean_rows("mean", "over users")
    cells = _domain_cells(evaluation, by_domain, metric, differences["mean"])
    table.add_row(by_domain.name, *cells)
    if evaluation.recorded_user_mean is not None:
        difference = differences["user_mean"]
        cells = _domain_cells(evaluation, over_users, metric, difference)
        table.add_row(over_users.name, *cells)
    return table


def _caption(evaluation: Evaluation) -> Text:
    """What the intervals are, and which domains the mean leaves out."""
    baseline = "recency popularity" if evaluation.has_recency else "popularity"
    lines = [
        "Intervals are of 95 %, over users; "
        f"the difference is that to ranking by {baseline}."
    ]
    if evaluation.has_recency:
        lines.append(f"{recency_sentence(evaluation)}.")
    lines += [f"{sentence}." for sentence in split_sentences(evaluation)]
    sentence = sentence_on_mean(evaluation)
    if sentence is not None:
        lines.append(f"{sentence[0].upper()}{sentence[1:]}.")
    return Text("\n".join(lines))


def _domain_cells(
    evaluation: Evaluation,
    row: DomainFigures,
    metric: str,
    difference: dict[str, Any],
) -> list[str]:
    """A row of the table by domain, behind the domain's name.

    metric: the one whose interval is shown. difference: {value, interval} of the model's metric
    less the last baseline's.
    """
    intervals = intervals_by_metric(row.model)
    cells = [
        f"{row.users:,}",
        *metric_cells(row.model, METRICS),
        interval(intervals.get(metric)),
        format_number(row.popularity[metric]),
    ]
    if evaluation.has_recency:
        cells.append(format_number(row.recency[metric]))
    cells.append(interval(difference["interval"]))
    if evaluation.has_compared(WITH_RECENCY):
        cells.append(format_number(row.with_recency_headline))
    return cells


def _breakdown_table(record: dict[str, Any]) -> Table:
    """The headline metric of each group of users that has any, beside the baselines'.

                                                                    popular
                         users                   NDCG                  NDCG
    domain                  by          users     @10     interval      @10
    ───────────────────────────────────────────────────────────────────────
    Books      item popularity    head     66  0.2366  0.164 0.315   0.5031
    Books       history length     5–9      9  0.1593            –   0.1649
    Books    history in domain    none     10  0.0732  0.000 0.177   0.2427
    """
    metric = headline(record)
    columns = [
        "domain",
        "users by",
        "",
        "users",
        metric,
        "interval",
        f"popular {metric}",
    ]
    systems = ["popularity"]
    if record.get(RECENCY):
        columns.append(f"recent {metric}")
        systems.append(RECENCY)
    table = _table_of(f"{metric} by groups of users", columns)
    for domain, breakdowns in record["breakdown"].items():
        for breakdown, groups in breakdowns.items():
            for group, figures in groups.items():
                if not figures["users"]:
                    continue
                intervals = intervals_by_metric(figures)
                baselines = []
                for system in systems:
                    baseline = figures[f"{system} {metric}"]
                    baselines.append(format_number(baseline))
                table.add_row(
                    Text(escape_name(domain)),
                    breakdown,
                    group,
                    f"{figures['users']:,}",
                    format_number(figures[metric]),
                    interval(intervals.get(metric)),
                    *baselines,
                )
        table.add_section()
    return table


def _recommendation_table(record: dict[str, Any]) -> Table:
    """Catalogue coverage and the Gini index of what all users are recommended.

                       coverage    gini
    domain     items       @10     @10
    ──────────────────────────────────
    Books        300    0.8100  0.5400
    """
    by_domain = record["recommended"]
    names = list(next(iter(by_domain.values())))
    table = _table_of("What all users are recommended", ["domain", *names])
    for domain, figures in by_domain.items():
        table.add_row(
            Text(escape_name(domain)),
            f"{figures['items']:,}",
            *metric_cells(figures, names[1:]),
        )
    return table
