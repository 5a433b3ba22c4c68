"""A run's folder: an earlier run is never replaced, and two runs never write to one folder, whatever happens to it."""

import hashlib
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
from conftest import at_step, records
from test_resume import run

import train
from robopoet import portable
from robopoet.errors import ConfigError
from robopoet.training import run as run_module
from robopoet.training.folder import Folder, earlier_runs, lock_folder, set_aside
from robopoet.weights import checkpoint


def hashes(folder: Path) -> dict[str, str]:
    """The files of a run and their content."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def out(small) -> Path:
    return Path(small["out_dir"])


class KilledError(Exception):
    pass


def killed_before_its_first_save(keys: dict) -> None:
    """Begin a new run and end it at its first save."""

    def killed(*args):
        raise KilledError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(train.Run, "save", killed)
        run(keys, seed=5, init_from="scratch")


def ended_by_a_signal(keys: dict, step: int) -> None:
    """Begin a new run and send it SIGTERM in a step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(keys, seed=6)


# --- a new run where one was


def test_new_runs_put_earlier_ones_in_numbered_folders_and_best_pt_stays_until_there_is_another(
    small, out, monkeypatch, capsys
):
    run(small)
    assert not (out / "previous").exists()
    first, seen = hashes(out), []
    capsys.readouterr()
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: seen.append(hashes(out)["best.pt"]))  # it first saves after that
        run(small, seed=1, tensorboard=True)
    told = capsys.readouterr().out
    assert hashes(out / "previous/1") == first and seen == [first["best.pt"]] != [hashes(out)["best.pt"]]
    assert f"the earlier run is in {out}/previous/1: --init_from=auto --out_dir={out}/previous/1 resumes it" in told
    second = hashes(out)
    assert any(name.startswith("events.out.tfevents") for name in second)
    (out / "mine.txt").write_text("a user's own")
    run(small, seed=2)
    assert not any(name.startswith("events.out.tfevents") for name in hashes(out))
    assert [hashes(folder) for folder in earlier_runs(out)] == [first, second]
    assert (out / "mine.txt").read_text() == "a user's own"
    run(small, out_dir=str(out / "previous/1"), init_from="auto", max_iters=9)
    assert records(out / "previous/1")[-1]["iter"] == 9
    run(small, init_from=str(out / "previous/2/best.pt"), seed=3)  # nothing that it starts from is replaced
    assert hashes(out / "previous/2") == second


def test_a_finished_run_outlasts_others_that_are_ended_in_their_first_steps(small, out, capsys):
    """The documented command again and again; a signal saves ckpt.pt before there is a best.pt."""
    run(small)
    first = hashes(out)
    ended_by_a_signal(small, 1)
    assert hashes(out)["best.pt"] == first["best.pt"] and checkpoint.load(out / "ckpt.pt")["iter_num"] == 2
    second = {name: hash for name, hash in hashes(out).items() if name != "best.pt"}
    ended_by_a_signal(small, 1)
    assert [hashes(folder) for folder in earlier_runs(out)] == [first, second]
    run(small, init_from="auto")
    assert checkpoint.load(out / "best.pt")["run_id"] == checkpoint.load(out / "ckpt.pt")["run_id"]
    assert [hashes(folder) for folder in earlier_runs(out)] == [first, second]


def test_a_run_without_a_checkpoint_leaves_nothing_behind_and_auto_never_resumes_the_one_before(small, out, capsys):
    old = run(small)
    first = hashes(out)
    for _ in range(2):
        killed_before_its_first_save(small)
        assert hashes(out)["best.pt"] == first["best.pt"] and not (out / "ckpt.pt").exists()
    capsys.readouterr()
    found = run(small, init_from="auto", seed=5)
    assert f"--out_dir={out}/previous/1 resumes the one there" in capsys.readouterr().err
    assert [hashes(folder) for folder in earlier_runs(out)] == [first]
    fresh = run(small, seed=5, out_dir=str(out.parent / "fresh"))
    assert [r["loss"] for r in found] == [r["loss"] for r in fresh] != [r["loss"] for r in old]
    assert {r["run"] for r in found} == {checkpoint.load(out / "ckpt.pt")["run_id"]}
    assert len({r["run"] for r in [*old, *found, *fresh]}) == 3


def test_a_new_run_that_is_refused_moves_nothing(small, out, monkeypatch):
    run(small)
    before = hashes(out)
    refused = {"not prepared": {"dataset": "nowhere"}, "none.pt: not found": {"teacher": "none.pt"}}
    for message, changes in refused.items():
        with pytest.raises((ConfigError, ValueError), match=message):
            run(small, **changes)
    with lock_folder(out), pytest.raises(ConfigError, match="another run is writing to"):
        run(small)
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"out_dir: .* has 0 MB free"):
        run(small)
    assert hashes(out) == before and sorted(path.name for path in out.iterdir() if path.is_dir()) == []


def test_the_disk_must_hold_a_run_beside_the_earlier_ones(small, out, monkeypatch):
    def refused(free: int, **changes) -> bool:
        monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: usage._replace(free=free))
        monkeypatch.setattr(train, "train_step", lambda *args: (_ for _ in ()).throw(KilledError))
        try:
            run(small, **changes)
        except KilledError:
            return False
        except ConfigError as e:
            assert "MB free" in str(e) and ("earlier runs are in" in str(e)) == (out / "previous").exists()
            return True

    usage = shutil.disk_usage(out.parent)
    run(small)
    best, ckpt = (out / "best.pt").stat().st_size, (out / "ckpt.pt").stat().st_size
    content = checkpoint.load(out / "ckpt.pt")
    weights = 4 * sum(p.numel() for name, p in content["model"].items() if "lm_" not in name)
    states = [kept for each in content["optimizer_states"] for kept in each["state"].values()]
    moments = 4 * sum(tensor.numel() for kept in states for tensor in kept.values())
    whole = 4 * weights + 3 * moments  # best.pt, and three times weights with their moments
    assert refused(whole - best - 2 * ckpt - 1, init_from="resume")
    assert not refused(whole - best - 2 * ckpt, init_from="resume")
    assert refused(whole - 1) and not refused(whole)
    shutil.copy(out / "previous/1/ckpt.pt", out / "ckpt.pt")  # as if its first save had brought no best.pt
    assert refused(whole - ckpt - 1, init_from="resume") and not refused(whole - ckpt, init_from="resume")


# --- a kill at any moment

NAMES = "best.pt ckpt.pt ckpt.prev.pt ckpt.damaged.pt metrics.jsonl report.html config.yaml".split()
NAMES += ["events.out.tfevents.1"]
CALLS = ("mkdir", "link", "unlink", "replace", "fsync", "open")


def killed_at(work, nth: int, after: bool) -> bool:
    """Run `work()` in a process that ends before or after its nth file operation; False if it has fewer."""
    if (pid := os.fork()) == 0:
        count = 0

        def counted(call):
            def call_or_end(*args, **keys):
                nonlocal count
                count += 1
                if count == nth and not after:
                    os._exit(7)
                try:
                    return call(*args, **keys)
                finally:
                    if count == nth:
                        os._exit(7)

            return call_or_end

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 7)
    return code == 7


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_kill_at_any_file_operation_loses_nothing_and_the_next_start_finishes(tmp_path, monkeypatch, links, after):
    def no_links(*args):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    nth, was_killed = 0, True
    while was_killed:
        nth += 1
        out = tmp_path / str(nth)
        out.mkdir()
        for name in NAMES:
            (out / name).write_text(f"first {name}")
        first = hashes(out)
        set_aside(out)
        for name in NAMES[:-1]:
            (out / name).unlink(missing_ok=True)
            (out / name).write_text(f"second {name}")
        second = hashes(out)
        was_killed = killed_at(lambda out=out: set_aside(out), nth, after)
        assert hashes(out)["best.pt"] == second["best.pt"]
        assert (out / "ckpt.pt").exists() or not (out / "ckpt.prev.pt").exists()  # or `auto` would resume from that
        folders = [out, *filter(Path.is_dir, (out / "previous.part", out / "previous/1", out / "previous/2"))]
        assert {hash for folder in folders for hash in hashes(folder).values()} >= {*first.values(), *second.values()}
        set_aside(out)
        assert [hashes(folder) for folder in earlier_runs(out)] == [first, second]
        assert hashes(out) == {"best.pt": second["best.pt"]} and not (out / "previous.part").exists()
        assert set_aside(out) is None
    assert nth > 15


# --- the folder of a run that goes on


def test_a_run_whose_folder_is_moved_ends_there_and_never_mixes_with_another_that_takes_its_name(
    small, out, tmp_path, monkeypatch
):
    moved, ids = tmp_path / "moved", []

    def move() -> None:
        if not moved.exists():
            out.rename(moved)
            ids.append({r["run"] for r in run(small, seed=7)})

    at_step(monkeypatch, 4, move)
    with pytest.raises(ConfigError, match=rf"{out} was moved .* saved in {moved}: .* --out_dir={moved} resumes it"):
        run(small, max_iters=9)
    assert len(ids[0]) == 1 and {r["run"] for r in records(out)} == ids[0]
    monkeypatch.undo()
    found = run(small, out_dir=str(moved), init_from="resume", max_iters=9)
    whole = run(small, out_dir=str(tmp_path / "whole"), max_iters=9)
    assert [r["loss"] for r in found] == [r["loss"] for r in whole]
    assert not {r["run"] for r in found} & ids[0]


def test_a_run_whose_folder_another_has_taken_saves_itself_beside_the_earlier_ones(small, out, tmp_path, monkeypatch):
    ids = []

    def take() -> None:
        if not ids:
            (out / ".lock").unlink()
            ids.append({})
            ids[0] = {r["run"] for r in run(small, seed=7)}

    at_step(monkeypatch, 4, take)
    with pytest.raises(ConfigError, match=rf"{out} was taken by another run .* --out_dir={out}/previous/2 resumes it"):
        run(small, max_iters=9)
    assert {r["run"] for r in records(out)} == ids[0] == {checkpoint.load(out / "ckpt.pt")["run_id"]}
    first, rest = earlier_runs(out)
    assert [r["iter"] for r in records(first) if r["kind"] == "train"] == [1, 2, 3, 4]
    monkeypatch.undo()
    found = run(small, out_dir=str(rest), init_from="resume", max_iters=9)
    whole = run(small, out_dir=str(tmp_path / "whole"), max_iters=9)
    assert [r["loss"] for r in records(first) + found] == [r["loss"] for r in whole]


def test_a_folder_or_lock_that_is_deleted_is_made_again(small, out, tmp_path, monkeypatch, capsys):
    def refused() -> None:
        with pytest.raises(ConfigError, match="another run is writing to"):
            lock_folder(out)

    whole = run(small, out_dir=str(tmp_path / "whole"))
    for delete in (lambda: shutil.rmtree(out), (out / ".lock").unlink):
        with monkeypatch.context() as patch:
            at_step(patch, 4, delete)
            at_step(patch, 5, refused)
            run(small)
        assert f"{out}, or its .lock, was deleted while the run wrote to it" in capsys.readouterr().err
        assert [r["loss"] for r in records(out)][-3:] == [r["loss"] for r in whole][-3:]
        assert {"ckpt.pt", "best.pt"} <= hashes(out).keys()
        shutil.rmtree(out)
        run(small)


def test_a_folder_that_can_not_be_made_again_is_told(small, out, monkeypatch, capsys):
    def replace() -> None:
        shutil.rmtree(out)
        out.write_text("a file")

    at_step(monkeypatch, 4, replace)
    with pytest.raises(ConfigError, match=rf"step 6 could not be saved: .*{out} can't be written .*; there is none"):
        run(small)
    assert f"a record of step 5 is lost: out_dir: {out} can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("knows", [True, False])
def test_where_a_folder_went(tmp_path, monkeypatch, knows):
    """Not every system tells, or can open a folder: then it is made again."""
    if not knows:
        monkeypatch.setattr(portable, "open_folder", lambda path: None)
    folder, other, gone = Folder(tmp_path / "a", True), Folder(tmp_path / "b", True), Folder(tmp_path / "c", True)
    folder.path.rename(tmp_path / "d")
    shutil.rmtree(gone.path)
    assert folder.where() == (tmp_path / "d" if knows else tmp_path / "a") and bool(folder.lost) == knows
    assert (gone.where(), gone.lost) == (tmp_path / "c", "") and (other.where(), other.lost) == (tmp_path / "b", "")
    assert Folder(tmp_path / "e", is_main=False).where() == tmp_path / "e" and not (tmp_path / "e").exists()
    for each in (folder, other, gone):
        with pytest.raises(ConfigError, match="another run"):
            lock_folder(each.path)
        each.close()
        lock_folder(each.path).release()


def test_earlier_runs_are_in_the_order_of_their_numbers(out):
    for n in (10, 9, 1, 2):
        (out / "previous" / str(n)).mkdir(parents=True)
    assert [path.name for path in earlier_runs(out)] == ["1", "2", "9", "10"]


def test_a_resumed_run_keeps_its_best_though_it_does_worse(small, out, monkeypatch):
    told, evaluate = iter([2.0, 2.5, 2.3, 2.2]), train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: evaluate(*args) | {"loss": next(told)})
    run(small, max_iters=4, eval_interval=2)
    run(small, max_iters=8, eval_interval=2, init_from="resume")
    assert checkpoint.load(out / "best.pt")["iter_num"] == 2 and checkpoint.load(out / "ckpt.pt")["iter_num"] == 8


def test_best_pt_is_this_runs_best_on_the_disk_though_a_better_one_could_not_be_saved(small, out, monkeypatch):
    told, evaluate, save, failed = iter([3.0, 2.0, 2.5, 2.7]), train.evaluate, checkpoint.save, []

    def full(path: Path, content: dict, **keys) -> None:
        if path.name == "best.pt" and content["iter_num"] == 4:
            failed.append(path)
            raise OSError(28, "No space left on device", str(path))
        save(path, content, **keys)

    run(small)
    monkeypatch.setattr(train, "evaluate", lambda *args: evaluate(*args) | {"loss": next(told)})
    monkeypatch.setattr(checkpoint, "save", full)
    run(small, max_iters=8, eval_interval=2)
    best = checkpoint.load(out / "best.pt")
    assert (best["iter_num"], best["best_iter"], best["best_val_loss"]) == (6, 6, 2.5) and failed


def test_a_runs_config_yaml_gives_a_command_that_a_shell_can_run(small, tmp_path):
    out = tmp_path / "mein ?'s"
    run(small | {"out_dir": str(out)})
    command = (out / "config.yaml").read_text().splitlines()[0]
    assert shlex.split(command, comments=False) == ["#", "python", "train.py", str(out / "config.yaml")]


def test_an_out_dir_of_two_lines_is_refused(small, tmp_path):
    with pytest.raises(ConfigError, match=r"out_dir: found '.*a\\nb', must be a single line"):
        run(small | {"out_dir": f"{tmp_path}/a\nb"})
    assert not list(tmp_path.glob("a*"))
