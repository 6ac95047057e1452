"""The engine's C++ ops, `torch.ops.fairlead.*`: every .cpp of this folder, compiled once for this machine."""

from fairlead.llm.kernels.build import load

__all__ = ["load"]
