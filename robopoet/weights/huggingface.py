"""Models in Hugging Face's format: download one from the Hub, read a folder, export one.

A folder holds config.json, model.safetensors (or several, with an index) and tokenizer.json.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import safetensors
import safetensors.torch
import torch

from model import GPT, GPTConfig
from robopoet import files
from robopoet.errors import CheckpointError, DataError, describe
from robopoet.files import did_you_mean_path
from robopoet.text import tokenizer, tokenizer_json
from robopoet.text.chat import ending_ids, template
from robopoet.text.tokenizer import END
from robopoet.text.tokenizer_json import Foreign
from robopoet.weights.architectures import ARCHITECTURES, Architecture, Name, architecture_of
from robopoet.weights.header import SAMPLING, ExportDtype, config_entries, credit, printable
from robopoet.weights.layout import Weights

FILES = ["*.safetensors", "*.json"]  # what we read
HEADER_BYTES = 10 * 2**20  # a safetensors or GGUF file's header may be so long: room for 100,000 tensors
NO_MATCH = "it does not match Hugging Face's " + " or ".join(kind.title for kind in ARCHITECTURES.values())


@dataclass(frozen=True)
class Kind:
    """The key of a config.json that says what its other keys are, and one that ours has beside them."""

    model_type: Name = "gpt2"
    licences: tuple[str, ...] = ()


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
    missing = f"{name}: no such file or folder{did_you_mean_path(name)}"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{missing}; if it is a model on the Hugging Face Hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as e:  # many classes, and they change with the network library
        raise CheckpointError(
            f"{missing}; the Hugging Face Hub could not be asked for it ({type(e).__name__})"
        ) from None


def is_cached(name: str) -> bool:
    """Whether a model of the Hub was downloaded."""
    try:
        from huggingface_hub import snapshot_download

        return bool(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except Exception:  # not installed, or one of many classes
        return False


def load_folder(folder: Path) -> dict[str, Any]:
    """Read a folder; returns what our checkpoints hold: model, model_args, model_extra, licences, tokenizer if any.

    Raises CheckpointError when a file is missing, damaged, or of another architecture.
    """
    kind, config, licences = _read_config(folder / "config.json")
    names = {"model.safetensors"}
    if (index := folder / "model.safetensors.index.json").exists():
        shards = files.read_json(index, ShardIndex, CheckpointError, NO_MATCH)
        names = {Path(name).name for name in shards.weight_map.values()}
    weights: Weights = {}
    for name in sorted(names):
        weights |= _load_safetensors(folder / name)
    try:
        ours = kind.layout.ours(weights, config)
    except (ValueError, RuntimeError) as e:
        raise CheckpointError(f"{folder}: {describe(e)}") from None
    licences = [*map(printable, licences)] or [credit(folder.absolute().name, "see its model card")]
    content = {"model": ours, **config_entries(config), "licences": licences}
    if (path := folder / "tokenizer.json").exists():
        try:
            give_tokenizer(content, tokenizer_json.from_huggingface(files.read_bytes(path, DataError)))
        except DataError as e:
            raise CheckpointError(f"{folder}: {e}") from None
    if "transformer.wte.weight" in ours:
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    return content


def _read_config(path: Path) -> tuple[Architecture, GPTConfig, tuple[str, ...]]:
    """The architecture that config.json names, the shape that it gives, and the licences, if it is ours."""
    raw = files.read_bytes(path, CheckpointError)
    head = files.decode_json(raw, Kind, path, CheckpointError, NO_MATCH)
    found = head.model_type
    try:
        if found not in ARCHITECTURES:  # another model's config has other keys
            raise ValueError(f"model_type: found {found!r}, must be {' or '.join(ARCHITECTURES)}")
        kind = ARCHITECTURES[found]
        config = kind.read(files.decode_json(raw, kind.keys(), path, CheckpointError, NO_MATCH))
        return kind, config, head.licences
    except CheckpointError:
        raise
    except ValueError as e:
        raise CheckpointError(f"{path}: is another architecture: " + "; ".join(str(e).splitlines())) from None


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: not found; a model needs config.json and model.safetensors")
    files.check_regular(path, CheckpointError)
    try:
        with open(path, "rb") as f:
            if (size := int.from_bytes(f.read(8), "little")) > HEADER_BYTES:
                raise CheckpointError(f"{path}: its header has {size:,} bytes, must have at most {HEADER_BYTES:,}")
        return safetensors.torch.load_file(path)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, OSError, RuntimeError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{path}: {NO_MATCH[3:]} ({describe(e)})") from None


def give_tokenizer(content: dict[str, Any], foreign: Foreign) -> None:
    """Give a checkpoint a tokenizer from elsewhere, and put its embeddings' rows in the order of our ids.

    A new id gets the mean row; rows that no id has stay behind the others. Raises DataError if an id has no row.
    """
    content["tokenizer"] = foreign.tokenizer.to_json()
    wte = content["model"].get("transformer.wte.weight")
    if foreign.ids == list(range(len(foreign.ids))) or wte is None or len(wte) != content["model_args"]["vocab_size"]:
        return
    if (most := max(foreign.ids)) >= len(wte):
        raise DataError(f"its tokenizer has {most + 1:,} ids, its embeddings have {len(wte):,} rows")
    rows = torch.tensor([*foreign.ids, *range(most + 1, len(wte))])
    mean = wte.float().mean(0).to(wte.dtype)
    content["model"]["transformer.wte.weight"] = torch.where((rows < 0)[:, None], mean, wte[rows.clamp(min=0)])
    content["model_args"]["vocab_size"] = len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# export


def check(config: GPTConfig, tok: tokenizer.Tokenizer) -> None:
    """Raise CheckpointError if transformers has no such model; any tokenizer will do."""
    architecture_of(config)


def export(
    model: GPT,
    tok: tokenizer.Tokenizer,
    content: dict[str, Any],
    passage: str,
    path: Path,
    dtype: ExportDtype = "float32",
    picture: str = "",
) -> str:
    """Write a new folder that transformers loads; returns a line that says by which of its classes.

    content: the checkpoint. passage: a sample for the model card. dtype: unused, a folder's weights are float32.
    picture: of the loss, for the card, as an SVG file's text. Raises OSError or CheckpointError if the folder exists or
    can't be written.
    """
    end = tok.specials.get(END)
    ends = {"bos_token_id": end, "eos_token_id": end}
    ending = ending_ids(tok)
    generated = {"eos_token_id": ending} if len(ending) > 1 else {}
    if never := [id for id in tok.specials.values() if id not in ending]:  # as in Poet
        generated["suppress_tokens"] = never
    kind = architecture_of(model.config)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END) if end is not None else {}
    contents = {
        "config": {
            **kind.write(model.config, content["model_args"].get("dropout", 0.0)),
            **ends,
            "dtype": "float32",
            "licences": list(content.get("licences", ())),  # for load_folder
        },
        "generation_config": {"do_sample": True, **SAMPLING, **ends, "pad_token_id": end} | generated,
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.block_size,
            **special,
            "padding_side": "left",  # a batch's rows are continued at their right
            "clean_up_tokenization_spaces": False,
            "chat_template": template(tok),
        },
        "tokenizer": tokenizer_json.to_huggingface(tok),
    }
    with files.creating(path) as part:
        part.mkdir()
        weights = {name: w.contiguous() for name, w in kind.layout.theirs(model).items()}
        try:
            safetensors.torch.save_file(weights, part / "model.safetensors", {"format": "pt"})
        except safetensors.SafetensorError as e:  # it wraps the system's
            raise CheckpointError(f"{path}: {describe(e)}") from None
        (part / "model.safetensors").chmod(0o644)
        for name, value in contents.items():
            (part / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
        card = model_card(model, tok, content, passage)
        if picture:
            (part / "loss.svg").write_text(picture, encoding="utf-8")
            card += "\nHow its loss fell:\n\n![The loss of training and validation, step by step](loss.svg)\n"
        (part / "README.md").write_text(card, encoding="utf-8")
    return "AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained load it"


def model_card(model: GPT, tok: tokenizer.Tokenizer, content: dict[str, Any], passage: str) -> str:
    """The exported folder's README, as Markdown."""
    head = ["---", "pipeline_tag: text-generation", "library_name: transformers", "---", ""]
    return "\n".join([*head, "# A GPT trained with RoboPoet", "", describe_model(model, tok, content, passage)])


def describe_model(model: GPT, tok: tokenizer.Tokenizer, content: dict[str, Any], passage: str) -> str:
    """What a model is, as Markdown: shape, loss, licences, styles and a sample."""
    c, styles = model.config, tokenizer.styles(tok)
    lines = [f"{model.num_params():,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, "]
    lines[-1] += f"{c.block_size} tokens of context, vocabulary {c.vocab_size:,}."
    if (loss := content.get("best_val_loss")) is not None:
        lines += ["", f"Validation loss: {loss:.4f} nats per token, after {content.get('iter_num', 0):,} steps."]
    if licences := content.get("licences"):
        lines += [
            "",
            "Trained on these texts, or from these weights, with their licences:",
            "",
            *(f"- {licence}" for licence in licences),
        ]
    if styles:
        names = ", ".join(f"`{tokenizer.style_token(style)}`" for style in styles)
        lines += ["", f"A passage is written in the style of the tag that its prompt begins with: {names}."]
    return "\n".join([*lines, "", "A sample:", "", *(f"    {line}" for line in passage.splitlines()), ""])
