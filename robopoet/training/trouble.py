"""A loss or gradient that is not finite: noted on the device, so that no step waits, and reported with its rows."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from robopoet.errors import DivergedError
from robopoet.machine import Machine
from robopoet.text.windows import TrainWindows


class Trouble:
    """The first step of a run whose loss or gradient was not finite on any rank.

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
