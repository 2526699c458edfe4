"""The page in a headless Chromium whose microphone hears a recording."""

import asyncio
import wave

import pytest

from tests.toolkit.browser import CHROMIUM, opened
from tests.toolkit.indexing.served import serving
from tests.toolkit.indexing_files import EXPORT, save_audio, save_image, save_images
from toolkit.indexing.items import FileSource
from toolkit.indexing.update import update

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"), pytest.mark.timeout(120)]

NAMES = "[...document.querySelectorAll('#results li')].map(entry => entry.hit.name)"
STATUS = "document.getElementById('status').textContent"
READY = "document.getElementById('keys').textContent"
RERANKED = f"{STATUS}.includes('were re-ranked')"


def then_silence(path, seconds=20):
    """Chromium repeats the end of the file that the microphone hears: that is to be silence."""
    with wave.open(str(path)) as file:
        settings, sound = file.getparams(), file.readframes(file.getnframes())
    out = path.with_name("microphone.wav")
    with wave.open(str(out), "wb") as file:
        file.setparams(settings)
        file.writeframes(sound + bytes(2 * 16000 * seconds))
    return out, len(sound) / 2 / 16000


async def seconds_of_query(tab):
    return await tab.run("(query.body.size - 44) / 2 / 16000")


async def check_by_voice(tab, recording, duration):
    await tab.press("r")
    await tab.until("document.getElementById('record').getAttribute('aria-pressed') === 'true'")
    await asyncio.sleep(duration + 0.7)
    await tab.press("r")
    await tab.until(RERANKED)
    recorded = await tab.run(NAMES)
    assert len(recorded) == 5
    assert await seconds_of_query(tab) == pytest.approx(duration, abs=0.15)  # the silence is cut

    await tab.run("show([]), say('')")
    await tab.choose_file("#file", recording)
    await tab.until(RERANKED)
    uploaded = await tab.run(NAMES)
    assert await seconds_of_query(tab) == duration
    assert recorded[0] in uploaded[:2]
    return uploaded


async def check_attention(tab):
    await tab.press("ArrowRight")
    await tab.press("Enter")
    await tab.until("document.getElementById('detail').open && !document.getElementById('attention').hidden")
    pixels = "document.getElementById('heat').getContext('2d').getImageData(0, 0, 4, 4).data"
    shades = await tab.run(f"[...{pixels}].filter((_, n) => n % 4 == 3)")
    assert len(shades) == 16
    assert min(shades) == 0 < max(shades)
    await tab.press("Escape")
    await tab.until("!document.getElementById('detail').open")


async def check_widths(tab):
    for dark in (False, True):
        for width in (1300, 400):
            await tab.show(width, dark, phone=width < 600)
            assert await tab.run("document.documentElement.scrollWidth <= innerWidth")
        colors = await tab.run(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        )
        light = [sum(map(int, color[4:-1].split(","))) for color in colors]
        assert (light[0] > light[1]) == dark


async def check_errors(tab, broken):
    await tab.choose_file("#file", broken)
    await tab.until(f"{STATUS}.startsWith('Not searched')")
    assert "cannot decode" in await tab.run(STATUS)


def test_images_are_found_by_voice(tmp_path):
    pictures = save_images(tmp_path / "pictures")
    update(tmp_path / "index", FileSource(str(pictures), "image"), EXPORT, device="cpu")
    recording = save_audio(tmp_path / "query.wav", 1)
    microphone, duration = then_silence(recording)
    (tmp_path / "broken.wav").write_bytes(b"no sound")

    async def check(address):
        async with opened(tmp_path / "profile", address, microphone) as tab:
            await tab.until(READY)
            await tab.show(1300)
            uploaded = await check_by_voice(tab, recording, duration)
            await check_attention(tab)
            await check_widths(tab)
            await check_errors(tab, tmp_path / "broken.wav")
            assert not tab.problems
            return uploaded

    with serving(tmp_path / "index", EXPORT) as server:
        result = asyncio.run(check(f"http://127.0.0.1:{server.server_port}/"))
        expected = server.answers.search(recording.read_bytes(), rerank=True)["results"]
        assert result == [hit["name"] for hit in expected]


def test_recordings_are_found_by_an_image(tmp_path):
    for number in range(6):
        save_audio(tmp_path / "audio" / f"{number}.wav", number)
    update(tmp_path / "index", FileSource(str(tmp_path / "audio"), "audio"), EXPORT, device="cpu")
    picture = save_image(tmp_path / "query.png", 3)

    async def check(address):
        async with opened(tmp_path / "profile", address) as tab:
            await tab.until(READY)
            await tab.show(400, dark=True, phone=True)
            assert await tab.run("document.getElementById('record').hidden")
            await tab.choose_file("#file", picture)
            await tab.until(RERANKED)
            await check_attention(tab)
            loaded = "document.querySelector('#results audio')"
            await tab.run(f"{loaded}.preload = 'auto', {loaded}.load()")
            await tab.until(f"{loaded}.duration > 0.2")
            assert not tab.problems
            return await tab.run(NAMES)

    with serving(tmp_path / "index", EXPORT, token="secret") as server:
        result = asyncio.run(check(f"http://localhost:{server.server_port}/?token=secret"))
        expected = server.answers.search(picture.read_bytes(), rerank=True)["results"]
        assert result == [hit["name"] for hit in expected]
