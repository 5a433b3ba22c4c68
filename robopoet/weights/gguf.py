"""Models as GGUF files, for llama.cpp and what is built on it, such as Ollama and LM Studio.

llama.cpp's gpt2 has learned positions, its starcoder2 rotary ones (robopoet/weights/architectures.py says why). Names
and keys are those of its converter; special tokens are control tokens, which a prompt spells by their names.
"""

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model import GPT
from robopoet.errors import CheckpointError
from robopoet.text import tokenizer, tokenizer_json
from robopoet.text.tokenizer import END, PATTERNS, BPETokenizer
from robopoet.weights import huggingface

Dtype = Literal["float16", "float32"]
Tensors = dict[str, np.ndarray]

NAMES = {  # ours, after transformer. -> llama.cpp's
    "wte.": "token_embd.",
    "wpe.": "position_embd.",
    "ln_f.": "output_norm.",
    "h.": "blk.",
    ".ln_1.": ".attn_norm.",
    ".attn.c_attn.": ".attn_qkv.",
    ".attn.c_proj.": ".attn_output.",
    ".ln_2.": ".ffn_norm.",
    ".mlp.c_fc.": ".ffn_up.",
    ".mlp.c_proj.": ".ffn_down.",
}
QKV = ".attn_q.", ".attn_k.", ".attn_v."
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # a chat is a text to continue
NEVER = b"\xff"  # the byte that is in no UTF-8 text


def export(model: GPT, tok: tokenizer.Tokenizer, content: dict[str, Any], passage: str, path: Path, dtype: Dtype) -> str:
    """Write a new GGUF file; returns what to know of it, as a line.

    content: the checkpoint. passage: a sample for the description. dtype: of the matrices; vectors and positions are
    float32, as llama.cpp computes with them. Raises CheckpointError if the file exists, if llama.cpp can't hold the
    tokenizer or float16 the weights, or if the package gguf is not installed.
    """
    if path.exists():
        raise CheckpointError(f"{path}: exists; choose another file, or remove it")
    if not isinstance(tok, BPETokenizer) or len(tok.tokens) == 256:
        kind = "bytes" if isinstance(tok, BPETokenizer) else "characters"
        raise CheckpointError(f"{path}: llama.cpp can't hold a tokenizer of single {kind}; export a folder or .html")
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise CheckpointError(f"{path}: needs the package gguf: pip install gguf") from None
    handle, part = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".part", dir=path.absolute().parent)
    os.close(handle)
    writer = GGUFWriter(part, "gpt2" if model.config.positions == "learned" else "starcoder2")
    try:
        _add_keys(writer, model, tok, path.stem, huggingface.model_card(model, tok, content, passage), dtype)
        _add_tokenizer(writer, tok)
        for name, weight in _tensors(model, tok, dtype, path).items():
            writer.add_tensor(name, weight)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.chmod(part, 0o644)
        os.replace(part, path)
    finally:
        writer.close()
        Path(part).unlink(missing_ok=True)
    return ""


def _add_keys(writer: Any, model: GPT, tok: BPETokenizer, name: str, card: str, dtype: Dtype) -> None:
    """What the model is, and its shape."""
    from gguf import LlamaFileType

    c = model.config
    writer.add_type("model")
    writer.add_name(name)
    writer.add_description(card)
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if dtype == "float16" else LlamaFileType.ALL_F32)
    writer.add_vocab_size(tok.vocab_size)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_head_count(c.n_head)
    writer.add_head_count_kv(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    if c.positions == "rotary":
        writer.add_rope_freq_base(10_000.0)
        writer.add_rope_dimension_count(c.n_embd // c.n_head)


def _add_tokenizer(writer: Any, tok: BPETokenizer) -> None:
    from gguf import TokenType

    end = tok.specials.get(END, tok.tokens.index(NEVER))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PATTERNS[tok.pattern])
    writer.add_token_list([*map(tokenizer_json.show, tok.tokens), *tok.specials])
    writer.add_token_types([TokenType.NORMAL] * len(tok.tokens) + [TokenType.CONTROL] * len(tok.specials))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer_json.merges(tok)])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_array("tokenizer.ggml.suppress_tokens", [id for name, id in tok.specials.items() if name != END])
    writer.add_chat_template(TEMPLATE)


def _tensors(model: GPT, tok: BPETokenizer, dtype: Dtype, path: Path) -> Tensors:
    """llama.cpp's tensors; of the embeddings only rows that have a token (nanoGPT pads them)."""
    tensors = {}
    for name, w in huggingface.with_biases(model).items():
        name = name.removeprefix("transformer.")
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs) if ours[0] == "." else name
        for ours, theirs in NAMES.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        w = w.numpy()
        if name == "token_embd.weight":
            w = w[: tok.vocab_size]
        if w.ndim > 1 and name != "position_embd.weight":
            with np.errstate(over="ignore"):
                w = w.astype(dtype)
        if not np.isfinite(w).all():
            raise CheckpointError(f"{path}: {name} has numbers too large for {dtype}; --export_dtype=float32")
        if ".attn_qkv." in name and model.config.positions == "rotary":
            for part, rows in zip(QKV, np.split(w, 3), strict=True):
                tensors[name.replace(".attn_qkv.", part)] = rows
        else:
            tensors[name] = w
    return tensors
