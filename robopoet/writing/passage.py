"""A passage: how it is to be written, its text as it grows, and where it ends."""

import dataclasses
import difflib
import re
from array import array
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import msgspec

import configurator
from configurator import ConfigError
from robopoet import untrusted
from robopoet.text.tokenizer import END, StreamDecoder, Tokenizer

MAX_STOPS, MAX_STOP_CHARS = 20, 200  # each character is compared with each of them
MOST_HELD = 4_000  # characters that are held back: a text without ends is not searched over and over
LOOK_BEHIND = 10_000  # characters before those by which a unit is known: a speech by its speaker
SPEAKER = r"(?:[A-Z][A-Z .,'’&-]+|[A-Z][\w .,'’-]*:)"  # a line of its own: FIRST WITCH, or First Citizen:
SPEECH = re.compile(rf"^{SPEAKER}\n(?=.*\S)", re.M)
ENDS = {  # what closes a unit, up to its last visible character; what follows must be there already
    "word": re.compile(r"\S(?=\s)"),
    "line": re.compile(r"\S(?=[ \t]*\n)"),
    "sentence": re.compile(r"[.!?][\"')\]’”]*(?=\s)"),
    "paragraph": re.compile(r"\S(?=[ \t]*\n[ \t]*\n)"),
    "speech": re.compile(r"\S(?=[ \t]*\n[ \t]*\n)"),  # of a paragraph that has a speaker
    "scene": re.compile(r"\S(?=\s*\n(?:ACT|SCENE) )"),
}


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


def ends(text: str, unit: str, start: int) -> list[int]:
    """Where in `text`, from `start` on, a unit is complete: the places behind its last visible character."""
    places = [match.end() for match in ENDS[unit].finditer(text, max(start - 50, 0))]  # 50: a full stop and its quotes
    if unit == "speech":
        places = [place for place in places if SPEECH.match(text[:place].rsplit("\n\n", 1)[-1])]
    return [place for place in places if place >= start]


class Passage:
    """One row's text as it grows: whole characters only, and nothing that may have to be taken back.

    It ends with the character that completes a stop or, with until=UNIT, shows that the first unit is whole; what is
    kept then ends where either begins. With until=UNIT it comes a line at a time. Without, or if no unit comes in time,
    it ends where a reader would: from half of max_new_tokens on, what follows the last whole speech (sentence, where no
    one speaks) is held back, and left out if no other is finished.

    ids: of its tokens, "i". logprobs: of the ids, where they are asked for: nats, "d".
    """

    def __init__(self, tok: Tokenizer, settings: Settings, prompt: str = "", number: int = 0):
        self.prompt, self.settings, self.number, self.done = prompt, settings, number, False
        self.ids, self.logprobs = array("i"), array("d")
        self._decoder, self._end_id = StreamDecoder(tok), tok.specials.get(END)
        self._certain: list[str] = []
        self._before, self._held = prompt[-LOOK_BEHIND:], ""
        self._blank, self._drama = True, bool(SPEECH.search(prompt))

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
            return self._finish(len(self._held))
        piece, until, stops = self._decoder.push([id]), self.settings.until, self.settings.stop
        # what ends it is looked for at each character, so that it doesn't depend on how the text is cut into tokens
        for part in piece if stops or until not in ("auto", "tokens") else [piece]:
            self._held += part
            places = [len(self._held) - len(stop) for stop in stops if self._held.endswith(stop)]
            if part.isspace() and until not in ("auto", "tokens"):
                places += self._ends(until)
            if places:
                return self._finish(min(places))
        self._drama = self._drama or ("\n" in piece and self._has_speech())
        return self._release(self._will_stay())

    def finish(self) -> str:
        """No more tokens come; returns the text that was held back and may stay."""
        if self.done:
            return ""
        self._held += self._decoder.push([], final=True)
        self._drama = self._drama or self._has_speech()
        for unit in (self._unit(), "sentence", "line", "word") if self.settings.until != "tokens" else ():
            if places := self._ends(unit):
                return self._finish(places[-1])
        return self._finish(len(self._held))

    def _has_speech(self) -> bool:
        return bool(SPEECH.search(self._before + self._held))

    def _unit(self) -> str:
        """What `auto` ends with."""
        return "speech" if self._drama else "sentence"

    def _ends(self, unit: str) -> list[int]:
        """Where in what is held a unit is complete that has something of this passage in it."""
        places = [place - len(self._before) for place in ends(self._before + self._held, unit, len(self._before))]
        return [place for place in places if not self._blank or self._held[:place].strip()]

    def _will_stay(self) -> int:
        """How many of the characters held will stay, whatever comes."""
        until, halfway = self.settings.until, len(self.ids) > self.settings.max_new_tokens // 2
        if until != "tokens" and halfway:
            stays = max(self._ends(self._unit()), default=0)
        elif until in ("auto", "tokens"):
            stays = len(self._held)
        else:
            stays = len(self._held[: max(self._held.rfind("\n"), 0)].rstrip())
        begun = max((n for s in self.settings.stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
        return min(max(stays, len(self._held) - MOST_HELD), len(self._held) - begun)

    def _release(self, n: int) -> str:
        certain, self._held = self._held[:n], self._held[n:]
        self._certain.append(certain)
        self._before = (self._before + certain)[-LOOK_BEHIND:]
        self._blank = self._blank and not certain.strip()
        return certain

    def _finish(self, n: int) -> str:
        self.done = True
        return self._release(n)
