"""What this process may use of the machine: a container or a batch system may allow less than there is.

`python -m lan_utils.machine` prints CPU cores and free memory in MB for scripts/sweep.sh.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# Limit, use, and the part of the use that the kernel can reclaim: control groups of version 2 and of version 1.
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's control groups and of all groups around them, of both versions."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, controllers, group = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            root = CGROUPS / controller if controllers else CGROUPS
            folder = root / group.lstrip("/")
            # In a container the group's name may be the host's, and only the root is there.
            yield from (parent for parent in (folder, *folder.parents) if parent.is_relative_to(root))


def free_memory() -> int:
    """Bytes that this process and its children may still use."""
    free = psutil.virtual_memory().available
    for folder in _groups("memory"):
        for limit, used, cached in MEMORY_FILES:
            with contextlib.suppress(OSError, ValueError, KeyError):  # another version's, or no limit: "max"
                allowed = int((folder / limit).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free = min(free, allowed - int((folder / used).read_text()) + int(statistics[cached]))
    return max(free, 0)


def usable_cores() -> int:
    """CPU cores that this process may keep busy, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):  # another version's, or no limit: "max", -1
                quota, period = map(int, " ".join((folder / name).read_text() for name in files).split())
                if quota > 0:
                    cores = min(cores, max(1, quota // period))
    return cores


def share_of_cores() -> int:
    """CPU cores for this run: those of `usable_cores` that OMP_NUM_THREADS leaves it, as a sweep sets it for each."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return min(usable_cores(), int(threads)) if re.fullmatch("[1-9][0-9]*", threads) else usable_cores()


if __name__ == "__main__":
    print(usable_cores(), free_memory() // 10**6)
