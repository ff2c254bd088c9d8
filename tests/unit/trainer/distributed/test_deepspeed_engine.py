import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.runs import rank_of_one
from trainer.config.optimizer import OptimizerConfig
from trainer.distributed.deepspeed_engine import (
    build_engine_config,
    learning_rate_share,
    start_engine,
)
from trainer.errors import InputError

ROOT = Path(__file__).parents[4]


def shares(total, **options):
    config = OptimizerConfig(**options)
    return [learning_rate_share(config, step, total) for step in range(total)]


def test_constant_is_the_full_rate_in_every_step():
    assert shares(5) == [1] * 5


def test_warm_up_rises_to_the_full_rate():
    assert shares(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear_falls_evenly_after_warm_up():
    assert shares(7, warmup_steps=2, schedule="linear") == pytest.approx(
        [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )
    assert shares(4, schedule="linear", final_share=0.2) == pytest.approx(
        [1, 0.8, 0.6, 0.4]
    )


def test_cosine_is_half_way_in_the_middle():
    found = shares(8, schedule="cosine", final_share=0.1)
    assert (
        found[0] == 1
        and found[4] == pytest.approx(0.55)
        and found == sorted(found, reverse=True)
    )
    assert found[1] == pytest.approx(
        0.1 + 0.9 * 0.9619397662556434
    )  # cos²(π/16)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_share_stays_at_the_end_value_after_the_last_step(schedule):
    config = OptimizerConfig(
        schedule=schedule, final_share=0.25, warmup_steps=2
    )
    assert [
        learning_rate_share(config, step, 10) for step in (10, 11, 1000)
    ] == pytest.approx([0.25] * 3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_no_longer_than_its_warm_up(schedule):
    assert shares(3, warmup_steps=4, schedule=schedule) == [0.25, 0.5, 0.75]


def merged(given, config=None, batch_size=10, world_size=4):
    return build_engine_config(
        config or OptimizerConfig(), given, batch_size, world_size
    )


def test_our_settings_reach_deepspeed():
    config = OptimizerConfig(
        0.5, 0.8, 0.9, 1e-6, weight_decay=0.1, clip=3.0, zero_stage=2
    )
    found = merged({}, config)
    assert found["optimizer"]["type"] == "AdamW"
    params = {
        "lr": 0.5,
        "betas": [0.8, 0.9],
        "eps": 1e-6,
        "weight_decay": 0.1,
        "torch_adam": True,
        "fused": True,
    }
    assert found["optimizer"]["params"] == params
    assert (
        found["zero_optimization"]["stage"] == 2
        and found["gradient_clipping"] == 0
    )
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert merged({}, batch_size=3)["train_micro_batch_size_per_gpu"] == 1


@pytest.mark.parametrize(
    ("given", "expected"), [(0, None), (1, False), (2, False), (3, None)]
)
def test_deepspeed_takes_no_norm_that_the_host_would_wait_for(given, expected):
    assert (
        merged({"zero_optimization": {"stage": given}})[
            "zero_optimization"
        ].get("compute_grad_norm")
        is expected
    )
    offloaded = {
        "zero_optimization": {
            "stage": given,
            "offload_optimizer": {"device": "cpu"},
        }
    }
    assert (
        "compute_grad_norm" not in merged(offloaded)["zero_optimization"]
    )  # which it refuses beside an offload


def test_the_users_json_goes_over_ours_key_by_key():
    given = {
        "zero_optimization": {"stage": 3, "contiguous_gradients": False},
        "optimizer": {"params": {"weight_decay": 0.5}},
        "wall_clock_breakdown": True,
    }
    found = merged(given)
    assert found["zero_optimization"] == {
        "stage": 3,
        "contiguous_gradients": False,
    }
    assert found["optimizer"]["type"] == "AdamW"
    assert (
        found["optimizer"]["params"]["weight_decay"] == 0.5
        and found["optimizer"]["params"]["lr"] == 1e-3
    )
    assert found["wall_clock_breakdown"] is True
    assert given["optimizer"] == {
        "params": {"weight_decay": 0.5}
    }  # left as it was


@pytest.mark.parametrize(
    "given",
    [
        {"bf16": {"enabled": True}},
        {"torch_autocast": {"enabled": True}},
        {"fp16": {"enabled": False}},
        {"train_batch_size": 10},
        {
            "train_batch_size": "auto",
            "gradient_accumulation_steps": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        },
        {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 2},
    ],
)
def test_what_is_settled_elsewhere_does_not_reach_deepspeed(given):
    assert merged(given) == merged({})


REFUSED = [
    ({"fp16": {"enabled": True}}, "fp16", "bf16"),
    ({"fp16": True}, "fp16", "bf16"),
    ({"amp": {"enabled": True}}, "amp", "bf16"),
    (
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps",
        "global_batch_size",
    ),
    ({"train_batch_size": 11}, "train_batch_size is 11", "global_batch_size"),
    (
        {"train_micro_batch_size_per_gpu": 10},
        "train_micro_batch_size_per_gpu is 10",
        "global_batch_size",
    ),
    ({"scheduler": {"type": "WarmupLR"}}, "scheduler", "optimizer.schedule"),
    ({"gradient_clipping": 1.0}, "gradient_clipping", "optimizer.clip"),
    (
        {"optimizer": {"type": "Adam", "params": {"lr": 0.1}}},
        "optimizer.params.lr",
        "optimizer.learning_rate",
    ),
]


@pytest.mark.parametrize(
    ("given", "key", "way_out"), REFUSED, ids=[key for _, key, _ in REFUSED]
)
def test_what_cannot_hold_beside_a_fused_table_is_refused_with_the_way_out(
    given, key, way_out
):
    with pytest.raises(InputError) as error:
        merged(given)
    assert f"deepspeed.{key}" in str(error.value) and way_out in str(
        error.value
    )


@pytest.mark.ranks
def test_no_engine_is_loaded_before_one_is_started():
    program = (
        "import sys, trainer.distributed.deepspeed_engine\n"
        "print([name for name in ('deepspeed', 'torch') if name in sys.modules])"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"zero_optimization": 3}, "deepspeed.zero_optimization is 3"),
        ({"zero_optimization": [1]}, "deepspeed.zero_optimization is [1]"),
        ({"optimizer": "Adam"}, "deepspeed.optimizer is Adam"),
        ({"optimizer": {"params": 3}}, "deepspeed.optimizer.params is 3"),
    ],
)
def test_a_value_where_a_section_belongs_is_named(given, named):
    with pytest.raises(InputError) as refused:
        merged(given)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    "given",
    [
        {"zero_optimization": {"stage": 7}},
        {"zero_optimization": {"stage": "x"}},
        {"zero_optimization": {"no_such_key": 1}},
        {"zero_optimization": {"reduce_bucket_size": -1}},
        {"optimizer": {"type": "NoSuchOptimizer"}},
        {"optimizer": {"params": {"betas": "x"}}},
        {"optimizer": {"params": {"no_such_key": 1}}},
    ],
    ids=str,
)
def test_what_deepspeed_itself_refuses_is_one_line(given):
    """Pydantic's and PyTorch's errors have several lines and a trace."""
    with rank_of_one(), pytest.raises(InputError) as refused:
        start_engine(torch.nn.Linear(2, 2), merged(given))
    message = str(refused.value)
    assert message.isprintable() and len(message) < 700
    assert message.startswith("deepspeed: DeepSpeed refuses")
