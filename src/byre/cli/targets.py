"""What ``mirror`` and ``backup`` share: the options about their target, making and opening it, running the job.

The target is opened in the graph of the source, for the job moves data between nodes of one graph.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ..errors import ByreError, InvalidArgument, NotSupported
from ..units import SECTOR, align_up
from . import common
from .create import declared_options
from .progress import Display, mode_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..graph.node import Node
    from ..image import Image
    from ..jobs.convert import MadeFiles
    from ..jobs.job import Job

__all__ = ["ERROR_SWITCHES", "TARGET_SWITCHES", "Target", "Watch", "error_policies", "print_options", "record_backing"]

TARGET_SWITCHES: Final = (
    common.Switch("output-format", "O", "target-format", "FMT", "format of the target; the source's if not given"),
    common.Switch("options", "o", "target-format-options", "KEY=VALUE,...", "creation options; -o help lists them"),
    common.Switch("no-create", "n", "no-create", "", "the target exists: fill it"),
    common.Switch("cache", "t", "cache", "CACHE", "cache mode of the target (writeback)"),
    common.SOURCE_CACHE,
    common.Switch("rate", "r", "speed", "RATE", "bytes per second"),
)
ERROR_SWITCHES: Final = (
    common.Switch("on-error", "", "on-error", "POLICY", "what to do about errors (below)"),
    common.Switch("on-source-error", "", "on-source-error", "POLICY", "about errors while reading the source"),
    common.Switch("on-target-error", "", "on-target-error", "POLICY", "about errors while writing the target"),
    *common.JOURNAL,
    common.PROGRESS,
    common.Switch("progress-kind", "", "progress", "bar|text|json", "how to show the progress"),
    common.QUIET,
    common.IMAGE_OPTS._replace(help="the source is key=value,... instead of a file name"),
    common.OBJECT,
    common.FORCE_SHARE,
)
_PAUSE: Final = 5.0
"""Seconds until a job that an error stopped tries again."""


def print_options(given: common.Given) -> None:
    """What ``-o help`` prints."""
    name = given.last("output-format", "qcow2")
    common.print_create_options(name, declared_options(name), complete=len(given.positional) > 1)


def error_policies(given: common.Given) -> tuple[str, str]:
    """What to do about errors of the source, and of the target."""
    from ..jobs.errors_policy import check_policy

    both = given.last("on-error", "report")
    return check_policy(given.last("on-source-error", both)), check_policy(given.last("on-target-error", both))


def record_backing(options: dict[str, str], layer: Node) -> None:
    """A new target is to lie over ``layer``, an open backing file of the source."""
    from ..graph.opening import has_protocol

    name = layer.filename
    options["backing_file"] = name if has_protocol(name) else os.path.abspath(name)
    options["backing_fmt"] = layer.driver


class Target:
    """The image that a job fills: made first, unless it exists; removed again if the job fails.

    A context manager around making, opening and the job.
    """

    def __init__(self, given: common.Given, source: Image, options: dict[str, str]) -> None:
        self._given = given
        self._source = source
        self._options = options
        self._name = given.positional[-1]
        self._journal = common.journal_path(given)
        #: What another run has begun is there already, and stays for the next one if this one fails.
        self._resumed = given.has("resume") and os.path.exists(self._journal)
        if self._journal:
            self._check_journal()
        #: Made by this run or the one before.
        self._ours = not given.has("no-create")
        self._new = self._ours and not self._resumed
        self._format = given.last("output-format", source.format if self._ours else "")
        self._made: MadeFiles | None = None
        self._image: Image | None = None

    def _check_journal(self) -> None:
        """:raises ByreError: there is none to go on with, or one that is not to be; before anything is made"""
        from ..jobs.journal import Journal

        if self._resumed:
            Journal.open(self._journal).close()
        else:
            Journal.check_absent(self._journal)
            if os.path.abspath(self._journal) == os.path.abspath(self._name):
                raise InvalidArgument("the journal and the target are one file", where=self._name)

    def __enter__(self) -> Image:
        from ..jobs.convert import MadeFiles, check_not_source

        check_not_source([self._source], self._name)
        if self._new:
            self._check_backing()
            self._made = MadeFiles(self._name, self._options, self._companions())
        try:
            if self._made is not None:
                self._create()
                self._made.begun = True
            self._image = self._open()
            return self._image
        except BaseException as error:
            self._remove(error)
            raise

    def _check_backing(self) -> None:
        """:raises NotSupported: the format has none, but is to"""
        if "backing_file" in self._options and "backing_file" not in declared_options(self._format):
            raise NotSupported(f"backing file not supported for file format {self._format!r}",
                               hint="choose another with -O")  # fmt: skip

    def _creation(self) -> dict[str, object]:
        return {**self._options, "size": align_up(self._source.size, SECTOR)}

    def _companions(self) -> list[str]:
        """Files that the target consists of, besides the one the user names."""
        from ..graph.creating import companions

        return companions(self._format, self._name, self._creation())

    def _create(self) -> None:
        from ..graph.creating import create

        try:
            create(self._name, self._format, options=self._creation(),
                   policy=common.policy(self._given), secrets=self._given.secrets())  # fmt: skip
        except ByreError as error:
            error.where = error.where or self._name
            raise

    def _open(self) -> Image:
        policy = common.policy(self._given)
        if self._ours:
            # What the user put into the target is his word.
            names = [self._options["backing_file"]] if self._options.get("backing_file") else []
            names += self._companions()
            policy = policy._replace(named=tuple((self._name, name) for name in names))
        return common.open_image(
            self._name, self._given, format=self._format, image_opts=False, read_only=False,
            cache=self._given.last("cache", "writeback"), force_share=False, policy_override=policy,
            graph=self._source.graph,
            options={key: value for key, value in self._options.items() if key.endswith("key-secret")},
        )  # fmt: skip

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if self._image is not None:
                self._image.close()
        except ByreError as failed:
            if error is None:
                self._remove(failed)
                raise
        if error is not None:
            self._remove(error)

    def _remove(self, error: BaseException) -> None:
        if self._journal and os.path.exists(self._journal):
            common.warn(f"{self._name} is kept: the same command with --resume goes on")
        elif self._made is not None:
            left = self._made.remove(error)
            if left:
                common.warn(left)
        elif self._image is not None and any(self._image.node.stats.operation_count[1:3]):
            common.warn(f"{self._name} is only partly overwritten")


class Watch:
    """Runs a job in the foreground, with its progress. A job that an error stopped tries again every few seconds."""

    def __init__(self, given: common.Given) -> None:
        kind = given.last("progress-kind")
        if kind not in ("", "bar", "text", "json"):
            raise common.UsageError("--progress must be bar, text or json")
        self.given = given
        self._mode = mode_for(given.has("progress"), kind, given.has("quiet"))
        self.rate = common.size_argument(given.last("rate"), "speed") if given.has("rate") else 0

    def run(self, job: Job, ready: Callable[[], None] | None = None) -> None:
        """:param ready: called when the job is READY
        :raises ByreError: the job failed
        """
        from ..jobs.states import State

        def changed(_job: Job, state: State) -> None:
            if state is State.READY and ready is not None:
                ready()

        job.on_change = changed
        job.on_error_event = self._error
        with Display(job.control, job.kind, self._mode):
            job.execute()

    def _error(self, job: Job, _operation: str, action: str, error: ByreError) -> None:
        if action == "ignore":
            common.warn(f"{error}; going on")
        if action != "stop":
            return
        common.warn(f"stopped: {error}; trying again in {_PAUSE:g} seconds")
        import threading

        timer = threading.Timer(_PAUSE, self._resume, (job,))
        timer.daemon = True
        timer.start()

    @staticmethod
    def _resume(job: Job) -> None:
        try:
            job.resume()
        except (ByreError, InvalidArgument):
            pass  # it goes on already, or has ended
