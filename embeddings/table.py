"""The item matrix M (section 4.1) as one row-wise sharded TorchRec table with a fused optimizer."""

import logging

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel, ShardingEnv
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan

from embeddings.optimizers import fused_params
from embeddings.rows import RowScatter

logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # TorchRec calls what torch has renamed

_TABLE, _FEATURE = "item_table", "item"
_INIT_BLOCK = 4096  # rows drawn from one generator: a shard may begin anywhere, so blocks are drawn whole and cut


class ItemTable:
    """M, shared by all ranks of the default process group; every method is called on all ranks.

    Rows are named as in the dataset; where they are stored is the table's own business (RowScatter). It stays outside
    the module that DeepSpeed gets: DeepSpeed would broadcast rank 0's shard over the others'.
    """

    def __init__(self, rows, dim, config, seed, device):
        """rows: number of embeddings; dim: r. Rows start normal with std config.init_std, drawn from (seed, stored row)
        alone, so that any number of ranks starts from the same table.

        Raises ValueError where FBGEMM lacks the optimizer on this device, or a rank would hold no row.
        """
        ranks = dist.get_world_size()
        if -(-rows // ranks) * (ranks - 1) >= rows:  # TorchRec cuts in equal parts, rounded up, and fails on an empty one
            raise ValueError(f"a table of {rows} rows leaves some of {ranks} ranks without one: use fewer ranks")
        self.rows, self.dim, self.device = rows, dim, torch.device(device)
        self.scatter = RowScatter(rows)
        collection = EmbeddingCollection(
            tables=[EmbeddingConfig(name=_TABLE, embedding_dim=dim, num_embeddings=rows, feature_names=[_FEATURE])],
            device=torch.device("meta"),
        )
        sharder = EmbeddingCollectionSharder(fused_params=fused_params(config, self.device.type))
        plan = construct_module_sharding_plan(
            collection,
            {_TABLE: row_wise(compute_kernel=EmbeddingComputeKernel.FUSED.value)},
            sharder=sharder,
            world_size=ranks,
            local_size=ranks,
            device_type=self.device.type,
        )
        self._parallel = DistributedModelParallel(
            nn.ModuleDict({"m": collection}),
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=self.device,
            plan=ShardingPlan({"m": plan}),
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._collection = self._parallel.module["m"]
        self._fill(config.init_std, seed)

    def __call__(self, ids):
        """The vectors of rows `ids` (int64, any number, each rank its own), as a leaf: (ids, r), float32.

        After the caller's backward, `update` carries the leaf's gradient into the table.
        """
        stored = self.scatter.stored(ids.to(self.device))
        length = torch.tensor([len(stored)], device=self.device)
        updates = None if torch.is_grad_enabled() else self.updates
        self._looked_up = self._collection(KeyedJaggedTensor([_FEATURE], stored, lengths=length))[_FEATURE].values()
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
        """This rank's part: (first stored row, {name: tensor (rows here, …)}), the tensors as views that may be written.

        "weight" (rows here, r), and what the fused optimizer keeps of each row ("momentum1", …), if anything.
        """
        weight = self._collection.state_dict()[f"embeddings.{_TABLE}.weight"]
        (state,) = self._parallel.fused_optimizer.state_dict()["state"].values()
        named = {"weight": weight} | {name.removeprefix(f"{_TABLE}."): tensor for name, tensor in state.items()}
        shards = {name: tensor.local_shards()[0] for name, tensor in named.items()}
        return shards["weight"].metadata.shard_offsets[0], {name: shard.tensor for name, shard in shards.items()}

    @property
    def updates(self):
        """How often the fused optimizer has stepped; Adam's bias correction counts it."""
        return int(self._kernel.iter.item())

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

    def _fill(self, std, seed):
        first, tensors = self.shard()
        weights = tensors["weight"]
        generator = torch.Generator()
        for block in range(first // _INIT_BLOCK, -(-(first + len(weights)) // _INIT_BLOCK)):
            generator.manual_seed((seed * 0x9E3779B1 + block * 0x85EBCA77 + 1) % 2**63)
            drawn = torch.randn(_INIT_BLOCK, self.dim, generator=generator).mul_(std)
            low, high = max(first, block * _INIT_BLOCK), min(first + len(weights), (block + 1) * _INIT_BLOCK)
            weights[low - first : high - first] = drawn[low % _INIT_BLOCK :][: high - low].to(weights)
