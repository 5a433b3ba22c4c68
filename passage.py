"""A passage: how it is to be written, its text as it grows, and where it ends."""

import re
from dataclasses import dataclass
from typing import Literal

import configurator
from data.tokenizer import END, StreamDecoder, Tokenizer

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
        """What is wrong with these values, a line each."""
        found = configurator.bounds(self, "max_new_tokens", 1) + configurator.bounds(self, "seed", 0, 2**63 - 1)
        found += configurator.bounds(self, "temperature top_k no_repeat_ngram", 0)
        found += configurator.bounds(self, "top_p", 1e-9, 1) + configurator.bounds(self, "min_p", 0, 1)
        found += configurator.bounds(self, "repetition_penalty", 1e-9)
        return found + [f"stop: found {text!r}, must not be empty" for text in self.stop if not text]


def ends(text: str, unit: str, start: int) -> list[int]:
    """Where in `text`, from `start` on, a unit is complete: the places behind its last visible character."""
    places = [match.end() for match in ENDS[unit].finditer(text, max(start - 3, 0))]  # 3: a full stop and its quotes
    if unit == "speech":
        places = [place for place in places if SPEECH.match(text[:place].rsplit("\n\n", 1)[-1])]
    return [place for place in places if place >= start]


class Passage:
    """One row's text as it grows: whole characters only, and nothing that may have to be taken back.

    With until=UNIT it ends with the first whole unit, and comes a line at a time. Without, or if none comes in time, it
    ends where a reader would: from half of max_new_tokens on, what follows the last whole speech (sentence, where no
    one speaks) is held back, and left out if no other is finished.
    """

    def __init__(self, tok: Tokenizer, settings: Settings, prompt: str = "", number: int = 0):
        self.prompt, self.settings, self.number = prompt, settings, number
        self.text, self.done = "", False
        self.ids: list[int] = []
        self.logprobs: list[float] = []  # of the ids, where they are asked for: nats
        self._decoder, self._held, self._drama = StreamDecoder(tok), "", bool(SPEECH.search(prompt))
        self._end = tok.specials.get(END)

    def push(self, id: int) -> str:
        """Take the next token; returns the text that is now certain."""
        if self.done:
            return ""
        self.ids.append(id)
        if id == self._end:
            return self._finish(len(self._held))
        self._held += (piece := self._decoder.push([id]))
        if "\n" in piece and not self._drama:
            self._drama = bool(SPEECH.search(self.prompt + self.text + self._held))
        stops = [place for stop in self.settings.stop if (place := self._held.find(stop)) >= 0]
        if stops:
            return self._finish(min(stops))
        if self.settings.until not in ("auto", "tokens") and (places := self._ends(self.settings.until)):
            return self._finish(places[0])
        held_back = max(
            (n for s in self.settings.stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0
        )
        return self._release(min(len(self._held) - held_back, self._certain()))

    def finish(self) -> str:
        """No more tokens come; returns the text that was held back and may stay."""
        if self.done:
            return ""
        self._held += self._decoder.push([], final=True)
        for unit in (self._unit(), "sentence", "line", "word") if self.settings.until != "tokens" else ():
            if places := self._ends(unit):
                return self._finish(places[-1])
        return self._finish(len(self._held))

    def _unit(self) -> str:
        """What `auto` ends with."""
        return "speech" if self._drama else "sentence"

    def _ends(self, unit: str) -> list[int]:
        """Where in what is held a unit is complete that has something of this passage in it."""
        before = self.prompt + self.text
        blank = not self.text.strip()
        places = [place - len(before) for place in ends(before + self._held, unit, len(before))]
        return [place for place in places if not blank or self._held[:place].strip()]

    def _certain(self) -> int:
        """How many of the characters held will stay, whatever comes."""
        until, halfway = self.settings.until, len(self.ids) > self.settings.max_new_tokens // 2
        if until != "tokens" and halfway:
            return max(self._ends(self._unit()), default=0)
        if until in ("auto", "tokens"):
            return len(self._held)
        return len(self._held[: max(self._held.rfind("\n"), 0)].rstrip())

    def _release(self, n: int) -> str:
        certain, self._held = self._held[:n], self._held[n:]
        self.text += certain
        return certain

    def _finish(self, n: int) -> str:
        self.done = True
        return self._release(n)
