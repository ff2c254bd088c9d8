"""`launch/export.py` writes the same vectors and ids by one rank and by two."""

import json

from tests.ranks.conftest import BIN, ranks_of, run


def export(trained_run, output, ranks=1, status=(0,)):
    arguments = [
        "launch/export.py",
        "--run",
        trained_run,
        "--output",
        output,
        "--json",
    ]
    command = (
        ranks_of(ranks, *arguments)
        if ranks > 1
        else [BIN / "python", *map(str, arguments)]
    )
    return run(command, status=status, OMP_NUM_THREADS="1")


def facts(done):
    (line,) = [
        line for line in done.stdout.splitlines() if line.startswith("{")
    ]
    return json.loads(line)


def test_two_ranks_write_what_one_writes(one_encoder, tmp_path):
    one, two = (
        export(one_encoder, tmp_path / "one"),
        export(one_encoder, tmp_path / "two", ranks=2),
    )
    assert facts(one) == facts(two)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_refusal_is_one_line_by_the_first_rank(one_encoder, tmp_path):
    done = export(one_encoder, tmp_path, ranks=2, status=(2,))
    (line,) = [
        line for line in done.stderr.splitlines() if line.startswith("error: ")
    ]
    assert "is there already" in line
