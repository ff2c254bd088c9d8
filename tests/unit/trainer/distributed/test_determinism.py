"""`deterministic: true`: every operation of a step has a way of one order, and a CPU's bits stay."""

import os
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.runs import SmallRun, everything, rank_of_one, same, train
from tests.unit.trainer.training.test_step import batches
from trainer.config.changes import may_change_on_resume
from trainer.distributed.determinism import use_deterministic_sums
from trainer.errors import InputError
from trainer.training.loop import train as train_run

# What raises on CUDA where determinism is asked for (the list at torch.use_deterministic_algorithms),
# as far as a model of sequences could use it. cumsum and bincount: of floats alone.
RAISES = {
    "put_",
    "histc",
    "median",
    "nanmedian",
    "kthvalue",
    "nll_loss2d_forward",
    "grid_sampler_2d_backward",
}
RAISES |= {
    "upsample_linear1d_backward",
    "reflection_pad1d_backward",
    "_ctc_loss_backward",
    "max_unpool2d",
}
RAISES |= {
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
}
OF_FLOATS = {"cumsum", "cumsum_", "logcumsumexp", "bincount"}
# What adds atomically on CUDA unless determinism is asked for, and then does not.
SWITCHES = {
    "index_add",
    "index_add_",
    "scatter_add",
    "scatter_add_",
    "index_put",
    "index_put_",
}


class Operators(TorchDispatchMode):
    """The operations of a step, by name, with those that CUDA has no deterministic way for."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.refused = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.names.add(name)
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        reduces = name.startswith("scatter_reduce") and "prod" in args
        if (
            name in RAISES
            or reduces
            or (
                name in OF_FLOATS
                and any(value.is_floating_point() for value in tensors)
            )
        ):
            self.refused.add(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with rank_of_one() as ranks:
        yield SmallRun(tmp_path_factory.mktemp("determinism"), ranks)


SETTINGS = [
    [],
    ["model.loss_correction=shapley"],
    ["model.encoder=gru"],
    ["negatives.shared=0", "model.gate=sequence"],
]
SETTINGS += [
    ["optimizer.clip=0.5", "optimizer.zero_stage=1"],
    ["model.loss=bpr", "optimizer.zero_stage=2"],
]


@pytest.mark.parametrize("settings", SETTINGS, ids="; ".join)
def test_every_operation_of_a_step_has_a_deterministic_way_on_cuda(
    run, settings
):
    """By name, on a CPU. What CUDA alone has, its attention and FBGEMM's update, is in docs/cuda.md."""
    trainer = run.trainer(
        config=run.configured("model.kernel=plain", *settings)
    )
    first, second = batches(trainer, 2)
    trainer.train_step(first)
    with Operators() as operators:
        trainer.train_step(second)
        trainer.settle()
    assert operators.refused == set()
    assert (
        operators.names & SWITCHES and "index_select" in operators.names
    )  # it has seen what the option is for


def test_an_operation_without_a_deterministic_way_is_seen():
    with Operators() as operators:
        torch.rand(5).cumsum(0)
        torch.arange(5).cumsum(0)
        torch.rand(5).put_(torch.tensor([1]), torch.tensor([2.0]))
    assert operators.refused == {"cumsum", "put_"}


@pytest.mark.parametrize("settings", SETTINGS[:4], ids="; ".join)
def test_it_changes_no_bit_on_a_cpu(run, settings):
    plain, sums = (
        run.trainer(config=run.configured(*settings)) for _ in range(2)
    )
    train(plain, 3)
    with use_deterministic_sums(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        train(sums, 3)
    assert same(everything(sums), everything(plain))


def test_it_holds_for_a_whole_run_and_ends_with_it(run, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def stop(*_):
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )
        raise InputError("enough")

    monkeypatch.setattr("trainer.training.loop._train", stop)
    for asked in ("true", "false"):
        with pytest.raises(InputError, match="enough"):
            train_run(run.configured(f"deterministic={asked}"), run.ranks)
    assert seen == [(True, ":4096:8"), (False, None)]
    assert (
        not torch.are_deterministic_algorithms_enabled()
        and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    )
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_workspace_of_cublas_that_is_not_deterministic_is_refused(
    monkeypatch,
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    refusal = re.escape(
        "CUBLAS_WORKSPACE_CONFIG is :0:0: deterministic=true needs :4096:8 or"
    )
    with pytest.raises(InputError, match=refusal), use_deterministic_sums(True):
        pass
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with use_deterministic_sums(True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_run_may_go_on_with_it_or_without():
    assert "deterministic" in may_change_on_resume()
