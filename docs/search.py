"""Search among the settings of config/sweep.yaml with Optuna (pip install optuna): so many trials, keys of train.py.

python docs/search.py 20 --dataset=mine --minutes=2 --init_from=scratch
"""

import json
import subprocess
import sys
from pathlib import Path

import optuna
import yaml

HOME = Path(__file__).resolve().parents[1]
SPACE = yaml.safe_load((HOME / "config" / "sweep.yaml").read_text(encoding="utf-8"))["parameters"]


def suggest(trial: optuna.Trial, key: str, kind: dict) -> object:
    """The value of `key` in a trial, from the choices or the range that the space has for it."""
    if "values" in kind:
        return trial.suggest_categorical(key, kind["values"])
    return trial.suggest_float(key, kind["min"], kind["max"], log=kind["distribution"].startswith("log_"))


def lowest_bpb(trial: optuna.Trial) -> float:
    """Train in a folder of the trial's own; returns the lowest bits per byte of the val split."""
    out = Path("out", "search", str(trial.number))
    keys = [f"--{key}={suggest(trial, key, kind)}" for key, kind in SPACE.items()]
    subprocess.run([sys.executable, str(HOME / "train.py"), *sys.argv[2:], *keys, f"--out_dir={out}"], check=True)
    records = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return min(record["bpb"] for record in records if record["kind"] == "eval")


if __name__ == "__main__":
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1337))
    study.optimize(lowest_bpb, n_trials=int(sys.argv[1]), catch=subprocess.CalledProcessError)
    print(f"{study.best_value:.3f} bits/byte with out/search/{study.best_trial.number}/best.pt: {study.best_params}")
