"""Parameters to Flower records and back, with everything wrong named at once."""

import struct

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

from fedgex.common.arrays import check
from fedgex.common.errors import UpdateError
from fedgex.common.models.parameters import load_parameters, parameters
from fedgex.common.transport.records import floats, packed, to_arrays, to_record


def test_arrays_survive_the_record_in_name_value_and_precision():
    arrays = {
        "b": np.array([[1.5, -2.0]], dtype=np.float32),
        "a": np.array(3.0, dtype=np.float16),
        "c": np.zeros((0, 4), dtype=np.float64),
    }

    found = to_arrays(to_record(arrays))

    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


def pack(header: bytes, numbers: bytes) -> bytes:
    """Return what safetensors' description of its format says, written naively."""
    padded = header + b" " * (-len(header) % 8)
    return struct.pack("<Q", len(padded)) + padded + numbers


def carrying(content: bytes, name: str = "safetensors") -> ArrayRecord:
    return ArrayRecord({name: Array("uint8", (len(content),), "safetensors", content)})


def test_a_record_is_one_piece_of_bytes_wider_types_first_then_by_name():
    arrays = {
        "half": np.array(3.0, dtype=np.float16),
        "b": np.array([[1.5], [-2.0]], dtype=np.float32).T,
        "a": np.zeros((0, 4), dtype=np.float32),
    }

    record = to_record(arrays)

    header = (
        b'{"a":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},'
        b'"b":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"half":{"dtype":"F16","shape":[],"data_offsets":[8,10]}}'
    )
    expected = pack(header, struct.pack("<ffe", 1.5, -2.0, 3.0))
    assert list(record) == ["safetensors"]
    assert packed(record) == record["safetensors"].data == expected
    assert record["safetensors"].dtype == "uint8"
    assert record["safetensors"].shape == (len(expected),)


def test_a_long_record_is_cut_into_pieces_that_read_as_one():
    arrays = {"a": np.arange(10_000_000, dtype=np.float32), "b": np.ones(3)}

    record = to_record(arrays)
    swapped = ArrayRecord(dict(reversed(record.items())))

    names = ["safetensors", "safetensors-1", "safetensors-2"]
    assert list(record) == names
    assert [len(record[name].data) for name in names[:2]] == [1 << 24] * 2
    for found in (to_arrays(record), to_arrays(swapped)):
        np.testing.assert_array_equal(found["a"], arrays["a"])
        np.testing.assert_array_equal(found["b"], arrays["b"])
    del record["safetensors-1"]
    with pytest.raises(UpdateError, match="not packed"):
        to_arrays(record)


def test_the_same_arrays_in_another_order_are_the_same_bytes():
    arrays = {name: np.full(2, i) for i, name in enumerate(("b", "c", "a"))}

    turned = to_record(dict(reversed(arrays.items())))

    assert packed(turned) == packed(to_record(arrays))


GOOD = packed(to_record({"a": np.ones(3, np.float32)}))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x93NUMPY\x01\x00", id="another format"),
        pytest.param(GOOD[:-1], id="torn"),
        pytest.param(GOOD + b"\0", id="more than it says"),
        pytest.param(b"\xff" * 8 + GOOD[8:], id="a header beyond all bounds"),
        pytest.param(
            pack(b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}', b"\0\0"),
            id="a number format that NumPy lacks",
        ),
    ],
)
def test_bytes_that_are_no_arrays_are_refused(content):
    with pytest.raises(UpdateError, match=r"^the arrays cannot be read$"):
        to_arrays(carrying(content))


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(ArrayRecord(), id="nothing"),
        pytest.param(carrying(GOOD, "a"), id="another name"),
        pytest.param(
            ArrayRecord({**carrying(GOOD), "a": Array(np.zeros(1))}), id="one beside it"
        ),
    ],
)
def test_arrays_that_are_not_packed_are_refused(record):
    with pytest.raises(UpdateError, match=r'^the arrays are not packed as "safeten'):
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
