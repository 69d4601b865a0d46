"""What the tests of jobs.py, status.py, sweep.sh and sweep.slurm share: the launchers in a project of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

# A training script as the launchers see one: flags, run folder, status.json. What it does is --activation.
STANDIN = """
import argparse, dataclasses, fcntl, json, os, pathlib, signal, sys, time
from lan_utils.study import run_name

@dataclasses.dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"
    activation: str = "tanh-lan"
    seed: int = 1
    exp_name: str = "standin"
    total_timesteps: int = 100
    runs_dir: str = "runs"
    seconds: float = 0.0

parser = argparse.ArgumentParser()
for field in dataclasses.fields(Args):
    parser.add_argument("--" + field.name.replace("_", "-"), type=field.type, default=field.default)
args = parser.parse_args()
folder = pathlib.Path(args.runs_dir) / run_name(args)
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / ".lock", "a")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
again = (folder / "begun").exists()
(folder / "begun").write_text(str(os.getpid()))

if not again:
    (folder / "config.json").write_text(json.dumps({"threads": int(os.environ["OMP_NUM_THREADS"])}))

def status(state):
    content = {"state": state, "step": 100 * (state == "finished"), "total_timesteps": 100, "steps_per_second": 50}
    content |= {"pid": os.getpid(), "host": os.uname().nodename, "updated": time.time()}
    (folder / "status.json.tmp").write_text(json.dumps(content))
    os.replace(folder / "status.json.tmp", folder / "status.json")

def note(*words):
    with open(pathlib.Path(args.runs_dir) / "notes", "a") as file:
        file.write(" ".join(map(str, words)) + "\\n")

def checkpoint(signum, frame):
    note("signalled", folder.name, signum)
    status("stopped")
    time.sleep(0.3)  # a second signal would be noted too
    sys.exit(128 + signum)

status("running")
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
    status("finished")
"""


@pytest.fixture
def project(tmp_path):
    """The launchers in a folder of their own, whose name has a space, with a script that takes no time."""
    folder = tmp_path / "a project"
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "lan_utils").mkdir()
    for name in ("__init__.py", "cli.py", "files.py", "flags.py", "machine.py", "study.py"):
        shutil.copy(ROOT / "lan_utils" / name, folder / "lan_utils")
    (folder / "standin.py").write_text(STANDIN)
    return folder


def environment(path=(), **variables):
    """`python` is the tests' own; no GPU but a fake one; `path` comes first."""
    path = os.pathsep.join([*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    return clean | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1", **variables}


def bash(*command, cwd=None, stdin="", **kwargs):
    kwargs.setdefault("env", environment())
    return subprocess.run(
        ["bash", *map(str, command)], capture_output=True, text=True, cwd=cwd, input=stdin, timeout=280, **kwargs
    )


def jobs(*arguments):
    """The lines that scripts/jobs.py prints."""
    command = [sys.executable, ROOT / "scripts" / "jobs.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
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
