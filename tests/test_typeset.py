"""What print leaves in a plain text is gone and counted, where the text itself shows that it is not of the work."""

import pytest
from conftest import within

from prepare import PrepareConfig, main
from robopoet.text import corpus, typeset

SOFT, ZERO = typeset.SOFT_HYPHENS, typeset.ZERO_WIDTHS
LINES = "It was a long and dark night and {} says so much that the\nline goes on to the very end of what"


def paged(page: str, n: int = 6, *, first: int = 5) -> str:
    """Pages that end within a sentence, with a form feed between; @: the number of the page, LINES: its text."""
    texts = (page.replace("@", str(i)).replace("LINES", LINES.format("x" * i)) for i in range(first, first + n))
    return "\f".join(texts)


PLAIN = "\n".join(LINES.format("x" * i) for i in range(5, 11)) + "\n"
FEEDS = {"form feeds": 5}


@pytest.mark.parametrize(
    ("page", "counts"),
    [
        ("THE FOX          @\n\nLINES\n\n", {"running heads": 6}),
        ("@\tThe fox\nLINES", {"running heads": 6}),
        ("The fox @\n\n\nLINES", {"running heads": 6}),
        ("\n  The Fox, page @  \nLINES", {"running heads": 6}),
        ("LINES\n\n        @\n", {"page numbers": 6}),
        ("LINES\n- @ -\n\n", {"page numbers": 6}),
        ("[Page @]\nLINES\n", {"page numbers": 6}),
        ("THE FOX     1\n\nLINES\n\n     12\n", {"running heads": 6, "page numbers": 6}),
        ("@\nTHE FOX   7\nLINES\n", {"page numbers": 6, "running heads": 6}),
        ("LINES\nPage @ of 10\n", {"page numbers": 6}),
        ("LINES\n\n~ @ ~\n", {"page numbers": 6}),
        ("LINES\n\nFree eBooks at planet.com\n", {"running heads": 6}),
    ],
)
def test_form_feeds_and_the_edges_of_pages_are_left_out(page, counts):
    assert typeset.running_text(paged(page)) == (PLAIN, FEEDS | counts)


def test_numbers_that_part_sentences_are_those_of_pages_without_form_feeds():
    pages = [LINES.format("x" * i) + " it goes on" * 60 for i in range(5, 11)]
    text = "\n\n".join(f"{page} and\nthe\n\n{i}" for i, page in enumerate(pages, 90)).replace(
        "\n\nIt was", "\n\nit was"
    )
    assert typeset.running_text(text) == (
        "".join(f"{page} and\nthe\n" for page in pages).replace("the\nIt", "the\nit"),
        {"page numbers": 6},
    )
    numbered = text.replace("the\n\n", "the end.\n\n").replace("\n\nit was", "\n\nIt was")
    assert typeset.running_text(numbered) == (numbered, {})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("He [Pg 1] went so[Pg 2]me way\n[Pg 3] to {Page 4}bed.", "He went some way\nto bed."),
        ("See [Page 12].", "See [Page 12]."),
        ("See [Page 12] and [Page 3].", "See [Page 12] and [Page 3]."),
    ],
)
def test_marks_of_pages_that_count_on_are_left_out(text, found):
    assert typeset.running_text(text)[0] == found


CHAPTERS = "CHAPTER I.\n\nThe Fox\n\nIt was.\n\nII. The hen\n\nSo.\n\nChapter 3. THE END\n\nAll.\n"


@pytest.mark.parametrize(
    "table",
    [
        "CONTENTS\n\nI. The fox ..... 1\nII. The hen    17\nIII. The end  33\n\n",
        "  Table of Contents:\n\nChapter\n\nThe Fox\n\nThe Hen\n\nThe End\n\n",
        "INHALT\n\nI. The fox\nII. The hen\nChapter 3. The end\n\n",
    ],
)
def test_a_table_of_contents_whose_lines_are_the_headings_of_the_text_is_left_out(table):
    assert typeset.running_text(f"Book\n\n{table}{CHAPTERS}") == (f"Book\n\n{CHAPTERS}", {"tables of contents": 1})
    assert typeset.running_text(f"{CHAPTERS}\n{table}By me") == (f"{CHAPTERS}\nBy me", {"tables of contents": 1})


@pytest.mark.parametrize(
    "text",
    [
        f"Contents\n\nThe box held these:\n\n{CHAPTERS}",
        f"CONTENTS\n\nThe fox\nThe hen\n\n{CHAPTERS}",
        f"CONTENTS\n\nThe fox\nThe hen\nThe end\n   Part one\n   Part two\n\n{CHAPTERS}",
        "Contents\n\nThe fox\nthe fox\nThe fox\nthe hen\n",
    ],
)
def test_what_only_looks_like_a_table_of_contents_stays(text):
    assert typeset.running_text(text) == (text, {})


def test_pages_that_end_with_sentences_lose_what_stands_as_on_paper():
    page = "THE FOX      @\n\nIt was late.\n\n   @\n"
    found, counts = typeset.running_text(paged(page))
    assert found == "\n\n".join(["It was late."] * 6) + "\n"
    assert counts == FEEDS | {"running heads": 6, "page numbers": 6}


def test_pages_without_heads_and_numbers_are_joined_only_within_a_sentence():
    text = "poem one\nends so\fpoem two\f\fPoem three\nit goes\fThe end."
    assert typeset.running_text(text)[0] == "poem one\nends so\npoem two\n\nPoem three\nit goes\n\nThe end.\n"


def test_a_running_head_without_a_number_stays_where_it_is_the_title():
    text = "THE FOX\n\nIt was a long day.\nIt was.\f" + paged("THE FOX\n\nLINES", 4) + "\fThe end of what"
    found, counts = typeset.running_text(text)
    assert found.startswith("THE FOX\n\nIt was a long day.\nIt was.\n\nIt was a long") and found.count("THE FOX") == 1
    assert counts == {"form feeds": 5, "running heads": 4}


@pytest.mark.parametrize(
    "pages",
    [
        [f"CHAPTER {i}\n\nIt was late. So\nit was." for i in range(1, 7)],  # a page for each
        [f"{i}\n\nO rose, thou\nart sick!" for i in range(1, 7)],
        [f"It was 18{i}\nand so it went on" for i in (12, 40, 41)],
        ["It was late and\nthe years went by\n1812", "It was late and", "it was so", "as long as"],
        [f"the fox and the hen\n{LINES.format('x' * i)}" for i in range(6)],  # a refrain
        ["CHAPTER I\nso it went", "CHAPTER II\nso they went", "CHAPTER III\nand on"],
    ],
)
def test_what_only_looks_like_it_stays_between_pages(pages):
    found, counts = typeset.running_text("\f".join(pages))
    assert found.split() == " ".join(pages).split() and counts == {"form feeds": len(pages) - 1}


def test_paragraphs_end_with_a_page_where_they_look_so():
    ends = ["so it was late and went on and on.\nIt was", "late.", "  So it is.\nIt was late and went on and on", "on",
            "and it was late and it was time to go.", "It was late, and so on they all went and"]  # fmt: skip
    assert typeset.running_text("\f".join(ends))[0] == (
        "so it was late and went on and on.\nIt was\nlate.\n\n  So it is.\nIt was late and went on and on\non\n"
        "and it was late and it was time to go.\n\nIt was late, and so on they all went and\n"
    )


@pytest.mark.parametrize(
    ("text", "joined", "n"),
    [
        ("A wonder! It was won-\nder, as the Won-\nder was.", "A wonder! It was wonder,\nas the Wonder\nwas.", 2),
        ("A rabbit-hole and rabbithole: a rabbit-\nhole.", "", 0),
        ("So it is hy-\nphenated here.", "", 0),
        ("A wonder. It was won-\n\nder -\nder, 1-\nder, won--\nder.", "", 0),
        ("A wonder.\n" + "So it is.\n" * 300 + "It was won-\nder.", "", 0),  # a poem may break a word
        ("An unknown one; un‐\n   known) so", "An unknown one; unknown)\nso", 1),
    ],
)
def test_hyphens_at_line_ends_are_joined_where_the_book_has_the_word(text, joined, n):
    assert typeset.running_text(text) == (joined or text, {"hyphens at line ends": n} if n else {})


@pytest.mark.parametrize(
    ("text", "seen", "counts"),
    [
        ("One\u200bword and co\u2060re \u200ezero\u200d joined\ufeff here\xad soft hy\xadphen.",
         "Oneword and core zero joined here soft hyphen.", {SOFT: 2, ZERO: 5}),
        ("so hy\xad\nphenated, it is un¬\n  known so\xad", "so hyphenated,\nit is unknown\nso", {SOFT: 3}),
        ("नमस्\u200dते می\u200cخواهم 👩\u200d👩 ا\u200f\u202bب\u202c ไทย\u200bไทย ¬x", None, {}),
    ],
)  # fmt: skip
def test_marks_that_nobody_sees_are_left_out_where_a_script_does_not_need_them(text, seen, counts):
    assert typeset.running_text(text) == (seen or text, counts)


@pytest.mark.slow
def test_hostile_text_takes_time_linear_in_its_length():
    with within(20):
        for unit in ("\f", "a-\n", "\xad ", "\u200b", "x", "1\f", "-\n", "A  1\f", " \f\n", "x\xad\n", "1\n",
                     "Index\n", "Index\nx\n", ".", "[Pg 1]"):  # fmt: skip
            typeset.running_text(unit * 100_000)
        names = "".join(f"x{i}\nIndex\n" for i in range(5_000))
        typeset.running_text(names + names + names.replace("\n", "\nx\n"))


def test_how_much_of_each_was_left_out_is_told_unless_nothing_is_cleaned(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(paged("THE FOX     @\n\nLINES", 60).replace("night", "ni\xadght") + "\r\n")
    (tmp_path / "b.html").write_text("<p>So <span class=pagenum>12</span>it was.")
    (tmp_path / "index.html").write_text("<a href=1>The fox</a><br><a href=2>The hen</a><br><a href=3>All</a>")
    main(PrepareConfig(input=(str(tmp_path),), out=str(tmp_path / "bins"), tokenizer="char"))
    said = capsys.readouterr()
    told = "page matter left out: form feeds (59), running heads (60), soft hyphens (60), page numbers (1), tables of "
    assert told + "contents (1)\n" in said.out
    assert f"warning: {tmp_path}/index.html: holds no text; left out\n" in said.err
    (tmp_path / "b.html").write_text("<p>So <i class=pagenum>12</i>it was.<p>&lt;|endoftext|><p>It was.")
    found = list(corpus.documents(corpus.manifest_of_files((f"{tmp_path}/b.html",))))
    assert [dict(doc.page_matter) for doc in found] == [{"page numbers": 1}, {}]

    manifest = "sources: [{style: a, file: a.txt, clean: none}]\n"
    (tmp_path / "corpus.yaml").write_text(manifest)
    (doc,) = corpus.documents(corpus.read_manifest(tmp_path))
    assert doc.text == doc.raw and doc.page_matter == {}
