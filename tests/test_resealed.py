"""A checkpoint that was altered and given a right hash: refused in one line, or resumed to the very same losses."""

import copy
import functools
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records

import configurator
import train
from robopoet.errors import CheckpointError, ConfigError, DataError, DivergedError
from robopoet.training.run import EARLIER_AUTO
from robopoet.weights import checkpoint
from train import TrainConfig

ODD = (None, True, -1, 2**70, 0.5, float("nan"), float("inf"), "x", [], [1], {}, {"x": 1}, torch.zeros(2))
TENSORS: list[Callable[[torch.Tensor], Any]] = [
    lambda t: t.flatten()[:-1],
    lambda t: t.expand(2, *t.shape),
    lambda t: t[None],
    lambda t: t.mT if t.dim() == 2 else t[..., None],
    lambda t: torch.zeros(1).expand(t.shape) if t.dim() else t[None],  # claims more numbers than the file holds
    lambda t: t.half(),
    lambda t: t.double(),
    lambda t: t.long(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to_sparse() if t.dim() else t.bool(),
    lambda t: torch.full_like(t, torch.nan),
    lambda t: torch.full_like(t, torch.inf),
    lambda t: t.to("meta"),
    lambda t: t.tolist(),
]
PRUNED = ("model", "optimizer", "tokenizer", "licences")  # other tests change all that these hold


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to each value in dicts and lists of dicts, itself first; of the tensors of a kind, one."""
    yield path
    if path and path[0] in PRUNED:
        return
    if isinstance(value, dict) and all(isinstance(item, torch.Tensor) for item in value.values()) and value:
        picked = [max(value, key=lambda name: value[name].dim())] if len(value) > 3 else list(value)
    elif isinstance(value, dict):
        picked = [name for name in value if not (path[-1:] == ("state",) and name not in (0, 2))]
    else:
        picked = range(len(value)) if isinstance(value, list) else ()
    for name in picked:
        yield from places(value[name], (*path, name))


def value_at(content: dict, path: tuple) -> Any:
    return functools.reduce(lambda holder, name: holder[name], path, content)


def with_value(content: dict, path: tuple, odd: Any) -> dict:
    """A copy of `content` with another value at `path`, or none (...)."""
    changed = copy.deepcopy(content)
    if odd is ...:
        del value_at(changed, path[:-1])[path[-1]]
    else:
        value_at(changed, path[:-1])[path[-1]] = odd
    return changed


def mutations(content: dict) -> Iterator[tuple[tuple, Any]]:
    """Each value missing (...), of every other type and shape, out of range, and with something more in it."""
    for path in list(places(content))[1:]:
        value = value_at(content, path)
        if isinstance(value, torch.Tensor):
            new = [transform(value) for transform in TENSORS] + [None, "x", 1.0]
            if path[-1] in ("step", "exp_avg_sq"):
                new += [-torch.ones_like(value), torch.full_like(value, -1e-9)]
        else:
            new = [odd for odd in ODD if type(odd) is not type(value) or odd != value]
        if isinstance(value, dict):
            new.append(value | {"other": torch.zeros(3)})
        yield from ((path, odd) for odd in (..., *new))


CONTENT: dict[str, Any] = {}  # a checkpoint's content; with_value copies it


@pytest.fixture
def resume(small, tmp_path, monkeypatch):
    """Resumes the run in a checkpoint for two steps, with further keys; returns its losses, or the one line it ends in.

    The first such checkpoint is in resume.content.
    """
    monkeypatch.setattr(os, "fsync", lambda file: None)  # a power cut is no part of this
    shape = {
        "n_layer": 1,
        "n_embd": 8,
        "max_iters": 3,
        "lr_decay_iters": 5,
        "ema": 0.9,
        "dropout": 0.1,
        "eval_iters": 1,
    }
    if not CONTENT:  # made once
        train.main(TrainConfig(**small | shape | {"sample_tokens": 0}))
        CONTENT.update(checkpoint.load(Path(small["out_dir"]) / "ckpt.pt"))

    def again(content: dict, **keys) -> list | str:
        out = tmp_path / "again"
        out.mkdir(exist_ok=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        checkpoint.save(out / "ckpt.pt", content)
        args = [f"--{key}={value}" for key, value in {"out_dir": out, "init_from": "resume", "max_iters": 5}.items()]
        try:
            train.main(configurator.parse(TrainConfig, [*args, *(f"--{key}={value}" for key, value in keys.items())]))
        except (CheckpointError, ConfigError, DataError) as e:
            return str(e)
        except DivergedError as e:  # a learning rate may be as large as anyone wants
            return str(e).splitlines()[0]
        return [(record["iter"], record["kind"], record["loss"]) for record in records(out)]

    again.content, again.out = CONTENT, tmp_path / "again"
    return again


def check(resume, path: tuple, odd: Any, expected: list) -> None:
    """The mutant is refused in one line, or resumes as if it were none; a key of the config, as the key when given."""
    found, where = resume(with_value(resume.content, path, odd)), f"{path} {odd!r}"
    if isinstance(found, str):
        assert len(found.splitlines()) == 1 and len(found) < 600, where
        assert "ckpt.pt: " in found or path[0] == "config", where
    elif found != expected and path[0] == "config" and path[1:]:
        given = TrainConfig.__dataclass_fields__[path[1]].default if odd is ... else odd
        if path[1] in EARLIER_AUTO and type(odd) in (int, float, str) and odd == EARLIER_AUTO[path[1]]:
            given = None  # as an earlier version wrote it
        assert found == resume(resume.content, **{path[1]: configurator.written(given)}), where
    else:
        assert found == expected, where


def test_some_resealed_checkpoints_are_refused_in_one_line_or_change_nothing(resume):
    expected, cases = resume(resume.content), list(mutations(resume.content))
    assert len(expected) == 3 and len(cases) > 1500
    for path, odd in random.Random(0).sample(cases, 25):
        check(resume, path, odd, expected)


@pytest.mark.slow
def test_every_resealed_checkpoint_is_refused_in_one_line_or_changes_nothing(resume):
    expected = resume(resume.content)
    for path, odd in mutations(resume.content):
        check(resume, path, odd, expected)


MOMENT, MOMENTUM = ("optimizer_states", 0, "state", 2, "exp_avg_sq"), ("optimizer_states", 1, "state", 0)
REFUSED = [
    (MOMENT, torch.zeros(3), r"the states of its optimizer 0 don't fit its model_args \(2\.exp_avg_sq is \(3,\), must"),
    (MOMENT, torch.zeros(8).double(), r"2\.exp_avg_sq is missing, or not a tensor of torch\.float32"),
    (MOMENT, torch.full((8,), torch.nan), r"optimizer 0: 2\.exp_avg_sq is not finite"),
    (MOMENT, -torch.ones(8), r"2\.exp_avg_sq is below 0"),
    ((*MOMENT[:4], "step"), torch.tensor(4.0), r"2\.step is below 0 or above 3"),
    (MOMENTUM, {}, r"0\.momentum_buffer is missing"),
    (MOMENTUM[:3], torch.zeros(2), r"it holds no run to resume"),
    (
        ("optimizer_states", 1, "param_groups", 0, "params"),
        [1, 0, 2, 3],
        "1 are not of this model's parameters",
    ),
    (("optimizer_states",), [], "has the states of 0 optimizers, the run has 2"),
    (
        ("average", "transformer.wte.weight"),
        torch.zeros(49, 8) / 0,
        r"its averages: \S+ is not finite",
    ),
    (("average",), {}, r"its averages don't fit"),
    (("teachers",), {"a.pt": 1}, r"Expected `str`, got `int` - at `\$\.teachers\[\.\.\.\]`"),
    (("model", "transformer.ln_f.bias"), torch.zeros(8).half(), "its weights are not all float32"),
    (("bad_evals",), 0.5, r"Expected `int`, got `float` - at `\$\.bad_evals`"),
    (("seconds",), "x", r"at `\$\.seconds`"),
    (("first_val_loss",), float("nan"), r"at `\$\.first_val_loss`"),
    (("best_val_loss",), ..., r"missing required field `best_val_loss`"),
    (("config",), [], r"at `\$\.config`"),
    (("config",), {}, r"missing required field `dataset` - at `\$\.config`; it holds no run"),
    (("model_extra",), ..., r"missing required field `model_extra`; it holds no run to resume"),
    (("config", "ema"), 1.5, r"ema: found 1\.5, must be at least 0 and at most 0\.9999"),
    (("config", "tag_prob"), 7.0, r"tag_prob: found 7\.0, must be"),
    (("config", "weight_decay"), float("inf"), r"weight_decay: found inf, must be"),
    (("config", "gradient_accumulation_steps"), 2**70, r"gradient_accumulation_steps: found \d+, must be .* 1,048,576"),
]


@pytest.mark.parametrize(("path", "odd", "told"), REFUSED)
def test_what_no_run_saves_is_refused_by_name(resume, path, odd, told):
    found = resume(with_value(resume.content, path, odd))
    assert isinstance(found, str) and re.search(r"^[^\n]*ckpt\.pt: [^\n]*" + told + r"[^\n]*$", found), found


def test_the_state_of_a_scaler_is_bounded_and_its_settings_are_the_runs_own(resume):
    keys = {"dtype": "float16", "max_iters": 4}
    resume(resume.content, **keys)
    content = checkpoint.load(resume.out / "ckpt.pt")
    expected = resume(content, dtype="float16")
    assert len(content["scaler"]) == 5 and len(expected) == 2
    for key, odd in (("scale", 0.0), ("scale", float("inf")), ("scale", "x"), ("_growth_tracker", -1), ("scale", ...)):
        changed = {name: value for name, value in (content["scaler"] | {key: odd}).items() if value is not ...}
        assert "at `$.scaler" in resume(content | {"scaler": changed}, dtype="float16")
    odd = content["scaler"] | {"growth_factor": 0.0, "backoff_factor": -1.0, "growth_interval": "x"}
    assert resume(content | {"scaler": odd}, dtype="float16") == expected
