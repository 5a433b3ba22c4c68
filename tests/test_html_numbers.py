"""The arithmetic of the page of --export=poet.html, in V8: its products, GELU, and weights in base64."""

import base64
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from py_mini_racer import MiniRacer
from test_html import ENGINE, call


@pytest.fixture
def v8() -> MiniRacer:
    """V8 with the engine alone."""
    v8 = MiniRacer()
    v8.eval(ENGINE.read_text(encoding="utf-8"))
    return v8


@pytest.mark.parametrize("has_simd", [True, False])
def test_products_are_numpys_and_a_row_alone_has_the_bits_that_it_has_beside_others(has_simd):
    v8, rng = MiniRacer(), np.random.default_rng(0)
    if not has_simd:
        v8.eval("globalThis.WebAssembly = undefined")
    v8.eval(ENGINE.read_text(encoding="utf-8"))
    code = """(y, x, w, ...sizes) => { const arena = new Arena(y.length + x.length + w.length + 9);
        const [a, b, c] = [y, x, w].map((all) => { const a = arena.take(all.length); a.set(all); return a; });
        arena.multiply(a, b, c, ...sizes); return [Array.from(a), arena.buffer !== null]; }"""
    for M, N, K, more in [(1, 4, 4, 0), (3, 9, 8, 0), (5, 6, 12, 3), (2, 3, 16, 0), (2, 8, 7, 1), (16, 65, 32, 4)]:
        dy, dx, dw = N + more, K + more, K + 2 * more
        y, x, w = (rng.standard_normal(n, np.float32) for n in (M * dy, M * dx, N * dw))
        found, simd = call(v8, code, y.tolist(), x.tolist(), w.tolist(), M, N, K, dy, dx, dw)
        wanted = y.astype(float).reshape(M, dy)
        wanted[:, :N] += x.reshape(M, dx)[:, :K].astype(float) @ w.reshape(N, dw)[:, :K].T
        assert simd == has_simd and np.abs(np.array(found) - wanted.ravel()).max() < 1e-5
        for m in range(M):
            alone, _ = call(
                v8, code, y[m * dy :][:dy].tolist(), x[m * dx :][:dx].tolist(), w.tolist(), 1, N, K, dy, dx, dw
            )
            assert alone == found[m * dy :][:dy]


def test_the_engines_product_is_poet_wat_assembled():
    if not (assembler := shutil.which("wat2wasm")):
        pytest.skip("requirements-slow.txt has it")
    command = [assembler, str(ENGINE.with_suffix(".wat")), "--output=-"]
    assembled = subprocess.run(command, capture_output=True, check=True).stdout
    product = re.search(r'PRODUCT = "(.*?)"', ENGINE.read_text(encoding="utf-8"))[1]
    assert base64.b64decode(product) == assembled


def test_weights_are_decoded_bit_for_bit(v8):
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]  # subnormals, zeros and the largest among them
    for numbers in (halves, np.float32([0, -0.0, 1e-45, np.pi, 3e38])):
        text = base64.b64encode(numbers.tobytes()).decode()
        found = call(v8, "(...given) => Array.from(decodeWeights(...given), String)", text, numbers.dtype.name)
        assert np.array_equal(np.float32(found), np.float32(numbers))
    for lacks in ("true", "delete Uint8Array.fromBase64"):  # as in a browser that has it, and in an older one
        v8.eval(lacks)
        for n in range(6):
            found = call(v8, "(s) => Array.from(decodeBase64(s))", base64.b64encode(b"abcde"[:n]).decode())
            assert bytes(found) == b"abcde"[:n]


def test_gelu_and_erf_are_torchs(v8):
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    found = torch.tensor(call(v8, "(x) => x.map(erf)", x.tolist()), dtype=torch.float64)
    torch.testing.assert_close(found, x.erf(), rtol=0, atol=5e-8)
    code = "(x, isTanh) => { x = Float64Array.from(x); gelu(x, x.length, isTanh); return Array.from(x); }"
    for is_tanh, approximate in ((False, "none"), (True, "tanh")):
        found = torch.tensor(call(v8, code, x.tolist(), is_tanh), dtype=torch.float64)
        torch.testing.assert_close(found, torch.nn.functional.gelu(x, approximate=approximate), rtol=0, atol=2e-7)
