"""Errors: every failure has a system error number, a place and a printable sentence."""

from __future__ import annotations

import errno
import os

import pytest

from byre import errors


def test_a_message_says_where_and_what_to_do() -> None:
    error = errors.Busy("the image is locked", where="a.img", hint="stop the other program")
    assert str(error) == "a.img: the image is locked; stop the other program"
    assert str(errors.Busy("the image is locked")) == "the image is locked"
    assert error.errno == errno.EBUSY
    assert errors.Busy("x", errno=errno.EAGAIN).errno == errno.EAGAIN


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOENT, errors.NotFound), (errno.EEXIST, errors.AlreadyExists), (errno.EACCES, errors.AccessDenied),
     (errno.EPERM, errors.AccessDenied), (errno.EROFS, errors.ReadOnly), (errno.EBUSY, errors.Busy),
     (errno.ENOSPC, errors.NoSpace), (errno.EDQUOT, errors.NoSpace), (errno.EINVAL, errors.InvalidArgument),
     (errno.EIO, errors.IOFailure), (errno.ELOOP, errors.IOFailure), (0, errors.IOFailure)],
)  # fmt: skip
def test_system_errors_keep_their_number(number: int, kind: type[errors.ByreError]) -> None:
    made = errors.from_oserror(OSError(number, "x"), "cannot read 512 bytes at 0x0", "a.img")
    assert type(made) is kind
    assert made.errno == (number or errno.EIO)
    assert str(made) == f"a.img: cannot read 512 bytes at 0x0: {os.strerror(made.errno)}"


def test_every_public_error_is_a_byre_error_with_a_number() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type):
            assert issubclass(kind, errors.ByreError)
            assert kind("x").errno > 0


def test_text_of_an_image_cannot_steer_a_terminal() -> None:
    assert errors.printable("b\x1b]0;x\x07\n\udcff") == "b\\x1b]0;x\\x07\\n\\udcff"
    assert errors.printable("grün.img") == "grün.img"
    assert errors.printable("a\u202eb") == "a\\u202eb"
