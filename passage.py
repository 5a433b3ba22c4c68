"""A passage: how it is to be written, its text as it grows, and where it ends."""

import copy
import dataclasses
import difflib
import functools
import math
import re
from array import array
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import msgspec

import configurator
import untrusted
from configurator import ConfigError
from data.tokenizer import END, StreamDecoder, Tokenizer

MAX_STOPS, MAX_STOP_CHARS = 100, 1_000  # each character written is compared with each stop


@dataclass(frozen=True)
class Settings:
    """How a passage is written."""

    # the passage
    style: str = ""  # one of the checkpoint's, or a blend as shakespeare:0.7,alice:0.3 (none: as the prompt suggests)
    max_new_tokens: int = 300  # tokens to write at most; more than block_size is fine
    until: Literal["auto", "tokens", "line", "sentence", "paragraph", "speech", "scene"] = "auto"  # see README, Writing
    stop: tuple[str, ...] = ()  # end before this text, as --stop="\n\n"; repeatable
    seed: int = 1337  # same seed, same passage
    # the choice of a token; applied in this order, but for seed and temperature each is off unless given
    repetition_penalty: float = 1.0  # above 1: tokens already in the text are less likely
    no_repeat_ngram: int = 0  # no n tokens in a row come twice (0: they may)
    temperature: float = 0.9  # below 1: bolder towards the likely; 0: always the likeliest
    top_k: int = 0  # choose among the k likeliest (0: all)
    top_p: float = 0.95  # choose among the likeliest that together have this probability (1: all)
    min_p: float = 0.0  # leave out what is less likely than this share of the likeliest (0: nothing)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each; beyond these bounds float32 has no number for a probability."""
        found = configurator.bounds(self, "max_new_tokens", 1, 2**53) + configurator.bounds(self, "seed", 0, 2**63 - 1)
        found += configurator.bounds(self, "no_repeat_ngram", 0, 100) + configurator.bounds(self, "top_k", 0, 2**53)
        found += configurator.bounds(self, "repetition_penalty", 1e-6, 1e6)
        if self.temperature:
            found += [f"{line}, or 0" for line in configurator.bounds(self, "temperature", 1e-6, 1e6)]
        found += configurator.bounds(self, "top_p", 1e-9, 1) + configurator.bounds(self, "min_p", 0, 1)
        if len(self.stop) > MAX_STOPS or max(map(len, self.stop), default=0) > MAX_STOP_CHARS:
            found.append(f"stop: must be at most {MAX_STOPS} texts of at most {MAX_STOP_CHARS:,} characters each")
        return found + [f"stop: found {text!r}, must not be empty" for text in self.stop if not text]


SavedSettings = msgspec.defstruct(  # those of a file: each must be there and no other
    "SavedSettings", get_type_hints(Settings).items(), frozen=True, forbid_unknown_fields=True
)


def make_settings(given: dict[str, Any]) -> Settings:
    """The defaults, but for what is given; raises ConfigError for an unknown name, a wrong type or range."""
    values = dataclasses.asdict(Settings()) | given
    for name in given.keys() - get_type_hints(Settings).keys():
        near = difflib.get_close_matches(name, get_type_hints(Settings), n=1)
        raise ConfigError(f"{name}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
    saved = untrusted.convert(values, SavedSettings, "settings", ConfigError, "see sample.py --help")
    settings = Settings(**msgspec.structs.asdict(saved))
    if problems := settings.problems():
        raise ConfigError("; ".join(problems))
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# where units and stops are, in a text that comes in pieces

RUNS = re.compile(r"\s+|\S+")
SPEAKER = r"(?:[A-Z][A-Z .,'’&-]+|[A-Z][\w .,'’-]*:)"  # a line of its own: FIRST WITCH, or First Citizen:
SPEECH = re.compile(rf"^{SPEAKER}\n(?=.*\S)", re.M)
IS_SPEAKER = re.compile(SPEAKER)
HEADINGS = ("ACT", "SCENE")
CLOSING = "\"')]’”"  # what may stand behind a full stop in its sentence


class Units:
    """Where a text's words, lines, sentences, paragraphs, speeches and scenes end, found as it grows behind `prompt`.

    A unit ends behind its last visible character, a place counted from the prompt's end; it is whole when what follows
    shows it: white space, a line's end, a blank line, or, for a scene, a line that begins with ACT or SCENE. A speech
    is a paragraph that begins with a speaker's line. The time this takes is linear in the text, however it is cut.
    """

    def __init__(self, prompt: str = ""):
        self.first: dict[str, int] = {}  # unit -> where the first one ends, behind the prompt
        self.last: dict[str, int] = {}  # and where the last
        self.has_speech = bool(SPEECH.search(prompt))  # begun, anywhere
        tail = prompt[max(prompt.rfind("\n\n"), 0) :]  # the paragraph that goes on
        self.n = self.place = -len(tail)  # characters read; those up to the last visible one
        self.line_place = self.n  # those up to the last visible one before the last line end
        self._line: list[str] = []  # what there is of the last line
        self._line_number = 0  # in its paragraph
        self._newlines = 0  # since the last visible character; -1: and other white space than blanks
        self._closes = False  # a sentence, unless a visible character follows
        self._after_newline = self._after_speaker = self._in_speech = False
        self.read(tail)
        self._line = ["".join(self._line)]

    def read(self, piece: str) -> None:
        """Take the characters that come next."""
        for run in RUNS.findall(piece):
            if run.isspace():
                self._read_space(run)
            else:
                self._read_visible(run)

    def undecided(self, unit: str) -> float:
        """Where a unit may yet turn out to have ended, by what comes next; inf if nowhere so far."""
        if unit == "scene" and self.place == self.n and self._is_heading(partly=True):
            return self.line_place
        opens = {"line": self._newlines == 0, "paragraph": 0 <= self._newlines < 2, "scene": True}
        opens["speech"] = opens["paragraph"] and self._in_speech
        return self.place if opens.get(unit) and self.place > 0 else math.inf

    def _is_heading(self, partly: bool = False) -> bool:
        """Whether the last line, behind a line of the passage, is the word that begins a scene."""
        line = "".join(self._line) if self.line_place > 0 and len(self._line) < 7 else ""
        return bool(line) and any(heading.startswith(line) if partly else heading == line for heading in HEADINGS)

    def _read_visible(self, run: str) -> None:
        self.n += len(run)
        self.place, self._newlines, self._after_newline = self.n, 0, False
        self._line.append(run)
        if bare := run.rstrip(CLOSING):
            self._closes = bare[-1] in ".!?"
        if self._after_speaker:
            self.has_speech = True
            self._in_speech |= self._line_number == 1

    def _read_space(self, run: str) -> None:
        if self.place == self.n:
            self._end("word", self.place)
            if self._closes:
                self._end("sentence", self.place)
            if run[0] == " " and self._is_heading():
                self._end("scene", self.line_place)
        self._closes = False
        for char in run:
            self.n += 1
            if char == "\n":
                self._read_newline()
            else:
                self._after_newline = False
                self._line.append(char)
                if char not in " \t":
                    self._newlines = -1

    def _read_newline(self) -> None:
        self.line_place = self.place
        if self._newlines >= 0:
            self._newlines += 1
            if self._newlines == 1:
                self._end("line", self.place)
            elif self._newlines == 2:
                self._end("paragraph", self.place)
                if self._in_speech:
                    self._end("speech", self.place)
        self._after_speaker = bool(IS_SPEAKER.fullmatch("".join(self._line)))
        if self._after_newline:
            self._line_number, self._in_speech = 0, False
        else:
            self._line_number += 1
        self._line, self._after_newline = [], True

    def _end(self, unit: str, place: int) -> None:
        if place > 0:
            self.first.setdefault(unit, place)
            self.last[unit] = place


@functools.lru_cache(maxsize=1)
def _units_behind(prompt: str) -> Units:
    return Units(prompt)


@functools.lru_cache(maxsize=MAX_STOPS)
def _borders(text: str) -> list[int]:
    """For each beginning of `text`, how long a beginning of it is its end, too (Knuth, Morris and Pratt 1977)."""
    borders, k = [0], 0
    for char in text[1:]:
        while k and char != text[k]:
            k = borders[k - 1]
        k += char == text[k]
        borders.append(k)
    return borders


class Stop:
    """Finds `text` in what comes in pieces; `matched` of its characters are what was read last."""

    def __init__(self, text: str):
        self.text, self.matched, self._n = text, 0, 0

    def read(self, piece: str) -> list[int]:
        """Take the characters that come next; returns where `text` begins, for each that they complete."""
        text, borders, k, places = self.text, _borders(self.text), self.matched, []
        for n, char in enumerate(piece, self._n + 1):
            while k and char != text[k]:
                k = borders[k - 1]
            k += char == text[k]
            if k == len(text):
                places.append(n - k)
                k = borders[k - 1]
        self.matched, self._n = k, self._n + len(piece)
        return places


# ---------------------------------------------------------------------------------------------------------------------


class Passage:
    """One row's text as it grows: whole characters only, and nothing that may have to be taken back.

    It ends where a stop begins or, with until=UNIT, where the first whole unit ends, whichever place comes first in the
    text; with until=UNIT it comes a line at a time. Without, or if no unit comes in time, it ends where a reader would:
    from half of max_new_tokens on, what follows the last whole speech (sentence, where no one speaks) is held back, and
    left out if no other is finished.

    ids: of its tokens, "i". logprobs: of the ids, where they are asked for: nats, "d".
    """

    def __init__(self, tok: Tokenizer, settings: Settings, prompt: str = "", number: int = 0):
        self.prompt, self.settings, self.number, self.done = prompt, settings, number, False
        self.ids, self.logprobs = array("i"), array("d")
        self._decoder, self._end_id = StreamDecoder(tok), tok.specials.get(END)
        self._units, self._stops = copy.deepcopy(_units_behind(prompt)), [Stop(text) for text in settings.stop]
        self._certain: list[str] = []
        self._held: list[str] = []
        self._n = self._n_certain = 0  # characters, in all and certain
        self._end: float = math.inf  # where it ends, as far as is known

    @property
    def text(self) -> str:
        """What is certain of it, without the prompt."""
        self._certain = ["".join(self._certain)]
        return self._certain[0]

    def push(self, id: int) -> str:
        """Take the next token; returns the text that is now certain."""
        if self.done:
            return ""
        self.ids.append(id)
        if id == self._end_id:
            return self._finish(min(self._end, self._n))
        self._read(self._decoder.push([id]))
        undecided = self._undecided()
        if self._end <= undecided:
            return self._finish(self._end)
        return self._release(min(undecided, self._end, self._will_stay()))

    def finish(self) -> str:
        """No more tokens come; returns the text that was held back and may stay."""
        if self.done:
            return ""
        self._read(self._decoder.push([], final=True))
        if self._end < math.inf:
            return self._finish(self._end)
        for unit in (self._unit(), "sentence", "line", "word") if self.settings.until != "tokens" else ():
            if (place := self._units.last.get(unit, -1)) >= self._n_certain:
                return self._finish(place)
        return self._finish(self._n)

    def _read(self, piece: str) -> None:
        self._held.append(piece)
        self._n += len(piece)
        for stop in self._stops:
            self._end = min([self._end, *stop.read(piece)])
        if self.settings.until != "tokens":
            self._units.read(piece)
            self._end = min(self._end, self._units.first.get(self.settings.until, math.inf))

    def _undecided(self) -> float:
        """Where the passage may yet turn out to end, by what comes next; all its characters if nowhere before."""
        stop = self._n - max((stop.matched for stop in self._stops), default=0)
        return min(stop, self._units.undecided(self.settings.until)) if self._end < math.inf else stop

    def _unit(self) -> str:
        """What `auto` ends with."""
        return "speech" if self._units.has_speech else "sentence"

    def _will_stay(self) -> int:
        """How many characters will stay whatever comes, but for stops."""
        until, halfway = self.settings.until, len(self.ids) > self.settings.max_new_tokens // 2
        if until != "tokens" and halfway:
            return self._units.last.get(self._unit(), 0)
        return self._n if until in ("auto", "tokens") else self._units.line_place

    def _release(self, n: int) -> str:
        """Let the first n characters be certain; returns those that were not."""
        if n <= self._n_certain:
            return ""
        held, size = "".join(self._held), n - self._n_certain
        self._certain.append(held[:size])
        self._held, self._n_certain = [held[size:]], n
        return held[:size]

    def _finish(self, n: int) -> str:
        self.done = True
        return self._release(n)
