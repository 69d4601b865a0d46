"""What has become of each run of a job list; sweep.sh and sweep.slurm ask it.

python scripts/status.py jobs.txt            a table
python scripts/status.py --plan jobs.txt     line number, state, log file and command of each run, separated by tabs
python scripts/status.py --plan jobs.txt 3   of line 3 only

Everything is read from what the runs leave on the disk, and from squeue where there is one. Imports no torch: it
answers at once for hundreds of runs.
"""

import ast
import fcntl
import functools
import itertools
import mmap
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PROJECT = Path(__file__).resolve().parent.parent
NAMING_FLAGS = ("runs_dir", "env_id", "exp_name", "activation", "seed", "total_timesteps")
START = re.compile(r"=== \S+ start in process (\d+) on (\S+) (?:as Slurm job (\S+) )?with ")
EXIT = re.compile(r"=== \S+ exit (\d+)")
PROGRESS = re.compile(r"\d+%\D* (\d+)/\d+ \[[^,\]]*, +([\d.]+)(step/s|s/step)")  # of checkpoint.Progress
STOPPED = (130, 143)  # exit codes: stopped by a signal, resumes
LOG_TAIL = 100_000  # bytes: more than half a day of progress lines


class Job(NamedTuple):
    """One line of the list."""

    line: int
    script: str
    folder: Path
    log: Path
    steps: int
    command: str


class Status(NamedTuple):
    """state: finished, running, failed, stopped (unfinished, resumes) or waiting. step 0 and speed 0: unknown."""

    state: str
    step: int
    speed: float
    last_lines: list[str]


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------ the list


@functools.cache
def script_defaults(script: str) -> dict[str, Any]:
    """The flags' defaults as the script declares them, of those that are constants."""
    tree = ast.parse((PROJECT / script).read_text())
    fields = [field for node in tree.body if isinstance(node, ast.ClassDef) for field in node.body]
    return {
        field.target.id: field.value.value
        for field in fields
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Constant)
    }


def parse_job(number: int, text: str) -> Job | None:
    """One line of the list; None for a blank line or a comment. Exits with 2 where it is not a run of this project."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        fail(f"line {number}: {error} in: {text}")
    if not words:
        return None
    if not all(map(str.isprintable, words)):
        fail(f"line {number}: {text!r} holds an unprintable character")
    if len(words) < 2 or words[0] not in ("python", "python3") or not words[1].endswith(".py"):
        fail(f"line {number}: {text}: a job is one line `python <script>.py <flags>`, as scripts/jobs.sh prints it")
    script, flags = words[1], words[2:]
    if not (PROJECT / script).is_file():
        fail(f"line {number}: there is no {script} in the project's folder")
    try:
        values = {name: script_defaults(script)[name] for name in NAMING_FLAGS}
    except (SyntaxError, UnicodeDecodeError):
        fail(f"line {number}: {script} is not Python")
    except KeyError as error:
        fail(f"line {number}: {script} is not a training script of this project: it has no {error} among its flags")
    for word, following in itertools.pairwise([*flags, ""]):
        name, has_value, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
        if name == "overwrite":
            fail(
                f"line {number}: --overwrite would throw the run away whenever it is resumed; delete its folder instead"
            )
        if name in values:
            values[name] = value if has_value else following
    try:
        seed, steps = int(values["seed"]), int(values["total_timesteps"])
    except ValueError:
        fail(f"line {number}: --seed and --total-timesteps take whole numbers: {text}")
    name = "{env_id}__{exp_name}__{activation}__{seed}".format_map(values | {"seed": seed})
    if "/" in name or len(os.fsencode(name)) > 251:
        fail(f"line {number}: the run's name must have no slash and at most 251 bytes: {name}")
    runs_dir = Path(values["runs_dir"])
    return Job(number, script, runs_dir / name, runs_dir / ".sweep" / f"{name}.log", steps, shlex.join(words))


def read_jobs(file: str) -> list[Job]:
    """The list's runs, each once. Exits with 2 where the list cannot be run as it is."""
    try:
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        lines = text.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        fail(f"cannot read the job list {file}: {reason}; name a file of commands, as scripts/jobs.sh prints them")
    os.chdir(PROJECT)
    jobs: dict[Path, Job] = {}
    for number, line in enumerate(lines, start=1):
        job = parse_job(number, line.rstrip("\r"))
        if job is None:
            continue
        first = jobs.setdefault(Path(os.path.abspath(job.folder)), job)
        if first.command != job.command:
            fail(f"lines {first.line} and {job.line} are the same run, {job.folder}, with different flags")
    if not jobs:
        fail(f"the job list {'on standard input' if file == '-' else file} holds no job")
    return list(jobs.values())


# ---------------------------------------------------------------------------------------------- their states


def is_locked(folder: Path) -> bool:
    """Is a process at work in the run folder? Asks without taking the lock, which a starting run may want."""
    try:
        with open(folder / ".lock", "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return False
    return struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK


def is_alive(pid: str, host: str, log: Path) -> bool:
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


def read_log(log: Path) -> str:
    """The line of the last start, however far back, and the log's end."""
    if not log.is_file() or not log.stat().st_size:
        return ""
    with open(log, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        tail = max(0, len(content) - LOG_TAIL)
        start = content.rfind(b"=== ", 0, max(0, content.rfind(b" start in process ")))
        head = content[start : content.find(b"\n", start) + 1] if 0 <= start < tail else b""
        return (head + content[tail:]).decode(errors="replace")


def status_of(job: Job) -> Status:
    """From `model.pt`, the lock, the log and the newest checkpoint's name."""
    text = read_log(job.log)
    lines = [line for part in text.split("\n") if (line := part.rsplit("\r", 1)[-1].rstrip())]
    start = max((i for i, line in enumerate(lines) if START.match(line)), default=-1)
    pid, host, slurm_id = START.match(lines[start]).groups() if start >= 0 else ("", "", "")
    this_time = lines[start + 1 :]
    ended = next((match for line in reversed(this_time) if (match := EXIT.match(line))), None)
    last_lines = [line for line in this_time if not EXIT.match(line)][-5:]

    points = [PROGRESS.search(line) for line in lines]
    points = [point for point in points if point and float(point[2])]
    speed = 0.0
    if points:
        speed = float(points[-1][2]) if points[-1][3] == "step/s" else 1 / float(points[-1][2])
    checkpoints = [int(file.stem) for file in (job.folder / "checkpoints").glob("*.ckpt") if file.stem.isdigit()]
    step = max([*checkpoints, 0])

    model = job.folder / "model.pt"
    slurm_state = slurm_states().get(slurm_id, "") if slurm_id else ""
    if model.is_file() and model.stat().st_size:
        return Status("finished", job.steps, speed, last_lines)
    if is_locked(job.folder) or (not ended and (is_alive(pid, host, job.log) or slurm_state == "RUNNING")):
        shown = [PROGRESS.search(line) for line in this_time]
        return Status("running", max([step, *(int(point[1]) for point in shown if point)]), speed, last_lines)
    if slurm_state == "PENDING" or (not text and step == 0):
        return Status("waiting", step, speed, last_lines)
    if ended and int(ended[1]) not in STOPPED:
        return Status("failed", step, speed, [*last_lines, f"exit code {ended[1]}"])
    return Status("stopped", step, speed, last_lines)


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
        if status.state not in ("finished", "failed")
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
        note = ""
        if status.state in ("running", "stopped") or (status.step and status.state != "finished"):
            note = f"{status.step:>10,} of {job.steps:,} steps"
        if status.state == "running" and status.speed:
            note += f", {status.speed:.0f} per second"
        if status.state == "failed":
            note = f"{status.last_lines[-1]}, see {job.log}"
        print(f"{status.state:8}  {job.folder.name:{width}}  {note}".rstrip())
    states = [status.state for status in statuses]
    counts = [f"{states.count(state)} {state}" for state in ("finished", "running", "failed", "stopped", "waiting")]
    unfinished = len(states) - states.count("finished") - states.count("failed")
    left = seconds_left(jobs, statuses)
    if not unfinished:
        remaining = ""
    elif left is None:
        remaining = "; time left unknown: no run " + (
            "has printed a speed yet" if "running" in states else "is going on"
        )
    else:
        remaining = f"; about {duration(left)} left"
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
    only = [int(number) for number in only]
    for job in jobs:
        if not only or job.line in only:
            print(job.line, status_of(job).state, job.log, job.command, sep="\t")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly behind `| head`
    try:
        main()
    except OSError as error:
        fail(f"cannot read {error.filename}: {error.strerror}")
