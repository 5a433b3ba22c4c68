"""Errors that are no bug: each message names the file or key, what was found and what to do."""


class DataError(ValueError):
    """A corpus, tokenizer or bin can't be used."""


class CheckpointError(ValueError):
    """A checkpoint can't be read, or does not fit."""


class RankError(RuntimeError):
    """Another of torchrun's ranks is gone, or does not answer."""


class DivergedError(ArithmeticError):
    """A loss or gradient is not finite; the message names the step, the ranks and their rows."""


MISTAKES = DataError, CheckpointError, RankError, DivergedError  # a script prints one of these as a line
