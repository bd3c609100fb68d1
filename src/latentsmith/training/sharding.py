"""How processes share a training: whole networks on each (DDP), or trained ones split over all (`fully_shard`)."""

from typing import Any

import torch
from torch import Tensor, nn


def strategy(name: str, processes: int) -> Any:
    """Lightning's strategy for trainer.strategy.

    model_parallel: every process a share of the data, of the weights and of the optimizer's state. ddp: the whole of
    both; it may not lay its buckets of gradients out anew after the first step, as it does otherwise, since a resumed
    run would then add them up in another order.
    """
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    if name == "model_parallel":
        return ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    return DDPStrategy(find_unused_parameters=True) if processes > 1 else name


def shard(part: nn.Module, mesh: Any) -> None:
    """Split the parameters of a network over the processes of `mesh`, block by block if it has `repeated_blocks`."""
    from torch.distributed.fsdp import fully_shard

    repeated: Any = getattr(part, "repeated_blocks", list)
    for block in repeated():
        fully_shard(block, mesh=mesh)
    fully_shard(part, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all shards of it together; then every process has to ask."""
    shards: Any = tensor
    return shards.full_tensor() if is_sharded(tensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, split as `like` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like
    on_device = tensor.to(placed.device_mesh.device_type)
    return distribute_tensor(on_device, placed.device_mesh, placed.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(into: Tensor, tensor: Tensor) -> None:
    """Fill a tensor, sharded or not, with the numbers of a whole one."""
    into.copy_(split_like(tensor, into))
