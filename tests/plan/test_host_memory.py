"""The memory that is really this process's: a container's limits, and what ulimit leaves."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from fastqwen.plan.host_memory import free_bytes, total_bytes

GIB = 2**30


def machine(root: Path, files: dict[str, str]) -> Path:
    usual = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n"}
    for name, text in {**usual, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_machine_without_limits(tmp_path: Path):
    root = machine(tmp_path, {"proc/self/cgroup": "0::/user\n", "sys/fs/cgroup/user/memory.max": "max\n"})
    assert total_bytes(root) == total_bytes(tmp_path / "nothing") > GIB
    assert free_bytes(root) == min(8 * GIB, total_bytes(root))


def test_a_container_and_the_one_around_it(tmp_path: Path):
    group = "sys/fs/cgroup/"
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            f"{group}pod/box/memory.max": f"{2 * GIB}",
            f"{group}pod/box/memory.current": f"{GIB}",
            f"{group}pod/box/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
            f"{group}pod/memory.max": f"{GIB}",
            f"{group}pod/memory.current": f"{GIB // 4 * 3}",
        },
    )
    assert (total_bytes(root), free_bytes(root)) == (GIB, GIB // 4)
    (root / f"{group}pod/memory.max").write_text("max")
    assert (total_bytes(root), free_bytes(root)) == (2 * GIB, GIB // 2 * 3)


def test_a_container_that_is_slowed_down_before_it_is_full(tmp_path: Path):
    group = "sys/fs/cgroup/"
    files = {f"{group}memory.max": f"{2 * GIB}", f"{group}memory.high": f"{GIB}", f"{group}memory.current": "0"}
    root = machine(tmp_path, {"proc/self/cgroup": "0::/box\n", **files})
    assert (total_bytes(root), free_bytes(root)) == (GIB, GIB)
    (root / f"{group}memory.high").write_text("max\n")
    assert total_bytes(root) == 2 * GIB


def test_the_older_kind_of_container(tmp_path: Path):
    group = "sys/fs/cgroup/memory/docker/"
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "12:cpu:/x\n5:memory:/docker\n0::/\n",
            f"{group}memory.limit_in_bytes": f"{GIB}",
            f"{group}memory.usage_in_bytes": f"{GIB // 2}",
            f"{group}memory.stat": f"total_inactive_file {GIB // 4}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    assert (total_bytes(root), free_bytes(root)) == (GIB, GIB // 4 * 3)


def test_ulimit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = machine(tmp_path, {"proc/self/status": f"Name: x\nVmSize:\t{GIB // 1024} kB\n"})
    limits = {resource.RLIMIT_AS: 3 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY), 0))
    assert (total_bytes(root), free_bytes(root)) == (3 * GIB, 2 * GIB)
