"""Debian's Chromium, driven through the DevTools protocol (chromedevtools.github.io/devtools-protocol).

The protocol goes over two pipes (`--remote-debugging-pipe`): JSON messages that end with a zero byte. So neither a
driver nor a WebSocket library is needed.
"""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

TIMEOUT_SECONDS = 30.0
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
)
POLL_SECONDS = 0.02


@contextmanager
def running_browser() -> Iterator["Browser"]:
    """Runs a browser. Skips the test where none is installed."""
    executable = next((path for name in NAMES if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser here ({', '.join(NAMES)}): apt install chromium")
    with tempfile.TemporaryDirectory(prefix="rtp-browser-", ignore_cleanup_errors=True) as profile:
        # The browser reads descriptor 3 and writes 4. A shell puts the pipes there.
        (read_commands, write_commands), (read_events, write_events) = os.pipe(), os.pipe()
        redirect = ["sh", "-c", f'exec "$@" 3</dev/fd/{read_commands} 4>/dev/fd/{write_events}', "sh", executable]
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to use its sandbox as root
        process = subprocess.Popen(
            [*redirect, *FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_commands, write_events),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_events)
        try:
            browser = Browser(write_commands, read_events)
            yield browser
            browser.call("Browser.close")
            process.wait(TIMEOUT_SECONDS)
        finally:
            process.kill()
            process.wait()
            os.close(write_commands)
            os.close(read_events)


class Browser:
    """A running browser: calls methods of the protocol, and hands events to the pages that they belong to."""

    def __init__(self, commands: int, events: int):
        self._commands, self._events = commands, events
        self._buffer = b""
        self._last_id = 0
        self._pages: dict[str, Page] = {}

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """Calls a method, of one page's session if it is given, and returns its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._last_id:
            if page := self._pages.get(answer.get("sessionId", "")):
                page.record(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> "Page":
        """Opens a page and waits until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._events], [], [], TIMEOUT_SECONDS)[0], "the browser does not answer"
            read = os.read(self._events, 1 << 20)
            assert read, "the browser has ended"
            self._buffer += read
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message


class Page:
    """One page of a browser.

    `requested`: the addresses that it requested. `errors`: exceptions of its scripts, and what its policy refused.
    """

    def __init__(self, browser: Browser, target: str, session: str):
        self.requested: list[str] = []
        self.errors: list[str] = []
        self._browser, self._target, self._session = browser, target, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol on this page and returns its result."""
        return self._browser.call(method, self._session, **params)

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Waits until a JavaScript expression is true."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self.evaluate(condition):
            shown = self.evaluate("document.body?.innerText")
            assert time.monotonic() < deadline, f"{condition} is not true within {TIMEOUT_SECONDS} s; shown:\n{shown}"
            time.sleep(POLL_SECONDS)

    def text(self, selector: str) -> list[str]:
        """Returns the visible text of each element."""
        text: list[str] = self.evaluate(f"[...document.querySelectorAll({selector!r})].map(e => e.innerText)")
        return text

    # What a user does

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({selector!r}).click()")

    def type(self, text: str, selector: str = "#text") -> None:
        """Types `text` into a field, replacing what it had."""
        self.evaluate(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def press_enter(self, *, composing: bool = False) -> None:
        """Presses Enter. `composing`: an input method takes the key, to choose a candidate."""
        key = {"key": "Process" if composing else "Enter", "code": "Enter"}
        code = 229 if composing else 13  # Windows' VK_PROCESSKEY
        text = {} if composing else {"text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", windowsVirtualKeyCode=code, **key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", windowsVirtualKeyCode=code, **key)

    def record(self, event: dict[str, Any]) -> None:
        """Keeps what a test may ask for."""
        match event:
            case {"method": "Network.requestWillBeSent", "params": {"request": {"url": url}}}:
                self.requested.append(url)
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                self.errors.append(str(details.get("exception", details).get("description", details)))
            case {"method": "Log.entryAdded", "params": {"entry": {"source": source, "level": "error"} as entry}}:
                if source != "network":  # the network's are answers with an error status
                    self.errors.append(entry["text"])
