"""Configuration: a dataclass, overridden by YAML files, overridden by --key=value.

Each script has one frozen dataclass. Its fields are the keys, and the comment behind each field is its help text.
Values are text at first, from YAML too (which would guess that `off` is false and `6e-4` a string), and each is
converted to the type of its field.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

VERSION = "0.1.0"
HOME = Path(__file__).parent  # holds the scripts, config/ and data/
JSON_BYTES = 100 * 2**20  # largest file that read_bytes reads by default
YAML_BYTES, YAML_EVENTS, YAML_DEPTH = 2**20, 100_000, 20
MOST_COMPARED = 1000  # characters of a word, and words, among which the most similar is looked for
SHOWN_PROBLEMS = 20  # most problems in one message
SHOWN_CHARS = 300  # longest line of a message; some quote user input
RANK_WAIT_S = 5.0  # torchrun looks for ranks that failed ten times a second
BaseLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # leaves every scalar as text and builds no objects
NO_KEY = {"no key": True}  # metadata of a config's field that no one can set, as it is no key
BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class ConfigError(ValueError):
    """A setting can't be used; the message names the key or file, what was found and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# dataclass <- YAML <- command line


def load(cls: type, argv: list[str], positional: str | None = None) -> Any:
    """Build the config `cls` from its defaults, then the YAML files in `argv` in order, then the flags in `argv`.

    argv: `--key=value`, `--key value`, `--flag` and *.yaml, in any order. positional: the key that a bare argument
    sets, or adds to if the key is repeatable. `--help` and `--version` print and exit. Raises ConfigError with every
    problem found, one a line. If `cls` has a field `given`, it gets the names of the keys that were given.
    """
    if "-h" in argv or "--help" in argv:
        print(usage(cls, positional))
        raise SystemExit(0)
    if "--version" in argv:
        print(f"RoboPoet {VERSION}, torch {importlib.metadata.version('torch')}, Python {platform.python_version()}")
        raise SystemExit(0)
    types = get_type_hints(cls)
    hints = {field.name: types[field.name] for field in keys_of(cls)}
    found, problems = _parse(argv, hints, positional)
    values = _convert_all(found, hints, problems)
    cfg = cls(**values, **({"given": frozenset(values)} if "given" in types else {}))
    problems += cfg.problems()
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise ConfigError("\n  ".join([*map(shorten, problems[:SHOWN_PROBLEMS]), *more]))
    return cfg


Found = dict[str, tuple[Any, str]]  # key -> (text or list of texts, where it was found)


def _parse(argv: list[str], hints: dict[str, Any], positional: str | None) -> tuple[Found, list[str]]:
    """Collect the text given for each key, flags over YAML, and what is wrong with `argv`."""
    found: Found = {}
    flags: dict[str, Any] = {}
    problems: list[str] = []
    args, extra = list(argv), []
    while args:
        arg = args.pop(0)
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            problem = ""
            if not equals:
                value, problem = _take_value(key, args, hints)
            if problem:
                problems.append(problem)
            elif get_origin(hints.get(key)) is tuple:
                flags.setdefault(key, []).append(value)
            else:
                flags[key] = value
        elif arg.endswith((".yaml", ".yml")):
            found |= {key: (value, f"{arg}: {key}") for key, value in _read_yaml(arg, problems).items()}
        elif get_origin(hints.get(positional)) is tuple and (arg == "-" or arg[:1] != "-"):
            flags.setdefault(positional, []).append(arg)
        elif positional and positional not in flags and (arg == "-" or arg[:1] != "-"):
            flags[positional] = arg
        else:
            extra.append(arg)
    if extra:
        problems.append(_too_many(extra, flags.get(positional, ""), hints))
    return found | {key: (value, f"--{key}") for key, value in flags.items()}, problems


def _too_many(extra: list[str], before: str, hints: dict[str, Any]) -> str:
    """What is wrong with bare arguments for which there is no key; before: the bare argument that has one."""
    many = "is one argument" if len(extra) == 1 else f"are {len(extra)} arguments"
    advice = f"write --key=value, or name a .yaml file{did_you_mean_path(extra[0])}"
    if "prompt" in hints:
        words = extra if before.endswith(".pt") or os.path.exists(before) else [before, *extra]
        advice = f"if this is a prompt, write --prompt={shlex.quote(' '.join(words))}"
    return f"{' '.join(extra)}: {many} too many; {advice}"


def _take_value(key: str, args: list[str], hints: dict[str, Any]) -> tuple[str | None, str]:
    """The value of `--key` where no `=` follows, or None and the problem; takes the argument it uses off `args`."""
    kind = hints.get(key, bool)  # an unknown key is reported later
    is_flag = kind is bool or "true" in get_args(kind)
    if args and not args[0].startswith("--") and (not is_flag or args[0].lower() in BOOLS):
        return args.pop(0), ""
    if is_flag:
        return "true", ""
    if args and kind in (str, tuple[str, ...]) and not did_you_mean(args[0][2:].partition("=")[0], hints):
        value = args.pop(0)  # begins with -- but resembles no key
        return None, f"--{key}: has no value; if that is {value}, write --{key}={value}"
    return None, f"--{key}: has no value; write --{key}=VALUE"


def _read_yaml(path: str, problems: list[str]) -> dict[str, Any]:
    """Read a YAML file of keys with every scalar left as text; appends to `problems` if that fails."""
    try:
        content = read_yaml(beside_scripts(path), ConfigError)
        if content and not isinstance(content, dict):
            raise ConfigError(f"{path}: must hold `key: value` lines")
    except ConfigError as e:
        problems.append(str(e))
        return {}
    return content or {}


def _convert_all(found: Found, hints: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Convert each key's text to the key's type; appends unknown keys and values of a wrong type to `problems`."""
    values = {}
    for key, (value, where) in found.items():
        if key not in hints:
            near = did_you_mean(key, hints) if len(problems) < SHOWN_PROBLEMS else ""  # the search is slow
            problems.append(f"{where}: no such key{near or '; --help lists all'}")
            continue
        try:
            values[key] = _convert(hints[key], value)
        except ValueError as e:
            problems.append(f"{where}: {e}")
    return values


def _convert(kind: Any, value: Any) -> Any:
    """Convert text to `kind`: bool, int, float, str, Literal, tuple[str, ...], or one of these or None, written `auto`.

    Raises ValueError when it can't be.
    """
    if get_origin(kind) is tuple:
        values = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(item, str) for item in values):
            raise ValueError(f"found {value!r}, must be a list of texts")
        return tuple(_convert(str, item) for item in values)
    if not isinstance(value, str):
        raise ValueError(f"found a {'list' if isinstance(value, list) else 'mapping'}, must be one value")
    if type(None) in get_args(kind):
        try:
            return None if value.lower() == "auto" else _convert(get_args(kind)[0], value)
        except ValueError as e:
            raise ValueError(f"{e}, or auto") from None
    if get_origin(kind) is Literal:
        if value.lower() not in get_args(kind):
            near = did_you_mean(value.lower(), get_args(kind))
            raise ValueError(f"found {value!r}, must be one of {', '.join(get_args(kind))}{near}")
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
    if re.search(r"[\ud800-\udfff]", value):  # what Python makes of bytes on the command line that are not UTF-8
        raise ValueError(f"found {value!r}, which is not UTF-8; rename it if it is a file")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# what a script calls


def keys_of(cfg: Any) -> list[dataclasses.Field]:
    """The fields of a config, or of its class, that are keys."""
    return [field for field in dataclasses.fields(cfg) if NO_KEY.items().isdisjoint(field.metadata.items())]


def values_of(cfg: Any) -> dict[str, Any]:
    """The value of each key."""
    return {field.name: getattr(cfg, field.name) for field in keys_of(cfg)}


def bounds(cfg: Any, keys: str, low: float, high: float = math.inf) -> list[str]:
    """A problem for each of the space-separated `keys` whose value lies outside [low, high]; None, auto, never does."""
    wanted = f"at least {low:g}" + (f" and at most {high:,}" if high < math.inf else "")
    values = {key: value for key in keys.split() if (value := getattr(cfg, key)) is not None}
    outside = {key: value for key, value in values.items() if not low <= value <= high or value == math.inf}
    auto = {key: ", or auto" for key in outside if getattr(type(cfg), key, "") is None}  # the key's default
    return [f"{key}: found {value}, must be {wanted}{auto.get(key, '')}" for key, value in outside.items()]


def written(value: Any) -> Any:
    """A key's value as YAML and messages have it: `auto` for None, a list for a tuple."""
    return "auto" if value is None else list(value) if isinstance(value, tuple) else value


def change(cfg: Any, key: str, text: str) -> Any:
    """A copy of `cfg` with `key` set to the value of `text`; raises ConfigError when it can't have that value."""
    try:
        changed = dataclasses.replace(cfg, **{key: _convert(get_type_hints(type(cfg))[key], text)})
    except ValueError as e:
        raise ConfigError(f"{key}: {e}") from None
    if problems := changed.problems():
        raise ConfigError("\n".join(problems))
    return changed


def usage(cls: type, positional: str | None = None) -> str:
    """The help text: one line for each key of `cls` with its name, its default, and the comment behind it."""
    script = _command(inspect.getsourcefile(cls)).replace("bench.", "-m bench.")
    files = f"[CONFIG.yaml ...]{f' [{positional.upper()}]' if positional else ''}"
    lines = [f"python {script} {files} [--key=value ...]"]
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for owner in reversed(cls.__mro__[:-1]):  # a subclass's own keys come last
        for line in inspect.getsource(owner).splitlines():
            if heading := re.fullmatch(r"    # (.*)", line):
                lines.append(f"\n{heading[1]}")
            elif key := re.match(r"    (\w+): .*?  # (.*)$", line):
                default = defaults[key[1]]
                shown = " ".join(default) if isinstance(default, tuple) else str(written(default))
                choices = f" [{' '.join(get_args(hints[key[1]]))}]" if get_origin(hints[key[1]]) is Literal else ""
                lines.append(f"  --{key[1]:<28} {shown:<14} {key[2]}{choices}")
    return "\n".join(lines)


def _command(path: str) -> str:
    """What a script is called by: train.py, or bench.gpu for a module of bench."""
    folder, script = os.path.split(path)
    return f"bench.{script.removesuffix('.py')}" if os.path.basename(folder) == "bench" else script


def launch(main: Callable[[Any], None], cls: type, *mistakes: type[Exception], positional: str | None = None) -> None:
    """Run `main` with the command line's config.

    ConfigError, OSError, out-of-memory and the exceptions in `mistakes` print one line and exit with code 2. Others are
    bugs and keep their traceback.
    """
    script = _command(sys.argv[0])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's
            stream.reconfigure(errors="replace")  # a character that a terminal lacks becomes a ?
    try:
        main(load(cls, sys.argv[1:], positional))
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        pass
    except (ConfigError, OSError, *mistakes) as e:
        _fail(f"{script}: {describe(e) if isinstance(e, OSError) else e}")
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        advice = "halve batch_size and double gradient_accumulation_steps (the numbers stay the same)"
        _fail(f"{script}: the GPU has too little memory; {advice}, or generate fewer passages at a time")
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody reads it any more; spare Python's own flush at exit the same error
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(message: str) -> NoReturn:
    """Print `message` and exit with code 2; of torchrun's ranks, those that fail alike leave that to the first."""
    if _is_other_rank():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # torchrun ends and reports the other ranks of a failure
        time.sleep(RANK_WAIT_S)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun's own report ends with
        about = {"py_callstack": message, "timestamp": int(datetime.now(UTC).timestamp())}
        Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}), "utf-8")
    print(message, file=sys.stderr)
    raise SystemExit(2) from None


def _is_other_rank() -> bool:
    """Whether torchrun started this process and it is not the first one of its machine."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU has too little memory: PyTorch has a type of its own for CUDA's error, but not for MPS's."""
    return "out of memory" in str(error)


def warn(message: str) -> None:
    """Print a warning to stderr, on a machine's first rank alone; does nothing if stderr is closed."""
    if _is_other_rank():
        return
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# files and messages, bounded


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What a message adds about a `word` that is not among the `known` ones: the most similar of them, if any is."""
    return f"; did you mean {near}?" if (near := _nearest(word, known)) else ""


def did_you_mean_path(path: str | Path) -> str:
    """What a message adds about a missing path: the most similar one, here or beside the scripts, if there is any."""
    path = Path(path)
    with contextlib.suppress(OSError, ValueError):
        for missing in (*reversed(path.parents), path):
            if not beside_scripts(missing).exists():  # the first folder that is missing, or else the file
                rest = path.relative_to(missing)
                folders = filter(os.path.isdir, (missing.parent, HOME / missing.parent))
                names = itertools.chain.from_iterable(map(os.listdir, folders))
                there = (name for name in names if beside_scripts(missing.with_name(name) / rest).exists())
                near = _nearest(missing.name, there)
                return f"; did you mean {missing.with_name(near) / rest}?" if near else ""
    return ""


def _nearest(word: str, known: Iterable[str]) -> str:
    """The most similar of the `known` words, or "" if none is similar."""
    first = [*itertools.islice(known, MOST_COMPARED)]
    return next(iter(difflib.get_close_matches(word[:MOST_COMPARED], first, n=1)), "")


def beside_scripts(path: str | Path) -> Path:
    """`path`, or if it does not exist, the same path beside the scripts if that does."""
    return HOME / path if not os.path.exists(path) and os.path.exists(HOME / path) else Path(path)


def check_regular(path: Path, error: type[Exception]) -> int:
    """The size of a regular file in bytes; raises `error` on anything else: pipes and devices may never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:
        near = did_you_mean_path(path) if isinstance(e, FileNotFoundError) else ""
        raise error(f"{path}: {getattr(e, 'strerror', None) or e}{near}") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is {'a folder' if stat.S_ISDIR(found.st_mode) else 'not a regular file'}; name a file")
    return found.st_size


def read_bytes(path: Path, error: type[Exception], limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises `error` if it is larger or can't be read."""
    if (size := check_regular(path, error)) > limit:
        raise error(f"{path}: has {size:,} bytes, must have at most {limit:,}")
    try:
        with open(path, "rb") as f:
            return f.read(size)  # not read(limit), which would allocate that much
    except OSError as e:
        raise error(f"{path}: {e.strerror}") from None


def read_yaml(path: Path, error: type[Exception]) -> Any:
    """The content of a YAML file, every scalar left as text.

    Raises `error` on a file over 1 MB, over 100,000 values, nesting over 20 deep, and aliases, which can expand to
    gigabytes.
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
    """An exception's message, shortened; an operating system's names its file first, as ours do."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    return shorten(str(e)) or type(e).__name__


def shorten(text: str) -> str:
    """`text` on one line of at most SHOWN_CHARS characters; a longer one loses its middle."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[:200]} ... {line[-90:]}"
