"""GGUF files of Llamas: the numbers of transformers, each type of tensor, and what is refused, hostile files too."""

import io
import os
import random
import struct
import sys
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
from conftest import make_book, make_text, within
from gguf import GGMLQuantizationType as Type
from llama_cpp import Llama
from llamas import SPECIALS, make_llama, small_tokenizer, tensors_of, write
from test_llama import in_float64
from test_sources import memory_below

import prepare
import train
from robopoet.errors import CheckpointError, ConfigError
from robopoet.text import tokenizer_json
from robopoet.text.tokenizer import SMOLLM_PATTERN, BPETokenizer
from robopoet.weights import checkpoint, gguf, gguf_reader
from sample import Poet
from train import TrainConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tok() -> BPETokenizer:
    return small_tokenizer()


# --- the numbers


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 4, "intermediate_size": 32},
        {"num_key_value_heads": 1, "num_hidden_layers": 3},
        {"num_attention_heads": 2, "hidden_size": 96},
    ],
)
def test_logits_are_transformers(tmp_path, tok, shape):
    theirs = make_llama(tok, **shape)
    ours, back, content = checkpoint.load_model(write(tmp_path / "a.gguf", theirs, tok), CPU, torch.float64)
    assert back.to_json() == tok.to_json() and content["model_args"]["vocab_size"] == tok.vocab_size
    idx = torch.randint(tok.vocab_size, (3, 48))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx, idx)[0], in_float64(theirs)(idx).logits, rtol=0, atol=1e-9)


def test_ids_and_log_probabilities_are_llama_cpps(tmp_path, tok):
    path = write(tmp_path / "a.gguf", make_llama(tok), tok)
    ours, _, _ = checkpoint.load_model(path, CPU, torch.float64)
    llama, text = Llama(path), make_text(30, seed=7)
    ids, n = tok.encode(text)[:40], len(tok.tokens)
    in_file = [(id + len(SPECIALS)) % tok.vocab_size for id in range(tok.vocab_size)]  # its specials come first
    assert llama.ids(text) == [in_file[id] for id in tok.encode(text)]
    with torch.no_grad():
        wanted = ours(torch.tensor([ids]), torch.tensor([ids]))[0][0].log_softmax(-1)
    found = llama.log_probabilities([in_file[id] for id in ids], tok.vocab_size)[:, in_file]
    torch.testing.assert_close(found[:, :n], wanted[:, :n], rtol=0, atol=0.05)  # its cache is float16


def test_what_we_export_is_read_back(tmp_path, tok):
    first = checkpoint.load_model(write(tmp_path / "a.gguf", make_llama(tok), tok), CPU, torch.float32)
    gguf.export(*first, "a passage", tmp_path / "b.gguf", "float32")
    model, back, content = checkpoint.load_model(tmp_path / "b.gguf", CPU, torch.float32)
    assert back.to_json() == tok.to_json() and model.config == first[0].config
    assert content["licences"] == ["the model Small: apache-2.0"]
    for name, weight in first[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


QUANTISED = [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]


@pytest.mark.parametrize("kind", QUANTISED)
def test_each_type_of_tensor_is_read_as_gguf_dequantises_it(tmp_path, tok, kind):
    model = make_llama(tok)
    path, plain = write(tmp_path / "a.gguf", model, tok, kind), write(tmp_path / "plain", model, tok)
    exact, rounded = (checkpoint.load(p)["model"] for p in (plain, path))
    assert exact.keys() == rounded.keys()
    for name, w in exact.items():
        if w.dim() == 1:
            assert torch.equal(rounded[name], w)
        else:
            assert rounded[name].dtype == torch.float32
            far = (rounded[name] - w).abs().max() / w.abs().max()
            assert 0 < far < {Type.F16: 1e-3, Type.BF16: 1e-2, Type.Q8_0: 1e-2}.get(kind, 0.15)
    wte = tensors_of(model)["token_embd.weight"]
    as_theirs = reference.dequantize(reference.quantize(wte, kind), kind)
    assert np.array_equal(rounded["transformer.wte.weight"].numpy(), as_theirs)


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_k_quants_are_read(tmp_path, tok, kind):
    """gguf does not write these, so their blocks are random numbers."""
    model = make_llama(tok, hidden_size=256, intermediate_size=256)
    n_bytes = reference.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(0)
    blocks = {}

    def random_blocks(tensors):
        for name, w in tensors.items():
            if w.ndim == 2:
                raw = rng.integers(0, 256, (len(w), n_bytes), dtype=np.uint8)
                scale = slice(n_bytes - 2, n_bytes) if kind == Type.Q6_K else slice(0, 2)
                raw[:, scale] = np.full((len(w), 1), 0.001, np.float16).view(np.uint8)
                if kind != Type.Q6_K:
                    raw[:, 2:4] = np.full((len(w), 1), 0.001, np.float16).view(np.uint8)
                blocks[name] = raw
        return tensors | {name: (raw, kind) for name, raw in blocks.items()}

    found = checkpoint.load(write(tmp_path / "a.gguf", model, tok, tensors=random_blocks))["model"]
    down = reference.dequantize(blocks["blk.1.ffn_down.weight"], kind)
    assert np.array_equal(found["transformer.h.1.mlp.c_proj.weight"].numpy(), down) and len(np.unique(down)) > 500


def test_a_file_is_known_by_its_first_bytes_or_its_name(tmp_path, tok):
    path = write(tmp_path / "a.gguf", make_llama(tok), tok)
    path.rename(tmp_path / "model")
    assert checkpoint.load(tmp_path / "model")["tokenizer"] == tok.to_json()
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"empty\.gguf: it is truncated"):
        checkpoint.load(tmp_path / "empty.gguf")
    with pytest.raises(CheckpointError, match=r"none\.gguf: not found"):
        checkpoint.load(tmp_path / "none.gguf")


def test_without_the_package_it_says_what_to_install(tmp_path, tok, monkeypatch):
    path = write(tmp_path / "a.gguf", make_llama(tok), tok)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"a\.gguf: .*the package gguf: pip install gguf"):
        checkpoint.load(path)


@pytest.mark.parametrize(("pre", "pattern"), gguf_reader.PRES.items())
def test_text_is_cut_as_the_file_says(tmp_path, tok, pre, pattern):
    path = write(tmp_path / "a.gguf", make_llama(tok), tok, tokenizer__ggml__pre=pre)
    assert checkpoint.tokenizer_of(checkpoint.load(path), path).pattern == pattern


def test_a_byte_that_the_tokenizer_lacks_gets_the_mean_row(tmp_path, tok):
    lacking = BPETokenizer(tok.tokens, SPECIALS, SMOLLM_PATTERN)
    lacking.tokens = [token for token in tok.tokens if token not in (b"\x04", b"\xff")]
    model = make_llama(tok)
    rows = [*range(lacking.tokens.__len__() + len(SPECIALS))]

    def fewer(tensors):
        return tensors | {"token_embd.weight": tensors["token_embd.weight"][rows]}

    path = write(tmp_path / "a.gguf", model, lacking, tensors=fewer, llama__vocab_size=len(rows))
    content = checkpoint.load(path)
    back = checkpoint.tokenizer_of(content, path)
    assert sorted(back.tokens) == sorted(tok.tokens) and back.vocab_size == tok.vocab_size
    wte = content["model"]["transformer.wte.weight"]
    theirs = fewer(tensors_of(model))
    for byte in (b"\x04", b"\xff"):
        assert back.tokens.index(byte) < 256
    new = [back.tokens.index(byte) for byte in (b"\x04", b"\xff")]
    kept = wte[[id for id in range(len(wte)) if id not in new]]
    torch.testing.assert_close(wte[new], kept.mean(0).expand(2, -1))
    assert len(theirs["token_embd.weight"]) == len(kept)
    checkpoint.build_model(content, path)


def test_a_book_is_prepared_and_a_run_starts_from_a_file(tmp_path, tok, shapeless):
    path = write(tmp_path / "a.gguf", make_llama(tok), tok)
    for name in ("alpha", "beta"):
        (tmp_path / f"{name}.txt").write_text(make_book(5, 80))
    out = str(tmp_path / "bins")
    prepare.main(prepare.PrepareConfig(input=(str(tmp_path / "*.txt"),), out=out, tokenizer=str(path)))
    train.main(TrainConfig(**shapeless | {"init_from": str(path), "dataset": out}))
    trained = checkpoint.load(Path(shapeless["out_dir"]) / "best.pt")
    assert trained["model_args"]["vocab_size"] == tok.vocab_size + 2
    assert trained["licences"] == ["alpha: unknown", "beta: unknown", "the model Small: apache-2.0"]
    assert trained["model_extra"]["mlp"] == "swiglu" and trained["model_extra"]["n_kv_head"] == 2
    for place in (Path(shapeless["out_dir"]) / "best.pt", path):
        assert Poet(str(place), "cpu", "float32").write("The", max_new_tokens=5, until="tokens")


# --- what is refused


def without(name):
    return lambda tensors: {key: w for key, w in tensors.items() if key != name}


def plus(name, make):
    return lambda tensors: tensors | {name: make(tensors)}


WTE = "token_embd.weight"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"arch": "qwen2"}, r"general\.architecture: found 'qwen2', must be 'llama'"),
        ({"llama.block_count": None}, r"missing required field `llama\.block_count`; it must be a Llama like SmolLM2"),
        ({"llama.block_count": 3}, r"has no tensor blk\.2\.attn_k\.weight"),
        ({"llama.block_count": 2**31}, r"llama\.block_count: found 2147483648, must be at least 1 and at most 1,048"),
        ({"llama.block_count": 2**20}, r"has no tensor blk\.10\.attn_k\.weight"),
        ({"llama.block_count": "2"}, r"Expected `int`, got `str` - at `\$\.llama\.block_count`"),
        ({"llama.attention.head_count": [4, 4]}, r"\$\.llama\.attention\.head_count"),
        ({"llama.attention.head_count": 0, "llama.rope.dimension_count": None}, r"head_count: found 0, must be at"),
        ({"llama.attention.head_count": 3}, r"llama\.rope\.dimension_count: found 16, must be 21"),
        ({"llama.attention.head_count_kv": 3}, r"llama\.attention\.head_count: found 4, must be divis"),
        ({"llama.attention.key_length": 32}, r"llama\.attention\.key_length: found 32, must be 16"),
        ({"llama.embedding_length": 2**20}, r"llama\.rope\.dimension_count: found 16, must be 262144"),
        ({"llama.feed_forward_length": 128}, r"blk\.0\.ffn_gate\.weight: found shape \(96, 64\), must be \(128, 64\)"),
        ({"llama.attention.layer_norm_rms_epsilon": 1e-6}, r"rms_epsilon: found 1e-06, must be 1e-05"),
        ({"llama.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type: found 'yarn', must not be there"),
        ({"llama.rope.freq_base": 0.0}, r"llama\.rope\.freq_base: found 0"),
        ({"llama.rope.freq_base": float("nan")}, r"llama\.rope\.freq_base: found nan"),
        ({"llama.expert_count": 8}, r"llama\.expert_count: found 8, must not be there"),
        ({"llama.vocab_size": 7}, r"llama\.vocab_size: found 7, must be 303"),
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer\.ggml\.model: found 'llama', must be 'gpt2'"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, r"tokenizer\.ggml\.pre: found 'deepseek-llm', must be 'smollm' or "),
        ({"tokenizer.ggml.pre": None}, r"tokenizer\.ggml\.pre: found '', must be 'smollm' or"),
        ({"tokenizer.ggml.tokens": ["a"]}, r"llama\.vocab_size: found 303, must be 1; tokenizer\.ggml\.token_type"),
        ({"tokenizer.ggml.merges": ["a b"]}, "its ids are not in the order of its merges"),
        ({"tokenizer.ggml.token_type": [1] * 303}, "its ids are not in the order of its merges"),
        ({"tokenizer.ggml.token_type": None}, r"tokenizer\.ggml\.token_type: found 0, must be one for each of 303"),
        ({"general.alignment": 64}, ""),
        ({"general.alignment": 0}, r"general\.alignment: found 0"),
        ({"tensors": without("blk.1.ffn_up.weight")}, r"has no tensor blk\.1\.ffn_up\.weight"),
        ({"tensors": plus("rope_freqs.weight", lambda t: np.ones(8, "f4"))}, r"has a tensor rope_freqs\.weight, which"),
        ({"tensors": plus("output.weight", lambda t: t[WTE].copy())}, ""),
        ({"tensors": plus("output.weight", lambda t: -t[WTE])}, r"output\.weight: is not token_embd\.weight"),
        ({"tensors": plus("output_norm.weight", lambda t: np.full(64, np.nan, "f4"))}, r"ln_f\.weight is not finite"),
        ({"tensors": plus("output_norm.weight", lambda t: np.ones((8, 8), "f4"))}, r"found shape \(8, 8\), must be"),
        ({"tensors": plus(WTE, lambda t: (np.zeros((303, 36), "u1"), Type.IQ4_NL))}, "found type IQ4_NL"),
    ],
    ids=range(35),
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_key(tmp_path, tok, keys, message):
    arch, tensors = keys.pop("arch", "llama"), keys.pop("tensors", lambda tensors: tensors)
    path = write(tmp_path / "a.gguf", make_llama(tok), tok, arch=arch, tensors=tensors, **keys)
    if not message:
        checkpoint.load_model(path, CPU, torch.float32)
        return
    with pytest.raises(CheckpointError, match=rf"a\.gguf: [^\n]*{message}[^\n]*$"):
        checkpoint.load_model(path, CPU, torch.float32)


def test_more_ids_than_bins_hold_are_refused(tmp_path):
    names = [*map(tokenizer_json.show, (bytes([byte]) for byte in range(256)))] + [f"<{i}>" for i in range(65_300)]
    keys = {"tokens": names, "merges": [], "model": "gpt2", "pre": "smollm", "token_type": [1] * len(names)}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"general.architecture": "llama"}
    sizes = "block_count context_length embedding_length feed_forward_length attention.head_count".split()
    metadata |= {f"llama.{key}": 1 for key in sizes} | {"llama.attention.layer_norm_rms_epsilon": 1e-5}
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.tokens: found 65,556, must be at most 65,536"):
        gguf_reader.read_metadata(metadata)


def head(n_tensors: int = 0, n_keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + body


def entry(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


ARRAY = struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is truncated"),
        (b"GGUF", "is truncated"),
        (b"GGML" + bytes(100), "does not begin with GGUF"),
        (head(version=1), "its version of GGUF is 1"),
        (head(version=0x03000000), "its version of GGUF is 50331648"),
        (head(), r"general\.architecture: found None"),
        (head(n_tensors=2**63), "claims 9,223,372,036,854,775,808 tensors"),
        (head(n_keys=2**64 - 1), "is truncated"),
        (head(n_keys=1, body=struct.pack("<Q", 2**63)), "is truncated"),
        (head(n_keys=1, body=entry(8, struct.pack("<Q", 2**40))), "is truncated"),
        (head(n_keys=1, body=entry(9, struct.pack("<IQ", 0, 2**60))), "claims an array of 1,152,921"),
        (head(n_keys=1, body=entry(9, struct.pack("<IQ", 0, 2**17))), "is truncated"),
        (head(n_keys=1, body=entry(9, struct.pack("<IQ", 9, 1) + ARRAY * 50)), "a value of type 9"),
        (head(n_keys=1, body=entry(99, bytes(8))), "a value of type 99"),
        (head(n_keys=1, body=entry(8, struct.pack("<Q", 1) + b"\xff")), "can't decode byte 0xff"),
        (head(n_tensors=1, body=struct.pack("<QI", 0, 2**31)), "claims a tensor of 2147483648 dimensions"),
        (head(n_tensors=1, body=struct.pack("<QI", 0, 4) + bytes(16)), "is truncated"),
    ],
    ids=range(17),
)
def test_a_damaged_or_hostile_header_is_refused_without_allocating(tmp_path, raw, message):
    (tmp_path / "a.gguf").write_bytes(raw)
    with within(5), memory_below(2**24), pytest.raises(CheckpointError, match=rf"a\.gguf: [^\n]*{message}[^\n]*$"):
        checkpoint.load(tmp_path / "a.gguf")


def test_tensors_that_lie_beyond_the_file_or_on_one_another_are_refused(tmp_path, tok):
    path = write(tmp_path / "a.gguf", make_llama(tok), tok)
    whole = path.read_bytes()
    name = b"token_embd.weight"
    place = whole.index(name) + len(name) + 4 + 16 + 4  # its dimensions and type lie between
    for start in (len(whole), 2**63, 2**64 - 1):
        path.write_bytes(whole[:place] + struct.pack("<Q", start) + whole[place + 8 :])
        with pytest.raises(CheckpointError, match=r"is truncated: token_embd\.weight ends at byte"):
            checkpoint.load(path)
    for size in (len(whole) - 1, len(whole) // 2, 5000):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is truncated"):
            checkpoint.load(path)
    many = write(tmp_path / "many.gguf", make_llama(tok, num_hidden_layers=30), tok)
    raw = many.read_bytes()
    header = gguf_reader.GGUFHeader(io.BytesIO(raw))
    start = min(header.tensors.values(), key=lambda t: -np.prod(t.shape)).start
    for tensor_name in header.tensors:  # all of them claim the file's first bytes
        at = raw.index(tensor_name.encode()) + len(tensor_name) + 4 + 8 * len(header.tensors[tensor_name].shape) + 4
        raw = raw[:at] + struct.pack("<Q", 0) + raw[at + 8 :]
    many.write_bytes(raw[: header.data + 303 * 64 * 4])
    assert start >= 0
    with pytest.raises(CheckpointError, match="its tensors overlap"):
        checkpoint.load(many)


@pytest.mark.filterwarnings("ignore:invalid value")  # scales that are not finite
def test_whatever_bytes_are_damaged_the_error_is_one_line(tmp_path, tok):
    path = write(tmp_path / "a.gguf", make_llama(tok), tok, Type.Q4_0)
    intact, rng, refused = path.read_bytes(), random.Random(0), 0
    end = gguf_reader.GGUFHeader(io.BytesIO(intact)).data
    for _ in range(200):
        raw = bytearray(intact)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(end)] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(raw[: rng.randrange(len(raw))] if rng.random() < 0.2 else raw)
        try:
            with within(10):
                checkpoint.load_model(path, CPU, torch.float32)
        except CheckpointError as e:
            assert "\n" not in str(e) and len(str(e)) < 2000
            refused += 1
    assert refused > 100


def test_a_pipe_of_that_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.gguf")
    with within(5), pytest.raises(CheckpointError, match="not a regular file"):
        checkpoint.load(tmp_path / "a.gguf")


def test_a_tokenizer_of_a_damaged_file_is_told_to_prepare(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "a.txt").write_text("To be.\n")
    keys = {"input": (str(tmp_path / "a.txt"),), "out": str(tmp_path / "bins"), "tokenizer": str(tmp_path / "a.gguf")}
    with pytest.raises(ConfigError, match=r"tokenizer: .*a\.gguf: it is truncated"):
        prepare.main(prepare.PrepareConfig(**keys))
