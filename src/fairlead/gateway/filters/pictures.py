"""Pictures put before a served classifier."""

from io import BytesIO

import numpy as np

from fairlead.core.errors import Unsupported
from fairlead.core.specs import ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors

ANY_SIDE = 224
"""Pixels, where the classifier takes any."""


def check_picture_classifier(spec: ModelSpec) -> tuple[str, ...]:
    """The labels of a served classifier of pictures. Raises Unsupported for a model that is none."""
    shape = spec.inputs[0].shape if spec.inputs else ()
    if (
        len(spec.inputs) != 1
        or spec.inputs[0].datatype not in {"FP32", "UINT8"}
        or len(shape) != 4
        or 3 not in (shape[1], shape[3])
        or not spec.outputs
        or not spec.outputs[0].labels
    ):
        raise Unsupported(
            f"model '{spec.name}' does not classify pictures: it must take one FP32 or UINT8 tensor of [-1, height, width, 3]"
            " or [-1, 3, height, width] and give an output with `labels`"
        )
    return spec.outputs[0].labels


def picture_row(spec: ModelSpec, data: bytes) -> Tensors:
    """A PNG, JPEG or WebP of our own as the classifier's one row: RGB in 0 to 1 (FP32) or 0 to 255 (UINT8). It takes milliseconds."""
    from PIL import Image

    tensor = spec.inputs[0]
    height, width, first = _sides(tensor)
    with Image.open(BytesIO(data)) as opened:
        picture = opened.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    if tensor.datatype == "FP32":
        pixels = (pixels / 255.0).astype(DTYPES["FP32"])
    if first:
        pixels = pixels.transpose(2, 0, 1)
    return {tensor.name: np.ascontiguousarray(pixels[None])}


def _sides(tensor: TensorSpec) -> tuple[int, int, bool]:
    """(height, width, whether the colours come first)."""
    _, second, third, last = tensor.shape
    first = last != 3
    height, width = (third, last) if first else (second, third)
    return height if height > 0 else ANY_SIDE, width if width > 0 else ANY_SIDE, first
