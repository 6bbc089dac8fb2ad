"""No reader waits for a named pipe in the place of its file; `python -m tests.faults files` too."""

import os

import pytest

from minsae_jax.errors import UserError
from tests.hostile.attempt import Tally, attempt
from tests.hostile.inputs import INPUTS, Input


@pytest.mark.parametrize("name", [name for name in INPUTS if isinstance(INPUTS[name], Input)])
def test_a_pipe_is_named_or_left_out(name, tmp_path):
    each = INPUTS[name]
    path = each.prepare(tmp_path)
    path.unlink()
    os.mkfifo(path)

    def read():
        try:
            each.read(path)
        except OSError as e:  # which a command reports with the name of the file
            raise UserError(f"{e.strerror}: {e.filename}") from e

    # A reader that waits fails after WAIT_SECONDS.
    attempt(read, each.names.removeprefix("YAML"), Tally())
