"""docs/: the Dockerfile's steps, run without Docker, and systemd's unit, as systemd itself reads it."""

import configparser
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import REPO, save_random
from served import Served

import configurator
from robopoet.errors import ConfigError
from serve import ServeConfig

UNIT = REPO / "docs" / "robopoet.service"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments."""
    text = re.sub(r"^#.*\n", "", (REPO / "docs" / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(name, arguments) for name, _, arguments in (line.partition(" ") for line in text.splitlines() if line)]


def arguments(name: str) -> list[str]:
    return [given for instruction, given in instructions() if instruction == name]


def unit() -> dict[str, str]:
    """The keys of [Service]; of one that stands twice, the last."""
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read(UNIT)
    assert parser.sections() == ["Unit", "Service", "Install"]
    return dict(parser["Service"])


def config_of(words: list[str]) -> ServeConfig:
    """What serve.py makes of these arguments, which follow its own name."""
    return configurator.parse(ServeConfig, words, "checkpoint")


def health_command(port: int) -> list[str]:
    (check,) = arguments("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[0] == "python3" and all("8000" in word for word in command[2:])
    return [sys.executable, *(word.replace("8000", str(port)) for word in command[1:])]


def test_the_dockerfile_names_what_is_there_and_runs_without_rights(monkeypatch):
    monkeypatch.setenv("ROBOPOET_API_KEY", "k")
    known = "ARG FROM WORKDIR RUN COPY ENV USER EXPOSE HEALTHCHECK ENTRYPOINT CMD".split()
    assert {name for name, _ in instructions()} == {*known}
    for copied in arguments("COPY"):
        for source in copied.split()[:-1]:
            assert [*REPO.glob(source)], source
    assert all(int(id) > 0 for id in arguments("USER")[0].split(":"))
    assert [*map(shlex.split, arguments("RUN"))]  # raises where a quote is not closed
    (entry,), (command,) = (map(json.loads, arguments(name)) for name in ("ENTRYPOINT", "CMD"))
    assert entry == ["python3", "serve.py"] and "ROBOPOET_API_KEY" not in str(arguments("ENV"))
    cfg = config_of(command)
    assert cfg.host == "0.0.0.0" and cfg.port == int(arguments("EXPOSE")[0])
    monkeypatch.delenv("ROBOPOET_API_KEY")
    with pytest.raises(ConfigError, match="ROBOPOET_API_KEY"):  # a container that nobody gave a key serves nobody
        config_of(command)


def test_the_health_check_tells_a_server_that_lives_from_one_that_does_not(tmp_path):
    with Served(save_random(tmp_path / "best.pt")) as server:
        assert subprocess.run(health_command(server.port)).returncode == 0
        server.engine.stop()
        assert subprocess.run(health_command(server.port), stderr=subprocess.DEVNULL).returncode == 1
    assert subprocess.run(health_command(server.port), stderr=subprocess.DEVNULL).returncode == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint")
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", str(REPO / "docs" / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_unit_starts_what_is_there_and_waits_for_what_runs():
    service = unit()
    python, script, *words = shlex.split(service["ExecStart"])
    cfg = config_of(words)
    assert (REPO / script).exists() and cfg.host == "127.0.0.1" and not Path(cfg.checkpoint).is_absolute()
    assert float(service["TimeoutStopSec"]) > cfg.grace_s
    assert service["DynamicUser"] == "yes" and service["ProtectSystem"] == "strict" and service["MemoryMax"]
    header = UNIT.read_text().partition("[Unit]")[0]
    assert service["WorkingDirectory"] in header and service["EnvironmentFile"].removeprefix("-") in header
    assert python.removesuffix("/bin/python") in header
    copied = re.search(r"sudo cp -r (.+) /opt", header).group(1).split()
    assert all([*REPO.glob(pattern)] for pattern in copied)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_takes_the_unit_and_finds_it_safe(tmp_path):
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace(shlex.split(unit()["ExecStart"])[0], sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(here)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-300:]  # ten times the exposure, which may be 100: below 20 is safe


@pytest.mark.slow
def test_the_dockerfiles_steps_make_a_server(tmp_path):
    """In a folder instead of /; what this Python has need not be fetched."""
    app, venv = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    checkpoint = save_random(tmp_path / "best.pt")
    installed = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ROBOPOET_API_KEY": "k"}
    steps = 0
    for name, given in instructions():
        if name == "COPY":
            *sources, target = given.split()
            for source in (path for pattern in sources for path in REPO.glob(pattern)):
                if source.is_dir():
                    shutil.copytree(source, app / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(source, app / target)
        elif name == "RUN":
            command = given.replace("/opt/venv", str(venv))
            ran = subprocess.run(
                ["sh", "-ec", command],
                cwd=app,
                env=environment | {"PYTHONPATH": installed},
                capture_output=True,
                text=True,
            )
            assert ran.returncode == 0, ran.stdout + ran.stderr
            steps += 1
    assert steps == 2 and (venv / "bin" / "python3").exists()
    command = [*json.loads(arguments("ENTRYPOINT")[0]), str(checkpoint), "--port=0", "--host=127.0.0.1", "--device=cpu"]
    environment |= {"PATH": f"{venv}/bin:{environment['PATH']}", "PYTHONPATH": installed, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=app, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = next((line for line in process.stderr if line.startswith("serving ")), "")
        url = line.split()[-1].removesuffix("/v1")
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stderr.close()
