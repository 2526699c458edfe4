"""The process that logs to wandb or trackio for rank 0, so that they can neither block nor end the training.

It is started by `wandb_run.py` and replies to each JSON line on a socket with one: {}, or {"error": reason} before it
exits. The first line has the name of the tracker and the options of `wandb.init`, further ones the numbers of a record,
the last {"finish": true}. If the training ends without that, by an error or a signal, the run is closed as failed.
"""

import json
import os
import signal
import socket
import threading
from typing import Any

_CLOSING = 20.0  # seconds to upload the rest if the training has ended without {"finish": true}


def main(descriptor: int) -> None:
    """Serve rank 0 over a socket until it finishes the run or exits."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job; the training handles them
    connection = socket.socket(fileno=descriptor)
    lines = connection.makefile("rb")
    try:
        options = json.loads(lines.readline())
        tracker = options.pop("tracker", "wandb")
        run = _open(options, connection) if tracker == "wandb" else _Trackio(options, connection)
        for line in lines:
            values = json.loads(line)
            if "finish" in values:
                _close(run, options["mode"], 0)
                _answer(connection)
                os._exit(0)
            run.log(values)
            _answer(connection)
        threading.Timer(_CLOSING, os._exit, [1]).start()
        _close(run, options["mode"], 1)
    except BaseException as error:
        _answer(connection, error=" ".join(str(error).split()) or type(error).__name__)
    os._exit(1)  # without wandb's exit hooks, which may wait for a server


def _open(options: dict[str, Any], connection: socket.socket) -> Any:
    """Initialize the wandb run; its metrics are plotted over `step`, in whatever order its parts are uploaded."""
    import wandb

    settings = wandb.Settings(console="off", silent=True, **options["settings"])
    run = wandb.init(**options | {"settings": settings})
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    _answer(connection, folder=run.dir)
    return run


class _Trackio:
    """A run of trackio, which takes the step apart from the values and has no IDs: the name has it."""

    def __init__(self, options: dict[str, Any], connection: socket.socket) -> None:
        import trackio

        name = f"{options['name']}-{options['id']}"
        self._run = trackio.init(options["project"], name=name, resume="allow", embed=False)
        _answer(connection, folder="")

    def log(self, values: dict[str, float]) -> None:
        """Log a record."""
        self._run.log({name: value for name, value in values.items() if name != "step"}, step=int(values["step"]))

    def finish(self, exit_code: int) -> None:
        """Write what is left."""
        self._run.finish()


def _close(run: Any, mode: str, exit_code: int) -> None:
    """Finish the wandb run; offline it is on the disk once wandb's service has ended, which may be killed with us."""
    import wandb

    run.finish(exit_code=exit_code)
    if mode == "offline":
        wandb.teardown(exit_code=exit_code)


def _answer(connection: socket.socket, **values: str) -> None:
    connection.sendall(json.dumps(values).encode() + b"\n")
