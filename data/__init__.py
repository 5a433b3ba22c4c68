"""Text in, windows of token ids out."""


class DataError(ValueError):
    """A corpus, tokenizer or bin that can't be used; the message names the file, what was found and what to do."""
