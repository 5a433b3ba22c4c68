"""How fast the page of --export=poet.html generates in V8 on one core, beside what scalar code could reach there.

python -m bench.html out/demo/best.pt
python -m bench.html out/demo/best.pt --screenshot=bench/results/poet.png

The limit is the slower of two: a token's floating-point operations, at the speed of the engine's own product of a
matrix in the L1 cache; the bytes of the weights, at the speed at which V8 copies. A token's operations are 2 for each
weight of a matrix, and 4 n_embd in each layer for each token in view. Times are CPU seconds: machines are shared.
"""

import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import configurator
from bench.common import markdown, origin, progress, show, spread, write_result
from bench.peer import resident_mb
from robopoet.errors import bounds
from robopoet.machine import find_machine
from robopoet.weights import checkpoint, html

RUN = """
let poet, weights = {};
function put(name, base64) { weights[name] = decodeWeights(base64, about.dtype); return name; }
function open() { poet = new Poet(about, weights); return 0; }
function write(n, temperature) {
  for (const _ of poet.write("\\n", { until: "tokens", max_new_tokens: n, temperature })) {}
  return 0;
}
const [x, y, b, w] = [64, 64, 64, 4096].map((n) => new Float32Array(n));
function multiply(repeats) { // 2 * 4096 operations each
  for (let i = 0; i < repeats; i++) linear(y, 0, x, w, b, 1);
  return 0;
}
let from, to;
function copy(repeats) { // 2 ** 26 bytes, read and written, each
  from ??= new Float32Array(2 ** 24).fill(1);
  to ??= new Float32Array(2 ** 24).fill(1);
  for (let i = 0; i < repeats; i++) to.set(from);
  return 0;
}
"""


@dataclass(frozen=True)
class HTMLConfig:
    """The keys of bench.html."""

    checkpoint: str = "out/demo/best.pt"  # the model
    tokens: int = 300  # tokens generated in each repeat
    repeats: int = 5  # how often each measurement is made
    screenshot: str = ""  # take only a picture of the page, in Chromium, to this file
    out: str = "html_DEVICE"  # name of the result

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "tokens", 1) + bounds(self, "repeats", 1)


def take_screenshot(page: Path, picture: Path) -> None:
    """Let the page write in Chromium, point at a word, and save what is seen, 1,200 pixels wide."""
    from selenium import webdriver
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--window-size=1200,940"):
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver")) as browser:
        find = lambda selector: browser.find_element("css selector", selector)  # noqa: E731
        browser.get(page.absolute().as_uri())
        WebDriverWait(browser, 60).until(lambda _: find("#write").is_enabled())
        find("#prompt").send_keys("O gentle night,")
        for slider, share in zip(browser.find_elements("css selector", "#styles input"), (70, 30), strict=False):
            change = (
                "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
            )
            browser.execute_script(change, slider, share)
        find("#write").click()
        WebDriverWait(browser, 60).until(lambda _: find("#write").is_displayed())
        browser.execute_script("scrollTo(0, 0)")
        webdriver.ActionChains(browser).move_to_element(find("#text .new:nth-of-type(9)")).pause(0.5).perform()
        browser.save_screenshot(str(picture))


def main(cfg: HTMLConfig) -> None:
    """Export the model, measure its engine and write the result, or take a picture of the page."""
    from py_mini_racer import MiniRacer

    model, tok, content = checkpoint.load_model(Path(cfg.checkpoint), torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "poet.html"
        html.export(model, tok, content, "", page)
        if cfg.screenshot:
            return take_screenshot(page, Path(cfg.screenshot))
        text = page.read_text(encoding="utf-8")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    engine, about = (re.search(rf'id="{id}">(.*?)</script>', text, re.S)[1] for id in ("engine", "about"))
    lines = re.findall(r'data-name="(.*?)">(.*?)</script>', text)
    v8 = MiniRacer()
    v8.eval("0")  # V8 itself takes some 40 MB, in a browser too
    before, start = resident_mb("self", "VmRSS"), time.perf_counter()
    v8.eval(f"{engine}\nconst about = {about};{RUN}")
    for name, base64 in lines:
        v8.call("put", name, base64)
    v8.call("open")
    load_s = time.perf_counter() - start

    def rates_of(work: float, *call: str | float) -> list[float]:
        """How much of `work` a call does in a second, in each repeat, once its loops are compiled."""
        v8.call(*call)
        rates = []
        for _ in progress(range(cfg.repeats), f"laps of {call[0]}"):
            begun = time.process_time()
            v8.call(*call)
            rates.append(work / (time.process_time() - begun))
        return rates

    rates = {name: rates_of(cfg.tokens, "write", cfg.tokens, t) for name, t in (("sampled", 0.9), ("greedy", 0))}
    v8.low_memory_notification()
    c, n = model.config, model.num_params()
    beside_mb = (resident_mb("self", "VmRSS") - before) * 2**20 / 1e6 - 4 * n / 1e6
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    matrices -= c.block_size * c.n_embd if c.positions == "learned" else 0
    flop = 2 * matrices + 4 * c.n_embd * c.n_layer * min(cfg.tokens / 2, c.block_size)
    flops, bandwidth = max(rates_of(8192e5, "multiply", 100_000)), max(rates_of(20 * 2**26, "copy", 10))
    limit = min(flops / flop, bandwidth / (4 * n))
    result = origin("html", find_machine("cpu", "float32")) | {
        "v8": v8.v8_version,
        "parameters": n,
        "file_mb": len(text) / 1e6,
        "load_s": load_s,
        "tokens_per_s": {key: spread(values) for key, values in rates.items()},
        "flop_per_token": flop,
        "flops": flops,
        "bytes_per_s": bandwidth,
        "limit_tokens_per_s": limit,
        "memory_beside_weights_mb": beside_mb,
    }
    print(table([result]))
    return write_result(result, cfg.out)


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results, a row for each."""
    rows = []
    for r in results:
        greedy, sampled = (show(r["tokens_per_s"][kind]) for kind in ("greedy", "sampled"))
        limit = f"{r['limit_tokens_per_s']:,.0f}"
        sizes = [f"{r['file_mb']:.1f}", f"{r['load_s']:.1f}", f"{r['memory_beside_weights_mb']:.0f}"]
        rows.append([f"{r['parameters']:,}", greedy, sampled, limit, *sizes])
    header = ["parameters", "greedy, tokens/s", "sampled", "limit", "file, MB", "s to load", "MB more"]
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, HTMLConfig, positional="checkpoint")
