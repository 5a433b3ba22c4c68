"""Time train.py's steps from a pretrained model, in turns with transformers' eager loop and with PEFT's LoRA.

python -m bench.finetune --dataset=data/mine
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import configurator
import train
from bench.common import origin, progress, show, side_by_side, spread, write_result
from bench.sample_speed import transformers_llama
from bench.train_speed import build, find_one_machine
from model import GPT
from robopoet.errors import ConfigError, bounds
from robopoet.machine import Machine
from robopoet.text.dataset import find_dataset, read_meta
from robopoet.text.windows import TrainWindows
from robopoet.training.plan import complete, finish
from robopoet.training.run import find_start
from robopoet.weights import architectures

LORA_RANK = 8
Step = Callable[[int], Any]  # trains on the rows of that step


@dataclass(frozen=True)
class FinetuneConfig(train.TrainConfig):
    """The keys of train.py, and those of the timing."""

    init_from: str = "smollm2"  # what all start from: a Llama
    repeats: int = 5  # rounds, in each of which all take turns; the median counts
    steps: int = 3  # optimizer steps of a turn; one more, before the first, is not timed
    out: str = ""  # name of the result (finetune_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "repeats steps", 1)


def check_same_loss(ours: GPT, theirs: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise ConfigError unless both models have the same loss, within 1e-3, on a row (1, T) in float32."""
    with torch.no_grad():
        losses = (
            ours(inputs, targets)[1].item(),
            theirs(input_ids=inputs, labels=inputs, shift_labels=targets)[0].item(),
        )
    if abs(losses[0] - losses[1]) > 1e-3:
        raise ConfigError(
            f"init_from: transformers' loss with these weights is {losses[1]:.4f}, ours is {losses[0]:.4f}"
        )


def eager_loop(theirs: torch.nn.Module, windows: TrainWindows, state: train.State) -> Step:
    """A plain loop over our rows: autocast, clipping, and the optimizer of our run, or AdamW for LoRA's matrices."""
    cfg, machine = state.cfg, state.machine
    trained = [p for p in theirs.parameters() if p.requires_grad]
    is_lora = len(trained) < len(list(theirs.parameters()))
    adafactor = cfg.optimizer == "adafactor" and not is_lora
    optimizer = torch.optim.Adafactor(trained) if adafactor else torch.optim.AdamW(trained, fused=True)
    theirs.train()

    def step(number: int) -> None:
        inputs, targets = windows.batch(*state.rows.of(number, 0), machine.device)
        for x, y in zip(inputs.split(state.rows.size), targets.split(state.rows.size), strict=True):
            with machine.autocast():
                loss = theirs(input_ids=x, labels=x, shift_labels=y.contiguous())[0]
            (loss / state.rows.count).backward()
        torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with PEFT's LoRA on every matrix of its blocks."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"))


def measure(cfg: FinetuneConfig, machine: Machine) -> dict[str, Any]:
    """Time all in turns: when the machine slows down, all do. Ratios are taken round by round."""
    start = find_start(cfg.init_from, Path(cfg.out_dir), eval_only=True)
    cfg = complete(cfg, start)
    folder = find_dataset(cfg.dataset)
    start.check_fit(cfg.dataset, cfg.optimizer, read_meta(folder))
    state, windows = build(finish(cfg, 1), machine, folder, start)
    model = state.model
    if architectures.architecture_of(model.config) is not architectures.LLAMA:
        raise ConfigError(f"init_from: {cfg.init_from} is no Llama; name one, such as smollm2")
    eager = transformers_llama(model, machine)
    check_same_loss(model.eval(), eager, *windows.batch(0, 1, machine.device))
    turns: dict[str, Step] = {"RoboPoet": lambda number: train.train_step(state, windows, number)}
    turns["transformers"] = eager_loop(eager, windows, state)
    if importlib.util.find_spec("peft"):
        lora = with_lora(transformers_llama(model, machine))
        turns[f"PEFT, LoRA of rank {LORA_RANK}"] = eager_loop(lora, windows, state)
    for step in progress(turns.values(), "first steps"):
        step(0)
    rounds = []
    for lap in progress(range(cfg.repeats), "rounds"):
        steps, seconds = range(1 + lap * cfg.steps, 1 + (lap + 1) * cfg.steps), {}
        for name, step in turns.items():
            machine.synchronize()
            began = time.perf_counter()
            for number in steps:
                step(number)
            machine.synchronize()
            seconds[name] = (time.perf_counter() - began) / cfg.steps
        rounds.append(seconds)
    speed = {name: spread([cfg.tokens_per_step / seconds[name] for seconds in rounds]) for name in turns}
    ratio = {name: spread([seconds[name] / seconds["RoboPoet"] for seconds in rounds]) for name in [*turns][1:]}
    return origin("finetune", machine) | {
        "start": cfg.init_from,
        "parameters": model.num_params(),
        "rows": [cfg.rows_per_step, cfg.block_size],
        "optimizer": cfg.optimizer,
        "tok_per_sec": speed,
        "ratio": ratio,
    }


def main(cfg: FinetuneConfig) -> None:
    """Time the steps, print a table and write the result."""
    result = measure(cfg, find_one_machine(cfg))
    print(table([result]))
    write_result(result, cfg.out or "finetune_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results."""
    blocks = []
    for r in results:
        rows, length = r["rows"]
        lines = [["RoboPoet", show(r["tok_per_sec"]["RoboPoet"])]]
        lines += [[name, show(r["tok_per_sec"][name]), show(ratio, ".2f")] for name, ratio in r["ratio"].items()]
        blocks.append((f"{r['start']}, {rows} x {length:,}\n{r['optimizer']}, {r['machine']['dtype']}", lines))
    return side_by_side(["tokens/s", "ours is faster"], blocks)


if __name__ == "__main__":
    configurator.launch(main, FinetuneConfig)
