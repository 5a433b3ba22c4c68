"""The CUDA path on a machine without a GPU: traced on fake tensors, and what the machine is asked before it is used."""

import shutil
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_with_hooks

import robopoet.machine
import train
from robopoet.machine import Machine, why_no_compile
from robopoet.text import windows
from robopoet.training.optimizer import configure_optimizers
from train import TrainConfig

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has hooks of its own; see test_cuda.py")
def test_a_step_and_a_token_never_read_the_device_and_find_every_tensor_on_it(tmp_path):
    done = run_with_hooks("fake_cuda.cpp", tmp_path, (HERE / "trace_cuda.py").read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("step") for line in lines) == 24 and sum("token" in line for line in lines) == 6
    assert sum(line.startswith("compiled") for line in lines) == 3
    assert "launches 132 132" in lines  # by Muon, whatever the number of layers: 220 with six of them once


def test_a_gpu_too_old_for_triton_trains_uncompiled(monkeypatch):
    from torch._dynamo import device_interface
    from torch.utils import _triton

    made = {}
    fake = SimpleNamespace(is_available=lambda: True, Worker=SimpleNamespace(get_device_properties=lambda: made["gpu"]))
    nothing = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(_triton, "has_triton_package", lambda: True)
    monkeypatch.setattr(
        device_interface, "get_interface_for_device", lambda device: fake if device == "cuda" else nothing
    )
    monkeypatch.setattr(robopoet.machine, "has_triton", _triton.has_triton.__wrapped__)
    monkeypatch.setattr(robopoet.machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(robopoet.machine.os.path, "exists", lambda path: True)
    for capability, is_known in (((6, 1), False), ((7, 5), True)):
        made["gpu"] = SimpleNamespace(major=capability[0], minor=capability[1])
        reason = why_no_compile(torch.device("cuda"))
        assert reason is None if is_known else "Triton" in reason
        assert why_no_compile(torch.device("cpu")) is None
    monkeypatch.setattr(_triton, "has_triton_package", lambda: False)
    assert "Triton" in why_no_compile(torch.device("cuda"))


def test_a_step_seeds_its_own_device_alone(monkeypatch):
    Machine(torch.device("cpu"), torch.float32).seed(7)
    found = torch.rand(5)
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(5))
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    monkeypatch.setattr(torch.xpu, "manual_seed_all", lambda seed: pytest.fail("a device that is not there"))
    Machine(torch.device("cuda"), torch.float32).seed(8)
    assert seeded == [8]


def test_what_goes_to_a_gpu_is_pinned_first_so_that_nothing_waits(monkeypatch):
    told = []

    class Tensor:
        def pin_memory(self):
            told.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            told.append((device.type, non_blocking))

    monkeypatch.setattr(windows.torch, "from_numpy", lambda array: Tensor())
    windows.put(np.zeros(3), torch.device("cuda"))
    assert told == ["pinned", ("cuda", True)]
    windows.put(np.zeros(3), torch.device("cpu"))
    assert told[2:] == [("cpu", False)]


def test_on_gpus_the_votes_time_out_before_nccl_does(monkeypatch):
    timeouts = {}
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    store = SimpleNamespace()
    monkeypatch.setattr(robopoet.machine.dist, "rendezvous", lambda *args, **keys: iter([(store, 0, 2)]))
    monkeypatch.setattr(robopoet.machine.dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(
        robopoet.machine.dist, "init_process_group", lambda *args, **keys: timeouts.update(all=keys["timeout"])
    )
    monkeypatch.setattr(robopoet.machine.dist, "new_group", lambda **keys: timeouts.update(keys) or "the votes")
    assert robopoet.machine._join("cpu:gloo,cuda:nccl", 0, 2, 10.0, torch.device("cuda", 0)) == "the votes"
    assert timeouts == {"all": timedelta(seconds=20), "timeout": timedelta(seconds=10), "backend": "gloo"}
    timeouts.clear()
    assert robopoet.machine._join("gloo", 0, 2, 10.0, None) is None
    assert timeouts == {"all": timedelta(seconds=10)}


@pytest.mark.parametrize("recorded", [False, True])
def test_adamw_is_capturable_only_where_it_is_recorded(recorded):
    cfg = TrainConfig(n_layer=1, n_head=1, n_embd=8)
    model, cpu = train.make_model(cfg, 61), Machine(torch.device("cpu"), torch.float32)
    adamw, _ = configure_optimizers(model, cpu, "muon", 1e-2, 0.1, (0.8, 0.99), 0.02, 0.1, recorded)
    assert adamw.defaults["capturable"] == recorded


def test_an_unfused_adamw_skips_a_step_that_is_not_finite(small, monkeypatch):
    """As on MPS, whose AdamW reads no verdict."""
    cpu, cfg = Machine(torch.device("cpu"), torch.float32), TrainConfig(**small | {"optimizer": "adamw"})
    state = train.build_state(cfg, cpu, train.make_model(cfg, 61))
    groups = state.optimizers[0].param_groups
    state.optimizers = [torch.optim.AdamW([{**group, "fused": False} for group in groups], fused=False)]
    ids = torch.zeros(8, 32, dtype=torch.long)
    for is_bad in (False, True):
        before = [p.detach().clone() for p in state.model.parameters()]
        if is_bad:
            state.model.transformer.wte.weight.register_hook(lambda grad: grad * torch.nan)
        train.update(state, ids, ids, torch.tensor(3), 1.0)
        same = [torch.equal(p, was) for p, was in zip(state.model.parameters(), before, strict=True)]
        assert all(same) if is_bad else not any(same)
    assert state.trouble.first.tolist() == [3, 0]


def test_recording_where_it_can_not_be_is_said_and_left_out(small, capsys):
    cpu, cfg = Machine(torch.device("cpu"), torch.float32), TrainConfig(**small | {"record": True})
    assert train.build_state(cfg, cpu, train.make_model(cfg, 61)).recorded_update is None
    assert "record: needs a CUDA device" in capsys.readouterr().err
