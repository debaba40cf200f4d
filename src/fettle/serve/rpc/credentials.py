"""TLS of the gRPC port, from the same files as that of HTTP."""

from __future__ import annotations

import grpc

from fettle.serve.options import ServeOptions


def credentials_of(options: ServeOptions) -> grpc.ServerCredentials | None:
    """None for a port in the clear. The files were checked when the HTTP ports took them."""
    if options.tls_certificate is None or options.tls_key is None:
        return None
    authority = None if options.tls_client_ca is None else options.tls_client_ca.read_bytes()
    pair = (options.tls_key.read_bytes(), options.tls_certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
