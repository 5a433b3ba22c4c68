import os
import pickle
import random
from pathlib import Path

import pytest
import torch

import checkpoint
from checkpoint import CheckpointError
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig

CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, gelu="tanh", bias=False)


@pytest.fixture
def content() -> dict:
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abcdefgh", ["<|endoftext|>", "<|alice|>", "<|unk|>"])
    return {**checkpoint.model_entries(GPT(CONFIG)), "tokenizer": tokenizer.to_json(), "iter_num": 3}


@pytest.fixture
def saved(content, tmp_path) -> Path:
    checkpoint.save(tmp_path / "ckpt.pt", content)
    return tmp_path / "ckpt.pt"


def test_a_checkpoint_alone_is_enough_to_write(saved, content):
    model, tokenizer, rest = checkpoint.load_model(saved, torch.device("cpu"), torch.float64)
    assert model.config == CONFIG and not model.training
    for name, p in model.state_dict().items():
        assert torch.equal(p, content["model"][name].double())
    assert tokenizer.encode("abz") == [0, 1, 10]
    assert rest["iter_num"] == 3


def test_model_args_are_nanogpts_seven_and_torch_load_reads_the_file(saved):
    plain = torch.load(saved, weights_only=True)
    assert set(plain["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert plain["model_extra"] == {"gelu": "tanh"}


def test_every_flipped_bit_is_refused(saved, tmp_path):
    whole, rng = saved.read_bytes(), random.Random(0)
    places = [rng.randrange(len(whole)) for _ in range(205)] + list(range(len(whole) - 95, len(whole)))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"flipped\.pt"):
            checkpoint.load(tmp_path / "flipped.pt")


def test_every_truncation_is_refused(saved, tmp_path):
    whole = saved.read_bytes()
    for size in [0, 1, len(whole) - 1, len(whole) - 71, len(whole) - 72, *range(2, len(whole), len(whole) // 200)]:
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            checkpoint.load(tmp_path / "cut.pt")


def test_a_failed_write_leaves_the_old_file_and_no_other(saved, content, monkeypatch):
    before = saved.read_bytes()

    def half(obj, f):
        f.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved, content)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["ckpt.pt"]


def test_the_file_before_is_kept_when_asked(saved, content):
    before = saved.read_bytes()
    checkpoint.save(saved, content | {"iter_num": 4}, keep=saved.with_name("ckpt.prev.pt"))
    assert saved.with_name("ckpt.prev.pt").read_bytes() == before
    assert checkpoint.load(saved)["iter_num"] == 4


def test_a_malicious_pickle_runs_nothing(tmp_path, content):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    checkpoint.save(tmp_path / "bomb.pt", content | {"config": Bomb()})
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_nanogpts_own_checkpoint_is_read_without_a_hash(tmp_path, content):
    compiled = {f"_orig_mod.{name}": p for name, p in content["model"].items()}
    torch.save({"model": compiled, "model_args": content["model_args"], "iter_num": 5}, tmp_path / "nano.pt")
    model = checkpoint.build_model(checkpoint.load(tmp_path / "nano.pt"), tmp_path / "nano.pt")
    assert torch.equal(model.lm_head.weight, content["model"]["lm_head.weight"]) and model.config.gelu == "none"


def test_ours_without_its_hash_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="lost its SHA-256"):
        checkpoint.load(tmp_path / "bare.pt")


def test_what_is_no_checkpoint_is_named(tmp_path, content):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    checkpoint.save(tmp_path / "misfit.pt", content | {"model_args": content["model_args"] | {"n_embd": 32}})
    for name, message in {
        "list.pt": "no 'model'",
        "text.pt": "damaged",
        "no.pt": "not found",
        "": "is a folder",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"misfit\.pt: its weights don't fit"):
        checkpoint.load_model(tmp_path / "misfit.pt", torch.device("cpu"), torch.float32)
