"""What the control groups of a container, of version 1 and 2, let this process have of the machine."""

from collections.abc import Iterator
from pathlib import Path

CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
FILE_CACHE = frozenset({"active_file", "inactive_file"})
"""Memory that the kernel takes back when it is needed; what is mapped from files, as weights are, is counted here."""


def cgroup_cpus(root: Path = CGROUP, own: Path = OWN_CGROUP) -> float | None:
    """The tightest processor quota upon this process in cores; None: no limit."""
    quotas = []
    for folder in _cgroups(root, own, "cpu"):
        match _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us"):
            case [quota, period] if quota.isdigit():
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def cgroup_memory_bytes(root: Path = CGROUP, own: Path = OWN_CGROUP) -> int | None:
    """The tightest memory limit upon this process; None: no limit."""
    return min((limit for _, limit in _memory_limits(root, own)), default=None)


def cgroup_free_bytes(root: Path = CGROUP, own: Path = OWN_CGROUP) -> int | None:
    """What the memory limits upon this process leave; None: no limit."""
    return min((max(limit - _used_bytes(folder), 0) for folder, limit in _memory_limits(root, own)), default=None)


def _memory_limits(root: Path, own: Path) -> Iterator[tuple[Path, int]]:
    for folder in _cgroups(root, own, "memory"):
        match _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes"):
            case [limit] if limit.isdigit() and int(limit) < 1 << 62:
                yield folder, int(limit)


def _used_bytes(folder: Path) -> int:
    used = _words(folder / "memory.current") or _words(folder / "memory.usage_in_bytes")
    counts = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    # version 1 counts the groups below it apart
    cache = sum(int(counts.get("total_" + name) or counts.get(name, "0")) for name in FILE_CACHE)
    return int(used[0]) - cache if used else 0


def _cgroups(root: Path, own: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and its ancestors, of version 2 (one tree) and 1 (one a controller)."""
    for _, controllers, path in (line.split(":", 2) for line in _lines(own)):
        top = root if not controllers else root / controller if controller in controllers.split(",") else None
        if top is not None:
            folder = top / path.lstrip("/")
            yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(top))


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
