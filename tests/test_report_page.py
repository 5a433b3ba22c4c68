"""report.html in Chromium, from disk: at a desk and on a phone, by day and by night, with and without scripts."""

import itertools
import json
import re

import pytest
from conftest import report_of
from test_html import SCRIPT
from test_report import shown_at

SHOWN = "getComputedStyle(document.querySelector('.by-time')).display !== 'none'"
TEXTS = """return [...document.querySelectorAll('main *, header *, footer *')].filter(
  (e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).map((e) => {
    const style = getComputedStyle(e), ground = getComputedStyle(e.closest('.card') ?? document.body).backgroundColor;
    return [e instanceof SVGElement ? style.fill : style.color, ground, parseFloat(style.fontSize)];
  })"""
BOXES = """return [...document.querySelectorAll('.chart')].filter((e) => e.checkVisibility()).map(
  (e) => [...e.querySelectorAll('text')].map((t) => t.getBoundingClientRect()).map((b) => [b.x, b.y, b.right, b.bottom])
  )"""


def luminance(colour: str) -> float:
    """WCAG's, 0 to 1."""
    parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.slow
@pytest.mark.parametrize("scripts", [True, False])
def test_a_report_is_legible_at_any_width_and_keeps_what_was_chosen(small, tmp_path, browser, scripts):
    report = report_of(small | {"out_dir": "out/a_poet", "max_iters": 100_000})
    for step in range(0, 100_000, 500):
        styles = {SCRIPT: 3.0, "a_style_whose_name_has_no_blank_" * 9: 2.0} if step else {}
        sample = {"text": f"{SCRIPT} {'long' * 99} {step}", "copied_words": step // 9000}
        for record in shown_at(step, 3 + 500 / (step + 100), loss_by_style=styles, **sample):
            report.add(record)
    path = tmp_path / "report.html"
    path.write_bytes(report.page(100.0))
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get(path.as_uri())
    for width, scheme in itertools.product((1200, 390), ("light", "dark")):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for colour, ground, pixels in browser.execute_script(TEXTS):
            light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 4.5 and pixels >= 12, (colour, ground, pixels)
        assert (luminance(ground) < 0.1) == (scheme == "dark")
        charts = browser.execute_script(BOXES)
        assert len(charts) == 3 and min(map(len, charts)) > 4
        for texts in charts:
            for a, b in itertools.combinations(texts, 2):  # no two overlap
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert min(x for x, *_ in texts) >= 0 and max(right for _, _, right, _ in texts) <= width
    assert not browser.execute_script(f"return {SHOWN}")
    browser.find_element("css selector", "label[for=over-time]").click()
    browser.find_element("css selector", "summary").click()
    assert browser.execute_script(f"return {SHOWN}")
    browser.get(path.as_uri())  # as a browser does now and then
    opened = browser.execute_script(f"return [{SHOWN}, document.querySelector('details').open]")
    assert opened == [scripts, scripts]
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {event["params"]["request"]["url"] for event in asked if event["method"] == "Network.requestWillBeSent"}
    assert urls == {path.as_uri()} and browser.get_log("browser") == []
