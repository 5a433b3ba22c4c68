"""Which optimizer trains which parameter; and Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

import itertools
import math
from typing import Any

import torch
import torch.nn as nn

from model import GPT
from robopoet.machine import Machine
from robopoet.training.sharding import from_owners, gather, is_shard, local, to_owners


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About U V' of each matrix U S V', by five Newton-Schulz steps in `dtype`: (n, rows, columns) -> the same.

    Singular values end between 0.7 and 1.2. The coefficients are Jordan's, chosen to grow small values fastest.
    """
    x = matrices.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def share(shapes: list[torch.Size], ranks: int) -> list[int]:
    """The rank that orthogonalises each matrix: costly ones first, each on the rank that has the least to do.

    Graham 1969, "Bounds on Multiprocessing Timing Anomalies".
    """
    costs = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]  # FLOPs of orthogonalize(), / 10
    owners, loads = [0] * len(shapes), [0] * ranks
    for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum: torch.optim.Muon's numbers, but all matrices of one shape at once.

    Each rank orthogonalises its share of the matrices, and all receive the results; of a sharded model, their shards
    of them. It never waits for the device, so
    a CUDA graph can hold it, and like fused AdamW it skips the step if GradScaler found an overflow. dtype: in which
    orthogonalize() computes.
    """

    _step_supports_amp_scaling = True  # GradScaler sets found_inf, a scalar tensor, before step()

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        momentum: float = 0.9,
        rank: int = 0,
        ranks: int = 1,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.rank, self.ranks = dtype, rank, ranks

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient; all ranks call it together."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            owners, sharded = share([p.shape for p in group["params"]], self.ranks), is_shard(group["params"][0])
            shapes: dict[torch.Size, list[list[nn.Parameter]]] = {}  # the matrices of a shape, by owner
            for p, owner in zip(group["params"], owners, strict=True):
                shapes.setdefault(p.shape, [[] for _ in range(self.ranks)])[owner].append(p)
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            lr, momentum, updates = group["lr"], group["momentum"], []
            if found_inf is not None:  # if it is 1, nothing may change
                lr = lr * (1 - found_inf)
            for shape, parts in shapes.items():
                params, counts = list(itertools.chain(*parts)), [len(part) for part in parts]
                grads = [local(p.grad) for p in params]
                moments = [local(self.state[p]["momentum_buffer"]) for p in params]
                if found_inf is not None:
                    grads = [torch.where(found_inf > 0, m, g) for m, g in zip(moments, grads, strict=True)]
                torch._foreach_lerp_(moments, grads, 1 - momentum)
                mine = slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))
                if sharded:
                    ahead = torch.stack(torch._foreach_lerp(grads, moments, momentum)).to(self.dtype)
                    ahead = to_owners(ahead, shape[0], counts, self.rank)
                elif parts[self.rank]:
                    ahead = torch.stack(torch._foreach_lerp(grads[mine], moments[mine], momentum))
                updates.append(orthogonalize(ahead, self.dtype) if parts[self.rank] else None)
            for (shape, parts), update in zip(shapes.items(), updates, strict=True):
                params, counts = [local(p) for p in itertools.chain(*parts)], [len(part) for part in parts]
                if self.ranks > 1:  # only now, so that ranks wait for each other once
                    if update is None:
                        update = torch.empty(0, *shape, dtype=self.dtype, device=params[0].device)
                    update = (from_owners if sharded else gather)(update, counts, self.rank)
                update = update.to(params[0].dtype) * (-lr * math.sqrt(max(1, shape[0] / shape[1])))
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, list(update))


def configure_optimizers(cfg: Any, model: GPT, machine: Machine, recorded: bool = False) -> list[torch.optim.Optimizer]:
    """AdamW on every parameter; or Muon on the matrices of the blocks, and AdamW on the others.

    cfg: a TrainConfig. recorded: steps are captured in a CUDA graph. Matrices and embeddings decay, vectors don't
    (Loshchilov and Hutter 2019, arXiv:1711.05101). Each group keeps its peak rate, "peak_lr", for the schedule.
    """
    hidden = {id(p) for p in model.transformer.h.parameters() if p.dim() >= 2} if cfg.optimizer == "muon" else set()
    others = [p for p in model.parameters() if id(p) not in hidden]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas, fused = (cfg.beta1, cfg.beta2), machine.device.type in ("cpu", "cuda")
    adamw = torch.optim.AdamW(groups, cfg.peak_lr, betas, fused=fused, capturable=recorded)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if hidden:
        matrices = [p for p in model.parameters() if id(p) in hidden]
        dtype = torch.float32 if machine.dtype is torch.float16 else machine.dtype  # float16 would overflow
        ranks = {"rank": machine.rank, "ranks": machine.world_size}
        decay = cfg.weight_decay if cfg.muon_weight_decay < 0 else cfg.muon_weight_decay
        optimizers.append(Muon(matrices, cfg.muon_learning_rate, decay, dtype, **ranks))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def state_shapes(optimizer: torch.optim.Optimizer) -> dict[str, torch.Size]:
    """Of what `optimizer`, Muon or AdamW, keeps once it has stepped: "3.exp_avg", of its parameter 3, -> shape."""
    names = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq", "step")
    params = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    return {f"{i}.{name}": p.shape if name != "step" else torch.Size() for i, p in enumerate(params) for name in names}


def set_rates(optimizers: list[torch.optim.Optimizer], scale: float | torch.Tensor) -> None:
    """Set each group's learning rate to its peak times `scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale


def unscale(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """Divide gradients by the loss scale; if those of one optimizer overflowed, all will skip the step."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if scaler.is_enabled():
        flags = [flag for optimizer in optimizers for flag in scaler._found_inf_per_device(optimizer).values()]
        overflow = torch.stack(flags).amax()
        for flag in flags:
            flag.copy_(overflow)


def step_all(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, bad: torch.Tensor) -> None:
    """Step every optimizer, unless `bad`, a scalar on the device, is 1; then clear the gradients."""
    for optimizer in optimizers:
        reads_found_inf = getattr(optimizer, "_step_supports_amp_scaling", False)  # fused AdamW and Muon do
        if reads_found_inf and not scaler.is_enabled():
            optimizer.found_inf = bad  # read on the device: nothing waits
        if reads_found_inf or not bad:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
