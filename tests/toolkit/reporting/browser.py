"""A page as headless Chromium shows it: errors in its console, requests, pictures and audio."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Loads what is not loaded before it is played or scrolled to, and looks whether the browser can show it.
_LOOK = """(async () => {
  const pictures = [...document.images], audio = [...document.querySelectorAll('audio')];
  await Promise.all(pictures.map(one => one.decode().catch(() => {})));
  const played = [];
  for (const one of audio) {
    try { one.muted = true; await one.play(); one.pause(); played.push(one.duration) } catch (error) { played.push(-1) }
  }
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return {pictures: pictures.map(one => one.naturalWidth), played, wide};
})()"""


def look(page: Path, width: int, dark: bool, folder: Path, screenshot: Path | None = None) -> dict[str, Any]:
    """Open a page.

    Args:
        page: The HTML file.
        width: Width of the window in pixels.
        dark: Prefer dark colors.
        folder: For the browser's files.
        screenshot: PNG to write.

    Returns:
        {"errors": texts, "requests": URLs other than the page and data, "pictures": widths in pixels, 0 where one does
        not load, "played": durations in seconds, -1 where audio does not play, "wide": pixels beyond the window}.
    """
    return asyncio.run(_look(page, width, dark, folder, screenshot))


async def _look(page: Path, width: int, dark: bool, folder: Path, screenshot: Path | None) -> dict[str, Any]:
    import aiohttp

    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'chromium'}", "--no-first-run"]
    options += ["--autoplay-policy=no-user-gesture-required", "about:blank"]
    process = await asyncio.create_subprocess_exec(
        str(CHROMIUM), *options, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr
        address = None
        while address is None:
            line = (await asyncio.wait_for(process.stderr.readline(), 60)).decode()
            assert line, "chromium ended"
            address = re.search(r"ws://([^/]+)/", line)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{address[1]}/json/list") as response:
                target = next(one for one in await response.json() if one["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                return await _Tab(socket).look(page, width, dark, screenshot)
    finally:
        process.kill()
        await process.wait()


class _Tab:
    """A tab of the browser, by the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.count = socket, 0
        self.errors: list[str] = []
        self.requests: list[str] = []

    async def look(self, page: Path, width: int, dark: bool, screenshot: Path | None) -> dict[str, Any]:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await self.call("Emulation.setDeviceMetricsOverride", **size)
        await self.call("Page.navigate", url=page.resolve().as_uri())
        await self.until("Page.loadEventFired")
        seen = await self.call("Runtime.evaluate", expression=_LOOK, awaitPromise=True, returnByValue=True)
        if screenshot:
            shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
            import base64

            screenshot.write_bytes(base64.b64decode(shot["data"]))
        requests = [url for url in self.requests if not url.startswith("data:") and url != page.resolve().as_uri()]
        return {"errors": self.errors, "requests": requests, **seen["result"]["value"]}

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        await self.socket.send_json({"id": self.count, "method": method, "params": parameters})
        while (message := await self.receive()).get("id") != self.count:
            pass
        assert "error" not in message, message
        return message["result"]

    async def until(self, event: str) -> None:
        while (await self.receive()).get("method") != event:
            pass

    async def receive(self) -> dict[str, Any]:
        message = json.loads((await asyncio.wait_for(self.socket.receive(), 60)).data)
        parameters = message.get("params", {})
        if message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(str(parameters["args"]))
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        return message
