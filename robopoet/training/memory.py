"""What to do about too little memory: compute activations again (Chen et al. 2016, arXiv:1604.06174), and advice."""

import functools
from typing import Any

from torch.utils.checkpoint import checkpoint

from model import GPT


def recompute_blocks(model: GPT) -> None:
    """Have each block keep only its input, (B, T, C), and compute the rest again in the backward pass."""
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def less_memory(cfg: Any) -> str:
    """What to change in a TrainConfig that a GPU has too little memory for."""
    rows, micros, ways = cfg.batch_size, cfg.gradient_accumulation_steps, []
    if rows % 2 == 0:
        halved = f"--batch_size={rows // 2} --gradient_accumulation_steps={2 * micros}"
        ways.append(f"{halved} (now {rows} and {micros}; the same losses)")
    if not cfg.recompute:
        ways.append("--recompute=true (the same losses in a third more time)")
    ways.append(f"a block_size below {cfg.block_size}")
    return f"the GPU has too little memory; take {', or '.join(ways)}"
