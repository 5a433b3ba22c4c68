"""Books as people have them: encodings, HTML, EPUB, Parquet; and hostile ones."""

import html
import io
import random
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import read_all, within
from hypothesis import given, settings
from hypothesis import strategies as st

from robopoet.errors import DataError
from robopoet.text import books, corpus, layout, markup
from robopoet.text.tokenizer import BPETokenizer

SENTENCES = {
    "fr": (
        "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient si "
        "vite que je n’avais pas le temps de me dire : « Je m’endors. » Et, une demi-heure après, la pensée qu’il "
        "était temps de chercher le sommeil m’éveillait."
    ),
    "de": (
        "Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett zu einem "
        "ungeheueren Ungeziefer verwandelt. Er lag auf seinem panzerartig harten Rücken und sah, wenn er den Kopf ein "
        "wenig hob, seinen gewölbten, braunen, von bogenförmigen Versteifungen geteilten Bauch, auf dessen Höhe sich "
        "die Bettdecke, zum gänzlichen Niedergleiten bereit, kaum noch erhalten konnte. Seine vielen, im Vergleich zu "
        "seinem sonstigen Umfang kläglich dünnen Beine flimmerten ihm hilflos vor den Augen. »Was ist mit mir "
        "geschehen?«, dachte er. Es war kein Traum. Sein Zimmer lag ruhig zwischen den vier wohlbekannten Wänden; über "
        "dem Tisch hing das Bild, das er kürzlich in einem hübschen Rahmen untergebracht hatte."
    ),
    "ru": (
        "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. Все смешалось в "
        "доме Облонских."
    ),
    "pl": (
        "Litwo! Ojczyzno moja! ty jesteś jak zdrowie: Ile cię trzeba cenić, ten tylko się dowie, Kto cię stracił. "
        "Dziś piękność twą w całej ozdobie Widzę i opisuję, bo tęsknię po tobie. Panno święta, co Jasnej bronisz "
        "Częstochowy I w Ostrej świecisz Bramie! Ty, co gród zamkowy Nowogródzki ochraniasz z jego wiernym ludem!"
    ),
    "ja": (
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いて"
        "いた事だけは記憶している。吾輩はここで始めて人間というものを見た。"
    ),
    "zh": "道可道,非常道。名可名,非常名。无名天地之始;有名万物之母。故常无欲,以观其妙;常有欲,以观其徼。",
    "ar": "كان يا ما كان في قديم الزمان وسالف العصر والأوان ملك من ملوك الساسان بجزائر الهند والصين صاحب جند وأعوان",
    "emoji": "She wrote 😀 and then 👩‍👩‍👧‍👦, then 🇫🇷, and at last a flag 🏳️‍🌈 of e\u0301 and \U0001f1ef\U0001f1f5.",
}


@pytest.mark.parametrize("text", SENTENCES.values(), ids=SENTENCES)
def test_every_script_round_trips(text):
    tok = BPETokenizer.train([text * 3], 300, [])
    ids = list(tok.encode(text))
    assert tok.decode_bytes(ids).decode() == text and len(ids) < len(text.encode())


# --- HTML


def test_html_is_laid_out_as_a_browser_does():
    page = """<html><head><title>Not the text</title><style>p {}</style></head><body><nav>Contents</nav>
    <h1>I.  The
    pool</h1><p>It  was <i>so</i> late&mdash;</p><p>M<sup>r</sup> Su&shy;per&nbsp;man</p>
    <div>Roses are red,</div><div>&nbsp;violets blue</div><p>a<br>b<br/><br>c</p><ul><li>one<li>two</ul>
    <table><tr><td>1</td><td>2</td></tr><tr><td>3</td></tr></table><script>alert(1)</script><p hidden>no</p>
    <pre>x\n  y</pre></body></html>"""
    assert markup.html_text(page) == (
        "I. The pool\n\nIt was so late—\n\nMr Super man\n\nRoses are red,\n violets blue\n\na\nb\n\nc\n\none\ntwo\n\n"
        "1 2\n3\n\nx\n  y"
    )


@pytest.mark.parametrize(
    "page",
    [
        "<form method=post action=p.aspx><p>{}</p></form><p>Footer.</p>",
        "<p><button>{}</button></p><p>Footer.</p>",
        "<object data=x.swf><p>{}</p></object><p>Footer.</p>",
        "<body class=toc><p>{}</p><p>Footer.</p>",
        "<html class='cover'><body class='cover toc'><p>{}</p><p>Footer.</p>",
        "<div class=toc><p>{}</p></div><p>Footer.</p>",
        "<h2 class=toc><a href='#toc'>{}</a></h2><p>Footer.</p>",
        "<h1 class='cover'>{}</h1><p>Footer.</p>",
        "<p class=head>{}</p><p class=nav>Footer.</p>",
        "<noframes><body><p>Old</p></body></noframes><noembed><p>Old</p></noembed><p>{}</p><p>Footer.</p>",
    ],
)
def test_what_a_reader_of_a_page_sees_is_read(page):
    assert markup.html_text(page.format("It was a dark night.")) == "It was a dark night.\n\nFooter."


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<h2>One<span class=mw-editsection>[<a href=e>edit</a>]</span></h2><p class=noprint>Log in<p>It", "One\n\nIt"),
        ("<div role=navigation><h3>This page</h3><a href=s>Source</a></div><p>It was.", "It was."),
        ("<p>If <math><mi>x</mi><mo>=</mo><mn>2</mn><annotation>x=2</annotation></math> then", "If x=2 then"),
    ],
)
def test_what_a_page_has_for_its_readers_tools_is_left_out(page, text):
    assert markup.html_text(page) == text


def test_a_page_is_one_whatever_its_files_name():
    page = b"\n<?xml version='1.0'?>\n<!doctype html>\n<html><body><p>It was.</p>"
    assert books.read("a.txt", page) == ("It was.", "")
    assert books.read("a.txt", b"<htmls> are <html>") == ("<htmls> are <html>", "")


@pytest.mark.parametrize("element", ["<div class=toc>{}</div>", "<ul epub:type=toc>{}</ul>", "<nav>{}</nav>"])
def test_lists_of_links_are_left_out(element):
    links = "Contents: " + "<li><a href='#c'>The first chapter</a>" * 3
    losses = {}
    page = f"<p>It was{element.format(links)}<p>a dark night.".encode()
    assert books.read("a.html", page, losses=losses) == ("It was\n\na dark night.", "")
    assert losses == {"a.html": (8, 8 + 15)}


def test_text_in_cdata_is_read():
    page = "<p><![CDATA[It was <late> & ]]>dark.<![CDATA[ So]]></p><script>//<![CDATA[\nlet a;\n//]]></script>"
    assert markup.html_text(page + "<p>So<![CDATA[it ended</p>") == "It was <late> & dark. So\n\nSoit ended"
    with within(5):
        markup.html_text("<![CDATA[" * 200_000)


def test_a_prefixed_page_is_laid_out_like_any_other():
    page = "<h:html xmlns:h='x'><h:head><h:title>T</h:title></h:head><h:h1>One</h:h1><h:p>It was.</h:p></h:html>"
    assert markup.html_text(page) == "One\n\nIt was."


def test_marks_of_notes_and_pages_are_left_out_and_numbers_kept():
    page = """<p>The sea<a href="#n1"><sup>1</sup></a> is<sup><a href="#n2">[12]</a></sup> wide<a href="#n3">*</a>,
    <span class="pagenum">[Pg 7]</span>in <a href="#y">1843</a>, 5 <a epub:type="noteref" href="#n">see note</a>the
    2<sup>nd</sup> <a href="x">ship</a> had 12 guns.</p>"""
    assert " ".join(markup.html_text(page).split()) == "The sea is wide, in 1843, 5 the 2nd ship had 12 guns."


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs"), exclude_characters="\xa0"), max_size=200))
def test_any_text_survives_html(text):
    kept = " ".join(filter(None, text.split(" ")))
    assert markup.html_text(f"<div><p>{html.escape(text)}</p>\n</div>") == kept


# --- EPUB

CONTAINER = """<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""
OPF = """<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata/><manifest>
<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>
<item id="cover" href="cover.xhtml" media-type="application/xhtml+xml"/>
<item id="b" href="text/two%20b.xhtml" media-type="application/xhtml+xml"/>
<item id="a" href="text/one.xhtml" media-type="application/xhtml+xml"/>
<item id="notes" href="notes.xhtml" media-type="application/xhtml+xml"/>
<item id="pic" href="p.png" media-type="image/png"/></manifest>
<spine><itemref idref="cover"/><itemref idref="nav"/><itemref idref="a"/><itemref idref="b"/>
<itemref idref="notes" linear="no"/><itemref idref="pic"/></spine>
<guide><reference type="cover" href="cover.xhtml"/><reference type="toc" href="text/one.xhtml#toc"/></guide>
</package>"""
FILES = {
    "META-INF/container.xml": CONTAINER,
    "OEBPS/book.opf": OPF,
    "OEBPS/nav.xhtml": "<nav><a href='text/one.xhtml'>One</a></nav>",
    "OEBPS/cover.xhtml": "<p>A cover</p>",
    "OEBPS/text/one.xhtml": "<?xml version='1.0' encoding='utf-8'?><html><head><title/></head><body><h1>One</h1>"
    "<script src='x'/><p>It was late.</p></body></html>",
    "OEBPS/text/two b.xhtml": "<html><body><h1>Two</h1><p>It was later&nbsp;still.</p></body></html>",
    "OEBPS/notes.xhtml": "<p>1. A note</p>",
}


def epub(changed: dict[str, str | bytes | None] | None = None) -> bytes:
    """An EPUB of FILES; changed: other contents of these, or None: without that one."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (FILES | (changed or {})).items():
            if content is not None:
                archive.writestr(name, content)
    return packed.getvalue()


def test_an_epub_is_read_in_the_order_of_its_spine():
    assert books.read("a.epub", epub()) == ("One\n\nIt was late.\n\nTwo\n\nIt was later still.", "")


def test_a_work_has_the_same_words_as_text_html_and_epub(tmp_path):
    paragraphs = [f"{SENTENCES[language]} {i}." for i in range(5) for language in ("fr", "ja", "emoji")]
    page = "<html><body>" + "".join(f"<p>{html.escape(p)}</p>" for p in paragraphs) + "</body></html>"
    (tmp_path / "text.txt").write_text("\n\n".join(paragraphs))
    (tmp_path / "page.HTML").write_text(page)
    (tmp_path / "book.epub").write_bytes(epub({"OEBPS/text/one.xhtml": page, "OEBPS/text/two b.xhtml": "<p/>"}))
    texts = {doc.name: doc.text for doc in corpus.documents(corpus.manifest_of_files((str(tmp_path),)))}
    assert texts["text"] == texts["page"] == texts["book"]


ENCRYPTION = (
    '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><EncryptedData>%s</EncryptedData></encryption>'
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"META-INF/encryption.xml": ENCRYPTION % '<EncryptionMethod Algorithm="x#aes128-cbc"/>'},
            r"is encrypted \(DRM",
        ),
        ({"META-INF/container.xml": None, "OEBPS/book.opf": None}, r"is damaged or no EPUB \(no .opf file lists"),
        ({"OEBPS/text/one.xhtml": None}, "lacks 'OEBPS/text/one.xhtml', which it names"),
        ({"OEBPS/book.opf": OPF.replace("text/one.xhtml", "../../../etc/passwd")}, "lacks '../../etc/passwd'"),
        ({"OEBPS/book.opf": OPF.replace("itemref", "item")}, r"is damaged or no EPUB \(its package lists no chapters"),
        ({"OEBPS/book.opf": OPF[:300]}, "is damaged or no EPUB"),
        ({"OEBPS/book.opf": ""}, "is damaged or no EPUB"),
        ({"OEBPS/text/one.xhtml": b"caf\xe9"}, "text/one.xhtml: byte 3 is not UTF-8"),
        ({"OEBPS/text/one.xhtml": b"a" * 60_000_000}, "unpacks to over"),
        ({"OEBPS/book.opf": b"a" * 60_000_000}, "unpacks to over"),
        ({f"{i}": b"" for i in range(20_001)}, r"holds 20,\d\d\d files, may hold at most 20,000"),
    ],
)
def test_an_epub_that_can_not_be_read_is_refused(changed, message):
    with within(5), pytest.raises(DataError, match=f"^a.epub: (OEBPS/)?{message}"):
        books.read("a.epub", epub(changed))


def test_fonts_may_be_obfuscated():
    listed = ENCRYPTION % '<EncryptionMethod Algorithm="http://www.idpf.org/2008/embedding"/>'
    assert books.read("a.epub", epub({"META-INF/encryption.xml": listed})) == books.read("a.epub", epub())


def test_entities_are_neither_expanded_nor_fetched(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(12))
    doctype = f'<!DOCTYPE package [{laughs}<!ENTITY secret SYSTEM "{secret.as_uri()}">]>'
    package = OPF.replace("<package", f"{doctype}<package").replace("<metadata/>", "<m x='&l11;'>&l11;&secret;</m>")
    page = f"{doctype}<html><body><p>It was &secret; &l11; late.</p></body></html>"
    with within(5):
        try:
            text, _ = books.read("a.epub", epub({"OEBPS/book.opf": package, "OEBPS/text/one.xhtml": page}))
        except DataError as e:
            text = str(e)
    assert "the secret" not in text and "haha" not in text and len(text) < 200


@pytest.mark.parametrize(
    "unit", ["<", "<a ", "<!--", "&", '<a x="', "<script>", "<p>x", "<div>", "&#", "<a href='#'>1"]
)
def test_hostile_html_takes_time_linear_in_its_length(unit):
    with within(30):  # a second each; minutes if it were quadratic
        markup.html_text(unit * 200_000)


@pytest.mark.parametrize("page", ["<div>{0}</p>{0}", "<div><p>{0}</p></div>{0}", "<div><a>x{0}</a>{0}"])
def test_elements_nested_so_deep_that_closing_them_takes_minutes_are_refused(page):
    opened, closed, _ = page.split("{0}")
    with pytest.raises(DataError, match=r"a\.html: nests its elements too deep, [\d,]+ are open at once"):
        books.read("a.html", (opened * 30_000 + closed * 30_000).encode())


@pytest.mark.parametrize("unit", ["<font>x", "<div><p>x</p>", "<b>x<br>", "<a name=x>x", "<a href=x></a>", "<ul><li>x"])
def test_elements_that_are_never_closed_are_read(unit):
    assert markup.html_text(unit * 5000).count("x") == 5000 * ("x" in unit.replace("=x", ""))


def test_a_page_is_the_same_text_however_it_is_parsed(monkeypatch):
    page = "".join(
        f"<p>Page {i}, <i>caf\xe9 &amp;\xa0x</i>\r\n<a href='#n'>[{i}]</a><pre>a\n  b</pre><!-- {i} -->"
        for i in range(200)
    )
    expected = markup.html_text(page)
    for fed in (1, 7, 10**6):
        monkeypatch.setattr(markup, "FED", fed)
        assert markup.html_text(page) == expected


def test_nested_links_are_joined_only_where_they_may_be_notes(monkeypatch):
    joined = []
    monkeypatch.setattr(layout, "NOTE_MARK", SimpleNamespace(fullmatch=joined.append))
    markup.html_text("<div><a>word " * 500 + "</a></div>" * 500)
    assert sum(map(len, joined)) <= 500 * layout.NOTE_CHARS


def test_a_chapter_is_read_once():
    spine = OPF.replace('<itemref idref="a"/>', '<itemref idref="a"/>' * 1000)
    assert books.read("a.epub", epub({"OEBPS/book.opf": spine})) == books.read("a.epub", epub())


def test_mutated_epubs_raise_nothing_but_data_errors():
    draw, whole = random.Random(0), epub()
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.choice([1, 3, 20])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            assert isinstance(books.read("a.epub", bytes(content[: draw.randrange(len(content) * 2)]))[0], str)
        except DataError as e:
            assert str(e).startswith("a.epub: ") and "\n" not in str(e)


# --- other files


@pytest.mark.parametrize(
    ("name", "tool"),
    [("a.pdf", "pdftotext"), ("b.MOBI", "ebook-convert"), ("c.DOC", "soffice"), ("d.txt", "pdftotext")],
)
def test_what_is_no_text_is_refused_with_the_tool_that_converts_it(tmp_path, name, tool):
    (tmp_path / name).write_bytes(b"%PDF-1.7")
    with pytest.raises(DataError, match=rf"{name}: is no text; convert it first, with .*{tool}"):
        read_all(corpus.manifest_of_files((str(tmp_path),)))


def test_parquet_is_read_row_by_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [f"tale {i} é" for i in range(2500)]
    parquet.write_table(pyarrow.table({"id": range(2500), "text": rows}), tmp_path / "a.parquet", row_group_size=400)
    docs = list(corpus.documents(corpus.manifest_of_files((str(tmp_path),))))
    assert [doc.raw for doc in docs] == rows
    assert (docs[7].name, docs[7].place) == ("a:8", f"{tmp_path}/a.parquet: row 8")

    def refused(message):
        with pytest.raises(DataError, match=message):
            list(corpus.documents(corpus.manifest_of_files((str(tmp_path),))))

    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:-20])
    refused("a.parquet: after row 0: damaged, or no Parquet file")
    offsets, text = np.array([0, 3, 6], dtype="<i4"), b"abcd\xffe"
    column = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(text)]
    )
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    refused(r"a.parquet: after row 0: damaged, .*UTF8.* index 1")
    for table, message in (({"words": rows}, "found words"), ({"text": [1]}, "found text"), ({"text": []}, "text")):
        parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
        refused(f"a.parquet: .*{message}")
