"""What the templates of `launch/templates` promise."""

from pathlib import Path

import pytest
import yaml

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
