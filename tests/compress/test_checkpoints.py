from __future__ import annotations

import pytest
import torch
from torch import nn

from fettle.compress.checkpoints import Progress, checkpoint_path, digest_state, read_checkpoint, write_checkpoint
from fettle.core.errors import CorruptArtifact

WORK = "ab" * 32
PROGRESS = Progress(
    work=WORK, epochs=2, batches=7, scores=(0.1, 0.30000000000000004), best=1, scaler={"scale": 65536.0}
)


def written(folder, tensors=None):
    path = checkpoint_path(folder, WORK)
    write_checkpoint(path, PROGRESS, tensors or {"model/a": torch.ones(2)})
    return path


def test_what_was_written_is_read(tmp_path, generator):
    shared = torch.randn(3, 4, generator=generator)
    tensors = {
        "model/weight": shared,
        "model/tied": shared,
        "model/turned": shared.t(),
        "model/number": torch.tensor(3, dtype=torch.int64),
        "best/half": shared.bfloat16(),
        "model/none": torch.zeros(0, 3),
    }
    progress, found = read_checkpoint(written(tmp_path / "made" / "anew", tensors), WORK)
    assert progress == PROGRESS
    assert list(found) == sorted(found)
    assert {name: value.dtype for name, value in found.items()} == {name: v.dtype for name, v in tensors.items()}
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_none_where_nothing_is(tmp_path):
    assert read_checkpoint(checkpoint_path(tmp_path, WORK), WORK) is None


def test_other_work_has_a_file_of_its_own(tmp_path):
    assert checkpoint_path(tmp_path, WORK) != checkpoint_path(tmp_path, "cd" * 32)


def test_other_work_is_refused(tmp_path):
    with pytest.raises(CorruptArtifact, match=r"of other work, ababab.*delete it"):
        read_checkpoint(written(tmp_path), "ab" * 8 + "00" * 24)


@pytest.mark.parametrize("damage", ["cut", "emptied", "text", "header"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = written(tmp_path)
    whole = path.read_bytes()
    content = {"cut": whole[:-3], "emptied": b"", "text": b"hello" * 100, "header": whole.replace(b"epochs", b"apochs")}
    path.write_bytes(content[damage])
    with pytest.raises(CorruptArtifact, match=r"cannot be read: .*delete it to train from the start"):
        read_checkpoint(path, WORK)


def test_a_foreign_safetensors_file_is_refused(tmp_path):
    import safetensors.torch

    path = checkpoint_path(tmp_path, WORK)
    safetensors.torch.save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        read_checkpoint(path, WORK)


def test_a_write_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = written(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(path, PROGRESS, {"model/a": torch.zeros(2)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_tells_values_names_and_types_apart():
    model = nn.Linear(3, 2)
    found = {digest_state(model)}
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    found.add(digest_state(model))
    found.add(digest_state(nn.Sequential(model)))
    found.add(digest_state(model.double()))
    assert len(found) == 4
