"""A headless Chromium, driven through the DevTools protocol."""

import asyncio
import contextlib
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    "--remote-debugging-port=0",
)
KEYS = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37}


class Tab:
    """One page, the messages of its console, and the addresses that it requests."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.count = socket, 0
        self.problems: list[str] = []
        self.requests: list[str] = []

    async def call(self, method, **values):
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": values})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]
            self.note(message)

    def note(self, message):
        method, values = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(values["exceptionDetails"]))
        if method == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(values["entry"]))
        if method == "Runtime.consoleAPICalled":
            self.problems.append(str(values["args"]))
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])

    async def run(self, script):
        """The value of an expression; promises are awaited."""
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition, seconds=30):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not await self.run(f"Boolean({condition})"):
            status = await self.run("document.getElementById('status')?.textContent")
            assert time.monotonic() < end, f"{condition} did not come; status: {status}; {self.problems}"
            await asyncio.sleep(0.05)

    async def press(self, key):
        text = {"text": "\r" if key == "Enter" else key} if key == "Enter" or len(key) == 1 else {}
        code = {"windowsVirtualKeyCode": KEYS.get(key, ord(key[0].upper()))}
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    async def choose_file(self, selector, path):
        root = await self.call("DOM.getDocument")
        node = await self.call("DOM.querySelector", nodeId=root["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node["nodeId"])

    async def show(self, width, dark=False, phone=False):
        """Set the width, light or dark, and whether it is a phone's screen."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=features)


@contextlib.asynccontextmanager
async def opened(folder: Path, address: str, microphone: Path | None = None) -> AsyncIterator[Tab]:
    """Open an address in a new browser; a file may be what its microphone hears."""
    assert CHROMIUM
    heard = [f"--use-file-for-fake-audio-capture={microphone}%noloop"] if microphone else []
    command = [CHROMIUM, *FLAGS, *heard, f"--user-data-dir={folder}", "about:blank"]
    log = folder.with_suffix(".log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        port = folder / "DevToolsActivePort"
        end = time.monotonic() + 30
        while not (port.exists() and "\n" in port.read_text()):
            running = process.poll() is None and time.monotonic() < end
            assert running, log.read_text(errors="replace")[-2000:]
            await asyncio.sleep(0.05)
        devtools = f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{devtools}/json/list") as answer:
                (page,) = [one for one in await answer.json(content_type=None) if one["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=1 << 26) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.navigate", url=address)
                await tab.until("location.href !== 'about:blank' && document.readyState === 'complete'")
                yield tab
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait()
