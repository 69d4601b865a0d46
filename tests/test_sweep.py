"""sweep.sh with the real GNU parallel, and sweep.slurm in a real Slurm."""
# ruff: noqa: F401, F811 (the fixture `project` is imported, then an argument)

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections import Counter
from pathlib import Path

import forked
import psutil
import pytest
import torch
from conftest import ROOT, read_events
from launchers import (
    STANDIN,
    bash,
    environment,
    job_list,
    jobs,
    locked_by_another_process,
    notes,
    project,
    sweep,
    wait_until,
)

SLURM_PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
HAS_PARALLEL = shutil.which("parallel") is not None
HAS_SLURM = all(map(shutil.which, SLURM_PROGRAMS)) and os.geteuid() == 0
GAME = "BreakoutNoFrameskip-v4"  # by default
needs_parallel = pytest.mark.skipif(not HAS_PARALLEL, reason="GNU parallel is not installed (apt install parallel)")
needs_slurm = pytest.mark.skipif(not HAS_SLURM, reason="needs root and Slurm (apt install slurm-wlm munge)")

# ------------------------------------------------------------------------------------------------------------- sweep.sh


def fake_gpus(folder, *free_megabytes):
    """An `nvidia-smi` for machines without a GPU."""
    folder.mkdir()
    indices = "\\n".join(map(str, range(len(free_megabytes))))
    memory = "\\n".join(map(str, free_megabytes))
    (folder / "nvidia-smi").write_text(
        f"#!/bin/sh\ncase $1 in *index) printf '{indices}\\n';; *) printf '{memory}\\n';; esac"
    )
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def most_at_once(project, gpu=None):
    began = {run: float(at) for run, at, device, _ in notes(project, "begin") if gpu in (None, device)}
    ended = {run: float(at) for run, at in notes(project, "end") if run in began}
    times = sorted([(at, 1) for at in began.values()] + [(at, -1) for at in ended.values()])
    return max(sum(change for _, change in times[: i + 1]) for i in range(len(times)))


@needs_parallel
def test_a_sweep_inside_a_slurm_job_and_from_a_shell_with_cdpath(project):
    """Would catch: every run failing on an unset variable of an array job, as in `salloc`; a `cd` to elsewhere."""
    file = job_list(project, "python standin.py")
    done = sweep(project, file, env=environment(SLURM_JOB_ID="5", CDPATH=f".:{project}"), cwd=project)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "1 of 1 runs have finished, 0 failed"


@needs_parallel
def test_a_sweep_that_cannot_tell_what_became_of_its_runs_does_not_report_success(project):
    """A script that is gone at the end, as after a checkout. Would catch: exit code 0 after failed runs."""
    (project / "gone.py").write_text(
        STANDIN.replace("import argparse", "__file__ and __import__('os').remove(__file__)\nimport argparse", 1)
    )
    done = sweep(project, job_list(project, "python gone.py --activation crash"))
    assert done.returncode == 1
    assert "there is no gone.py" in done.stderr
    assert "cannot tell what has become of the runs" in done.stderr
    assert ", 0 failed" not in done.stdout  # with the comma: a clock may say 20:01:50 failed


def test_a_full_disk_does_not_empty_the_list(project):
    """No file can grow, as with a full TMPDIR. Would catch: here-strings with the whole list, which bash writes into a
    file of TMPDIR; then the sweep ran nothing and exited with 0."""
    lines = [f"python standin.py --seed {seed} --exp-name {'long' * 20}" for seed in range(880)]
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)), "restore_signals": False}
    done = sweep(project, "--dry-run", job_list(project, *lines), **full)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[2:] == lines


def test_an_empty_plan_is_an_error(project, tmp_path):
    """Would catch: exit code 0 of a sweep that was told nothing about its jobs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    done = sweep(project, job_list(project, "python standin.py"), env=environment([tmp_path / "bin"]))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: scripts/status.py says nothing about the jobs")


def test_a_closed_standard_input(project):
    """Would catch: a list read from the first file that bash opened instead, or a wait for ever."""
    file = job_list(project, "python standin.py")
    for arguments, code in (("", 2), (f"--dry-run {file.name}", 0)):
        done = bash("-c", f"exec bash scripts/sweep.sh {arguments} <&-", cwd=project)
        assert done.returncode == code, done.stderr
        assert done.stderr == ("error: the job list on standard input contains no job\n" if code else "")


@needs_parallel
def test_an_unreadable_run_is_left_out_and_counted(project):
    """The other one runs. Would catch: exit code 0 of a sweep with a run that it could not even look at."""
    (project / "runs" / f"{GAME}__standin__tanh-lan__1" / ".lock").mkdir(parents=True)
    done = sweep(project, job_list(project, "python standin.py", "python standin.py --seed 2"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: line 1 is left out: cannot read runs/")
    assert done.stdout.splitlines()[-1] == "1 of 2 runs have finished, 1 failed"
    assert [run for run, *_ in notes(project, "begin")] == [f"{GAME}__standin__tanh-lan__2"]
    alone = sweep(project, project / "jobs.txt")
    assert alone.returncode == 1  # nothing left to run, and not all is well


@needs_parallel
def test_a_sweep_keeps_the_threads_that_its_runs_began_with(project):
    """Would catch: a resumed run with today's count, which ends with other weights."""
    for seed, threads in ((1, 7), (2, None)):
        folder = project / "runs" / f"{GAME}__standin__tanh-lan__{seed}"
        folder.mkdir(parents=True)
        (folder / "status.json").write_text('{"state": "stopped", "step": 5}')
        (folder / "begun").touch()
        (folder / "config.json").write_text("{}" if threads is None else f'{{"threads": {threads}}}')
    file = job_list(project, *(f"python standin.py --seed {seed}" for seed in (1, 2, 3)))
    done = sweep(project, "--jobs-per-gpu", 64, file)
    assert (done.returncode, done.stderr) == (0, "")
    used = {run[-1]: threads for run, *_, threads in notes(project, "begin")}
    assert used == {"1": "7", "2": "1", "3": "1"}
    resumed = [line for line in done.stdout.splitlines() if "CPU threads that it began with" in line]
    assert len(resumed) == 1
    assert resumed[0].endswith(f"with the 7 CPU threads that it began with, not 1: {GAME}__standin__tanh-lan__1")


def test_a_slurm_task_keeps_the_threads_too(project, tmp_path):
    """Would catch: --cpus-per-task of today."""
    folder = project / "runs" / f"{GAME}__standin__tanh-lan__1"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "stopped", "step": 5}')
    (folder / "config.json").write_text('{"threads": 3}')
    process = slurm_task(project, tmp_path, "python standin.py", SLURM_CPUS_PER_TASK="1")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "with the 3 CPU threads that it began with, not 1" in output
    assert [threads for *_, threads in notes(project, "begin")] == ["3"]


def slurm_task(project, tmp_path, *lines, **variables):
    """The task of an array's first line, without Slurm; `scontrol` notes what it is called with."""
    (tmp_path / "bin").mkdir()
    for program, content in (("scontrol", f"echo $* >> '{tmp_path}/scontrol'"), ("squeue", "true")):
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / "bin" / program).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "1"}
    command = ["bash", "scripts/sweep.slurm", job_list(project, *lines)]
    env = environment([tmp_path / "bin"], **slurm, **variables)
    return subprocess.Popen(command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def catches_usr1(process):
    mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1]
    return int(mask, 16) >> (signal.SIGUSR1 - 1) & 1


def has_child(process, word):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    try:
        return any(word in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)
    except OSError:  # it has ended already
        return False


@pytest.mark.parametrize("delay", [0, 0.1, 0.3, 0.5, "run"])
def test_a_warning_at_any_moment_queues_the_task_again(project, tmp_path, delay):
    """Would catch: a task that the time limit's signal ends for good, because its run was just about to start."""
    process = slurm_task(project, tmp_path, "python standin.py --seconds 100")
    wait_until(lambda: catches_usr1(process), process)
    if delay == "run":
        wait_until(lambda: has_child(process, b"--run"), process, every=0.001)
    else:
        time.sleep(delay)
    process.send_signal(signal.SIGUSR1)
    told, errors = process.communicate(timeout=60)
    assert "task 7_1: out of time, queued again" in told, (told, errors)
    assert (tmp_path / "scontrol").read_text() == "requeue 7_1\n"


def test_a_task_leaves_a_run_alone_that_another_process_trains(project, tmp_path):
    """Would catch: three failures against the lock; a list whose last lines have no task, silently."""
    folder = project / "runs" / "BreakoutNoFrameskip-v4__standin__tanh-lan__1"
    folder.mkdir(parents=True)
    (project / "runs" / ".sweep").mkdir()
    with locked_by_another_process(folder):
        process = slurm_task(project, tmp_path, "python standin.py", "python standin.py --seed 2")
        told, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode == 0
    assert "task 7_1: another process is training it: python standin.py\n" in told
    assert "the list goes on after line 1, where the array ends" in told


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR2, signal.SIGXCPU])
def test_a_warning_to_the_shell_around_a_run_reaches_the_run(project, tmp_path, signum):
    """Some systems signal every process of a job. Would catch: a shell that dies of it and leaves its run."""
    process = slurm_task(project, tmp_path, "python standin.py --seconds 100")
    wait_until(lambda: notes(project, "begin"), process)
    (shell,) = psutil.Process(process.pid).children()
    shell.send_signal(signum)
    wait_until(lambda: notes(project, "signalled"), process)
    wait_until(lambda: len(notes(project, "begin")) == 2, process)  # it is tried again: nobody said that time is out
    for told in (
        psutil.Process(process.pid),
        *psutil.Process(process.pid).children(recursive=True),
    ):  # as Slurm ends it
        told.terminate()
    process.communicate(timeout=60)


@needs_parallel
def test_slots_never_exceed_the_limit_and_gpus_take_turns(project, tmp_path):
    """Would catch: a slot's GPU that depends on the job's number, so that one GPU gets them all when jobs differ."""
    file = job_list(project, *(f"python standin.py --seed {seed} --seconds 0.{seed % 4}" for seed in range(16)))
    done = sweep(project, "--jobs-per-gpu", 2, file, env=environment([fake_gpus(tmp_path / "bin", 9000, 9000)]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 at once, 2 on each of the GPUs 0 1" in done.stdout
    assert done.stdout.splitlines()[-1] == "16 of 16 runs have finished, 0 failed"
    devices = Counter(device for _, _, device, _ in notes(project, "begin"))
    assert devices.keys() == {"0", "1"}
    assert min(devices.values()) >= 4
    assert most_at_once(project) <= 4
    assert most_at_once(project, "0") <= 2
    assert most_at_once(project, "1") <= 2
    threads = max(1, len(os.sched_getaffinity(0)) // 4)
    assert {number for *_, number in notes(project, "begin")} == {str(threads)}
    again = sweep(project, file)
    assert again.stdout.startswith("16 runs: 16 finished, 0 running already, 0 to run")
    assert again.returncode == 0
    assert len(notes(project, "begin")) == 16


def test_the_default_number_follows_from_the_scarcest(project, tmp_path):
    file = job_list(project, "python standin.py")
    cores = len(os.sched_getaffinity(0))
    small = fake_gpus(tmp_path / "small", 40000, 2100)
    text = sweep(project, "--dry-run", file, env=environment([small])).stdout.splitlines()[1]
    assert text.startswith("2 at once, 1 on each of the GPUs 0 1, CPU threads of each: ")
    assert "1 by 2.1 GB of free GPU memory at 2.0 GB" in text
    assert "of free RAM at 3.9 GB a run" in text
    text = sweep(project, "--dry-run", file, env=environment([small], CUDA_VISIBLE_DEVICES="1")).stdout.splitlines()[1]
    assert text.startswith("1 at once, 1 on each of the GPUs 1,")
    text = sweep(project, "--dry-run", file, env=environment([small], CUDA_VISIBLE_DEVICES="")).stdout.splitlines()[1]
    assert re.match(r"\d+ at once, on the CPU, CPU threads of each: \d+ \(\d+ by ", text)
    assert f"{cores} by {cores} CPU cores" in text
    assert int(text.split()[0]) == max(1, min(map(int, re.findall(r"(\d+) by ", text))))
    for what, tenths in ((r"free RAM at 2\.5 GB a run", 25), (r"free disk at 1\.5 GB", 15)):
        runs, whole, tenth = map(int, re.search(rf"(\d+) by (\d+)\.(\d) GB of {what}", text).groups())
        assert runs == (10 * whole + tenth) // tenths


def test_memory_and_disk_are_those_of_the_games_and_the_replay_memory(project):
    """Would catch: a sweep of Up'n Down that is killed for memory when its replay memories are full; room for a million
    transitions kept free for a thousand; what is finished counted."""
    flags = "total_timesteps: int = 10_000_000\n    buffer_size: int = 1_000_000\n    batch_size: int = 32"
    copy = STANDIN.replace("total_timesteps: int = 100", flags).replace('"standin"', '"copy"')
    (project / "copy_of_dqn.py").write_text(copy)
    large = "python copy_of_dqn.py --env-id UpNDownNoFrameskip-v4"
    small = "python copy_of_dqn.py --buffer-size=100000 --batch-size 64"
    short = "python copy_of_dqn.py --total-timesteps 1000 --seed 2"

    def needs(*lines):
        text = sweep(project, "--dry-run", job_list(project, *lines)).stdout
        return re.search(r"free RAM at (\d+\.\d) GB a run", text)[1], re.search(r"disk at (\d+\.\d)", text)[1]

    assert needs(small) == ("0.9", "0.4")  # 0.8 + 100,000 * 1,500 bytes + 64 * 0.3 MB = 0.969 GB
    assert needs(short) == ("0.8", "0.3")
    assert needs(small, large, short) == ("3.4", "2.9")  # 1.2 * 2,181 bytes a transition
    assert needs(small, "python standin.py") == ("2.5", "1.5")
    folder = project / "runs" / "UpNDownNoFrameskip-v4__copy__tanh-lan__1"
    folder.mkdir(parents=True)
    (folder / "model.pt").write_text("weights")
    assert needs(small, large) == ("0.9", "0.4")


@needs_parallel
def test_crashes_hangs_and_kills(project):
    """A crash is retried twice and listed with its last line; what hangs, or was killed with -9, finishes after the
    retry; a run that exits 0 without a model has failed too. Would catch: a failed run that vanishes silently."""
    file = job_list(project, "# a comment", "", "python standin.py --activation crash",
                    "python standin.py --activation hang", "python standin.py --activation kill9",
                    "python standin.py --activation kill9", "python standin.py --activation nothing",
                    "python standin.py --exp-name 'a name' --runs-dir 'other runs'")  # fmt: skip
    other = project / "other runs"
    command = ["bash", str(project / "scripts" / "sweep.sh"), "--jobs-per-gpu", "3", file.name]
    process = subprocess.Popen(
        command, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    hung = project / "runs" / "BreakoutNoFrameskip-v4__standin__hang__1" / "begun"
    wait_until(lambda: hung.exists() and hung.read_text(), process)
    os.kill(int(hung.read_text()), signal.SIGKILL)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 2, output  # two runs failed
    assert output.splitlines()[-1] == "3 of 5 runs have finished, 2 failed"
    assert (
        f"failed: python standin.py --activation crash\nruns/.sweep/{GAME}__standin__crash__1.log ends with" in output
    )
    assert "    error: it crashed, as it does every time\n" in output
    begun = Counter(run for run, *_ in notes(project, "begin"))
    assert begun == {
        "BreakoutNoFrameskip-v4__standin__crash__1": 3,
        "BreakoutNoFrameskip-v4__standin__nothing__1": 1,
        "BreakoutNoFrameskip-v4__standin__hang__1": 2,
        "BreakoutNoFrameskip-v4__standin__kill9__1": 2,
    }
    assert (other / "BreakoutNoFrameskip-v4__a name__tanh-lan__1" / "model.pt").exists()
    assert "exit 0" in (other / ".sweep" / "BreakoutNoFrameskip-v4__a name__tanh-lan__1.log").read_text()
    log = (project / "runs" / ".sweep" / "BreakoutNoFrameskip-v4__standin__kill9__1.log").read_text()
    assert [word for word in re.findall(r"exit (\d+)", log)] == ["137", "0"]
    states = [line.split()[0] for line in sweep(project, "--status", file).stdout.splitlines()[:-1]]
    assert states == ["failed", "finished", "finished", "failed", "finished"]


@needs_parallel
@pytest.mark.parametrize("shortage", ["not enough memory: 0.5 GB needed", "cannot write x: No space left on device"])
def test_a_shortage_that_passes_is_waited_for(project, shortage):
    """Would catch: a list of hundreds of runs that fails within minutes because somebody else took the memory; an
    error for another reason, or a signal, that is waited for; a run that never fitted, and waits for ever."""
    script = project / "scripts" / "sweep.sh"
    script.write_text(script.read_text().replace("WAIT_SECONDS=300", "WAIT_SECONDS=2"))
    short = f"import os, sys\nif not os.path.exists('free'): sys.exit('error: {shortage}; lower x')\n"
    (project / "standin.py").write_text(STANDIN.replace("parser = ", f"{short}parser = ", 1))
    file = job_list(project, *(f"python standin.py --seed {seed}" for seed in (1, 2)))
    command = ["bash", str(script), "--jobs-per-gpu", "1", file.name]
    process = subprocess.Popen(
        command, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = project / "runs" / ".sweep" / f"{GAME}__standin__tanh-lan__1.log"
    wait_until(lambda: log.exists() and log.read_text().count(" waits\n") >= 4, process)  # more than the three tries
    wanted = ["running", "waits for free memory or disk"]  # but for the moments in which it is tried
    wait_until(
        lambda: sweep(project, "--status", file).stdout.splitlines()[0].split(maxsplit=2)[::2] == wanted, process
    )
    (project / "free").touch()
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, output
    assert output.count(" waits, ") == 1
    assert output.splitlines()[-1] == "2 of 2 runs have finished, 0 failed"

    (project / "free").unlink()
    script.write_text(script.read_text().replace("WAIT_SECONDS=2", "WAIT_SECONDS=100"))
    file = job_list(project, "python standin.py --seed 3")
    process = subprocess.Popen(
        command, cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = log.with_name(log.name.replace("__1.log", "__3.log"))
    wait_until(lambda: log.exists() and " waits\n" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert log.read_text().count(" start in ") == 1
    script.write_text(script.read_text().replace("WAITS=48", "WAITS=0"))
    done = sweep(project, file)
    assert done.returncode == 1
    assert log.read_text().count(" start in ") == 4


@needs_parallel
def test_what_never_fitted_does_not_wait(project):
    """Would catch: a run with more games than the sweep reckons with, which holds its slot for hours."""
    short = "import sys\nsys.exit('error: not enough memory: 99999.5 GB needed, 3.0 GB free; lower x')\n"
    (project / "standin.py").write_text(STANDIN.replace("parser = ", f"{short}parser = ", 1))
    done = sweep(project, job_list(project, "python standin.py"))
    assert done.returncode == 1
    assert " waits, " not in done.stdout


@needs_parallel
@pytest.mark.parametrize("how", ["terminal", signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_stopping_tells_each_training_once_and_leaves_none(project, how):
    """Would catch: a second signal, on which a training leaves without a checkpoint; a retry of what was stopped; an
    orphan. Ctrl-C on a terminal reaches the whole foreground process group."""
    lines = [f"python standin.py --seed {seed} --seconds 100" for seed in range(4)]
    command = ["bash", "scripts/sweep.sh", "--jobs-per-gpu", "2", job_list(project, *lines).name]
    terminal, its_end = pty.openpty()

    def on_the_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for signum in (signal.SIGHUP, signal.SIGINT):  # which `nohup` and `&` around the tests would have ignored
            signal.signal(signum, signal.SIG_DFL)

    process = subprocess.Popen(
        command, cwd=project, env=environment(), stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True,
        preexec_fn=on_the_terminal,
    )  # fmt: skip
    os.close(its_end)
    wait_until(lambda: len(notes(project, "begin")) == 2, process)
    if how == "terminal":
        os.write(terminal, b"\x03")
    else:
        process.send_signal(how)
    output = b""
    with contextlib.suppress(OSError):  # the terminal's end, when its last process has gone
        while True:
            output += os.read(terminal, 10_000)
    os.close(terminal)
    assert process.wait(60) == 128 + (signal.SIGINT if how == "terminal" else how)
    assert b"stopped with 4 of 4 runs unfinished; the same command resumes them" in output
    assert sorted(notes(project, "signalled")) == [
        [f"BreakoutNoFrameskip-v4__standin__tanh-lan__{seed}", "15"] for seed in (0, 1)
    ]
    for run in ("BreakoutNoFrameskip-v4__standin__tanh-lan__0", "BreakoutNoFrameskip-v4__standin__tanh-lan__1"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((project / "runs" / run / "begun").read_text()), 0)
    assert len(notes(project, "begin")) == 2


def test_without_gnu_parallel(project, tmp_path):
    """Says how to install it, also where moreutils' program of the same name is found."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "parallel").write_text(
        "#!/bin/sh\necho 'parallel [OPTIONS] command -- arguments' >&2; exit 1\n"
    )
    (tmp_path / "bin" / "parallel").chmod(0o755)
    done = sweep(project, job_list(project, "python standin.py"), env=environment([tmp_path / "bin"]))
    assert done.returncode == 2
    assert done.stderr.startswith("error: GNU parallel is missing: apt install parallel")
    assert not (project / "runs").exists()


# ------------------------------------------------------------------------------------------------------------ real runs

COMMON = "--metrics-frequency 0 --checkpoint-frequency"
PPO = f"--total-timesteps 1536 --num-envs 4 --num-steps 32 --num-minibatches 2 --no-async-envs {COMMON} 256"
DQN = f"--total-timesteps 1600 --buffer-size 1600 --learning-starts 400 --batch-size 8 {COMMON} 200"
FLAGS = {"dqn": DQN.split(), "ppo": PPO.split(), "pqn": PPO.split()}
SWEPT = ("dqn", "pqn")  # and Slurm runs PPO


def run_folder(runs_dir, name):
    return runs_dir / f"PongNoFrameskip-v4__{name}_atari_lan__relu__1"


def real_jobs(runs_dir, *names):
    lines = []
    for name in names:
        arguments = ("--algorithms", name, "--games", "Pong", "--activations", "relu", "--seeds", 1)
        lines += jobs(*arguments, "--runs-dir", runs_dir, "--", *FLAGS[name])
    return lines


def checkpoint_step(runs_dir, name):
    folder = run_folder(runs_dir, name) / "checkpoints"
    return max((int(file.stem) for file in folder.glob("*.ckpt")), default=0)


def outcome(runs_dir, name):
    folder = run_folder(runs_dir, name)
    events = read_events(folder)
    events.pop("charts/SPS")
    return torch.load(folder / "model.pt", weights_only=True), events


@contextlib.contextmanager
def undisturbed(tmp_path, name):
    """Trains the same beside what the test does; then compares its outcome with that of the run in `runs_dir`."""
    _, *line = shlex.split(real_jobs(tmp_path / "undisturbed", name)[0])
    alone = forked.start(line, tmp_path / f"undisturbed-{name}.txt")

    def check(runs_dir):
        alone.join(200)
        assert alone.exitcode == 0
        weights, events = outcome(runs_dir, name)
        expected_weights, expected_events = outcome(tmp_path / "undisturbed", name)
        assert weights.keys() == expected_weights.keys()
        assert all(torch.equal(weights[key], expected_weights[key]) for key in weights)
        assert events == expected_events

    try:
        yield check
    finally:
        alone.kill()


@needs_parallel
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_real_sweep_killed_and_stopped_ends_like_an_undisturbed_one(tmp_path):
    """One training is killed with -9 and resumes within the sweep; then the sweep is stopped and started again."""
    runs_dir = tmp_path / "my runs"
    (tmp_path / "jobs.txt").write_text("\n".join(real_jobs(runs_dir, *SWEPT)) + "\n")
    command = ["bash", str(ROOT / "scripts" / "sweep.sh"), "--jobs-per-gpu", "2", "jobs.txt"]
    folder = run_folder(runs_dir, "dqn")
    log = runs_dir / ".sweep" / f"{folder.name}.log"

    def start():
        return subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)

    with contextlib.ExitStack() as stack:
        checks = [stack.enter_context(undisturbed(tmp_path, name)) for name in SWEPT]
        process = start()
        wait_until(lambda: checkpoint_step(runs_dir, "dqn") >= 200, process)
        os.kill(json.loads((folder / "status.json").read_text())["pid"], signal.SIGKILL)
        wait_until(lambda: "resumed at" in log.read_text(), process)
        status = sweep(ROOT, "--status", tmp_path / "jobs.txt").stdout.splitlines()
        assert status[0].startswith(f"running     {folder.name} "), status
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=100)[0]
        assert process.returncode == 128 + signal.SIGTERM, output
        assert re.findall(r"exit (\d+)", log.read_text()) == ["137", "143"]
        assert checkpoint_step(runs_dir, "dqn") % 200  # written on the signal
        status = sweep(ROOT, "--status", tmp_path / "jobs.txt").stdout.splitlines()
        assert status[0].startswith(f"stopped     {folder.name} "), status

        process = start()
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
        assert output.splitlines()[-1] == "2 of 2 runs have finished, 0 failed"
        for check in checks:
            check(runs_dir)


# ---------------------------------------------------------------------------------------------------------------- Slurm


@pytest.fixture(scope="session")
def slurm():
    """A Slurm of this test process, on ports of its own: environment variables with which its commands find it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))  # not pytest's: munged, another user, must reach it
    with socket.socket() as one, socket.socket() as two:
        port = 20_000 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        while True:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
                break
            except OSError:
                port += 7
    helper = Path(__file__).parent / "slurm.sh"
    started = subprocess.run(["bash", helper, "start", folder, str(port)], capture_output=True, text=True)
    try:
        assert started.returncode == 0, started.stderr
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run(["bash", helper, "stop", folder], check=True)


class Array:
    """A submitted array of scripts/sweep.slurm."""

    def __init__(self, folder, file, slurm, *options):
        self.environment = environment(**slurm)
        self.output = file.parent / "array.out"
        lines = len(file.read_text().splitlines())
        options = ("--mem=1", f"--output={self.output}", f"--array=1-{lines}%64", *options)
        command = ("sbatch", "--parsable", *options, "scripts/sweep.slurm", str(file))
        self.id = self.call(*command, cwd=folder).strip()

    def call(self, *command, cwd=None):
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=self.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def states(self):
        """{task: (state, exit code)}"""
        text = self.call("scontrol", "show", "job", self.id)
        tasks = [dict(word.split("=", 1) for word in block.split() if "=" in word) for block in text.split("\n\n")]
        return {task["ArrayTaskId"]: (task["JobState"], int(task["ExitCode"].split(":")[0])) for task in tasks if task}

    def wait(self):
        wait_until(lambda: {state for state, _ in self.states().values()} <= {"COMPLETED", "FAILED"})

    def start_requeued(self, task):
        """Once the task is queued again: start it now, Slurm itself waits two minutes."""
        wait_until(lambda: self.states()[task][0] == "PENDING")
        time.sleep(2)  # slurmd takes what starts within the second of a kill for what it killed ("credential revoked")
        self.call("scontrol", "update", f"jobid={self.id}_{task}", "starttime=now")


@pytest.mark.slow
@needs_slurm
def test_an_array_runs_its_lines_and_only_them(project, slurm):
    """Line = index. Blank lines, comments and repetitions are nothing; a crash is tried three times and fails the task;
    what was killed with -9 finishes; names with spaces survive."""
    file = job_list(project, "# a comment", "", "python standin.py --activation crash",
                    "python standin.py --activation kill9", "python standin.py --activation kill9",
                    "python standin.py --exp-name 'a name'")  # fmt: skip
    array = Array(project, file, slurm)
    array.wait()
    assert array.states() == {
        "1": ("COMPLETED", 0),
        "2": ("COMPLETED", 0),
        "3": ("FAILED", 1),
        "4": ("COMPLETED", 0),
        "5": ("COMPLETED", 0),
        "6": ("COMPLETED", 0),
    }, array.output.read_text()
    begun = Counter((run, *rest[:-3]) for run, *rest in notes(project, "begin"))
    assert begun == {
        ("BreakoutNoFrameskip-v4__standin__crash__1",): 3,
        ("BreakoutNoFrameskip-v4__standin__kill9__1",): 2,
        ("BreakoutNoFrameskip-v4__a", "name__tanh-lan__1"): 1,
    }
    status = sweep(project, "--status", file, env=array.environment).stdout.splitlines()
    assert [line.split()[0] for line in status[:-1]] == ["failed", "finished", "finished"]
    assert (
        f"as Slurm job {array.id}_3 with "
        in (project / "runs" / ".sweep" / f"{GAME}__standin__crash__1.log").read_text()
    )

    again = Array(project, file, slurm)  # the same command: what has finished is not begun again
    again.wait()
    assert len(notes(project, "begin")) == 6 + 3
    assert f"task {again.id}_6: finished already" in again.output.read_text()


@needs_slurm
def test_sbatch_from_elsewhere_and_a_bad_list_say_what_is_wrong(project, tmp_path, slurm):
    file = job_list(project, "python gone.py")
    for folder, message in [
        (project, "there is no gone.py"),
        (tmp_path, "is not the project's folder; call sbatch there"),
    ]:
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(ROOT / "scripts" / "sweep.slurm", tmp_path / "scripts")
        array = Array(folder, file, slurm)
        array.wait()
        assert array.states() == {"1": ("FAILED", 2)}
        assert message in array.output.read_text()
    assert not (project / "runs").exists()


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_requeued_and_a_warned_real_run_end_like_an_undisturbed_one(tmp_path, slurm):
    """`scontrol requeue`, as a preemption would, then the signal that comes ahead of the time limit. Would catch: a
    training told twice, which leaves without a checkpoint; a task that takes the warning for a failure."""
    runs_dir = tmp_path / "runs"
    file = tmp_path / "jobs.txt"
    file.write_text("\n".join(real_jobs(runs_dir, "ppo")) + "\n")
    array = Array(ROOT, file, slurm)
    log = runs_dir / ".sweep" / f"{run_folder(runs_dir, 'ppo').name}.log"

    with undisturbed(tmp_path, "ppo") as check:
        wait_until(lambda: checkpoint_step(runs_dir, "ppo") >= 256)
        status = sweep(ROOT, "--status", file, env=array.environment).stdout
        assert status.startswith("running"), status
        array.call("scontrol", "requeue", f"{array.id}_1")
        wait_until(lambda: "exit 143" in log.read_text())
        first = checkpoint_step(runs_dir, "ppo")
        array.start_requeued("1")
        wait_until(lambda: checkpoint_step(runs_dir, "ppo") > first)
        array.call("scancel", "--batch", "--signal=USR1", f"{array.id}_1")
        wait_until(lambda: "out of time, queued again to resume" in array.output.read_text())
        second = checkpoint_step(runs_dir, "ppo")
        status = sweep(ROOT, "--status", file, env=array.environment).stdout
        assert status.startswith("waiting"), status
        array.start_requeued("1")
        array.wait()
        assert array.states() == {"1": ("COMPLETED", 0)}, array.output.read_text() + log.read_text()
        text = log.read_text()
        assert re.findall(r"exit (\d+)", text) == ["143", "143", "0"]
        assert re.findall(r"resumed at ([\d,]+)", text) == [f"{first:,}", f"{second:,}"]
        assert text.count("stopped by SIGTERM") == 2
        check(runs_dir)
