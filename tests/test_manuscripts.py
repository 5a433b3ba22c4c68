"""Manuscripts: what a reader sees of .docx, .odt and .fb2, what is left out and told; and hostile ones."""

import io
import random
import zipfile

import pytest
from conftest import within

from robopoet.errors import DataError
from robopoet.text import books, corpus

RELS = '<Relationships><Relationship Type="x/officeDocument" Target="%s"/></Relationships>'
PADDING = {"picture.png": random.Random(0).randbytes(600_000)}  # so that much may be unpacked


def zipped(members: dict[str, str | bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def word(tag: str, body: str) -> str:
    return f'<w:{tag} xmlns:w="urn:w" xmlns:mc="urn:mc" xmlns:m="urn:m">{body}</w:{tag}>'


def docx(body: str, beside: dict[str, str] | None = None, text: str = "word/document.xml") -> bytes:
    """A .docx with `body`, written with <p> for <w:p>, and so on; beside: other files of it."""
    body = word("document", f"<w:body>{prefixed(body)}</w:body>")
    return zipped({"_rels/.rels": RELS % text, text: body} | (beside or {}))


def prefixed(body: str) -> str:
    return body.replace("</", "\0").replace("<", "<w:").replace("\0", "</w:").replace("w:mc:", "mc:")


def line(text: str, marks: str = "") -> str:
    return f"<p>{marks}<r><t>{text}</t></r></p>"


def odt(body: str, styles: str = "", head: str = "") -> bytes:
    names = " ".join(f'xmlns:{prefix}="urn:{prefix}"' for prefix in "office text table draw svg style".split())
    content = f"<office:document-content {names}>{head}<office:body>{body}</office:body></office:document-content>"
    styles = f"<office:document-styles {names}>{styles}</office:document-styles>"
    return zipped({"content.xml": content, "styles.xml": styles})


def fb2(body: str, declared: str = "utf-8") -> bytes:
    book = f"<?xml version='1.0' encoding='{declared}'?><FictionBook xmlns:l='l'>{body}</FictionBook>"
    return book.encode(declared)


def read(name: str, content: bytes):
    losses, counts = {}, books.Counter()
    text, told = books.read(name, content, losses=losses, page_matter=counts)
    return text, told, {path: tuple(loss) for path, loss in losses.items()}, dict(counts)


LONG = "It was late, and nobody who had been on the road that night would speak of it before the morning came."


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (line(LONG) + line("So.") + "<p/>" + line("He"), f"{LONG}\n\nSo.\n\nHe"),
        (line("Red,") + line("blue;") + "<p/>" + line("sugar,") + line("you."), "Red,\nblue;\n\nsugar,\nyou."),
        (line(LONG) + "<p><r><tab/><t>So  it</t><br/><t> went.</t></r></p>", f"{LONG}\n\nSo  it\n went."),
        ("<p><r><t>I</t></r></p>" + line("  had"), "I\n  had"),
        ("<p><pPr><tabs><tab/></tabs></pPr><r><t>a</t><tab/><t>b</t><br type='page'/><t>c</t></r></p>", "a\tb\n\nc"),
        (
            "<p><r><t>re</t><noBreakHyphen/><t>do su</t><softHyphen/><t>per\xa0\xad\x0bman</t></r></p>",
            "re-do super man",
        ),
        ("<p><r><sym font='Symbol' char='F061'/><sym font='Wingdings' char='F04A'/><sym char='00e9'/></r></p>", "αé"),
        (line("No ") + line("I", "<pPr><framePr dropCap='drop'/></pPr>") + line("t was."), "No\nIt was."),
        (line("It ", "<pPr><rPr><del/></rPr></pPr>") + line("was."), "It was."),
        ("<p><hyperlink><r><t>It</t></r></hyperlink><ins><r><t> was</t></r></ins></p>", "It was"),
        ("<p><moveTo><r><t>It</t></r></moveTo><smartTag><r><t> was</t></r></smartTag></p>", "It was"),
        ("<p><fldSimple instr='DATE'><r><t>May</t></r></fldSimple></p>", "May"),
        ("<p><r><rPr><vanish val='0'/><rPrChange><rPr><vanish/></rPr></rPrChange></rPr><t>It</t></r></p>", "It"),
        (
            f"<tbl><tr><tc>{line('1')}</tc><tc>{line('2')}</tc></tr><tr><tc>{line('3')}</tc></tr></tbl>" + line("End."),
            "1 2\n3\n\nEnd.",
        ),
        ("<tbl><tr><tc>" + line("1") + line("2") + "</tc></tr></tbl>", "1\n2"),
        (
            "<p><r><mc:AlternateContent><mc:Choice><txbxContent>" + line("Box.") + "</txbxContent></mc:Choice>"
            "<mc:Fallback><txbxContent>" + line("Box.") + "</txbxContent></mc:Fallback></mc:AlternateContent>"
            "<t>It was.</t></r></p>",
            "Box.\nIt was.",
        ),
        ("<p><r><ruby><rt><r><t>x</t></r></rt><rubyBase><r><t>漢</t></r></rubyBase></ruby></r></p>", "漢"),
    ],
)
def test_a_docx_is_what_its_reader_sees(body, text):
    assert read("a.DOCX", docx(body)) == (text, "", {}, {})
    assert read("a.docm", docx(body, text="/doc/text2.xml"))[0] == text


FIELD = "<r><fldChar fldCharType='{}'/></r>"


def test_a_field_shows_its_result_and_no_table_of_contents():
    begin, separate, end = map(FIELD.format, ("begin", "separate", "end"))
    toc = f"<p>{begin}<r><instrText> TO</instrText></r><r><instrText>C \\o</instrText></r>{separate}"
    inner = f"{begin}<r><instrText>PAGEREF x</instrText></r>{separate}<r><t>7</t></r>{end}"
    toc += f"<r><t>One </t></r>{inner}</p>" + line("Two 9") + f"<p>{end}</p>"
    gallery = "<sdt><sdtPr><docPartObj><docPartGallery val='Table of Contents'/></docPartObj></sdtPr>"
    gallery += "<sdtContent>" + line("Contents") + line("One 7") + "</sdtContent></sdt>"
    nested = f"<p>{begin}<r><instrText>IF </instrText></r>{begin}<r><instrText>PAGE</instrText></r>{separate}"
    nested += f"<r><t>3</t></r>{end}{separate}<r><t>It was.</t></r>{end}</p>"
    nested += f"<p>{begin}{separate}<r><t>Late</t></r>{separate}<r><t>r.</t></r>{end}{end}</p>"
    assert read("a.docx", docx(toc + gallery + nested)) == ("It was.\nLater.", "", {}, {"tables of contents": 2})
    assert read("a.docx", docx(f"<p><r><t>It</t></r>{begin}<r><t> was</t></r></p>"))[:3] == (
        "It",
        "",
        {"word/document.xml": (3, 5)},
    )


def test_what_is_left_out_of_a_docx_is_told():
    body = "<p><r><t>It was</t></r><r><rPr><vanish/></rPr><t>hidden</t></r><r><footnoteReference id='2'/></r>"
    body += "<del><r><delText>old</delText></r></del><moveFrom><r><t>moved</t></r></moveFrom><r><t> late.</t></r></p>"
    note = "<footnote type='separator'><p><r><separator/></r></p></footnote><footnote id='2'>" + line("A note.")
    beside = {
        "word/footnotes.xml": word("footnotes", prefixed(note + "</footnote>")),
        "word/header1.xml": word("hdr", prefixed(line("ALICE 7"))),
        "word/header2.xml": word("hdr", prefixed("<p/>")),
        "word/comments.xml": word("comments", prefixed("<comment>" + line("Cut?") + "</comment>")),
        "word/styles.xml": "<",
    }
    losses = {"word/document.xml": (6, 15), "word/footnotes.xml": (5, 5)}
    counts = {"deleted revisions": 2, "notes": 1, "running heads": 1, "comments": 1}
    assert read("a.docx", docx(body, beside)) == ("It was late.", "", losses, counts)


def test_an_odt_is_what_its_reader_sees():
    head = '<style:style style:name="T1"><style:text-properties text:display="none"/></style:style>'
    body = f"""<text:tracked-changes><text:changed-region><text:insertion>
      <office:change-info><text:p>why</text:p></office:change-info></text:insertion></text:changed-region>
      <text:changed-region><text:deletion><text:p>old</text:p></text:deletion>
      </text:changed-region></text:tracked-changes><text:h>One</text:h><text:p>{LONG}
      <text:note><text:note-body><text:p>A note.</text:p></text:note-body></text:note> So <text:span> it</text:span>
      <office:annotation><text:p>Cut?</text:p></office:annotation>went<text:span
       text:style-name="T1">hidden</text:span>.
      </text:p><text:p>A<text:s text:c="3"/>b<text:tab/>c<text:line-break/>
      d<text:soft-page-break/><text:s/></text:p><text:p/><text:p>Roses,</text:p><text:p><text:s/>violets.</text:p>
      <text:section text:display="none"><text:p>secret</text:p></text:section>
      <text:table-of-content><text:p>One 7</text:p></text:table-of-content>
      <text:list><text:list-item><text:p>Item</text:p></text:list-item></text:list>
      <table:table><table:table-row><table:table-cell><text:p>1</text:p></table:table-cell><table:table-cell>
      <text:p>2</text:p></table:table-cell></table:table-row></table:table>
      <text:p><draw:frame><svg:title>picture</svg:title><draw:text-box><text:p>Box.</text:p></draw:text-box></draw:frame>
      </text:p><text:p>By <text:title>Title</text:title></text:p>"""
    running_head = "<style:header><text:p>ALICE <text:page-number>7</text:page-number></text:p></style:header>"
    text = f"One\n\n{LONG} So it went.\n\nA   b\tc\nd\n\nRoses,\n violets.\nItem\n\n1 2\n\nBox.\n\nBy Title"
    counts = {"deleted revisions": 1, "notes": 1, "comments": 1, "tables of contents": 1, "running heads": 1}
    content = odt(body, running_head, head)
    found = read("a.odt", content)
    assert (found[0], found[1], found[3]) == (text, "", counts)
    assert found[2] == {"content.xml": (5 + 12, 5 + 12 + books.count_letters(text))}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        flat = archive.read("content.xml").replace(b"document-content", b"document")
    assert read("a.fodt", flat)[0] == read("a.ott", content)[0] == text


@pytest.mark.parametrize("declared", ["utf-8", "windows-1251", "utf-16"])
def test_an_fb2_is_what_its_reader_sees(declared):
    book = fb2(
        """<description><title-info><book-title>Имя</book-title></title-info></description><body><title><p>Книга</p>
        <p>Первая</p></title><section><epigraph><p>Быть</p><text-author>Поэт</text-author></epigraph><p>Была <a
        l:href="#n1" type="note">[1]</a>тёмная,\x0b <strong><emphasis>тихая</strong></emphasis>
        ночь&nbsp;&mdash; & дождь.</p><empty-line/><poem><stanza><v>Розы,</v>
        <v>фиалки;</v></stanza><stanza><v>сахар.</v></stanza></poem><p>Да.</p><p>Нет.</p><table><tr><td>1</td><td>2</td>
        </tr></table>Конец</section></body><body name="notes"><section id="n1"><p>Снос</p></section></body>
        <binary id="p">0KHQvdC+</binary>""",
        declared,
    )
    text = (
        "Книга\n\nПервая\n\nБыть\n\nПоэт\n\nБыла тёмная, тихая ночь — & дождь.\n\nРозы,\nфиалки;\n\nсахар.\n\nДа.\n\n"
        "Нет.\n\n1 2\n\nКонец"
    )
    for name, content, path in (
        ("a.fb2", book, "a.fb2"),
        ("a.FB2.zip", zipped({"A.fb2": book}), "A.fb2"),
        ("a.fb2", zipped({"A.fb2": book}), "A.fb2"),
    ):
        found = read(name, content)
        assert (found[0], found[2], found[3]) == (text, {path: (4, 4 + books.count_letters(text))}, {"notes": 1})
        assert ("windows-1251" in found[1] or "cp1251" in found[1]) == (declared == "windows-1251")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1", "has a password, or is a .doc; open it and save it as .docx"),
        ("a.docx", b"It was.", "is damaged or no .docx .*not a zip"),
        ("a.docx", docx(line("It"))[:200], "is damaged or no .docx"),
        ("a.docx", zipped({"a.txt": "It was."}), "is damaged or no .docx .*no item named 'word/document.xml'"),
        ("a.docx", zipped({"_rels/.rels": RELS % "x/book.xml", "x/book.xml": "<workbook/>"}), "x/book.xml: .*workbook"),
        ("a.docx", docx("<p>"), "word/document.xml: is damaged, or another kind of file .*mismatch"),
        ("a.docx", zipped({"word/document.xml": b"a" * 60_000_000}), "unpacks to over"),
        ("a.docx", zipped({f"{i}": b"" for i in range(20_001)}), "holds 20,001 files, may hold at most 20,000"),
        ("a.odt", zipped({"META-INF/manifest.xml": "<a><encryption-data/></a>"}), "has a password; open"),
        ("a.fodt", b"It was.", "is damaged, or another kind of file"),
        ("a.fb2", b"<html><p>It was.</p></html>", "is damaged, or another kind of file .*its XML is html"),
        ("a.fb2", b"<FictionBook><body><p>It</i></body>", "is damaged, or another kind of file .*mismatch"),
        ("a.fb2.zip", zipped({"a.txt": "It was."}), "is damaged or no .fb2"),
        ("a.rtf", b"{\\rtf1 It was.}", "is no text; convert it first, with soffice --convert-to docx"),
    ],
)
def test_a_manuscript_that_can_not_be_read_is_refused(name, content, message):
    with within(5), pytest.raises(DataError, match=rf"^{name}: {message}"):
        books.read(name, content)


def test_entities_of_a_manuscript_are_neither_multiplied_nor_fetched(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret")
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(12))
    for padding in ("", "x" * 300_000):
        doctype = f'<!DOCTYPE a [{laughs}<!ENTITY secret SYSTEM "{secret.as_uri()}"><!--{padding}-->]>'
        for entity in ("&l11;", "&secret;"):
            text = word("document", prefixed(line(f"It was {entity} late.")))
            with within(5):
                try:
                    found, _ = books.read("a.docx", zipped({"word/document.xml": doctype + text}))
                except DataError as e:
                    found = str(e)
            assert "the secret" not in found and "haha" not in found and len(found) < 400


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("<tbl><tr><tc>" + line("a") + line("b"), "</tc></tr></tbl>"),
        (line("It", "<pPr><rPr><del/></rPr></pPr>"), ""),
        ("<p><r><fldChar fldCharType='begin'/><instrText>x</instrText>", "</r></p>"),
        ("<sdt><sdtPr><docPartObj><docPartGallery val='Table of Contents'/>", "</docPartObj></sdtPr></sdt>"),
    ],
)
def test_a_hostile_docx_takes_time_linear_in_its_length(start, end):
    with within(30):  # a second each; minutes if it were quadratic
        books.read("a.docx", docx(start * 20_000 + end * 20_000, PADDING))


def test_a_long_manuscript_is_read_whole():
    body = "".join(line(f"{LONG} {i}") for i in range(3000)) + f"<p><r><t>{'x' * 11_000_000}</t></r></p>"
    text = books.read("a.docx", docx(body, PADDING))[0]
    assert text.count("\n\n") == 3000 and text.count("x") == 11_000_000


def test_mutated_manuscripts_raise_nothing_but_data_errors():
    draw = random.Random(0)
    wholes = {"a.docx": docx(line("It was.") * 3), "a.odt": odt("<text:p>It was.</text:p>"), "a.fb2": fb2("<body/>")}
    for name, whole in wholes.items():
        for _ in range(100):
            content = bytearray(whole)
            for _ in range(draw.choice([1, 3, 20])):
                content[draw.randrange(len(content))] = draw.randrange(256)
            try:
                assert isinstance(books.read(name, bytes(content[: draw.randrange(len(content) * 2)]))[0], str)
            except DataError as e:
                assert str(e).startswith(f"{name}: ") and "\n" not in str(e)


def test_manuscripts_are_taken_from_a_folder_with_their_losses(tmp_path):
    note = word("footnotes", prefixed("<footnote>" + line("A note.") + "</footnote>"))
    (tmp_path / "Book.DOCX").write_bytes(docx(line(LONG), {"word/footnotes.xml": note}))
    (tmp_path / "~$Book.docx").write_bytes(b"\x05Alice" + b" " * 156)  # Word's, while that is open
    (tmp_path / "book.odt").write_bytes(odt(f"<text:p>{LONG}</text:p>"))
    (tmp_path / "tale.fb2.zip").write_bytes(zipped({"a.fb2": fb2("<body><section><p>It was.</p></section></body>")}))
    manifest = corpus.manifest_of_files((str(tmp_path),))
    assert [source.style for source in manifest.sources] == ["book", "book", "tale"]
    docs = list(corpus.documents(manifest))
    assert [doc.text for doc in docs] == [f"{LONG}\n", f"{LONG}\n", "It was.\n"]
    warnings = corpus.survey(docs).warnings
    assert f"{tmp_path}/Book.DOCX: is read without 5 of the 5 letters in word/footnotes.xml" in warnings
    assert any(f"{tmp_path}/book.odt: is the same text as {tmp_path}/Book.DOCX" in warning for warning in warnings)
