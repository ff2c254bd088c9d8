"""A path of a trained model for a service, the cross-domain task's or a single-domain one's: padded histories in, vectors of
users out, plain operations only.

The trainer's own forward is packed, with layouts that are worked out from the data and a compiled kernel; `torch.export` can
take neither. tests/unit/syncrec/test_export.py holds this to it. It computes in fp32, whatever `model.precision` says.

Shapes: B users, N items of a history, P = N + 1 tokens, K experts of both stacks, r width.
"""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn

from syncrec.layers.embedding import OnlyExpert
from syncrec.layers.time_encoding import NO_GAP, TICKS

_NORMS = (
    "attention_norm_scale",
    "attention_norm_shift",
    "ffn_norm_scale",
    "ffn_norm_shift",
)
_BLOCK = ("qkv", "out", "w1", "b1", "w2", "b2", *_NORMS)


class UserEncoder(nn.Module):
    """Y^cross of eq. 4 at each history's newest token: what a `Query` of the same histories gives. Of a domain: its Y^single of
    eq. 2, given histories of that domain alone."""

    def __init__(self, model, span, domain=None):
        """model: a SyNCRec; its weights are copied. span: the dataset's first and last time. domain: its number. Raises
        ValueError where it has no exported form."""
        super().__init__()
        config = model.config
        check_exportable(config)
        stacks = [
            stack
            for stack in (model.cross_experts, model.single_experts)
            if stack is not None
        ]
        self.max_length, self.heads, self.blocks, self.experts = (
            config.max_length,
            config.heads,
            config.blocks,
            config.experts,
        )
        self.pre_norm, self.literal_gate = (
            config.norm == "pre",
            config.gate == "sequence",
        )
        self._keep("start", model.embedding.start)
        self._keep("positions", model.embedding.positions)
        gate = model.cross_gate if domain is None else model.single_gates[domain]
        self._keep("gate", None if isinstance(gate, OnlyExpert) else gate.weight)
        for number in range(config.blocks):
            for name in _BLOCK:
                weights = [getattr(stack.blocks[number], name) for stack in stacks]
                self._keep(f"{name}_{number}", torch.cat(weights))
        if self.pre_norm:
            self._keep(
                "last_scale", torch.cat([stack.last_norm.scale for stack in stacks])
            )
            self._keep(
                "last_shift", torch.cat([stack.last_norm.shift for stack in stacks])
            )
        tower = model.cross_tower if domain is None else model.single_towers[domain]
        self.tower = copy.deepcopy(tower).eval().requires_grad_(False)
        self.clock, self.first_time, self.duration = (
            None,
            float(span[0]),
            max(float(span[1] - span[0]), sys.float_info.min),
        )
        if model.clock is not None:
            self.clock = copy.deepcopy(model.clock).eval().requires_grad_(False)
            self._keep("gap_bounds", 2 ** torch.arange(1, NO_GAP))

    def _keep(self, name, weight):
        self.register_buffer(name, None if weight is None else weight.detach().clone())

    def forward(self, items_BNR, lengths_B, times_BN, now_B):
        """items_BNR: item vectors of the newest N items, oldest first, N from 1 to max_length, anything behind a history's end;
        lengths_B: int64, how many there are, 0 for a user without a history; times_BN: when they were, now_B: when the request
        is, float64, in the logs' unit; of no account in a model without time_knots. Returns (B, r)."""
        users, given, width = items_BNR.shape
        tokens = given + 1
        lengths_B1 = (
            (lengths_B + 1).clamp(max=self.max_length).unsqueeze(1)
        )  # in tokens: SOS, and an item each
        place_P = torch.arange(tokens, device=items_BNR.device)
        # A history of max_length items has no room for SOS.
        from_BP = (place_P + (lengths_B.unsqueeze(1) + 1 - lengths_B1)).clamp(max=given)
        whole_BPR = torch.cat([self.start.expand(users, 1, width), items_BNR], dim=1)
        x_BPR = whole_BPR.gather(1, from_BP.unsqueeze(2).expand(-1, -1, width))
        position_BP = (lengths_B1 - 1 - place_P).clamp(min=0)
        there_BP1 = (place_P < lengths_B1).unsqueeze(2)
        # What lies behind the end is not seen by any token before it, but NaN times zero is NaN.
        x_BPR = x_BPR + F.embedding(position_BP, self.positions)
        if self.clock is not None:
            x_BPR = x_BPR + self._time_of_tokens(times_BN, now_B, lengths_B, from_BP)
        x_BPR = torch.where(there_BP1, x_BPR, 0.0)
        newest_B11 = (lengths_B1 - 1).unsqueeze(2)
        newest_BR = x_BPR.gather(1, newest_B11.expand(-1, -1, width)).squeeze(1)
        y_KBPR = x_BPR.expand(self.experts, -1, -1, -1)
        for number in range(self.blocks):
            y_KBPR = self._block(number, y_KBPR)
        y_KBR = y_KBPR.gather(
            2, newest_B11.expand(self.experts, -1, -1, width)
        ).squeeze(2)
        if self.pre_norm:
            y_KBR = F.layer_norm(y_KBR, (width,)) * self.last_scale + self.last_shift
        if self.gate is None:
            mixed_BR = y_KBR[0]
        else:
            mixed_BR = torch.einsum(
                "bk,kbr->br",
                self._gate_weights(newest_BR, x_BPR, position_BP, there_BP1),
                y_KBR,
            )
        y_BR = self.tower(mixed_BR)
        return (
            y_BR
            if self.clock is None
            else y_BR + self.clock.added_to_outputs(self._ticks(now_B))
        )

    def _time_of_tokens(self, times_BN, now_B, lengths_B, from_BP):
        """What time adds to SOS and the items that the tokens are (from_BP: 0 for SOS), each predicting for the next one's."""
        users, tokens = from_BP.shape
        tick_BN, now_B1 = self._ticks(times_BN), self._ticks(now_B).unsqueeze(1)
        asked_BP = torch.cat([tick_BN, now_B1], dim=1).gather(1, from_BP)
        asked_BP = torch.where(from_BP < lengths_B.unsqueeze(1), asked_BP, now_B1)
        since_BP = asked_BP - torch.cat(
            [torch.zeros_like(now_B1), tick_BN], dim=1
        ).gather(1, from_BP)
        gap_BP = torch.bucketize(since_BP.clamp(min=0) + 1, self.gap_bounds, right=True)
        gap_BP = torch.where(from_BP > 0, gap_BP, NO_GAP)
        return self.clock.added_to_tokens(asked_BP.flatten(), gap_BP.flatten()).view(
            users, tokens, -1
        )

    def _ticks(self, times):
        """As `Dataset.ticks`."""
        return (
            ((times.double() - self.first_time) / self.duration).clamp(0, 1) * TICKS
        ).long()

    def _block(self, number, x_KBPR):
        w = {name: getattr(self, f"{name}_{number}").unsqueeze(1) for name in _BLOCK}

        def norm(y_KBPR, name):
            y_KBPR = F.layer_norm(y_KBPR, y_KBPR.shape[-1:])
            return y_KBPR * w[f"{name}_norm_scale"] + w[f"{name}_norm_shift"]

        def attend(y_KBPR):
            experts, users, tokens, width = y_KBPR.shape
            qkv = (y_KBPR @ w["qkv"]).view(
                experts, users, tokens, 3, self.heads, width // self.heads
            )
            query, key, value = (
                part.transpose(2, 3).flatten(0, 1) for part in qkv.unbind(3)
            )
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            return (
                mixed.transpose(1, 2).reshape(experts, users, tokens, width) @ w["out"]
            )

        def feed_forward(y_KBPR):
            return F.gelu(y_KBPR @ w["w1"] + w["b1"]) @ w["w2"] + w["b2"]

        if self.pre_norm:
            x_KBPR = x_KBPR + attend(norm(x_KBPR, "attention"))
            return x_KBPR + feed_forward(norm(x_KBPR, "ffn"))
        x_KBPR = norm(x_KBPR + attend(x_KBPR), "attention")
        return norm(x_KBPR + feed_forward(x_KBPR), "ffn")

    def _gate_weights(self, newest_BR, x_BPR, position_BP, there_BP1):
        if not self.literal_gate:
            return torch.softmax(newest_BR @ self.gate[0].T, dim=-1)
        scores_BPK = torch.einsum("bpr,bpkr->bpk", x_BPR, self.gate[position_BP])
        return torch.softmax((scores_BPK * there_BP1).sum(1), dim=-1)


def check_exportable(config):
    """Raises ValueError for a model that `UserEncoder` does not cover. config: its ModelConfig."""
    if config.encoder != "transformer":
        # torch.export writes a GRU out step by step, and then it is for histories of one length.
        raise ValueError(
            f"model.encoder is {config.encoder}: only transformer can be exported; launch/recommend.py takes any"
        )


def exported(encoder: UserEncoder) -> torch.export.ExportedProgram:
    """The encoder for any number of users and 1 to max_length items, loadable with PyTorch alone.

    Without what PyTorch keeps beside it: the example, which it would pickle, and where in which folders the code lay.
    """
    given = min(2, encoder.max_length)
    example = (
        torch.zeros(2, given, encoder.start.shape[1], dtype=encoder.start.dtype),
        torch.tensor([given, 0]),
        torch.zeros(2, given, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    users = {0: torch.export.Dim("users", min=1)}
    items = (
        {1: torch.export.Dim("items", min=1, max=encoder.max_length)}
        if encoder.max_length > 1
        else {}
    )
    shapes = {
        "items_BNR": users | items,
        "lengths_B": users,
        "times_BN": users | items,
        "now_B": users,
    }
    program = torch.export.export(encoder.eval(), example, dynamic_shapes=shapes)
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
