"""A search over settings: wandb's agent and Optuna run trials of train.py with what config/sweep.yaml allows."""

import itertools
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
import yaml
from conftest import start
from scripts import run_script
from wandb import wandb_agent
from wandb.apis.public import sweeps
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import configurator
from bench import search
from robopoet.errors import ConfigError
from robopoet.training import log
from robopoet.weights import checkpoint
from train import TrainConfig

REPO = Path(__file__).parents[1]
SWEEP = yaml.safe_load((REPO / "config" / "sweep.yaml").read_text())
SPACE = SWEEP["parameters"]
SHORT = {"device": "cpu", "dtype": "float32", "block_size": 16, "batch_size": 2, "eval_iters": 1, "sample_tokens": 0}


def asked(**values) -> dict:
    """What wandb's server asks of an agent for a trial with these values of keys."""
    return {key: {"value": value} for key, value in values.items()}


def ends(kind: dict) -> list:
    """The values of a choice, or both ends of a range."""
    return kind.get("values") or [kind["min"], kind["max"]]


def keys_of_trials(out: Path) -> dict:
    """The values that a run had for the keys of the search."""
    cfg = configurator.parse(TrainConfig, [str(out / "config.yaml")])
    return {key: getattr(cfg, key) for key in SPACE}


def lowest(out: Path) -> float:
    """The lowest bits per byte of a run's evaluations; infinite before the first."""
    best = float("inf")
    for line in (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else ():
        record = json.loads(line)
        if record["kind"] == "eval" and record["bpb"] < best:
            best = record["bpb"]
    return best


def test_train_takes_every_trial_that_the_sweep_allows():
    keys = [word for word in SWEEP["command"] if word.startswith("--")]
    for values in itertools.product(*map(ends, SPACE.values())):
        trial = dict(zip(SPACE, values, strict=True))
        cfg = configurator.parse(TrainConfig, [*keys, *create_sweep_command_args({"args": asked(**trial)})["args"]])
        assert {key: getattr(cfg, key) for key in SPACE} == trial
    assert cfg.given == {*SPACE, "dataset", "minutes", "init_from", "out_dir", "wandb"} and cfg.wandb == "online"


def test_wandb_names_the_runs_of_a_sweep(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(wandb, "init", lambda **options: seen.append(options["name"]) or wandb)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    config = configurator.values_of(TrainConfig(out_dir=str(tmp_path / "sweep"), wandb="offline"))
    log.to_wandb(config, "1", iter([]))
    monkeypatch.setenv("WANDB_SWEEP_ID", "1")
    log.to_wandb(config, "1", iter([]))
    log.to_wandb(config | {"wandb_run_name": "mine"}, "1", iter([]))
    assert seen == ["sweep", None, "mine"]


@pytest.mark.slow
def test_wandbs_agent_runs_a_trial_and_stops_another_early(books, tmp_path, monkeypatch):
    """Its own loop and command builder; the server, which is not there, asks for a long trial and then to stop it."""
    outs = {name: tmp_path / name for name in ("whole", "stopped")}
    trials = [{key: ends(kind)[i] for key, kind in SPACE.items()} for i in (0, -1)]
    sent = []

    def heartbeat(api, agent, metrics, running):
        if not running and len(sent) < len(outs):
            sent.append(name := list(outs)[len(sent)])
            steps = {"max_iters": 4} if name == "whole" else {"max_iters": 10**6, "eval_interval": 2}
            keys = SHORT | steps | {"dataset": str(books), "out_dir": str(outs[name]), "wandb": "offline"}
            args = asked(**trials[len(sent) - 1], **keys)
            return [{"type": "run", "run_id": name, "program": SWEEP["program"], "args": args}]
        stops = "stopped" in running and lowest(outs["stopped"]) < float("inf")
        return [{"type": "stop", "run_id": "stopped"}] if stops else []

    monkeypatch.setattr(sweeps, "_sweep_with_runs", lambda *_: {"config": yaml.safe_dump(SWEEP)})
    monkeypatch.setattr(sweeps, "_register_agent", lambda *_, **keys: {"id": "agent"})
    monkeypatch.setattr(sweeps, "_agent_heartbeat", heartbeat)
    monkeypatch.setattr(wandb, "Api", lambda: None)
    monkeypatch.setattr(wandb_agent.Agent, "POLL_INTERVAL", 0.2)
    for name in ("RUN_ID", "SWEEP_PARAM_PATH"):  # the agent sets them
        monkeypatch.setenv(f"WANDB_{name}", "")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    monkeypatch.chdir(REPO)
    wandb_agent.Agent(None, multiprocessing.Queue(), sweep_id="sweep", count=2).run()

    for (name, out), trial in zip(outs.items(), trials, strict=True):
        assert keys_of_trials(out) == trial and lowest(out) < 9
        (record,) = out.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb")
        assert SWEEP["metric"]["name"].encode() in record.read_bytes()
    assert checkpoint.load(outs["whole"] / "ckpt.pt")["iter_num"] == 4
    assert 2 <= checkpoint.load(outs["stopped"] / "ckpt.pt")["iter_num"] < 10**6


@pytest.mark.slow
def test_optuna_searches_among_the_same_settings(books, tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="requirements-slow.txt has it")

    def forked(command, check):
        assert check
        run_script(*command[1:], cwd=tmp_path).check_returncode()
        if command[-1] == "--out_dir=out/search/1":
            raise subprocess.CalledProcessError(2, command)  # the others go on

    keys = SHORT | {"dataset": books, "max_iters": 2}
    monkeypatch.setattr(subprocess, "run", forked)
    monkeypatch.setattr(sys, "argv", ["docs/search.py", "3", *(f"--{key}={value}" for key, value in keys.items())])
    monkeypatch.chdir(tmp_path)
    study = runpy.run_path(str(REPO / "docs" / "search.py"), run_name="__main__")["study"]
    folders = [tmp_path / "out" / "search" / str(trial.number) for trial in study.trials]
    assert [keys_of_trials(out) for out in folders] == [trial.params for trial in study.trials]
    values = [lowest(out) for out in folders]
    assert [trial.value for trial in study.trials] == [values[0], None, values[2]]
    best = 0 if values[0] < values[2] else 2
    assert f"{values[best]:.3f} bits/byte with out/search/{best}/best.pt" in capsys.readouterr().out
    for key, searched in study.trials[0].distributions.items():
        kind = SPACE[key]
        if "values" in kind:
            assert list(searched.choices) == kind["values"]
        else:
            assert (searched.low, searched.high) == (kind["min"], kind["max"])
            assert searched.log == ("learning_rate" in key)
    assert study.trials[0].distributions.keys() == SPACE.keys()


@pytest.mark.slow
def test_bench_search(run, results, monkeypatch, tmp_path):
    pytest.importorskip("optuna", reason="requirements-slow.txt has it")
    (tmp_path / "corpus.yaml").write_text(f"sources: [{{style: day, file: {run}/day.txt}}]\n", encoding="utf-8")

    def call(script, *args, cwd=REPO):
        keys = [f"--{key}={value}" for key, value in (SHORT | {"max_iters": 2}).items()]
        more = ["--vocab_size=265"] if script == "prepare.py" else keys
        run_script(script, *args, *more, cwd=cwd).check_returncode()

    monkeypatch.setattr(search, "call", call)
    args = [str(tmp_path), "--book=day", "--trials=2", "--seeds=2"]
    result, name = start(monkeypatch, search, search.SearchConfig, *args, positional="corpus")
    assert name.startswith("search_") and result["failed"] == 0 and len(result["trials"]) == 2
    best = min(result["trials"], key=lambda trial: trial["val"])
    for found in result["found"]:
        assert {key: found[key] for key in SPACE} == {key: best[key] for key in SPACE}
        assert found["val"] not in [trial["val"] for trial in result["trials"]]  # another seed
    for way in (result["dial"], result["found"]):
        assert len(way) == 2 and all(0 < each["test"] < 9 for each in way)
    lines = search.table([result]).splitlines()
    assert lines[0].startswith(f"day: {result['bytes']:,} bytes; minutes: 0.67 a run; val after so many trials: 1: ")
    assert f"| `n_embd` | {result['dial'][0]['n_embd']} | {best['n_embd']} |" in " ".join(" ".join(lines).split())
    with pytest.raises(ConfigError, match=r"book: found noon; no text of"):
        start(monkeypatch, search, search.SearchConfig, str(tmp_path), "--book=noon", positional="corpus")
