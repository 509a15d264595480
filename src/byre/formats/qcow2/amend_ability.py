"""The methods that change a qcow2 image as a whole: options, backing file, emptying; see :mod:`.amend` and others.

Apart from them because most commands need none, and those modules load numpy.
"""

from __future__ import annotations

from ...typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from ...crypto.secrets import SecretProvider
    from ...jobs.job import Control
    from ...options import OptionValues
    from .image import Qcow2Node

__all__ = ["WithAmending"]


def _node(ability: WithAmending) -> Qcow2Node:
    return cast("Qcow2Node", ability)


class WithAmending:
    """See :class:`byre.formats.abilities.Amendable`, ``BackingChangeable`` and ``Emptiable``."""

    def amend(self, options: OptionValues, control: Control, *, force: bool = False,
              secrets: SecretProvider | None = None) -> None:  # fmt: skip
        from .amend import amend

        amend(_node(self), options, control, force=force, secrets=secrets)

    def check_backing(self, name: str, format: str) -> None:
        from .header_update import check_backing

        check_backing(_node(self), name, format)

    def change_backing(self, name: str, format: str) -> None:
        from .header_update import change_backing

        change_backing(_node(self), name, format)

    def make_empty(self) -> None:
        from .resizing import make_empty

        make_empty(_node(self))
