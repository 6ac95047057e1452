"""Stand-ins for the few packages that the engine imports beside torch and transformers, for a machine that lacks them.

`install` puts one in the place of each that is missing: enough to compute with, nothing of what reads requests or writes logs.
"""

import copy
import importlib.util
import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


class Struct:
    """As msgspec's, by keyword or in order, without the checks."""

    _fields: dict[str, Any] = {}  # of each class its own

    def __init_subclass__(cls, **_: Any) -> None:
        inherited = {name: value for base in reversed(cls.__mro__[1:]) for name, value in getattr(base, "_fields", {}).items()}
        names = inspect.get_annotations(cls)
        own = {name: cls.__dict__.get(name, _MISSING) for name in names if not str(names[name]).startswith("typing.ClassVar")}
        cls._fields = {**inherited, **own}

    def __init__(self, *given: Any, **named: Any) -> None:
        named.update(zip(self._fields, given, strict=False))
        for name, default in self._fields.items():
            if name not in named and default is _MISSING:
                raise TypeError(f"{type(self).__name__} lacks {name}")
            if name not in named:
                named[name] = default.factory() if isinstance(default, _Field) else copy.copy(default)
        self.__dict__.update(named)
        if hasattr(self, "__post_init__"):
            self.__post_init__()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), tuple(map(str, self.__dict__.values()))))


class _Field:
    def __init__(self, default_factory: Any = None, default: Any = None, name: str | None = None) -> None:
        self.factory = default_factory or (lambda: default)


class _Log:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


_MISSING = object()


def _anything(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *_, **__: None})


def _replace(struct: Any, **changes: Any) -> Any:
    made = copy.copy(struct)
    made.__dict__.update(changes)
    if hasattr(made, "__post_init__"):
        made.__post_init__()
    return made


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # transformers asks for psutil's
    module.__dict__.update(members)
    sys.modules[name] = module
    return module


def install(*, everywhere: bool = False) -> list[str]:
    """Returns the names of what is stood in for. `everywhere`: also for what is there, to try this out."""
    missing = [name for name in ("msgspec", "structlog", "llguidance", "psutil") if everywhere or not importlib.util.find_spec(name)]
    nothing = SimpleNamespace(__getattr__=lambda name: None)
    if "msgspec" in missing:
        structs = _module("msgspec.structs", replace=_replace, asdict=lambda struct: dict(struct.__dict__))
        coder = type("Coder", (), {"__init__": lambda self, *_, **__: None, "encode": None, "decode": None})
        formats = {name: _module(f"msgspec.{name}", Encoder=coder, Decoder=coder, encode=None, decode=None) for name in ("json", "msgpack")}
        meta = type("Meta", (), {"__init__": lambda self, **_: None})
        errors = {name: type(name, (Exception,), {}) for name in ("ValidationError", "DecodeError", "MsgspecError")}
        _module(
            "msgspec",
            Struct=Struct,
            Meta=meta,
            field=_Field,
            structs=structs,
            UNSET=None,
            UnsetType=type(None),
            Raw=bytes,
            **formats,
            **errors,
        )
    if "structlog" in missing:
        _module("structlog", get_logger=lambda *_: _Log(), stdlib=nothing, contextvars=nothing, types=nothing)
    if "llguidance" in missing:
        _module("llguidance", __getattr__=_anything)
    if "psutil" in missing:
        _module("psutil", virtual_memory=lambda: SimpleNamespace(available=8 << 30))
    return missing
