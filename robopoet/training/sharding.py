"""Weights, gradients and optimizer states sharded among ranks: FSDP2 (Zhao et al. 2023, arXiv:2304.11277)."""

import warnings

import torch

from model import GPT
from robopoet.machine import Machine


def shard(model: GPT, machine: Machine) -> None:
    """Keep this rank's shard of every parameter, on its device; no device ever holds the full model."""
    from torch.distributed.device_mesh import init_device_mesh  # these two imports take half a second
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # the logits, which nobody writes to
    mesh = init_device_mesh(machine.device.type, (machine.world_size,))
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=mesh)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of which this rank holds a shard; any other tensor as it is. All ranks call it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # importing DTensor takes half a second


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that every rank has in full, if `other` is a shard of the same full shape."""
    if hasattr(other, "full_tensor") and tensor.shape == other.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return tensor
