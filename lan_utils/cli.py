"""The command line: words become Args, errors one line and an exit code; what is printed during a run."""

import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

import tyro
from tqdm import tqdm

PRINT_SECONDS = 30  # between two lines of progress where there is no terminal
# What terminals and batch systems send before they end a process: save and exit. SIGQUIT still ends it at once.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
TOO_MANY = (
    "error: the system allows no more processes or threads (a container's pids limit, or ulimit -u): raise it, or use "
    "fewer with --num-threads 1 and PPO's --no-async-envs"
)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BadInput(Exception):
    """The request cannot be carried out: exit code 2, nothing written."""


class RunFailed(Exception):
    """The run cannot go on: exit code 1."""


class Stopped(KeyboardInterrupt):
    """A signal ended the run: exit code 128 + its number."""

    def __init__(self, signum: int, saved: bool):
        super().__init__(signum)
        self.signum, self.saved = signum, saved


def parse(args_class: type) -> Any:
    """The command line as an instance of a dataclass of flags, whose docstring opens `--help`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (closed by whoever started this)
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)
    try:
        return tyro.cli(args_class, description=args_class.__doc__)
    except BrokenPipeError:  # --help | head
        os._exit(128 + signal.SIGPIPE)


def launch(main: Callable[[Any], None], args_class: type) -> None:
    """Parse the command line, run `main(args)`, and turn what a user can cause into one line and an exit code.

    Args:
        args_class: dataclass of flags.
    """
    args = parse(args_class)
    try:
        main(args)
    except BadInput as error:
        leave(2, f"error: {error}")
    except RunFailed as error:
        leave(1, f"error: {error}")
    except BlockingIOError:
        leave(1, TOO_MANY)
    except Stopped as stop:
        remedy = "this resumes it" if stop.saved else "nothing was saved; this starts anew"
        leave(128 + stop.signum, f"stopped by {signal.Signals(stop.signum).name}; {remedy}: {same_command()}")
    except KeyboardInterrupt:
        leave(130, f"interrupted; every file is whole, run this again: {same_command()}")
    except BrokenPipeError:  # | head
        os._exit(128 + signal.SIGPIPE)
    except OSError as error:
        remedy = "free some space" if error.errno in DISK_FULL else "fix this"
        reason = str(error.strerror or error).split("\n", 1)[0]
        what = f"cannot use {error.filename or 'a file'}: {reason}"
        leave(1, f"error: {what}. What was saved is whole: {remedy}, then run this again: {same_command()}")
    except Exception as error:
        first_line = str(error).split("\n", 1)[0]
        if first_line == "can't start new thread":
            leave(1, TOO_MANY)
        kind = type(error)
        # By their names: importing torch for this would cost the plots a second.
        if kind.__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error):
            leave(1, f"error: out of memory: {first_line}; free some, then run this again: {same_command()}")
        if kind.__name__ == "BrokenProcessPool":
            leave(1, f"error: a worker process died (out of memory?); free some, then run this again: {same_command()}")
        if getattr(args, "compile", False) and kind.__module__.startswith(("torch._dynamo", "torch._inductor")):
            remedy = "start anew without it, under another --exp-name or with --overwrite"
            leave(1, f"error: --compile failed: {first_line}; {remedy}")
        raise


def leave(code: int, message: str) -> NoReturn:
    """Print one line on stderr and exit."""
    print_line(message, sys.stderr)
    sys.exit(code)


def print_line(line: str, stream: TextIO | None = None) -> None:
    """Print a line, by default on stdout; training goes on when nobody reads it any more, or the terminal is closed."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(message: str) -> None:
    print_line(f"warning: {message}", sys.stderr)


def same_command() -> str:
    """What resumes this run."""
    return shlex.join(["python", *(word for word in sys.argv if word != "--overwrite")])


class Progress:
    """A bar on a terminal; elsewhere the same line every 30 seconds."""

    def __init__(self, total: int, done: int):
        self.bar = tqdm(total=total, initial=done, unit="step", smoothing=0.05, dynamic_ncols=True, disable=None)
        self.first, self.total, self.done = done, total, done
        self.start = self.printed = time.monotonic()

    def update(self, step: int, **values: str) -> None:
        """Show `step` agent steps and, beside speed and time left, `values`."""
        if not self.bar.disable:
            self.bar.set_postfix(values, refresh=False)
        self.bar.update(step - self.done)
        self.done = step
        if self.bar.disable and time.monotonic() - self.printed >= PRINT_SECONDS:
            self.printed = time.monotonic()
            postfix = ", ".join(f"{name}={value}" for name, value in values.items())
            elapsed = self.printed - self.start
            line = tqdm.format_meter(
                step, self.total, elapsed, ncols=0, unit="step", initial=self.first, postfix=postfix
            )
            print_line(line)

    def speed(self) -> float:
        """Agent steps per second since this process began."""
        return (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    def close(self) -> None:
        self.bar.close()
