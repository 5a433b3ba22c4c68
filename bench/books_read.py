"""How well pages and books are read: ours beside trafilatura, resiliparse and readability-lxml, against checked texts.

python -m bench.books_read FOLDER
pip install trafilatura resiliparse readability-lxml   # what is missing is left out, and named

FOLDER holds a folder for each kind, such as pages and books, with files NAME.html or NAME.epub, and beside each one
NAME.txt: the text that a person has checked. A word is lost that the checked text has oftener than the reader, added if
it is the other way round, and glued if it was added and the checked text has its parts side by side. The other readers
get an EPUB's pages one by one, in its order.
"""

import importlib
import importlib.metadata
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import configurator
from bench.common import markdown, origin, progress, write_result
from robopoet import files
from robopoet.errors import ConfigError, warn
from robopoet.machine import find_machine
from robopoet.text import books, cleaning, encodings, epub, markup

# letters and digits; of the scripts that are written without spaces, each alone
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
READ_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


def _trafilatura(page: str) -> str:
    import trafilatura

    return trafilatura.extract(page, include_comments=False, favor_recall=True) or ""


def _resiliparse(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(page, main_content=True)


def _readability(page: str) -> str:
    import readability

    return markup.html_text(readability.Document(page).summary())  # it finds the part of a page; ours lays that out


PEERS: dict[str, tuple[str, Callable[[str], str]]] = {  # package -> what is imported, and what reads a page
    "trafilatura": ("trafilatura", _trafilatura),
    "resiliparse": ("resiliparse", _resiliparse),
    "readability-lxml": ("readability", _readability),
}


@dataclass(frozen=True)
class BooksReadConfig:
    """The keys of bench.books_read."""

    folder: str = ""  # holds the folders with files and their checked texts
    out: str = "books_read"  # name of the result

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return [] if self.folder and checked(Path(self.folder)) else [f"folder: {self.folder!r} holds no NAME.txt"]


def checked(folder: Path) -> dict[str, list[Path]]:
    """The files that have a checked text beside them, by the name of their folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*/*")):
        if path.suffix in (*books.HTML, ".epub") and path.with_suffix(".txt").exists():
            found.setdefault(path.parent.name, []).append(path)
    return found


def pages_of(name: str, content: bytes) -> list[str]:
    """The source of a page, or of each page of an EPUB that is in its reading order."""
    if not name.endswith(".epub"):
        return [encodings.decode(name, content)[0]]
    found = epub.read_book(name, content).pages
    return [encodings.decode(name, page.content)[0] for page in found if page.role not in ("unlisted", "unread")]


def compare(text: str, wanted: str) -> dict[str, int]:
    """How many words `wanted` has, and how many of them `text` has lost, added and glued."""
    read, words = Counter(READ_WORD.findall(text)), READ_WORD.findall(wanted)
    added = read - Counter(words)
    pairs = {first + second for first, second in pairwise(words)}
    return {
        "words": len(words),
        "lost": (Counter(words) - read).total(),
        "added": added.total(),
        "glued": sum(n for word, n in added.items() if word in pairs),
    }


def measure(readers: dict[str, Callable[[str, bytes], str]], paths: list[Path]) -> dict[str, dict[str, Any]]:
    """What each reader makes of the files, summed; failed: the number of files that it raised an error on."""
    sums = {name: {"words": 0, "lost": 0, "added": 0, "glued": 0, "failed": 0, "seconds": 0.0} for name in readers}
    for path in progress(paths, "files"):
        content = files.read_bytes(path, ConfigError)
        wanted = cleaning.clean_text(files.read_bytes(path.with_suffix(".txt"), ConfigError).decode())
        for name, read in readers.items():
            start = time.process_time()
            try:
                text = read(path.name, content)
            except Exception as e:  # a peer may raise anything
                warn(f"{name}: {path.name}: {e}")
                text = ""
                sums[name]["failed"] += 1
            sums[name]["seconds"] += time.process_time() - start
            for key, n in compare(cleaning.clean_text(text), wanted).items():
                sums[name][key] += n
    return sums


def main(cfg: BooksReadConfig) -> None:
    """Read all files with every reader that is installed, and write the result."""
    readers: dict[str, Callable[[str, bytes], str]] = {"ours": lambda name, content: books.read(name, content)[0]}
    versions = {}
    for package, (module, read) in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError:
            warn(f"{package} is left out: pip install {package}")
            continue
        versions[package] = importlib.metadata.version(package)
        readers[package] = lambda name, content, read=read: "\n\n".join(map(read, pages_of(name, content)))
    found = checked(Path(cfg.folder))
    result = origin("books_read", find_machine("cpu", "float32")) | {
        "versions": versions,
        "files": {kind: [path.name for path in paths] for kind, paths in found.items()},
        "readers": {kind: measure(readers, paths) for kind, paths in found.items()},
    }
    print(table([result]))
    return write_result(result, cfg.out)


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results, a row for each kind of file and reader."""
    rows = []
    for result in results:
        for kind, readers in result["readers"].items():
            n = len(result["files"][kind])
            for name, sums in readers.items():
                shares = [f"{sums[key] / max(sums['words'], 1):.2%}" for key in ("lost", "added")]
                version = result["versions"].get(name, "")
                figures = [f"{sums['glued']:,}", f"{sums['failed']}", f"{sums['seconds']:.1f}"]
                rows.append([f"{kind} ({n})", f"{name} {version}".strip(), f"{sums['words']:,}", *shares, *figures])
    return markdown(["files", "reader", "words", "lost", "added", "glued", "failed", "s"], rows)


if __name__ == "__main__":
    configurator.launch(main, BooksReadConfig, positional="folder")
