"""jobs.sh, status.py, sweep.sh with the real GNU parallel, and sweep.slurm in a real Slurm."""

import contextlib
import fcntl
import os
import pty
import re
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
from typing import get_args

import pytest
import torch
from conftest import ROOT, read_events, run_script

import dqn_atari_lan
import ppo_atari_lan

SLURM_PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
HAS_PARALLEL = shutil.which("parallel") is not None
HAS_SLURM = all(map(shutil.which, SLURM_PROGRAMS)) and os.geteuid() == 0
needs_parallel = pytest.mark.skipif(not HAS_PARALLEL, reason="GNU parallel is not installed (apt install parallel)")
needs_slurm = pytest.mark.skipif(not HAS_SLURM, reason="needs root and Slurm (apt install slurm-wlm munge)")

GAMES = {"BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders", "VideoPinball"}
MAIN = {"relu", "tanh", "sigmoid", "tanh-lan"}
FIGURES = {  # figure: algorithm, games, activations, seeds
    "1": ("dqn", GAMES, {"relu", "tanh"}, 5),
    "4": ("dqn", {"Breakout"}, {"tanh", "tanh-lan"}, 1),
    "5a": ("dqn", GAMES, MAIN, 5),
    "5b": ("dqn", GAMES, {"relu", "tanh", "tanh-lan", "layernorm", "wide-1024"}, 5),
    "6": ("dqn", GAMES, MAIN, 5),
    "7": ("dqn", GAMES, {"relu", "selu", "tanh-lan", "tanh-addlan", "tanh-2xlan"}, 5),
    "8": ("ppo", GAMES, MAIN, 5),
    "10": ("dqn", {"Breakout"}, {"tanh", "tanh-lan"}, 1),
    "11": ("dqn", {"Breakout"}, {"tanh", "tanh-lan", "sigmoid", "sigmoid-lan"}, 1),
    "13": ("dqn", GAMES, {"relu", "relu-lan", "sigmoid", "sigmoid-lan", "tanh", "tanh-lan"}, 5),
    "14": ("dqn", GAMES, {"relu", "relu-lan"}, 5),
    "15": ("dqn", GAMES, MAIN, 5),
    "16": ("dqn", GAMES, MAIN, 5),
    "17": ("ppo", GAMES, MAIN, 5),
}

# A training script as the launchers see one: flags, run folder, model.pt. What it does is --activation.
STANDIN = """
import argparse, fcntl, os, pathlib, signal, sys, time

class Experiment:
    env_id: str = "Game"
    activation: str = "fine"
    seed: int = 1
    exp_name: str = "standin"
    total_timesteps: int = 100
    runs_dir: str = "runs"

parser = argparse.ArgumentParser()
for name, default in vars(Experiment).items():
    if not name.startswith("_"):
        parser.add_argument("--" + name.replace("_", "-"), default=default)
parser.add_argument("--seconds", type=float, default=0)
args = parser.parse_args()
folder = pathlib.Path(args.runs_dir) / f"{args.env_id}__{args.exp_name}__{args.activation}__{args.seed}"
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / ".lock", "a")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
again = (folder / "begun").exists()
(folder / "begun").write_text(str(os.getpid()))

def note(*words):
    with open(pathlib.Path(args.runs_dir) / "notes", "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

def checkpoint(signum, frame):
    note("signalled", folder.name, signum)
    time.sleep(0.3)  # a second signal would be noted too
    sys.exit(128 + signum)

signal.signal(signal.SIGTERM, checkpoint)
signal.signal(signal.SIGINT, checkpoint)
note("begin", folder.name, time.time(), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"])
if args.activation == "crash":
    sys.exit("error: it crashed, as it does every time")
if args.activation == "hang" and not again:
    time.sleep(1000)
if args.activation == "kill9" and not again:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(args.seconds)
note("end", folder.name, time.time())
if args.activation != "nothing":
    (folder / "model.pt").write_text("weights")
"""


@pytest.fixture
def project(tmp_path):
    """The launchers in a folder of their own, whose name has a space, with a script that takes no time."""
    folder = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "standin.py").write_text(STANDIN)
    return folder


def environment(path=(), **variables):
    """`python` is the tests' own; no GPU but a fake one; `path` comes first."""
    path = os.pathsep.join([*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    return clean | {"PATH": path, **variables}


def bash(*command, cwd=None, stdin="", **kwargs):
    kwargs.setdefault("env", environment())
    return subprocess.run(
        ["bash", *map(str, command)], capture_output=True, text=True, cwd=cwd, input=stdin, timeout=280, **kwargs
    )


def jobs(*arguments):
    done = bash(ROOT / "scripts" / "jobs.sh", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def sweep(project, *arguments, **kwargs):
    return bash(project / "scripts" / "sweep.sh", *arguments, **kwargs)


def job_list(project, *lines, name="jobs.txt"):
    (project / name).write_text("".join(f"{line}\n" for line in lines))
    return project / name


def notes(project, kind):
    """What the stand-ins noted: [[run, ...]]."""
    lines = (project / "runs" / "notes").read_text().splitlines() if (project / "runs" / "notes").exists() else []
    return [line.split()[1:] for line in lines if line.split()[0] == kind]


def wait_until(condition, process=None, every=0.02):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, condition
        assert process is None or process.poll() is None
        time.sleep(every)


@contextlib.contextmanager
def locked_by_another_process(folder):
    """The run folder as a training holds it."""
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", holder, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()
        yield
        process.stdin.close()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ jobs.sh


def parsed(line):
    words = shlex.split(line)
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    return (
        words[1].split("_")[0],
        flags["--env-id"].removesuffix("NoFrameskip-v4"),
        flags["--activation"],
        flags["--seed"],
    )


def test_the_whole_study_seed_1_first():
    """880 distinct runs. Would catch: an activation that a script gained; seed 2 before all of seed 1."""
    lines = jobs()
    runs = [parsed(line) for line in lines]
    assert len(lines) == len(set(runs)) == 880
    assert [seed for *_, seed in runs] == [seed for seed in "12345" for _ in range(176)]
    assert {game for _, game, _, _ in runs} == GAMES
    for script in (dqn_atari_lan, ppo_atari_lan):
        algorithm = script.__name__.split("_")[0]
        activations = {activation for name, _, activation, _ in runs if name == algorithm}
        assert activations == set(get_args(script.Experiment.__annotations__["activation"]))
    comparison = runs[:11]
    assert len({activation for _, _, activation, _ in comparison}) == 11
    assert len({(algorithm, game) for algorithm, game, _, _ in comparison}) == 1
    assert lines[0] == "python dqn_atari_lan.py --env-id BeamRiderNoFrameskip-v4 --activation relu --seed 1"


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figures_runs(figure):
    algorithm, games, activations, seeds = FIGURES[figure]
    runs = [parsed(line) for line in jobs("--figure", figure)]
    expected = {
        (algorithm, game, activation, str(seed + 1))
        for game in games
        for activation in activations
        for seed in range(seeds)
    }
    assert len(runs) == len(expected)
    assert set(runs) == expected


def test_filters_and_flags_that_are_passed_on():
    """Would catch: a name that the shell, or the launcher, would split or expand."""
    name = 'it\'s a $HOME `name` with "quotes" * é'
    flags = ["--exp-name", name, "--no-double-q", "--total-timesteps", "1000"]
    lines = jobs("--algorithms", "dqn", "--games", "Pong,Breakout", "--activations", "tanh,relu", "--seeds", "7,2",
                 "--runs-dir", "my runs", "--", *flags)  # fmt: skip
    assert len(lines) == 8
    script = ["python", "dqn_atari_lan.py", "--env-id", "PongNoFrameskip-v4"]
    start = [*script, "--activation", "tanh", "--seed", "7", "--runs-dir"]
    assert shlex.split(lines[0]) == [*start, "my runs", *flags]
    as_bash_reads_it = bash("-c", f"printf '%s\\n' {lines[0]}").stdout.splitlines()
    assert as_bash_reads_it == [*start, "my runs", *flags]
    assert jobs("--figure", "8", "--seeds", "3", "--games", "Pong") == [
        f"python ppo_atari_lan.py --env-id PongNoFrameskip-v4 --activation {activation} --seed 3"
        for activation in ("relu", "tanh", "sigmoid", "tanh-lan")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--games Pnog", "--games Pnog: there is no such one; it takes some of BeamRider,Breakout,"),
        ("--games *", "--games *: there is no such one"),
        ("--games Pong,", "ends in a comma"),
        ("--algorithms a2c", "takes some of dqn,ppo"),
        ("--activations relu,gelu", "--activations gelu: there is no such one; it takes some of relu,tanh,"),
        ("--seeds one", "--seeds one: it takes whole numbers"),
        ("--seeds 1,,2", "it takes whole numbers"),
        ("--figure 2", "it takes some of 1,4,5a,5b,6,7,8,10,11,13,14,15,16,17"),
        ("--figure 8 --algorithms dqn", "figure 8 needs none of these runs, only ppo"),
        ("--runs-dir", "--runs-dir needs a value"),
        ("--seed 1", "unknown flag --seed"),
        ("-- --seed 4", "choose with --games, --activations and --seeds"),
    ],
)
def test_what_jobs_refuses(arguments, message):
    done = bash(ROOT / "scripts" / "jobs.sh", *arguments.split(), cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------- the job list


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["python standin.py", "python gone.py --seed 1"], "line 2: there is no gone.py"),
        (["echo hello"], "line 1: echo hello: a job is one line `python <script>.py <flags>`"),
        (["python standin.py; rm -rf x"], "a job is one line `python <script>.py <flags>`"),
        (["python scripts/status.py"], "scripts/status.py is not a training script of this project"),
        (["", "python standin.py --exp-name 'open"], "line 2: No closing quotation"),
        (["python standin.py --seed 1 --overwrite"], "line 1: --overwrite would throw the run away"),
        (["python standin.py --seed x"], "line 1: --seed and --total-timesteps take whole numbers"),
        (["python standin.py --seed 1", "python standin.py --seed=01 --seconds 1"], "lines 1 and 2 are the same run"),
        (["python standin.py --exp-name " + "n" * 250], "at most 251 bytes"),
        (["# nothing", ""], "holds no job"),
    ],
)
def test_a_list_that_cannot_be_run_is_refused_before_anything_starts(project, lines, message):
    """One line on stderr, exit code 2, from each launcher. Would catch: half a sweep that ran before the bad line."""
    file = job_list(project, *lines)
    before = files(project)
    slurm = bash("scripts/sweep.slurm", "--dry-run", file, cwd=project)
    for done in (sweep(project, file), sweep(project, "--status", file), slurm):
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    assert {path for path in files(project) if "__pycache__" not in str(path)} == before.keys()


def test_other_bad_input(project):
    for arguments, message in [
        (["absent.txt"], "cannot read the job list"),
        (["--jobs-per-gpu", "0", "x"], "--jobs-per-gpu takes a number from 1 on"),
        (["--foo"], "unknown flag --foo"),
        (["a", "b"], "one job list at a time"),
        ([], "the job list on standard input holds no job"),
    ]:
        done = sweep(project, *arguments, cwd=project)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_status_says_how_it_is_called(project):
    for arguments in ([], ["--plan"], ["a", "b"], ["--plan", "a", "1x"]):
        done = subprocess.run(
            [sys.executable, "scripts/status.py", *arguments], cwd=project, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr == "error: expected jobs.txt, or --plan jobs.txt and maybe numbers of its lines; see --help\n"
        )


def test_dry_run_does_nothing(project):
    """Blank lines, comments, Windows line ends and repetitions are no jobs; tasks have the list's line numbers."""
    file = job_list(project, "# all", "", "python standin.py --seed 1\r", "python standin.py --seed 1 # again",
                    "  python standin.py --seed 2 --exp-name 'a b'")  # fmt: skip
    before = files(project)
    second = "python standin.py --seed 2 --exp-name 'a b'"
    done = sweep(project, "--dry-run", file.name, cwd=project)
    assert done.stdout.splitlines()[0] == "2 runs: 0 finished, 0 running already, 2 to run"
    assert done.stdout.splitlines()[2:] == ["python standin.py --seed 1", second]
    piped = sweep(project, "--dry-run", stdin=file.read_text())
    assert piped.stdout == done.stdout
    slurm = bash("scripts/sweep.slurm", "--dry-run", file, cwd=project)
    assert slurm.stdout.splitlines() == ["task 3: python standin.py --seed 1", f"task 5: {second}"]
    slurm = bash("scripts/sweep.slurm", "--dry-run", "-", cwd=project, stdin=file.read_text())
    assert slurm.stdout.splitlines() == ["task 3: python standin.py --seed 1", f"task 5: {second}"]
    status = sweep(project, "--status", file)
    assert status.stdout.splitlines()[-1].startswith("2 runs: 0 finished, 0 running, 0 failed, 0 stopped, 2 waiting")
    assert files(project) == before


def test_status_of_every_state(project):
    """Hand-made folders and logs; 30 and 10 steps a second and 100 to go at 20, one run at work."""
    runs = project / "runs"
    log = "=== 2026-01-01T00:00:00+00:00 start in process 1 on host with OMP_NUM_THREADS=1: python standin.py\n"
    for seed, end in [
        (1, " 90% 90/100 [00:03<00:00, 30.00step/s, last_100_games=1.56]\n=== 2026-01-01T00:00:09+00:00 exit 0\n"),
        (2, "  1% 1/100 [00:03<00:00, ?step/s]\n 40% 40/100 [00:04<00:06, 10.00step/s]\n"),
        (3, "error: no luck\n=== 2026-01-01T00:00:09+00:00 exit 1\n"),
        (4, "=== 2026-01-01T00:00:09+00:00 exit 143\n"),
        (5, "killed by a reboot, without a word\n"),
    ]:
        folder = runs / f"Game__standin__fine__{seed}"
        (folder / "checkpoints").mkdir(parents=True)
        (runs / ".sweep").mkdir(exist_ok=True)
        (runs / ".sweep" / f"{folder.name}.log").write_text(log + end)
    (runs / "Game__standin__fine__1" / "model.pt").write_text("weights")
    (runs / "Game__standin__fine__4" / "checkpoints" / "0000000050.ckpt").touch()
    file = job_list(project, *(f"python standin.py --seed {seed}" for seed in range(1, 7)))
    with locked_by_another_process(runs / "Game__standin__fine__2"):
        lines = sweep(project, "--status", file).stdout.splitlines()
        assert "1 running already, 4 to run" in sweep(project, "--dry-run", file).stdout
    # own speed 10: 60 steps, 6 s; of the others at 20: 50, 100 and 100 steps, 12.5 s
    assert [line.split()[0] for line in lines[:6]] == ["finished", "running", "failed", "stopped", "stopped", "waiting"]
    assert re.search(r"40 of 100 steps, 10 per second$", lines[1])
    assert "exit code 1, see runs/.sweep/Game__standin__fine__3.log" in lines[2]
    assert re.search(r"50 of 100 steps$", lines[3])
    assert lines[6] == "6 runs: 1 finished, 1 running, 1 failed, 2 stopped, 1 waiting; about 18 s left"


@pytest.mark.parametrize(
    "log",
    [
        "error: no luck\n" * 20_000 + "=== 2026-01-01T00:00:09+00:00 exit 1\n",
        "error: no luck\n=== 2026-01-01T00:00:09+00:00 exit 1\nand a child's last words\n",
    ],
)
def test_a_failed_runs_status_whatever_its_log_holds(project, log):
    """Would catch: a failed run shown as waiting or stopped, because of where its last lines are."""
    file = project / "runs" / ".sweep" / "Game__standin__fine__1.log"
    file.parent.mkdir(parents=True)
    start = "=== 2026-01-01T00:00:00+00:00 start in process 1 on host with OMP_NUM_THREADS=1: python standin.py\n"
    file.write_text(start + log)
    done = sweep(project, "--status", job_list(project, "python standin.py"))
    assert done.stdout.startswith("failed "), done.stdout


# ------------------------------------------------------------------------------------------------ sweep.sh


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
def test_a_sweep_that_cannot_tell_what_came_of_its_runs_does_not_say_that_all_went_well(project):
    """A script that is gone at the end, as after a checkout. Would catch: exit code 0 after failed runs."""
    (project / "gone.py").write_text(
        STANDIN.replace("import argparse", "__file__ and __import__('os').remove(__file__)\nimport argparse", 1)
    )
    done = sweep(project, job_list(project, "python gone.py --activation crash"))
    assert done.returncode == 1
    assert "there is no gone.py" in done.stderr
    assert "cannot tell what came of the runs" in done.stderr
    assert "0 failed" not in done.stdout


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
    folder = project / "runs" / "Game__standin__fine__1"
    folder.mkdir(parents=True)
    (project / "runs" / ".sweep").mkdir()
    with locked_by_another_process(folder):
        process = slurm_task(project, tmp_path, "python standin.py", "python standin.py --seed 2")
        told, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode == 0
    assert "task 7_1: another process is training it: python standin.py\n" in told
    assert "the list goes on behind line 1, where the array ends" in told


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
    small = fake_gpus(tmp_path / "small", 40000, 1600)
    text = sweep(project, "--dry-run", file, env=environment([small])).stdout.splitlines()[1]
    assert text.startswith("2 at once, 1 on each of the GPUs 0 1, CPU threads of each: ")
    assert "1 by 1.6 GB of free GPU memory at 1.5 GB" in text
    text = sweep(project, "--dry-run", file, env=environment([small], CUDA_VISIBLE_DEVICES="1")).stdout.splitlines()[1]
    assert text.startswith("1 at once, 1 on each of the GPUs 1,")
    text = sweep(project, "--dry-run", file, env=environment([small], CUDA_VISIBLE_DEVICES="")).stdout.splitlines()[1]
    assert re.match(r"\d+ at once, on the CPU, CPU threads of each: \d+ \(\d+ by ", text)
    assert f"{cores} by {cores} CPU cores" in text
    assert int(text.split()[0]) == max(1, min(map(int, re.findall(r"(\d+) by ", text))))
    for what, tenths in ((r"free RAM at 2\.5 GB a run", 25), (r"free disk at 1\.5 GB", 15)):
        runs, whole, tenth = map(int, re.search(rf"(\d+) by (\d+)\.(\d) GB of {what}", text).groups())
        assert runs == (10 * whole + tenth) // tenths


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
    hung = project / "runs" / "Game__standin__hang__1" / "begun"
    wait_until(lambda: hung.exists() and hung.read_text(), process)
    os.kill(int(hung.read_text()), signal.SIGKILL)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 2, output  # two runs failed
    assert output.splitlines()[-1] == "3 of 5 runs have finished, 2 failed"
    assert "failed: python standin.py --activation crash\nruns/.sweep/Game__standin__crash__1.log ends with" in output
    assert "    error: it crashed, as it does every time\n" in output
    begun = Counter(run for run, *_ in notes(project, "begin"))
    assert begun == {
        "Game__standin__crash__1": 3,
        "Game__standin__nothing__1": 1,
        "Game__standin__hang__1": 2,
        "Game__standin__kill9__1": 2,
    }
    assert (other / "Game__a name__fine__1" / "model.pt").exists()
    assert "exit 0" in (other / ".sweep" / "Game__a name__fine__1.log").read_text()
    log = (project / "runs" / ".sweep" / "Game__standin__kill9__1.log").read_text()
    assert [word for word in re.findall(r"exit (\d+)", log)] == ["137", "0"]
    states = [line.split()[0] for line in sweep(project, "--status", file).stdout.splitlines()[:-1]]
    assert states == ["failed", "finished", "finished", "failed", "finished"]


@needs_parallel
@pytest.mark.parametrize("how", ["terminal", signal.SIGTERM, signal.SIGHUP])
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
    assert sorted(notes(project, "signalled")) == [[f"Game__standin__fine__{seed}", "15"] for seed in (0, 1)]
    for run in ("Game__standin__fine__0", "Game__standin__fine__1"):
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


# ------------------------------------------------------------------------------------------------ real runs

COMMON = "--metrics-frequency 0 --checkpoint-frequency"
PPO = f"--total-timesteps 1536 --num-envs 4 --num-steps 32 --num-minibatches 2 --no-async-envs {COMMON} 256"
DQN = f"--total-timesteps 1600 --buffer-size 1600 --learning-starts 400 {COMMON} 200"
SCRIPTS = {"dqn": ("dqn_atari_lan.py", DQN.split()), "ppo": ("ppo_atari_lan.py", PPO.split())}


def run_folder(runs_dir, name):
    return runs_dir / f"PongNoFrameskip-v4__{name}_atari_lan__relu__1"


def real_jobs(runs_dir, *names):
    lines = []
    for name in names:
        arguments = ("--algorithms", name, "--games", "Pong", "--activations", "relu", "--seeds", 1)
        lines += jobs(*arguments, "--runs-dir", runs_dir, "--", *SCRIPTS[name][1])
    return lines


def checkpoint_step(runs_dir, name):
    folder = run_folder(runs_dir, name) / "checkpoints"
    return max((int(file.stem) for file in folder.glob("*.ckpt")), default=0)


def outcome(runs_dir, name):
    folder = run_folder(runs_dir, name)
    events = read_events(folder)
    events.pop("charts/SPS")
    return torch.load(folder / "model.pt", weights_only=True), events


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Outcomes of the runs that nobody disturbs."""
    found = {}

    def get(name):
        if name not in found:
            runs_dir = tmp_path_factory.mktemp("undisturbed") / "runs"
            script, flags = SCRIPTS[name]
            names = ("--env-id", "PongNoFrameskip-v4", "--activation", "relu", "--seed", 1)
            done = run_script(script, *names, "--runs-dir", runs_dir, *flags)
            assert done.returncode == 0, done.stderr
            found[name] = outcome(runs_dir, name)
        return found[name]

    return get


def assert_undisturbed(runs_dir, name, undisturbed):
    weights, events = outcome(runs_dir, name)
    expected_weights, expected_events = undisturbed(name)
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[key], expected_weights[key]) for key in weights)
    assert events == expected_events


@needs_parallel
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_real_sweep_killed_and_stopped_ends_like_an_undisturbed_one(tmp_path, undisturbed):
    """One training is killed with -9 and resumes within the sweep; then the sweep is stopped and started again."""
    runs_dir = tmp_path / "my runs"
    (tmp_path / "jobs.txt").write_text("\n".join(real_jobs(runs_dir, "dqn", "ppo")) + "\n")
    command = ["bash", str(ROOT / "scripts" / "sweep.sh"), "--jobs-per-gpu", "2", "jobs.txt"]
    logs = {name: runs_dir / ".sweep" / f"{run_folder(runs_dir, name).name}.log" for name in SCRIPTS}

    def start():
        return subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)

    process = start()
    wait_until(lambda: checkpoint_step(runs_dir, "dqn") >= 200, process)
    owner = (run_folder(runs_dir, "dqn") / ".lock").read_text()
    os.kill(int(owner.split()[1]), signal.SIGKILL)
    wait_until(lambda: "resumed at" in logs["dqn"].read_text(), process)
    wait_until(lambda: checkpoint_step(runs_dir, "ppo") or "exit 0" in logs["ppo"].read_text(), process)
    status = sweep(ROOT, "--status", tmp_path / "jobs.txt").stdout.splitlines()
    assert status[0].startswith("running   PongNoFrameskip-v4__dqn_atari_lan__relu__1"), status
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert re.findall(r"exit (\d+)", logs["dqn"].read_text()) == ["137", "143"]
    assert checkpoint_step(runs_dir, "dqn") % 200  # written on the signal

    process = start()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert output.splitlines()[-1].endswith("have finished, 0 failed")
    for name in SCRIPTS:
        assert_undisturbed(runs_dir, name, undisturbed)


# -------------------------------------------------------------------------------------------------- Slurm


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
    assert begun == {("Game__standin__crash__1",): 3, ("Game__standin__kill9__1",): 2, ("Game__a", "name__fine__1"): 1}
    status = sweep(project, "--status", file, env=array.environment).stdout.splitlines()
    assert [line.split()[0] for line in status[:-1]] == ["failed", "finished", "finished"]
    assert (
        f"as Slurm job {array.id}_3 with " in (project / "runs" / ".sweep" / "Game__standin__crash__1.log").read_text()
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
def test_a_requeued_and_a_warned_real_run_end_like_an_undisturbed_one(tmp_path, slurm, undisturbed):
    """`scontrol requeue`, as a preemption would, then the signal that comes ahead of the time limit. Would catch: a
    training told twice, which leaves without a checkpoint; a task that takes the warning for a failure."""
    runs_dir = tmp_path / "runs"
    file = tmp_path / "jobs.txt"
    file.write_text("\n".join(real_jobs(runs_dir, "ppo")) + "\n")
    array = Array(ROOT, file, slurm)
    log = runs_dir / ".sweep" / f"{run_folder(runs_dir, 'ppo').name}.log"

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
    assert_undisturbed(runs_dir, "ppo", undisturbed)
