"""The encoding of a text: found, told with the words that it makes, or asked for; and what is not text in it."""

import random
import sys

import pytest
from conftest import read_all, within
from test_books import SENTENCES, epub

from robopoet.errors import DataError
from robopoet.text import books, corpus, encodings

NIGHT = "It was a dark night, and the wind blew over the moor. “Who is there?” she said; the café was closed.\n"
CZECH = "Příliš žluťoučký kůň úpěl ďábelské ódy. Když se ráno probudil.\n"
POLISH = (
    "Stary człowiek szedł powoli przez las i myślał o swoich dzieciach, które mieszkały w mieście. Wieczorem wrócił do "
    "domu, usiadł przy stole i czytał książkę, którą dostał od przyjaciela. Żona gotowała zupę, a wiatr wiał.\n"
)
GERMAN = (
    "Der alte Mann ging langsam durch den Wald und dachte an seine Kinder, die in der Stadt wohnten. Es war kalt, und "
    "der Wind wehte um das Haus. Seine Frau kochte eine Suppe für ihn.\n"
)
TURKISH = "Yaşlı adam ormanda yavaşça yürüyor ve şehirde yaşayan çocuklarını düşünüyordu; ağaç ve ışık gördü.\n"
LINKED = '<div class="calibre3" id="link-{0}"><span class="italic bold"><a href="#x{0}">{1}</a></span></div>'
ITALIAN = "Perché non sei più venuto? È già tardi, così andò via; la città era là, sotto la luna.\n"
QUOTED = "He said to her, “It’s late,” and went home to the café in the old street where nobody ever came.\n"
KOREAN = "모든 국민은 법 앞에 평등하다. 누구든지 성별, 종교 또는 사회적 신분에 의하여 차별을 받지 아니한다.\n"
OTHER = "; if that is wrong, name its --encoding"


def survey(path) -> corpus.Survey:
    return corpus.survey(corpus.documents(corpus.manifest_of_files((str(path),))))


# --- guesses


@pytest.mark.parametrize(
    ("text", "encoding", "told"),
    [
        (SENTENCES["fr"], "cp1252", "cp1252: couché à après"),
        (SENTENCES["de"], "latin-1", "cp1252: Träumen Rücken gewölbten"),
        (SENTENCES["ru"], "cp1251", "cp1251: Все счастливые семьи похожи"),
        (SENTENCES["ru"], "koi8-r", "koi8-r: Все"),
        (SENTENCES["ru"], "cp866", "cp866: Все"),
        (SENTENCES["pl"], "cp1250", "cp1250: jesteś cię cenić"),
        (SENTENCES["ja"], "shift_jis", "cp932: 吾輩は猫である"),
        (SENTENCES["ja"], "euc_jp", "euc_jis_2004: 吾輩は猫である"),
        (SENTENCES["zh"], "gb18030", "gb18030: 道可道"),
        (SENTENCES["ar"], "cp1256", "cp1256: كان"),
        (CZECH * 20, "iso8859-2", "iso8859-2: Příliš žluťoučký kůň úpěl"),
        (CZECH * 20, "cp852", "cp852: Příliš"),
        (CZECH * 20, "cp1250", "cp1250: Příliš"),
        (POLISH * 20, "iso8859-2", "iso8859-2: człowiek myślał które książkę"),
        (GERMAN * 20, "cp850", ": für"),
        (GERMAN * 20, "mac-roman", "mac-roman: für"),
        (ITALIAN * 20, "cp1252", "cp1252: Perché più È già"),
        (ITALIAN * 20, "cp850", ": Perché più È già"),
        ("<p>" + POLISH.replace("\n", "</p><p>") * 20, "iso8859-2", "iso8859-2: człowiek"),  # on one line
        ("It was late. " * 5000 + POLISH.replace("\n", "") * 9, "cp1250", "cp1250: człowiek"),
        ("".join(LINKED.format(i, word) for i, word in enumerate((CZECH[:21] * 30).split())), "cp852", "cp852: Příliš"),
        (TURKISH * 20, "cp1254", "cp1254: Yaşlı"),
        (QUOTED * 20, "mac-roman", "mac-roman: café"),
        (QUOTED.replace("\n", "\r") * 20, "mac-roman", "mac-roman: café"),  # lines as a Mac of then ended them
        (SENTENCES["fr"].replace("’", "'"), "cp850", ": couché à après"),
    ],
)
def test_a_book_is_read_in_the_encoding_that_it_was_saved_in(text, encoding, told):
    content = text.encode(encoding, "ignore")
    found, telling = encodings.decode("a.txt", content)
    assert found == content.decode(encoding)
    assert telling.startswith("is not UTF-8, reads as ") and told in telling and telling.endswith(OTHER)


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_with_its_mark_is_read_without_a_word(language, encoding):
    text, told = encodings.decode("a.txt", SENTENCES[language].encode(encoding))
    assert (text.removeprefix("\ufeff"), told) == (SENTENCES[language], "")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *(
            (text, f"utf-{bits}-{order}e")
            for text in (NIGHT, "It was late.\n" * 9, CZECH)
            for bits in (16, 32)
            for order in "lb"
        ),
        *((SENTENCES[language].replace("。", "。\n"), "utf-16-le") for language in ("ru", "zh", "ja", "ar")),
        *((SENTENCES[language].replace(" ", ""), f"utf-16-{end}") for language in ("zh", "ja") for end in ("le", "be")),
        (SENTENCES["ja"], "iso2022_jp"),
        ("It was late.\n" * 30_000 + SENTENCES["ja"], "iso2022_jp"),
        (KOREAN, "iso2022_kr"),
        (SENTENCES["zh"], "hz"),
        (SENTENCES["fr"], "utf-7"),
    ],
)
def test_other_encodings_whose_bytes_may_be_ascii_are_read_too(text, encoding):
    content = text.encode(encoding, "ignore")
    text, told = encodings.decode("a.txt", content)
    assert text == content.decode(encoding)
    assert told.startswith(f"is not UTF-8, reads as {encoding}") and told.endswith(OTHER)


def test_plain_text_is_taken_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "chardet", None)  # to import it raises ImportError
    for text in (NIGHT, "1 + 1 = 2, C++; a ~ b, {c}\n", "Příliš \x1b[31mžluťoučký\x1b[0m"):
        assert encodings.decode("a.txt", text.encode()) == (text, "")
    monkeypatch.undo()
    for text in (
        "x = 'a+bcd+efg-h' ~{ y ~}\n",
        "deb12+deb12u1, base64: QUJD+REVG/abc=\n",
        "\x1b[31mRed\x1b[0m\n",
        "a\0b\n",
    ):
        assert encodings.decode("a.txt", text.encode()) == (text, "")


@pytest.mark.parametrize("word", ["café", "it’s", "£5", "“so”", "1843–1849", "naïve", "déjà", "m²"])
@pytest.mark.parametrize("lines", [5, 2000])
def test_one_accent_in_a_book_is_windows_1252(word, lines):
    text = "The clocks were striking thirteen.\n" * lines + f"He said {word}.\n" + "It was late.\n" * lines
    found, told = encodings.decode("a.txt", text.encode("cp1252"))
    assert found == text and f"cp1252: {word}" in told


@pytest.mark.parametrize(("encoding", "word"), [("cp850", "Zürich"), ("mac-roman", "Zürich")])
def test_an_accent_that_windows_1252_makes_a_sign_or_a_capital_inside_a_word_is_another(encoding, word):
    text = "The clocks were striking thirteen.\n" * 90 + f"He said {word}.\n" + "It was late.\n" * 90
    assert encodings.decode("a.txt", text.encode(encoding))[0] == text


def test_where_two_encodings_fit_alike_a_person_is_asked_with_what_each_reads():
    text = "The clocks were striking thirteen.\n" * 90 + "How naïve.\n"
    with pytest.raises(
        DataError, match=r"^a\.txt: byte \d+ is not UTF-8; it reads as .*; name its --encoding$"
    ) as caught:
        encodings.decode("a.txt", text.encode("cp850"))
    assert "naïve" in str(caught.value) and "mac-roman: naãve" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (SENTENCES["ja"].encode()[:-1], len(SENTENCES["ja"].encode()) - 3),  # 1 in 95 characters
        ("né".encode("latin-1"), 1),  # too little to tell
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), 0),
        (random.Random(1).randbytes(5000), 0),
        (b"a" + bytes(random.Random(2).choices(range(0x80, 0x100), k=5000)), 1),
    ],
)
def test_what_no_encoding_fits_is_refused_with_its_byte(content, place):
    with pytest.raises(DataError, match=rf"^a\.txt: byte {place} is not UTF-8.*; save the file as UTF-8, or name its"):
        encodings.decode("a.txt", content)


@pytest.mark.parametrize("declared", ["iso-8859-2", "windows-1250"])
def test_a_pages_own_encoding_is_believed(declared):
    words = "Jabłoń, śliwa i czereśnia"
    tags = "<p class='its tags have more letters, of ASCII, than its text'>" * 50
    page = f"<meta charset={declared}>{tags}{words}"
    text, told = books.read("a.html", page.encode(declared))
    assert text == words and "Jabłoń śliwa" in told
    assert books.read("a.html", page.replace(declared, "utf-8").encode(declared))[0] != ""  # it may be wrong


def test_a_guess_inside_an_epub_is_told_and_can_be_overruled(tmp_path):
    page = "<html><body><h1>%s</h1>" + f"<p>{CZECH * 5}</p></body></html>"
    files = {"OEBPS/text/one.xhtml": page % "Kůň", "OEBPS/text/two b.xhtml": "<p>Ať</p>"}
    (tmp_path / "a.epub").write_bytes(epub({name: text.encode("iso8859-2") for name, text in files.items()}))
    found = survey(tmp_path / "a.epub")
    assert found.warnings[0] == (
        f"{tmp_path}/a.epub: OEBPS/text/one.xhtml is not UTF-8, reads as iso8859-2: Kůň Příliš žluťoučký úpěl{OTHER}; "
        "so are 1 more of its files"
    )
    [(_, _, text)] = read_all(corpus.manifest_of_files((str(tmp_path),)))
    assert text.startswith("Kůň\n\nPříliš žluťoučký") and text.endswith("\n\nAť\n")  # guessed by the whole book
    [(_, _, text)] = read_all(corpus.manifest_of_files((str(tmp_path),), "cp1251"))
    assert text.startswith("Kůň".encode("iso8859-2").decode("cp1251"))
    found = epub({"OEBPS/text/two b.xhtml": page.encode("iso8859-2")})
    assert books.read("a.epub", found, "iso8859-2")[0].startswith("One\n\nIt was late.")  # the others stay UTF-8


def test_an_encoding_that_is_named_is_taken_or_refused():
    assert encodings.decode("a.txt", b"na\x8bve", "mac-roman") == ("naãve", "")
    with pytest.raises(DataError, match=r"a\.txt: byte 1 is not ascii, nor is 50% of it"):
        encodings.decode("a.txt", b"n\xe9", "ascii")
    for name in ("klingon", "rot13", "undefined"):
        with pytest.raises(DataError, match=rf"encoding: found {name}, must|byte 0 is not {name}"):
            encodings.decode("a.txt", b"abc", name)


def test_a_guessed_encoding_is_told_and_can_be_overruled(tmp_path):
    (tmp_path / "proust.txt").write_bytes(SENTENCES["fr"].encode("cp1252"))
    told = f"{tmp_path}/proust.txt: is not UTF-8, reads as cp1252: couché à après{OTHER}"
    assert survey(tmp_path).warnings == (told,)
    [doc] = corpus.documents(corpus.manifest_of_files((str(tmp_path),), "cp1250"))
    assert doc.raw == SENTENCES["fr"].encode("cp1252").decode("cp1250")


@pytest.mark.parametrize("unit", [b"x", b"\xe9", b"\xe9 ", b"x\xe9\n", b"+AOk", b"\x1b", b"~{", b"\0"])
@pytest.mark.slow
def test_hostile_bytes_take_time_linear_in_their_number(unit):
    with within(10):
        for content in (unit * (2**20 // len(unit)), b"\xe9\n" + unit * (2**20 // len(unit)) + b"\xe9"):
            try:
                encodings.decode("a.txt", content)
            except DataError as e:
                assert "\n" not in str(e)


# --- damage


@pytest.mark.parametrize(
    ("bad", "replaced", "n"),
    [
        (b"\xff", "\ufffd", 1),
        (b"caf\xe9", "caf\ufffd", 1),
        (b"\xed\xa0\xbd", "\ufffd" * 3, 3),
        (b"\xe2\x80", "\ufffd", 1),
    ],
)
def test_bad_bytes_in_utf8_are_replaced_and_counted(tmp_path, bad, replaced, n):
    lines = [NIGHT.encode()] * 60
    (tmp_path / "a.txt").write_bytes(b"".join(lines[:40]) + bad + b"\n" + b"".join(lines[40:]))
    [(_, _, text)] = read_all(corpus.manifest_of_files((str(tmp_path),)))
    assert text == NIGHT * 40 + replaced + "\n" + NIGHT * 20
    told = f"is not all UTF-8: characters replaced with U+FFFD: {n}, the first in line 41"
    assert survey(tmp_path).warnings == (f"{tmp_path}/a.txt: {told}",)


def test_the_line_ends_of_a_lone_bad_byte_in_a_long_text_stay(tmp_path):
    text = "It’s late. " + "The clocks struck. " * 9
    found, told = encodings.decode("a.txt", text.encode() * 40 + b"\xff")
    assert found == text * 40 + "\ufffd" and told.endswith("U+FFFD: 1, the first in line 1")


def test_more_than_a_hundredth_of_bad_bytes_stops():
    own = "é" * 97 + "\ufffd"  # a text's own U+FFFD is no damage
    assert encodings.decode("a.txt", own.encode() * 10 + b"\xff" * 9)[1].endswith("U+FFFD: 9, the first in line 1")
    with pytest.raises(
        DataError, match=r"^a\.txt: byte 1970 is not UTF-8, nor is 1% of it; save the file as UTF-8, or"
    ):
        encodings.decode("a.txt", own.encode() * 10 + b"\xff" * 11)


def test_damage_in_another_encoding_is_replaced_too():
    for encoding in ("utf-16", "utf-16-le"):
        text, told = encodings.decode("a.txt", (NIGHT * 9).encode(encoding)[:-1])
        assert text == (NIGHT * 9)[:-1] + "\ufffd" and told.endswith("U+FFFD: 1, the first in line 9")
    text, told = encodings.decode("a.txt", (NIGHT * 9).encode("cp1252") + b"\x81", "cp1252")
    assert (
        text == NIGHT * 9 + "\ufffd"
        and told == "is not all cp1252: characters replaced with U+FFFD: 1, the first in line 10"
    )


def test_a_file_in_two_encodings_is_refused_with_the_place():
    french = SENTENCES["fr"] + "\n"
    content = french.encode() * 30 + french.encode("cp1252") * 30
    with pytest.raises(DataError, match=r"^a\.txt: 30 lines, the first line 31, are not UTF-8, as others are; convert"):
        encodings.decode("a.txt", content)


# --- control codes


@pytest.mark.parametrize(
    ("content", "text", "n"),
    [
        (b"\0" + QUOTED.encode("cp1252") * 20, QUOTED * 20, 1),
        (NIGHT.encode() * 9 + bytes(9), NIGHT * 9, 9),
        (b"It w\0\0as late, it was late, and it was later.\n", "It was late, it was late, and it was later.\n", 2),
        ("Příliš žluťoučký kůň\0 úpěl.\n".encode() * 3, "Příliš žluťoučký kůň úpěl.\n" * 3, 3),
        (f"\x1b[1;31m{NIGHT}\x1b[0m".encode() * 3, NIGHT * 3, 6),
        (
            "\x1b[1;31m道可道\x1b[0m,非常道。名可名,非常名。\n".encode("gb18030") * 99,
            "道可道,非常道。名可名,非常名。\n" * 99,
            198,
        ),
        (b"N\bNA\bAM\bME\bE\n" + NIGHT.encode() * 2, "NAME\n" + NIGHT * 2, 4),
        (b"One\x0b\x0cTwo\t3\r\n\x1a", "One\x0b\n\nTwo\t3\n", 0),
    ],
)
def test_control_codes_never_reach_a_text_without_a_word(tmp_path, content, text, n):
    (tmp_path / "a.txt").write_bytes(content)
    assert [text for _, _, text in read_all(corpus.manifest_of_files((str(tmp_path),)))] == [text]
    told = [line for line in survey(tmp_path).warnings if "control" in line]
    assert len(told) == bool(n) and all(line.endswith(f"holds control codes, left out: {n}") for line in told)


def test_control_codes_in_a_page_are_left_out_too(tmp_path):
    page = f"<html><body><p>{NIGHT[:50]}\0\0{NIGHT[50:]}</p>".encode()
    (tmp_path / "a.html").write_bytes(page)
    (tmp_path / "b.epub").write_bytes(epub({"OEBPS/text/one.xhtml": page, "OEBPS/text/two b.xhtml": "<p>Late.</p>"}))
    texts = [text for _, _, text in read_all(corpus.manifest_of_files((str(tmp_path),)))]
    assert texts == [NIGHT, f"{NIGHT}\nLate.\n"]
    told = "holds control codes, left out: 2"
    assert survey(tmp_path).warnings[:2] == (
        f"{tmp_path}/a.html: {told}",
        f"{tmp_path}/b.epub: OEBPS/text/one.xhtml {told}",
    )


def test_control_codes_in_json_lines_are_left_out_too(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a\\u0000b"}\n{"text": "\\u001b[31mred\\u001b[0m"}\n{"text": "\\u0000"}\n'
    )
    docs = [doc for doc in corpus.documents(corpus.manifest_of_files((str(tmp_path),))) if doc.text]
    assert [(doc.text, doc.told) for doc in docs] == [
        ("ab\n", "holds control codes, left out: 1"),
        ("red\n", "holds control codes, left out: 2"),
    ]


def test_a_manifest_may_keep_control_codes_and_is_told(manifest):
    read = manifest("sources: [{style: s, file: a.txt, clean: none}]", a=NIGHT.encode() + b"\0")
    assert [text for _, _, text in read_all(read)] == [NIGHT + "\0"]
    assert corpus.survey(corpus.documents(read)).warnings[0].endswith("holds control codes, learnt (clean: none): 1")


def test_what_is_mostly_control_codes_is_no_text(manifest):
    read = manifest("sources: [{style: s, file: a.txt}]", a=b"ab\0\1\2\3 and more\n")
    with pytest.raises(
        DataError, match=r"a\.txt: 4 of its 16 characters are control codes; it is no text, or in another"
    ):
        read_all(read)
