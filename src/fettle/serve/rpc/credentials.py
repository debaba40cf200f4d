"""TLS of the gRPC port, from the same files as that of HTTP, and renewed with it."""

from __future__ import annotations

import grpc

from fettle.serve.tls import Certificates, Loaded


def credentials_of(certificates: Certificates | None) -> grpc.ServerCredentials | None:
    """None for a port in the clear."""
    if certificates is None:
        return None
    used = certificates.latest
    first = _configuration(used)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC before each handshake, on a thread of its own; None where nothing has changed."""
        nonlocal used
        latest = certificates.latest
        if latest is used:
            return None
        used = latest
        return _configuration(latest)

    return grpc.dynamic_ssl_server_credentials(first, changed, require_client_authentication=used.client_ca is not None)


def _configuration(loaded: Loaded) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(loaded.key, loaded.certificate)], loaded.client_ca)
