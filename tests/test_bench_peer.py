"""bench.learn, bench.sample_speed and bench.train_speed beside peers; a stand-in speaks for nanoGPT."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LLAMA, TINY, ordered, start

import configurator
from bench import (
    common,
    finetune,
    learn,
    plot,
    sample_speed,
    train_speed,
)
from bench import (
    peer as nanogpt,
)
from model import GPT, GPTConfig
from robopoet.errors import ConfigError
from robopoet.machine import Machine, find_machine
from robopoet.text.dataset import read_meta
from robopoet.training.plan import complete, finish
from robopoet.training.run import find_start
from robopoet.weights.checkpoint import model_entries, save


@pytest.mark.slow
def test_train_speed_beside_a_peer(run, results, peer, monkeypatch):
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=2", "--steps=2", "--warmup_steps=1", f"--peer={peer}"]
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    assert list(result["peers"]) == ["nanoGPT", "nanoGPT, compiled"]
    for found in result["peers"].values():
        assert found["vocab_size"] == read_meta(run / "data").vocab_size
        assert found["dt_ms"]["median"] == 10 and found["peak_mem_mb"] > 10
        assert found["ratio"]["max"] == pytest.approx(10 / result["dt_ms"]["min"])


def test_a_peer_has_its_own_vocabulary_in_place_of_gpt2s(run, results, peer, monkeypatch):
    told = []
    found = lambda self, cfg, machine, data, vocab_size, steps: told.append(vocab_size) or ([10.0] * steps, 1.0)  # noqa: E731
    monkeypatch.setattr(nanogpt.Peer, "run", found)
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=1", "--steps=1", "--start=false", f"--peer={peer}"]
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args, "--vocab_size=50257")
    assert told == [50_304, 50_304] and result["peers"]["nanoGPT"]["vocab_size"] == 50_304
    assert "as it is, 50,304 ids" in train_speed.table([result])
    assert nanogpt.peer_vocab(6725) == 6725


def test_what_a_peer_is_checked_with_is_no_part_of_our_peak(run, results, peer, monkeypatch):
    order = []
    check, lap = train_speed.check_same_loss, train_speed.lap
    monkeypatch.setattr(train_speed, "check_same_loss", lambda *args: order.append("check") or check(*args))
    monkeypatch.setattr(train_speed, "forget_peak", lambda machine: order.append("forget"))
    monkeypatch.setattr(train_speed, "lap", lambda *args: order.append("lap") or lap(*args))
    monkeypatch.setattr(nanogpt.Peer, "run", lambda *args: ([10.0] * 9, 1.0))
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=1", "--steps=1", "--start=false", f"--peer={peer}"]
    start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    assert order[:3] == ["check", "forget", "lap"]
    told = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: told.append("reset"))
    for device in ("cpu", "cuda"):
        common.forget_peak(SimpleNamespace(device=torch.device(device)))
    assert told == ["emptied", "reset"]


@pytest.mark.slow
def test_a_peers_peak_memory_on_a_gpu_is_the_gpus(run, peer, tmp_path):
    uses_a_gpu = (
        "import torch\ntorch.cuda.is_initialized = lambda: True\ntorch.cuda.max_memory_reserved = lambda: 7 * 2**30\n"
    )
    script = peer / "train.py"
    script.write_text(uses_a_gpu + script.read_text(encoding="utf-8"), encoding="utf-8")
    home = tmp_path / "home"
    home.mkdir()
    _, peak_mem_mb = nanogpt.Launch(peer, ["--max_iters=1", "--eval_interval=9"], run / "data", 61).run(home)
    assert peak_mem_mb == 7 * 1024


def curve(*losses):
    """A curve whose evaluations are ten steps and ten seconds apart."""
    return [
        {"iter": 10 * i, "tokens": 640 * i, "seconds": 10.0 * i, "loss": loss, "bpb": loss / 2}
        for i, loss in enumerate(losses, 1)
    ]


def test_what_learn_makes_of_the_curves(run, results, peer, monkeypatch):
    """Two rates are tried, the better is kept for the second seed; ours has its losses after 15 and 20 seconds."""
    theirs = {(0, 0.1): curve(5.0, 4.5), (0, 0.2): curve(4.0, 3.0, 3.5), (1, 0.2): curve(4.0, 2.0)}
    ours = {1337: curve(4.0, 2.0), 1338: curve(3.0, 2.0, 1.0), 1339: curve(5.0, 4.0)}
    monkeypatch.setattr(learn, "run_peer", lambda cfg, machine, folder, seed, rate: theirs[seed, rate])
    monkeypatch.setattr(learn, "run_ours", lambda cfg, seed, out: ours[seed])
    monkeypatch.setattr(learn, "evaluate_test", lambda best, machine: {"bpb": 2.0 if "1338" in str(best) else 1.0})
    args = [f"{run}/tiny.yaml", *TINY, "--seeds=3", f"--peer={peer}", "--peer_args=--max_iters=20", "--peer_seeds=2"]
    args += ["--peer_rate=0.1", "--peer_rate=0.2"]
    result, name = start(monkeypatch, learn, learn.LearnConfig, *args)
    assert name.startswith("learn_tiny_") and result["corpus"] == "data"
    assert result["peer"]["rates"] == {"0.1": 4.5, "0.2": 3.0} and result["peer"]["rate"] == 0.2
    assert result["goal"] == {"loss": [3.0, 2.0, 3.0], "peer_seconds": [20, 20, 20], "seconds": [15, 20, None]}
    assert result["ours"]["test_bpb"] == common.spread([1.0, 2.0, 1.0]) and "test split | 1.000" in learn.table(
        [result]
    )
    assert result["ours"]["loss"] == common.spread([2.0, 1.0, 4.0]) and result["ours"]["curves"] == [*ours.values()]
    assert result["peer"]["bpb"] == common.spread([1.5, 1.0]) and "1 of 3 never" in learn.table([result])
    result["goal"]["seconds"][2] = 10.0
    assert learn.times_sooner(result) == common.spread([20 / 15, 1.0, 2.0]) and "times sooner" in learn.table([result])


@pytest.mark.slow
def test_learn_beside_a_peer(run, results, peer, monkeypatch):
    args = [f"{run}/tiny.yaml", *TINY, "--max_iters=6", "--eval_interval=2", "--seeds=3", f"--peer={peer}"]
    args += ["--peer_args=--max_iters=20", "--peer_evals=4", "--peer_rate=1e-3", "--peer_rate=2e-3"]
    args += ["--peer_seeds=2"]
    result, name = start(monkeypatch, learn, learn.LearnConfig, *args)
    assert name.startswith("learn_tiny_")
    ours, theirs = result["ours"]["curves"], result["peer"]["curves"]
    assert [[p["iter"] for p in curve] for curve in ours] == [[2, 4, 6]] * 3
    assert [[p["iter"] for p in curve] for curve in theirs] == [[5, 10, 15, 20]] * 2
    assert [p["seconds"] for p in theirs[0]] == pytest.approx([0.05, 0.1, 0.15, 0.2])  # its evaluations left out
    assert [p["tokens"] for p in theirs[0]] == [5 * 128, 10 * 128, 15 * 128, 20 * 128]
    assert theirs[0][0]["loss"] != theirs[1][0]["loss"] and ours[0][0]["loss"] != ours[1][0]["loss"]  # another seed
    assert result["peer"]["rates"].keys() == {"0.001", "0.002"} and result["peer"]["rate"] in (0.001, 0.002)
    assert all(a <= b["seconds"] for a, b in zip(result["goal"]["seconds"], [curve[-1] for curve in ours], strict=True))
    assert result["goal"]["loss"][0] == result["goal"]["loss"][2] == min(point["loss"] for point in theirs[0])
    assert "nanoGPT" in learn.table([result]) and result["corpus"] == "data"
    cfg, before = plot.PlotConfig(out=str(run / "learn.svg")), sorted(results.iterdir())
    plot.main(cfg)
    picture = (run / "learn.svg").read_bytes()
    assert b"<svg" in picture and b"bits per byte" in picture
    plot.main(cfg)
    assert (run / "learn.svg").read_bytes() == picture
    assert sorted(results.iterdir()) == before  # nothing is written there unless told
    with pytest.raises(ConfigError, match=r"out: must name .*--out=bench/results/learn\.svg"):
        configurator.parse(plot.PlotConfig, [], "runs")


@pytest.mark.slow
def test_a_peers_loss_is_evaluated_as_ours(run, peer, monkeypatch):
    cfg = configurator.parse(
        learn.LearnConfig, [f"{run}/tiny.yaml", *TINY, f"--peer={peer}", "--peer_args=--max_iters=4"]
    )
    machine = find_machine("cpu", "float32")
    curve = learn.run_peer(cfg, machine, run / "data", 3, None)
    vocab_size = read_meta(run / "data").vocab_size
    torch.manual_seed(1337 + 3)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=vocab_size)).eval()
    meta, nats, count = read_meta(run / "data"), 0.0, 0
    ids = np.fromfile(run / "data" / "val.bin", dtype="<u2").astype(np.int64)
    for doc in meta.splits["val"].documents:
        text = torch.from_numpy(ids[doc.start : doc.stop])
        for i in range(0, len(text) - 1, 16):
            targets = text[i + 1 : i + 17][None]
            with torch.no_grad():
                nats += model(text[i : i + 16][None, : targets.shape[1]], targets)[1].item() * targets.numel()
            count += targets.numel()
    assert curve[0]["loss"] == pytest.approx(nats / count, rel=1e-4)


@pytest.mark.parametrize(("loss", "seconds"), [(9.0, 10.0), (5.0, 10.0), (4.5, 15.0), (3.0, 30.0), (2.9, None)])
def test_when_a_curve_comes_down_to_a_loss(loss, seconds):
    curve = [{"loss": 5.0, "seconds": 10.0}, {"loss": 4.0, "seconds": 20.0}, {"loss": 3.0, "seconds": 30.0}]
    assert learn.seconds_to(loss, curve) == seconds


def test_a_peer_without_max_iters_is_refused(run, peer):
    cfg = configurator.parse(learn.LearnConfig, [f"{run}/tiny.yaml", *TINY, f"--peer={peer}"])
    with pytest.raises(ConfigError, match="peer_args"):
        learn.run_peer(cfg, find_machine("cpu", "float32"), run / "data", 0, None)


@pytest.mark.slow
def test_sample_speed(run, results, peer, monkeypatch):
    monkeypatch.setattr(sample_speed, "read_gb_per_s", lambda device: 10.0)
    args = [f"{run}/out/best.pt", "--batch_size=2", "--max_new_tokens=8", "--long_tokens=20", "--check_tokens=40"]
    args += ["--repeats=2", "--starts=1", "--device=cpu", "--dtype=float32", f"--peer={peer}", "--prompt=to be"]
    result, name = start(monkeypatch, sample_speed, sample_speed.SampleSpeedConfig, *args, positional="checkpoint")
    assert name.startswith("sample_speed_out_float32_") and result["same_text"] is True
    assert [(case["passages"], case["tokens"]) for case in result["cases"]] == [(1, 8), (2, 8), (1, 20)]
    peers = {"nanoGPT"} | ({"transformers"} if importlib.util.find_spec("transformers") else set())
    for case in result["cases"]:
        assert set(case["ratio"]) == peers - ({"transformers"} if case["tokens"] == 20 else set())
        assert all(map(ordered, [*case["speed"].values(), *case["first_token_ms"].values(), *case["ratio"].values()]))
        assert case["ratio"]["nanoGPT"]["max"] < 1000 and case["gb_per_s"] > 0
    assert 0 < result["val_loss"]["float32"] < 5
    assert "nanoGPT" in sample_speed.table([result]) and "the same for all" in sample_speed.remarks(result)[0]


def save_kind(run, path, **kind) -> int:
    """The run's checkpoint with a new model of another kind in it; returns how many parameters that has."""
    content, shape = torch.load(run / "out" / "best.pt", weights_only=True), {"n_layer": 1, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**shape, block_size=16, vocab_size=read_meta(run / "data").vocab_size, **kind))
    save(path, content | model_entries(model))
    return model.num_params()


NOT_NANOGPTS = "^peer: nanoGPT has no model with positions rotary, norm rmsnorm, mlp swiglu, kv_heads 1; leave the key "
QUICK = ["--batch_size=2", "--max_new_tokens=4", "--long_tokens=4", "--check_tokens=4", "--repeats=1", "--starts=0"]
QUICK += ["--device=cpu", "--dtype=float32", "--prompt=to be"]


@pytest.mark.parametrize("kind", [{"positions": "rotary"}, {"n_kv_head": 1}, {**LLAMA, "mlp": "gelu"}], ids=str)
def test_peers_that_have_no_such_model_get_a_gpt2_of_its_shape(run, results, peer, tmp_path, monkeypatch, capsys, kind):
    n = save_kind(run, tmp_path / "best.pt", **kind)
    args = [f"{tmp_path}/best.pt", *QUICK, f"--peer={peer}"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result, _ = start(monkeypatch, sample_speed, sample_speed.SampleSpeedConfig, *args, positional="checkpoint")
    assert result["same_text"] and all(set(case["ratio"]) == {"nanoGPT"} for case in result["cases"])
    assert result["parameters"] == n and "learned positions" in result["note"]
    assert result["note"] in sample_speed.remarks(result)[0] and capsys.readouterr().out.count(result["note"]) == 1


def test_a_llama_is_compared_with_transformers_own_and_not_with_nanogpt(run, results, peer, tmp_path, monkeypatch):
    n = save_kind(run, tmp_path / "best.pt", **LLAMA)
    args = [f"{tmp_path}/best.pt", *QUICK]
    result, _ = start(monkeypatch, sample_speed, sample_speed.SampleSpeedConfig, *args, positional="checkpoint")
    assert result["same_text"] and all(set(case["ratio"]) == {"transformers"} for case in result["cases"])
    assert result["parameters"] == n and "note" not in result
    with pytest.raises(ConfigError, match=NOT_NANOGPTS):
        sample_speed.main(configurator.parse(sample_speed.SampleSpeedConfig, [*args, f"--peer={peer}"], "checkpoint"))


def test_fine_tuning_in_turns_with_transformers(run, results, tmp_path, monkeypatch):
    save_kind(run, tmp_path / "best.pt", **LLAMA)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else found(name))
    args = [f"--init_from={tmp_path}/best.pt", f"--dataset={run}/data", "--batch_size=4", "--optimizer=adafactor"]
    args += ["--gradient_accumulation_steps=2", "--dropout=0", "--device=cpu", "--dtype=float32"]
    result, name = start(monkeypatch, finetune, finetune.FinetuneConfig, *args, "--repeats=2", "--steps=3")
    assert name.startswith("finetune_") and result["rows"] == [8, 16] and set(result["ratio"]) == {"transformers"}
    assert all(map(ordered, [*result["tok_per_sec"].values(), *result["ratio"].values()]))
    assert "| ours is faster" in finetune.table([result]) and "| transformers |" in finetune.table([result])

    cfg = configurator.parse(finetune.FinetuneConfig, args)
    machine = find_machine("cpu", "float32")
    origin = find_start(cfg.init_from, tmp_path, eval_only=True)
    state, windows = train_speed.build(finish(complete(cfg, origin), 1), machine, run / "data", origin)
    theirs = sample_speed.transformers_llama(state.model, machine)
    batch = windows.batch(0, 1, machine.device)
    finetune.check_same_loss(state.model.eval(), theirs, *batch)
    finetune.eager_loop(theirs, windows, state)(0)
    with pytest.raises(ConfigError, match="transformers' loss with these weights is"):
        finetune.check_same_loss(state.model, theirs, *batch)


def test_only_a_llama_is_fine_tuned_beside_transformers(run, tmp_path):
    args = [f"--init_from={run}/out/best.pt", f"--dataset={run}/data", "--device=cpu", "--dtype=float32"]
    with pytest.raises(ConfigError, match="is no Llama; name one, such as smollm2"):
        finetune.main(configurator.parse(finetune.FinetuneConfig, args))


def test_steps_of_a_llama_are_not_compared_with_nanogpt(run, peer):
    keys = [f"--{key}={value}" for key, value in LLAMA.items()]
    args = [f"{run}/tiny.yaml", *TINY, *keys, f"--peer={peer}", "--start=false"]
    with pytest.raises(ConfigError, match=NOT_NANOGPTS):
        train_speed.main(configurator.parse(train_speed.SpeedConfig, args))


def test_writers_are_compared_round_by_round():
    """tokens, seconds of all and of the first token; a writer whose context is too short is left out."""
    cfg = sample_speed.SampleSpeedConfig(repeats=2)
    times = {"RoboPoet": iter([9.0, 2.0, 4.0]), "nanoGPT": iter([9.0, 8.0, 8.0])}
    writers = {name: lambda passages, tokens, of=of: (next(of), 0.5) for name, of in times.items()}
    shape = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=20, block_size=20)
    machine = Machine(torch.device("cpu"), torch.bfloat16)
    found = sample_speed.compare(sample_speed.Case(4, 30), writers | {"transformers": None}, cfg, machine, shape)
    assert found["speed"] == {"RoboPoet": common.spread([60, 30]), "nanoGPT": common.spread([15, 15])}
    assert found["ratio"] == {"nanoGPT": common.spread([4, 2])}
    assert found["first_token_ms"]["RoboPoet"] == common.spread([500, 500])
    assert found["cache_bytes"] == 4 * (2 * 3 * 10 * 15) * 2  # keys and values, three quarters of the context, bf16


def test_without_the_bins_of_its_training_a_models_speed_is_still_told(run, results, tmp_path, monkeypatch, capsys):
    content = torch.load(run / "out" / "best.pt", weights_only=True)
    content["config"]["dataset"] = str(tmp_path / "gone")
    save(tmp_path / "best.pt", content)
    args = [f"{tmp_path}/best.pt", "--batch_size=2", "--max_new_tokens=4", "--long_tokens=4", "--check_tokens=2"]
    args += ["--repeats=1", "--starts=0", "--device=cpu", "--dtype=float32", "--prompt=to be"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result, _ = start(monkeypatch, sample_speed, sample_speed.SampleSpeedConfig, *args, positional="checkpoint")
    assert "| 2 x 4 " in sample_speed.table([result])
    assert "val_loss" not in result and "start_s" not in result and len(result["cases"]) == 3
    assert "val loss is left out" in capsys.readouterr().err and "import torch" not in sample_speed.remarks(result)[0]
