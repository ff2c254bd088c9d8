"""What a run keeps of the recent past: read where it fits, made anew and replaced where it does not."""

import dataclasses
import json
import re

import numpy as np
import pytest

import trainer.evaluation.recency.stored as stored
from tests.helpers.made import draw_histories, write_dataset
from tests.helpers.runs import best_of, edit_json, finished_run, rank_of_one
from trainer.checkpoint.best_model import load_trained_model, open_run
from trainer.data.loading.day_counts import count_recent
from trainer.evaluation import evaluate_run as evaluate_run_module
from trainer.evaluation.evaluate_run import evaluate_run
from trainer.evaluation.recency.stored import (
    open_recency,
    open_recency_term,
)
from trainer.files.atomic import write_json
from trainer.run_files import BEST, HALF_LIFE, RECENCY_TERM


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    with rank_of_one() as ranks:
        yield finished_run(
            tmp_path_factory.mktemp("run"), ranks, "evaluation.min_users=1"
        )


@pytest.fixture
def run(original, tmp_path):
    return original.copied(tmp_path / "run")


@pytest.fixture
def fitted(monkeypatch):
    """How often a term is fitted, and a half-life chosen."""
    calls = {"fit_recency_term": 0, "choose_half_life": 0}
    for name in calls:
        real = getattr(stored, name)

        def counted(*arguments, name=name, real=real):
            calls[name] += 1
            return real(*arguments)

        monkeypatch.setattr(stored, name, counted)
    return calls


def trained_of(run, data=None):
    config, dataset = open_run(run.folder, data)
    return load_trained_model(run.folder, config, dataset, run.ranks)


def term_of(run, data=None):
    trained = trained_of(run, data)
    counts = count_recent(trained.dataset, run.ranks, trained.config.stream)
    return open_recency_term(trained, counts)


def choice_of(run, config=None):
    config = config or run.config
    counts = count_recent(run.dataset, run.ranks, config.stream)
    return open_recency(
        counts, run.dataset, run.ranks, config, run=run.folder
    ).choice


def test_a_term_is_fitted_once_and_read_from_then_on(run, fitted):
    first = term_of(run)
    assert first.users_D.sum() > 0
    again = term_of(run)
    assert fitted["fit_recency_term"] == 1
    np.testing.assert_array_equal(first.weight_DK, again.weight_DK)
    np.testing.assert_array_equal(first.users_D, again.users_D)


def test_a_half_life_is_chosen_once_and_read_from_then_on(run, fitted):
    first = choice_of(run)
    assert choice_of(run) == first
    assert fitted["choose_half_life"] == 1
    other = dataclasses.replace(run.config, seed=run.config.seed + 1)
    choice_of(run, other)
    assert fitted["choose_half_life"] == 2
    assert (
        json.loads((run.folder / HALF_LIFE).read_text())["made_of"]["seed"]
        == other.seed
    )


def spoiled(record):
    """Records that are none, each with what is said of it."""
    name = next(iter(record["domains"]))
    entry = record["domains"][name]

    def with_entry(**changes):
        return record | {"domains": record["domains"] | {name: entry | changes}}

    yield "[]", "list indices"
    yield "{", "Expecting"
    yield "{}", "it has no 'format_version'"
    for changed, said in (
        (record | {"format_version": 99}, "format 99"),
        (record | {"half_lives": [1]}, r"its half_lives are \[1\]"),
        (record | {"offset": 0.5}, "its offset is 0.5"),
        (record | {"unit": "weeks"}, "its unit is 'weeks'"),
        (record | {"domains": {name: entry}}, "its domains are domain 0"),
        (record | {"domains": 3}, "not iterable"),
        (with_entry(weights=[]), "'domain 0' has 1 weights"),
        (with_entry(score="1"), "'1' is no number"),
        (with_entry(score=float("nan")), "nan is no number"),
        (with_entry(users=None), "None is no number"),
        (
            record | {"made_of": record["made_of"] | {"seed": 77}},
            "it was made with another seed",
        ),
    ):
        yield json.dumps(changed), said


def test_a_damaged_term_is_named_fitted_anew_and_replaced(run, capsys):
    expected = term_of(run)
    file = run.folder / RECENCY_TERM
    whole = file.read_text()
    trained = trained_of(run)
    counts = count_recent(trained.dataset, run.ranks, trained.config.stream)
    for text, said in spoiled(json.loads(whole)):
        file.write_text(text)
        capsys.readouterr()
        term = open_recency_term(trained, counts)
        assert term.weight_DK.tolist() == expected.weight_DK.tolist()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{file}: is made anew: ")
        assert re.search(said, line), line
        assert file.read_text() == whole


def test_another_checkpoint_gets_a_term_of_its_own(run, fitted, capsys):
    """The run was gone on with, and has a better model."""
    term_of(run)
    folder = run.folder / "checkpoints"
    (folder / "step-00000003").rename(folder / "step-00000004")
    manifest = folder / "step-00000004" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    write_json(run.folder / BEST, best_of(4))
    capsys.readouterr()
    term_of(run)
    assert fitted["fit_recency_term"] == 2
    assert "it was made with another checkpoint" in capsys.readouterr().err
    term_of(run)
    assert fitted["fit_recency_term"] == 2


def test_a_later_dataset_is_scored_with_the_kept_term(
    run, fitted, tmp_path, capsys
):
    """Also where it has one more domain, whose scores stay the model's. Nothing is kept of it."""
    first = term_of(run)
    items = (5, 4, 3)
    later = write_dataset(
        tmp_path / "later", draw_histories(20, items, seed=4), items
    )
    kept = (run.folder / RECENCY_TERM).read_text()
    term = term_of(run, later.folder)
    assert fitted["fit_recency_term"] == 1
    np.testing.assert_array_equal(term.weight_DK[:2], first.weight_DK)
    assert term.weight_DK[2].tolist() == [1, 0, 0, 0, 0, 0]
    assert "has no domain domain 2: scored by" in capsys.readouterr().err
    (run.folder / RECENCY_TERM).unlink()
    term_of(run, later.folder)
    assert fitted["fit_recency_term"] == 2
    assert not (run.folder / RECENCY_TERM).exists()
    assert kept


def test_a_folder_that_cannot_be_written_costs_no_figures(
    run, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "write_json", full)
    assert term_of(run).users_D.sum() > 0
    assert "is not kept (No space left on device)" in capsys.readouterr().err


def test_evaluations_of_a_run_fit_once_and_agree(run, fitted):
    options = {"recency_term": True}
    first = evaluate_run(run.folder, run.ranks, **options)
    again = evaluate_run(run.folder, run.ranks, **options)
    assert first == again
    assert fitted == {"fit_recency_term": 1, "choose_half_life": 1}
    assert "recency" in first and "with_recency" in first


@pytest.mark.parametrize("full", [False, True])
def test_events_are_not_counted_where_only_the_model_is_asked_for(
    run, monkeypatch, full
):
    whole = evaluate_run(run.folder, run.ranks, full=full)

    def refused(*_):
        raise AssertionError("events are counted")

    monkeypatch.setattr(evaluate_run_module, "count_recent", refused)
    record = evaluate_run(run.folder, run.ranks, full=full, skip_recency=True)
    assert record["mean"] == whole["mean"]
    assert record["popularity"] == whole["popularity"]
    assert "recency" not in record and "recency" in whole
    with pytest.raises(AssertionError):
        evaluate_run(run.folder, run.ranks)


def test_a_half_life_of_another_unit_is_chosen_anew(run, fitted, capsys):
    choice_of(run)
    edit_json(run.folder / HALF_LIFE, unit="days")
    choice_of(run)
    assert fitted["choose_half_life"] == 2
    assert "its unit is 'days'" in capsys.readouterr().err
