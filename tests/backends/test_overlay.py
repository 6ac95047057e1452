"""Declared specs over detected ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.backends.overlay import lines, over_example, overlay, renamed
from fairlead.core.config import read_yaml
from fairlead.core.errors import LoadError
from fairlead.core.specs import ModelSpec, TensorSpec

specs = st.lists(
    st.builds(
        TensorSpec,
        name=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
        datatype=st.sampled_from(["FP32", "INT64", "BYTES"]),
        shape=st.lists(st.integers(-1, 5), max_size=4).map(tuple),
    ),
    unique_by=lambda spec: spec.name,
    max_size=4,
)


def tensor(name: str, datatype: str = "FP32", *shape: int) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape)  # type: ignore[arg-type]


@given(specs)
def test_declaring_what_was_detected_changes_nothing(detected: list[TensorSpec]) -> None:
    for declared in ([], detected, list(reversed(detected))):
        assert overlay(detected, declared, "inputs") == tuple(detected)
        assert over_example(detected, declared, "inputs") == tuple(detected)
        assert renamed(detected, declared, "inputs") == detected


@given(specs, st.data())
def test_an_open_dimension_may_be_fixed_but_never_opened(detected: list[TensorSpec], data: st.DataObject) -> None:
    declared = [
        tensor(
            s.name,
            s.datatype,
            *(data.draw(st.integers(-1, 5)) if dim == -1 else data.draw(st.sampled_from([dim, dim + 1])) for dim in s.shape),
        )
        for s in detected
    ]
    fits = all(have in (-1, want) for s, d in zip(detected, declared, strict=True) for have, want in zip(s.shape, d.shape, strict=True))
    if fits:
        assert overlay(detected, declared, "inputs") == tuple(declared)
    else:
        with pytest.raises(LoadError, match="with shape"):
            overlay(detected, declared, "inputs")


@given(st.lists(st.sampled_from(["FP32", "FP64", "INT64"]), min_size=1, max_size=4))
def test_the_lines_shown_are_lines_that_parse(datatypes: list[str]) -> None:
    shown = tuple(tensor(f"x{i}", datatype, -1, i) for i, datatype in enumerate(datatypes))
    assert read_yaml(lines("inputs", shown), ModelSpec, "model.yaml").inputs == shown


def test_labels_and_optional_are_added_to_what_is_detected() -> None:
    declared = TensorSpec(name="y", datatype="FP32", shape=(-1, 2), labels=("no", "yes"), optional=True)
    assert overlay([tensor("y", "FP32", -1, 2), tensor("z")], [declared], "outputs") == (declared, tensor("z"))


def test_names_are_taken_in_order_where_the_artefact_has_none_of_its_own() -> None:
    assert overlay([tensor("a"), tensor("b")], [tensor("x"), tensor("y")], "inputs", named=False) == (tensor("x"), tensor("y"))
    assert renamed([tensor("a"), tensor("b", "INT64")], [tensor("x"), tensor("y")], "inputs") == [tensor("x"), tensor("y", "INT64")]
    for wrong in (
        lambda: overlay([tensor("a")], [tensor("x"), tensor("y")], "inputs", named=False),
        lambda: renamed([tensor("a")], [tensor("x"), tensor("y")], "inputs"),
    ):
        with pytest.raises(LoadError, match="`inputs` declares 2, but the artefact has 1:\ninputs:\n  - {name: a"):
            wrong()


def test_contradictions_are_refused_by_name() -> None:
    with pytest.raises(LoadError, match="declares 'z', but the artefact has 'a'"):
        overlay([tensor("a")], [tensor("z")], "inputs")
    with pytest.raises(LoadError, match="declares 'a' as INT64, but the artefact has FP32"):
        overlay([tensor("a")], [tensor("a", "INT64")], "inputs")
    with pytest.raises(LoadError, match="declares 'a' twice"):
        overlay([tensor("a")], [tensor("a"), tensor("a")], "inputs")


def test_an_example_shows_one_of_the_shapes_that_fit() -> None:
    assert over_example([tensor("a", "FP32", 3)], [tensor("a", "FP32", -1)], "inputs") == (tensor("a", "FP32", -1),)
    with pytest.raises(LoadError, match=r"declares 'a' as FP32 \[4\], but the example shows FP32 \[3\]"):
        over_example([tensor("a", "FP32", 3)], [tensor("a", "FP32", 4)], "inputs")
    with pytest.raises(LoadError, match="declares 'b', but the example has 'a'"):
        over_example([tensor("a")], [tensor("b")], "inputs")
