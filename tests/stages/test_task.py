"""What is checked before any work, and the signature that a captured program gets."""

import numpy as np
import pytest
import torch
from torch import nn

from fettle.compress.capture import export_program
from fettle.core.errors import CaptureError, DataError
from fettle.core.recipe import Budget
from fettle.core.signature import ImagePreprocess
from fettle.stages.task import Misfit, Sources, make_task, signature_of
from fettle.testing.models import CASES, BranchOnValue, FixedBatch


def task_of(model, example, validation, **changes):
    wishes = {
        "metric": "accuracy", "classes": (), "image": None, "name": "model", "budget": Budget(), "seed": 0,
        "threads": 1, "batch": 1, "progress": lambda what, share: None,
    }  # fmt: skip
    train = changes.pop("train", None)
    return make_task(model, example, Sources(validation=validation, train=train), **{**wishes, **changes})


def batches(case="mlp", count=20):
    return [(CASES[case].data(rows=count), torch.zeros(count, dtype=torch.int64))]


@pytest.mark.parametrize("case", CASES)
def test_every_tiny_model_gets_a_signature(case):
    found = CASES[case]
    signature = signature_of(export_program(found.build(), found.data(rows=1)))
    assert [spec.shape for spec in signature.inputs] == [("batch", *shape) for shape in found.shapes]
    assert len(signature.outputs) == found.outputs
    assert all(spec.shape[0] == "batch" for spec in signature.outputs)
    assert len({spec.name for spec in (*signature.inputs, *signature.outputs)}) == len(found.shapes) + found.outputs


def test_inputs_have_the_names_of_forward():
    signature = signature_of(export_program(CASES["two_inputs"].build(), CASES["two_inputs"].data(rows=1)))
    assert [spec.name for spec in signature.inputs] == ["image", "table"]


def test_an_input_called_output_does_not_clash():
    class Net(nn.Module):
        def forward(self, output):
            return output * 2

    signature = signature_of(export_program(Net(), (torch.ones(2, 3),)))
    assert [signature.inputs[0].name, signature.outputs[0].name] == ["output", "output_"]


def test_an_image_that_fits():
    image = ImagePreprocess(mode="RGB", resize=8, crop=8)
    signature = signature_of(export_program(CASES["relu6"].build(), CASES["relu6"].data(rows=1)), image=image)
    assert signature.image == image


@pytest.mark.parametrize("image", [ImagePreprocess(resize=9, crop=9), ImagePreprocess(mode="L", mean=(0,), std=(1,))])
def test_an_image_that_does_not(image):
    with pytest.raises(Misfit, match="image preprocessing") as raised:
        signature_of(export_program(CASES["relu6"].build(), CASES["relu6"].data(rows=1)), image=image)
    assert raised.value.argument == "image"


@pytest.mark.parametrize("model", [FixedBatch, BranchOnValue])
def test_what_cannot_be_captured_is_no_fault_of_the_example(model):
    with pytest.raises(CaptureError, match=r"torch\.export"):
        task_of(model().eval(), (torch.ones(2, 8),), [])


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("seed", {"seed": -1}),
        ("threads", {"threads": 0}),
        ("batch", {"batch": 0}),
        ("metric", {"metric": "nope"}),
        ("metric", {"metric": "mean_squared_error"}),
        ("classes", {"classes": ("a",)}),
    ],
)
def test_a_misfit_names_its_argument(argument, changes):
    with pytest.raises(Misfit) as raised:
        task_of(CASES["mlp"].build(), CASES["mlp"].data(rows=1), batches(), **changes)
    assert raised.value.argument == argument


@pytest.mark.parametrize(
    ("model", "example", "argument"),
    [
        (None, (torch.ones(1, 12),), "model"),
        ("mlp", (torch.ones(1, 11),), "example"),
        ("mlp", (torch.ones(1, 12, dtype=torch.int64),), "example"),
        ("mlp", (torch.ones(1, 12), torch.ones(1, 12)), "example"),
        ("mlp", (), "example"),
        ("mlp", (torch.tensor(1.0),), "example"),
        ("mlp", np.ones((1, 12), np.float32), "example"),
    ],
)
def test_model_and_example_must_fit(model, example, argument):
    with pytest.raises(Misfit) as raised:
        task_of(CASES[model].build() if model else None, example, batches())
    assert raised.value.argument == argument


def test_a_bare_tensor_is_an_example():
    assert task_of(CASES["mlp"].build(), torch.ones(1, 12), batches()).example[0].shape == (1, 12)


def test_checking_a_training_model_leaves_its_statistics_alone():
    model = CASES["shared_relu"].build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task_of(model, CASES["shared_relu"].data(rows=1), batches("shared_relu"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bad_training_data_is_an_error_now():
    with pytest.raises(DataError, match="split 'train'"):
        task_of(CASES["mlp"].build(), CASES["mlp"].data(rows=1), batches(), train=[])


def test_calibration_is_validation_where_there_is_no_training_data():
    task = task_of(CASES["mlp"].build(), CASES["mlp"].data(rows=1), batches())
    assert task.calibration is task.validation


def test_calibration_batches_are_writable_tensors_even_from_read_only_arrays():
    x = np.ones((4, 12), np.float32)
    x.flags.writeable = False
    task = task_of(CASES["mlp"].build(), CASES["mlp"].data(rows=1), [(x, np.zeros(4, np.int64))])
    ((tensor,),) = task.calibration_batches()
    assert tensor.shape == (4, 12)
