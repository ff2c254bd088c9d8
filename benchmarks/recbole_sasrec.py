"""RecBole's side of recbole_peer.py: its SASRec, by its own trainer and loader. Runs in the
peers' environment.

    .venv-peers/bin/python benchmarks/recbole_sasrec.py FOLDER TASK.json

FOLDER is what trainer/study/peers/dataset_export.py wrote; items are our table's rows.
TASK.json: its `kind` names a function of KINDS, which says the rest. What is found is the last
line printed, as JSON.
"""

import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed

from trainer.study.peers.interface import SPLITS, PeerDataset

AT_ONCE = 512  # users that are scored together
CHUNK = 128  # targets whose scores of all items are in memory at once


class Log(PeerDataset):
    """What FOLDER holds, for RecBole's own split."""

    def write(self) -> None:
        """The whole log in RecBole's own format. Its times are float32, so the place in the
        history stands for the time.
        """
        file = self.folder / "recbole" / "log" / "log.inter"
        if file.exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        users_N = np.repeat(np.arange(len(self.lengths_U)), self.lengths_U)
        place_N = np.arange(len(self.items_N)) - np.repeat(
            self.starts_U, self.lengths_U
        )
        columns = np.stack([users_N, self.items_N, place_N], axis=1)
        header = "user_id:token\titem_id:token\ttimestamp:float"
        np.savetxt(
            file, columns, fmt="%d", delimiter="\t", header=header, comments=""
        )


class EveryPlace(SASRec):
    """In training gives the outputs at all places, (B, T, r), not at each sample's last one."""

    def gather_indexes(self, output: torch.Tensor, gather_index: torch.Tensor):
        return (
            output
            if self.training
            else super().gather_indexes(output, gather_index)
        )


class Peer:
    """RecBole's configuration, dataset, loaders, model and trainer. options: its own settings,
    over what the split asks for.
    """

    def __init__(self, log: Log, options: dict, kind: type[SASRec] = SASRec):
        log.write()
        settings = {
            "data_path": str(log.folder / "recbole"),
            "checkpoint_dir": str(log.folder / "recbole" / "saved"),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            # Of each user the last is test, the one before it validation.
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "order": "TO",
                "group_by": "user",
                "mode": "full",
            },
            "use_gpu": False,
            "show_progress": False,
            **options,
        }
        if (
            settings.get("loss_type", "CE") == "CE"
        ):  # over all items: it refuses negatives
            settings["train_neg_sample_args"] = None
        # it reads the command line too
        arguments = sys.argv
        sys.argv = sys.argv[:1]
        self.config = Config(
            model="SASRec", dataset="log", config_dict=settings
        )
        sys.argv = arguments
        logging.getLogger().setLevel(logging.WARNING)
        init_seed(self.config["seed"], self.config["reproducibility"])
        self.dataset = create_dataset(self.config)
        self.train, self.validation, _ = data_preparation(
            self.config, self.dataset
        )
        self.model = kind(self.config, self.train.dataset).to(
            self.config["device"]
        )
        self.trainer = Trainer(self.config, self.model)
        # Rows of our table in RecBole's numbers. What nobody touched has none: it is not
        # learnt, and gets the padding's 0.
        tokens = self.dataset.field2token_id["item_id"]
        rows = (
            int(
                max(
                    log.items_N.max(),
                    *(
                        log.load(f"candidates-{split}").max()
                        for split in SPLITS
                    ),
                )
            )
            + 1
        )
        self.number_of = np.array(
            [tokens.get(str(row), 0) for row in range(rows)]
        )

    def facts(self) -> dict:
        """What a record says of it."""
        learnt = (
            "loss_type",
            "train_batch_size",
            "learner",
            "learning_rate",
            "weight_decay",
            "valid_metric",
            "stopping_step",
        )
        dropout = ("hidden_dropout_prob", "attn_dropout_prob")
        shape = (
            "n_layers",
            "n_heads",
            "hidden_size",
            "inner_size",
            "MAX_ITEM_LIST_LENGTH",
        )
        names = ("recbole", "torch", "numpy", "pandas", "scipy", "ray")
        return {
            "samples_per_epoch": len(self.train.dataset.inter_feat),
            "weights": sum(
                parameter.numel() for parameter in self.model.parameters()
            ),
            "threads": torch.get_num_threads(),
            "recbole": {
                name: self.config[name]
                for name in (*learnt, *dropout, *shape, "seed")
            },
            "versions": {name: version(name) for name in names},
        }


class Timed:
    """The first batches of a loader's epoch; notes when each is asked for and how many
    interactions it predicts.
    """

    def __init__(self, loader: Any, batches: int):
        self.loader = loader
        self.batches = batches
        self.times = []
        self.sizes = []

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __iter__(self):
        for number, batch in enumerate(self.loader):
            self.times.append(time.perf_counter())
            if number == self.batches:
                return
            self.sizes.append(len(batch))
            yield batch
        self.times.append(time.perf_counter())


def speed(log: Log, task: dict) -> dict:
    """Training interactions/s of each window, by RecBole's trainer. task: options; warm_up,
    window (batches); windows.
    """
    peer = Peer(log, task["options"])
    timed = Timed(
        peer.train,
        min(
            task["warm_up"] + task["windows"] * task["window"], len(peer.train)
        ),
    )
    peer.trainer._train_epoch(timed, 0)
    windows = []
    for begin in range(
        task["warm_up"], len(timed.sizes) - task["window"] + 1, task["window"]
    ):
        end = begin + task["window"]
        windows.append(
            sum(timed.sizes[begin:end])
            / (timed.times[end] - timed.times[begin])
        )
    return {"interactions_per_second": windows} | peer.facts()


def quality(log: Log, task: dict) -> dict:
    """RecBole's own training. After every epoch the candidates' scores are left in
    FOLDER/OUTPUT/SPLIT-EPOCH.npy.

    task: options, output, minutes. Ends by its early stopping, which ranks all items, or after
    the first epoch over the limit.
    """
    peer = Peer(log, task["options"])
    epochs = Epochs(log, peer, task)
    stopped = "RecBole's early stopping"
    try:
        peer.trainer.fit(
            peer.train,
            peer.validation,
            verbose=False,
            saved=False,
            callback_fn=epochs.note,
        )
        if len(epochs.found) == peer.config["epochs"]:
            stopped = "all epochs"
    except TimeIsUp:
        stopped = "limit of minutes"
    return {"epochs": epochs.found, "stopped": stopped} | peer.facts()


def quality_by_user(log: Log, task: dict) -> dict:
    """The same model, loss and Adam, fed users instead of shuffled prefixes: all of a user's
    prefixes in one pass.

    RecBole makes a sample of every prefix and pads it on the right, under a causal mask and
    with positions from the oldest: the output for a prefix is what a pass over the whole
    history gives at that place. So this computes the same losses over a ninth of the tokens
    (Amazon reviews, T = 64), which is what makes training to the end affordable; the batches
    are others, and prefixes of a user share their dropout. task: options, output, minutes,
    patience (epochs without a better validation NDCG@10).
    """
    peer = Peer(log, task["options"], EveryPlace)
    epochs = Epochs(log, peer, task)
    rows = by_user(log, peer, peer.config["MAX_ITEM_LIST_LENGTH"])
    generator = np.random.default_rng(peer.config["seed"])
    stopped = "all epochs"
    try:
        for epoch in range(peer.config["epochs"]):
            peer.model.train()
            order = generator.permutation(len(rows[0]))
            batch_of = (
                np.cumsum(rows[3][order]) // peer.config["train_batch_size"]
            )
            for batch in np.split(order, np.flatnonzero(np.diff(batch_of)) + 1):
                peer.trainer.optimizer.zero_grad()
                user_loss(
                    peer,
                    [torch.from_numpy(part[batch]) for part in rows],
                    generator,
                ).backward()
                peer.trainer.optimizer.step()
            epochs.note(epoch, None)
            best = max(epochs.found, key=lambda figures: figures["validation"])
            if epoch - best["epoch"] >= task["patience"]:
                stopped = "patience"
                break
    except TimeIsUp:
        stopped = "limit of minutes"
    return {"epochs": epochs.found, "stopped": stopped} | peer.facts()


def by_user(log: Log, peer: Peer, longest: int):
    """inputs (R, T), targets (R, T, 0: none), lengths and numbers of targets (R,): a row a
    user, and one for each prefix of more than T interactions, which predicts one item; in
    RecBole's numbers.
    """
    inputs = []
    targets = []
    for start, length in zip(log.starts_U, log.lengths_U, strict=True):
        items = peer.number_of[log.items_N[start : start + length - 2]]
        first = items[: longest + 1]
        inputs.append(np.pad(first[:-1], (0, longest - len(first) + 1)))
        targets.append(np.pad(first[1:], (0, longest - len(first) + 1)))
        for end in range(longest + 1, len(items)):
            inputs.append(items[end - longest : end])
            targets.append(
                np.append(np.zeros(longest - 1, items.dtype), items[end])
            )
    inputs_RT = np.stack(inputs)
    targets_RT = np.stack(targets)
    return (
        inputs_RT,
        targets_RT,
        (inputs_RT > 0).sum(1),
        (targets_RT > 0).sum(1),
    )


def user_loss(
    peer: Peer, rows: tuple[torch.Tensor, ...], generator: torch.Generator
) -> torch.Tensor:
    """`SASRec.calculate_loss` over the prefixes of some rows of `by_user`."""
    inputs_RT, targets_RT, lengths_R, _ = rows
    longest = int(lengths_R.max())
    y_RTR = peer.model.forward(inputs_RT[:, :longest], lengths_R)
    targets_RT = targets_RT[:, :longest]
    row_L, place_L = torch.nonzero(targets_RT, as_tuple=True)
    y_LR = y_RTR[row_L, place_L]
    target_L = targets_RT[row_L, place_L]
    vectors = peer.model.item_embedding
    if peer.model.loss_type == "CE":
        return FullSoftmax.apply(y_LR, vectors.weight, target_L)
    # Uniform over what is no target of the user's, as its sampler draws them: anew until so.
    negative_L = torch.zeros_like(target_L)
    while (
        again_L := (negative_L == 0)
        | (targets_RT[row_L] == negative_L.unsqueeze(1)).any(1)
    ).any():
        negative_L[again_L] = torch.from_numpy(
            generator.integers(1, peer.model.n_items, int(again_L.sum()))
        )
    return peer.model.loss_fct(
        (y_LR * vectors(target_L)).sum(1), (y_LR * vectors(negative_L)).sum(1)
    )


class FullSoftmax(torch.autograd.Function):
    """nn.CrossEntropyLoss of y · M(x) over all items, with its gradients at once, a few targets
    at a time: half the time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_LR: torch.Tensor,
        items_IR: torch.Tensor,
        target_L: torch.Tensor,
    ):
        grad_y = torch.empty_like(y_LR)
        grad_items = torch.zeros_like(items_IR)
        total = 0.0
        for place in torch.arange(len(y_LR)).split(CHUNK):
            y = y_LR[place]
            target = target_L[place]
            scores = y @ items_IR.T
            high = scores.amax(1, keepdim=True)
            own = scores.gather(1, target.unsqueeze(1)) - high
            share = scores.sub_(high).exp_()
            sums = share.sum(1, keepdim=True)
            total += float((sums.log() - own).sum())
            share.div_(sums)[torch.arange(len(y)), target] -= 1
            grad_y[place] = share @ items_IR
            grad_items.addmm_(share.T, y)
        ctx.save_for_backward(
            grad_y.div_(len(y_LR)), grad_items.div_(len(y_LR))
        )
        return y_LR.new_tensor(total / len(y_LR))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        grad_y, grad_items = ctx.saved_tensors
        return grad * grad_y, grad * grad_items, None


class TimeIsUp(Exception):
    pass


class Epochs:
    """Scores the candidates after every epoch, and raises TimeIsUp after the first over
    task["minutes"].
    """

    def __init__(self, log: Log, peer: Peer, task: dict):
        self.peer = peer
        self.limit = 60 * task["minutes"]
        self.found = []
        self.output = log.folder / task["output"]
        self.output.mkdir(parents=True, exist_ok=True)
        longest = peer.config["MAX_ITEM_LIST_LENGTH"]
        self.inputs = {}
        for split, held_out in SPLITS.items():
            items_UT, lengths_U = log.padded(
                np.arange(len(log.lengths_U)), held_out, longest
            )
            items_UT = np.where(
                np.arange(longest) < lengths_U[:, None],
                peer.number_of[items_UT],
                0,
            )
            self.inputs[split] = (
                items_UT,
                lengths_U,
                peer.number_of[log.load(f"candidates-{split}")],
            )
        self.begun = time.perf_counter()

    def note(self, epoch: int, value: float | None) -> None:
        """value: RecBole's own validation, where it has one."""
        self.peer.model.eval()
        figures = {
            "epoch": epoch,
            "seconds": time.perf_counter() - self.begun,
            "recbole_validation": value,
        }
        for split, arrays in self.inputs.items():
            parts = (
                np.array_split(array, -(-len(array) // AT_ONCE))
                for array in arrays
            )
            scores_UC = np.concatenate(
                [
                    self._score(*map(torch.from_numpy, part))
                    for part in zip(*parts, strict=True)
                ]
            )
            np.save(self.output / f"{split}-{epoch}.npy", scores_UC)
            rank_U = (scores_UC[:, :1] <= scores_UC).sum(1)
            figures[split] = float(
                np.where(rank_U <= 10, 1 / np.log2(rank_U + 1), 0).mean()
            )  # NDCG@10 over all users
        self.found.append(figures)
        print(json.dumps(figures), file=sys.stderr, flush=True)
        (self.output / "epochs.json").write_text(json.dumps(self.found))
        if time.perf_counter() - self.begun > self.limit:
            raise TimeIsUp

    @torch.no_grad()
    def _score(self, items_BT, lengths_B, candidates_BC):
        """y · M(x) of each candidate, as `SASRec.predict` scores one."""
        y_BR = self.peer.model.forward(items_BT, lengths_B)
        return (
            torch.einsum(
                "br,bcr->bc",
                y_BR,
                self.peer.model.item_embedding(candidates_BC),
            )
            .float()
            .numpy()
        )


KINDS = {"speed": speed, "quality": quality, "quality_by_user": quality_by_user}


def main() -> None:
    task = json.loads(Path(sys.argv[2]).read_text())
    print(json.dumps(KINDS[task["kind"]](Log(Path(sys.argv[1])), task)))


if __name__ == "__main__":
    main()
