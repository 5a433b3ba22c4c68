"""GGUF files: what llama.cpp itself makes of them, and each tensor as the package gguf reads it back."""

import random
import re
import resource
import sys
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
from conftest import MIXED_WORDS, SPECIALS, TEXT, make_text
from llama_cpp import Llama, compare_greedy_text, compare_log_probabilities, export, make_model

import sample
from model import GPT
from robopoet.errors import CheckpointError, ConfigError, describe
from robopoet.text.tokenizer import CHAT, END, PATTERNS, BPETokenizer, Tokenizer
from robopoet.weights import checkpoint, huggingface
from robopoet.weights.header import ExportDtype
from sample import SampleConfig

CPU = torch.device("cpu")
SHAPES = [  # positions, GELU and biases of every kind; widths that are no multiple of 32
    {},
    {"gelu": "tanh", "bias": False, "n_head": 1},
    {"n_embd": 18, "n_head": 3, "n_layer": 1},
    {"positions": "rotary"},
    {"positions": "rotary", "gelu": "tanh", "bias": False},
    {"positions": "rotary", "n_embd": 30, "n_head": 5, "n_layer": 3},
]


# --- the model


@pytest.mark.parametrize("shape", SHAPES)
def test_log_probabilities_are_ours(tmp_path, bpe, shape):
    compare_log_probabilities(tmp_path, make_model(bpe, **shape), bpe, spread=0.2, atol=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_poets_for_each_tag(tmp_path, bpe, shape):
    compare_greedy_text(tmp_path, bpe, shape)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_tensor_is_ours_bit_for_bit(tmp_path, bpe, shape, dtype):
    model = make_model(bpe, **shape)
    read = {t.name: t.data for t in reference.GGUFReader(export(model, bpe, tmp_path / "poet.gguf", dtype)).tensors}
    weights, c = model.state_dict(), model.config

    def same(name: str, ours: torch.Tensor, matrix: bool = True) -> None:
        found = read.pop(name)
        assert found.dtype == (dtype if matrix else "float32")
        assert np.array_equal(found, ours.numpy().astype(found.dtype)), name

    def layer(theirs: str, ours: str, rows: slice = slice(None), matrix: bool = True) -> None:
        weight = weights[f"transformer.{ours}.weight"][rows]
        same(f"{theirs}.weight", weight, matrix)
        bias = weights.get(f"transformer.{ours}.bias")
        same(f"{theirs}.bias", torch.zeros(len(weight)) if bias is None else bias[rows], False)

    same("token_embd.weight", weights["transformer.wte.weight"])
    layer("output_norm", "ln_f", matrix=False)
    if c.positions == "learned":
        same("position_embd.weight", weights["transformer.wpe.weight"], False)
    for i in range(c.n_layer):
        layer(f"blk.{i}.attn_norm", f"h.{i}.ln_1", matrix=False)
        if c.positions == "learned":
            layer(f"blk.{i}.attn_qkv", f"h.{i}.attn.c_attn")
        else:
            for part, name in enumerate("qkv"):
                rows = slice(part * c.n_embd, (part + 1) * c.n_embd)
                layer(f"blk.{i}.attn_{name}", f"h.{i}.attn.c_attn", rows)
        layer(f"blk.{i}.attn_output", f"h.{i}.attn.c_proj")
        layer(f"blk.{i}.ffn_norm", f"h.{i}.ln_2", matrix=False)
        layer(f"blk.{i}.ffn_up", f"h.{i}.mlp.c_fc")
        layer(f"blk.{i}.ffn_down", f"h.{i}.mlp.c_proj")
    assert read == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_checkpoints_of_every_dtype_and_folders_of_transformers_give_the_same_file(tmp_path, bpe, dtype, positions):
    model = make_model(bpe, positions=positions).to(torch.bfloat16).to(dtype)
    saved = {**checkpoint.model_entries(model), "tokenizer": bpe.to_json()}
    checkpoint.save(tmp_path / "best.pt", saved)
    loaded = checkpoint.load_model(tmp_path / "best.pt", CPU, torch.float32)
    huggingface.export(*loaded, "a passage", tmp_path / "folder")
    files = []
    for source in (tmp_path / "best.pt", tmp_path / "folder"):
        model, tok, _ = checkpoint.load_model(source, CPU, torch.float32)
        path = export(model, tok, tmp_path / "x.gguf")
        files.append(path.read_bytes())
        path.unlink()
        path.with_suffix(".Modelfile").unlink()
    plain = make_model(bpe, positions=positions).to(torch.bfloat16).float()
    assert files[0] == files[1] == export(plain, bpe, tmp_path / "x.gguf").read_bytes()


# --- the tokenizer


def dense_tokenizer(pattern: str) -> BPETokenizer:
    """Tokens of two bytes that meet at nearly every place where text can be cut, so that each cut shows in the ids."""
    ascii = list(b"ab1 .'\n\r\t")
    pairs = [bytes([x, y]) for x in [*ascii, *range(0x80, 0xC0)] for y in [*ascii, *range(0xC2, 0xF5)]]
    random.Random(1).shuffle(pairs)
    return BPETokenizer([bytes([i]) for i in range(256)] + pairs, [END], pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_are_the_same_for_all_kinds_of_characters(tmp_path, pattern):
    tok = dense_tokenizer(pattern)
    llama = Llama(export(make_model(tok, n_layer=1, n_embd=8), tok, tmp_path / "poet.gguf"))
    known = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cs", "Cn")]  # by this Python
    chosen = known[:8000:2] + random.Random(2).sample(known, 3000)
    for start in range(0, len(chosen), 1000):
        text = "".join(f"a{c}b {c} 1{c}\n{c}.{c}'{c}" for c in chosen[start : start + 1000])
        assert llama.ids(text) == tok.encode(text)
    odd = [
        "",
        " ",
        "   ",
        "\n\n \n",
        "a  b   c\n \n\t d \r\n\r\n",
        "we'll I'M 'tis don't''s",
        "1234567 12 3.14",
        "«été» naïve",
    ]
    odd += [
        "東京 日本語",
        "🙂👩‍👩‍👧 🇫🇷",
        "\ufeff\u200b\u00a0\u3000x",
        "á\u0301 ﬁ",
        "مرحبا 123",
        "<|endoftext|><|a|>",
        "\0\x1b",
    ]
    for text in [*odd, make_text(500, seed=3)]:
        assert llama.ids(text) == tok.encode(text), text


def test_tags_are_control_tokens_and_text_that_spells_them_is_text(tmp_path, bpe):
    llama = Llama(export(make_model(bpe), bpe, tmp_path / "poet.gguf"))
    for name, id in bpe.specials.items():
        assert llama.ids(f"{name}The rose", parse_special=True) == [id, *bpe.encode("The rose")]
        assert llama.ids(f"{name}The rose") == bpe.encode(f"{name}The rose")
    for text in (TEXT[:2000], "The end . Yes , we 'll do n't  a", " ".join(MIXED_WORDS)):
        assert llama.ask("/detokenize", tokens=bpe.encode(text))["content"] == text


def test_a_chat_is_a_text_to_continue(tmp_path, bpe):
    llama = Llama(export(make_model(bpe), bpe, tmp_path / "poet.gguf"))
    messages = [{"role": "user", "content": "<|a|> The rose \n"}]
    answer = llama.ask("/v1/chat/completions", messages=messages, max_tokens=20, temperature=0)
    assert answer["usage"]["prompt_tokens"] == 1 + len(bpe.encode(" The rose \n"))
    assert answer["choices"][0]["message"]["content"] == llama.greedy("<|a|> The rose \n", 20)["content"]


def only(tok: Tokenizer, ids: list[int], **shape) -> GPT:
    """A model that predicts nothing but these ids."""
    model = make_model(tok, **shape)
    with torch.no_grad():  # whatever the text, the last hidden state is all ones
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[ids] = 2.0
    return model


@pytest.mark.parametrize("name", [END, CHAT[1]])
def test_a_chat_ends_with_a_turn_or_the_text(tmp_path, name):
    tok = BPETokenizer.train([TEXT], 343, [*CHAT, END])
    llama = Llama(export(only(tok, [tok.specials[name]]), tok, tmp_path / "poet.gguf"))
    answer = llama.ask("/v1/chat/completions", messages=[{"role": "user", "content": "The rose"}], max_tokens=9)
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["choices"][0]["message"]["content"] == ""


def test_a_text_ends_at_the_end_of_text_and_no_tag_is_generated(tmp_path, bpe):
    ends = Llama(export(only(bpe, [bpe.specials[END]]), bpe, tmp_path / "ends.gguf")).greedy("The", 5)
    assert ends["stop_type"] == "eos" and ends["content"] == ""
    tags = [bpe.specials[name] for name in SPECIALS[1:]]
    tagged = Llama(export(only(bpe, tags), bpe, tmp_path / "tags.gguf"))
    for temperature in (0, 1):
        answer = tagged.ask("/completion", prompt="The", n_predict=30, temperature=temperature, return_tokens=True)
        assert not {*tags} & {*answer["tokens"]}
    endless = BPETokenizer(bpe.tokens, [])  # one book has no <|endoftext|>
    answer = Llama(export(only(endless, [11]), endless, tmp_path / "endless.gguf")).greedy("The", 5)
    assert answer["tokens"] == [11] * 5  # llama.cpp's own default for the end


def test_nanogpts_padding_is_left_out(tmp_path, bpe):
    padding = list(range(bpe.vocab_size, 384))
    llama = Llama(export(only(bpe, padding, vocab_size=384), bpe, tmp_path / "poet.gguf"))
    assert max(llama.greedy("The", 30)["tokens"]) < bpe.vocab_size
    assert llama.log_probabilities([84], 384).isfinite().sum() == bpe.vocab_size


# --- the file


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_file_says_what_it_holds_and_controls_no_terminal(tmp_path, bpe, positions):
    path = export(make_model(bpe, positions=positions), bpe, tmp_path / "my\x1bpoet.gguf", "float16")
    fields = {name: field.contents() for name, field in reference.GGUFReader(path).fields.items()}
    kind = {"learned": "gpt2", "rotary": "starcoder2"}[positions]
    expected = {
        "general.architecture": kind,
        "general.type": "model",
        "general.name": "my�poet",
        "general.license": "a: public domain; b: �[31mMIT���",
        "general.tags": ["text-generation", "a", "b"],
        "general.file_type": reference.LlamaFileType.MOSTLY_F16,
        f"{kind}.context_length": 128,
        f"{kind}.attention.layer_norm_epsilon": pytest.approx(torch.nn.LayerNorm(1).eps),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": bpe.specials[END],
        "tokenizer.ggml.eot_token_id": bpe.specials[END],
    }
    assert {key: fields[key] for key in expected} == expected
    description = fields["general.description"]
    assert "Validation loss: 2.5000" in description and "- b: �[31mMIT���\n" in description
    assert "`<|a|>`, `<|b|>`" in description and description.endswith("A sample:\n\n    a passage\n")
    beside = path.with_suffix(".Modelfile")
    assert (
        sorted(tmp_path.iterdir()) == [beside, path]
        and "\x1b" not in beside.read_text()
        and path.stat().st_mode & 0o777 == 0o644
    )


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_text_ends_with_the_context_and_one_of_rotary_positions_may_go_on(tmp_path, bpe, positions):
    path = export(make_model(bpe, positions=positions, block_size=48), bpe, tmp_path / "poet.gguf")
    llama = Llama(path, n_ctx=512)  # more than the model has
    answer = llama.greedy("The rose", 100)
    assert len(answer["tokens"]) == 48 - answer["tokens_evaluated"] and answer["stop_type"] == "limit"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        llama.greedy(list(range(48)), 1)
    if positions == "rotary":
        answer = Llama(path, ctx_shift=True, n_keep=1).greedy("<|a|>The rose", 200)
        assert len(answer["tokens"]) == 200


def test_an_export_alone_prints_no_passage(tmp_path, bpe, capsys):
    path = tmp_path / "best.pt"
    checkpoint.save(path, {**checkpoint.model_entries(make_model(bpe)), "tokenizer": bpe.to_json()})
    keys = {"checkpoint": str(path), "device": "cpu", "dtype": "float32", "max_new_tokens": 5}
    sample.main(SampleConfig(**keys, export=str(tmp_path / "a.gguf")))
    assert capsys.readouterr().out.startswith(f"{tmp_path}/a.gguf: llama.cpp")


def test_sample_exports_what_it_sampled_from(tmp_path, bpe, capsys, monkeypatch):
    path = tmp_path / "best.pt"
    checkpoint.save(path, {**checkpoint.model_entries(make_model(bpe)), "tokenizer": bpe.to_json()})
    keys = {"checkpoint": str(path), "device": "cpu", "dtype": "float32", "max_new_tokens": 5, "prompt": "The rose"}
    for dtype, size in (("float16", 2), ("float32", 4)):
        name = str(tmp_path / f"{dtype}.gguf")
        sample.main(SampleConfig(**keys, export=name, export_dtype=dtype))
        said = capsys.readouterr().out
        line, create, start = said.splitlines()[-3:]
        known = "llama.cpp, Ollama and LM Studio load it; a text ends after 128 tokens, prompt included"
        assert line == f"{name}: {known}"
        beside = name.replace(".gguf", ".Modelfile")
        assert (create, start) == (f"ollama create {dtype} -f {beside}", f"ollama run {dtype}")
        (embeddings,) = [t for t in reference.GGUFReader(name).tensors if t.name == "token_embd.weight"]
        assert embeddings.data.itemsize == size
    with pytest.raises(ConfigError, match=r"export: .*float16\.gguf exists; choose another name, or remove it"):
        sample.main(SampleConfig(**keys, export=str(tmp_path / "float16.gguf")))
    monkeypatch.setitem(sys.modules, "gguf", None)
    capsys.readouterr()
    with pytest.raises(CheckpointError, match=r"^export: \.gguf needs the package gguf: pip install gguf$"):
        sample.main(SampleConfig(**keys, export=str(tmp_path / "other.gguf")))
    assert capsys.readouterr().out == ""  # before anything is generated
    files = ["best.pt", "float16.Modelfile", "float16.gguf", "float32.Modelfile", "float32.gguf"]
    assert sorted(p.name for p in tmp_path.iterdir()) == files


def refused(message: str, folder: Path, model: GPT, tok: Tokenizer, dtype: ExportDtype = "float32") -> None:
    before = sorted(folder.iterdir())
    with pytest.raises((CheckpointError, OSError)) as raised:
        export(model, tok, folder / "poet.gguf", dtype)
    assert re.fullmatch(rf"[^\n]*{message}[^\n]*", describe(raised.value))
    assert sorted(folder.iterdir()) == before


def test_what_llama_can_not_hold_is_refused_in_one_line(tmp_path, bpe, char):
    refused("export: llama.cpp can't hold a tokenizer of characters; export to", tmp_path, make_model(char), char)
    single = BPETokenizer([bytes([i]) for i in range(256)], SPECIALS)
    refused("export: llama.cpp can't hold a tokenizer without merges", tmp_path, make_model(single), single)
    large = make_model(bpe)
    with torch.no_grad():
        large.transformer.h[1].mlp.c_fc.weight[3, 4] = 70_000.0
    line = r"export: blk\.1\.ffn_up\.weight has numbers too large for float16; use --export_dtype=float32"
    refused(line, tmp_path, large, bpe, "float16")
    export(large, bpe, tmp_path / "poet.gguf")
    refused(r"poet\.gguf: exists; choose another name, or remove it", tmp_path, large, bpe)
    (tmp_path / "poet.gguf").unlink()
    refused(r"export: .*poet\.Modelfile exists; remove it, or choose another name", tmp_path, large, bpe)


def test_a_full_disk_leaves_nothing(tmp_path, bpe):
    model = make_model(bpe)
    size = export(model, bpe, tmp_path / "whole.gguf").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1000, size // 2, size - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            refused(r"poet\.gguf: File too large", tmp_path, model, bpe)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
