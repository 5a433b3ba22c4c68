"""The documents keep their shape: lines that fit, links that lead somewhere, figures that follow from the results."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bench import common, summary, table
from robopoet import VERSION

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "bench/RESULTS.md", "bench/PASSAGES.md", "docs/README.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_fits_its_page(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100] == []
    assert name != "README.md" or len(lines) <= 210


@pytest.mark.parametrize("name", [*DOCUMENTS, "CONTRIBUTING.md", "bench/LOG.md"])
def test_the_links_of_a_document_lead_to_a_heading_that_stands_once(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(lines))
    assert links
    for link in links:
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
            assert list(map(table.anchor, headings)).count(heading) == 1, link


def test_the_changelog_tells_what_this_version_has():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and [line for line in lines if len(line) > 100] == []
    headings = [line for line in lines if line.startswith("## ")]
    assert headings[0] == "## Unreleased" and headings[1].startswith(f"## {VERSION} - ")


def test_a_wrapped_command_has_the_same_arguments():
    commands = [json.loads(path.read_text())["command"] for path in common.RESULTS.glob("*.json")]
    commands.append(f"""python x.py --a='it costs $5, "really"' '--b={"one two " * 20}' "--c=it's" '{"$HOME " * 20}'""")
    for command in commands:
        wrapped = common.wrap_command(command)
        shell = ["bash", "-c", f"set -- {wrapped}\nprintf '%s\\0' \"$@\""]
        seen = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
        assert seen == shlex.split(command)
        assert max(map(len, wrapped.splitlines())) <= 100 or "$HOME" in command  # in which bash would put a folder


def test_side_by_side_keeps_every_cell_in_its_column():
    rows = [["speed", "1", "2"], ["share", "", "3%"], ["of neither"], ["start", "4"]]
    lines = common.side_by_side(["ours", "theirs"], [("one\ntwo", rows), ("next", rows[:1])]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", "", "ours", "theirs"]
    assert cells[2:] == [
        ["one", "speed", "1", "2"],
        ["two", "share", "", "3%"],
        ["", "start", "4", ""],
        ["next", "speed", "1", "2"],
    ]
    assert len(set(map(len, lines))) == 1


def timed(dtype, lead, peer_mb, tuned=1.5):
    """A result of bench.train_speed, in which nanoGPT is `lead` times slower, and tuned `tuned` times."""
    figure = lambda value: common.spread([value])  # noqa: E731
    peers = {"nanoGPT": {"tok_per_sec": figure(700.0), "ratio": figure(lead), "peak_mem_mb": 1500.0}}
    peers["nanoGPT, compiled"] = {"tok_per_sec": figure(900.0), "ratio": figure(tuned), "peak_mem_mb": peer_mb}
    machine = {"device": "AMD EPYC", "dtype": dtype, "threads": 2, "memory_gb": None}
    result = {"kind": "train_speed", "config": "robopoet_adamw", "machine": machine, "peers": peers}
    return result | {"tok_per_sec": figure(2000.0), "parameters": 6_493_440, "peak_mem_mb": 1000.0}


def test_where_it_loses_follows_from_the_results():
    both = [timed("bfloat16", 2.9, 999.0), timed("float32", 1.7, 1001.0, tuned=1.2)]
    shown = summary.results_block(both)
    assert "| train 6.5M, tokens/s | 2,000    | 2.9x      | 1.5x    |                | EPYC     |" in shown
    assert "No GPU has run it yet" in shown
    shown = "\n".join(summary.losses(both))
    assert "The lead of 2.9x varies from 2.9x to 2.9x" in shown and "it is 1.7x" in " ".join(shown.split())
    assert "nanoGPT, compiled, is only 1.2x behind on robopoet_adamw in float32" in shown
    assert "needs less memory: bfloat16 999 MB, ours 1,000." in shown  # not float32
    assert "people's range" not in shown and "short book" not in shown
    on_a_gpu = timed("bfloat16", 1.1, 2000.0)
    on_a_gpu["machine"] = {"device": "NVIDIA H100", "dtype": "bfloat16", "threads": 16, "memory_gb": 79.1}
    both = [on_a_gpu, timed("bfloat16", 2.9, 1001.0)]
    shown = summary.results_block(both) + "\n".join(summary.losses(both))
    assert "No GPU" not in shown and "1.1x" not in shown and "less memory" not in shown


def test_a_row_has_the_range_over_machines_and_names_the_one_with_the_least_lead():
    slow = timed("float32", 1.7, 1001.0, tuned=1.6) | {"tok_per_sec": common.spread([900.0])}
    slow["machine"] = slow["machine"] | {"device": "AMD EPYC, AVX2"}
    shown = summary.results_block([slow, timed("float32", 2.0, 999.0), timed("bfloat16", 2.9, 999.0)])
    row = "| 900–2,000 | 1.7–2.9x  | 1.5–1.6x |                | EPYC, AVX2 |"
    assert row in shown  # the other machine's own is in bfloat16


def test_every_result_has_its_place_in_the_tables():
    results = table.read_results()
    assert {r["kind"] for r in results} <= table.SECTIONS.keys()
    shown = table.tables()
    assert all(common.wrap_command(r["command"]) in shown for r in results)


def test_line_counts_may_be_off_by_a_little_but_not_by_much():
    block = summary.files_block()
    lines = summary.lines_of("model.py")
    assert lines == len((ROOT / "model.py").read_text(encoding="utf-8").splitlines())
    assert summary.alike(block.replace(f"| {lines:<5} |", f"| {lines + 10:<5} |"), block)
    assert not summary.alike(block.replace(f"| {lines:<5} |", f"| {2 * lines:<5} |"), block)
    assert not summary.alike(block.replace("`model.py`", "`models.py`"), block)
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("robopoet/**/*.py")}
    assert {str(path) for path in packages} <= summary.FILES.keys()
    assert {path.name for path in ROOT.glob("*.py")} <= summary.FILES.keys()


def test_every_test_that_the_list_of_faults_names_exists():
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    defined = re.findall(r"^def (test_\w+)", "\n".join(files.values()), re.M)
    named = re.findall(r"`(test_\w+(?:\.py|\.\.\.)?)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 50
    for name in named:
        start = name.removesuffix("...")
        exists = name in files if name.endswith(".py") else any(found.startswith(start) for found in defined)
        assert exists, name
        assert name != start or name.endswith(".py") or name in defined, f"{name} is not the full name"
