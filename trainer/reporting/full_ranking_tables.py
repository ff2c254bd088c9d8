"""What a person reads of a full ranking: tables of its record."""

from rich import box
from rich.table import Table
from rich.text import Text

from trainer.reporting.run_log import evaluation_table, number, printable

METRICS = ("HR@10", "NDCG@10", "MRR")  # the record has more, 80 columns have not


def full_tables(record: dict) -> list[Table]:
    """The figures by domain with intervals, beside popularity's; the breakdowns; what is recommended; the sampled figures."""
    tables = [_by_domain(record), _breakdown(record), _recommended(record)]
    if record.get("sampled"):
        table = evaluation_table(record["sampled"])
        table.title = f"{record['kind'].capitalize()} among drawn candidates"
        tables.append(table)
    return tables


def interval(found) -> str:
    """A 95 % interval, or a dash where there is none."""
    return "–" if found is None else " ".join(f"{value:.3f}" for value in found)


def headline(record) -> str:
    """The metric that is compared with popularity's."""
    return record["difference"]["metric"]


def _table(title, *columns, caption=None):
    style = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
        **style,
    )
    for place, column in enumerate(columns):
        header = column.replace(" ", "\n").replace("@", "\n@")
        if place:
            table.add_column(header, justify="right", no_wrap=True, vertical="bottom")
        else:
            table.add_column(header, overflow="fold", min_width=9, vertical="bottom")
    return table


def _by_domain(record):
    name = headline(record)
    title = f"{record['kind'].capitalize()} at step {record['step']:,} among all items of the domain"
    caption = "Intervals are of 95 %, over users; the difference is that to ranking by popularity."
    columns = [
        "domain",
        "users",
        *METRICS,
        f"{name} interval",
        f"popular {name}",
        "difference interval",
    ]
    table = _table(title, *columns, caption=caption)

    def row(label, figures, popularity, difference):
        own = [number(figures[metric]) for metric in METRICS]
        within = (figures.get("interval") or {}).get(name)
        baseline = number(popularity[name]), interval(difference["interval"])
        table.add_row(label, f"{figures['users']:,}", *own, interval(within), *baseline)

    for domain, figures in record["domains"].items():
        row(
            Text(printable(domain)),
            figures,
            record["popularity"][domain],
            record["difference"]["domains"][domain],
        )
    table.add_section()
    row("mean", record["mean"], record["popularity_mean"], record["difference"]["mean"])
    return table


def _breakdown(record):
    name = headline(record)
    columns = ["domain", "users by", "", "users", name, "interval", f"popular {name}"]
    table = _table(f"{name} by groups of users", *columns)
    for domain, breakdowns in record["breakdown"].items():
        for breakdown, groups in breakdowns.items():
            for group, figures in groups.items():
                if figures["users"]:
                    within, popularity = (
                        (figures.get("interval") or {}).get(name),
                        figures[f"popularity {name}"],
                    )
                    label = (
                        Text(printable(domain)),
                        breakdown,
                        group,
                        f"{figures['users']:,}",
                    )
                    table.add_row(
                        *label,
                        number(figures[name]),
                        interval(within),
                        number(popularity),
                    )
        table.add_section()
    return table


def _recommended(record):
    columns = next(iter(record["recommended"].values()))
    table = _table("What all users are recommended", "domain", *columns)
    for domain, found in record["recommended"].items():
        table.add_row(
            Text(printable(domain)),
            f"{found['items']:,}",
            *(number(found[name]) for name in list(columns)[1:]),
        )
    return table
