"""What has become of each run of a job list; sweep.sh and sweep.slurm ask it.

python scripts/status.py jobs.txt               (a table)
python scripts/status.py --plan jobs.txt 3 4    (what a launcher needs to know of the runs of lines 3 and 4)

Everything is read from what the runs leave on the disk, and from squeue where there is one. Imports no torch: it
answers at once for hundreds of runs.
"""

import fcntl
import functools
import itertools
import mmap
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple

from tyro.conf import Positional, arg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lan_utils import flags
from lan_utils.cli import BadInput, launch
from lan_utils.files import read_json
from lan_utils.study import NEUTRAL_FLAGS, ROOT, dqn_disk, dqn_memory, run_name

STATES = ("finished", "running", "failed", "stopped", "waiting", "unreadable")
START = re.compile(r"^=== \S+ start in process (\d+) on (\S+) (?:as Slurm job (\S+) )?with ", re.MULTILINE)
EXIT = re.compile(r"^=== \S+ exit (\d+)$", re.MULTILINE)
WAITS = re.compile(r"^=== \S+ waits$", re.MULTILINE)
STOPPED = ("129", "130", "138", "140", "143", "152")  # exit codes of a run that a signal stopped and that resumes
LOG_TAIL = 20_000  # bytes
OTHER_RAM, OTHER_DISK = 2500, 1500  # MB, of a run without a replay memory: PPO with 8 games, PQN with 128
FRESH_SECONDS = 600  # a run whose lock cannot be seen, as on another host, is running if it has written so lately

defaults_of = functools.cache(flags.defaults_of)


@dataclass
class Args:
    """Show what has become of each run of a job list."""

    jobs: Annotated[Positional[str], arg(metavar="JOBS.TXT")]
    """the job list; -: standard input"""
    lines: Annotated[Positional[tuple[int, ...]], arg(metavar="[LINE ...]", help_behavior_hint="")] = ()
    """only the runs of these lines, counted from 1"""
    plan: bool = False
    """instead of the table a line for each run, with tabs: line number, state, CPU threads that an unfinished run began
    with (or -), log file, command, MB of RAM, MB of disk that it needs until it has finished"""


class Job(NamedTuple):
    """One line of the list."""

    line: int
    script: str
    folder: Path
    log: str
    steps: int
    command: str
    ram: int  # MB, as disk
    disk: int
    flags: dict[str, Any]  # as the line gives them, or the script's plain defaults


class Status(NamedTuple):
    """state: one of STATES (docs/sweeps.md explains them). step 0, speed 0 and threads 0: unknown."""

    state: str
    step: int = 0
    speed: float = 0.0
    note: str = ""
    threads: int = 0


# ------------------------------------------------------------------------------------------------ the list


def parse_job(number: int, text: str) -> Job | None:
    """One line of the list; None for a blank line or a comment, which a `#` outside of quotes begins.

    Raises:
        BadInput: it is not a run of this project.
    """
    line = f"line {number}"
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise BadInput(f"{line}: {error} in: {text}") from None
    if not words:
        return None
    if not all(map(str.isprintable, words)):
        raise BadInput(f"{line}: {text!r} contains an unprintable character")
    if len(words) < 2 or words[0] not in ("python", "python3") or not words[1].endswith(".py"):
        raise BadInput(f"{line}: {text}: a job is one line `python <script>.py <flags>`, as scripts/jobs.py prints it")
    script = words[1]
    if not (ROOT / script).is_file():
        raise BadInput(f"{line}: there is no {script} in the project's folder")
    if (ROOT / script).parent != ROOT:
        raise BadInput(f"{line}: {script} is not a training script: those are in the project's folder itself")
    try:
        values = dict(defaults_of(ROOT / script))
    except SyntaxError as error:
        raise BadInput(f"{line}: {script} is not valid Python: {error}") from None
    if not values:
        raise BadInput(f"{line}: {script} is not a training script: it has no class Args")
    for word, following in itertools.pairwise([*words[2:], ""]):
        word, has_value, value = word.partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and isinstance(values.get(name), bool):
            values[name] = True
        elif word.startswith("--no-") and isinstance(values.get(name[3:]), bool):
            values[name[3:]] = False
        elif word.startswith("--"):
            values[name] = value if has_value else following
    if values["overwrite"] is not False:
        raise BadInput(
            f"{line}: --overwrite would delete the run whenever it is resumed; "
            "to start it anew, stop it and run this line once by hand"
        )
    for name in ("env_id", "exp_name", "activation", "seed", "total_timesteps"):
        if name not in values:
            raise BadInput(f"{line}: {script} has no plain default of --{name.replace('_', '-')}: add the flag here")
    replay = {"buffer_size", "batch_size"} & values.keys()
    for name in ("seed", "total_timesteps", *replay):
        try:
            values[name] = int(values[name])
        except ValueError:
            raise BadInput(f"{line}: --{name.replace('_', '-')} takes a whole number: {text}") from None
    args = SimpleNamespace(**values)
    name = run_name(args)
    if "/" in name or len(os.fsencode(name)) > 251:
        raise BadInput(f"{line}: the run's name must have no slash and at most 251 bytes: {name}")
    if args.runs_dir.startswith("-"):
        raise BadInput(f"{line}: --runs-dir needs a folder: {text}")
    log = f"{args.runs_dir}/.sweep/{name}.log"
    ram, disk = OTHER_RAM, OTHER_DISK
    if len(replay) == 2:  # DQN, or a copy of it under another name
        transitions = min(args.buffer_size, args.total_timesteps)
        ram = dqn_memory(args.env_id, transitions, args.batch_size) // 1_000_000
        disk = dqn_disk(args.env_id, transitions) // 1_000_000
    return Job(
        number, script, Path(args.runs_dir, name), log, args.total_timesteps, shlex.join(words), ram, disk, values
    )


def read_jobs(file: str) -> list[Job]:
    """The list's runs, each once.

    Raises:
        BadInput: the list cannot be run as it is.
    """
    try:
        with open(0 if file == "-" else file, "rb", closefd=file != "-") as opened:
            lines = opened.read().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = "name a file of commands, as scripts/jobs.py prints them"
        raise BadInput(f"cannot read the job list {file}: {reason}; {hint}") from None
    os.chdir(ROOT)
    jobs: dict[str, Job] = {}
    for number, line in enumerate(lines, start=1):
        job = parse_job(number, line.rstrip("\r"))
        if job is None:
            continue
        first = jobs.setdefault(os.path.abspath(job.folder), job)
        if first.command != job.command:
            both = f"lines {first.line} and {job.line}"
            raise BadInput(f"{both} are the same run, {job.folder}, with different flags or scripts")
    if not jobs:
        raise BadInput(f"the job list {'on standard input' if file == '-' else file} contains no job")
    return list(jobs.values())


# ---------------------------------------------------------------------------------------------- their states


def is_locked(folder: Path) -> bool | None:
    """Is a process at work in the run folder? Asks without taking the lock, which a starting run may want.

    Returns:
        None where the file system has no locks on this host.
    """
    # By hand: Python's fcntl module has no struct flock, and /proc/locks knows neither NFS nor other containers.
    question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        file = open(folder / ".lock", "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return False
    with file:
        try:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
        except OSError:
            return None
    return struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK


def is_alive(pid: str, host: str, log: str) -> bool:
    """Does the launcher's process that wrote this start into the log still exist? It comes before the run's lock."""
    try:
        return host == os.uname().nodename and os.fsencode(log) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@functools.cache
def slurm_states() -> dict[str, str]:
    """The state of each job that Slurm knows, by its id as the logs have it."""
    if not shutil.which("squeue"):
        return {}
    try:
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return {}
    return dict(line.split(maxsplit=1) for line in listed.stdout.splitlines() if " " in line)


def read_log(log: str) -> str:
    """The line of the last start, however far back, and the log's end; "" where there is no log."""
    try:
        with open(log, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            tail = max(0, len(content) - LOG_TAIL)
            start = content.rfind(b"\n=== ", 0, max(0, content.rfind(b" start in process "))) + 1
            head = content[start : start + 1000].split(b"\n")[0] + b"\n" if start < tail else b""
            return (head + content[tail:]).decode(errors="replace")
    except (FileNotFoundError, ValueError):  # the second: it is empty
        return ""


def other_flags(job: Job) -> str:
    """Those of its line with which the run in its folder was not trained: the script would refuse them. "": none."""
    trained = read_json(job.folder / "config.json").get("args")
    if not isinstance(trained, dict):
        return ""
    trained = defaults_of(ROOT / job.script) | trained  # the script had no such flag yet
    differing = [
        f"--{name.replace('_', '-')} {trained[name]}, not {value}"
        for name, value in job.flags.items()
        if name in trained and name not in NEUTRAL_FLAGS and not is_same(value, trained[name])
    ]
    return ", ".join(differing)


def is_same(given: Any, trained: Any) -> bool:
    """Is the text of a flag the value that it had? 2.5e-4 is 0.00025. Flags of several words are left to the script."""
    if isinstance(trained, (list, tuple, dict)):
        return True
    try:
        return float(given) == float(trained)
    except (TypeError, ValueError):
        return str(given) == str(trained)


def status_of(job: Job) -> Status:
    """The state of a run by its status.json, its lock and the launcher's log."""
    try:
        return read_status(job)
    except OSError as error:
        return Status("unreadable", note=f"cannot read {error.filename or job.folder}: {error.strerror}")


def read_status(job: Job) -> Status:
    """Raises OSError."""
    locked = is_locked(job.folder)  # first: a run that ends meanwhile has written its status before it unlocks
    file = job.folder / "status.json"
    status = read_json(file)
    state, step, speed = status.get("state"), status.get("step", 0), status.get("steps_per_second", 0.0)
    log = read_log(job.log)
    model = job.folder / "model.pt"
    if state == "finished" or (not status and model.is_file() and model.stat().st_size):
        other = other_flags(job)
        if other:
            return Status("failed", step, note=f"it has finished with other flags: {other}")
        return Status("finished", step or job.steps, speed)

    start = [None, *START.finditer(log)][-1]
    pid, host, slurm_id = start.groups() if start else ("", "", "")
    ended = EXIT.findall(log, start.end() if start else 0)[-1:]
    slurm_state = slurm_states().get(slurm_id, "") if slurm_id else ""
    may_be_unseen = state == "running" and (locked is None or status.get("host") != os.uname().nodename)
    if (
        locked
        or (may_be_unseen and abs(time.time() - status.get("updated", 0)) < FRESH_SECONDS)
        or (not ended and (is_alive(pid, host, job.log) or slurm_state == "RUNNING"))
    ):
        if start and WAITS.search(log, start.end()):
            return Status("running", step, note="waits for free memory or disk")
        return Status("running", step, speed)

    of_run = step, speed, "", read_json(job.folder / "config.json").get("threads") or 0
    if slurm_state == "PENDING":
        return Status("waiting", *of_run)
    # The run went on after what the launcher last ran.
    by_hand = status and log and file.stat().st_mtime > os.stat(job.log).st_mtime
    if ended and ended[0] not in STOPPED and not by_hand:
        return Status("failed", *of_run)._replace(note=f"exit code {ended[0]}, see {job.log}")
    if state == "failed":
        return Status("failed", *of_run)
    return Status("stopped" if status or log else "waiting", *of_run)


def seconds_left(jobs: list[Job], statuses: list[Status]) -> float | None:
    """Until all runs but the failed ones have finished, if as many train at once as now; None where it is unknown.

    A run's speed is its own, or the mean of its script's runs, or the mean of all.
    """
    speeds: dict[str, list[float]] = {}
    for job, status in zip(jobs, statuses, strict=True):
        if status.speed:
            speeds.setdefault(job.script, []).append(status.speed)
    running = sum(status.state == "running" for status in statuses)
    if not speeds or not running:
        return None
    means = {script: sum(of_script) / len(of_script) for script, of_script in speeds.items()}
    other = sum(means.values()) / len(means)
    left = [
        (job.steps - status.step) / (status.speed or means.get(job.script, other))
        for job, status in zip(jobs, statuses, strict=True)
        if status.state in ("running", "stopped", "waiting")
    ]
    return max(sum(left) / running, *left, 0)


def duration(seconds: float) -> str:
    """At most two units: 2 d 3 h, 3 h 20 min, 20 min, 40 s."""
    days, hours, minutes = int(seconds // 86400), int(seconds % 86400 // 3600), int(seconds % 3600 // 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def print_table(jobs: list[Job]) -> None:
    statuses = [status_of(job) for job in jobs]
    width = max((len(job.folder.name) for job in jobs), default=0)
    for job, status in zip(jobs, statuses, strict=True):
        note = status.note
        if not note and (status.state in ("running", "stopped") or (status.step and status.state != "finished")):
            note = f"{status.step:>10,} of {job.steps:,} steps"
        if status.state == "running" and status.speed:
            note += f", {status.speed:.0f} per second"
        print(f"{status.state:10}  {job.folder.name:{width}}  {note}".rstrip())
    states = [status.state for status in statuses]
    counts = [f"{states.count(state)} {state}" for state in STATES if state != "unreadable" or state in states]
    left = seconds_left(jobs, statuses)
    remaining = ""
    if {"running", "stopped", "waiting"} & set(states):
        unknown = "no run has a speed yet" if "running" in states else "no run is training"
        remaining = f"; time left unknown: {unknown}" if left is None else f"; about {duration(left)} left"
    print(f"{len(jobs)} runs: {', '.join(counts)}{remaining}", flush=True)


def main(args: Args) -> None:
    jobs = [job for job in read_jobs(args.jobs) if not args.lines or job.line in args.lines]
    if not args.plan:
        print_table(jobs)
        return
    for job in jobs:
        status = status_of(job)
        fields = job.line, status.state, status.threads or "-", job.log, job.command, job.ram, job.disk
        print(*fields, sep="\t", flush=True)
        if status.state == "unreadable":
            print(f"error: line {job.line} is left out: {status.note}", file=sys.stderr)


if __name__ == "__main__":
    launch(main, Args)
