"""The packed model against the slow padded one, and what else the paper says of a training step."""

import copy
import math
import threading
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from syncrec.batch.build import build_query
from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.layers.embedding import InputEmbedding
from syncrec.layers.tower import Tower
from syncrec.layers.transformer import ExpertStack
from syncrec.model import (
    SyNCRec,
    _sum_by_domain,
    mix,
    select_decayed_parameters,
)
from syncrec.reduction import Reduction
from tests.helpers.histories import (
    draw,
    draw_shared,
    flatten,
    pack,
    ticks_of,
    without_newest,
)
from tests.helpers.reference import (
    EQUATIONS,
    NONE,
    SOS,
    cross_sequence,
    single_sequence,
    training_step,
)
from trainer.data.loading.mutual_information_sample import draw_candidates

DOMAIN_ITEMS = (6, 4, 5, 3)
SMALL = ModelConfig(
    **EQUATIONS,
    dim=6,
    max_length=5,
    experts=4,
    cross_experts=2,
    blocks=2,
    heads=2,
    ffn_dim=7,
    dropout=0.0,
    eta=0.7,
)
SASREC = {
    "experts": 1,
    "stop_gradient": False,
    "loss_correction": "none",
    "mutual_information": False,
}
# Only harm is corrected.
HARM = {
    "loss_correction": "harm",
    "stop_gradient": "harm",
}
# Every reading of the paper that a config value stands for, and a few of them together.
READINGS = {
    "default": {},
    "paper": {
        "loss": "bpr_probability",
        "gate": "sequence",
        "heads": 1,
        "experts": 5,
        "cross_experts": 3,
    },
    "pre_norm": {"norm": "pre"},
    "one_head_one_block": {"heads": 1, "blocks": 1},
    "one_cross_expert": {"cross_experts": 1},
    "one_single_expert": {"cross_experts": 3},
    "sequence_gate": {"gate": "sequence"},
    "sequence_gate_pre_norm": {"gate": "sequence", "norm": "pre"},
    "no_stop_gradient": {"stop_gradient": False},
    "no_stop_gradient_sequence_gate": {
        "stop_gradient": False,
        "gate": "sequence",
    },
    "no_correction": {"loss_correction": "none"},
    "harm": HARM,
    "harm_of_the_cross_view": {**HARM, "prediction": "cross"},
    "harm_sequence_gate_time": {**HARM, "gate": "sequence", "time_knots": 3},
    "harm_in_gradients_alone": {"stop_gradient": "harm"},
    "no_tower": {"tower": False},
    "shapley": {"loss_correction": "shapley", "correction_temperature": 0.1},
    "shapley_sequence_gate_pre_norm_bpr": {
        "loss_correction": "shapley",
        "gate": "sequence",
        "norm": "pre",
        "loss": "bpr",
    },
    "sharp_correction": {"correction_temperature": 0.3},
    "fixed_scales": {"learn_scales": False},
    "no_information": {"mutual_information": False},
    "last_pooling": {"mutual_information_pooling": "last"},
    "cosine": {
        "mutual_information_similarity": "cosine",
        "mutual_information_temperature": 0.2,
    },
    "others": {"mutual_information_denominator": "others"},
    "others_cosine_last": {
        "mutual_information_denominator": "others",
        "mutual_information_similarity": "cosine",
        "mutual_information_pooling": "last",
    },
    "bpr": {"loss": "bpr"},
    "bce": {"loss": "bce"},
    "bpr_probability": {"loss": "bpr_probability"},
    "information_alone": {"eta": 0.0},
    "time": {"time_knots": 5},
    "gaps": {"time_knots": 1},
    "time_sequence_gate_shapley": {
        "time_knots": 2,
        "gate": "sequence",
        "loss_correction": "shapley",
    },
    "time_one_token": {"time_knots": 70_000, "max_length": 1},
    "one_token": {"max_length": 1},
    "nothing_cut": {"max_length": 13},
    "all_off": {**SASREC, "experts": 3},
}


def make_model(config, domains, seed, lambda_state=False):
    """A float64 model with no parameter at a value that could hide its part: no zeros, no ones."""
    generator = torch.Generator().manual_seed(seed)
    model = SyNCRec(config, domains).double()
    for name, parameter in model.named_parameters():
        offset = (
            1.0
            if "norm" in name and name.endswith(("scale", "weight"))
            else 0.0
        )
        parameter.data = offset + 0.4 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    if lambda_state and model.correction is not None:
        drawn = (
            torch.rand(domains, generator=generator, dtype=torch.float64) + 0.1
        )
        model.correction.lambda_D = drawn / drawn.sum()
    gaps = [gap for gap in (model.gap, model.gap_of_mean) if gap is not None]
    for gap in gaps if lambda_state else []:
        gap.sums_2D = 0.5 * torch.randn(
            2, domains, generator=generator, dtype=torch.float64
        )
        gap.sums_2D[1] = 0.8
        gap.noise_3D = torch.tensor(
            [[1e-4] * domains, [0.8] * domains, [5e-3] * domains],
            dtype=torch.float64,
        )
    return model


def make_table(domain_items, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        sum(domain_items), width, generator=generator, dtype=torch.float64
    )


def run(model, table, batch, reduction=None):
    """(loss, report, gradient by parameter name, gradient of the table) of one training step."""
    table = table.clone().requires_grad_()
    model.zero_grad()
    loss, report = model(batch, table[batch.ids], reduction)
    loss.backward()
    return (
        loss.detach(),
        report,
        {name: p.grad for name, p in model.named_parameters()},
        table.grad,
    )


def near(actual, expected, what):
    """Equal to 1e-9 of the scale of `expected`."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = (
        torch.zeros_like(expected)
        if actual is None
        else torch.as_tensor(actual)
    )
    assert actual.dtype == torch.float64, f"{what} is {actual.dtype}"
    assert actual.shape == expected.shape, what
    scale = max(expected.abs().max().item() if expected.numel() else 0.0, 1e-6)
    worst = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert worst <= 1e-9 * scale, (
        f"{what}: off by {worst:.3g} on a scale of {scale:.3g}"
    )  # also fails for NaN


def same_numbers(actual_D, expected, what):
    """Equal, where NaN stands for None."""
    expected_D = torch.tensor(
        [float("nan") if value is None else value for value in expected],
        dtype=torch.float64,
    )
    assert torch.equal(actual_D.isnan(), expected_D.isnan()), what
    near(actual_D.nan_to_num(), expected_D.nan_to_num(), what)


def recorded(model, batch, rows):
    """What the towers and SC-MIM gave: cross (M, r), single (M, r), InfoNCE (sums, counts) or None."""
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output)

    hooks = [model.cross_tower.register_forward_hook(keep("cross"))]
    hooks.append(model.single_towers.register_forward_hook(keep("single")))
    if model.mutual_information is not None:
        hooks.append(
            model.mutual_information.register_forward_hook(keep("information"))
        )
    copy.deepcopy(model)(batch, rows)
    for hook in hooks:
        hook.remove()
    return (
        seen["cross"],
        seen["single"],
        seen.get("information"),
    )


def compare(
    config,
    domain_items,
    seed,
    absent_domain=None,
    shared=None,
    lambda_state=False,
):
    """Holds one packed training step against the reference; returns the reference's result."""
    histories = draw(seed, domain_items, absent_domain=absent_domain)
    shared_negatives = (
        draw_shared(seed, domain_items, shared) if shared else None
    )
    model = make_model(config, len(domain_items), seed, lambda_state)
    table = make_table(domain_items, config.dim, seed)
    state = model.state_dict()
    expected = training_step(
        config, state, table, histories, domain_items, shared_negatives
    )
    batch, keys = pack(
        histories,
        domain_items,
        config.max_length,
        config.mutual_information_pooling,
        shared_negatives,
    )

    cross_MR, single_MR, information = recorded(model, batch, table[batch.ids])
    keys = [SOS, *(step for _, step in keys)]
    cross_tokens = [
        (u, i)
        for u, h in enumerate(histories)
        for i, _ in cross_sequence(h, config.max_length)
    ]
    assert [keys[place] for place in batch.cross.input_M] == [
        given for _, given in cross_tokens
    ]
    near(
        cross_MR,
        torch.stack([expected.cross_outputs[key] for key in cross_tokens]),
        "cross-domain outputs",
    )
    single_tokens = [
        (d, u, i)
        for d in range(len(domain_items))
        for u, history in enumerate(histories)
        for i, _ in single_sequence(history, d, config.max_length)
    ]
    assert [keys[place] for place in batch.single.input_M] == [
        given for _, _, given in single_tokens
    ]
    near(
        single_MR,
        torch.stack([expected.single_outputs[key] for key in single_tokens]),
        "single-domain outputs",
    )

    loss, report, gradients, item_gradient = run(model, table, batch)
    same_numbers(
        report.single_D, expected.single, "single-domain loss by domain"
    )
    same_numbers(report.cross_D, expected.cross, "cross-domain loss by domain")
    near(report.loss_single, expected.loss_single, "single-domain loss")
    near(report.loss_cross, expected.loss_cross, "corrected cross-domain loss")
    same_numbers(report.phi_D, expected.phi, "φ")
    near(report.lambda_D, expected.lambdas, "λ")
    if model.correction is not None:
        near(model.correction.lambda_D, expected.lambdas, "λ state")
    near(
        report.mutual_information,
        sum(expected.information),
        "mutual information",
    )
    if information is not None:
        sums_D, counts_D = information
        near(
            sums_D / counts_D.clamp(min=1),
            expected.information,
            "mutual information by domain",
        )
    near(loss, expected.total, "loss")
    near(item_gradient, expected.item_gradient, "gradient of the items")
    names = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert names == expected.parameter_gradients.keys() - (
        set() if config.learn_scales else {*SCALES}
    )
    for name in names:
        # Where the reference has no gradient the packed model may have zeros: all ranks must run the same modules.
        gradient = expected.parameter_gradients[name]
        near(
            gradients[name],
            torch.zeros_like(model.get_parameter(name))
            if gradient is None
            else gradient,
            name,
        )
    return expected


SCALES = ("correction.alpha", "correction.beta")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("reading", READINGS)
def test_packed_step_equals_the_padded_one(reading, seed):
    config = replace(SMALL, **READINGS[reading])
    # Even seeds: a domain that nobody touched, shared negatives, and a λ that has seen batches before.
    odd = seed % 2
    absent = None if odd else seed % len(DOMAIN_ITEMS)
    compare(
        config,
        DOMAIN_ITEMS,
        seed,
        absent,
        shared=None if odd else 4,
        lambda_state=not odd,
    )


@pytest.mark.parametrize("seed", range(10, 20))
def test_packed_step_equals_the_padded_one_on_more_batches(seed):
    config = replace(SMALL, max_length=3 + seed % 4)
    absent = seed % 5 if seed % 5 < len(DOMAIN_ITEMS) else None
    compare(
        config,
        DOMAIN_ITEMS,
        seed,
        absent,
        shared=8 if seed % 3 == 0 else None,
        lambda_state=seed % 2,
    )


@pytest.mark.parametrize(
    "loss", ["sampled_softmax", "bpr", "bce", "bpr_probability"]
)
def test_packed_step_equals_the_padded_one_with_shared_negatives_and_a_domain_of_one_item(
    loss,
):
    compare(replace(SMALL, loss=loss), (6, 1, 5), seed=6, shared=7)


@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_packed_step_equals_the_padded_one_in_a_single_domain(gate):
    compare(replace(SMALL, gate=gate), (9,), seed=7)


def test_one_expert_in_one_domain_with_all_else_off_is_two_equal_towers_over_one_sequence():
    """What is left is SASRec under a tower: both views hold the same tokens, so equal towers give equal losses."""
    config = replace(SMALL, **SASREC)
    expected = compare(config, (9,), seed=8)
    assert expected.phi[0] != 0
    model = make_model(config, 1, seed=8)
    model.single_towers[0].load_state_dict(model.cross_tower.state_dict())
    batch, _ = pack(draw(8, (9,)), (9,), config.max_length)
    _, report, _, _ = run(model, make_table((9,), config.dim, 8), batch)
    near(report.loss_single, report.loss_cross, "losses of equal views")
    near(report.phi_D, torch.zeros(1), "φ of equal views")


def test_the_drawn_batches_hold_the_awkward_cases():
    """The comparison above is worth what its batches hold."""
    seen, longest = set(), SMALL.max_length
    for seed in (1, 2, *range(10, 20)):
        for history in draw(
            seed, DOMAIN_ITEMS, absent_domain=None if seed % 2 else seed % 4
        ):
            count, weight = len(history.items), history.weight
            seen |= {
                f"weight {weight}",
                f"{count} interactions" if count < 2 else "more interactions",
            }
            cross = cross_sequence(history, longest)
            if count > longest:
                seen.add("cross-domain sequence cut")
            for d in range(len(DOMAIN_ITEMS)):
                single = single_sequence(history, d, longest)
                if not single:
                    seen.add("domain never touched")
                    continue
                if single[0][0] != SOS:
                    seen.add("single-domain sequence cut")
                if single[-1][1] is NONE:
                    seen.add("token without a target")
                if (
                    {step for _, step in single}
                    - {step for _, step in cross}
                    - {NONE}
                ):
                    seen.add("predicted in the single-domain view only")
    assert len(seen) == 10, seen


def only(batch, view):
    """The batch with no loss in the other view."""
    other = {"cross": "single", "single": "cross"}[view]
    silent = replace(
        getattr(batch, other),
        target_weight_L=torch.zeros_like(getattr(batch, other).target_weight_L),
    )
    micro_batch = replace(batch.micro_batches[0], **{other: silent})
    return replace(batch, micro_batches=(micro_batch,))


@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("view", ["cross", "single"])
def test_each_task_trains_its_own_experts_only(view, stop_gradient):
    config = replace(
        SMALL,
        stop_gradient=stop_gradient,
        loss_correction="none",
        mutual_information=False,
    )
    model = make_model(config, len(DOMAIN_ITEMS), seed=3)
    batch, _ = pack(draw(3, DOMAIN_ITEMS), DOMAIN_ITEMS, config.max_length)
    _, _, gradients, _ = run(
        model, make_table(DOMAIN_ITEMS, config.dim, 3), only(batch, view)
    )
    experts = {
        name: gradient
        for name, gradient in gradients.items()
        if "experts" in name
    }
    for name, gradient in experts.items():
        silent = gradient is None or not gradient.any()
        assert silent == (
            stop_gradient and not name.startswith(f"{view}_experts")
        ), name
        if not stop_gradient:
            assert gradient.flatten(1).any(1).all(), (
                f"not every expert learns: {name}"
            )
    assert len({name.split(".")[0] for name in experts}) == (
        2 if stop_gradient else 1
    )


def test_no_module_sees_a_padded_token():
    config = SMALL
    model = make_model(config, len(DOMAIN_ITEMS), seed=4)
    histories = draw(4, DOMAIN_ITEMS, users=20)
    batch, _ = pack(histories, DOMAIN_ITEMS, config.max_length)
    cross = sum(
        len(cross_sequence(history, config.max_length)) for history in histories
    )
    single = [
        sum(
            len(single_sequence(history, d, config.max_length))
            for history in histories
        )
        for d in range(len(DOMAIN_ITEMS))
    ]
    assert (
        0 < sum(single) < len(DOMAIN_ITEMS) * len(histories) * config.max_length
    )
    counted = {}
    for name, module in model.named_modules():
        if isinstance(module, (ExpertStack, Tower)) or "norm" in name:
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: counted.setdefault(
                    name, []
                ).append(inputs[0].shape[-2])
            )
        elif isinstance(module, InputEmbedding):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: counted.setdefault(
                    name, []
                ).append(len(output))
            )
    run(model, make_table(DOMAIN_ITEMS, config.dim, 4), batch)
    for name, tokens in counted.items():
        if "experts" in name or name == "embedding":
            assert sorted(tokens) == sorted([cross, sum(single)]), name
        elif name.startswith("cross_tower"):
            assert tokens == [cross], name
        else:
            assert tokens == [single[int(name.split(".")[1])]], name
    assert {
        "embedding",
        "cross_experts",
        "single_experts",
        "cross_tower",
        "single_towers.3.norm",
    } <= counted.keys()


@pytest.mark.parametrize("gate", ["token", "sequence"])
def test_outputs_are_causal_with_the_token_gate_and_not_with_the_literal_one(
    gate,
):
    """Reading 3: W_g over the whole sequence lets every position's mixture see the items that it is to predict."""
    config = replace(SMALL, gate=gate, max_length=8)
    model = make_model(config, 1, seed=5)
    table = make_table((9,), config.dim, 5)
    outputs = []
    for newest_input in (3, 4):
        history = replace(
            draw(5, (9,))[0],
            items=[0, 1, 2, newest_input, 5],
            domains=[0] * 5,
            weight=1,
        )
        batch, _ = pack(
            [replace(history, negatives=[[6]] * 5)], (9,), config.max_length
        )
        outputs.append(recorded(model, batch, table[batch.ids])[0])
    before, after = outputs
    assert not torch.equal(before[-1], after[-1])
    assert torch.equal(before[:-1], after[:-1]) == (gate == "token")


def test_dropout_only_while_training():
    batch, _ = pack(draw(9, DOMAIN_ITEMS), DOMAIN_ITEMS, SMALL.max_length)
    table = make_table(DOMAIN_ITEMS, SMALL.dim, 9)
    without, with_dropout = SMALL, replace(SMALL, dropout=0.5)
    expected = run(make_model(without, 4, seed=9), table, batch)[0]
    model = make_model(with_dropout, 4, seed=9)
    assert run(model.eval(), table, batch)[0] == expected
    assert run(model.train(), table, batch)[0] != expected


class SimulatedRank(Reduction):
    """One of several ranks that run as threads and meet at a barrier, as collectives do."""

    def __init__(self, rank, barrier, exchanged):
        self.rank, self.world_size = rank, barrier.parties
        self.barrier, self.exchanged, self.calls = barrier, exchanged, 0

    def _give(self, values):
        call, self.calls = self.calls, self.calls + 1
        self.exchanged[call, self.rank] = values
        return call

    def _take(self, call):
        self.barrier.wait(timeout=60)
        return [self.exchanged[call, rank] for rank in range(self.world_size)]

    def start_sum(self, values):
        assert not values.requires_grad and values.dtype == torch.float64
        call = self._give(values)
        return lambda: torch.stack(self._take(call)).sum(0)

    def gather(self, values_B):
        return torch.cat(self._take(self._give(values_B)))

    def collect(self, values_CR, place_C, rows):
        return torch.stack(
            self._take(self._give(super().collect(values_CR, place_C, rows)))
        ).sum(0)


def run_ranks(models, batches, tables):
    """Each rank's (loss, report); the gradients of the mean loss are left in the models and tables.

    The ranks' graphs are joined by `gather`, so one backward of the mean loss gives each rank's parameters what
    backward and a gradient mean over ranks would, and summing over ranks gives that mean.
    """
    barrier, exchanged = threading.Barrier(len(models)), {}
    results = [None] * len(models)

    def one(rank):
        try:
            rows = tables[rank][batches[rank].ids]
            results[rank] = models[rank](
                batches[rank], rows, SimulatedRank(rank, barrier, exchanged)
            )
        except BaseException:
            barrier.abort()
            raise

    threads = [
        threading.Thread(target=one, args=(rank,))
        for rank in range(len(models))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results, "a rank failed"
    torch.stack([loss for loss, _ in results]).mean().backward()
    return results


@pytest.mark.parametrize("size", [2, 4, 50])
@pytest.mark.parametrize("denominator", ["all", "others"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sample_of_users_is_the_same_at_any_number_of_ranks(
    size, denominator, world_size
):
    """50: more than there are, who then stand for themselves: what all users as candidates give."""
    config = replace(SMALL, mutual_information_denominator=denominator, eta=0.3)
    histories = draw(world_size, DOMAIN_ITEMS, users=12)
    model = make_model(config, len(DOMAIN_ITEMS), world_size, lambda_state=True)
    table = make_table(DOMAIN_ITEMS, config.dim, world_size)
    # A user that only fills up is in no batch of the plan.
    counted_U = np.flatnonzero([history.weight for history in histories])
    lengths_UD = np.array(
        [
            np.bincount(histories[user].domains, minlength=len(DOMAIN_ITEMS))
            for user in counted_U
        ]
    )

    def sampled(part, first):
        batch, _ = pack(part, DOMAIN_ITEMS, config.max_length)
        return replace(
            batch,
            candidates=draw_candidates(
                1,
                2,
                3,
                counted_U,
                lengths_UD,
                first + np.arange(len(part)),
                size,
            ),
        )

    whole = sampled(histories, 0)
    loss, report, gradients, item_gradient = run(
        copy.deepcopy(model), table, whole
    )
    everyone, _, _, everyone_gradient = run(
        copy.deepcopy(model), table, replace(whole, candidates=None)
    )
    if size == 50:
        near(loss, everyone, "loss")
        near(item_gradient, everyone_gradient, "gradient of the items")
    else:
        assert abs(loss - everyone) > 1e-6 and not torch.equal(
            item_gradient, everyone_gradient
        )
    replicas = [copy.deepcopy(model) for _ in range(world_size)]
    tables = [table.clone().requires_grad_() for _ in range(world_size)]
    batches = [
        sampled(part, rank * len(part))
        for rank, part in enumerate(split(histories, world_size))
    ]
    results = run_ranks(replicas, batches, tables)
    ranks_add_up(
        results, tables, replicas, (loss, report, gradients, item_gradient)
    )


def ranks_add_up(results, tables, replicas, whole):
    """The ranks' losses, gradients and mutual information are those of one process; whole: what `run` gave there."""
    loss, report, gradients, item_gradient = whole
    near(
        torch.stack([rank_loss.detach() for rank_loss, _ in results]).mean(),
        loss,
        "mean loss",
    )
    near(
        sum(rank_table.grad for rank_table in tables),
        item_gradient,
        "mean gradient of the items",
    )
    for name, gradient in gradients.items():
        near(
            sum(
                dict(replica.named_parameters())[name].grad
                for replica in replicas
            ),
            gradient,
            name,
        )
    near(
        sum(rank_report.mutual_information for _, rank_report in results),
        report.mutual_information,
        "information",
    )


DECAY_KINDS = {
    "all": {"time_knots": 3, "norm": "pre"},
    "gru": {**SASREC, "encoder": "gru", "heads": 1, "tower": True},
}


@pytest.mark.parametrize("kind", DECAY_KINDS)
def test_weight_decay_is_for_projections_and_embeddings(kind):
    model = SyNCRec(replace(SMALL, **DECAY_KINDS[kind]), 2)
    decayed = select_decayed_parameters(model)
    names = {name for name, _ in model.named_parameters()}
    kept = {name.rpartition(".")[2] for name in names - decayed}
    assert decayed <= names
    block = {
        "b1",
        "b2",
        "attention_norm_scale",
        "attention_norm_shift",
        "ffn_norm_scale",
        "ffn_norm_shift",
    }
    if kind == "all":
        assert kept == {
            *block,
            "scale",
            "shift",
            "weight",
            "bias",
            "alpha",
            "beta",
        }
        assert {name.rpartition(".")[2] for name in decayed} == {
            *(
                "qkv",
                "out",
                "w1",
                "w2",
                "weight",
                "start",
                "positions",
                "knots_2KR",
                "gaps_GR",
            ),
        }
    else:
        assert kept == {
            *(
                f"bias_{way}_l{layer}"
                for way in ("ih", "hh")
                for layer in (0, 1)
            ),
            "weight",
            "bias",
        }
    assert all(
        "norm" in name for name in names - decayed if name.endswith(".weight")
    )


def split(histories, world_size):
    size = len(histories) // world_size
    return [
        histories[rank * size : (rank + 1) * size] for rank in range(world_size)
    ]


RANK_READINGS = {
    "default": {},
    "paper": {"loss": "bpr_probability", "gate": "sequence"},
    "others": {
        "mutual_information_denominator": "others",
        "mutual_information_similarity": "cosine",
    },
    "no_stop_gradient": {"stop_gradient": False},
    "harm": HARM,
    "no_correction_no_information": {
        "loss_correction": "none",
        "mutual_information": False,
    },
    "cross_task_alone": {**SASREC, "tasks": "cross", "tower": False},
    "shapley": {"loss_correction": "shapley", "correction_temperature": 0.1},
    "shapley_of_gru": {
        **SASREC,
        "tasks": "cross",
        "encoder": "gru",
        "heads": 1,
        "loss_correction": "shapley",
    },
}


@pytest.mark.parametrize("reading", RANK_READINGS)
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("shared", [None, 5])
def test_mean_over_ranks_equals_one_process(reading, world_size, shared):
    config = replace(SMALL, **RANK_READINGS[reading])
    seed = world_size
    histories = draw(seed, DOMAIN_ITEMS, users=12, absent_domain=1)
    # The last rank's users only fill up, as at the end of an epoch.
    filling = 12 // world_size
    histories = [
        *histories[:-filling],
        *(replace(history, weight=0) for history in histories[-filling:]),
    ]
    negatives = draw_shared(seed, DOMAIN_ITEMS, shared) if shared else None
    model = make_model(config, len(DOMAIN_ITEMS), seed, lambda_state=True)
    table = make_table(DOMAIN_ITEMS, config.dim, seed)
    replicas = [copy.deepcopy(model) for _ in range(world_size)]
    tables = [table.clone().requires_grad_() for _ in range(world_size)]
    batches = [
        pack(part, DOMAIN_ITEMS, config.max_length, shared_negatives=negatives)[
            0
        ]
        for part in split(histories, world_size)
    ]
    whole, _ = pack(
        histories, DOMAIN_ITEMS, config.max_length, shared_negatives=negatives
    )

    loss, report, gradients, item_gradient = run(model, table, whole)
    results = run_ranks(replicas, batches, tables)

    ranks_add_up(
        results, tables, replicas, (loss, report, gradients, item_gradient)
    )
    for _, rank_report in results:
        for field in (
            "single_D",
            "cross_D",
            "loss_single",
            "loss_cross",
            "phi_D",
            "lambda_D",
        ):
            value = getattr(rank_report, field)
            first = getattr(results[0][1], field)
            assert torch.equal(
                value.nan_to_num(nan=-1.0), first.nan_to_num(nan=-1.0)
            ), f"{field} differs between ranks"
            near(value.nan_to_num(), getattr(report, field).nan_to_num(), field)
    if model.correction is not None:
        for replica in replicas:
            assert torch.equal(
                replica.correction.lambda_D, replicas[0].correction.lambda_D
            )
        near(
            replicas[0].correction.lambda_D,
            model.correction.lambda_D,
            "λ state",
        )


@pytest.mark.parametrize("reading", RANK_READINGS)
@pytest.mark.parametrize("shared", [None, 5])
def test_micro_batches_are_one_batch(reading, shared):
    """Losses, λ, its state, and all gradients, SC-MIM among the users of all micro-batches."""
    config = replace(SMALL, **RANK_READINGS[reading])
    histories = draw(7, DOMAIN_ITEMS, users=12, absent_domain=1)
    negatives = draw_shared(7, DOMAIN_ITEMS, shared) if shared else None
    packed = (histories, DOMAIN_ITEMS, config.max_length, "mean", negatives)
    table = make_table(DOMAIN_ITEMS, config.dim, 7)
    model = make_model(config, len(DOMAIN_ITEMS), 7, lambda_state=True)
    accumulating = copy.deepcopy(model)
    loss, report, gradients, item_gradient = run(model, table, pack(*packed)[0])
    cut, _ = pack(*packed, accumulation=4)
    assert [one.users > 0 for one in cut.micro_batches] == 4 * [True]

    accumulated = run(accumulating, table, cut)

    near(accumulated[0], loss, "loss")
    near(accumulated[3], item_gradient, "gradient of the items")
    for name, gradient in gradients.items():
        if gradient is None:
            assert accumulated[2][name] is None
        else:
            near(accumulated[2][name], gradient, name)
    for field in fields(report):
        value = getattr(accumulated[1], field.name)
        expected = getattr(report, field.name)
        near(value.nan_to_num(), expected.nan_to_num(), field.name)
    for name, buffer in model.named_buffers():
        near(accumulating.get_buffer(name), buffer, name)


def test_backward_keeps_the_activations_of_one_micro_batch():
    """Of the others it keeps where they begin, and computes them anew."""
    histories = draw(3, DOMAIN_ITEMS, users=40)
    model = make_model(SMALL, len(DOMAIN_ITEMS), 3)
    table = make_table(DOMAIN_ITEMS, SMALL.dim, 3)
    saved = {}
    for accumulation in (1, 4):
        batch, _ = pack(
            histories, DOMAIN_ITEMS, SMALL.max_length, accumulation=accumulation
        )
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        rows = table[batch.ids].requires_grad_()
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one)
        with hooks:
            model(batch, rows)
        saved[accumulation] = sum(sizes)
    assert saved[4] < 0.5 * saved[1]


def test_sums_of_many_losses_are_exact_enough_for_their_difference():
    """φ is a small difference of two of them; summed in float32 they were off by 4e-6."""
    generator = torch.Generator().manual_seed(0)
    targets = 200_000
    view = SimpleNamespace(
        target_starts=(0, 150_000, targets),
        target_domain_L=(torch.arange(targets) >= 150_000).long(),
        target_weight_L=torch.ones(targets),
        comparable_L=torch.rand(targets, generator=generator) < 0.9,
    )
    loss_L = 6 + 4 * torch.rand(targets, generator=generator)
    sums = _sum_by_domain(view, loss_L)
    for number, part in enumerate((slice(150_000), slice(150_000, None))):
        total = loss_L[part].double().sum()
        comparable = loss_L[part][view.comparable_L[part]].double().sum()
        assert sums[0, number].item() == pytest.approx(total.item(), rel=1e-12)
        assert sums[2, number].item() == pytest.approx(
            comparable.item(), rel=1e-12
        )


def test_dropout_of_a_micro_batch_is_the_same_in_backward():
    """A gradient is that of the loss that forward gave: along itself the loss changes by its square."""
    # Nothing that follows from the losses without gradient.
    config = replace(
        SMALL, dropout=0.3, stop_gradient=False, loss_correction="none"
    )
    model = make_model(config, len(DOMAIN_ITEMS), 5)
    table = make_table(DOMAIN_ITEMS, config.dim, 5)
    histories = draw(5, DOMAIN_ITEMS, users=12)
    batch, _ = pack(histories, DOMAIN_ITEMS, config.max_length, accumulation=3)
    state = copy.deepcopy(model.state_dict())
    losses = []
    step = 1e-6
    gradient = torch.zeros_like(table)
    for factor in (0, step, -step):
        model.load_state_dict(state)
        torch.manual_seed(5)
        moved = table + factor * gradient
        loss, _, _, found = run(model, moved, batch)
        losses.append(loss)
        if not factor:
            gradient = found
    slope = (losses[1] - losses[2]) / (2 * step)
    torch.testing.assert_close(
        slope, gradient.square().sum(), rtol=1e-5, atol=0
    )


def test_information_among_a_ranks_own_users_is_the_mean_of_the_ranks():
    config = replace(SMALL, mutual_information_negatives="rank", eta=0.0)
    histories = [
        replace(history, weight=1)
        for history in draw(21, DOMAIN_ITEMS, users=12)
    ]
    model = make_model(config, len(DOMAIN_ITEMS), 21)
    table = make_table(DOMAIN_ITEMS, config.dim, 21)
    batches = [
        pack(part, DOMAIN_ITEMS, config.max_length)[0]
        for part in split(histories, 2)
    ]
    alone = [
        run(copy.deepcopy(model), table, batch)[1].mutual_information
        for batch in batches
    ]
    tables = [table.clone().requires_grad_() for _ in batches]
    results = run_ranks(
        [copy.deepcopy(model) for _ in batches], batches, tables
    )
    near(
        torch.stack([loss.detach() for loss, _ in results]).mean(),
        -torch.stack(alone).mean(),
        "mean loss",
    )
    near(
        sum(report.mutual_information for _, report in results),
        torch.stack(alone).mean(),
        "report",
    )


@pytest.mark.parametrize("reading", ["default", "paper", "pre_norm", "cosine"])
def test_bf16_is_near_fp32(reading):
    config = replace(SMALL, **{**READINGS[reading], "dim": 32, "ffn_dim": 32})
    batch, _ = pack(
        draw(22, DOMAIN_ITEMS, users=20), DOMAIN_ITEMS, config.max_length
    )
    table = make_table(DOMAIN_ITEMS, config.dim, 22).float() * 0.1
    torch.manual_seed(22)
    model = SyNCRec(config, len(DOMAIN_ITEMS))
    half = SyNCRec(replace(config, precision="bf16"), len(DOMAIN_ITEMS))
    half.load_state_dict(model.state_dict())
    loss, report, gradients, item_gradient = run(model, table, batch)
    half_loss, half_report, half_gradients, half_item_gradient = run(
        half, table, batch
    )
    assert (
        half_loss.dtype == torch.float32
        and half_item_gradient.dtype == torch.float32
    )
    torch.testing.assert_close(half_loss, loss, rtol=0.02, atol=0.0)
    torch.testing.assert_close(
        half_report.lambda_D, report.lambda_D, rtol=0.05, atol=0.0
    )
    gradients["items"], half_gradients["items"] = (
        item_gradient,
        half_item_gradient,
    )
    flat, half_flat = (
        torch.cat([g.flatten() for g in grads.values()])
        for grads in (gradients, half_gradients)
    )
    assert not torch.equal(flat, half_flat), "the products were not in bf16"
    assert torch.cosine_similarity(flat, half_flat, dim=0) > 0.99


@pytest.mark.parametrize("gate", ["token", "sequence"])
@pytest.mark.parametrize("knots", [0, 6])
def test_query_gives_the_newest_output_of_the_training_view(gate, knots):
    """A query for x_1 … x_{n-1} at the time of x_n sees what training sees when it predicts x_n, whatever is scored."""
    config = replace(SMALL, gate=gate, prediction="cross", time_knots=knots)
    model = make_model(config, len(DOMAIN_ITEMS), 23)
    table = make_table(DOMAIN_ITEMS, config.dim, 23)
    histories = [
        history for history in draw(23, DOMAIN_ITEMS, users=12) if history.items
    ]
    batch, _ = pack(histories, DOMAIN_ITEMS, config.max_length)
    cross_MR, _, _ = recorded(model, batch, table[batch.ids])
    newest = (
        np.cumsum(
            [
                len(cross_sequence(history, config.max_length))
                for history in histories
            ]
        )
        - 1
    )
    prefixes = without_newest(histories)
    assert min(len(history.items) for history in prefixes) == 0
    items_N, lengths_B, *_ = flatten(prefixes)
    now_B = np.array([history.ticks[-1] for history in histories])
    given = {"ticks_N": ticks_of(prefixes), "now_B": now_B}
    query = move(
        build_query(
            items_N, lengths_B, config.max_length, np.array([7, 7, 1]), **given
        ),
        "cpu",
    )
    outputs_BDR = model(query, table[query.ids])
    expected_BR = cross_MR[newest]
    if knots:
        expected_BR = expected_BR + model.clock.encode_outputs(
            torch.from_numpy(now_B)
        )
    assert outputs_BDR.shape == (len(histories), len(DOMAIN_ITEMS), config.dim)
    for domain in range(len(DOMAIN_ITEMS)):
        near(outputs_BDR[:, domain], expected_BR, "query")


def test_a_prediction_is_the_mean_of_both_views_weighed_by_the_gap():
    """Each user's newest token in each domain, of which it may have had nothing, beside the newest of all."""
    config, domains = (
        replace(SMALL, prediction_temperature=0.5, time_knots=4),
        len(DOMAIN_ITEMS),
    )
    model, table = (
        make_model(config, domains, 24),
        make_table(DOMAIN_ITEMS, config.dim, 24),
    )
    histories = draw(24, DOMAIN_ITEMS, users=9)
    items_N, lengths_B, domain_N, *_ = flatten(histories)
    now_B = np.arange(len(histories)) * 7_000
    given = (
        config.max_length,
        items_N[:0],
        domain_N,
        domains,
        ticks_of(histories),
        now_B,
    )
    query = move(build_query(items_N, lengths_B, *given), "cpu")
    model.gap.sums_2D = torch.tensor(
        [[0.4, 0.0, -3.0, 0.0], [0.5, 0.5, 0.5, 0.0]], dtype=torch.float64
    )
    own = [1 / (1 + math.exp(gap / 0.5)) for gap in (0.8, 0.0, -6.0, 0.0)]
    model.eval()
    found_BDR = model(query, table[query.ids])
    rows = table[query.ids]
    cross_BR = model._cross_outputs(query.cross, rows)[query.newest_B]
    for domain in range(domains):
        own_N = domain_N == domain
        lengths = np.bincount(
            np.repeat(np.arange(len(histories)), lengths_B)[own_N],
            minlength=len(histories),
        )
        items, ticks = items_N[own_N], ticks_of(histories)[own_N]
        assert 0 in lengths
        # As if there were no other domain: a view of one task, through the domain's own gate and tower.
        one = move(
            build_query(
                items,
                lengths,
                config.max_length,
                items[:0],
                ticks_N=ticks,
                now_B=now_B,
            ),
            "cpu",
        )
        x_MR = model.tokens(one.cross, table[one.ids])
        experts = model._run_experts(
            x_MR, one.cross, model.single_experts, model.cross_experts, None
        )
        mixed_MR = mix(
            model.single_gates[domain](x_MR, one.cross, slice(None)), experts
        )
        single_BR = model.single_towers[domain](mixed_MR)[one.newest_B]
        expected_BR = (1 - own[domain]) * cross_BR + own[domain] * single_BR
        expected_BR = expected_BR + model.clock.encode_outputs(
            torch.from_numpy(now_B)
        )
        near(found_BDR[:, domain], expected_BR.detach(), f"domain {domain}")


def test_training_alone_moves_the_gap():
    batch, _ = pack(
        draw(25, DOMAIN_ITEMS, absent_domain=1), DOMAIN_ITEMS, SMALL.max_length
    )
    model, table = (
        make_model(SMALL, len(DOMAIN_ITEMS), 25),
        make_table(DOMAIN_ITEMS, SMALL.dim, 25),
    )
    model.eval()
    model(batch, table[batch.ids])
    assert not model.gap.sums_2D.any()
    model.train()
    _, report = model(batch, table[batch.ids])
    sums_D, ones_D = model.gap.sums_2D
    there = ~report.phi_D.isnan()
    assert 0 < there.sum() < len(there)
    near(
        sums_D[there] / ones_D[there],
        report.phi_D[there].double(),
        "the mean gap",
    )
    assert (
        not sums_D[~there].any()
        and (model.gap.single_weight_D[~there] == 0.5).all()
    )


def _as_one_stack(state):
    """The state of a model without stop-gradient that has the experts of both stacks."""
    merged = {}
    for name, value in state.items():
        if not name.startswith(("single_experts.", "gap_of_mean.")):
            other = name.replace("cross_experts.", "single_experts.")
            if other != name:
                value = torch.cat([value, state[other]])
            merged[name] = value
    return merged


@pytest.mark.parametrize("gap", [None, 0.3, -0.002])
def test_where_no_domain_is_harmed_the_model_is_an_mmoe(gap):
    """Losses, gradients and predictions; gap: as seen in earlier batches, None: there were none."""
    domains = len(DOMAIN_ITEMS)
    config = replace(SMALL, **HARM, mutual_information=False)
    plain = replace(config, loss_correction="none", stop_gradient=False)
    model = make_model(config, domains, 31)
    if gap is not None:
        sums = [[gap] * domains, [1.0] * domains]
        model.gap_of_mean.sums_2D = torch.tensor(sums, dtype=torch.float64)
        # Its standard error is 0.1, far above the gap of this batch.
        noise = [[2.0] * domains, [1.0] * domains, [0.005] * domains]
        model.gap_of_mean.noise_3D = torch.tensor(noise, dtype=torch.float64)
    mmoe = SyNCRec(plain, domains).double()
    mmoe.load_state_dict(_as_one_stack(model.state_dict()))
    table = make_table(DOMAIN_ITEMS, config.dim, 31)
    batch, _ = pack(draw(31, DOMAIN_ITEMS), DOMAIN_ITEMS, config.max_length)
    loss, report, gradients, item_gradient = run(model, table, batch)
    expected, plain_report, plain_gradients, plain_item = run(
        mmoe, table, batch
    )
    assert report.lambda_D.tolist() == [1] * domains
    near(loss, expected, "loss")
    near(report.phi_D.nan_to_num(), plain_report.phi_D.nan_to_num(), "φ")
    near(item_gradient, plain_item, "gradient of the items")
    gradients = _as_one_stack(gradients)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        near(gradients[name], gradient, name)
    near(mmoe.gap.sums_2D, model.gap.sums_2D, "the mean gap")


@pytest.mark.parametrize("view", ["cross", "single"])
def test_a_harmed_domain_trains_its_own_tasks_experts_only(view):
    """Harm beyond measure: the gates of that domain are 0, as the paper's stop-gradient is."""
    domains = len(DOMAIN_ITEMS)
    config = replace(SMALL, **HARM, mutual_information=False)
    model = make_model(config, domains, 32)
    model.gap_of_mean.sums_2D = torch.ones(2, domains, dtype=torch.float64)
    model.gap_of_mean.sums_2D[0] = -1e6
    noise = [[0.0] * domains, [1.0] * domains, [0.005] * domains]
    model.gap_of_mean.noise_3D = torch.tensor(noise, dtype=torch.float64)
    batch, _ = pack(draw(32, DOMAIN_ITEMS), DOMAIN_ITEMS, config.max_length)
    table = make_table(DOMAIN_ITEMS, config.dim, 32)
    _, _, gradients, _ = run(model, table, only(batch, view))
    for name, gradient in gradients.items():
        if "experts" in name:
            assert gradient.any() == name.startswith(f"{view}_experts"), name
