import base64
import gzip
import hashlib
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import InputError
from trainer.reporting import plots
from trainer.reporting.html import LIBRARY, page_title
from trainer.reporting.run_report import update_report, write_report
from trainer.reporting.run_status import RunStatus

METRICS = ["HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"]
LIBRARY_BYTES = 500_000  # more than this of Plotly is in the page, once
MOST_BYTES = 1_500_000  # of a page
# Of npm's plotly.js-basic-dist-min 4.1.1, package/plotly-basic.min.js
LIBRARY_SHA256 = (
    "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
)


class Page(HTMLParser):
    """What a browser makes of the page: its text outside scripts, its elements with their attributes, its scripts."""

    def __init__(self, path):
        super().__init__()
        self.words, self.elements, self.scripts = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)
        elif self.cdata_elem != "style":
            self.words.append(data)

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def train_record(step, phi, seconds=None, weights=None, **changes):
    """phi: {domain: φ}; weights: {domain: λ}, by default equal."""
    weights = dict.fromkeys(phi, 1 / len(phi)) if weights is None else weights
    record = {
        **{
            "kind": "train",
            "step": step,
            "epoch": 0,
            "seconds": float(step) if seconds is None else seconds,
        },
        **{
            "loss": 4.0,
            "loss_single": 2.0,
            "loss_cross": 2.0,
            "mutual_information": 0.5,
            "lambda": weights,
            "phi": phi,
        },
        **{
            "single_by_domain": dict.fromkeys(phi, 2.0),
            "cross_by_domain": dict.fromkeys(phi, 2.5),
        },
        **{
            "alpha": 1.0,
            "beta": 1.0,
            "learning_rate": 1e-3,
            "gradient_norm": 0.7,
            "users_per_second": 1000.0,
        },
        **{"tokens_per_second": 5e4, "data_wait": 0.25, "memory_gb": 3.0},
    }
    return record | changes


def evaluation_record(kind, step, values, **changes):
    """values: {domain: every metric's figure, or None for a domain without users}."""
    domains = {
        d: {"users": 0 if v is None else 10, **dict.fromkeys(METRICS, v)}
        for d, v in values.items()
    }
    known = [value for value in values.values() if value is not None]
    mean = dict.fromkeys(METRICS, sum(known) / len(known) if known else None)
    record = {
        "kind": kind,
        "step": step,
        "epoch": 0,
        "domains": domains,
        "mean": mean,
        "too_short": 4,
    }
    return record | changes


def write_run(folder, records, config="model: {experts: 5}\n", tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records) + tail
    )
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def full_run(domains=("Books", "Toys"), lines=30):
    phi = {domain: 0.1 * number for number, domain in enumerate(domains)}
    records = [train_record(step, phi) for step in range(1, lines + 1)]
    records += [
        evaluation_record(
            "validation", step, dict.fromkeys(domains, 0.1 + step / 1000)
        )
        for step in (10, 30, 20)
    ]
    test = evaluation_record("test", 30, dict.fromkeys(domains, 0.25))
    popular = evaluation_record("test", 30, dict.fromkeys(domains, 0.1))
    return [
        *records,
        test
        | {
            "popularity": popular["domains"],
            "popularity_mean": popular["mean"],
        },
    ]


def figures_of(page):
    """The charts of a page, as Plotly gets them."""
    scripts = [script for script in page.scripts if '"layout"' in script]
    return [
        json.loads(script) for script in scripts if script.startswith('{"data"')
    ]


def test_a_finished_run(tmp_path):
    path = write_report(write_run(tmp_path / "run", full_run()))
    page = Page(path)
    assert path == tmp_path / "run" / "report.html"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ]
    for words in (
        "run training report",
        "Test NDCG@10 0.2500 mean, ×2.50 popularity",
        "Best validation NDCG@10 0.1300 mean, at step 30",
        "Duration 0:00:30 30 steps",
        "Users per second 1,000 median, 25.0% waiting for data",
        "Test, step 30 Held-out items",
        "domain users HR@5 HR@10 NDCG@5 NDCG@10 MRR popularity NDCG@10 ratio",
        "Books 10 0.2500 0.2500 0.2500 0.2500 0.2500 0.1000 ×2.50",
        "mean 20 0.2500",
        "over users 20 0.2500",
        "Books 10 +0.000 1.000",
        "The same throughout: users per second 1000, share of the time waiting for data 0.25, "
        "memory, GB 3, gradient norm 0.7, learning rate 0.001, α 1, β 1.",
        "4 users have a history too short",
        "Configuration model: {experts: 5}",
    ):
        assert words in page.text
    assert len(figures_of(page)) == 7
    assert "details" in [tag for tag, _ in page.elements]


def test_the_page_asks_for_nothing_and_holds_the_library_once(tmp_path):
    page = Page(write_report(write_run(tmp_path, full_run())))
    (library,) = (
        script for script in page.scripts if len(script) > LIBRARY_BYTES
    )
    code = gzip.decompress(base64.b64decode(library))
    assert b"plotly.js (basic - minified) v" in code[:100]
    assert code == gzip.decompress(LIBRARY.read_bytes())
    assert not [
        (tag, a)
        for tag, a in page.elements
        if {"src", "href", "srcset", "data"} & a.keys()
    ]
    policy = [
        a["content"]
        for tag, a in page.elements
        if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert (
        policy and "default-src 'none'" in policy[0] and "http" not in policy[0]
    )


def test_hostile_names_and_config_stay_text(tmp_path):
    names = [
        "<script>alert(1)</script>",
        "</script><img src=x onerror=alert(1)>",
        "{{ 7 * 7 }}",
        "a & b",
        "q\"'",
    ]
    page = Page(
        write_report(
            write_run(
                tmp_path, full_run(names), "</pre><script>alert(2)</script>\n"
            )
        )
    )
    tame = Page(
        write_report(
            write_run(tmp_path / "tame", full_run(["a", "b", "c", "d", "e"]))
        )
    )
    assert (
        page.count("script") == tame.count("script") and page.count("img") == 0
    )
    for name in [*names, "</pre><script>alert(2)</script>"]:
        assert name in page.text
    own = "".join(
        script for script in page.scripts if len(script) < LIBRARY_BYTES
    )
    # Plotly reads a little HTML in its labels.
    assert "<script" not in own and "&lt;script" in own


def test_a_run_that_has_only_begun(tmp_path):
    page = Page(
        write_report(
            write_run(
                tmp_path,
                [train_record(1, {"Books": 0.1})],
                config=None,
                tail='{"kind": "tr',
            )
        )
    )
    assert (
        "no test yet" in page.text
        and "no validation yet" in page.text
        and "holds no config.yaml" in page.text
    )
    # One step is a dot, and no line.
    assert figures_of(page) == [] and not any(
        len(script) > LIBRARY_BYTES for script in page.scripts
    )
    assert (
        "Not drawn, as fewer than two steps have logged it: Loss and its parts; λ by domain; "
        in page.text
    )


def test_a_run_without_a_line(tmp_path):
    page = Page(write_report(write_run(tmp_path, [])))
    assert figures_of(page) == [] and page.count("table") == 0
    assert "Transfer at the end" not in page.text


@pytest.mark.parametrize(
    "weights", [{}, {"Books": None, "Toys": None}], ids=["missing", "null"]
)
def test_a_run_without_lambda(tmp_path, weights):
    records = [
        train_record(step, {"Books": 0.1, "Toys": 0.2}, weights=weights)
        for step in range(5)
    ]
    page = Page(write_report(write_run(tmp_path, records)))
    assert (
        "Smallest λ" not in page.text
        and "No domain ended with negative transfer" in page.text
    )
    assert "logged it: λ by domain; Validation NDCG@10 by domain." in page.text
    assert "λ at the end" not in page.text


def test_one_domain(tmp_path):
    page = Page(write_report(write_run(tmp_path, full_run(["Books"]))))
    assert "Smallest λ" not in page.text and "thick line" not in page.text
    assert not any('"name":"mean"' in script for script in page.scripts)
    assert "Not drawn" not in page.text


def test_validation_stands_in_for_a_missing_test(tmp_path):
    records = [record for record in full_run() if record["kind"] != "test"]
    page = Page(write_report(write_run(tmp_path, records)))
    assert (
        "Best validation so far, step 30" in page.text and "0.1300" in page.text
    )


def test_domains_without_users_are_dashes(tmp_path):
    values = {"Books": 0.25, "Toys": None}
    records = [
        evaluation_record("validation", 4, dict.fromkeys(values)),
        evaluation_record("validation", 5, values),
    ]
    text = Page(write_report(write_run(tmp_path, records))).text
    assert (
        "Toys 0 – – – – –" in text and "Best validation so far, step 5" in text
    )
    nothing = [
        evaluation_record(kind, 5, {"Toys": None})
        for kind in ("validation", "validation", "test")
    ]
    assert (
        "mean 0 – – – – –"
        in Page(write_report(write_run(tmp_path / "none", nothing))).text
    )


def test_it_says_where_transfer_was_negative_at_the_end(tmp_path):
    # The last fifth alone counts: Books is negative only before it, Toys only in it, Music was not seen in it.
    early, late = (
        {"Books": -0.5, "Toys": 0.5, "Music": -1.0},
        {"Books": 0.5, "Toys": -0.25, "Music": None},
    )
    weights = {"Books": 0.5, "Toys": 0.125, "Music": 0.375}
    records = [train_record(step, early) for step in range(80)]
    records += [
        train_record(80 + step, late, weights=weights) for step in range(20)
    ]
    text = Page(write_report(write_run(tmp_path, records))).text
    assert (
        "1 of 2 domains ended with negative transfer: Toys (φ −0.250)." in text
    )
    assert "No φ was logged at the end for Music." in text
    assert "Smallest λ: Toys with 0.375 (1: all alike)." in text
    # The table has the same figures, on the same scale.
    assert "Books 0 +0.500 1.500" in text and "Toys 0 −0.250 0.375" in text


def test_it_says_that_the_loss_was_lost(tmp_path):
    records = [
        train_record(
            step, {"Books": 0.1}, loss=None if step in (1200, 1300) else 1.0
        )
        for step in (1100, 1200, 1300)
    ]
    text = Page(write_report(write_run(tmp_path, records))).text
    assert (
        "The loss was not a finite number in 2 of 3 train lines, first at step 1,200."
        in text
    )


def test_it_says_who_was_skipped(tmp_path):
    records = full_run()
    assert (
        "skipped"
        not in Page(write_report(write_run(tmp_path / "whole", records))).text
    )
    (
        records[3]["skipped_users"],
        records[7]["skipped_users"],
        records[-1]["skipped_users"],
    ) = 1200, 34, 56
    text = Page(write_report(write_run(tmp_path / "torn", records))).text
    assert "1,234 users were skipped in training" in text
    assert "56 users could not be read and are left out." in text
    hostile = [
        train_record(
            1, {"Books": 0.1}, skipped_users="<script>alert(1)</script>"
        )
    ]
    assert (
        "skipped"
        not in Page(
            write_report(write_run(tmp_path / "hostile", hostile, config=None))
        ).text
    )


def test_a_resumed_clock_counts_on(tmp_path):
    seconds = [10.0, 20.0, 5.0, 15.0]
    records = [
        train_record(step, {"Books": 0.1}, seconds=now)
        for step, now in enumerate(seconds)
    ]
    assert (
        "Duration 0:00:35"
        in Page(
            write_report(
                write_run(
                    tmp_path, [*records, evaluation_record("test", 1, {})]
                )
            )
        ).text
    )


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"metrics\.jsonl: not found; name the folder of a run"
    ):
        write_report(tmp_path)


def test_a_domain_has_one_colour_everywhere_and_no_other_has_it():
    names = [f"domain {number}" for number in range(12)]
    records = full_run(names)
    train, validations = records[:30], records[30:33]
    domains = plots.assign_styles(names)
    figures = [
        plots.weight_plot(train, domains),
        plots.gap_plot(train, domains),
        plots.validation_plot(validations, validations[1], domains),
    ]
    seen = {name: set() for name in names}
    for figure in figures:
        drawn = [trace.name for trace in figure.data if trace.showlegend]
        assert [name for name in drawn if name != "mean"] == names
        for trace in figure.data:
            if trace.name in seen:
                seen[trace.name].add(trace.line.color)
    pairs = plots.pairs_plot(train, domains)
    for name, chart in zip(names, pairs, strict=True):
        (cross,) = (
            trace for trace in chart.figure.data if trace.name == "cross"
        )
        seen[name].add(cross.line.color)
        assert chart.caption == name
    assert all(len(colours) == 1 for colours in seen.values())
    assert len(set.union(*seen.values())) == 12


@pytest.mark.parametrize("count", [1, 40])
def test_long_runs_are_thinned_and_zero_is_always_in_view_of_phi(count):
    names = [str(number) for number in range(count)]
    records = [
        train_record(step, dict.fromkeys(names, 5.0 + step % 2))
        for step in range(3001)
    ]
    figure = plots.gap_plot(records, plots.assign_styles(names))
    most = plots.points_per_line(count)
    assert all(most / 2 < len(trace.x) <= most for trace in figure.data)
    assert count * most <= plots.MAX_POINTS
    low, high = figure.layout.yaxis.range
    assert low < 0 < 5 < high


@given(
    lines=st.integers(1, 300),
    points=st.integers(1, 40),
    gaps=st.sets(st.integers(0, 299)),
)
def test_thinning_keeps_the_ends_and_the_means(lines, points, gaps):
    steps, values = np.arange(lines) * 10, np.linspace(-1, 1, lines)
    values[[gap for gap in gaps if gap < lines]] = np.nan
    thin_steps, thin_values = plots.thin(steps, values, points)
    assert len(thin_steps) == len(thin_values) <= max(points, 1)
    assert thin_steps[-1] == steps[-1] and (np.diff(thin_steps) > 0).all()
    size = -(-lines // points)
    expected = [values[start : start + size] for start in range(0, lines, size)]
    expected = [
        np.nanmean(part) if np.isfinite(part).any() else np.nan
        for part in expected
    ]
    np.testing.assert_allclose(thin_values, expected, atol=1e-12)


def test_a_moving_mean_passes_over_gaps_and_keeps_a_level():
    values = np.full(300, 3.0)
    values[50:70] = np.nan
    records = [
        train_record(i, {"Books": 0.1}, loss=None if np.isnan(v) else v)
        for i, v in enumerate(values)
    ]
    figure = plots.loss_plot(records)
    bold = next(
        trace
        for trace in figure.data
        if trace.name == "loss" and trace.showlegend
    )
    y = np.asarray(bold.y)
    np.testing.assert_allclose(y[np.isfinite(y)], 3.0)
    assert np.isnan(y).sum() == 20


def test_a_full_ranking_has_a_table_of_its_own(tmp_path):
    folder = write_run(tmp_path / "run", full_run())

    def figures(value, interval):
        return {
            "users": 10,
            "HR@10": value,
            "NDCG@10": value,
            "interval": interval,
        }

    within = {"HR@10": [0.1, 0.2], "NDCG@10": [0.3, 0.4]}
    record = {
        **{
            "kind": "test",
            "step": 30,
            "domains": {
                "Books": figures(0.35, within),
                "<b>": figures(None, None),
            },
        },
        **{
            "mean": figures(0.35, within),
            "popularity": {
                "Books": figures(0.2, within),
                "<b>": figures(None, None),
            },
        },
        "popularity_mean": figures(0.2, within),
        "difference": {
            "domains": {
                "Books": {"interval": [-0.05, 0.25]},
                "<b>": {"interval": None},
            },
            "mean": {"interval": [0.1, 0.2]},
        },
    }
    with_recency = record | {
        "kind": "validation",
        "recency": record["popularity"],
        "recency_mean": figures(0.2, within),
        "recency_choice": {"half_life": 7, "unit": "days", "validation": {}},
        "recency_difference": {
            "domains": {
                "Books": {"interval": [0.01, 0.02]},
                "<b>": {"interval": None},
            },
            "mean": {"interval": [0.1, 0.2]},
        },
    }
    (folder / "evaluation-full-validation.json").write_text(
        json.dumps(with_recency)
    )
    page = Page(write_report(folder))
    for words in (
        "popularity NDCG@10 difference 95 % recency NDCG@10 difference 95 %",
        "0.2000 −0.0500 to 0.2500 0.2000 0.0100 to 0.0200",
        "with a half-life of 7 days",
    ):
        assert words in page.text
    (folder / "evaluation-full-test.json").write_text(json.dumps(record))
    (folder / "evaluation-full-validation.json").write_text(
        '{"kind": "vali'
    )  # torn: left out
    page = Page(write_report(folder))
    for words in (
        "Test among all items of the domain, step 30",
        "domain users HR@10 NDCG@10 NDCG@10 95 % popularity NDCG@10 difference 95 %",
        "Books 10 0.3500 0.3500 0.3000 to 0.4000 0.2000 −0.0500 to 0.2500",
        "<b> 10 – – – – –",
    ):
        assert words in page.text


def test_the_library_is_the_one_that_its_name_says():
    code = gzip.decompress(LIBRARY.read_bytes())
    assert hashlib.sha256(code).hexdigest() == LIBRARY_SHA256
    version = LIBRARY.name.removesuffix(".min.js.gz").rpartition("-")[2]
    assert f"(basic - minified) v{version}\n".encode() in code[:100]
    assert "MIT" in (LIBRARY.parent / "plotly-LICENSE").read_text()


@pytest.mark.parametrize("count", [2, 20])
def test_a_page_of_a_long_run_is_small(tmp_path, count):
    rng = np.random.default_rng(0)
    names = [f"domain {number}" for number in range(count)]
    records = []
    for step in range(3000):
        values = rng.normal(size=(3, count)).tolist()
        phi, single, cross = (
            dict(zip(names, row, strict=True)) for row in values
        )
        noise = {
            "loss": step / 7,
            "single_by_domain": single,
            "cross_by_domain": cross,
        }
        records.append(train_record(step, phi, **noise))
    path = write_report(write_run(tmp_path, records))
    assert path.stat().st_size < MOST_BYTES


def test_lambda_is_on_one_scale_whatever_the_version_that_logged_it(tmp_path):
    # 1 where all weigh alike; earlier versions logged weights that add up to 1, or to their number.
    look = {"lambda": {"Books": 0.75, "Toys": 0.25}}
    for name, weights in (
        ("a", {"Books": 0.75, "Toys": 0.25}),
        ("b", {"Books": 1.5, "Toys": 0.5}),
    ):
        records = [
            train_record(step, {"Books": 0.1, "Toys": 0.1}, weights=weights)
            for step in range(5)
        ]
        folder = write_run(tmp_path / name, records)
        (folder / "look.json").write_text(json.dumps(look))
        page = Page(write_report(folder))
        assert "Smallest λ: Toys with 0.500" in page.text
        assert "Books 0 +0.100 1.500 1.500" in page.text
        domains = plots.assign_styles(["Books", "Toys"])
        figure = plots.weight_plot(records, domains)
        assert {float(np.mean(trace.y)) for trace in figure.data} == {1.5, 0.5}


@pytest.mark.parametrize(
    "steps", [[1, 2], [1, 5], [29, 30, 31], [1, 9], [10, 30], [1, 4000]]
)
def test_steps_have_whole_ticks_no_two_alike(steps):
    figure = plots.loss_plot(
        [train_record(step, {"Books": 0.1}) for step in steps]
    )
    axis = figure.layout.xaxis
    if steps[-1] - steps[0] <= 8:
        assert axis.dtick == 1
    else:
        assert axis.dtick is None and axis.nticks - 1 <= steps[-1] - steps[0]


def test_axes_say_what_they_show():
    records = full_run()
    train, validations = records[:30], records[30:33]
    domains = plots.assign_styles(["Books", "Toys"])
    for figure, title in (
        (plots.loss_plot(train), "loss"),
        (plots.weight_plot(train, domains), "λ (1: all alike)"),
        (plots.gap_plot(train, domains), "φ"),
        (
            plots.validation_plot(validations, validations[1], domains),
            "NDCG@10",
        ),
    ):
        assert figure.layout.yaxis.title.text == title
        assert figure.layout.xaxis.title.text == "step"


def test_a_validation_is_drawn_from_two_on_and_its_range_is_that_of_the_lines():
    domains = plots.assign_styles(["Books"])
    record = evaluation_record("validation", 10, {"Books": 0.3})
    assert plots.validation_plot([record], record, domains) is None
    later = evaluation_record("validation", 20, {"Books": 0.31})
    figure = plots.validation_plot([record, later], later, domains)
    assert figure.layout.yaxis.rangemode is None


def test_what_does_not_change_is_said_in_words():
    records = [train_record(step, {"Books": 0.1}) for step in range(5)]
    charts, level = plots.panels_plot(records, plots.OPTIMISATION)
    assert charts == [] and level == [
        "gradient norm 0.7",
        "learning rate 0.001",
        "α 1",
        "β 1",
    ]
    records[3]["learning_rate"] = 2e-3
    records[4]["beta"] = 0.9
    charts, level = plots.panels_plot(records, plots.OPTIMISATION)
    assert [chart.caption for chart in charts] == ["learning rate", "α and β"]
    assert level == ["gradient norm 0.7"]


@pytest.mark.parametrize(
    ("state", "reason", "has_ended", "sense", "words"),
    [
        ("training", "", False, "", "Training, step 30 of 1,200, as of 20"),
        ("training", "", True, "bad", "Ended without a word after step 30 of 1,200"),
        ("stopped", "as asked", True, "", "Stopped after step 30 of 1,200, 20"),
        ("failed", "the loss\nis <b>", True, "bad", ": the loss is <b>."),
        ("finished", "", False, "good", "Finished after step 30 of 1,200"),
    ],
)  # fmt: skip
def test_the_page_says_what_state_the_run_is_in(
    tmp_path, state, reason, has_ended, sense, words
):
    folder = write_run(tmp_path, full_run())
    RunStatus.now(state, 30, 1200, reason).write(folder)
    page = Page(write_report(folder, has_ended))
    assert words in page.text
    assert ("p", {"class": f"state {sense}"}) in page.elements


def test_who_is_not_trained_any_more_is_not_said_to_train(tmp_path, capsys):
    folder = write_run(tmp_path, full_run())
    RunStatus.now("training", 30, 60).write(folder)
    update_report(folder)
    assert "Ended without a word" in (folder / "report.html").read_text()
    (folder / "status.json").write_text('{"state": ')  # torn: no sentence
    update_report(folder)
    assert "Ended without" not in (folder / "report.html").read_text()
    assert capsys.readouterr().err == ""


def test_small_domains_are_marked_and_the_mean_says_what_it_leaves_out(
    tmp_path,
):
    test = evaluation_record("test", 30, {"Books": 0.5, "Noir": 0.1})
    test["domains"]["Noir"]["users"] = 2
    test |= {
        "mean": dict.fromkeys(METRICS, 0.5),
        "mean_domains": ["Books"],
        "min_users": 5,
    }
    text = Page(write_report(write_run(tmp_path, [test]))).text
    assert "Noir (not in the mean) 2 0.1000" in text
    assert "mean 10 0.5000" in text and "over users 12 0.4333" in text
    assert (
        "The mean is of 1 domain; left out, with fewer than 5 users: Noir (2)."
        in text
    )


def test_it_says_that_the_run_had_not_converged(tmp_path):
    records = full_run()
    text = Page(write_report(write_run(tmp_path / "a", records))).text
    assert "The best validation was the last one" in text
    records.insert(
        -1, evaluation_record("validation", 40, {"Books": 0.1, "Toys": 0.1})
    )
    text = Page(write_report(write_run(tmp_path / "b", records))).text
    assert "The best validation was the last one" not in text


def test_groups_coverage_and_gini_of_a_full_ranking_are_on_the_page(tmp_path):
    folder = write_run(tmp_path, full_run())
    record = evaluation_record("test", 30, {"Books": 0.25, "Toys": 0.1})
    record |= {
        "popularity": record["domains"],
        "popularity_mean": record["mean"],
    }
    interval = {"interval": [0.05, 0.2]}
    record["difference"] = {
        "metric": "NDCG@10", "mean": interval,
        "domains": {"Books": interval, "Toys": {"interval": [-0.2, -0.1]}},
    }  # fmt: skip
    group = {
        "users": 7,
        "NDCG@10": 0.2,
        "popularity NDCG@10": 0.1,
        "interval": {"NDCG@10": [0.1, 0.3]},
    }
    nobody = {
        "users": 0,
        "NDCG@10": None,
        "popularity NDCG@10": None,
        "interval": None,
    }
    record["breakdown"] = {
        "Books": {"history in domain": {"none": group, "some": nobody}}
    }
    record["recommended"] = {
        "Books": {"items": 300, "coverage@10": 0.81, "gini@10": 0.54}
    }
    (folder / "evaluation-full-test.json").write_text(json.dumps(record))
    page = Page(write_report(folder))
    for words in (
        "domain users by group users NDCG@10 NDCG@10 95 % popularity NDCG@10 ratio",
        "Books history in domain none 7 0.2000 0.1000 to 0.3000 0.1000 ×2.00",
        "domain test users items coverage@10 gini@10 Books 10 300 0.8100 0.5400",
    ):
        assert words in page.text
    assert "history in domain some" not in page.text  # nobody is in it
    html = (folder / "report.html").read_text()
    assert (
        html.count('class="better"') - html.count("+0.") == 2
    )  # of Books, and of the mean
    assert 'class="worse">−0.2000 to −0.1000<' in html


def test_titles_stand_in_for_ids(tmp_path):
    folder = write_run(tmp_path, full_run())
    item = {
        "domain": "Books",
        "item": "7",
        "nearest": {"Books": [["8", 0.9]], "Toys": [["7", 0.5]]},
    }
    look = {"items": [item]}
    (folder / "look.json").write_text(json.dumps(look))
    text = Page(write_report(folder)).text
    assert (
        "in Books in Toys 7 8 (0.90) 7 (0.50)" in text
        and "--titles FILE" in text
    )
    titles = {"Books": {"7": "Emma", "8": "<i>Persuasion"}, "Toys": {}}
    (folder / "look.json").write_text(json.dumps(look | {"titles": titles}))
    text = Page(write_report(folder)).text
    assert (
        "Emma <i>Persuasion (0.90) 7 (0.50)" in text and "--titles" not in text
    )


def test_a_folder_that_is_but_a_number_has_its_parent_in_the_title(tmp_path):
    assert page_title(tmp_path / "studies" / "1") == "studies/1"
    assert page_title(tmp_path / "shop") == "shop"
