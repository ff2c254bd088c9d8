"""What a study would run is looked at before anything runs."""

import pytest

from tests.helpers import PARTS
from tests.helpers.made import draw_histories, write_dataset
from trainer.config.study import StudyConfig
from trainer.errors import InputError
from trainer.study.plan import check_settings, leave_out_same
from trainer.study.runner import run_study

DOMAINS = ["shop", "video"]
MISSPELT = [
    ({"tune": {"model.dropot": [0.1]}}, "model.dropot=0.1: Key 'dropot'"),
    ({"tune": {"learning_rate": [0.1]}}, "did you mean table.learning_rate"),
    ({"tune": {"model.dropout": [0.1, "x"]}}, "model.dropout=x: Value 'x'"),
    ({"tune": {"model.dropout": [0.1, 2]}}, "model.dropout is 2"),
    ({"tune": {"epochs": [1], "model.dim": [8, 63]}}, "model.dim is 63"),
    ({"tune": {"epochs": [[1, 2]]}}, "epochs=[1, 2]"),
    ({"sweep": {"model.dropot": [0.1]}}, "model.dropot=0.1"),
    ({"sweep": {"model.dropout": [0.1, 7]}}, "model.dropout is 7"),
    ({"own": {"SDSR": ["model.dropot=1"]}}, "model.dropot=1"),
]


@pytest.mark.parametrize(("settings", "message"), MISSPELT, ids=str)
def test_a_misspelt_key_or_value_is_refused(settings, message):
    config = StudyConfig(systems=["SyNCRec", "SDSR"], **settings)
    with pytest.raises(InputError) as refused:
        check_settings(config, [], DOMAINS)
    assert message in str(refused.value)
    assert str(refused.value).isprintable()


def test_what_suits_some_systems_is_tried():
    """GRU4Rec has no norm to choose; SyNCRec has."""
    tune = {"model.norm": ["post", "pre"], "model.dropout": [0.1, 0.5]}
    config = StudyConfig(systems=["GRU4Rec", "SyNCRec"], tune=tune)
    check_settings(config, [], DOMAINS)


def test_nothing_is_made_before(tmp_path):
    data = write_dataset(tmp_path / "data", draw_histories(12)).folder
    config = StudyConfig(tune={"model.dropot": [0.1]})
    output = tmp_path / "study"
    with pytest.raises(InputError, match="dropot"):
        run_study(data, output, [], config, tmp_path / "no-scripts")
    assert not output.exists()


SAME = [
    ([], {}, ["w/o SC-MIM"]),
    (["model.loss_correction=none"], {}, ["w/o LC-NTG", "w/o SC-MIM"]),
    (["model.stop_gradient=off"], {}, ["w/o SC-MIM", "w/o stop-gradient"]),
    (PARTS, {}, ["SyNCRec, all parts"]),
    ([], {"w/o SC-MIM": ["model.dropout=0.7"]}, []),
    ([], {"SyNCRec": PARTS}, ["SyNCRec, all parts"]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "own", "same"), SAME)
def test_what_changes_nothing_over_the_base_is_left_out(settings, own, same):
    """Baselines are not: an MMoE may be what SyNCRec is, and stands for another model."""
    config = StudyConfig(settings=list(settings), own=own)
    left, names = leave_out_same(config, [])
    assert sorted(names) == sorted(same)
    assert left.systems == [name for name in config.systems if name not in same]
