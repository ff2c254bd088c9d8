import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.alone import group_of_one
from trainer.config.changes import iterate_settings
from trainer.config.load import (
    flatten_config,
    load_config,
    load_recorded,
    to_yaml,
)
from trainer.config.run import RunConfig
from trainer.errors import InputError
from trainer.evaluation.evaluate_run import evaluate_run

PRESETS = Path(__file__).parents[4] / "launch" / "configs"


def refusal(*overrides, files=(), deepspeed=None):
    with pytest.raises(InputError) as error:
        load_config(files, list(overrides), deepspeed)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(folder, text, name="config.yaml"):
    (folder / name).write_text(text)
    return folder / name


UNKNOWN = {
    "modle.dim=3": ("model", "optimizer", "global_batch_size"),
    "model.dimension=3": ("dim", "experts", "max_length"),
    "table.lr=3": ("learning_rate", "init_std"),
    "optimizer.lr=3": ("learning_rate", "warmup_steps"),
    "negatives.count=3": ("per_target", "shared"),
    "stream.worker=3": ("workers", "prefetch"),
    "evaluation.negative=3": ("negatives", "patience"),
    "log.interval=3": ("every", "tensorboard", "trackers", "project"),
}


@pytest.mark.parametrize(("override", "allowed"), UNKNOWN.items(), ids=UNKNOWN)
def test_an_unknown_key_is_refused_with_the_allowed_ones(
    tmp_path, override, allowed
):
    keys, value = override.split("=")
    *section, key = keys.split(".")
    text = (
        f"{key}: {value}" if not section else f"{section[0]}:\n  {key}: {value}"
    )
    for message in (refusal(override), refusal(files=[write(tmp_path, text)])):
        key = (section or [key])[0] if section == ["modle"] else key
        assert f"'{key}'" in message
        assert all(name in message.split("there are:")[1] for name in allowed)
    assert "config.yaml" in message


BAD_VALUES = {
    "global_batch_size": "0", "accumulation": "0 -1 1.5", "epochs": "0 1.5 ten null true", "seed": "-1", "max_steps": "-1", "timeout_minutes": "0 inf nan",
    "model": "3 null", "model.dim": "0 x", "model.norm": "middle", "model.dropout": "1 nan", "model.eta": "2",
    "model.heads": "3", "model.loss": "hinge",
    "model.encoder": "lstm", "model.mutual_information": "maybe", "model.mutual_information_negatives": "1 all 0.5 true",
    "table.optimizer": "adamw off", "table.learning_rate": "0 nan inf", "table.beta1": "1",
    "optimizer.learning_rate": "-1 nan", "optimizer.eps": "0", "optimizer.clip": "-1 nan", "optimizer.warmup_steps": "-1",
    "optimizer.zero_stage": "4", "optimizer.schedule": "step", "optimizer.beta2": "1", "optimizer.ema": "1 -0.1 nan",
    "tokens_per_batch": "-1 127", "negatives.per_target": "0", "negatives.shared": "-1",
    "stream.workers": "-2", "stream.prefetch": "0", "stream.verify": "perhaps",
    "evaluation.negatives": "0", "evaluation.batch_size": "0", "evaluation.patience": "-1",
    "log.every": "0", "deepspeed": "3", "stream.damaged": "ignore",
    "checkpoint.every_steps": "-1 0.5", "checkpoint.every_minutes": "-1 inf", "checkpoint.every_epochs": "-1",
    "checkpoint.keep": "0",
}  # fmt: skip
BAD_VALUES = [
    f"{key}={value}"
    for key, values in BAD_VALUES.items()
    for value in values.split()
]


@pytest.mark.parametrize("override", BAD_VALUES)
def test_a_bad_value_names_its_key(tmp_path, override):
    key, value = override.split("=")
    assert key in refusal(override)
    *section, name = key.split(".")
    text = (
        f"{name}: {value}"
        if not section
        else f"{section[0]}:\n  {name}: {value}"
    )
    assert name in refusal(files=[write(tmp_path, text)])


def test_with_a_stop_gradient_both_tasks_need_experts_of_their_own():
    shared = ["model.cross_experts=9", "model.stop_gradient=off"]
    assert load_config([], shared).model.cross_experts == 9
    message = refusal("model.cross_experts=9")
    assert "model.cross_experts is 9" in message


@pytest.mark.parametrize("override", ["epochs", "=3", "--epochs", "x y"])
def test_an_override_without_a_key_or_value_is_refused(override):
    assert override in (message := refusal(override)) and "key=value" in message


@pytest.mark.parametrize(
    "text",
    [
        "a: [1\n",
        "epochs: 1\nepochs: 2\n",
        "epochs: 1\n\tseed: 2",
        "\x00",
        "- 1\n- 2\n",
        "epochs",
        "model:\n",
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    assert "broken.yaml" in refusal(
        files=[write(tmp_path, text, "broken.yaml")]
    )


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.yaml" in refusal(files=[tmp_path / "nowhere.yaml"])
    assert str(tmp_path) in refusal(files=[tmp_path])


def test_a_preset_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(["amazon4"], []) == load_config(
        [PRESETS / "amazon4.yaml"], []
    )
    (tmp_path / "default").write_text("epochs: 77")
    assert load_config(["default"], []).epochs == 20
    assert load_config(["./default"], []).epochs == 77
    assert load_config(["demo", "default"], ["epochs=3"]).model.dim == 32


@pytest.mark.parametrize(
    "name", ["amazon", "default.yaml", "launch/configs/no.yaml", "", ".."]
)
def test_a_wrong_preset_lists_those_that_there_are(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    message = refusal(files=[name])
    assert message.startswith(f"{name}: there is no such")
    assert "amazon4, default, demo, gru4rec, paper, sasrec, timeline" in message


MISSPELT = {
    "learning_rate=0.1": "table.learning_rate or optimizer.learning_rate",
    "dim=64": "model.dim",
    "zero_stage=2": "optimizer.zero_stage",
    "patience=1": "evaluation.patience",
}


@pytest.mark.parametrize(("override", "hint"), MISSPELT.items(), ids=MISSPELT)
def test_the_name_of_a_sections_setting_alone_gets_a_hint(
    tmp_path, override, hint
):
    file = write(tmp_path, override.replace("=", ": "))
    for message in (refusal(override), refusal(files=[file])):
        assert f"did you mean {hint}? there are: data, run" in message
    assert "did you mean" not in refusal("surely_no_such_key=1")


def test_negatives_that_others_take_the_place_of_are_refused():
    message = refusal("negatives.per_target=4")
    assert "negatives.per_target is 4" in message
    assert "negatives.shared=0" in message
    config = load_config([], ["negatives.per_target=4", "negatives.shared=0"])
    assert config.negatives.per_target == 4


@pytest.mark.parametrize(
    "override",
    [
        "epochs=${nothing}",
        "model.dim=${oc.env:NOT_SET_AT_ALL}",
        "epochs=[1",
        "deepspeed.a=???",
    ],
)
def test_what_yaml_or_omegaconf_cannot_read_is_one_line_too(override):
    assert override.split("=")[0] in refusal(override)


@pytest.mark.parametrize(
    "tag",
    [
        "python/object/apply:os.system",
        "python/object/new:os.system",
        "python/name:os.system",
    ],
)
def test_yaml_that_asks_for_code_is_refused_and_runs_nothing(tmp_path, tag):
    made = tmp_path / "made"
    attack = f"!!{tag} ['touch {made}']"
    assert "hostile.yaml" in refusal(
        files=[write(tmp_path, f"data: {attack}\n", "hostile.yaml")]
    )
    assert "deepspeed.a" in refusal(f"deepspeed.a={attack}")
    assert not made.exists()


def test_later_files_and_then_overrides_win(tmp_path):
    one = write(
        tmp_path, "epochs: 3\nseed: 3\nmodel: {dim: 32, heads: 2}", "one.yaml"
    )
    two = write(tmp_path, "seed: 4\nmodel: {dim: 64}", "two.yaml")
    config = load_config([one, two], ["model.dim=16", "max_steps=7"])
    assert (config.epochs, config.seed, config.max_steps) == (3, 4, 7)
    assert (config.model.dim, config.model.heads) == (16, 2)
    assert dataclasses.replace(load_config([], []), data="") == RunConfig()


@pytest.mark.parametrize("word", ["on", "off"])
@pytest.mark.parametrize("key", ["stop_gradient", "mutual_information"])
def test_on_and_off_may_be_written_bare(tmp_path, key, word):
    """YAML 1.1 calls them booleans; in quotes they are words, and mean the same."""
    for config in (
        load_config([], [f"model.{key}={word}"]),
        load_config([write(tmp_path, f"model:\n  {key}: {word}\n")], []),
        load_config([write(tmp_path, f"model:\n  {key}: '{word}'\n")], []),
    ):
        assert getattr(config.model, key) is (word == "on")
    assert (
        load_config(
            [write(tmp_path, "log:\n  tensorboard: off\n")], []
        ).log.tensorboard
        is False
    )


@pytest.mark.parametrize(
    "path",
    [
        "/tmp/a b",
        "1e3",
        "007",
        "2024_01_01",
        "on",
        "{x}",
        "[x]",
        "a=b",
        "~/x",
        "null",
        "a: b",
    ],
)
def test_paths_are_taken_letter_by_letter(path):
    config = load_config([], [f"run={path}", f"data={path}"])
    assert config.run == config.data == path


def test_what_is_saved_reads_back_as_it_was(tmp_path):
    overrides = [
        "data=/x",
        "run=on",
        "seed=3",
        "model.mutual_information=off",
        "table.eps=1e-6",
    ]
    config = load_config(
        [],
        [
            *overrides,
            "deepspeed.zero_optimization.stage=2",
            "deepspeed.bf16.enabled=true",
        ],
    )
    again = load_config([write(tmp_path, to_yaml(config))], [])
    assert again == config and again.deepspeed == {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
    }


def test_deepspeeds_own_json_is_a_section(tmp_path):
    facts = {
        "zero_optimization": {"stage": 3, "offload": {"x": [1, 2]}},
        "comms_logger": {"enabled": True},
    }
    file = write(tmp_path, json.dumps(facts), "ds.json")
    config = load_config(
        [],
        [
            "deepspeed.zero_optimization.stage=1",
            "deepspeed.wall_clock_breakdown=true",
        ],
        file,
    )
    assert config.deepspeed == facts | {"wall_clock_breakdown": True}
    assert config.model.precision == "fp32"


@pytest.mark.parametrize("section", ["bf16", "torch_autocast"])
def test_bf16_of_deepspeed_is_the_models_precision(tmp_path, section):
    file = write(tmp_path, json.dumps({section: {"enabled": True}}), "ds.json")
    assert load_config([], [], file).model.precision == "bf16"
    assert (
        load_config([], [f"deepspeed.{section}.enabled=true"]).model.precision
        == "bf16"
    )
    assert (
        load_config([], [f"deepspeed.{section}.enabled=false"]).model.precision
        == "fp32"
    )


@pytest.mark.parametrize("text", ["{", "[1]", "3", ""])
def test_a_deepspeed_file_that_is_no_json_object_is_named(tmp_path, text):
    assert "ds.json" in refusal(deepspeed=write(tmp_path, text, "ds.json"))
    assert "nowhere.json" in refusal(deepspeed=tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    "preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem
)
def test_presets_load(preset):
    load_config([preset], [])


def test_what_holds_without_a_file_is_the_default_preset(tmp_path):
    """In whole, and its file states nothing that is not the dataclasses' own."""
    assert load_config(["default"], []) == load_config([], []) == RunConfig()
    stated = yaml.safe_load((PRESETS / "default.yaml").read_text())
    for key, value in stated.items():
        values = value if isinstance(value, dict) else {key: value}
        section = RunConfig()
        if isinstance(value, dict):
            section = getattr(section, key)
        assert {name: getattr(section, name) for name in values} == values


def test_a_run_records_every_setting_so_that_another_default_changes_nothing(
    tmp_path,
):
    """As a run of version 0.2.0 has them, which had other defaults."""
    config = load_config(
        [],
        [
            "model.time_knots=0",
            "model.correction_total=one",
            "model.learn_scales=true",
            "negatives.shared=0",
        ],
    )
    recorded = yaml.safe_load(to_yaml(config))
    for key, field in iterate_settings():
        value = recorded
        for name in key.split("."):
            value = value[name]
        assert dataclasses.is_dataclass(field.type) == (
            isinstance(value, dict) and key != "deepspeed"
        )
    file = write(tmp_path, to_yaml(config))
    assert load_recorded(file) == load_config([file], []) == config


def test_there_are_the_presets_that_the_documentation_names():
    assert {path.stem for path in PRESETS.glob("*.yaml")} >= {
        "paper",
        "default",
        "amazon4",
        "demo",
        "sasrec",
        "gru4rec",
    }


def test_the_paper_preset_says_every_reading_itself():
    """Literal readings of the paper, none of them left to a default that may change."""
    literal = {
        "model": {
            "dim": 128, "max_length": 128, "experts": 5, "cross_experts": 3, "blocks": 2, "heads": 1, "ffn_dim": 128,
            "norm": "post", "gate": "sequence", "loss": "bpr_probability", "loss_correction": "negative_transfer_gap",
            "time_knots": 0, "correction_total": "one", "stop_gradient": True,
            "learn_scales": True, "mutual_information": True, "mutual_information_pooling": "mean",
            "mutual_information_similarity": "sigmoid", "mutual_information_denominator": "others",
        },
        "negatives": {"per_target": 1, "shared": 0},
    }  # fmt: skip
    written = yaml.safe_load((PRESETS / "paper.yaml").read_text())
    loaded = dataclasses.asdict(load_config([PRESETS / "paper.yaml"], []))
    for section, values in literal.items():
        assert {key: written[section].get(key) for key in values} == values
        assert {key: loaded[section][key] for key in values} == values


def test_what_is_secret_in_an_address_is_not_kept(tmp_path):
    config = load_config(
        [], ["data=https://user:pa55@host/folder?key=pa55", f"run={tmp_path}"]
    )
    assert config.data == "https://user:pa55@host/folder?key=pa55"
    assert (
        "pa55" not in to_yaml(config)
        and "pa55" not in str(flatten_config(config))
        and "host/folder" in to_yaml(config)
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    with group_of_one(), pytest.raises(InputError, match="give it as --data"):
        evaluate_run(tmp_path, None)


def test_the_preset_of_a_split_by_time_goes_over_another():
    config = load_config(["amazon4", "timeline"], [])
    alone = load_config(["amazon4"], [])
    assert config.split.kind == "timeline" and config.model.time_knots == 1
    assert config.evaluation.recency_term
    model = dataclasses.replace(config.model, time_knots=170)
    assert (model, config.table) == (alone.model, alone.table)
