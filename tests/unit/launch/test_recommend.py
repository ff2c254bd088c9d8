import pytest
from rich.console import Console

from launch.recommend import parse
from launch.tables import recommendation_table

COUNTS = {
    "users": 1200,
    "without_history": 3,
    "unknown_domain": 0,
    "unknown_item": 41,
    "unread": 0,
}
RECORD = COUNTS | {"rows": {"[red]shop": 12000}}


def test_the_table_says_how_many_and_what_was_left_out():
    console = Console(width=120)
    with console.capture() as shown:
        console.print(recommendation_table("out/[b]", RECORD))
    text = " ".join(shown.get().split())
    for words in (
        "out/[b]: 1,200 users, 3 of them without a history",
        "[red]shop",
        "12,000",
        "41 interactions with items",
    ):
        assert words in text
    assert (
        "domains that the model does not know" not in text
        and "damaged" not in text
    )


def test_options_are_as_the_paper_s_service_asks():
    options = parse(
        [
            "--run",
            "r",
            "--output",
            "o",
            "-k",
            "1",
            "--domain",
            "shop",
            "--domain",
            "video",
            "--local_rank=0",
        ]
    )
    assert (options.k, options.domain, options.input) == (
        1,
        ["shop", "video"],
        (),
    )


@pytest.mark.parametrize("missing", ["--run", "--output"])
def test_what_is_needed_is_asked_for(missing, capsys):
    given = {"--run": "r", "--output": "o"}
    del given[missing]
    with pytest.raises(SystemExit):
        parse([word for pair in given.items() for word in pair])
    assert missing in capsys.readouterr().err
