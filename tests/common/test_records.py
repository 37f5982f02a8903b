"""Parameters to Flower records and back, with everything wrong named at once."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord
from torch import nn

from fedgex.common.errors import UpdateError
from fedgex.common.records import (
    check,
    floats,
    load_parameters,
    parameters,
    text,
    to_arrays,
    to_record,
)


def test_arrays_survive_the_record_in_name_value_and_precision():
    arrays = {
        "b": np.array([[1.5, -2.0]], dtype=np.float32),
        "a": np.array(3.0, dtype=np.float16),
        "c": np.zeros((0, 4), dtype=np.float64),
    }

    found = to_arrays(to_record(arrays))

    assert list(found) == ["a", "b", "c"]
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


def test_bytes_that_are_no_array_are_refused_by_name():
    junk = Array(dtype="float32", shape=(1,), stype="numpy.ndarray", data=b"junk")
    record = ArrayRecord({"a": junk, "b": Array(np.zeros(1)), "c": junk})

    with pytest.raises(UpdateError, match=r"^a cannot be read; c cannot be read$"):
        to_arrays(record)


def test_floats_are_all_of_single_precision():
    found = floats({"a": np.array([0.5], dtype=np.float16), "b": np.array([2])})

    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert (found["a"][0], found["b"][0]) == (0.5, 2.0)


def test_parameters_are_named_by_module_and_go_back_bit_by_bit():
    torch.manual_seed(0)
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)

    arrays = parameters({"head": source})
    load_parameters({"head": target}, arrays | {"other.weight": np.zeros(9)})

    assert set(arrays) == {"head.weight", "head.bias"}
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


def test_loading_copies_so_that_training_does_not_change_the_arrays():
    head = nn.Linear(1, 1)
    arrays = {"head.weight": np.ones((1, 1), np.float32), "head.bias": np.ones(1, "f4")}
    load_parameters({"head": head}, arrays)

    with torch.no_grad():
        head.weight.add_(1)

    assert arrays["head.weight"][0, 0] == 1.0


def test_a_misfit_leaves_the_module_as_it_was():
    head = nn.Linear(3, 2)
    before = head.weight.detach().clone()

    with pytest.raises(UpdateError, match=r"head\.bias is missing"):
        load_parameters({"head": head}, {"head.weight": np.zeros((2, 3), np.float32)})

    assert torch.equal(head.weight, before)


EXPECTED = {"gone": (2,), "shape": (2,), "kind": (1,), "nan": (2,), "inf": (1,)}
WRONG = {
    "shape": np.zeros((2, 1)),
    "kind": np.zeros(1, dtype=np.int64),
    "nan": np.array([0.0, np.nan]),
    "inf": np.array([-np.inf]),
    "extra": np.zeros(1),
}


def test_everything_wrong_is_named_at_once():
    with pytest.raises(UpdateError) as refusal:
        check(EXPECTED, WRONG, exact=True)

    assert str(refusal.value).split("; ") == [
        "gone is missing",
        "extra is not asked for",
        "shape has shape (2, 1), expected (2,)",
        "kind is of type int64, expected floating point",
        "nan holds NaN or infinity",
        "inf holds NaN or infinity",
    ]


def test_other_names_pass_unless_the_match_must_be_exact():
    arrays = {"a": np.zeros(1), "extra": np.zeros(1)}

    check({"a": (1,)}, arrays)
    with pytest.raises(UpdateError, match=r"^extra is not asked for$"):
        check({"a": (1,)}, arrays, exact=True)


@pytest.mark.parametrize(("record", "kind"), [({}, "NoneType"), ({"study": 3}, "int")])
def test_text_that_is_no_text_is_refused_by_its_key(record, kind):
    with pytest.raises(UpdateError, match=f'"study" is {kind}, not text'):
        text(ConfigRecord(record), "study")


def test_text_is_returned():
    assert text(ConfigRecord({"study": "abc"}), "study") == "abc"
