"""Activations computed again, and what a run says when the GPU has too little memory."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, LLAMA
from test_train import losses, run

import configurator
import train
from model import GPT, GPTConfig
from robopoet import machine
from robopoet.training.memory import recompute_blocks
from train import TrainConfig


def saved_for_backward(model: GPT) -> int:
    """The elements that a forward pass of `model` keeps for the backward pass, parameters left out."""
    kept, params = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(model.config.vocab_size, (4, 32))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, ids)
    return sum(storage.nbytes() // 4 for storage in kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_blocks_inputs_are_kept(kind):
    shape = {"n_layer": 6, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": 7} | KINDS[kind]
    models = [GPT(GPTConfig(**shape)) for _ in range(2)]
    recompute_blocks(models[1])
    plain, recomputed = map(saved_for_backward, models)
    inputs = 6 * 4 * 32 * 32
    assert inputs <= recomputed < 2 * inputs and plain > 8 * recomputed


@pytest.mark.parametrize(("optimizer", "kind"), [("muon", {}), ("adamw", {}), ("muon", LLAMA)], ids=str)
def test_the_losses_are_the_same_bits(small, tmp_path, optimizer, kind):
    keys = small | kind | {"dropout": 0.1, "optimizer": optimizer, "batch_size": 4, "gradient_accumulation_steps": 2}
    recomputed = run(keys, recompute=True, out_dir=str(tmp_path / "recomputed"))
    assert losses(recomputed) == losses(run(keys))


def test_a_micro_batchs_logits_are_gone_before_the_next_ones_are_made(small):
    cpu, cfg = machine.Machine(torch.device("cpu"), torch.float32), TrainConfig(**small | {"batch_size": 4})
    cfg = dataclasses.replace(cfg, gradient_accumulation_steps=3)
    state, earlier = train.build_state(cfg, cpu, train.make_model(cfg, 61)), []

    def forward(*args, **keys):
        assert all(logits() is None for logits in earlier)
        logits, loss = state.model(*args, **keys)
        earlier.append(weakref.ref(logits))
        return logits, loss

    forward.train = state.model.train
    state.forward = forward
    ids = torch.zeros(12, 32, dtype=torch.long)
    train.update(state, ids, ids, torch.tensor(0), 1.0)
    assert len(earlier) == 3


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        ({}, "--batch_size=4 --gradient_accumulation_steps=2 (now 8 and 1; the same losses), or --recompute=true"),
        ({"batch_size": 1, "recompute": True}, "take a block_size below 32"),
    ],
)
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory (MPS allocated")]
)
def test_too_little_memory_is_told_with_the_keys_to_change(small, monkeypatch, capsys, keys, advice, error):
    def full(*args):
        raise error

    monkeypatch.setattr(train, "train_step", full)
    assert advice in last_words(small | keys, monkeypatch, capsys)


def last_words(keys: dict, monkeypatch, capsys) -> str:
    """What train.py prints when the GPU has too little memory for a run with those keys; test_cuda.py asks a GPU."""
    monkeypatch.setattr("sys.argv", ["train.py", *(f"--{key}={value}" for key, value in keys.items())])
    with pytest.raises(SystemExit) as end:
        configurator.launch(train.main, train.TrainConfig)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "train.py: the GPU has too little memory; take " in said
    return said


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((6, 1), "float32"), ((6, 0), "float16")],
)
def test_each_gpu_gets_the_dtype_that_is_fast_on_it(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert machine._fastest_dtype(SimpleNamespace(type="cuda"), True) == dtype
