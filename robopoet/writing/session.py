"""An interactive session: prompts and commands, one a line."""

import collections
import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import configurator
from robopoet import files
from robopoet.errors import ConfigError, Mistake, describe, did_you_mean
from robopoet.writing.editing import HISTORY_LINES, edit_lines, keep_line
from robopoet.writing.passage import Passage, Settings, make_settings
from robopoet.writing.poet import Poet
from robopoet.writing.replay import save_passages
from robopoet.writing.terminal import BOLD, RED, check_writable, paint, print_passages, unescape

KEYS = tuple(field.name for field in dataclasses.fields(Settings))
HINTS = get_type_hints(Settings)
ABOUT_LAST = ("/more", "/again", "/undo", "/check", "/save")  # what these are about: the last passage
COMMANDS = (*ABOUT_LAST, "/set", *(f"/{key}" for key in KEYS), "/help", "/quit", "/exit")
HELP = """\
anything that is no command is a prompt; \\n in it, or a line break that you paste, is a line break
/more            continue the last passage
/again           write another passage from its prompt
/undo            forget it: the one before is the last again
/check           show how much of it is copied from the training text
/save FILE       append it with its prompt to FILE; to a .jsonl as a record from which --replay regenerates it
/set NAME VALUE  change a setting, or without a value, back to its default; /NAME VALUE does the same, and a part
                 of the name is enough: /temp 0.7, /stop "THE END" "\\n\\n"
/set             show all settings
/quit, quit, exit or Ctrl-D ends the session; Ctrl-C stops a passage and keeps what is written of it"""
HELP_TERMINAL = """
Tab completes commands, settings, styles and file names; the last {:,} lines that you typed are kept in
{}, which only you can read"""
MAX_UNDO = 100  # passages that are remembered
TAIL_CHARS = 400  # characters shown of a passage that is the last again


class Session:
    """Reads prompts and commands from stdin, and prints a passage for each prompt as it is generated."""

    def __init__(self, poet: Poet, settings: Settings):
        self.poet, self.settings = poet, settings
        self.next_number = 0  # number of the random stream that the next passage draws from
        self.passages: collections.deque[Passage] = collections.deque(maxlen=MAX_UNDO)
        self.history: Path | None = None  # where typed lines are kept

    @property
    def last(self) -> Passage:
        """The last passage; there must be one."""
        return self.passages[-1]

    def run(self) -> None:
        """Read lines until /quit, quit, exit or the end of input; raises ConfigError if they are not UTF-8."""
        self.history = edit_lines(self.complete)
        print("Type a prompt, or /help.")
        while True:
            try:
                line = input("> ")
            except EOFError:
                return print()
            except UnicodeDecodeError as e:
                raise ConfigError(f"stdin: byte {e.start} is not UTF-8") from None
            except KeyboardInterrupt:
                print()
                continue
            if line.strip() in ("/quit", "/exit", "quit", "exit"):
                return None
            try:
                if self.history:
                    keep_line(self.history, line)
                self.do(line)
            except (Mistake, OSError) as e:
                print(paint(describe(e) if isinstance(e, OSError) else str(e), RED))
            except KeyboardInterrupt:
                print()

    def do(self, line: str) -> None:
        """Run a command or continue a prompt; raises ConfigError and others if that fails."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ABOUT_LAST and not self.passages:
            raise ConfigError(f"{command}: there is no passage yet; type a prompt")
        if not line.startswith("/"):
            self.generate(unescape(line))
        elif command == "/more":
            self.generate(self.last.prompt + self.last.text, echo=False)
        elif command == "/again":
            self.generate(self.last.prompt)
        elif command == "/undo":
            self.undo()
        elif command == "/check":
            print(self.poet.originality.check(self.last.text).describe())
        elif command == "/save":
            self.save(argument)
        elif command == "/help":
            print(HELP + (HELP_TERMINAL.format(HISTORY_LINES, self.history) if self.history else ""))
            print(re.sub("^  --", "  ", configurator.usage(Settings).partition("\n")[2], flags=re.M))
            print(f"\nstyles: {', '.join(self.poet.styles) or 'none'}")
        elif line.strip() == "/set":
            print("\n".join(map(self.describe, KEYS)))
        else:
            self.set(argument if command == "/set" else line.strip())

    def generate(self, prompt: str, echo: bool = True) -> None:
        """Continue `prompt` with the next random stream, until an interrupt at most; echo: print the prompt, too."""
        (passage,) = passages = self.poet.begin(prompt, 1, self.next_number, **dataclasses.asdict(self.settings))
        self.next_number += 1
        try:
            print_passages(self.poet, passages, self.poet.stream(passages, logprobs=True), echo=echo)
        except KeyboardInterrupt:
            n_shown = len(passage.text)
            passage.cut()
            print(passage.text[n_shown:])
        self.passages.append(passage)

    def undo(self) -> None:
        """Forget the last passage, and show the end of the one before."""
        self.passages.pop()
        text = self.last.prompt + self.last.text if self.passages else "(no passage is left)"
        print(text if len(text) <= TAIL_CHARS else f"...{text[-TAIL_CHARS:]}")

    def save(self, argument: str) -> None:
        """Append the last passage and its prompt to a file: a .jsonl gets a record for a replay, any other the text.

        Raises ConfigError or OSError if that fails; then the file is as it was.
        """
        if not argument:
            raise ConfigError("/save: name a file, e.g. /save poem.txt, or /save passages.jsonl for --replay")
        path = Path(os.path.expanduser(argument))
        check_writable("save", path)
        if path.suffix == ".jsonl":
            if not self.last.done:
                raise ConfigError("/save: the passage was interrupted before its first token; /again generates another")
            save_passages(path, self.poet, [self.last])
        else:
            gap = "\n" if path.exists() and path.stat().st_size else ""
            files.append_lines(path, f"{gap}{self.last.prompt}{self.last.text}\n".encode())
        print(f"appended to {path}")

    def set(self, change: str) -> None:
        """Change a setting: NAME VALUE or NAME=VALUE, the value in quotes or not; without one it gets its default.

        Raises ConfigError, and changes nothing, if there is no such setting or it can't have that value.
        """
        found = re.fullmatch(r"(?s)(.+?)(?:\s*=\s*|\s+|$)(.*)", change)
        assert found  # it has a character
        word, value = found.groups()
        key, quoted = key_of(word), re.fullmatch(r'("[^"]*"\s*)+', value)
        texts = [unescape(text) for text in (re.findall('"([^"]*)"', value) if quoted else [value])]
        text = texts[0] if len(texts) == 1 else texts
        given = dataclasses.asdict(self.settings) | {key: getattr(Settings, key)}
        changed = configurator.change(self.settings, key, text) if text else make_settings(given)
        self.poet.blend_of(changed.style)  # raises for an unknown style
        self.settings = changed
        self.next_number = 0 if key == "seed" else self.next_number
        print(self.describe(key))

    def describe(self, key: str) -> str:
        """A setting with its value, and its default if that is another."""
        value, default = getattr(self.settings, key), getattr(Settings, key)
        line = f"{key}: {value!r}"
        return line if value == default else f"{paint(line, BOLD)} (default: {default!r})"

    def complete(self, line: str) -> list[str]:
        """What a line that is typed so far may become: its last word a command, setting, value or file."""
        command, space, argument = line.partition(" ")
        if not line.startswith("/"):
            return []
        if command == "/save" and space:
            return [f"/save {path}" for path in paths(argument)]
        before = line[: max(map(line.rfind, " ,=")) + 1]
        words: list[str] = []
        if not before:
            takes_value = {"/save", "/set", *(f"/{key}" for key in KEYS)}
            words = [f"{word} " if word in takes_value else word for word in COMMANDS]
        elif before == "/set ":
            words = [f"{key} " for key in KEYS]
        elif named := re.match(r"(?:/set )?([^ =]+)[ =]", line):
            with contextlib.suppress(ConfigError):
                key = key_of(named[1])
                choices = get_args(HINTS[key]) if get_origin(HINTS[key]) is Literal else ()
                words = [*(self.poet.styles if key == "style" else choices)]
        return [before + word for word in words if word.startswith(line[len(before) :])]


def key_of(word: str) -> str:
    """The setting whose name, without underscores, begins with a word or else holds it.

    word: may begin with the / of a command. Raises ConfigError unless there is one such setting.
    """
    slash, part = word[: word.startswith("/")], word.lstrip("/-").replace("_", "")
    names = {key.replace("_", ""): key for key in KEYS}
    found = [name for name in names if name.startswith(part)] or [name for name in names if part in name]
    if len(found) == 1:
        return names[found[0]]
    if found and part:
        raise ConfigError(f"{word}: could be {', '.join(slash + names[name] for name in found)}; write more of it")
    kind, near = ("command", did_you_mean(word, COMMANDS)) if slash else ("setting", did_you_mean(word, KEYS))
    raise ConfigError(f"{word}: no such {kind}{near or '; /help lists all'}")


def paths(start: str) -> list[str]:
    """The files and folders whose path begins with `start`, hidden ones only if it asks for them."""
    folder, name = os.path.split(start)
    found = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(os.path.expanduser(folder) or "."):
            if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
                found.append(os.path.join(folder, entry.name) + "/" * entry.is_dir())
    return sorted(found)
