"""Who may import whom, change a config or replace a file; how long a file is; what names and comments keep to."""

import ast
import graphlib
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SCRIPTS = "train", "sample", "prepare", "serve"
FOLDERS = "robopoet", "bench", "tests", "config", "data"
BOTTOM = "errors files ops machine portable"

# what each module, or each module of a folder, may import of ours; robopoet. is left out
MAY_IMPORT = {
    "configurator": "robopoet errors files",
    "model": "ops",
    "ops": "",
    "errors": "",
    "files": "errors portable",
    "portable": "",
    "machine": BOTTOM,
    "text": "errors files portable text",
    "weights": f"{BOTTOM} text model weights",
    "training": f"configurator {BOTTOM} text model weights training",
    "writing": f"configurator {BOTTOM} text model weights writing",
    "serving": f"robopoet {BOTTOM} text model weights writing serving",
    **dict.fromkeys(SCRIPTS, f"configurator {BOTTOM} text model weights training writing"),
    "serve": f"configurator {BOTTOM} text weights writing serving",
}


def module_of(path: str) -> str:
    """The name under which the file at `path`, relative to the repository, is imported."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path: str, source: str, ours: set[str]) -> set[str]:
    """The modules that a file imports, also inside functions; of `from a import b`, a.b where that is one of ours."""
    package = module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in ours else base)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def import_problems(sources: dict[str, str]) -> list[str]:
    """Each import that the rule forbids, and a circle if there is one; sources: path -> Python."""
    ours, problems, graph = {module_of(path) for path in sources}, [], {}
    tops = {"bench", "tests", *(module.partition(".")[0] for module in ours)}
    for path, source in sources.items():
        name, found = module_of(path).removeprefix("robopoet."), imports_of(path, source, ours)
        graph[module_of(path)] = found & ours
        allowed = "" if path.endswith("__init__.py") else MAY_IMPORT.get(name, MAY_IMPORT.get(name.partition(".")[0]))
        if allowed is None:
            problems.append(f"{path}: has no place in the rule")
            continue
        for other in sorted(found):
            top, short = other.partition(".")[0], other.removeprefix("robopoet.")
            if top in tops:
                forbidden = not {short, short.partition(".")[0]} & set(allowed.split())
            else:
                forbidden = name == "ops" and top not in {"torch", *sys.stdlib_module_names}
            if forbidden:
                problems.append(f"{path}: imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        problems.append(f"a circle: {' <- '.join(e.args[1])}")
    return problems


def python_files() -> dict[str, str]:
    """Every Python file of the repository: path -> text."""
    paths = [*REPO.glob("*.py"), *(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))]
    return {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_imports_point_downwards_and_make_no_circle():
    sources = {path: text for path, text in python_files().items() if not path.startswith(("bench/", "tests/"))}
    assert import_problems(sources) == []
    known = {module_of(path).removeprefix("robopoet.") for path in sources}
    assert known >= {*MAY_IMPORT, "writing.decode"}  # a file that the rule names is there


def test_the_top_level_holds_six_scripts_and_data_none():
    paths = python_files()
    assert {path for path in paths if "/" not in path} == {f"{name}.py" for name in (*SCRIPTS, "model", "configurator")}
    assert not [path for path in paths if path.startswith(("data/", "config/"))]


def test_each_file_is_short():
    most = {"model.py": 289, "train.py": 420}
    lengths = {path: text.count("\n") for path, text in python_files().items()}
    assert {path: n for path, n in lengths.items() if n > most.get(path, 400)} == {}


# --- a value has one room that may change it

PLAN, FILES = "robopoet/training/plan.py", "robopoet/files.py"
CHANGES = {"replace", "dataclasses.replace", "copy.replace", "msgspec.structs.replace", "object.__setattr__"}

# what is changed elsewhere is no script's config: path -> first arguments
NOT_CONFIGS = {
    "model.py": {"self.config"},  # a GPTConfig, when the context is cropped
    "configurator.py": {"cfg"},  # the settings of a session, at its user's command
    "prepare.py": {"cfg", "manifest", "spans[-1]"},  # its own, completed from its corpus's manifest at the start
    "robopoet/text/corpus.py": {"manifest"},
    "robopoet/weights/checkpoint.py": {"config"},  # a GPTConfig
    "robopoet/serving/protocol.py": {"settings"},  # how a request samples
    "robopoet/writing/decode.py": {"model.config", "row"},  # a GPTConfig with a padded window; a text's place
}

# files that are written elsewhere: path -> what is called, and on what
WRITTEN = {
    "robopoet/text/sources.py": {"requirements.write_text"},  # for pip, in a temporary folder
    "robopoet/training/log.py": {"open(os.devnull)"},
    "robopoet/weights/huggingface.py": {
        "(part / f'{name}.json').write_text",
        "(part / 'README.md').write_text",
        "(part / 'loss.svg').write_text",
    },
    "robopoet/weights/gguf.py": {"modelfile.write_text"},
    "robopoet/weights/html.py": {"open(part)"},  # like those before, within files.creating
    "configurator.py": {"Path(report).write_text"},  # what torchrun asks for
}


def calls(source: str) -> Iterator[tuple[ast.Call, str, str]]:
    """Each call, the name of what is called, and its first argument ("": none)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func), ast.unparse(node.args[0]) if node.args else ""


def changed_configs(sources: dict[str, str]) -> list[str]:
    """Each call outside of plan.py that makes a changed copy of a config, or changes a frozen one."""
    return [
        f"{path}: {name}({argument})"
        for path, source in sources.items()
        for _, name, argument in calls(source)
        if path != PLAN and argument not in NOT_CONFIGS.get(path, ())
        if name in CHANGES or name.rpartition(".")[2] == "revise"
    ]


def writes(node: ast.Call, name: str) -> bool:
    """Whether a call renames a file, or opens one to write."""
    last = name.rpartition(".")[2]
    if name in ("os.replace", "os.rename", "shutil.move") or last in ("rename", "write_text", "write_bytes"):
        return True
    if last == "replace":
        return len(node.args) == 1 and not node.keywords and name not in CHANGES  # a Path's: a text's has two
    mode = node.args[0 if isinstance(node.func, ast.Attribute) and name != "os.fdopen" else 1 :][:1]
    mode += [keyword.value for keyword in node.keywords if keyword.arg == "mode"]
    modes = [str(value.value) for value in mode if isinstance(value, ast.Constant)]
    return last in ("open", "fdopen") and any(set(text) & set("wax+") for text in modes)


def written_files(sources: dict[str, str]) -> list[str]:
    """Each call outside of files.py that writes or renames a file."""
    found = []
    for path, source in sources.items():
        for node, name, argument in calls(source):
            said = name if name.endswith(("write_text", "write_bytes")) else f"{name}({argument})"
            if path != FILES and writes(node, name) and said not in WRITTEN.get(path, ()):
                found.append(f"{path}: {said}")
    return found


def of_the_house() -> dict[str, str]:
    """The files of the package and the scripts."""
    return {path: text for path, text in python_files().items() if "/" not in path or path.startswith("robopoet/")}


def test_plan_alone_changes_a_config():
    assert changed_configs(of_the_house()) == []


@pytest.mark.parametrize(
    "line",
    [
        "dataclasses.replace(cfg, seed=1)",
        "replace(cfg, seed=1)",
        "object.__setattr__(cfg, 'given', ())",
        "plan.revise(cfg, seed=1)",
        "revise(cfg, seed=1)",
    ],
)
def test_a_changed_config_is_found(line):
    broken = HOUSE | {"robopoet/training/log.py": f"def f(cfg):\n    return {line}", PLAN: f"def f(cfg): {line}"}
    (found,) = changed_configs(broken)
    assert found.startswith(f"robopoet/training/log.py: {line.partition('(')[0]}(cfg")


def test_files_alone_writes_and_renames():
    assert written_files(of_the_house()) == []


@pytest.mark.parametrize(
    "line",
    [
        "os.replace(part, path)",
        "os.rename(part, path)",
        "shutil.move(part, path)",
        "part.rename(path)",
        "part.replace(path)",
        "path.write_text('x')",
        "path.write_bytes(b'x')",
        "open(path, 'wb')",
        "open(path, mode='a')",
        "path.open('w')",
        "path.open(mode='r+b')",
    ],
)
def test_a_written_file_is_found(line):
    broken = HOUSE | {"robopoet/text/corpus.py": f"def f(path, part):\n    {line}", FILES: f"def f(path, part): {line}"}
    (found,) = written_files(broken)
    assert found.startswith(f"robopoet/text/corpus.py: {line.partition('(')[0]}")


@pytest.mark.parametrize("line", ["open(path)", "open(path, 'rb')", "text.replace('a', 'b')", "path.open()"])
def test_a_file_that_is_read_is_no_problem(line):
    assert written_files(HOUSE | {"robopoet/text/corpus.py": line}) == []


def test_train_needs_few_names():
    nodes = [node for node in ast.walk(ast.parse(python_files()["train.py"])) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module.partition(".")[0] == "robopoet"]
    assert sum(len(node.names) for node in ours) <= 35 and len({node.module for node in ours}) <= 14


# --- a name means one thing

SHARED = {
    "main": "each script's",
    "export": "each format's, called through its module",
    "check": "what each format can hold, called through its module",
}


def doubled_names(sources: dict[str, str]) -> list[str]:
    """Each public name that two modules define at their top level."""
    places: dict[str, set[str]] = {}
    for path, source in sources.items():
        for node in ast.parse(source).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [part.id for t in targets if t for part in ast.walk(t) if isinstance(part, ast.Name)]
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names = [node.name]
            for name in names:
                places.setdefault(name, set()).add(path)
    public = {name: paths for name, paths in places.items() if not name.startswith("_") and name not in SHARED}
    return [f"{name}: {', '.join(sorted(paths))}" for name, paths in public.items() if len(paths) > 1]


def test_a_name_means_one_thing():
    assert doubled_names(of_the_house()) == []


@pytest.mark.parametrize(
    "line", ["SIZE = 3", "SIZE: int = 3", "A, SIZE = 1, 2", "def SIZE(): pass", "class SIZE: pass"]
)
def test_a_doubled_name_is_found(line):
    broken = HOUSE | {"train.py": "SIZE = 1\n_SIZE = 1", "robopoet/text/corpus.py": f"{line}\n_SIZE = 1"}
    assert doubled_names(broken) == ["SIZE: robopoet/text/corpus.py, train.py"]


# --- a comment is a whole thought


def cut_thoughts(sources: dict[str, str]) -> list[str]:
    """Each comment, and each line of a docstring, that begins with "of"."""
    found = []
    for path, source in sources.items():
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        lines = [(t.start[0], t.string.lstrip("#! ")) for t in tokens if t.type == tokenize.COMMENT]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                lines += [(getattr(node, "lineno", 1), line.strip()) for line in text.splitlines()]
        found += [f"{path}:{number}: {line}" for number, line in sorted(lines) if line.lower().startswith("of ")]
    return found


def test_no_comment_begins_with_of():
    assert cut_thoughts(python_files()) == []


@pytest.mark.parametrize(
    "text", ["x = 1  # of the model", "# Of a text", '"""Of each rank."""', 'def f():\n    """Sum.\n\n    of all."""']
)
def test_a_comment_that_begins_with_of_is_found(text):
    (found,) = cut_thoughts({"train.py": f"{text}\n", "sample.py": "x = 'of'  # often, of course\n"})
    assert found.startswith("train.py:")


# a small house that keeps the rule; each case below breaks it in one place
HOUSE = {
    "configurator.py": "import sys, yaml",
    "model.py": "import torch\nfrom robopoet.ops import Linear",
    "train.py": "import configurator, model\nfrom robopoet.training import log\nfrom robopoet.writing import decode",
    "prepare.py": "from robopoet.text.corpus import read",
    "robopoet/__init__.py": '"""What stands behind the scripts."""',
    "robopoet/ops.py": "import math\nimport torch.nn.functional as F\nfrom torch import nn",
    "robopoet/errors.py": "",
    "robopoet/machine.py": "from robopoet.errors import RankError\nimport torch",
    "robopoet/text/__init__.py": "",
    "robopoet/text/corpus.py": "from robopoet import errors\nimport robopoet.text.sources",
    "robopoet/text/sources.py": "import numpy",
    "robopoet/weights/checkpoint.py": "from model import GPT\nfrom ..text import corpus",
    "robopoet/training/log.py": "def f():\n    from robopoet.weights import checkpoint\n    import wandb",
    "robopoet/writing/decode.py": "from robopoet.weights import checkpoint",
    "robopoet/writing/poet.py": "from . import decode\nfrom .decode import generate",
}


def test_a_house_that_keeps_the_rule_passes():
    assert import_problems(HOUSE) == []


@pytest.mark.parametrize(
    ("path", "line", "forbidden"),
    [
        ("robopoet/ops.py", "import numpy as np", "numpy"),
        ("robopoet/ops.py", "from robopoet.errors import RankError", "robopoet.errors"),
        ("model.py", "from robopoet import machine", "robopoet.machine"),
        ("configurator.py", "import robopoet.machine", "robopoet.machine"),
        ("configurator.py", "def f():\n    import model", "model"),
        ("robopoet/errors.py", "import configurator", "configurator"),
        ("robopoet/machine.py", "class A:\n    def f(self):\n        import train", "train"),
        ("robopoet/machine.py", "if TYPE_CHECKING:\n    from train import State", "train"),
        ("robopoet/machine.py", "importlib.import_module('train')", "train"),
        ("robopoet/machine.py", "from .text import corpus", "robopoet.text.corpus"),
        ("robopoet/text/corpus.py", "from model import GPT", "model"),
        (
            "robopoet/text/corpus.py",
            "def f():\n    from robopoet.weights import checkpoint",
            "robopoet.weights.checkpoint",
        ),
        ("robopoet/text/sources.py", "from ..weights.checkpoint import load", "robopoet.weights.checkpoint"),
        ("robopoet/weights/checkpoint.py", "import robopoet.writing.decode as g", "robopoet.writing.decode"),
        ("robopoet/weights/checkpoint.py", "import bench.common", "bench.common"),
        ("robopoet/training/log.py", "from robopoet.writing import poet", "robopoet.writing.poet"),
        ("robopoet/training/log.py", "def f():\n    from robopoet.writing.poet import Poet", "robopoet.writing.poet"),
        ("robopoet/training/log.py", "from robopoet import writing", "robopoet"),
        ("robopoet/writing/poet.py", "async def f():\n    import robopoet.training.log", "robopoet.training.log"),
        ("robopoet/writing/poet.py", "from prepare import main", "prepare"),
        ("robopoet/text/__init__.py", "from robopoet.text import corpus", "robopoet.text.corpus"),
        ("prepare.py", "import train", "train"),
        ("prepare.py", "from robopoet.serving import engine", "robopoet.serving"),
    ],
)
def test_a_forbidden_import_is_found(path, line, forbidden):
    assert f"{path}: imports {forbidden}" in import_problems(HOUSE | {path: f"{HOUSE[path]}\n{line}"})


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("robopoet/text/sources.py", "def f():\n    from robopoet.text import corpus"),
        ("robopoet/writing/decode.py", "from . import poet"),
        ("robopoet/text/corpus.py", "from robopoet.text.corpus import read"),
    ],
)
def test_a_circle_is_found(path, line):
    (found,) = import_problems(HOUSE | {path: f"{HOUSE[path]}\n{line}"})
    assert found.startswith("a circle: ")


def test_a_new_file_needs_a_place_in_the_rule():
    assert import_problems(HOUSE | {"robopoet/other.py": ""}) == ["robopoet/other.py: has no place in the rule"]
