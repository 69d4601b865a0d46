"""What has become of each run of a job list; sweep.sh and sweep.slurm ask it.

  python scripts/status.py jobs.txt            a table
  python scripts/status.py --plan jobs.txt     a line for each run, with tabs:
      line number, state, CPU threads that an unfinished run began with (or -),
      log file, command, MB of RAM and of disk that it needs until it has finished
  python scripts/status.py --plan jobs.txt 3   of line 3 only

Everything is read from what the runs leave on the disk, and from squeue where
there is one. Imports no torch: it answers at once for hundreds of runs.
"""

import fcntl
import functools
import itertools
import json
import mmap
import os
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lan_utils.flags import defaults_of
from lan_utils.study import ROOT, dqn_disk, dqn_memory, run_name

STATES = ("finished", "running", "failed", "stopped", "waiting", "unreadable")
START = re.compile(r"=== \S+ start in process (\d+) on (\S+) (?:as Slurm job (\S+) )?with ")
EXIT = re.compile(r"=== \S+ exit (\d+)")
STOPPED = ("129", "130", "138", "140", "143", "152")  # exit codes: stopped by a signal, resumes
LOG_TAIL = 20_000  # bytes
OTHER_RAM, OTHER_DISK = 2500, 1500  # MB, of a run without a replay memory: PPO with its eight games
JSON_LIMIT = 1_000_000  # bytes
FRESH_SECONDS = (
    600  # a run whose lock may not be seen here, such as one on another host, is at work if it wrote so lately
)
# What comes before a comment: whole words, quoted and escaped as in a shell. A `#` begins one only where a word would.
WORDS = re.compile(r"""(?:[ \t\r\n]++|(?!\#)(?:[^ \t\r\n'"\\]|\\.|'[^']*+'|"(?:[^"\\]|\\.)*+")++)*+""")


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


class Status(NamedTuple):
    """state: one of STATES; stopped is unfinished and resumes, waiting has not begun. step 0 and speed 0: unknown."""

    state: str
    step: int = 0
    speed: float = 0.0
    note: str = ""
    threads: int = 0


class Unreadable(Exception):
    """A run's file is none that a run writes, or cannot be read."""


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------ the list


def parse_job(number: int, text: str) -> Job | None:
    """One line of the list; None for a blank line or a comment. Exits with 2 where it is not a run of this project."""
    end = WORDS.match(text).end()
    try:
        words = shlex.split(text[:end] if text[end:].startswith("#") else text)
    except ValueError as error:
        fail(f"line {number}: {error} in: {text}")
    if not words:
        return None
    if not all(map(str.isprintable, words)):
        fail(f"line {number}: {text!r} holds an unprintable character")
    if len(words) < 2 or words[0] not in ("python", "python3") or not words[1].endswith(".py"):
        fail(f"line {number}: {text}: a job is one line `python <script>.py <flags>`, as scripts/jobs.py prints it")
    script, flags = words[1], words[2:]
    if not (ROOT / script).is_file():
        fail(f"line {number}: there is no {script} in the project's folder")
    if (ROOT / script).parent != ROOT:
        fail(f"line {number}: {script} is not a training script: those lie in the project's folder itself")
    values = defaults_of(ROOT / script)
    if not values:
        fail(f"line {number}: {script} is not a training script: it has no class Args of flags")
    for word, following in itertools.pairwise([*flags, ""]):
        name, has_value, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if name == "overwrite":
            fail(
                f"line {number}: --overwrite would throw the run away whenever it is resumed; "
                "to start it anew, stop it and run this line once by hand"
            )
        if name in values:
            values[name] = value if has_value else following
    replay = {"buffer_size", "batch_size"} & values.keys()
    for name in ("seed", "total_timesteps", *replay):
        try:
            values[name] = int(values[name])
        except ValueError:
            fail(f"line {number}: --{name.replace('_', '-')} takes a whole number: {text}")
    args = SimpleNamespace(**values)
    name = run_name(args)
    if "/" in name or len(os.fsencode(name)) > 251:
        fail(f"line {number}: the run's name must have no slash and at most 251 bytes: {name}")
    runs_dir = args.runs_dir if not args.runs_dir.startswith("-") else f"./{args.runs_dir}"  # no flag of `mkdir`
    log = f"{runs_dir}/.sweep/{name}.log"
    ram, disk = OTHER_RAM, OTHER_DISK
    if len(replay) == 2:  # DQN, or a copy of it under another name
        transitions = min(args.buffer_size, args.total_timesteps)
        ram = dqn_memory(args.env_id, transitions, args.batch_size) // 1_000_000
        disk = dqn_disk(args.env_id, transitions) // 1_000_000
    return Job(number, script, Path(runs_dir, name), log, args.total_timesteps, shlex.join(words), ram, disk)


def read_jobs(file: str) -> list[Job]:
    """The list's runs, each once. Exits with 2 where the list cannot be run as it is."""
    try:
        with open(0 if file == "-" else file, "rb", closefd=file != "-") as opened:
            lines = opened.read().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        fail(f"cannot read the job list {file}: {reason}; name a file of commands, as scripts/jobs.py prints them")
    os.chdir(ROOT)
    jobs: dict[str, Job] = {}
    for number, line in enumerate(lines, start=1):
        job = parse_job(number, line.rstrip("\r"))
        if job is None:
            continue
        first = jobs.setdefault(os.path.abspath(job.folder), job)
        if first.command != job.command:
            fail(f"lines {first.line} and {job.line} are the same run, {job.folder}, with different flags")
    if not jobs:
        fail(f"the job list {'on standard input' if file == '-' else file} holds no job")
    return list(jobs.values())


# ---------------------------------------------------------------------------------------------- their states


def open_regular(file: Path | str) -> int | None:
    """Descriptor for reading; None where there is no such file. Waits for no pipe and follows no link.

    Raises:
        Unreadable
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = "it is a link" if os.path.islink(file) else error.strerror
        raise Unreadable(f"cannot read {file}: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable(f"{file} is no regular file: move it away")
    return descriptor


def read_json(file: Path) -> dict[str, Any]:
    """{} where there is no such file.

    Raises:
        Unreadable
    """
    descriptor = open_regular(file)
    if descriptor is None:
        return {}
    with open(descriptor, "rb") as opened:
        try:
            content = json.loads(opened.read(JSON_LIMIT))
        except (ValueError, RecursionError):
            content = None
    if not isinstance(content, dict):
        raise Unreadable(f"{file} is damaged: restore it or move it away")
    return content


def number(value: Any) -> float:
    """The value, or 0 where it is none that a run writes."""
    return value if type(value) in (int, float) and 0 < value < 1e15 else 0


def is_locked(folder: Path) -> bool | None:
    """Is a process at work in the run folder? Asks without taking the lock, which a starting run may want.

    Returns:
        None where the file system has no locks on this host.
    """
    descriptor = open_regular(folder / ".lock")
    if descriptor is None:
        return False
    # By hand: Python's fcntl module has no struct flock, and /proc/locks knows neither NFS nor other containers.
    question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with open(descriptor, "rb") as file:
        try:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, question)
        except OSError:
            return None
    return struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK


def is_alive(pid: str, host: str, log: str) -> bool:
    """Is the launcher's process that wrote this start into the log still there? It is before the run takes its lock."""
    try:
        return host == os.uname().nodename and os.fsencode(log) in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@functools.cache
def slurm_states() -> dict[str, str]:
    """State of each job that Slurm knows, by the id that the logs give."""
    if not shutil.which("squeue"):
        return {}
    try:
        command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i %T"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return {}
    return dict(line.split(maxsplit=1) for line in listed.stdout.splitlines() if " " in line)


def read_log(log: str) -> tuple[list[str], float]:
    """The line of the last start, however far back, and the log's last lines; when it was last written.

    Raises:
        Unreadable
    """
    descriptor = open_regular(log)
    if descriptor is None:
        return [], 0.0
    with open(descriptor, "rb"):
        written, size = os.fstat(descriptor).st_mtime, os.fstat(descriptor).st_size
        if not size:
            return [], 0.0
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
            tail = max(0, len(content) - LOG_TAIL)
            start = content.rfind(b"=== ", 0, max(0, content.rfind(b" start in process ")))
            head = content[start : start + 1000].split(b"\n")[0] + b"\n" if 0 <= start < tail else b""
            text = (head + content[tail:]).decode(errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line], written


def status_of(job: Job) -> Status:
    """From the run's status.json and lock, and from the launcher's log."""
    try:
        return read_status(job)
    except Unreadable as error:
        return Status("unreadable", note=str(error))
    except OSError as error:
        return Status("unreadable", note=f"cannot read {error.filename or job.folder}: {error.strerror}")


def read_status(job: Job) -> Status:
    """Raises Unreadable or OSError."""
    file = job.folder / "status.json"
    status = read_json(file)
    state = status.get("state")
    if status and state not in ("running", "stopped", "failed", "finished"):
        raise Unreadable(f"{file} is damaged: restore it or move it away")
    lines, log_written = read_log(job.log)
    step, speed = int(number(status.get("step"))), number(status.get("steps_per_second"))
    model = job.folder / "model.pt"
    if state == "finished" or (not status and model.is_file() and model.stat().st_size):
        return Status("finished", step or job.steps, speed)

    start = max((i for i, line in enumerate(lines) if START.match(line)), default=-1)
    pid, host, slurm_id = START.match(lines[start]).groups() if start >= 0 else ("", "", "")
    ended = [match[1] for line in lines[start + 1 :] if (match := EXIT.match(line))][-1:]
    slurm_state = slurm_states().get(slurm_id, "") if slurm_id else ""
    locked = is_locked(job.folder)
    may_be_unseen = state == "running" and (locked is None or status.get("host") != os.uname().nodename)
    if (
        locked
        or (may_be_unseen and abs(time.time() - number(status.get("updated"))) < FRESH_SECONDS)
        or (not ended and (is_alive(pid, host, job.log) or slurm_state == "RUNNING"))
    ):
        return Status("running", step, speed)

    threads = read_json(job.folder / "config.json").get("threads")
    of_run = step, speed, "", threads if type(threads) is int and 0 < threads < 10_000 else 0
    if slurm_state == "PENDING":
        return Status("waiting", *of_run)
    by_hand = status and file.stat().st_mtime > log_written  # later than what the launcher last ran
    if ended and ended[0] not in STOPPED and not by_hand:
        return Status("failed", *of_run)._replace(note=f"exit code {ended[0]}, see {job.log}")
    if state == "failed":
        return Status("failed", *of_run)
    return Status("stopped" if status or lines else "waiting", *of_run)


def seconds_left(jobs: list[Job], statuses: list[Status]) -> float | None:
    """Until all runs but the failed ones have finished, if as many go on at once as now; None where nobody can tell.

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
    """2 days 3 h, 3 h 20 min, 20 min, 40 s: no more than two units."""
    days, hours, minutes = int(seconds // 86400), int(seconds % 86400 // 3600), int(seconds % 3600 // 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


def print_table(jobs: list[Job]) -> None:
    statuses = [status_of(job) for job in jobs]
    width = max(len(job.folder.name) for job in jobs)
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
        unknown = "no run has told its speed yet" if "running" in states else "no run is going on"
        remaining = f"; time left unknown: {unknown}" if left is None else f"; about {duration(left)} left"
    print(f"{len(jobs)} runs: {', '.join(counts)}{remaining}")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__, end="")
        return
    plan = arguments[:1] == ["--plan"]
    names, only = arguments[plan : plan + 1], arguments[plan + 1 :]
    if not names or (only and not plan) or not all(map(str.isdecimal, only)):
        fail("expected jobs.txt, or --plan jobs.txt and maybe numbers of its lines; see --help")
    jobs = read_jobs(*names)
    if not plan:
        print_table(jobs)
        return
    for job in jobs:
        if not only or str(job.line) in only:
            status = status_of(job)
            print(job.line, status.state, status.threads or "-", job.log, job.command, job.ram, job.disk, sep="\t")
            if status.state == "unreadable":
                print(f"error: line {job.line} is left out: {status.note}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly behind `| head`
    main()
