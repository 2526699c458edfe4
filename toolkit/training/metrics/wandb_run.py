"""Logging to Weights & Biases in a separate process: online, else offline, else not at all; or to trackio, locally.

Rank 0 queues its records for a thread, which sends them to `wandb_process.py`. If that process replies with an error,
dies, or does not reply in time, it is killed, and a new one writes all records of this training process offline.
Restarts and parts share one ID, so that wandb shows one run.
"""

import configparser
import contextlib
import importlib.util
import json
import logging
import netrc
import os
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shards.errors import UserError
from toolkit.config import schema as config
from toolkit.training.checkpointing.background import reason_of
from toolkit.training.checkpointing.progress import Progress

logger = logging.getLogger(__name__)

_INIT = 20.0  # seconds for a server's first reply, unless WANDB_INIT_TIMEOUT is set
_START = 60.0  # seconds for a process to import wandb, also from a slow file system
_LOG = 60.0  # seconds for one record
_FINISH_OFFLINE = 20.0  # seconds to finish an offline run
_HEADER = 7  # bytes of a wandb file without records
_UNWRITTEN = 120.0  # seconds until wandb has written the first records of a part to the disk
_KEPT = 50_000  # newest records in memory, to be written again after a failure
# Stands for the key that wandb obtains for an identity token: its form, three parts, is that of such a key.
_EXCHANGED_TOKEN = "a.b.c"
_ROOT = Path(__file__).resolve().parents[3]
_START_CODE = (
    "import sys; sys.path[:0] = [sys.argv[2]]; from toolkit.training.metrics.wandb_process import main; "
    "main(int(sys.argv[1]))"
)
LOCAL = "local"  # mode of trackio
_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def check_wandb(settings: config.Wandb, run: Path) -> None:
    """Check that a run with wandb online has a key of a valid form.

    A resumed run is not ended by a missing key: it continues offline.

    Raises:
        UserError: There is no key, or one of a wrong form, and the run has no checkpoint yet.
    """
    mode, problem = choose_mode(settings)
    if mode == LOCAL and not importlib.util.find_spec("trackio"):
        raise UserError("wandb.tracker is trackio, which is missing: pip install 'speech-image-toolkit[trackio]'")
    if problem and mode == "online" and not any(run.glob("checkpoints/step-*")):
        raise UserError(f"{problem}; or set --wandb.mode offline")


def open_wandb(settings: config.Wandb, run: Path, progress: Progress) -> "WandbRun | None":
    """Open the run in wandb, offline if there is no key.

    All restarts share one ID. It is stored in the checkpoints, for a run that is continued in another folder, and in
    the run folder, for a run that is killed before its first checkpoint.

    Returns:
        The wandb run; None: wandb is disabled.
    """
    mode, problem = choose_mode(settings)
    if mode == "disabled":
        return None
    if problem:
        logger.warning(f"wandb is offline: {problem}")
        mode = "offline"
    kept = run / "wandb_id"
    if not progress.wandb_id:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            progress.wandb_id = kept.read_text().strip()
    progress.wandb_id = progress.wandb_id or uuid.uuid4().hex[:12]
    try:
        kept.write_text(progress.wandb_id)
    except OSError as error:
        logger.warning(f"{kept} was not written: {reason_of(error)}; training goes on")
    options = {"project": settings.project, "name": run.resolve().name, "id": progress.wandb_id, "resume": "allow"}
    return WandbRun(options | {"dir": str(run.resolve()), "tracker": settings.tracker}, mode)


class WandbRun:
    """Rank 0's handle of the wandb run: no method raises, and only `finish` takes time, which is bounded."""

    def __init__(self, options: dict[str, Any], mode: str) -> None:
        """Start to open the wandb run, with options of `wandb.init` and "tracker"."""
        self._tracker = options.get("tracker", "wandb")
        self._options, self._mode = options, mode
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None: finish
        self._kept: deque[bytes] = deque(maxlen=_KEPT)
        self._process: _Process | None = None
        self._too_slow = ""
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float]) -> None:
        """Log a record, which has a `step`."""
        self._waiting.put(json.dumps(values).encode())

    def finish(self, seconds: float) -> None:
        """Finish the wandb run.

        Args:
            seconds: Timeout of the server; after it the run is written offline, in a few more seconds.
        """
        self._waiting.put(None)
        opened = self._opened.wait(seconds / 2)
        self._thread.join(seconds if opened else 0)
        process = self._process
        if self._thread.is_alive() and process and process.mode == "online":
            self._too_slow = f"its server has not {'taken all that was logged' if opened else 'answered'} so far"
            process.kill()
        self._thread.join(_FINISH_OFFLINE)
        if self._thread.is_alive():
            logger.warning(
                f"{self._tracker} was not finished within {_FINISH_OFFLINE:.0f} s; log.jsonl has all that was logged"
            )
            if process := self._process:
                process.kill()

    def parts(self) -> int:
        """Return the number of parts of this wandb run that were written offline."""
        return len(list(Path(self._options["dir"]).glob(f"wandb/offline-run-*-{self._options['id']}")))

    def _serve(self) -> None:
        """Write the queued records, in a thread: as configured, after a failure offline, after another not at all."""
        reason = ""
        for mode in (self._mode, "offline") if self._mode != LOCAL else (LOCAL,):
            try:
                self._write(mode, reason)
                return
            except Exception as error:  # no error of wandb ends the training
                reason = self._too_slow or getattr(error, "strerror", None) or str(error)
            finally:
                if self._process:
                    self._process.kill()
            if self._process:
                self._drop_empty(self._process.folder)
        logger.warning(f"{self._tracker} is off: {reason}; training goes on, and log.jsonl has all that is logged")
        self._opened.set()
        while self._waiting.get() is not None:
            pass

    def _write(self, mode: str, reason: str) -> None:
        """Write the kept and the queued records, until the run is finished; `reason`: why not as configured.

        Raises:
            RuntimeError, OSError, EOFError: As in `_Process.request`.
        """
        seconds = init_seconds()
        settings = {"init_timeout": seconds, "x_stats_pid": os.getpid()}
        self._process = _Process(mode)
        options = self._options | {"mode": mode, "settings": settings}
        for old in Path(self._options["dir"]).glob("wandb/offline-run-*"):
            self._drop_empty(old, _UNWRITTEN)
        self._process.open(options, _START + seconds)
        folder = self._process.folder
        if mode != LOCAL and Path(self._options["dir"]) not in folder.resolve().parents:
            logger.warning(f"wandb cannot write to {self._options['dir']}/wandb: its files are in {folder}")
        self._opened.set()
        for record in list(self._kept):
            self._process.request(record, _LOG)
        if reason:
            logger.warning(f"wandb is offline: {reason}; later, `wandb sync {folder.parent}/offline-run-*` uploads it")
        while (line := self._waiting.get()) is not None:
            self._kept.append(line)
            self._process.request(line, _LOG)
        self._waiting.put(None)  # for the next process, in case this one fails now
        self._process.request(b'{"finish": true}', 24 * 3600)  # `finish` has a timeout

    def _drop_empty(self, folder: Path, age: float = 0.0) -> None:
        """Remove a part without records that was last written `age` seconds ago: `wandb sync` would fail on it."""
        with contextlib.suppress(OSError):
            state = (folder / f"run-{self._options['id']}.wandb").stat()
            if state.st_size <= _HEADER and time.time() - state.st_mtime >= age:
                shutil.rmtree(folder, ignore_errors=True)


class _Process:
    """A running `wandb_process.py`.

    Attributes:
        mode: online, offline, or local.
        folder: Folder that it writes to.
    """

    def __init__(self, mode: str) -> None:
        self.mode, self.folder = mode, Path()
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START_CODE, str(theirs.fileno()), str(_ROOT)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._answers = self._socket.makefile("rb")

    def open(self, options: dict[str, Any], seconds: float) -> None:
        """Initialize the wandb run with options of `wandb.init`; raises as `request` does."""
        self.folder = Path(self.request(json.dumps(options).encode(), seconds)["folder"]).parent

    def request(self, line: bytes, seconds: float) -> dict[str, str]:
        """Send a line and wait for the reply.

        Raises:
            RuntimeError: The reply is an error.
            OSError: There is no reply in time.
            EOFError: The process has ended.
        """
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(line + b"\n")
            answer = self._answers.readline()
        except TimeoutError:
            raise TimeoutError(f"its process has not answered within {seconds:.0f} s") from None
        if not answer:
            raise EOFError("its process has ended")
        values: dict[str, str] = json.loads(answer)
        if "error" in values:
            raise RuntimeError(values["error"])
        return values

    def kill(self) -> None:
        """Kill the process; wandb's service ends with it."""
        self._child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1)


def init_seconds() -> float:
    """Return the timeout for opening a run online, in seconds."""
    with contextlib.suppress(KeyError, ValueError):
        return max(1.0, min(600.0, float(os.environ["WANDB_INIT_TIMEOUT"])))
    return _INIT


def choose_mode(settings: config.Wandb) -> tuple[str, str]:
    """Return the mode, and what is wrong with it or with the key in one line; empty: nothing."""
    mode, variable = settings.mode, os.environ.get("WANDB_MODE", "").strip().lower()
    name = "wandb.mode"
    if mode == "auto" and variable:
        if variable not in _MODES:
            return "offline", f"WANDB_MODE is {variable!r}; expected online, offline or disabled"
        mode, name = _MODES[variable], "WANDB_MODE"  # type: ignore[assignment]
    if settings.tracker == "trackio" and mode != "disabled":
        return LOCAL, ""
    key, source = _find_key()
    if mode == "auto":
        mode = "offline" if key is None else "online"
    if mode != "online":
        return mode, ""
    if key is None:
        return mode, f"{name} is online, and there is no key: run `wandb login`, or set WANDB_API_KEY"
    return mode, _wrong_form(key, source)


def _wrong_form(key: str, source: str) -> str:
    """Return what wandb rejects in a key without a server's help; empty: nothing."""
    secret = key.split("-", 1)[-1]
    if key and (re.fullmatch(r"[\w-]{40,}", secret) or re.fullmatch(r"([\w-]+\.){2}[\w-]+", key)):
        return ""
    return f"{source} holds no wandb key: it has {len(key)} characters, a key has 40 or more; run `wandb login`"


def _find_key() -> tuple[str | None, str]:
    """Find the key that wandb will use, and its source; None: there is none."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key.strip(), "WANDB_API_KEY"
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return _EXCHANGED_TOKEN, "WANDB_IDENTITY_TOKEN_FILE"
    host = urlsplit(_server()).netloc
    for name in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            hosts = netrc.netrc(os.path.expanduser(name)).hosts
            for each in [host, *(other for other in hosts if "wandb" in other or "forge.coreweave" in other)]:
                if each in hosts:
                    return hosts[each][2], name
    return None, ""


def _server() -> str:
    """Return the address of the server, as set by `wandb login --host` or the environment."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    read = configparser.ConfigParser()
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        read.read(os.path.expanduser(f"{folder}/settings"))
    return read.get("default", "base_url", fallback="https://api.wandb.ai")
