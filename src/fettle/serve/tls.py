"""HTTPS from files: the server's certificate, and the authority that clients' certificates must come from.

Renewed files are taken while the server runs, as certbot and cert-manager expect.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from fettle.core.errors import UsageError
from fettle.core.files import state_of

_log = logging.getLogger("fettle.serve")


def server_context(certificate: Path, key: Path, client_ca: Path | None = None) -> ssl.SSLContext:
    """What a listener needs for TLS 1.2 and above.

    certificate: PEM, the server's first, then those between it and the authority. key: PEM, without a password.
    client_ca: PEM of the authorities; where given, a client without a certificate of theirs is not spoken to (mTLS).
    Raises UsageError, which names the file, where one is missing, is no PEM, or does not fit the other.
    """
    for what, path in (("certificate", certificate), ("key", key), ("client CA", client_ca)):
        if path is not None:
            _check_readable(what, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, certificate, key)
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError:
            raise UsageError(f"the TLS client CA {client_ca} must hold certificates in PEM") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the files held at one moment, for two implementations of TLS: a context, and PEM.

    client_ca: None where clients need no certificate.
    """

    context: ssl.SSLContext
    key: bytes
    certificate: bytes
    client_ca: bytes | None


class Certificates:
    """The TLS files of a running server, followed; what cannot be used changes nothing.

    latest: what new handshakes use; connections that are open keep what they have. context: for listeners, for as long
    as they live: it hands each handshake on to the latest one, so that no handshake ever sees half of a change.
    Raises UsageError, like `server_context`, where the files cannot be used at first.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._seen = self._used = self._state()
        self.latest = self._load()
        self.context = self.latest.context
        self.context.sni_callback = self._hand_on  # called for each handshake, with and without a name

    def refresh(self) -> None:
        """Look at the files, and take them where they are others than before. Blocks: call it from a thread."""
        state = self._state()
        if state == self._used:
            return
        if state != self._seen:  # a pair is two files: the other may not be there yet, so not before the next look
            self._seen = state
            return
        found, problem = None, None
        try:
            found = self._load()
        except (UsageError, OSError) as error:
            problem = error
        if self._state() != state:
            return
        self._used = state
        if found is None:
            _log.error("the TLS certificate stays as it was: %s", problem)
            return
        self.latest = found
        _log.info("the TLS certificate was read again")

    def _hand_on(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self.latest.context

    def _load(self) -> Loaded:
        return Loaded(
            server_context(self._certificate, self._key, self._client_ca),
            self._key.read_bytes(),
            self._certificate.read_bytes(),
            None if self._client_ca is None else self._client_ca.read_bytes(),
        )

    def _state(self) -> list[tuple[int, ...] | None]:
        return [state_of(path) for path in (self._certificate, self._key, self._client_ca) if path is not None]


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Let the context's next handshakes use these files. Raises UsageError."""

    def no_password() -> str:
        raise UsageError(f"the TLS key {key} must not need a password: nobody is there to type it")

    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as problem:
        if problem.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(f"the TLS key {key} does not belong to the certificate {certificate}") from None
        raise UsageError(f"the TLS certificate {certificate} and key {key} must be PEM: {_why(problem)}") from None


def _check_readable(what: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as problem:
        raise UsageError(f"the TLS {what} {path} cannot be read: {problem.strerror or problem}") from None


def _why(problem: ssl.SSLError) -> str:
    return (problem.reason or "unreadable").replace("_", " ").lower()
