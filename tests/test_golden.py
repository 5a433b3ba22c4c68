"""A hundred steps whose losses stand in golden.json, so that an edit that changes the numbers is seen.

PYTHONPATH=. python tests/test_golden.py    # writes them anew, when they are meant to change
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import make_book

import prepare
import train

GOLDEN = Path(__file__).parent / "golden.json"
SHAPE = ["--block_size=32", "--batch_size=8", "--n_layer=2", "--n_head=2", "--n_embd=32", "--dropout=0.1"]
SHAPE += ["--gradient_accumulation_steps=2", "--max_iters=100", "--eval_interval=50", "--log_interval=1"]
SHAPE += ["--device=cpu", "--dtype=float32", "--learning_rate=5e-3"]


RUNS = {
    "adamw": ["--optimizer=adamw"],
    "muon": ["--optimizer=muon"],
    "rotary": ["--positions=rotary"],
    "llama": ["--positions=rotary", "--norm=rmsnorm", "--mlp=swiglu", "--bias=false", "--n_kv_head=1"],
}


def curve(folder: Path, name: str) -> dict[str, list[float]]:
    """The losses of a run on two books of random words, one thread, float32; prepares them once."""
    if not (folder / "bins").exists():
        (folder / "alpha.txt").write_text(make_book(1, 60))
        (folder / "beta.txt").write_text(make_book(2, 40).upper())
        prepare.main(prepare.PrepareConfig(input=(str(folder / "*.txt"),), out=str(folder / "bins"), tokenizer="char"))
    args = [*SHAPE, f"--dataset={folder / 'bins'}", f"--out_dir={folder / name}", *RUNS[name]]
    train.main(train.configurator.parse(train.TrainConfig, args))
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {kind: [round(r["loss"], 5) for r in records if r["kind"] == kind] for kind in ("train", "eval")}


@pytest.mark.parametrize("name", RUNS)
def test_a_hundred_steps_have_the_losses_they_had(tmp_path, name):
    found, golden = curve(tmp_path, name), json.loads(GOLDEN.read_text())[name]
    assert found["train"] == pytest.approx(golden["train"], abs=1e-3) and len(golden["train"]) == 100
    assert found["eval"] == pytest.approx(golden["eval"], abs=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(Path(folder), name) for name in RUNS}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
