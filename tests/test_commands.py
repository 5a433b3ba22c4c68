"""Every command that a document shows exists and names what is there, and those that can run here do run."""

import functools
import glob
import importlib.util
import itertools
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from commands import DOCUMENTS, FOREIGN, PROGRAMS, REPO, blocks, is_command, shown, simple_commands, text_of
from torch.distributed.run import get_args_parser

import configurator
from robopoet.errors import ConfigError

# what a reader has before the first command: by the others that is what `make poem` leaves
POEM = "data/robopoet/meta.json out/demo/best.pt out/demo/metrics.jsonl"
NANOGPT = "PATH_TO_NANOGPT/train.py PATH_TO_NANOGPT/model.py PATH_TO_NANOGPT/configurator.py"
RUNS = "out/a/metrics.jsonl out/b/metrics.jsonl"
CHARACTERS = "data/shakespeare_char/meta.json"
GIVEN = {
    "README.md": f"my/emma.epub my/letters.epub my/notes.txt nanoGPT/out-shakespeare-char/ckpt.pt {RUNS} {CHARACTERS}"
    " data/big/meta.json",
    "bench/PASSAGES.md": f"{POEM} out/robopoet/best.pt botchan.txt",
    "bench/RESULTS.md": f"{POEM} {CHARACTERS} data/bible/meta.json nanogpt/train.py rb/pages/a.html rb/pages/a.txt"
    " data/botchan/meta.json out/botchan/best.pt out/lectures/best.pt"
    " out/demo.gguf out/robopoet/best.pt out/few_books/best.pt out/overfitted/ckpt.pt out/short/best.pt"
    " out/short_anew/best.pt few_books_runs/seed1337/best.pt",
    "bench/books_read.py": "FOLDER/pages/a.html FOLDER/pages/a.txt",
    "bench/finetune.py": "data/mine/meta.json",
    "bench/gpu.py": f"{POEM} {CHARACTERS} {NANOGPT}",
    "bench/plot.py": RUNS,
    "config/gpt2.yaml": "big/fineweb.jsonl.gz",
    "config/sweep.yaml": "my/emma.epub",
    "docs/README.md": f"{POEM} data/mine/meta.json",
    "docs/search.py": "data/mine/meta.json",
    "config/slurm.sh": "data/big/meta.json",
    "prepare.py": "books/emma.epub my/folder/notes.txt",
    **dict.fromkeys(("bench/learn.py", "bench/sample_speed.py", "bench/train_speed.py"), f"{POEM} {NANOGPT}"),
}
NAMES_FILES = {*"checkpoint run runs corpus input folder peer gguf replay teacher init_from tokenizer".split()}
NO_FILES = {"", "scratch", "resume", "auto", "bpe", "char", "gpt2", "smollm2"}
COMMITTED = ("config", "bench", "tests")
PLACEHOLDER = re.compile(r"(--\w+)=(?:[A-Z]+|\.\.\.)")
EVERY_SCRIPTS = {"--help", "--version", "--key"}
TORCHRUNS = get_args_parser()._option_string_actions.keys()


@functools.cache
def config_of(script: str) -> tuple[type, str | None]:
    """The config of the script at a path, and the key that a bare argument sets."""
    with mock.patch.object(configurator, "launch") as launch, mock.patch.object(sys, "argv", [script]):
        runpy.run_path(str(REPO / script), run_name="__main__")
    (_, cls), keys = launch.call_args
    return cls, keys.get("positional")


@functools.cache
def configs() -> dict[str, type]:
    """The config of each script that has one, by the script's path."""
    paths = [
        path
        for path in (*REPO.glob("*.py"), *REPO.glob("bench/*.py"))
        if "configurator.launch(main" in path.read_text()
    ]
    return {(name := path.relative_to(REPO).as_posix()): config_of(name)[0] for path in paths}


def check(words: list[str]) -> None:
    """Check a command in the folder of its reader, and leave there the names of the files that it would write.

    Raises ConfigError, ValueError, SystemExit or SyntaxError.
    """
    program, *args = words
    if program.startswith("--"):
        check_key(program, configs().values())
    elif program == "python" and args[0] == "-c":
        compile(args[1], "documented", "exec")
    elif program == "python" and args[:2] == ["-m", "pytest"]:
        check_tests(args[2:])
    elif program == "python" and args[0] == "-m" and not args[1].startswith("bench."):
        assert importlib.util.find_spec(args[1])
    elif program == "python":
        check_script(args)
    elif program == "torchrun":
        parsed = get_args_parser().parse_args(args)
        check_script([parsed.training_script, *parsed.training_script_args])
    elif program == "sbatch":
        subprocess.run(["bash", "-n", REPO / args[0]], check=True)
        check_script(["train.py", *args[1:]])
    elif program == "pip":
        check_pip(args)
    else:
        assert program in ("make", *FOREIGN)


def check_key(word: str, classes: Iterable[type]) -> None:
    """Raise ConfigError if no config has the key of a word such as --epochs=8, or none takes that value for it."""
    key, equals, _ = word.partition("=")
    having = [cls for cls in classes if key[2:] in {field.name for field in configurator.keys_of(cls)}]
    if key in TORCHRUNS or key in EVERY_SCRIPTS:
        return
    if not having:
        raise ConfigError(f"{key}: no script has this key")
    wrong = [problems_of(cls, word) for cls in having] if equals and not PLACEHOLDER.fullmatch(word) else []
    if wrong and all(wrong):
        raise ConfigError(wrong[0])


def problems_of(cls: type, word: str) -> str:
    """What is wrong with the key and the value in a word; what is missing beside it is no problem of theirs."""
    try:
        configurator.parse(cls, [word])
    except ConfigError as e:
        return "".join(line for line in str(e).splitlines() if line.strip().startswith("--"))
    return ""


def check_script(words: list[str]) -> None:
    """Check a command of ours: its keys, their values, and that the files which it names are there by then."""
    script, *args = words
    if script == "-m":
        script = f"{args.pop(0).replace('.', '/')}.py"
    if not (REPO / script).exists():
        raise ConfigError(f"{script}: not found")
    if script == "docs/search.py":  # takes a number, then keys of train.py
        script, args = "train.py", args[1:]
    cls, positional = config_of(script)
    for word in filter(PLACEHOLDER.fullmatch, args):
        check_key(word, [cls])
    args = [word for word in args if not PLACEHOLDER.fullmatch(word) and word not in EVERY_SCRIPTS]
    args = [path for word in args for path in sorted(glob.glob(word)) or [word]]
    cfg = configurator.parse(cls, args, positional)
    for setting in getattr(cfg, "settings", ()):
        for word in shlex.split(setting):
            check_key(word, [config_of("train.py")[0], config_of("prepare.py")[0]])
    if missing := [path for path in needed(cfg) if not is_there(path)]:
        raise ConfigError(f"{script} {shlex.join(args)}: {', '.join(missing)}: not there by then")
    for path in written(cfg):
        touch(path, getattr(cfg, "out_dir", ""))


def needed(cfg: Any) -> Iterator[str]:
    """The files, folders and globs that a config's values name as input."""
    values = configurator.values_of(cfg)
    for key in NAMES_FILES & values.keys():
        value = values[key]
        yield from {*(value if isinstance(value, tuple) else value.split(","))} - NO_FILES
    if not (values.get("vocab_size") or type(cfg).__name__ == "MemoryConfig"):  # these make up their ids
        for name in {values.get("dataset"), values.get("char_dataset")} - {None}:
            yield next(iter(glob.glob(f"{name}/meta.json")), f"data/{name}/meta.json")


def is_there(path: str) -> bool:
    """Whether a file, folder or glob is in the reader's folder, or committed."""
    committed = path.startswith(COMMITTED) and (REPO / path).exists()
    return committed or bool(glob.glob(path)) or (REPO / path / "corpus.yaml").exists()


def written(cfg: Any) -> list[str]:
    """The files that a command leaves of which later ones may make use."""
    kind = type(cfg).__name__
    if kind == "PrepareConfig":
        return [f"{cfg.out or cfg.corpus or cfg.input[0]}/meta.json"]
    if kind == "TrainConfig":
        return [f"{cfg.out_dir}/{name}" for name in ("best.pt", "metrics.jsonl", "config.yaml") if not cfg.eval_only]
    return [path for path in (cfg.save, cfg.export) if path] if kind == "SampleConfig" else []


def touch(path: str, out_dir: str = "") -> None:
    """Make a file, with what a config.yaml must hold."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(f"out_dir: {out_dir}\n" if out_dir else "")


def check_tests(args: list[str]) -> None:
    """Check that the test files of a call of pytest exist, and have tests for its -k and -m."""
    files = [REPO / arg for arg in args if arg.endswith(".py")]
    text = "".join(path.read_text() for path in files or (REPO / "tests").glob("test_*.py"))
    for option, value in itertools.pairwise(args):
        if option == "-k":
            assert re.search(rf"^def test_\w*{value}", text, re.M), value
        elif option == "-m":
            assert f"mark.{value.removeprefix('not ')}\n" in text, value


def check_pip(args: list[str]) -> None:
    """Check that what pip is to install of ours exists."""
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for arg in args:
        assert not arg.endswith(".txt") or (REPO / arg).exists(), arg
        if found := re.fullmatch(r"\.\[(.*)\]", arg):
            assert extras.keys() >= {*found[1].split(",")}, arg


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Checks commands in the folder of a reader who has so many files."""
    monkeypatch.chdir(tmp_path)

    def check_all(name: str, text: str) -> None:
        for path in GIVEN.get(name, POEM).split():
            touch(path)
        for words in shown(name, text):
            check(words)

    return check_all


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_and_key_of_a_document_exists(name, reader):
    reader(name, text_of(name))


@pytest.mark.parametrize(
    ("name", "indent"), [("README.md", "    "), ("bench/RESULTS.md", "    "), ("config/gpt2.yaml", "  ")]
)
def test_bash_reads_the_same_commands(name, indent):
    text = text_of(name).replace(".venv/Scripts/activate", "ruff")  # bash has no functions with slashes
    shell = [piece for is_block, piece in blocks(text, indent) if is_block and is_command(piece)]
    assert shell
    tells = "".join(f"{program}() {{ printf '%s\\0' {program} \"$@\" ''; }}\n" for program in PROGRAMS)
    for piece in shell:
        command = [shutil.which("bash"), "-f", "-c", tells + piece]
        done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=True)
        seen = [text.split("\0") for text in done.stdout.removesuffix("\0\0").split("\0\0")]
        assert list(simple_commands(piece)) == seen


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("README.md", "Say:\n\n    python train.py --max_itres=3  # it's wrong\n", "--max_itres: no such key"),
        ("README.md", "    make poem\n    python train.py config/demo.yaml --epochs=few", "--epochs: found 'few'"),
        ("README.md", "    make poem\n    python sample.py out/none/best.pt", "out/none/best.pt: not there by then"),
        ("README.md", "    python sample.py --save=a\n", "out/demo/best.pt: not there"),
        ("README.md", "    make poem && python train.py --dataset=mine", "data/mine/meta.json: not there"),
        ("README.md", "    make poem\n    python train.py cfg/demo.yaml", "cfg/demo.yaml"),
        ("README.md", "    make poetry\n", "make poetry"),
        ("README.md", "    torchrun --nproc_per_node=2 \\\n        train.py --shards=true\n", "--shards: no such key"),
        ("README.md", "Give `--max_itres=3`.\n", "--max_itres: no script has this key"),
        ("README.md", "Give `--styles=alice:1,bob:2` to `sample.py`.\n", "--styles: no script"),
        ("README.md", "Then `sample.py out/none/best.pt\n--seed=1` again.\n", "out/none/best.pt: not there"),
        ("bench/RESULTS.md", "```sh\n# EPYC's\npython -m bench.lern a.yaml\n```\n", "bench/lern.py: not found"),
        ("bench/RESULTS.md", '```sh\npython -m bench.books "--settings=--epochs=2\\\n --epoch=3"\n```', "--epoch: no"),
        ("bench/demo.py", "It writes.\n\npython -m bench.demo out/demo --what=1\n", "--what: no such key"),
        ("config/demo.yaml", "Shakespeare.\n  python prepare.py data/robpoet && make poem\n", "data/robpoet"),
        ("config/demo.yaml", "As long as GPT-2's, --max_itres=1900, brings 3.73.\n", "--max_itres: no script"),
    ],
)
def test_a_command_or_key_that_does_not_exist_is_found(name, text, problem, reader):
    with pytest.raises((ConfigError, ValueError), match=problem):
        reader(name, text)
