"""The corpus: what is read, what cleaning keeps, and where documents are cut."""

import contextlib
import dataclasses
import gzip
import hashlib
import html
import http.server
import io
import json
import os
import random
import re
import signal
import tarfile
import textwrap
import threading
import tracemalloc
import urllib.request
import zipfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, corpus
from data.corpus import Document, clean_drama, clean_prose, clean_text

REPO = Path(__file__).parent.parent


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def manifest(tmp_path):
    """Writes a corpus.yaml, and files beside it, and reads it."""

    def read(text: str, **files: bytes) -> corpus.Manifest:
        (tmp_path / "corpus.yaml").write_text(text)
        for name, content in files.items():
            (tmp_path / f"{name}.txt").write_bytes(content)
        return corpus.read_manifest(tmp_path)

    return read


@contextlib.contextmanager
def within(seconds: float):
    """Ends what hangs: regular expressions look for signals too."""

    def refuse(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, refuse)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_below(limit: int):
    """Refuses what allocates more bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def read_all(manifest: corpus.Manifest) -> list[tuple[str, str, str]]:
    return [(doc.name, doc.style, doc.text) for doc in corpus.documents(manifest)]


# --- cleaning plays

PLAY = r"""# The Tragedy of Tests

## ACT I

### SCENE II. A platform\--before the &ldquo;castle&rdquo;.

_Enter BERNARDO and
FRANCISCO, with torches_

**Bernardo**  
Who's there? A &amp; B, & c.  
Speak. _\[Aside]_ He comes.

**FIRST WITCH**  
Nay, _\[To the
king]_ answer me.

*Exit.*

**All**  
_Exeunt_
"""  # noqa: W291

CLEANED_PLAY = """The Tragedy of Tests

ACT I

SCENE II. A platform--before the “castle”.

[Enter BERNARDO and
FRANCISCO, with torches]

BERNARDO
Who's there? A & B, &c.
Speak. [Aside] He comes.

FIRST WITCH
Nay, [To the
king] answer me.

[Exit.]

ALL
[Exeunt]
"""


def test_a_play_keeps_its_words_and_loses_its_markup():
    assert clean_drama(PLAY) == CLEANED_PLAY


def test_a_play_with_other_line_ends_is_the_same_play():
    assert clean_drama(PLAY.replace("\n", "\r\n")) == CLEANED_PLAY


def test_cleaning_a_cleaned_play_changes_nothing():
    assert clean_drama(CLEANED_PLAY) == CLEANED_PLAY


def test_only_the_abbreviation_loses_its_gap():
    assert clean_drama("Tom & company, & c.\n") == "Tom & company, &c.\n"


# --- cleaning prose

BOOK = (
    "\r\n\r\n            THE TITLE  \r\n\r\n\r\n\r\n  It was late.\t\r\nShe slept.\r\n\r\n"
    "    Twinkle, little bat!\r\n      How I wonder\r\n    what you're at!\r\n\r\n   The end.\r\n\x1a"
)
CLEANED_BOOK = (
    "THE TITLE\n\nIt was late.\nShe slept.\n\nTwinkle, little bat!\n  How I wonder\nwhat you're at!\n\nThe end.\n"
)


def test_prose_loses_indents_and_line_ends_but_verse_keeps_its_shape():
    assert clean_prose(BOOK) == CLEANED_BOOK
    assert clean_prose(CLEANED_BOOK) == CLEANED_BOOK


def test_plain_text_keeps_its_indents():
    assert clean_text(BOOK) == (
        "            THE TITLE\n\n  It was late.\nShe slept.\n\n"
        "    Twinkle, little bat!\n      How I wonder\n    what you're at!\n\n   The end.\n"
    )


def test_old_macintosh_line_ends_become_line_feeds():
    assert clean_text("one\rtwo\r\rthree") == "one\ntwo\n\nthree\n"


@pytest.mark.parametrize("clean", [clean_text, clean_prose, clean_drama])
@pytest.mark.parametrize("blank", ["", "\n", " \t\r\n \x1a"])
def test_nothing_cleaned_is_nothing(clean, blank):
    assert clean(blank) == ""


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("aé字. \t\n\r*\x1a"), max_size=60))
def test_plain_cleaning_keeps_every_visible_character_in_order(text):
    cleaned = clean_text(text)
    assert "".join(cleaned.split()) == "".join(text.replace("\x1a", "").split())
    assert not any(line != line.rstrip(" \t") for line in cleaned.split("\n"))
    assert "\n\n\n" not in cleaned
    assert clean_text(cleaned) == cleaned


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab \t\x0b\n"), max_size=60))
def test_indents_go_as_textwrap_has_them_go(text):
    paragraph = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    assert corpus._dedent(paragraph) == textwrap.dedent(paragraph)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aB_ _[\n"), max_size=40))
def test_a_stage_direction_that_opens_late_is_mended_as_by_the_plain_pattern(text):
    expected = re.sub(r"_(\w+) _\[", r"_[\1 ", text)
    assert re.sub(r"(?<!\w)([^\W_]*)_(\w+) _\[", r"\1_[\2 ", text) == expected  # as in clean_drama


CHARACTERS = [" ", "\t", "\n", "\r", "a", "é", "7", *"*_[]#-&\\"]
MIXED = [
    " \n",
    "\n ",
    "\n\n",
    "x ",
    "x\n y\n\n  ",
    " " * 500 + "x\n\n",
    "& c",
    "&#",
    "&amp;",
    "\\[",
    "**",
    "** ",
    "**a** ",
]
MIXED += [
    "_[",
    "_a",
    "_a _[",
    "_x _",
    "[ ",
    "[]",
    "*[",
    "_*",
    "# ",
    "\n#",
    "***\n",
    "*** END OF ",
    "\n*** ",
    "Gutenberg",
]
MIXED += ["*** START OF THE PROJECT GUTENBERG ", "***START OF THE PROJECT GUTENBERG x\n", "*END*THE SMALL PRINT!"]
MIXED += ["END OF PROJECT GUTENBERG ", "END OF PROJECT GUTENBERG\n", "Produced by ", "prepared by x\n"]
SURROUNDED = [("", ""), (" ", "x \n"), ("**", ""), ("_", ""), ("[", ""), ("&#", ";")]
SURROUNDED += [(f"*** START OF THE PROJECT GUTENBERG {end}", "") for end in ("", "X ***\n", "X ***\nProduced by X\n")]
SURROUNDED += [("gutenberg\n", "\nEND OF PROJECT GUTENBERG")]


def take_linear_time(unit: str, size: int, *surrounded: tuple[str, str]) -> None:
    for before, after in surrounded:
        text = before + (unit * (size // len(unit) + 1))[:size] + after
        for name in ("prose", "drama"):
            with within(5):
                corpus.CLEANERS[name](text)
        for pattern in (corpus.GUTENBERG_START, corpus.GUTENBERG_END, corpus.GUTENBERG_CREDIT):
            with within(5):
                list(pattern.finditer(text)) if pattern is not corpus.GUTENBERG_CREDIT else pattern.match(text)


@pytest.mark.parametrize("unit", CHARACTERS, ids=repr)
def test_a_megabyte_of_one_character_is_cleaned(unit):
    take_linear_time(unit, 10**6, (" ", "x \n"))


@pytest.mark.slow
@pytest.mark.parametrize("unit", CHARACTERS + MIXED, ids=lambda unit: repr(unit)[:30])
def test_a_megabyte_of_anything_that_starts_a_pattern_is_cleaned(unit):
    take_linear_time(unit, 10**6, ("", ""))
    take_linear_time(unit, 200_000, *SURROUNDED)


def test_numbers_of_characters_that_are_too_long_are_no_character():
    assert clean_drama("a&#65;b&#" + "9" * 5000 + ";c&#0000000066;\n") == "aAb\ufffdcB\n"


# --- Project Gutenberg

STORY = "CHAPTER I\n\nThe project began at *** START.\nIt was long.\n\nCHAPTER II\n\nThe end of the project.\n"
OLD_HEADER = (
    "The Project Gutenberg Etext of A Story, by Nobody\n\n"
    "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\nYou may not sue.\n\n"
)
NEW_HEADER = (
    "The Project Gutenberg eBook of A Story\n\nThis eBook is for the use of anyone anywhere.\n\nTitle: A Story\n\n"
)
LICENCE = "\n\nUpdated editions will replace the previous one.\n\nSection 1. General Terms of Use\n"
SMALL_PRINT = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"


@pytest.mark.parametrize(
    "start",
    [
        NEW_HEADER + "*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\n",
        NEW_HEADER
        + "*** START OF THIS PROJECT GUTENBERG EBOOK A STORY ***\n\nProduced by Ann O. Nym\nand others\n\n\n",
        NEW_HEADER + "***START OF THE PROJECT GUTENBERG EBOOK A STORY***\n\n\nE-text prepared by Ann O. Nym\n\n",
        OLD_HEADER + SMALL_PRINT + "\n\n",
        OLD_HEADER + "*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*\n\n",
    ],
)
@pytest.mark.parametrize(
    "end",
    [
        "\n*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***" + LICENCE,
        "\n***END OF THIS PROJECT GUTENBERG EBOOK A STORY***" + LICENCE,
        "\n\nEnd of the Project Gutenberg EBook of A Story\n\n*** END OF THIS PROJECT GUTENBERG EBOOK" + LICENCE,
        "\nEnd of Project Gutenberg's A Story, by Nobody\n" + LICENCE,
        "\n\nEnd of The Project Gutenberg Etext of A Story, by Nobody\n",
        "\n\nend oF pRoject gutenBerg\n",
        "",
    ],
)
def test_project_gutenbergs_frame_goes_and_the_whole_story_stays(start, end):
    assert clean_text((start + STORY + end).replace("\n", "\r\n")) == STORY


def test_small_print_behind_the_story_takes_nothing_of_it():
    text = STORY + "\nEnd of the Project Gutenberg Etext of A Story\n\n" + SMALL_PRINT
    assert clean_text(text) == STORY


def test_a_book_that_is_not_from_project_gutenberg_is_left_whole():
    assert clean_text(STORY) == STORY
    credits = "Produced by me.\nIn my own house.\n\nAnd so on.\n"
    assert clean_text(credits) == credits


def test_blank_lines_that_hold_a_blank_are_blank():
    lines = f"*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\nProduced by Me\nand you\n\n{STORY}\n".split("\n")
    assert clean_text("\r\n".join(line or " " for line in lines)) == STORY


BOTCHAN = "BOTCHAN\nBy the late Mr. Natsume\n" + "Because of an hereditary recklessness, I have been a loser.\n" * 300


def test_a_credit_that_no_blank_line_ends_is_one_line():
    start = (
        "Title: Botchan\n*** START OF THIS PROJECT GUTENBERG EBOOK BOTCHAN ***\nProduced by David Starner and others\n"
    )
    end = "End of Project Gutenberg's Botchan\n*** END OF THIS PROJECT GUTENBERG EBOOK BOTCHAN ***\n" + LICENCE
    assert clean_text(start + BOTCHAN + end) == BOTCHAN


def test_a_credit_is_eight_lines_at_most():
    start = "*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\n"
    for n in range(1, 20):
        credit = "Produced by Ann O. Nym\n" + "".join(f"and helper {i}\n" for i in range(1, n))
        expected = STORY if n <= 8 else credit.split("\n", 1)[1] + "\n" + STORY
        assert clean_text(f"{start}{credit}\n{STORY}") == expected
    long = "Produced by Ann O. Nym\n" + 3 * ("A paragraph of the book on a single line, as some have them. " * 5 + "\n")
    assert clean_text(f"{start}{long}\n{STORY}").startswith("A paragraph of the book")


def test_of_several_books_in_one_file_each_is_kept():
    books = [STORY.replace("CHAPTER", f"BOOK {i} CHAPTER") for i in range(3)]
    framed = [
        f"{NEW_HEADER}*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\nProduced by Me\n\n{book}\n"
        f"*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***{LICENCE}"
        for book in books
    ]
    assert clean_text("".join(framed)) == "\n".join(books)


# --- what cleaning takes is told


def told(*texts: str, clean: str = "text") -> tuple[str, ...]:
    docs = [Document(f"d{i}", "s", corpus.CLEANERS[clean](text), text, f"my/d{i}.txt") for i, text in enumerate(texts)]
    return corpus.survey(docs).warnings


def test_gutenbergs_own_frame_is_no_loss(capsys):
    licence = "You may copy it, give it away or re-use it under the terms of the licence.\n" * 250
    start = NEW_HEADER + "*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\nProduced by Me\n\n"
    end = "\n*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***\n"
    assert told(start + STORY + end + licence) == ()
    [said] = told(start + STORY + end + licence * 10)  # that is no licence
    assert (
        said.startswith("my/d0.txt: cleaning kept 0% of its letters; the ") and "begin '*** END OF THE PROJECT" in said
    )
    [said] = told("Poems, by me\n" * 5000 + start + STORY)
    assert "begin 'Poems, by me Poems" in said


def test_what_else_is_lost_is_told_by_its_first_words():
    text = "It began.\n\n" + "\n\n".join(["Nobody must lose this, whoever cleans."] * 9) + "\n\nThe end.\n"
    doc = Document("d", "s", clean_text("It began.\n\nThe end.\n"), text, "my/d.txt")
    [said] = corpus.survey([doc]).warnings
    assert said == (
        "my/d.txt: cleaning kept 4% of its letters; the 279 that went begin "
        "'Nobody must lose this, whoever cleans. Nobody must lose this' (clean: none in a corpus.yaml keeps all)"
    )
    assert (
        told("&eacute;&eacute;t&eacute; &ldquo;caf&eacute;&rdquo;\n" * 9, clean="drama") == ()
    )  # marks are no letters


@pytest.mark.parametrize("kept, warns", [(9000, False), (8999, True)])
def test_ninety_per_cent_are_enough(kept, warns):
    doc = Document("d", "s", "a" * kept, "a" * kept + "b" * (10_000 - kept), "d.txt")
    assert bool(corpus.survey([doc]).warnings) == warns


def test_the_same_text_twice_is_told_with_both_names():
    assert told("one", "two", "one\r\n") == (
        "my/d2.txt: is the same text as my/d0.txt; leave one out, or it counts twice",
    )
    said = told(*["one"] * 20)
    assert len(said) == 6 and said[-1] == "14 more are texts that stand there twice"


# --- reading


def test_byte_order_mark_goes_from_text_and_stays_in_none(manifest):
    content = "\ufeffIt  was\r\n\r\n\r\nlate. \x1a".encode()
    assert read_all(manifest("sources: [{style: s, file: a.txt}]", a=content)) == [("a", "s", "It  was\n\nlate.\n")]
    kept = read_all(manifest("sources: [{style: s, file: a.txt, clean: none}]", a=content))
    assert kept[0][2].encode() == content


@pytest.mark.parametrize("clean", ["text", "none", "drama"])
def test_what_is_not_utf8_is_named_with_its_place(manifest, clean):
    for content, place in [("é".encode() + b"bc\xff", 4), ("né".encode("latin-1"), 1), (b"\xed\xa0\x80", 0)]:
        read = manifest(f"sources: [{{style: s, file: a.txt, clean: {clean}}}]", a=content)
        with pytest.raises(DataError, match=rf"a\.txt: byte {place} "):
            read_all(read)


def test_the_place_counts_the_byte_order_mark(manifest):
    read = manifest("sources: [{style: s, file: a.txt}]", a=b"\xef\xbb\xbfab\xff")
    with pytest.raises(DataError, match="byte 5 "):
        read_all(read)


def test_of_many_files_the_bad_one_is_named(manifest):
    read = manifest('sources: [{style: s, file: "*.txt"}]', good=b"good", bad=b"\xff")
    with pytest.raises(DataError, match=r"bad\.txt"):
        read_all(read)


def test_a_glob_is_read_in_order_and_sources_in_theirs(manifest):
    read = manifest(
        'sources: [{style: z, file: c.txt}, {style: s, file: "[ab]*.txt"}]', b=b"B", a=b"A", ab=b"AB", c=b"C"
    )
    assert read_all(read) == [("c", "z", "C\n"), ("a", "s", "A\n"), ("ab", "s", "AB\n"), ("b", "s", "B\n")]


def test_patterns_to_remove_are_removed_before_cleaning(manifest):
    read = manifest(
        r"sources: [{style: s, file: a.txt, remove: ['\[edition \d\]\r\n', X+]}]", a=b"[edition 2]\r\noXXne"
    )
    assert read_all(read)[0][2] == "one\n"


def test_a_pattern_to_remove_that_never_ends_is_refused(manifest):
    read = manifest(r"sources: [{style: s, file: a.txt, remove: ['x', '(a+)+$']}]", a=b"x" + b"a" * 60 + b"b")
    before = signal.getsignal(signal.SIGALRM)
    with within(5), pytest.raises(DataError, match=r"a\.txt: remove: '\(a\+\)\+\$' takes over 2 s"):
        read_all(read)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_patterns_are_removed_in_a_thread_too(manifest):
    read, found = manifest("sources: [{style: s, file: a.txt, remove: [b+]}]", a=b"abc"), []
    thread = threading.Thread(target=lambda: found.extend(read_all(read)))
    thread.start()
    thread.join()
    assert found == [("a", "s", "ac\n")]


def test_letters_are_counted_before_cleaning(manifest):
    [doc] = corpus.documents(manifest("sources: [{style: s, file: a.txt, remove: [b+]}]", a="1 aé字bb".encode()))
    assert (corpus.count_letters(doc.raw), corpus.count_letters(doc.text)) == (5, 3)


@pytest.mark.parametrize("content", [b"", b" \r\n\x1a", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_by_name(manifest, tmp_path, content):
    with pytest.raises(DataError, match=r"a\.txt"):
        read_all(manifest("sources: [{style: s, file: a.txt}]", a=content))


HASH = "ab" * 32
BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &b{i} [*a,*a,*a]\n" for i in range(9))


@pytest.mark.parametrize(
    "text, said",
    [
        (BILLION, "alias"),
        ("sources: " + "[" * 10_000, "deep"),
        ("sources: [{style: s, file: a.txt, sha256: ab}]", "sha256"),
        ("sources: [{style: s, file: a.txt, max_bytes: 0}]", "max_bytes"),
        ("sources: [{style: s, file: a.txt, max_bytes: 1e400}]", "max_bytes"),
        ("sources: [{style: s, file: a.txt, max_bytes: many}]", "max_bytes"),
        ('sources: [{style: s, file: "a\\0.txt"}]', "file"),
        ('sources: [{style: "s\\n", file: a.txt}]', "style"),
        ('sources: [{style: "s|>", file: a.txt}]', "style"),
        ("sources: [{style: unk, file: a.txt}]", "special token"),
        (f"sources: [{{style: {'s' * 1001}, file: a.txt}}]", "style"),
        (f"sources: [{{style: s, file: a.txt, members: '{'[' * 500_000}'}}]", "members"),
        (f"sources: [{{style: s, file: a.txt, remove: ['{'(' * 900}']}}]", "remove"),
        ("sources: [{style: s, file: a.txt, remove: ['a{99999999999999999999}']}]", "remove"),
        ("sources: [{style: s, file: a.txt, remove: [[a]]}]", "remove"),
        (f"sources: [{{style: s, url: 'file:///etc/a.txt', sha256: {HASH}}}]", "url: found file:///etc/a.txt"),
        (f"sources: [{{style: s, url: 'https://a/..', sha256: {HASH}}}]", r"url: found https://a/\.\."),
        (f"sources: [{{style: s, url: 'https://a/', sha256: {HASH}}}]", "url"),
        (f"sources: [{{style: s, url: 'https://a', sha256: {HASH}}}]", "url"),
        (f"sources: [{{style: s, package: ../../a==1, sha256: {HASH}}}]", r"package: found \.\./\.\./a==1"),
        (f"sources: [{{style: s, package: a==1 --pre, sha256: {HASH}}}]", "package"),
        ("sources: [{style: s, file: a.txt}]\nfolder: /", "folder"),
        ("sources: [{style: s, file: a.txt}]\ntags: perhaps", "tags"),
        ("sources: [{style: s, file: a.txt}]\ntext_sha256: [a]", "text_sha256"),
        ("sources: []", "sources"),
        ("sources: [a]", "sources"),
        ("? [a]\n: b", "YAML"),
        ("sources: [{style: s, file: a.txt, colour: red}]", "colour"),
        ("sources: [{file: a.txt}]", "style"),
        ("colour: red\nsources: [{style: s, file: a.txt}]", "colour"),
        ("splits: [1, 0, 0]", "sources"),
        ("", "sources"),
        ("- a", "corpus.yaml"),
        ("sources: [a", "YAML"),
        ("sources: abc", "corpus.yaml"),
        ("sources:", "corpus.yaml"),
        ("sources: [{style: s}]", "one of file, url, package"),
        (f"sources: [{{style: s, file: a.txt, url: 'http://a/b', sha256: {HASH}}}]", "one of file, url, package"),
        (f"sources: [{{style: s, file: a.txt, package: a==1, sha256: {HASH}}}]", "one of file, url, package"),
        ("sources: [{style: s, url: 'file:///a'}]", "sha256"),
        ("sources: [{style: s, package: a==1}]", "sha256"),
        ("sources: [{style: s, file: a.txt, clean: bleach}]", "bleach"),
        ("sources: [{style: s, file: a.txt, clean: [prose]}]", "clean"),
        ("sources: [{style: s, file: [a.txt]}]", "file"),
        ("sources: [{style: s, file: a.txt, remove: abc}]", "remove"),
        ("sources: [{style: s, file: a.txt, remove: ['(']}]", "remove"),
    ],
)
def test_a_wrong_manifest_is_told_what_is_wrong(manifest, text, said):
    with within(5), pytest.raises(DataError, match=said) as caught:
        read_all(manifest(text, a=b"abc"))
    assert re.match(r".*/corpus\.yaml: [^\n]{1,500}\Z", str(caught.value))


def test_an_unknown_kind_of_archive_is_refused_before_any_download(manifest):
    with pytest.raises(DataError, match="archive"):
        manifest(f"sources: [{{style: s, package: book==1.0, sha256: {HASH}, archive: rar}}]")


@pytest.mark.parametrize(
    "splits",
    ["[0.9, 0.1]", "[0.9, 0.1, 0.1]", "[1.1, -0.1, 0]", "[0, 0.5, 0.5]", "0.9", "[a, b, c]", "[.nan, 0.5, 0.5]"],
)
def test_wrong_splits_are_refused(manifest, splits):
    with pytest.raises(DataError, match=r"corpus\.yaml"):
        manifest(f"splits: {splits}\nsources: [{{style: s, file: a.txt}}]", a=b"a")


def test_a_style_that_looks_like_a_number_is_a_name(manifest):
    assert read_all(manifest("sources: [{style: 1984, file: a.txt}]", a=b"a"))[0][1] == "1984"


def test_no_mutation_of_a_manifest_is_a_traceback(manifest, tmp_path):
    rng = random.Random(0)
    whole = (
        "sources:\n  - {style: s, licence: x, file: '*.txt', clean: prose, remove: ['[xy]+', (a|b)c], max_bytes: 99}\n"
        f"  - {{style: t, file: a.txt, sha256: {sha256(b'abc')}}}\nsplits: [0.8, 0.1, 0.1]\ntags: true\n"
    )
    read_all(manifest(whole, a=b"abc"))
    bits = [
        "[",
        "]",
        "{",
        "}",
        ":",
        "-",
        "&a ",
        "*a",
        "\0",
        "\n",
        "null",
        "1e999",
        "-1",
        "'",
        '"',
        "\\",
        "é",
        "**",
        "../",
    ]
    refused = 0
    for _ in range(400):
        mutated = whole
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(mutated))
            mutated = mutated[:start] + rng.choice(bits) + mutated[start + rng.randint(0, 9) :]
        (tmp_path / "corpus.yaml").write_text(mutated)
        try:
            read_all(corpus.read_manifest(tmp_path))
        except DataError as e:
            assert "\n" not in str(e) and len(str(e)) < 700
            refused += 1
    assert refused > 200


def test_a_folder_without_a_manifest_is_named(tmp_path):
    with pytest.raises(DataError, match=r"corpus\.yaml: not found"):
        corpus.read_manifest(tmp_path)


# --- what is pinned, and archives


def test_a_pinned_file_must_be_that_file(manifest):
    pinned = f"sources: [{{style: s, file: a.txt, sha256: {sha256(b'abc')}}}]"
    assert read_all(manifest(pinned, a=b"abc"))[0][2] == "abc\n"
    with pytest.raises(DataError, match="SHA-256"):
        read_all(manifest(pinned, a=b"abd"))


@pytest.fixture
def serve():
    """Starts an HTTP server whose reply is what `reply` writes; returns its address."""
    servers = []

    def start(reply) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                with contextlib.suppress(OSError):  # who asked may leave
                    reply(self)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/tale.txt"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(content: bytes, *headers: tuple[str, str], status: int = 200):
    def reply(handler) -> None:
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(content)

    return reply


def pinned(url: str, content: bytes, **keys: object) -> str:
    more = "".join(f", {key}: {value}" for key, value in keys.items())
    return f"sources: [{{style: s, url: '{url}', sha256: {sha256(content)}{more}}}]"


def test_a_url_is_checked_kept_and_not_asked_again(manifest, tmp_path, serve):
    served = {"content": b"once"}
    source = pinned(serve(lambda handler: send(served["content"])(handler)), b"once")
    assert read_all(manifest(source)) == [("tale", "s", "once\n")]
    served["content"] = b"gone"
    assert read_all(manifest(source)) == [("tale", "s", "once\n")]
    (tmp_path / "raw" / "tale.txt").write_bytes(b"damaged")  # what was kept is checked too, and fetched anew
    with pytest.raises(DataError, match=r"tale\.txt"):
        read_all(manifest(source))
    served["content"] = b"once"
    assert read_all(manifest(source)) == [("tale", "s", "once\n")]
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["tale.txt"]


@pytest.mark.parametrize(
    "reply, said",
    [
        (send(b"twice"), "SHA-256"),
        (send(b"onc", ("Content-Length", "4")), "SHA-256"),
        (send(b"once" * 1000), r"longer than max_bytes, 1,000"),
        (send(b"", status=404), "could not be downloaded.*404"),
        (send(b"5\r\nonce", ("Transfer-Encoding", "chunked")), "could not be downloaded"),
        (send(b"ffffffffff\r\nonce", ("Transfer-Encoding", "chunked")), "could not be downloaded"),
        (send(b"", ("Location", "http://127.0.0.1:1/b"), status=302), "redirects to 'http.*only https to https"),
        (send(b"", ("Location", "https://127.0.0.1:1/b"), status=301), "redirects to 'https.*only https to https"),
        (send(b"", ("Location", "file:///etc/hostname"), status=302), "file:///etc/hostname"),
        (lambda handler: handler.wfile.write(b"no HTTP\r\n\r\n"), "could not be downloaded"),
    ],
    ids=range(10),
)
def test_a_url_with_another_text_is_refused_and_nothing_is_kept(manifest, tmp_path, serve, reply, said):
    with within(5), pytest.raises(DataError, match=said) as caught:
        read_all(manifest(pinned(serve(reply), b"once", max_bytes=1000)))
    assert "/tale.txt: " in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("length", ["10", "1000000000000", "-5", "many"])
def test_a_length_that_is_not_true_doesnt_matter_where_the_hash_is_right(manifest, serve, length):
    source = pinned(serve(send(b"once", ("Content-Length", length))), b"once")
    assert read_all(manifest(source))[0][2] == "once\n"


def test_redirects_go_from_https_to_https_alone():
    follow = corpus._Redirects().redirect_request
    request = urllib.request.Request("https://a/tale.txt")
    assert follow(request, None, 302, "", {}, "https://b:444/tale.txt").full_url == "https://b:444/tale.txt"
    for url in ("http://a/tale.txt", "ftp://a/tale.txt", "file:///tale.txt", "httpsx://a/"):
        with pytest.raises(DataError, match="only https to https"):
            follow(request, None, 302, "", {}, url)


@pytest.mark.parametrize("url", ["example/tale.txt", "http://[bad/tale.txt", "http://a b/tale.txt"])
def test_what_is_not_a_url_is_an_error_that_names_it(manifest, tmp_path, url):
    with pytest.raises(DataError, match="tale"):
        read_all(manifest(pinned(url, b"once")))
    assert not (tmp_path / "raw").exists()


def test_where_nothing_can_be_kept_is_told(manifest, tmp_path, serve):
    (tmp_path / "raw").write_bytes(b"in the way")
    with pytest.raises(DataError, match=r"raw/tale\.txt: could not be written"):
        read_all(manifest(pinned(serve(send(b"once")), b"once")))
    (tmp_path / "raw").unlink()
    with pytest.raises(DataError, match=r"could not be written \(File name too long\)"):
        read_all(manifest(pinned(serve(send(b"once")) + "a" * 300, b"once")))
    assert not (tmp_path / "raw").exists()


def make_zip(members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(members: dict[str, bytes]) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        folder = tarfile.TarInfo("p/plays/folder.md")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    return buffer.getvalue()


@pytest.mark.parametrize("kind, make", [("wheel", make_zip), ("sdist", make_tar)])
def test_members_of_an_archive_are_read_in_order_of_name(manifest, tmp_path, kind, make):
    archive = make({"p/plays/b.md": b"B", "p/other.md": b"no", "p/plays/a.md": b"A", "p/plays/c.txt": b"no"})
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"book==1.0.{kind}").write_bytes(archive)
    source = f"style: s, package: book==1.0, archive: {kind}, sha256: {sha256(archive)}"
    assert read_all(manifest(f"sources: [{{{source}, members: p/plays/*.md}}]")) == [
        ("a", "s", "A\n"),
        ("b", "s", "B\n"),
    ]
    with pytest.raises(DataError, match="nothing/"):
        read_all(manifest(f"sources: [{{{source}, members: nothing/*}}]"))


def keep(tmp_path: Path, kind: str, archive: bytes, **keys: object) -> str:
    """A manifest of a package that need not be downloaded."""
    (tmp_path / "raw").mkdir(exist_ok=True)
    (tmp_path / "raw" / f"book==1.0.{kind}").write_bytes(archive)
    more = "".join(f", {key}: {value}" for key, value in keys.items())
    return f"sources: [{{style: s, package: book==1.0, archive: {kind}, sha256: {sha256(archive)}{more}}}]"


def make_sparse_tar(size: int) -> bytes:
    entry = tarfile.TarInfo("a.md")
    entry.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" * 2  # one piece of no bytes
    header[483:495] = f"{size:011o}\0".encode()
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return gzip.compress(bytes(header) + bytes(1024))


def make_long_header_tar(size: int) -> bytes:
    entry = tarfile.TarInfo("././@LongLink")
    entry.type, entry.size = tarfile.GNUTYPE_LONGNAME, size
    return gzip.compress(entry.tobuf(tarfile.GNU_FORMAT) + bytes(size + 1024))


@pytest.mark.parametrize("bomb", ["zip", "tar", "other member", "sparse", "long name"])
def test_an_archive_that_unpacks_to_too_much_is_refused(manifest, tmp_path, bomb):
    large = 50 * 2**20
    if bomb == "zip":
        with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.md", bytes(large))
        kind, content = "wheel", buffer.getvalue()
    elif bomb in ("tar", "other member"):
        kind, content = "sdist", make_tar({"a.md" if bomb == "tar" else "b.txt": bytes(large), "c.md": b"c"})
    else:
        make = make_sparse_tar if bomb == "sparse" else make_long_header_tar
        kind, content = "sdist", make(8**11 - 1 if bomb == "sparse" else large)
    read = manifest(keep(tmp_path, kind, content, members="'*.md'"))
    said = r"^book==1\.0: unpacks to over max_bytes, or over 100 times its size"
    with memory_below(45 * 2**20), within(5), pytest.raises(DataError, match=said):  # a few copies of what is let by
        read_all(read)


@pytest.mark.parametrize("kind, make", [("wheel", make_zip), ("sdist", make_tar)])
def test_the_members_of_an_archive_share_one_bound(manifest, tmp_path, monkeypatch, kind, make):
    archive = make({"a.md": b"a" * 600, "b.md": b"b" * 600})
    assert len(read_all(manifest(keep(tmp_path, kind, archive, members="'*.md'")))) == 2
    if kind == "wheel":
        monkeypatch.setattr(corpus, "UNPACKED", 1)
        monkeypatch.setattr(corpus, "UNPACKED_FLOOR", 1199 - len(archive))
        with pytest.raises(DataError, match=r"^book==1\.0: unpacks to over max_bytes"):
            read_all(manifest(keep(tmp_path, kind, archive)))


def test_an_archive_larger_than_its_bound_is_not_even_read(manifest, tmp_path):
    with pytest.raises(DataError, match=r"book==1\.0: pip could not download"):
        read_all(manifest(keep(tmp_path, "wheel", make_zip({"a.md": b"a" * 600}), max_bytes=100)))


@pytest.mark.parametrize("kind, make", [("wheel", make_zip), ("sdist", make_tar)])
def test_damaged_archives_are_refused_in_one_line(manifest, tmp_path, kind, make):
    whole, rng, refused = make({"a.md": b"text " * 50, "b.md": b"B"}), random.Random(0), 0
    for i in range(300):
        plain = bytearray(whole if kind == "wheel" or i % 2 else gzip.decompress(whole))
        for _ in range(rng.randint(1, 8)):
            plain[rng.randrange(len(plain))] = rng.randrange(256)
        content = bytes(plain[: rng.randrange(len(plain))] if i % 5 == 0 else plain)
        read = manifest(keep(tmp_path, kind, content if kind == "wheel" or i % 2 else gzip.compress(content)))
        try:
            with within(5):
                read_all(read)
        except DataError as e:
            assert "\n" not in str(e)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("make, kind", [(make_zip, "wheel"), (make_tar, "sdist")])
def test_a_members_name_must_be_text(manifest, tmp_path, make, kind):
    for name in ("a\nb.md", "a\udcff.md") if kind == "sdist" else ("a\nb.md",):
        with pytest.raises(DataError, match=r"^'a\\.*: the name is not UTF-8") as caught:
            read_all(manifest(keep(tmp_path, kind, make({name: b"text"}))))
        str(caught.value).encode()


# --- a user's own files


def test_own_files_have_their_stems_as_styles(tmp_path):
    for name in ("My Book!.txt", "b.txt", "deep/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    own = corpus.manifest_of_files((str(tmp_path / "*.txt"), str(tmp_path / "b.txt"), str(tmp_path / "**/c.txt")))
    assert read_all(own) == [
        ("My Book!", "my_book", "My Book!.txt\n"),
        ("b", "b", "b.txt\n"),
        ("c", "c", "deep/c.txt\n"),
    ]
    assert own.tags
    assert not corpus.manifest_of_files((str(tmp_path / "b.txt"),)).tags  # one style needs no telling apart


def test_names_with_brackets_are_names_not_patterns(tmp_path):
    folder = tmp_path / "books [mine]"
    folder.mkdir()
    (folder / "tale[1].txt").write_text("one")
    assert read_all(corpus.manifest_of_files((str(tmp_path / "*/*.txt"),)))[0][2] == "one\n"
    (folder / "corpus.yaml").write_text("sources: [{style: s, file: '*.txt'}]")
    assert read_all(corpus.read_manifest(folder))[0][2] == "one\n"


def test_no_file_an_empty_folder_and_an_empty_file_are_refused(tmp_path):
    (tmp_path / "notes.md").write_text("not read of a folder")
    (tmp_path / "a.txt").write_text("one")
    for patterns in [("none*.txt",), ("a.txt", "none*.txt"), ("none.txt", "a.txt")]:
        with pytest.raises(DataError, match="none"):
            corpus.manifest_of_files(tuple(str(tmp_path / pattern) for pattern in patterns))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=rf"{tmp_path.name}: holds no \.txt"):
        corpus.manifest_of_files((str(tmp_path),))
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.txt"):
        read_all(corpus.manifest_of_files((str(tmp_path / "*.txt"),)))


def test_a_folder_is_its_texts_and_those_of_its_folders_in_order(tmp_path):
    folder = tmp_path / "my [books]"
    for name in ("b.txt", "a/z.txt", "a/c.jsonl", "d.jsonl.gz", "a/notes.md", "image.png", "e.txt.orig", ".f.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        line = b'{"text": "' + name.encode() + b'"}'
        content = {".gz": gzip.compress(line), ".jsonl": line}.get(Path(name).suffix, name.encode())
        (folder / name).write_bytes(content)
    expected = [
        ("c:1", "c", "a/c.jsonl\n"),
        ("z", "z", "a/z.txt\n"),
        ("b", "b", "b.txt\n"),
        ("d:1", "d", "d.jsonl.gz\n"),
    ]
    assert read_all(corpus.manifest_of_files((str(folder),))) == expected
    twice = (str(tmp_path / "*"), str(folder / "b.txt"), f"{folder}/./a", str(folder))
    assert read_all(corpus.manifest_of_files(twice)) == expected  # and what is named twice is read once


def test_links_lead_to_each_file_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "tale.txt").write_text("one")
    (tmp_path / "a" / "b" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "again").symlink_to(tmp_path)  # two loops: 2**40 paths
    (tmp_path / "a" / "copy.txt").symlink_to(tmp_path / "a" / "b" / "tale.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "b")
    for patterns in [(".",), ("**/*.txt",), ("**",), ("a/**/*.txt", "linked/*", "a"), ("a/**/b/**/*.txt",)]:
        with within(5):
            own = corpus.manifest_of_files(tuple(str(tmp_path / pattern) for pattern in patterns))
        [(_, style, text)] = read_all(own)
        assert (style in ("tale", "copy"), text) == (True, "one\n")
    (tmp_path / "corpus.yaml").write_text("sources: [{style: s, file: '**/*.txt'}, {style: t, file: a/copy.txt}]")
    assert [style for _, style, _ in read_all(corpus.read_manifest(tmp_path))] == ["s", "t"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["**", "*", "a", "b", ".h", "[ab]", "*.txt"]), min_size=1, max_size=4))
def test_without_links_a_glob_finds_what_pythons_finds(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp() / "tree"
    for name in ("a/b/c.txt", "a/a/d.txt", "b/e.txt", ".h/f.txt", "a/.g.txt", "h.txt", "a/b/**"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    pattern = os.path.join(folder, *parts)
    expected = {path for path in corpus.glob.glob(pattern, recursive=True) if os.path.isfile(path)}
    assert {path for path in corpus._glob(pattern) if os.path.isfile(path)} == expected


def test_a_folder_that_can_not_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"deep: Permission denied"):
        corpus.manifest_of_files((str(tmp_path),))


def test_a_file_must_be_regular_of_a_bounded_size_and_have_a_name_in_utf8(tmp_path):
    with pytest.raises(DataError, match="/dev/zero: is not a regular file"):
        read_all(corpus.manifest_of_files(("/dev/zero",)))
    for name in (b"caf\xe9.txt", b"a\nb.txt"):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as f:
            f.write(b"text")
        with pytest.raises(DataError, match="the name is not UTF-8 or holds control characters") as caught:
            read_all(corpus.manifest_of_files((str(tmp_path),)))
        assert "\n" not in str(caught.value) and str(caught.value).isascii()
        os.unlink(path)
    with open(tmp_path / "a.txt", "wb") as f:
        f.truncate(2**30 + 1)
    with within(5), pytest.raises(DataError, match=r"a\.txt: has 1,073,741,825 bytes, must have at most 1,073,741,824"):
        read_all(corpus.manifest_of_files((str(tmp_path),)))
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "corpus.yaml").write_text("sources: [{style: s, file: a.txt, max_bytes: 3}]")
    with pytest.raises(DataError, match=r"a\.txt: has 4 bytes, must have at most 3; "):
        read_all(corpus.read_manifest(tmp_path))
    (tmp_path / "corpus.yaml").write_text("sources: [{style: s, file: a.txt, max_bytes: 4}]")
    assert read_all(corpus.read_manifest(tmp_path))[0][2] == "text\n"
    (tmp_path / "b.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"b\.txt: No such file"):
        read_all(corpus.manifest_of_files((str(tmp_path),)))


# --- JSON lines

LINES = [
    b'{"text": "First tale.  \\r\\n\\n\\n\\nIts end.", "url": "http://example"}\r\n',
    '{"id": 2, "meta": {"text": "no"}, "text": "Deux  \x85 été"}\n'.encode(),
    b'{"text":"\\ud83d\\ude42 \\u6771"}',
]
TALES = [("tales:1", "First tale.\n\nIts end.\n"), ("tales:2", "Deux  \x85 été\n"), ("tales:3", "🙂 東\n")]


def write_lines(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["tales.jsonl", "tales.jsonl.gz"])
def test_a_line_of_json_is_a_document(tmp_path, name):
    path = write_lines(tmp_path / name, b"".join(LINES))
    own = corpus.manifest_of_files((str(path),))
    assert read_all(own) == [(doc, "tales", text) for doc, text in TALES]
    assert not own.tags
    (tmp_path / "corpus.yaml").write_text(f"sources: [{{style: s, file: '*.{name[6:]}', clean: none}}]")
    assert [text for _, _, text in read_all(corpus.read_manifest(tmp_path))][1] == "Deux  \x85 été"


def test_the_other_keys_of_a_line_are_not_looked_at(tmp_path):
    line = b'{"n": ' + b"9" * 5000 + b', "text": "a", "x": {"text": [null, 1e999]}, "text": "b"}\n'
    path = write_lines(tmp_path / "tales.jsonl", line)
    assert read_all(corpus.manifest_of_files((str(path),))) == [("tales:1", "tales", "b\n")]


def test_a_gzip_bomb_is_refused_in_little_memory(tmp_path):
    path, part = tmp_path / "bomb.jsonl.gz", gzip.compress(bytes(10 * 2**20))
    path.write_bytes(gzip.compress(b'{"text": "') + part * 100)  # 1 MB; 1 GB on one line
    with memory_below(300 * 2**20), within(5), pytest.raises(DataError, match=r"bomb\.jsonl\.gz: line 1: is longer"):
        read_all(corpus.manifest_of_files((str(path),)))
    lines = gzip.compress((json.dumps({"text": "x" * 1000}) + "\n").encode() * 20_000)  # 20 MB in many
    path.write_bytes(lines)
    with pytest.raises(DataError, match=r"bomb\.jsonl\.gz: line \d+: unpacks to over 100 times"):
        read_all(corpus.manifest_of_files((str(path),)))


@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.gz"])
def test_a_line_has_a_bound(tmp_path, monkeypatch, name):
    monkeypatch.setattr(corpus, "JSON_BYTES", 100)
    line = b'{"text": "' + b"x" * 87 + b'"}\n'
    path = write_lines(tmp_path / name, line * 2)
    assert len(line) == 100 and len(read_all(corpus.manifest_of_files((str(path),)))) == 2
    write_lines(path, line + line[:10] + b"x" + line[10:])
    with pytest.raises(DataError, match=rf"{name}: line 2: is longer than 100 bytes"):
        read_all(corpus.manifest_of_files((str(path),)))


def test_a_gzip_file_in_several_parts_is_read_to_its_end(tmp_path):
    (tmp_path / "tales.jsonl.gz").write_bytes(b"".join(map(gzip.compress, LINES)))
    assert [text for _, _, text in read_all(corpus.manifest_of_files((str(tmp_path),)))] == [text for _, text in TALES]


@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"plain text",
        b'{"text": "cut',
        b'{"text": "a"} {"text": "b"}',
        b'"text"',
        b'["text"]',
        b"null",
        b'{"txt": "a"}',
        b'{"text": null}',
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'{"text": "a", "n": 1',
    ],
    ids=lambda line: line[:30].decode(errors="replace"),
)
def test_a_bad_line_is_named_in_one_line(tmp_path, name, line):
    write_lines(tmp_path / name, LINES[1] + line + b"\n" + LINES[2])
    with pytest.raises(DataError, match=rf"{name}: line 2: ") as caught:
        read_all(corpus.manifest_of_files((str(tmp_path),)))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_a_damaged_gzip_file_is_named(tmp_path):
    lines = [f'{{"text": "tale {hashlib.sha256(b"%d" % i).hexdigest()}"}}\n'.encode() for i in range(100)]
    whole, path = gzip.compress(b"".join(lines)), tmp_path / "tales.jsonl.gz"
    flipped = whole[:1000] + bytes([whole[1000] ^ 0xFF]) + whole[1001:]
    for content in (whole[:-1], whole[:2000], flipped, whole[:-8] + bytes(8), b"".join(lines), whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tales\.jsonl\.gz: line \d+: ") as caught:
            read_all(corpus.manifest_of_files((str(path),)))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz"])
def test_a_file_of_no_lines_is_refused_by_name(tmp_path, name):
    write_lines(tmp_path / name, b"")
    with pytest.raises(DataError, match=rf"{name}: holds no text"):
        read_all(corpus.manifest_of_files((str(tmp_path),)))


# --- what a pass finds


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.text(max_size=30), st.text(max_size=30)), max_size=8))
def test_a_survey_counts_as_the_documents_held_in_memory(entries):
    docs = [Document(f"d{i}", style, text, raw) for i, (style, text, raw) in enumerate(entries)]
    with patch.object(corpus, "COUNTED_CHARS", 7):
        found = dataclasses.replace(corpus.survey(iter(docs)), warnings=())
    whole = "".join(f"{doc.name}\0{doc.style}\0{doc.text}\0" for doc in docs)
    assert found == corpus.Survey(
        n_documents=len(docs),
        styles=list(dict.fromkeys(style for style, _, _ in entries)),
        text_sha256=sha256(whole.encode()),
        letters=sum(map(str.isalpha, "".join(text for _, text, _ in entries))),
        raw_letters=sum(map(str.isalpha, "".join(raw for _, _, raw in entries))),
        characters="".join(sorted(set("".join(text for _, text, _ in entries)))),
    )


# --- splits


def make_documents(texts: list[str]) -> list[Document]:
    return [Document(f"d{i}", f"s{i % 3}", text, "") for i, text in enumerate(texts)]


def deal(docs: list[Document], shares: tuple[float, ...], exact: bool) -> dict[str, list[tuple[Document, str]]]:
    """What each split has of each document."""
    dealt: dict[str, list[tuple[Document, str]]] = {name: [] for name in corpus.SPLITS}
    for doc in docs:
        for name, text in corpus.split(doc, len(docs), shares, exact):
            dealt[name].append((doc, text))
    return dealt


SHARES = st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)
TEXTS = st.lists(st.text(st.sampled_from("ab\n "), min_size=1, max_size=80), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(TEXTS, SHARES, st.booleans(), st.booleans())
def test_every_character_goes_to_just_one_split(texts, shares, exact, many):
    docs = make_documents(texts * 201 if many else texts)
    dealt = deal(docs, shares, exact)
    again = dict.fromkeys((doc.name for doc in docs), "")
    for parts in dealt.values():
        assert all(text for _, text in parts)
        for doc, text in parts:
            again[doc.name] += text
    assert again == {doc.name: doc.text for doc in docs}
    # and within each split the documents keep their order
    for parts in dealt.values():
        numbers = [int(doc.name[1:]) for doc, _ in parts]
        assert numbers == sorted(numbers)


def test_documents_are_cut_at_blank_lines_near_the_shares():
    paragraphs = [f"Paragraph {i}\nhas two lines.\n\n" for i in range(200)]
    docs = make_documents(["".join(paragraphs)] * 3)
    dealt = deal(docs, (0.8, 0.1, 0.1), exact=False)
    for name, share in zip(corpus.SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert [doc for doc, _ in dealt[name]] == docs
        for doc, text in dealt[name]:
            assert text.startswith("Paragraph")
            assert text.endswith("\n\n")
            assert abs(len(text) - share * len(doc.text)) <= 2 * len(paragraphs[-1])


def test_without_blank_lines_a_line_is_not_cut_and_without_lines_a_word_is():
    lines = deal(make_documents(["line of text\n" * 50]), (0.8, 0.1, 0.1), exact=False)
    assert all(text.endswith("text\n") for parts in lines.values() for _, text in parts)
    words = deal(make_documents(["word " * 20]), (0.8, 0.1, 0.1), exact=False)
    assert [len(words[name][0][1]) for name in corpus.SPLITS] == [80, 10, 10]


def test_an_exact_cut_is_nanogpts():
    for n in [*range(1, 300), 1000, 12_345, 1_115_394]:
        text = ("0123456789\n\n" * (n // 12 + 1))[:n]
        dealt = deal(make_documents([text]), (0.9, 0.1, 0), exact=True)
        joined = {name: "".join(part for _, part in parts) for name, parts in dealt.items()}
        assert joined == {"train": text[: int(n * 0.9)], "val": text[int(n * 0.9) :], "test": ""}


def test_many_documents_are_dealt_whole_and_in_proportion():
    docs = make_documents([f"Tale {i}\n\nwith an end.\n" for i in range(4000)])
    dealt = deal(docs, (0.8, 0.15, 0.05), exact=False)
    assert all(text == doc.text for parts in dealt.values() for doc, text in parts)
    for name, share in zip(corpus.SPLITS, (0.8, 0.15, 0.05), strict=True):
        five_sigma = 5 * (4000 * share * (1 - share)) ** 0.5
        assert abs(len(dealt[name]) - 4000 * share) < five_sigma
    # a document's split is its own affair: neither order nor company matters
    of_fewer = deal(docs[:999:-1], (0.8, 0.15, 0.05), exact=False)
    assert all({doc for doc, _ in of_fewer[name]} <= {doc for doc, _ in dealt[name]} for name in corpus.SPLITS)
    assert deal(docs, (1.0, 0.0, 0.0), exact=False)["train"] == [(doc, doc.text) for doc in docs]


def test_the_deal_of_many_documents_is_as_it_always_was():
    dealt = deal(make_documents([f"Tale {i}\n\nwith an end.\n" for i in range(300)]), (0.9, 0.05, 0.05), exact=False)
    val = "16 53 58 104 147 157 180 194 202 203 235 241 264 277 288"
    assert [doc.name for doc, _ in dealt["val"]] == [f"d{i}" for i in val.split()]
    test = "25 94 96 107 156 159 222 239 255 269 294"
    assert [doc.name for doc, _ in dealt["test"]] == [f"d{i}" for i in test.split()]


def test_the_corpus_hash_depends_on_names_styles_texts_and_order():
    a, b = Document("a", "s", "text", ""), Document("b", "s", "text", "")
    variants = [[a, b], [b, a], [a], [Document("a", "t", "text", ""), b], [Document("a", "s", "text.", ""), b]]
    assert len({corpus.survey(docs).text_sha256 for docs in variants}) == len(variants)


# --- the corpus that is trained on unless another is named


@pytest.fixture(scope="module")
def default_manifest():
    return corpus.read_manifest(REPO / "data" / "robopoet")


@pytest.fixture(scope="module")
def default_documents(default_manifest):
    return list(corpus.documents(default_manifest))


def test_the_default_corpus_is_the_one_that_is_pinned(default_manifest, default_documents):
    assert len(default_documents) == 39
    assert Counter(doc.style for doc in default_documents) == {"shakespeare": 38, "alice": 1}
    assert len({doc.name for doc in default_documents}) == 39
    assert default_manifest.text_sha256 == corpus.survey(default_documents).text_sha256


def test_the_default_corpus_keeps_its_letters_and_gains_none(default_manifest, default_documents):
    raw = {
        Path(name).stem: html.unescape(content.decode())
        for source in default_manifest.sources
        for name, content in corpus.raw_texts(source, default_manifest.folder)
    }
    for doc in default_documents:
        before = Counter(char for char in raw[doc.name].lower() if char.isalpha())
        after = Counter(char for char in doc.text.lower() if char.isalpha())
        assert not after - before, doc.name
        assert after.total() >= 0.97 * before.total(), doc.name
        assert after.total() >= 0.97 * corpus.count_letters(doc.raw), doc.name


def test_no_markup_is_left_in_the_default_corpus(default_documents):
    for doc in default_documents:
        # Alice's own underscores and rows of stars stand in the book
        of_plays = ("_", "*", "\\", "#", "[]", "&amp;") if doc.style == "shakespeare" else ()
        for mark in (*of_plays, "\r", "\x1a", "\ufeff", "\t", "\n\n\n", " \n", "FULCRUM", "later editions"):
            assert mark not in doc.text, (doc.name, mark)
        depth = 0
        for place, char in enumerate(doc.text):
            depth += (char == "[") - (char == "]")
            assert depth in (0, 1), (doc.name, doc.text[max(0, place - 60) : place + 20])
        assert depth == 0, doc.name
        assert doc.text == doc.text.strip() + "\n", doc.name


def test_the_default_corpus_reads_as_plays_and_a_tale(default_documents):
    texts = {doc.name: doc.text for doc in default_documents}
    assert texts["hamlet"].startswith("Hamlet\n\nACT I\n\nSCENE I. ")
    assert "\n\nBERNARDO\nWho's there?\n\n" in texts["hamlet"]
    assert "\n\n[Enter HORATIO and MARCELLUS]\n\n" in texts["hamlet"]
    assert "Twinkle, twinkle, little bat!\n" in texts["alice29"]
    for name, text in texts.items():
        if name != "alice29":
            assert "\nACT I\n" in f"\n{text}", name
            assert "\n[Exeunt" in text, name
