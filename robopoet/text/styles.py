"""What the style sheets of a page say of the layout of its text: what is a block, what is hidden, which space counts.

It knows the properties in VALUES, and the selectors that can be decided where an element starts. These are matched step
by step while the elements come, so that one that is nested deep costs no more. Sheets are untrusted: a page that asks
for too many comparisons is refused.
"""

import html
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

TRIED = 3_000_000  # the most comparisons of an element with a part of a selector on a page: some seconds
DISPLAYS = {
    **dict.fromkeys("block list-item flow-root table table-caption table-row table-row-group".split(), "block"),
    **dict.fromkeys("table-header-group table-footer-group".split(), "block"),
    **dict.fromkeys("inline inline-block inline-table contents ruby ruby-base".split(), "inline"),
    **dict.fromkeys(("flex", "grid"), "flex"),
    **dict.fromkeys(("inline-flex", "inline-grid"), "inline-flex"),
    **dict.fromkeys(("none", "ruby-text"), "none"),
    "table-cell": "cell",
}
VALUES = {  # the properties that count -> what each of their values means
    "display": DISPLAYS,
    "visibility": {"visible": "visible", "hidden": "hidden", "collapse": "hidden"},
    "white-space": {
        **dict.fromkeys(("normal", "nowrap", "initial"), "normal"),
        **dict.fromkeys(("pre", "pre-wrap", "break-spaces"), "pre"),
        "pre-line": "pre-line",
    },
    "position": {"absolute": "apart", "fixed": "apart", "static": "", "relative": "", "sticky": ""},
    "float": {"left": "apart", "right": "apart", "none": ""},
}
LARGE_SIZES = {"em": 1.8, "rem": 1.8, "%": 180, "px": 29, "pt": 22}  # from which size on a letter is a drop capital
COMMENT = re.compile(r"/\*.*?(?:\*/|\Z)|<!--|-->", re.S)
# a string, closed or not, or what parts rules and declarations
TOKEN = re.compile(r"""(?:"(?:[^"\\\n]|\\.)*+|'(?:[^'\\\n]|\\.)*+)["']?|[{};]""", re.S)
IDENT = r"(?:[\w-]|\\.)+"
NESTED = r"(?:[^()]|\([^()]*\))*+"
LISTED = re.compile(rf"""(?:[^,()"'\[]|"[^"]*"|'[^']*'|\({NESTED}\)|\[[^\[\]]*\])++""")  # a selector among others
SIMPLE = re.compile(
    rf"(?:[\w*-]*\|)?(?P<tag>[\w-]+|\*)|\.(?P<cls>{IDENT})|#(?P<id>{IDENT})|:(?P<pseudo>[\w-]+)(?:\((?P<argument>{NESTED})\))?"
    rf"|\[\s*(?P<key>[\w|:\\-]{{1,50}})\s*(?:(?P<how>[~|^$*]?=)\s*(?P<value>\"[^\"]*\"|'[^']*'|[^\]\s\"']+)\s*i?\s*)?\]"
)
COMBINATOR = re.compile(r"\s*([>+~])\s*|\s+")
NTH = re.compile(r"\s*(?:([+-]?\d{0,9})n)?\s*([+-]?\s*\d{1,9})?\s*")
COMPARE: dict[str | None, Callable[[str, str], bool]] = {  # an attribute's value with the one that a selector wants
    None: lambda value, wanted: True,
    "=": lambda value, wanted: value.strip() == wanted,
    "~=": lambda value, wanted: wanted in value.split(),
    "|=": lambda value, wanted: f"{value}-".startswith(f"{wanted}-"),
    "^=": lambda value, wanted: wanted != "" and value.startswith(wanted),
    "$=": lambda value, wanted: wanted != "" and value.endswith(wanted),
    "*=": lambda value, wanted: wanted != "" and wanted in value,
}
MOST_IMPORTS = 100  # sheets that one sheet imports, and these
MOST_LISTED = 10  # selectors in one that holds others


class _Element(NamedTuple):
    """An element as selectors see it; places: among its parent's children, and among those of its name, from 1."""

    tag: str
    attributes: Mapping[str, str]
    places: tuple[int, int]


class Compound(NamedTuple):
    """What one element must be: all that tests ask. follows: how the next element of the selector follows.

    key: a name that such an element has. weight: of its ids, classes and names, for the order of rules.
    """

    tests: tuple[Callable[[_Element], bool], ...] = ()
    key: str = ""
    weight: tuple[int, int, int] = (0, 0, 0)
    follows: str = ""


@dataclass(frozen=True, eq=False)
class Selector:
    """Elements that a rule applies to. rank: orders what rules declare of one element, the last wins."""

    compounds: tuple[Compound, ...]
    rank: tuple[int, ...]
    declared: dict[str, tuple[bool, str]]


def declarations(block: str) -> dict[str, tuple[bool, str]]:
    """What a block of CSS says of the properties that count: whether it is important, and the meaning of its value."""
    found: dict[str, tuple[bool, str]] = {}
    for part in block.split(";"):
        name, _, value = part.partition(":")
        name, (value, *important) = name.strip().lower(), value.lower().split("!", 1)
        if name == "font-size":
            size = re.fullmatch(r"\s*(\d{1,4}(?:\.\d{1,9})?)(em|rem|%|px|pt)\s*", value)
            meaning: str | None = "large" if size and float(size[1]) >= LARGE_SIZES[size[2]] else ""
        elif name in ("left", "top"):
            meaning = value.strip()
        else:
            words = value.split()
            words = [word for word in words if word != "flow"] if name == "display" and len(words) > 1 else words
            meaning = VALUES.get(name, {}).get(words[0]) if len(words) == 1 else None
        if meaning is not None and (important or not found.get(name, (False,))[0]):
            found[name] = (bool(important), meaning)
    return found


class Sheet:
    """The rules of one style sheet that count, by what their first compound asks for. imports: other sheets."""

    def __init__(self, css: str) -> None:
        self.first: dict[str, list[Selector]] = {}
        self.imports: list[str] = []
        css = COMMENT.sub(" ", html.unescape(css) if "&" in css else css)
        for number, (prelude, block) in enumerate(_rules(css)):
            if prelude.startswith("@"):
                target = re.match(r"""@import\s*(?:url\()?\s*["']?([^"')\s;]+)""", prelude)
                self.imports += [target[1]] if target else []
            elif declared := declarations(block):
                for text in LISTED.findall(prelude):
                    if selector := _selector(text.strip(), number, declared):
                        self.first.setdefault(selector.compounds[0].key, []).append(selector)


class Sheets:
    """The style sheets of a book, each parsed once.

    sheets: by key. find: the key for a path of the book and an address that it names.
    """

    def __init__(self, sheets: Mapping[str, bytes], find: Callable[[str, str], str]) -> None:
        self.sheets, self.find = sheets, find
        self.parsed: dict[str, Sheet] = {}
        self.found: dict[str, list[Sheet]] = {}

    def named(self, page: str, href: str) -> list[Sheet]:
        """The sheet that the file `page` means by `href`, after those that it imports."""
        first = self.find(page, href)
        if first not in self.found:
            keys = [first]
            for key in keys:  # keys grows while it is read
                imported = [self.find(key, other) for other in self._parsed(key).imports]
                keys += [key for key in imported if key not in keys][: MOST_IMPORTS - len(keys)]
            self.found[first] = [self._parsed(key) for key in reversed(keys)]
        return self.found[first]

    def _parsed(self, key: str) -> Sheet:
        if key not in self.parsed:
            self.parsed[key] = Sheet(self.sheets.get(key, b"").decode("utf-8", "replace"))
        return self.parsed[key]


def is_for_screen(media: str) -> bool:
    """Whether what is meant for these media is for the page that a reader sees, whatever the size of that."""
    return not media.strip() or any(
        part.strip().lower() in ("all", "screen", "only screen") for part in media.split(",")
    )


def _rules(css: str) -> Iterator[tuple[str, str]]:
    """Each rule as what stands before its block, and that; and each @import."""
    start, skipped, rule = 0, 0, ""
    for token in TOKEN.finditer(css):
        mark = token[0]
        if mark not in ("{", "}", ";"):
            continue
        if skipped or (rule and mark == "{"):  # a block in a rule, or in what is not for a screen
            skipped += (mark == "{") - (mark == "}")
            start = start if rule else token.end()
            continue
        prelude = css[start : token.start()].strip()
        if rule:
            if mark == "}":
                yield rule, prelude
                rule, start = "", token.end()
            continue
        start = token.end()
        if mark == "{" and prelude.startswith("@"):
            name, _, media = prelude.partition(" ")
            skipped = not (name in ("@layer", "@supports") or (name == "@media" and is_for_screen(media)))
        elif mark == "{":
            rule = prelude or "{"
        elif mark == ";" and prelude.startswith("@import"):
            yield prelude, ""


def _selector(text: str, number: int, declared: dict[str, tuple[bool, str]]) -> Selector | None:
    """The selector that `text` is, unless it asks for what can't be told where an element starts."""
    compounds, place = list[Compound](), 0
    while place < len(text):
        compound, place = _compound(text, place)
        link = COMBINATOR.match(text, place)
        if not compound or (not link and place < len(text)):  # such as a pseudo-element
            return None
        place = link.end() if link else place
        compounds.append(compound._replace(follows=(link[1] or " ") if link else ""))
    weight = [sum(weights) for weights in zip(*(compound.weight for compound in compounds), strict=True)]
    return Selector(tuple(compounds), (*weight, number), declared) if compounds else None


def _compound(text: str, place: int = 0) -> tuple[Compound | None, int]:
    """What the selector at `place` asks of one element, if that can be told where it starts, and where that ends."""
    parts: list[Compound] = []
    while found := SIMPLE.match(text, place):
        if not (part := _simple(found)) or (found["tag"] and parts):
            return None, place
        parts.append(part)
        place = found.end()
    if not parts:
        return None, place
    tests = tuple(test for part in parts for test in part.tests)
    ids, classes, names = (sum(weights) for weights in zip(*(part.weight for part in parts), strict=True))
    key = max((part.key for part in parts), key=lambda key: key[:1] in (".", "#"))
    return Compound(tests, key, (ids, classes, names)), place


def _simple(found: re.Match[str]) -> Compound | None:
    """The compound that a simple selector alone is, if that can be told where an element starts."""
    tag, pseudo = (found["tag"] or "").lower(), (found["pseudo"] or "").lower()
    if tag:
        return _asking(lambda one: one.tag == tag, tag, (0, 0, 1)) if tag != "*" else Compound()
    if not pseudo:
        named = re.sub(r"\\(.)", r"\1", found["cls"] or found["id"] or "")
        if found["cls"]:
            key, how, wanted, name = "class", "~=", named, f".{named}"
        elif found["id"]:
            key, how, wanted, name = "id", "=", named, f"#{named}"
        else:
            key = found["key"].replace("\\", "").lower().replace("|", ":").lstrip("*:")
            how, wanted, name = found["how"], (found["value"] or "").strip("\"'"), ""
        fits, weight = COMPARE[how], (1, 0, 0) if key == "id" else (0, 1, 0)
        return _asking(lambda one: key in one.attributes and fits(one.attributes[key], wanted), name, weight)
    if pseudo in ("not", "is", "where"):
        texts = [text.strip() for text in LISTED.findall(found["argument"] or "")]
        inner = [one for text in texts[:MOST_LISTED] for one, end in [_compound(text)] if one and end == len(text)]
        if not inner or len(inner) < len(texts):
            return None
        weight, is_not = max(one.weight for one in inner) if pseudo != "where" else (0, 0, 0), pseudo == "not"
        return _asking(lambda one: is_not != any(_fits(compound, one) for compound in inner), "", weight)
    if pseudo in ("first-child", "first-of-type", "nth-child", "nth-of-type"):
        argument = (found["argument"] or "").strip().lower() if pseudo.startswith("nth") else "1"
        wanted = {"odd": "2n+1", "even": "2n"}.get(argument, argument)
        if wanted and (nth := NTH.fullmatch(wanted)):
            step = 0 if nth[1] is None else int(nth[1]) if nth[1][-1:].isdigit() else int(f"{nth[1]}1")
            first, of_type = int((nth[2] or "0").replace(" ", "")), pseudo.endswith("type")
            steps = range(first, 2**31, step) if step > 0 else range(first, 0, step) if step else (first,)
            return _asking(lambda one: one.places[of_type] in steps, "", (0, 1, 0))
    return None


def _asking(test: Callable[[_Element], bool], key: str, weight: tuple[int, int, int]) -> Compound:
    return Compound((test,), key, weight)


def _fits(compound: Compound, element: _Element) -> bool:
    return all(test(element) for test in compound.tests)


_State = tuple[int, Selector, int]  # number of the sheet, selector, and how many of its compounds have matched


@dataclass(slots=True)
class _Open:
    """An open element, and the states that go on with its descendants, its children, the next child, and later ones."""

    below: dict[_State, None]  # dicts are used as ordered sets
    children: dict[_State, None] = field(default_factory=dict)
    next: dict[_State, None] = field(default_factory=dict)
    later: dict[_State, None] = field(default_factory=dict)
    tags: Counter[str] = field(default_factory=Counter)  # how many children have each name
    n_children: int = 0


class Styles:
    """The style sheets of a page, and the elements that are open in it."""

    def __init__(self) -> None:
        self.sheets: list[Sheet] = []
        self.open = [_Open({})]
        self.tried = 0

    def start(self, tag: str, attributes: dict[str, str]) -> dict[str, str]:
        """What the sheets and its own style say of the layout of an element that starts."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        if self.sheets and self.tried <= TRIED:
            self._match(tag, attributes, found)
        if "style" in attributes:
            for name, (important, value) in declarations(attributes["style"]).items():
                if name not in found or (important, 1) > found[name][0][:2]:
                    found[name] = ((important, 1), value)
        return {name: value for name, (_, value) in found.items()} if found else {}

    def _match(self, tag: str, attributes: dict[str, str], found: dict[str, tuple[tuple[int, ...], str]]) -> None:
        parent = self.open[-1]
        states: list[_State] = [*parent.children, *parent.below, *parent.next, *parent.later]
        parent.n_children, parent.tags[tag] = parent.n_children + 1, parent.tags[tag] + 1
        places = parent.n_children, parent.tags[tag]
        one = _Element(tag, attributes, places)
        keys = [
            "",
            tag,
            *(f".{name}" for name in set(attributes.get("class", "").split())),
            f"#{attributes.get('id', '').strip()}",
        ]
        for number, sheet in enumerate(self.sheets):
            for key in keys:
                states += [(number, selector, 0) for selector in sheet.first.get(key, ())]
        self.tried += len(states)
        element = _Open(parent.below)
        parent.next = {}
        self.open.append(element)
        for number, selector, step in states:
            compound = selector.compounds[step]
            if not _fits(compound, one):
                continue
            state = (number, selector, step + 1)
            match compound.follows:
                case "":
                    for name, (important, value) in selector.declared.items():
                        rank = (important, 0, *selector.rank[:3], number, selector.rank[3])
                        if name not in found or rank >= found[name][0]:
                            found[name] = (rank, value)
                case ">":
                    element.children[state] = None
                case "+":
                    parent.next[state] = None
                case "~":
                    parent.later[state] = None
                case _ if state not in element.below:
                    element.below = element.below | {state: None}

    def end(self) -> None:
        """End the element that started last of those that are open."""
        if self.sheets and self.tried <= TRIED and len(self.open) > 1:
            self.open.pop()
