"""Which code of gRPC says what a status of HTTP says: the one table for all refusals.

413 is RESOURCE_EXHAUSTED because gRPC itself answers a message that is too large so; what can be tried again (429 and
503) has `retry-after` in its trailing metadata, in seconds, and 413 has not.
"""

from __future__ import annotations

import grpc

CODES: dict[int, grpc.StatusCode] = {
    200: grpc.StatusCode.OK,
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def code_of(status: int) -> grpc.StatusCode:
    """The code for a status; what has no other meaning is the client's fault from 400 on and ours from 500 on.

    >>> code_of(429).name, code_of(431).name, code_of(507).name
    ('RESOURCE_EXHAUSTED', 'INVALID_ARGUMENT', 'INTERNAL')
    """
    other = grpc.StatusCode.INVALID_ARGUMENT if 400 <= status < 500 else grpc.StatusCode.INTERNAL
    return CODES.get(status, other)
