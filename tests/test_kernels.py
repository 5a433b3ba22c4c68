"""What Inductor writes for CUDA, compiled to machine code for cards that are not there: tests/trace_kernels.py."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_with_hooks

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has hooks of its own"),
]


def trace(folder: Path, call: str) -> dict:
    """The value of a call of trace_kernels."""
    pytest.importorskip("triton", reason="requirements-slow.txt has it")
    code = f"import json, sys\nsys.path.insert(0, {str(HERE)!r})\nimport trace_kernels\n"
    done = run_with_hooks("fake_cuda.cpp", folder, f"{code}print(json.dumps(trace_kernels.{call}))")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# every shape, dtype and card is met, each shape's kernels on two cards: all of them on all would take half an hour
CASES = [
    ("reference", "bfloat16", [80, 90, 120], ["--n_layer=2"]),
    ("reference", "float16", [75], ["--n_layer=2"]),
    ("few_books", "float32", [75, 86], ["--n_layer=2"]),
    ("few_books", "bfloat16", [89], ["--n_layer=2"]),
    ("gpt2", "bfloat16", [90, 86], ["--n_layer=2"]),
    ("llama", "bfloat16", [80, 89], ["--n_layer=2"]),
    ("llama", "float32", [120], ["--n_layer=2"]),
]


@pytest.mark.parametrize(("shape", "dtype", "cards", "keys"), CASES)
def test_an_update_is_one_graph_that_never_waits_and_its_kernels_fit_the_cards(tmp_path, shape, dtype, cards, keys):
    found = trace(tmp_path, f"trace({shape!r}, {dtype!r}, {cards}, *{keys})")
    assert (found["breaks"], found["graphs"], found["parts"], found["waits"]) == ({}, 1, 2, [])
    assert found["kernels"] > 15 and len(found["tried"]) == len(cards) * found["kernels"]
    for tried in found["tried"]:  # Inductor tries each block size and takes the fastest
        assert any(binary["fits"] for binary in tried), tried


def test_a_wait_rows_that_recompile_and_a_huge_block_are_seen(tmp_path):
    found = trace(tmp_path, "make_mistakes()")
    assert len(found["waits"]) == 1 and "_to_copy at trace_kernels.py" in found["waits"][0]
    assert "recompil" in found["recompiles"].lower()
    assert any(found["as written"]) and not any(found["huge"])


def test_gpt2s_rows_take_the_memory_that_its_config_says(tmp_path):
    text = (HERE.parent / "config/gpt2.yaml").read_text(encoding="utf-8")
    said = re.findall(r"(\d+)(?: --gradient_accumulation_steps=| and )(\d+)[^;]*?([\d.]+) GB", text.replace("\n#", ""))
    least, most = trace(tmp_path, "peaks_gb([6, 60])")
    assert [int(rows) for rows, *_ in said] == [6, 12, 30, 60]
    for rows, parts, gb in said:
        assert int(rows) * int(parts) == 480  # as in the config
        assert float(gb) == pytest.approx(least + (int(rows) - 6) / 54 * (most - least), abs=0.06)
