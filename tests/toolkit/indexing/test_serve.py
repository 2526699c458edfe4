"""The server of the page: its answers equal the command's, it answers its page only, hostile requests are bounded."""

import io
import json
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from shards.errors import UserError
from tests.toolkit.indexing.served import ask, connect, open_files, parsed, raw, receive, serving
from tests.toolkit.indexing_files import EXPORT, save_audio, save_image, save_images
from toolkit import search as command
from toolkit.indexing import serve
from toolkit.indexing.answers import MAX_BODY
from toolkit.indexing.items import FileSource
from toolkit.indexing.serve import addresses
from toolkit.indexing.update import update


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An index of seven images, one of four recordings, and a query of each kind."""
    folder = tmp_path_factory.mktemp("files")
    save_images(folder / "pictures")
    for number in range(4):
        save_audio(folder / "audio" / f"{number}.wav", number)
    update(folder / "index", FileSource(str(folder / "pictures"), "image"), EXPORT, device="cpu")
    update(folder / "audio-index", FileSource(str(folder / "audio"), "audio"), EXPORT, device="cpu")
    save_audio(folder / "query.wav", 1)
    save_image(folder / "query.png", 1)
    return folder


@pytest.fixture(scope="module")
def server(files):
    with serving(files / "index", EXPORT) as started:
        yield started


@pytest.fixture(scope="module")
def query(files):
    return (files / "query.wav").read_bytes()


def alive(server, query):
    """Whether a search still finds something."""
    status, _, answer = ask(server, "/search", query)
    return status == 200 and len(answer["results"]) == 5


def printed(capsys, *arguments):
    capsys.readouterr()
    command.main([*map(str, arguments), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)["results"]


@pytest.mark.parametrize(("index", "name"), [("index", "query.wav"), ("audio-index", "query.png")])
def test_answers_equal_those_of_the_command(files, index, name, capsys):
    with serving(files / index, EXPORT) as server:
        for target, k in (("/search", 0), ("/search?rerank=1", 3)):
            status, headers, answer = ask(server, target, (files / name).read_bytes())
            assert (status, headers["Content-Type"]) == (200, "application/json")
            expected = printed(capsys, files / index, files / name, "--top", 5, "--rerank", k, "--fuse", "sum")
            for hit in expected:
                del hit["path"]
            assert len(expected) == len(answer["results"])
            for ours, theirs in zip(answer["results"], expected, strict=True):
                assert ours == pytest.approx(theirs, abs=1e-5)
        assert str(files) not in json.dumps(answer)
        status, _, attention = ask(server, "/attention?row=2", (files / name).read_bytes())
        assert (status, attention["side"], len(attention["match"])) == (200, 4, 16)
        assert sum(attention["match"]) == pytest.approx(1, abs=1e-4)


def test_the_page_is_complete_and_loads_nothing_else(server):
    status, headers, page = ask(server, "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    named = set(re.findall(rb'(?:src|href)="([^"]+)"', page))
    assert named == {b"/page.css", b"/page.js", b"/icon.svg"}
    for name in named:
        status, _, content = ask(server, name.decode())
        assert status == 200
        assert b"//" not in re.sub(rb"(?m)//.*$|http://www.w3.org/2000/svg", b"", content)  # no address but in comments
    assert not re.search(rb"<script>|<style|\son\w+=|\sstyle=", page)
    about = ask(server, "/about")[2]
    assert (about["indexed"], about["items"], about["rerank"]) == ("image", 7, 3)


def test_items_are_encoded_again_and_bounded(files, tmp_path):
    pictures = save_images(tmp_path / "pictures", 2)
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))
    large.save(pictures / "large.png", pnginfo=None)
    update(tmp_path / "index", FileSource(str(pictures), "image"), EXPORT, device="cpu")
    with serving(tmp_path / "index", EXPORT) as server:
        names = ["0.png", "large.png", "sub/1.png"]
        for row, name in enumerate(names):
            status, headers, content = ask(server, f"/item/{row}")
            assert (status, headers["Content-Type"], content[:2]) == (200, "image/jpeg", b"\xff\xd8")
            with Image.open(io.BytesIO(content)) as shown, Image.open(pictures / name) as stored:
                assert shown.size == ((512, 384) if name == "large.png" else stored.size)
        save_image(pictures / "0.png", 99)
        assert ask(server, "/item/0")[::2] == (
            404,
            {"error": "0.png has changed since it was indexed: update the index"},
        )
    with serving(files / "audio-index", EXPORT) as server:
        wave, rate = soundfile.read(io.BytesIO(ask(server, "/item/3")[2]))
        assert rate == 16000
        np.testing.assert_array_equal(wave, soundfile.read(files / "audio/3.wav")[0])


@pytest.mark.parametrize(
    "target",
    [
        "/item/7", "/item/-1", "/item/999999999999", "/item/1e0", "/item/", "/item/0/../1", "/../index.json",
        "/page/page.html", "/page.css/", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd",
        "/item/..\\..\\x", "/index.json", "/query.wav", "/item/0%00.jpg", "http://127.0.0.1/../etc/passwd",
    ],
)  # fmt: skip
def test_only_items_are_served_by_number(server, query, target):
    status, _, answer = ask(server, target)
    assert (status, list(answer)) == (404, ["error"])
    assert ask(server, target.replace("/item/", "/attention?row=").replace("item", "x"), query)[0] == 404
    assert alive(server, query)


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_other_methods_are_refused(server, method):
    with connect(server) as connection:
        connection.sendall(f"{method} /about HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert re.match(rb"HTTP/1.0 (501|405) ", receive(connection)) is not None
    assert ask(server, "/search")[0] == ask(server, "/about", b"x")[0] == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8000"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:9"}, 200),  # a forwarded port
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another server on this machine
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
    ],
)
def test_other_sites_are_refused(server, query, headers, status):
    assert ask(server, "/search", query, **headers)[0] == status
    if headers != {"Origin": "null"}:
        assert ask(server, "/item/0", **headers)[0] == status


def test_two_hosts_or_none_are_refused(server):
    assert raw(server, b"GET /about HTTP/1.1\r\n\r\n")[0] == 403
    assert raw(server, b"GET /about HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")[0] == 403
    same = {"Origin": f"http://127.0.0.1:{server.server_port}", "Sec_Fetch_Site": "same-origin"}
    assert ask(server, "/about", **same)[0] == 200
    assert ask(server, "/", Sec_Fetch_Site="cross-site")[0] == 200  # a link may lead to the page


def test_a_token_is_needed_where_one_is_set(files, query):
    with serving(files / "index", EXPORT, token="secret") as server:
        for target in ("/", "/page.js", "/about", "/item/0", "/?token=", "/?token=other", "/about?token=secret"):
            assert ask(server, target)[0] == 403
        assert ask(server, "/search", query)[0] == 403
        assert ask(server, "/about", Cookie="a=b; speech-image=secret; \x00")[0] == 403
        status, headers, _ = ask(server, "/?token=secret")
        assert (status, headers["Location"]) == (303, "/")
        assert "HttpOnly" in headers["Set-Cookie"]
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert ask(server, "/about", Cookie=cookie)[0] == ask(server, "/", Cookie=f"a=b; {cookie}")[0] == 200
        assert ask(server, "/search", query, Cookie=cookie)[0] == 200
        assert ask(server, "/search", query, Cookie=cookie, Host="evil.example")[0] == 403
        assert "/?token=secret" in "\n".join(addresses(server, "it"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no sound", "cannot be decoded as audio"),
        (b"RIFF\x00\x00\x00\x00WAVE", "audio"),
        ("truncated", "truncated"),
        ("long", "61.0 s of audio or more, the longest allowed is 60 s$"),
    ],
)
def test_broken_queries_are_answered_in_one_line(server, query, body, message):
    if body == "truncated":
        body = query[: len(query) // 2]
    elif body == "long":
        body = sound(np.zeros(16000 * 61))
    status, _, answer = ask(server, "/search", body)
    assert (status, list(answer)) == (422, ["error"])
    assert re.search(message, answer["error"])
    assert "\n" not in answer["error"]
    assert alive(server, query)


def sound(wave):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16000, format="WAV")
    return buffer.getvalue()


def test_silence_is_searched_with_and_named(server, query):
    assert ask(server, "/search", sound(np.zeros(8000)))[2]["warning"] == "silence"
    assert ask(server, "/search", query)[2]["warning"] is None


def test_broken_pictures_are_answered_in_one_line(files):
    header = bytes.fromhex("89504e470d0a1a0a0000000d49484452000f4240000f424008020000005a7c0e2a")  # a million squared
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "TIFF")
    good = (files / "query.png").read_bytes()
    with serving(files / "audio-index", EXPORT) as server:
        for body in (b"no picture", header, good[:200], buffer.getvalue(), b"%!PS-Adobe"):
            status, _, answer = ask(server, "/search", body)
            assert (status, list(answer)) == (422, ["error"]), body[:20]
            assert "\n" not in answer["error"]
        assert ask(server, "/search", good)[0] == 200


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (f"Content-Length: {1 << 30}", 413),
        (f"Content-Length: {MAX_BODY + 1}", 413),
        ("Content-Length: 99999999999999999999", 411),
        ("Content-Length: -1", 411),
        ("Content-Length: 0", 400),
        ("Content-Length: 5\r\nContent-Length: 6", 411),
        ("Transfer-Encoding: chunked", 411),
        ("X: 1", 411),
    ],
)
def test_bodies_are_bounded_before_they_are_read(server, query, lines, status):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with connect(server) as connection:
        connection.sendall(f"POST /search HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n\r\n".encode())
        assert parsed(receive(connection))[0] == status
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert alive(server, query)


def test_a_client_that_sends_on_reads_why_it_was_refused(server):
    with connect(server) as connection:
        connection.sendall(f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {1 << 30}\r\n\r\n".encode())
        connection.sendall(bytes(2 << 20))
        assert parsed(receive(connection))[0] == 413


def test_slow_requests_time_out(server, query, monkeypatch):
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.4)
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.4)
    with connect(server) as slow:
        slow.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        begun = time.monotonic()
        for _ in range(8):  # a byte now and then does not postpone it
            slow.sendall(b"x")
            time.sleep(0.1)
        assert parsed(receive(slow))[0] == 408
        assert time.monotonic() - begun < 5
    with connect(server) as silent, connect(server) as dripping:
        dripping.sendall(b"GET /about HT")
        assert receive(silent) == receive(dripping) == b""
    with connect(server) as short:
        short.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nxxx")
        short.shutdown(1)
        assert parsed(receive(short))[::2] == (400, {"error": "the body ends after 3 of 1,000 bytes"})
    assert alive(server, query)


@pytest.mark.parametrize("request_", [b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET\r\n\r\n", b"A" * 70_000 + b"\r\n\r\n"])
def test_requests_that_are_not_http_are_answered(server, query, request_):
    with connect(server) as connection:
        connection.sendall(request_)
        assert b"error" in receive(connection)
    assert alive(server, query)


def test_200_at_once_are_each_answered(server, query, monkeypatch):
    monkeypatch.setattr(serve, "WAIT_SECONDS", 0.5)
    files, threads = open_files(), []

    def one(number):
        import threading

        answer = ask(server, "/search?rerank=1" if number % 2 else "/search", query)
        threads.append(threading.active_count())
        return answer[0], "results" in answer[2] or answer[2] == {"error": "busy: try again"}

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(one, range(200)))
    assert {status for status, _ in answers} <= {200, 503}
    assert all(good for _, good in answers)
    assert sum(status == 200 for status, _ in answers) >= serve.BODIES
    assert max(threads) < 200 + serve.CONNECTIONS + 20
    assert alive(server, query)
    assert open_files() < files + 10


def test_a_failure_inside_is_one_line_and_not_the_end(server, query, monkeypatch, caplog):
    monkeypatch.setattr(server.answers, "search", lambda *_, **__: 1 / 0)
    status, _, answer = ask(server, "/search", query)
    assert (status, list(answer)) == (500, ["error"])
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert alive(server, query)


def test_nothing_of_a_query_is_written(files, server, query):
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*")}
    assert alive(server, query)
    assert {path: path.stat().st_mtime_ns for path in files.rglob("*")} == before


def test_the_command_serves_until_interrupted(files):
    arguments = [sys.executable, command.__file__, str(files / "index"), "--serve", "0", "--device", "cpu"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        lines = [process.stdout.readline() for _ in range(3)]
        assert re.fullmatch(r"serving .*index \(7 items\) at http://127.0.0.1:\d+/ \(Ctrl-C ends it\)\n", lines[0])
        port = int(lines[0].partition("127.0.0.1:")[2].partition("/")[0])
        assert lines[1].startswith(f"from another machine: ssh -N -L {port}:127.0.0.1:{port} ")
        assert lines[2] == f"and open http://localhost:{port}/ there\n"
        process.server_port = port
        with connect(process):  # a browser keeps connections open that it does not use
            assert ask(process, "/about")[2]["items"] == 7
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=20)
        assert (process.returncode, output, errors) == (0, "stopped\n", "")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve", "{taken}"], "Address already in use: pass another address or port"),
        (["--serve", "70000"], "expected a port"),
        (["--serve", "0", "query.wav"], "takes no QUERY"),
        (["--serve", "0", "--host", "256.1.1.1"], "--host 256.1.1.1: "),
        (["--host", "0.0.0.0", "query.wav"], "--host is for --serve"),
    ],
)
def test_mistakes_are_one_line(files, server, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        command.main([str(files / "index"), *(one.format(taken=server.server_port) for one in arguments)])
    assert "\n" not in str(caught.value)


def test_the_ssh_line_goes_through_the_login_node(server, monkeypatch):
    monkeypatch.setenv("SLURM_SUBMIT_HOST", "login1")
    assert "-J login1 " in addresses(server, "it")[1]


def test_an_installed_package_has_the_page():
    text = (Path(command.__file__).parents[1] / "pyproject.toml").read_text()
    assert '"indexing/page/*"' in text
