"""The machine: which device a run gets, and torchrun's environment."""

import time
from types import SimpleNamespace

import pytest
import torch

import robopoet.machine
from robopoet.errors import ConfigError
from robopoet.machine import find_machine


@pytest.fixture
def alone(monkeypatch):
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    return monkeypatch


def test_cpu_is_always_available(alone):
    machine = find_machine("cpu", "bfloat16")
    assert (machine.device, machine.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert (machine.rank, machine.world_size, machine.is_main) == (0, 1, True)


def test_a_missing_gpu_names_the_way_out(alone):
    alone.setattr(torch.cuda, "device_count", lambda: 0)
    for device in ("cuda", "cuda:3"):
        with pytest.raises(ConfigError, match=r"--device=cpu.*config/demo\.yaml"):
            find_machine(device, "float32")


def test_a_missing_mps_is_reported(alone):
    alone.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="mps"):
        find_machine("mps", "float32")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dtype": "float64"}, "^dtype: found float64, which mps lacks; use --dtype=float32 or --device=cpu$"),
        ({"WORLD_SIZE": "2"}, "^device: found mps, but 2 processes can't share it; use --device=cpu, or one$"),
    ],
)
def test_what_mps_can_not_do_is_said_in_one_line(alone, keys, message):
    alone.setattr(torch.backends.mps, "is_available", lambda: True)
    alone.setattr(torch.cuda, "is_available", lambda: False)
    dtype = keys.pop("dtype", "float32")
    for name, value in ({"RANK": "0", "LOCAL_RANK": "0", **keys} if keys else {}).items():
        alone.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        find_machine("mps", dtype)


CU126 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90".split()
CU128 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120".split()
CU130 = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120".split()


@pytest.mark.parametrize(
    ("capability", "builds", "wheel"),
    [
        ((6, 1), CU126, None),  # GTX 1060: runs 6.0's
        ((6, 1), CU128, "cu126"),
        ((7, 0), CU130, "cu126"),  # V100
        ((7, 0), CU126, None),
        ((8, 9), CU128, None),  # RTX 4090: runs 8.6's
        ((8, 0), ["sm_86"], "cu130"),  # a later minor version's binary does not run
        ((12, 0), CU126, "cu130"),  # RTX 5090
        ((12, 1), CU130, None),
        ((13, 0), CU130, None),  # compiled from compute_120
        ((13, 0), CU128, "cu130"),
        ((9, 0), ["sm_90a"], None),
        ((9, 1), ["sm_90a"], "cu130"),
        ((9, 0), ["gfx90a"], None),
    ],
)
def test_a_card_without_kernels_is_told_which_wheel_has_them(alone, capsys, capability, builds, wheel):
    card = SimpleNamespace(name="a card", major=capability[0], minor=capability[1])
    taken = []
    alone.setattr(torch.cuda, "is_available", lambda: True)
    alone.setattr(torch.cuda, "device_count", lambda: 1)
    alone.setattr(torch.cuda, "get_device_properties", lambda device: card)
    alone.setattr(torch.cuda, "get_arch_list", lambda: builds)
    alone.setattr(torch.cuda, "set_device", taken.append)
    alone.setattr(torch, "set_float32_matmul_precision", taken.append)
    by_itself = find_machine("auto", "float32").device
    warning = capsys.readouterr().err
    if wheel is None:
        assert by_itself == find_machine("cuda", "float32").device == torch.device("cuda", 0) and not warning
        return
    assert by_itself == torch.device("cpu") and not taken
    with pytest.raises(ConfigError) as error:
        find_machine("cuda", "float32")
    for line, way_out in ((warning.strip(), "; taking the CPU"), (str(error.value), ", or use --device=cpu")):
        assert f"device: a card has compute capability {capability[0]}.{capability[1]}, for which" in line
        assert f"install one from the index {wheel} " in line and line.endswith(way_out) and "\n" not in line


@pytest.mark.parametrize(
    ("capability", "trains", "line"),
    [
        ((8, 6), True, "cuda:0, float32 as TF32, ranks: 1"),
        ((8, 6), False, "cuda:0, float32, ranks: 1"),
        ((7, 5), True, "cuda:0, float32, ranks: 1"),
    ],
)
def test_float32_is_trained_as_tf32_where_there_is_such_and_said(alone, capability, trains, line):
    precision = ["highest"]
    alone.setattr(torch.cuda, "device_count", lambda: 1)
    alone.setattr(torch.cuda, "set_device", lambda device: None)
    alone.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    alone.setattr(robopoet.machine, "why_no_kernels", lambda device: None)
    alone.setattr(torch, "set_float32_matmul_precision", lambda value: precision.append(value))
    alone.setattr(torch, "get_float32_matmul_precision", lambda: precision[-1])
    assert str(find_machine("cuda", "float32", trains=trains)) == line
    assert str(find_machine("cpu", "float32")) == "cpu, float32, ranks: 1"


@pytest.mark.parametrize("device", ["gpu", "tpu", "", "cuda:x", "cuda:-1", "meta", "xpu"])
def test_an_unknown_device_lists_the_known_ones(alone, device):
    with pytest.raises(ConfigError, match=r"device.*auto, cpu, cuda"):
        find_machine(device, "float32")


def test_auto_takes_cuda_then_mps_then_cpu(alone):
    alone.setattr(torch.cuda, "is_available", lambda: False)
    alone.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_machine("auto", "float32").device.type == "cpu"
    alone.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_machine("auto", "float32").device.type == "mps"


@pytest.mark.parametrize(("slowed", "trained"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_auto_trains_in_the_dtype_that_multiplies_faster_and_writes_in_bfloat16(alone, slowed, trained):
    def product(a, b):
        laps.append(a.dtype)
        clock[0] += 2 if a.dtype is getattr(torch, slowed) else 1

    laps, clock = [], [0.0]
    alone.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    alone.setattr(robopoet.machine, "linear", product)
    alone.setattr(robopoet.machine.time, "thread_time", lambda: clock[0])
    assert find_machine("cpu", "auto").dtype is getattr(torch, trained)
    assert set(laps) == {torch.float32, torch.bfloat16}
    assert find_machine("cpu", "auto", trains=False).dtype is torch.bfloat16
    alone.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert find_machine("cpu", "auto").dtype is find_machine("cpu", "auto", trains=False).dtype is torch.float32


def test_torchruns_environment_must_be_numbers(alone):
    alone.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK"):
        find_machine("cpu", "float32")


@pytest.mark.parametrize("kept", ["True", "False"])
def test_several_agents_are_warned_of_a_store_that_names_dead_ranks(alone, capsys, kept):
    names = {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": kept}
    for name, value in names.items():
        alone.setenv(name, value)
    alone.setattr(robopoet.machine.dist, "rendezvous", lambda *args, **keys: iter([(None, 0, 2)]))
    alone.setattr(robopoet.machine.dist, "init_process_group", lambda *args, **keys: None)
    robopoet.machine._join("gloo", 0, 2, 10.0, None)
    assert ("set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err) == (kept == "True")


def test_other_programs_do_not_change_the_dtype_of_a_cpu(monkeypatch):
    """A product that waits for a core takes longer, but no more of its thread's own time."""

    def product(a, b):
        if a.dtype is torch.float32:
            time.sleep(0.01)
        else:
            begin = time.thread_time()
            while time.thread_time() - begin < 0.002:
                pass

    monkeypatch.setattr(robopoet.machine, "linear", product)
    assert robopoet.machine._faster_on_cpu() == "float32"
