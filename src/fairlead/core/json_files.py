"""Files of a model's folder that hold a JSON object."""

import json
from pathlib import Path
from typing import Any

from fairlead.core.errors import LoadError


def read_json(path: Path, *, otherwise: str = "") -> dict[str, Any]:
    """Raises LoadError that names the file, also where it is no object. `otherwise`: what it means that there is none."""
    where = f"{path.parent.name}/{path.name}"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise LoadError(f"{path.parent.name} has no {path.name}" + (f": {otherwise}" if otherwise else "")) from None
    except OSError as error:
        raise LoadError(f"{where} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise LoadError(f"{where} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise LoadError(f"{where} must hold a JSON object, not {type(found).__name__}")
    return found
