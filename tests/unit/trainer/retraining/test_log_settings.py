"""The settings of the logs' form are options of prepare."""

from launch import prepare
from trainer.config.retraining import RetrainConfig
from trainer.retraining.day import Day
from trainer.retraining.job import _prepare_arguments


def test_the_form_of_the_logs_reaches_prepare(tmp_path):
    settings = {
        "columns": "user_id,item_id,rating,timestamp",
        "delimiter": "::",
        "time_format": "%d/%m/%Y %H:%M",
        "where": "rating >= 4 and domain = '-x'",
        "items": "items.dat",
        "items_columns": "item_id,title,genres",
        "items_delimiter": "|",
        "domain_separator": "|",
        "bad_rows": "skip",
        "min_domain": 7,
    }
    config = RetrainConfig(
        folder=str(tmp_path), name="1", input=["a.dat"], **settings
    )
    words = _prepare_arguments(config, {"extends": None}, Day(tmp_path, "1"))
    options = prepare.parse([str(word) for word in words])
    for name, value in settings.items():
        assert getattr(options, name) == value
    made = prepare.prepare_config(options)
    assert made.columns == ("user_id", "item_id", "rating", "timestamp")


def test_without_them_prepare_has_its_defaults(tmp_path):
    config = RetrainConfig(folder=str(tmp_path), name="1", input=["a.csv"])
    words = _prepare_arguments(config, {"extends": None}, Day(tmp_path, "1"))
    made = prepare.prepare_config(prepare.parse([str(word) for word in words]))
    assert (made.where, made.delimiter, made.bad_rows) == (None, None, "stop")
