"""The file for Prometheus' node exporter."""

import re

import pytest

from tests.unit.trainer.reporting.test_run_log import (
    HOSTILE,
    evaluation_record,
    train_record,
)
from trainer.config.run import LogConfig
from trainer.training.observers import node_exporter
from trainer.training.observers.node_exporter import NodeExporterFile

# The grammar of the text format, version 0.0.4.
SAMPLE = re.compile(
    r'[a-z_:][a-z0-9_:]*\{run="(?:[^"\\\n]|\\.)*"'
    r'(?:,domain="(?:[^"\\\n]|\\.)*")?\} -?[0-9.e+-]+'
)


def samples(text):
    """The values by name and labels; raises where a line is none."""
    assert text.endswith("\n")
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) syncrec_\w+ .+", line)
            continue
        assert SAMPLE.fullmatch(line), line
        name, value = line.rsplit(" ", 1)
        assert name not in found
        found[name] = float(value)
    return found


def test_it_has_the_figures_of_the_last_records(tmp_path):
    file = tmp_path / "syncrec.prom"
    exporter = NodeExporterFile(file, "shop", 100)
    exporter.on_log(None, train_record(10, loss=2.5, mfu=None))
    assert samples(file.read_text())['syncrec_step{run="shop"}'] == 10
    # It is written every few seconds at most, and with each validation.
    exporter.on_log(None, train_record(11))
    assert samples(file.read_text())['syncrec_step{run="shop"}'] == 10
    exporter.on_validation(None, evaluation_record(11))
    found = samples(file.read_text())
    assert found['syncrec_step{run="shop"}'] == 11
    assert found['syncrec_total_steps{run="shop"}'] == 100
    assert found['syncrec_phi{run="shop",domain="Toys"}'] == -0.125
    key = 'syncrec_validation_ndcg_at_10{run="shop",domain="mean"}'
    assert found[key] == 0.25
    assert not any("mfu" in name or "gradient" in name for name in found)
    assert [path.name for path in tmp_path.iterdir()] == ["syncrec.prom"]


def test_hostile_names_are_escaped(tmp_path):
    names = [*HOSTILE, 'a"b', "a\\b"]
    exporter = NodeExporterFile(tmp_path / "x.prom", 'run "1"\\', 100)
    exporter.on_log(None, train_record(1, names))
    found = samples((tmp_path / "x.prom").read_text())
    phi = [name for name in found if name.startswith("syncrec_phi{")]
    assert len(phi) == len(names)
    assert r'domain="a\"b"' in "".join(phi)


def test_a_folder_that_is_not_there_is_warned_of_once(tmp_path, capsys):
    exporter = NodeExporterFile(tmp_path / "no" / "x.prom", "shop", 100)
    for step in (1, 2):
        exporter.on_validation(None, evaluation_record(step))
    error = capsys.readouterr().err
    assert error.count("warning: log.prometheus: ") == 1
    assert "No such file or directory; the run goes on" in error


def test_a_name_that_the_exporter_passes_over_is_refused():
    with pytest.raises(ValueError, match=r"give a name that ends in \.prom"):
        LogConfig(prometheus="/var/lib/syncrec.txt")


def test_all_gauges_are_known_figures():
    record = train_record(1) | {"exchange": 0, "padding": 0, "mfu": 0}
    assert node_exporter._GAUGES.keys() <= record.keys() | {"skipped_users"}
