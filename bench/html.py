"""How fast the page of --export=poet.html generates in V8 on one core, or in a browser.

python -m bench.html out/demo/best.pt
python -m bench.html out/demo/best.pt --browser=firefox
python -m bench.html out/demo/best.pt --screenshot=bench/results/poet.png

The limit in V8 is the slower of two: a token's floating-point operations, at the speed of the engine's own product of
a matrix in the L1 cache; the bytes of the weights, at the speed at which V8 copies. A token's operations are 2 for each
weight of a matrix, and 4 n_embd in each layer for each token in view. Times in V8 are CPU seconds: machines are shared;
a browser is timed from the click on Write, its processes on as many cores as they like.
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
from bench.browser import COMMANDS, Browser, find_browser, open_browser
from bench.common import markdown, origin, progress, show, spread, write_result
from bench.peer import resident_mb
from model import GPT
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
const arena = new Arena(2 * 64 + 4096), [x, y, w] = [64, 64, 4096].map((n) => arena.take(n));
function multiply(repeats) { // 2 * 4096 operations each
  for (let i = 0; i < repeats; i++) arena.multiply(y, x, w, 1, 64, 64);
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

# in the page: seconds from a click on Write to the first text and to the end, and tokens
WRITE = """new Promise((done) => {
  const set = (id, value) => { $(id).value = value; };
  set("until", "tokens"); set("max_new_tokens", %d); set("temperature", %g); set("prompt", "To be, or not to be");
  let first = 0;
  const start = performance.now(), elapsed = () => (performance.now() - start) / 1000;
  const watcher = new MutationObserver(() => { if (text.querySelector(".new")) first ||= elapsed(); });
  watcher.observe(text, { childList: true });
  $("write").click();
  const end = setInterval(() => {
    if ($("write").hidden) return;
    clearInterval(end);
    watcher.disconnect();
    done({ first, whole: elapsed(), count });
  }, 5);
})"""


@dataclass(frozen=True)
class HTMLConfig:
    """The keys of bench.html."""

    checkpoint: str = "out/demo/best.pt"  # the model
    tokens: int = 300  # tokens generated in each repeat
    repeats: int = 5  # how often each measurement is made
    browser: str = ""  # chromium or firefox: time the page there, not its engine in V8
    screenshot: str = ""  # take only a picture of the page, in Chromium, to this file
    out: str = "html_DEVICE"  # name of the result

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = bounds(self, "tokens", 1) + bounds(self, "repeats", 1)
        if self.browser and not (self.browser in COMMANDS and find_browser(self.browser)):
            found.append(f"browser: found {self.browser!r}, must be installed, and one of {', '.join(COMMANDS)}")
        return found


def take_screenshot(page: Path, picture: Path) -> None:
    """Let the page write in Chromium, point at a word, and save what is seen, 1,200 pixels wide."""
    from selenium.webdriver import ActionChains

    with open_browser("chromium") as browser:
        open_page(browser, page)
        for i, share in enumerate((70, 30)):
            slide = f"s.value = {share}, s.dispatchEvent(new Event('input', {{ bubbles: true }}))"
            browser.evaluate(f"((s) => s && ({slide}))($('style-{i}'))")
        browser.driver.find_element("id", "prompt").send_keys("O gentle night,")
        browser.evaluate(WRITE % (300, 0.9))
        browser.evaluate("scrollTo(0, 0)")
        word = browser.driver.find_element("css selector", "#text .new:nth-of-type(9)")
        ActionChains(browser.driver).move_to_element(word).pause(0.5).perform()
        browser.driver.save_screenshot(str(picture))


def open_page(browser: Browser, page: Path) -> float:
    """Seconds until the page could write."""
    start = time.perf_counter()
    browser.get(page)
    while browser.evaluate("$('write').disabled"):
        time.sleep(0.02)
    return time.perf_counter() - start


def time_in(name: str, page: Path, cfg: HTMLConfig) -> dict[str, Any]:
    """What the page does in a browser, for the result."""
    with open_browser(name) as browser:
        found = {"browser": browser.version, "load_s": open_page(browser, page), "tokens_per_s": {}}
        for kind, temperature in (("sampled", 0.9), ("greedy", 0)):
            call = WRITE % (cfg.tokens, temperature)
            browser.evaluate(call)  # compiles what is hot
            laps = [browser.evaluate(call) for _ in progress(range(cfg.repeats), f"laps, {kind}")]
            found["tokens_per_s"][kind] = spread([lap["count"] / lap["whole"] for lap in laps])
        found["first_text_ms"] = spread([1000 * lap["first"] for lap in laps])
    return found


def time_in_v8(text: str, model: GPT, cfg: HTMLConfig) -> dict[str, Any]:
    """What the engine of the page's text does in V8 alone, for the result."""
    from py_mini_racer import MiniRacer

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
    return {
        "v8": v8.v8_version,
        "load_s": load_s,
        "tokens_per_s": {key: spread(values) for key, values in rates.items()},
        "flop_per_token": flop,
        "flops": flops,
        "bytes_per_s": bandwidth,
        "limit_tokens_per_s": limit,
        "memory_beside_weights_mb": beside_mb,
    }


def main(cfg: HTMLConfig) -> None:
    """Export the model, time it in V8 or in a browser and write the result, or take a picture of the page."""
    model, tok, content = checkpoint.load_model(Path(cfg.checkpoint), torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "poet.html"
        html.export(model, tok, content, "", page)
        if cfg.screenshot:
            return take_screenshot(page, Path(cfg.screenshot))
        text = page.read_text(encoding="utf-8")
        found = time_in(cfg.browser, page, cfg) if cfg.browser else time_in_v8(text, model, cfg)
    result = origin("html", find_machine("cpu", "float32"))
    result |= {"parameters": model.num_params(), "file_mb": len(text) / 1e6} | found
    print(table([result]))
    return write_result(result, cfg.out)


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results, a row for each."""
    rows = []
    for r in results:
        greedy, sampled = (show(r["tokens_per_s"][kind], ".0f") for kind in ("greedy", "sampled"))
        limit = f"{r['limit_tokens_per_s']:,.0f}" if "limit_tokens_per_s" in r else "–"
        first = f"{r['first_text_ms']['median']:.0f}" if "first_text_ms" in r else "–"
        rows.append(
            [
                f"{r['parameters']:,}",
                r.get("browser", "V8"),
                greedy,
                sampled,
                limit,
                f"{r['load_s']:.1f}",
                first,
            ]
        )
    header = ["parameters", "in", "greedy, tokens/s", "sampled", "limit", "load, s", "ms"]
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, HTMLConfig, positional="checkpoint")
