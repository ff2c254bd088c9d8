"""With one task, one expert and no tower the model is SASRec: held against one made of PyTorch's own layers, padded."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncrec.batch.build import build_query
from syncrec.config import ModelConfig
from tests.helpers.histories import (
    draw,
    draw_shared,
    flatten,
    pack,
    without_newest,
)
from tests.unit.syncrec.test_model import (
    DOMAIN_ITEMS,
    make_model,
    make_table,
    near,
    run,
)

SASREC = ModelConfig(
    time_knots=0,
    dim=6,
    max_length=5,
    tasks="cross",
    experts=1,
    stop_gradient=False,
    tower=False,
    loss_correction="none",
    mutual_information=False,
    heads=2,
    ffn_dim=7,
    dropout=0.0,
)


class PaddedSASRec(nn.Module):
    """Histories on the left of (B, T), SOS first; `nn.TransformerEncoderLayer` under a causal mask; loss target by target."""

    def __init__(self, config, model, table):
        super().__init__()
        self.config = config
        self.items = nn.Parameter(table.clone())
        self.start = nn.Parameter(model.embedding.start.detach().clone())
        self.positions = nn.Parameter(
            model.embedding.positions.detach().clone()
        )
        layer = {
            "dropout": 0.0,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": config.norm == "pre",
        }
        shape = config.dim, config.heads, config.ffn_dim
        layers = (
            nn.TransformerEncoderLayer(*shape, **layer, dtype=table.dtype)
            for _ in range(config.blocks)
        )
        self.layers = nn.ModuleList(layers)
        self.last = (
            nn.LayerNorm(config.dim, dtype=table.dtype)
            if config.norm == "pre"
            else nn.Identity()
        )
        for name, values in model.named_parameters():
            if name in self.places():
                attribute, transposed = self.places()[name]
                given = (
                    values.detach()[0] if values.dim() == 3 else values.detach()
                )
                self.get_parameter(attribute).data.copy_(
                    given.T if transposed else given.view(-1)
                )
        for block in self.layers:  # SyNCRec's attention has no shifts
            block.self_attn.in_proj_bias.data.zero_()
            block.self_attn.out_proj.bias.data.zero_()

    def places(self):
        """{our parameter: (PyTorch's, whether it is transposed)}"""
        found = {}
        for number in range(self.config.blocks):
            own, other = f"cross_experts.blocks.{number}.", f"layers.{number}."
            for ours, theirs in (
                ("qkv", "self_attn.in_proj_weight"),
                ("out", "self_attn.out_proj.weight"),
            ):
                found[own + ours] = other + theirs, True
            for ours, theirs in (("1", "linear1"), ("2", "linear2")):
                found |= {
                    f"{own}w{ours}": (f"{other}{theirs}.weight", True),
                    f"{own}b{ours}": (f"{other}{theirs}.bias", False),
                }
            for ours, theirs in (
                ("attention_norm", "norm1"),
                ("ffn_norm", "norm2"),
            ):
                found |= {
                    f"{own}{ours}_scale": (f"{other}{theirs}.weight", False)
                }
                found |= {
                    f"{own}{ours}_shift": (f"{other}{theirs}.bias", False)
                }
        if self.config.norm == "pre":
            found |= {"cross_experts.last_norm.scale": ("last.weight", False)}
            found |= {"cross_experts.last_norm.shift": ("last.bias", False)}
        return found

    def forward(self, histories):
        """The output at each user's tokens, a list of (tokens, r)."""
        longest = self.config.max_length
        padded, tokens = [], []
        for history in histories:
            given = torch.cat([self.start, self.items[history.items[:-1]]])[
                : max(len(history.items), 1)
            ][-longest:]
            count = min(len(history.items), longest)
            given = given[:count] + self.positions[:count].flip(0)
            padded.append(F.pad(given, (0, 0, 0, longest - count)))
            tokens.append(count)
        x_BTR = torch.stack(padded)
        mask = nn.Transformer.generate_square_subsequent_mask(
            longest, dtype=x_BTR.dtype
        )
        for layer in self.layers:
            x_BTR = layer(x_BTR, src_mask=mask)
        return [
            y_TR[:count]
            for y_TR, count in zip(self.last(x_BTR), tokens, strict=True)
        ]

    def loss(self, histories, shared_negatives=None):
        """The mean over counted targets, and the mean of each domain."""
        losses = [[] for _ in DOMAIN_ITEMS]
        for history, outputs in zip(histories, self(histories), strict=True):
            steps = range(len(history.items) - len(outputs), len(history.items))
            for step, y_R in zip(steps, outputs, strict=True):
                item, d = history.items[step], history.domains[step]
                negatives = torch.tensor(history.negatives[step])
                if shared_negatives is not None:
                    negatives = torch.as_tensor(shared_negatives[d])
                    negatives = negatives[negatives != item]
                scores = self.items[negatives] @ y_R
                if self.config.loss == "bpr":
                    value = -F.logsigmoid(
                        self.items[item] @ y_R - scores
                    ).mean()
                else:  # sampled_softmax: each negative stands for (items − 1) / n of the others
                    weight = torch.tensor(
                        (DOMAIN_ITEMS[d] - 1) / len(scores), dtype=scores.dtype
                    ).log()
                    logits = torch.cat(
                        [(self.items[item] @ y_R).view(1), scores + weight]
                    )
                    value = F.cross_entropy(logits, torch.tensor(0))
                if history.weight:
                    losses[d].append(value)
        every = [value for values in losses for value in values]
        return torch.stack(every).mean(), [
            torch.stack(values).mean().item() if values else float("nan")
            for values in losses
        ]


@pytest.mark.parametrize(
    "reading",
    [
        {},
        {"norm": "pre", "loss": "bpr"},
        {"heads": 1, "blocks": 1, "max_length": 13},
    ],
)
@pytest.mark.parametrize("seed", [31, 32])
def test_losses_and_gradients_are_those_of_a_plain_padded_sasrec(reading, seed):
    config = replace(SASREC, **reading)
    histories = draw(seed, DOMAIN_ITEMS, absent_domain=1)
    shared = draw_shared(seed, DOMAIN_ITEMS, 8) if seed % 2 else None
    model = make_model(config, len(DOMAIN_ITEMS), seed)
    table = make_table(DOMAIN_ITEMS, config.dim, seed)
    padded = PaddedSASRec(config, model, table)
    expected, by_domain = padded.loss(histories, shared)
    expected.backward()

    batch, _ = pack(
        histories, DOMAIN_ITEMS, config.max_length, shared_negatives=shared
    )
    loss, report, gradients, item_gradient = run(model, table, batch)
    near(loss, expected.detach(), "loss")
    near(report.loss_cross, expected.detach(), "cross-domain loss")
    assert (
        report.cross_D.isnan().tolist()
        == torch.tensor(by_domain).isnan().tolist()
    )
    near(
        report.cross_D.nan_to_num(),
        torch.tensor(by_domain, dtype=torch.float64).nan_to_num(),
        "loss by domain",
    )
    near(item_gradient, padded.items.grad, "gradient of the items")
    near(gradients.pop("embedding.start"), padded.start.grad, "gradient of SOS")
    near(
        gradients.pop("embedding.positions"),
        padded.positions.grad,
        "gradient of the positions",
    )
    assert (
        gradients.keys() == padded.places().keys()
    )  # nothing else learns: no gate, no tower, no second task
    for name, (attribute, transposed) in padded.places().items():
        gradient = padded.get_parameter(attribute).grad
        near(
            gradients[name],
            (gradient.T if transposed else gradient).reshape(
                gradients[name].shape
            ),
            name,
        )


def test_what_two_tasks_would_give_is_not_a_number():
    batch, _ = pack(draw(33, DOMAIN_ITEMS), DOMAIN_ITEMS, SASREC.max_length)
    _, report, _, _ = run(
        make_model(SASREC, 4, seed=33),
        make_table(DOMAIN_ITEMS, SASREC.dim, 33),
        batch,
    )
    for value in (
        report.single_D,
        report.loss_single,
        report.phi_D,
        report.lambda_D,
    ):
        assert value.isnan().all()
    assert (
        not report.single_targets_D.any()
        and not report.mutual_information
        and report.cross_targets_D.sum() > 0
    )


def test_a_query_gives_the_newest_output():
    model, table = (
        make_model(SASREC, 4, seed=34),
        make_table(DOMAIN_ITEMS, SASREC.dim, 34),
    )
    histories = [history for history in draw(34, DOMAIN_ITEMS) if history.items]
    items_N, lengths_B, *_ = flatten(without_newest(histories))
    query = build_query(items_N, lengths_B, SASREC.max_length, items_N[:0])
    newest = [
        outputs[-1] for outputs in PaddedSASRec(SASREC, model, table)(histories)
    ]
    near(
        model(query, table[query.ids])[:, 2],
        torch.stack(newest).detach(),
        "query",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop_gradient", True),
        ("loss_correction", "negative_transfer_gap"),
        ("mutual_information", True),
    ],
)
def test_what_needs_both_tasks_is_refused_in_one_line(name, value):
    allowed = {
        "stop_gradient": False,
        "loss_correction": "none",
        "mutual_information": False,
    }
    with pytest.raises(
        ValueError,
        match=rf"^model\.{name} is (on|{value}): with model\.tasks=cross [^\n]* set model\.{name}=\w+$",
    ):
        ModelConfig(tasks="cross", **(allowed | {name: value}))
