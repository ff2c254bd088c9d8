"""The padded opponent is the same model, the operations are counted right, and the script measures and writes."""

import json
import sys
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops, train_step
from benchmarks.padded import PaddedSyNCRec, copy_weights, pad_batch
from benchmarks.workload import dataset_of, draw
from syncrec.batch import build_batch, move, trim
from syncrec.config import ModelConfig
from syncrec.model import SyNCRec
from tests.syncrec import histories
from trainer.data.negatives import NegativesConfig

DOMAIN_ITEMS = (6, 4, 5, 3)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def models(config, rows, domains, dtype=torch.float64):
    """The packed model, M, and the padded one with the same weights."""
    torch.manual_seed(3)
    packed = SyNCRec(config, domains).to(dtype)
    for parameter in packed.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    if packed.correction is not None:
        packed.correction.lambda_D = torch.rand(domains, dtype=dtype)
    table = torch.randn(rows, config.dim, dtype=dtype)
    padded = PaddedSyNCRec(config, domains, rows).to(dtype)
    copy_weights(packed, table, padded)
    return packed, table.requires_grad_(), padded


@pytest.mark.parametrize(
    ("reading", "shared", "absent"),
    [
        ({"loss": "bpr"}, 0, None),
        ({"loss": "bpr", "max_length": 20}, 0, None),
        ({"loss": "sampled_softmax"}, 4, 2),
        ({"loss": "bce", "heads": 2, "norm": "pre", "mutual_information_similarity": "cosine"}, 0, 0),
        ({"loss": "bpr", "loss_correction": "none", "mutual_information": "off"}, 0, None),
    ],
)
def test_the_padded_model_has_the_losses_and_gradients_of_ours(reading, shared, absent):
    given = {"dim": 6, "max_length": 5, "experts": 4, "cross_experts": 3, "ffn_dim": 7, "dropout": 0.0, "eta": 0.7}
    config = ModelConfig(**(given | reading))
    drawn = histories.draw(5, DOMAIN_ITEMS, users=9, absent_domain=absent)
    items_N, lengths_B, domain_N, weight_B, negatives = histories.flatten(drawn)
    kept_N, lengths_B, domain_N = trim(np.arange(len(items_N)), lengths_B, domain_N, config.max_length)
    negatives = histories.draw_shared(5, DOMAIN_ITEMS, shared) if shared else negatives[kept_N]
    arrays = items_N[kept_N], lengths_B, domain_N, weight_B, negatives, DOMAIN_ITEMS, config.max_length
    packed, table, padded = models(config, sum(DOMAIN_ITEMS), len(DOMAIN_ITEMS))

    batch = move(build_batch(*arrays), "cpu")
    loss, report = packed(batch, table[batch.ids])
    loss.backward()
    padded_loss, (single_D, cross_D, lambda_D) = padded(pad_batch(*arrays))
    padded_loss.backward()

    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(padded_loss, loss, **close)
    torch.testing.assert_close(single_D, report.single_D.nan_to_num().to(single_D), **close)
    torch.testing.assert_close(cross_D, report.cross_D.nan_to_num().to(cross_D), **close)
    torch.testing.assert_close(lambda_D, report.lambda_D, **close)
    torch.testing.assert_close(padded.items.weight.grad[2:], table.grad, **close)
    torch.testing.assert_close(padded.items.weight.grad[1:2], packed.embedding.start.grad, **close)
    last_cross, first_single = padded.experts[config.cross_experts - 1], padded.experts[config.cross_experts]
    torch.testing.assert_close(last_cross.blocks[0].qkv.weight.grad.T, packed.cross_experts.blocks[0].qkv.grad[-1], **close)
    torch.testing.assert_close(first_single.blocks[1].outer.weight.grad.T, packed.single_experts.blocks[1].w2.grad[0], **close)


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


@pytest.mark.parametrize("negatives", [NegativesConfig(per_target=2), NegativesConfig(shared=300)])
def test_the_formula_counts_what_is_computed(negatives):
    loss = "sampled_softmax" if negatives.shared else "bpr"
    sizes = dict(dim=32, max_length=32, experts=5, cross_experts=3, ffn_dim=48)
    config = ModelConfig(**sizes, dropout=0.0, loss=loss, kernel="plain")  # the counter does not see into the fused one
    dataset = dataset_of(1000, 3, users=8, steps=1)
    arrays = *draw(dataset, 0, 8, 4, 32, negatives), [domain.items for domain in dataset.domains], config.max_length
    packed, table, padded = models(config, 1000, 3, torch.float32)
    table = table.detach()
    batch, padded_batch = move(build_batch(*arrays), "cpu"), pad_batch(*arrays)
    # The kernel of the attention is unknown to the counter on CPU; the plain one computes whole squares.
    for work, run in (
        (flops.packed_work(config, batch, square=True), lambda: packed(batch, table[batch.ids].requires_grad_())[0]),
        (flops.padded_work(config, padded_batch, square=True), lambda: padded(padded_batch)[0]),
    ):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Everything()
        with counter, sdpa_kernel(SDPBackend.MATH):
            run().backward()
        assert flops.step_operations(config, work) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_needed_attention_is_less_than_half_of_what_padded_squares_hold():
    config = ModelConfig(dim=8, max_length=32)
    dataset = dataset_of(100, 3, users=8, steps=1)
    arrays = draw(dataset, 0, 8, 4, 32, NegativesConfig())
    batch = build_batch(*arrays, [domain.items for domain in dataset.domains], 32)
    cross, _ = flops.packed_work(config, batch)
    assert cross.pairs == sum(length * (length + 1) // 2 for length in arrays[1].tolist())
    assert cross.tokens == len(arrays[0])


def test_every_step_draws_as_many_interactions_and_other_items():
    dataset = dataset_of(100_000, 5, users=32, steps=2)
    assert dataset.num_embeddings == 100_000
    first, second = (draw(dataset, step, 32, 16, 128, NegativesConfig()) for step in range(2))
    for items_N, lengths_B, domain_N, _, negatives_N1 in (first, second):
        assert (lengths_B.min(), lengths_B.max(), lengths_B.sum()) == (16, 128, 2304)
        assert (dataset.domain_of(items_N) == domain_N).all()
        assert (dataset.domain_of(negatives_N1[:, 0]) == domain_N).all()
        assert (negatives_N1[:, 0] != items_N).all()
        assert np.bincount(domain_N, minlength=5).min() > 2304 / 5 * 0.8
    assert (first[0] != second[0]).mean() > 0.99


@pytest.mark.parametrize(("items", "fits"), [(10**5, True), (10**6, True), (10**7, False)])
def test_ten_million_items_do_not_fit_with_dense_adam(items, fits):
    reason = train_step.too_large(items, 128, 24 * 2**30)
    assert (reason is None) == fits
    if reason:
        assert "5.1 GB" in reason and "20.5 GB" in reason and "25.8 GB" in reason


def small(system):
    model = ModelConfig(dim=16, max_length=16, experts=3, cross_experts=2, ffn_dim=16, loss="bpr")
    return train_step.Setting(
        system, items=500, steps=3, warmup=1, users=4, window=0.01, model=model, negatives=NegativesConfig()
    )


def run_main(monkeypatch, settings, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_step.py", *map(str, arguments)])
    monkeypatch.setattr(train_step, "plan", lambda _: (settings, [{"system": "padded", "items": 7, "reason": "too many"}]))
    with pytest.raises(SystemExit) as left:
        train_step.main()
    return left.value.code


def test_both_systems_are_measured_and_written(monkeypatch, tmp_path, capfd):
    file = tmp_path / "result.json"
    settings = [small(train_step.OURS), small(train_step.PADDED)]
    assert not run_main(monkeypatch, settings, "--json", file)
    record = json.loads(file.read_text())
    assert [result["system"] for result in record["results"]] == ["ours", "padded"]
    for result in record["results"]:
        seconds = result["step_seconds"]
        assert len(seconds["all"]) == 3 and len(result["warmup_seconds"]) == 1
        assert seconds["min"] <= seconds["median"] <= seconds["max"]
        assert result["tokens"] == 4 * 16
        assert result["tokens_per_second"] == pytest.approx(64 / seconds["median"])
        share = result["operations_per_step"] / seconds["median"] / record["matmul_rate"]
        assert result["matmul_share"] == pytest.approx(share) and 0 < share < 1
        assert len(set(result["losses"])) == 4
    assert record["matmul_rate"] == max(record["matmul_rates"].values())
    assert record["machine"]["versions"]["torch"] == torch.__version__
    assert record["not_run"][0]["reason"] == "too many"
    assert "too many" in capfd.readouterr().out


def test_a_killed_process_is_reported_and_the_others_are_kept(monkeypatch, tmp_path, capsys):
    def killed(_):
        raise BrokenProcessPool

    monkeypatch.setattr(train_step, "in_own_process", killed)
    assert run_main(monkeypatch, [small(train_step.OURS)], "--json", tmp_path / "result.json") == 1
    assert "killed" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["not_run"][1]["system"] == "ours"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items", "9"], "--items 9: give at least 10"),
        (["--steps", "0"], "0: give at least 1"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--loss", "mse"], "invalid choice"),
    ],
)
def test_bad_options_are_refused_in_words(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        train_step.parse(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_short_is_short_and_writes_nothing_unasked():
    options = train_step.parse(["--short"])
    assert (options.items, options.steps, options.warmup, options.json) == ([10**5], 3, 1, None)
    options = train_step.parse([])
    assert (options.items, options.steps, options.warmup) == ([10**5, 10**6, 10**7], 10, 3)
    assert options.json.name == "train_step.json"
