"""Scripts as from the shell, in processes forked from one that has imported torch.

`python dqn_atari_lan.py` spends some four CPU seconds on imports, and the tests start it again and again.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preload"])


def _child(arguments, streams, environment, before):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # python's default again
    for descriptor, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    if before:
        before()
    sys.argv = list(arguments)
    sys.path.insert(0, str((ROOT / arguments[0]).parent))
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing leaves without


def serve():
    """Start the server that forks, where there is none; the environment of what it forks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Python 3.11 does not tell the server where to look for what it preloads, and hides that it found nothing.
    with mock.patch.dict(os.environ, environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}):
        forkserver.ensure_running()
    return environment


def start(arguments, output, errors=None, before=None):
    """`python <arguments>` in the project's folder, on one thread, so that two tests at once do not fight.

    Args:
        arguments: a script and its flags.
        output, errors: files to which stdout and stderr are appended; one file by default.
        before: called in the process before the script.
    """
    environment = serve()
    streams = [str(output), str(errors or output)]
    process = CONTEXT.Process(target=_child, args=([*map(str, arguments)], streams, environment, before))
    process.start()
    return process


def run(arguments, timeout=280):
    """Start a script and wait for its end; a `subprocess.CompletedProcess`."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        process = start(arguments, *streams)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, *(file.read_text() for file in streams))
