"""On Apple's GPUs: train, sample and serve on a machine that has none, on a device that is pretended."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_with_hooks

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has hooks of its own")
@pytest.mark.skipif(torch.backends.mps.is_built(), reason="a Mac's build has hooks of its own")
def test_nothing_asks_for_a_dtype_a_kernel_or_a_mixture_that_apples_gpus_lack(tmp_path):
    arguments = ["-q", "-p", "no:cacheprovider", str(HERE / "trace_mps.py")]
    code = f"import sys, pytest; sys.exit(pytest.main({arguments}))"
    done = run_with_hooks("fake_mps.cpp", tmp_path, code)
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.startswith(10 * ".")
