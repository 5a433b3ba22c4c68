"""Which parameter is trained by which optimizer: AdamW on all, or Muon on the blocks' matrices and AdamW on the rest.

Loshchilov and Hutter 2019, arXiv:1711.05101; Jordan et al. 2024, kellerjordan.github.io/posts/muon.
"""

import math

import torch
import torch.nn as nn


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that ranks share out among themselves, put together on each of them, who call together; others as is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor has; its import takes 0.5 s


def shared_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """This rank's share of `tensor`, which every rank has whole, if `other` is shared out and of its shape."""
    if hasattr(other, "full_tensor") and tensor.shape == other.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return tensor


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """U V' of each matrix U S V', roughly, by five Newton-Schulz steps: (n, rows, columns) -> the same, in `dtype`.

    Singular values end between 0.7 and 1.2. The coefficients are Jordan's, chosen for the steepest start.
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
    """Nesterov momentum, orthogonalised; the same numbers as torch.optim.Muon, with all matrices of a shape at once.

    It never waits for the device, so that a CUDA graph can hold it, and it heeds GradScaler's verdict as fused AdamW
    does. dtype: of the orthogonalisation's products.
    """

    _step_supports_amp_scaling = True  # GradScaler sets found_inf, a scalar tensor, before it calls step

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
                if found_inf is not None:  # then nothing may change
                    lr, grads = lr * (1 - found_inf), torch.where(found_inf > 0, torch.stack(moments), grads)
                torch._foreach_lerp_(moments, list(grads), 1 - group["momentum"])
                ahead = grads.lerp(torch.stack(moments), group["momentum"])
                update = shared_as(orthogonalize(whole(ahead), self.dtype), ahead)  # only whole matrices have a U V'
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, list(update.to(grads.dtype) * (-lr * math.sqrt(max(1, rows / columns)))))


def configure_optimizers(
    model: nn.Module,
    kind: str,
    learning_rate: float,
    muon_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    dtype: torch.dtype,
    recorded: bool = False,
) -> list[torch.optim.Optimizer]:
    """AdamW alone, or AdamW and Muon; every parameter of the GPT is in one group of one of them.

    kind: "adamw" or "muon". Matrices and embeddings decay, vectors don't. Each group keeps its rate as "peak_lr".
    dtype: of the run's matrix products, which Muon's are too, float16 excepted. recorded: as part of a CUDA graph.
    """
    hidden = {id(p) for p in model.transformer.h.parameters() if p.dim() >= 2} if kind == "muon" else set()
    adamw = [p for p in model.parameters() if id(p) not in hidden]
    groups = [
        {"params": [p for p in adamw if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in adamw if p.dim() < 2], "weight_decay": 0.0},
    ]
    device = next(model.parameters()).device.type
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, learning_rate, betas, fused=device in ("cpu", "cuda"), capturable=recorded)
    ]
    if hidden:
        matrices = [p for p in model.parameters() if id(p) in hidden]
        muon_dtype = torch.float32 if dtype is torch.float16 else dtype
        optimizers.append(Muon(matrices, muon_learning_rate, weight_decay, muon_dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
