"""``create``: make an empty image, alone or as an overlay of another."""

from __future__ import annotations

import sys

from ..catalog import by_prefix, driver
from ..errors import ByreError, InvalidArgument, NotSupported, printable
from ..graph.creating import create
from ..graph.opening import has_protocol
from ..options import convert
from ..typing import TYPE_CHECKING, Final
from . import common

if TYPE_CHECKING:
    from ..options import OptionSet, OptionValues

__all__ = ["HELP", "declared_options", "format_line", "run"]

_TABLE: Final = (
    common.FORMAT._replace(help="format of the new image; raw if it is not given"),
    common.Switch("backing-file", "b", "backing", "FILENAME", "backing file of the new image"),
    common.Switch("backing-format", "F", "backing-format", "FMT", "format of the backing file"),
    common.Switch("unsafe", "u", "backing-unsafe", "", "do not open the backing file"),
    common.Switch("options", "o", "options", "KEY=VALUE,...", "options of the format; -o help lists them"),
    common.QUIET,
    common.OBJECT,
)

HELP: Final = f"""\
usage: byre create [OPTIONS] FILENAME [SIZE]
Make an empty image. SIZE may be left out with a backing file.

{common.option_help(_TABLE)}"""

_RAW_SHOWN: Final = ("size", "nocow", "preallocation", "extent_size_hint")
"""What "Formatting ..." shows of a format that declares no order of its own."""

_SUFFIXES: Final = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
    "and exabytes, respectively.",
)


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    format_name = given.last("format", "raw")
    options = common.create_options(given.all("options"))
    if options is None:
        declared = declared_options(format_name)
        common.print_create_options(format_name, declared, complete=bool(given.positional))
        return 0
    if not given.positional:
        raise common.UsageError("expecting image file name")
    if len(given.positional) > 2:
        raise common.UsageError(f"unexpected argument: {given.positional[2]}")
    filename = given.positional[0]
    size = common.size_argument(given.positional[1], "image size") if len(given.positional) == 2 else None
    try:
        _create(filename, format_name, size, options, given)
    except ByreError as error:
        error.where = error.where or filename
        raise
    return 0


def declared_options(format_name: str) -> OptionSet:
    """The creation options of a format.

    :raises ByreError: an unknown format, or one that cannot be created
    """
    row = driver(format_name)
    declared: OptionSet | None = None
    if row.kind == "format" and "c" in row.abilities:
        declared = getattr(row.load(), "CREATE_OPTIONS", None)
    if declared is None:
        raise NotSupported(f"driver {format_name!r} cannot create images")
    return declared


def _create(filename: str, format_name: str, size: int | None, options: dict[str, str], given: common.Given) -> None:
    declared = declared_options(format_name)
    _check_protocol(filename)
    if size is not None and "size" in options:
        raise InvalidArgument("the image size must be given only once")
    for key, name, what in (
        ("backing-file", "backing_file", "backing file"),
        ("backing-format", "backing_fmt", "backing file format"),
    ):
        if given.has(key):
            if name not in declared:
                raise NotSupported(f"{what} not supported for file format {format_name!r}")
            options[name] = given.last(key)
    _check_backing(filename, options, size, unsafe=given.has("unsafe"))
    accepted, refusal = split_options(declared, options)

    def announce(values: OptionValues) -> None:
        if not given.has("quiet"):
            sys.stdout.write(format_line(filename, format_name, declared, values, options))
            sys.stdout.flush()
        if refusal is not None:
            raise refusal

    policy = common.policy(given)
    # The user named the backing file himself; what that one names is up to the policy.
    create(filename, format_name, size, options=accepted, check_backing=not given.has("unsafe"), policy=policy,
           announce=announce, secrets=given.secrets(), remark="Could not open backing image.")  # fmt: skip


def split_options(declared: OptionSet, options: dict[str, str]) -> tuple[dict[str, object], InvalidArgument | None]:
    """(options with their types, the first refusal of a word that is not among the choices, or of a count).

    The peer shows what it was asked for before it judges these; sizes it judges at once.

    :raises BadNumber: a size that is no number
    """
    accepted: dict[str, object] = {}
    refusal: InvalidArgument | None = None
    for name, text in options.items():
        kind = declared[name].type if name in declared else "str"
        try:
            accepted[name] = convert(declared[name], text) if name in declared else text
        except InvalidArgument as error:
            if kind in ("enum", "int"):
                refusal = refusal or error
            elif kind == "size" and not text[1:].isdecimal():
                raise common.BadNumber(error.message, _SUFFIXES) from None
            else:
                raise
    return accepted, refusal


def _check_protocol(filename: str) -> None:
    """:raises ByreError: images cannot be created over the protocol that ``filename`` begins with"""
    if has_protocol(filename):
        prefix = filename.partition(":")[0]
        row = by_prefix(prefix)
        if row is None:
            raise InvalidArgument(f"unknown protocol {prefix!r}",
                                  hint="write ./ before a file name that holds a colon")  # fmt: skip
        if "c" not in row.abilities and row.name not in ("host_device", "host_cdrom", "nbd"):
            raise NotSupported(f"protocol driver {row.name!r} cannot create images")


def _check_backing(filename: str, options: dict[str, str], size: int | None, *, unsafe: bool) -> None:
    """:raises InvalidArgument: what is said about the backing file makes no sense"""
    backing = options.get("backing_file")
    if backing is not None:
        if backing == filename:
            raise InvalidArgument("the image and its backing file have the same name")
        if not backing:
            raise InvalidArgument("the name of the backing file is empty")
        if "backing_fmt" not in options and unsafe:
            raise InvalidArgument("a backing file is given without its format", hint="use -F (or backing_fmt=)")
    if size is None and "size" not in options and (unsafe or backing is None):
        raise InvalidArgument("image creation needs a size")


def format_line(
    filename: str, format_name: str, declared: OptionSet, values: OptionValues, typed: dict[str, str]
) -> str:
    """The line ``Formatting ...``: options that were given or have a default, as the peer shows them.

    :param typed: the options as the user wrote them
    """
    parts = [f"Formatting '{printable(filename)}', fmt={format_name}"]
    order = getattr(driver(format_name).load(), "CREATE_PRINT_ORDER", None)
    for name in order or _RAW_SHOWN:
        if name not in declared:
            continue
        default = declared[name].default if order else None
        if name in values.given and declared[name].type in ("size", "int"):
            parts.append(f"{name}={values.given[name]}")
        elif name in typed:
            parts.append(f"{name}={printable(typed[name].replace(',', ',,'))}")
        elif default is not None:
            parts.append(f"{name}={default if not isinstance(default, bool) else 'on' if default else 'off'}")
    return " ".join(parts) + "\n"
