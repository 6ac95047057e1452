"""What loads and executes each kind of model: one file per kind, imported only when a model needs it."""

from fairlead.backends.base import Backend, Executable, Kind
from fairlead.backends.table import BACKENDS, detect, load_backend

__all__ = ["BACKENDS", "Backend", "Executable", "Kind", "detect", "load_backend"]
