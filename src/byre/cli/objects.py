"""What ``--object`` defines: secrets, throttle groups, TLS credentials, authorizations; loaded where one is given."""

from __future__ import annotations

from ..errors import InvalidArgument
from ..options import parse_json, parse_keyval
from ..typing import TYPE_CHECKING
from .common import as_peer, warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..crypto.secrets import Secret
    from ..filters.throttle_group import ThrottleGroup
    from ..graph.graph import Graph
    from ..nbd.authorization import Authorization
    from ..nbd.tls import Credentials

    Object = Secret | ThrottleGroup | Credentials | Authorization
    Objects = Mapping[str, tuple[str, Object]]

__all__ = ["furnish", "hide_secrets", "parse_objects", "secrets"]


def parse_objects(texts: Sequence[str]) -> dict[str, tuple[str, Object]]:
    """(definition, object) by id.

    :raises ByreError: a malformed definition, another type of object, or an id defined twice
    """
    found: dict[str, tuple[str, Object]] = {}
    for text in texts:
        id, made = _parse_object(text)
        if id in found:
            raise InvalidArgument(f"object {id!r} is defined twice")
        found[id] = text, made
    return found


def _parse_object(text: str) -> tuple[str, Object]:
    """(id, object) for the definition in ``text``."""
    if "throttle-group" in text or "tls-creds" in text or "authz" in text:
        kind = str(parse_json(text, "object").get("qom-type")) if text.startswith("{") \
            else parse_keyval(text, implied="qom-type").get("qom-type", "")  # fmt: skip
        if kind == "throttle-group":
            from ..filters.throttle_group import ThrottleGroup

            group = ThrottleGroup.parse(text)
            return group.name, group
        if kind.startswith("tls-creds-"):
            from ..nbd.tls import Credentials

            credentials = Credentials.parse(text)
            return credentials.id, credentials
        if kind.startswith("authz-"):
            from ..nbd.authorization import Authorization

            authorization = Authorization.parse(text)
            return authorization.id, authorization
    from ..crypto.secrets import Secret

    secret = Secret.parse(text)
    return secret.id, secret


def secrets(objects: Objects) -> dict[str, Secret]:
    """The secrets among ``objects``, by id."""
    from ..crypto.secrets import Secret

    return {id: made for id, (_, made) in objects.items() if isinstance(made, Secret)}


def furnish(graph: Graph, objects: Objects) -> None:
    """Give ``graph`` what its nodes find by id: the throttle groups and TLS credentials among ``objects``."""
    from ..filters.throttle_group import ThrottleGroup
    from ..nbd.tls import Credentials

    for id, (_, made) in objects.items():
        if isinstance(made, ThrottleGroup):
            graph.throttle_groups[id] = made
        elif isinstance(made, Credentials):
            graph.tls_credentials[id] = made


def hide_secrets(objects: Objects) -> None:
    """Secrets written on the command line are taken out of what the system shows of it, and out of core dumps."""
    exposed = [text for text, made in objects.values() if getattr(made, "exposed", False)]
    if not exposed:
        return
    from ..crypto.secrets import hide_arguments, protect_memory

    hide_arguments(exposed)
    protect_memory()
    if not as_peer():
        warn("data= shows a secret to everyone who lists processes as this one starts; use file=PATH or file=env:NAME")
