"""The index finds what a brute-force search finds, and refuses a text that the checkpoint was not trained on."""

import json
import random
import shutil
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.writing.originality import Originality, fold

WORDS = "a b to be, née — \u2019tis well-known".split()
APOSTROPHES = "'’‘ʼ＇`´"
FILLERS = "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f"  # letters and marks that nobody sees


def make_folder(folder, seed):
    """Bins of two works over a vocabulary of a few words, so that runs of every length recur."""
    rng = random.Random(seed)
    for name in ("one", "two"):
        lines = [" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(180)]  # long enough to be cut
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    files = (str(folder / "*.txt"),)
    prepare.main(prepare.PrepareConfig(input=files, out=str(folder / "bins"), tokenizer="char"))
    return folder / "bins"


def plain_words(text):
    """The words of a text, character by character: letters, digits and marks, without case and apostrophes."""
    words = [""]
    for char in unicodedata.normalize("NFD", text.casefold()):
        kind = unicodedata.category(char)
        if "CJK UNIFIED" in unicodedata.name(char, ""):
            words += [char, ""]
        elif char not in APOSTROPHES and kind != "Cf" and not "\ufe00" <= char <= "\ufe0f":
            words += [""] if kind[0] not in "LMN" else []
            words[-1] += char if kind[0] in "LMN" else ""
    return [word for word in words if word]


def sha256_of(folder):
    return json.loads((folder / "meta.json").read_text())["text_sha256"]


def works_of(folder):
    """The words of the train split's works, decoded token by token, each between spaces."""
    meta = json.loads((folder / "meta.json").read_text())
    tok, ids = tokenizer.from_json(meta["tokenizer"]), np.fromfile(folder / "train.bin", "<u2").tolist()
    spans = [(doc["name"], doc["start"], doc["stop"]) for doc in meta["splits"]["train"]["documents"]]
    texts = [
        (name, "".join(tok.chars[id] for id in ids[start:stop] if id < len(tok.chars))) for name, start, stop in spans
    ]
    return {name: f" {' '.join(plain_words(text))} " for name, text in texts}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("originality"), 1)


@pytest.fixture(scope="module")
def index(folder):
    return Originality(folder, sha256_of(folder))


@pytest.fixture(scope="module")
def works(folder):
    return works_of(folder)


PIECES = st.one_of(
    st.tuples(st.sampled_from(["one", "two"]), st.integers(0, 900), st.integers(0, 80)),  # a copy, cut anywhere
    st.sampled_from([*WORDS, *"BE Ne\u0301e tis NÉE! b\u2014a Well known".split(), "new", "\n\n\t", "\u00a0", ""]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, max_size=8))
def test_it_finds_what_a_search_for_every_run_of_words_finds(index, works, pieces):
    text = " ".join(piece if isinstance(piece, str) else works[piece[0]][piece[1] :][: piece[2]] for piece in pieces)
    words = plain_words(text)

    def occurs(run):
        return any(f" {run} " in work for work in works.values())

    runs = [" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)]
    report = index.check(text)
    longest = [run for run in runs if occurs(run)]
    assert len(report.longest) == max(map(len, longest), default=0) and report.longest in ["", *longest]
    assert report.work == next((name for name in works if report.longest and f" {report.longest} " in works[name]), "")
    for n in (4, 8, 12):
        sequences = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        new = [not occurs(sequence) for sequence in sequences]
        assert report.new[n] == (pytest.approx(sum(new) / len(new)) if new else None)


def test_a_planted_copy_is_found_however_its_lines_break(index, works):
    run = " ".join(works["two"].split()[20:40])
    assert run not in works["one"]
    report = index.check(f"quite new\n{run.replace(' ', ',' + chr(10), 7).upper()}\tand again")
    assert (report.longest, report.work) == (run, "two")
    assert report.new == {4: 4 / 21, 8: 4 / 17, 12: 4 / 13}
    assert report.describe().startswith(f'longest copy: {len(run)} characters, "{run[:20]}')


@pytest.mark.parametrize(
    "text, words",
    [
        ("I will\n  proclaim THEE, thou\u2014", "i will proclaim thee thou"),
        ("O’er o'er oʼer \u2018tis", "oer oer oer tis"),
        ("well-known \u2013 _both_ (1,599) & ...", "well known both 1 599"),
        ("Straße STRASSE Σίσυφος ΣΊΣΥΦΟΣ", "strasse strasse σι\u0301συφοσ σι\u0301συφοσ"),
        ("na\u00efve nai\u0308ve co\u00adop ŉ", "nai\u0308ve nai\u0308ve coop n"),
        ("床前明月光,疑 コー", "床 前 明 月 光 疑 コ ー"),
        ("हिन्दी می\u200cروم ❤\ufe0f", "हिन्दी میروم"),
    ],
)
def test_words_are_what_a_reader_compares(text, words):
    assert fold(text).split() == unicodedata.normalize("NFD", words).split()
    for i in range(len(text)):
        assert fold(text[:i]) + fold(text[i:]) == fold(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs", "Cn"), max_codepoint=0x2E7F, exclude_characters=FILLERS)))
def test_the_words_of_any_text_are_those_found_character_by_character(text):
    found = [unicodedata.normalize("NFD", word) for word in fold(text).split()]
    assert found == plain_words(text)


def test_new_text_is_reported_as_new(index):
    report = index.check("not one of these words")
    assert (report.longest, report.work, report.new) == ("", "", {4: 1.0, 8: None, 12: None})
    assert report.describe() == "longest copy: none\nnot in the training text: 100% of its 4-word sequences"
    assert index.check(" \n").new == {4: None, 8: None, 12: None} and "too short" in index.check("").describe()


def test_no_match_runs_from_one_work_into_the_next(index, works):
    ends, begins = works["one"].split()[-6:], works["two"].split()[:6]
    report = index.check(" ".join(ends + begins))
    assert len(report.longest.split()) < 12 and report.new[12] == 1.0


def test_a_dataset_with_another_text_than_the_checkpoints_is_refused(folder, tmp_path):
    for sha256 in ("0" * 64, ""):
        with pytest.raises(DataError, match=r"meta\.json: text_sha256 is .*name the dataset"):
            Originality(folder, sha256)
    with pytest.raises(DataError, match=r"train split is not the checkpoint's \(7 characters -> [\d,]+ characters\)"):
        Originality(folder, sha256_of(folder), {"train": "7 characters", "val": "8 characters"})
    with pytest.raises(DataError, match=r"meta\.json: not found; run"):
        Originality(tmp_path, sha256_of(folder))
    shutil.copytree(folder, tmp_path / "bins")
    (tmp_path / "bins" / "train.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"train\.bin: is 1 bytes long"):
        Originality(tmp_path / "bins", sha256_of(folder))
