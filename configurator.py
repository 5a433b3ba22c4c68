"""Configuration: dataclass <- YAML files <- --key=value, all checked.

A script owns one frozen dataclass; the comment behind each key is its help text, so there is one list of keys and
no other. A value is text wherever it comes from (YAML is read with no type guessing, so `6e-4` and `off` mean what
they say) and is converted by the key's type alone.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import inspect
import math
import os
import platform
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

VERSION = "0.1.0"
HOME = Path(__file__).parent  # of the scripts, config/ and data/
JSON_BYTES = 100 * 2**20  # as much is read of a file unless its reader says otherwise
YAML_BYTES = 2**20
YAML_EVENTS, YAML_DEPTH = 100_000, 20
SHOWN_PROBLEMS = 20  # of one message
SHOWN_CHARS = 300  # of a line of one: some quote what was found

BaseLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # leaves every scalar as text and builds no object


class ConfigError(ValueError):
    """What the user asked for can't be done; the message says which key or file, what was found and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# dataclass <- YAML <- command line


def load(cls: type, argv: list[str], positional: str | None = None) -> Any:
    """Build `cls` from its defaults, then the YAML files in `argv` in order, then its `--key=value` and `--key value`.

    positional: the key that takes a bare argument which is not a YAML file, or several if it is repeatable. Raises
    ConfigError with every problem found, one a line; `--help` prints the keys, `--version` the versions, and exits.
    The keys that were given, here or in YAML, are the result's `given`, if its class has that.
    """
    types = get_type_hints(cls)
    hints = {field.name: types[field.name] for field in dataclasses.fields(cls)}
    if "-h" in argv or "--help" in argv:
        print(usage(cls, positional))
        raise SystemExit(0)
    if "--version" in argv:
        print(f"RoboPoet {VERSION}, torch {importlib.metadata.version('torch')}, Python {platform.python_version()}")
        raise SystemExit(0)
    found: dict[str, tuple[Any, str]] = {}  # key -> (text or list of texts, where it stands)
    flags: dict[str, Any] = {}
    problems: list[str] = []
    args = list(argv)
    while args:
        arg = args.pop(0)
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals:  # --key value, or a bare --flag for a bool
                kind = hints.get(key, bool)  # an unknown key is told as such below
                is_flag = kind is bool or "true" in get_args(kind)
                takes_next = args and not args[0].startswith("--") and (not is_flag or args[0].lower() in BOOLS)
                value = args.pop(0) if takes_next else "true" if is_flag else None
            if value is None:
                following = args[0][2:].partition("=")[0] if args and hints.get(key) in (str, tuple[str, ...]) else None
                if following is None or difflib.get_close_matches(following, hints, n=1):
                    problems.append(f"--{key}: has no value; write --{key}=VALUE")
                else:  # no key: the value itself begins with --
                    meant = args.pop(0)
                    problems.append(f"--{key}: has no value; if that is {meant}, write --{key}={meant}")
            elif get_origin(hints.get(key)) is tuple:
                flags.setdefault(key, []).append(value)
            else:
                flags[key] = value
        elif arg.endswith((".yaml", ".yml")):
            found |= {key: (value, f"{arg}: {key}") for key, value in _read_yaml(arg, problems).items()}
        elif get_origin(hints.get(positional)) is tuple and not arg.startswith("-"):
            flags.setdefault(positional, []).append(arg)
        elif positional and positional not in flags and (arg == "-" or not arg.startswith("-")):
            flags[positional] = arg
        else:
            problems.append(f"{arg}: is one argument too many; write --key=value, or name a .yaml file")
    found |= {key: (value, f"--{key}") for key, value in flags.items()}

    values = {}
    for key, (value, where) in found.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1) if len(problems) < SHOWN_PROBLEMS else []
            problems.append(f"{where}: no such key" + (f"; did you mean {near[0]}?" if near else "; --help lists all"))
            continue
        try:
            values[key] = _convert(hints[key], value)
        except ValueError as e:
            problems.append(f"{where}: {e}")
    cfg = cls(**values)
    problems += cfg.problems()
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise ConfigError("\n  ".join([*map(shorten, problems[:SHOWN_PROBLEMS]), *more]))
    if hasattr(cls, "given"):
        object.__setattr__(cfg, "given", frozenset(values))
    return cfg


def beside_scripts(path: str | Path) -> Path:
    """`path`, or the same path beside the scripts where the working folder has none."""
    return HOME / path if not os.path.exists(path) and os.path.exists(HOME / path) else Path(path)


BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _convert(kind: Any, value: Any) -> Any:
    """Turn text into `kind` (bool, int, float, str, Literal, tuple[str, ...]); raises ValueError with what it wants."""
    if get_origin(kind) is tuple:
        values = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(item, str) for item in values):
            raise ValueError(f"found {value!r}, wants a list of texts")
        return values
    if not isinstance(value, str):
        raise ValueError(f"found a {'list' if isinstance(value, list) else 'mapping'}, wants one value")
    if get_origin(kind) is Literal:
        if value.lower() not in get_args(kind):
            raise ValueError(f"found {value!r}, must be one of {', '.join(get_args(kind))}")
        return value.lower()
    if kind is bool:
        if value.lower() not in BOOLS:
            raise ValueError(f"found {value!r}, must be true or false")
        return BOOLS[value.lower()]
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            if kind is int and re.fullmatch(r"[+-]?\d+", value):
                return int(value)
            number = float(value)
            if math.isfinite(number) and (kind is float or number.is_integer()):
                return kind(number)
        raise ValueError(f"found {value!r}, must be {'a whole number' if kind is int else 'a number'}")
    return value


def change(cfg: Any, key: str, text: str) -> Any:
    """A copy of `cfg` in which `key` has the value that `text` stands for; raises ConfigError when it can't have it."""
    try:
        changed = dataclasses.replace(cfg, **{key: _convert(get_type_hints(type(cfg))[key], text)})
    except ValueError as e:
        raise ConfigError(f"{key}: {e}") from None
    if problems := changed.problems():
        raise ConfigError("\n".join(problems))
    return changed


def _read_yaml(path: str, problems: list[str]) -> dict[str, Any]:
    """Read a YAML mapping with every scalar left as text; appends to `problems`."""
    try:
        content = read_yaml(beside_scripts(path), ConfigError)
        if content and not isinstance(content, dict):
            raise ConfigError(f"{path}: must hold `key: value` lines")
    except ConfigError as e:
        problems.append(str(e))
        return {}
    return content or {}


def bounds(cfg: Any, keys: str, low: float, high: float = math.inf) -> list[str]:
    """Name each of the space-separated `keys` whose value does not lie within [low, high]."""
    wanted = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    values = {key: getattr(cfg, key) for key in keys.split()}
    return [f"{key}: found {value}, must be {wanted}" for key, value in values.items() if not low <= value <= high]


def usage(cls: type, positional: str | None = None) -> str:
    """One line for each key of `cls`: name, default, and the comment that stands behind it in the source."""
    folder, script = os.path.split(inspect.getsourcefile(cls))
    if os.path.basename(folder) == "bench":
        script = f"-m bench.{script.removesuffix('.py')}"
    lines = [f"python {script} [CONFIG.yaml ...]{f' [{positional.upper()}]' if positional else ''} [--key=value ...]"]
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for owner in reversed(cls.__mro__[:-1]):  # a config may extend another: its own keys come last
        for line in inspect.getsource(owner).splitlines():
            if heading := re.fullmatch(r"    # (.*)", line):
                lines.append(f"\n{heading[1]}")
            elif key := re.match(r"    (\w+): .*?  # (.*)$", line):
                default = defaults[key[1]]
                shown = " ".join(default) if isinstance(default, tuple) else str(default)
                choices = f" [{' '.join(get_args(hints[key[1]]))}]" if get_origin(hints[key[1]]) is Literal else ""
                lines.append(f"  --{key[1]:<28} {shown:<14} {key[2]}{choices}")
    return "\n".join(lines)


def launch(main: Callable[[Any], None], cls: type, *mistakes: type[Exception], positional: str | None = None) -> None:
    """Run `main(cfg)` on the command line's config; ConfigError, OSError and `mistakes` end in one line and exit 2."""
    script = os.path.basename(sys.argv[0])
    try:
        main(load(cls, sys.argv[1:], positional))
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        pass
    except (ConfigError, OSError, *mistakes) as e:
        print(f"{script}: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as e:
        if type(e).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        print(
            f"{script}: the GPU has too little memory; halve batch_size and double gradient_accumulation_steps (the "
            "numbers stay the same), or write fewer passages at a time",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # no one reads it any more: Python's own flush, at the end, would fail too
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(message: str) -> None:
    """Say on stderr what went otherwise than asked, if anyone still reads it."""
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# files


def check_regular(path: Path, error: type[Exception]) -> int:
    """The size of a regular file, bytes; raises `error` for what is missing or is none: pipes and devices never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:
        raise error(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is {'a folder' if stat.S_ISDIR(found.st_mode) else 'not a regular file'}; name a file")
    return found.st_size


def read_bytes(path: Path, error: type[Exception], limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises `error`."""
    if (size := check_regular(path, error)) > limit:
        raise error(f"{path}: has {size:,} bytes, must have at most {limit:,}")
    try:
        with open(path, "rb") as f:
            return f.read(size)  # read(limit) would allocate so much
    except OSError as e:
        raise error(f"{path}: {e.strerror}") from None


def read_yaml(path: Path, error: type[Exception]) -> Any:
    """The YAML file at `path`, every scalar left as text; raises `error`, also for aliases, which can blow up.

    Of at most 1 MB; mappings and lists nest at most 20 deep.
    """
    raw = read_bytes(path, error, YAML_BYTES)
    try:
        text, depth = raw.decode(), 0
        for count, event in enumerate(yaml.parse(text, Loader=BaseLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise error(f"{path}: line {event.start_mark.line + 1}: has an alias, *NAME; write the value out")
            if depth > YAML_DEPTH or count > YAML_EVENTS:
                raise error(f"{path}: holds over {YAML_EVENTS:,} values or nests over {YAML_DEPTH} deep; shorten it")
        return yaml.load(text, Loader=BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        raise error(f"{path}: is not YAML: {describe(e)}") from None


def describe(e: Exception) -> str:
    """An exception's message in one line of bounded length."""
    return shorten(str(e)) or type(e).__name__


def shorten(text: str) -> str:
    """`text` in one line of at most 300 characters: what stands in the middle of a longer one is left out."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[:200]} ... {line[-90:]}"
