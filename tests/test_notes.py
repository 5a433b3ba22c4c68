"""Marks of notes are left out of a page with what encloses them, and other numbers are kept."""

import pytest

from robopoet.text import markup


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<h2><a href='toc.html#c1'>1</a></h2><p>In <a href='n.html'>1865</a> it was.", "1\n\nIn 1865 it was."),
        ("<p><a href='c.html#v1'>1</a> In the <a href='#v2'>2</a> And", "1 In the 2 And"),
        ("<p>x<sup>2</sup>, km<sup>2</sup>, <sup>3</sup>Then, 2<sup>nd</sup>", "x2, km2, 3Then, 2nd"),
        ("<p><a href='https://a.org/#n2'>2</a>, [<a href='#c'>1865</a>], (<a href='#c'>7</a>)", "2, [1865], (7)"),
        ("<p>So<a epub:type=noteref href='#x'>[1]</a> he [<a href='#n2'>2</a>] at once.<sup>3</sup>", "So he at once."),
        ("<p>So [<a href='#n2'>2</a>] <i>it</i> is", "So it is"),
        ("<p>So [<a href='#n2'>2</a>, <a href='#x'>3</a>]. [<a href='#n2'>2</a>;<a href='#n3'>3</a>] so", "So. so"),
        ("<p>Only<a href='c.html#filepos12'>1</a> so<a href='#c01-note-0002'>2</a>", "Only so"),
        ("<div><span>[</span><a role=doc-backlink href='#r'>1</a><span>]</span> <p>A note.</div>", "A note."),
        ("<p><a href='#r2'>2</a>. Another.<p>[<a href='#fnref3'>3</a>] And <a href='#r3'>↩</a>", "Another.\n\nAnd"),
        ("<p>So (<a href='notes.html#x'>12</a>), he said<a href='#x7'><sup>7</sup></a>, late", "So, he said, late"),
        ("<p>So<a href='#_ftn4'>4</a> it<a href='b.html#fn-5'>5</a> is<a href='#cite_note-6'>[6]</a>.", "So it is."),
        ("<p>So<a href='#x9'>9</a> it is.<p>Chapter <a href='#x8'>8</a><aside epub:type=footnote id=x9>A note",
         "So it is.\n\nChapter 8\n\nA note"),
        ("<p>So<a href='#note-a'><sup>a</sup></a> it<sup><a href='#fn_iv'>[iv]</a></sup> <a href='#note-i'>i</a>s"
         "<a href='#b'><sup>b</sup></a>, M<sup>r</sup>", "So it isb, Mr"),
        ("<p>So <a href='#x9'>9</a> it is.<ol class=footnotes><li><a id=x9 href='#x'>9</a>. A note",
         "So it is.\n\nA note"),
    ],
)  # fmt: skip
def test_a_note_mark_is_known_by_where_it_leads(page, text, monkeypatch):
    assert markup.html_text(page) == text
    monkeypatch.setattr(markup, "FED", 1)
    assert markup.html_text(page) == text
