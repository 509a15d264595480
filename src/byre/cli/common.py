"""What the verbs share: option tables, the options most of them have, opening an image from those.

A verb is a module with ``run(arguments) -> int`` and ``HELP``. It declares its options as a table of
:class:`Switch` and calls :func:`parse`; syntax, abbreviations and refusals are those of ``getopt_long``.
What ``--object`` defines is in ``objects``, text for people and JSON in ``output``, the frame around a verb (errors,
signals, exit codes) in ``main``.
"""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar

from ..errors import ByreError, InvalidArgument, printable
from ..options import parse_keyval, unflatten
from ..typing import TYPE_CHECKING, Final, NamedTuple
from ..units import parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..crypto.secrets import Secret
    from ..graph.graph import Graph
    from ..graph.opening import Policy
    from ..image import Image
    from ..options import Option, OptionSet
    from .objects import Object

__all__ = [
    "FORCE_SHARE",
    "FORMAT",
    "IMAGE_OPTS",
    "OBJECT",
    "OUTPUT",
    "PROGRAM",
    "PROGRESS",
    "QUIET",
    "SOURCE_CACHE",
    "BadNumber",
    "Given",
    "HelpRequested",
    "Switch",
    "UsageError",
    "as_peer",
    "create_options",
    "image_options",
    "open_image",
    "option_help",
    "option_line",
    "output_format",
    "parse",
    "policy",
    "print_create_options",
    "report",
    "size_argument",
    "warn",
    "warn_graph",
]

PROGRAM: ContextVar[str] = ContextVar("PROGRAM", default="byre")
"""The name the program was started under; main() sets it."""

MAX_SIZE: Final = (1 << 63) - 1
_FILE_OPTIONS: Final = ("extent_size_hint", "nocow")
"""Creation options that belong to the file below an image."""


class UsageError(InvalidArgument):
    """The command line itself is wrong."""


class BadNumber(InvalidArgument):
    """Text that is no number; the peer explains suffixes on further lines, which scripts compare.

    :ivar lines: what follows the message under the peer's name
    """

    def __init__(self, message: str, lines: tuple[str, ...], *, where: str = "") -> None:
        super().__init__(message, where=where)
        self.lines = lines


class HelpRequested(Exception):
    """``-h`` or ``--help`` was given: main() prints the verb's HELP."""


def as_peer() -> bool:
    """Whether byre was started under the name of another program (``qemu-img``, ...)."""
    return PROGRAM.get() != "byre"


def report(message: object, *, program: str = "") -> None:
    """One error line on stderr: ``PROG: message``, control characters escaped.

    :param program: for a thread that does not know under which name it was started
    """
    sys.stderr.write(f"{program or PROGRAM.get()}: {printable(str(message))}\n")
    if isinstance(message, BadNumber) and as_peer():
        sys.stderr.write("".join(f"{line}\n" for line in message.lines))


def warn(message: str, *, program: str = "") -> None:
    """One warning line on stderr.

    :param program: for a thread that does not know under which name it was started
    """
    sys.stderr.write(f"{program or PROGRAM.get()}: warning: {printable(message)}\n")


# -- option tables --------------------------------------------------------------------------------


class Switch(NamedTuple):
    """One option of a verb.

    :ivar key: how the verb asks for it
    :ivar short: a letter, "" if there is none
    :ivar long: a name without the dashes, "" if there is none
    :ivar value: what its argument is called; "" if it takes none
    :ivar help: a few words for the help text
    """

    key: str
    short: str = ""
    long: str = ""
    value: str = ""
    help: str = ""


FORMAT: Final = Switch("format", "f", "format", "FMT", "format of the image; probed if it is not given")
IMAGE_OPTS: Final = Switch("image-opts", "", "image-opts", "", "the name is key=value,... instead of a file name")
OBJECT: Final = Switch("object", "", "object", "TYPE,id=ID,...", "an object such as a secret")
FORCE_SHARE: Final = Switch("force-share", "U", "force-share", "", "open although another program writes the image")
OUTPUT: Final = Switch("output", "", "output", "human|json", "how to print the result")
QUIET: Final = Switch("quiet", "q", "quiet", "", "print errors only")
JOURNAL: Final = (
    Switch("journal", "", "journal", "FILE", "keep in FILE what is done, until all is"),
    Switch("resume", "", "resume", "", "go on with the journal of a run that did not end"),
)
PROGRESS: Final = Switch("progress", "p", "", "", "show the progress")
SOURCE_CACHE: Final = Switch("source-cache", "T", "", "CACHE", "cache mode of the source")

_EVERY_VERB: Final = (
    Switch("help", "h", "help", "", "show this help"),
    Switch("untrusted", "", "untrusted", "", "open nothing that an image names (also BYRE_UNTRUSTED=1)"),
    Switch("allow-ref", "", "allow-ref", "", "allow json: and protocol names as backing files (also BYRE_ALLOW_REF=1)"),
    Switch("max-size", "", "max-size", "SIZE", "refuse images larger than this"),
)


class Given:
    """The options and other arguments of one command line.

    :ivar ordered: (key, value) as they came; the value of a switch without argument is ""
    :ivar positional: everything that is no option
    """

    def __init__(self, ordered: list[tuple[str, str]], positional: list[str]) -> None:
        self.ordered = ordered
        self.positional = positional
        self._objects: dict[str, tuple[str, Object]] | None = None

    def has(self, key: str) -> bool:
        return any(name == key for name, _ in self.ordered)

    def last(self, key: str, default: str = "") -> str:
        """The value of the last ``key``, which replaces earlier ones."""
        for name, value in reversed(self.ordered):
            if name == key:
                return value
        return default

    def all(self, key: str) -> list[str]:
        return [value for name, value in self.ordered if name == key]

    def objects(self) -> dict[str, tuple[str, Object]]:
        """What ``--object`` defines: (definition, object) by id, the same objects at each call.

        :raises ByreError: a malformed definition, or another type of object
        """
        if self._objects is None:
            texts = self.all("object")
            if not texts:
                return {}
            from .objects import parse_objects

            self._objects = parse_objects(texts)
        return self._objects

    def secrets(self) -> dict[str, Secret]:
        """The secrets among :meth:`objects`, by id."""
        if not self.objects():
            return {}
        from .objects import secrets

        return secrets(self.objects())

    def furnish(self, graph: Graph) -> None:
        """Give ``graph`` what its nodes find by id: the throttle groups and TLS credentials among :meth:`objects`."""
        if not self.objects():
            return
        from .objects import furnish

        furnish(graph, self.objects())


def parse(table: Sequence[Switch], arguments: Sequence[str]) -> Given:
    """Sort ``arguments`` into options and the rest, as ``getopt_long`` does (options may come after names).

    The options every verb has are added to ``table``. Object definitions are checked.

    :raises UsageError: unknown or ambiguous option, missing or superfluous argument
    :raises HelpRequested: ``-h``, ``--help``
    """
    switches = (*table, *_EVERY_VERB)
    ordered: list[tuple[str, str]] = []
    positional: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            positional += rest
            break
        if word.startswith("--"):
            ordered.append(_long_option(switches, word, rest))
        elif len(word) > 1 and word[0] == "-":
            ordered += _short_options(switches, word, rest)
        else:
            positional.append(word)
    given = Given(ordered, positional)
    if given.has("help"):
        raise HelpRequested
    if given.objects():
        from .objects import hide_secrets

        hide_secrets(given.objects())
    return given


def _long_option(switches: Sequence[Switch], word: str, rest: list[str]) -> tuple[str, str]:
    name, equals, value = word[2:].partition("=")
    found = [s for s in switches if s.long == name] or [s for s in switches if s.long and s.long.startswith(name)]
    if not found or not name:
        raise UsageError(f"unrecognized option '{word}'")
    if len({s.key for s in found}) > 1:
        raise UsageError(f"option '{word}' is ambiguous: " + ", ".join(f"--{s.long}" for s in found))
    switch = found[0]
    if not switch.value:
        if equals:
            raise UsageError(f"option '--{switch.long}' takes no argument")
        return switch.key, ""
    if not equals:
        if not rest:
            raise UsageError(f"missing argument for option '{word}'")
        value = rest.pop(0)
    return switch.key, value


def _short_options(switches: Sequence[Switch], word: str, rest: list[str]) -> list[tuple[str, str]]:
    """The options of a bundle such as ``-qU`` or ``-fqcow2``."""
    result: list[tuple[str, str]] = []
    letters = word[1:]
    while letters:
        letter, letters = letters[0], letters[1:]
        switch = next((s for s in switches if s.short == letter), None)
        if switch is None:
            raise UsageError(f"unrecognized option '-{letter}'")
        if switch.value:
            if not letters and not rest:
                raise UsageError(f"missing argument for option '-{letter}'")
            result.append((switch.key, letters or rest.pop(0)))
            break
        result.append((switch.key, ""))
    return result


def option_help(table: Sequence[Switch]) -> str:
    """The lines of a help text that list the options of ``table`` and those of every verb."""
    rows = []
    for s in (*table, *_EVERY_VERB):
        names = ", ".join(n for n in (s.short and f"-{s.short}", s.long and f"--{s.long}") if n)
        value = ("=" if s.long else " ") + s.value if s.value else ""
        rows.append((names + value, s.help))
    return "".join(f"  {left:<28} {right}\n" for left, right in rows)


def output_format(given: Given) -> str:
    """ "human" or "json".

    :raises UsageError: something else
    """
    value = given.last("output", "human")
    if value not in ("human", "json"):
        raise UsageError(f"--output must be 'human' or 'json', not '{value}'")
    return value


def size_argument(text: str, what: str, *, least: int = 0, most: int = MAX_SIZE) -> int:
    """A size in bytes typed by the user.

    :param what: named in the message, e.g. "image size"
    :raises BadNumber: not a size
    :raises InvalidArgument: outside ``least`` to ``most``
    """
    try:
        size = -1 if text[:1] == "-" and text[1:].isdecimal() else parse_size(text, what)
    except InvalidArgument as error:
        raise BadNumber(error.message, (f"{PROGRAM.get()}: (kilobytes, megabytes, ...)",)) from None
    if not least <= size <= most:
        raise InvalidArgument(f"invalid {what} {text!r}: must be between {least} and {most} bytes")
    return size


# -- opening --------------------------------------------------------------------------------------


def policy(given: Given) -> Policy:
    """Which files an image may name, from the options and the environment."""
    from ..graph.opening import Policy

    untrusted = given.has("untrusted") or os.environ.get("BYRE_UNTRUSTED", "") not in ("", "0")
    references = given.has("allow-ref") or os.environ.get("BYRE_ALLOW_REF", "") not in ("", "0")
    made = Policy.untrusted() if untrusted else Policy(allow_references=references)
    if given.has("max-size"):
        made = made._replace(max_size=size_argument(given.last("max-size"), "maximum size", least=1))
    return made


def image_options(text: str) -> dict[str, object]:
    """Nested options for an ``--image-opts`` string; its first part may be a bare file name.

    :raises InvalidArgument: malformed
    """
    return unflatten(parse_keyval(text, implied="file"))


def journal_path(given: Given) -> str:
    """The file given with ``--journal``, "" without one.

    :raises UsageError: --resume without it
    """
    if given.has("resume") and not given.has("journal"):
        raise UsageError("--resume needs --journal FILE")
    return given.last("journal")


def open_image(
    name: str,
    given: Given,
    *,
    format: str = "",
    image_opts: bool | None = None,
    read_only: bool = True,
    cache: str = "writeback",
    force_share: bool | None = None,
    backing: bool = True,
    exclusive: bool = False,
    resizable: bool = False,
    no_io: bool = False,
    check: bool = False,
    discard: str = "unmap",
    detect_zeroes: str = "off",
    policy_override: Policy | None = None,
    graph: Graph | None = None,
    options: Mapping[str, str] | None = None,
) -> Image:
    """Open what the user named, as the shared options say, and print the warnings of opening it.

    :param format: the driver; "" probes
    :param image_opts: ``name`` is key=value,...; by default whether ``--image-opts`` was given
    :param options: of the driver ``format``
    :param force_share: by default whether ``-U`` was given
    :raises ByreError: with the name in ``where``
    """
    from ..graph.graph import Graph
    from ..opening import open as open_target

    if image_opts is None:
        image_opts = given.has("image-opts")
    if force_share is None:
        force_share = given.has("force-share")
    if image_opts and format:
        raise UsageError("--image-opts and a format option exclude each other: put driver=... into the options")
    target: str | dict[str, object] = name
    if image_opts:
        target = image_options(name)
        if force_share and target.get("force-share", "on") != "on":
            raise UsageError("--force-share/-U conflicts with the image options")
    if options:
        target, format = unflatten({"driver": format, "filename": name, **options}), ""
    graph = graph or Graph()
    given.furnish(graph)
    try:
        image = open_target(
            target,
            format=format,
            read_only=read_only,
            cache=cache,
            discard=discard,
            detect_zeroes=detect_zeroes,
            force_share=force_share,
            backing=backing,
            no_io=no_io,
            check=check,
            exclusive=exclusive,
            resizable=resizable,
            policy=policy(given) if policy_override is None else policy_override,
            graph=graph,
            secrets=given.secrets(),
        )
    except ByreError as error:
        error.where = error.where or name
        raise
    warn_graph(graph)
    return image


def warn_graph(graph: Graph) -> None:
    """Print what opening had to say; not under the name of a program that says nothing there."""
    if not as_peer():
        for message in graph.warnings:
            warn(message)
    sys.stderr.write("".join(f"{printable(message)}\n" for message in graph.repairs))
    graph.warnings.clear()
    graph.repairs.clear()


# -- -o key=value ---------------------------------------------------------------------------------


def create_options(texts: Iterable[str]) -> dict[str, str] | None:
    """The options of all ``-o`` together, later ones replacing earlier ones; ``None`` if help was asked for.

    :raises InvalidArgument: an option list that is not key=value,...
    """
    result: dict[str, str] = {}
    wants_help = False
    for text in texts:
        if not text or text.startswith(",") or (len(text) - len(text.rstrip(","))) % 2:
            raise InvalidArgument(f"invalid option list: {text}")
        values = parse_keyval(text)
        for word in ("help", "?"):
            wants_help |= values.get(word) == "on"
        result.update(values)
    return None if wants_help else result


def option_line(option: Option) -> str:
    """What ``-o help`` says about one option."""
    kinds = {"bool": "bool (on/off)", "int": "num", "size": "size"}
    left = f"{option.name}=<{kinds.get(option.type, 'str')}>"
    return f"  {left:<22} - {option.help}"


def print_create_options(format: str, declared: OptionSet, *, complete: bool) -> None:
    """The list that ``-o help`` prints.

    :param complete: a target was named, so the options of its protocol are among them
    """
    lines = ["Supported options:" if complete else f"Supported {format} options:"]
    own = [o for o in declared.options if complete or o.name not in _FILE_OPTIONS]
    if format == "raw" and not complete:
        own = [option for option in own if option.name == "size"]
    for option in sorted(own, key=lambda each: each.name):
        lines.append(option_line(option))
    if not complete:
        lines += ["", "The protocol level may support further options.",
                  "Specify the target filename to include those options."]  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
