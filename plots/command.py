"""What the command around the plots needs: the out folder, and worker processes."""

import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from lan_utils.cli import BadInput
from lan_utils.files import replace
from plots.events import CACHE_NAME, read_run
from plots.report import TABLES
from plots.results import RecordedRun

MARK = ".plot_results"  # of an out folder; whoever wants the folder for something else deletes it
MARK_TEXT = b"plot_results.py draws into this folder and replaces its own files here.\n"


def print_lines(lines: Iterable[str], to_stdout: bool = False) -> None:
    for line in lines:
        print(line, file=sys.stdout if to_stdout else sys.stderr, flush=True)


def choose_items(only: Sequence[str], figures: Iterable[str]) -> list[str]:
    """The names of figures, and "tables", that begin with one of `only`; all without it.

    Raises:
        BadInput: nothing begins with one of them.
    """
    names = [*figures, "tables"]
    for beginning in only:
        if not beginning or not any(name.startswith(beginning) for name in names):
            raise BadInput(f"--only {beginning!r} is not how any of these names starts: {', '.join(names)}")
    return [name for name in names if not only or name.startswith(tuple(only))]


# -------------------------------------------------------------------------------------------- out folder


def is_marked(out_dir: Path) -> bool:
    """Is the folder this program's own? Its mark says so, nothing else."""
    try:
        return (out_dir / MARK).read_bytes() == MARK_TEXT
    except OSError:
        return False


def prepare_out_dir(out_dir: Path, items: Sequence[str]) -> Path:
    """Make the out folder, its mark and its cache.

    Args:
        items: names of figures, and "tables".

    Returns:
        The folder of the cache.

    Raises:
        BadInput: it cannot be written, or holds a file of these names without the mark that this program made it.
    """
    try:
        if (out_dir / "config.json").exists():
            raise BadInput(f"--out-dir {out_dir} is a run's folder; name another one")
        if not is_marked(out_dir):
            names = [f"{name}.{suffix}" for name in items for suffix in ("png", "pdf") if name != "tables"]
            for name in (MARK, "index.html", *TABLES, *names):
                if os.path.lexists(out_dir / name):
                    raise BadInput(
                        f"--out-dir {out_dir} holds {name}, which this program did not make; name another one"
                    )
        cache = out_dir / ".cache"
        cache.mkdir(parents=True, exist_ok=True)
        if not is_marked(out_dir):
            replace(out_dir / MARK, lambda file: file.write(MARK_TEXT))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"--out-dir {out_dir}: {reason}; name a folder that can be written") from None
    return cache


def read_runs(runs: Sequence[RecordedRun], cache: Path) -> None:
    """Give each run that has a config.json its points; files of the cache that belong to none of them are deleted."""
    readable = [run for run in runs if run.algorithm]
    hashes = [hashlib.sha1(os.fsencode(run.folder.absolute())).hexdigest() for run in readable]
    caches = [cache / f"plot_results-{name}.npz" for name in hashes]
    with workers() as pool:
        folders = [run.folder for run in readable]
        for run, found in zip(readable, pool.map(read_run, folders, caches, chunksize=4), strict=True):
            run.points, run.agent_steps, run.problems = found
    for file in cache.iterdir():
        if CACHE_NAME.fullmatch(file.name) and file not in caches:
            file.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- processes


def begin_worker(parent: int) -> None:
    """Leave Ctrl-C to the program, and die with it, however it ends (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before this line
            os._exit(1)


@contextlib.contextmanager
def workers() -> Iterator[ProcessPoolExecutor]:
    """A process per CPU core. An error or Ctrl-C ends it with the tasks that have begun, a few seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fork = multiprocessing.get_context("fork")  # no second import of everything
    with ProcessPoolExecutor(cores, fork, begin_worker, (os.getpid(),)) as pool:
        try:
            yield pool
        except BaseException:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would find the pool half shut down
            pool.shutdown(cancel_futures=True)
            raise
