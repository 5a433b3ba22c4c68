"""Weights on disk: ours, nanoGPT's, Hugging Face's. Ours are written whole or not at all and never believed unhashed.

A checkpoint is what torch.save writes, with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and ours (model_extra, tokenizer, text_sha256, ...). It is a zip archive, and its SHA-256 stands in the zip's
comment: any zip reader, torch.load and nanoGPT among them, passes over it.
"""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch

from data import DataError, tokenizer
from data.tokenizer import END, CharTokenizer
from model import GPT, GPTConfig

NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
LABEL = b"sha256:"
COMMENT_BYTES = len(LABEL) + 64


class CheckpointError(ValueError):
    """A checkpoint that can't be read or doesn't fit; the message names the file, what was found and what to do."""


def save(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Write `content` to `path`: at every moment either the old file or the new one stands there, whole.

    keep: where the old file goes, if it is to be kept.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w+b") as f:
            try:
                torch.save(content, f)
            except RuntimeError as e:  # the zip writer's own complaint, after the disk's
                raise e.__context__ if isinstance(e.__context__, OSError) else e from None
            f.seek(-2, os.SEEK_END)  # a zip ends with the length of its comment, here 0
            f.write(COMMENT_BYTES.to_bytes(2, "little"))
            f.write(LABEL + _digest(f, f.tell()))
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the names, too, must be on disk
    os.fsync(folder)
    os.close(folder)


def _digest(f: BinaryIO, size: int) -> bytes:
    """The SHA-256, in hexadecimal, of the first `size` bytes of `f`, whose position ends there."""
    sha = hashlib.sha256()
    f.seek(0)
    while size and (block := f.read(min(size, 2**20))):
        sha.update(block)
        size -= len(block)
    return sha.hexdigest().encode()


def sha256(path: Path) -> str:
    """The SHA-256, in hexadecimal, of the file at `path`, or of a folder's weights: which model it is."""
    sha = hashlib.sha256()
    for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        sha.update(part.read_bytes())
    return sha.hexdigest()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: ours, nanoGPT's, or a folder of Hugging Face's, or the Hub's of that name.

    Nothing in the file is executed (weights_only). A file without a hash is taken only if it isn't ours. Raises
    CheckpointError when it is missing, cut short, altered or not one.
    """
    if not path.exists() and re.fullmatch(r"[\w-]+(/[\w-]+)?", str(path)):
        path = fetch(str(path))
    if (path / "config.json").is_file():
        return load_huggingface(path)
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            body = max(f.tell() - COMMENT_BYTES, 0)
            f.seek(body)
            comment = f.read()
            if comment.startswith(LABEL) and comment != LABEL + _digest(f, body):
                raise CheckpointError(f"{path}: its SHA-256 is not the one it carries; the file is damaged")
            f.seek(0)
            content = torch.load(f, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; train first, or name another checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder; name the file, as {path}/best.pt") from None
    except Exception as e:  # a damaged file makes the unpickler raise whatever it stumbles over
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise CheckpointError(f"{path}: is not a checkpoint, or is damaged ({reason[:120]})") from None
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise CheckpointError(f"{path}: is not a checkpoint: it has no 'model' and 'model_args'")
    if "model_extra" in content and not comment.startswith(LABEL):
        raise CheckpointError(f"{path}: has lost its SHA-256; the file is damaged")
    return content


def model_entries(model: GPT) -> dict[str, Any]:
    """The entries of a checkpoint that hold a model: its weights, nanoGPT's seven arguments, and ours beside them."""
    config = dataclasses.asdict(model.config)
    return {
        "model": model.state_dict(),
        "model_args": {key: config[key] for key in NANOGPT_ARGS},
        "model_extra": {key: value for key, value in config.items() if key not in NANOGPT_ARGS},
    }


def build_model(content: dict[str, Any], path: Path, dropout: float = 0.0, vocab_size: int = 0) -> GPT:
    """The model that a checkpoint holds, on the CPU in float32; raises CheckpointError when its parts don't fit.

    vocab_size: ids that it must have at least; those that the checkpoint lacks are initialised as for a new model.
    """
    try:
        config = GPTConfig(**{**content["model_args"], **content.get("model_extra", {}), "dropout": dropout})
        model = GPT(dataclasses.replace(config, vocab_size=max(config.vocab_size, vocab_size)))
        weights = {key.removeprefix("_orig_mod."): value for key, value in content["model"].items()}
        if vocab_size > config.vocab_size:
            new = model.lm_head.weight.detach()[config.vocab_size :].clone()
            for key in ("transformer.wte.weight", "lm_head.weight"):
                weights[key] = torch.cat([weights[key], new.to(weights[key].dtype)])
        model.load_state_dict(weights)
    except (TypeError, RuntimeError, AttributeError, ValueError) as e:
        raise CheckpointError(f"{path}: its weights don't fit its model_args ({str(e).splitlines()[0]})") from None
    return model


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[GPT, tokenizer.Tokenizer, dict[str, Any]]:
    """All it takes to write: the model in eval mode on `device` in `dtype`, its tokenizer, and the rest of the file."""
    content = load(path)
    tok = tokenizer_of(content, path)
    model = build_model(content, path).to(device, dtype).eval()
    return model, tok, content


GPT2_SIZES = (50_257, 50_304)  # GPT-2's vocabulary, and what nanoGPT pads it to


def tokenizer_of(content: dict[str, Any], path: Path) -> tokenizer.Tokenizer:
    """The tokenizer of a checkpoint: its own, nanoGPT's characters, or GPT-2's if the size is; else CheckpointError."""
    try:
        if "tokenizer" in content:
            return tokenizer.from_json(content["tokenizer"])
        if "model_extra" not in content and (found := nanogpt_characters(content, path)):
            return found
        if content["model_args"].get("vocab_size") in GPT2_SIZES:
            return tokenizer.BPETokenizer.gpt2([END])
    except DataError as e:
        raise CheckpointError(f"{path}: {e}") from None
    raise CheckpointError(
        f"{path}: has no tokenizer; put nanoGPT's meta.pkl, or a folder's tokenizer.json, beside the weights"
    )


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT


class _Plain(pickle.Unpickler):
    """Reads numbers, texts, lists and dicts; no class or function can be named, so nothing can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def nanogpt_characters(content: dict[str, Any], path: Path) -> CharTokenizer | None:
    """The characters in the meta.pkl of nanoGPT's checkpoint at `path`; None if there is none.

    It is looked for beside the checkpoint and where nanoGPT keeps it, in data/DATASET of the same checkout. Raises
    CheckpointError when it is damaged.
    """
    dataset = content["config"].get("dataset", "") if isinstance(content.get("config"), dict) else ""
    for place in (path.parent / "meta.pkl", path.absolute().parent.parent / "data" / str(dataset) / "meta.pkl"):
        if place.is_file():
            try:
                with open(place, "rb") as f:
                    itos = _Plain(f).load()["itos"]
                return CharTokenizer("".join(itos[id] for id in range(len(itos))), [])
            except Exception as e:  # a damaged pickle makes the unpickler raise whatever it stumbles over
                raise CheckpointError(f"{place}: is not a meta.pkl of nanoGPT's ({type(e).__name__}: {e})") from None
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # its Conv1D
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
FIXED = {  # what a GPT-2 may have otherwise, and this model has not
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def fetch(name: str) -> Path:
    """The folder of a model on the Hugging Face Hub, downloaded once; raises CheckpointError when it can't be had."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name}: no such file or folder; if it is a model on the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as e:  # whatever the network library of the day raises
        raise CheckpointError(
            f"{name}: no such file or folder, and the Hugging Face Hub could not be asked for it ({type(e).__name__})"
        ) from None


def load_huggingface(folder: Path) -> dict[str, Any]:
    """What a folder of a GPT-2 (config.json, safetensors, tokenizer.json) holds, as a checkpoint of ours has it.

    Raises CheckpointError when a part is missing, damaged, or of another architecture.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = {key: config.get(key, value) for key, value in FIXED.items()}
        problems = [f"{key}: found {found[key]!r}, must be {FIXED[key]!r}" for key in FIXED if found[key] != FIXED[key]]
        args = {key: config[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        args |= {"block_size": config["n_positions"], "bias": True, "dropout": config.get("resid_pdrop", 0.1)}
        if config.get("n_inner") not in (None, 4 * args["n_embd"]):
            problems.append(f"n_inner: found {config['n_inner']}, must be {4 * args['n_embd']}")
        if (gelu := config.get("activation_function", "gelu_new")) not in GELUS:
            problems.append(f"activation_function: found {gelu!r}, must be one of {', '.join(GELUS)}")
        if problems:
            raise CheckpointError(f"{path}: is another architecture: " + "; ".join(problems))
        index = folder / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.is_file():
            names = {Path(name).name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        weights: dict[str, torch.Tensor] = {}
        for path in (folder / name for name in sorted(names)):
            weights |= safetensors.torch.load_file(path)
        content = {"model": _from_huggingface(weights), "model_args": args, "model_extra": {"gelu": GELUS[gelu]}}
        if (path := folder / "tokenizer.json").is_file():
            content["tokenizer"] = tokenizer.from_huggingface(json.loads(path.read_text(encoding="utf-8"))).to_json()
    except CheckpointError:
        raise
    except DataError as e:
        raise CheckpointError(f"{folder}: {e}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; a model needs config.json and model.safetensors") from None
    except (KeyError, TypeError, AttributeError, ValueError, OSError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{path}: is not what Hugging Face's GPT-2 has ({type(e).__name__}: {e})") from None
    return content


def _from_huggingface(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's weights under nanoGPT's names, in nanoGPT's shapes."""
    ours = {}
    for name, weight in weights.items():
        name = "transformer." + name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # masks; the embedding once more
            ours[name] = weight.t() if name.endswith(TRANSPOSED) else weight
    return ours | {"lm_head.weight": ours["transformer.wte.weight"]}


def export(model: GPT, tok: tokenizer.Tokenizer, content: dict[str, Any], passage: str, folder: Path) -> None:
    """Write a new folder that transformers' AutoModelForCausalLM and AutoTokenizer load.

    content: the checkpoint. passage: a sample for the model card. Raises CheckpointError if the folder exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; choose another folder, or remove it")
    c, end = model.config, tok.specials.get(END)
    weights = {}
    for name, p in model.state_dict().items():
        if name != "lm_head.weight":
            weights[name] = (p.t() if name.endswith(TRANSPOSED) else p).float().contiguous()
            if not c.bias and name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight")):
                weights[name.removesuffix("weight") + "bias"] = torch.zeros(len(p))  # a GPT-2 has them
    config = FIXED | {
        "architectures": ["GPT2LMHeadModel"],
        "n_positions": c.block_size,
        **{key: getattr(c, key) for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
        "activation_function": "gelu" if c.gelu == "none" else "gelu_new",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), content["model_args"].get("dropout", 0.0)),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        "dtype": "float32",
    }
    special = {"bos_token": END, "eos_token": END} if end is not None else {}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.block_size, **special}
    about["clean_up_tokenization_spaces"] = False
    writing = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "bos_token_id": end, "eos_token_id": end}
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.absolute().parent))
    try:
        safetensors.torch.save_file(weights, part / "model.safetensors", {"format": "pt"})
        files = {"config": config, "generation_config": writing, "tokenizer_config": about}
        for name, value in (files | {"tokenizer": tokenizer.to_huggingface(tok)}).items():
            (part / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
        (part / "README.md").write_text(model_card(model, tok, content, passage), encoding="utf-8")
        for path in part.iterdir():
            path.chmod(0o644)
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def model_card(model: GPT, tok: tokenizer.Tokenizer, content: dict[str, Any], passage: str) -> str:
    """What a reader of the exported folder should know, as Markdown."""
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
        lines += ["", f"Validation loss: {loss:.4f} nats per token, after {content['iter_num']:,} steps."]
    if licences := content.get("licences"):
        lines += ["", "Trained on texts under these licences:", "", *(f"- {licence}" for licence in licences)]
    if styles:
        names = ", ".join(f"`{tokenizer.style_token(style)}`" for style in styles)
        lines += ["", f"A passage is written in the style of the tag that its prompt begins with: {names}."]
    return "\n".join([*lines, "", "A sample:", "", *(f"    {line}" for line in passage.splitlines()), ""])
