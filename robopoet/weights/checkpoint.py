"""Weights on disk: ours, nanoGPT's, Hugging Face's. Ours are written whole or not at all and never believed unhashed.

A checkpoint is what torch.save writes, with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and ours (model_extra, tokenizer, text_sha256, ...). It is a zip archive, and its SHA-256 stands in the zip's
comment: any zip reader, torch.load and nanoGPT among them, passes over it.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import shutil
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
import safetensors
import safetensors.torch
import torch

import configurator
from model import GPT, GPTConfig
from robopoet import untrusted
from robopoet.errors import CheckpointError, DataError
from robopoet.text import tokenizer
from robopoet.text.tokenizer import END, SavedBPE, SavedChar
from robopoet.untrusted import Count

NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
LABEL = b"sha256:"
COMMENT_BYTES = len(LABEL) + 64
PICKLE_BYTES = 2**25  # of a checkpoint's part without tensors; a tokenizer of 2**20 ids takes half of it
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64

Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Name = Annotated[str, msgspec.Meta(max_length=100)]


class ModelArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """nanoGPT's seven arguments."""

    n_layer: Size
    n_head: Size
    n_embd: Size
    block_size: Size
    vocab_size: Size
    bias: bool = True
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, must be divisible by n_head, {self.n_head}")


class ModelExtra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model has beside those."""

    gelu: Literal["none", "tanh"] = "none"


@dataclass(frozen=True)
class RunConfig:
    """What is read of the config that a checkpoint was trained with."""

    dataset: str = ""
    optimizer: str = ""
    batch_size: Count = 1


@dataclass(frozen=True)
class Header:
    """What a checkpoint holds beside tensors and the state of its run; nanoGPT's has the first two."""

    model_args: ModelArgs
    config: RunConfig = RunConfig()
    model_extra: ModelExtra | None = None
    tokenizer: SavedBPE | SavedChar | None = None
    iter_num: Count = 0
    best_val_loss: float | None = None
    text_sha256: str = ""
    licences: tuple[str, ...] = ()


def read_header(content: dict[str, Any], path: Path) -> Header:
    """What the checkpoint at `path` says of itself, typed and in range; raises CheckpointError."""
    loss = content.get("best_val_loss")
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:  # as nanoGPT has it
        content = content | {"best_val_loss": float(loss)}
    return untrusted.convert(content, Header, path, CheckpointError, "it is not a checkpoint, or is damaged")


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
    """The SHA-256, in hexadecimal, of the file at `path`, or of a folder's weights; raises CheckpointError."""
    sha = hashlib.sha256()
    for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        untrusted.check_regular(part, CheckpointError)
        try:
            with open(part, "rb") as f:
                hashlib.file_digest(f, lambda: sha)
        except OSError as e:
            raise CheckpointError(f"{part}: {e.strerror}") from None
    return sha.hexdigest()


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
FILE_ENDINGS = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".safetensors", ".zip", ".json", ".yaml", ".md", ".txt"}


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: ours, nanoGPT's, or a folder of Hugging Face's, or the Hub's of that name.

    Nothing in the file is executed (weights_only). A file without a hash is taken only if it isn't ours. Raises
    CheckpointError when it is missing, cut short, altered or not one.
    """
    if not os.path.exists(path):
        if not HUB_NAME.fullmatch(str(path)) or path.suffix.lower() in FILE_ENDINGS:
            name = configurator.shorten(str(path))
            raise CheckpointError(f"{name}: not found; train first, or name another checkpoint")
        path = fetch(str(path))
    if os.path.isfile(path / "config.json"):
        return load_huggingface(path)
    if os.path.isdir(path):
        raise CheckpointError(f"{path}: is a folder; name the file, as {path}/best.pt")
    size = untrusted.check_regular(path, CheckpointError)
    try:
        with open(path, "rb") as f:
            body = max(size - COMMENT_BYTES, 0)
            f.seek(body)
            comment = f.read(COMMENT_BYTES)
            if comment.startswith(LABEL) and comment != LABEL + _digest(f, body):
                raise CheckpointError(f"{path}: its SHA-256 is not the one it carries; the file is damaged")
            _check_zip(f, size)
            f.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickles that torch did not write
                content = torch.load(f, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror or e}") from None
    except Exception as e:  # a damaged file makes the unpickler raise whatever it stumbles over
        raise CheckpointError(f"{path}: is not a checkpoint, or is damaged ({type(e).__name__})") from None
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise CheckpointError(f"{path}: is not a checkpoint: it has no 'model' and 'model_args'")
    if "model_extra" in content and not comment.startswith(LABEL):
        raise CheckpointError(f"{path}: has lost its SHA-256; the file is damaged")
    header = read_header(content, path)
    if header.tokenizer and header.tokenizer.vocab_size > header.model_args.vocab_size:
        raise CheckpointError(f"{path}: its tokenizer has {header.tokenizer.vocab_size} ids, its model fewer")
    loss = {"best_val_loss": header.best_val_loss} if "best_val_loss" in content else {}
    return content | {"model_args": msgspec.structs.asdict(header.model_args)} | loss


def _check_zip(f: BinaryIO, size: int) -> None:
    """Raise ValueError unless `f` is a zip whose parts are as large as they look: none is compressed."""
    with zipfile.ZipFile(f) as archive:
        parts = archive.infolist()
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(part.file_size for part in parts) > size:
        raise ValueError("it would unpack to more than it is")
    if any(part.filename.endswith(".pkl") and part.file_size > PICKLE_BYTES for part in parts):
        raise ValueError("it holds too much beside tensors")


def model_entries(model: GPT) -> dict[str, Any]:
    """The entries of a checkpoint that hold a model: its weights, nanoGPT's seven arguments, and ours beside them."""
    config = dataclasses.asdict(model.config)
    return {
        "model": model.state_dict(),
        "model_args": {key: config[key] for key in NANOGPT_ARGS},
        "model_extra": {key: value for key, value in config.items() if key not in NANOGPT_ARGS},
    }


def build_model(content: dict[str, Any], path: Path, dropout: float = 0.0, vocab_size: int = 0) -> GPT:
    """The model that a checkpoint holds, on the CPU in float32.

    vocab_size: ids that it must have at least; those that the checkpoint lacks are initialised as for a new model.
    Raises CheckpointError when its parts don't fit or a weight is not finite.
    """
    header = read_header(content, path)
    extra = header.model_extra or ModelExtra()
    args = msgspec.structs.asdict(header.model_args) | msgspec.structs.asdict(extra) | {"dropout": dropout}
    config = GPTConfig(**args)
    weights = check_weights(content["model"], config, path)
    model = GPT(dataclasses.replace(config, vocab_size=max(config.vocab_size, vocab_size)))
    if vocab_size > config.vocab_size:
        new = model.lm_head.weight.detach()[config.vocab_size :].clone()
        for key in ("transformer.wte.weight", "lm_head.weight"):
            weights[key] = torch.cat([weights[key], new.to(weights[key].dtype)])
    model.load_state_dict(weights)
    return model


def check_weights(weights: Any, config: GPTConfig, path: Path) -> dict[str, torch.Tensor]:
    """`weights` under their plain names; raises CheckpointError unless they are those of such a model, and finite.

    Nothing of the size that `config` claims is built: one block, on a device without memory, stands for all.
    """
    try:
        weights = {name.removeprefix("_orig_mod."): weight for name, weight in weights.items()}
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in GPT(dataclasses.replace(config, n_layer=1)).state_dict().items()}
        of_block = [name for name in shapes if ".h.0." in name]
        n_tensors = len(shapes) + (config.n_layer - 1) * len(of_block)
        if len(weights) != n_tensors:
            raise ValueError(f"there are {len(weights)} tensors, must be {n_tensors}")
        for i in range(1, config.n_layer):
            shapes |= {name.replace(".h.0.", f".h.{i}."): shapes[name] for name in of_block}
        held, used = {}, 0
        for name, shape in shapes.items():
            w = weights.get(name)
            if not isinstance(w, torch.Tensor) or w.layout is not torch.strided or w.dtype not in DTYPES or w.is_meta:
                raise ValueError(f"{name} is missing, or not a tensor of numbers")
            if w.shape != shape:
                raise ValueError(f"{name} is {tuple(w.shape)}, must be {tuple(shape)}")
            held[w.untyped_storage().data_ptr()] = w.untyped_storage().nbytes()
            used += w.nbytes if name != "lm_head.weight" else 0  # the embedding once more
        if used > sum(held.values()):
            raise ValueError("its tensors claim more numbers than the file holds")
    except (TypeError, RuntimeError, AttributeError, ValueError) as e:  # what a tensor of an odd kind raises, too
        raise CheckpointError(f"{path}: its weights don't fit its model_args ({untrusted.describe(e)})") from None
    if spoilt := [name for name, w in weights.items() if not w.isfinite().all()]:
        raise CheckpointError(f"{path}: {spoilt[0]} is not finite; the run diverged, or the file is damaged")
    return weights


def load_model(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[GPT, tokenizer.Tokenizer, dict[str, Any]]:
    """All it takes to write: the model in eval mode on `device` in `dtype`, its tokenizer, and the rest of the file."""
    content = load(path)
    tok = tokenizer_of(content, path)
    model = build_model(content, path).to(device, dtype).eval()
    return model, tok, content


GPT2_SIZES = (50_257, 50_304)  # GPT-2's vocabulary, and what nanoGPT pads it to


def tokenizer_of(content: dict[str, Any], path: Path) -> tokenizer.Tokenizer:
    """The tokenizer of a checkpoint: its own, nanoGPT's characters, or GPT-2's if the size is; else CheckpointError."""
    header = read_header(content, path)
    try:
        if header.tokenizer:
            return tokenizer.from_json(header.tokenizer)
        if header.model_extra is None and (found := nanogpt_characters(header.config.dataset, path)):
            return found
        if header.model_args.vocab_size in GPT2_SIZES:
            return tokenizer.BPETokenizer.gpt2([END])
    except DataError as e:
        raise CheckpointError(f"{path}: {e}") from None
    raise CheckpointError(
        f"{path}: has no tokenizer; put nanoGPT's meta.pkl, or a folder's tokenizer.json, beside the weights"
    )


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT


META_BYTES = 2**20  # 59,000 characters
PLAIN = {  # pickle's opcodes for numbers, texts, tuples, lists and dicts
    *"PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE".split(),
    *"BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE SHORT_BINBYTES BINBYTES".split(),
    *"EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS".split(),
}


@dataclass(frozen=True)
class NanoGPTMeta:
    """What is read of nanoGPT's meta.pkl: the character of each id."""

    itos: dict[Count, Annotated[str, msgspec.Meta(min_length=1, max_length=1)]]


class _Plain(pickle.Unpickler):
    """No class or function can be named, so nothing can run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _unpickle(raw: bytes) -> Any:
    """What a pickle of plain values holds; raises ValueError when it has others, or puts one at a place far away."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name not in PLAIN or (opcode.name == "LONG_BINPUT" and argument > len(raw)):
            raise ValueError(f"it holds more than plain values ({opcode.name})")
    return _Plain(io.BytesIO(raw)).load()


def nanogpt_characters(dataset: str, path: Path) -> tokenizer.Tokenizer | None:
    """The characters in the meta.pkl of nanoGPT's checkpoint at `path`; None if there is none.

    It is looked for beside the checkpoint and where nanoGPT keeps it, in data/`dataset` of the same checkout. Raises
    CheckpointError when it is damaged.
    """
    for place in (path.parent / "meta.pkl", path.absolute().parent.parent / "data" / dataset / "meta.pkl"):
        if os.path.isfile(place):
            raw, what = untrusted.read_bytes(place, CheckpointError, META_BYTES), "is not a meta.pkl of nanoGPT's"
            try:
                value = _unpickle(raw)
            except Exception as e:  # a damaged pickle makes the unpickler raise whatever it stumbles over
                raise CheckpointError(f"{place}: {what} ({untrusted.describe(e)})") from None
            itos = untrusted.convert(value, NanoGPTMeta, place, CheckpointError, f"it {what}").itos
            if sorted(itos) != list(range(len(itos))):
                raise CheckpointError(f"{place}: {what} (its ids are not 0 to {len(itos) - 1})")
            saved = {"kind": "char", "chars": "".join(itos[id] for id in range(len(itos))), "specials": []}
            return tokenizer.from_json(untrusted.convert(saved, SavedChar, place, CheckpointError, f"it {what}"))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # its Conv1D
GELUS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
HEADER_BYTES = 10 * 2**20  # of a safetensors file: 100,000 tensors


@dataclass(frozen=True)
class Architecture:
    """What a GPT-2 may have otherwise, and this model has not: the defaults alone are taken."""

    model_type: Name = "gpt2"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class HuggingFaceConfig:
    """The shape in a GPT-2's config.json."""

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
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, Annotated[str, msgspec.Meta(max_length=255)]]


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
    path, advice = folder / "config.json", "it is not what Hugging Face's GPT-2 has"
    raw = untrusted.read_bytes(path, CheckpointError)
    found = untrusted.decode_json(raw, Architecture, path, CheckpointError, advice)
    pairs = zip(dataclasses.asdict(found).items(), dataclasses.astuple(Architecture()), strict=True)
    problems = [f"{key}: found {value!r}, must be {fixed!r}" for (key, value), fixed in pairs if value != fixed]
    if found.model_type == "gpt2":  # the shape of another has other names
        c = untrusted.decode_json(raw, HuggingFaceConfig, path, CheckpointError, advice)
        if c.n_inner not in (None, 4 * c.n_embd):
            problems.append(f"n_inner: found {c.n_inner}, must be {4 * c.n_embd}")
        if (gelu := c.activation_function) not in GELUS:
            problems.append(f"activation_function: found {gelu!r}, must be one of {', '.join(GELUS)}")
    if problems:
        raise CheckpointError(f"{path}: is another architecture: " + "; ".join(problems))
    args = {"block_size": c.n_positions, "bias": True, "dropout": c.resid_pdrop}
    args |= {key: getattr(c, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    untrusted.convert(args, ModelArgs, path, CheckpointError, advice)
    names = {"model.safetensors"}
    if (index := folder / "model.safetensors.index.json").exists():
        shards = untrusted.read_json(index, ShardIndex, CheckpointError, advice)
        names = {Path(name).name for name in shards.weight_map.values()}
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        weights |= _load_safetensors(folder / name)
    content = {"model": _from_huggingface(weights), "model_args": args, "model_extra": {"gelu": GELUS[gelu]}}
    if (path := folder / "tokenizer.json").exists():
        try:
            tok = tokenizer.from_huggingface(untrusted.read_bytes(path, DataError))
        except DataError as e:
            raise CheckpointError(f"{folder}: {e}") from None
        content["tokenizer"] = tok.to_json()
    return content


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
        raise CheckpointError(f"{path}: is not what Hugging Face's GPT-2 has ({untrusted.describe(e)})") from None


def _from_huggingface(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GPT-2's weights under nanoGPT's names, in nanoGPT's shapes."""
    ours = {}
    for name, weight in weights.items():
        name = "transformer." + name.removeprefix("transformer.")
        if not name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):  # masks; the embedding once more
            ours[name] = weight.t() if name.endswith(TRANSPOSED) and weight.dim() == 2 else weight
    if "transformer.wte.weight" in ours:
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    return ours


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
    config = dataclasses.asdict(Architecture()) | {
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
        lines += ["", f"Validation loss: {loss:.4f} nats per token, after {content.get('iter_num', 0):,} steps."]
    if licences := content.get("licences"):
        lines += ["", "Trained on texts under these licences:", "", *(f"- {licence}" for licence in licences)]
    if styles:
        names = ", ".join(f"`{tokenizer.style_token(style)}`" for style in styles)
        lines += ["", f"A passage is written in the style of the tag that its prompt begins with: {names}."]
    return "\n".join([*lines, "", "A sample:", "", *(f"    {line}" for line in passage.splitlines()), ""])
