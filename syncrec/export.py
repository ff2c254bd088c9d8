"""Exports a path of a trained model for inference in a service, by `torch.export`.

It is the cross-domain task's or a single-domain one's: padded histories in, vectors of users out,
plain operations only. The trainer's own forward is packed, with layouts that are worked out from
the data and a compiled kernel; `torch.export` can take neither.
tests/unit/syncrec/test_export.py holds this path to it. It computes in fp32, whatever
`model.precision` says.

Shapes: B users, N items of a history, P = N + 1 tokens, K experts of both stacks, r width.
"""

import copy
import sys
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncrec.config import ModelConfig
from syncrec.layers.attention import GroupLayerNorm
from syncrec.layers.gate import Gate, OnlyExpert
from syncrec.layers.time_encoding import NO_GAP, TICKS, Clock
from syncrec.layers.transformer import ExpertStack
from syncrec.model import SyNCRec

_NORMS = (
    "attention_norm_scale",
    "attention_norm_shift",
    "ffn_norm_scale",
    "ffn_norm_shift",
)
_BLOCK = ("qkv", "out", "w1", "b1", "w2", "b2", *_NORMS)


class UserEncoder(nn.Module):
    """Y^cross of eq. 4 at each history's newest token (section 4.2.1).

    It is what a `Query` of the same histories gives. Of a domain: its Y^single of eq. 2, given
    histories of that domain alone.

    Example: four users, the newest N = 3 items of each, the third without a history:

        items_BNR    (4, 3, r), the vectors of rows 3, 12, 5 | 15, –, – | –, –, – | 1, 2, –
        lengths_B    tensor([3, 1, 0, 2])
        result       (4, r)
    """

    start: Tensor
    positions: Tensor
    gate: Tensor | None
    last_scale: Tensor
    last_shift: Tensor
    clock: Clock | None
    gap_bounds: Tensor

    def __init__(
        self,
        model: SyNCRec,
        span: tuple[float, float],
        domain: int | None = None,
    ):
        """model: its weights are copied. span: the dataset's first and last time. domain: its number.

        Raises ValueError where the model has no exported form.
        """
        super().__init__()
        config = model.config
        check_exportable(config)
        self.max_length = config.max_length
        self.heads = config.heads
        self.blocks = config.blocks
        self.experts = config.experts
        self.pre_norm = config.norm == "pre"
        self.literal_gate = config.gate == "sequence"
        self._copy("start", model.embedding.start)
        self._copy("positions", model.embedding.positions)
        gate: Gate | OnlyExpert = model.cross_gate
        tower: nn.Module = model.cross_tower
        if domain is not None:
            gate = cast(Gate | OnlyExpert, model.single_gates[domain])
            tower = model.single_towers[domain]
        gate_weight = None
        if not isinstance(gate, OnlyExpert):
            gate_weight = gate.weight
        self._copy("gate", gate_weight)
        self._copy_experts(model)
        self.tower = copy.deepcopy(tower).eval().requires_grad_(False)
        self.clock = None
        self.first_time = float(span[0])
        duration = float(span[1] - span[0])
        self.duration = max(duration, sys.float_info.min)
        if model.clock is not None:
            clock = copy.deepcopy(model.clock)
            self.clock = clock.eval().requires_grad_(False)
            gap_bounds = 2 ** torch.arange(1, NO_GAP)
            self._copy("gap_bounds", gap_bounds)

    def _copy_experts(self, model: SyNCRec) -> None:
        """Stacks the weights of all experts."""
        stacks = [cast(ExpertStack, model.cross_experts)]
        if model.single_experts is not None:
            stacks.append(cast(ExpertStack, model.single_experts))
        for number in range(self.blocks):
            for name in _BLOCK:
                weights = []
                for stack in stacks:
                    block = stack.blocks[number]
                    weights.append(getattr(block, name))
                self._copy(f"{name}_{number}", torch.cat(weights))
        if self.pre_norm:
            norms = [cast(GroupLayerNorm, stack.last_norm) for stack in stacks]
            scales: list[Tensor] = [norm.scale for norm in norms]
            shifts: list[Tensor] = [norm.shift for norm in norms]
            self._copy("last_scale", torch.cat(scales))
            self._copy("last_shift", torch.cat(shifts))

    def _copy(self, name: str, weight: Tensor | None) -> None:
        """Registers a copy of a weight as buffer."""
        if weight is not None:
            weight = weight.detach().clone()
        self.register_buffer(name, weight)

    def forward(
        self,
        items_BNR: Tensor,
        lengths_B: Tensor,
        times_BN: Tensor,
        now_B: Tensor,
    ) -> Tensor:
        """The users' vectors (B, r).

        Args:
            items_BNR: item vectors of the newest N items, oldest first, N from 1 to max_length,
                anything behind a history's end.
            lengths_B: int64, how many there are, 0 for a user without a history.
            times_BN: when they were, float64, in the logs' unit.
            now_B: when the request is. Both times are of no account in a model without time_knots.
        """
        users, items, width = items_BNR.shape
        # In tokens: SOS, and an item each.
        lengths_B1 = (lengths_B + 1).clamp(max=self.max_length).unsqueeze(1)
        index_P = torch.arange(items + 1, device=items_BNR.device)
        # A history of max_length items has no room for SOS.
        skipped_B1 = lengths_B.unsqueeze(1) + 1 - lengths_B1
        source_BP = (index_P + skipped_B1).clamp(max=items)
        start_B1R = self.start.expand(users, 1, width)
        whole_BPR = torch.cat([start_B1R, items_BNR], dim=1)
        source_BPR = source_BP.unsqueeze(2).expand(-1, -1, width)
        x_BPR = whole_BPR.gather(1, source_BPR)
        position_BP = (lengths_B1 - 1 - index_P).clamp(min=0)
        is_token_BP1 = (index_P < lengths_B1).unsqueeze(2)
        x_BPR = x_BPR + F.embedding(position_BP, self.positions)
        if self.clock is not None:
            x_BPR = x_BPR + self._encode_time(
                times_BN,
                now_B,
                lengths_B,
                source_BP,
            )
        # No token sees what lies behind the end, but NaN times zero is NaN.
        x_BPR = torch.where(is_token_BP1, x_BPR, 0.0)
        newest_B11 = (lengths_B1 - 1).unsqueeze(2)
        newest_BR = x_BPR.gather(1, newest_B11.expand(-1, -1, width)).squeeze(1)
        y_KBR = self._run_experts(x_BPR, newest_B11)
        if self.gate is None:
            mixed_BR = y_KBR[0]
        else:
            weights_BK = self._gate_weights(
                newest_BR,
                x_BPR,
                position_BP,
                is_token_BP1,
            )
            mixed_BR = torch.einsum("bk,kbr->br", weights_BK, y_KBR)
        y_BR = self.tower(mixed_BR)
        if self.clock is None:
            return y_BR
        now_B = self._to_ticks(now_B)
        return y_BR + self.clock.encode_outputs(now_B)

    def _run_experts(self, x_BPR: Tensor, newest_B11: Tensor) -> Tensor:
        """The experts' outputs at each user's newest token, (K, B, r).

        Example: K = 5, the four users of the class's example, of 4, 2, 1 and 3 tokens:

            x_BPR         (4, 4, r)
            newest_B11    tensor([3, 1, 0, 2]) as (4, 1, 1)
            result        (5, 4, r)
        """
        width = x_BPR.shape[2]
        y_KBPR = x_BPR.expand(self.experts, -1, -1, -1)
        for number in range(self.blocks):
            y_KBPR = self._run_block(number, y_KBPR)
        newest_KB1R = newest_B11.expand(self.experts, -1, -1, width)
        y_KBR = y_KBPR.gather(2, newest_KB1R).squeeze(2)
        if self.pre_norm:
            y_KBR = F.layer_norm(y_KBR, (width,))
            y_KBR = y_KBR * self.last_scale + self.last_shift
        return y_KBR

    def _encode_time(
        self,
        times_BN: Tensor,
        now_B: Tensor,
        lengths_B: Tensor,
        source_BP: Tensor,
    ) -> Tensor:
        """What time adds to SOS and the items, each of which predicts for the next one's time.

        Args:
            times_BN, now_B, lengths_B: as in `forward`.
            source_BP: which item each token is, 0 for SOS.

        Returns (B, P, r).

        Example: one user with two items, at the ticks 10 and 14, who asks at 30:

            source_BP    tensor([[0, 1, 2]])
            target_BP    tensor([[10, 14, 30]])
            since_BP     tensor([[10, 4, 16]])
            gap_BP       tensor([[NO_GAP, 2, 4]])
        """
        users, tokens = source_BP.shape
        tick_BN = self._to_ticks(times_BN)
        now_B1 = self._to_ticks(now_B).unsqueeze(1)
        target_BP = torch.cat([tick_BN, now_B1], dim=1).gather(1, source_BP)
        has_next_BP = source_BP < lengths_B.unsqueeze(1)
        target_BP = torch.where(has_next_BP, target_BP, now_B1)
        before_BP = torch.cat([torch.zeros_like(now_B1), tick_BN], dim=1)
        since_BP = target_BP - before_BP.gather(1, source_BP)
        span_BP = since_BP.clamp(min=0) + 1
        gap_BP = torch.bucketize(span_BP, self.gap_bounds, right=True)
        gap_BP = torch.where(source_BP > 0, gap_BP, NO_GAP)
        added = cast(Clock, self.clock).encode_tokens(
            target_BP.flatten(),
            gap_BP.flatten(),
        )
        return added.view(users, tokens, -1)

    def _to_ticks(self, times: Tensor) -> Tensor:
        """As `Dataset.ticks`.

        Example: a dataset from 0 to 10:

            times     tensor([-1.0, 0.0, 5.0, 20.0])
            result    tensor([0, 0, 32767, 65535])
        """
        elapsed = (times.double() - self.first_time) / self.duration
        return (elapsed.clamp(0, 1) * TICKS).long()

    def _run_block(self, number: int, x_KBPR: Tensor) -> Tensor:
        """`Block` of syncrec/layers/transformer.py, eq. 5 to 7."""
        weights = {}
        for name in _BLOCK:
            weights[name] = getattr(self, f"{name}_{number}").unsqueeze(1)
        if self.pre_norm:
            normed = _norm(x_KBPR, weights, "attention")
            x_KBPR = x_KBPR + self._attend(normed, weights)
            normed = _norm(x_KBPR, weights, "ffn")
            return x_KBPR + _feed_forward(normed, weights)
        x_KBPR = x_KBPR + self._attend(x_KBPR, weights)
        x_KBPR = _norm(x_KBPR, weights, "attention")
        x_KBPR = x_KBPR + _feed_forward(x_KBPR, weights)
        return _norm(x_KBPR, weights, "ffn")

    def _attend(self, y_KBPR: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Eq. 5 and 6 of all experts, (K, B, P, r).

        Example: K = 5, four users of up to 4 tokens, r = 128, 2 heads:

            y_KBPR, result       (5, 4, 4, 128)
            qkv                  (5, 4, 4, 3, 2, 64)
            each of `heads`      (20, 2, 4, 64)
        """
        experts, users, tokens, width = y_KBPR.shape
        head_dim = width // self.heads
        qkv = y_KBPR @ weights["qkv"]
        qkv = qkv.view(experts, users, tokens, 3, self.heads, head_dim)
        heads = []
        for part in qkv.unbind(3):
            heads.append(part.transpose(2, 3).flatten(0, 1))
        mixed = F.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(experts, users, tokens, width)
        return mixed @ weights["out"]

    def _gate_weights(
        self,
        newest_BR: Tensor,
        x_BPR: Tensor,
        position_BP: Tensor,
        is_token_BP1: Tensor,
    ) -> Tensor:
        """The experts' weights at each user's newest token, (B, K).

        Args:
            newest_BR: the inputs of the newest tokens.
            x_BPR: the inputs of all tokens, 0 behind a history's end.
            position_BP: distance from the newest token.
            is_token_BP1: False behind a history's end.

        Example: two users with three and one tokens, K = 2:

            position_BP     tensor([[2, 1, 0], [0, 0, 0]])
            is_token_BP1    tensor([[True, True, True], [True, False, False]]) as (2, 3, 1)
            result          tensor([[0.3, 0.7], [0.6, 0.4]])
        """
        gate = cast(Tensor, self.gate)
        if not self.literal_gate:
            scores_BK = newest_BR @ gate[0].T
            return torch.softmax(scores_BK, dim=-1)
        scores_BPK = torch.einsum(
            "bpr,bpkr->bpk",
            x_BPR,
            gate[position_BP],
        )
        scores_BK = (scores_BPK * is_token_BP1).sum(1)
        return torch.softmax(scores_BK, dim=-1)


def _norm(y_KBPR: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """LayerNorm of all experts, (K, B, P, r).

    Args:
        y_KBPR: its input.
        weights: of one block of all experts, (K, 1, …, …) each.
        name: attention or ffn.
    """
    scale_K11R = weights[f"{name}_norm_scale"]
    shift_K11R = weights[f"{name}_norm_shift"]
    normed = F.layer_norm(y_KBPR, y_KBPR.shape[-1:])
    return normed * scale_K11R + shift_K11R


def _feed_forward(y_KBPR: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Eq. 7 of all experts, (K, B, P, r). weights: as for `_norm`."""
    inner = y_KBPR @ weights["w1"] + weights["b1"]
    inner = F.gelu(inner)
    return inner @ weights["w2"] + weights["b2"]


def check_exportable(config: ModelConfig) -> None:
    """Raises ValueError for a model that `UserEncoder` does not cover."""
    if config.encoder != "transformer":
        # torch.export writes a GRU out step by step, and then it is for histories of one length.
        raise ValueError(
            f"model.encoder is {config.encoder}: only transformer can be exported; "
            "launch/recommend.py takes any"
        )


def export_program(encoder: UserEncoder) -> torch.export.ExportedProgram:
    """The encoder for any number of users and 1 to max_length items, loadable with PyTorch alone.

    Without what PyTorch adds: the example, which it would pickle, and the folders of the code.
    """
    items = min(2, encoder.max_length)
    width = encoder.start.shape[1]
    example = (
        torch.zeros(2, items, width, dtype=encoder.start.dtype),
        torch.tensor([items, 0]),
        torch.zeros(2, items, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    users = {0: torch.export.Dim("users", min=1)}
    users_and_items = dict(users)
    if encoder.max_length > 1:
        users_and_items[1] = torch.export.Dim(
            "items",
            min=1,
            max=encoder.max_length,
        )
    shapes = {
        "items_BNR": users_and_items,
        "lengths_B": users,
        "times_BN": users_and_items,
        "now_B": users,
    }
    program = torch.export.export(
        encoder.eval(),
        example,
        dynamic_shapes=shapes,
    )
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
