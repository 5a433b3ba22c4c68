"""GPT-2 in Hugging Face's format: download it from the Hub, read a folder, export one.

A folder holds config.json, model.safetensors (or several, with an index) and tokenizer.json.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors
import safetensors.torch
import torch

from model import GPT
from robopoet import untrusted
from robopoet.errors import CheckpointError, DataError
from robopoet.text import tokenizer, tokenizer_json
from robopoet.text.tokenizer import END
from robopoet.weights.header import ModelArgs, Share, Size

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # its Conv1D layers
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}  # its name -> torch's `approximate`
HEADER_BYTES = 10 * 2**20  # of a safetensors file: room for 100,000 tensors
NOT_GPT2 = "it does not match Hugging Face's GPT-2"

Name = Annotated[str, msgspec.Meta(max_length=100)]


@dataclass(frozen=True)
class Architecture:
    """Options of Hugging Face's GPT-2 for which our model supports only these values."""

    model_type: Name = "gpt2"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class HuggingFaceConfig:
    """The keys of a GPT-2's config.json that give its shape."""

    n_layer: Size
    n_head: Size
    n_embd: Size
    n_positions: Size
    vocab_size: Size
    resid_pdrop: Share = 0.1
    n_inner: int | None = None
    activation_function: Name = "gelu_new"


@dataclass(frozen=True)
class ShardIndex:
    """model.safetensors.index.json: the file that holds each tensor."""

    weight_map: dict[str, Annotated[str, msgspec.Meta(max_length=255)]]


# ---------------------------------------------------------------------------------------------------------------------
# reading


def fetch(name: str) -> Path:
    """Download a model from the Hugging Face Hub unless it is cached; returns its folder.

    Raises CheckpointError when huggingface_hub is not installed or the download fails.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such file or folder; if it is a model on the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as e:  # many classes, and they change with the network library
        raise CheckpointError(
            f"{name}: no such file or folder, and the Hugging Face Hub could not be asked for it ({type(e).__name__})"
        ) from None


def load(folder: Path) -> dict[str, Any]:
    """Read a folder that holds a GPT-2; returns what our own checkpoints hold: model, model_args, tokenizer.

    Raises CheckpointError when a file is missing, damaged, or of another architecture.
    """
    content = _read_config(folder / "config.json")
    names = {"model.safetensors"}
    if (index := folder / "model.safetensors.index.json").exists():
        shards = untrusted.read_json(index, ShardIndex, CheckpointError, NOT_GPT2)
        names = {Path(name).name for name in shards.weight_map.values()}
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        weights |= _load_safetensors(folder / name)
    content["model"] = _our_weights(weights)
    if (path := folder / "tokenizer.json").exists():
        try:
            tok = tokenizer_json.from_huggingface(untrusted.read_bytes(path, DataError))
        except DataError as e:
            raise CheckpointError(f"{folder}: {e}") from None
        content["tokenizer"] = tok.to_json()
    return content


def _read_config(path: Path) -> dict[str, Any]:
    """`model_args` and `model_extra` as config.json gives them."""
    raw = untrusted.read_bytes(path, CheckpointError)
    found = untrusted.decode_json(raw, Architecture, path, CheckpointError, NOT_GPT2)
    pairs = zip(dataclasses.asdict(found).items(), dataclasses.astuple(Architecture()), strict=True)
    problems = [f"{key}: found {value!r}, must be {fixed!r}" for (key, value), fixed in pairs if value != fixed]
    if found.model_type == "gpt2":  # another model's config has other keys
        config = untrusted.decode_json(raw, HuggingFaceConfig, path, CheckpointError, NOT_GPT2)
        if config.n_inner not in (None, 4 * config.n_embd):
            problems.append(f"n_inner: found {config.n_inner}, must be {4 * config.n_embd}")
        if (gelu := config.activation_function) not in GELUS:
            problems.append(f"activation_function: found {gelu!r}, must be one of {', '.join(GELUS)}")
    if problems:
        raise CheckpointError(f"{path}: is another architecture: " + "; ".join(problems))
    args = {"block_size": config.n_positions, "bias": True, "dropout": config.resid_pdrop}
    args |= {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    untrusted.convert(args, ModelArgs, path, CheckpointError, NOT_GPT2)
    return {"model_args": args, "model_extra": {"gelu": GELUS[gelu]}}


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: not found; a model needs config.json and model.safetensors")
    untrusted.check_regular(path, CheckpointError)
    try:
        with open(path, "rb") as f:
            if (size := int.from_bytes(f.read(8), "little")) > HEADER_BYTES:
                raise CheckpointError(f"{path}: its header has {size:,} bytes, must have at most {HEADER_BYTES:,}")
        return safetensors.torch.load_file(path)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{path}: does not match Hugging Face's GPT-2 ({untrusted.describe(e)})") from None


def _our_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face's GPT-2 weights under nanoGPT's names, in nanoGPT's shapes."""
    ours = {}
    for name, weight in weights.items():
        name = "transformer." + name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # causal masks; the tied embedding
            ours[name] = weight.t() if name.endswith(TRANSPOSED) and weight.dim() == 2 else weight
    if "transformer.wte.weight" in ours:
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    return ours


# ---------------------------------------------------------------------------------------------------------------------
# export


def export(model: GPT, tok: tokenizer.Tokenizer, content: dict[str, Any], passage: str, folder: Path) -> None:
    """Write a new folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

    content: the checkpoint. passage: a sample for the model card. Raises CheckpointError if the folder exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; choose another folder, or remove it")
    end = tok.specials.get(END)
    ends = {"bos_token_id": end, "eos_token_id": end}
    special = {"bos_token": END, "eos_token": END} if end is not None else {}
    files = {
        "config": _their_config(model, content["model_args"].get("dropout", 0.0)) | ends | {"dtype": "float32"},
        "generation_config": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, **ends},
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.block_size,
            **special,
            "clean_up_tokenization_spaces": False,
        },
        "tokenizer": tokenizer_json.to_huggingface(tok),
    }
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.absolute().parent))
    try:
        safetensors.torch.save_file(_their_weights(model), part / "model.safetensors", {"format": "pt"})
        for name, value in files.items():
            (part / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
        (part / "README.md").write_text(model_card(model, tok, content, passage), encoding="utf-8")
        for path in part.iterdir():
            path.chmod(0o644)
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _their_config(model: GPT, dropout: float) -> dict[str, Any]:
    """config.json, up to the special tokens."""
    c = model.config
    return dataclasses.asdict(Architecture()) | {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": c.block_size,
        **{key: getattr(c, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
        "activation_function": "gelu" if c.gelu == "none" else "gelu_new",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    }


def _their_weights(model: GPT) -> dict[str, torch.Tensor]:
    """The model's weights in float32, in the shapes of Hugging Face's GPT-2."""
    weights = {}
    for name, p in model.state_dict().items():
        if name != "lm_head.weight":
            weights[name] = (p.t() if name.endswith(TRANSPOSED) else p).float().contiguous()
            if not model.config.bias and name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight")):
                weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(p))  # a GPT-2 always has biases
    return weights


def model_card(model: GPT, tok: tokenizer.Tokenizer, content: dict[str, Any], passage: str) -> str:
    """The exported folder's README, as Markdown: shape, loss, licences, styles and a sample."""
    c, styles = model.config, tokenizer.styles(tok)
    lines = [
        "---",
        "pipeline_tag: text-generation",
        "library_name: transformers",
        "---",
        "",
        "# A GPT trained with RoboPoet",
        "",
    ]
    lines += [f"{model.num_params():,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, "]
    lines[-1] += f"{c.block_size} tokens of context, vocabulary {c.vocab_size:,}."
    if (loss := content.get("best_val_loss")) is not None:
        lines += ["", f"Validation loss: {loss:.4f} nats per token, after {content.get('iter_num', 0):,} steps."]
    if licences := content.get("licences"):
        lines += ["", "Trained on texts under these licences:", "", *(f"- {licence}" for licence in licences)]
    if styles:
        names = ", ".join(f"`{tokenizer.style_token(style)}`" for style in styles)
        lines += ["", f"A passage is written in the style of the tag that its prompt begins with: {names}."]
    return "\n".join([*lines, "", "A sample:", "", *(f"    {line}" for line in passage.splitlines()), ""])
