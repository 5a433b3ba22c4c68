"""What the style sheets of a page say of the layout of its text: what is a block, what is hidden, which space counts.

It knows the properties in VALUES, and the selectors that can be decided where an element starts. These are matched step
by step while the elements come, so that one that is nested deep costs no more. Sheets are untrusted: a page that asks
for too many comparisons is refused.
"""

import html
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
SIMPLE = re.compile(
    rf"(?:[\w*-]*\|)?(?P<tag>[\w-]+|\*)|\.(?P<cls>{IDENT})|#(?P<id>{IDENT})|:(?P<pseudo>first-child|root|link|any-link)(?![\w(-])"
    rf"|\[\s*(?P<key>[\w|:\\-]{{1,50}})\s*(?:(?P<how>[~|^$*]?=)\s*(?P<value>\"[^\"]*\"|'[^']*'|[^\]\s\"']+)\s*i?\s*)?\]"
)
COMBINATOR = re.compile(r"\s*([>+~])\s*|\s+")


MOST_IMPORTS = 100  # sheets that one sheet imports, and these


class Compound(NamedTuple):
    """What one element must be; tests: of its attributes. follows: how the next element of the selector follows."""

    tag: str
    tests: tuple[tuple[str, str, str], ...]
    is_first: bool
    follows: str


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
                for text in prelude.split(",") if "(" not in prelude else ():
                    if selector := _selector(text.strip(), number, declared):
                        self.first.setdefault(_key(selector.compounds[0]), []).append(selector)


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
    return not media.strip() or any(part.strip().lower() in ("all", "screen") for part in media.split(","))


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
    compounds, place, n_ids, n_classes, n_tags = [], 0, 0, 0, 0
    while place < len(text):
        tag, tests, is_first, begun = "", [], False, place
        while found := SIMPLE.match(text, place):
            if found["tag"] and place > begun:
                return None
            place = found.end()
            tag = found["tag"].lower() if found["tag"] and found["tag"] != "*" else tag
            is_first |= found["pseudo"] == "first-child"
            tests += [("class", "~=", _plain(found["cls"]))] if found["cls"] else []
            tests += [("id", "=", _plain(found["id"]))] if found["id"] else []
            if found["key"]:
                key = found["key"].replace("\\", "").lower().replace("|", ":").lstrip("*:")
                tests.append((key, found["how"] or "", (found["value"] or "").strip("\"'")))
            tests += [("href", "", "")] if found["pseudo"] in ("link", "any-link") else []
            tag = "html" if found["pseudo"] == "root" else tag
        if place == begun:
            return None
        n_ids += sum(test[0] == "id" for test in tests)
        n_classes, n_tags = n_classes + len(tests) + is_first, n_tags + (tag != "")
        link = COMBINATOR.match(text, place)
        if not link and place < len(text):  # a pseudo-element, or what is not known
            return None
        place = link.end() if link else place
        compounds.append(Compound(tag, tuple(tests), is_first, (link[1] or " ") if link else ""))
    return Selector(tuple(compounds), (n_ids, n_classes - n_ids, n_tags, number), declared) if compounds else None


def _plain(name: str) -> str:
    return re.sub(r"\\(.)", r"\1", name)


def _key(compound: Compound) -> str:
    """Under which of an element's names its first compound is looked up."""
    marks = {("id", "="): "#", ("class", "~="): "."}
    names = [marks[key, how] + value for key, how, value in compound.tests if (key, how) in marks]
    return names[0] if names else compound.tag


def _fits(compound: Compound, tag: str, attributes: dict[str, str], is_first: bool) -> bool:
    if (compound.tag and compound.tag != tag) or (compound.is_first and not is_first):
        return False
    for key, how, wanted in compound.tests:
        value = attributes.get(key)
        if value is None:
            return False
        match how:
            case "=":
                fits = value.strip() == wanted
            case "~=":
                fits = wanted in value.split()
            case "|=":
                fits = value == wanted or value.startswith(wanted + "-")
            case "^=":
                fits = wanted != "" and value.startswith(wanted)
            case "$=":
                fits = wanted != "" and value.endswith(wanted)
            case "*=":
                fits = wanted != "" and wanted in value
            case _:
                fits = True
        if not fits:
            return False
    return True


_State = tuple[int, Selector, int]  # number of the sheet, selector, and how many of its compounds have matched


class _Open:
    """An open element, and the states that go on with its descendants, its children, the next child, and later ones."""

    __slots__ = "below", "children", "later", "n_children", "next"

    def __init__(self, below: dict[_State, None]) -> None:
        self.below = below  # dicts are used as ordered sets
        self.children, self.next, self.later = dict[_State, None](), dict[_State, None](), dict[_State, None]()
        self.n_children = 0


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
        keys = ["", tag, *("." + name for name in set(attributes.get("class", "").split()))]
        keys += ["#" + attributes["id"].strip()] if "id" in attributes else []
        for number, sheet in enumerate(self.sheets):
            for key in keys:
                states += [(number, selector, 0) for selector in sheet.first.get(key, ())]
        self.tried += len(states)
        element, is_first = _Open(parent.below), not parent.n_children
        parent.next, parent.n_children = {}, parent.n_children + 1
        self.open.append(element)
        for number, selector, step in states:
            compound = selector.compounds[step]
            if not _fits(compound, tag, attributes, is_first):
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
