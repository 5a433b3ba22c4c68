"""Checkpoints: a file that is replaced atomically and carries its SHA-256, which is verified before anything is read.

A checkpoint is what torch.save writes, with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and ours (model_extra, tokenizer, text_sha256, ...). torch.save writes a zip archive; the hash is the archive's
comment, which torch.load, nanoGPT and other zip readers skip.
"""

import contextlib
import dataclasses
import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import torch

from model import GPT, GPTConfig
from robopoet import files
from robopoet.errors import CheckpointError, DataError, describe, shorten
from robopoet.machine import Machine
from robopoet.text import tokenizer
from robopoet.text.tokenizer import END
from robopoet.weights import gguf_reader, huggingface, nanogpt, pretrained
from robopoet.weights.header import config_entries, read_header
from robopoet.weights.layout import NoInit, without_memory

LABEL = b"sha256:"
COMMENT_BYTES = len(LABEL) + 64
PICKLE_BYTES = 2**25  # limit of the part without tensors; a tokenizer of 2**20 ids takes half of it
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
GPT2_SIZES = (50_257, 50_304)  # GPT-2's vocabulary, and what nanoGPT pads it to


def save(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Write `content` to `path` atomically: after a crash at any moment, `path` is the old file or the new one.

    keep: where to move the old file instead of replacing it. Raises OSError when the disk can't take the file.
    """
    with files.replacing(path, keep) as f:
        try:
            torch.save(content, f)
        except RuntimeError as e:  # the zip writer raises its own error over the disk's
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None
        f.seek(-2, os.SEEK_END)  # a zip archive ends with the length of its comment, so far 0
        f.write(COMMENT_BYTES.to_bytes(2, "little"))
        f.write(LABEL + _digest(f, f.tell()))


class Saver:
    """Writes a run's checkpoints one after the other; on CUDA in a thread, while training goes on.

    On a CPU the thread would take cores from the steps, and the copies memory from the model: there nothing is copied,
    and all is written at once.
    """

    def __init__(self, machine: Machine):
        self.machine, self.in_background = machine, machine.device.type == "cuda"
        self.pool = ThreadPoolExecutor(1)
        self.begun: tuple[Future[None], Callable[[], None]] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.wait()

    def snapshot(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as it is now, for start(), whatever later steps write to it."""
        if self.in_background:
            try:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
                return copy.copy_(tensor, non_blocking=True)
            except RuntimeError:  # too little memory, or too little that can be pinned
                self.in_background = False
        return tensor

    def start(self, write: Callable[[], None]) -> None:
        """Call `write`, in the thread if that is possible, once the snapshots are whole; wait() comes before."""
        self.machine.synchronize()  # here, as a thread that waits for the device would disturb a recording
        if not self.in_background:
            return write()
        self.begun = self.pool.submit(write), write  # kept, so that this thread frees the pinned memory
        return None

    def wait(self) -> None:
        """Wait until what was begun is written; raises what `write` raised."""
        begun, self.begun = self.begun, None
        if begun:
            begun[0].result()


def _digest(f: BinaryIO, size: int) -> bytes:
    """The SHA-256, in hexadecimal, of the first `size` bytes of `f`; leaves `f` positioned after them."""
    sha = hashlib.sha256()
    f.seek(0)
    while size and (block := f.read(min(size, 2**20))):
        sha.update(block)
        size -= len(block)
    return sha.hexdigest().encode()


def weights_sha256(path: Path) -> str:
    """The SHA-256, in hexadecimal, of a file, or of a folder's safetensors files in order of name.

    Raises CheckpointError when one can't be read.
    """
    return files.sha256(CheckpointError, *(sorted(path.glob("*.safetensors")) if path.is_dir() else [path]))


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
FILE_EXTENSIONS = {*".pt .pth .ckpt .bin .pkl .safetensors .gguf .zip .json .yaml .md .txt".split()}


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU; no code in it is run (weights_only).

    path: a file of ours or nanoGPT's, a GGUF file, a folder in Hugging Face's format, a name in PRETRAINED or a model's
    on the Hub. Ours must carry a hash; nanoGPT's have none. Raises CheckpointError when the file is missing, truncated,
    altered or no checkpoint.
    """
    credit: dict[str, Any] = {}
    if not os.path.exists(path):
        if not HUB_NAME.fullmatch(str(path)) or path.suffix.lower() in FILE_EXTENSIONS:
            raise not_found(path)
        credit = {"licences": [pretrained.licence(str(path))]}
        path = pretrained.locate(str(path))
    if os.path.isfile(path / "config.json"):
        return huggingface.load_folder(path) | credit
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: is a folder; name the file, as {path}/best.pt")
    if gguf_reader.is_gguf(path):
        return gguf_reader.load_gguf(path) | credit
    content, is_hashed = _read_file(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise CheckpointError(f"{path}: is not a checkpoint: it has no 'model' and 'model_args'")
    if "model_extra" in content and not is_hashed:
        raise CheckpointError(f"{path}: has lost its SHA-256; the file is damaged")
    header = read_header(content, path)
    if header.tokenizer and header.tokenizer.vocab_size > header.model_args.vocab_size:
        raise CheckpointError(f"{path}: its tokenizer has {header.tokenizer.vocab_size} ids, its model fewer")
    loss = {"best_val_loss": header.best_val_loss} if "best_val_loss" in content else {}
    return content | {"model_args": msgspec.structs.asdict(header.model_args)} | loss


def not_found(path: Path, advice: str = "train first, or name another checkpoint") -> CheckpointError:
    """The error that says that there is no file at `path`, with one that resembles it, or else with `advice`."""
    return CheckpointError(f"{shorten(str(path))}: not found{files.did_you_mean_path(path) or f'; {advice}'}")


def _read_file(path: Path) -> tuple[Any, bool]:
    """What torch.load reads from `path`, and whether the file carries a hash; raises CheckpointError on a wrong one."""
    size = files.check_regular(path, CheckpointError)
    try:
        with open(path, "rb") as f:
            body = max(size - COMMENT_BYTES, 0)
            f.seek(body)
            comment = f.read(COMMENT_BYTES)
            if comment.startswith(LABEL) and comment != LABEL + _digest(f, body):
                raise CheckpointError(f"{path}: its SHA-256 does not match; the file is damaged")
            _check_zip(f, size)
            f.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of pickles it did not write
                return torch.load(f, map_location="cpu", weights_only=True), comment.startswith(LABEL)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror or e}") from None
    except Exception as e:  # on a damaged file the unpickler may raise anything
        raise CheckpointError(f"{path}: is not a checkpoint, or is damaged ({type(e).__name__})") from None


def _check_zip(f: BinaryIO, size: int) -> None:
    """Raise ValueError unless `f`, of `size` bytes, is a zip archive without compression, so that it can't inflate."""
    with zipfile.ZipFile(f) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
        raise ValueError("it would unpack to more than it is")
    if any(part.filename.endswith(".pkl") and part.file_size > PICKLE_BYTES for part in parts):
        raise ValueError("it holds too much beside tensors")


def model_entries(model: GPT) -> dict[str, Any]:
    """A model as entries of a checkpoint: `model` (its state dict), `model_args` (nanoGPT's seven), `model_extra`."""
    return {"model": model.state_dict(), **config_entries(model.config)}


def build_model(content: dict[str, Any], path: Path, dropout: float = 0.0, vocab_size: int = 0) -> GPT:
    """Build the model that a checkpoint holds, on the CPU in float32.

    content: what `load` returned for `path`. vocab_size: if larger than the checkpoint's, embedding rows are added and
    initialised as in a new model. Raises CheckpointError when weights and model_args don't fit, or a weight is not
    finite.
    """
    config = GPTConfig(**read_header(content, path).shape | {"dropout": dropout})
    weights = check_weights(content["model"], config, path)
    size = max(config.vocab_size, vocab_size)
    with contextlib.nullcontext() if size > config.vocab_size else NoInit():  # only new rows need it
        model = GPT(dataclasses.replace(config, vocab_size=size))
    if size > config.vocab_size:
        new = model.lm_head.weight.detach()[config.vocab_size :].clone()
        for key in ("transformer.wte.weight", "lm_head.weight"):
            weights[key] = torch.cat([weights[key], new.to(weights[key].dtype)])
    model.load_state_dict(weights)
    return model


def check_weights(weights: Any, config: GPTConfig, path: Path) -> dict[str, torch.Tensor]:
    """`weights` without torch.compile's prefix; raises CheckpointError unless they fit `config` and are finite.

    A file may claim any size, so nothing of that size is allocated: one block on the meta device gives all shapes.
    """
    try:
        weights = {name.removeprefix("_orig_mod."): weight for name, weight in weights.items()}
        shapes = {name: p.shape for name, p in without_memory(config, 1).state_dict().items()}
        of_block = [name for name in shapes if ".h.0." in name]
        n_tensors = len(shapes) + (config.n_layer - 1) * len(of_block)
        if len(weights) != n_tensors:
            note = ""
            if ("transformer.wpe.weight" in weights) != ("transformer.wpe.weight" in shapes):
                note = f"; positions are {config.positions}, transformer.wpe.weight belongs to learned ones"
            raise ValueError(f"there are {len(weights)} tensors, must be {n_tensors}{note}")
        for i in range(1, config.n_layer):
            shapes |= {name.replace(".h.0.", f".h.{i}."): shapes[name] for name in of_block}
    except (TypeError, RuntimeError, AttributeError, ValueError) as e:  # GPT() raises these, too
        raise CheckpointError(f"{path}: its weights don't fit its model_args ({describe(e)})") from None
    check_tensors(weights, shapes, "its weights", path)
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise CheckpointError(f"{path}: its lm_head is not tied to its embeddings, as this model's is")
    return weights


def check_tensors(
    tensors: dict[str, Any],
    shapes: dict[str, torch.Size],
    what: str,
    path: Path,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Raise CheckpointError unless `tensors` are just those of `shapes`, of `dtypes`, finite, with bytes of their own.

    what: what they are, in the plural, as the message says.
    """
    try:
        if extra := tensors.keys() - shapes.keys():
            raise ValueError(f"there is no {min(map(str, extra))}")
        held: dict[int, int] = {}
        used = 0
        for name, shape in shapes.items():
            t = tensors.get(name)
            if not isinstance(t, torch.Tensor) or t.layout is not torch.strided or t.dtype not in dtypes or t.is_meta:
                raise ValueError(f"{name} is missing, or not a tensor of {' or '.join(map(str, dtypes))}")
            if t.shape != shape:
                raise ValueError(f"{name} is {tuple(t.shape)}, must be {tuple(shape)}")
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            used += t.nbytes if name != "lm_head.weight" else 0  # tied: the embedding's own bytes
        if used > sum(held.values()):
            raise ValueError("they claim more numbers than the file holds")
    except (TypeError, RuntimeError, AttributeError, ValueError) as e:  # tensors of odd kinds raise these too
        raise CheckpointError(f"{path}: {what} don't fit its model_args ({describe(e)})") from None
    if not_finite := [name for name, t in tensors.items() if not t.isfinite().all()]:
        raise CheckpointError(
            f"{path}: {what}: {not_finite[0]} is not finite; the run diverged, or the file is damaged"
        )


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[GPT, tokenizer.Tokenizer, dict[str, Any]]:
    """Load what generation needs: the model in eval mode on `device` in `dtype`, its tokenizer, and the checkpoint.

    Raises CheckpointError as `load`, `tokenizer_of` and `build_model` do.
    """
    content = load(path)
    tok = tokenizer_of(content, path)
    model = build_model(content, path).to(device, dtype).eval()
    return model, tok, content


def tokenizer_of(content: dict[str, Any], path: Path) -> tokenizer.Tokenizer:
    """The tokenizer of a checkpoint: the one inside it, nanoGPT's meta.pkl, or GPT-2's if the vocabulary is that large.

    Raises CheckpointError when there is none.
    """
    header = read_header(content, path)
    try:
        if header.tokenizer:
            return tokenizer.from_json(header.tokenizer)
        if header.model_extra is None and (found := nanogpt.find_alphabet(header.config.dataset, path)):
            return found
        if header.model_args.vocab_size in GPT2_SIZES:
            return tokenizer.BPETokenizer.gpt2([END])
    except DataError as e:
        raise CheckpointError(f"{path}: {e}") from None
    raise CheckpointError(
        f"{path}: has no tokenizer; put nanoGPT's meta.pkl, or a folder's tokenizer.json, beside the weights"
    )
