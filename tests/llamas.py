"""Small Llamas with random weights, as transformers has them and as GGUF files."""

import functools
import json
from pathlib import Path

import gguf as reference
import numpy as np
import torch
import transformers
from conftest import make_text
from gguf import GGMLQuantizationType as Type

from robopoet.text import tokenizer_json
from robopoet.text.tokenizer import END, SMOLLM_PATTERN, BPETokenizer

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
SHAPE |= {"num_hidden_layers": 2, "max_position_embeddings": 48, "rope_theta": 100_000.0, "rms_norm_eps": 1e-5}
SPECIALS = [END, "<|im_start|>", "<|im_end|>"]


@functools.cache
def small_tokenizer() -> BPETokenizer:
    """300 tokens and the specials, cut as SmolLM's."""
    learned = BPETokenizer.train([make_text(500)], 300, [])
    return BPETokenizer(learned.tokens, SPECIALS, SMOLLM_PATTERN)


def make_llama(tok: BPETokenizer, **shape) -> transformers.LlamaForCausalLM:
    """A Llama of transformers with random weights, tied."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | shape, vocab_size=tok.vocab_size, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model


NAMES = {
    "model.layers.": "blk.",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "_proj": "",
    "mlp.": "ffn_",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}


def tensors_of(model: transformers.LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Its tensors as llama.cpp's converter names and lays them out: pairs that rotate together stand side by side."""
    found = {}
    for name, w in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
        if n := next((n for part, n in heads.items() if part in name), 0):
            w = w.reshape(n, 2, len(w) // n // 2, -1).swapaxes(1, 2).reshape(w.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        found[name] = w.numpy()
    return found


def write(
    path: Path, model: transformers.LlamaForCausalLM, tok: BPETokenizer, kind: Type = Type.F32, arch="llama", **keys
) -> Path:
    """A GGUF file, specials first as in SmolLM2's. kind: the matrices' type. keys: those that differ; None: left out.

    tensors: a function that changes them.
    """
    c, change = model.config, keys.pop("tensors", lambda tensors: tensors)
    writer = reference.GGUFWriter(path, arch)
    shown, n = [*map(tokenizer_json.show, tok.tokens)], len(tok.specials)
    values = {
        "general.name": "Small",
        "general.license": "apache-2.0",
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100_000.0,
        "llama.rope.dimension_count": c.hidden_size // c.num_attention_heads,
        "llama.vocab_size": tok.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*tok.specials, *shown],
        "tokenizer.ggml.token_type": [3] * n + [1] * len(shown),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer_json.merges(tok)],
        "tokenizer.ggml.eos_token_id": 2,
    }
    for key, value in {**values, **{key.replace("__", "."): value for key, value in keys.items()}}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    tensors = tensors_of(model)
    wte = tensors["token_embd.weight"]
    tensors["token_embd.weight"] = np.concatenate([wte[-n:], wte[:-n]]) if n else wte  # theirs: specials first
    for name, w in change(tensors).items():
        if isinstance(w, tuple):
            writer.add_tensor(name, w[0], raw_dtype=w[1])
        elif w.ndim == 2:
            writer.add_tensor(name, reference.quantize(w, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def save_folder(path: Path, model: transformers.LlamaForCausalLM, tok: BPETokenizer) -> Path:
    """A folder such as the Hub has of SmolLM2: bfloat16, specials first, and a tokenizer that cuts off each digit."""
    n = len(tok.specials)
    saved = tokenizer_json.to_huggingface(tok)
    saved["model"]["vocab"] = {name: id + n for name, id in saved["model"]["vocab"].items()} | {
        name: i for i, name in enumerate(tok.specials)
    }
    for i, added in enumerate(saved["added_tokens"]):
        added["id"] = i
    digits = {"type": "Digits", "individual_digits": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, level]}
    model.to(torch.bfloat16).save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    return path
