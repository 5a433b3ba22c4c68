"""Training in less memory: activations computed again (Chen et al. 2016, arXiv:1604.06174), and shards.

FSDP2 (Zhao et al. 2023, arXiv:2304.11277) shards weights, gradients and optimizer states among ranks.
"""

import functools
import warnings

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from model import GPT
from robopoet.machine import Machine


def recompute_blocks(model: GPT) -> None:
    """Have each block keep only its input, (B, T, C), and compute the rest again in the backward pass."""
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


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


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of which this rank holds a shard."""
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard, its rows of the full tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gather(own: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
    """The matrices of all ranks, in the ranks' order: this rank's, (counts[rank], ...), to (sum of counts, ...)."""
    padded = own.new_empty(len(counts), max(counts), *own.shape[1:])
    padded[rank, : len(own)] = own
    dist.all_gather(list(padded), padded[rank])
    return torch.cat([part[:count] for part, count in zip(padded, counts, strict=True)])


def to_owners(shards: torch.Tensor, n_rows: int, counts: list[int], rank: int) -> torch.Tensor:
    """Each rank's rows of n matrices, to all n_rows rows of the matrices that this rank owns.

    shards: (n, rows, columns), in their owners' order. counts: how many matrices each rank owns; n in all. Returns
    (counts[rank], n_rows, columns).
    """
    count, columns, rows = counts[rank], shards.shape[2], rows_of_ranks(n_rows, len(counts))
    sent = [number * shards[0].numel() for number in counts]
    received = shards.new_empty(count * n_rows * columns)
    lengths = [count * number * columns for number in rows]
    dist.all_to_all_single(received, shards.flatten(), lengths, sent)
    parts = zip(received.split(lengths), rows, strict=True)
    return torch.cat([part.view(count, number, columns) for part, number in parts], dim=1)


def from_owners(own: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
    """The way back: (counts[rank], n_rows, columns) to (n, rows, columns)."""
    rows, columns = rows_of_ranks(own.shape[1], len(counts)), own.shape[2]
    parts = [part.flatten() for part in own.split(rows, dim=1)]
    size = rows[rank] * columns
    received = own.new_empty(sum(counts) * size)
    sent = [part.numel() for part in parts]
    dist.all_to_all_single(received, torch.cat(parts), [number * size for number in counts], sent)
    return received.view(sum(counts), rows[rank], columns)


def rows_of_ranks(n_rows: int, ranks: int) -> list[int]:
    """How many of a tensor's rows FSDP2 gives to each rank: as many as to the others, but for the last ones."""
    each = -(-n_rows // ranks)
    return [min(max(n_rows - rank * each, 0), each) for rank in range(ranks)]


def shard_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that every rank has in full, if `other` is a shard of the same full shape."""
    if hasattr(other, "full_tensor") and tensor.shape == other.shape:
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(other, DTensor)
        return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return tensor
