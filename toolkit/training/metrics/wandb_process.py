"""The process that writes a run's wandb record for rank 0, which can therefore neither wait for wandb nor end by it.

It is started by `wandb_run.py` and answers each JSON line on a socket with one: {}, or {"error": why} before it ends.
The first line has the options of `wandb.init`, each further one the numbers of a record, the last one {"finish": true}.
Where the training ends without that, by an error or a signal, the record is closed as that of a failed run.
"""

import json
import os
import signal
import socket
import sys
import threading
from typing import Any

_CLOSING = 20.0  # seconds for what is left to upload once the training has ended without a word


def main(descriptor: int) -> None:
    """Serve rank 0 until it says that the run is finished, or has ended.

    Args:
        descriptor: Of the socket.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a job; they are for the training to answer
    connection = socket.socket(fileno=descriptor)
    lines = connection.makefile("rb")
    try:
        options = json.loads(lines.readline())
        run = _open(options, connection)
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
    os._exit(1)  # without wandb's own hooks, which may wait for a server


def _open(options: dict[str, Any], connection: socket.socket) -> Any:
    """Open the record; its curves are drawn over `step`, whatever order its parts are uploaded in."""
    import wandb

    settings = wandb.Settings(console="off", silent=True, **options["settings"])
    run = wandb.init(**options | {"settings": settings})
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    _answer(connection, folder=run.dir)
    return run


def _close(run: Any, mode: str, exit_code: int) -> None:
    """Finish the record; offline it is on the disk only once wandb's service has ended, which may be killed with us."""
    import wandb

    run.finish(exit_code=exit_code)
    if mode == "offline":
        wandb.teardown(exit_code=exit_code)


def _answer(connection: socket.socket, **values: str) -> None:
    connection.sendall(json.dumps(values).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
