"""Compile the `.proto` files into `descriptors.binpb`: `python -m fettle.serve.rpc.generate`, with grpcio-tools."""

from __future__ import annotations

import tempfile
from pathlib import Path

PROTOS = ("open_inference.proto", "health.proto")
_HERE = Path(__file__).parent


def compiled() -> bytes:
    """A FileDescriptorSet of all files, serialized."""
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as aside:
        target = Path(aside) / "set"
        code = protoc.main(["protoc", f"--proto_path={_HERE}", f"--descriptor_set_out={target}", *PROTOS])
        if code:
            raise SystemExit(code)
        return target.read_bytes()


if __name__ == "__main__":
    (_HERE / "descriptors.binpb").write_bytes(compiled())
