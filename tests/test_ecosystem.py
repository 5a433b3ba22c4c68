"""Optional packages, and nanoGPT's weights, tokenizers, data and optimizer, both ways."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS, decode, make_book, within

import prepare
import train
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError
from robopoet.text import tokenizer
from robopoet.text.dataset import read_meta
from robopoet.text.tokenizer import END, BPETokenizer
from robopoet.weights import checkpoint
from robopoet.writing.originality import Originality
from sample import Poet
from train import TrainConfig


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([make_book(3, 60) + "Été, 東京! 1234 don't  we'll\t\n"], 360, [END, "<|alpha|>"])


def test_no_script_imports_optional_packages():
    command = "import sys, prepare, train, sample; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    optional = {"transformers", "tokenizers", "huggingface_hub", "matplotlib", "wandb", "tensorboard"}
    optional |= {"rustbpe", "pydivsufsort"}
    assert done.returncode == 0 and not optional & set(done.stdout.split())


def test_a_missing_optional_package_is_reported_with_how_to_install_it(monkeypatch, books):
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(prepare.DataError, match="bpe needs rustbpe: pip install rustbpe; or use --tokenizer=char"):
        BPETokenizer.train(["abc"], 300, [])
    with pytest.raises(prepare.DataError, match="originality: needs pydivsufsort: pip install pydivsufsort"):
        Originality(books, read_meta(books).text_sha256)


# --- nanoGPT


def save_nanogpt(folder: Path, out: str = "out", chars: str = "\n ,.abcdefghij") -> Path:
    """A character checkpoint as nanoGPT leaves it in a checkout, with its data set's meta.pkl."""
    data = folder / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    ids = {char: i for i, char in enumerate(chars)}
    meta = {"vocab_size": len(chars), "itos": {i: char for char, i in reversed(ids.items())}, "stoi": ids}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=len(chars), n_layer=2, n_head=2, n_embd=16))
    entries = checkpoint.model_entries(model)
    compiled = {f"_orig_mod.{name}": p for name, p in entries["model"].items()}
    content = {"model": compiled, "optimizer": {}, "model_args": entries["model_args"], "iter_num": 5}
    content |= {"best_val_loss": torch.tensor(2.0), "config": {"dataset": "shakespeare_char"}}
    (folder / out).mkdir(exist_ok=True)
    torch.save(content, folder / out / "ckpt.pt")
    return folder / out / "ckpt.pt"


@pytest.fixture
def nanogpt(tmp_path) -> Path:
    """That checkpoint in a checkout, tmp_path."""
    return save_nanogpt(tmp_path)


def test_nanogpts_characters_are_found_in_its_checkout_or_beside_the_checkpoint(nanogpt, tmp_path):
    text = Poet(str(nanogpt), "cpu", "float32").write("abc ", max_new_tokens=20, until="tokens")[0]
    assert text.startswith("abc ") and len(text) == 24
    assert checkpoint.tokenizer_of(checkpoint.load(nanogpt), nanogpt).encode("\n ,a") == [0, 1, 2, 4]
    moved = tmp_path / "far" / "away" / "model.pt"
    moved.parent.mkdir(parents=True)
    os.rename(nanogpt, moved)
    with pytest.raises(CheckpointError, match=r"has no tokenizer; put nanoGPT's meta\.pkl"):
        Poet(str(moved), "cpu", "float32")
    os.rename(tmp_path / "data" / "shakespeare_char" / "meta.pkl", moved.with_name("meta.pkl"))
    assert Poet(str(moved), "cpu", "float32").write("abc ", max_new_tokens=20, until="tokens")[0] == text


def test_a_meta_pkl_runs_nothing(nanogpt, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for content in (pickle.dumps({"itos": Bomb()}), b"not a pickle", pickle.dumps([1])):
        (tmp_path / "data" / "shakespeare_char" / "meta.pkl").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"meta\.pkl: .*is not a meta\.pkl of nanoGPT's"):
            Poet(str(nanogpt), "cpu", "float32")
    assert not (tmp_path / "exploded").exists()


def nested(depth: int) -> bytes:
    return b"\x80\x04" + b"]" * depth + b"a" * (depth - 1) + b"."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is not a meta.pkl"),
        (b"\x80\x04}r\xff\xff\xff\x7f.", "LONG_BINPUT"),  # a memo of 2**31 entries
        (nested(200_000), "is not a meta.pkl"),
        (b"\x80\x04" + b"(" * 200_000 + b"t" * 200_000 + b".", "is not a meta.pkl"),
        (b"\x80\x04" + b"]" * 3_000_000, "must have at most 1,048,576"),
        (b"cos\nsystem\n(S'true'\ntR.", "GLOBAL"),
        (pickle.dumps({"itos": {0: "a", 2: "b"}}), "its ids are not 0 to 1"),
        (pickle.dumps({"itos": {0: "ab"}}), r"length <= 1.*\$\.itos"),
        (pickle.dumps({"itos": {0: ""}}), r"length >= 1.*\$\.itos"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "a character appears twice"),
        (pickle.dumps({"itos": {0: 5}}), r"\$\.itos"),
        (pickle.dumps({"itos": {"a": "a"}}), r"\$\.itos"),
        (pickle.dumps({"itos": ["a"]}), r"\$\.itos"),
        (pickle.dumps({}), "itos"),
    ],
    ids=range(14),
)
def test_a_meta_pkl_that_is_not_nanogpts_is_refused_in_one_line(nanogpt, tmp_path, raw, message):
    path = tmp_path / "data" / "shakespeare_char" / "meta.pkl"
    path.write_bytes(raw)
    with within(30), pytest.raises(CheckpointError, match=rf"^[^\n]*meta\.pkl: [^\n]*{message}[^\n]*$") as caught:
        checkpoint.load_model(nanogpt, torch.device("cpu"), torch.float32)
    assert "TimeoutError" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_meta_pkl_of_many_characters_is_read(nanogpt, tmp_path, protocol):
    chars = [chr(0x4E00 + i) for i in range(20_000)] + [chr(0x10000 + i) for i in range(20_000)]
    itos, stoi = dict(enumerate(chars)), {char: i for i, char in enumerate(chars)}
    meta = {"vocab_size": len(chars), "itos": itos, "stoi": stoi, "note": (1.5, None, True, [-1])}
    (tmp_path / "data" / "shakespeare_char" / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    assert checkpoint.tokenizer_of(checkpoint.load(nanogpt), nanogpt).chars == "".join(chars)


def test_a_new_run_starts_from_nanogpts_weights_on_text_of_its_characters(nanogpt, tmp_path, shapeless):
    (tmp_path / "abc.txt").write_text("abc, def.\nghij abc.\n" * 100)
    keys = {"input": (str(tmp_path / "abc.txt"),), "out": str(tmp_path / "bins"), "tokenizer": str(nanogpt)}
    prepare.main(prepare.PrepareConfig(**keys))
    new = {"dataset": str(tmp_path / "bins"), "out_dir": str(tmp_path / "new")}
    train.main(TrainConfig(**shapeless | new | {"init_from": str(nanogpt)}))
    trained = checkpoint.load(tmp_path / "new" / "best.pt")
    assert trained["model_args"]["block_size"] == 16 and trained["tokenizer"]["chars"] == "\n ,.abcdefghij"
    (tmp_path / "abc.txt").write_text("abc xyz" * 100)
    with pytest.raises(prepare.DataError, match="does not know 'x', 'y', 'z'; leave --tokenizer out for one"):
        prepare.main(prepare.PrepareConfig(**keys))


@pytest.mark.parametrize("vocab_size", [50_257, 50_304])
def test_gpt2s_vocabulary_is_known_by_its_size_also_as_nanogpt_pads_it(bpe, monkeypatch, vocab_size):
    monkeypatch.setattr(BPETokenizer, "gpt2", lambda specials: bpe)
    args = {"n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 1, "vocab_size": vocab_size}
    assert checkpoint.tokenizer_of({"model_args": args}, Path("ckpt.pt")) is bpe


def test_nanogpts_padding_is_never_written(tmp_path, bpe, monkeypatch):
    """A GPT-2 vocabulary that nanoGPT padded to a multiple of 64, and a model that predicts nothing but the padding."""
    monkeypatch.setattr(checkpoint, "GPT2_SIZES", (360, 448))
    monkeypatch.setattr(BPETokenizer, "gpt2", lambda specials: bpe)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=448, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():  # whatever the text, the last hidden state is all ones
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[360:] = 2.0
    entries = checkpoint.model_entries(model)
    torch.save({"model": entries["model"], "model_args": entries["model_args"]}, tmp_path / "padded.pt")
    poet = Poet(str(tmp_path / "padded.pt"), "cpu", "float32")
    probs = poet.model(torch.tensor([poet.tokenizer.encode("The")]))[0].softmax(-1)
    assert probs[..., 360:].sum() > 0.999999
    for settings in ({"temperature": 0}, {"top_p": 1.0}, {"top_p": 0.9, "top_k": 20}, {"repetition_penalty": 1.5}):
        passages = poet.begin("The", 8, max_new_tokens=25, until="tokens", **settings)
        for _ in poet.stream(passages):
            pass
        assert max(id for passage in passages for id in passage.ids) < bpe.vocab_size == 360


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("learned", None),
        ("rotary", r'Missing key\(s\) in state_dict: "transformer.wpe.weight"'),
        ("llama", r'wpe.weight"[^$]*size mismatch for transformer.h.0.attn.c_attn.weight[^$]*mlp.c_fc.weight'),
    ],
)
def test_nanogpts_model_takes_learned_positions_and_says_what_it_misses_in_others(small, kind, message):
    """As its sample.py and train.py do: a model from model_args, then load_state_dict."""
    train.main(TrainConfig(**small | KINDS[kind]))
    saved = torch.load(Path(small["out_dir"]) / "best.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))  # has the names and shapes of nanoGPT's
    with pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext():
        model.load_state_dict(saved["model"])


def test_prepared_characters_are_a_data_set_of_nanogpts(books):
    meta = pickle.loads((books / "meta.pkl").read_bytes())
    ids = np.fromfile(books / "val.bin", dtype=np.uint16)
    tok = tokenizer.from_json(json.loads((books / "meta.json").read_text())["tokenizer"])
    assert meta["vocab_size"] == tok.vocab_size == len(meta["itos"]) and max(meta["itos"]) == tok.vocab_size - 1
    parts = "".join(meta["itos"][i] for i in ids.tolist()).split(END)
    assert "".join(parts) == decode(tok, ids.tolist())
    assert [meta["stoi"][char] for char in parts[0]] == ids[: len(parts[0])].tolist()


def test_nanogpts_optimizer_resumes_from_ours(small):
    """Its AdamW has two groups, matrices and vectors, each in the order of the model's parameters."""
    train.main(TrainConfig(**small | {"optimizer": "adamw"}))
    saved = torch.load(Path(small["out_dir"]) / "ckpt.pt", weights_only=True)
    assert isinstance(saved["iter_num"], int) and isinstance(saved["best_val_loss"], float)
    model = checkpoint.build_model(saved, Path("ckpt.pt"))
    params = dict(model.named_parameters())
    groups = [
        {"params": [p for p in params.values() if p.dim() >= 2]},
        {"params": [p for p in params.values() if p.dim() < 2]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    optimizer.load_state_dict(saved["optimizer"])
    for p, state in optimizer.state.items():
        assert state["exp_avg"].shape == p.shape and state["step"] == small["max_iters"]
    assert len(optimizer.state) == len(params)


def test_a_checkpoints_tokenizer_of_another_language_is_warned_of(tmp_path, bpe, capsys):
    model = GPT(GPTConfig(block_size=16, vocab_size=bpe.vocab_size, n_layer=1, n_head=1, n_embd=8))
    checkpoint.save(tmp_path / "a.pt", {**checkpoint.model_entries(model), "tokenizer": bpe.to_json()})
    (tmp_path / "ru.txt").write_text("Все счастливые семьи похожи друг на друга.\n" * 100, "utf-8")
    keys = {"input": (str(tmp_path / "ru.txt"),), "tokenizer": str(tmp_path / "a.pt")}
    prepare.main(prepare.PrepareConfig(**keys, out=str(tmp_path / "bins")))
    assert "a.pt's was made for another language than this text's; leave --tokenizer out" in capsys.readouterr().err
