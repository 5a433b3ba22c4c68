"""Excerpts of a training text, which a model that was tuned on it reads before it writes."""

import re

import numpy as np

from robopoet.text.tokenizer import Tokenizer
from robopoet.text.windows import Split

# the end of a paragraph, of a sentence that ends a line, of a line
EXCERPT_ENDS = [re.compile(end) for end in (r"\n\s*\n", r"[.!?][\"')\]’”]*\s*\n", r"\n")]


def last_excerpts(split: Split, tok: Tokenizer, tokens: int) -> dict[str, list[int]]:
    """The end of each style's longest text, `tokens` ids at most, up to where a paragraph or a sentence ends.

    Style -> ids; "" stands for all if the corpus has no tags.
    """
    styles = split.styles if (split.tags >= 0).any() else [""] * len(split.styles)
    spans = list(zip(styles, split.starts.tolist(), split.stops.tolist(), strict=True))
    found = {}
    for style in dict.fromkeys(style for style, *_ in spans):
        start, stop = max((span[1:] for span in spans if span[0] == style), key=lambda span: span[1] - span[0])
        ids = split.read(max(start, stop - 8 * tokens), stop)
        pieces = np.split(ids, np.flatnonzero(np.isin(ids, [*tok.specials.values()])) + 1)  # a span may hold many texts
        text = tok.decode_bytes(max(pieces, key=len).tolist()).decode(errors="ignore")
        ends = [max((match.end() for match in end.finditer(text)), default=0) for end in EXCERPT_ENDS]
        found[style] = tok.encode(text[: next((end for end in ends if 2 * end > len(text)), None)])[-tokens:]
    return found
