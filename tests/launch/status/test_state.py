"""Why a run ended is shown: a limit of restarts, and what a stopped run stopped for."""

from pathlib import Path

from launch.record import Attempt
from launch.status.failure import Failure
from launch.status.state import RunState, _ended_state
from launch.status.tables import status_table

LIMIT = "a rank was killed or hung; 3 restarts in a row wrote no new checkpoint: no restart"


def test_a_limit_of_restarts_is_shown_beside_the_exit_code() -> None:
    failure = Failure(3, 70, [], Path("rank3.log"))
    last = Attempt(2, ended=1.0, code=70, why=LIMIT, cause="killed")
    state, reason, _ = _ended_state([last], None, failure)
    assert (state, reason) == ("failed", f"{failure.how}; {LIMIT}")
    plain = Attempt(0, ended=1.0, code=1, why="a rank failed with exit code 1: no restart", cause="failed")
    assert _ended_state([plain], None, failure)[1] == failure.how


def test_the_table_shows_why_a_run_stopped() -> None:
    why = "stopped by a signal; 20 restarts in a row wrote no new checkpoint: no restart"
    state = RunState(Path("runs/a"), None, "stopped", why, 5, 10, None, None, 20, None, None, None)
    assert f"stopped ({why})" in status_table([state])
