"""What the pages of a printed book leave in a plain text: form feeds, running heads, page numbers, contents, hyphens,
and marks that nobody sees.

A line at the edge of a page goes only if it says the same on others, or counts them; where pages don't end within
sentences, only if a number stands far from its words, or below the page. A hyphen at a line's end goes only where the
book itself has the word without one.
"""

import re
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from robopoet.text.matter import CONTENTS, CONTENTS_TITLES, ENTRY_CHARS, FEWEST_ENTRIES, PAGE_NUMBERS

FORM_FEEDS, HEADS = "form feeds", "running heads"  # as they are told
HYPHENS, SOFT_HYPHENS, ZERO_WIDTHS = "hyphens at line ends", "soft hyphens", "zero-width characters"

CUT_PAGES = 0.2  # the share of page ends within sentences from which on form feeds part pages of paper, not chapters
FEWEST_PAGES, NUMBERED_PAGES = 3, 0.3  # that agree; the least share of pages that have a number at the same edge
LONGEST_HEAD = 300  # the longest running head
SHORT_LINE = 0.8  # how long a line that ends a paragraph is at most, as a share of the longest
HYPHENATED_LINES = 0.005  # the share of lines that end with a hyphen from which on a text was set with hyphens
SENTENCE_END = re.compile(r"[.!?…:;][\"'”’»)\]]*\s*\Z")
# a word as no running head has it: a long one, or the first, in lower case
LOWER_WORD = re.compile(r"(?:(?<!\w)(?=[^\W\d_]{4})|^\W*)[a-zß-öø-ÿа-яα-ω]")
NUMBER = r"(?:\d{1,4}|[ivxlc]{1,7})"
NUMBER_LINE = re.compile(
    rf"[\s\-–—\[(|~*•·]*(?:(?i:page|pg|p|seite|s)\b\.?\s*)?({NUMBER})(?:\s*(?:/|of|von|de|из)\s*\d{{1,4}})?[\s\-–—\])|~*•·]*",
    re.A,
)
WEB_ADDRESS = re.compile(r"\bwww\.|://|\w\.(?:com|net|org)\b", re.I)
# a page's number alone, between the line before it and the first character of the next
PAGE_END = re.compile(r"^(.*)\n{1,3}[ \t\-–—\[(]{0,80}(\d{1,4})[ \t\-–—\])]{0,80}\n{1,3}[ \t]{0,80}(.)", re.M)
CUT_LINES, PAGE_CHARS = 0.4, 600  # the least share of them that stand within sentences; the least text on a page
PAGE_MARK = re.compile(r"(?P<space>(?<=\s))?[\[{](?:Pg|Page)\.? ?(\d{1,4})[\]}](?(space) ?)")
MOST_TABLES = 100  # the most tables of contents that a text is searched for
CONTENTS_TITLE = re.compile(rf"^[^\w\n]*+(?:{'|'.join(CONTENTS_TITLES)})[^\w\n]*$", re.M | re.I)
OTHER_ENTRIES = 3  # lines after which a table ends if none is a heading of the text
ENTRY_NUMBER = re.compile(
    r"\W*(?:(?:chapter|chapitre|kapitel|capítulo|capitolo|глава|rozdział|book|part|act|canto)\b\W*)?(?:[ivxlcdm]+\b|\d+)?\W*"
)
ENTRY_PAGE = re.compile(r"[\s.·…_]*(?:\b\d{1,4}|\b[ivxlc]{1,7})?\W*\Z")
ENTRY_LEADER = re.compile(r"(?:\t|[\s.·…_]{2,})\d{1,4}\W*\Z")  # a page's number far from a chapter's
HEAD = re.compile(rf"\s*(?:({NUMBER})(\s+))?(\S.*?)(?:(\s+)({NUMBER}))?\s*")

# Between characters of scripts that need them, zero-width ones stay: Indic and Arabic letters, emoji
_NEED = (
    "\u0590-\u1cff\u2190-\u2bff\ua800-\uaaff\ufb1d-\ufdff\ufe00-\ufe0f\ufe70-\ufefc\U00010800-\U00011fff"
    "\U0001f000-\U000e007f"
)
INVISIBLE = re.compile(rf"(?<![{_NEED}])[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]+(?![{_NEED}])")
SOFT_LINE_END = re.compile(r"(?<=[^\W\d_])(?:\xad[\xad \t]*|¬)\n[ \t]*([^\W\d_]\S*)[ \t]*\n?")
HYPHEN_LINE_END = re.compile(r"(?<=[^\W\d_])[-‐]\n[ \t]*([^\W\d_]{1,50})(\S{0,50}(?!\S))[ \t]*\n?")
WHOLE_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def running_text(text: str) -> tuple[str, Counter[str]]:
    """`text`, whose lines end with LF, without what pages of print leave in it; and how much of each that was."""
    counts: Counter[str] = Counter()
    counts[FORM_FEEDS] += text.count("\f")
    if "\f" in (text := text if "\f" in text else _with_page_ends(text)):
        text = _without_pages(text, counts)
    numbers = [int(found[2]) for found in PAGE_MARK.finditer(text)]
    if len(numbers) > 1 and all(first < second for first, second in pairwise(numbers)):
        text, n_marks = PAGE_MARK.subn("", text)
        counts[PAGE_NUMBERS] += n_marks
    if CONTENTS_TITLE.search(text):
        text = _without_contents(text, counts)
    if "\xad" in text or "¬" in text:
        text, n_joined = SOFT_LINE_END.subn(r"\1\n", text)
        counts[SOFT_HYPHENS] += n_joined + text.count("\xad")
        text = text.replace("\xad", "")
    if not text.isascii():
        counts[ZERO_WIDTHS] += sum(len(found[0]) for found in INVISIBLE.finditer(text))
        text = INVISIBLE.sub("", text)
    if "-\n" in text or "‐\n" in text:
        text = _without_hyphens(text, counts)
    return text, +counts


def _without_hyphens(text: str, counts: Counter[str]) -> str:
    lines = [line for line in text.split("\n") if line.strip()]
    if sum(line.endswith(("-", "‐")) for line in lines) < HYPHENATED_LINES * len(lines):
        return text
    words = {found[0].casefold() for found in WHOLE_WORD.finditer(text)}

    def join(found: re.Match[str]) -> str:
        before = re.search(r"[^\W\d_]+\Z", text[max(found.start() - 50, 0) : found.start()])
        first, second = before[0].casefold() if before else "", found[1].casefold()
        if first + second not in words or f"{first}-{second}" in words:
            return found[0]
        counts[HYPHENS] += 1
        return f"{found[1]}{found[2]}\n"

    return HYPHEN_LINE_END.sub(join, text)


def _with_page_ends(text: str) -> str:
    """`text` with a form feed after each page's number that stands alone, if these part sentences and count on."""
    ends = list(PAGE_END.finditer(text))
    counted = {found for pair in pairwise(ends) if int(pair[0][2]) + 1 == int(pair[1][2]) for found in pair}
    n_cut = sum(found[3].islower() and not SENTENCE_END.search(found[1]) for found in counted)
    if len(counted) < FEWEST_PAGES or n_cut < CUT_LINES * len(counted) or len(text) < PAGE_CHARS * len(counted):
        return text
    numbers = {found[2] for found in counted}
    return PAGE_END.sub(
        lambda found: f"{found[1]}\n{found[2]}\n\f{found[3]}" if found[2] in numbers else found[0], text
    )


def _without_contents(text: str, counts: Counter[str]) -> str:
    """`text` without its tables of contents: lines under a title that says so, which stand again as its headings."""
    lines = text.split("\n")
    filled = [i for i, line in enumerate(lines) if line.strip()]
    names = [_heading(lines[i]) for i in filled]
    places: dict[str, int] = {}
    again = [0] * len(names)  # where a line's name stands next; 0: nowhere
    for i in reversed(range(len(names))):
        again[i], places[names[i]] = places.get(names[i], 0), i
    gone: set[int] = set()
    for title in [i for i, line in enumerate(filled) if CONTENTS_TITLE.fullmatch(lines[line])][:MOST_TABLES]:
        last, n_entries, stop, i = title, 0, len(names), title + 1
        while i < stop and i - last <= OTHER_ENTRIES:
            if names[i] and (again[i] or places[names[i]] < title):  # a French book has its table at the end
                last, n_entries, stop = i, n_entries + 1, min(stop, again[i] or stop)
            i += 1
        after = filled[last + 1] if last + 1 < len(filled) else len(lines)
        is_whole = 2 * n_entries >= last - title and after > filled[last] + 1  # and a blank line ends it
        if is_whole and n_entries >= FEWEST_ENTRIES and filled[title] not in gone:
            gone.update(range(filled[title], after))
            counts[CONTENTS] += 1
    return "\n".join(line for i, line in enumerate(lines) if i not in gone)


def _heading(line: str) -> str:
    """What a line of a table of contents and its heading have in common: the words, or else the number."""
    if len(line) > ENTRY_CHARS:
        return ""
    line = line.strip().casefold()
    name = ENTRY_PAGE.sub("", ENTRY_NUMBER.sub("", line, count=1))
    return " ".join(re.findall(r"\w+", name or ENTRY_LEADER.sub("", line)))


class _Edge(NamedTuple):
    """What a line at the edge of a page says: its words, and a number before or after them, maybe far from them."""

    words: str
    has_number: bool
    is_apart: bool


def _without_pages(text: str, counts: Counter[str]) -> str:
    """`text` without form feeds, and without what the pages that they part have at their edges."""
    pages = [page for part in text.split("\f") if (page := _trimmed(part.split("\n")))]
    is_paper = len(pages) >= FEWEST_PAGES and sum(map(_is_cut, pages[:-1])) >= CUT_PAGES * (len(pages) - 1)
    for edge in (0, -1, 0, -1):  # twice, for a head and a number
        edges = {i: page[edge] for i, page in enumerate(pages) if page and len(page[edge]) <= LONGEST_HEAD}
        for i in _furniture(edges, edge == -1, is_paper, pages, counts):
            del pages[i][edge]
            pages[i] = _trimmed(pages[i])
    pages = [page for page in pages if page] or [[""]]
    is_paper &= counts[HEADS] + counts[PAGE_NUMBERS] > 0
    ends = [_break(page, after, is_paper) for page, after in pairwise(pages)]
    return "".join("\n".join(page) + end for page, end in zip(pages, [*ends, "\n"], strict=True))


def _trimmed(lines: list[str]) -> list[str]:
    """`lines` without blank ones at their ends."""
    filled = [i for i, line in enumerate(lines) if line.strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []


def _is_cut(page: list[str]) -> bool:
    """Whether a page ends within a sentence."""
    last = next((line for line in reversed(page) if line.strip() and not NUMBER_LINE.fullmatch(line)), ".")
    return SENTENCE_END.search(last) is None


def _furniture(
    edges: dict[int, str], is_foot: bool, is_paper: bool, pages: list[list[str]], counts: Counter[str]
) -> list[int]:
    """The pages whose line at an edge is a page's number or a running head; edges: this line of each page.

    is_paper: whether the pages end within sentences; else each may be a chapter or a poem, with a number and a title.
    """
    groups: dict[_Edge, list[int]] = {}
    offsets: dict[int, int] = {}  # the number in a line, beyond that of its page
    for i, line in edges.items():
        alone, beside = NUMBER_LINE.fullmatch(line), HEAD.fullmatch(line)
        number = alone[1] if alone else beside and (beside[1] or beside[5])
        if number and number.isdigit():
            offsets[i] = int(number) - i
        gap = (beside[2] or beside[4] or "") if beside and not alone else ""
        words = "" if alone else (beside[3] if beside and number else line.strip()).casefold()
        groups.setdefault(_Edge(words, bool(number), len(gap) > 1 or "\t" in gap), []).append(i)
    found: list[int] = []
    for edge, places in groups.items():
        (offset, n_agree), *_ = Counter(offsets[i] for i in places if i in offsets).most_common(1) or [(0, 0)]
        if n_agree >= FEWEST_PAGES:  # the numbers count the pages
            places = [i for i in places if offsets.get(i, offset) == offset]
        if not edge.words:
            is_found = len(places) >= max(2, NUMBERED_PAGES * len(pages)) and (is_paper or is_foot)
        elif edge.has_number:
            is_found = len(places) >= 2 if edge.is_apart else n_agree >= FEWEST_PAGES and is_paper
        else:
            is_head = not LOWER_WORD.search(edges[places[0]]) or WEB_ADDRESS.search(edges[places[0]])
            is_found = is_paper and len(places) >= FEWEST_PAGES and is_head
            is_title = not is_foot and (places[0] == 0 or not _is_cut(pages[places[0] - 1]))  # where it stands first
            places = places[is_title:]
        found += places if is_found else []
        counts[HEADS if edge.words else PAGE_NUMBERS] += len(places) if is_found else 0
    return found


def _break(page: list[str], after: list[str], is_paper: bool) -> str:
    """What parts the last line of a page from the page after it: a paragraph may go on there."""
    if _is_cut(page) or not is_paper:  # verse may end a page without a full stop, too
        return "\n" if is_paper or (_is_cut(page) and after[0].lstrip()[:1].islower()) else "\n\n"
    is_short = len(page[-1]) < SHORT_LINE * max(map(len, page))
    return "\n\n" if is_short or after[0][:1].isspace() or not "".join(after[1:2]).strip() else "\n"
