"""19: a malformed checkpoint whose hash is right ends in one line, in bounded time and memory; see tests/README.md."""

import hashlib
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import KINDS, within

import train
from robopoet.errors import CheckpointError
from robopoet.weights import checkpoint
from train import TrainConfig

CPU = torch.device("cpu")
NUMBERS = (float("nan"), float("inf"), float("-inf"), 1e30, 0.0)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
NO_TENSORS = (None, 1.0, "x", [], {}, [1.0, 2.0])
SHAPES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda w: w.t() if w.dim() == 2 else w[:, None],
    lambda w: w.flatten(),
    lambda w: w[None],
    lambda w: w[:-1],
    lambda w: w[:0],
    lambda w: torch.cat([w, w]),
    lambda w: torch.zeros(1).expand(w.shape),  # claims more numbers than the file holds
    lambda w: torch.zeros(1).expand(2**40),
    lambda w: w.to_sparse(),
]


def with_number(weight: torch.Tensor, at: int, number: float) -> torch.Tensor:
    """`weight` with another number at one place."""
    flat = weight.flatten().clone()
    flat[at % len(flat)] = number
    return flat.view(weight.shape)


def mutate(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A checkpoint that differs from `content` in a weight, a weight's name, or the shape that it claims."""
    weights, args = dict(content["model"]), dict(content["model_args"])
    name, other = rng.sample(sorted(weights), 2)
    match rng.randrange(8):
        case 0 | 1:
            weights[name] = with_number(weights[name], rng.randrange(10**6), rng.choice(NUMBERS))
        case 2:
            weights[name] = weights[name].to(rng.choice(DTYPES))
        case 3 | 4:
            weights[name] = rng.choice(SHAPES)(weights[name])
        case 5:
            weights[name] = rng.choice(NO_TENSORS)
        case 6:
            weights[rng.choice(["x", name + ".", "_orig_mod." + name, other])] = weights.pop(name)
        case 7:
            key = rng.choice(["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias"])
            args[key] = not args[key] if key == "bias" else args[key] * rng.choice([2, 3, 1000]) + rng.choice([0, 1])
    return content | {"model": weights, "model_args": args}


def mutate_bytes(body: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut out or doubled; what is left has its own hash."""
    damaged = bytearray(body)
    for _ in range(rng.choice([1, 3, 30])):
        at, n = rng.randrange(len(damaged)), rng.randrange(1, 100)
        match rng.randrange(3):
            case 0:
                damaged[at] = rng.randrange(256)
            case 1:
                del damaged[at : at + n]
            case 2:
                damaged[at:at] = damaged[at : at + n]
    return bytes(damaged) + checkpoint.LABEL + hashlib.sha256(damaged).hexdigest().encode()


def load_mutations(small: dict, path: Path, monkeypatch, times: int, kind: str) -> None:
    """Load mutations of a checkpoint: most reach build_model, many are refused, and the rest hold finite numbers."""
    train.main(TrainConfig(**small | {"n_layer": 1, "n_embd": 8, "max_iters": 3} | KINDS[kind]))
    whole = Path(small["out_dir"]) / "best.pt"
    content, body = checkpoint.load(whole), whole.read_bytes()[: -checkpoint.COMMENT_BYTES]
    rng, build_model, reached, refused = random.Random(times), checkpoint.build_model, [], []
    monkeypatch.setattr(checkpoint, "build_model", lambda *args: reached.append(args) or build_model(*args))
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a power cut is no part of this
    checkpoint.load_model(whole, CPU, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(times):
        if i % 5 == 0:
            path.write_bytes(mutate_bytes(body, rng))
        else:
            checkpoint.save(path, mutate(content, rng))
        try:
            with within(10):
                model, _, _ = checkpoint.load_model(path, CPU, torch.float32)
        except CheckpointError as e:
            refused.append(str(e))
        else:
            assert all(p.isfinite().all() for p in model.parameters())
    assert all(str(path) in line and len(line.splitlines()) == 1 and len(line) < 500 for line in refused)
    assert not any("SHA-256" in line for line in refused)
    assert len(reached) > 0.7 * times and 0.4 * times < len(refused) < 0.9 * times
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_mutations_of_a_checkpoint_end_in_one_line(small, tmp_path, monkeypatch, kind):
    load_mutations(small, tmp_path / "m.pt", monkeypatch, 100, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutations_of_a_checkpoint_end_in_one_line(small, tmp_path, monkeypatch, kind):
    load_mutations(small, tmp_path / "m.pt", monkeypatch, 1000, kind)
