"""Which optimizer trains which parameter; and Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

import math
from typing import Any

import torch
import torch.nn as nn

from model import GPT
from robopoet.machine import Machine
from robopoet.training.sharding import full_tensor, shard_like


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


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum: torch.optim.Muon's numbers, but all matrices of one shape at once.

    It never waits for the device, so a CUDA graph can hold it, and like fused AdamW it skips the step if GradScaler
    found an overflow. dtype: in which orthogonalize() computes.
    """

    _step_supports_amp_scaling = True  # GradScaler sets found_inf, a scalar tensor, before step()

    def __init__(
        self, params: list[nn.Parameter], lr: float, weight_decay: float, dtype: torch.dtype, momentum: float = 0.9
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for (rows, columns), params in shapes.items():
                moments = [self.state[p]["momentum_buffer"] for p in params]
                lr, grads = group["lr"], torch.stack([p.grad for p in params])
                if found_inf is not None:  # if it is 1, nothing may change
                    lr, grads = lr * (1 - found_inf), torch.where(found_inf > 0, torch.stack(moments), grads)
                torch._foreach_lerp_(moments, list(grads), 1 - group["momentum"])
                ahead = grads.lerp(torch.stack(moments), group["momentum"])
                update = shard_like(orthogonalize(full_tensor(ahead), self.dtype), ahead)  # not U V' of a shard
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, list(update.to(grads.dtype) * (-lr * math.sqrt(max(1, rows / columns)))))


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
        optimizers.append(Muon(matrices, cfg.muon_learning_rate, cfg.weight_decay, dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


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
