"""What a book starts from: which model is chosen for it, by which measure, and how a run of minutes goes on from it."""

import bz2
import math
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_book

import configurator
import prepare
import train
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError, ConfigError
from robopoet.text.dataset import read_meta
from robopoet.text.tokenizer import END, BPETokenizer
from robopoet.training import plan
from robopoet.training.run import find_start
from robopoet.weights import bases, checkpoint, huggingface, pretrained
from sample import Poet

LLAMA = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
BOOK = make_book(2, 60)


@pytest.fixture
def smollm2(tmp_path, monkeypatch) -> Path:
    """A folder with a small Llama, which is at hand as smollm2."""
    torch.manual_seed(0)
    tok = BPETokenizer.train([make_book(1, 60)], 340, [END])
    shape = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "block_size": 512}
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, **LLAMA | shape)).eval()
    huggingface.export(model, tok, checkpoint.model_entries(model), "a passage", tmp_path / "smollm2")
    monkeypatch.setattr(pretrained, "locate", lambda name: tmp_path / "smollm2")
    monkeypatch.setattr(bases, "at_hand", lambda: "smollm2")
    monkeypatch.chdir(tmp_path_of(tmp_path))
    return tmp_path / "smollm2"


def tmp_path_of(tmp_path: Path) -> Path:
    """A folder without a file called smollm2, which would win over the name."""
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def prepared(tmp_path: Path, name: str, text: str, *argv: str):
    (tmp_path / f"{name}.txt").write_text(text)
    argv = [f"--input={tmp_path}/{name}.txt", f"--out={tmp_path}/{name}", *argv]
    prepare.main(configurator.parse(prepare.PrepareConfig, argv))
    return read_meta(tmp_path / name)


@pytest.mark.parametrize("bits, is_taken", [(0.01, True), (9.0, False)])
def test_the_model_that_predicts_a_text_better_than_bzip2_packs_it_is_taken(
    smollm2, tmp_path, monkeypatch, capsys, bits, is_taken
):
    monkeypatch.setattr(bases, "_bits_per_byte", lambda model, tok, text: bits)
    meta = prepared(tmp_path, "book", BOOK)
    assert meta.start == ("smollm2" if is_taken else "")
    theirs = checkpoint.tokenizer_of(checkpoint.load(smollm2), smollm2)
    assert (meta.tokenizer.to_json()["tokens"] == theirs.to_json()["tokens"]) == is_taken
    text = (tmp_path / "book.txt").read_bytes()
    packed = 8 * len(bz2.compress(text)) / len(text)  # the whole text's; the train split's is close
    said = capsys.readouterr().out
    found = float(said.split("bzip2 ")[1].split(":")[0])
    assert f"smollm2 needs {bits:.2f} bits" in said and found == pytest.approx(packed, rel=0.1)
    assert prepared(tmp_path, "own", BOOK, "--tokenizer=bpe").start == ""
    assert prepared(tmp_path, "given", BOOK, "--tokenizer=smollm2").start == "smollm2"
    monkeypatch.setattr(prepare, "LONG", 1000)
    assert prepared(tmp_path, "long", BOOK).start == ""


def test_bits_per_byte_are_those_of_each_token_in_its_window(smollm2):
    model, tok, _ = checkpoint.load_model(smollm2, torch.device("cpu"), torch.float64)
    text = BOOK[:2500] + "é東"
    ids, nats = tok.encode(text), 0.0
    for i in range(1, len(ids)):
        start = (i - 1) // bases.READ_TOKENS * bases.READ_TOKENS
        logits = model(torch.tensor([ids[start:i]]))[0][0, -1]
        nats -= logits.log_softmax(-1)[ids[i]].item()
    n_bytes = len(text.encode()) - len(tok.decode_bytes(ids[:1]))
    assert len(ids) > 2 * bases.READ_TOKENS
    assert bases._bits_per_byte(model, tok, text) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-9)


@pytest.mark.parametrize("text", ["a", "ab", "Hi.", "Hi.\n\nO!"])
def test_a_text_of_a_few_letters_suits_no_model_or_some(smollm2, tmp_path, text):
    assert prepared(tmp_path, "tiny", text).splits["train"].characters > 0


def test_a_run_of_minutes_goes_on_from_it_and_another_start_may_be_given(smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "_bits_per_byte", lambda model, tok, text: 0.01)
    prepared(tmp_path, "book", BOOK)
    keys = [f"--dataset={tmp_path}/book", "--minutes=0.1", "--max_iters=2", "--device=cpu", "--dtype=float32"]

    def run(name: str, *argv: str) -> dict:
        train.main(configurator.parse(train.TrainConfig, [*keys, f"--out_dir={tmp_path}/{name}", *argv]))
        return yaml.safe_load((tmp_path / name / "config.yaml").read_text())

    found = run("first")
    assert found["init_from"] == "smollm2" and 1 < found["block_size"] <= 1024 and found["optimizer"] == "adafactor"
    assert found["norm"] == "rmsnorm" and found.get("dropout", 0.1) == 0.0
    content = checkpoint.load(tmp_path / "first" / "best.pt")
    assert any("smollm2" in licence for licence in content["licences"])
    assert Poet(str(tmp_path / "first" / "best.pt"), "cpu", "float32").write("The", max_new_tokens=5)
    scratch = ["--init_from=scratch", "--n_layer=1", "--n_head=1", "--n_embd=16"]
    assert "init_from" not in run("second", *scratch)


def test_a_run_without_minutes_learns_without_dropout_if_the_model_did(smollm2, tmp_path):
    prepared(tmp_path, "book", BOOK, "--tokenizer=smollm2")
    keys = [f"--dataset={tmp_path}/book", "--init_from=smollm2", "--max_iters=1", "--device=cpu", "--block_size=16"]
    train.main(configurator.parse(train.TrainConfig, [*keys, f"--out_dir={tmp_path}/run"]))
    assert checkpoint.load(tmp_path / "run" / "best.pt")["config"]["dropout"] == 0.0
    train.main(configurator.parse(train.TrainConfig, [*keys, f"--out_dir={tmp_path}/own", "--dropout=0.2"]))
    assert checkpoint.load(tmp_path / "own" / "best.pt")["config"]["dropout"] == 0.2


def test_a_run_without_minutes_takes_rates_and_rows_for_a_model_that_knows_much(smollm2, tmp_path):
    prepared(tmp_path, "book", BOOK, "--tokenizer=smollm2")
    keys = [f"--dataset={tmp_path}/book", "--init_from=smollm2", "--max_iters=1", "--device=cpu"]

    def chosen(*argv: str) -> dict:
        cfg = configurator.parse(train.TrainConfig, [*keys, *argv])
        found = vars(plan.complete(cfg, find_start(cfg.init_from, tmp_path / "none", False)))
        return {key: found[key] for key in ("optimizer", "learning_rate", "block_size", "batch_size")}

    assert chosen() == {"optimizer": "adafactor", "learning_rate": None, "block_size": 512, "batch_size": 2}
    given = ["--optimizer=muon", "--block_size=16"]
    assert chosen(*given) == {"optimizer": "muon", "learning_rate": 3e-4, "block_size": 16, "batch_size": 64}
    assert chosen("--batch_size=3")["batch_size"] == 3
    assert chosen("--shard=true")["optimizer"] == "adamw"
    with pytest.raises(CheckpointError, match="n_head: the checkpoint has 2, the config 12; leave it out"):
        chosen("--n_head=12")
    with pytest.raises(ConfigError, match=r"n_embd: found 256, must be divisible by n_head, 12"):
        chosen("--init_from=auto", "--n_head=12", f"--out_dir={tmp_path}/none")
