"""One log in the forms in which people have theirs: each becomes the same dataset."""

import datetime
import gzip
import json
import random
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

DOMAINS = ("books", "films, old", "music")
DAY = 86_400


def sample_events(users=30, items=24, count=400, seed=3):
    """Events as dicts; an item has one domain. Every rating is there, times differ."""
    draw = random.Random(seed)
    events = []
    for number in range(count):
        item = draw.randrange(items)
        events.append(
            {
                "user_id": draw.randrange(users),
                "item_id": item,
                "domain": DOMAINS[item % len(DOMAINS)],
                "rating": draw.randrange(1, 6),
                "timestamp": DAY * (number + 1),
            }
        )
    draw.shuffle(events)
    return events


def write_delimited(path, events, names, delimiter=",", header=True):
    """Writes text without any quotes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [delimiter.join(names)] if header else []
    for event in events:
        fields = []
        for name in names:
            fields.append(str(event[name.partition(":")[0]]))
        lines.append(delimiter.join(fields))
    text = "\n".join(lines) + "\n"
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_csv_zst(folder, events):
    plain = write_csv(folder, events)
    path = folder / "log.csv.zst"
    with duckdb.connect() as connection:
        connection.execute(
            f"COPY (FROM read_csv('{plain}', all_varchar=true)) "
            f"TO '{path}' (FORMAT csv, COMPRESSION zstd)"
        )
    plain.unlink()
    return path


def write_csv(folder, events, name="log.csv"):
    """Writes CSV, in which a domain with a comma stands in quotes."""
    path = folder / name
    lines = ["user_id,item_id,domain,rating,timestamp"]
    for event in events:
        lines.append(
            f'{event["user_id"]},{event["item_id"]},"{event["domain"]}",'
            f"{event['rating']},{event['timestamp']}"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_items(folder, events, name, delimiter, names, header=True):
    """Writes the domain of every item."""
    items = {event["item_id"]: event for event in events}
    rows = [{**event, "title": f"No. {item}"} for item, event in items.items()]
    return write_delimited(folder / name, rows, names, delimiter, header)


def _lines(folder, events):
    path = folder / "log.jsonl.gz"
    lines = [json.dumps(event, ensure_ascii=False) for event in events]
    text = "\n\n".join(lines) + "\n"  # blank lines are none
    path.write_bytes(gzip.compress(text.encode()))
    return path, {}


def _floats_in_json(folder, events):
    path = folder / "log.ndjson"
    with open(path, "w", encoding="utf-8") as stream:
        for event in events:
            record = {
                **event,
                "item_id": float(event["item_id"]),
                "more": {"a": [1]},
            }
            stream.write(json.dumps(record) + "\n")
    return path, {}


def _list(folder, events):
    path = folder / "log.json"
    path.write_text(json.dumps(events), encoding="utf-8")
    return path, {}


def _hive(folder, events):
    """As recommend writes it: out/domain=NAME/part-00000.parquet."""
    for domain in DOMAINS:
        part = folder / "log" / f"domain={domain.replace(',', '%2C')}"
        part.mkdir(parents=True)
        rows = [event for event in events if event["domain"] == domain]
        names = ("user_id", "item_id", "timestamp")
        table = pa.table(
            {name: [event[name] for event in rows] for name in names}
        )
        pq.write_table(table, part / "part-00000.parquet")
    (folder / "log" / "_recommend.json").write_text("{}")
    return folder / "log", {}


def _recbole(folder, events):
    names = ["user_id:token", "item_id:token", "rating:float"]
    names.append("timestamp:float")
    path = write_delimited(folder / "log.inter", events, names, "\t")
    items = write_items(
        folder,
        events,
        "log.item",
        "\t",
        ["item_id:token", "title:token_seq", "domain:token"],
    )
    return path, {"items": str(items)}


def _movielens(folder, events):
    names = ["user_id", "item_id", "rating", "timestamp"]
    path = write_delimited(
        folder / "ratings.dat", events, names, "::", header=False
    )
    items = write_items(
        folder,
        events,
        "movies.dat",
        "::",
        ["item_id", "title", "domain"],
        header=False,
    )
    return path, {
        "columns": ",".join(names),
        "items": str(items),
        "items_columns": ["item_id", "title", "domain"],
    }


def _divided(delimiter, name="log.csv"):
    def write(folder, events):
        names = ["rating", "user_id", "item_id", "domain", "timestamp"]
        path = write_delimited(folder / name, events, names, delimiter)
        return path, {"delimiter": delimiter.replace("\t", "tab")}

    return write


def _formatted(folder, events):
    rows = []
    for event in events:
        date = datetime.datetime.fromtimestamp(event["timestamp"], datetime.UTC)
        rows.append({**event, "timestamp": f"{date:%d/%m/%Y %H:%M}"})
    names = ["user_id", "item_id", "domain", "timestamp"]
    path = write_delimited(folder / "log.csv", rows, names, "|")
    return path, {"delimiter": "|", "time_format": "%d/%m/%Y %H:%M"}


def _formatted_parquet(folder, events):
    columns = {}
    for name in ("user_id", "item_id", "domain"):
        columns[name] = [event[name] for event in events]
    columns["timestamp"] = []
    for event in events:
        date = datetime.datetime.fromtimestamp(event["timestamp"], datetime.UTC)
        columns["timestamp"].append(f"{date:%d.%m.%y}")
    path = folder / "log.parquet"
    pq.write_table(pa.table(columns), path)
    return path, {"time_format": "%d.%m.%y"}


def _several(folder, events):
    """Logs with other columns, in other orders and forms."""
    (folder / "log").mkdir()
    write_csv(folder / "log", events[:100], "a.csv")
    names = ["timestamp", "domain", "item_id", "user_id"]
    write_delimited(folder / "log/deep/b.tsv.gz", events[100:200], names, "\t")
    table = pa.table(
        {name: [event[name] for event in events[200:300]] for name in names}
    )
    pq.write_table(table, folder / "log" / "c.pq")
    lines = [json.dumps(event) for event in events[300:]]
    (folder / "log/d.jsonl").write_text("\n".join(lines))
    return folder / "log", {}


# By name: writes the events into a folder, and returns the input and the options of PrepareConfig.
FORMS = {
    "csv.zst": lambda folder, events: (write_csv_zst(folder, events), {}),
    "json lines": _lines,
    "json lines with floats": _floats_in_json,
    "one json list": _list,
    "folders named domain=": _hive,
    "RecBole": _recbole,
    "MovieLens": _movielens,
    "semicolons": _divided(";"),
    "bars": _divided("|", "log.txt"),
    "double colons": _divided("::", "log.dat"),
    "tabs": _divided("\t", "log.data"),
    "dates of a format": _formatted,
    "dates of a format in Parquet": _formatted_parquet,
    "several": _several,
}
# Their times are dates.
DATED = ("dates of a format", "dates of a format in Parquet")


def bad_csv(folder: Path) -> Path:
    """Rows of which some cannot be used; two items in each domain remain."""
    path = folder / "bad.csv"
    path.write_text(
        "user_id,item_id,domain,timestamp\n"
        "1,10,a,1\n"
        ",10,a,2\n"  # row 2
        "1,11,a\n"  # row 3
        "1,11,a,yesterday\n"  # row 4
        "1,11,a,3\n"
        "1,11,a,3,4\n"  # row 6
        "2,10,,5\n"  # row 7
        "2,20,b,6\n"
        "2,21,b,7\n"
        "2,,b,8\n"  # row 10
        "2,21,b,\n"  # row 11
    )
    return path


BAD_ROWS = {
    2: "'user_id' is empty",
    3: "has 3 fields in place of 4",
    4: "'timestamp' is not a finite number",
    6: "has 5 fields in place of 4",
    7: "'domain' is empty",
    10: "'item_id' is empty",
    11: "'timestamp' is empty",
}
