"""tokenizer.json from elsewhere: SmolLM's kind has the ids that `tokenizers` gives, in our order."""

import json
import random
import unicodedata

import pytest
import tokenizers
from conftest import REPO, SPECIALS, decode, make_text
from tokenizers import decoders, models, pre_tokenizers, trainers

from robopoet.errors import DataError
from robopoet.text import tokenizer_json
from robopoet.text.tokenizer import CHAT, END, SMOLLM_PATTERN, styles
from robopoet.text.tokenizer_json import BYTE_OF_CHAR, RARE_BYTES, Foreign

FIRST = [END, *CHAT, "<repo_name>"]  # SmolLM2 has 17 specials before all other ids
SCRIPTS = """Être où, naïve Straße; Ещё одна книга 1234, Ένα βιβλίο 42. 東京は3月に日本語 한국어 책 10권 हिन्दी किताब
    १२३ مرحبا ١٢٣ שלום ไทย ๙๙ Ⅷ ½ x² 🙂👩‍👩‍👧🇫🇷 don't we'll I'M 'tis 1,234.56 -7e10
    for (i = 0; i < 10; i++) { a[i] += 2; }"""


def mixed_text(n_chars: int) -> str:
    """Several scripts, numbers, emoji, runs of white space and code, in no order."""
    rng, parts, size = random.Random(0), [], 0
    words = [*SCRIPTS.split(), *make_text(200).split(), *(REPO / "model.py").read_text().split()]
    gaps = [" ", " ", " ", "", "  ", "\n", "\n\n", "\t", "   ", " \n", "\r\n", "\xa0", "\u3000 ", "\n" + " " * 8]
    while size < n_chars:
        parts.append(rng.choice(words) + rng.choice(gaps))
        size += len(parts[-1])
    return "".join(parts)


def every_character(step: int = 1) -> str:
    """Each assigned code point that is no surrogate, between a letter, spaces, a digit and line ends.

    step: take one in so many ideographs and other letters without case.
    """
    kinds = ((c, unicodedata.category(c)) for c in map(chr, range(0x110000)))
    known = [c for c, kind in kinds if kind not in ("Cs", "Cn", "Co") and (kind != "Lo" or ord(c) % step == 0)]
    private = ["\ue000", "\uf8ff", "\U000f0000", "\U0010fffd"]
    return "".join(f"a{c} {c}1{c}\n  {c}{c}2" for c in [*known, *private])


def check_ids(ours: Foreign, theirs: tokenizers.Tokenizer, text: str) -> None:
    """The same ids, but for the bytes that theirs drops."""
    for start in range(0, len(text), 200_000):
        part = text[start : start + 200_000]
        ids = [ours.ids[id] for id in ours.tokenizer.encode(part)]
        assert decode(ours.tokenizer, ours.tokenizer.encode(part)) == part
        assert ids == theirs.encode(part, add_special_tokens=False).ids


def check_all(ours: Foreign, theirs: tokenizers.Tokenizer, step: int, n_chars: int) -> None:
    lacking = "".join(bytes([byte]).decode() for byte in RARE_BYTES if byte < 128)
    check_ids(ours, theirs, every_character(step).translate(dict.fromkeys(map(ord, lacking), "_")))
    check_ids(ours, theirs, mixed_text(n_chars))
    spelled = f"{END}<|im_start|>a  1"  # text that spells a special is text
    assert decode(ours.tokenizer, ours.tokenizer.encode(spelled)) == spelled


@pytest.fixture(scope="module")
def smollm() -> tokenizers.Tokenizer:
    """A small tokenizer of SmolLM's kind: specials first, and no ids for the bytes that text hardly has."""
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    alphabet = [char for char, byte in BYTE_OF_CHAR.items() if byte not in RARE_BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=FIRST, initial_alphabet=alphabet, show_progress=False, limit_alphabet=256
    )
    theirs.train_from_iterator([mixed_text(100_000)], trainer)
    return theirs


def test_ids_are_those_of_tokenizers_in_our_order(smollm):
    ours = tokenizer_json.from_huggingface(smollm.to_str())
    assert ours.tokenizer.pattern == SMOLLM_PATTERN
    n_added = len(RARE_BYTES)
    assert ours.tokenizer.vocab_size == 1200 + n_added == len(ours.ids)
    assert sorted(ours.ids) == [-1] * n_added + list(range(1200))
    assert ours.ids[-len(FIRST) :] == list(range(len(FIRST))) and list(ours.tokenizer.specials) == FIRST
    assert styles(ours.tokenizer) == {}  # what begins and ends a message is no tag
    check_all(ours, smollm, 10, 200_000)


def test_a_byte_without_an_id_gets_one_and_text_comes_back(smollm):
    ours = tokenizer_json.from_huggingface(smollm.to_str())
    text = "a\x00b\x13 \x7f1\U000fffff"
    assert decode(ours.tokenizer, ours.tokenizer.encode(text)) == text
    lacking = {id for id, theirs in enumerate(ours.ids) if theirs < 0}
    assert {ours.tokenizer.tokens[id] for id in lacking} == {bytes([byte]) for byte in RARE_BYTES}


def test_an_export_of_it_gives_the_same_ids_and_is_read_back(smollm):
    ours = tokenizer_json.from_huggingface(smollm.to_str()).tokenizer
    written = json.dumps(tokenizer_json.to_huggingface(ours))
    back, text = tokenizer_json.from_huggingface(written), mixed_text(50_000) + every_character(10)[:100_000]
    assert back.tokenizer.to_json() == ours.to_json() and back.ids == list(range(ours.vocab_size))
    assert tokenizers.Tokenizer.from_str(written).encode(text).ids == ours.encode(text)


def test_special_tokens_may_stand_anywhere(bpe):
    saved = tokenizer_json.to_huggingface(bpe)
    vocab = {name: id + (id >= 100) for name, id in saved["model"]["vocab"].items()}
    saved["model"] |= {"vocab": vocab}
    saved["added_tokens"][0]["id"] = 100
    back = tokenizer_json.from_huggingface(json.dumps(saved))
    assert back.tokenizer.to_json() == bpe.to_json() and list(bpe.specials) == SPECIALS
    n = len(bpe.tokens)
    assert back.ids == [*range(100), *range(101, n + 1), 100, n + 1, n + 2]


DIGITS, LEVEL = {"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([DIGITS | {"individual_digits": False}, LEVEL], "in another way"),
        ([LEVEL, DIGITS], "in another way"),
        ([DIGITS], "in another way"),
        ([DIGITS, DIGITS, LEVEL], "in another way"),
        ([DIGITS, LEVEL | {"add_prefix_space": True}], "a space before every text"),
    ],
    ids=range(5),
)
def test_what_cuts_text_in_another_way_is_refused(smollm, steps, message):
    saved = json.loads(smollm.to_str())
    saved["pre_tokenizer"]["pretokenizers"] = steps
    with pytest.raises(DataError, match=rf"^tokenizer\.json: .*{message}"):
        tokenizer_json.from_huggingface(json.dumps(saved))


def test_a_letter_without_an_id_is_refused(smollm):
    saved = json.loads(smollm.to_str())
    letters = [char for char in BYTE_OF_CHAR if char != "e"]
    saved["model"] |= {"merges": [], "vocab": {name: id for id, name in enumerate([*FIRST, *letters])}}
    with pytest.raises(DataError, match=r"^tokenizer\.json: .*not all 256 bytes"):
        tokenizer_json.from_huggingface(json.dumps(saved))
