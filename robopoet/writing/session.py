"""An interactive session: prompts and commands, one a line."""

import contextlib
import dataclasses
from pathlib import Path

import configurator
from configurator import ConfigError
from robopoet.errors import CheckpointError, DataError
from robopoet.writing.passage import Passage, Settings
from robopoet.writing.poet import Poet
from robopoet.writing.replay import save
from robopoet.writing.terminal import check_save, print_passages, unescape

SETTERS = {  # a command -> the setting that it changes
    "/style": "style",
    "/temp": "temperature",
    "/topk": "top_k",
    "/topp": "top_p",
    "/minp": "min_p",
    "/rep": "repetition_penalty",
    "/ngram": "no_repeat_ngram",
    "/maxcopy": "max_copy",
    "/tokens": "max_new_tokens",
    "/until": "until",
    "/seed": "seed",
}
HELP = f"""{" VALUE, ".join(SETTERS)} VALUE
change a setting; /settings shows them all
/more continues the last passage, /again generates another from its prompt
/check shows how much of it is copied, /save FILE saves it
/quit, quit or exit ends the session
anything else is a prompt (\\n: line break); Ctrl-C stops a passage"""


class Session:
    """Reads prompts and commands from stdin, and prints a passage for each prompt as it is generated."""

    def __init__(self, poet: Poet, settings: Settings):
        self.poet, self.settings = poet, settings
        self.next_number = 0  # of the next passage's random stream
        self.last: list[Passage] = []  # the last passage, once there is one

    def run(self) -> None:
        """Read lines until /quit, quit, exit or the end of input; raises ConfigError if they are not UTF-8."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its history and line editing)
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
        if command in ("/more", "/again", "/check", "/save") and not self.last:
            raise ConfigError(f"{command}: there is no passage yet; type a prompt")
        if not line.startswith("/"):
            self.generate(unescape(line))
        elif command in SETTERS:
            changed = configurator.change(self.settings, SETTERS[command], argument)
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
        else:
            print(HELP)
            print(f"styles: {', '.join(self.poet.styles) or 'none'}")

    def generate(self, prompt: str, echo: bool = True) -> None:
        """Continue `prompt` with the next random stream; echo: print the prompt, too."""
        self.last = self.poet.begin(prompt, 1, self.next_number, **dataclasses.asdict(self.settings))
        self.next_number += 1
        print_passages(self.poet, self.last, self.poet.stream(self.last, logprobs=True), echo=echo)
