"""The tables that scripts print."""

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from trainer.data.format.dataset import Dataset
    from trainer.data.prepare.overlap import Overlap

_LEFT_OUT = {
    "unknown_domain": "interactions of domains that the model does not know are left out",
    "unknown_item": "interactions with items that the model does not know are left out",
    "unread": "users of damaged shards are left out",
}
_FIRST_BAD = 5  # bad rows that are shown
_SHOWN_PAIRS = 15  # pairs of domains
_TIE_ORDERS = {"hash": "a hash", "file": "the rows of the logs"}
_COMPARED = ("candidate", "current", "when_published")


def dataset_table(dataset: "Dataset", percentiles: tuple[str, ...]) -> Table:
    """How large a prepared dataset is, by domain. percentiles: names of the length percentiles.

                     data: 40 users in 8 shards, 8 streams
         domain   users   items   interactions   50 %   90 %   99 %   max
         ─────────────────────────────────────────────────────────────────
         shop        27      20            216      8      8      8     8
         video       27      20            216      8      8      8     8
         ─────────────────────────────────────────────────────────────────
         all         40      40            432

    The caption says how many users are too short, and how many users' newest two events are at
    the same time.
    """
    folder = escape(str(dataset.folder))
    shards = len(dataset.shards)
    title = (
        f"{folder}: {dataset.users:,} users in "
        f"{shards} shards, {dataset.streams} streams"
    )
    caption = (
        f"{', '.join(percentiles)}: interactions of a user in the domain. "
        f"{dataset.too_short:,} users are too short to be evaluated, the longest has "
        f"{dataset.max_length:,} interactions"
    )
    split_users = dataset.users - dataset.too_short
    order = dataset.tie_order
    if order is not None and dataset.tied_users is not None and split_users:
        share = dataset.tied_users / split_users
        caption += (
            f".\nNewest two events at the same time: {dataset.tied_users:,} of "
            f"{split_users:,} evaluated users ({share:.1%}), "
            f"ordered by {_TIE_ORDERS[order]}"
        )
    table = Table("domain", title=title, caption=caption)
    for column in ("users", "items", "interactions", *percentiles):
        table.add_column(column, justify="right")
    for domain in dataset.domains:
        lengths = domain.length_percentiles.values()
        counts = (domain.users, domain.items, domain.interactions, *lengths)
        _add_row(table, domain.name, counts)
    table.add_section()
    items = sum(domain.items for domain in dataset.domains)
    totals = (dataset.users, items, dataset.interactions)
    _add_row(table, "all", totals)
    return table


def dataset_notes(dataset: "Dataset") -> list[str]:
    """What a preparation left out, and which users the domains share, a line each.

    bad rows left out: 1, 'domain' is empty
    they are listed in data/bad_rows.jsonl; the first:
      log.csv: row 433: 'domain' is empty
    small domains left out: navi (1 items, 2 interactions)
    users: 26 in 1 domain, 14 in 2 domains
    users of two domains: shop and video 14
    """
    from trainer.data.prepare.left_out import read_left_out
    from trainer.data.prepare.overlap import Overlap

    lines = _left_out_lines(read_left_out(dataset.folder), dataset.folder)
    overlap = Overlap.load(dataset.folder)
    if overlap is not None and len(dataset.domains) > 1:
        lines += _overlap_lines(overlap, dataset)
    return lines


def _left_out_lines(record: dict[str, Any], folder: Path) -> list[str]:
    """What a preparation left out: by the expression, as bad, without a domain, of small domains.

    record: of preparation.json.
    """
    lines = []
    if record.get("filtered"):
        lines.append(f"left out by where: {record['filtered']:,} rows")
    for reason, count in record.get("bad", {}).items():
        lines.append(f"bad rows left out: {count:,}, {reason}")
    if record.get("items_without_domain"):
        lines.append(
            f"items without a domain left out: {record['items_without_domain']:,}, "
            f"{record['rows_without_domain']:,} rows"
        )
    lines += _first_bad_lines(folder / "bad_rows.jsonl")
    domains = []
    for name, size in record.get("domains", {}).items():
        domains.append(
            f"{name} ({size['items']:,} items, {size['interactions']:,} interactions)"
        )
    if domains:
        lines.append(f"small domains left out: {', '.join(domains)}")
    return lines


def _first_bad_lines(file: Path) -> list[str]:
    """The first of the bad rows that are listed in a file."""
    if not file.is_file():
        return []
    lines = [f"they are listed in {file}; the first:"]
    with open(file, encoding="utf-8") as stream:
        for line in itertools.islice(stream, _FIRST_BAD):
            row = json.loads(line)
            if "item" in row:
                lines.append(f"  item {row['item']}: {row['rows']:,} rows")
            else:
                lines.append(
                    f"  {row['file']}: row {row['row']}: {row['reason']}"
                )
    return lines


def _overlap_lines(overlap: "Overlap", dataset: "Dataset") -> list[str]:
    """How many users are in 1, 2, … domains, and in which pairs of domains most of them are.

    A domain that shares no user with another is named: it has nothing to learn from them.
    """
    parts = []
    for number, users in enumerate(overlap.users_by_domains, start=1):
        if users:
            domains = "1 domain" if number == 1 else f"{number} domains"
            parts.append(f"{users:,} in {domains}")
    lines = [f"users: {', '.join(parts)}"]
    if overlap.is_disjoint:
        lines.append(
            "no user is in two domains: the domains have nothing to learn from "
            "one another"
        )
        return lines
    pairs = []
    for one, other, users in overlap.shared_users[:_SHOWN_PAIRS]:
        pairs.append(f"{one} and {other} {users:,}")
    more = len(overlap.shared_users) - _SHOWN_PAIRS
    if more > 0:
        pairs.append(f"{more:,} more pairs in overlap.json")
    lines.append(f"users of two domains: {', '.join(pairs)}")
    connected = set()
    for one, other, _ in overlap.shared_users:
        connected |= {one, other}
    for domain in dataset.domains:
        if domain.users and domain.name not in connected:
            lines.append(
                f"{domain.name} shares no user with another domain: it has nothing "
                "to learn from them"
            )
    return lines


def _add_row(table: Table, name: str, counts: tuple[int, ...]) -> None:
    """Adds a row of counts, with commas between thousands."""
    cells = [f"{count:,}" for count in counts]
    table.add_row(escape(name), *cells)


def recommendation_table(output: str | Path, record: dict[str, Any]) -> Table:
    """How many recommendations were written, and what was left out. record: _recommend.json.

        recs: 40 users, 2 of them without a history that the model knows
        domain   recommendations
        ────────────────────────
        shop                 400
        video                400

    The caption counts interactions and users that are left out, with the reason.
    """
    table = Table(
        "domain",
        title=(
            f"{escape(str(output))}: {record['users']:,} users, "
            f"{record['without_history']:,} of them without a history that the model knows"
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("recommendations", justify="right")
    for name, rows in record["rows"].items():
        table.add_row(escape(name), f"{rows:,}")
    lines = []
    for key, sentence in _LEFT_OUT.items():
        if record[key]:
            lines.append(f"{record[key]:,} {sentence}")
    table.caption = "\n".join(lines) or None
    return table


def user_table(rows: list[dict[str, Any]]) -> Table:
    """One user's recommendations. rows: of that user, as recommend.py writes them.

    domain   rank   item    score
    ─────────────────────────────
    shop        1   B1s    1.1667
    shop        2   B2s    0.8333
    ─────────────────────────────
    video       1   B1v    1.1667
    """
    history = rows[0]["history"]
    known = f"{history:,} known events"
    if not history:
        known = "new to the model"
    table = Table("domain", title=f"{escape(str(rows[0]['user_id']))}: {known}")
    table.add_column("rank", justify="right")
    table.add_column("item")
    table.add_column("score", justify="right")
    domain = None
    for row in sorted(rows, key=lambda row: (row["domain"], row["rank"])):
        if domain not in (None, row["domain"]):
            table.add_section()
        domain = row["domain"]
        cells = [domain, str(row["item_id"])]
        table.add_row(
            escape(cells[0]),
            f"{row['rank']}",
            escape(cells[1]),
            f"{row['score']:.4f}",
        )
    return table


def comparison_table(record: dict[str, Any]) -> Table:
    """A candidate's figures beside the current version's, by domain. record: of `publish`.

        domain      users   candidate   current   when published     difference, 95 %
        ─────────────────────────────────────────────────────────────────────────────
        shop        1,200      0.3531    0.3448           0.3402   -0.0020 to +0.0186
        video    41 (all)      0.2100    0.2200                –                    –

    (all): the domain has too few newest users, so all of its users were ranked.
    """
    table = Table("domain", title="NDCG@10 on the newest held-out items")
    for column in ("users", *_COMPARED, "difference, 95 %"):
        table.add_column(column.replace("_", " "), justify="right")
    for name, figures in record["domains"].items():
        users = f"{figures['users']:,}"
        if not figures["newest"]:
            users += " (all)"
        numbers = []
        for key in _COMPARED:
            figure = figures[key]
            numbers.append("–" if figure is None else f"{figure:.4f}")
        interval = (figures["difference"] or {}).get("interval")
        between = "–"
        if interval is not None:
            low, high = interval
            between = f"{low:+.4f} to {high:+.4f}"
        table.add_row(escape(name), users, *numbers, between)
    return table
