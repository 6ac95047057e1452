"""Fairlead: one server for every kind of model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairlead.backends.python import Context, Model

__all__ = ["Context", "Model", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazily: `import fairlead` stays light for everyone who does not write a Python model
    if name in ("Context", "Model"):
        from fairlead.backends import python

        return getattr(python, name)
    raise AttributeError(f"module 'fairlead' has no attribute {name!r}")
