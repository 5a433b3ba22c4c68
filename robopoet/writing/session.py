"""An interactive session: prompts and commands, one a line."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import configurator
from robopoet.errors import ConfigError, Mistake, did_you_mean
from robopoet.writing.passage import Passage, Settings, make_settings
from robopoet.writing.poet import Poet
from robopoet.writing.replay import save_passages
from robopoet.writing.terminal import check_writable, print_passages, unescape

KEYS = tuple(field.name for field in dataclasses.fields(Settings))
ABOUT_LAST = ("/more", "/again", "/check", "/save")
COMMANDS = (*(f"/{key}" for key in KEYS), *ABOUT_LAST, "/settings", "/help", "/quit", "/exit")
HELP = """

Each of these sets a value, or its default if you give none; a part of a name is enough: /temp 0.7, /topk 40
/settings shows the values they have
/more continues the last passage, /again generates another from its prompt
/check shows how much of it is copied, /save FILE saves it
/quit, quit or exit ends the session
anything else is a prompt (\\n: line break); Ctrl-C stops a passage"""
HISTORY, HISTORY_LINES = Path("~/.robopoet_history"), 1000


class Session:
    """Reads prompts and commands from stdin, and prints a passage for each prompt as it is generated."""

    def __init__(self, poet: Poet, settings: Settings):
        self.poet, self.settings = poet, settings
        self.next_number = 0  # number of the random stream that the next passage draws from
        self.last: list[Passage] = []  # the last passage, once there is one

    def run(self) -> None:
        """Read lines until /quit, quit, exit or the end of input; raises ConfigError if they are not UTF-8."""
        with editing([*COMMANDS, *self.poet.styles]):
            self._run()

    def _run(self) -> None:
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
                self.do(line)
            except (Mistake, OSError) as e:
                print(e)
            except KeyboardInterrupt:
                print()

    def do(self, line: str) -> None:
        """Run a command or continue a prompt; raises ConfigError and others if that fails."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command in ABOUT_LAST and not self.last:
            raise ConfigError(f"{command}: there is no passage yet; type a prompt")
        if not line.startswith("/"):
            self.generate(unescape(line))
        elif command == "/more":
            self.generate(self.last[0].prompt + self.last[0].text, echo=False)
        elif command == "/again":
            self.generate(self.last[0].prompt)
        elif command == "/check":
            print(self.poet.originality.check(self.last[0].text).describe())
        elif command == "/save":
            if not argument:
                raise ConfigError("/save: name a file, e.g. /save passages.jsonl")
            if not self.last[0].done:
                raise ConfigError("/save: the passage was interrupted; /again generates another")
            check_writable("save", Path(argument))
            save_passages(Path(argument), self.poet, self.last)
        elif command == "/settings":
            print("\n".join(f"{key}: {value!r}" for key, value in dataclasses.asdict(self.settings).items()))
        elif command == "/help":
            print(re.sub("^  --", "/", configurator.usage(Settings).partition("\n\n")[2], flags=re.M) + HELP)
            print(f"styles: {', '.join(self.poet.styles) or 'none'}")
        else:
            self.set(key_of(command), unescape(argument))

    def set(self, key: str, text: str) -> None:
        """Give a setting the value of `text`, or its default for none; raises ConfigError if it can't have that."""
        given = dataclasses.asdict(self.settings) | {key: getattr(Settings, key)}
        changed = configurator.change(self.settings, key, text) if text else make_settings(given)
        self.poet.blend_of(changed.style)  # raises for an unknown style
        self.settings = changed
        self.next_number = 0 if key == "seed" else self.next_number

    def generate(self, prompt: str, echo: bool = True) -> None:
        """Continue `prompt` with the next random stream; echo: print the prompt, too."""
        self.last = self.poet.begin(prompt, 1, self.next_number, **dataclasses.asdict(self.settings))
        self.next_number += 1
        print_passages(self.poet, self.last, self.poet.stream(self.last, logprobs=True), echo=echo)


def key_of(command: str) -> str:
    """The setting that a command changes: its name, without underscores, begins with the command's or else holds it.

    Raises ConfigError unless there is one.
    """
    part, names = command[1:].replace("_", ""), {key.replace("_", ""): key for key in KEYS}
    found = [name for name in names if name.startswith(part)] or [name for name in names if part in name]
    if len(found) == 1:
        return names[found[0]]
    if found:
        raise ConfigError(f"{command}: could be {', '.join(f'/{names[name]}' for name in found)}; write more of it")
    near = did_you_mean(command, COMMANDS)
    raise ConfigError(f"{command}: no such command{near or '; /help lists all'}")


@contextlib.contextmanager
def editing(words: list[str]) -> Iterator[None]:
    """Lets input() edit lines, complete `words` and keep a history in HISTORY, where Python has readline."""
    try:
        import readline
    except ImportError:  # as on Windows
        readline = None
    if not (readline and sys.stdin.isatty()):
        yield
        return
    history = HISTORY.expanduser()
    readline.set_completer_delims(" ,:")
    readline.set_completer(lambda text, i: [*(w for w in words if w.startswith(text)), None][i] if text else None)
    readline.parse_and_bind("tab: complete")
    with contextlib.suppress(OSError):  # there is none yet
        readline.read_history_file(history)
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with contextlib.suppress(OSError):
            readline.write_history_file(history)
