"""A checkpoint that version 0.1.0 wrote is still read, resumed, sampled from and exported as that version did it.

tests/fixtures/checkpoint_0.1.0.pt: 20 steps with Muon on two books of random words, beside what 0.1.0 made of it.
In that version's tree, `PYTHONPATH=.:tests python tests/test_kept.py` writes those figures.
"""

import hashlib
import json
import re
import shutil
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import make_book

import configurator
import prepare
import sample
import train

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "checkpoint_0.1.0.pt"
EXPECTED = json.loads((FIXTURES / "expected_0.1.0.json").read_text())
CPU = ["--device=cpu", "--dtype=float32"]

# what an export has gained since: a file's name -> keys; what it had instead; the card's new heading and its old one
ADDED = {
    "config": ("licences",),
    "generation_config": ("top_k", "pad_token_id", "suppress_tokens"),
    "tokenizer_config": ("pad_token", "padding_side", "chat_template"),
}
EARLIER = {"generation_config": {"temperature": 0.8}}  # now it is sample.py's own
HEADINGS = (
    "Trained on these texts, or from these weights, with their licences:",
    "Trained on texts under these licences:",
)


def prepare_books(folder: Path) -> Path:
    """The bins on which the checkpoint was trained."""
    (folder / "alpha.txt").write_text(make_book(1, 60))
    (folder / "beta.txt").write_text(make_book(2, 40).upper())
    prepare.main(prepare.PrepareConfig(input=(str(folder / "*.txt"),), out=str(folder / "bins"), tokenizer="char"))
    return folder / "bins"


def evaluate(bins: Path) -> list[float]:
    """The loss on val and on test, nats per token."""
    found = []
    for split in ("val", "test"):
        args = [f"--dataset={bins}", f"--init_from={CHECKPOINT}", "--eval_only=true", f"--split={split}", *CPU]
        with redirect_stdout(StringIO()) as printed:
            train.main(configurator.parse(train.TrainConfig, args))
        found += map(float, re.findall(r"loss (\d+\.\d+)", printed.getvalue()))
    return found


def resume(bins: Path, out: Path) -> dict[str, list[float]]:
    """The losses of steps 21 to 30, and on val after them."""
    out.mkdir()
    shutil.copy(CHECKPOINT, out / "ckpt.pt")
    args = [f"--dataset={bins}", f"--out_dir={out}", "--init_from=resume", "--max_iters=30", "--log_interval=1", *CPU]
    train.main(configurator.parse(train.TrainConfig, args))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["iter"] for r in records if r["kind"] == "train"] == [*range(21, 31)]
    return {kind: [round(r["loss"], 5) for r in records if r["kind"] == kind] for kind in ("train", "eval")}


def sampled(file: Path, *args: str) -> dict[str, list[list]]:
    """The ids and their log-probabilities of each passage that sample.py saves to `file`."""
    args = [str(CHECKPOINT), "--prompt=the Queen", "--style=alpha", "--max_new_tokens=40", f"--save={file}", *args]
    sample.main(configurator.parse(sample.SampleConfig, [*args, *CPU], "checkpoint"))
    saved = [json.loads(line) for line in file.read_text().splitlines()]
    return {"ids": [s["ids"] for s in saved], "logprobs": [[round(p, 5) for p in s["logprobs"]] for s in saved]}


def greedy(folder: Path) -> dict[str, list[list]]:
    """At temperature 0; past the end of the context, so that the cache is filled anew."""
    return sampled(folder / "greedy.jsonl", "--temperature=0", "--repetition_penalty=1.5", "--no_repeat_ngram=2")


def seeded(folder: Path) -> dict[str, list[list]]:
    """Three passages from a seed."""
    return sampled(folder / "seeded.jsonl", "--num_samples=3", "--seed=7", "--top_k=30")


def export(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file that transformers reads, and of the model card."""
    args = [str(CHECKPOINT), f"--export={folder}", "--temperature=0", "--max_new_tokens=10", *CPU]
    sample.main(configurator.parse(sample.SampleConfig, args, "checkpoint"))
    return hashes(folder)


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_evaluating_gives_the_losses_it_gave(books):
    assert evaluate(books) == pytest.approx(EXPECTED["losses"], abs=1e-3) and len(EXPECTED["losses"]) == 2


def test_resuming_gives_the_losses_it_gave(books, tmp_path):
    found, expected = resume(books, tmp_path / "out"), EXPECTED["resumed"]
    assert found["train"] == pytest.approx(expected["train"], abs=1e-3) and len(expected["train"]) == 10
    assert found["eval"] == pytest.approx(expected["eval"], abs=1e-3) and len(expected["eval"]) == 1


@pytest.mark.parametrize("how", [greedy, seeded])
def test_sampling_gives_the_ids_it_gave(tmp_path, how):
    found, expected = how(tmp_path), EXPECTED[how.__name__]
    assert found["ids"] == expected["ids"] and min(map(len, found["ids"])) > 16
    for passage, logprobs in zip(found["logprobs"], expected["logprobs"], strict=True):
        assert passage == pytest.approx(logprobs, abs=1e-3)


def test_exporting_gives_the_bytes_it_gave_but_for_what_was_added(tmp_path):
    export(folder := tmp_path / "export")
    for name, keys in ADDED.items():
        content = json.loads((folder / f"{name}.json").read_text())
        kept = {key: value for key, value in content.items() if key not in keys}
        assert len(kept) == len(content) - len(keys)
        kept |= EARLIER.get(name, {})
        (folder / f"{name}.json").write_text(json.dumps(kept, indent=2, ensure_ascii=False))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace(*HEADINGS))
    assert hashes(folder) == EXPECTED["export"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bins = prepare_books(folder)
        made = {"losses": evaluate(bins), "resumed": resume(bins, folder / "out"), "greedy": greedy(folder)}
        made |= {"seeded": seeded(folder), "export": export(folder / "export")}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in made.items())
    (FIXTURES / "expected_0.1.0.json").write_text(f"{{{lines}}}\n")
