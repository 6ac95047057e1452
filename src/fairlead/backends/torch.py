"""TorchScript (`.pt`) and torch.export (`.pt2`)."""

import json
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch
from msgspec import structs
from torch.utils import _pytree as pytree

from fairlead.backends.base import Backend, Executable
from fairlead.backends.overlay import lines, overlay, over_example, spec_of
from fairlead.backends.tabular import reason
from fairlead.core.errors import LoadError, ModelError
from fairlead.core.specs import Datatype, ModelSpec, TensorSpec
from fairlead.core.tensors import DTYPES, Tensors

_DATATYPES: dict[torch.dtype, Datatype] = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
    torch.bfloat16: "BF16",
}
_EXAMPLE = "fairlead.json"
