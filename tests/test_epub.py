"""EPUBs that are not quite EPUB are read as reading programs do, and what of a book is not read is told by file."""

import pytest
from test_books import CONTAINER, FILES, OPF, epub

from robopoet.errors import DataError
from robopoet.text import books, corpus

WHOLE = "One\n\nIt was late.\n\nTwo\n\nIt was later still."
ONE = FILES["OEBPS/text/one.xhtml"]


def moved(place: str) -> dict[str, str | None]:
    """The changes to FILES that move the first chapter to `place`."""
    return {"OEBPS/text/one.xhtml": None, place: ONE}


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("one.xhtml", "one.xhtml#start", {}),
        ("one.xhtml", "one.xhtml?page=1#start", {}),
        ("text/one.xhtml", "/OEBPS/text/one.xhtml", {}),
        ("text/one.xhtml", "/text/one.xhtml", {}),
        ("text/one.xhtml", "text\\one.xhtml", {}),
        ("text/one.xhtml", "./text/../text/one.xhtml", {}),
        ("text/one.xhtml", "Text/One.XHTML", {}),
        ("text/one.xhtml", "../../OEBPS/text/one.xhtml", {}),
        ("", "", moved("OEBPS\\text\\one.xhtml")),
        ("text/one.xhtml", "text/\xe9.xhtml", moved("OEBPS/text/e\u0301.xhtml")),
        ("text/one.xhtml", "text/e%CC%81.xhtml", moved("OEBPS/text/\xe9.xhtml")),
        ("text/one.xhtml", "text/a%20b.xhtml", moved("OEBPS/text/a%20b.xhtml")),
        ("text/one.xhtml", "text/a#1.xhtml", moved("OEBPS/text/a#1.xhtml")),
        ("text/one.xhtml", "text/a&b.xhtml", moved("OEBPS/text/a&b.xhtml")),
        ("text/one.xhtml", "text/&eacute;.xhtml", moved("OEBPS/text/\xe9.xhtml")),
        ("text/one.xhtml", "\ntext/one.xhtml ", {}),
        ("<metadata/>", "<metadata><publisher>Simon & Co&nbsp;&hellip;</publisher></metadata>", {}),
        ("<metadata/>", "<metadata><title>A < B</title></metadata>", {}),
        ('<?xml version="1.0"?>', '\n\n<?xml version="1.0"?>', {}),
        ('<?xml version="1.0"?>', '\ufeff\n<?xml version="1.0"?>', {}),
        ('<item id="pic"', "<item", {}),
        ('<item id="pic" href="p.png"', '<item id="pic"', {}),
        ('href="text/one.xhtml" media-type="application/xhtml+xml"', 'href="text/one.xhtml"', {}),
        ('<itemref idref="cover"/>', '<itemref idref="none"/><itemref/><itemref idref="cover"/>', {}),
        ("item", "opf:item", {}),
        ("item ", "ITEM ", {}),
        ('idref="a"', 'idref="A"', {}),
        ("one.xhtml", "%E9.xhtml", moved("OEBPS/text/\xe9.xhtml")),
        ("", "", {"OEBPS/book.opf": OPF.replace("?>", " encoding='utf-16'?>", 1).encode("utf-16")}),
        ("", "", {"OEBPS/book.opf": OPF.replace("?>", " encoding='utf-16'?>", 1)}),
        ("", "", {"OEBPS/book.opf": OPF.replace("<metadata/>", "<metadata>\xe9</metadata>").encode("latin-1")}),
        (
            "",
            "",
            {
                "META-INF/container.xml": CONTAINER.replace("<rootfile ", '<rootfile full-path="a.pdf"/><rootfile ', 1),
                "a.pdf": b"%PDF",
            },
        ),
        ("", "", {"OEBPS/book.opf": OPF.replace("?>", " encoding='utf-16'?>", 1).encode("utf-16-le")}),
        ("", "", {"META-INF/container.xml": None}),
        ("", "", {"META-INF/container.xml": None, "__MACOSX/._b.opf": b"\0\5\x16\7", "__MACOSX/._b.html": b"\0\5"}),
        ("", "", {"META-INF/container.xml": "<container/>"}),
        ("", "", {"META-INF/container.xml": CONTAINER.replace("OEBPS/", "/OEBPS/")}),
        ("", "", {"META-INF/container.xml": CONTAINER.replace("OEBPS", "oebps")}),
        ("", "", {"META-INF/container.xml": "\n<?xml version='1.0'?>" + CONTAINER}),
        ("", "", {"META-INF/container.xml": None, "META-INF\\container.xml": CONTAINER}),
    ],
)
def test_an_epub_with_flaws_is_read_as_reading_programs_do(old, new, changed):
    assert books.read("a.epub", epub({"OEBPS/book.opf": OPF.replace(old, new) if old else OPF} | changed))[0] == WHOLE


def test_an_epub_may_be_a_folder_in_its_zip():
    nested = {f"My Book/{name}": content for name, content in FILES.items()} | dict.fromkeys(FILES)
    assert books.read("a.epub", epub(nested))[0] == WHOLE


def test_names_in_utf8_that_are_not_marked_so_are_found():
    name = "OEBPS/text/\xe9.xhtml".encode()
    content = epub({"OEBPS/text/one.xhtml": None, name.decode(): ONE} | opf("one.xhtml", "\xe9.xhtml"))
    for record, flags, length in ((b"PK\3\4", 6, 30), (b"PK\1\2", 8, 46)):  # its head, of this length, has the flags
        place = content.index(name, content.index(record)) - length
        while not content.startswith(record, place):
            place = content.index(name, place + length + 1) - length
        assert content[place + flags : place + flags + 2] == b"\0\x08"
        content = content[: place + flags] + b"\0\0" + content[place + flags + 2 :]
    assert books.read("a.epub", content)[0] == WHOLE


def opf(old: str, new: str) -> dict[str, str]:
    """FILES' package with `new` for `old`."""
    assert old in OPF
    return {"OEBPS/book.opf": OPF.replace(old, new)}


def read_with_losses(changed: dict[str, str | bytes | None]) -> tuple[str, dict[str, tuple[int, int]]]:
    losses = {}
    return books.read("a.epub", epub(changed), losses=losses)[0], losses


USUAL = {"OEBPS/cover.xhtml": (6, 6), "OEBPS/notes.xhtml": (5, 5)}  # what FILES' text lacks
ITEM = 'href="text/one.xhtml" media-type="application/xhtml+xml"'


MEDIA = (
    "text/xml application/xml APPLICATION/XHTML+XML text/html text/x-oeb1-document application/x-dtbook+xml "
    "application/xhtml+xml;charset=utf-8 application/octet-stream image/png"
)


@pytest.mark.parametrize("media", MEDIA.split())
def test_a_chapter_is_read_whatever_its_media_type(media):
    assert read_with_losses(opf(ITEM, f'href="text/one.xhtml" media-type="{media}"')) == (WHOLE, USUAL)


def test_chapters_in_dtbook_and_plain_text_are_read():
    dtbook = (
        "<?xml version='1.0'?><dtbook xmlns='http://www.daisy.org/z3986/2005/dtbook/'><head><title>T</title></head>"
        "<book><bodymatter><level1><pagenum>12</pagenum><h1>One</h1><p>It was<noteref idref='n'>1</noteref> late.</p>"
        "<poem><line>So</line><line>late</line></poem></level1></bodymatter></book></dtbook>"
    )
    changed = opf(ITEM, 'href="one.xml" media-type="application/x-dtbook+xml"') | {"OEBPS/one.xml": dtbook}
    text = WHOLE.replace("late.", "late.\n\nSo\nlate")
    assert books.read("a.epub", epub(changed))[0] == text
    changed = opf(ITEM, 'href="one.txt" media-type="text/plain"') | {"OEBPS/one.txt": "\ufeffI <3 you\n  so.\n"}
    assert books.read("a.epub", epub(changed))[0].startswith("I <3 you\n  so.\n\nTwo")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('<itemref idref="a"/>', '<itemref idref="a" linear="no"/>'),
        (ITEM, f'{ITEM} properties="nav"'),
        ("one.xhtml#toc", "one.xhtml"),
        (ITEM, 'href="p.svg" media-type="image/svg+xml" fallback="x"/><item id="x" href="text/one.xhtml"'),
    ],
)
def test_a_chapter_is_read_whatever_else_the_book_calls_it(old, new):
    assert read_with_losses(opf(old, new)) == (WHOLE, USUAL)


def test_a_book_whose_every_page_is_said_to_be_beside_it_is_read():
    text, losses = read_with_losses(opf("<itemref ", '<itemref linear="no" '))
    assert text == WHOLE and losses == USUAL
    text, _ = read_with_losses({"OEBPS/text/one.xhtml": "", "OEBPS/text/two b.xhtml": ""})
    assert text == "A cover\n\n1. A note"


def test_pages_of_links_are_contents_and_pages_with_text_are_not():
    page = "<body><p>Contents</p>" + "<p><a href='text/one.xhtml'>The first chapter</a></p>" * 9
    changed = opf("text/one.xhtml#toc", "toc.xhtml")["OEBPS/book.opf"].replace('href="cover.xhtml"', 'href="toc.xhtml"')
    changed = {"OEBPS/book.opf": changed, "OEBPS/toc.xhtml": page, "OEBPS/cover.xhtml": None}
    losses = {"OEBPS/toc.xhtml": (8, 8 + 9 * 15), "OEBPS/notes.xhtml": (5, 5)}
    assert read_with_losses(changed) == (WHOLE, losses)
    entries = "".join(f"<p><a href='text/{i}.xhtml'>The first fox</a></p>" for i in range(9))
    listed = changed | {"OEBPS/toc.xhtml": f"<body><p>Contents</p>{entries}<p>By nobody"}
    losses["OEBPS/toc.xhtml"] = (8, 8)
    assert read_with_losses(listed) == (WHOLE, losses)
    changed["OEBPS/toc.xhtml"] += "<p>" + "It was the first chapter of many. " * 9
    assert read_with_losses(changed)[0].endswith(WHOLE) and len(read_with_losses(changed)[0]) > 500


def test_every_file_that_loses_letters_is_told(tmp_path):
    lost = {
        "OEBPS/extra.html": "<p>Nobody lists this.</p>",
        "OEBPS/broken.html": b"caf\xe9",
        "OEBPS/text/one.xhtml": ONE.replace("<h1>", "<nav>Go on <a href='b'>to the next</a></nav><h1>"),
    }
    remote = opf('href="text/two%20b.xhtml"', 'href="https://example.org/b.xhtml"')
    text, losses = read_with_losses(lost | remote)
    unread = dict.fromkeys(("https://example.org/b.xhtml", "OEBPS/broken.html"), (0, 0))
    one, two = {"OEBPS/text/one.xhtml": (4, 16)}, {"OEBPS/text/two b.xhtml": (18, 18)}
    assert text == "One\n\nIt was late." and losses == USUAL | unread | one | two | {"OEBPS/extra.html": (15, 15)}

    (tmp_path / "a.epub").write_bytes(epub(lost | remote))
    survey = corpus.survey(corpus.documents(corpus.manifest_of_files((str(tmp_path),))))
    assert (survey.letters, survey.raw_letters) == (12, 12 + 6 + 5 + 15 + 4 + 18)
    (line,) = survey.warnings
    assert line == (
        f"{tmp_path}/a.epub: is read without 18 of the 18 letters in OEBPS/text/two b.xhtml, 15 of the 15 letters in "
        "OEBPS/extra.html, 6 of the 6 letters in OEBPS/cover.xhtml, 5 of the 5 letters in OEBPS/notes.xhtml, "
        "4 of the 16 letters in OEBPS/text/one.xhtml, what 2 more files hold"
    )


def test_a_number_that_leads_to_a_note_in_another_file_is_its_mark():
    page = "<p>It was<a href='../notes.xhtml#x1'>1</a> late in <a href='../text/two%20b.xhtml#x2'>2</a>.</p>"
    changed = {"OEBPS/text/one.xhtml": page.replace("notes", "end"), "OEBPS/notes.xhtml": None}
    changed["OEBPS/end.xhtml"] = "<section role='doc-endnotes'><p id='x1'>A note</p></section>"
    changed |= opf("notes.xhtml", "end.xhtml")
    assert books.read("a.epub", epub(changed))[0].startswith("It was late in 2.\n\nTwo\n\n")


def test_text_in_pictures_is_told():
    changed = opf(ITEM, 'href="one.svg" media-type="image/svg+xml"')
    changed |= {"OEBPS/text/one.xhtml": None, "OEBPS/one.svg": "<svg><text>It was late.</text></svg>"}
    assert read_with_losses(changed)[1] == USUAL | {"OEBPS/one.svg": (9, 9)}


def test_a_file_of_which_nothing_is_read_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "a.html").write_text("<noscript>It was late.</noscript>")
    with pytest.raises(DataError, match=r"a.html: holds no text, read without 9 of the 9 letters in .*a.html$"):
        list(corpus.documents(corpus.manifest_of_files((str(tmp_path),))))
