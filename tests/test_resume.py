"""Resuming, and starting from learned weights: the config is completed from the checkpoint, and nothing mixes."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import KINDS, at_step, records
from scripts import run_script

import configurator
import prepare
import train
from robopoet import files
from robopoet.errors import CheckpointError, ConfigError
from robopoet.machine import Machine
from robopoet.text.dataset import read_meta
from robopoet.training.log import Meter
from robopoet.training.plan import finish
from robopoet.training.run import Progress, find_start
from robopoet.weights import checkpoint
from train import TrainConfig

REPO = Path(__file__).parent.parent


def run(keys: dict, **changes) -> list[dict]:
    """Train as from the command line, where only these keys are given; returns the records of metrics.jsonl."""
    keys = keys | changes
    train.main(configurator.parse(TrainConfig, [f"--{key}={value}" for key, value in keys.items()]))
    return records(Path(keys["out_dir"]))


# --- a new run from learned weights


def test_a_new_run_can_start_from_any_checkpoint_and_takes_its_shape(small, shapeless, tmp_path):
    run(small)
    path = str(Path(small["out_dir"]) / "best.pt")
    best = checkpoint.load(Path(path))["best_val_loss"]
    found = run(shapeless, out_dir=str(tmp_path / "tuned"), init_from=path, learning_rate=1e-5)
    assert [found[0][key] for key in ("kind", "iter", "loss")] == ["eval", 0, pytest.approx(best)]
    assert found[1]["iter"] == 1
    assert checkpoint.load(tmp_path / "tuned" / "best.pt")["model_args"]["n_layer"] == 2


def test_best_pt_is_no_worse_than_what_a_run_starts_from(small, tmp_path):
    run(small)
    path, tuned = Path(small["out_dir"]) / "best.pt", tmp_path / "tuned"
    keys = small | {"out_dir": str(tuned), "learning_rate": 1.0, "warmup_iters": 0}
    found = run(keys, init_from=str(path))
    first, *later = [record["loss"] for record in found if record["kind"] == "eval"]
    assert min(later) > first
    best, start = checkpoint.load(tuned / "best.pt"), checkpoint.load(path)
    assert best["iter_num"] == best["best_iter"] == 0 and checkpoint.load(tuned / "ckpt.pt")["iter_num"] == 6
    assert all(torch.equal(weight, start["model"][name]) for name, weight in best["model"].items())
    assert run(keys, init_from="auto") == found  # nothing is evaluated again


# --- runs never mix


def test_records_of_another_run_are_dropped_on_resuming(small):
    out = Path(small["out_dir"])
    whole = run(small)
    stray = json.dumps(whole[0] | {"run": "another", "loss": -1.0})
    (out / "metrics.jsonl").write_text(stray + "\n" + (out / "metrics.jsonl").read_text())
    assert [r["loss"] for r in run(small, init_from="auto", max_iters=7)][: len(whole)] == [r["loss"] for r in whole]


def test_runs_from_before_they_had_an_id_are_resumed(small, capsys):
    out = Path(small["out_dir"])
    run(small, max_iters=3, lr_decay_iters=6)
    content = checkpoint.load(out / "ckpt.pt")
    del content["run_id"]
    checkpoint.save(out / "ckpt.pt", content)
    lines = [{key: value for key, value in r.items() if key != "run"} for r in records(out)]
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = run(small, init_from="resume", max_iters=6)
    assert [r["iter"] for r in found if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


# --- what is not given


def test_resuming_takes_what_is_not_given_from_the_checkpoint(small, capsys):
    out = {"out_dir": small["out_dir"]}
    whole = run(small, out_dir=str(Path(small["out_dir"]).parent / "whole"), lr_decay_iters=6, dropout=0.2)
    run(small, max_iters=3, lr_decay_iters=6, dropout=0.2)
    capsys.readouterr()
    parts = run(out, init_from="resume", max_iters=6)
    assert [r["loss"] for r in parts] == [r["loss"] for r in whole]
    assert "changed since the checkpoint: max_iters 3 -> 6" in capsys.readouterr().out
    run(out, init_from="resume", log_interval=2)
    told = capsys.readouterr().out
    assert "finished: step 6 of max_iters 6; a larger --max_iters trains on" in told
    run(out, init_from="resume", max_iters=2)
    assert "finished: step 6 of max_iters 2" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="n_layer: the checkpoint has 2, the config 6; leave it out"):
        run(out, init_from="resume", n_layer=6)  # the default, but given


def test_a_run_that_patience_has_stopped_says_so_and_resumes_with_more(small, capsys):
    keys = small | {"learning_rate": 1e-12, "muon_learning_rate": 1e-12, "eval_interval": 1, "max_iters": 5}
    keys |= {"decay_lr": False}
    run(keys, patience=2)
    said = "stopped: 2 evaluations without a better val loss; a larger --patience trains on"
    assert said in capsys.readouterr().out
    run(keys, init_from="auto")
    assert said in capsys.readouterr().out
    assert run(keys, init_from="auto", patience=9)[-1]["iter"] == 5


def test_a_number_of_steps_that_is_given_overrules_the_epochs_of_the_checkpoint(small):
    run(small, epochs=0.1)
    steps = len([r for r in run({"out_dir": small["out_dir"]}, init_from="resume", max_iters=9) if "lr" in r])
    assert steps == 9


def test_evaluating_takes_the_dataset_from_the_checkpoint(small, capsys):
    run(small)
    capsys.readouterr()
    best = Path(small["out_dir"]) / "best.pt"
    run({"out_dir": small["out_dir"]}, eval_only=True, init_from=best, split="test")
    assert f"{best} on {small['dataset']}/test.bin: loss" in capsys.readouterr().out


def test_evaluating_reads_the_full_split_unless_told_otherwise_and_then_says_so(small, capsys):
    run(small | {"eval_iters": 1, "batch_size": 2})
    split, best = read_meta(Path(small["dataset"])).splits["val"], str(Path(small["out_dir"]) / "best.pt")
    whole = split.tokens - len(split.documents)  # a document's first token is no target
    for given, expected, n in (({}, "", whole), ({"eval_iters": 2}, "at most 2 batches, spread over ", 4 * 32)):
        capsys.readouterr()
        run({"out_dir": small["out_dir"]}, eval_only=True, init_from=best, **given)
        out = capsys.readouterr().out
        assert f"{best} on {expected}{small['dataset']}/val.bin: loss" in out and f"; {n:,} tokens in" in out


def test_evaluating_the_latest_of_an_empty_folder_is_one_line(small, tmp_path):
    for start in ("auto", "resume"):
        with pytest.raises((ConfigError, CheckpointError), match=r"ckpt\.pt"):
            run(small, eval_only=True, init_from=start, out_dir=str(tmp_path / "empty"))
        assert not (tmp_path / "empty").exists()


@pytest.fixture
def cut_elsewhere(small, tmp_path) -> str:
    """The dataset of `small`, prepared with other splits; its val split was in the other's train split."""
    folder = tmp_path / "cut"
    folder.mkdir()
    books = [{"style": path.stem, "file": str(path)} for path in sorted(Path(small["dataset"]).parent.glob("*.txt"))]
    (folder / "corpus.yaml").write_text(yaml.safe_dump({"sources": books, "splits": [0.5, 0.4, 0.1]}))
    prepare.main(prepare.PrepareConfig(input=(str(folder),), tokenizer="char"))
    return str(folder)


def test_a_run_is_resumed_with_its_own_splits_alone(small, cut_elsewhere, tmp_path):
    ours, theirs = (read_meta(Path(folder)) for folder in (small["dataset"], cut_elsewhere))
    assert (ours.text_sha256, ours.tokenizer) == (theirs.text_sha256, theirs.tokenizer)
    run(small)
    change = f"{ours.splits['val'].characters:,} characters -> {theirs.splits['val'].characters:,} characters"
    with pytest.raises(CheckpointError, match=rf"another cut of .*, train .*, val {change}, test .*; prepare that"):
        run(small, dataset=cut_elsewhere, init_from="resume", max_iters=9)
    latest = Path(small["out_dir"]) / "ckpt.pt"
    saved = checkpoint.load(latest)
    del saved["identity"]  # as in an older checkpoint
    checkpoint.save(latest, saved)
    run(small, dataset=cut_elsewhere, init_from="resume", max_iters=9)
    assert checkpoint.load(latest)["identity"] == theirs.identity


def test_a_run_without_tags_is_not_resumed_with_tags(small):
    run(small)
    meta = read_meta(Path(small["dataset"]))
    untagged = dataclasses.replace(meta, styles={})
    start = find_start("resume", Path(small["out_dir"]), eval_only=False)
    with pytest.raises(CheckpointError, match="tags alpha, beta -> none"):
        start.check_fit("mine", "muon", untagged)


def test_weights_that_may_have_read_the_val_split_are_told_of(small, cut_elsewhere, tmp_path, capsys):
    run(small)
    best = str(Path(small["out_dir"]) / "best.pt")
    other = {"dataset": cut_elsewhere, "out_dir": str(tmp_path / "other")}
    for keys in ({"init_from": best}, {"init_from": best, "eval_only": True}, {"teacher": best}):
        for changes, told in ((other, 1), ({"out_dir": other["out_dir"]}, 0)):
            capsys.readouterr()
            run(small | changes, **keys)
            said = capsys.readouterr().err
            assert said.count(f"{best} was trained on another cut of {cut_elsewhere}'s text and may have read") == told


def test_a_new_run_may_shorten_the_context_and_change_nothing_else_of_the_shape(small, shapeless, tmp_path):
    run(small)
    best = Path(small["out_dir"]) / "best.pt"
    keys = shapeless | {"init_from": best, "out_dir": tmp_path / "short"}
    run(keys, block_size=16, learning_rate=1e-12, muon_learning_rate=1e-12)
    short, whole = checkpoint.load(tmp_path / "short" / "best.pt"), checkpoint.load(best)
    assert short["model_args"] == whole["model_args"] | {"block_size": 16}
    position = "transformer.wpe.weight"
    torch.testing.assert_close(short["model"][position], whole["model"][position][:16])
    assert (tmp_path / "short" / "best.pt").stat().st_size < best.stat().st_size
    for change in ({"block_size": 64}, {"n_layer": 6}, {"n_embd": 64}, {"bias": False}):
        (key,) = change
        with pytest.raises(CheckpointError, match=f"{key}: the checkpoint has"):
            run(keys, **change)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cropped_model_predicts_as_the_whole_one_within_its_context(small_config, kind):
    model = train.make_model(dataclasses.replace(small_config, **KINDS[kind]), 64).eval()
    idx = torch.randint(64, (2, 16))
    before = model(idx, idx)[0]
    model.crop_block_size(16)
    assert torch.equal(model(idx, idx)[0], before)
    assert model.config.block_size == 16
    if kind == "learned":
        assert model.transformer.wpe.num_embeddings == 16


def test_positions_of_another_kind_than_the_checkpoints_are_refused(small, shapeless, tmp_path):
    run(small, positions="rotary", max_iters=4)
    best = Path(small["out_dir"]) / "best.pt"
    for start in ({"init_from": "resume"}, {"init_from": best, "out_dir": tmp_path / "new"}):
        with pytest.raises(
            CheckpointError, match=r"positions: the checkpoint has rotary, the config learned; leave it"
        ):
            run(shapeless | {"out_dir": small["out_dir"]} | start, positions="learned", max_iters=8)
        records = run(shapeless | {"out_dir": small["out_dir"]} | start, max_iters=8)
        assert any(r["kind"] == "eval" for r in records)
    assert "transformer.wpe.weight" not in checkpoint.load(tmp_path / "new" / "best.pt")["model"]


def test_a_run_of_a_version_that_wrote_numbers_for_auto_resumes_as_it_would_have(small, capsys):
    whole = run(small, max_iters=9)
    run(small, max_iters=3, lr_decay_iters=9)
    path = Path(small["out_dir"]) / "ckpt.pt"
    content = checkpoint.load(path)
    before = {"learning_rate": 0.0, "muon_weight_decay": -1.0, "lr_decay_iters": 0, "wandb_run_name": ""}
    checkpoint.save(path, content | {"config": content["config"] | before})
    capsys.readouterr()
    resumed = run({"out_dir": small["out_dir"], "device": "cpu"}, init_from="resume", max_iters=9)
    assert "changed since the checkpoint: max_iters 3 -> 9\n" in capsys.readouterr().out
    for kind in ("train", "eval"):
        ours, theirs = ([(r["iter"], r["loss"]) for r in found if r["kind"] == kind] for found in (resumed, whole))
        assert ours == theirs
    kept = checkpoint.load(path)["config"]
    assert [kept[key] for key in before] == [None] * 4


def test_a_warmup_is_shortened_for_a_short_run_and_one_that_was_given_not_without_a_word(small, capsys):
    keys = {key: small[key] for key in small if key != "warmup_iters"}
    assert [r["iter"] for r in run(keys, max_iters=10) if r["kind"] == "train"] == list(range(1, 11))
    assert checkpoint.load(Path(small["out_dir"]) / "best.pt")["config"]["warmup_iters"] == 1
    cfg = configurator.parse(TrainConfig, ["config/demo.yaml", "--max_iters=2"])
    assert finish(cfg, 1).warmup_iters == 0
    assert capsys.readouterr().err == "warning: warmup_iters: 20 steps don't fit into 2; the warmup takes 0\n"
    assert [finish(TrainConfig(max_iters=steps), 1).warmup_iters for steps in (19, 20, 100)] == [1, 20, 20]


# --- config.yaml


def losses(out: Path) -> list[tuple]:
    return [(record["kind"], record["iter"], record["loss"]) for record in records(out)]


@pytest.fixture
def weights(small, tmp_path) -> Path:
    """A checkpoint with a longer context than the default."""
    run(small, out_dir=tmp_path / "base", block_size=160)
    return tmp_path / "base" / "best.pt"


@pytest.mark.parametrize("begins", ["auto", "weights", "minutes"])
def test_config_yaml_repeats_a_run_whatever_resumed_it(small, shapeless, weights, tmp_path, begins):
    out, again = tmp_path / "a run", tmp_path / "again"
    keys = {"auto": {**small, "init_from": "auto", "epochs": 0.1}, "minutes": {**small, "minutes": 0.05}}
    keys["weights"] = {**shapeless, "init_from": weights, "block_size": 128}  # the default, but shorter than theirs
    run(keys[begins], out_dir=out, dropout=0.1)
    begun = (out / "config.yaml").read_text()
    run({"out_dir": out, "init_from": "auto"})
    run({"out_dir": out, "init_from": "resume", "minutes": 9})
    assert (out / "config.yaml").read_text() == begun
    train.main(configurator.parse(TrainConfig, [str(out / "config.yaml"), f"--out_dir={again}"]))
    assert losses(again) == losses(out)
    begun_with = {"out_dir": str(out), "minutes": keys[begins].get("minutes", 0.0)}
    assert checkpoint.load(again / "best.pt")["config"] | begun_with == checkpoint.load(out / "best.pt")["config"]


def test_config_yaml_has_the_keys_of_the_last_resume_and_where_the_run_began(shapeless, weights, tmp_path):
    out = tmp_path / "out"
    run(shapeless, init_from=weights, max_iters=3)
    begun = (out / "config.yaml").read_text()
    run({"out_dir": out, "init_from": "auto", "max_iters": 5})
    assert (out / "config.yaml").read_text() == begun.replace("max_iters: 3", "max_iters: 5")
    assert f"\ninit_from: {weights}\n" in begun


# --- from any folder


def test_scripts_find_their_configs_and_data_from_any_folder_and_leave_nothing_there(tmp_path):
    done = run_script("train.py", "config/demo.yaml", "--dataset=nope", cwd=tmp_path)
    assert done.returncode == 2 and "nope" in done.stderr and "config/demo.yaml" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = run_script("train.py", "config/nope.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "config/nope.yaml: No such file" in done.stderr


def test_a_corpus_beside_the_scripts_is_prepared_from_any_folder_and_once(tmp_path, monkeypatch, capsys):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "data" / "mine", elsewhere):
        folder.mkdir(parents=True)
    (home / "data" / "mine" / "a.txt").write_text("To be, or not to be.\n\n" * 50)
    (home / "data" / "mine" / "corpus.yaml").write_text("sources:\n  - style: a\n    file: a.txt\n")
    monkeypatch.setattr(files, "HOME", home)
    for place in (elsewhere, home):
        monkeypatch.chdir(place)
        prepare.main(configurator.parse(prepare.PrepareConfig, ["data/mine", "--tokenizer=char"], "input"))
    assert (home / "data" / "mine" / "train.bin").exists() and list(elsewhere.iterdir()) == []
    assert "prepared already" in capsys.readouterr().out


# --- the peak that MFU is a share of


def test_mfu_is_never_above_one_and_its_peak_is_measured_again_when_passed(small_config, monkeypatch):
    peaks = iter([1.0, 2e15, 1.0, 1.0])
    machine = Machine(torch.device("cpu"), torch.float32)
    monkeypatch.setattr(Machine, "matmul_flops", lambda self, product: next(peaks))
    meter = Meter(machine, train.make_model(small_config, 64), 100)
    loss = torch.tensor(1.0)
    meter.steps = 1
    first = meter.lap(Progress(1), loss, loss, 1e-3)["mfu"]
    assert 0 < first < 1 and meter.peak_flops == 2e15
    meter.flops_per_step, meter.steps = 1e30, 1
    assert meter.lap(Progress(2), loss, loss, 1e-3)["mfu"] == 1.0
    meter.flops_per_step, meter.steps = 1e30, 1
    assert meter.lap(Progress(3), loss, loss, 1e-3)["mfu"] <= 1.0


def test_make_clean_removes_what_make_made_and_nothing_of_the_users(tmp_path):
    (tmp_path / "Makefile").write_text((REPO / "Makefile").read_text())
    made = (".venv/installed", "out/demo/best.pt", "data/robopoet/raw/a.whl", "data/robopoet/train.bin")
    made += ("data/robopoet/meta.json",)
    kept = ("out/mine/best.pt", "data/mine/train.bin", "data/mine/meta.json", "data/robopoet/corpus.yaml")
    kept += ("wandb/run", "out/best.pt", "data/bible/raw/a")
    for name in (*made, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"Makefile", *kept}


def test_a_run_that_has_started_holds_no_copy_of_its_checkpoint(small, monkeypatch):
    run(small, max_iters=3)
    starts, find_start = [], train.find_start
    monkeypatch.setattr(train, "find_start", lambda *args: starts.append(find_start(*args)) or starts[-1])
    held = []
    at_step(monkeypatch, 4, lambda: held.append(starts[0].content))
    run(small, init_from="resume")
    assert held == [{}]
