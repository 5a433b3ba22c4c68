"""The style sheets of a page decide what is a line, a space, or hidden, as in a browser; hostile ones take no time."""

import os

import pytest
from conftest import within
from test_books import FILES, OPF, epub

from prepare import PrepareConfig, main
from robopoet.errors import DataError
from robopoet.text import books, markup, sources
from robopoet.text.dataset import read_meta
from robopoet.text.sources import Source

VERSE = "<p class='poem x' id=i><span>Roses</span><span class=b>are <i>red</i></span></p>"


@pytest.mark.parametrize(
    ("css", "is_verse"),
    [
        ("span{display:block}", True),
        (".poem span { color: red; display : BLOCK !important }", True),
        ("p.poem > span, h1 { display: list-item }", True),
        ("#i span{display:table}", True),
        ("p span:first-child{display:flex}", True),
        ("span + .b, span ~ span{display:block}", True),
        ("[class~=poem] > *{display:block}", True),
        ("/* } */ @charset 'x'; @font-face{src:url(a;b)} body p>span{display:block flow}", True),
        ("@media screen { @media all { span{display:block} } }", True),
        ("<!-- span{display:block} -->", True),
        ("a{content:'}span{'} span{display:block}", True),
        ("span{display:block;}.poem span{display:inline}", False),
        ("span{display:block !important}#i span{display:inline}", True),
        ("#i span{display:inline} .poem span{display:block}", False),
        ("span{display:inline} span{display:block}", True),
        ("@media print{span{display:block}} @media (max-width: 9px){span{display:block}}", False),
        ("span::before{display:block} span:hover{display:block} .poem:not(p) span{display:block}", False),
        ("div span{display:block} p > i{color:red} .POEM span{display:block} span{display:wide}", False),
        ("span{display:block", False),
        ("span:not(.x, p > b){display:block} span:not(:not(.x)){display:inline}", False),
        ("span:not(.x):not(b){display:block} p:not(.poem) span{display:inline}", True),
        (":is(b, span), h1{display:block} #i :where(.b){display:inline}", True),
        ("span[title='a,b'], span:any-link, span:nth-child(even){display:block}", True),
        ("span:nth-child(n+1){display:block} span:nth-child(-n + 3){display:inline}", False),
        ("span:nth-of-type(2){display:block} span:nth-child(3n){display:inline}", True),
        ("#i > :first-of-type{display:block} span:last-child{display:inline}", True),
    ],
)
def test_a_span_is_a_line_of_verse_where_the_style_sheets_say_so(css, is_verse):
    text = "Roses\nare red" if is_verse else "Rosesare red"
    assert markup.html_text(f"<html><head><style>{css}</style></head><body>{VERSE}") == text
    assert markup.html_text(f"{VERSE}<style type='text/css'>{css}</style>") == text  # it counts for what stands before
    assert markup.html_text(f"<style media=print>{css}</style>{VERSE}") == "Rosesare red"


STYLED = [
    ("<p><span style='display:block'>Roses</span><span style='display: block;'>are red</span>", "Roses\nare red"),
    ("<style>b+i{display:block}</style><p><b>a</b><u>b</u><i>c</i><b>d</b><i>e</i>", "abcd\ne"),
    ("<style>span{display:inline!important}</style><p>a<span style='display:block'>b</span>", "ab"),
    ("<div><b style='position:absolute'>It</b><b style='position:absolute;left:9px'>was</b></div>", "It was"),
    ("<style>div{position:absolute;top:5px}</style><div style='left:1px'>It</div><div style='left:9px'>was</div>"
     "<div style='top:9px;left:1px'>late.</div><div style='top:9px;left:1px'>So</div>", "It was\nlate.\nSo"),
    ("<p>line<span style='float:right'>20</span></p><div style='display:flex'><b>a</b><b>b</b></div>",
     "line 20\n\na b"),
    ("<p style='white-space:pre-line'>\nRoses   are\n  red\n\nvio<b>\nlets</b></p><p>x\ny",
     "Roses are\nred\n\nvio\nlets\n\nx y"),
    ("<style>p{white-space:pre-wrap}</style><p>\nRoses   are\n  red <i>\nso</i></p>", "Roses   are\n  red \nso"),
    ("<p style='display:none'>no</p>a<b style='visibility:hidden'>no</b><i hidden>no</i>b<i hidden "
     "style='display:inline'>c", "abc"),
    ("<style>body{display:none} .x{visibility:collapse}</style><body><p class=x>no</p>It was.", "It was."),
    ("<ul style='display:block'><li style='display:inline'>a</li><li style='display:inline'>b</li></ul>", "a b"),
    ("<p style='display:inline'>a</p><p style='display:inline'>b</p><b style='display:table-cell'>c</b>", "ab c"),
    ("<p>a<xmp>x <b>y</b>\n  z</xmp>b<details><summary>S</summary>T</details>U", "a\n\nx <b>y</b>\n  z\n\nb\nS\nT\nU"),
    ("<textarea>a\n  b</textarea>", "a\n  b"),
]  # fmt: skip


PREFIXED = [  # with what means HTML
    ("<x:html xmlns:x='http://www.w3.org/1999/xhtml'><x:head><x:title>T</x:title></x:head><x:body><x:h1>One</x:h1>"
     "<x:p>It was.</x:p><x:p>a<x:br/>b</x:p></x:body></x:html>", "One\n\nIt was.\n\na\nb"),
    ("<html xmlns:h='http://www.w3.org/1999/xhtml'><body><h:p>It was.</h:p><h:p>Then.</h:p>", "It was.\n\nThen."),
    ("<h:body><h:p>It was.</h:p><h:p>Then.</h:p>", "It was.\n\nThen."),
    ("<p xmlns:o='urn:schemas-microsoft-com:office'>So<o:p></o:p>on <svg:svg><svg:p>x</svg:p></svg:svg>", "Soon"),
    ("<h:html xmlns:h='http://www.w3.org/1999/xhtml'><h:style>h|p &gt; h|b{display:block}</h:style><h:p>a<h:b>b",
     "a\nb"),
]  # fmt: skip
CAPITALS = [  # drop capitals are joined to their words
    ("<p><img src='o.png' alt='O'/>nce upon a time.</p><p><span class='dropcap'>T</span>he end.</p><div class=dc>"
     "W</div><p>hen.</p>", "Once upon a time.\n\nThe end.\n\nWhen."),
    ("<p><img alt=A> long time</p><p><img alt='A picture'>x<p><img alt=C></p><p>Copyright<p><img alt=T>HE caf<img "
     "alt=é>s<p><img alt='“I'>t<p><img alt=T>The<p>caf<img alt=é></p><p>So",
     "A long time\n\nx\n\nCopyright\n\nTHE cafés\n\n“It\n\nThe\n\ncafé\n\nSo"),
    ("<p class=letter>A</p><p>noun<p>a <img alt=x> b <b style='float:left'>I</b> was", "A\n\nnoun\n\na x b I was"),
    ("<p><svg aria-label='O'><path/></svg>nce<p><img alt=''>So", "Once\n\nSo"),
    ("<div><img alt='Drop cap W'></div>\n<p>hen I went.<div style='font-size:300%'>I</div> was so.<p>It was.",
     "When I went.\n\nI was so.\n\nIt was."),
    ("<div style='float:left'>I</div><p>t was.</p><table class=initial><tr><td>T</td></tr></table><p>HE end",
     "It was.\n\nTHE end"),
    ("<p style='float:left'>‘T</p><p>is so.<p><span style='float:left'>A</span><span>lice</span>",
     "‘Tis so.\n\nAlice"),
    ("<div class=dc>W</div><p>When<div class=dropcap>O</div><p>— so<div class=x>A</div><p>noun<h1 class=dc>I</h1>s",
     "W\n\nWhen\n\nO\n\n— so\n\nA\n\nnoun\n\nI\n\ns"),
    ("<p><span class=dropcap><b>O</b></span><i>nce</i> upon<p><span class=dc>“</span><span class=dc>O</span>nce",
     "Once upon\n\n“Once"),
]  # fmt: skip


@pytest.mark.parametrize(("page", "text"), [*STYLED, *PREFIXED, *CAPITALS])
def test_a_page_is_laid_out_as_a_browser_shows_it(page, text):
    assert markup.html_text(page) == text


def linked(sheets: dict[str, str], head: str) -> str:
    page = FILES["OEBPS/text/one.xhtml"].replace("<title/>", head).replace("<p>It was late.</p>", VERSE)
    return books.read("a.epub", epub({"OEBPS/text/one.xhtml": page} | sheets))[0].partition("\n\nTwo")[0]


@pytest.mark.parametrize(
    ("sheets", "head"),
    [
        ({"OEBPS/css/a b.css": "span{display:block}"}, "<link rel='stylesheet' href='../css/a%20b.CSS?x'/>"),
        ({"OEBPS/css/a.css": "@import url('b.css');@import 'a.css';", "OEBPS/css/b.css": "span{display:block}"},
         "<link rel='stylesheet' href='../css/a.css'/>"),
        ({"OEBPS/s": "span{display:block}",
          "OEBPS/book.opf": OPF.replace("<manifest>", "<manifest><item id='s' href='s' media-type='text/css'/>")},
         "<link rel='stylesheet' href='../s'/>"),
        ({"OEBPS/a.css": "span{display:block}"}, "<style>@import '../a.css';</style>"),
        ({"OEBPS/a.css": "span{display:block}"}, "<?xml-stylesheet type='text/css' href='../a.css'?>"),
    ],
)  # fmt: skip
def test_the_style_sheets_of_a_book_count(sheets, head):
    assert linked(sheets, head) == "One\n\nRoses\nare red"
    empty = {path: content.replace("block", "") for path, content in sheets.items()}
    assert linked(empty, head) == linked({}, head) == "One\n\nRosesare red"


def test_the_style_sheets_beside_a_page_count(tmp_path):
    page = tmp_path / "a" / "b" / "page.html"
    page.parent.mkdir(parents=True)
    link = "<link rel=stylesheet href='{}'>"
    for href, place in (
        ("my%20s.css?v=1", "a/b/my s.css"),
        ("../css/s.css#x", "a/css/s.css"),
        ("x/s.css", "a/b/x/s.css"),
    ):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("span{display:block}")
        page.write_text(link.format(href) + VERSE)
        assert [doc.text for doc in sources.raw_documents(Source("a", file=str(page)), tmp_path)] == ["Roses\nare red"]
    (tmp_path / "s.css").write_text("span{display:block}")
    (tmp_path / "a/b/out.css").symlink_to(tmp_path / "s.css")
    os.mkfifo(tmp_path / "a/b/pipe.css")
    for href in (
        "../../s.css",
        "out.css",
        f"{tmp_path}/s.css",
        "pipe.css",
        "none.css",
        "https://example.org/my%20s.css",
    ):
        page.write_text(link.format(href) + VERSE)
        assert [doc.text for doc in sources.raw_documents(Source("a", file=str(page)), tmp_path)] == ["Rosesare red"]


def test_a_page_is_prepared_again_when_its_style_sheet_changes(tmp_path, capsys):
    (tmp_path / "a.html").write_text("<link rel=stylesheet href='s.css'>" + VERSE * 9)
    for css in ("", "", "span{display:block}"):
        (tmp_path / "s.css").write_text(css)
        main(PrepareConfig(input=(f"{tmp_path}/a.html",), out=str(tmp_path / "bins"), tokenizer="char"))
        is_prepared = "is prepared already" in capsys.readouterr().out
    assert not is_prepared
    assert sum(s.characters for s in read_meta(tmp_path / "bins").splits.values()) == 9 * len("Roses\nare red\n\n") - 1


@pytest.mark.slow
def test_hostile_style_sheets_take_no_long_time():
    with within(60):
        for css in ("a{" * 10**5, "'\\'" * 10**5, "a," * 10**5 + "b{display:block}", "[a=" * 10**5 + "{display:none}",
                    "a " * 10**5 + "{display:block}", "@media " * 10**5, "/*" * 10**5, "}" * 10**5,
                    ":not(" * 10**5 + "{display:none}", ":is(:not(b), i)" * 10**4 + "{display:block}",
                    "[('" * 10**5 + "{display:none}"):  # fmt: skip
            assert markup.html_text(f"<style>{css}</style><p>x") == "x"
        deep = "<style>" + "div div div div{display:block}" * 20 + "</style>" + "<div>x" * 3000
        assert markup.html_text(deep).count("x") == 3000
        siblings = "<style>p~p~p{display:inline}p+p~b{display:block}</style>" + "<p>x" * 20_000
        assert markup.html_text(siblings).count("x") == 20_000
        with pytest.raises(DataError, match=r"a.html: its style sheets ask for over 3,000,000 comparisons; refused"):
            markup.lay_out("<style>" + "*{display:block}" * 3000 + "</style>" + "<b>x</b>" * 2000, "a.html")
