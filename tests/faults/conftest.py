"""One warm server for all tests of a process, and folders that its verbs have finished."""

import pytest

from tests.faults.process import Server, compiler
from tests.faults.verbs import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    if compiler() is None:
        pytest.skip("fault injection requires Linux and a C compiler")
    with Server() as server:
        yield Workshop(server, tmp_path_factory.mktemp("faults"))
