"""``convert``: copy images into a new one of any format, or into an existing one (``-n``)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from ..catalog import driver
from ..errors import ByreError, InvalidArgument, NotSupported
from ..profiles import profile
from ..units import SECTOR, align_up
from . import common
from .create import declared_options
from .progress import Display, mode_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..graph.opening import Policy
    from ..image import Image
    from ..jobs.blockcopy import CopySettings

__all__ = ["HELP", "run"]

_TABLE: Final = (
    common.FORMAT._replace(help="format of the input; probed if it is not given"),
    common.Switch("output-format", "O", "target-format", "FMT", "format of the output; raw if it is not given"),
    common.Switch("for", "", "for", "NAME", "make an image that this place takes (below)"),
    common.Switch("compress", "c", "compress", "", "write compressed clusters"),
    common.Switch("level", "", "level", "N", "how hard to compress: 1 to 9 (zlib), 1 to 22 (zstd)"),
    common.Switch("offload", "C", "copy-range-offloading", "", "let the system copy from file to file where it can"),
    common.Switch("options", "o", "target-format-options", "KEY=VALUE,...", "creation options; -o help lists them"),
    common.Switch("backing-file", "B", "backing", "FILENAME", "the output becomes an overlay of this file"),
    common.Switch("backing-format", "F", "backing-format", "FMT", "format of the backing file"),
    common.Switch("snapshot", "l", "snapshot", "SNAPSHOT", "convert an internal snapshot (below)"),
    common.Switch("sparse", "S", "sparse-size", "SIZE", "zeroes this long become holes (4k); 0 writes everything"),
    common.Switch("no-create", "n", "no-create", "", "the output exists: fill it"),
    common.Switch("target-is-zero", "", "target-is-zero", "", "the existing output reads as zeroes"),
    common.Switch("target-image-opts", "", "target-image-opts", "", "the output is key=value,... (with -n)"),
    common.Switch("cache", "t", "cache", "CACHE", "cache mode of the output (unsafe)"),
    common.SOURCE_CACHE,
    common.Switch("rate", "r", "rate-limit", "RATE", "bytes per second"),
    common.Switch("parallel", "m", "parallel", "COUNT", "how many requests at once, 1 to 16"),
    common.Switch("out-of-order", "W", "oob-writes", "", "write in any order"),
    common.Switch("salvage", "", "salvage", "", "what cannot be read becomes zeroes, with a warning"),
    common.Switch("bitmaps", "", "bitmaps", "", "copy persistent bitmaps"),
    common.Switch("skip-broken", "", "skip-broken-bitmaps", "", "but not inconsistent ones"),
    common.PROGRESS,
    common.Switch("progress-kind", "", "progress", "bar|text|json", "how to show the progress"),
    common.QUIET,
    common.IMAGE_OPTS,
    common.OBJECT,
    common.FORCE_SHARE,
)

HELP: Final = f"""\
usage: byre convert [OPTIONS] FILENAME... OUTPUT_FILENAME
Copy an image, or several one behind the other, into OUTPUT_FILENAME.

{common.option_help(_TABLE)}
SNAPSHOT is an id or a name, or snapshot.id=ID,snapshot.name=NAME.
--for chooses format, options and a virtual size that azure, hyperv, esxi, virtualbox, aws, gcp or proxmox accept; -o
may add to it. For gcp, an output named *.tar.gz becomes the archive that is imported. 'byre lint --for NAME' checks."""

MAX_SPARSE: Final = 16 << 20
MAX_PARALLEL: Final = 16


def run(arguments: list[str]) -> int:
    given = common.parse(_TABLE, arguments)
    options = common.create_options(given.all("options"))
    if options is None:
        _print_options(given)
        return 0
    _check_combinations(given)
    settings = _settings(given)
    if len(given.positional) < 2:
        raise common.UsageError("must specify the input and the output image file name")
    if given.has("snapshot"):
        from .snapshot import check_snapshot

        check_snapshot(given.last("snapshot"))
    if given.has("snapshot") and len(given.positional) > 2:
        raise InvalidArgument("a snapshot cannot be concatenated with other images")
    if given.has("bitmaps") and len(given.positional) > 2:
        raise InvalidArgument("copying bitmaps is only possible with a single source")
    mode = mode_for(given.has("progress"), given.last("progress-kind"), given.has("quiet"))
    rate = common.size_argument(given.last("rate"), "rate limit") if given.has("rate") else 0
    _check_cache(given.last("cache", "unsafe"), "cache")
    _check_cache(given.last("source-cache", "writeback"), "source cache")
    sources: list[Image] = []
    try:
        for name in given.positional[:-1]:
            sources.append(common.open_image(name, given, format=given.last("format"),
                                             cache=given.last("source-cache", "writeback")))  # fmt: skip
        if given.has("snapshot"):
            from .snapshot import load_snapshot

            load_snapshot(sources[0], given.last("snapshot"))
        if given.has("bitmaps"):
            from ..jobs.convert import check_bitmaps

            check_bitmaps(sources[0], skip_broken=given.has("skip-broken"))
        _Conversion(given, options, settings, sources, mode, rate).run()
    finally:
        for image in reversed(sources):
            image.close()
    return 0


def _print_options(given: common.Given) -> None:
    if given.has("target-image-opts") and not given.has("output-format"):
        raise common.UsageError("option help requires a format be specified")
    name = given.last("output-format", "raw")
    common.print_create_options(name, declared_options(name), complete=len(given.positional) > 1)


def _check_combinations(given: common.Given) -> None:
    """:raises UsageError: options that exclude or need each other"""
    for condition, message in (
        (given.has("skip-broken") and not given.has("bitmaps"), "use of --skip-broken-bitmaps requires --bitmaps"),
        (given.has("compress") and given.has("offload"), "cannot enable copy offloading when -c is used"),
        (given.has("sparse") and given.has("offload"), "cannot enable copy offloading when -S is used"),
        (given.has("salvage") and given.has("offload"), "cannot use copy offloading in salvaging mode"),
        (given.has("target-image-opts") and not given.has("no-create"), "--target-image-opts requires use of -n flag"),
        (given.has("options") and given.has("no-create"), "-o has no effect when skipping image creation"),
        (given.has("target-is-zero") and not given.has("no-create"), "--target-is-zero requires use of -n flag"),
        (given.has("level") and not given.has("compress"), "--level needs -c"),
        (given.has("for") and given.has("no-create"), "--for has no effect when skipping image creation"),
        (given.last("progress-kind", "text") not in ("bar", "text", "json"), "--progress must be bar, text or json"),
    ):
        if condition:
            raise common.UsageError(message)


def _settings(given: common.Given) -> CopySettings:
    from ..jobs.blockcopy import CopySettings

    sparse = 4096
    if given.has("sparse"):
        sparse = common.size_argument(given.last("sparse"), "buffer size for sparse output")
        if sparse % SECTOR or sparse > MAX_SPARSE:
            raise InvalidArgument(
                f"invalid buffer size for sparse output: {sparse}",
                hint=f"multiples of {SECTOR} up to {MAX_SPARSE} are valid; 0 writes everything",
            )
    return CopySettings(
        sparse=sparse,
        compress=given.has("compress"),
        level=_number(given, "level", "compression level", 1, 22) if given.has("level") else 0,
        in_order=not given.has("out-of-order"),
        threads=_number(given, "parallel", "number of parallel requests", 1, MAX_PARALLEL)
        if given.has("parallel")
        else 0,
        offload=given.has("offload"),
        salvage=_salvage_warning(given),
    )


def _salvage_warning(given: common.Given) -> Callable[[str], None] | None:
    """What is told, by whatever thread, of sectors that cannot be read; ``None`` to fail there."""
    if not given.has("salvage"):
        return None
    return _say_nothing if given.has("quiet") else partial(common.warn, program=common.PROGRAM.get())


def _say_nothing(_message: str) -> None:
    pass


def _number(given: common.Given, key: str, what: str, least: int, most: int) -> int:
    text = given.last(key)
    try:
        number = int(text, 0)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise InvalidArgument(f"invalid {what} {text!r}: allowed are {least} to {most}")
    return number


def _check_cache(mode: str, what: str) -> None:
    from ..opening import CACHE_MODES

    if mode not in CACHE_MODES:
        raise InvalidArgument(f"invalid {what} option {mode!r}: expected one of {', '.join(CACHE_MODES)}")


class _Conversion:
    """Make or open the target, copy, and tidy up if that fails."""

    def __init__(self, given: common.Given, options: dict[str, str], settings: CopySettings, sources: list[Image],
                 mode: str, rate: int) -> None:  # fmt: skip
        self.given = given
        self.options = options
        self.settings = settings
        self.sources = sources
        self.mode = mode
        self.rate = rate
        self.output = given.positional[-1]
        self.place = profile(given.last("for")) if given.has("for") else None
        self.format = self._format()
        self.new = not given.has("no-create")
        self.size = sum(align_up(image.size, SECTOR) for image in sources)
        if self.place is not None:
            self.options = {**dict(self.place.options), **options}
            self.size = align_up(self.size, self.place.alignment)

    def _format(self) -> str:
        """:raises UsageError: the place takes another format than the one given"""
        given, place = self.given, self.place
        if place is None:
            return given.last("output-format", "" if given.has("target-image-opts") else "raw")
        name = given.last("output-format", place.format)
        if driver(name).name != place.format:
            raise common.UsageError(f"--for {place.name} writes {place.format}, not {name}")
        return place.format

    def run(self) -> None:
        if self.place is not None and self.place.name == "gcp" and self.output.endswith(".tar.gz"):
            self._pack()
            return
        self._run()
        if self.place is not None and self.place.solid:
            from .delivery import fill_holes

            fill_holes(self.output)

    def _pack(self) -> None:
        """Convert into a raw file beside the output, and pack that."""
        import os

        from ..jobs.job import Control
        from .delivery import pack

        archive, self.output = self.output, f"{self.output}.{os.getpid()}.raw"
        try:
            self._run()
            control = Control()
            with Display(control, "pack", self.mode):
                pack(self.output, archive, control)
        finally:
            if os.path.exists(self.output):
                os.unlink(self.output)

    def _run(self) -> None:
        from ..jobs.convert import MadeFiles, check_not_source

        if not self.given.has("target-image-opts"):
            check_not_source(self.sources, self.output)
        over_backing = self._settle_backing()
        if not self.new:
            self._copy(over_backing)
            return
        self._check_new()
        if self._is_sink():
            self._copy_to_sink(over_backing)
            return
        made = MadeFiles(self.output, self.options, self._companions())
        try:
            self._create()
            made.begun = True
            self._copy(over_backing)
        except BaseException as error:
            left = made.remove(error)
            if left:
                common.warn(left)
            raise

    def _settle_backing(self) -> bool:
        """Put -B and -F into the options; whether the target has a backing file."""
        given, options = self.given, self.options
        declared = declared_options(self.format) if self.new else ()
        for key, name, what in (
            ("backing-file", "backing_file", "backing file"),
            ("backing-format", "backing_fmt", "backing format"),
        ):
            if given.has(key) and self.new:
                if name not in declared:
                    raise NotSupported(f"{what} not supported for file format {self.format!r}")
                options[name] = given.last(key)
        over_backing = bool(options.get("backing_file") if self.new else given.last("backing-file"))
        if not over_backing:
            return False
        if given.has("target-is-zero"):
            raise InvalidArgument("cannot use --target-is-zero when the destination image has a backing file")
        if len(self.sources) > 1:
            raise InvalidArgument("a backing file for the target makes no sense when concatenating input images")
        if self.new and "backing_fmt" not in options:
            raise InvalidArgument("use of a backing file requires an explicit backing format", hint="use -F")
        return True

    def _check_new(self) -> None:
        """Refuse before anything is written."""
        if self.settings.compress:
            declared = declared_options(self.format)
            if not (any(option.name.startswith("compress") for option in declared.options)
                    or getattr(driver(self.format).load(), "CAN_COMPRESS", False)):  # fmt: skip
                raise NotSupported("compression not supported for this file format", where=self.output)
            if self.options.get("encryption") == "on" or "encrypt.format" in self.options:
                raise NotSupported("compression and encryption not supported at the same time")
            if self.options.get("preallocation", "off") != "off":
                raise NotSupported("compression and preallocation not supported at the same time")

    def _is_sink(self) -> bool:
        """Whether the output is a pipe; "-" means standard output, but for scripts that know it as a file name."""
        from ..protocols.sink import is_sink

        return is_sink(self.output) or (self.output == "-" and not common.as_peer())

    def _copy_to_sink(self, over_backing: bool) -> None:
        """Write the new image from beginning to end, without looking back."""
        from ..graph.graph import Graph
        from ..image import Image
        from ..jobs.convert import ConvertJob
        from ..protocols.sink import Sink

        module = driver(self.format).load()
        if not hasattr(module, "open_stream"):
            raise NotSupported(f"images of format {self.format!r} cannot be written to a pipe", where=self.output,
                               hint="vmdk with subformat=streamOptimized can")  # fmt: skip
        if self.mode != "none" and self.output == "-":
            raise common.UsageError("-p cannot be used when the image goes to standard output")
        options = {**self.options, "size": self.size}
        values = declared_options(self.format).parse(options, what=f"format {self.format!r}")
        with Sink(self.output) as sink:
            graph = Graph()
            node = module.open_stream(sink.write, values, self.output)
            graph.add(node)
            with Image(node, graph, read_only=False) as target:
                job = ConvertJob(self.sources, target, self.settings, target_is_new=True, over_backing=over_backing,
                                 speed=self.rate, measure=self.mode != "none")  # fmt: skip
                with Display(job.control, "convert", self.mode):
                    job.execute()
            node.finish()

    def _companions(self) -> list[str]:
        """Files that the target consists of, besides the one the user names."""
        from ..graph.creating import companions

        return companions(self.format, self.output, {**self.options, "size": self.size})

    def _create(self) -> None:
        from ..graph.creating import create

        try:
            create(self.output, self.format, options={**self.options, "size": self.size},
                   policy=common.policy(self.given), secrets=self.given.secrets())  # fmt: skip
        except ByreError as error:
            error.message = f"error while converting to {driver(self.format).name}: {error.message}"
            error.where = error.where or self.output
            raise

    def _target_policy(self) -> Policy:
        """The user named the files of a target that was just made; what those name is not his word."""
        from ..graph.opening import parse_filename

        images = {self.output, str(parse_filename(self.output).get("filename", ""))}
        names = [self.options["backing_file"]] if self.options.get("backing_file") else []
        names += self._companions()
        return common.policy(self.given)._replace(named=tuple((image, name) for image in images for name in names))

    def _open_target(self) -> Image:
        cache = self.given.last("cache", "unsafe")
        return common.open_image(
            self.output,
            self.given,
            format=self.format,
            image_opts=self.given.has("target-image-opts"),
            read_only=False,
            cache=cache,
            force_share=False,
            resizable=cache in ("none", "off", "directsync"),
            discard="unmap" if self.settings.sparse else "ignore",
            policy_override=self._target_policy() if self.new else None,
            # What was just encrypted is opened with the same key.
            options={key: value for key, value in self.options.items() if key.endswith("key-secret")},
        )

    def _copy(self, over_backing: bool) -> None:
        from ..jobs.convert import ConvertJob, check_bitmap_target, copy_bitmaps

        bitmaps = self.given.has("bitmaps")
        with self._open_target() as target:
            if bitmaps:
                check_bitmap_target(target)
            job = ConvertJob(
                self.sources,
                target,
                self.settings,
                target_is_new=self.new,
                target_is_zero=self.given.has("target-is-zero"),
                over_backing=over_backing,
                speed=self.rate,
                measure=self.mode != "none",
            )
            try:
                with Display(job.control, "convert", self.mode):
                    job.execute()
                if bitmaps:
                    copy_bitmaps(self.sources[0], target, common.warn)
            except BaseException:
                if not self.new:
                    common.warn(f"{self.output} is only partly overwritten")
                raise
