"""A passage's text: what is released as it grows, and where it ends."""

import random
import re

import numpy as np
import pytest

from robopoet.errors import ConfigError
from robopoet.text.tokenizer import END, BPETokenizer
from robopoet.writing.passage import MAX_STOPS, Passage, Settings, make_settings

BYTES = BPETokenizer([bytes([b]) for b in range(256)], [END])
PLAY = """ROMEO
What light is this?
It is the east.

[Enter JULIET]

JULIET
O Romeo, Romeo!

ROMEO
Shall I hear more?

SCENE III. Another part of it.

[Enter both]

JULIET
Ay me. I sp"""
TALE = "Alice was tired.\n\n'What is the use of a book,' thought Alice\n'without pictures?' So she was\nconsid"


def write(text: str, prompt: str = "", **settings) -> str:
    """Push `text` byte by byte; what is released is never taken back."""
    passage = Passage(BYTES, Settings(**{"max_new_tokens": len(text.encode())} | settings), prompt)
    shown = ""
    for id in text.encode():
        shown += passage.push(id)
        assert shown == passage.text
    shown += passage.finish()
    assert shown == passage.text and text.startswith(shown) and passage.done
    return shown


@pytest.mark.parametrize(
    "until, text, prompt, last",
    [
        ("line", PLAY, "", "ROMEO"),
        ("line", PLAY[6:], "ROMEO\n", "this?"),
        ("line", "\n\n" + TALE, "It was so. ", "tired."),
        ("sentence", PLAY, "", "this?"),
        ("sentence", "he said 'O! my.' Then", "", "O!"),
        ("paragraph", PLAY, "", "east."),
        ("paragraph", TALE, "", "tired."),
        ("speech", PLAY, "", "east."),
        ("speech", PLAY[6:], "ROMEO\n", "east."),
        ("speech", PLAY[PLAY.index("[Enter J") :], "", "Romeo!"),  # a stage direction is no speech
        ("scene", PLAY, "", "hear more?"),
        ("scene", PLAY[:40], "", "this?"),  # not reached: the last complete sentence
        ("scene", PLAY[: PLAY.index("Shall") + 3], "", "Romeo, Romeo!"),  # the last speech
        ("line", "one two thr", "", "two"),
        ("speech", "First Citizen:\nSpeak, speak.\n\nAll:\nNo", "", "speak."),
        ("speech", "one\n\ntwo words", "", "one"),  # no one speaks: the last line
    ],
)
def test_a_passage_ends_after_the_first_complete_unit(until, text, prompt, last):
    written = write(text, prompt, until=until)
    assert written == text[: text.index(last) + len(last)]


@pytest.mark.parametrize(
    "text, prompt, last",
    [
        (PLAY, "", "hear more?"),
        (PLAY[: PLAY.index("I hear")], "", "Romeo, Romeo!"),
        (PLAY[: PLAY.index("Shall") + 3], "", "Romeo, Romeo!"),
        ("What light\nis this that I see over th", "ROMEO\n", "over"),  # the speech isn't finished: the last line, word
        (TALE, "", "pictures?'"),
        ("a bcd efg", "", "bcd"),
        ("abcdefg", "", "abcdefg"),
        (" \n ", "", " \n "),
    ],
)
def test_until_auto_ends_a_passage_where_a_reader_would(text, prompt, last):
    written = write(text, prompt)
    assert written == text[: text.index(last) + len(last)]


def test_until_auto_releases_the_first_half_at_once():
    passage = Passage(BYTES, Settings(max_new_tokens=len(PLAY)))
    for id in PLAY[: len(PLAY) // 2].encode():
        passage.push(id)
    assert passage.text == PLAY[: len(PLAY) // 2]


def test_the_end_token_releases_everything():
    for until in ("auto", "speech", "tokens"):
        passage = Passage(BYTES, Settings(until=until))
        for id in b"No one spea":
            passage.push(id)
        passage.push(BYTES.specials[END])
        assert passage.done and passage.text == "No one spea" and passage.ids[-1] == BYTES.specials[END]


@pytest.mark.parametrize("stops", [("ab",), ("aab", "b!"), ("zzz",), ("\n\n",)])
def test_a_stream_ends_before_a_stop_and_never_releases_a_part_of_it(stops):
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)] + [b"aa", b"\n\n", b"xab!"], [END])
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([*b"ab!xz\n", 256, 257, 258], size=12).tolist()
        whole = tokenizer.decode_bytes(ids).decode()
        cuts = [whole.find(stop) for stop in stops if stop in whole]
        expected = whole[: min(cuts)] if cuts else whole
        passage, shown = Passage(tokenizer, Settings(stop=stops, until="tokens")), ""
        for id in ids:
            shown += passage.push(id)
            assert expected.startswith(shown)
        assert passage.done == bool(cuts)
        assert shown + passage.finish() == expected == passage.text


def test_released_pieces_are_whole_characters():
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)], [END])
    text = "né 你好 🌹!"
    passage = Passage(tokenizer, Settings(until="tokens"))
    pieces = [passage.push(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert passage.push(tokenizer.specials[END]) == "" and passage.done
    cut = Passage(tokenizer, Settings(until="tokens"))
    assert cut.push("é".encode()[0]) == "" and cut.finish() == ""


# --- the rule, applied once to the whole text

SPEAKER = r"(?:[A-Z][A-Z .,'’&-]+|[A-Z][\w .,'’-]*:)"
SPEECH = re.compile(rf"^{SPEAKER}\n(?=.*\S)", re.M)
ENDS = {
    "word": r"\S(?=\s)",
    "line": r"\S(?=[ \t]*\n)",
    "sentence": r"[.!?][\"')\]’”]*(?=\s)",
    "paragraph": r"\S(?=[ \t]*\n[ \t]*\n)",
    "speech": r"\S(?=[ \t]*\n[ \t]*\n)",
    "scene": r"\S(?=\s*\n(?:ACT|SCENE) )",
}


def ends(text: str, unit: str, prompt: str = "") -> list[int]:
    """The positions in `text` where a unit ends that holds some of it, found by a search of all the text."""
    whole = prompt + text
    places = [match.end() for match in re.finditer(ENDS[unit], whole)]
    if unit == "speech":
        places = [place for place in places if SPEECH.match(whole[:place].rsplit("\n\n", 1)[-1])]
    return [place - len(prompt) for place in places if place > len(prompt)]


def shown(text: str, settings: Settings, prompt: str) -> int:
    """How much of `text` is released while it is the first half."""
    undecided = max((n for stop in settings.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
    lines = text[: max(text.rfind("\n"), 0)].rstrip()
    return min(len(text) - undecided, len(text) if settings.until == "auto" else len(lines))


def naive(text: str, settings: Settings, prompt: str, is_ended: bool, half: str) -> str:
    """The passage that all of `text` gives; half: the text of the first half of its tokens."""
    for so_far in (text[:n] for n in range(1, len(text) + 1)):
        places = [so_far.find(stop) for stop in settings.stop if stop in so_far]
        if settings.until not in ("auto", "tokens"):
            places += ends(so_far, settings.until, prompt)[:1]
        if places:
            return so_far[: min(places)]
    if is_ended or settings.until == "tokens":
        return text
    largest = "speech" if SPEECH.search(prompt + text) else "sentence"
    for unit in (largest, "sentence", "line", "word"):
        if left := [place for place in ends(text, unit, prompt) if place >= shown(half, settings, prompt)]:
            return text[: left[-1]]
    return text


class Pieces:
    """A tokenizer whose ids are the indices of `pieces`, bytes, and after them END."""

    def __init__(self, pieces):
        self.pieces, self.specials = pieces, {END: len(pieces)}

    def decode_bytes(self, ids):
        return b"".join(self.pieces[id] for id in ids if id < len(self.pieces))


def cut(raw: bytes, rng: random.Random) -> list[bytes]:
    """`raw` in pieces of random lengths, which may split a character."""
    longest, pieces = rng.choice([1, 3, 8, 40]), []
    while raw:
        n = rng.randint(1, longest)
        pieces, raw = [*pieces, raw[:n]], raw[n:]
    return pieces


PARTS = [
    "a",
    "b",
    "A",
    "ROMEO\n",
    "ROMEO",
    "Citizen:\n",
    "ACT ",
    "SCENE ",
    "SCENE",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "\r",
]
PARTS += [".", "!", "?", '"', "'", ")", "’", "x y", "Hi.\n", "é", "\u00a0", ":", ",", "-"]
STOPS = ["a", "\n", "b\n", "\n\nR", "!", "! ", "Hi.\nA", "aab", "\nSCENE", "é", "y'", ".\nROMEO\nb", " a a", "aa"]


@pytest.mark.parametrize("until", ["auto", "tokens", "line", "sentence", "paragraph", "speech", "scene"])
def test_a_passage_equals_its_rule_applied_to_the_whole_text_however_it_is_tokenized(until):
    rng = random.Random(until)
    for _ in range(250):
        text = "".join(rng.choices(PARTS, k=rng.randrange(1, 40)))
        prompt = "".join(rng.choices(PARTS, k=rng.choice([0, 0, 3, 9])))
        stop, is_ended = tuple(rng.sample(STOPS, rng.choice([0, 1, 3]))), rng.random() < 0.3
        found = set()
        for _ in range(3):
            pieces = cut(text.encode(), rng)
            is_long = rng.random() < 0.5  # the half is not reached
            settings = Settings(until=until, stop=stop, max_new_tokens=10**6 if is_long else len(pieces))
            passage = Passage(Pieces(pieces), settings, prompt)
            for id in [*range(len(pieces)), *([len(pieces)] if is_ended else [])]:
                passage.push(id)
            passage.finish()
            half = b"".join(pieces if is_long else pieces[: len(pieces) // 2]).decode(errors="ignore")
            assert passage.text == naive(text, settings, prompt, is_ended, half), (text, prompt, settings, pieces)
            found.add(passage.text if is_long else None)
        assert len(found - {None}) <= 1


def test_a_stop_after_the_end_of_a_unit_changes_nothing():
    settings = Settings(until="line", stop=("X",))
    for pieces in ([b"abc", b"\nX"], [b"abc\nX"], [b"ab", b"c\n", b"X"]):
        passage = Passage(Pieces(pieces), settings)
        for id in range(len(pieces)):
            passage.push(id)
        assert passage.done and passage.text == "abc"


def test_units_of_a_play():
    for unit, count in {"line": 11, "sentence": 7, "paragraph": 6, "speech": 3, "scene": 1}.items():
        assert len(ends(PLAY, unit)) == count, unit


class Counting:
    """A pattern that counts the characters that it searches."""

    searched = 0

    def __init__(self, pattern):
        self.pattern = pattern

    def finditer(self, text, start):
        Counting.searched += len(text) - start
        return self.pattern.finditer(text, start)

    def search(self, text):
        Counting.searched += len(text)
        return self.pattern.search(text)

    def match(self, text):
        Counting.searched += len(text)
        return self.pattern.match(text)


@pytest.mark.parametrize("piece", [b"a", b" ", b"A", b"aab" * 300])
@pytest.mark.parametrize("until", ["auto", "scene"])
def test_the_work_for_a_token_does_not_grow_with_the_text(piece, until, monkeypatch):
    patterns = {unit: Counting(re.compile(pattern)) for unit, pattern in ENDS.items()}
    monkeypatch.setattr("robopoet.writing.passage.ENDS", patterns)
    monkeypatch.setattr("robopoet.writing.passage.SPEECH", Counting(SPEECH))
    tokens = 6_000 if len(piece) == 1 else 60
    passage = Passage(Pieces([piece]), Settings(until=until, max_new_tokens=tokens // 10, stop=("aab" * 60 + "X",)))
    for _ in range(tokens):
        passage.push(0)
    searched = []
    for _ in range(2):
        Counting.searched = 0
        for _ in range(tokens // 6):
            passage.push(0)
        searched.append(Counting.searched)
    assert 0 < searched[1] <= 1.01 * searched[0] and not passage.done


def test_the_text_that_is_searched_stays_short():
    passage, lengths = Passage(Pieces([b"the queen ", b"said.\n"]), Settings(until="scene", max_new_tokens=10**6)), []
    for i in range(10_000):
        passage.push(i % 700 == 0)
        lengths.append(len(passage._before + passage._held))
    assert max(lengths) < 20_000 < len(passage.text) and passage.ids.itemsize == 4


# --- settings


@pytest.mark.parametrize(
    "given, said",
    [
        ({"temprature": 1}, "temprature: no such setting; did you mean temperature"),
        ({"temperature": "hot"}, "settings: .*temperature"),
        ({"until": "chapter"}, "settings: .*until"),
        ({"stop": "x"}, "settings: .*stop"),
        ({"stop": ("",)}, "stop: found ''"),
        ({"stop": ("x",) * (MAX_STOPS + 1)}, "stop: must be at most"),
        ({"stop": ("x" * 1001,)}, "stop: must be at most"),
        ({"style": None}, "settings: .*style"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0"),
        ({"max_new_tokens": 1.5}, "settings: .*max_new_tokens"),
        ({"max_new_tokens": 10**30}, "max_new_tokens"),
        ({"seed": 2**63}, "seed: found"),
        *(({key: value}, key) for key in ("temperature", "repetition_penalty") for value in (1e-300, 1e308, -1.0)),
        *(({"temperature": value}, "temperature") for value in (float("nan"), float("inf"), 1e-7)),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"top_k": 10**30}, "top_k"),
        ({"no_repeat_ngram": 101}, "no_repeat_ngram"),
    ],
)
def test_wrong_settings_are_named_in_one_line(given, said):
    with pytest.raises(ConfigError, match=said) as e:
        make_settings(given)
    assert "\n" not in str(e.value)
