"""Page matter of HTML and EPUBs is left out, and told; what only looks like it is kept."""

import pytest
from conftest import within

from robopoet.text import markup

PAGE_MATTER = [
    (
        '<p>He went <span class="pagenumber">12</span>to <span class="page-number">13</span>the <span '
        'class="page_number">14</span>house <span class="pb" title="15">[15]</span>and <span class="pageNum" '
        'id="p16">{16}</span>in <span id="page_17">17</span>to <a id="page18" class="page">[Pg 18]</a>bed <span '
        'role="doc-pagebreak">19</span>now.</p>',
        "He went to the house and in to bed now.",
        {"page numbers": 8},
    ),
    (
        "<p>It <span epub:type=pagebreak id=x>xii</span>was <span class='PageNo'>p. 3</span>so<a name=page_4>4</a> "
        "ver<span class='x-epub-pagebreak' style='position:absolute'>5</span>y <a class=seitenzahl>S. 6</a>late.<p "
        "class=folio>– 7 –</p><pb>8</pb> <b class=pagenum>page 8 of 12</b>",
        "It was so very late.\n\n8",
        {"page numbers": 7},
    ),
    (
        "<div class=pagebreak>A chapter.</div><p class=page>So 12 it was.</p><h2 id=page_1>1</h2><p>See <a class=page "
        "href=x>12</a>.<p id=p3>3</p><p id=page_4>5</p><div class=page>I was.</div>",
        "A chapter.\n\nSo 12 it was.\n\n1\n\nSee 12.\n\n3\n\n5\n\nI was.",
        {},
    ),
    (
        "<p><a href=a>Prev</a> | <a href=b>Up</a> | <a href=c>Next</a></p><h1>One</h1><p>It was.</p><ul><li><a "
        "href=a>Previous chapter</a><li><a href=b>Home</a></ul><p><a href=c>Chapter 2 →</a><br><a href=d>« 1</a>",
        "One\n\nIt was.",
        {"lines of navigation": 5},
    ),
    (
        "<div class=navheader><table><tr><th colspan=3>Chapter 3. The fox</th></tr><tr><td><a href=a>Prev</a><td>Part "
        "I<td><a href=b>Next</a></table></div><nav><a href=x>Home</a></nav>It<ul class=toc><li><a href=x>a</a></ul>is.",
        "It\nis.",
        {"lines of navigation": 2, "tables of contents": 1},
    ),
    (
        "<div class=navheader><table><tr><th>Chapter 3. Fox<tr><td><a accesskey=p href=x><img src=x></a></table></div>"
        "<p>It was.</p><ul class=docnav><li><a accesskey=n href=x><b>Suivant</b>6.5. The hen</a></li></ul>"
        "<p class=nav>No link.<p><a accesskey=p href=x><b>Niveau</b>6.5. The hen</a>",
        "It was.\n\nNo link.",
        {"lines of navigation": 3},
    ),
    (
        "<p>Next: <a href=x rel=next>The fox</a>, Previous: <a href=y>The hen</a>, Up: <a href=z>All</a> &nbsp; [<a "
        "href=c>Contents</a>][<a href=i>Index</a>]</p><p>It was.<p><a href=x rel=next>The fox</a>",
        "It was.",
        {"lines of navigation": 2},
    ),
    (
        "<p>Up <a href=x>the hill</a><p>Where do you go?<p><a href=y>Home</a><p><a href=a>Left</a><br><a href=b>Right"
        "</a><p>Next <a href=a>it</a><p><a href=x>The last page</a> of the book.",
        "Up the hill\n\nWhere do you go?\n\nHome\n\nLeft\nRight\n\nNext it\n\nThe last page of the book.",
        {},
    ),
    (
        "<h2>Contents</h2><table><tr><td><a href='#c1'>CHAPTER I.</a><td>Down<tr><td><a href='#c2'>CHAPTER II.</a><td>"
        "Up<tr><td><a href='#c3'>III.</a></table><h2 id=c1>CHAPTER I.</h2><p>It was <a href='#x'>so</a>.",
        "CHAPTER I.\n\nIt was so.",
        {"tables of contents": 1},
    ),
    (
        "<table><tr><td><a href=a>Prev</a><td>The fox<td><a href=b>Next</a></table><p>Go to: <a href=a>Home</a> [<a "
        "href=b>Next</a>]<p><a href=a>← Chapter 1</a> <a href=b>Contents</a> <a href=c>Chapter 3 →</a><p>It was.",
        "It was.",
        {"lines of navigation": 3},
    ),
    ("<h1>Contents</h1><p><a href=a>One</a> | <a href=b>Two</a><p>It was", "It was", {"tables of contents": 1}),
    (
        "<h1><a href='t.html#1'>Genesis</a></h1><h2><a href='t.html#2'>One</a></h2><h3><a href='t.html#3'>I</a></h3>In",
        "Genesis\n\nOne\n\nI\n\nIn",
        {},
    ),
    (
        "<p class=folio>I</p><p class=page>mix</p><div class=nav>The <a href=x>river</a> runs on and on.</div>"
        "<h2>Contents</h2><p><a href='#a'>Wood</a> is good.<p><a href='#b'>Iron</a> is better.",
        "I\n\nmix\n\nThe river runs on and on.\n\nContents\n\nWood is good.\n\nIron is better.",
        {},
    ),
    (  # each word leads to what is said of it
        "<p><a href='#a'>O</a> <a href='#b'>rose</a><br><a href='#c'>thou</a> <a href='#d'>art</a><br><a href='#e'>sick"
        "</a>",
        "O rose\nthou art\nsick",
        {},
    ),
    ("<h1>Inhalt</h1><p><a href='#a'>Eins</a><p><a href='#b'>Zwei</a><p>Es war", "Es war", {"tables of contents": 1}),
    (
        "<p><a href=1.html>The fox</a><p><a href=2.html>The hen</a><p><a href=3.html>The end</a>",
        "",
        {"tables of contents": 1},
    ),
    (
        "<p><a href='#c1'>The fox</a><br><a href='#c2'>The hen</a> 3<br><a href='#c3'>All</a></p><h2 id=c1>The fox</h2>"
        "<p>It was.<a name=c2></a><h2>The hen</h2><p>So.<h2><a name=c3>All</a></h2>",
        "The fox\n\nIt was.\n\nThe hen\n\nSo.\n\nAll",
        {"tables of contents": 1},
    ),
    (
        "<p>People use it for:<ul><li><a href='#c1'>Foxes</a><li><a href='#c2'>Hens</a><li><a href='#c3'>Eggs</a></ul>"
        "<h2 id=c1>Foxes</h2><h2 id=c2>Hens</h2><h2 id=c3>Eggs</h2>",
        "People use it for:\n\nFoxes\nHens\nEggs\n\nFoxes\n\nHens\n\nEggs",
        {},
    ),
    (
        "<ul><li><a href='#c0'>Cows</a> (many)<li><a href='#c1'>Foxes</a><li><a href='#c2'>Hens</a><li><a href='#c3'>"
        "Eggs</a></ul><h2 id=c1>Foxes</h2><h2 id=c2>Hens</h2><h2 id=c3>Eggs</h2>",
        "Cows (many)\nFoxes\nHens\nEggs\n\nFoxes\n\nHens\n\nEggs",
        {},
    ),
    (  # each line of a poem leads to what is said of it; headings lead back to the contents, verses to themselves
        "<p><a href='#c1'>Roses are</a><br><a href='#c2'>red</a><br><a href='#c3'>violets</a><p id=c1>On red<p id=c2>So"
        "<p id=c3>On<h1><a href='#t1'>Genesis</a></h1><h2><a href='#t2'>One</a></h2><h3><a href='#t3'>I</a></h3><p><a "
        "href='#v1'>1</a> In the<p><a href='#v2'>2</a> And<p><a href='#v3'>3</a> And God",
        "Roses are\nred\nviolets\n\nOn red\n\nSo\n\nOn\n\nGenesis\n\nOne\n\nI\n\n1 In the\n\n2 And\n\n3 And God",
        {},
    ),
    (
        "<a href='#main'>Skip to main content</a><h1>One<a class=headerlink href='#one'>¶</a></h1><p>It was.<p>"
        "<a href=e>Edit this page</a><p>© Copyright 2020, Me. Created using <a href='https://a.org'>Sphinx</a> 1.8.",
        "One\n\nIt was.",
        {"lines of navigation": 3},
    ),
    (
        "<h2><a aria-hidden=true href='#o'>#</a>One</h2><p>It was built with care by <a href='https://a.org'>me</a>.<hr><p>"
        "© 2020 Me<p>Built with <a href='https://a.org'>Sphinx</a> using a theme.",
        "One\n\nIt was built with care by me.",
        {"lines of navigation": 2},
    ),
    (
        "<p>© 2020 Me<p>Copyright is a word.<p>Built with <a href='b.html'>bricks</a>.",
        "© 2020 Me\n\nCopyright is a word.\n\nBuilt with bricks.",
        {},
    ),
]


@pytest.mark.parametrize(("page", "text", "counts"), PAGE_MATTER)
def test_page_matter_is_left_out_and_counted(page, text, counts):
    layout = markup.lay_out(page, "a.html")
    assert (layout.text, dict(layout.counts), layout.lost) == (text, counts, 0)


@pytest.mark.parametrize(
    ("subset", "body", "text"),
    [
        ('<!ENTITY me "Alice">', "I, &me;, am &amp; &eacute;.", "I, Alice, am & é."),
        ("<!ENTITY br '<br/>'><!ENTITY a \"x&br;y\">", "1&br;2 &a;", "1\n2 x\ny"),
        ("<!ELEMENT p (#PCDATA)><!-- ' ]> --><?x ]> ?><!ENTITY me ']>'><!ENTITY % x 'y'>", "a&me;b", "a]>b"),
        ('<!ENTITY f SYSTEM "file:///etc/passwd">', "So&f; it", "So it"),
        (f'<!ENTITY a "{"x" * 2000}">', "So&a; it", "So it"),
        ('<!ENTITY a "&b;&b;"><!ENTITY b "&a;&a;">', "So&a; it", "So it"),
        ("".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 9)) + '<!ENTITY l0 "ha">', "&l3;x", "x"),
    ],
)
def test_a_document_types_own_entities_are_expanded_and_its_declarations_are_no_text(subset, body, text):
    page = f"<?xml version='1.0'?>\n<!DOCTYPE html [{subset}]>\n<html><body><p>{body}</p></body></html>"
    assert markup.html_text(page) == text
    assert markup.html_text(page.replace("[", "PUBLIC '-//x' 'y.dtd' [", 1)) == text


def test_hostile_declarations_take_no_long_time():
    with within(20):
        for unit in ("<!DOCTYPE a [", "<!DOCTYPE a [<!--", "<!DOCTYPE a ['", "<!ENTITY  ", '<!ENTITY a "'):
            markup.html_text("<!DOCTYPE a [" + unit * 20_000)
        bombs = "".join(f'<!ENTITY l{i} "{f"&l{i + 1};" * 99}">' for i in range(9))
        assert markup.html_text(f"<!DOCTYPE a [{bombs}<!ENTITY l9 'x'>]><p>a" + "&l0;" * 50_000) == "a"


def test_entities_add_no_more_than_a_limit():
    page = f"<!DOCTYPE html [<!ENTITY a '{'x' * 999}'>]><p>" + "&a;" * 100_000
    assert len(markup.html_text(page)) <= 2**20
