"""What a run does when it is killed, starved of disk or fed what is not a number; see tests/README.md."""

import ast
import contextlib
import os
import random
import re
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import at_step, records

import configurator
import train
from robopoet.errors import ConfigError, DivergedError
from robopoet.machine import Machine
from robopoet.text.dataset import FORMAT, Meta, SplitMeta
from robopoet.text.tokenizer import CharTokenizer
from robopoet.training import log
from robopoet.training import run as run_module
from robopoet.training.folder import lock_folder
from robopoet.training.run import Progress, Run, find_start
from robopoet.training.schedule import StepRows
from robopoet.weights import checkpoint
from train import TrainConfig

CPU = Machine(torch.device("cpu"), torch.float32)
REPO = Path(__file__).parents[1]


def in_a_child(work) -> int:
    """Run `work()` in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)
    return os.waitpid(pid, 0)[1]


# --- 1: kill -9


@pytest.fixture
def save_step(saver):
    """Saves a small run as it stands at a step; returns once that is written."""
    cfg = TrainConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, device="cpu", dtype="float32")
    state = train.build_state(cfg, CPU, train.make_model(cfg, 50))
    chars, size = "".join(map(chr, range(32, 82))), SplitMeta(0, 0, 0, 0, "0" * 64, ())
    splits = {"train": size, "val": size, "test": size}
    meta = Meta(FORMAT, "", "0" * 64, 50, {}, (), splits, CharTokenizer(chars, []).saved)

    def save(out: Path, step: int) -> None:
        run = Run(out, configurator.values_of(cfg), meta, CPU)
        with run.saver:
            run.save(state.model, state.optimizers, state.scaler, Progress(iter_num=step), val_loss=float(-step))
        run.folder.close()

    return save


def save_for_ever(save_step, out: Path, announce: int) -> None:
    """What a run does at each evaluation, again and again; writes each saved step to a pipe."""
    for step in range(1, 100_000):
        save_step(out, step)
        os.write(announce, step.to_bytes(4, "little"))


def newest(out: Path) -> int:
    """The step at which `auto` resumes; 0 when there is nothing to resume."""
    start = find_start("auto", out, eval_only=False)
    return start.content["iter_num"] if start.content else 0


def kill_while_saving(save_step, out: Path, after_s: float) -> tuple[int, int]:
    """The last step announced before a kill -9, and the step that is there after it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            save_for_ever(save_step, out, write)
        os._exit(1)
    os.close(write)
    first = os.read(read, 4)  # it has begun
    time.sleep(after_s)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(read, "rb") as pipe:
        said = first + pipe.read()
    return int.from_bytes(said[-4:], "little"), newest(out)


def kill_often(save_step, folder: Path, times: int) -> None:
    rng = random.Random(0)
    for i in range(times):
        out = folder / str(i)
        out.mkdir()
        announced, found = kill_while_saving(save_step, out, rng.random() * 0.05)
        assert found >= announced > 0
        checkpoint.load(out / "best.pt")


def test_a_kill_at_any_moment_leaves_the_last_announced_checkpoint(tmp_path, save_step):
    kill_often(save_step, tmp_path, 10)


@pytest.mark.slow
def test_a_hundred_kills_at_any_moment(tmp_path, save_step):
    kill_often(save_step, tmp_path, 100)


CALLS = {"torch.save": 2, "os.fsync": 4, "os.replace": 3}  # by one save: best.pt; then ckpt.pt, the old one kept


@pytest.mark.parametrize(("call", "nth"), [(call, nth) for call in CALLS for nth in range(1, CALLS[call] + 2)])
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_between_writing_flushing_and_renaming_loses_nothing(tmp_path, save_step, call, nth, before):
    """The second save of a run, killed before or after each of its calls; one call later there is none, and no kill."""
    save_step(tmp_path, 1)

    def second_save() -> None:
        module, name = {"torch": torch, "os": os}[call.split(".")[0]], call.split(".")[1]
        original, calls = getattr(module, name), []

        def fatal(*args, **keys):
            calls.append(1)
            if before and len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **keys)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(module, name, fatal)
        save_step(tmp_path, 2)
        os._exit(0)

    killed = nth <= CALLS[call]
    assert os.waitstatus_to_exitcode(in_a_child(second_save)) == (-signal.SIGKILL if killed else 0)
    renamed = not killed or (call, nth) == ("os.fsync", 4) or (call, nth, before) == ("os.replace", 3, False)
    assert newest(tmp_path) == (2 if renamed else 1)
    checkpoint.load(tmp_path / "best.pt")
    save_step(tmp_path, 3)  # and the next run saves again
    assert newest(tmp_path) == 3 and not list(tmp_path.glob("*.part"))


# --- 15: what is not a number


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_updates_nothing_and_is_named(small, monkeypatch, optimizer, what, value):
    cfg = TrainConfig(**small | {"optimizer": optimizer, "eval_interval": 2})
    forward, seen = train.GPT.forward, []

    def poisoned(self, idx, targets=None, **keys):
        logits, loss = forward(self, idx, targets, **keys)
        if self.training:
            seen.append(1)
            if len(seen) == 4:
                before.update({name: p.detach().clone() for name, p in self.named_parameters()})
                models.append(self)
                if what == "loss":
                    loss = loss * value
                else:
                    loss.register_hook(lambda grad: grad * value)
        return logits, loss

    before, models = {}, []
    monkeypatch.setattr(train.GPT, "forward", poisoned)
    with pytest.raises(DivergedError) as told:
        train.main(cfg)
    assert f"step 4: the {what} is not finite" in str(told.value) and "rows 24 to 31, tokens [" in str(told.value)
    assert all(torch.equal(p, before[name]) for name, p in models[0].named_parameters())
    assert checkpoint.load(Path(cfg.out_dir) / "ckpt.pt")["iter_num"] == 2


# --- 16 and 17: the disk


@contextlib.contextmanager
def largest_file(size: int):
    """No file of this process can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_old_checkpoint_and_is_tried_again(small, monkeypatch, capsys, saver):
    save, steps = Run.save, []

    def cramped(run, *content):
        steps.append(content[3].iter_num)
        with largest_file(20_000) if steps[-1] == 4 else contextlib.nullcontext():
            save(run, *content)
            run.saver.wait()
        assert bool(run.unsaved) == (steps[-1] == 4)

    monkeypatch.setattr(Run, "save", cramped)
    seen, out = [], Path(small["out_dir"])
    at_step(monkeypatch, 5, lambda: seen.append((newest(out), list(out.glob("*.part")))))
    train.main(TrainConfig(**small | {"eval_interval": 2}))
    assert steps == [2, 4, 6] and seen == [(2, [])] and newest(out) == 6
    assert f"step 4 could not be saved: {out}/best.pt: File too large" in capsys.readouterr().out


def test_a_full_disk_leaves_config_yaml_and_metrics_as_they_were(small, monkeypatch, capsys):
    """A file of the same size as the old one may be written, to a `.part`, but not a longer one."""
    train.main(TrainConfig(**small | {"lr_decay_iters": 9}))
    out, keep, write = Path(small["out_dir"]), Run.keep_config, log.append_lines
    config, metrics = (out / "config.yaml").read_bytes(), (out / "metrics.jsonl").read_bytes()

    def cramped(call, size: int):
        def limited(*args):
            with largest_file(size):
                return call(*args)

        return limited

    monkeypatch.setattr(Run, "keep_config", cramped(keep, 10))
    monkeypatch.setattr(log, "append_lines", cramped(write, len(metrics) + 10))
    train.main(TrainConfig(**small | {"init_from": "auto", "max_iters": 9, "lr_decay_iters": 9}))
    assert (out / "config.yaml").read_bytes() == config and (out / "metrics.jsonl").read_bytes() == metrics
    told = capsys.readouterr().err
    assert f"warning: {out}/config.yaml: File too large\n" in told and newest(out) == 9
    assert f"warning: a record of step 7 is lost: {out}/metrics.jsonl: File too large\n" in told


def test_a_run_whose_last_save_fails_says_so_at_the_end(small, monkeypatch, saver):
    def full(*args, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(ConfigError, match=r"step 6 could not be saved: No space left on device"):
        train.main(TrainConfig(**small))


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(small, monkeypatch):
    usage = run_module.shutil.disk_usage(small["dataset"])
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    at_step(monkeypatch, 0, lambda: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=r"out_dir: .* has 0 MB free, the checkpoints take 1 MB more"):
        train.main(TrainConfig(**small))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_someone_else_is_refused(small, tmp_path):
    (tmp_path / "out").mkdir(mode=0o755)

    def as_nobody() -> None:
        os.setuid(65534)
        try:
            lock_folder(tmp_path / "out")
        except ConfigError as e:
            os._exit(7 if "Permission denied" in str(e) or "can't be written" in str(e) else 1)

    assert os.waitstatus_to_exitcode(in_a_child(as_nobody)) == 7


# --- 24 and 25: what stands around a run


def test_a_logger_that_blocks_does_not_hold_up_training(small, monkeypatch, capsys):
    never = threading.Event()

    class Run:
        def log(self, numbers):
            never.wait()

        def finish(self):
            pass

    wandb = type(sys)("wandb")
    wandb.init = lambda **options: Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(log, "LOGGER_WAIT_S", 0.1)
    train.main(TrainConfig(**small | {"wandb": "online"}))
    assert records(small["out_dir"])[-1]["iter"] == 6
    assert capsys.readouterr().err.count("wandb has not answered") == 1
    never.set()


def test_a_folder_that_a_run_writes_to_is_refused_to_a_second_until_the_first_is_gone(small, monkeypatch):
    seen = []

    def second() -> None:
        with pytest.raises(ConfigError, match="another run is writing") as told:
            train.main(TrainConfig(**small))
        seen.append(told)

    at_step(monkeypatch, 2, second)
    train.main(TrainConfig(**small))
    assert len(seen) == 1
    in_a_child(lambda: (lock_folder(Path(small["out_dir"])), os.kill(os.getpid(), signal.SIGKILL)))
    train.main(TrainConfig(**small | {"init_from": "auto"}))


def test_a_torn_or_foreign_line_of_metrics_is_dropped_when_a_run_resumes(small, capsys):
    train.main(TrainConfig(**small | {"max_iters": 3, "lr_decay_iters": 6}))
    path = Path(small["out_dir"]) / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "train", "it')
    train.main(TrainConfig(**small | {"init_from": "auto"}))
    assert [r["iter"] for r in records(small["out_dir"]) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert re.search(r"metrics\.jsonl: line \d+: .*; dropped", capsys.readouterr().err)


def sources() -> list[tuple[Path, ast.AST]]:
    """Every script of the repository, parsed; tests left out."""
    paths = [*REPO.glob("*.py"), *REPO.glob("robopoet/**/*.py"), *REPO.glob("bench/*.py")]
    assert {REPO / "train.py", REPO / "robopoet/files.py", REPO / "bench/common.py"} <= {*paths}
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def test_no_code_is_run_from_data_and_no_clock_can_jump():
    """18 and 25: neither eval, exec nor an unpickler that finds classes, and only clocks that never go back."""
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "time.time"}
    for path, tree in sources():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name == "yaml.load":
                assert any("BaseLoader" in ast.unparse(keyword.value) for keyword in call.keywords), path
            elif name == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords), path
            else:
                assert name not in forbidden, f"{path}:{call.lineno}: {name}"


def test_a_window_is_read_in_the_same_order_whatever_the_ranks():
    """9: two ranks, then one, then two; an uneven share is refused."""
    rows = []
    for step, world_size in enumerate([2, 2, 1, 1, 2]):
        for rank in range(world_size):
            first, count = StepRows(8, 2, world_size).of(step, rank)
            rows += range(first, first + count)
    assert rows == list(range(5 * 16))
    with pytest.raises(ConfigError, match="can't be shared equally by 3 ranks"):
        StepRows(8, 2, 3)


def test_a_timeout_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="timeout_s: found 0"):
        configurator.parse(TrainConfig, ["--timeout_s=0"])
