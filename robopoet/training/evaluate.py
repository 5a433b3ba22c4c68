"""Evaluation: the loss over a split."""

import math
import time
from typing import Any

import torch

from model import GPT
from robopoet.machine import Machine
from robopoet.text.tokenizer import Tokenizer, token_bytes
from robopoet.text.windows import EvalPlan, Split, eval_batches

SHOWN_STYLES = 8  # in a line; a run's metrics.jsonl has the losses of all


@torch.no_grad()
def evaluate(model: GPT, split: Split, tok: Tokenizer, plan: EvalPlan, machine: Machine) -> dict[str, Any]:
    """Loss (nats/token) over a split, its standard error, perplexity, bits per byte, and the loss of each style.

    The ranks share the batches and sum in float64. tok: the tokenizer whose ids the split holds. loss_se: the standard
    error of the mean over windows. seconds: how long the evaluation took.
    """
    start = time.perf_counter()
    model.eval()
    names = list(dict.fromkeys(split.styles))
    style_of = torch.tensor([names.index(style) for style in split.styles])
    lengths = torch.from_numpy(token_bytes(tok)).to(machine.device)
    # for each style: nats, targets, bytes, windows, sum and sum of squares of the windows' mean losses
    sums = torch.zeros(6, len(names), dtype=torch.float64)
    for inputs, targets, span in eval_batches(split, plan, machine.device, machine.rank, machine.world_size):
        with machine.autocast():
            _, losses = model(inputs, targets, reduction="none")
        losses, targets = losses[: len(span)], targets[: len(span)]  # without EvalPlan.even's padding row
        counted = targets >= 0
        size = (lengths[targets.clamp(min=0)] * counted).sum(1)
        nats, count, size = (part.cpu().double() for part in (losses.sum(1), counted.sum(1), size))
        per_row = torch.stack([nats, count, size, torch.ones_like(nats), nats / count, (nats / count) ** 2])
        sums.index_add_(1, style_of[torch.from_numpy(span)], per_row)
    sums = machine.all_reduce(sums)
    nats, count, size, n, mean, square = sums.sum(1).tolist()
    return {
        "loss": nats / count,
        "loss_se": math.sqrt(max(square / n - (mean / n) ** 2, 0.0) / n),
        "ppl": math.exp(min(nats / count, 700)),
        "bpb": nats / math.log(2) / size,
        "loss_by_style": {name: (sums[0, i] / sums[1, i]).item() for i, name in enumerate(names) if sums[1, i]},
        "tokens": int(count),
        "seconds": time.perf_counter() - start,
    }


def result_line(result: dict[str, Any]) -> str:
    """An evaluation in one line, with the losses of its first SHOWN_STYLES styles."""
    losses = [f"{style} {loss:.4f}" for style, loss in result["loss_by_style"].items()]
    more = [f"{len(losses) - SHOWN_STYLES} more"] if len(losses) > SHOWN_STYLES else []
    styles = ", ".join(losses[:SHOWN_STYLES] + more)
    return (
        f"loss {result['loss']:.4f} ± {result['loss_se']:.4f}  ppl {result['ppl']:.1f}  bits/byte {result['bpb']:.4f}  "
        f"({styles}; {result['tokens']:,} tokens in {result['seconds']:.1f} s)"
    )
