"""A passage: its settings, its text as it grows, and where it ends."""

import dataclasses
import re
from array import array
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import msgspec

from robopoet import files
from robopoet.errors import ConfigError, bounds, did_you_mean
from robopoet.text.tokenizer import END, StreamDecoder, Tokenizer

Until = Literal["auto", "tokens", "line", "sentence", "paragraph", "speech", "scene"]
MAX_STOPS, MAX_STOP_CHARS = 20, 200  # every new character is checked against every stop
MAX_HELD = 4_000  # characters held back at most, so that a text without ends is not searched again and again
LOOK_BEHIND = 10_000  # earlier characters that are searched too: a speech is recognised by its speaker's line
SPEAKER = r"(?:[A-Z][A-Z .,'’&-]+|[A-Z][\w .,'’-]*:)"  # on a line of its own: FIRST WITCH, or First Citizen:
SPEECH = re.compile(rf"^{SPEAKER}\n(?=.*\S)", re.M)
ENDS = {  # the last visible characters of a unit, recognised by what follows them
    "word": re.compile(r"\S(?=\s)"),
    "line": re.compile(r"\S(?=[ \t]*\n)"),
    "sentence": re.compile(r"[.!?][\"')\]’”]*(?=\s)"),
    "paragraph": re.compile(r"\S(?=[ \t]*\n[ \t]*\n)"),
    "speech": re.compile(r"\S(?=[ \t]*\n[ \t]*\n)"),  # a paragraph that begins with a speaker
    "scene": re.compile(r"\S(?=\s*\n(?:ACT|SCENE) )"),
}


@dataclass(frozen=True)
class Settings:
    """How a passage is generated."""

    # the passage
    style: str = ""  # a style of the model, or a blend: shakespeare:0.7,alice:0.3 (default: what the prompt suggests)
    max_new_tokens: int = 300  # generate at most this many tokens; may exceed block_size
    until: Until = "auto"  # end after the first whole unit (auto: where a reader would; tokens: at max_new_tokens)
    stop: tuple[str, ...] = ()  # end before this text, e.g. --stop="\n\n"; repeatable
    seed: int = 1337  # the same seed gives the same passage
    # sampling, in this order
    repetition_penalty: float = 1.0  # above 1: tokens already in the text become less likely
    no_repeat_ngram: int = 0  # no sequence of n tokens occurs twice (0: off)
    max_copy: int = 0  # never copy this many words in a row from the training text, in any case or punctuation (0: off)
    temperature: float = 0.9  # below 1: likely tokens become likelier; 0: always the likeliest
    top_k: int = 0  # sample from the k likeliest tokens (0: all)
    top_p: float = 0.95  # sample from the likeliest tokens whose probabilities add up to this (1: all)
    min_p: float = 0.0  # drop tokens less probable than this share of the likeliest token's probability (0: drop none)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each; beyond these bounds float32 can't hold the probabilities."""
        found = bounds(self, "max_new_tokens", 1, 2**53) + bounds(self, "seed", 0, 2**63 - 1)
        found += bounds(self, "no_repeat_ngram", 0, 100) + bounds(self, "top_k", 0, 2**53)
        found += bounds(self, "repetition_penalty", 1e-6, 1e6)
        if self.max_copy:
            found += [f"{line}, or 0" for line in bounds(self, "max_copy", 3, 100)]
        if self.temperature:
            found += [f"{line}, or 0" for line in bounds(self, "temperature", 1e-6, 1e6)]
        found += bounds(self, "top_p", 1e-9, 1) + bounds(self, "min_p", 0, 1)
        if len(self.stop) > MAX_STOPS or max(map(len, self.stop), default=0) > MAX_STOP_CHARS:
            found.append(f"stop: must be at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS:,} characters each")
        return found + [f"stop: found {text!r}, must not be empty" for text in self.stop if not text]


LATER = {"max_copy": 0}  # settings that older files lack, with what they mean there
SavedSettings = msgspec.defstruct(  # as read from a file: every other key must be present, and no more
    "SavedSettings",
    [(name, hint, LATER[name]) if name in LATER else (name, hint) for name, hint in get_type_hints(Settings).items()],
    kw_only=True,
    frozen=True,
    forbid_unknown_fields=True,
)


def make_settings(given: dict[str, Any]) -> Settings:
    """The defaults, overridden by `given`; raises ConfigError for an unknown name or a wrong type or value."""
    values = dataclasses.asdict(Settings()) | given
    for name in given.keys() - get_type_hints(Settings).keys():
        raise ConfigError(f"{name}: no such setting{did_you_mean(name, get_type_hints(Settings))}")
    saved = files.convert(values, SavedSettings, "settings", ConfigError, "see sample.py --help")
    settings = Settings(**msgspec.structs.asdict(saved))
    if problems := settings.problems():
        raise ConfigError("; ".join(problems))
    return settings


def ends(text: str, unit: str, start: int) -> list[int]:
    """The positions in `text`, from `start` on, where a complete unit ends: just after its last visible character."""
    found = [match.end() for match in ENDS[unit].finditer(text, max(start - 50, 0))]  # 50: a full stop and its quotes
    if unit == "speech":
        found = [end for end in found if SPEECH.match(text[:end].rsplit("\n\n", 1)[-1])]
    return [end for end in found if end >= start]


class Passage:
    """A passage that grows token by token. The text that it releases is whole characters, never taken back.

    It ends before the first stop or, with until=UNIT, after the first complete unit, whichever comes first; with
    until=UNIT its text is released a line at a time. With until=tokens it ends when the tokens run out. With
    until=auto, or if no unit is completed in time, it ends where a reader would end it: from half of max_new_tokens
    on, text after the last complete speech (sentence, if no one speaks) is held back, and dropped unless another one
    is completed.

    prompt: the text that it continues. number: of its random stream. rest: the prompt's last bytes, if its tokens write
    those first; they are no text of it. ids: its tokens, array("i"). logprobs: of its tokens, nats, array("d"); empty
    unless push() is given them. n_healing: how many of its first tokens write nothing but `rest`.
    """

    def __init__(self, tok: Tokenizer, settings: Settings, prompt: str = "", number: int = 0, rest: bytes = b""):
        self.prompt, self.settings, self.number, self.rest, self.done = prompt, settings, number, rest, False
        self.is_stuck = False  # whether it ended because every token would have completed a copy
        self.ids, self.logprobs, self.n_healing = array("i"), array("d"), 0
        self._tok, self._decoder, self._end_id = tok, StreamDecoder(tok, len(rest)), tok.specials.get(END)
        self._released: list[str] = []
        self._kept = (0, 0, "")  # what cut() keeps: how many tokens, and of their text, how much is released, what held
        self._before, self._held = prompt[-LOOK_BEHIND:], ""
        self._blank, self._drama = True, bool(SPEECH.search(prompt))

    @property
    def text(self) -> str:
        """The text released so far, without the prompt."""
        self._released = ["".join(self._released)]
        return self._released[0]

    @property
    def n_new(self) -> int:
        """How many of its tokens continue the prompt: max_new_tokens at most."""
        return len(self.ids) - self.n_healing

    def push(self, id: int, logprob: float | None = None) -> str:
        """Append a token, unless the passage is done; returns the text that is released."""
        if self.done:
            return ""
        self.ids.append(id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if id == self._end_id:
            return self._finish(len(self._held))
        if self._decoder.skip:
            self.n_healing += len(self._tok.decode_bytes([id])) <= self._decoder.skip
        piece, until, stops = self._decoder.push([id]), self.settings.until, self.settings.stop
        # character by character, so that the end does not depend on how the text is split into tokens
        for part in piece if stops or until not in ("auto", "tokens") else [piece]:
            self._held += part
            found = [len(self._held) - len(stop) for stop in stops if self._held.endswith(stop)]
            if part.isspace() and until not in ("auto", "tokens"):
                found += self._ends(until)
            if found:
                return self._finish(min(found))
        self._drama = self._drama or ("\n" in piece and self._has_speech())
        released = self._release(self._releasable())
        if released:
            self._kept = len(self.ids), self._kept[1] + len(released), self._held  # whole at any interrupt
        return released

    def finish(self) -> str:
        """End the passage, for no more tokens come; returns the text that is released last.

        The bytes of a character that is unfinished by then are no text.
        """
        if self.done:
            return ""
        self._drama = self._drama or self._has_speech()
        for unit in (self._auto_unit(), "sentence", "line", "word") if self.settings.until != "tokens" else ():
            if found := self._ends(unit):
                return self._finish(found[-1])
        return self._finish(len(self._held))

    def cut(self) -> None:
        """End the passage, which was interrupted, at the last token that released text, as if the tokens had run out.

        Its settings become those with which it is generated again. One that has released nothing stays as it is.
        """
        n_ids, n_released, held = self._kept
        if self.done:
            return
        self._released = [self.text[:n_released] + held]
        if n_ids:
            self.ids, self.logprobs = self.ids[:n_ids], self.logprobs[:n_ids]
            ended = {"until": "tokens", "max_new_tokens": n_ids - self.n_healing}
            self.settings = make_settings(dataclasses.asdict(self.settings) | ended)
            self.done = True

    def get_stuck(self) -> str:
        """End the passage, for every token would complete a copy; returns the text that is released last."""
        self.is_stuck = not self.done
        return self.finish()

    def _has_speech(self) -> bool:
        return bool(SPEECH.search(self._before + self._held))

    def _auto_unit(self) -> str:
        """The unit that until=auto ends with."""
        return "speech" if self._drama else "sentence"

    def _ends(self, unit: str) -> list[int]:
        """The positions in the held text where a unit ends that holds some of this passage's own visible text."""
        start = len(self._before)
        found = [end - start for end in ends(self._before + self._held, unit, start)]
        return [end for end in found if not self._blank or self._held[:end].strip()]

    def _releasable(self) -> int:
        """How many of the held characters will stay, whatever comes next."""
        until, halfway = self.settings.until, self.n_new > self.settings.max_new_tokens // 2
        if until != "tokens" and halfway:
            n = max(self._ends(self._auto_unit()), default=0)
        elif until in ("auto", "tokens"):
            n = len(self._held)
        else:
            n = len(self._held[: max(self._held.rfind("\n"), 0)].rstrip())
        begun = (k for stop in self.settings.stop for k in range(1, len(stop)) if self._held.endswith(stop[:k]))
        return min(max(n, len(self._held) - MAX_HELD), len(self._held) - max(begun, default=0))

    def _release(self, n: int) -> str:
        released, self._held = self._held[:n], self._held[n:]
        self._released.append(released)
        self._before = (self._before + released)[-LOOK_BEHIND:]
        self._blank = self._blank and not released.strip()
        return released

    def _finish(self, n: int) -> str:
        released = self._release(n)
        self.done = True  # last: an interrupt may come at any time, and what is done is complete
        return released
