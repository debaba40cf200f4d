"""HTTPS from files: the server's certificate, and the authority that clients' certificates must come from."""

from __future__ import annotations

import ssl
from pathlib import Path

from fettle.core.errors import UsageError


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
