"""From gradients to weights: which optimizer trains which parameter, steps that must not count, and the average.

Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from model import GPT
from robopoet.errors import CheckpointError, DivergedError
from robopoet.machine import Machine
from robopoet.text.windows import TrainWindows
from robopoet.training.memory import from_owners, full_tensor, gather, is_shard, local, shard_like, to_owners
from robopoet.weights import checkpoint
from robopoet.weights.header import SavedOptimizer


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


def orthogonalize_all(stacks: list[torch.Tensor], dtype: torch.dtype, turn: bool) -> list[torch.Tensor]:
    """orthogonalize() for stacks of several shapes, which may be empty: (n, rows, columns) each -> the same shapes.

    turn: whether the tall matrices of a shape go together with the wide ones of its transpose.
    """
    updates = list(stacks)
    together: dict[int | tuple[int, ...], list[int]] = {}
    for i, (n, *shape) in enumerate(x.shape for x in stacks):
        if n:
            together.setdefault(tuple(sorted(shape)) if turn else i, []).append(i)
    for places in together.values():
        if len(places) == 1:
            updates[places[0]] = orthogonalize(stacks[places[0]], dtype)
            continue
        is_tall = [stacks[i].shape[1] > stacks[i].shape[2] for i in places]
        wide = [stacks[i].mT if tall else stacks[i] for i, tall in zip(places, is_tall, strict=True)]
        done = orthogonalize(torch.cat(wide), dtype).split([len(x) for x in wide])
        for i, tall, update in zip(places, is_tall, done, strict=True):
            updates[i] = update.mT if tall else update
    return updates


def assign_owners(shapes: list[torch.Size], ranks: int) -> list[int]:
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

    Each rank orthogonalises its share of the matrices, and all receive the results, or their shards of them if the
    model is sharded. It never waits for the device, so a CUDA graph can hold it, and like fused AdamW it skips the step
    if GradScaler found an overflow. dtype: in which orthogonalize() computes.
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
    def step(self) -> None:  # pyrefly: ignore[bad-override]  # it takes no closure
        """Update every parameter from its gradient; all ranks call it together."""
        found_inf = getattr(self, "found_inf", None)
        is_bad = None if found_inf is None else found_inf > 0  # then nothing may change
        for group in self.param_groups:
            owners = assign_owners([p.shape for p in group["params"]], self.ranks)
            sharded = is_shard(group["params"][0])
            shapes: dict[torch.Size, list[list[nn.Parameter]]] = {}  # the matrices of a shape, by owner
            for p, owner in zip(group["params"], owners, strict=True):
                shapes.setdefault(p.shape, [[] for _ in range(self.ranks)])[owner].append(p)
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            lr = group["lr"] if found_inf is None else group["lr"] * (1 - found_inf)
            ahead = [self._ahead(parts, group["momentum"], is_bad) for parts in shapes.values()]
            on_gpu = group["params"][0].is_cuda  # fewer launches; a CPU would have other bits and nothing to gain
            updates = orthogonalize_all(ahead, self.dtype, turn=on_gpu)
            weights = {shape: [local(p) for p in itertools.chain(*parts)] for shape, parts in shapes.items()}
            torch._foreach_mul_(list(itertools.chain(*weights.values())), 1 - lr * group["weight_decay"])
            back = -lr
            for (shape, parts), update in zip(shapes.items(), updates, strict=True):
                if self.ranks > 1:  # only now, so that ranks wait for each other once
                    update = (from_owners if sharded else gather)(update, [len(part) for part in parts], self.rank)
                # contiguous as the weights are, so that a GPU adds all in one launch
                scaled = torch.empty(update.shape, dtype=weights[shape][0].dtype, device=update.device)
                torch.mul(update.to(scaled.dtype), back * math.sqrt(max(1, shape[0] / shape[1])), out=scaled)
                torch._foreach_add_(weights[shape], list(scaled))

    def _ahead(self, parts: list[list[nn.Parameter]], momentum: float, is_bad: torch.Tensor | None) -> torch.Tensor:
        """Update the momenta of all matrices of a shape; returns the gradients mixed with them, of this rank's ones.

        parts: the matrices, by owner. Returns (n, rows, columns).
        """
        params, counts = list(itertools.chain(*parts)), [len(part) for part in parts]
        moments = [local(self.state[p]["momentum_buffer"]) for p in params]
        grads = torch.stack([local(p.grad) for p in params if p.grad is not None])
        if is_bad is not None:
            torch.where(is_bad, torch.stack(moments), grads, out=grads)
        torch._foreach_lerp_(moments, list(grads), 1 - momentum)
        if sharded := is_shard(params[0]):
            mine = slice(None)
        else:
            mine = slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))
        grads, moments = grads[mine], moments[mine]
        if moments:
            torch._foreach_lerp_(list(grads), moments, momentum)
        grads = grads.to(self.dtype)
        return to_owners(grads, params[0].shape[0], counts, self.rank) if sharded else grads


def configure_optimizers(
    model: GPT,
    machine: Machine,
    kind: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    muon_lr: float,
    muon_weight_decay: float,
    recorded: bool = False,
) -> list[torch.optim.Optimizer]:
    """AdamW or Adafactor on every parameter (kind), or Muon on the matrices of the blocks and AdamW on the others.

    Adafactor keeps a number for each row and column, not two for each weight, and its rate is a share of a tensor's
    root mean square (Shazeer and Stern 2018, arXiv:1804.04235). lr, muon_lr: the peak learning rates, which each group
    keeps as "peak_lr" for the schedule. recorded: steps are captured in a CUDA graph. Matrices and embeddings decay,
    vectors don't (Loshchilov and Hutter 2019, arXiv:1711.05101).
    """
    hidden = {id(p) for p in model.transformer.h.parameters() if p.dim() >= 2} if kind == "muon" else set()
    others = [p for p in model.parameters() if id(p) not in hidden]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if kind == "adafactor":
        # PyTorch's own bound on a row's mean square, 1e-7, is above that of a large model's gradients
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adafactor(groups, lr, eps=(1e-15, 1e-3))]
    else:
        fused = machine.device.type in ("cpu", "cuda")
        optimizers = [torch.optim.AdamW(groups, lr, betas, fused=fused, capturable=recorded)]
    if hidden:
        matrices = [p for p in model.parameters() if id(p) in hidden]
        dtype = torch.float32 if machine.dtype is torch.float16 else machine.dtype  # float16 would overflow
        ranks = {"rank": machine.rank, "ranks": machine.world_size}
        optimizers.append(Muon(matrices, muon_lr, muon_weight_decay, dtype, **ranks))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def state_shapes(optimizer: torch.optim.Optimizer) -> dict[str, torch.Size]:
    """The shapes of what an optimizer of ours keeps once it has stepped: "3.exp_avg" is its parameter 3's."""

    def kept(shape: torch.Size) -> dict[str, torch.Size]:
        if isinstance(optimizer, Muon):
            return {"momentum_buffer": shape}
        if isinstance(optimizer, torch.optim.AdamW):
            return {"exp_avg": shape, "exp_avg_sq": shape, "step": torch.Size()}
        if len(shape) < 2:
            return {"variance": shape, "step": torch.Size()}
        return {"row_var": torch.Size([shape[0], 1]), "col_var": torch.Size([1, shape[1]]), "step": torch.Size()}

    params = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    return {f"{i}.{name}": shape for i, p in enumerate(params) for name, shape in kept(p.shape).items()}


def restore_states(optimizer: torch.optim.Optimizer, saved: SavedOptimizer, what: str, path: Path, steps: int) -> None:
    """Give `optimizer` what it kept of each parameter.

    Its settings stay: rates and decay, as the config may have changed, and `fused`, which places the states.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [list(group.params) for group in saved.param_groups] != [group["params"] for group in groups]:
        raise CheckpointError(f"{path}: {what} are not of this model's parameters")
    kept = {f"{i}.{name}": tensor for i, state in saved.state.items() for name, tensor in state.items()}
    checkpoint.check_tensors(kept, state_shapes(optimizer), what, path, (torch.float32,))
    for name, tensor in kept.items():
        kind = name.split(".")[1]
        least = -math.inf if kind in ("exp_avg", "momentum_buffer") else 0
        most = steps if kind == "step" else math.inf
        if not ((tensor >= least) & (tensor <= most)).all():
            raise CheckpointError(f"{path}: {what}: {name} is below {least} or above {most}")
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    states = {  # contiguous: fused AdamW assumes it
        i: {name: shard_like(tensor.contiguous(), params[i]) for name, tensor in state.items()}
        for i, state in saved.state.items()
    }
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def unscale(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """Divide gradients by the loss scale; if those of one optimizer overflowed, all will skip the step."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    if scaler.is_enabled():
        flags = [flag for optimizer in optimizers for flag in scaler._found_inf_per_device(optimizer).values()]
        overflow = torch.stack(flags).amax()
        for flag in flags:
            flag.copy_(overflow)


def clip(model: GPT, most: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most `most` (0: no clipping); returns the norm before, a scalar."""
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), most or math.inf))


def step_all(optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, bad: torch.Tensor) -> None:
    """Step every optimizer, unless `bad`, a scalar on the device, is 1; then clear the gradients."""
    for optimizer in optimizers:
        reads_found_inf = getattr(optimizer, "_step_supports_amp_scaling", False)  # fused AdamW and Muon do
        if reads_found_inf and not scaler.is_enabled():
            vars(optimizer)["found_inf"] = bad  # read on the device: nothing waits
        if reads_found_inf or not bad:
            scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()


class Trouble:
    """The first step of a run whose loss or gradient was not finite on any rank: noted on the device, so no step waits.

    first: (2,) int64 on the device, that step (-1: none), and whether this rank's loss was not finite in it.
    """

    def __init__(self, machine: Machine):
        self.machine, self.first = machine, torch.tensor([-1, 0], device=machine.device)

    def note(self, step: torch.Tensor, loss: torch.Tensor, norm: torch.Tensor, is_scaled: bool) -> torch.Tensor:
        """1.0 if a rank's loss or the gradient norm of this step is not finite, else 0.0; all scalars on the device.

        is_scaled: the loss alone counts, because in float16 gradients overflow now and then, as GradScaler expects.
        """
        finite = loss.isfinite() if is_scaled else loss.isfinite() & norm.isfinite()
        bad = (~finite).float()
        if self.machine.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        here = torch.stack([step, ~loss.isfinite()])
        self.first.copy_(torch.where((self.first[0] < 0) & (bad > 0), here, self.first))
        return bad

    def check(self, windows: TrainWindows, rows_of: Callable[[int, int], tuple[int, int]], out_dir: str) -> None:
        """Raise DivergedError if there was such a step: it names the ranks whose loss was not finite, and their rows.

        rows_of: (step, rank) -> first row, number of rows. Waits for the device.
        """
        step, here = self.first.tolist()
        if step < 0:
            return
        votes = torch.zeros(self.machine.world_size)
        votes[self.machine.rank] = here
        ranks = [rank for rank, vote in enumerate(self.machine.all_reduce(votes).tolist()) if vote]
        lines = [f"step {step + 1}: the {'loss' if ranks else 'gradient'} is not finite; nothing was updated by it"]
        for rank in ranks or range(self.machine.world_size):
            first, count = rows_of(step, rank)
            starts, _ = windows.rows(first, count)
            place = f"rows {first} to {first + count - 1}, tokens {starts.tolist()} of {windows.split.path}"
            lines.append(f"rank {rank}: {place}")
        lines.append(f"a lower learning_rate may help; {out_dir} keeps what was saved before")
        raise DivergedError("\n  ".join(lines))


class Average:
    """An exponential moving average of weights, which predicts better than the last ones (Polyak and Juditsky 1992).

    If the model is sharded, a rank averages its own shards. decay: what a step keeps of the average; early, at step n,
    (1 + n) / (10 + n) if that is less, to forget the first weights.
    """

    def __init__(self, model: GPT, decay: float):
        self.model, self.decay = model, decay
        self.params: list[torch.Tensor] = list(model.parameters())
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`."""
        kept = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), self.params, 1 - kept)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average as its weights, and its own again afterwards."""
        own = [p.detach().clone() for p in self.params]
        self._copy(list(self.weights.values()))
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: list[torch.Tensor]) -> None:
        if reshard := getattr(self.model, "reshard", None):  # FSDP2 would keep the last forward pass's full embeddings
            reshard()
        for p, weight in zip(self.params, weights, strict=True):
            p.copy_(weight)

    @torch.no_grad()
    def load(self, saved: dict[str, torch.Tensor]) -> None:
        """Take a checkpoint's average, which is not sharded; raises KeyError or RuntimeError if it does not fit."""
        for name, weight in self.weights.items():
            weight.copy_(shard_like(saved[name], weight))
