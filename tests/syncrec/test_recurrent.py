"""Packed GRUs are PyTorch's GRU, sequence by sequence."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from syncrec.batch import attention_layout, move
from syncrec.config import ModelConfig
from syncrec.recurrent import RecurrentStack
from tests.syncrec.histories import draw, pack
from tests.syncrec.test_model import DOMAIN_ITEMS, make_model, make_table, run

CONFIG = ModelConfig(dim=6, encoder="gru", blocks=2, dropout=0.0)


@pytest.mark.parametrize("lengths", [[1], [3, 12, 1, 7, 30], [0, 5, 0, 2]])
def test_each_sequence_is_run_by_each_gru(lengths):
    torch.manual_seed(1)
    stack, layout = RecurrentStack(CONFIG, 3).double(), move(attention_layout(np.asarray(lengths)), "cpu")
    x_MR = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    found = stack(x_MR, layout)
    expected = torch.stack([torch.cat([gru(part)[0] for part in x_MR.split(lengths) if len(part)]) for gru in stack.layers])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weight).sum(), [x_MR, *stack.parameters()]) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tasks", ["both", "cross"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_of_grus_has_a_loss_and_gradients_of_all_weights(tasks, precision):
    alone = {"stop_gradient": "off", "loss_correction": "none", "mutual_information": "off"} if tasks == "cross" else {}
    config = replace(CONFIG, tasks=tasks, max_length=5, precision=precision, experts=2, cross_experts=1, **alone)
    batch = pack(draw(3, DOMAIN_ITEMS), DOMAIN_ITEMS, 5)[0]
    model = make_model(config, len(DOMAIN_ITEMS), seed=1).float()
    loss, *_ = run(model, make_table(DOMAIN_ITEMS, 6, seed=2).float(), batch)
    assert torch.isfinite(loss)
    layers = {name: weight for name, weight in model.named_parameters() if "layers" in name}
    assert layers and all(weight.grad is not None and weight.grad.any() for weight in layers.values())


def test_what_only_attention_has_is_refused():
    with pytest.raises(ValueError, match="it has no attention"):
        ModelConfig(encoder="gru", heads=2)
