"""The models that a book may start from, if they are at hand: SmolLM2, and the one that data/base trains."""

import bz2
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robopoet.errors import warn
from robopoet.text.tokenizer import Tokenizer
from robopoet.weights import checkpoint, pretrained
from robopoet.weights.header import read_header

BASE = Path("out/base/best.pt")  # trained on data/base, which reads only what is close to Shakespeare and the Bible
READ_TOKENS = 256  # tokens that a model reads at a time


def suiting(name: str, sample: str, text: str) -> Tokenizer | None:
    """A pretrained model's tokenizer, if it predicts `sample`, of `text`, better than bzip2 packs all of it, or None.

    A model that is trained from nothing on one book ends somewhat below bzip2's size; a pretrained one starts at
    what is measured here, and gains by training. Prints both figures.
    """
    model, tok, _ = checkpoint.load_model(Path(name), torch.device("cpu"), torch.float32)
    bits = _bits_per_byte(model, tok, sample)
    raw = text.encode()
    packed = 8 * len(bz2.compress(raw)) / max(len(raw), 1)
    chosen = f"its tokenizer is taken, and train.py --minutes=N starts from {name}" if bits < packed else "left out"
    print(f"{name} needs {bits:.2f} bits a byte of this text, bzip2 {packed:.2f}: {chosen}")
    return tok if bits < packed else None


@torch.inference_mode()
def _bits_per_byte(model: torch.nn.Module, tok: Tokenizer, text: str) -> float:
    """What `model` needs for a byte of `text` after the first token."""
    ids = torch.tensor(tok.encode(text))
    if len(ids) < 2:  # nothing to predict
        return math.inf
    windows = zip(ids[:-1].split(READ_TOKENS), ids[1:].split(READ_TOKENS), strict=True)
    nats = sum(model(x[None], y[None])[1].item() * len(x) for x, y in windows)
    return nats / math.log(2) / max(len(tok.decode_bytes(ids[1:].tolist())), 1)


def at_hand() -> str:
    """The name of the pretrained model that was fetched, or ""."""
    return next(filter(pretrained.is_here, pretrained.PRETRAINED), "")


def load_base() -> dict[str, Any] | None:
    """BASE's checkpoint, or None if there is none, or if it has learned no more than how frequent tokens are.

    A model that knows only frequencies has the loss of Zipf's law: 6.47 nats/token for 8,000 ids, measured 6.45.
    """
    if not BASE.exists():
        return None
    content = checkpoint.load(BASE)
    header = read_header(content, BASE)
    share = 1 / np.arange(1, header.model_args.vocab_size + 1)
    share /= share.sum()
    zipf = -float(share @ np.log(share))
    if header.best_val_loss is not None and not header.best_val_loss < zipf:
        loss, folder = header.best_val_loss, BASE.parent
        known = f"a val loss of {loss:.2f} is no better than {zipf:.2f}, which knowing the tokens' frequencies brings"
        warn(f"{BASE} is left out: {known}; remove {folder}, then train it anew")
        return None
    return content
