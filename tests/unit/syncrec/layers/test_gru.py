"""Recurrent experts against PyTorch's GRU, run over one sequence after the other without any padding."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncrec.batch.build import build_query
from syncrec.config import ModelConfig
from syncrec.export import UserEncoder
from syncrec.layers.gru import RecurrentStack
from syncrec.model import SyNCRec
from tests.helpers.histories import (
    draw,
    draw_shared,
    flatten,
    pack,
    without_newest,
)
from tests.helpers.reference import SOS, cross_sequence, single_sequence
from tests.unit.syncrec.test_model import (
    DOMAIN_ITEMS,
    SMALL,
    make_model,
    make_table,
    near,
    recorded,
    run,
)
from tests.unit.syncrec.test_sasrec import SASREC

GRU4REC = replace(SASREC, encoder="gru", heads=1, blocks=1)
GRUS = replace(SMALL, encoder="gru", heads=1)


def alone(stack, x_TR):
    """(K, T, r) of one sequence, layer by layer in GRUs of one layer each."""
    outputs = []
    for expert in stack.experts:
        y_TR, width = x_TR, x_TR.shape[1]
        for number in range(expert.num_layers):
            layer = nn.GRU(width, width, dtype=x_TR.dtype)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(
                    layer, f"{name}_l0", getattr(expert, f"{name}_l{number}")
                )
            y_TR = layer(y_TR.unsqueeze(1))[0].squeeze(1)
        outputs.append(y_TR)
    return torch.stack(outputs)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("experts", [1, 3])
def test_packed_experts_equal_a_gru_a_sequence(blocks, experts):
    """Outputs and every gradient, in sequences of 1 to 20 tokens."""
    torch.manual_seed(1)
    config = replace(GRU4REC, blocks=blocks, max_length=20)
    stack = RecurrentStack(config, experts).double()
    batch, _ = pack(
        draw(51, DOMAIN_ITEMS, users=9, longest=25),
        DOMAIN_ITEMS,
        config.max_length,
    )
    for view in (batch.cross, batch.single):
        lengths = view.attention.starts_S.diff().tolist()
        assert len(set(lengths)) > 3 and sum(
            s * n for s, n in view.attention.shapes
        ) > sum(lengths)
        x_MR = torch.randn(
            sum(lengths), config.dim, dtype=torch.float64, requires_grad=True
        )
        gradient_KMR = torch.randn(experts, *x_MR.shape, dtype=torch.float64)
        plain_KMR = torch.cat(
            [
                alone(stack, part)
                for part in x_MR.split([n for n in lengths if n])
            ],
            dim=1,
        )
        packed_KMR = stack(x_MR, view.attention)
        near(packed_KMR.detach(), plain_KMR.detach(), "outputs")
        wanted = [x_MR, *stack.parameters()]
        expected = torch.autograd.grad(plain_KMR, wanted, gradient_KMR)
        for found, one in zip(
            torch.autograd.grad(packed_KMR, wanted, gradient_KMR),
            expected,
            strict=True,
        ):
            near(found, one, "gradient")


def plain_gru4rec(model, table, histories, shared_negatives=None):
    """Mean loss, and each user's newest output, history by history."""
    losses, newest = [], []
    for history in histories:
        tokens = cross_sequence(history, model.config.max_length)
        if not tokens:
            continue
        given = [
            model.embedding.start[0]
            if step == SOS
            else table[history.items[step]]
            for step, _ in tokens
        ]
        (y_TR,) = alone(model.cross_experts, torch.stack(given))
        newest.append(y_TR[-1])
        for (_, step), y_R in zip(tokens, y_TR, strict=True):
            item, d, negatives = (
                history.items[step],
                history.domains[step],
                torch.tensor(history.negatives[step]),
            )
            if shared_negatives is not None:
                negatives = torch.as_tensor(shared_negatives[d])
                negatives = negatives[negatives != item]
            weight = torch.tensor(
                (DOMAIN_ITEMS[d] - 1) / len(negatives), dtype=table.dtype
            ).log()
            scores = torch.cat(
                [(table[item] @ y_R).view(1), table[negatives] @ y_R + weight]
            )
            if history.weight:
                losses.append(F.cross_entropy(scores, torch.tensor(0)))
    return torch.stack(losses).mean(), torch.stack(newest)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("seed", [52, 53])
def test_one_expert_without_a_tower_is_gru4rec(seed, blocks):
    """Loss and every gradient; no position takes part."""
    config = replace(GRU4REC, blocks=blocks)
    histories, shared = (
        draw(seed, DOMAIN_ITEMS, absent_domain=1),
        draw_shared(seed, DOMAIN_ITEMS, 8) if seed % 2 else None,
    )
    model, table = (
        make_model(config, len(DOMAIN_ITEMS), seed),
        make_table(DOMAIN_ITEMS, config.dim, seed),
    )
    own = table.clone().requires_grad_()
    expected, _ = plain_gru4rec(model, own, histories, shared)
    expected.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }
    batch, _ = pack(
        histories, DOMAIN_ITEMS, config.max_length, shared_negatives=shared
    )
    loss, report, found, item_gradient = run(model, table, batch)
    near(loss, expected.detach(), "loss")
    near(report.loss_cross, expected.detach(), "cross-domain loss")
    near(item_gradient, own.grad, "gradient of the items")
    assert (
        found.keys() == gradients.keys() and "embedding.positions" not in found
    )
    for name, gradient in gradients.items():
        near(found[name], gradient, name)


def test_a_query_gives_the_newest_output():
    model, table = (
        make_model(GRU4REC, 4, seed=54),
        make_table(DOMAIN_ITEMS, GRU4REC.dim, 54),
    )
    histories = [history for history in draw(54, DOMAIN_ITEMS) if history.items]
    items_N, lengths_B, *_ = flatten(without_newest(histories))
    query = build_query(items_N, lengths_B, GRU4REC.max_length, items_N[:0])
    _, newest = plain_gru4rec(model, table, histories)
    near(
        model(query, table[query.ids])[:, 0].detach(), newest.detach(), "query"
    )


@pytest.mark.parametrize(
    "given", [{}, {"gate": "sequence", "stop_gradient": False}], ids=str
)
def test_recurrent_experts_stand_in_both_views_of_the_whole_model(given):
    """Gates and towers around them as around a Transformer's; each task trains its own experts."""
    config = replace(GRUS, **given)
    histories = draw(55, DOMAIN_ITEMS)
    model, table = (
        make_model(config, 4, seed=55),
        make_table(DOMAIN_ITEMS, config.dim, 55),
    )
    batch, _ = pack(histories, DOMAIN_ITEMS, config.max_length)
    cross_MR, single_MR, _ = recorded(model, batch, table[batch.ids])
    stacks = [
        stack
        for stack in (model.cross_experts, model.single_experts)
        if stack is not None
    ]

    def output(history, tokens, gate, tower):
        rows = [
            model.embedding.start[0]
            if step == SOS
            else table[history.items[step]]
            for step, _ in tokens
        ]
        x_TR = torch.stack(rows)
        y_KTR = torch.cat([alone(stack, x_TR) for stack in stacks])
        if config.gate == "token":
            weights_TK = torch.softmax(x_TR @ gate.weight[0].T, dim=-1)
        else:
            scores = sum(
                gate.weight[len(tokens) - 1 - place] @ x_R
                for place, x_R in enumerate(x_TR)
            )
            weights_TK = torch.softmax(scores, dim=-1).expand(len(tokens), -1)
        return tower(torch.einsum("tk,ktr->tr", weights_TK, y_KTR))

    cross = [
        (history, cross_sequence(history, config.max_length))
        for history in histories
    ]
    expected = [
        output(history, tokens, model.cross_gate, model.cross_tower)
        for history, tokens in cross
        if tokens
    ]
    near(
        cross_MR.detach(), torch.cat(expected).detach(), "cross-domain outputs"
    )
    expected = []
    for d, (gate, tower) in enumerate(
        zip(model.single_gates, model.single_towers, strict=True)
    ):
        single = [
            (history, single_sequence(history, d, config.max_length))
            for history in histories
        ]
        expected += [
            output(history, tokens, gate, tower)
            for history, tokens in single
            if tokens
        ]
    near(
        single_MR.detach(),
        torch.cat(expected).detach(),
        "single-domain outputs",
    )
    _, _, gradients, _ = run(model, table, batch)
    assert all(
        gradients[name] is not None for name in gradients if "experts" in name
    )


def test_dropout_only_while_training_and_after_every_layer():
    torch.manual_seed(0)
    batch, _ = pack(draw(56, DOMAIN_ITEMS), DOMAIN_ITEMS, GRU4REC.max_length)
    layout, tokens = batch.cross.attention, len(batch.cross.input_M)
    x_MR = torch.randn(tokens, GRU4REC.dim)
    for blocks in (1, 2):
        stack = RecurrentStack(replace(GRU4REC, blocks=blocks, dropout=0.5), 2)
        dropped = stack(x_MR, layout) == 0
        assert 0.3 < dropped.float().mean() < 0.7
        assert stack.experts[0].dropout == (0.5 if blocks > 1 else 0)
        assert not (stack.eval()(x_MR, layout) == 0).any()


def test_bf16_is_near_fp32():
    config = replace(GRUS, dim=32, ffn_dim=32)
    batch, _ = pack(
        draw(57, DOMAIN_ITEMS, users=20), DOMAIN_ITEMS, config.max_length
    )
    table = make_table(DOMAIN_ITEMS, config.dim, 57).float() * 0.1
    model, half = (
        SyNCRec(config, 4),
        SyNCRec(replace(config, precision="bf16"), 4),
    )
    half.load_state_dict(model.state_dict())
    loss, _, gradients, _ = run(model, table, batch)
    half_loss, _, half_gradients, _ = run(half, table, batch)
    assert half_loss != loss and half_loss.dtype == torch.float32
    torch.testing.assert_close(half_loss, loss, rtol=0.02, atol=0.0)
    flat, half_flat = (
        torch.cat([g.flatten() for g in grads.values()])
        for grads in (gradients, half_gradients)
    )
    assert torch.cosine_similarity(flat, half_flat, dim=0) > 0.99


@pytest.mark.parametrize(
    ("name", "value"), [("heads", 2), ("norm", "pre"), ("kernel", "fused")]
)
def test_what_a_gru_has_not_is_refused_in_one_line(name, value):
    with pytest.raises(
        ValueError,
        match=rf"^model\.{name} is {value}: [^\n]*model\.encoder=gru has none[^\n]*$",
    ):
        ModelConfig(encoder="gru", **{name: value})


def test_there_is_no_exported_form():
    with pytest.raises(
        ValueError,
        match=re.escape(
            "model.encoder is gru: only transformer can be exported"
        ),
    ):
        UserEncoder(SyNCRec(GRU4REC, 2), (0, 1))
