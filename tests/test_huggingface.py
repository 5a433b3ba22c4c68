"""Weights and tokenizers in Hugging Face's format, both ways, against transformers and tokenizers."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import decode, make_book
from lxml import etree
from test_train import run

import prepare
import sample
import train
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError, ConfigError, describe
from robopoet.text import tokenizer, tokenizer_json
from robopoet.text.dataset import read_meta
from robopoet.text.tokenizer import END, BPETokenizer
from robopoet.weights import checkpoint, huggingface
from robopoet.writing.decode import generate
from sample import Poet, SampleConfig
from train import TrainConfig

SVG = "{http://www.w3.org/2000/svg}"
SHAPES = [{}, {"bias": False}, {"gelu": "tanh"}, {"n_layer": 1, "n_head": 4, "block_size": 24}]
SHAPES += [{"positions": "rotary"}, {"positions": "rotary", "bias": False, "gelu": "tanh", "block_size": 64}]


def make_checkpoint(path: Path, tok: tokenizer.Tokenizer, **shape) -> Path:
    """A checkpoint of ours whose weights are all random, biases and LayerNorms too."""
    torch.manual_seed(0)
    config = GPTConfig(**{"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32} | shape, vocab_size=tok.vocab_size)
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    checkpoint.save(path, {**checkpoint.model_entries(model), "tokenizer": tok.to_json()})
    return path


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([make_book(3, 60) + "Été, 東京! 1234 don't  we'll\t\n"], 360, [END, "<|alpha|>"])


def export(path: Path, folder: Path) -> tuple:
    """Export, then load with transformers, in float64: its model and tokenizer."""
    sample.main(SampleConfig(checkpoint=str(path), export=str(folder), device="cpu", dtype="float32", max_new_tokens=5))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    return theirs, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exported_model_is_the_same_in_transformers_and_when_loaded_back(tmp_path, bpe, shape):
    path = make_checkpoint(tmp_path / "best.pt", bpe, **shape)
    theirs, their_tok = export(path, tmp_path / "export")
    ours, tok, _ = checkpoint.load_model(path, torch.device("cpu"), torch.float64)
    back, back_tok, _ = checkpoint.load_model(tmp_path / "export", torch.device("cpu"), torch.float64)
    idx = torch.randint(tok.vocab_size, (3, ours.config.block_size))
    with torch.no_grad():
        logits = ours(idx, idx)[0]
        torch.testing.assert_close(theirs(idx).logits, logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(back(idx, idx)[0], logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(theirs.float()(idx).logits, logits.float(), rtol=0, atol=1e-4)
        theirs.double()
    assert back_tok.to_json() == tok.to_json()
    assert theirs.config.eos_token_id == their_tok.eos_token_id == tok.specials[END]
    assert theirs.generation_config.eos_token_id == tok.specials[END]
    prompt = their_tok("The rabbit", return_tensors="pt")
    new = ours.config.block_size - prompt["input_ids"].shape[1]
    greedy = theirs.generate(**prompt, max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)[0]
    choose = lambda logits: logits.argmax(-1)  # noqa: E731
    written = [ids.item() for ids in generate(ours, prompt["input_ids"], new, choose)]
    assert greedy[-new:].tolist() == written


def test_an_exported_tokenizer_gives_the_same_ids(tmp_path, bpe, books):
    texts = [make_book(9, 20), "  spaces\n\n\n and\ttabs, it's 1234 we'll don't", "Été 東京 🙂", " ", "\n"]
    chars = tokenizer.from_json(json.loads((books / "meta.json").read_text())["tokenizer"])
    val = np.fromfile(books / "val.bin", dtype=np.uint16).tolist()
    for name, tok, checked in (("bpe", bpe, texts), ("char", chars, [decode(chars, val), make_book(9, 3), "é"])):
        _, theirs = export(make_checkpoint(tmp_path / f"{name}.pt", tok), tmp_path / name)
        for text in checked:
            assert theirs(text)["input_ids"] == tok.encode(text)
            assert theirs.decode(tok.encode(text), skip_special_tokens=True) == decode(tok, tok.encode(text))
        for special, id in tok.specials.items():
            assert theirs(special)["input_ids"] == [id]
        saved = json.loads((tmp_path / name / "tokenizer.json").read_bytes())
        for added in (saved["added_tokens"], saved["added_tokens"][::-1]):  # in any order
            back = tokenizer_json.from_huggingface(json.dumps(saved | {"added_tokens": added}))
            assert back.tokenizer.to_json() == tok.to_json() and back.ids == list(range(tok.vocab_size))


@pytest.mark.slow
def test_the_exported_reference_tokenizer_gives_the_same_ids_on_each_full_document(tmp_path):
    prepare.main(prepare.PrepareConfig(corpus="data/robopoet", out=str(tmp_path)))
    meta = read_meta(tmp_path)
    tok = tokenizer.from_json(meta.tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json.to_huggingface(tok)))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for name, split in meta.splits.items():
        ids = np.fromfile(tmp_path / f"{name}.bin", "<u2")
        for span in split.documents:
            part = ids[span.start : span.stop].tolist()[:-1]  # without <|endoftext|>
            assert theirs.encode(decode(tok, part)).ids == part


def test_an_export_has_a_model_card_and_overwrites_nothing(tmp_path, small, capsys):
    train.main(TrainConfig(**small))
    best = Path(small["out_dir"]) / "best.pt"
    export(best, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "export").iterdir()} == {0o644}
    assert "Validation loss: " in card and "- alpha: " in card and "`<|beta|>`" in card
    with pytest.raises(ConfigError, match="exists"):
        export(best, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def values_drawn(drawing: etree.Element, along: str, css_class: str, places: list[float]) -> np.ndarray:
    """The values at these places, shares of a chart's width or height, by the numbers that stand beside its grid."""
    ticks = [(tick.get(along), tick.text) for tick in drawing.iter(f"{SVG}text") if tick.get("class") == css_class]
    shares, values = zip(
        *((float(at[:-1]) / 100, float(text.split()[0].replace(",", ""))) for at, text in ticks), strict=True
    )
    return np.polyval(np.polyfit(shares, values, 1), places)


def test_the_model_card_shows_the_loss_of_the_run(tmp_path, small):
    found = run(small, max_iters=40, eval_interval=10, learning_rate=5e-3)
    out, folder = Path(small["out_dir"]), tmp_path / "export"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    export(out / "best.pt", folder)
    assert "![The loss of training and validation, step by step](loss.svg)" in (folder / "README.md").read_text()
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if folder not in (path, *path.parents)}
    assert before == after  # nothing is written beside the folder

    root = etree.parse(folder / "loss.svg").getroot()
    assert not {element.tag for element in root.iter()} & {f"{SVG}script", f"{SVG}image", f"{SVG}foreignObject"}
    (drawing,) = root.xpath("//*[@class='chart']")
    trained, evaluated = ([r for r in found if r["kind"] == kind] for kind in ("train", "eval"))
    points = [list(map(float, point.split(","))) for point in drawing.find(f".//{SVG}polyline").get("points").split()]
    x, y = np.array(points).T / 1000  # the line's own box is stretched over the chart
    assert values_drawn(drawing, "x", "below", x) == pytest.approx([r["iter"] for r in trained], abs=0.1)
    assert values_drawn(drawing, "y", "left", y) == pytest.approx([r["loss"] for r in trained], abs=0.01)
    dots = [dot for dot in drawing.iter(f"{SVG}circle") if dot.get("class") == "val"]
    x, y = ([float(dot.get(key)[:-1]) / 100 for dot in dots] for key in ("cx", "cy"))
    assert values_drawn(drawing, "x", "below", x) == pytest.approx([r["iter"] for r in evaluated], abs=0.1)
    assert values_drawn(drawing, "y", "left", y) == pytest.approx([r["loss"] for r in evaluated], abs=0.01)

    alone = shutil.copy(out / "best.pt", tmp_path / "best.pt")  # without metrics.jsonl beside it
    export(alone, tmp_path / "alone")
    assert {path.name for path in folder.iterdir()} - {path.name for path in (tmp_path / "alone").iterdir()} == {
        "loss.svg"
    }
    assert "![" not in (tmp_path / "alone" / "README.md").read_text()


def test_constants_that_older_files_hold_are_left_out(tmp_path, bpe):
    loaded = checkpoint.load_model(make_checkpoint(tmp_path / "best.pt", bpe), torch.device("cpu"), torch.float32)
    huggingface.export(*loaded, "a passage", tmp_path / "export")
    file = tmp_path / "export" / "model.safetensors"
    constants = {"bias": torch.ones(1, 1, 32, 32), "masked_bias": torch.tensor(-1e4)}
    older = {
        f"transformer.h.{i}.attn.{name}": constant.clone() for i in range(2) for name, constant in constants.items()
    }
    safetensors.torch.save_file(safetensors.torch.load_file(file) | older, file)
    back, _, _ = checkpoint.load_model(tmp_path / "export", torch.device("cpu"), torch.float32)
    assert back.state_dict().keys() == loaded[0].state_dict().keys()


def test_a_full_disk_leaves_nothing_and_the_export_is_named(tmp_path, bpe):
    resource = pytest.importorskip("resource")
    model, tok, content = checkpoint.load_model(
        make_checkpoint(tmp_path / "best.pt", bpe), torch.device("cpu"), torch.float32
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1000, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises((CheckpointError, OSError)) as raised:
                huggingface.export(model, tok, content, "a passage", tmp_path / "export", picture="<svg/>")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert re.match(rf"{tmp_path}/export: .*File too large", describe(raised.value))
        assert os.listdir(tmp_path) == ["best.pt"]


@pytest.fixture(scope="module")
def their_tokenizer():
    """A byte-level BPE trained by tokenizers, its special token last, as GPT-2's is."""
    theirs = tokenizers.ByteLevelBPETokenizer()
    theirs.train_from_iterator([make_book(1, 60), "Été 東京"], vocab_size=500, show_progress=False)
    theirs.add_special_tokens([END])
    return theirs


@pytest.mark.parametrize("gelu", ["gelu_new", "gelu"])
@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_a_gpt2_of_transformers_is_fine_tuned_with_its_own_vocabulary(
    tmp_path, small, shapeless, their_tokenizer, gelu, shard
):
    vocab_size = their_tokenizer.get_vocab_size()
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 48, "activation_function": gelu}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=vocab_size, initializer_range=0.2, **shape)
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    their_tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard == "40KB")

    text = make_book(5, 80)
    for name in ("alpha", "beta"):
        (tmp_path / f"{name}.txt").write_text(text)
    keys = {"input": (str(tmp_path / "*.txt"),), "out": str(tmp_path / "bins"), "tokenizer": str(tmp_path / "theirs")}
    prepare.main(prepare.PrepareConfig(**keys))
    meta = json.loads((tmp_path / "bins" / "meta.json").read_text())
    assert meta["vocab_size"] == vocab_size + 2 and meta["styles"] == {"alpha": vocab_size, "beta": vocab_size + 1}
    first = meta["splits"]["train"]["documents"][0]
    ids = np.fromfile(tmp_path / "bins" / "train.bin", dtype=np.uint16)[first["start"] : first["stop"]].tolist()
    assert ids[:-1] == their_tokenizer.encode(decode(tokenizer.from_json(meta["tokenizer"]), ids)).ids
    assert ids[-1] == their_tokenizer.token_to_id(END)

    ours, _, _ = checkpoint.load_model(tmp_path / "theirs", torch.device("cpu"), torch.float64)
    idx = torch.randint(vocab_size, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], theirs.double().eval()(idx).logits, rtol=0, atol=1e-9)
    train.main(TrainConfig(**shapeless | {"init_from": str(tmp_path / "theirs"), "dataset": str(tmp_path / "bins")}))
    trained = checkpoint.load(Path(shapeless["out_dir"]) / "best.pt")
    assert trained["model_args"]["vocab_size"] == vocab_size + 2 and trained["model_args"]["block_size"] == 48
    assert trained["model_extra"]["gelu"] == ("tanh" if gelu == "gelu_new" else "none")
    assert Poet(str(Path(shapeless["out_dir"]) / "best.pt"), "cpu", "float32").write(
        "The", style="beta", max_new_tokens=5
    )


def test_rows_of_embeddings_follow_a_tokenizer_whose_specials_come_first(tmp_path, bpe):
    """As SmolLM2's does, which also lacks bytes that hardly any text has: they get the mean row."""
    export(make_checkpoint(tmp_path / "best.pt", bpe), tmp_path / "export")
    ours = checkpoint.load(tmp_path / "export")
    tok = json.loads((tmp_path / "export" / "tokenizer.json").read_text())
    weights = safetensors.torch.load_file(tmp_path / "export" / "model.safetensors")
    lacking, specials = [0x04, 0xFF], [358, 359]
    rows = [*specials, *(id for id in range(358) if id not in lacking)]
    names = {id: name for name, id in tok["model"]["vocab"].items()} | dict(zip(specials, bpe.specials, strict=True))
    tok["model"]["vocab"] = {names[row]: id for id, row in enumerate(rows)}
    for added in tok["added_tokens"]:
        added["id"] -= 358
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][rows]
    config = json.loads((tmp_path / "export" / "config.json").read_text()) | {"vocab_size": 358}
    (tmp_path / "export" / "tokenizer.json").write_text(json.dumps(tok))
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(weights, tmp_path / "export" / "model.safetensors", {"format": "pt"})
    back = checkpoint.load(tmp_path / "export")
    found = checkpoint.tokenizer_of(back, tmp_path)
    assert sorted(found.tokens) == sorted(bpe.tokens) and found.specials == bpe.specials
    wte = dict(zip([*found.tokens, *found.specials], back["model"]["transformer.wte.weight"], strict=True))
    for name, row in zip([*bpe.tokens, *bpe.specials], ours["model"]["transformer.wte.weight"], strict=True):
        wanted = weights["transformer.wte.weight"].mean(0) if name in (b"\x04", b"\xff") else row
        assert torch.equal(wte[name], wanted)
    checkpoint.build_model(back, tmp_path)
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:300].clone()
    (tmp_path / "export" / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    safetensors.torch.save_file(weights, tmp_path / "export" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="its tokenizer has 358 ids, its embeddings have 300 rows"):
        checkpoint.load(tmp_path / "export")


def test_another_architecture_is_refused_by_what_differs(tmp_path, bpe):
    intact = tmp_path / "intact"
    export(make_checkpoint(tmp_path / "best.pt", bpe), intact)
    config, tok = (json.loads((intact / f"{name}.json").read_text()) for name in ("config", "tokenizer"))

    def refused(name: str, content: bytes | dict | None, message: str) -> None:
        folder = tmp_path / "changed"
        folder.mkdir()
        for path in intact.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        with pytest.raises(CheckpointError, match=message) as caught:
            checkpoint.load_model(folder, torch.device("cpu"), torch.float32)
        assert len(str(caught.value).splitlines()) == 1
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    refused("config.json", config | {"model_type": "mamba"}, "model_type: found 'mamba', must be gpt2 or starcoder2")
    refused(
        "config.json", config | {"layer_norm_epsilon": 1e-6, "n_inner": 7}, r"layer_norm_epsilon: .*n_inner: found 7"
    )
    refused("config.json", config | {"activation_function": "relu"}, "activation_function: found 'relu'")
    refused("config.json", b"{", r"config\.json: .*does not match")
    refused(
        "config.json", {"model_type": "gpt2"}, r"config\.json: .*missing required field `n_positions`.*does not match"
    )
    refused("config.json", b"{" * 10**6, r"config\.json: .*does not match")
    refused("config.json", config | {"n_layer": 3}, "its weights don't fit")
    refused("config.json", config | {"n_layer": 10**5}, "its weights don't fit.*there are 29 tensors, must be 1200005")
    refused("config.json", config | {"n_layer": 10**9}, r"config\.json: .*n_layer: found 1000000000, must be at")
    for n_head in (0, -1, 10**9):
        wanted = rf"config\.json: .*n_head: found {n_head}, must be at least 1 and at most 1,048,576"
        refused("config.json", config | {"n_head": n_head}, wanted)
    for n_head in ("2", None, True, 2.5):
        refused("config.json", config | {"n_head": n_head}, r"config\.json: .*\$\.n_head")
    refused("config.json", config | {"n_head": 3}, r"config\.json: .*n_embd: found 32, must be divisible by n_head, 3")
    refused("config.json", config | {"n_embd": 2**20}, r"must be \(360, 1048576\)")
    refused("config.json", config | {"resid_pdrop": None}, r"config\.json: .*\$\.resid_pdrop")
    refused("config.json", config | {"activation_function": "x" * 10**6}, r"config\.json: .*\$\.activation_function")
    refused("model.safetensors.index.json", b"[" * 10**6, r"index\.json: .*does not match")
    refused("model.safetensors.index.json", {"weight_map": {"a": 5}}, r"index\.json: .*\$\.weight_map")
    refused("model.safetensors.index.json", {"weight_map": {"a": "x" * 300}}, r"length <= 255")
    refused("model.safetensors.index.json", {"weight_map": {"a": ".."}}, "is a folder")
    refused("model.safetensors.index.json", {"weight_map": {"a": "../best.pt"}}, r"changed/best\.pt: not found")
    refused("model.safetensors.index.json", {"weight_map": {}}, "there are 0 tensors")
    huge = (2**40).to_bytes(8, "little") + b"{}"
    refused("model.safetensors", huge, r"model\.safetensors: its header has 1,099,511,627,776 bytes")
    refused("model.safetensors", b"", r"model\.safetensors: does not match")
    claim = json.dumps({"wte.weight": {"dtype": "F32", "shape": [2**30, 2**9], "data_offsets": [0, 2**41]}}).encode()
    refused("model.safetensors", len(claim).to_bytes(8, "little") + claim, r"model\.safetensors: does not match")
    flat = safetensors.torch.save({"h.0.mlp.c_fc.weight": torch.zeros(2, 3, 4), "wte.weight": torch.zeros(1)})
    refused("model.safetensors", flat, "there are 3 tensors")
    nan = safetensors.torch.load_file(intact / "model.safetensors")
    nan["transformer.ln_f.weight"][0] = torch.nan
    refused("model.safetensors", safetensors.torch.save(nan), r"transformer\.ln_f\.weight is not finite")
    refused("model.safetensors", None, r"model\.safetensors: not found")
    refused(
        "model.safetensors", (intact / "model.safetensors").read_bytes()[:1000], r"model\.safetensors: does not match"
    )
    refused("tokenizer.json", None, "has no tokenizer")
    refused(
        "tokenizer.json",
        tok | {"model": tok["model"] | {"merges": tok["model"]["merges"][::-1]}},
        "order of its merges",
    )
    refused("tokenizer.json", tok | {"added_tokens": [{"id": 0, "content": END}]}, "each once")
    refused("tokenizer.json", tok | {"pre_tokenizer": {"type": "Whitespace"}}, "cuts text in another way")
    refused("tokenizer.json", tok | {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "in another way")
    refused("tokenizer.json", tok | {"pre_tokenizer": None}, "cuts text in another way")
    split, level = tok["pre_tokenizer"]["pretokenizers"]
    spaced = {"type": "Sequence", "pretokenizers": [split, level | {"add_prefix_space": True}]}
    refused("tokenizer.json", tok | {"pre_tokenizer": spaced}, "puts a space before every text")
    for regex in ("", ".", "(a+)+$", "("):
        cut = {"type": "Split", "pattern": {"Regex": regex}}
        refused("tokenizer.json", tok | {"pre_tokenizer": cut}, r"tokenizer\.json: its pattern is not one")
    refused("tokenizer.json", b"[" * 10**6, r"tokenizer\.json: .*like GPT-2's")
    refused("tokenizer.json", tok | {"model": []}, r"tokenizer\.json: .*\$\.model")
    refused("tokenizer.json", tok | {"model": tok["model"] | {"vocab": {"a": "0"}}}, r"\$\.model\.vocab")
    refused("tokenizer.json", tok | {"model": tok["model"] | {"merges": [["a"]]}}, r"\$\.model\.merges\[0\]")
    refused(
        "tokenizer.json", tok | {"model": {"vocab": {"a": 0, "東": 1}}, "added_tokens": []}, "'東' stands for no byte"
    )
    refused("tokenizer.json", tok | {"model": {"vocab": {"a": 0}}, "added_tokens": []}, "not all 256 bytes")
    twice = [{"id": 359 + i, "content": END} for i in range(2)]
    refused("tokenizer.json", tok | {"added_tokens": twice}, "each once")


def test_a_models_name_is_fetched_from_the_hub_and_a_failure_is_reported(tmp_path, bpe, books, monkeypatch):
    import huggingface_hub

    export(make_checkpoint(tmp_path / "best.pt", bpe), tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **keys: str(tmp_path / name))
    assert checkpoint.load(Path("hub"))["model_args"]["n_embd"] == 32

    def offline(name, **keys):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"gpt2: no such file or folder; the Hugging Face Hub could not be asked"):
        train.main(TrainConfig(init_from="gpt2", device="cpu", out_dir=str(tmp_path / "out"), dataset=str(books)))
    with pytest.raises(ConfigError, match=r"tokenizer: found 'bpee', must be .* a checkpoint; did you mean bpe\?"):
        prepare.main(prepare.PrepareConfig(corpus="data/robopoet", tokenizer="bpee"))
