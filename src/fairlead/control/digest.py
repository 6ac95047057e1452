"""What a version is, in one number: SHA-256 over its files and its spec.

```
digest = sha256(JSON {"files": [[path, sha256 of the file], ...], "spec": {...}}, keys and paths in order, no spaces)
```
The spec counts as far as it says something: what is left at its default is not in it, so that a key that a later release
brings changes no digest. Its name is not in it either, because the registry gives it.
"""

import hashlib
from collections.abc import Mapping
from enum import Enum
from io import BufferedReader
from typing import Any

import msgspec
import yaml
from msgspec import NODEFAULT, Struct

from fairlead.core.specs import ModelSpec, VersionPolicy

CHUNK_BYTES = 1 << 20
Files = Mapping[str, tuple[int, str]]
"""Path within the version's folder → bytes, SHA-256 in hex."""


def digest_of(files: Files, spec: ModelSpec) -> str:
    """In hex."""
    content = {"files": [[path, sha256] for path, (_, sha256) in sorted(files.items())], "spec": said(own(spec))}
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def own(spec: ModelSpec) -> ModelSpec:
    """What is a version's own: neither the name, nor which of a folder's versions are served."""
    return spec.replace(name="", version_policy=VersionPolicy())


def spec_text(spec: ModelSpec) -> str:
    """A `model.yaml` that says the same."""
    return yaml.safe_dump(said(own(spec)), sort_keys=True, allow_unicode=True)


def said(value: Any) -> Any:
    """As YAML has it, without what is left at its default."""
    match value:
        case Struct():
            found = {}
            for field in msgspec.structs.fields(value):
                each = getattr(value, field.name)
                default = field.default_factory() if field.default_factory is not NODEFAULT else field.default
                if each != default:
                    found[field.encode_name] = said(each)
            return found
        case dict():
            return {name: said(each) for name, each in value.items()}
        case tuple() | list():
            return [said(each) for each in value]
        case Enum():
            return value.value
    return value


def sha256_of(file: BufferedReader) -> str:
    """In hex."""
    return hashlib.file_digest(file, "sha256").hexdigest()
