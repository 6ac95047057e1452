"""Arrays and their KServe datatypes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.core.errors import InvalidRequest
from fairlead.core.tensors import DTYPES, canonical, datatype_of, decode_bytes, encode_bytes, nbytes_of, object_array


@pytest.mark.parametrize("name", DTYPES)
def test_every_datatype_has_one_dtype_and_back(name):
    assert datatype_of(np.zeros(1, DTYPES[name])) == name


def test_an_array_without_a_datatype_is_refused_by_name():
    with pytest.raises(ValueError, match="complex128 has no KServe datatype"):
        canonical(np.zeros(1, complex))


@given(st.lists(st.binary(max_size=20)))
def test_bytes_tensors_survive_their_binary_form(elements):
    array = object_array(elements, (len(elements),))
    buffer = encode_bytes(array)
    assert len(buffer) == nbytes_of(array)
    assert decode_bytes(memoryview(buffer)) == elements


@given(st.lists(st.binary(max_size=20), min_size=1), st.data())
def test_a_cut_bytes_tensor_is_an_error_or_a_shorter_list(elements, data):
    buffer = encode_bytes(object_array(elements, (len(elements),)))
    cut = data.draw(st.integers(0, len(buffer) - 1))
    try:
        assert decode_bytes(memoryview(buffer)[:cut]) == elements[: len(decode_bytes(memoryview(buffer)[:cut]))]
    except InvalidRequest as error:
        assert "incomplete string" in error.message


def test_more_elements_than_the_shape_promises_are_refused_early():
    buffer = encode_bytes(object_array([b""] * 1000, (1000,)))
    with pytest.raises(InvalidRequest, match="expecting 3"):
        decode_bytes(memoryview(buffer), "text", limit=3)


def test_strings_become_bytes_and_lists_become_contiguous_arrays():
    assert canonical(["é", b"x"]).tolist() == ["é".encode(), b"x"]
    assert canonical(np.zeros((4, 4))[:, 1]).flags.c_contiguous
    assert canonical(3.0).shape == ()
    with pytest.raises(ValueError, match="not int"):
        canonical(np.array([1, "a"], object))
