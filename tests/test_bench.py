"""The bench scripts measure what train.py and sample.py run, judge it rightly, and the README shows what they wrote."""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import configurator
import prepare
import train
from bench import (
    common,
    demo,
    learn,
    plot,
    prepare_speed,
    ranks,
    sample_speed,
    scaling,
    table,
    torture,
    train_speed,
    writing,
)
from bench import (
    peer as nanogpt,
)
from configurator import ConfigError
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError
from robopoet.machine import Machine, find_machine
from robopoet.text import tokenizer
from robopoet.text.batches import read_meta
from robopoet.weights.checkpoint import save

TINY = ["--block_size=16", "--batch_size=4", "--n_layer=1", "--n_head=2", "--n_embd=16", "--device=cpu"]
TINY += ["--dtype=float32", "--compile=false", "--max_iters=4", "--warmup_iters=0"]
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder that holds tiny data and a finished run on it, made as a user makes them."""
    folder = tmp_path_factory.mktemp("bench")
    for style in ("day", "night"):
        (folder / f"{style}.txt").write_text(f"To be or not to be, by {style}.\n\n" * 100, encoding="utf-8")
    data = str(folder / "data")
    prepare.main(prepare.PrepareConfig(input=(f"{folder}/*.txt",), out=data, tokenizer="char"))
    (folder / "tiny.yaml").write_text(f"dataset: {data}\nout_dir: {folder}/out\n", encoding="utf-8")
    train.main(configurator.load(train.TrainConfig, [f"{folder}/tiny.yaml", *TINY]))
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


STAND_IN = """
import os, sys, torch
from model import GPT, GPTConfig
args = dict(arg[2:].split("=") for arg in sys.argv[1:])
assert sorted(os.listdir("data/" + args["dataset"])) == ["meta.pkl", "train.bin", "val.bin"]
torch.manual_seed(1337)
keys = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": int(open("vocab").read())}
model = GPT(GPTConfig(**keys))
os.makedirs(args["out_dir"])
for i in range(int(args["max_iters"]) + 1):
    if i and i % int(args["eval_interval"]) == 0:
        content = {"model": model.state_dict(), "model_args": keys | {"bias": True, "dropout": 0.0}, "iter_num": i}
        config = {"batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": args.get("learning_rate")}
        torch.save(content | {"best_val_loss": 1.0, "optimizer": {}, "config": config}, args["out_dir"] + "/ckpt.pt")
    slow = i % int(args["eval_interval"]) == 0  # it counts its evaluations
    print(f"iter {i}: loss 3.0, time {500 if slow else 10}.00ms, mfu 1.00%")
"""


WRITES = """
class GPT(GPT):
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1] / temperature
            kept = logits.topk(min(top_k, logits.shape[1]))
            chosen = kept.indices.gather(1, torch.multinomial(kept.values.softmax(-1), 1))
            idx = torch.cat([idx, chosen], dim=1)
        return idx
"""


@pytest.fixture
def peer(run, tmp_path):
    """A checkout that is laid out as nanoGPT's and talks like it; our own model has its names and shapes."""
    folder = tmp_path / "peer"
    (folder / "config").mkdir(parents=True)
    vocab_size = read_meta(run / "data").vocab_size
    train_py = STAND_IN.replace('open("vocab").read()', f'"{vocab_size}"')
    (folder / "train.py").write_text(train_py, encoding="utf-8")
    (folder / "configurator.py").write_text("", encoding="utf-8")
    (folder / "model.py").write_text(
        (README.parent / "model.py").read_text(encoding="utf-8") + WRITES, encoding="utf-8"
    )
    return folder


def start(monkeypatch, script, cls, *args, positional=None):
    """Run a script's main on a command line; returns what it wrote."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *args])
    script.main(configurator.load(cls, list(args), positional))
    (path,) = common.RESULTS.glob("*.json")
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    result = json.loads(text)
    assert text == json.dumps(result, indent=2, sort_keys=True) + "\n"
    assert str(Path(args[0]).parent) not in text  # no absolute path
    return result, path.stem


def ordered(figure):
    return 0 < figure["min"] <= figure["median"] <= figure["max"]


def test_train_speed(run, results, monkeypatch, capsys):
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=3", "--steps=2", "--vram_limit_gb=8"]
    result, name = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    assert name.startswith("train_speed_tiny_")
    assert result["command"].startswith("python -m bench.train_speed tiny.yaml --block_size=16")
    assert ordered(result["tok_per_sec"]) and ordered(result["dt_ms"]) and ordered(result["mfu"])
    assert result["tok_per_sec"]["max"] == pytest.approx(1000 * 4 * 16 / result["dt_ms"]["min"])
    assert len(result["repeats_dt_ms"]) == 3 and result["loss"] < 5 and result["peak_mem_mb"] > 1
    assert 0.1 < result["start_s"] < 100 and f"{result['start_s']:.1f} s" in train_speed.table([result])
    out, err = capsys.readouterr()
    assert "not the reference card" in out and "not applicable to cpu" in err
    del result["start_s"]  # as in results from before it was measured
    assert " s " not in train_speed.table([result])


def test_the_first_status_line_stops_the_clock_and_the_run(run, tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    monkeypatch.setattr(train, "__file__", str(script))
    cfg = configurator.load(train_speed.SpeedConfig, [f"{run}/tiny.yaml", *TINY])
    script.write_text("import time\nprint('cpu')\ntime.sleep(0.2)\nprint('step      1  loss')\ntime.sleep(300)")
    start = time.perf_counter()
    assert 0.2 < train_speed.time_to_first_step(cfg, run / "data") < time.perf_counter() - start < 60
    script.write_text("import sys\nprint('cpu')\nsys.exit('train.py: no')")
    with pytest.raises(ConfigError, match="came to no first step: train"):
        train_speed.time_to_first_step(cfg, run / "data")


def test_time_shares(run):
    keys = [*TINY, "--n_embd=128", "--batch_size=64", "--dropout=0.1"]
    cfg = configurator.load(train_speed.SpeedConfig, [f"{run}/tiny.yaml", *keys])
    machine = train_speed.find_one_machine(cfg)
    state, windows = train_speed.build(cfg, machine, run / "data")
    shares = train_speed.time_shares(state, windows, cfg, machine)
    assert sum(shares.values()) == pytest.approx(1) and set(shares) == {*train_speed.OPERATIONS, "rest"}
    assert 0.05 < shares["matmul"] < 0.9 and min(shares.values()) > 0


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("matmul", "aten::mm aten::addmm mkldnn::_linear_pointwise sm90_xmma_gemm_bf16 nvjet_tst_128x64 cutlass_80"),
        ("attention and loss", "aten::bmm aten::baddbmm aten::_softmax void_pytorch_flash::flash_fwd<cutlass::half_t>"),
        ("attention and loss", "fmha_cutlassF_bf16 cunn_SoftMaxForward aten::gather"),
        ("optimizer", "aten::_fused_adamw_ multi_tensor_apply_kernel<FusedAdamMathFunctor> aten::_foreach_norm.Scalar"),
        ("dropout", "aten::random_.from aten::native_dropout fused_dropout_kernel"),
        ("copies", "aten::_to_copy aten::clone aten::copy_ Memcpy_DtoD direct_copy_kernel_cuda"),
        ("rest", "aten::add.Tensor aten::gelu triton_red_fused__to_copy_native_layer_norm"),
    ],
)
def test_what_an_operation_counts_as(kind, names):
    assert {name: train_speed.kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_kernels_are_counted_by_the_kind_of_device_they_ran_on():
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch.ones(64, 64) @ torch.ones(64, 64)
    assert "aten::mm" in train_speed.kernel_seconds(profiled, DeviceType.CPU)
    assert not train_speed.kernel_seconds(profiled, DeviceType.CUDA)


def test_a_peak_that_was_measured_beside_another_load_is_no_peak(run, results, monkeypatch):
    peaks = iter([1e3, 2e3, 1.5e3])  # FLOP/s, less than any step makes
    monkeypatch.setattr(Machine, "matmul_flops", lambda machine, product: next(peaks))
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=3", "--steps=1", "--start=false"]
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    assert result["mfu"]["max"] == 1 and 0 < result["mfu"]["min"] <= 1
    assert result["start_s"] is None and " s |" not in train_speed.table([result])
    peaks = iter([1e15, 1e15, 4e15])
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    model = train.new_model(configurator.load(train.TrainConfig, args[:-3]), read_meta(run / "data").vocab_size)
    flops = model.flops_per_token() * 4 * 16
    assert result["mfu"]["max"] == pytest.approx(1000 * flops / result["dt_ms"]["min"] / 4e15)  # of the best peak


def test_other_modes_of_compiling_and_the_loss_scale(run, results, monkeypatch):
    modes = []
    monkeypatch.setattr(train, "why_no_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model, mode="": modes.append(mode) or torch.nn.Sequential(model)[0])
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=2", "--steps=1", "--start=false", "--dtype=float16"]
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    assert modes == [] and len(result["loss_scales"]) == 2 and result["loss_scales"][0] > 1
    assert len(result["repeats_loss"]) == 2 and result["repeats_loss"][-1] == result["loss"]
    cfg = configurator.load(train_speed.SpeedConfig, [*args, "--compile=true", "--compile_mode=reduce-overhead"])
    machine, wrapped = train_speed.find_one_machine(cfg), torch.nn.Identity()
    monkeypatch.setattr(torch, "compile", lambda model, mode="": modes.append(mode) or wrapped)
    assert train_speed.build(cfg, machine, run / "data")[0].forward is wrapped and modes == ["", "reduce-overhead"]


def test_train_speed_on_random_ids(run, results, tmp_path, monkeypatch):
    def train_in_this_process(cfg, folder):  # to the end, evaluation included
        train.main(configurator.load(train.TrainConfig, [*TINY, f"--dataset={folder}", f"--out_dir={tmp_path}"]))
        return 1.0

    monkeypatch.setattr(train_speed, "time_to_first_step", train_in_this_process)
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=1", "--steps=1", "--vocab_size=300"]
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    cfg = configurator.load(train_speed.SpeedConfig, args)
    assert result["parameters"] == train.new_model(cfg, 300).num_params()
    assert result["loss"] == pytest.approx(np.log(300), abs=0.2)
    assert "random" in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_a_random_corpus_has_the_vocabulary_asked_for(tmp_path):
    cfg = train_speed.SpeedConfig(vocab_size=65_535, batch_size=200, block_size=128)
    train_speed.write_random_corpus(tmp_path, cfg)
    meta, ids = read_meta(tmp_path), np.fromfile(tmp_path / "train.bin", dtype="<u2")
    assert len(tokenizer.token_bytes(tokenizer.from_json(meta.tokenizer))) == 65_535 == meta.vocab_size
    assert len(ids) == 40 * 200 * 129 and ids.min() == 0 and ids.max() == 65_534
    for found in (1, 65_536):
        assert train_speed.SpeedConfig(vocab_size=found).problems()[0].startswith(f"vocab_size: found {found}, must be")


def test_scaling(run, results, monkeypatch):
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=2", "--steps=1", "--warmup_steps=1"]
    result, name = start(monkeypatch, scaling, scaling.ScalingConfig, *args)
    assert name.startswith("scaling_tiny_") and result["tokens_per_lap"] == 4 * 4 * 16
    configured, batch, corpus = result["variants"]
    assert [v["batch_size"] for v in (configured, batch, corpus)] == [4, 16, 4]
    assert corpus["corpus_tokens"] == 4 * configured["corpus_tokens"] == 4 * batch["corpus_tokens"]
    assert configured["ratio"] == common.spread([1.0, 1.0])
    for v in (configured, batch, corpus):
        assert ordered(v["tok_per_sec"]) and v["name"] in scaling.table([result])
        pairs = zip(v["repeats_tok_per_sec"], configured["repeats_tok_per_sec"], strict=True)
        assert v["ratio"] == pytest.approx(common.spread([mine / its for mine, its in pairs]))
    assert "**Scaling.**" in table.tables() and result["command"] in table.tables()


@pytest.mark.slow
def test_ranks(run, results, monkeypatch):
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=2", "--steps=6"]
    result, name = start(monkeypatch, ranks, ranks.RanksConfig, *args)
    assert name.startswith("ranks_tiny_") and result["tokens_per_step"] == 4 * 16
    one, two = result["tok_per_sec"]["1"], result["tok_per_sec"]["2"]
    assert ordered(one) and ordered(two) and result["all_reduce_ms"] > 0
    assert result["speedup"]["max"] <= two["max"] / one["min"] * 1.0001
    assert "**Ranks.**" in table.tables() and result["command"] in table.tables()


def test_a_tiled_corpus_has_the_windows_and_documents_of_its_source(run, tmp_path):
    scaling.tile(run / "data", tmp_path)
    cfg = configurator.load(scaling.ScalingConfig, [f"{run}/tiny.yaml", *TINY, "--tag_prob=1"])
    machine = scaling.find_one_machine(cfg)
    _, windows = scaling.build(cfg, machine, run / "data")
    _, tiled = scaling.build(cfg, machine, tmp_path)
    n = len(windows.split.tokens)
    starts, tags = tiled.rows(0, tiled.per_epoch)
    whole = starts % n <= n - 17  # in one copy
    places = starts[whole] % n
    in_memory = tiled.split.gather(starts, 17, machine.device)
    assert (in_memory[whole] == windows.split.gather(places, 17, machine.device)).all()
    document = np.searchsorted(windows.split.stops, places, side="right")
    assert (tags[whole] == windows.split.tags[document]).all() and len(set(tags)) == 2
    scaling.read_from_disk(tiled, tmp_path, machine)
    assert isinstance(tiled.split.tokens, np.memmap)
    assert (tiled.split.gather(starts, 17, machine.device) == in_memory).all()


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
    assert "nanoGPT, 50,304 ids" in train_speed.table([result])
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


def test_a_peers_peak_memory_on_a_gpu_is_the_gpus(run, peer, tmp_path):
    uses_a_gpu = (
        "import torch\ntorch.cuda.is_initialized = lambda: True\ntorch.cuda.max_memory_reserved = lambda: 7 * 2**30\n"
    )
    script = peer / "train.py"
    script.write_text(uses_a_gpu + script.read_text(encoding="utf-8"), encoding="utf-8")
    home = tmp_path / "home"
    home.mkdir()
    _, peak_mem_mb = nanogpt.launch(peer, home, ["--max_iters=1", "--eval_interval=9"], run / "data", 61)
    assert peak_mem_mb == 7 * 1024


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"kind": "train", "iter": -1}', r"line 2: .*\$\.iter"),
        ('{"kind": "train", "seconds": "1"}', r"line 2: .*\$\.seconds"),
        ("[" * 100_000, "line 2: "),
        ('{"kind": "eval", "loss": NaN}', "line 2: "),
    ],
)
def test_a_damaged_line_of_metrics_is_named(tmp_path, line, problem):
    first = '{"kind": "train", "iter": 1, "loss": 2.5, "tokens": 64, "seconds": 1.5, "lr": 0.1, "other": [1]}\n'
    (tmp_path / "metrics.jsonl").write_text(first + line, encoding="utf-8")
    (record,) = common.read_records(tmp_path)  # the last line is still being written
    assert (record.iter, record.loss, record.tokens, record.seconds, record.bpb) == (1, 2.5, 64, 1.5, None)
    (tmp_path / "metrics.jsonl").write_text(f"{first}{line}\n{first}", encoding="utf-8")
    with pytest.raises(ConfigError, match=problem):
        common.read_records(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", "nonsense", '{"kind": "learn"}'])
def test_a_damaged_result_is_named(results, tmp_path, content):
    results.mkdir()
    (results / "learn_x.json").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"learn_x\.json: .*run its bench again"):
        table.tables()
    with pytest.raises(ConfigError, match=r"learn_x\.json: .*run its bench again"):
        plot.main(plot.PlotConfig(out=str(tmp_path / "all.svg")))


def test_a_checkpoint_of_another_kind_ends_in_one_line(run, results, tmp_path):
    content = torch.load(run / "out" / "best.pt", weights_only=True)
    kept = {key: content[key] for key in ("model", "model_args")}  # as nanoGPT's may be
    torch.save(kept | {"config": {}}, tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match="does not say"):
        demo.main(demo.DemoConfig(run=str(tmp_path), device="cpu"))
    model = train.new_model(configurator.load(train.TrainConfig, TINY), read_meta(run / "data").vocab_size)
    machine = find_machine("cpu", "float32")
    with pytest.raises(CheckpointError, match="does not say what it was trained on"):
        common.evaluate_checkpoint(kept, tmp_path / "best.pt", model, "val", machine)


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
        configurator.load(plot.PlotConfig, [], "runs")


def test_runs_of_train_are_drawn_against_tokens_and_seconds(run, results, tmp_path, monkeypatch):
    for name in ("a", "b"):
        train.main(configurator.load(train.TrainConfig, [f"{run}/tiny.yaml", *TINY, f"--out_dir={tmp_path / name}"]))
    argv = [str(tmp_path / "a"), str(tmp_path / "b")]
    plot.main(configurator.load(plot.PlotConfig, [*argv, f"--out={tmp_path}/both"], "runs"))
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "both.svg").read_bytes()
    plot.main(configurator.load(plot.PlotConfig, argv, "runs"))  # beside the first
    assert (tmp_path / "a" / "loss.svg").read_bytes() == (tmp_path / "both.svg").read_bytes()
    plot.main(configurator.load(plot.PlotConfig, [*argv, f"--out={tmp_path}/one.svg"], "runs"))
    assert (tmp_path / "one.svg").exists() and not (tmp_path / "one.png").exists() and not results.exists()
    with pytest.raises(configurator.ConfigError, match=r"runs: .*none holds no metrics\.jsonl"):
        configurator.load(plot.PlotConfig, [str(tmp_path / "none")], "runs")


def test_runs_of_different_vocabularies_share_an_axis_in_bits_per_byte(tmp_path):
    """The same model of the same text, told in tokens of one byte and of four."""
    for name, token_bytes in (("bytes", 1), ("words", 4)):
        lines = []
        for step, bpb in ((10, 3.0), (20, 2.0)):
            place = {"iter": step, "tokens": 640 * step // token_bytes, "seconds": step / 10}
            lines.append({"kind": "train", "loss": (bpb - 0.5) * math.log(2) * token_bytes} | place)
            lines.append({"kind": "eval", "iter": step, "loss": bpb * math.log(2) * token_bytes, "bpb": bpb})
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    figure = plot.draw_runs((str(tmp_path / "bytes"), str(tmp_path / "words")))
    for panel in figure.axes:
        assert "bits per byte" in panel.get_ylabel()
        drawn = [list(line.get_ydata()) for line in panel.lines]
        for line, bpb in zip(drawn, ([2.5, 1.5], [3.0, 2.0]) * 2, strict=True):  # training and val, of each run
            assert line == pytest.approx(bpb)
    assert list(figure.axes[1].lines[1].get_xdata()) == [1.0, 2.0]
    plot.plt.close(figure)
    (tmp_path / "bytes" / "metrics.jsonl").write_text('{"kind": "train", "iter": 10, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match="holds no evaluation yet"):
        plot.draw_runs((str(tmp_path / "bytes"),))


def test_a_peers_loss_is_evaluated_as_ours(run, peer, monkeypatch):
    cfg = configurator.load(
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
    cfg = configurator.load(learn.LearnConfig, [f"{run}/tiny.yaml", *TINY, f"--peer={peer}"])
    with pytest.raises(ConfigError, match="peer_args"):
        learn.run_peer(cfg, find_machine("cpu", "float32"), run / "data", 0, None)


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
    assert "nanoGPT" in sample_speed.table([result]) and "the same by everyone" in sample_speed.remarks(result)[0]


def test_without_the_bins_of_its_training_a_models_speed_is_still_told(run, results, tmp_path, monkeypatch, capsys):
    content = torch.load(run / "out" / "best.pt", weights_only=True)
    content["config"]["dataset"] = str(tmp_path / "gone")
    save(tmp_path / "best.pt", content)
    args = [f"{tmp_path}/best.pt", "--batch_size=2", "--max_new_tokens=4", "--long_tokens=4", "--check_tokens=2"]
    args += ["--repeats=1", "--starts=0", "--device=cpu", "--dtype=float32", "--prompt=to be"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result, _ = start(monkeypatch, sample_speed, sample_speed.SampleSpeedConfig, *args, positional="checkpoint")
    assert "val_loss" not in result and "start_s" not in result and len(result["cases"]) == 3
    assert (
        "val loss is left out" in capsys.readouterr().err and "import of torch" not in sample_speed.remarks(result)[0]
    )


def test_prepare_speed(run, results, tmp_path, monkeypatch):
    (tmp_path / "corpus.yaml").write_text(f"sources: [{{style: day, file: {run}/day.txt}}]\n", encoding="utf-8")
    args = [f"--corpus={tmp_path}", "--document_chars=100", "--megabytes=0.05", "--lap_megabytes=0.02", "--repeats=2"]
    args += ["--vocab_size=265"]
    result, name = start(monkeypatch, prepare_speed, prepare_speed.PrepareSpeedConfig, *args)
    assert name.startswith("prepare_speed_") and 500 <= result["documents"] <= 520
    assert result["mb_per_s"] == pytest.approx(0.05 / result["seconds"], rel=0.01)
    assert 50 < result["peak_mem_mb"] < 2000
    assert ordered(result["tok_per_sec"]) and ordered(result["tiktoken_tok_per_sec"]) and ordered(result["ratio"])
    assert "tiktoken" in prepare_speed.table([result])
    with pytest.raises(ConfigError, match=r"prepare\.py failed: .*vocab_size"):
        prepare_speed.main(prepare_speed.PrepareSpeedConfig(corpus=str(tmp_path), megabytes=0.01, vocab_size=200))


@pytest.mark.slow
def test_torture(run, results, monkeypatch):
    args = [f"--dataset={run / 'data'}", "--minutes=0.4", "--seed=3"]
    result, name = start(monkeypatch, torture, torture.TortureConfig, *args)
    assert name.startswith("torture_") and result["steps"] > 0 and result["losses compared"] >= result["steps"]
    assert result["lost steps"] == result["losses that differ"] == result["codes that are wrong"] == 0
    assert sum(result[fault] for fault in torture.FAULTS) == result["resumes"] > 0
    assert 0 < result["watch_ms"] < result["step_ms"] and "Lost steps" in torture.table([result])


def test_demo(run, results, monkeypatch, capsys):
    args = [f"{run}/out", "--device=cpu", "--dtype=float32"]
    result, name = start(monkeypatch, demo, demo.DemoConfig, *args, positional="run")
    assert name.startswith("demo_out_") and result["steps"] == 4 and result["seconds"] > 0
    assert [(p["iter"], p["loss"]) for p in result["curve"]] == [(4, result["val"]["loss"])]
    assert set(result["val"]["loss_by_style"]) == set(result["test"]["loss_by_style"]) == {"day", "night"}
    assert 0 < result["test"]["loss"] < 5
    assert "6.5" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="not found"):
        demo.main(demo.DemoConfig(run=f"{run}/nothing", device="cpu"))


def test_writing(run, results, monkeypatch, capsys):
    args = [f"{run}/out/best.pt", "--passages=3", "--max_new_tokens=40", "--device=cpu", "--dtype=float32"]
    args += ["--temperature=0.9"]
    result, name = start(monkeypatch, writing, writing.WritingConfig, *args, positional="checkpoint")
    assert name.startswith("writing_out_") and set(result["styles"]) == {"day", "night"}
    assert [entry["coder"].split(",")[0] for entry in result["bpb"]] == [
        "RoboPoet",
        "Kneser-Ney",
        "PPMd",
        "xz -9e",
        "zstd -22",
    ]
    ours, n_gram = (result["bpb"][i] for i in (0, 1))  # sums over styles
    for entry in (ours, n_gram):
        assert min(entry["bpb_by_style"].values()) <= entry["bpb"] <= max(entry["bpb_by_style"].values())
    for entry in result["bpb"]:  # the text is one line again and again; the model is hardly trained
        low, high = (2, 8) if entry["coder"] == "RoboPoet" else (0, 2)
        assert low <= entry["bpb"] < high and all(low <= bpb < high for bpb in entry["bpb_by_style"].values())
        assert set(entry["bpb_by_style"]) == {"day", "night"}
    for figures in result["styles"].values():
        assert figures["passages"]["model"] == 3 and figures["passages"]["people"] > 1
        assert figures["people"]["real_words"]["mean"] > 0.9 and figures["coherent"] == {"model": 0, "people": 1}
        assert figures["people"]["longest_copy_characters"]["p1"] > 25 and "known_speakers" not in figures["people"]
    assert "**Writing.**" in table.tables() and "| model, temperature 0.9 |" in capsys.readouterr().out


def made_up(tok_per_sec, peak_mem_mb, parameters, device="NVIDIA GeForce RTX 4060", memory_gb=8.0):
    result = {"tok_per_sec": common.spread([tok_per_sec]), "peak_mem_mb": peak_mem_mb, "parameters": parameters}
    result |= {"machine": {"device": device, "memory_gb": memory_gb}}
    return result | {"targets": train_speed.judge(result)}


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ((1001, 6143, 9_999_999), [True, True, True]),
        ((1000, 6144, 10_000_000), [False, False, False]),
        ((50_000, 900, 124_000_000), [True, True, False]),
    ],
)
def test_targets(figures, met):
    result = made_up(*figures)
    assert list(result["targets"].values()) == met
    assert [": met" in line for line in train_speed.verdicts(result)] == met


@pytest.mark.parametrize(
    ("device", "memory_gb", "is_reference"),
    [
        ("NVIDIA GeForce RTX 3070", 7.8, True),
        ("NVIDIA GeForce RTX 4090", 23.5, False),
        ("NVIDIA H100 80GB HBM3", 79.1, False),
        ("AMD EPYC", None, False),
    ],
)
def test_verdicts_name_the_device(device, memory_gb, is_reference):
    for line in train_speed.verdicts(made_up(2000, 900, 6_000_000, device, memory_gb)):
        assert device in line and ("not the reference card" not in line) == is_reference


def test_an_absolute_path_is_cut_from_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/bench/demo.py", "/a/b/out/", "--out=/c/d.x", "data/mine", "--n=1/2"])
    assert common.command_line() == "python -m bench.demo out/ --out=d.x data/mine --n=1/2"


def test_table_checks_the_readme(run, results, tmp_path, monkeypatch, capsys):
    start(monkeypatch, demo, demo.DemoConfig, f"{run}/out", "--device=cpu", "--dtype=float32", positional="run")
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{table.BEGIN}\n{table.END}\nbelow\n", encoding="utf-8")
    check, write = table.TableConfig(check=True, readme=str(readme)), table.TableConfig(write=True, readme=str(readme))
    with pytest.raises(ConfigError, match="--write"):
        table.main(check)
    table.main(write)
    table.main(check)
    text = readme.read_text(encoding="utf-8")
    assert text == f"above\n{table.BEGIN}\n{table.tables()}{table.END}\nbelow\n"
    readme.write_text(text.replace("| 4 ", "| 5 "), encoding="utf-8")  # a figure differs
    with pytest.raises(ConfigError, match="does not show"):
        table.main(check)
    readme.write_text("no block", encoding="utf-8")
    with pytest.raises(ConfigError, match="lacks"):
        table.main(write)
    assert table.TableConfig(write=True, check=True).problems()


def test_the_readme_shows_the_results():
    table.main(table.TableConfig(check=True, readme=str(README)))
