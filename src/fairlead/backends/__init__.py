"""What loads and executes each kind of model: one file per kind, imported only when a model needs it."""

from fairlead.backends.base import Backend, Executable, Kind
from fairlead.backends.table import BACKENDS, detect, import_backend, load_backend

__all__ = ["BACKENDS", "Backend", "Executable", "Kind", "detect", "import_backend", "load_backend"]
