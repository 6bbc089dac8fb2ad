"""Errors that the command line reports as one line."""

import errno

import pytest

from minsae_jax import UserError
from minsae_jax.errors import reading


def test_any_error_of_a_damaged_file_is_one_of_the_user():
    with (
        pytest.raises(UserError, match=r"^x is damaged \(EOFError\); remove it$"),
        reading("x is damaged", remedy="; remove it"),
    ):
        raise EOFError


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_errors_of_the_system_are_not_damage(number):
    with pytest.raises(OSError, match="message"), reading("x is damaged"):
        raise OSError(number, "message")
