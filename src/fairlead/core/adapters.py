"""LoRA adapters as folders beside a model's weights: which there are, and which names they may have."""

import re
from pathlib import Path

CONFIG = "adapter_config.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""No `:` and `@`, which stand between the parts of a model's name, and nothing that leads out of the folder."""
MAX_ADAPTERS = 10_000
"""Of one folder, that are listed."""


def adapter_names(folder: Path) -> tuple[str, ...]:
    """Sorted. Blocks. A folder that is not there holds none."""
    try:
        with_config = (entry.name for entry in folder.iterdir() if NAME.fullmatch(entry.name) and (entry / CONFIG).is_file())
        return tuple(sorted(name for name, _ in zip(with_config, range(MAX_ADAPTERS), strict=False)))
    except OSError:
        return ()
