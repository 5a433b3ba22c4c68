"""What can go wrong by no fault of the code; each message names the file or key, what was found and what to do."""


class DataError(ValueError):
    """A corpus, tokenizer or bin that can't be used."""


class CheckpointError(ValueError):
    """A checkpoint that can't be read or doesn't fit."""


class RankError(RuntimeError):
    """Another of torchrun's ranks is gone or hangs."""


class DivergedError(ArithmeticError):
    """A loss or gradient that is not finite; the message names the step, the ranks and their rows."""
