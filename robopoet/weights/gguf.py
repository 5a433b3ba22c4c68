"""Models as GGUF files, for llama.cpp and what is built on it, such as Ollama and LM Studio.

llama.cpp's gpt2 has learned positions, its starcoder2 rotary ones. Both compute the tanh GELU from a table in float16,
also where the model has the exact one: the demo's log-probabilities differ by up to 0.003, and by 0.01 with llama.cpp's
default cache, float16. Those of its llama, which has no GELU, differ by 0.001 in small models. Style tags are control
tokens, which a prompt spells by their names. The Modelfile beside it is for Ollama. A chat template of the model that a
run started from is not kept: Ollama would put every prompt into a chat.
"""

import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model import GPT, GPTConfig
from robopoet import files
from robopoet.errors import CheckpointError
from robopoet.text import tokenizer_json
from robopoet.text.chat import ending_ids, template
from robopoet.text.tokenizer import END, PATTERNS, BPETokenizer, Tokenizer, styles
from robopoet.weights import huggingface, ollama
from robopoet.weights.architectures import architecture_of
from robopoet.weights.header import ExportDtype
from robopoet.weights.layout import C_ATTN, C_FC, Layout, in_dtype

if TYPE_CHECKING:
    from gguf import GGUFWriter

NAMES = {  # ours -> llama.cpp's
    ".wte.": ".token_embd.",
    ".wpe.": ".position_embd.",
    ".ln_f.": ".output_norm.",
    ".h.": ".blk.",
    ".ln_1.": ".attn_norm.",
    ".attn.c_proj.": ".attn_output.",
    ".ln_2.": ".ffn_norm.",
    ".mlp.c_proj.": ".ffn_down.",
}
ATTENTION = ".attn_q.", ".attn_k.", ".attn_v."
LAYOUTS = {  # an architecture's name, here and in llama.cpp -> its tensors
    "gpt2": Layout("", NAMES | {C_ATTN: ".attn_qkv.", C_FC: ".ffn_up."}),
    "starcoder2": Layout("", NAMES | {C_FC: ".ffn_up."}, {C_ATTN: ATTENTION}),
    "llama": Layout(
        "", NAMES, {C_ATTN: ATTENTION, C_FC: (".ffn_gate.", ".ffn_up.")}, paired=ATTENTION[:2], biases=False
    ),
}
NEVER = b"\xff"  # is in no UTF-8


class Weight(np.ndarray):
    """An array whose tofile(), by which GGUFWriter writes, fails on a full disk; numpy's may lose the end unnoticed."""

    def tofile(self, f: Any, sep: str = "", format: str = "%s") -> None:
        """Write all bytes to `f`; raises OSError."""
        f.write(self.data)


def check(config: GPTConfig, tok: Tokenizer) -> None:
    """Raise CheckpointError if llama.cpp can't hold the model or tokenizer, or the package gguf is not installed."""
    architecture_of(config)
    if not isinstance(tok, BPETokenizer):
        raise CheckpointError("export: llama.cpp can't hold a tokenizer of characters; export to .html or a folder")
    if len(tok.tokens) == 256:
        raise CheckpointError("export: llama.cpp can't hold a tokenizer without merges; export to .html or a folder")
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError("export: .gguf needs the package gguf: pip install gguf")


def export(
    model: GPT,
    tok: Tokenizer,
    content: dict[str, Any],
    passage: str,
    path: Path,
    dtype: ExportDtype,
    picture: str = "",
) -> str:
    """Write a new GGUF file, and a Modelfile of its name; returns who loads it, how long its texts may be, commands.

    content: the checkpoint. passage: a sample for the description. dtype: of the matrices; vectors and positions are
    float32, as llama.cpp's converter has them. picture: unused. Raises OSError if the file exists or can't be
    written, CheckpointError if the Modelfile exists or a weight is too large for float16, and as check() does.
    """
    check(model.config, tok)
    assert isinstance(tok, BPETokenizer)
    import gguf

    c, beside = model.config, path.with_suffix(".Modelfile")
    with files.creating(path) as part:
        if beside.exists():
            raise CheckpointError(f"export: {beside} exists; remove it, or choose another name")
        writer = gguf.GGUFWriter(part, architecture_of(c).model_type)
        try:
            writer.add_type("model")
            writer.add_name(_clean(path.stem))
            writer.add_description(_clean(huggingface.describe_model(model, tok, content, passage)))
            if licences := content.get("licences"):
                writer.add_license(_clean("; ".join(licences)))
            writer.add_tags(["text-generation", *map(_clean, styles(tok))])
            _add_config(writer, c, dtype)
            _add_tokenizer(writer, tok)
            for name, weight in _tensors(model, tok.vocab_size, dtype).items():
                writer.add_tensor(name, weight)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        finally:
            with contextlib.suppress(OSError):  # on a full disk it writes in vain once more
                writer.close()
        with files.creating(beside) as modelfile:
            modelfile.write_text(_clean(ollama.modelfile(path.name, c, tok)), encoding="utf-8")
    beyond = "" if c.positions == "learned" else ", or goes on with --context-shift --keep 1"
    known = f"llama.cpp, Ollama and LM Studio load it; a text ends after {c.block_size} tokens, prompt included{beyond}"
    return f"{known}\n{ollama.commands(beside)}"


def _add_config(writer: "GGUFWriter", c: GPTConfig, dtype: ExportDtype) -> None:
    """The model's shape."""
    from gguf import LlamaFileType

    writer.add_file_type(LlamaFileType.MOSTLY_F16 if dtype == "float16" else LlamaFileType.ALL_F32)
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_feed_forward_length(c.inner)
    writer.add_head_count(c.n_head)
    if c.kv_heads != c.n_head:
        writer.add_head_count_kv(c.kv_heads)
    (writer.add_layer_norm_rms_eps if c.norm == "rmsnorm" else writer.add_layer_norm_eps)(1e-5)
    if c.positions == "rotary":
        writer.add_rope_dimension_count(c.head_size)
        writer.add_rope_freq_base(c.rope_theta)


def _add_tokenizer(writer: "GGUFWriter", tok: BPETokenizer) -> None:
    """The tokens; special ones are never generated, as in Poet, but for those that end a text."""
    from gguf import TokenType

    end = tok.specials.get(END, tok.tokens.index(NEVER))  # llama.cpp ends texts at id 11 unless told otherwise
    ending = ending_ids(tok) or [end]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PATTERNS[tok.pattern])
    writer.add_token_list([*map(tokenizer_json.show, tok.tokens), *tok.specials])
    writer.add_token_types([TokenType.NORMAL] * len(tok.tokens) + [TokenType.CONTROL] * len(tok.specials))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer_json.merges(tok)])
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(ending[-1])
    writer.add_array("tokenizer.ggml.suppress_tokens", [id for id in tok.specials.values() if id not in ending])
    writer.add_chat_template(template(tok))


def _tensors(model: GPT, vocab_size: int, dtype: ExportDtype) -> dict[str, Weight]:
    """llama.cpp's tensors: name -> (rows, columns) or (n,), of the embeddings only `vocab_size` rows (nanoGPT pads)."""
    tensors = {}
    layout = LAYOUTS[architecture_of(model.config).model_type]
    for name, weight in layout.theirs(model).items():
        if name == "token_embd.weight":
            weight = weight[:vocab_size]
        kept = weight.ndim == 1 or name == "position_embd.weight"  # in float32
        tensors[name] = in_dtype(weight, name, "float32" if kept else dtype).numpy().view(Weight)
    return tensors


def _clean(text: str) -> str:
    """`text` without control characters, which a terminal would obey, and lone surrogates."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
