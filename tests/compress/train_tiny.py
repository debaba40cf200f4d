"""Run by test_training in a process of its own, to be killed: train, write the final weights, say which epoch runs.

python train_tiny.py CHECKPOINTS OUTPUT EPOCHS STOP_IN

"pass N" is printed in the middle of epoch N, where it waits for the kill if N is STOP_IN.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from fettle.compress.losses import label_loss
from fettle.compress.plan import Group, Plan
from fettle.compress.step import Context
from fettle.compress.training import Trainee, train
from fettle.core.recipe import StepSpec


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    checkpoints, output, epochs, stop_in = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    x = torch.randn(120, 6, generator=generator)
    y = (x[:, :3] - x[:, 3:]).argmax(dim=1)
    passes = iter(range(1000))

    def loader():
        this = next(passes)  # 0 is a look at the data
        for index, rows in enumerate(torch.randperm(len(x)).split(20)):
            if this and index == 3:
                say(f"pass {this}")
                if this == stop_in:
                    threading.Event().wait()
            yield (x[rows] + 0.1 * torch.randn(len(rows), 6),), y[rows]

    trainee = Trainee(
        model=model, groups=[Group(tensors=list(model.parameters()), decay=True)], loss=lambda a, i, t: label_loss(a, t)
    )
    context = Context(
        example=(x[:1],),
        train=loader,
        score=lambda net: float((net(x).argmax(dim=1) == y).float().mean()),
        device="cpu",
        checkpoint=checkpoints,
        note=say,
    )
    plan = Plan(epochs=epochs, learning_rate=0.01, weight_decay=0.01)
    outcome = train(trainee, plan, context, spec=StepSpec(name="tiny", parameters={}))
    say(str(outcome))
    safetensors.torch.save_file(model.state_dict(), output)


if __name__ == "__main__":
    main()
