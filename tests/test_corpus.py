"""The corpus: what its manifest may say, and what a pass over it finds."""

import dataclasses
import html
import random
import re
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import read_all, sha256, within
from hypothesis import given, settings
from hypothesis import strategies as st

from robopoet.errors import DataError
from robopoet.text import cleaning, corpus, sources
from robopoet.text.corpus import Document

REPO = Path(__file__).parent.parent


# --- reading


def test_cleaning_removes_a_byte_order_mark_and_none_keeps_it(manifest):
    content = "\ufeffIt  was\r\n\r\n\r\nlate. \x1a".encode()
    assert read_all(manifest("sources: [{style: s, file: a.txt}]", a=content)) == [("a", "s", "It  was\n\nlate.\n")]
    kept = read_all(manifest("sources: [{style: s, file: a.txt, clean: none}]", a=content))
    assert kept[0][2].encode() == content


def test_a_globs_files_are_read_in_order_of_name_and_sources_in_order_of_the_manifest(manifest):
    read = manifest(
        'sources: [{style: z, file: c.txt}, {style: s, file: "[ab]*.txt"}]', b=b"B", a=b"A", ab=b"AB", c=b"C"
    )
    assert read_all(read) == [("c", "z", "C\n"), ("a", "s", "A\n"), ("ab", "s", "AB\n"), ("b", "s", "B\n")]


def test_letters_are_counted_before_cleaning(manifest):
    [doc] = corpus.documents(manifest("sources: [{style: s, file: a.txt, remove: [b+]}]", a="1 aé字bb".encode()))
    assert (cleaning.count_letters(doc.raw), cleaning.count_letters(doc.text)) == (5, 3)


@pytest.mark.parametrize("content", [b"", b" \r\n\x1a", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_by_name(manifest, tmp_path, content):
    with pytest.raises(DataError, match=r"a\.txt"):
        read_all(manifest("sources: [{style: s, file: a.txt}]", a=content))


HASH = "ab" * 32
BILLION = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &b{i} [*a,*a,*a]\n" for i in range(9))


@pytest.mark.parametrize(
    "text, message",
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
        ("sources: [{style: s, file: a.txt, remove: ['(?:(?:a{99}){99}){99}']}]", "repeats more than 10,000 times"),
        ("sources: [{style: s, file: a.txt, remove: ['a(?R)']}]", "remove"),
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
def test_a_wrong_manifest_is_refused_with_what_is_wrong(manifest, text, message):
    with within(5), pytest.raises(DataError, match=message) as caught:
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
    valid = (
        "sources:\n  - {style: s, licence: x, file: '*.txt', clean: prose, remove: ['[xy]+', (a|b)c], max_bytes: 99}\n"
        f"  - {{style: t, file: a.txt, sha256: {sha256(b'abc')}}}\nsplits: [0.8, 0.1, 0.1]\ntags: true\n"
    )
    read_all(manifest(valid, a=b"abc"))
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
        mutated = valid
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


# --- what a pass finds


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.text(min_size=1, max_size=30), st.text(max_size=30)), max_size=8))
def test_a_survey_counts_as_the_documents_held_in_memory(entries):
    docs = [Document(f"d{i}", style, text, raw) for i, (style, text, raw) in enumerate(entries)]
    with patch.object(cleaning, "COUNTED_CHARS", 7):
        found = dataclasses.replace(corpus.survey(iter(docs)), warnings=())
    joined = "".join(f"{doc.name}\0{doc.style}\0{doc.text}\0" for doc in docs)
    assert [length for _, length in found.works] == [len(text) for _, text, _ in entries]
    assert found == corpus.Survey(
        n_documents=len(docs),
        n_bytes=len("".join(doc.text for doc in docs).encode()),
        styles=list(dict.fromkeys(style for style, _, _ in entries)),
        text_sha256=sha256(joined.encode()),
        letters=sum(map(str.isalpha, "".join(text for _, text, _ in entries))),
        raw_letters=sum(map(str.isalpha, "".join(raw for _, _, raw in entries))),
        characters="".join(sorted(set("".join(text for _, text, _ in entries)))),
        works=found.works,
    )


def test_a_copy_of_a_text_is_reported_with_both_names():
    def warnings_of(*texts: str) -> tuple[str, ...]:
        docs = [Document(f"d{i}", "s", cleaning.clean_text(text), text, f"my/d{i}.txt") for i, text in enumerate(texts)]
        return corpus.survey(docs).warnings

    assert warnings_of("one", "two", "one\r\n") == (
        "my/d2.txt: is the same text as my/d0.txt; leave one out, or it counts twice",
    )
    warnings = warnings_of(*["one"] * 20)
    assert len(warnings) == 6 and warnings[-1] == "14 more are copies"


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
        for name, content in sources.raw_texts(source, default_manifest.folder)
    }
    for doc in default_documents:
        before = Counter(char for char in raw[doc.name].lower() if char.isalpha())
        after = Counter(char for char in doc.text.lower() if char.isalpha())
        assert not after - before, doc.name
        assert after.total() >= 0.97 * before.total(), doc.name
        assert after.total() >= 0.97 * cleaning.count_letters(doc.raw), doc.name


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
