"""amend: options of an existing image are changed where it lies; what each means is the format's business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import NotSupported
from ..formats.abilities import Amendable, HasBitmaps
from ..graph import chain
from .job import Job

if TYPE_CHECKING:
    from ..crypto.secrets import SecretProvider
    from ..image import Image
    from ..options import OptionValues
    from .job import Control

__all__ = ["AmendJob"]

_NAMED: Final = 5
"""Names in a warning at most."""


class AmendJob(Job):
    """Change options of ``image``. Nobody else uses it meanwhile; cancelled, it is intact.

    :param options: of the format's ``AMEND_OPTIONS``
    :param force: allow what destroys data, such as erasing the last key slot
    :param secrets: the passphrases that options name
    :raises NotSupported: the format has no options that could be changed
    """

    kind = "amend"

    def __init__(self, image: Image, options: OptionValues, *, force: bool = False,
                 secrets: SecretProvider | None = None, measure: bool = False) -> None:  # fmt: skip
        super().__init__(measure=measure)
        node = chain.skip_filters(image.node)
        if not isinstance(node, Amendable):
            raise NotSupported(f"Format driver '{node.driver}' does not support option amendment", where=image.filename)
        self._node: Amendable = node
        self.image = image
        self.options = options
        self.force = force
        self.secrets = secrets

    def run(self, control: Control) -> None:
        before = self._bitmaps()
        self._node.amend(self.options, control, force=self.force, secrets=self.secrets)
        self.image.flush()
        lost = sorted(before - self._bitmaps())
        if lost:
            what = "a dirty bitmap was" if len(lost) == 1 else f"{len(lost)} dirty bitmaps were"
            names = ", ".join(map(repr, lost[:_NAMED])) + (", ..." if len(lost) > _NAMED else "")
            self.image.graph.warnings.append(f"{what} removed, which the image's version cannot hold: {names}")

    def _bitmaps(self) -> set[str]:
        """The names of the persistent bitmaps of the image."""
        node = self._node
        if not (isinstance(node, HasBitmaps) and "compat" in self.options):
            return set()
        return {name for name, _, _ in node.bitmap_store().entries()}
