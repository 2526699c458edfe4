"""A page as headless Chromium shows it: errors in its console, requests, pictures and audio."""

import asyncio
from pathlib import Path
from typing import Any

from tests.toolkit.browser import opened

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


def look(page: Path, width: int, dark: bool, folder: Path) -> dict[str, Any]:
    """Open a page.

    Args:
        page: The HTML file.
        width: Width of the window in pixels.
        dark: Prefer dark colors.
        folder: For the browser's files.

    Returns:
        {"errors": texts, "requests": URLs other than the page and data, "pictures": widths in pixels, 0 where one does
        not load, "played": durations in seconds, -1 where audio does not play, "wide": pixels beyond the window}.
    """
    address = page.resolve().as_uri()

    async def shown() -> dict[str, Any]:
        async with opened(folder / "chromium", address) as tab:
            await tab.show(width, dark)
            seen = await tab.run(_LOOK)
            requests = [url for url in tab.requests if not url.startswith("data:") and url != address]
            return {"errors": tab.problems, "requests": requests, **seen}

    return asyncio.run(shown())
