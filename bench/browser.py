"""Chromium and Firefox without windows, for pages from disk: Chromium by its driver, Firefox by WebDriver BiDi."""

import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

COMMANDS = {"chromium": ("chromium", "chromedriver"), "firefox": ("firefox-esr", "firefox")}
START_S, ANSWER_S = 60, 300  # how long Firefox may take to start, and to answer


class Browser(Protocol):
    """A browser with one page."""

    version: str

    def get(self, page: Path) -> None:
        """Open a file."""

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression in the page, or its promise, comes to, as JSON has it."""


def find_browser(name: str) -> str:
    """The program of "chromium" or "firefox", or "" if it, or Chromium's driver, is not installed."""
    found = [shutil.which(command) for command in COMMANDS[name]]
    return (found[0] or found[1] or "") if name == "firefox" else (found[0] or "") if all(found) else ""


class Chromium:
    """A Browser."""

    def __init__(self, driver: Any):
        self.driver, self.version = driver, f"Chromium {driver.capabilities['browserVersion'].partition('.')[0]}"

    def get(self, page: Path) -> None:
        """Open a file."""
        self.driver.get(page.absolute().as_uri())

    def evaluate(self, expression: str) -> Any:
        """What an expression comes to."""
        self.driver.set_script_timeout(ANSWER_S)
        code = (
            f"const done = arguments[0]; Promise.resolve(({expression})).then((value) => done(JSON.stringify(value)))"
        )
        return json.loads(self.driver.execute_async_script(code) or "null")


class Firefox:
    """A Browser. socket: of WebDriver BiDi."""

    def __init__(self, socket: Any):
        self.socket, self.numbers = socket, itertools.count(1)
        found = self.ask("session.new", capabilities={})["capabilities"]
        self.version = f"Firefox {found['browserVersion'].partition('.')[0]}"
        self.context = self.ask("browsingContext.getTree")["contexts"][0]["context"]

    def ask(self, method: str, **parameters: Any) -> Any:
        """The result of a command; raises RuntimeError if it fails."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != number:
            pass
        if "error" in answer:
            raise RuntimeError(f"Firefox: {method}: {answer['message']}")
        return answer["result"]

    def get(self, page: Path) -> None:
        """Open a file."""
        self.ask("browsingContext.navigate", context=self.context, url=page.absolute().as_uri(), wait="complete")

    def evaluate(self, expression: str) -> Any:
        """What an expression comes to; raises RuntimeError if it throws."""
        code = f"Promise.resolve(({expression})).then((value) => JSON.stringify(value ?? null))"
        found = self.ask("script.evaluate", expression=code, target={"context": self.context}, awaitPromise=True)
        if found["type"] != "success":
            raise RuntimeError(f"Firefox: {found['exceptionDetails']['text']}")
        return json.loads(found["result"]["value"])


@contextlib.contextmanager
def open_browser(name: str, width: int = 1200, height: int = 940) -> Iterator[Browser]:
    """Run "chromium" or "firefox", with a window that nobody sees."""
    with (_chromium if name == "chromium" else _firefox)(width, height) as browser:
        yield browser


@contextlib.contextmanager
def _chromium(width: int, height: int) -> Iterator[Chromium]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = find_browser("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", f"--window-size={width},{height}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as driver:
        yield Chromium(driver)


@contextlib.contextmanager
def _firefox(width: int, height: int) -> Iterator[Firefox]:
    import websocket  # selenium has it

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        size = [f"--width={width}", f"--height={height}"]
        command = [
            find_browser("firefox"),
            "--headless",
            "--no-remote",
            "--profile",
            profile,
            "--remote-debugging-port=0",
            *size,
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            told, end = Path(profile) / "WebDriverBiDiServer.json", time.monotonic() + START_S
            while not told.exists() or not told.read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError("Firefox: does not start")
                time.sleep(0.1)
            port = json.loads(told.read_text())["ws_port"]
            address = f"ws://127.0.0.1:{port}/session"
            socket = websocket.create_connection(address, timeout=ANSWER_S, suppress_origin=True)
            with contextlib.closing(socket):
                yield Firefox(socket)
        finally:
            process.terminate()
            process.wait()
