"""What the templates of `launch/templates` promise."""

from pathlib import Path

import pytest
import yaml

from launch import retrain
from trainer.config import RetrainConfig
from trainer.config.load import load_settings
from trainer.errors import InputError

TEMPLATES = Path(__file__).resolve().parents[3] / "launch" / "templates"


def pods(value):
    """Every pod's specification in a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)


@pytest.mark.parametrize("name", ["kubernetes.yaml"])
def test_a_pod_has_shared_memory_for_loaders(name):
    """Without a volume of its own a container has 64 MiB."""
    manifests = list(
        yaml.safe_load_all((TEMPLATES / name).read_text(encoding="utf-8"))
    )
    specified = [pod for manifest in manifests for pod in pods(manifest)]
    assert specified
    for pod in specified:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            (mounted,) = [
                mount["name"]
                for mount in container["volumeMounts"]
                if mount["mountPath"] == "/dev/shm"
            ]
            assert (
                volumes[mounted]["emptyDir"]["medium"] == "Memory"
                and volumes[mounted]["emptyDir"]["sizeLimit"]
            )


def config_of(*words):
    given = ["name=1", "input=[logs.parquet]", *words]
    return load_settings(RetrainConfig, [TEMPLATES / "retrain.yaml"], given)


def test_the_settings_of_a_retraining_can_be_trained_with_from_any_folder(
    tmp_path, monkeypatch
):
    """Its base is a preset's name: a path would be one of the folder that cron starts in."""
    monkeypatch.chdir(tmp_path)
    retrain._check_training(config_of())
    retrain._check_training(config_of("settings=[--device=cpu,epochs=3]"))


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("base=[launch/configs/default.yaml]", "launch/configs/default.yaml"),
        ("base=[defaults]", "amazon4, default"),
        ("settings=[model.dimm=64]", "dimm"),
        ("warm_settings=[model.dim=63]", "model.dim is 63"),
        ("settings=[split.kind=timeline]", "split.kind is timeline"),
    ],
)
def test_what_training_would_refuse_is_refused_before_a_dataset_is_made(
    tmp_path, monkeypatch, word, named
):
    monkeypatch.chdir(tmp_path)
    config = config_of(f"folder={tmp_path / 'shop'}", word)
    with pytest.raises(InputError, match=named):
        retrain._check_training(config)
    assert not (tmp_path / "shop").exists()
