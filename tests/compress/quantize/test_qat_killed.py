"""Quantization-aware training in processes that are killed.

Run as a program, `python test_qat_killed.py CHECKPOINTS OUTPUT STOP_IN LEARN_SCALES` is the process: it trains and
writes the weights, says "pass N" in the middle of its N-th pass over the data, and waits there for the kill if N is
STOP_IN.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn import functional

from fettle.compress.quantize.qat import QuantizationAware
from fettle.compress.step import Context
from fettle.testing.models import CASES
from fettle.testing.steps import answers, captured

CASE = CASES["residual"]
# Norms and ranges change their ways within the training, each at another epoch.
OPTIONS = {"epochs": 4, "weight_bits": 4, "learning_rate": 1e-2, "loss": "labels", "norm_epochs": 2, "follow_epochs": 3}


def main(checkpoints: Path, output: Path, stop_in: int, **options: object) -> None:
    torch.set_num_threads(1)
    batches = [((x,), (x[:, 0] > x[:, 1]).float().mean(dim=(1, 2)).round().long()) for (x,) in batches_of(6)]
    passes = iter(range(100))

    def loader():
        number = next(passes)  # 0 is a look at the data
        for index, batch in enumerate(batches[place] for place in torch.randperm(len(batches)).tolist()):
            if number and index == 3:
                say(f"pass {number}")
                if number == stop_in:
                    threading.Event().wait()
            yield batch

    def score(quantized):
        return -sum(float(functional.cross_entropy(answers(quantized, x)[0], y)) for x, y in batches)

    context = Context(
        example=CASE.data(rows=2),
        calibration=batches_of(6),
        train=loader,
        score=score,
        device="cpu",
        checkpoint=checkpoints,
        note=say,
    )
    trained = QuantizationAware(**{**OPTIONS, **options}).apply(captured(CASE), context)
    safetensors.torch.save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, output)


def batches_of(count: int) -> list[tuple[torch.Tensor, ...]]:
    return [CASE.data(rows=32, seed=200 + batch) for batch in range(count)]


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def start(checkpoints: Path, output: Path, *, stop_in: int, learn_scales: bool) -> subprocess.Popen[str]:
    arguments = [str(value) for value in (checkpoints, output, stop_in, int(learn_scales))]
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("learn_scales", [False, True])
def test_a_process_that_was_killed_goes_on_to_the_same_bytes(tmp_path, learn_scales):
    whole = start(tmp_path / "whole", tmp_path / "wanted", stop_in=0, learn_scales=learn_scales)
    for epoch in (1, 3):  # before there is a checkpoint, and with one of two epochs
        victim = start(tmp_path / "part", tmp_path / "found", stop_in=epoch, learn_scales=learn_scales)
        assert victim.stdout is not None
        assert f"pass {epoch}\n" in iter(victim.stdout.readline, "")
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(timeout=60) == -signal.SIGKILL
        victim.stdout.close()
        assert not (tmp_path / "found").exists()
        assert [path.suffix for path in (tmp_path / "part").glob("*")] == [".safetensors"] * (epoch > 1)
    again = lines_of(start(tmp_path / "part", tmp_path / "found", stop_in=0, learn_scales=learn_scales))
    wanted = lines_of(whole)
    assert any("went on after epoch 2 of 4" in line for line in again)
    assert [line for line in again if line.startswith("pass")] == ["pass 1", "pass 2"]  # epochs 3 and 4
    assert "was kept, score" in again[-1], "else nothing that was trained is compared"
    assert again[-1] == wanted[-1]
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), learn_scales=sys.argv[4] == "1")
