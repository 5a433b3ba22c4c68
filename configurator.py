"""Configuration: a dataclass, overridden by YAML files, overridden by --key=value.

Each script has one frozen dataclass. Its fields are the keys, and the comment behind each field is its help text.
Values are text at first, from YAML too (which would guess that `off` is false and `6e-4` a string), and each is
converted to the type of its field.
"""

import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from robopoet import VERSION
from robopoet.errors import ConfigError, Mistake, describe, did_you_mean, is_other_rank, is_out_of_memory, shorten
from robopoet.files import beside_scripts, did_you_mean_path, read_yaml

SHOWN_PROBLEMS = 20  # most problems in one message
RANK_WAIT_S = 5.0  # torchrun looks for ranks that failed ten times a second
NO_KEY = {"no key": True}  # metadata of a config's field that no one can set, as it is no key
BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


# ---------------------------------------------------------------------------------------------------------------------
# dataclass <- YAML <- command line


def parse(cls: type, argv: list[str], positional: str | None = None) -> Any:
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
    found, problems = _collect(argv, hints, positional)
    values = _convert_all(found, hints, problems)
    cfg = cls(**values, **({"given": frozenset(values)} if "given" in types else {}))
    problems += cfg.problems()
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise ConfigError("\n  ".join([*map(shorten, problems[:SHOWN_PROBLEMS]), *more]))
    return cfg


Found = dict[str, tuple[Any, str]]  # key -> (text or list of texts, where it was found)


def _collect(argv: list[str], hints: dict[str, Any], positional: str | None) -> tuple[Found, list[str]]:
    """Collect the text given for each key, flags over YAML, and what is wrong with `argv`."""
    found: Found = {}
    flags: dict[str, Any] = {}
    args = list(argv)
    extra: list[str] = []
    problems: list[str] = []
    repeatable = {key for key, kind in hints.items() if get_origin(kind) is tuple}

    def give(key: str, value: str) -> None:
        if key in repeatable:
            flags.setdefault(key, []).append(value)
        else:
            flags[key] = value

    while args:
        arg = args.pop(0)
        try:
            if arg.startswith("--"):
                key, equals, value = arg[2:].partition("=")
                give(key, value if equals else _take_value(key, args, hints))
            elif arg.endswith((".yaml", ".yml")):
                found |= {key: (value, f"{arg}: {key}") for key, value in _read_yaml(arg).items()}
            elif (arg == "-" or arg[:1] != "-") and positional and positional not in flags.keys() - repeatable:
                give(positional, arg)
            else:
                extra.append(arg)
        except ConfigError as e:
            problems.append(str(e))
    if extra:
        problems.append(_too_many(extra, flags.get(positional or "", ""), hints))
    return found | {key: (value, f"--{key}") for key, value in flags.items()}, problems


def _too_many(extra: list[str], before: str, hints: dict[str, Any]) -> str:
    """What is wrong with bare arguments for which there is no key; before: the bare argument that has one."""
    many = "is one argument" if len(extra) == 1 else f"are {len(extra)} arguments"
    advice = f"write --key=value, or name a .yaml file{did_you_mean_path(extra[0])}"
    if os.path.exists(extra[0]):
        advice = f"if this is a file, write ./{extra[0]}"
    if "prompt" in hints:
        words = extra if before.endswith(".pt") or os.path.exists(before) else [before, *extra]
        advice = f"if this is a prompt, write --prompt={shlex.quote(' '.join(words))}"
    return f"{' '.join(extra)}: {many} too many; {advice}"


def _take_value(key: str, args: list[str], hints: dict[str, Any]) -> str:
    """The value of `--key` where no `=` follows, taken off `args`; raises ConfigError if there is none."""
    kind = hints.get(key, bool)  # an unknown key is reported later
    is_flag = kind is bool or "true" in get_args(kind)
    if args and not args[0].startswith("--") and (not is_flag or args[0].lower() in BOOLS):
        return args.pop(0)
    if is_flag:
        return "true"
    advice = f"write --{key}=VALUE"
    if args and kind in (str, tuple[str, ...]) and not did_you_mean(args[0][2:].partition("=")[0], hints):
        value = args.pop(0)  # begins with -- but resembles no key
        advice = f"if that is {value}, write --{key}={value}"
    raise ConfigError(f"--{key}: has no value; {advice}")


def _read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file of keys with every scalar left as text; raises ConfigError if that fails."""
    content = read_yaml(beside_scripts(path), ConfigError) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold `key: value` lines")
    return content


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


def keys_of(cfg: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a config, or of its class, that are keys."""
    return [field for field in dataclasses.fields(cfg) if NO_KEY.items().isdisjoint(field.metadata.items())]


def values_of(cfg: Any) -> dict[str, Any]:
    """The value of each key."""
    return {field.name: getattr(cfg, field.name) for field in keys_of(cfg)}


def written(value: Any) -> Any:
    """A key's value as YAML and messages have it: `auto` for None, a list for a tuple."""
    return "auto" if value is None else list(value) if isinstance(value, tuple) else value


def change(cfg: Any, key: str, text: str | list[str]) -> Any:
    """A copy of `cfg` with `key` set to the value of `text`, or of several for a repeatable key.

    Raises ConfigError when it can't have that value.
    """
    try:
        changed = dataclasses.replace(cfg, **{key: _convert(get_type_hints(type(cfg))[key], text)})
    except ValueError as e:
        raise ConfigError(f"{key}: {e}") from None
    if problems := changed.problems():
        raise ConfigError("\n".join(problems))
    return changed


def usage(cls: type, positional: str | None = None) -> str:
    """The help text: one line for each key of `cls` with its name, its default, and the comment behind it."""
    script = _command(inspect.getfile(cls)).replace("bench.", "-m bench.")
    arguments = f"[CONFIG.yaml ...]{f' [{positional.upper()}]' if positional else ''}"
    lines = [f"python {script} {arguments} [--key=value ...]"]
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


def launch(main: Callable[[Any], None], cls: type, positional: str | None = None) -> None:
    """Run `main` with the command line's config.

    A Mistake, an OSError and too little memory print one line and exit with code 2. Others are bugs and keep their
    traceback.
    """
    script = _command(sys.argv[0])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is none
            stream.reconfigure(errors="replace")  # a character that a terminal lacks becomes a ?
    try:
        main(parse(cls, sys.argv[1:], positional))
    except BrokenPipeError:  # the reader of our output has left, as in `| head`
        pass
    except (Mistake, OSError) as e:
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
    if is_other_rank():
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # torchrun ends and reports the other ranks of a failure
        time.sleep(RANK_WAIT_S)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # what torchrun's own report ends with
        about = {"py_callstack": message, "timestamp": int(datetime.now(UTC).timestamp())}
        Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}), "utf-8")
    print(message, file=sys.stderr)
    raise SystemExit(2) from None
