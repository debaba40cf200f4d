"""What the options say of where and for whom to be open: certificates and keys, then sockets, with clear errors."""

from __future__ import annotations

import logging
import socket

from fettle.core.errors import UsageError
from fettle.serve.guard import is_loopback
from fettle.serve.key_file import KeyFile
from fettle.serve.listener import bind
from fettle.serve.options import ServeOptions
from fettle.serve.tls import Certificates

_log = logging.getLogger("fettle.serve")


def tls_of(options: ServeOptions) -> Certificates | None:
    """For all ports; None for plain HTTP. Raises UsageError."""
    if options.tls_certificate is None or options.tls_key is None:
        return None
    return Certificates(options.tls_certificate, options.tls_key, options.tls_client_ca)


def keys_of(options: ServeOptions) -> KeyFile | None:
    """The keys to ask for. Raises UsageError where they cannot be had, or leave the admin port to nobody."""
    if options.keys is None:
        if not is_loopback(options.host):
            _log.warning(
                "anyone who reaches %s may use this server: it has no API keys; make one with `fettle keys add`",
                options.host,
            )
        return None
    keys = KeyFile(options.keys)
    if options.admin_port is not None and not keys.keys.may("admin"):
        raise UsageError(f"admin_port needs a key with the action 'admin', and {options.keys} has none")
    return keys


def sockets_of(options: ServeOptions) -> list[socket.socket]:
    """The public port, then the admin port where there is one. Raises UsageError, and leaves none open then."""
    public = bind(options.host, options.port)
    if options.admin_port is None:
        return [public]
    try:
        return [public, bind(options.admin_host, options.admin_port)]
    except UsageError:
        public.close()
        raise


def admin_hosts(options: ServeOptions) -> list[str]:
    """The names by which the admin port may be called, besides those of this machine itself."""
    everywhere = options.admin_host in ("0.0.0.0", "::", "")
    return [*options.admin_names, *([] if everywhere else [options.admin_host])]
