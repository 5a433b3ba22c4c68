"""Who may import whom, and how long a file may be: the rules that keep the code easy to read."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SCRIPTS = "train", "sample", "prepare", "serve"
FOLDERS = "robopoet", "bench", "tests", "config", "data"
BOTTOM = "configurator errors files untrusted recording ops machine portable"

# what each module, or each module of a folder, may import of ours; robopoet. is left out
MAY_IMPORT = {
    "configurator": "",
    "model": "ops",
    "ops": "",
    "errors": "",
    "files": BOTTOM,
    "portable": "",
    "untrusted": BOTTOM,
    "recording": BOTTOM,
    "machine": BOTTOM,
    "text": "configurator errors files portable untrusted machine text",
    "weights": f"{BOTTOM} text model weights",
    "training": f"{BOTTOM} text model weights training writing.generate writing.preview",
    "writing": f"{BOTTOM} text model weights writing",
    "serving": f"{BOTTOM} text model weights writing serving",
    **dict.fromkeys(SCRIPTS, f"{BOTTOM} text model weights training writing"),
    "serve": f"{BOTTOM} text weights writing serving",
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
    assert known >= {*MAY_IMPORT, "writing.generate"}  # a file that the rule names is there


def test_the_top_level_holds_six_scripts_and_data_none():
    paths = python_files()
    assert {path for path in paths if "/" not in path} == {f"{name}.py" for name in (*SCRIPTS, "model", "configurator")}
    assert not [path for path in paths if path.startswith(("data/", "config/"))]


def test_each_file_is_short():
    most = {"model.py": 250, "train.py": 420, "configurator.py": 430}
    lengths = {path: text.count("\n") for path, text in python_files().items()}
    assert {path: n for path, n in lengths.items() if n > most.get(path, 400)} == {}


def changes_of_configs(source: str) -> list[str]:
    """The calls in `source` that make one config from another, or write into a frozen one."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    replaces = [call for call in calls if ast.unparse(call.func) in ("dataclasses.replace", "replace")]
    found = [call for call in replaces if call.args and ast.unparse(call.args[0]).rpartition(".")[2] in ("cfg", "self")]
    return [ast.unparse(call) for call in (*found, *(c for c in calls if ast.unparse(c.func) == "object.__setattr__"))]


def test_a_train_config_changes_in_plan_alone():
    files = {path: text for path, text in python_files().items() if path.startswith(("train.py", "robopoet/training/"))}
    found = {path: changes for path, text in files.items() if (changes := changes_of_configs(text))}
    assert found == {"robopoet/training/plan.py": ["dataclasses.replace(cfg, **values)"]}
    assert len(changes_of_configs("replace(self.cfg, a=1)\nobject.__setattr__(cfg, 'given', x)\nreplace(config)")) == 2


# a small house that keeps the rule; each case below breaks it in one place
HOUSE = {
    "configurator.py": "import sys, yaml",
    "model.py": "import torch\nfrom robopoet.ops import Linear",
    "train.py": "import configurator, model\nfrom robopoet.training import log\nfrom robopoet.writing import generate",
    "prepare.py": "from robopoet.text.corpus import read",
    "robopoet/__init__.py": '"""What stands behind the scripts."""',
    "robopoet/ops.py": "import math\nimport torch.nn.functional as F\nfrom torch import nn",
    "robopoet/errors.py": "",
    "robopoet/machine.py": "from robopoet.errors import RankError\nimport torch",
    "robopoet/text/__init__.py": "",
    "robopoet/text/corpus.py": "from robopoet import errors\nimport robopoet.text.sources",
    "robopoet/text/sources.py": "import numpy",
    "robopoet/weights/checkpoint.py": "from model import GPT\nfrom ..text import corpus",
    "robopoet/training/log.py": "def f():\n    from robopoet.writing.generate import generate\n    import wandb",
    "robopoet/writing/generate.py": "from robopoet.weights import checkpoint",
    "robopoet/writing/poet.py": "from . import generate\nfrom .generate import generate",
}


def test_a_house_that_keeps_the_rule_passes():
    assert import_problems(HOUSE) == []


@pytest.mark.parametrize(
    ("path", "line", "forbidden"),
    [
        ("robopoet/ops.py", "import numpy as np", "numpy"),
        ("robopoet/ops.py", "from robopoet.errors import RankError", "robopoet.errors"),
        ("model.py", "from robopoet import machine", "robopoet.machine"),
        ("configurator.py", "import robopoet.errors", "robopoet.errors"),
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
        ("robopoet/weights/checkpoint.py", "import robopoet.writing.generate as g", "robopoet.writing.generate"),
        ("robopoet/weights/checkpoint.py", "import bench.common", "bench.common"),
        ("robopoet/training/log.py", "from robopoet.writing import poet", "robopoet.writing.poet"),
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
        ("robopoet/writing/generate.py", "from . import poet"),
        ("robopoet/text/corpus.py", "from robopoet.text.corpus import read"),
    ],
)
def test_a_circle_is_found(path, line):
    (found,) = import_problems(HOUSE | {path: f"{HOUSE[path]}\n{line}"})
    assert found.startswith("a circle: ")


def test_a_new_file_needs_a_place_in_the_rule():
    assert import_problems(HOUSE | {"robopoet/other.py": ""}) == ["robopoet/other.py: has no place in the rule"]
