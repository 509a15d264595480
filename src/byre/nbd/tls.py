"""TLS for NBD: credentials in the peer's directory layout, contexts for both sides, and a stream several threads use.

Owns what ``--object tls-creds-x509,...`` and ``tls-creds-psk,...`` mean, and the files they name. Who may do what once
the certificate is verified is :mod:`.authorization`'s.
"""

from __future__ import annotations

import os
import ssl
import threading
from time import monotonic
from typing import TYPE_CHECKING, Final, NamedTuple

from ..crypto.secrets import find_text_secret
from ..errors import AccessDenied, InvalidArgument, NotFound, NotSupported, ProtocolError, from_oserror, printable
from ..options import Option, OptionSet, flatten, parse_json, parse_keyval

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping, Sequence

    from ..crypto.secrets import SecretProvider

__all__ = ["CREDENTIAL_TYPES", "Credentials", "TlsStream", "client_context", "distinguished_name", "server_context"]

CREDENTIAL_TYPES: Final = ("tls-creds-x509", "tls-creds-psk", "tls-creds-anon")
"""The types of ``--object`` that :meth:`Credentials.parse` takes (the last only to refuse it in words)."""

_MAX_FILE: Final = 1 << 20
_MAX_KEY: Final = 512
_RECORD: Final = 1 << 16
_SEND_STEP: Final = 1 << 18

_OPTIONS: Final = OptionSet(
    Option("id", "str", "how other options name it"),
    Option("endpoint", "enum", "which side it is for", "client", ("client", "server")),
    Option("dir", "str", "the folder that holds the files"),
    Option("verify-peer", "bool", "refuse a peer whose certificate the CA did not sign", True),
    Option("passwordid", "str", "the secret that opens the private key"),
    Option("username", "str", "which key of keys.psk a client uses", "qemu"),
    Option("priority", "str", "algorithms, in GnuTLS' words"),
    Option("sanity-check", "bool", "look at the certificates when they are loaded", True),
)


class Credentials(NamedTuple):
    """One ``--object`` that holds TLS credentials.

    :ivar kind: "x509" or "psk"
    :ivar endpoint: "server" or "client": the side it is for
    :ivar directory: holds ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem, client-key.pem, ca-crl.pem,
        or keys.psk
    :ivar verify_peer: the other side must show a certificate that the CA signed
    :ivar username: which line of keys.psk a client uses
    :ivar password_id: the secret that opens the private key, "" if it is not encrypted
    """

    id: str
    kind: str
    endpoint: str
    directory: str
    verify_peer: bool = True
    username: str = "qemu"
    password_id: str = ""

    @classmethod
    def parse(cls, text: str) -> Credentials:
        """The object that ``type,id=...,...`` (or JSON) defines.

        :raises ByreError: malformed, or a type or property that is not supported
        """
        properties = object_properties(text)
        kind = properties.pop("qom-type", "")
        if kind == "tls-creds-anon":
            raise NotSupported("tls-creds-anon is not supported: without certificates or keys anybody can listen in",
                               hint="use tls-creds-x509 or tls-creds-psk")  # fmt: skip
        if kind not in CREDENTIAL_TYPES:
            raise NotSupported(f"objects of type {kind!r} hold no TLS credentials")
        given = _OPTIONS.parse(properties, what=f"object {kind!r}")
        if not given.text("id") or not given.text("dir"):
            raise InvalidArgument(f"object {kind!r} needs an id and a dir")
        if (given.text("priority") or "NORMAL") != "NORMAL":
            raise NotSupported("priority strings are GnuTLS' and are not supported", where=f"object {given.text('id')}")
        return cls(given.word("id"), kind.removeprefix("tls-creds-"), given.word("endpoint"), given.word("dir"),
                   given.flag("verify-peer"), given.word("username"), given.text("passwordid") or "")  # fmt: skip

    def path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def require_endpoint(self, endpoint: str) -> None:
        """:raises InvalidArgument: they are for the other side"""
        if self.endpoint != endpoint:
            raise InvalidArgument(f"Expected TLS credentials for a {endpoint} endpoint")


def object_properties(text: str) -> dict[str, str]:
    """The properties of an ``--object``, its type as ``qom-type``."""
    if not text.startswith("{"):
        return parse_keyval(text, implied="qom-type")
    values = flatten(parse_json(text, "object"))
    return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}


# -- contexts -------------------------------------------------------------------------------------


def server_context(credentials: Credentials, secrets: SecretProvider | None = None) -> ssl.SSLContext:
    """What :class:`TlsStream` needs on the server's side. TLS 1.2 and above.

    :param secrets: where ``password_id`` is looked for
    :raises ByreError: files that are missing, unreadable or do not fit each other; keys where Python cannot do them
    """
    credentials.require_endpoint("server")
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    if credentials.kind == "psk":
        _use_keys(context, credentials)
        return context
    _load_authority(context, credentials, required=True)
    _load_certificate(context, credentials, "server", secrets)
    context.verify_mode = ssl.CERT_REQUIRED if credentials.verify_peer else ssl.CERT_NONE
    return context


def client_context(credentials: Credentials, secrets: SecretProvider | None = None) -> ssl.SSLContext:
    """The same on the client's side: the server's certificate is checked, and its name where one is given to
    :class:`TlsStream`. A client's own certificate is used if the folder has one.

    :raises ByreError: as :func:`server_context`
    """
    credentials.require_endpoint("client")
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    if credentials.kind == "psk":
        _use_keys(context, credentials)
        return context
    _load_authority(context, credentials, required=credentials.verify_peer)
    if os.path.exists(credentials.path("client-cert.pem")):
        _load_certificate(context, credentials, "client", secrets)
    context.check_hostname = credentials.verify_peer
    context.verify_mode = ssl.CERT_REQUIRED if credentials.verify_peer else ssl.CERT_NONE
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # nobody resumes a session: each connection negotiates anew
    return context


def _load_authority(context: ssl.SSLContext, credentials: Credentials, *, required: bool) -> None:
    path = credentials.path("ca-cert.pem")
    if not required and not os.path.exists(path):
        return
    _check_file(path)
    revoked = credentials.path("ca-crl.pem")
    try:
        context.load_verify_locations(path)
        if os.path.exists(revoked):
            _check_file(revoked)
            context.load_verify_locations(revoked)
            context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    except ssl.SSLError as error:
        raise InvalidArgument(f"cannot use the certificates: {_reason(error)}", where=printable(path)) from None
    except OSError as error:
        raise from_oserror(error, "cannot read the certificates", printable(path)) from None


def _load_certificate(
    context: ssl.SSLContext, credentials: Credentials, side: str, secrets: SecretProvider | None
) -> None:
    certificate, key = credentials.path(f"{side}-cert.pem"), credentials.path(f"{side}-key.pem")
    for path in (certificate, key):
        _check_file(path)
    password = find_text_secret(secrets, credentials.password_id) if credentials.password_id else b""
    try:
        # Without a password given, one that is needed must not be asked for on the terminal.
        context.load_cert_chain(certificate, key, lambda: password)
    except (ssl.SSLError, ValueError) as error:
        hint = "" if credentials.password_id else "if the key is encrypted, name its secret with passwordid="
        raise InvalidArgument(f"cannot use certificate and key: {_reason(error)}", where=printable(certificate),
                              hint=hint) from None  # fmt: skip
    except OSError as error:
        raise from_oserror(error, "cannot read certificate and key", printable(certificate)) from None


def _check_file(path: str) -> None:
    """:raises ByreError: ``path`` is no readable file of sensible size"""
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise from_oserror(error, "cannot use the TLS credentials", printable(path)) from None
    if size > _MAX_FILE or not os.path.isfile(path):
        raise InvalidArgument(f"cannot use the TLS credentials: no file of at most {_MAX_FILE} bytes",
                              where=printable(path))  # fmt: skip


def _use_keys(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Pre-shared keys instead of certificates.

    :raises NotSupported: this Python cannot
    """
    use_for_server = getattr(context, "set_psk_server_callback", None)
    use_for_client = getattr(context, "set_psk_client_callback", None)
    if use_for_server is None or use_for_client is None:
        raise NotSupported("pre-shared keys need Python 3.13 or later; this Python's TLS has no support for them",
                           hint="use tls-creds-x509")  # fmt: skip
    keys = _read_keys(credentials.path("keys.psk"))
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Ephemeral Diffie-Hellman first, so that a key that leaks later opens no old session.
    context.set_ciphers("ECDHE-PSK:DHE-PSK:PSK")
    if credentials.endpoint == "server":
        use_for_server(lambda name: keys.get(name or "", b""))
        return
    name = credentials.username
    if name not in keys:
        raise NotFound(f"no key for user {name!r}", where=printable(credentials.path("keys.psk")))
    use_for_client(lambda _hint: (name, keys[name]))


def _read_keys(path: str) -> dict[str, bytes]:
    """Keys by user name: lines of ``name:hexadecimal``."""
    _check_file(path)
    keys: dict[str, bytes] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(_MAX_FILE).splitlines()
    except OSError as error:
        raise from_oserror(error, "cannot read the keys", printable(path)) from None
    for number, line in enumerate(lines, 1):
        name, colon, digits = line.strip().rpartition(":")
        if not line.strip() or line.startswith("#"):
            continue
        try:
            key = bytes.fromhex(digits)
        except ValueError:
            key = b""
        if not colon or not name or not 0 < len(key) <= _MAX_KEY:
            raise InvalidArgument(f"line {number} is not name:key with a key of 1 to {_MAX_KEY} bytes in hexadecimal",
                                  where=printable(path))  # fmt: skip
        keys[name] = key
    return keys


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)


# -- names ----------------------------------------------------------------------------------------

_SHORT_NAMES: Final = {
    "commonName": "CN", "localityName": "L", "stateOrProvinceName": "ST", "organizationName": "O",
    "organizationalUnitName": "OU", "countryName": "C", "streetAddress": "STREET", "domainComponent": "DC",
    "userId": "UID", "emailAddress": "EMAIL", "serialNumber": "serialNumber", "title": "title",
}  # fmt: skip


def distinguished_name(certificate: Mapping[str, object] | None) -> str:
    """The subject of a verified certificate (``getpeercert()``): ``C=GB,O=Example,CN=laptop.example.com``.

    In the words of RFC 4514, but in the certificate's order, as the peer has it.
    """
    parts: Sequence[Sequence[tuple[str, str]]] = (certificate or {}).get("subject", ())  # type: ignore[assignment]
    return ",".join(
        "+".join(f"{_SHORT_NAMES.get(key, key)}={_escaped(value)}" for key, value in part) for part in parts
    )


def _escaped(value: str) -> str:
    text = "".join("\\" + c if c in ',+"\\<>;' else "\\00" if c == "\0" else c for c in value)
    if text.startswith(("#", " ")):
        text = "\\" + text
    return text[:-1] + "\\ " if text.endswith(" ") and not text.endswith("\\ ") else text


# -- streams --------------------------------------------------------------------------------------


class TlsStream:
    """A TLS session over a connected socket: one thread receives, any number send.

    The session is kept apart from the socket, so that a thread that waits for bytes keeps nobody from sending.
    Guarded by ``_session``: the TLS state, never held during a socket call. Guarded by ``_sending``: the order of
    what goes out.

    OSError passes through: timeouts (``BlockingIOError``, ``TimeoutError``) mean "nothing yet".
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool,
                 server_hostname: str | None = None) -> None:  # fmt: skip
        self.socket = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side,
                                     server_hostname=server_hostname)  # fmt: skip
        self._session = threading.Lock()
        self._sending = threading.Lock()

    def handshake(self, deadline: float | None = None) -> None:
        """Agree on keys and check the other side.

        :param deadline: ``monotonic()`` time by which it must be over; the socket keeps a timeout then
        :raises AccessDenied: the other side's certificate is not accepted, or it does not accept ours
        :raises ProtocolError: what came is not TLS, or came too late
        """
        try:
            while not self._step():
                if deadline is not None:
                    self.socket.settimeout(max(deadline - monotonic(), 0.001))
                data = self.socket.recv(_RECORD)
                if not data:
                    raise ProtocolError("the connection ended during the TLS handshake")
                self._incoming.write(data)
        except TimeoutError:
            raise ProtocolError("the TLS handshake took too long") from None
        except ssl.SSLError as error:
            self._say_why()
            if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE" in str(error.reason):
                raise AccessDenied(f"TLS handshake failed: {_reason(error)}") from None
            raise ProtocolError(f"TLS handshake failed: {_reason(error)}") from None

    def _step(self) -> bool:
        try:
            self._tls.do_handshake()
            done = True
        except ssl.SSLWantReadError:
            done = False
        if self._outgoing.pending:
            self.socket.sendall(self._outgoing.read())
        return done

    def _say_why(self) -> None:
        """Send the alert that tells the other side what was wrong."""
        try:
            if self._outgoing.pending:
                self.socket.sendall(self._outgoing.read())
        except OSError:
            pass

    @property
    def peer_name(self) -> str:
        """The verified other side's distinguished name, "" if it was not asked for a certificate."""
        return distinguished_name(self._tls.getpeercert())

    @property
    def version(self) -> str:
        return self._tls.version() or ""

    def recv_into(self, view: memoryview) -> int:
        """Bytes received into ``view``; 0 once the other side has ended its half.

        :raises ProtocolError: broken records
        """
        while True:
            with self._session:
                try:
                    return self._tls.read(len(view), view)  # type: ignore[return-value]
                except ssl.SSLWantReadError:
                    answer = self._outgoing.pending
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return 0
                except ssl.SSLError as error:
                    raise ProtocolError(f"TLS: {_reason(error)}") from None
            if answer:
                self._flush()  # the other side changed its keys
            data = self.socket.recv(_RECORD)
            with self._session:
                if data:
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()

    def send_all(self, buffers: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send ``buffers`` one behind the other, without anything of another thread in between."""
        with self._sending:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                for start in range(0, len(view), _SEND_STEP):
                    self._send(view[start : start + _SEND_STEP])

    def _send(self, view: memoryview) -> None:
        with self._session:
            try:
                while view:
                    view = view[self._tls.write(view) :]
            except ssl.SSLError as error:
                raise ProtocolError(f"TLS: {_reason(error)}") from None
            data = self._outgoing.read()
        self.socket.sendall(data)

    def _flush(self) -> None:
        with self._sending:
            with self._session:
                data = self._outgoing.read()
            if data:
                self.socket.sendall(data)

    def end(self) -> None:
        """Tell the other side that nothing follows. Best effort; the socket stays open."""
        try:
            with self._session:
                try:
                    self._tls.unwrap()
                except ssl.SSLError:
                    pass
            self._flush()
        except OSError:
            pass
