"""The padded encoder that is exported against the packed model."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from syncrec.batch.build import build_query
from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.export import UserEncoder, export_program
from syncrec.layers.time_encoding import TICKS
from syncrec.model import SyNCRec

ROOT = Path(__file__).resolve().parents[3]
SPAN = 1_000.0, 3_000_000.0
LENGTHS = [0, 1, 4, 7, 8, 9, 23]  # max_length is 8
PLAIN = {
    "tasks": "cross",
    "stop_gradient": False,
    "loss_correction": "none",
    "mutual_information": False,
}


def made(dtype=torch.float64, **given):
    """A model none of whose weights are at their start values."""
    torch.manual_seed(3)
    base = {
        "dim": 12,
        "max_length": 8,
        "experts": 4,
        "cross_experts": 2,
        "heads": 2,
        "ffn_dim": 10,
        "dropout": 0.2,
        "time_knots": 0,
    }
    model = SyNCRec(ModelConfig(**(base | given)), 3).to(dtype).eval()
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    return model


def padded(table, histories, ticks, now, max_length):
    recent = [history[-max_length:] for history in histories]
    items = torch.full(
        (len(recent), max(1, *map(len, recent)), table.shape[1]),
        float("nan"),
        dtype=table.dtype,
    )
    times = torch.full(items.shape[:2], float("nan"), dtype=torch.float64)
    for user, (history, when) in enumerate(zip(recent, ticks, strict=True)):
        items[user, : len(history)] = table[history]
        times[user, : len(history)] = torch.from_numpy(
            time_of(when[-max_length:])
        )
    return (
        items,
        torch.tensor([len(history) for history in recent]),
        times,
        torch.from_numpy(time_of(now)),
    )


def time_of(ticks):
    """In the middle of the tick, of logs from SPAN[0] to SPAN[1]."""
    return SPAN[0] + (np.minimum(ticks + 0.5, TICKS)) / TICKS * (
        SPAN[1] - SPAN[0]
    )


def both(model, lengths, domain=None):
    """What the packed model gives, and what the encoder is given. domain: of the histories in that domain alone."""
    generator = np.random.default_rng(5)
    histories = [generator.integers(0, 50, length) for length in lengths]
    seeded, longest = torch.Generator().manual_seed(1), model.config.max_length
    table = torch.randn(
        50,
        model.config.dim,
        dtype=next(model.parameters()).dtype,
        generator=seeded,
    )
    items = np.concatenate(histories)
    ticks = [
        np.sort(generator.choice([0, 1, 2, 900, 40_000, TICKS], length))
        for length in lengths
    ]
    now = np.array(
        [max(0, *when, 5_000 * (user % 2)) for user, when in enumerate(ticks)]
    )
    given = (
        items,
        np.array(lengths),
        longest,
        np.zeros(0, np.int64),
        items // 20,
        3,
        np.concatenate(ticks),
        now,
    )
    query = move(build_query(*given), "cpu")
    with torch.no_grad():
        if domain is None:
            outputs = model._cross_outputs(query.cross, table[query.ids])
            expected = model._scoring(query.cross, outputs, query.newest_B)
        else:
            outputs = model._single_outputs(query.single, table[query.ids])
            expected = model._scoring(
                query.single, outputs, query.newest_DB[domain]
            )
            own = [history // 20 == domain for history in histories]
            histories, ticks = (
                [each[here] for each, here in zip(kind, own, strict=True)]
                for kind in (histories, ticks)
            )
    return expected, padded(table, histories, ticks, now, longest)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"norm": "pre"},
        {"gate": "sequence"},
        {"gate": "sequence", "norm": "pre", "blocks": 1, "heads": 1},
        {"stop_gradient": False},
        {"tower": False},
        {"kernel": "plain", "blocks": 3},
        PLAIN | {"experts": 1, "tower": False},
        PLAIN | {"experts": 3},
        {"max_length": 1},
        {"time_knots": 9},
        {"time_knots": 1},
        {"time_knots": 40, "gate": "sequence", "norm": "pre"},
        {"time_knots": 2, "max_length": 1},
    ],
    ids=str,
)
def test_equals_the_packed_model(given):
    model = made(**given)
    expected, given_items = both(model, LENGTHS)
    torch.testing.assert_close(
        UserEncoder(model, SPAN)(*given_items), expected, rtol=1e-10, atol=1e-10
    )
    for domain in range(3 if model.both_tasks else 0):
        expected, given_items = both(model, LENGTHS, domain)
        torch.testing.assert_close(
            UserEncoder(model, SPAN, domain)(*given_items),
            expected,
            rtol=1e-10,
            atol=1e-10,
        )


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"gate": "sequence", "norm": "pre", "blocks": 1},
        {"max_length": 1, "blocks": 1},
        PLAIN | {"experts": 1, "blocks": 1},
        {"time_knots": 9},
    ],
    ids=str,
)
def test_the_exported_program_takes_any_users_and_items(given, tmp_path):
    model = made(torch.float32, **given)
    torch.export.save(
        export_program(UserEncoder(model, SPAN)), tmp_path / "encoder.pt2"
    )
    with zipfile.ZipFile(tmp_path / "encoder.pt2") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert not any(
        content for name, content in contents.items() if "sample_inputs" in name
    )  # they would be a pickle
    assert not any(
        str(ROOT).encode() in content for content in contents.values()
    )
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    for lengths in (LENGTHS, [0], [1], [30], [2, 2, 5]):
        expected, given_items = both(model, lengths)
        torch.testing.assert_close(
            program(*given_items), expected, rtol=1e-5, atol=1e-5
        )
