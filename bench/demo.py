"""Record what a finished run reached: its figures from metrics.jsonl, and best.pt's loss on the test split.

python -m bench.demo out/demo
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import configurator
from bench.common import evaluate_checkpoint, markdown, origin, reporting, write_result
from bench.learn import curve_of
from robopoet.errors import CheckpointError, ConfigError
from robopoet.machine import find_machine
from robopoet.training.history import read_records
from robopoet.weights import checkpoint


@dataclass(frozen=True)
class DemoConfig:
    """The keys of bench.demo."""

    run: str = "out/demo"  # out_dir of a finished run
    device: str = "auto"  # where the test split is evaluated: auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of matrix products
    out: str = ""  # name of the result (demo_RUN_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return []


def main(cfg: DemoConfig) -> None:
    """Collect the figures, evaluate the test split, print a table and write the result."""
    machine = find_machine(cfg.device, cfg.dtype)
    path = Path(cfg.run) / "best.pt"
    best = checkpoint.load(path)
    if not {"iter_num", "seconds"} <= best.keys():
        raise CheckpointError(f"{path}: does not say how long it was trained; name a run of train.py")
    records = read_records(Path(cfg.run))
    steps = [r for r in records if r.kind == "train"]
    vals = [r for r in records if r.kind == "eval" and r.iter == best["iter_num"]]
    if not steps or not vals:
        raise ConfigError(f"{cfg.run}/metrics.jsonl: lacks the evaluation of best.pt, step {best['iter_num']}")

    model = checkpoint.build_model(best, path).to(machine.device)
    with reporting(lambda: "the test split"):
        test = evaluate_checkpoint(best, path, model, "test", machine)
    result = origin("demo", machine) | {
        "run": Path(cfg.run).name,
        "parameters": model.num_params(),
        "vocab_size": model.config.vocab_size,
        "steps": best["iter_num"],
        "seconds": best["seconds"],
        "tok_per_sec": statistics.median(r.tok_per_sec for r in steps),
        "val": {key: getattr(vals[-1], key) for key in ("loss", "bpb", "loss_by_style")},
        "test": test,
        "curve": curve_of(records),
    }
    print(table([result]))
    write_result(result, cfg.out or f"demo_{result['run']}_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results, a column each."""
    styles = dict.fromkeys(style for r in results for style in r["val"]["loss_by_style"])
    rows = [
        ["parameters", *(f"{r['parameters']:,}" for r in results)],
        ["steps", *(f"{r['steps']:,}" for r in results)],
        ["minutes of training", *(f"{r['seconds'] / 60:,.1f}" for r in results)],
        ["tokens/s", *(f"{r['tok_per_sec']:,.0f}" for r in results)],
        ["val loss", *(f"{r['val']['loss']:.3f}" for r in results)],
    ]
    for style in styles:
        losses = [r["val"]["loss_by_style"].get(style) for r in results]
        rows.append([f"val loss, {style}", *("" if loss is None else f"{loss:.3f}" for loss in losses)])
    rows += [
        ["val bits/byte", *(f"{r['val']['bpb']:.3f}" for r in results)],
        ["test loss", *(f"{r['test']['loss']:.3f}" for r in results)],
        ["test bits/byte", *(f"{r['test']['bpb']:.3f}" for r in results)],
    ]
    return markdown(["", *(r["run"] for r in results)], rows)


if __name__ == "__main__":
    configurator.launch(main, DemoConfig, positional="run")
