"""The item matrix M (section 4.1) as one row-wise sharded TorchRec table with a fused optimizer."""

import contextlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel, ShardingEnv
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.fbgemm_qcomm_codec import (
    CommType,
    QCommsConfig,
    get_qcomm_codecs,
)
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import CacheParams, CommOp, ShardingPlan

from embeddings.config import optimizer_name
from embeddings.host_memory import TableMemory
from embeddings.optimizers import fused_params
from embeddings.placement import (
    HostNeeds,
    devices_of_host,
    free_room,
    plan_capacity,
    ranks_of_host,
)
from embeddings.row_scatter import RowScatter

logging.getLogger("torch.fx._symbolic_trace").setLevel(
    logging.ERROR
)  # TorchRec calls what torch has renamed

_TABLE, _FEATURE = "item_table", "item"
# FBGEMM's CUDA kernels are parallel over bags: a thread sorts one bag's ids by rank, a warp looks
# one bag's rows up. So the ids of a rank are cut into many bags. Every rank sends the lengths of all
# its bags to every other rank; among many ranks each has fewer bags.
_BAGS = 2048
_FEWEST_BAGS = 512
_BAGS_OF_ALL_RANKS = 2**17
_INIT_BLOCK = 4096  # rows drawn from one generator: a shard may begin anywhere, so blocks are drawn whole and cut


class ItemTable:
    """M, shared by all ranks of the default process group; every method is called on all ranks.

    Rows are named as in the dataset; where they are stored is the table's own business (RowScatter). It stays outside
    the module that DeepSpeed gets: DeepSpeed would broadcast rank 0's shard over the others'.
    """

    def __init__(self, rows, dim, config, seed, device, filled=True, beside=None):
        """rows: number of embeddings; dim: r. Rows start normal with std config.init_std, drawn from (seed, stored row)
        alone, so that any number of ranks starts from the same table.

        filled: False where all rows are read from a checkpoint next: they are not drawn, and cannot be looked up before.
        beside: what the host has to have room for besides (`HostNeeds`).
        Raises ValueError where FBGEMM lacks the optimizer on this device, a rank would hold no row, or the rows fit nowhere.
        """
        ranks = dist.get_world_size()
        if (
            -(-rows // ranks) * (ranks - 1) >= rows
        ):  # TorchRec cuts in equal parts, rounded up, and fails on an empty one
            raise ValueError(
                f"a table of {rows} rows leaves some of {ranks} ranks without one: use fewer ranks"
            )
        self.rows, self.dim, self.device = rows, dim, torch.device(device)
        self.scatter = RowScatter(rows)
        params = fused_params(config, self.device.type)
        own_rows = -(-rows // ranks)
        room = free_room(self.device)
        self.capacity = plan_capacity(
            config, optimizer_name(config), own_rows, dim, room, beside or HostNeeds()
        )
        described = EmbeddingConfig(
            name=_TABLE,
            embedding_dim=dim,
            num_embeddings=rows,
            feature_names=[_FEATURE],
            init_fn=_leave,
        )
        collection = EmbeddingCollection(
            tables=[described], device=torch.device("meta")
        )
        codecs = None if ranks == 1 else communication_codecs(config.communication)
        sharder = EmbeddingCollectionSharder(
            fused_params=params, qcomm_codecs_registry=codecs
        )
        cache_share = config.cache_share if self.capacity.cached else None
        plan = sharding_plan(
            collection,
            sharder,
            cache_share,
            ranks,
            devices_of_host(self.device),
            self.device.type,
        )
        with TableMemory():
            self._parallel = DistributedModelParallel(
                nn.ModuleDict({"m": collection}),
                env=ShardingEnv.from_process_group(dist.group.WORLD),
                device=self.device,
                plan=ShardingPlan({"m": plan}),
                sharders=[sharder],
                init_data_parallel=False,
            )
        self._collection = self._parallel.module["m"]
        self.begin_anew(config.init_std, seed)
        if filled:
            self.fill()

    def begin_anew(self, init_std: float, seed: int):
        """Gives up what is in the table, for other rows to be read into it: those that are new are drawn from `seed` with
        `init_std`."""
        self._init_std = init_std
        self._seed = seed
        self._filled = False

    def fill(self, places: np.ndarray | None = None):
        """Gives this rank's rows their first vectors, which depend on the seed and the stored row alone.

        places: those of the shard's rows that get them, int64, rising; None: all. Blocks without any of them are not drawn.
        """
        if places is None:
            self._fill(self._init_std, self._seed)
        else:
            self._fill(self._init_std, self._seed, places)

    def _fill(self, std: float, seed: int, places: np.ndarray | None = None):
        with self.rewritten() as (first, tensors):
            weights = tensors["weight"]
            if places is None:
                last = -(-(first + len(weights)) // _INIT_BLOCK)
                blocks = range(first // _INIT_BLOCK, last)
            else:
                blocks = np.unique((first + places) // _INIT_BLOCK).tolist()

            def fill_block(block):
                low = max(first, block * _INIT_BLOCK)
                high = min(first + len(weights), (block + 1) * _INIT_BLOCK)
                drawn = _drawn(block, self.dim, std, seed)[low % _INIT_BLOCK :][
                    : high - low
                ]
                if places is None:
                    weights[low - first : high - first] = drawn.to(weights)
                else:
                    wanted = places[
                        slice(*np.searchsorted(places, [low - first, high - first]))
                    ]
                    part = torch.from_numpy(wanted)
                    weights[part.to(weights.device)] = drawn[part - (low - first)].to(
                        weights
                    )

            threads = torch.get_num_threads()
            try:
                with ThreadPoolExecutor(
                    _threads(), initializer=torch.set_num_threads, initargs=(1,)
                ) as pool:
                    for _ in pool.map(fill_block, blocks):
                        pass
            finally:
                torch.set_num_threads(threads)

    def __call__(self, ids):
        """The vectors of rows `ids` (int64, any number, each rank its own), as a leaf: (ids, r), float32.

        After the caller's backward, `update` carries the leaf's gradient into the table.
        """
        return self.look_up(self.exchange(ids))

    def exchange(self, ids) -> "Exchange":
        """Starts to tell the ranks that hold the rows `ids` that they are wanted; `look_up` takes what comes of it. In between
        other rows may be looked up, and all may be updated: only ids are on their way.

        Several can be on their way at once, as long as all ranks start them, send them and look them up in the same order.
        """
        stored = self.scatter.stored(ids.to(self.device))
        lengths = bag_lengths(
            len(stored), bags_of_rank(dist.get_world_size()), self.device
        )
        # The host knows the count: TorchRec would read it from the device.
        features = KeyedJaggedTensor(
            [_FEATURE],
            stored,
            lengths=lengths,
            stride=len(lengths),
            length_per_key=[len(stored)],
        )
        return Exchange(self._collection, features)

    def look_up(self, exchange: "Exchange"):
        """The vectors of the rows whose ids were exchanged, as they are now; otherwise as when called."""
        if not self._filled:
            raise RuntimeError(
                "the item table has no rows yet: fill it or read a checkpoint into it first"
            )
        updates = None if torch.is_grad_enabled() else self.updates
        context, features = exchange.received()
        self._looked_up = self._collection.compute_and_output_dist(context, features)[
            _FEATURE
        ].values()
        if updates is not None:
            self.updates = updates  # FBGEMM counts when it looks up, also where nothing will be updated
        return self._looked_up.detach().requires_grad_(torch.is_grad_enabled())

    def update(self, gradient):
        """One step of the fused optimizer with d loss / d vectors of the last look-up.

        gradient: (ids, r), of a loss whose mean over ranks is the global one (TorchRec divides by the number of ranks).
        """
        self._looked_up.backward(gradient)
        self._looked_up = None

    def set_learning_rate(self, learning_rate):
        """Takes effect with the next look-up: FBGEMM hands the rate to backward when it looks up."""
        for group in self._parallel.fused_optimizer.param_groups:
            group["lr"] = learning_rate
        self._parallel.fused_optimizer.step()  # the fused kind of step: hands the rate to FBGEMM, updates nothing

    def shard(self):
        """This rank's part as it is now: (first stored row, {name: tensor (rows here, …)}), the tensors as views, to be written
        only as `rewritten` has it.

        "weight" (rows here, r), and what the fused optimizer keeps of each row ("momentum1", …), if anything.
        """
        weight = self._collection.state_dict()[f"embeddings.{_TABLE}.weight"]
        (state,) = self._parallel.fused_optimizer.state_dict()["state"].values()
        named = {"weight": weight} | {
            name.removeprefix(f"{_TABLE}."): tensor for name, tensor in state.items()
        }
        shards = {name: tensor.local_shards()[0] for name, tensor in named.items()}
        return shards["weight"].metadata.shard_offsets[0], {
            name: shard.tensor for name, shard in shards.items()
        }

    @contextlib.contextmanager
    def rewritten(self):
        """What `shard` gives, for a `with` in which it is written."""
        yield self.shard()
        self._kernel.reset_cache_states()  # what a device's cache has of the rows is not what they are any more
        self._filled = True

    @property
    def updates(self):
        """How often the fused optimizer has stepped; Adam's bias correction counts it."""
        return int(
            self._kernel.iter_cpu
        )  # `iter` is the same on the device, which would have to be waited for

    @updates.setter
    def updates(self, count):
        self._kernel.set_optimizer_step(count)
        self._kernel.iter_cpu.fill_(count)

    @property
    def _kernel(self):
        """FBGEMM's module that holds this rank's rows."""
        (lookup,) = self._collection._lookups
        (embedding,) = lookup._emb_modules
        return embedding.emb_module


class Exchange:
    """Ids on their way to the ranks that hold their rows, in two halves: how many go where, then the ids themselves."""

    def __init__(self, collection, features):
        self._context = collection.create_context()
        self._counts, self._ids = collection.input_dist(self._context, features), None

    def send(self):
        """Waits until it is known how many ids come from where (the host has to know), and sends the ids."""
        if self._ids is None:
            self._ids = self._counts.wait()

    def received(self):
        """TorchRec's context and the ids that have come, for the stream that is current now."""
        self.send()
        features = self._ids.wait()
        if (
            self._context.sharding_contexts[0].features_before_input_dist.device().type
            == "cuda"
        ):
            stream = torch.cuda.current_stream()  # they were made on another: their memory is not free before this one is done
            self._context.record_stream(stream)
            features.record_stream(stream)
        return self._context, features


def bags_of_rank(ranks: int) -> int:
    """Into how many bags each of so many ranks cuts the ids that it looks up."""
    return min(_BAGS, max(_FEWEST_BAGS, _BAGS_OF_ALL_RANKS // ranks))


def bag_lengths(ids: int, bags: int, device: torch.device) -> torch.Tensor:
    """How many of the ids are in each bag, int32 (bags,): equally many, the first bags one more.

    Five ids in three bags are tensor([2, 2, 1]).
    """
    lengths = torch.full((bags,), ids // bags, dtype=torch.int32, device=device)
    lengths[: ids % bags] += 1
    return lengths


def _leave(_weights):
    """What TorchRec is to draw a table's first vectors with: nothing, `ItemTable.fill` draws them."""


def _drawn(block, dim, std, seed):
    """The first vectors of a block of stored rows, (_INIT_BLOCK, dim)."""
    generator = torch.Generator()
    generator.manual_seed((seed * 0x9E3779B1 + block * 0x85EBCA77 + 1) % 2**63)
    return torch.randn(_INIT_BLOCK, dim, generator=generator).mul_(std)


def _threads():
    """The cores that this rank has for itself."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_of_host())


def sharding_plan(collection, sharder, cache_share, ranks, ranks_of_host, device_type):
    """Rows in equal contiguous parts over all ranks; with a cache_share on the hosts, that share cached on the devices."""
    kernel = (
        EmbeddingComputeKernel.FUSED
        if cache_share is None
        else EmbeddingComputeKernel.FUSED_UVM_CACHING
    )
    plan = construct_module_sharding_plan(
        collection,
        {_TABLE: row_wise(compute_kernel=kernel.value)},
        sharder=sharder,
        world_size=ranks,
        local_size=ranks_of_host,
        device_type=device_type,
    )
    if cache_share is not None:
        plan[_TABLE].cache_params = CacheParams(load_factor=cache_share)
    return plan


def communication_codecs(precision):
    """How TorchRec is to encode rows and their gradients between ranks; None where they go as they are."""
    if precision == "fp32":
        return None
    # Gradients in bf16 either way: fp16 has nothing below 6e-8, and a gradient of a mean over 10⁵ targets is often less.
    # Not by TorchRec's get_qcomm_codecs_registry: on gloo that makes fp16 of bf16, which gloo carries as well.
    codecs = get_qcomm_codecs(
        QCommsConfig(
            forward_precision=CommType(precision), backward_precision=CommType.BF16
        )
    )
    return {CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: codecs}
