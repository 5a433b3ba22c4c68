"""The page of --export=poet.html in Chromium and Firefox, from disk and without a network."""

import json
import time

import pytest
from test_html import SCRIPT, export
from test_huggingface import make_checkpoint

from bench.browser import find_browser, open_browser
from bench.html import open_page
from robopoet.text.tokenizer import BPETokenizer
from sample import Poet

pytest.importorskip("selenium", reason="requirements-slow.txt has it")
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait


def words(browser) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('#text span')].map((s) => s.textContent)")


def until(browser, condition: str) -> None:
    WebDriverWait(browser, 60, 0.05).until(lambda b: b.execute_script(f"return {condition}"), condition)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["a", SCRIPT])
def test_the_page_writes_stops_and_writes_on_in_chromium(tmp_path, bpe, browser, style):
    tok = BPETokenizer(bpe.tokens, [f"<|{style}|>", "<|b|>"])  # no end, and a model large enough to be stopped
    path = make_checkpoint(tmp_path / "best.pt", tok, positions="rotary", n_layer=64, n_embd=64)
    export(path, tmp_path / "poet.html", passage=f"{SCRIPT} A sample.", licences=[f"b: {SCRIPT}"])
    find = lambda selector: browser.find_element("css selector", selector)  # noqa: E731
    browser.get((tmp_path / "poet.html").as_uri())
    until(browser, "!document.getElementById('write').disabled")
    elements = browser.execute_script("return document.querySelectorAll('script, iframe, img, object').length")
    assert "".join(words(browser)) == f"{SCRIPT} A sample." and find("#licences li").text == f"b: {SCRIPT}"
    assert find("#styles label span").text == style and find("h1").text.lower().startswith(style.lower())

    # a prompt, greedily, in a blend: the text of Poet
    set_value = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    for selector, value in (("#temperature", 0), ("#style-0", 70), ("#style-1", 30), ("#max_new_tokens", 300)):
        browser.execute_script(set_value, find(selector), value)
    browser.execute_script("document.querySelector('details').open = true; document.activeElement.blur()")
    browser.execute_script(set_value, find("#until"), "tokens")
    find("#prompt").send_keys(f"The rabbit {SCRIPT}")
    grew = (
        "window.grew = new Set(); new MutationObserver(() => grew.add(document.querySelectorAll('#text span').length))"
    )
    browser.execute_script(f"{grew}.observe(document.getElementById('text'), {{childList: true}})")
    find("#write").click()
    until(browser, "document.querySelector('#text .new') && !document.getElementById('write').hidden")
    poet, settings = Poet(str(path), "cpu", "float32"), {"temperature": 0.0, "until": "tokens", "max_new_tokens": 300}
    poet.styles = {"first": tok.vocab_size - 2, "b": tok.vocab_size - 1}  # a script is no name for the command line
    settings["style"] = "first:0.7,b:0.3"
    assert "".join(words(browser)) == poet.write(f"The rabbit {SCRIPT}", **settings)[0]
    assert browser.execute_script("return grew.size") > 5  # streamed, not at once

    # a token tells what else might have come; by keyboard, too
    spans = browser.find_elements("css selector", "#text .new")
    webdriver.ActionChains(browser).move_to_element(spans[3]).perform()
    until(browser, "!document.getElementById('card').hidden")
    assert len(browser.find_elements("css selector", "#card tr")) == 6 and "%" in find("#card tr").text
    before = words(browser)
    find("#again").click()  # greedy: the same again
    until(browser, "!document.getElementById('write').hidden")
    assert words(browser) == before

    # a click on a word of the passage writes on from its end; Stop stops
    browser.execute_script(set_value, find("#temperature"), 1.5)
    browser.execute_script(set_value, find("#max_new_tokens"), 1000)
    browser.find_elements("css selector", "#text .new")[3].click()
    until(browser, "count > 15")  # what is kept may be all that there was: a text without a space is one word
    webdriver.ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    until(browser, "!document.getElementById('write').hidden")
    stopped = words(browser)
    assert find("#status").text == "Stopped." and len(stopped) < 900
    kept = browser.execute_script("return kept")
    assert 7 <= kept < 200 and stopped[:kept] == before[:kept] and stopped != before[: len(stopped)]
    webdriver.ActionChains(browser).move_to_element(find("h1")).perform()  # a word under the pointer is the current one
    browser.execute_script("document.getElementById('text').focus()")
    webdriver.ActionChains(browser).send_keys(Keys.ARROW_RIGHT * 2).perform()
    assert find("#text .current").text.strip() == stopped[1].strip()

    # nothing became an element, nothing was asked of a network, and no rule of the policy was broken
    assert browser.execute_script("return document.querySelectorAll('script, iframe, img, object').length") == elements
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in asked if event["method"] == "Network.requestWillBeSent"]
    assert urls and {url.partition(":")[0] for url in urls} <= {"file", "blob"}
    assert browser.get_log("browser") == []
    refused = "try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (error) { return error.name; }"
    assert browser.execute_script(refused) == "TypeError"
    fetched = "const done = arguments[0]; fetch('https://example.org').then(() => done('sent'), () => done('refused'))"
    assert browser.execute_async_script(fetched) == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


WRITTEN = """new Promise((done) => {
    $("write").click();
    const timer = setInterval(() => { if (!$("write").hidden) { clearInterval(timer); done(whole()); } }, 20);
})"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chromium", "firefox"])
def test_each_browser_writes_as_poet_and_says_what_it_can_not_do(tmp_path, bpe, name):
    if not find_browser(name):
        pytest.skip(f"needs {name}: apt-get install chromium chromium-driver firefox-esr")
    path = make_checkpoint(tmp_path / "best.pt", bpe, positions="rotary")
    export(path, tmp_path / "poet.html")
    with open_browser(name, 900, 600) as browser:
        ask = browser.evaluate
        open_page(browser, tmp_path / "poet.html")
        assert ask("$('hint').getBoundingClientRect().bottom < innerHeight && !$('voiceless').hidden")
        ask("$('style-0').value = 100, $('style-0').dispatchEvent(new Event('input', { bubbles: true }))")
        assert ask("$('voiceless').hidden")

        # a number that is missing or wrong: said, shown, and nothing is written
        for id, value, said in (("top_k", "", "Top k: must be a whole number from 0 on."),
                                ("top_p", 2, "Top p: must be a number from 0.01 to 1.")):  # fmt: skip
            before = ask(f"$({id!r}).value")
            ask(f"$({id!r}).value = {value!r}")
            ask("document.querySelector('details').open = false")
            ask("$('write').click()")
            assert ask("[$('status').textContent, document.activeElement.id, writing]") == [said, id, False]
            assert ask(f"$({id!r}).getBoundingClientRect().height > 0")
            ask(f"$({id!r}).value = {before!r}")

        # the text is Poet's, and its end stays in view
        ask("$('temperature').value = 0, $('max_new_tokens').value = 1000, $('until').value = 'tokens'")
        ask("$('prompt').value = 'The rabbit'")
        settings = {"temperature": 0.0, "until": "tokens", "max_new_tokens": 1000, "style": "a"}
        assert ask(WRITTEN) == Poet(str(path), "cpu", "float32").write("The rabbit", **settings)[0]
        assert ask("scrollY > 100 && hidden() < 0")

        # unless its reader has scrolled away
        ask("writeFrom(5)")
        while not ask("text.children.length > 300 || !writing"):
            time.sleep(0.001)
        if ask("scrollTo(0, 0), writing"):
            while ask("writing"):
                time.sleep(0.05)
            assert ask("scrollY") == 0
