"""A movie's first genre is its domain, and small genres are left out."""

import pyarrow as pa

from benchmarks import movielens


def test_first_genres_are_domains_and_the_largest_stay():
    movies = movielens.read_atomic(
        b"item_id:token\tmovie_title:token_seq\trelease_year:float\tgenre:token\n"
        b'1\tA "quoted" one\t1995\tComedy Romance\n'
        b"2\tTwo\t1996\tDrama\n"
        b"3\tThree\t1996\tRomance Comedy\n"
    )
    ratings = movielens.read_atomic(
        b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        b"7\t2\t5\t978300760\n"
        b"7\t1\t3\t978300001\n"
        b"5\t1\t3\t978300002\n"
        b"5\t3\t3\t978300003\n"
        b"6\t2\t3\t978300004\n"
    )
    log = movielens.make_log(ratings, movies, genres=2)
    assert log.equals(
        pa.table(
            {
                "user_id": [5, 6, 7, 7],
                "item_id": [1, 2, 1, 2],
                "domain": ["Comedy", "Drama", "Comedy", "Drama"],
                "timestamp": [978300002, 978300004, 978300001, 978300760],
            }
        )
    )
