"""A run of minutes ends in time though the machine's pace changes, and repeats its plans when it is resumed."""

import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import records

import configurator
import train
from robopoet.errors import ConfigError
from robopoet.machine import Machine
from robopoet.training import plan, schedule
from robopoet.training.run import Progress
from robopoet.weights import checkpoint

CPU = Machine(torch.device("cpu"), torch.float32)
LOADS = {
    "none": lambda share: 1,
    "the first third": lambda share: 3 if share < 1 / 3 else 1,
    "the last third": lambda share: 3 if share > 2 / 3 else 1,
    "the last tenth": lambda share: 5 if share > 0.9 else 1,
    "now and then": lambda share: 1 + 2 * (int(share * 9) % 2),
    "more and more": lambda share: 1 + 4 * share,
    "almost nothing else at first": lambda share: 20 if share < 0.1 else 1,
}


@pytest.fixture
def wall(monkeypatch) -> SimpleNamespace:
    """The time, which stands still unless a test moves it."""
    wall = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: wall.now)
    monkeypatch.setattr(Machine, "matmul_flops", lambda self, product: 1e15)
    return wall


# --- the clock


def simulate(wall, minutes: float, load, step_s: float = 0.3, pause_s: float = 2.0, epochs: float = 10.0, **keys):
    """The loop of train.py with steps and pauses that only take time; returns its config, and the share it took."""
    began, first = wall.now, schedule.Clock(minutes, CPU)
    pace = load(0)
    wall.now += 5.0
    first.pause = pause_s / step_s
    steps = schedule.steps_within(first.left_s / (step_s * pace), first.pause, lambda steps: max(steps // 10, 1))
    cfg = train.TrainConfig(minutes=minutes, epochs=epochs, max_iters=min(steps, int(epochs * 10**6)), **keys)
    cfg = plan.finish(cfg, 10**6 * cfg.rows_per_step)
    progress, found = Progress(), []
    log, run = SimpleNamespace(later=[], write=found.append, print=str), SimpleNamespace(keep_config=lambda *_: None)
    meter = SimpleNamespace(running_s=0.0)
    first.start(cfg.max_iters, cfg.epochs, 10**6, progress, log)
    while progress.iter_num < cfg.max_iters:
        before, cfg = cfg, plan.replan(cfg, first, progress, meter, log, run)
        step = progress.iter_num
        assert cfg.schedule.lr_scale(step) == pytest.approx(before.schedule.lr_scale(step), abs=1e-9)  # continuous
        pace = load((wall.now - began) / (60 * minutes))
        wall.now += step_s * pace
        meter.running_s += step_s * pace
        progress.iter_num += 1
        if cfg.schedule.evaluates(progress.iter_num):
            progress.seconds, meter.running_s = progress.seconds + meter.running_s, 0.0
            wall.now += pause_s * pace
            found.append({"kind": "eval", "iter": progress.iter_num})
    return cfg, (wall.now - began) / (60 * minutes), found


@pytest.mark.parametrize("minutes", [3, 60])
@pytest.mark.parametrize("load", LOADS)
def test_a_run_ends_in_time_though_other_programs_come_and_go(wall, load, minutes):
    cfg, share, found = simulate(wall, minutes, LOADS[load])
    plans = [record for record in found if record["kind"] == "plan"]
    assert 0.9 < share < 1.02 and len(cfg.plans) == len(plans) < 60
    assert (len(plans) == 0) == (load == "none")
    evaluated = [record["iter"] for record in found if record["kind"] == "eval"]
    assert len(evaluated) >= 6 and evaluated[-1] == cfg.max_iters
    scales = [cfg.schedule.lr_scale(step) for step in range(cfg.warmup_iters, cfg.max_iters)]
    assert scales == sorted(scales, reverse=True) and scales[-1] < 0.05 and cfg.schedule.lr_scale(cfg.max_iters) == 0


def test_a_plan_grows_from_few_steps_to_hundreds_with_its_evaluations(wall):
    cfg, share, found = simulate(wall, 3, lambda share: 60 if share < 0.2 else 1, pause_s=0.1)
    assert cfg.plans[0].split(":")[1:] == ["7", "1"]
    assert cfg.max_iters > 300 and 0.9 < share < 1.02
    assert 8 <= sum(record["kind"] == "eval" for record in found) <= 25


def test_a_text_that_teaches_nothing_more_ends_a_run_early_still(wall):
    cfg, share, _ = simulate(wall, 60, LOADS["none"], epochs=0.01)
    assert cfg.max_iters == 10_000 and share < 0.9


def test_an_interval_that_was_given_stays_and_its_evaluations_count(wall):
    cfg, share, found = simulate(wall, 3, LOADS["the first third"], eval_interval=2)
    assert cfg.eval_interval == 2 and 0.9 < share < 1.02 and len(cfg.plans) < 60
    assert sum(record["kind"] == "eval" for record in found) == -(-cfg.max_iters // 2)


def test_the_learning_rate_without_earlier_plans_has_the_bits_it_had():
    cfg = train.TrainConfig(max_iters=977, warmup_iters=13, min_lr=1e-3)
    floor = cfg.min_lr / cfg.peak_lr
    for step in range(13, 977):
        cosine = math.cos(math.pi * ((step - 13) / (977 - 13)))
        assert cfg.schedule.lr_scale(step) == floor + (1 - floor) * 0.5 * (1 + cosine)


def test_an_evaluation_comes_an_interval_after_the_one_before_whatever_was_planned():
    cfg = train.TrainConfig(max_iters=100, eval_interval=30, plans=("7:20:2", "31:50:10", "32:40:5"))
    found = [step for step in range(1, 101) if cfg.schedule.evaluates(step)]
    assert found == [2, 4, 6, 16, 26, 56, 86, 100]


@pytest.mark.parametrize("text", ["7", "7:8", "7:7:1", "9:8:1", "7:9:0", "-1:9:1", "a:9:1", "7:9:1:1", ""])
def test_a_plan_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"^plans: found"):
        configurator.parse(train.TrainConfig, [f"--plans={text}"])
    assert configurator.parse(train.TrainConfig, ["--plans=7:9:1"]).plans == ("7:9:1",)


# --- a run


class KilledError(Exception):
    pass


@pytest.fixture
def going(small, wall, monkeypatch):
    """Train for half a minute of imagined time under a load, killed before a step; returns the records."""
    world = SimpleNamespace(load=lambda now: 1, kill=-1)
    train_step, evaluate = train.train_step, train.evaluate

    def step(state, windows, number):
        if number == world.kill:
            raise KilledError
        wall.now += 0.25 * world.load(wall.now)
        return train_step(state, windows, number)

    def evaluation(*args):
        wall.now += 0.25 * world.load(wall.now)
        return evaluate(*args) | {"seconds": 0.25}

    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "evaluate", evaluation)
    keys = ["dataset", "device", "dtype", "n_layer", "n_head", "n_embd", "block_size", "batch_size", "log_interval"]
    argv = [f"--{key}={small[key]}" for key in keys]

    def run(out: Path, *more: str, load=lambda now: 1, kill: int = -1) -> list[dict]:
        world.load, world.kill = load, kill
        try:
            train.main(configurator.parse(train.TrainConfig, [*argv, f"--out_dir={out}", *more]))
            assert kill == -1
        except KilledError:
            assert kill >= 0
        return records(out)

    return run


def losses(found: list[dict], kind: str = "train") -> dict[int, float]:
    return {record["iter"]: record["loss"] for record in found if record["kind"] == kind}


def plans(found: list[dict]) -> list[tuple[int, int]]:
    return [(record["iter"], record["max_iters"]) for record in found if record["kind"] == "plan"]


def busy(now: float) -> float:
    """A load that comes and goes every four seconds."""
    return 1 + 2 * (int(now / 4) % 2)


def test_a_run_that_is_killed_again_and_again_repeats_every_plan_bit_for_bit(going, tmp_path, wall, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    saved = {}
    save = checkpoint.save

    def keep(path, content, **kwargs):
        save(path, content, **kwargs)
        if path.name == "ckpt.pt":
            saved[content["iter_num"]] = shutil.copy(path, tmp_path / f"{content['iter_num']}.pt")

    monkeypatch.setattr(checkpoint, "save", keep)
    began = wall.now
    found = going(whole, "--minutes=0.5", load=busy)
    assert 0.9 * 30 < wall.now - began < 1.02 * 30 and len(plans(found)) > 4
    final = checkpoint.load(whole / "ckpt.pt")
    at = next(step for step in saved if 1 < len([p for p in plans(found) if p[0] < step]) < len(plans(found)) - 2)
    shutil.copytree(whole, out)
    shutil.copy(saved[at], out / "ckpt.pt")
    (out / "best.pt").unlink()
    after = [step for step, _ in plans(found) if step > at]
    for kill in (at + 1, after[0] + 1, after[1] + 1):  # and other programs than before run beside it
        again = going(out, "--init_from=auto", load=lambda now: 4, kill=kill)
        assert all(losses(found)[step] == loss for step, loss in losses(again).items())
    again = going(out, "--init_from=auto", load=lambda now: 4)
    repeated = checkpoint.load(out / "ckpt.pt")
    assert losses(again) == losses(found) and losses(again, "eval") == losses(found, "eval")
    assert repeated["config"]["plans"] == final["config"]["plans"] and repeated["iter_num"] == final["iter_num"]
    for name, weight in final["model"].items():
        assert torch.equal(weight, repeated["model"][name]), name


def test_config_yaml_repeats_a_run_of_minutes_with_its_plans(going, tmp_path):
    out = tmp_path / "out"
    found = going(out, "--minutes=0.5", load=busy)
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert "minutes" not in kept and "epochs" not in kept and len(kept["plans"]) == len(plans(found))
    again = going(tmp_path / "again", f"{out}/config.yaml", f"--out_dir={tmp_path}/again", load=lambda now: 9)
    assert losses(again) == losses(found) and losses(again, "eval") == losses(found, "eval") and not plans(again)


def test_a_killed_run_ends_in_time_with_what_was_spent_before(going, tmp_path, wall):
    out, began = tmp_path / "out", wall.now
    going(out, "--minutes=1", load=busy, kill=60)
    going(out, "--minutes=1", "--init_from=auto", load=lambda now: 3, kill=70)
    found = going(out, "--init_from=auto", load=lambda now: 2)
    assert 0.9 * 60 < wall.now - began < 1.05 * 60
    assert sorted(losses(found)) == list(range(1, found[-1]["iter"] + 1))


def test_steps_that_are_given_when_it_is_resumed_end_the_planning(going, tmp_path):
    out = tmp_path / "out"
    going(out, "--minutes=0.5", load=busy)
    last = checkpoint.load(out / "ckpt.pt")["iter_num"]
    found = going(out, "--init_from=auto", f"--max_iters={last + 40}", load=busy)
    assert found[-1]["iter"] == last + 40 and plans(found)[-1][0] <= last
    assert all(record["lr"] > 0 for record in found if record["kind"] == "train")
    saved = checkpoint.load(out / "ckpt.pt")["config"]
    assert (saved["minutes"], saved["epochs"], saved["plans"]) == (0, 0, ())
    going(tmp_path / "given", "--minutes=0.5", "--max_iters=30", kill=20)
    assert going(tmp_path / "given", "--init_from=auto", load=lambda now: 9)[-1]["iter"] == 30


def test_a_checkpoint_from_before_there_were_plans_is_resumed(going, tmp_path):
    out = tmp_path / "out"
    going(out, "--max_iters=20", "--eval_interval=5", kill=12)
    content = checkpoint.load(out / "ckpt.pt")
    del content["other_s"], content["config"]["plans"]
    checkpoint.save(out / "ckpt.pt", content)
    found = going(out, "--init_from=auto")
    assert sorted(losses(found)) == list(range(1, 21))
    assert not plans(found)


def test_a_damaged_plan_in_the_records_is_dropped_or_holds_no_step_back(going, tmp_path):
    out = tmp_path / "out"
    going(out, "--minutes=0.5", kill=40)
    with open(out / "metrics.jsonl", "a") as f:
        run_id = records(out)[0]["run"]
        for changes in ({"max_iters": -1}, {"max_iters": "many"}, {"max_iters": 3}, {"other_s": None}):
            f.write(json.dumps({"kind": "plan", "iter": 38, "run": run_id, "max_iters": 99} | changes) + "\n")
    found = going(out, "--init_from=auto")
    assert found[-1]["iter"] > 60
