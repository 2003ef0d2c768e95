"""A headless Chromium that a test drives through the DevTools protocol, over two pipes: no package, no port."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 60
MAX_HEIGHT = 2000  # a browser without GPU takes seconds for a long page


def find_chromium() -> str | None:
    """The browser's program, $RAYCAP_TEST_CHROMIUM or on PATH."""
    return os.environ.get("RAYCAP_TEST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One tab. requests: URLs that the page asked for; complaints: all that the console shows, and uncaught errors."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer = commands, answers, b""
        os.set_blocking(answers, False)
        self._session: str | None = None
        self._number = 0
        self._loaded = False
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The answer to a command; what the page tells meanwhile is noted."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._receive()).get("id") != self._number:
            self._note(message)
        assert "error" not in message, message
        result: dict[str, Any] = message["result"]
        return result

    def open(self, url: str) -> None:
        """Loads a page and waits for all of it."""
        self._loaded = False
        answer = self.send("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        while not self._loaded:
            self._note(self._receive())

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=True)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression or promise in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEY_CODES[key])

    def screenshot(self) -> bytes:
        """A PNG of the page as wide as the window, its first MAX_HEIGHT pixels."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = size | {"height": min(size["height"], MAX_HEIGHT), "scale": 1}
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(params["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params))

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            assert time.monotonic() < deadline, f"chromium said nothing for {TIMEOUT_S} s"
            try:
                data = os.read(self._answers, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
                continue
            assert data, "chromium ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


KEY_CODES = {"Tab": 9, "ArrowRight": 39}


@contextmanager
def chromium_tab(program: str, profile: Path) -> Iterator[Tab]:
    """A tab of a fresh browser without network: names resolve to nothing. profile: an empty folder."""
    command_out, command_in = os.pipe()
    answer_out, answer_in = os.pipe()
    # Chromium reads commands from file 3 and answers on file 4. --no-sandbox: a container's root has no user namespaces.
    shell = f'exec "$@" 3<&{command_out} 4>&{answer_in}'
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    process = subprocess.Popen(
        ["/bin/bash", "-c", shell, "chromium", program, *flags, "about:blank"],
        pass_fds=(command_out, answer_in),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(command_out)
    os.close(answer_in)
    try:
        tab = Tab(command_in, answer_out)
        yield tab
    finally:
        os.close(command_in)  # chromium ends when its pipe does
        os.close(answer_out)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
