"""Share a training between processes: whole networks on each (DDP), or trained ones split over all (`fully_shard`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from latentsmith.data.loader import Record, to_device
from latentsmith.files.errors import BadInput

if TYPE_CHECKING:
    from lightning.fabric import Fabric

T = TypeVar("T")


def strategy(name: str, processes: int) -> Any:
    """Return Fabric's strategy for trainer.strategy.

    model_parallel: every process has a share of the data, the weights and the optimizer's state. ddp: a share of the
    data and the whole of both.
    """
    from lightning.fabric.strategies.ddp import DDPStrategy
    from lightning.fabric.strategies.model_parallel import ModelParallelStrategy

    if name == "model_parallel":
        return ModelParallelStrategy(shard_trained, data_parallel_size=processes, tensor_parallel_size=1)
    return DDPStrategy(broadcast_buffers=False) if processes > 1 else "auto"


def shard_trained(objective: Any, mesh: Any) -> Any:
    """Split the trained networks of an objective over the processes of a mesh, block by block; move the others."""
    from torch.distributed.fsdp import fully_shard

    for name, network in objective.networks.items():
        if name not in objective.trained:
            network.to(mesh.device_type)
            continue
        repeated: Any = getattr(network, "repeated_blocks", list)
        for part in (*repeated(), network):
            fully_shard(part, mesh=mesh["data_parallel"])
    for name, buffer in objective.named_buffers(recurse=False):
        setattr(objective, name, buffer.to(mesh.device_type))
    return objective


def fix_bucket_order(fabric: Fabric, model: nn.Module, batches: Iterator[Record]) -> Iterator[Record]:
    """Let DDP arrange its gradient buckets before the first step; return the same batches.

    DDP arranges them anew after its first backward pass, in the order in which gradients came. A resumed run would
    then sum its first step in another order than the run that was never stopped.
    """
    from lightning.fabric.strategies.ddp import DDPStrategy

    if not isinstance(fabric.strategy, DDPStrategy):
        return batches
    first = next(batches)
    loss, _ = model(to_device(first, fabric.device))
    fabric.backward(loss)
    model.zero_grad()
    return chain([first], batches)


def on_first_process(fabric: Fabric, function: Callable[[], T]) -> T:
    """Call a function in the first process, and return its result, or raise its BadInput, in all."""
    outcome: tuple[Any, BadInput | None] = (None, None)
    if fabric.is_global_zero:
        try:
            outcome = (function(), None)
        except BadInput as error:
            outcome = (None, error)
    result: T
    result, failure = fabric.broadcast(outcome)
    if failure is not None:
        raise failure
    return result


def largest(fabric: Fabric, number: int) -> int:
    """Return the largest of all processes' numbers; all have to ask."""
    if fabric.world_size == 1:
        return number
    found: Any = fabric.all_reduce(torch.tensor(number, device=fabric.device), reduce_op="max")
    return int(found)


def leave_group() -> None:
    """End the process group, and give gloo's threads time to drop the tensors of their last work.

    They need the interpreter for it, and a thread that asks for it while the process ends aborts the process.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(0.2)  # without the interpreter's lock


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or all its shards together; then every process has to ask."""
    shards: Any = tensor
    return shards.full_tensor() if is_sharded(tensor) else tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or this process's shard of it, in the same memory."""
    shards: Any = tensor
    return shards.to_local() if is_sharded(tensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, split as `like` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    on_device = tensor.to(sharded.device_mesh.device_type)
    return distribute_tensor(on_device, sharded.device_mesh, sharded.placements, src_data_rank=None)


@torch.no_grad()
def copy_whole(into: Tensor, tensor: Tensor) -> None:
    """Fill a tensor, sharded or not, with the numbers of a whole one."""
    into.copy_(split_like(tensor, into))
