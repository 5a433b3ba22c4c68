"""Cleaning: what it keeps of a text, what it removes, and when it warns."""

import re
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import read_all, within
from hypothesis import given, settings
from hypothesis import strategies as st

from robopoet.errors import DataError
from robopoet.files import HOME
from robopoet.text import cleaning, corpus
from robopoet.text.cleaning import clean_drama, clean_prose, clean_text
from robopoet.text.corpus import Document

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


def test_only_the_abbreviation_loses_its_space():
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
    assert clean_text("one\r\r\ntwo\r\r\n\r\r\nthree") == "one\ntwo\n\nthree\n"


@pytest.mark.parametrize("clean", [clean_text, clean_prose, clean_drama])
@pytest.mark.parametrize("blank", ["", "\n", " \t\r\n \x1a"])
def test_a_blank_text_is_cleaned_to_nothing(clean, blank):
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
def test_dedenting_equals_textwraps(text):
    paragraph = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    assert cleaning._dedent(paragraph) == textwrap.dedent(paragraph)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aB_ _[\n"), max_size=40))
def test_a_misplaced_underscore_is_moved_as_by_the_simple_pattern(text):
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
                cleaning.CLEANERS[name](text)
        for pattern in (cleaning.GUTENBERG_START, cleaning.GUTENBERG_END, cleaning.GUTENBERG_CREDIT):
            with within(5):
                list(pattern.finditer(text)) if pattern is not cleaning.GUTENBERG_CREDIT else pattern.match(text)


@pytest.mark.parametrize("unit", CHARACTERS, ids=repr)
def test_a_megabyte_of_one_character_is_cleaned(unit):
    take_linear_time(unit, 10**6, (" ", "x \n"))


@pytest.mark.slow
@pytest.mark.parametrize("unit", CHARACTERS + MIXED, ids=lambda unit: repr(unit)[:30])
def test_a_megabyte_of_anything_that_starts_a_pattern_is_cleaned(unit):
    take_linear_time(unit, 10**6, ("", ""))
    take_linear_time(unit, 200_000, *SURROUNDED)


def test_a_character_reference_of_too_many_digits_becomes_a_replacement_mark():
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
        "\n\nFin du Projet Gutenberg de A Story, par B\n\n*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***" + LICENCE,
        "\n\nEnd of the Project Gutenberg EBook of A Story\n\n*** END OF THIS PROJECT GUTENBERG EBOOK" + LICENCE,
        "\nEnd of Project Gutenberg's A Story, by Nobody\n" + LICENCE,
        "\n\nEnd of The Project Gutenberg Etext of A Story, by Nobody\n",
        "\n\nend oF pRoject gutenBerg\n",
        "",
    ],
)
def test_project_gutenbergs_header_and_licence_go_and_the_full_story_stays(start, end):
    assert clean_text((start + STORY + end).replace("\n", "\r\n")) == STORY


def test_a_book_with_both_marks_begins_after_the_last():
    """As in those of 2003 and 2004: the new line, then the old small print."""
    start = f"{NEW_HEADER}*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\nYou may not sue.\n\n{SMALL_PRINT}\n"
    assert clean_text(start + STORY) == STORY


def test_small_print_after_the_story_removes_nothing_of_it():
    text = STORY + "\nEnd of the Project Gutenberg Etext of A Story\n\n" + SMALL_PRINT
    assert clean_text(text) == STORY


def test_a_book_that_is_not_from_project_gutenberg_is_left_as_it_is():
    assert clean_text(STORY) == STORY
    credits = "Produced by me.\nIn my own house.\n\nAnd so on.\n"
    assert clean_text(credits) == credits


def test_lines_that_hold_only_a_space_are_blank():
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


# --- warnings of what cleaning removes


def warnings_of(*texts: str, clean: str = "text") -> tuple[str, ...]:
    docs = [
        Document(f"d{i}", "s", cleaning.CLEANERS[clean](text), text, f"my/d{i}.txt") for i, text in enumerate(texts)
    ]
    return corpus.survey(docs).warnings


def test_project_gutenbergs_licence_does_not_count_as_lost(capsys):
    licence = "You may copy it, give it away or re-use it under the terms of Project Gutenberg.\n" * 250
    start = NEW_HEADER + "*** START OF THE PROJECT GUTENBERG EBOOK A STORY ***\n\nProduced by Me\n\n"
    end = "\n*** END OF THE PROJECT GUTENBERG EBOOK A STORY ***\n"
    assert warnings_of(start + STORY + end + licence) == ()
    [message] = warnings_of(start + STORY + end + licence * 10)  # that is no licence
    assert (
        message.startswith("my/d0.txt: cleaning kept 0% of its letters; the ")
        and "begin '*** END OF THE PROJECT" in message
    )
    [message] = warnings_of("Poems, by me\n" * 5000 + start + STORY)
    assert "begin 'Poems, by me Poems" in message


@pytest.mark.parametrize(
    "line", ["End of Project Gutenberg is what he said", "*** START OF THE PROJECT GUTENBERG EBOOK A ***"]
)
def test_text_lost_to_a_line_like_project_gutenbergs_is_reported(line):
    [message] = warnings_of(f"{STORY * 20}\n{line}\n{STORY * 20}")
    assert "cleaning kept 5" in message or "cleaning kept 4" in message


def test_other_losses_are_reported_with_their_first_words():
    text = "It began.\n\n" + "\n\n".join(["Nobody must lose this, whoever cleans."] * 9) + "\n\nThe end.\n"
    doc = Document("d", "s", clean_text("It began.\n\nThe end.\n"), text, "my/d.txt")
    [message] = corpus.survey([doc]).warnings
    assert message == (
        "my/d.txt: cleaning kept 4% of its letters; the 279 it removed begin "
        "'Nobody must lose this, whoever cleans. Nobody must lose this' (clean: none in a corpus.yaml keeps all)"
    )
    assert (
        warnings_of("&eacute;&eacute;t&eacute; &ldquo;caf&eacute;&rdquo;\n" * 9, clean="drama") == ()
    )  # marks are no letters


@pytest.mark.parametrize("kept, warns", [(9000, False), (8999, True)])
def test_keeping_ninety_per_cent_gives_no_warning(kept, warns):
    doc = Document("d", "s", "a" * kept, "a" * kept + "b" * (10_000 - kept), "d.txt")
    assert bool(corpus.survey([doc]).warnings) == warns


# --- patterns to remove


def test_patterns_to_remove_are_removed_before_cleaning(manifest):
    read = manifest(
        r"sources: [{style: s, file: a.txt, remove: ['\[edition \d\]\r\n', X+]}]", a=b"[edition 2]\r\noXXne"
    )
    assert read_all(read)[0][2] == "one\n"


@pytest.mark.parametrize("in_thread", [False, True])  # a signal would reach the main thread alone
def test_a_pattern_to_remove_that_never_ends_is_refused(manifest, in_thread):
    read = manifest(r"sources: [{style: s, file: a.txt, remove: ['x', '(a|aa)+$']}]", a=b"x" + b"a" * 60 + b"b")
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(DataError, match=r"a\.txt: remove: '\(a\|aa\)\+\$' takes over 2 s"),
    ):
        pool.submit(read_all, read).result() if in_thread else read_all(read)


def test_own_patterns_remove_what_pythons_re_removes():
    """The corpora's pinned hashes were made with re."""
    text = '{"citation": "a", "text": "In the beginning", "book": "Genesis", "chapter": 1, "verse": 1}\r\n[x\r\n]\n' * 3
    for path in sorted(HOME.glob("data/*/corpus.yaml")):
        for source in corpus.read_manifest(path.parent).sources:
            for pattern in source.remove:
                assert cleaning.remove(text, (pattern,), "") == re.sub(pattern, "", text)
