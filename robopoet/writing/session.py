"""An interactive session: prompts and commands, one a line."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import configurator
from configurator import ConfigError
from robopoet.errors import CheckpointError, DataError
from robopoet.writing.passage import Passage, Settings, Until
from robopoet.writing.poet import Poet
from robopoet.writing.replay import save
from robopoet.writing.terminal import check_save, print_passages, unescape

SETTERS = {  # a command -> the setting that it changes, and the values that it takes
    "/style": ("style", "NAME, or a blend: NAME:0.7,NAME:0.3"),
    "/temp": ("temperature", "0 to 1e6 (0: always the likeliest)"),
    "/topk": ("top_k", "from 0 (0: all)"),
    "/topp": ("top_p", "1e-9 to 1 (1: all)"),
    "/minp": ("min_p", "0 to 1 (0: off)"),
    "/rep": ("repetition_penalty", "1e-6 to 1e6 (1: off)"),
    "/ngram": ("no_repeat_ngram", "0 to 100 (0: off)"),
    "/maxcopy": ("max_copy", "3 to 100 (0: off)"),
    "/tokens": ("max_new_tokens", "from 1"),
    "/until": ("until", ", ".join(get_args(Until))),
    "/seed": ("seed", "from 0"),
}
ABOUT_LAST = ("/more", "/again", "/check", "/save")
COMMANDS = (*SETTERS, *ABOUT_LAST, "/settings", "/help", "/quit", "/exit")
HELP = f"""{chr(10).join(f"{command:<9} {values}" for command, (_, values) in SETTERS.items())}
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
        self.next_number = 0  # of the next passage's random stream
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
            except (ConfigError, DataError, CheckpointError, OSError) as e:
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
        elif command in SETTERS:
            changed = configurator.change(self.settings, SETTERS[command][0], argument)
            self.poet.blend_of(changed.style)  # raises for an unknown style
            self.settings = changed
            self.next_number = 0 if command == "/seed" else self.next_number
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
            check_save(Path(argument))
            save(Path(argument), self.poet, self.last)
        elif command == "/settings":
            print("\n".join(f"{key}: {value!r}" for key, value in dataclasses.asdict(self.settings).items()))
        elif command != "/help":
            near = configurator.did_you_mean(command, COMMANDS)
            raise ConfigError(f"{command}: no such command{near or '; /help lists all'}")
        else:
            print(HELP)
            print(f"styles: {', '.join(self.poet.styles) or 'none'}")

    def generate(self, prompt: str, echo: bool = True) -> None:
        """Continue `prompt` with the next random stream; echo: print the prompt, too."""
        self.last = self.poet.begin(prompt, 1, self.next_number, **dataclasses.asdict(self.settings))
        self.next_number += 1
        print_passages(self.poet, self.last, self.poet.stream(self.last, logprobs=True), echo=echo)


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
