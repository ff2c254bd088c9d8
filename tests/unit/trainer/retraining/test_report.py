"""The page of all days: what was refused is seen at once, lines fill their chart, no chart of one dot."""

import json

import pytest

from trainer.retraining import report
from trainer.retraining.report import write_days


def day(name, published, candidate=0.5, current=0.4):
    figures = {
        "users": 1200,
        "newest": True,
        "candidate": candidate,
        "current": current,
        "difference": {
            "value": candidate - current,
            "error": 0.01,
            "interval": [
                candidate - current - 0.02,
                candidate - current + 0.02,
            ],
        },
        "when_published": None,
    }
    return {
        "name": name,
        "published": published,
        "reasons": [] if published else ["shop: worse"],
        "domains": {"shop": figures, "<b>": figures},
        "extension": None,
        "drift": {"shop": {"items": 3, "mean": 0.9, "p5": 0.8}},
        "seconds": {"training": 60.0},
    }


DAYS = [
    day("1", "0001"),
    day("2", None, candidate=0.3),
    day("3", "0002"),
]


def figures_of(page):
    for text in page.split('<script type="application/json">')[1:]:
        yield json.loads(text.partition("</script>")[0])


def test_a_refused_day_has_a_band_a_word_and_a_red_cell(tmp_path):
    page = write_days(tmp_path, DAYS).read_text()
    metrics, *_ = figures_of(page)
    (band,) = metrics["layout"]["shapes"]
    assert (band["x0"], band["x1"]) == (0.6, 1.4)  # over the second day alone
    (word,) = metrics["layout"]["annotations"]
    assert word["text"] == "refused" and word["x"] == 1
    assert page.count('<td class="worse">refused</td>') == 1
    assert page.count('<td class="worse">0.3000</td>') == 1


def test_lines_fill_their_chart_and_axes_say_what_they_show(tmp_path):
    titles = []
    for figure in figures_of(write_days(tmp_path, DAYS).read_text()):
        axis = figure["layout"]["yaxis"]
        assert "rangemode" not in axis  # from 0 on
        titles.append(axis["title"]["text"])
    assert titles == ["NDCG@10", "mean cosine", "seconds"]


def test_users_stand_in_the_table(tmp_path):
    page = write_days(tmp_path, DAYS).read_text()
    assert "<th>users</th>" in page
    assert page.count('<td class="">2,400</td>') == 3


def test_a_single_day_has_a_table_and_no_chart_of_one_dot(tmp_path):
    page = write_days(tmp_path, DAYS[:1]).read_text()
    (time,) = figures_of(page)  # bars
    assert time["layout"]["yaxis"]["title"]["text"] == "seconds"
    assert "version 0001" in page and "NDCG@10 day by day" not in page


@pytest.mark.parametrize("count", [2, 40])
def test_many_refused_days_have_words_that_fit(tmp_path, count):
    results = [day(str(number), None) for number in range(count)]
    figure = report._plot_metrics(results, [])
    assert len(figure.layout.shapes) == len(figure.layout.annotations) == count
    angles = {word.textangle for word in figure.layout.annotations}
    assert angles == {-90 if count > 12 else 0}
