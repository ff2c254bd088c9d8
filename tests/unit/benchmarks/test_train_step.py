"""The padded opponent is the same model, the operations are counted right, and the script measures and writes."""

import json
import sys

import numpy as np
import pytest
import torch
from torch.multiprocessing import ProcessExitedException
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops, machine, suite, train_step
from benchmarks.padded import PaddedSyNCRec, copy_weights, pad_batch
from benchmarks.workload import dataset_of, draw
from syncrec.batch.build import build_batch, trim
from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from tests.helpers import histories
from tests.helpers.alone import as_a_script, in_this_process
from tests.helpers.reference import EQUATIONS
from trainer.config.negatives import NegativesConfig

DOMAIN_ITEMS = (6, 4, 5, 3)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def models(config, rows, domains, dtype=torch.float64, plain=False):
    """The packed model, M, and the padded one with the same weights."""
    torch.manual_seed(3)
    packed = SyNCRec(config, domains).to(dtype)
    for parameter in packed.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    if packed.correction is not None:
        packed.correction.lambda_D = torch.rand(domains, dtype=dtype).softmax(
            0
        )  # loading evens out any other
    table = torch.randn(rows, config.dim, dtype=dtype)
    padded = PaddedSyNCRec(config, domains, rows, plain).to(dtype)
    copy_weights(packed, table, padded)
    return packed, table.requires_grad_(), padded


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    ("reading", "shared", "absent"),
    [
        ({"loss": "bpr"}, 0, None),
        ({"loss": "bpr", "max_length": 20}, 0, None),
        ({"loss": "sampled_softmax"}, 4, 2),
        (
            {
                "loss": "bce",
                "heads": 2,
                "norm": "pre",
                "mutual_information_similarity": "cosine",
            },
            0,
            0,
        ),
        (
            {
                "loss": "bpr",
                "loss_correction": "none",
                "mutual_information": False,
            },
            0,
            None,
        ),
    ],
)
def test_the_padded_model_has_the_losses_and_gradients_of_ours(
    reading, shared, absent, plain
):
    given = {
        "dim": 6,
        "max_length": 5,
        "experts": 4,
        "cross_experts": 3,
        "ffn_dim": 7,
        "dropout": 0.0,
        "eta": 0.7,
        **EQUATIONS,
    }
    config = ModelConfig(**(given | reading))
    drawn = histories.draw(5, DOMAIN_ITEMS, users=9, absent_domain=absent)
    items_N, lengths_B, domain_N, weight_B, negatives = histories.flatten(drawn)
    kept_N, lengths_B, domain_N = trim(
        np.arange(len(items_N)), lengths_B, domain_N, config.max_length
    )
    negatives = (
        histories.draw_shared(5, DOMAIN_ITEMS, shared)
        if shared
        else negatives[kept_N]
    )
    arrays = (
        items_N[kept_N],
        lengths_B,
        domain_N,
        weight_B,
        negatives,
        DOMAIN_ITEMS,
        config.max_length,
    )
    packed, table, padded = models(
        config, sum(DOMAIN_ITEMS), len(DOMAIN_ITEMS), plain=plain
    )

    batch = move(build_batch(*arrays), "cpu")
    loss, report = packed(batch, table[batch.ids])
    loss.backward()
    padded_loss, (single_D, cross_D, lambda_D) = padded(pad_batch(*arrays))
    padded_loss.backward()

    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(padded_loss, loss, **close)
    torch.testing.assert_close(
        single_D, report.single_D.nan_to_num().to(single_D), **close
    )
    torch.testing.assert_close(
        cross_D, report.cross_D.nan_to_num().to(cross_D), **close
    )
    torch.testing.assert_close(lambda_D, report.lambda_D, **close)
    torch.testing.assert_close(
        padded.items.weight.grad[2:], table.grad, **close
    )
    torch.testing.assert_close(
        padded.items.weight.grad[1:2], packed.embedding.start.grad, **close
    )
    last_cross, first_single = (
        padded.experts[config.cross_experts - 1],
        padded.experts[config.cross_experts],
    )
    torch.testing.assert_close(
        last_cross.blocks[0].qkv.weight.grad.T,
        packed.cross_experts.blocks[0].qkv.grad[-1],
        **close,
    )
    torch.testing.assert_close(
        first_single.blocks[1].outer.weight.grad.T,
        packed.single_experts.blocks[1].w2.grad[0],
        **close,
    )


def test_the_padded_model_refuses_readings_that_it_does_not_have():
    with pytest.raises(ValueError, match="gate"):
        PaddedSyNCRec(ModelConfig(gate="sequence"), 2, 10)


class Everything:
    """In place of the counter's module tracker, which does not take modules that run without a graph."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize(
    "negatives",
    [NegativesConfig(per_target=2, shared=0), NegativesConfig(shared=300)],
)
def test_the_formula_counts_what_is_computed(negatives):
    loss = "sampled_softmax" if negatives.shared else "bpr"
    sizes = dict(dim=32, max_length=32, experts=5, cross_experts=3, ffn_dim=48)
    config = ModelConfig(
        **sizes, **EQUATIONS, dropout=0.0, loss=loss, kernel="plain"
    )  # the counter does not see into the fused one
    dataset = dataset_of(1000, 3, users=8, steps=1)
    arrays = (
        *draw(dataset, 0, 8, 4, 32, negatives),
        [domain.items for domain in dataset.domains],
        config.max_length,
    )
    packed, table, padded = models(config, 1000, 3, torch.float32)
    table = table.detach()
    batch, padded_batch = move(build_batch(*arrays), "cpu"), pad_batch(*arrays)
    # The kernel of the attention is unknown to the counter on CPU; the plain one computes whole squares.
    for work, run in (
        (
            flops.packed_work(config, batch, square=True),
            lambda: packed(batch, table[batch.ids].requires_grad_())[0],
        ),
        (
            flops.padded_work(config, padded_batch, square=True),
            lambda: padded(padded_batch)[0],
        ),
    ):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Everything()
        with counter, sdpa_kernel(SDPBackend.MATH):
            run().backward()
        assert flops.step_operations(config, work) == pytest.approx(
            counter.get_total_flops(), rel=0.02
        )


def test_needed_attention_is_less_than_half_of_what_padded_squares_hold():
    config = ModelConfig(dim=8, max_length=32, time_knots=0)
    dataset = dataset_of(100, 3, users=8, steps=1)
    arrays = draw(dataset, 0, 8, 4, 32, NegativesConfig(shared=0))
    batch = build_batch(
        *arrays, [domain.items for domain in dataset.domains], 32
    )
    cross, _ = flops.packed_work(config, batch)
    assert cross.pairs == sum(
        length * (length + 1) // 2 for length in arrays[1].tolist()
    )
    assert cross.tokens == len(arrays[0])


def test_every_step_draws_as_many_interactions_and_other_items():
    dataset = dataset_of(100_000, 5, users=32, steps=2)
    assert dataset.num_embeddings == 100_000
    first, second = (
        draw(dataset, step, 32, 16, 128, NegativesConfig(shared=0))
        for step in range(2)
    )
    for items_N, lengths_B, domain_N, _, negatives_N1 in (first, second):
        assert (lengths_B.min(), lengths_B.max(), lengths_B.sum()) == (
            16,
            128,
            2304,
        )
        assert (dataset.domain_of(items_N) == domain_N).all()
        assert (dataset.domain_of(negatives_N1[:, 0]) == domain_N).all()
        assert (negatives_N1[:, 0] != items_N).all()
        assert np.bincount(domain_N, minlength=5).min() > 2304 / 5 * 0.8
    assert (first[0] != second[0]).mean() > 0.99


@pytest.mark.parametrize("domains", [1, 8, 9, 30])
def test_there_are_as_many_domains_as_asked_for(domains):
    dataset = dataset_of(300, domains, users=2, steps=1)
    names = {domain.name for domain in dataset.domains}
    assert len(dataset.domains) == len(names) == domains
    assert sum(domain.items for domain in dataset.domains) == 300


@pytest.mark.parametrize(
    ("items", "fits"), [(10**5, True), (10**6, True), (10**7, False)]
)
def test_ten_million_items_do_not_fit_with_dense_adam(items, fits):
    reason = train_step.too_large(items, 128, 24 * 2**30)
    assert (reason is None) == fits
    if reason:
        assert (
            "5.1 GB" in reason and "20.5 GB" in reason and "25.8 GB" in reason
        )


SMALL = [
    *(
        "items=[500]",
        "precision=[fp32]",
        "steps=3",
        "warmup=1",
        "users=4",
        "window=0.001",
    ),
    *(
        "model.dim=16",
        "model.max_length=16",
        "model.experts=3",
        "model.cross_experts=2",
        "model.ffn_dim=16",
    ),
]


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_step.py", *map(str, arguments)])
    with as_a_script(), pytest.raises(SystemExit) as left:
        train_step.main()
    return left.value.code


@pytest.mark.slow
@pytest.mark.ranks
def test_both_systems_are_measured_and_written(monkeypatch, tmp_path, capfd):
    file = tmp_path / "result.json"
    monkeypatch.setattr(suite, "in_own_process", in_this_process)
    monkeypatch.setattr(
        machine, "memory_bytes", lambda: 10**6
    )  # enough for 500 items, and not for 10,000
    assert not run_main(
        monkeypatch,
        "--json",
        file,
        *SMALL,
        "items=[500,10000]",
        "systems=[ours,padded]",
    )
    record = json.loads(file.read_text())
    assert [(of["system"], of["items"]) for of in record["results"]] == [
        ("ours", 500),
        ("ours", 10**4),
        ("padded", 500),
    ]
    limit = record["limits"]["fp32"]
    assert limit["seconds_per_step"] == pytest.approx(
        sum(
            limit["counts"][of] * limit["seconds"][of] for of in limit["counts"]
        )
    )
    assert limit["rate"] == pytest.approx(
        limit["operations"] / limit["seconds_per_step"]
    )
    for result in record["results"]:
        seconds = result["step_seconds"]
        assert len(seconds["all"]) == 3 and len(result["warmup_seconds"]) == 1
        assert seconds["min"] <= seconds["median"] <= seconds["max"]
        assert result["tokens"] == 4 * 16
        assert result["tokens_per_second"] == pytest.approx(
            64 / seconds["median"]
        )
        share = (
            result["operations_per_step"] / limit["rate"] / seconds["median"]
        )
        assert result["matmul_share"] == pytest.approx(share) and share > 0
        assert len(set(result["losses"])) == 4
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert [(of["system"], of["items"]) for of in record["not_run"]] == [
        ("padded", 10**4)
    ]
    ours, padded = record["results"][0], record["results"][2]
    shown = capfd.readouterr().out
    assert (
        f" {ours['tokens_per_second'] / padded['tokens_per_second']:.2f} |"
        in shown
        and "the machine has 0.0 GB" in shown
    )


class OnDevice(torch.Tensor):
    """A loss that must not be read while steps are measured."""

    allowed = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if not cls.allowed and getattr(function, "__name__", "") in (
            "item",
            "tolist",
            "__float__",
            "stack",
            "cpu",
        ):
            raise AssertionError(f"{function.__name__} waits for the device")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_no_step_is_read_before_the_last_is_done(monkeypatch):
    """The host waits twice: when the warm-up is over, and at the end."""
    waits, made = [], []

    def wait(device):
        waits.append(len(made))
        OnDevice.allowed = len(made) == 5

    def steps():
        for number in range(5):
            made.append(number)
            yield torch.tensor(float(number)).as_subclass(OnDevice)

    monkeypatch.setattr(train_step, "_wait_for", wait)
    seconds, interval, losses = train_step.timed_steps(
        steps(), 2, torch.device("cpu")
    )
    assert waits == [2, 5] and losses == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(seconds) == 5 and min(*seconds, interval) >= 0


def test_ours_makes_the_next_batch_ready_beside_each_step(monkeypatch):
    """As a run does, the one after the last measured step too; each ready batch goes into its step."""
    settings, _ = suite.settings("train_step", train_step.Settings, SMALL)
    calls = []

    class Trainer:
        def prepare(self, batch):
            calls.append(f"prepare {batch}")
            return f"ready {batch}"

        def train_step(self, ready, following):
            calls.append(f"step {ready}")
            calls.append(f"then {following()}")
            return f"loss of {ready}", None

        def settle(self):
            calls.append("settle")

    monkeypatch.setattr(train_step, "trainer_of", lambda *_, **__: Trainer())
    steps = train_step.start_ours(settings.model, settings, None, None)
    assert list(steps(["a", "b", "c"])) == [
        "loss of ready a",
        "loss of ready b",
    ]
    assert calls == [
        *("prepare a", "step ready a", "prepare b", "then ready b"),
        *("step ready b", "prepare c", "then ready c", "settle"),
    ]


@pytest.mark.ranks
def test_a_killed_process_is_reported_and_the_others_are_kept(
    monkeypatch, tmp_path, capsys
):
    def killed(*_):
        raise ProcessExitedException(
            "process 0 terminated with signal SIGKILL", 0, 1, 9, "SIGKILL"
        )

    monkeypatch.setattr(suite, "in_own_process", killed)
    assert (
        run_main(
            monkeypatch,
            *SMALL,
            "systems=[ours]",
            "--json",
            tmp_path / "result.json",
        )
        == 1
    )
    assert "SIGKILL" in capsys.readouterr().out
    assert (
        json.loads((tmp_path / "result.json").read_text())["not_run"][0][
            "system"
        ]
        == "ours"
    )


def test_precisions_are_measured_where_the_processor_has_them(monkeypatch):
    settings, _ = suite.settings(
        "train_step",
        train_step.Settings,
        [*SMALL, "precision=[fp32,bf16]", "systems=[ours,padded]"],
    )
    for has in (True, False):
        monkeypatch.setattr(machine, "has_bf16", lambda device, has=has: has)
        cases, not_run = train_step.plan(settings)
        assert [(of.system, of.precision) for of in cases] == [
            ("ours", "fp32"),
            *[("ours", "bf16")] * has,
            ("padded", "fp32"),
        ]
        assert [of["precision"] for of in not_run] == ["bf16"] * (not has)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["items=[9]"], "items is [9]: give at least 10"),
        (["steps=0"], "steps is 0: give at least 1"),
        (["model.loss=mse"], "model.loss"),
        (["model.experts=0"], "model.experts is 0: give at least 1"),
    ],
)
def test_bad_options_are_refused_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        suite.settings("train_step", train_step.Settings, arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err
