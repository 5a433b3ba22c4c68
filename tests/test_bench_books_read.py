"""bench.books_read counts what readers lose, add and glue, and says which readers are missing."""

import re

import pytest
from conftest import start
from test_books import epub

import configurator
from bench import books_read
from robopoet.errors import ConfigError


def test_words_are_counted_against_a_checked_text():
    wanted = "It was a dark, dark night. 吾輩は"
    assert books_read.compare("It was adark night. It was 吾輩", wanted) == {
        "words": 9, "lost": 4, "added": 3, "glued": 1}  # fmt: skip
    assert books_read.compare(wanted, wanted) == {"words": 9, "lost": 0, "added": 0, "glued": 0}


def test_readers_are_compared_and_missing_ones_named(results, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "checked"
    for name, content, text in (
        ("pages/a.html", b"<p>It was<span class=pagenum>3</span> late.<nav><a href=x>Next</a></nav>", "It was late."),
        ("pages/unchecked.html", b"<p>No", None),
        ("books/b.epub", epub(), "One\n\nIt was late.\n\nTwo\n\nIt was later still."),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        if text:
            (folder / name).with_suffix(".txt").write_text(text)

    def broken(page):
        raise ValueError("no article")

    peers = {"none": ("no_such_module", broken), "pytest": ("pytest", lambda page: re.sub("<.*?>", "", page)),
             "ruff": ("json", broken)}  # fmt: skip
    monkeypatch.setattr(books_read, "PEERS", peers)
    result, name = start(monkeypatch, books_read, books_read.BooksReadConfig, str(folder), positional="folder")
    assert name == "books_read" and result["files"] == {"books": ["b.epub"], "pages": ["a.html"]}
    pages, epubs = result["readers"]["pages"], result["readers"]["books"]
    kept = {key: pages["ours"][key] for key in ("words", "lost", "added", "glued", "failed")}
    assert kept == {"words": 3, "lost": 0, "added": 0, "glued": 0, "failed": 0}
    assert (pages["pytest"]["lost"], pages["pytest"]["added"], pages["pytest"]["glued"]) == (1, 2, 0)  # was3, lateNext
    assert epubs["ours"]["lost"] == epubs["ours"]["added"] == 0 < epubs["pytest"]["added"]
    assert (pages["ruff"]["lost"], pages["ruff"]["failed"]) == (3, 1)
    said = capsys.readouterr()
    assert "warning: none is left out: pip install none" in said.err and "ruff: a.html: no article" in said.err
    shown = re.sub(" +", " ", books_read.table([result]))
    assert "| pages (1) | ours | 3 | 0.00% | 0.00% | 0 | 0 |" in shown
    with pytest.raises(ConfigError, match=r"folder: '' holds no NAME.txt"):
        configurator.parse(books_read.BooksReadConfig, [], "folder")
