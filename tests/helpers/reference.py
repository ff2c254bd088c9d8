"""SyNCRec's training step, slow, padded and plain: what the packed model is held against.

Written from the paper's equations and from our readings of them, not from the packed code: histories are Python lists,
every sequence is padded on the left to T as in section 4.1, every expert runs with a graph and SG is `.detach()`, and
losses and SC-MIM go target by target and user by user. It shares nothing with the packed model but the names and shapes
of its parameters.

Shapes: B users, T longest sequence, K experts, r width.
"""

import math
from dataclasses import dataclass
from itertools import permutations

import torch

SOS = -1  # the input of a sequence's first token; other inputs and targets are steps of a user's history, 0 the oldest
# Settings of ModelConfig that the equations have and a run's defaults have not.
EQUATIONS = {
    "time_knots": 0,
    "stop_gradient": True,
    "loss_correction": "negative_transfer_gap",
    "mutual_information": True,
    "correction_total": "one",
    "learn_scales": True,
}
NONE = None  # the target of a token after which nothing follows


@dataclass(frozen=True)
class History:
    """One user. items: rows of M, oldest first; domains: of the items; negatives: each item's own, as rows; ticks: when."""

    items: list[int]
    domains: list[int]
    weight: int
    negatives: list[list[int]]
    ticks: list[int]


@dataclass(frozen=True)
class Result:
    """Everything that a training step computes, and the gradients of `total`.

    outputs: tower output of each token, by (user, input) for the cross-domain view and (domain, user, input) for the
    single-domain view. Lists have one entry a domain; None: the domain had no target (phi: no comparable one).
    """

    cross_outputs: dict
    single_outputs: dict
    single: list
    cross: list
    loss_single: torch.Tensor
    loss_cross: torch.Tensor
    phi: list
    lambdas: torch.Tensor
    information: list
    total: torch.Tensor
    parameter_gradients: dict
    item_gradient: torch.Tensor


def cross_sequence(history, longest):
    """The newest `longest` (input, target) pairs of SOS, x_1, … x_{n-1} → x_1, … x_n (Fig. 2)."""
    steps = list(range(len(history.items)))
    return list(zip([SOS, *steps[:-1]], steps, strict=False))[-longest:]


def single_sequence(history, domain, longest):
    """The same of one domain: SOS and the domain's items among x_1 … x_{n-1} → the domain's items among x_1 … x_n."""
    steps = [step for step, d in enumerate(history.domains) if d == domain]
    if not steps:
        return []
    inputs = [SOS, *(step for step in steps if step < len(history.items) - 1)]
    return list(zip(inputs, [*steps, NONE], strict=False))[-longest:]


def training_step(
    config, state, table, histories, domain_items, shared_negatives=None
):
    """One training step of users in one process, with dropout 0.

    state: state_dict of the packed model. table: M, (rows, r). domain_items: number of items of each domain.
    shared_negatives: rows by domain, in place of the histories' own negatives.
    """
    parameters = {name: value.detach().clone() for name, value in state.items()}
    lambda_state = parameters.pop("correction.lambda_D", None)
    gap_sums = parameters.pop("gap.sums_2D", None)
    gap_noise = parameters.pop("gap.noise_3D", None)
    by_mean = config.prediction == "both" and config.tasks == "both"
    if by_mean:
        gap_sums = parameters.pop("gap_of_mean.sums_2D", None)
        gap_noise = parameters.pop("gap_of_mean.noise_3D", None)
    parameters.pop("clock.newest_tick", None)
    for parameter in parameters.values():
        parameter.requires_grad_()
    table = table.detach().clone().requires_grad_()
    domains = range(len(domain_items))
    gates = None
    if config.stop_gradient == "harm":
        gates = [
            _unharmed(config, gap_sums[:, d].tolist(), gap_noise[:, d].tolist())
            for d in domains
        ]
    network = _Network(config, parameters, table, gates=gates)

    cross_sequences = [
        cross_sequence(history, config.max_length) for history in histories
    ]
    single_sequences = [
        [
            single_sequence(history, d, config.max_length)
            for history in histories
        ]
        for d in domains
    ]
    cross_outputs, single_outputs = {}, {}
    for user, outputs in enumerate(network.cross(histories, cross_sequences)):
        cross_outputs |= {
            (user, given): y
            for (given, _), y in zip(
                cross_sequences[user], outputs, strict=True
            )
        }
    for d in domains:
        for user, outputs in enumerate(
            network.single(d, histories, single_sequences[d])
        ):
            pairs = zip(single_sequences[d][user], outputs, strict=True)
            single_outputs |= {(d, user, given): y for (given, _), y in pairs}

    # Equations 8 and 9: the losses of each view, by the interaction (user, step) that is predicted.
    def loss_of(user, step, y):
        d = histories[user].domains[step]
        if config.time_knots:
            y = y + network.time(1, histories[user].ticks[step])
        negatives = (
            shared_negatives[d]
            if shared_negatives is not None
            else histories[user].negatives[step]
        )
        shared = shared_negatives is not None
        return _item_loss(
            config.loss,
            y,
            table,
            histories[user].items[step],
            negatives,
            shared,
            domain_items[d],
        )

    cross_losses, single_losses = {}, {}
    for user, sequence in enumerate(cross_sequences):
        for given, step in sequence:
            cross_losses[user, step] = loss_of(
                user, step, cross_outputs[user, given]
            )
    for d in domains:
        for user, sequence in enumerate(single_sequences[d]):
            for given, step in sequence:
                if step is not NONE:
                    single_losses[user, step] = loss_of(
                        user, step, single_outputs[d, user, given]
                    )

    def sum_and_count(losses, keys):
        counted = [
            losses[user, step] for user, step in keys if histories[user].weight
        ]
        return sum(counted, table.new_zeros(())), len(counted)

    def of_domain(losses, d):
        return [key for key in losses if histories[key[0]].domains[key[1]] == d]

    single_sums = [
        sum_and_count(single_losses, of_domain(single_losses, d))
        for d in domains
    ]
    cross_sums = [
        sum_and_count(cross_losses, of_domain(cross_losses, d)) for d in domains
    ]

    # Equation 10, over the interactions that both views predict; and the same of the mean of both views.
    phi, mean_gaps = [], []
    cross_given = {
        (user, step): given
        for user, sequence in enumerate(cross_sequences)
        for given, step in sequence
    }
    single_given = {
        (user, step): given
        for d in domains
        for user, sequence in enumerate(single_sequences[d])
        for given, step in sequence
    }
    for d in domains:
        comparable = [
            key for key in of_domain(cross_losses, d) if key in single_losses
        ]
        single, count = sum_and_count(single_losses, comparable)
        cross, _ = sum_and_count(cross_losses, comparable)
        phi.append((single.item() - cross.item()) / count if count else None)
        mean_losses = {
            (user, step): loss_of(
                user,
                step,
                cross_outputs[user, cross_given[user, step]] / 2
                + single_outputs[d, user, single_given[user, step]] / 2,
            )
            for user, step in comparable
        }
        mean, _ = sum_and_count(mean_losses, comparable)
        mean_gaps.append(
            (single.item() - mean.item()) / count if count else None
        )

    if config.loss_correction == "none":
        lambdas = table.new_ones(len(domains))
    elif config.loss_correction == "harm":
        gaps = mean_gaps if by_mean else phi
        shares = [
            _unharmed(
                config,
                *_observe(
                    gap_sums[:, d].tolist(), gap_noise[:, d].tolist(), gaps[d]
                ),
            )
            for d in domains
        ]
        lambdas = table.new_tensor([0.1 + 0.9 * share for share in shares])
    elif config.loss_correction == "shapley":

        def worth(coalition):
            """The negated mean cross-domain loss where the model sees the coalition's items alone."""
            partial, losses = (
                _Network(config, parameters, table, shown=coalition),
                {},
            )
            for user, outputs in enumerate(
                partial.cross(histories, cross_sequences)
            ):
                for (_, step), y in zip(
                    cross_sequences[user], outputs, strict=True
                ):
                    losses[user, step] = loss_of(user, step, y)
            total, count = sum_and_count(losses, losses)
            return -total.item() / count

        powers = [
            math.exp(value / config.correction_temperature)
            for value in shapley(worth, len(domains))
        ]
        present = [count > 0 for _, count in cross_sums]
        share = sum(
            power for power, there in zip(powers, present, strict=True) if there
        )
        found = zip(powers, present, lambda_state.tolist(), strict=True)
        lambdas = table.new_tensor(
            [power / share if there else old for power, there, old in found]
        )
    else:
        alpha, beta = (
            parameters["correction.alpha"],
            parameters["correction.beta"],
        )
        lambdas = _new_lambda(
            alpha,
            beta,
            config.correction_temperature,
            lambda_state.tolist(),
            phi,
        )

    # Equations 12 and 18.
    targets_single, targets_cross = (
        sum(count for _, count in single_sums),
        sum(count for _, count in cross_sums),
    )
    loss_single = sum(total for total, _ in single_sums) / max(
        targets_single, 1
    )
    loss_cross = sum(lambdas[d] * cross_sums[d][0] for d in domains) / max(
        targets_cross, 1
    )
    if config.mutual_information:
        vectors = [
            _user_vectors(config, d, histories, cross_outputs, single_outputs)
            for d in domains
        ]
        weight = parameters["mutual_information.weight"]
        information = [_information(config, weight, pairs) for pairs in vectors]
        total = config.eta * (loss_single + loss_cross) - (
            1 - config.eta
        ) * sum(information)
    else:
        information = [table.new_zeros(()) for _ in domains]
        total = loss_single + loss_cross

    *gradients, item_gradient = torch.autograd.grad(
        total, [*parameters.values(), table], allow_unused=True
    )
    return Result(
        cross_outputs={key: y.detach() for key, y in cross_outputs.items()},
        single_outputs={key: y.detach() for key, y in single_outputs.items()},
        single=[
            total.item() / count if count else None
            for total, count in single_sums
        ],
        cross=[
            total.item() / count if count else None
            for total, count in cross_sums
        ],
        loss_single=loss_single.detach(),
        loss_cross=loss_cross.detach(),
        phi=phi,
        lambdas=lambdas.detach(),
        information=[value.item() for value in information],
        total=total.detach(),
        parameter_gradients=dict(zip(parameters, gradients, strict=True)),
        item_gradient=item_gradient,
    )


def _observe(sums, noise, gap):
    """Sums of the gap and of ones, and of the noise, after one more batch; as they were where it had no gap."""
    if gap is None:
        return sums, noise
    if sums[1] > 0:
        off = gap - sums[0] / sums[1]
        noise = [
            0.99 * noise[0] + 0.01 * off * off,
            0.99 * noise[1] + 0.01,
            0.99 * 0.99 * noise[2] + 0.01 * 0.01,
        ]
    return [0.99 * sums[0] + 0.01 * gap, 0.99 * sums[1] + 0.01], noise


def _unharmed(config, sums, noise):
    """exp(−harm / temperature); harm: how far the mean gap is below 0 beyond three standard errors."""
    batches = noise[1] ** 2 / noise[2] if noise[2] > 0 else 0
    if batches < 10:
        return 1.0
    error = math.sqrt(noise[0] / noise[1] / batches)
    harm = max(0.0, -(sums[0] / sums[1]) - 3 * error)
    return math.exp(-harm / config.harm_temperature)


def shapley(worth, players):
    """Each player's gain, worth(with) − worth(without), averaged over every order in which they may come."""
    known = {}

    def value(coalition):
        if coalition not in known:
            known[coalition] = worth(coalition)
        return known[coalition]

    gains = [0.0] * players
    for order in permutations(range(players)):
        for place, player in enumerate(order):
            gains[player] += value(frozenset(order[: place + 1])) - value(
                frozenset(order[:place])
            )
    return [gain / math.factorial(players) for gain in gains]


class _Network:
    """Embedding layer, experts, gates and towers over left-padded (B, T, r) tensors.

    Parameters of the packed model, and what they are here:
        embedding.start (1, r), embedding.positions (T, r)    SOS; P, its row 0 for the newest position
        cross_experts.…[k], k < j; single_experts.…[k − j]    expert k of eq. 2, 4 (stop_gradient off: all in the first)
          blocks.b.qkv (r, 3 r)                               W^Q, W^K, W^V side by side, each head after head
          blocks.b.out, w1, b1, w2, b2                        W^F, W_1, b_1, W_2, b_2
          blocks.b.attention_norm_, ffn_norm_; last_norm.     LayerNorm scale and shift
        cross_gate.weight, single_gates.d.weight (1 or T, K, r)   W_g, by position as P
        cross_tower, single_towers.d                          h: inner, outer, norm
        clock.knots_2KR (2, knots, r), clock.gaps_GR          what time adds to a token's input [0] and output [1]; the gap
    """

    def __init__(self, config, parameters, table, shown=None, gates=None):
        """shown: the domains whose items it sees, the others' are zeros; None: all. gates: what replaces SG, by domain."""
        self.gates = gates
        self.config, self.parameters, self.table, self.shown = (
            config,
            parameters,
            table,
            shown,
        )

    def cross(self, histories, sequences):
        """Equation 4: a list of (tokens, r), one a user."""
        single_experts = range(self.config.cross_experts, self.config.experts)
        return self._task(
            histories,
            sequences,
            "cross_gate.",
            "cross_tower.",
            stopped=single_experts,
            domain=None,
        )

    def single(self, domain, histories, sequences):
        """Equation 2."""
        cross_experts = range(self.config.cross_experts)
        return self._task(
            histories,
            sequences,
            f"single_gates.{domain}.",
            f"single_towers.{domain}.",
            stopped=cross_experts,
            domain=domain,
        )

    def _gate_of_tokens(self, histories, sequences, domain):
        """What passes of a stopped gradient, (B, T, 1): by the task's domain, or by that of the token's target."""
        longest = self.config.max_length
        gates_BT1 = self.table.new_ones(len(sequences), longest, 1)
        for user, tokens in enumerate(sequences):
            for slot, (_, step) in enumerate(tokens, longest - len(tokens)):
                d = histories[user].domains[step] if domain is None else domain
                gates_BT1[user, slot] = self.gates[d]
        return gates_BT1

    def _task(self, histories, sequences, gate, tower, stopped, domain):
        inputs_BTR, real_BT = self._embed(histories, sequences)
        weights_BTK = self._gate(gate, inputs_BTR, real_BT)
        mixed_BTR = 0
        for k in range(self.config.experts):
            output_BTR = self._expert(k, inputs_BTR, real_BT)
            if self.config.stop_gradient and k in stopped:
                still_BTR = output_BTR.detach()
                passed_BTR = output_BTR - still_BTR
                output_BTR = still_BTR
                if self.gates is not None:
                    output_BTR = output_BTR + passed_BTR * (
                        self._gate_of_tokens(histories, sequences, domain)
                    )
            mixed_BTR = mixed_BTR + weights_BTK[:, :, k, None] * output_BTR
        output_BTR = self._tower(tower, mixed_BTR)
        longest = self.config.max_length
        return [
            output_BTR[user, longest - len(tokens) :]
            for user, tokens in enumerate(sequences)
        ]

    def _embed(self, histories, sequences):
        """Section 4.1. A PAD slot holds zeros; it is masked wherever tokens meet."""
        longest, width = self.config.max_length, self.config.dim
        start, positions = (
            self.parameters["embedding.start"][0],
            self.parameters["embedding.positions"],
        )
        rows, real = [], torch.zeros(len(histories), longest, dtype=torch.bool)
        for user, tokens in enumerate(sequences):
            first = longest - len(tokens)
            real[user, first:] = True
            row = [self.table.new_zeros(width)] * first
            for slot, (given, step) in enumerate(tokens, start=first):
                vector = (
                    start
                    if given == SOS
                    else self.table[histories[user].items[given]]
                )
                if (
                    given != SOS
                    and self.shown is not None
                    and histories[user].domains[given] not in self.shown
                ):
                    vector = torch.zeros_like(vector)
                row.append(
                    vector
                    + positions[longest - 1 - slot]
                    + self._when(histories[user].ticks, given, step)
                )
            rows.append(torch.stack(row))
        return torch.stack(rows), real

    def _when(self, ticks, given, step):
        """What time adds to a token: of the interaction that it predicts, and of how long after its own that is."""
        if not self.config.time_knots:
            return 0
        asked = 0 if step is NONE else ticks[step]
        after = None if given == SOS else max(0, asked - ticks[given])
        gap = 17 if after is None else (1 + after).bit_length() - 1
        return self.time(0, asked) + self.parameters["clock.gaps_GR"][gap]

    def time(self, function, tick):
        """A vector of time: on the line between the two knots beside it."""
        knots = self.parameters["clock.knots_2KR"][function]
        if len(knots) == 1:
            return knots[0]
        place = tick / 65535 * (len(knots) - 1)
        low = min(math.floor(place), len(knots) - 2)
        return (low + 1 - place) * knots[low] + (place - low) * knots[low + 1]

    def _gate(self, name, inputs_BTR, real_BT):
        """Equation 3, (B, T, K)."""
        if self.config.experts == 1:
            return inputs_BTR.new_ones(*inputs_BTR.shape[:2], 1)
        weight = self.parameters[name + "weight"]
        if self.config.gate == "token":
            return torch.softmax(inputs_BTR @ weight[0].T, dim=-1)
        by_slot_TKR = weight.flip(0)  # the last slot is the newest
        scores_BTK = (by_slot_TKR @ inputs_BTR.unsqueeze(-1)).squeeze(-1)
        scores_BK = (scores_BTK * real_BT.unsqueeze(-1)).sum(1)
        return (
            torch.softmax(scores_BK, dim=-1)
            .unsqueeze(1)
            .expand(-1, inputs_BTR.shape[1], -1)
        )

    def _expert(self, k, x_BTR, real_BT):
        """Equations 5 to 7, each sub-layer with its residual and LayerNorm."""
        stack, place = "cross_experts.", k
        if self.config.stop_gradient and k >= self.config.cross_experts:
            stack, place = "single_experts.", k - self.config.cross_experts

        def parameter(name):
            return self.parameters[stack + name][place]

        def norm(name, value):
            return _layer_norm(
                value, parameter(name + "scale"), parameter(name + "shift")
            )

        for block in range(self.config.blocks):
            name = f"blocks.{block}."

            def attend(value, name=name):
                return self._attention(
                    value,
                    real_BT,
                    parameter(name + "qkv"),
                    parameter(name + "out"),
                )

            def feed_forward(value, name=name):
                inner = _gelu(
                    value @ parameter(name + "w1") + parameter(name + "b1")
                )
                return inner @ parameter(name + "w2") + parameter(name + "b2")

            if self.config.norm == "pre":
                x_BTR = x_BTR + attend(norm(name + "attention_norm_", x_BTR))
                x_BTR = x_BTR + feed_forward(norm(name + "ffn_norm_", x_BTR))
            else:
                x_BTR = norm(name + "attention_norm_", x_BTR + attend(x_BTR))
                x_BTR = norm(name + "ffn_norm_", x_BTR + feed_forward(x_BTR))
        return norm("last_norm.", x_BTR) if self.config.norm == "pre" else x_BTR

    def _attention(self, z_BTR, real_BT, qkv, out):
        """Equations 5 and 6. A real slot sees real slots up to its own; a PAD slot sees itself, and nobody reads it."""
        longest, width, heads = (
            self.config.max_length,
            self.config.dim,
            self.config.heads,
        )
        head = width // heads
        causal_TT = torch.ones(longest, longest).tril().bool()
        allowed_BTT = (
            causal_TT & real_BT.unsqueeze(1) | torch.eye(longest).bool()
        )
        outputs = []
        for i in range(heads):
            query, key, value = (
                z_BTR @ qkv[:, part * width + i * head :][:, :head]
                for part in range(3)
            )
            scores_BTT = query @ key.transpose(1, 2) / math.sqrt(width / heads)
            outputs.append(
                torch.softmax(
                    scores_BTT.masked_fill(~allowed_BTT, -math.inf), dim=-1
                )
                @ value
            )
        return torch.cat(outputs, dim=-1) @ out

    def _tower(self, name, x_BTR):
        if not self.config.tower:
            return x_BTR

        def linear(layer, value):
            return (
                value @ self.parameters[name + layer + ".weight"].T
                + self.parameters[name + layer + ".bias"]
            )

        y_BTR = linear("outer", _gelu(linear("inner", x_BTR)))
        return _layer_norm(
            x_BTR + y_BTR,
            self.parameters[name + "norm.weight"],
            self.parameters[name + "norm.bias"],
        )


def _layer_norm(x, scale, shift):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * scale
        + shift
    )


def _gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _item_loss(kind, y, table, item, negatives, shared, items):
    """The loss of one target. shared: the negatives are the domain's: the target may be among them and is left out."""
    if shared:
        negatives = [negative for negative in negatives if negative != item]
    positive, scores = (
        y @ table[item],
        [y @ table[negative] for negative in negatives],
    )
    if kind == "sampled_softmax":
        # Each negative stands for (items − 1) / n of the others.
        others = (
            sum(
                (items - 1) / len(scores) * torch.exp(score) for score in scores
            )
            if items > 1
            else 0
        )
        return -torch.log(torch.exp(positive) / (torch.exp(positive) + others))
    if kind == "bce":
        own = -torch.log(_sigmoid(positive))
        return own - sum(
            torch.log(1 - _sigmoid(score)) for score in scores
        ) / max(len(scores), 1)
    if kind == "bpr_probability":
        positive, scores = (
            _sigmoid(positive),
            [_sigmoid(score) for score in scores],
        )
    return sum(
        (-torch.log(_sigmoid(positive - score)) for score in scores),
        0 * positive,
    ) / max(len(scores), 1)


def _sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def _new_lambda(alpha, beta, temperature, old, phi):
    """Equation 11 over the present domains, which share what the absent ones leave of 1: λ, or 1 / D before they were seen."""
    present = [d for d, gap in enumerate(phi) if gap is not None]
    free = 1 - sum(
        value if value > 0 else 1 / len(old)
        for d, value in enumerate(old)
        if d not in present
    )
    powers = {
        d: torch.exp((alpha * old[d] + beta * phi[d]) / temperature)
        for d in present
    }
    kept = {d: alpha.new_tensor([value]) for d, value in enumerate(old)}
    return torch.cat(
        [
            free * powers[d] / sum(powers.values()) if d in present else kept[d]
            for d in range(len(old))
        ]
    )


def _user_vectors(config, domain, histories, cross_outputs, single_outputs):
    """(single, cross) of each counted user that has tokens of the domain in both views: pooled tower outputs."""
    pairs = []
    for user, history in enumerate(histories):
        steps = [step for step, d in enumerate(history.domains) if d == domain]
        single = [
            single_outputs[domain, user, step]
            for step in steps
            if (domain, user, step) in single_outputs
        ]
        cross = [
            cross_outputs[user, step]
            for step in steps
            if (user, step) in cross_outputs
        ]
        if history.weight and single and cross:
            if config.mutual_information_pooling == "last":
                single, cross = single[-1:], cross[-1:]
            pairs.append((sum(single) / len(single), sum(cross) / len(cross)))
    return pairs


def _information(config, weight, pairs):
    """Equation 16, the mean over users; nothing where there is no other user."""
    if len(pairs) < 2:
        return weight.new_zeros(())

    def rho(u, v):
        v = weight @ v
        if config.mutual_information_similarity == "sigmoid":
            return _sigmoid(u @ v) / config.mutual_information_temperature
        return (
            u
            @ v
            / (u @ u).sqrt()
            / (v @ v).sqrt()
            / config.mutual_information_temperature
        )

    bounds = []
    for user, (own, cross) in enumerate(pairs):
        others = [
            single for other, (single, _) in enumerate(pairs) if other != user
        ]
        candidates = (
            others
            if config.mutual_information_denominator == "others"
            else [own, *others]
        )
        bounds.append(
            rho(own, cross)
            - torch.log(
                sum(torch.exp(rho(single, cross)) for single in candidates)
            )
        )
    return sum(bounds) / len(pairs)
