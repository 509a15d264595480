"""amend: options of an existing image are changed where it lies; what each means is the format's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import NotSupported
from ..formats.abilities import Amendable
from ..graph import chain
from .job import Job

if TYPE_CHECKING:
    from ..crypto.secrets import SecretProvider
    from ..image import Image
    from ..options import OptionValues
    from .job import Control

__all__ = ["AmendJob"]


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
        self._node.amend(self.options, control, force=self.force, secrets=self.secrets)
        self.image.flush()
