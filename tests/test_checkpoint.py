"""Checkpoints: saved atomically, refused if damaged, and not trusted about shapes and sizes."""

import hashlib
import io
import math
import os
import pickle
import random
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import within

from model import GPT, GPTConfig
from robopoet.errors import CheckpointError
from robopoet.text.tokenizer import CharTokenizer
from robopoet.weights import checkpoint, huggingface

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


def test_a_checkpoint_alone_is_enough_to_generate(saved, content):
    model, tokenizer, rest = checkpoint.load_model(saved, torch.device("cpu"), torch.float64)
    assert model.config == CONFIG and not model.training
    for name, p in model.state_dict().items():
        assert torch.equal(p, content["model"][name].double())
    assert tokenizer.encode("abz") == [0, 1, 10]
    assert rest["iter_num"] == 3


def test_model_args_are_nanogpts_seven_and_torch_load_reads_the_file(saved):
    plain = torch.load(saved, weights_only=True)
    assert set(plain["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert plain["model_extra"] | {"gelu": "tanh", "norm": "layernorm"} == plain["model_extra"]


def test_every_flipped_bit_is_refused(saved, tmp_path):
    intact, rng = saved.read_bytes(), random.Random(0)
    places = [rng.randrange(len(intact)) for _ in range(205)] + list(range(len(intact) - 95, len(intact)))
    for place in places:
        damaged = bytearray(intact)
        damaged[place] ^= 1 << rng.randrange(8)
        (tmp_path / "flipped.pt").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"flipped\.pt"):
            checkpoint.load(tmp_path / "flipped.pt")


def test_every_truncation_is_refused(saved, tmp_path):
    intact = saved.read_bytes()
    for size in [0, 1, len(intact) - 1, len(intact) - 71, len(intact) - 72, *range(2, len(intact), len(intact) // 200)]:
        (tmp_path / "cut.pt").write_bytes(intact[:size])
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


def test_the_file_before_is_kept_on_request(saved, content):
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


def test_a_file_that_is_no_checkpoint_is_refused_by_name(tmp_path, content):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    checkpoint.save(tmp_path / "misfit.pt", content | {"model_args": content["model_args"] | {"n_embd": 32}})
    for name, message in {
        "list.pt": "no 'model'",
        "text.pt": r"is not a checkpoint, or is damaged \(BadZipFile\)$",
        "no.pt": "not found",
        "": "is a folder",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"misfit\.pt: its weights don't fit .*wte.* must be \(11, 32\)"):
        checkpoint.load_model(tmp_path / "misfit.pt", torch.device("cpu"), torch.float32)


# --- what a file claims


def refused(content: dict, folder: Path, message: str) -> None:
    """Save `content` with a valid hash: it is refused in one line, soon and in little memory."""
    path = folder / "claims.pt"
    checkpoint.save(path, content)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with within(30), pytest.raises(CheckpointError, match=rf"^[^\n]*claims\.pt: [^\n]*{message}[^\n]*$") as caught:
        checkpoint.load_model(path, torch.device("cpu"), torch.float32)
    assert "TimeoutError" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 2**19


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(content, tmp_path, value):
    content["model"]["transformer.h.0.mlp.c_fc.weight"][3, 4] = value
    refused(content, tmp_path, r"transformer\.h\.0\.mlp\.c_fc\.weight is not finite")


def test_an_output_matrix_that_is_not_the_embedding_is_refused(content, tmp_path):
    content["model"]["lm_head.weight"] = content["model"]["lm_head.weight"] + 1
    refused(content, tmp_path, "its lm_head is not tied to its embeddings")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "n_layer: found 0, must be at least 1 and at most 1,048,576"),
        ({"n_layer": 10**5}, "there are 10 tensors, must be 600004"),
        ({"n_layer": 10**9}, "n_layer: found 1000000000, must be at least 1 and at most 1,048,576"),
        ({"n_layer": 2}, "there are 10 tensors, must be 16"),
        ({"n_layer": "1"}, r"\$\.model_args\.n_layer"),
        ({"n_layer": True}, r"\$\.model_args\.n_layer"),
        ({"n_embd": 10**9}, "n_embd: found 1000000000, must be at least 1 and at most 1,048,576"),
        ({"n_embd": 2**20}, r"wte\.weight is \(11, 16\), must be \(11, 1048576\)"),
        ({"vocab_size": 10**6}, r"wte\.weight is \(11, 16\), must be \(1000000, 16\)"),
        ({"block_size": 10**6}, r"wpe\.weight is \(8, 16\), must be \(1000000, 16\)"),
        ({"n_head": 3}, "n_embd: found 16, must be divisible by n_head, 3"),
        ({"n_head": 0}, "n_head: found 0, must be at least 1 and at most 1,048,576"),
        ({"n_head": None}, r"\$\.model_args\.n_head"),
        ({"bias": True}, "there are 10 tensors, must be 17"),
        ({"bias": "no"}, r"\$\.model_args\.bias"),
        ({"dropout": 7.5}, "dropout: found 7.5, must be from 0 to 1"),
        ({"dropout": math.nan}, "dropout: found nan, must be from 0 to 1"),
        ({"rotary": True}, "unknown field `rotary`"),
    ],
)
def test_a_shape_that_is_not_the_weights_is_refused_before_a_model_is_built(content, tmp_path, changes, message):
    refused(content | {"model_args": content["model_args"] | changes}, tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": []}, "its weights don't fit"),
        ({"model": {1: torch.zeros(2)}}, "its weights don't fit"),
        ({"model_args": None}, r"\$\.model_args"),
        ({"model_args": {}}, "missing required field `n_layer`"),
        ({"model_extra": {"gelu": "relu"}}, "gelu: found 'relu', must be none or tanh"),
        ({"model_extra": {"gelu": 5}}, r"\$\.model_extra\.gelu"),
        ({"model_extra": {"rotary": True}}, "unknown field `rotary`"),
        ({"tokenizer": {"kind": "char", "chars": "aa", "specials": []}}, "appears twice"),
        ({"tokenizer": {"kind": "char", "chars": "abcdefghijkl", "specials": []}}, "has 12 ids"),
        ({"tokenizer": {}}, r"\$\.tokenizer"),
        ({"iter_num": -1}, r"\$\.iter_num"),
        ({"best_val_loss": "low"}, r"\$\.best_val_loss"),
        ({"text_sha256": 5}, r"\$\.text_sha256"),
        ({"licences": "MIT"}, r"\$\.licences"),
        ({"config": {"dataset": 5}}, r"\$\.config\.dataset"),
    ],
)
def test_a_header_of_the_wrong_type_is_refused(content, tmp_path, changes, message):
    refused(content | changes, tmp_path, message)


@pytest.mark.parametrize(
    ("args", "extra", "message"),
    [
        ({"block_size": 1}, {}, "block_size: found 1, must be at least 2 with rotary positions"),
        ({"n_head": 16}, {}, "n_embd: found 16, must be divisible by twice n_head, 32"),  # heads of one number
        ({}, {"positions": "learned"}, "there are 9 tensors, must be 10; positions are learned, transformer.wpe"),
        ({}, {"positions": "alibi"}, "positions: found 'alibi', must be learned or rotary"),
    ],
)
def test_a_rotary_checkpoint_of_a_shape_it_can_not_have_is_refused(content, tmp_path, args, extra, message):
    rotary = content | {"model_extra": {"gelu": "tanh", "positions": "rotary"}}
    refused(rotary, tmp_path, "there are 10 tensors, must be 9; positions are rotary, transformer.wpe.weight belongs")
    del content["model"]["transformer.wpe.weight"]
    checkpoint.save(tmp_path / "rotary.pt", rotary)
    checkpoint.load_model(tmp_path / "rotary.pt", torch.device("cpu"), torch.float32)
    changes = {"model_args": content["model_args"] | args, "model_extra": rotary["model_extra"] | extra}
    refused(rotary | changes, tmp_path, message)


def test_a_tensor_of_another_kind_is_refused(content, tmp_path):
    name, zeros, weights = "transformer.ln_f.weight", torch.zeros(16), content["model"]
    for odd in (zeros.long(), zeros.to_sparse(), zeros.to("meta"), [0.0], 5):
        refused(content | {"model": weights | {name: odd}}, tmp_path, "its weights don't fit.*ln_f|damaged")


def test_tensors_that_claim_more_numbers_than_the_file_holds_are_refused(content, tmp_path):
    vocab_size, weights = 2**20, content["model"]
    wide = torch.zeros(1, 16).expand(vocab_size, 16)  # 64 bytes that stand for 64 MB
    args = content["model_args"] | {"vocab_size": vocab_size}
    tied = {"transformer.wte.weight": wide, "lm_head.weight": wide}
    refused(content | {"model": weights | tied, "model_args": args}, tmp_path, "claim more numbers than the file holds")


def test_a_zip_that_unpacks_to_more_than_its_size_is_refused(content, tmp_path):
    nano = {"model": content["model"], "model_args": content["model_args"], "x": torch.zeros(10**6)}
    torch.save(nano, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain:
        parts = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, part in parts.items():
            packed.writestr(name, part)
    assert (tmp_path / "bomb.pt").stat().st_size < 50_000
    with pytest.raises(CheckpointError, match=r"bomb\.pt: is not a checkpoint, or is damaged \(ValueError\)$"):
        checkpoint.load(tmp_path / "bomb.pt")
    old = io.BytesIO()
    torch.save(content, old, _use_new_zipfile_serialization=False)  # names sizes before it has the bytes
    (tmp_path / "old.pt").write_bytes(old.getvalue())
    with pytest.raises(CheckpointError, match=r"old\.pt: is not a checkpoint"):
        checkpoint.load(tmp_path / "old.pt")


@pytest.mark.parametrize("missing", [["bias"], ["dropout"], ["bias", "dropout"]])
def test_missing_arguments_of_an_early_nanogpt_are_filled_in(content, tmp_path, missing):
    """Its early checkpoints lack `bias` or `dropout`, and hold the loss in a tensor."""
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
    args = {key: value for key, value in checkpoint.model_entries(model)["model_args"].items() if key not in missing}
    nano = {"model": model.state_dict(), "model_args": args, "iter_num": 3, "best_val_loss": torch.tensor([1.5])}
    torch.save(nano, tmp_path / "nano.pt")
    found = checkpoint.load(tmp_path / "nano.pt")
    assert (
        found["model_args"]["bias"] is True and type(found["best_val_loss"]) is float and found["best_val_loss"] == 1.5
    )
    assert checkpoint.build_model(found, tmp_path / "nano.pt").config == model.config


# --- mutations under a valid hash: a mutated file fails at its hash, so here the content is mutated before it is saved


def with_value(value: float):
    def change(weight: torch.Tensor, rng: random.Random) -> torch.Tensor:
        changed = weight.clone()
        changed[tuple(rng.randrange(n) for n in weight.shape)] = value
        return changed

    return change


def renamed(model: dict, rng: random.Random) -> dict:
    name = rng.choice(list(model))
    return {(key + "x" if key == name else key): weight for key, weight in model.items()}


def swapped(model: dict, rng: random.Random) -> dict:
    one = rng.choice(list(model))
    other = rng.choice([name for name in model if model[name].shape != model[one].shape])
    return model | {one: model[other], other: model[one]}


BAD_WEIGHT = {
    "nan": with_value(math.nan),
    "infinite": with_value(-math.inf),
    "a row less": lambda w, rng: w[:-1].clone(),
    "a row more": lambda w, rng: torch.cat([w, w[:1]]),
    "one more dimension": lambda w, rng: w[None],
    "integers": lambda w, rng: w.to(rng.choice([torch.int64, torch.int8, torch.bool])),
    "complex numbers": lambda w, rng: w.to(torch.complex64),
    "float8": lambda w, rng: w.to(torch.float8_e4m3fn),
    "no memory": lambda w, rng: w.to("meta"),
    "no tensor": lambda w, rng: rng.choice([None, 5, [0.0], "w", {}]),
}
BAD_MODEL = {
    "a weight missing": lambda m, rng: {name: m[name] for name in rng.sample(list(m), len(m) - 1)},
    "a weight too many": lambda m, rng: m | {f"transformer.h.{rng.randrange(9)}.x.weight": torch.zeros(3)},
    "a weight renamed": renamed,
    "two weights swapped": swapped,
    "one number for many": lambda m, rng: m | {"transformer.ln_f.weight": torch.zeros(1).expand(16)},
}
BAD_ARGS = {
    "n_layer": [2, 3, 1000],
    "n_embd": [2, 8, 32, 2**20],
    "block_size": [1, 7, 9, 2**20],
    "vocab_size": [12, 2**20],
    "bias": [True],
}
BAD = [*BAD_WEIGHT, *BAD_MODEL, *BAD_ARGS]


def mutant(content: dict, kind: str, rng: random.Random) -> dict:
    model, args = content["model"], content["model_args"]
    if kind in BAD_ARGS:
        return content | {"model_args": args | {kind: rng.choice(BAD_ARGS[kind])}}
    if kind in BAD_MODEL:
        return content | {"model": BAD_MODEL[kind](model, rng)}
    name = rng.choice(list(model))
    return content | {"model": model | {name: BAD_WEIGHT[kind](model[name], rng)}}


@pytest.mark.parametrize("kind", BAD)
def test_a_mutant_with_a_valid_hash_is_loaded_and_then_refused_by_build_model(content, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # slow, and nothing crashes here
    path, before_kb = tmp_path / "mutant.pt", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(8):
        checkpoint.save(path, mutant(content, kind, random.Random(seed)))
        loaded = checkpoint.load(path)  # its hash and its header are right
        with pytest.raises(
            CheckpointError, match=r"^[^\n]*mutant\.pt: [^\n]*(its weights don't fit|is not finite)[^\n]*$"
        ):
            checkpoint.build_model(loaded, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 2**18


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_that_differs_but_fits_is_built(content, tmp_path, dtype):
    model, path = content["model"], tmp_path / "other.pt"
    other = {f"_orig_mod.{name}": weight.to(dtype) for name, weight in reversed(model.items())}
    checkpoint.save(path, content | {"model": other, "model_args": content["model_args"] | {"n_head": 4}})
    built = checkpoint.build_model(checkpoint.load(path), path)
    assert built.config.n_head == 4
    for name, weight in built.state_dict().items():
        assert weight.dtype is torch.float32 and torch.equal(weight, model[name].to(dtype).float())


# --- which file it is


def test_only_a_regular_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path in (tmp_path / "pipe.pt", Path("/dev/zero")):
        for read in (checkpoint.load, checkpoint.weights_sha256):
            with pytest.raises(CheckpointError, match="is not a regular file"):
                read(path)


def test_valid_names_are_fetched_from_the_hub_and_file_names_are_not(monkeypatch, tmp_path):
    fetched = []

    def fetch(name):
        fetched.append(name)
        raise CheckpointError("fetched")

    monkeypatch.setattr(huggingface, "fetch", fetch)
    monkeypatch.setattr("robopoet.files.did_you_mean_path", lambda path: "")  # whatever lies beside the checkout
    monkeypatch.chdir(tmp_path)
    for name in (names := ["gpt2", "org/model-1.5B", "org/tiny.en", "a.b/c.d", "org_1/model_2"]):
        with pytest.raises(CheckpointError, match=r"^fetched$"):
            checkpoint.load(Path(name))
    files = [*"out/x.pt best.pt out/demo/best ../x /no/such ckpt.PTH model.safetensors".split(), "x" * 300 + ".pt"]
    for name in [*files, "ünï/code", "a\0b", "-x/y", "org/.x"]:
        with pytest.raises(CheckpointError, match="not found; train first"):
            checkpoint.load(Path(name))
    assert fetched == names


def test_a_hash_of_a_file_is_read_in_blocks(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(a := os.urandom(3_000_000))
    (tmp_path / "b.safetensors").write_bytes(b := os.urandom(2_000_000))
    (tmp_path / "c.safetensors").write_bytes(c := b"c")
    monkeypatch.setattr(Path, "read_bytes", None)
    assert checkpoint.weights_sha256(tmp_path / "a.pt") == hashlib.sha256(a).hexdigest()
    assert checkpoint.weights_sha256(tmp_path) == hashlib.sha256(b + c).hexdigest()
