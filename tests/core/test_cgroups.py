from pathlib import Path

from fairlead.core.cgroups import cgroup_cpus, cgroup_free_bytes, cgroup_memory_bytes


def test_limits_of_containers_are_read_from_both_versions_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert cgroup_cpus(tmp_path, own) is cgroup_free_bytes(tmp_path, own) is None  # no control groups at all

    own.write_text("0::/system.slice/server\n")
    inner = tmp_path / "v2/system.slice/server"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner / "memory.max").write_text("2147483648\n")
    (inner.parent / "memory.max").write_text("max\n")
    assert cgroup_cpus(tmp_path / "v2", own) == 1.5
    (inner / "memory.current").write_text("1500000000\n")
    (inner / "memory.stat").write_text("anon 900000000\nfile 600000000\nshmem 100000000\ninactive_file 300000000\nactive_file 200000000\n")
    assert cgroup_memory_bytes(tmp_path / "v2", own) == 2 << 30
    assert cgroup_free_bytes(tmp_path / "v2", own) == (2 << 30) - 1_000_000_000  # what is in the page cache may go

    own.write_text("5:cpu,cpuacct:/\n4:memory:/box\n0::/\n")
    for folder, name, value in (
        ("cpu", "cpu.cfs_quota_us", "50000"),
        ("cpu", "cpu.cfs_period_us", "100000"),
        ("memory", "memory.limit_in_bytes", "9223372036854771712"),
        ("memory/box", "memory.limit_in_bytes", "1073741824"),
        ("memory/box", "memory.usage_in_bytes", "800000000"),
        ("memory/box", "memory.stat", "inactive_file 5\ntotal_inactive_file 300000000\ntotal_active_file 0\n"),
    ):
        (tmp_path / "v1" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "v1" / folder / name).write_text(value)
    assert cgroup_cpus(tmp_path / "v1", own) == 0.5
    assert cgroup_memory_bytes(tmp_path / "v1", own) == 1 << 30
    assert cgroup_free_bytes(tmp_path / "v1", own) == (1 << 30) - 500_000_000
