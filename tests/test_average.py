"""The average of a run's weights: a closed form, what is evaluated and saved, resuming, and shards."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import records
from test_ranks import losses, train_on_two

import train
from robopoet.errors import CheckpointError
from robopoet.weights import checkpoint
from train import TrainConfig


def run(keys: dict, **changes) -> Path:
    """Train with those keys; returns the run's folder."""
    cfg = TrainConfig(**keys | changes)
    assert cfg.problems() == []
    train.main(cfg)
    return Path(cfg.out_dir)


def test_best_pt_holds_the_closed_form_and_training_is_as_without_it(small, tmp_path, monkeypatch):
    keys = small | {"max_iters": 40, "eval_interval": 20, "dropout": 0.1}
    plain = run(keys, out_dir=str(tmp_path / "plain"))
    seen, step_of = [], train.train_step

    def watched(state, windows, step):
        if not seen:
            seen.append(copy.deepcopy(state.model.state_dict()))
        result = step_of(state, windows, step)
        seen.append(copy.deepcopy(state.model.state_dict()))
        return result

    monkeypatch.setattr(train, "train_step", watched)
    averaged = run(keys, out_dir=str(tmp_path / "averaged"), ema=0.8)
    assert losses(averaged) == losses(plain)
    best, latest, without = (
        checkpoint.load(path) for path in (averaged / "best.pt", averaged / "ckpt.pt", plain / "ckpt.pt")
    )
    kept = [min(0.8, (1 + step) / (10 + step)) for step in range(40)]
    for name, found in best["model"].items():
        shares = [
            torch.tensor(kept[i:], dtype=torch.float64).prod() for i in range(41)
        ]  # what is left of it at the end
        expected = seen[0][name].double() * shares[0]
        for i in range(40):
            expected += seen[i + 1][name].double() * (1 - kept[i]) * shares[i + 1]
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(latest["model"][name], without["model"][name])
        assert not torch.equal(found, latest["model"][name])
    assert best["best_val_loss"] == records(averaged)[-1]["loss"] != records(plain)[-1]["loss"]


def test_what_was_evaluated_is_what_best_pt_predicts(small, capsys):
    out = run(small, max_iters=20, eval_interval=20, ema=0.9)
    train.main(TrainConfig(**small | {"eval_only": True, "init_from": str(out / "best.pt")}))
    assert f"loss {records(out)[-1]['loss']:.4f} " in capsys.readouterr().out


def test_a_run_may_begin_to_average_when_it_resumes(small):
    run(small, max_iters=6)
    assert checkpoint.load(run(small, init_from="resume", max_iters=8, ema=0.5) / "ckpt.pt")["average"]


def test_an_average_that_does_not_fit_is_refused(small):
    path = run(small, max_iters=6, ema=0.5) / "ckpt.pt"
    content = checkpoint.load(path)
    for damaged in ({"lm_head.weight": torch.zeros(1)}, dict.fromkeys(content["average"], torch.zeros(3, 3, 3))):
        checkpoint.save(path, content | {"average": damaged})
        with pytest.raises(CheckpointError, match="its averages don't fit"):
            run(small, init_from="resume", max_iters=8)


@pytest.mark.slow
def test_shards_average_as_copies_do_and_train_on_as_without(small, tmp_path):
    keys = small | {"n_embd": 34, "n_head": 1, "max_iters": 20, "eval_interval": 5}
    copies = train_on_two(keys | {"out_dir": tmp_path / "copies", "ema": 0.9})
    halves = train_on_two(keys | {"out_dir": tmp_path / "halves", "ema": 0.9, "shard": True})
    plain = train_on_two(keys | {"out_dir": tmp_path / "plain", "shard": True})
    assert losses(halves) == losses(plain)
    assert losses(halves, "eval") == pytest.approx(losses(copies, "eval"), abs=1e-5)
    theirs = checkpoint.load(copies / "best.pt")["model"]
    for name, weight in checkpoint.load(halves / "best.pt")["model"].items():
        torch.testing.assert_close(weight, theirs[name], atol=1e-4, rtol=0)
    again = train_on_two(
        keys | {"out_dir": tmp_path / "parts", "ema": 0.9, "shard": True, "max_iters": 10, "lr_decay_iters": 20}
    )
    again = train_on_two(
        keys | {"out_dir": again, "ema": 0.9, "shard": True, "init_from": "resume", "lr_decay_iters": 20}
    )
    ends = [checkpoint.load(out / "ckpt.pt")["average"] for out in (halves, again)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(w, ends[1][name]) for name, w in ends[0].items())
