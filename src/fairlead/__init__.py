"""Fairlead: one server for every kind of model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairlead.backends.python import Context, Model
    from fairlead.backends.torch import save_torchscript

__all__ = ["Context", "Model", "__version__", "save_torchscript"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazily: `import fairlead` stays light for who does not write models
    if name in ("Context", "Model"):
        from fairlead.backends import python

        return getattr(python, name)
    if name == "save_torchscript":
        from fairlead.backends.torch import save_torchscript

        return save_torchscript
    raise AttributeError(f"module 'fairlead' has no attribute {name!r}")
