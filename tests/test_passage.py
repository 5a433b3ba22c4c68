"""A passage's text: what is shown of it while it grows, and where it ends."""

import numpy as np
import pytest

import passage
from data.tokenizer import END, BPETokenizer
from passage import Passage, Settings

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
    """Push `text` byte by byte; nothing that is shown may be taken back."""
    whole = Passage(BYTES, Settings(**{"max_new_tokens": len(text.encode())} | settings), prompt)
    shown = ""
    for id in text.encode():
        shown += whole.push(id)
        assert shown == whole.text
    shown += whole.finish()
    assert shown == whole.text and text.startswith(shown) and whole.done
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
        ("scene", PLAY[:40], "", "this?"),  # not reached: the last sentence that is whole
        ("scene", PLAY[: PLAY.index("Shall") + 3], "", "Romeo, Romeo!"),  # the last speech
        ("line", "one two thr", "", "two"),
        ("speech", "First Citizen:\nSpeak, speak.\n\nAll:\nNo", "", "speak."),
        ("speech", "one\n\ntwo words", "", "one"),  # no one speaks: the last line
    ],
)
def test_a_passage_ends_with_the_first_whole_unit(until, text, prompt, last):
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
def test_left_alone_a_passage_ends_where_a_reader_would(text, prompt, last):
    written = write(text, prompt)
    assert written == text[: text.index(last) + len(last)]


def test_left_alone_half_of_a_passage_is_shown_at_once():
    whole = Passage(BYTES, Settings(max_new_tokens=len(PLAY)))
    for id in PLAY[: len(PLAY) // 2].encode():
        whole.push(id)
    assert whole.text == PLAY[: len(PLAY) // 2]


def test_the_end_of_the_text_ends_it_whole():
    for until in ("auto", "speech", "tokens"):
        whole = Passage(BYTES, Settings(until=until))
        for id in b"No one spea":
            whole.push(id)
        whole.push(BYTES.specials[END])
        assert whole.done and whole.text == "No one spea" and whole.ids[-1] == BYTES.specials[END]


def test_units_of_a_play():
    for unit, count in {"line": 11, "sentence": 7, "paragraph": 6, "speech": 3, "scene": 1}.items():
        assert len(passage.ends(PLAY, unit, 0)) == count, unit


@pytest.mark.parametrize("stops", [("ab",), ("aab", "b!"), ("zzz",), ("\n\n",)])
def test_streaming_ends_before_a_stop_and_never_shows_a_part_of_it(stops):
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
        assert shown + passage.finish() == expected == passage.text


def test_streamed_pieces_are_whole_characters():
    tokenizer = BPETokenizer([bytes([b]) for b in range(256)], [END])
    text = "né 你好 🌹!"
    passage = Passage(tokenizer, Settings(until="tokens"))
    pieces = [passage.push(id) for id in tokenizer.encode(text)]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert passage.push(tokenizer.specials[END]) == "" and passage.done
    cut = Passage(tokenizer, Settings(until="tokens"))
    assert cut.push("é".encode()[0]) == "" and cut.finish() == "\ufffd"
