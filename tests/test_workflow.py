"""Continuous integration and the hooks of pre-commit: they name what exists, and need what they install."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from robopoet.files import read_yaml

REPO = Path(__file__).parents[1]
WORKFLOW = REPO / ".github" / "workflows" / "test.yml"
UNIX = r"\b(fcntl|resource|termios|pty|SIGALRM|SIGKILL|os\.(fork|kill|mkfifo|symlink)|run_script|within)\b"


@pytest.fixture(scope="module")
def jobs() -> dict:
    return read_yaml(str(WORKFLOW), ValueError)["jobs"]


def required(name: str) -> list[str]:
    """The packages that a file of requirements pins, without the files that it names."""
    return re.findall(r"^([\w-]+)==", (REPO / name).read_text(), re.M)


def imports_at_start(path: Path) -> set[str]:
    """The modules that a file imports at its top level."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    plain = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    named = plain | {node.module for node in body if isinstance(node, ast.ImportFrom)}
    return {module.partition(".")[0] for module in named}


def test_actions_have_a_major_version_and_what_is_run_exists(jobs):
    assert jobs.keys() == {"linux", "elsewhere"}
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    commands = " ".join(step["run"] for step in steps if "run" in step)
    named = re.findall(r"(?:\S+/)\S+\.py|requirements\S*\.txt|\.ci/run", commands)
    assert len(named) > 9 and [path for path in named if not (REPO / path).is_file()] == []
    assert os.access(REPO / ".ci" / "run", os.X_OK) and [*jobs["linux"]["steps"][-1].values()] == [".ci/run"]
    assert "http" not in WORKFLOW.read_text()


def test_what_is_run_elsewhere_needs_no_package_and_no_system_that_is_not_there(jobs):
    install, run = (step["run"] for step in jobs["elsewhere"]["steps"][-2:])
    added = re.search(r"'\^\((\S+)\)==", install)[1].split("|")
    assert {*added} <= {*required("requirements-dev.txt")} and "-r requirements-light.txt" in install
    packages = {"yaml" if name == "pyyaml" else name for name in [*required("requirements-light.txt"), *added]}
    tests = {path.stem: path for path in (REPO / "tests").glob("*.py")}
    ours = {path.stem for path in REPO.glob("*.py")} | {"robopoet", "bench"}
    files = [REPO / name for name in re.findall(r"tests/\S+", run)]
    for path in files:
        assert re.findall(UNIX, path.read_text(encoding="utf-8")) == []
    files += [tests["conftest"], REPO / "bench" / "common.py"]
    for path in files:  # which grows
        needed = imports_at_start(path) - ours - {*sys.stdlib_module_names} - packages
        assert needed <= tests.keys(), path
        files += [tests[name] for name in needed if tests[name] not in files]


def test_hooks_run_what_make_test_installs():
    (repo,) = read_yaml(str(REPO / ".pre-commit-config.yaml"), ValueError)["repos"]
    assert repo["repo"] == "local" and {hook["language"] for hook in repo["hooks"]} == {"system"}
    tools = [hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repo["hooks"]]
    assert {*tools} <= {*required("requirements-dev.txt")}
    makefile = (REPO / "Makefile").read_text()
    assert all(f"$(BIN)/{' '.join(hook['name'].split()[:2])}" in makefile for hook in repo["hooks"])
