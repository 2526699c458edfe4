"""Log messages on the terminal, as the commands set them up."""

import pytest

from shards.logs import setup_logging


@pytest.fixture(autouse=True)
def _logging():
    setup_logging(rank=0)
