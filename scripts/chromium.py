"""A headless Chromium that is driven over a pipe, by the DevTools protocol; standard library only.

Tests open pages in it, and `doc_screenshots.py` draws pictures for docs/. Facts: the DevTools protocol, domains Target,
Page, Runtime, Network, DOM, Input and Emulation (chromedevtools.github.io/devtools-protocol); with
`--remote-debugging-pipe` the browser reads messages from file descriptor 3 and writes to 4, each ended by a zero byte.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# WebGPU, computed on the processor.
SOFTWARE_WEBGPU = (
    *(option for option in OPTIONS if option != "--disable-gpu"),
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
)
_PATIENCE_SECONDS = 300
"""For one answer: a page that loads weights on a busy machine takes long. It ends a hang and judges nothing."""


class Chromium:
    """A running browser; `page` opens a tab."""

    def __init__(self, process: subprocess.Popen[bytes], reader: int, writer: int) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._last_id, self._buffer = 0, b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command; RuntimeError when the browser refuses it."""
        sent = self._send(method, session, params)
        while True:
            answer = self._message(_PATIENCE_SECONDS)
            if answer is None:
                raise RuntimeError(f"{method}: no answer from Chromium")
            if answer.get("id") != sent:
                self._heard(answer)
                continue
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            result: dict[str, Any] = answer["result"]
            return result

    def listen(self, seconds: float = 0.05) -> None:
        """Takes in what the browser tells by itself."""
        while (event := self._message(seconds)) is not None:
            self._heard(event)

    def page(self, width: int = 1280, height: int = 900) -> Page:
        """An empty tab of that size in pixels."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, session, (width, height))

    def _send(self, method: str, session: str | None, params: dict[str, Any]) -> int:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        return self._last_id

    def _heard(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event.get("method") == "Target.attachedToTarget":
            # A worker waits until it is told to run, so that none of its requests is missed.
            session = event["params"]["sessionId"]
            for method in ("Network.enable", "Runtime.enable", "Runtime.runIfWaitingForDebugger"):
                self._send(method, session, {})

    def _message(self, seconds: float) -> dict[str, Any] | None:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._reader], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            read = os.read(self._reader, 1 << 20)
            if not read:
                raise RuntimeError("Chromium has ended")
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


class Page:
    """A tab: what it is asked, and all that it and its workers requested and logged."""

    def __init__(self, browser: Chromium, session: str, size: tuple[int, int]) -> None:
        self._browser, self._session = browser, session
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=True, flatten=True)
        self.resize(*size)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command to this tab."""
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int) -> None:
        """Another size of the screen; below 500 pixels it is a phone's."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def prefer_dark(self, dark: bool) -> None:
        """What the page is told of the user's choice of colours."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, address: str) -> None:
        """Goes there, and waits until the document is loaded."""
        before = len(self._browser.events)
        self.call("Page.navigate", url=address)
        end = time.monotonic() + _PATIENCE_SECONDS
        while not any(event.get("method") == "Page.loadEventFired" for event in self._browser.events[before:]):
            assert time.monotonic() < end, f"{address} was not loaded"
            self._browser.listen()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, or of its promise; RuntimeError with what it throws."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = _PATIENCE_SECONDS) -> Any:
        """The value of an expression as soon as it is none that counts as false; AssertionError after `seconds`."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(condition)):
            assert time.monotonic() < end, f"never true: {condition}\n" + "\n".join(self.logs())
            self._browser.listen()
        return value

    def choose_files(self, selector: str, files: Sequence[Path]) -> None:
        """As a user who chooses files in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=list(map(str, files)))

    def drop_files(self, selector: str, files: Sequence[Path]) -> None:
        """As a user who drags files over the middle of an element and drops them."""
        box = self.evaluate(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        data = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=box[0], y=box[1], data=data)

    def screenshot(self, whole: bool = False) -> bytes:
        """The content of a PNG file of what is shown, or of the whole document."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(shot["data"])

    def requested(self) -> list[str]:
        """The addresses that the tab and its workers asked for so far."""
        self._browser.listen()
        asked = [
            event["params"] for event in self._browser.events if event.get("method") == "Network.requestWillBeSent"
        ]
        return [params["request"]["url"] for params in asked]

    def logs(self) -> list[str]:
        """What was logged and thrown so far."""
        self._browser.listen()
        said = []
        for event in self._browser.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.consoleAPICalled":
                said.append(" ".join(str(a.get("value", a.get("description", ""))) for a in params["args"]))
            elif event.get("method") == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                said.append(details.get("exception", {}).get("description", details["text"]))
            elif event.get("method") == "Log.entryAdded":
                said.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return said


@contextmanager
def chromium(executable: str, options: Sequence[str] = OPTIONS) -> Iterator[Chromium]:
    """A browser with a profile of its own, which is gone afterwards."""
    inward, outward = os.pipe(), os.pipe()
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # bash puts the ends of the pipes where the browser looks for them; a plain sh knows one digit of a descriptor.
        process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{inward[0]} 4>&{outward[1]}',
                "bash",
                executable,
                *options,
                f"--user-data-dir={profile}",
            ],
            pass_fds=(inward[0], outward[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(inward[0])
        os.close(outward[1])
        try:
            yield Chromium(process, outward[0], inward[1])
        finally:
            process.terminate()
            process.wait()
            os.close(inward[1])
            os.close(outward[0])


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of static files, as `python -m http.server` is one."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler: Callable[..., SimpleHTTPRequestHandler] = partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
