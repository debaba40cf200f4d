"""Thousands of damaged calls: each is answered, with a code that is declared, by workers that live on."""

import os
import random
import subprocess
import time

import grpc
import numpy as np
import pytest

from fettle.serve.rpc.messages import ModelInferRequest

SECONDS, CALLS = 10.0, 4000
REFUSED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
DECLARED = REFUSED | {grpc.StatusCode.OK}


def mutated(content, random):
    """The bytes with some changed, cut out, doubled or cut off."""
    octets = bytearray(content)
    for _ in range(random.randint(1, 4)):
        # Mostly near the beginning, where the structure is.
        start = random.randrange((len(octets) if random.random() < 0.3 else min(64, len(octets))) + 1)
        match random.randrange(5):
            case 0 if start < len(octets):
                octets[start] = random.randrange(256)
            case 1:
                del octets[start : start + random.randint(1, 12)]
            case 2:
                octets[start:start] = random.randbytes(random.randint(1, 12))
            case 3:
                octets[start:start] = octets[start : start + random.randint(1, 40)]
            case _ if random.random() < 0.2:
                del octets[start:]
    return bytes(octets) or b"\x00"


def reshaped(rpc, random):
    """A well-formed message whose parts do not fit each other."""
    message = rpc.image_request(raw=random.random() < 0.5)
    tensor = message.inputs[0]
    match random.randrange(7):
        case 0:
            del tensor.shape[:]
            tensor.shape.extend(random.choice([[], [0], [-1, 3, 8, 8], [2**62, 8], [1] * 17, [1, 3, 8, 7], [192]]))
        case 1:
            tensor.datatype = random.choice(["", "FP16", "FP64", "BF16", "BYTES", "INT32", "fp32", "\x00"])
        case 2:
            message.raw_input_contents.append(random.randbytes(random.randrange(1000)))
        case 3:
            message.inputs.add().CopyFrom(tensor)
        case 4:
            tensor.contents.bytes_contents.append(b"x")
        case 5:
            message.outputs.add(name=random.choice(["", "logits", "nope", "x" * 500])).parameters["a"].int64_param = 1
        case _:
            tensor.parameters["shared_memory_region"].string_param = "r"
            del message.raw_input_contents[:]
    return message.SerializeToString()


def workers_of(server):
    found = subprocess.run(["pgrep", "-P", str(server.process.pid)], capture_output=True, text=True, check=False)
    return sorted(int(line) for line in found.stdout.split())


def resident_kib(pids):
    """Of all processes together."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/status") as file:
            total += int(next(line for line in file if line.startswith("VmRSS")).split()[1])
    return total


@pytest.mark.slow
def test_no_damaged_message_is_answered_by_more_than_a_refusal(rpc, serving):
    seed = int(os.environ.get("FETTLE_FUZZ_SEED", "0"))
    chance = random.Random(seed)
    good = [rpc.image_request(raw=raw, id="a").SerializeToString() for raw in (True, False)]
    workers = workers_of(serving)
    codes, memory = {}, []
    end = time.monotonic() + SECONDS
    with rpc.Client(serving.grpc) as client:
        infer = client.callable("ModelInfer")
        for part in range(8):
            for _ in range(CALLS // 8):
                if time.monotonic() > end:
                    break
                content = mutated(chance.choice(good), chance) if chance.random() < 0.7 else reshaped(rpc, chance)
                call = infer.future(content, timeout=20)
                code, details = call.code(), call.details()
                assert code in DECLARED, (seed, part, code, details, content)
                assert ".py" not in details
                codes[code] = codes.get(code, 0) + 1
            memory.append(resident_kib([serving.process.pid, *workers]))
        answer = client.infer(rpc.image_request(1.0))
    np.testing.assert_allclose(rpc.arrays_of(answer)["logits"], [[5.0] * 3], rtol=1e-5)
    assert workers_of(serving) == workers
    assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 200
    assert memory[-1] - memory[1] < 20_000


def test_large_hostile_messages_leave_workers_and_health_alone(rpc, serving):
    def field(number, content):
        size, octets = len(content), [number << 3 | 2]
        while size > 127:
            octets.append(size & 127 | 128)
            size >>= 7
        return bytes([*octets, size]) + content

    name = field(1, b"tiny")
    shape = field(3, b"\x01\x03\x08\x08")
    tensor = field(1, b"x") + field(2, b"FP32") + shape
    hostile = [
        name + field(5, b"") * 900_000,
        name + field(5, field(3, b"\x01" * 1_800_000)),
        name + field(4, field(1, b"k")) * 300_000,
        name + field(5, tensor + field(5, field(8, b"") * 900_000)),
        name + field(5, tensor + field(5, field(6, bytes(1_800_000)))),
        name + field(7, b"") * 900_000,
        bytes(1_900_000),
        b"\x2a" * 1_900_000,
    ]
    workers = workers_of(serving)
    with rpc.Client(serving.grpc) as client:
        for content in hostile:
            calls = [client.callable("ModelInfer").future(content, timeout=30) for _ in range(2)]
            assert client.call("ServerReady", timeout=10).ready
            for call in calls:
                assert call.exception(timeout=40).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert client.infer(rpc.image_request()).model_name == "tiny"
    assert workers_of(serving) == workers


def test_every_truncation_of_a_call_is_refused(rpc, serving):
    content = rpc.image_request().SerializeToString()
    assert ModelInferRequest.FromString(content)
    with rpc.Client(serving.grpc) as client:
        for size in [*range(60), *range(60, len(content), 37)]:
            assert client.refused("ModelInfer", content[:size]).code() in REFUSED
