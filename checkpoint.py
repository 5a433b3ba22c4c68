"""Weights on disk, written whole or not at all, and never believed without their hash.

A checkpoint is what torch.save writes, with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and ours (model_extra, tokenizer, text_sha256, ...). It is a zip archive, and its SHA-256 stands in the zip's
comment: any zip reader, torch.load and nanoGPT among them, passes over it.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data import DataError, tokenizer
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


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises CheckpointError when it is missing, cut short, altered or not one.

    Nothing in the file is executed (weights_only). A file without a hash is taken only if it isn't ours.
    """
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


def build_model(content: dict[str, Any], path: Path, dropout: float = 0.0) -> GPT:
    """The model that a checkpoint holds, on the CPU in float32; raises CheckpointError when its parts don't fit."""
    try:
        config = GPTConfig(**{**content["model_args"], **content.get("model_extra", {}), "dropout": dropout})
        model = GPT(config)
        model.load_state_dict({key.removeprefix("_orig_mod."): value for key, value in content["model"].items()})
    except (TypeError, RuntimeError, AttributeError, ValueError) as e:
        raise CheckpointError(f"{path}: its weights don't fit its model_args ({str(e).splitlines()[0]})") from None
    return model


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[GPT, tokenizer.Tokenizer, dict[str, Any]]:
    """All it takes to write: the model in eval mode on `device` in `dtype`, its tokenizer, and the rest of the file."""
    content = load(path)
    if "tokenizer" not in content:
        raise CheckpointError(f"{path}: has no tokenizer inside; it is not a checkpoint of ours")
    try:
        tok = tokenizer.from_json(content["tokenizer"])
    except DataError as e:
        raise CheckpointError(f"{path}: {e}") from None
    model = build_model(content, path).to(device, dtype).eval()
    return model, tok, content
