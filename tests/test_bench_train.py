"""bench.train_speed, bench.scaling and bench.ranks measure what train.py runs."""

import time

import numpy as np
import pytest
import torch
from conftest import TINY, ordered, start
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import configurator
import train
from bench import (
    common,
    memory,
    ranks,
    scaling,
    table,
    train_speed,
)
from robopoet.errors import ConfigError
from robopoet.machine import Machine
from robopoet.text import tokenizer
from robopoet.text.dataset import Bin, read_meta


@pytest.mark.slow
def test_train_speed(run, results, monkeypatch, capsys):
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=3", "--steps=2", "--vram_limit_gb=8"]
    result, name = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    assert name.startswith("train_speed_tiny_")
    assert result["command"].startswith("python -m bench.train_speed tiny.yaml --block_size=16")
    assert ordered(result["tok_per_sec"]) and ordered(result["dt_ms"]) and ordered(result["mfu"])
    assert result["tok_per_sec"]["max"] == pytest.approx(1000 * 4 * 16 / result["dt_ms"]["min"])
    assert len(result["repeats_dt_ms"]) == 3 and result["loss"] < 5 and result["peak_mem_mb"] > 1
    assert 0.1 < result["start_s"] < 100 and f"| s to first step | {result['start_s']:.1f} " in train_speed.table(
        [result]
    )
    out, err = capsys.readouterr()
    assert "not the reference card" in out and "not applicable to cpu" in err
    del result["start_s"]  # as in results from before it was measured
    assert "s to first step" not in train_speed.table([result])


@pytest.mark.slow
def test_memory(run, results, monkeypatch):
    monkeypatch.setattr(memory, "SHAPES", {"tiny": (1, 1, 8), "wide": (2, 2, 512)})
    monkeypatch.setattr(memory, "VOCAB", 300)
    args = [f"{run}/tiny.yaml", *TINY, "--rows=16", "--block_size=256"]
    result, name = start(monkeypatch, memory, memory.MemoryConfig, *args)
    assert name.startswith("memory_") and len(result["runs"]) == 4
    plain, again = result["runs"][-2:]
    assert (plain["shape"], plain["rows"], plain["recompute"], again["recompute"]) == ("wide", 16, False, True)
    # the least that the other block keeps without: its attention matrices, MLP and residual streams
    kept_mb = 16 * 256 * (2 * 256 + 10 * 512) * 2 / 2**20
    assert plain["peak_mem_mb"] - again["peak_mem_mb"] > kept_mb / 2
    assert plain["peak_mem_mb"] > result["runs"][0]["peak_mem_mb"] + kept_mb
    assert f"| {plain['peak_mem_mb']:,.0f} " in memory.table([result])
    cfg = configurator.parse(memory.MemoryConfig, [f"{run}/tiny.yaml", *TINY, "--device=cuda:9"])
    with pytest.raises(ConfigError, match="came to no step 3: "):
        memory.measure(cfg, False)
    with pytest.raises(ConfigError, match="rows: found 'two', must be a whole number"):
        configurator.parse(memory.MemoryConfig, ["--rows=two"])


def test_the_first_status_line_stops_the_clock_and_the_run(run, tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    monkeypatch.setattr(train, "__file__", str(script))
    cfg = configurator.parse(train_speed.SpeedConfig, [f"{run}/tiny.yaml", *TINY])
    script.write_text("import time\nprint('cpu')\ntime.sleep(0.2)\nprint('step      1  loss')\ntime.sleep(300)")
    start = time.perf_counter()
    assert 0.2 < train_speed.time_to_first_step(cfg, run / "data") < time.perf_counter() - start < 60
    script.write_text("import sys\nprint('cpu')\nsys.exit('train.py: no')")
    with pytest.raises(ConfigError, match="came to no first step: train"):
        train_speed.time_to_first_step(cfg, run / "data")


def test_time_shares(run):
    keys = [*TINY, "--n_embd=128", "--batch_size=64", "--dropout=0.1"]
    cfg = configurator.parse(train_speed.SpeedConfig, [f"{run}/tiny.yaml", *keys])
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
    assert result["start_s"] is None and "s to first step" not in train_speed.table([result])
    peaks = iter([1e15, 1e15, 4e15])
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    model = train.make_model(configurator.parse(train.TrainConfig, args[:-3]), read_meta(run / "data").vocab_size)
    flops = model.flops_per_token() * 4 * 16
    assert result["mfu"]["max"] == pytest.approx(1000 * flops / result["dt_ms"]["min"] / 4e15)  # the best peak


def test_other_modes_of_compiling_and_the_loss_scale(run, results, monkeypatch):
    modes = []
    monkeypatch.setattr("robopoet.machine.why_no_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda model, mode="": modes.append(mode) or torch.nn.Sequential(model)[0])
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=2", "--steps=1", "--start=false", "--dtype=float16"]
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    assert modes == [] and len(result["loss_scales"]) == 2 and result["loss_scales"][0] > 1
    assert len(result["repeats_loss"]) == 2 and result["repeats_loss"][-1] == result["loss"]
    cfg = configurator.parse(train_speed.SpeedConfig, [*args, "--compile=true", "--compile_mode=reduce-overhead"])
    machine, wrapped = train_speed.find_one_machine(cfg), torch.nn.Identity()
    monkeypatch.setattr(torch, "compile", lambda model, mode="": modes.append(mode) or wrapped)
    assert train_speed.build(cfg, machine, run / "data")[0].forward is wrapped and modes == ["", "reduce-overhead"]


def test_train_speed_on_random_ids(run, results, tmp_path, monkeypatch):
    def train_in_this_process(cfg, folder):  # to the end, evaluation included
        train.main(configurator.parse(train.TrainConfig, [*TINY, f"--dataset={folder}", f"--out_dir={tmp_path}"]))
        return 1.0

    monkeypatch.setattr(train_speed, "time_to_first_step", train_in_this_process)
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=1", "--steps=1", "--vocab_size=300"]
    result, _ = start(monkeypatch, train_speed, train_speed.SpeedConfig, *args)
    cfg = configurator.parse(train_speed.SpeedConfig, args)
    assert result["parameters"] == train.make_model(cfg, 300).num_params()
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


def test_scaling(run, results, monkeypatch):
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=2", "--steps=1", "--warmup_steps=1"]
    result, name = start(monkeypatch, scaling, scaling.ScalingConfig, *args)
    assert name.startswith("scaling_tiny_") and result["tokens_per_lap"] == 4 * 4 * 16
    configured, batch, corpus = result["variants"]
    assert [v["batch_size"] for v in (configured, batch, corpus)] == [4, 16, 4]
    assert corpus["corpus_tokens"] == 4 * configured["corpus_tokens"] == 4 * batch["corpus_tokens"]
    assert configured["ratio"] == common.spread([1.0, 1.0])
    for v in (configured, batch, corpus):
        assert ordered(v["tok_per_sec"]) and v["name"].partition(",")[0] in scaling.table([result])
        pairs = zip(v["repeats_tok_per_sec"], configured["repeats_tok_per_sec"], strict=True)
        assert v["ratio"] == pytest.approx(common.spread([mine / its for mine, its in pairs]))
    assert "## Scaling" in table.tables() and common.wrap_command(result["command"]) in table.tables()


def test_a_tiled_corpus_has_the_windows_and_documents_of_its_source(run, tmp_path):
    scaling.tile(run / "data", tmp_path)
    cfg = configurator.parse(scaling.ScalingConfig, [f"{run}/tiny.yaml", *TINY, "--tag_prob=1"])
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
    assert isinstance(tiled.split.tokens, Bin)
    assert (tiled.split.gather(starts, 17, machine.device) == in_memory).all()


@pytest.mark.slow
def test_ranks(run, results, monkeypatch):
    args = [f"{run}/tiny.yaml", *TINY, "--repeats=2", "--steps=6"]
    result, name = start(monkeypatch, ranks, ranks.RanksConfig, *args)
    assert name.startswith("ranks_tiny_") and result["tokens_per_step"] == 4 * 16
    one, two = result["tok_per_sec"]["1"], result["tok_per_sec"]["2"]
    assert ordered(one) and ordered(two) and result["all_reduce_ms"] > 0
    assert result["speedup"]["max"] <= two["max"] / one["min"] * 1.0001
    assert "## Ranks" in table.tables() and common.wrap_command(result["command"]) in table.tables()
