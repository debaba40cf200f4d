"""A conformance suite for any server of the Open Inference Protocol v2, from outside: all it needs is the address.

python -m fettle.testing.oip http://127.0.0.1:8080 --model digits --grpc 127.0.0.1:8081

from fettle.testing.oip import CHECKS, Server, Skipped

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_mine_conforms(check):
    try:
        check(Server("http://127.0.0.1:8080", model="digits"))
    except Skipped as reason:
        pytest.skip(str(reason))

rest, infer, refusals, binary, compression, rpc   the checks, each a function of a Server that raises AssertionError
server, tensors, client                           what is asked: the address, made-up tensors, HTTP with a deadline
answers                                           what an answer must be
run                                               all checks, as values or as lines

It changes nothing on the server, beyond what it asks of it: a few hundred small requests and two of a megabyte.
"""

from fettle.testing.oip.client import Skipped, Unanswered
from fettle.testing.oip.run import CHECKS, GROUPS, Check, Outcome, Result, run_checks, try_check
from fettle.testing.oip.server import Server

__all__ = [
    "CHECKS",
    "GROUPS",
    "Check",
    "Outcome",
    "Result",
    "Server",
    "Skipped",
    "Unanswered",
    "run_checks",
    "try_check",
]
