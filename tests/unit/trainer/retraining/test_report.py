"""The page of all days: what was refused is seen at once, lines fill their chart, no chart of one dot."""

import json

import pytest

from trainer.reporting import plots
from trainer.reporting.colours import RED
from trainer.retraining import arrivals_report, report
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


def evaluated(name, served, recent, below=(), **extra):
    """A day with what the model that served made of its events: {domain: NDCG@10}."""
    record = {"kind": "arrivals", "step": 3}
    for key, values in (
        ("domains", served),
        ("recency", recent),
        ("popularity", dict.fromkeys(served, 0.1)),
    ):
        record[key] = {}
        for domain, value in values.items():
            record[key][domain] = {"users": 70, "NDCG@10": value}
        mean = sum(values.values()) / len(values)
        mean_key = "mean" if key == "domains" else f"{key}_mean"
        record[mean_key] = {"NDCG@10": mean}
    return day(name, name.zfill(4)) | {
        "arrivals": record | extra,
        "below_recency": list(below),
        "warnings": [f"{domain}: below <it>" for domain in below],
    }


ARRIVALS = [
    day("1", "0001"),  # of before: it has no figures
    day("2", "0002") | {"arrivals": {"skipped": "no model served yet"}},
    evaluated("3", {"shop": 0.3, "<b>": 0.5}, {"shop": 0.2, "<b>": 0.3}),
    day("none", "0004") | {"arrivals": {"skipped": "no event is later"}},
    evaluated(
        "4", {"shop": 0.1, "<b>": 0.6}, {"shop": 0.25, "<b>": 0.35}, ["shop"]
    ),
]


def lines_of(figure):
    return {trace["name"]: trace["y"] for trace in figure["data"]}


def test_yesterdays_model_on_todays_events_is_a_line_beside_recency(tmp_path):
    """A gap on days without figures; the mean, and each domain; what is below has a red mark."""
    page = write_days(tmp_path, ARRIVALS).read_text()
    assert "<h2>Yesterday&#39;s model on today&#39;s events</h2>" in page
    _, mean, shop, other, *_ = figures_of(page)
    assert lines_of(mean) == {
        "recency popularity": [0.25, None, pytest.approx(0.3)],
        "yesterday's model": [0.4, None, 0.35],
    }
    served = lines_of(shop)["yesterday's model"]
    assert served == [0.3, None, 0.1]
    assert lines_of(other)["recency popularity"] == [0.3, None, 0.35]
    colours = shop["data"][-1]["marker"]["color"]
    assert colours.index(RED) == 2 and colours.count(RED) == 1
    assert RED not in other["data"][-1]["marker"]["color"]
    assert "Warning: shop: below &lt;it&gt;." in page
    assert page.count('<td class="worse">0.3500</td>') == 1
    assert page.count('<td class="">0.4000</td>') > 0


def test_with_its_recency_term_the_served_model_is_that(tmp_path):
    term = {
        "with_recency": {"shop": {"users": 70, "NDCG@10": 0.7}},
        "with_recency_mean": {"NDCG@10": 0.7},
    }
    results = []
    for name in "34":
        result = evaluated(name, {"shop": 0.3}, {"shop": 0.2}, **term)
        results.append(result)
    charts = arrivals_report.plot_arrivals(results, [])
    assert charts[0].figure.data[-1].y == (0.7, 0.7)


def test_days_of_before_are_drawn_without_it(tmp_path):
    page = write_days(tmp_path, DAYS).read_text()
    assert "Yesterday" not in page
    assert arrivals_report.describe_arrivals(DAYS[0]) == []


def test_of_many_domains_the_largest_have_a_plot():
    served = {f"d{number}": 0.3 for number in range(30)}
    results = [evaluated(name, served, served) for name in "34"]
    for result in results:
        result["arrivals"]["domains"]["d29"]["users"] = 7000
    styles = plots.assign_styles(list(served))
    charts = arrivals_report.plot_arrivals(results, styles)
    captions = [chart.caption for chart in charts]
    assert len(captions) == 13
    assert captions[0] == "mean" and "d29" in captions


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
