"""machine.py: what a container or a batch system leaves of the machine."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import ppo_atari_lan as ppo
import pqn_atari_lan as pqn
from lan_utils import machine

GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """`groups(text of /proc/self/cgroup, {file: content})` on a machine with 24 GB free and 64 cores."""
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 24 * GB}))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "OWN_GROUPS", tmp_path / "own")

    def make(own, files):
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(f"{content}\n")

    return make


def memory_v1(folder, limit, used, cached):
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"cache 5\ninactive_file 0\ntotal_inactive_file {cached}",
    }


def memory_v2(folder, limit, used, cached):
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}",
    }


NO_LIMIT_V1 = 9223372036854771712
OWN_V1 = "9:name=systemd:/\n4:memory:/slurm/job_7\n2:cpu,cpuacct:/slurm/job_7\n0::/\n"


def test_memory_limits_of_both_versions(groups):
    """1 GB, 0.4 used, 0.1 of it cache: 0.7 left. Would catch: a limit that only one version's files tell."""
    groups(OWN_V1, memory_v1("memory/slurm/job_7", GB, 4 * GB // 10, GB // 10))
    assert machine.free_memory() == 7 * GB // 10
    groups("0::/job:7/step\n", memory_v2("job:7/step", GB, 4 * GB // 10, GB // 10))
    assert machine.free_memory() == 7 * GB // 10


def test_the_tightest_group_around_counts_and_no_limit_is_none(groups):
    """Would catch: a Slurm step without a limit in a job with one; "max" and 2**63 taken for a limit or an error."""
    no_limit = memory_v1("memory/slurm/job_7", NO_LIMIT_V1, GB, 0)
    groups(OWN_V1, no_limit)
    assert machine.free_memory() == 24 * GB
    groups(OWN_V1, no_limit | memory_v1("memory/slurm", 3 * GB, GB, 0))
    assert machine.free_memory() == 2 * GB
    groups("0::/job/step\n", memory_v2("job/step", "max", GB, 0))
    assert machine.free_memory() == 24 * GB
    groups("0::/job/step\n", memory_v2("job", GB, 5 * GB, 0))
    assert machine.free_memory() == 0


def test_a_container_that_sees_its_group_as_the_root(groups):
    """/proc/self/cgroup names the host's path there. Would catch: Docker's limit on version 1, not seen."""
    groups("4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n", memory_v1("memory", GB, 0, 0))
    assert machine.free_memory() == GB
    groups("3:cpu,cpuacct:/docker/0123\n", {"cpu/cpu.cfs_quota_us": 200_000, "cpu/cpu.cfs_period_us": 100_000})
    assert machine.usable_cores() == 2


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/job\n", {"job/cpu.max": "250000 100000"}, 2),
        ("0::/job\n", {"job/cpu.max": "50000 100000"}, 1),
        ("0::/job\n", {"job/cpu.max": "max 100000"}, 64),
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "400000 100000"}, 4),
        (OWN_V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": 300_000, "cpu/slurm/job_7/cpu.cfs_period_us": 100_000}, 3),
        (OWN_V1, {"cpu/slurm/job_7/cpu.cfs_quota_us": -1, "cpu/slurm/job_7/cpu.cfs_period_us": 100_000}, 64),
        (OWN_V1, {}, 64),
    ],
)
def test_cores_under_a_quota(groups, own, files, cores):
    """Would catch: 64 threads, or runs, that share the time of two cores."""
    groups(own, files)
    assert machine.usable_cores() == cores


@pytest.mark.parametrize(
    ("threads", "cores"), [(None, 4), ("1", 1), ("3", 3), ("64", 4), ("0", 4), ("2,1", 4), ("", 4)]
)
def test_a_runs_share_of_the_cores(monkeypatch, groups, threads, cores):
    """Would catch: a sweep of 16 runs on 16 cores that starts 8 workers for each."""
    groups("0::/job\n", {"job/cpu.max": "400000 100000"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert machine.share_of_cores() == cores
    assert ppo.Args().async_envs == pqn.Args().async_envs == (cores > 2)


def test_without_control_groups(groups, tmp_path):
    groups("", {})
    (tmp_path / "own").unlink()
    assert (machine.free_memory(), machine.usable_cores()) == (24 * GB, 64)


def test_what_sweep_sh_reads():
    """Two numbers, without torch."""
    show = "import runpy, sys; runpy.run_module('lan_utils.machine', run_name='__main__')"
    show += "; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", show], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    cores, megabytes = map(int, done.stdout.split())
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    assert 100 < megabytes < 10**8
