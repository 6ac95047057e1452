"""What the operator declared, laid over what the artefact tells."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from msgspec import structs

from fairlead.core.errors import LoadError
from fairlead.core.specs import Datatype, TensorSpec
from fairlead.core.tensors import datatype_of


def overlay(
    detected: Sequence[TensorSpec], declared: Sequence[TensorSpec], side: str, *, named: bool = True, convertible: bool = False
) -> tuple[TensorSpec, ...]:
    """The specs of one side ("inputs" or "outputs"); pure. Raises LoadError where the two contradict each other.

    named: the artefact's names are its own, so a declared one must be among them and undeclared ones stay as they are.
    Otherwise (positions only) the declared are taken in order, all or none of them.
    convertible: the backend converts datatypes, so another one may be declared.
    A declared dimension may fix one that the artefact leaves open, not the other way round.
    """
    names = [spec.name for spec in declared]
    if len(set(names)) != len(names):
        raise LoadError(f"`{side}` declares {next(n for n in names if names.count(n) > 1)!r} twice")
    if not declared:
        return tuple(detected)
    if named:
        found = {spec.name: spec for spec in detected}
        for name in names:
            if name not in found:
                raise LoadError(f"`{side}` declares {name!r}, but the artefact has {', '.join(map(repr, found)) or 'none'}")
        own = {spec.name: spec for spec in declared}
        return tuple(_merge(spec, own[spec.name], side, convertible) if spec.name in own else spec for spec in detected)
    if len(declared) != len(detected):
        raise LoadError(f"`{side}` declares {len(declared)}, but the artefact has {len(detected)}:\n{lines(side, detected)}")
    return tuple(_merge(spec, own, side, convertible) for spec, own in zip(detected, declared, strict=True))


def over_example(shown: Sequence[TensorSpec], declared: Sequence[TensorSpec], side: str) -> tuple[TensorSpec, ...]:
    """As `overlay`, for specs that one example shows: a declared -1 may stand for what it shows. Undeclared ones stay as they are."""
    if not declared:
        return tuple(shown)
    found = {spec.name: spec for spec in shown}
    for spec in declared:
        have = found.get(spec.name)
        if have is None:
            if spec.optional or side == "outputs":
                continue
            raise LoadError(f"`{side}` declares {spec.name!r}, but the example has {', '.join(map(repr, found)) or 'none'}")
        fits = len(spec.shape) == len(have.shape) and all(
            want == -1 or have_ in (-1, want) for want, have_ in zip(spec.shape, have.shape, strict=True)
        )
        if spec.datatype != have.datatype or not fits:
            raise LoadError(
                f"`{side}` declares {spec.name!r} as {spec.datatype} {list(spec.shape)}, but the example shows {have.datatype} {list(have.shape)}:\n{lines(side, shown)}"
            )
    own = {spec.name: spec for spec in declared}
    return tuple(own.pop(spec.name, spec) for spec in shown) + tuple(own.values())


def renamed(found: Sequence[TensorSpec], declared: Sequence[TensorSpec], side: str) -> list[TensorSpec]:
    """Where none of the declared names is the artefact's, they are taken in order: a program's arguments are positions too."""
    if not declared or {spec.name for spec in declared} & {spec.name for spec in found}:
        return list(found)
    if len(declared) != len(found):
        raise LoadError(f"`{side}` declares {len(declared)}, but the artefact has {len(found)}:\n{lines(side, found)}")
    return [structs.replace(spec, name=own.name) for spec, own in zip(found, declared, strict=True)]


def _merge(detected: TensorSpec, declared: TensorSpec, side: str, convertible: bool) -> TensorSpec:
    if declared.datatype != detected.datatype and not convertible:
        raise LoadError(f"`{side}` declares {declared.name!r} as {declared.datatype}, but the artefact has {detected.datatype}")
    fits = len(declared.shape) == len(detected.shape) and all(
        have in (-1, want) for have, want in zip(detected.shape, declared.shape, strict=True)
    )
    if not fits:
        raise LoadError(
            f"`{side}` declares {declared.name!r} with shape {list(declared.shape)}, but the artefact has {list(detected.shape)}"
        )
    labels, optional = declared.labels or detected.labels, declared.optional or detected.optional
    return structs.replace(declared, labels=labels, optional=optional)


def lines(side: str, specs: Sequence[TensorSpec]) -> str:
    """The lines of model.yaml that declare these specs."""
    return "\n".join([f"{side}:", *(f"  - {{name: {s.name}, datatype: {s.datatype}, shape: {list(s.shape)}}}" for s in specs)])


def spec_of(name: str, array: np.ndarray, *, batches: bool) -> TensorSpec:
    """The spec that an array shows; its first dimension is the batch where the model `batches`."""
    return TensorSpec(name=name, datatype=cast(Datatype, datatype_of(array)), shape=(-1, *array.shape[1:]) if batches else array.shape)
