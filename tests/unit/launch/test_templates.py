"""What the templates of `launch/templates` and the image promise; tests/ranks/test_templates.py starts them."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from launch import retrain
from trainer.config import RetrainConfig
from trainer.config.load import load_settings
from trainer.errors import InputError, NonFiniteLoss, RunStopped

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = ROOT / "launch" / "templates"
MANIFESTS = ["kubernetes.yaml", "indexed_job.yaml", "trainjob.yaml"]
# The fields of Kubeflow Trainer v2 that the templates use, by its sources:
# pkg/apis/trainer/v1alpha1 of kubeflow/trainer. No package holds its schema.
KUBEFLOW = {
    "TrainJob.spec": {"runtimeRef", "trainer", "suspend"},
    "TrainJob.spec.runtimeRef": {"apiGroup", "kind", "name"},
    "TrainJob.spec.trainer": {
        "image",
        "command",
        "args",
        "env",
        "numNodes",
        "numProcPerNode",
        "resourcesPerNode",
    },
    "TrainingRuntime.spec": {"mlPolicy", "template"},
    "TrainingRuntime.spec.mlPolicy": {"numNodes", "torch"},
    "TrainingRuntime.spec.mlPolicy.torch": set(),
    "TrainingRuntime.spec.template": {"metadata", "spec"},
    # JobSet's.
    "TrainingRuntime.spec.template.spec": {"replicatedJobs"},
}


def pods(value):
    """Every pod's specification in a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def read_manifests(name):
    """A template's objects by kind."""
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    return {each["kind"]: each for each in yaml.safe_load_all(text)}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_pod_has_shared_memory_for_loaders(name):
    """Without a volume of its own a container has 64 MiB."""
    manifests = read_manifests(name).values()
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


def job_of_runtime(runtime):
    """The Job that Kubeflow's JobSet makes of a runtime's only replicated job."""
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "template"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
    spec = replicated["template"]["spec"]
    return job | {"spec": spec}


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_knows_every_field(name):
    """By the schema of the newest version that the package has, which takes no unknown field."""
    validator = pytest.importorskip(
        "kubernetes_validate",
        reason="pip install kubernetes-validate (the extra kubernetes)",
    )
    version = validator.latest_version()
    objects = read_manifests(name)
    if name == "trainjob.yaml":
        objects = {"Job": job_of_runtime(objects["TrainingRuntime"])}
    for each in objects.values():
        validator.validate(each, version, strict=True)


def fields_of(value, path):
    """Each path of KUBEFLOW below this one, and the fields that stand there."""
    yield path, set(value)
    for name, inner in value.items():
        if f"{path}.{name}" in KUBEFLOW:
            yield from fields_of(inner, f"{path}.{name}")


def test_every_release_of_kubeflow_knows_every_field():
    for kind, each in read_manifests("trainjob.yaml").items():
        assert each["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert set(each) == {"apiVersion", "kind", "metadata", "spec"}
        for path, fields in fields_of(each["spec"], f"{kind}.spec"):
            assert fields <= KUBEFLOW[path], path


def test_a_trainjob_refers_to_its_runtime_and_to_the_container_that_it_fills():
    objects = read_manifests("trainjob.yaml")
    runtime = objects["TrainingRuntime"]
    reference = objects["TrainJob"]["spec"]["runtimeRef"]
    assert reference["kind"] == "TrainingRuntime"
    assert reference["name"] == runtime["metadata"]["name"]
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    labels = replicated["template"]["metadata"]["labels"]
    assert labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    (pod,) = pods(runtime)
    assert [each["name"] for each in pod["containers"]] == ["node"]
    trainer = objects["TrainJob"]["spec"]["trainer"]
    # Its controller counts one process where there are no requests.
    assert trainer["resourcesPerNode"]["requests"]
    # And refuses torchrun's variables here.
    assert not [one for one in trainer["env"] if one["name"].startswith("PET_")]


@pytest.mark.parametrize("name", ["indexed_job.yaml", "trainjob.yaml"])
def test_a_job_acts_on_what_a_training_ends_with(name):
    """75 begins again and is not counted; 2 and 3 would come again."""
    objects = read_manifests(name)
    job = objects.get("Job") or job_of_runtime(objects["TrainingRuntime"])
    actions = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        for status in rule.get("onExitCodes", {}).get("values", []):
            actions[status] = rule["action"]
    assert actions == {2: "FailJob", 3: "FailJob", 75: "Ignore"}
    assert (InputError.status, RunStopped.status) == (2, 75)
    assert NonFiniteLoss.status == 3
    pod = job["spec"]["template"]["spec"]
    # The policy asks for it.
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 300


def test_pods_of_an_indexed_job_find_the_first_by_the_service():
    objects = read_manifests("indexed_job.yaml")
    service = objects["Service"]
    job = objects["Job"]
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    values = {one["name"]: one["value"] for one in container["env"]}
    assert values["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert values["HOSTS"] == str(job["spec"]["completions"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert values["RANKS_PER_HOST"] == str(gpus)


def test_an_image_has_what_is_installed():
    """Packages and files of setup.py, and no tests."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    (packages,) = re.findall(r"include=(\[.*?\])", setup, re.DOTALL)
    wanted = {name.rstrip("*") for name in ast.literal_eval(packages)}
    wanted |= {"setup.py", "README.md", "LICENSE"}
    assert wanted <= kept
    assert "tests" not in kept


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
