"""The item matrix M (section 4.1) as one row-wise sharded TorchRec table with a fused optimizer.

One copy of it lies on all ranks together, or one on each group of ranks (embeddings/replicas.py).
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.remote_device import _remote_device
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel, ShardingEnv
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import (
    construct_module_sharding_plan,
    row_wise,
)
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
)

from embeddings.codecs import communication_codecs, encode_gradient
from embeddings.config import TableConfig, optimizer_name
from embeddings.host_memory import TableMemory
from embeddings.optimizers import fused_params
from embeddings.placement import (
    HostNeeds,
    count_devices_of_host,
    count_ranks_of_host,
    free_room,
    plan_capacity,
)
from embeddings.replicas import (
    SharedRows,
    build_groups,
    count_ranks_of_group,
    exchange_rows,
    sum_gradients,
)
from embeddings.row_scatter import RowScatter

# TorchRec calls what torch has renamed.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

_TABLE = "item_table"
_FEATURE = "item"
# FBGEMM's CUDA kernels are parallel over bags: a thread sorts one bag's ids by rank, a warp looks
# one bag's rows up. So the ids of a rank are cut into many bags. Every rank sends the lengths of all
# its bags to every other rank; among many ranks each has fewer bags.
_BAGS = 2048
_FEWEST_BAGS = 512
_BAGS_OF_ALL_RANKS = 2**17
# Rows drawn from one generator: a shard may begin anywhere, so blocks are drawn whole and cut.
_INIT_BLOCK = 4096

# The first stored row, and tensors by name.
Shard = tuple[int, dict[str, Tensor]]


class ItemTable:
    """M, shared by all ranks of the default process group (section 4.1).

    Every method is called on all ranks. Rows are named as in the dataset; where they are stored is
    the table's own business (RowScatter). It stays outside the module that DeepSpeed gets: DeepSpeed
    would broadcast rank 0's shard over the others'.

    Example: a table of 20 rows of two domains over two ranks, and the rows that the four users of
    syncrec/batch/build.py's head look up:

        ids        tensor([1, 2, 3, 5, 7, 8, 12, 14, 15, 16])
        table(ids) (10, r), float32, from the shards of both ranks
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        config: TableConfig,
        seed: int,
        device: torch.device | str,
        filled: bool = True,
        beside: HostNeeds | None = None,
    ):
        """Allocates this rank's shard.

        Rows start normal with std config.init_std, drawn from (seed, stored row) alone, so that any
        number of ranks starts from the same table.

        Args:
            rows: number of embeddings.
            dim: r.
            config: the table's settings.
            seed: of the rows' first vectors.
            device: where the table is trained.
            filled: False where all rows are read from a checkpoint next: they are not drawn, and
                cannot be looked up before.
            beside: what the host has to have room for besides.

        Raises ValueError where FBGEMM lacks the optimizer on this device, a rank would hold no row,
        the ranks cannot be cut into groups, or the rows fit nowhere.
        """
        ranks = dist.get_world_size()
        size = count_ranks_of_group(config, ranks)
        rows_of_rank = -(-rows // size)
        # TorchRec cuts in equal parts, rounded up, and fails on an empty one. The last is the
        # smallest, and its replicas answer for a part of it each.
        if rows - rows_of_rank * (size - 1) < ranks // size:
            raise ValueError(
                f"a table of {rows} rows leaves some of {ranks} ranks without one: use fewer ranks"
            )
        self.rows = rows
        self.dim = dim
        self.device = torch.device(device)
        self.scatter = RowScatter(rows)
        params = fused_params(config, self.device.type)
        self.capacity = plan_capacity(
            config,
            optimizer_name(config),
            rows_of_rank,
            dim,
            free_room(self.device),
            beside or HostNeeds(),
            copies=ranks // size,
        )
        self.groups = build_groups(size)
        self._parallel = self._build_sharded(config, params)
        self._collection = self._parallel.module["m"]
        self._looked_up: _LookUp | None = None
        self._communication = config.communication
        self._prepare_copies()
        self.reset(config.init_std, seed)
        if filled:
            self.fill()

    def _build_sharded(
        self, config: TableConfig, params: dict[str, Any]
    ) -> DistributedModelParallel:
        """TorchRec's sharded module. params: of the fused optimizer."""
        ranks = self.groups.size
        table_config = EmbeddingConfig(
            name=_TABLE,
            embedding_dim=self.dim,
            num_embeddings=self.rows,
            feature_names=[_FEATURE],
            init_fn=_leave_undrawn,
        )
        meta = torch.device("meta")
        collection = EmbeddingCollection(tables=[table_config], device=meta)
        codecs = None
        if ranks > 1:
            codecs = communication_codecs(config.communication, self.dim)
        sharder = EmbeddingCollectionSharder(
            fused_params=params, qcomm_codecs_registry=codecs
        )
        plan = sharding_plan(
            collection,
            sharder,
            config.cache_share if self.capacity.cached else None,
            ranks,
            count_devices_of_host(self.device),
            self.device.type,
            self.groups.first_rank,
        )
        with TableMemory():
            return DistributedModelParallel(
                nn.ModuleDict({"m": collection}),
                env=ShardingEnv.from_process_group(self.groups.within),
                device=self.device,
                plan=ShardingPlan({"m": plan}),
                sharders=[sharder],
                init_data_parallel=False,
            )

    def _prepare_copies(self) -> None:
        """Has FBGEMM's update left to `update`, where the table has copies."""
        self._leaf: Tensor | None = None
        if self.groups.copies > 1:
            self._local_count = len(self.local_rows()[1]["weight"])
            lookup = self._collection._lookups[0]
            lookup.register_forward_hook(self._cut_off)

    def reset(self, init_std: float, seed: int) -> None:
        """Gives up what is in the table, for other rows to be read into it.

        Rows that are new are drawn from `seed` with `init_std`.
        """
        self._init_std = init_std
        self._seed = seed
        self._filled = False

    def fill(self, index: np.ndarray | None = None) -> None:
        """Draws first vectors of this rank's rows, which depend on seed and stored row alone.

        index: those of the shard's rows that get them, int64, rising; None: all. Blocks without any
        of them are not drawn.
        """
        with self.rewritten() as (first, tensors):
            weights = tensors["weight"]
            if index is None:
                end_block = -(-(first + len(weights)) // _INIT_BLOCK)
                blocks = range(first // _INIT_BLOCK, end_block)
            else:
                blocks = np.unique((first + index) // _INIT_BLOCK).tolist()

            def fill_block(block: int) -> None:
                self._fill_block(block, first, weights, index)

            threads = torch.get_num_threads()
            try:
                with ThreadPoolExecutor(
                    _threads(), initializer=torch.set_num_threads, initargs=(1,)
                ) as pool:
                    for _ in pool.map(fill_block, blocks):
                        pass
            finally:
                torch.set_num_threads(threads)

    def _fill_block(
        self, block: int, first: int, weights: Tensor, index: np.ndarray | None
    ) -> None:
        """Fills the shard's rows of a block. first: the shard's first stored row."""
        begin = block * _INIT_BLOCK
        low = max(first, begin)
        high = min(first + len(weights), begin + _INIT_BLOCK)
        block_drawn = _draw_block(block, self.dim, self._init_std, self._seed)
        drawn = block_drawn[low % _INIT_BLOCK :][: high - low]
        if index is None:
            weights[low - first : high - first] = drawn.to(weights)
            return
        bounds = np.searchsorted(index, [low - first, high - first])
        rows = torch.from_numpy(index[slice(*bounds)])
        weights[rows.to(weights.device)] = drawn[rows - (low - first)].to(
            weights
        )

    def __call__(self, ids: Tensor) -> Tensor:
        """The vectors of rows `ids`, as a leaf: (ids, r), float32.

        ids: int64, any number, each rank its own. After the caller's backward, `update` carries the
        leaf's gradient into the table.
        """
        return self.look_up(self.exchange(ids))

    def exchange(self, ids: Tensor) -> "Exchange":
        """Starts to tell the ranks that have the rows `ids` that they are wanted (input dist).

        `look_up` takes what comes of it. In between other rows may be looked up, and all may be
        updated: only ids are on their way. Several exchanges can be on their way at once, as long as
        all ranks start them, send them and look them up in the same order.
        """
        stored = self.scatter.stored(ids.to(self.device))
        bags = count_bags(self.groups.size)
        lengths = bag_lengths(len(stored), bags, self.device)
        # The host knows the count: TorchRec would read it from the device.
        features = KeyedJaggedTensor(
            [_FEATURE],
            stored,
            lengths=lengths,
            stride=len(lengths),
            length_per_key=[len(stored)],
        )
        share = None
        if self.groups.copies > 1 and torch.is_grad_enabled():
            share = self._share
        return Exchange(self._collection, features, share)

    def _share(self, looked_up_N: Tensor) -> SharedRows:
        """Tells replicas which rows of the shard are looked up for a step."""
        return exchange_rows(self.groups, looked_up_N, self._local_count)

    def look_up(self, exchange: "Exchange") -> Tensor:
        """The vectors of the rows whose ids were exchanged, as they are now; else as when called."""
        if not self._filled:
            raise RuntimeError(
                "the item table has no rows yet: fill it or read a checkpoint into it first"
            )
        training = torch.is_grad_enabled()
        updates = self.updates
        context, features = exchange.received()
        has_copies = self.groups.copies > 1
        if training and has_copies and exchange.shared is None:
            raise RuntimeError(
                "the ids were exchanged without gradients: replicas do not know them"
            )
        outputs = self._collection.compute_and_output_dist(context, features)
        vectors = outputs[_FEATURE].values()
        self._looked_up = _LookUp(vectors, exchange.shared, self._leaf)
        self._leaf = None
        if not training or has_copies:
            # FBGEMM counts when it looks up, also where nothing will be updated.
            self.updates = updates
        return vectors.detach().requires_grad_(training)

    def update(self, gradient: Tensor) -> None:
        """One step of the fused optimizer with d loss / d vectors of the last look-up.

        gradient: (ids, r), of a loss whose mean over ranks is the global one (TorchRec divides by
        the number of ranks). Called on all ranks.
        """
        looked_up = cast(_LookUp, self._looked_up)
        looked_up.vectors.backward(gradient)
        self._looked_up = None
        if looked_up.shared is not None:
            gradient_NR = cast(Tensor, cast(Tensor, looked_up.leaf).grad)
            self._update_copies(
                looked_up.shared, gradient_NR.view(-1, self.dim)
            )

    def _cut_off(
        self, _module: nn.Module, _arguments: Any, vectors: Tensor
    ) -> Tensor | None:
        """Ends backward before FBGEMM's update, which is made when all groups' gradients are summed.

        A hook of the look-up, whose vectors it replaces by a leaf; None: they stay.
        """
        if not torch.is_grad_enabled():
            return None
        self._leaf = vectors.detach().requires_grad_()
        return self._leaf

    def _update_copies(self, shared: SharedRows, gradient_NR: Tensor) -> None:
        """The same update on all copies: each row once, with its gradients of all ranks summed."""
        gradient_UR = sum_gradients(
            self.groups,
            shared,
            gradient_NR,
            functools.partial(encode_gradient, self._communication),
        )
        bags = count_bags(self.groups.size)
        lengths = bag_lengths(len(shared.rows_U), bags, self.device)
        offsets = nn.functional.pad(lengths.long().cumsum(0), (1, 0))
        vectors = self._kernel(indices=shared.rows_U, offsets=offsets)
        vectors.backward(gradient_UR)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Takes effect with the next look-up: FBGEMM hands the rate to backward when it looks up."""
        for group in self._parallel.fused_optimizer.param_groups:
            group["lr"] = learning_rate
        # The fused kind of step: hands the rate to FBGEMM, updates nothing.
        self._parallel.fused_optimizer.step()

    def shard(self) -> Shard:
        """This rank's part as it is now: (first stored row, {name: tensor (rows here, …)}).

        Of all ranks together each row once: of rows that replicas hold too, a part. "weight" (rows
        here, r), and what the fused optimizer has of each row ("momentum1", …), if anything. The
        tensors are views, to be read only.
        """
        first, tensors = self.local_rows()
        bounds = self.groups.part_bounds(len(tensors["weight"]))
        low = bounds[self.groups.group]
        high = bounds[self.groups.group + 1]
        part = {}
        for name, tensor in tensors.items():
            part[name] = tensor[low:high]
        return first + low, part

    def local_rows(self) -> Shard:
        """All rows that this rank holds, which its replicas hold too; else as `shard`.

        They are to be written only as `rewritten` has it.
        """
        weight = self._collection.state_dict()[f"embeddings.{_TABLE}.weight"]
        (state,) = self._parallel.fused_optimizer.state_dict()["state"].values()
        (weight_shard, *_) = weight.local_shards()
        tensors = {"weight": weight_shard.tensor}
        for name, tensor in state.items():
            (shard, *_) = tensor.local_shards()
            tensors[name.removeprefix(f"{_TABLE}.")] = shard.tensor
        return weight_shard.metadata.shard_offsets[0], tensors

    @contextlib.contextmanager
    def rewritten(self) -> Iterator[Shard]:
        """What `local_rows` gives, for a `with` in which it is written: on replicas alike."""
        yield self.local_rows()
        # What a device's cache has of the rows is out of date.
        self._kernel.reset_cache_states()
        self._filled = True

    @property
    def updates(self) -> int:
        """How often the fused optimizer has stepped; Adam's bias correction counts it."""
        # `iter` is the same on the device, which would have to be waited for.
        return int(self._kernel.iter_cpu)

    @updates.setter
    def updates(self, count: int) -> None:
        self._kernel.set_optimizer_step(count)
        self._kernel.iter_cpu.fill_(count)

    @property
    def _kernel(self) -> Any:
        """FBGEMM's module that has this rank's rows."""
        (lookup,) = self._collection._lookups
        (embedding,) = lookup._emb_modules
        return embedding.emb_module


@dataclass(frozen=True)
class _LookUp:
    """Vectors whose gradient is awaited.

    Where the table has copies: shared, the rows to be updated, and leaf, the looked-up rows of this
    rank's shard, which get its group's gradients.
    """

    vectors: Tensor
    shared: SharedRows | None
    leaf: Tensor | None


class Exchange:
    """Ids on their way to the ranks that have their rows, in two halves.

    First go the counts, how many ids go where, then the ids themselves. Where the table has copies,
    replicas then tell each other which rows they have been asked for.
    """

    def __init__(
        self,
        collection: Any,
        features: KeyedJaggedTensor,
        share: Callable[[Tensor], SharedRows] | None = None,
    ):
        """collection: TorchRec's sharded EmbeddingCollection.

        share: tells replicas the ids that have come; None: there are none, or no update follows.
        """
        self._context = collection.create_context()
        self._counts = collection.input_dist(self._context, features)
        self._share = share
        self._ids: Any = None
        self._features: Any = None
        self.shared: SharedRows | None = None

    def send(self) -> None:
        """Waits until the host knows how many ids come from where, and sends the ids.

        With copies it also waits for the ids, and sends them on.
        """
        if self._ids is not None:
            return
        self._ids = self._counts.wait()
        if self._share is not None:
            self._features = self._ids.wait()
            self.shared = self._share(self._features[0].values())

    def received(self) -> tuple[Any, Any]:
        """TorchRec's context and the ids that have come, for the stream that is current now."""
        self.send()
        features = self._features
        if features is None:
            features = self._ids.wait()
        sharding_context = self._context.sharding_contexts[0]
        sent = sharding_context.features_before_input_dist
        if sent.device().type == "cuda":
            # They were made on another stream: their memory is not free before this one is done.
            stream = torch.cuda.current_stream()
            self._context.record_stream(stream)
            features.record_stream(stream)
            if self.shared is not None:
                for tensor in self.shared.tensors():
                    tensor.record_stream(stream)
        return self._context, features


def count_bags(ranks: int) -> int:
    """Into how many bags each of so many ranks cuts the ids that it looks up."""
    return min(_BAGS, max(_FEWEST_BAGS, _BAGS_OF_ALL_RANKS // ranks))


def bag_lengths(ids: int, bags: int, device: torch.device) -> Tensor:
    """How many of the ids are in each bag, int32 (bags,): equally many, the first bags one more.

    Five ids in three bags are tensor([2, 2, 1]).
    """
    lengths = torch.full((bags,), ids // bags, dtype=torch.int32, device=device)
    lengths[: ids % bags] += 1
    return lengths


def _leave_undrawn(_weights: Tensor) -> None:
    """What TorchRec is to draw first vectors with: nothing, `ItemTable.fill` draws them."""


def _draw_block(block: int, dim: int, std: float, seed: int) -> Tensor:
    """The first vectors of a block of stored rows, (_INIT_BLOCK, dim)."""
    generator = torch.Generator()
    generator.manual_seed((seed * 0x9E3779B1 + block * 0x85EBCA77 + 1) % 2**63)
    return torch.randn(_INIT_BLOCK, dim, generator=generator).mul_(std)


def _threads() -> int:
    """The cores that this rank has for itself."""
    return max(1, len(os.sched_getaffinity(0)) // count_ranks_of_host())


def sharding_plan(
    collection: EmbeddingCollection,
    sharder: EmbeddingCollectionSharder,
    cache_share: float | None,
    ranks: int,
    local_size: int,
    device_type: str,
    first_rank: int = 0,
) -> EmbeddingModuleShardingPlan:
    """Rows in equal contiguous parts over so many ranks.

    With a cache_share they lie on the hosts, that share cached on the devices. first_rank: of the
    group that shares them.
    """
    kernel = EmbeddingComputeKernel.FUSED
    if cache_share is not None:
        kernel = EmbeddingComputeKernel.FUSED_UVM_CACHING
    plan = construct_module_sharding_plan(
        collection,
        {_TABLE: row_wise(compute_kernel=kernel.value)},
        sharder=sharder,
        world_size=ranks,
        local_size=local_size,
        device_type=device_type,
    )
    if cache_share is not None:
        plan[_TABLE].cache_params = CacheParams(load_factor=cache_share)
    if first_rank:
        _place_in_group(plan[_TABLE], local_size, device_type, first_rank)
    return plan


def _place_in_group(
    table: ParameterSharding, local_size: int, device_type: str, first_rank: int
) -> None:
    """Names the group's ranks as all ranks do, where TorchRec's plan counts them from 0."""
    spec = cast(EnumerableShardingSpec, table.sharding_spec)
    ranks = []
    for number, shard in enumerate(spec.shards):
        rank = first_rank + number
        device = device_type
        if device_type != "cpu":
            device += f":{rank % local_size}"
        shard.placement = _remote_device(f"rank:{rank}/{device}")
        ranks.append(rank)
    table.ranks = ranks
