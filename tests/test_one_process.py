"""`main(Args(...))` as a notebook, a test or a process pool calls it: afterwards the process is as before."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import forked
import psutil
import pytest
import torch
from conftest import SCRIPTS, Quadrants, make_quadrants, small_args, stacked

import dqn_atari_lan
from lan_utils.cli import BadInput, RunFailed, Stopped
from lan_utils.run import Run, leaves_no_trace, set_up

pytestmark = pytest.mark.slow

# One script with its game in the process, and one with several games in each of its workers.
KINDS = [("dqn_atari_lan.py", False), ("pqn_atari_lan.py", True)]


def module_named(script):
    return importlib.import_module(script.removesuffix(".py"))


SET_BY_OTHERS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR")  # the latter by importing torch's compiler


def state_of_the_process():
    children = psutil.Process().children(recursive=True)
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "wakeup": signal.set_wakeup_fd(-1) if threading.current_thread() is threading.main_thread() else None,
        "excepthook": threading.excepthook,
        "warnings": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "flushes denormals": sys.float_info.min / 2 == 0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "benchmark": torch.backends.cudnn.benchmark,
        "precision": (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.fp32_precision),
        "environment": {name: value for name, value in os.environ.items() if name not in SET_BY_OTHERS},
        # Python's own, which it starts once, is no worker.
        "children": {child.pid for child in children if "resource_tracker" not in " ".join(child.cmdline())},
        "running threads": {thread.name for thread in threading.enumerate() if not thread.daemon},
    }


@pytest.fixture
def unchanged(monkeypatch):
    """Afterwards the process is as before; before, nothing is as a training sets it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(threading, "excepthook", lambda error: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = state_of_the_process()
    yield
    after = state_of_the_process()
    torch.set_num_threads(threads)
    assert after == before
    assert multiprocessing.active_children() == []


def assert_free(folder):
    """Its lock, for another process: this one could take its own twice."""
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", take, folder / ".lock"], check=True)


def status(folder):
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize(("script", "async_envs"), KINDS)
def test_three_seeds_in_a_loop_of_which_one_has_finished_before(
    monkeypatch, runs_dir, capsys, unchanged, script, async_envs
):
    """Would catch: a finished run that ends the loop, a second run whose flags are the first one's."""
    module = module_named(script)
    monkeypatch.setattr(module, "make_env", make_quadrants)
    module.main(small_args(module, runs_dir, seed=2, async_envs=async_envs, total_timesteps=640))
    (finished,) = runs_dir.iterdir()
    before = {file: file.stat().st_mtime_ns for file in finished.iterdir() if file.name != ".lock"}
    for seed in (1, 2, 3):
        args = small_args(module, runs_dir, seed=seed, async_envs=async_envs, total_timesteps=640)
        assert module.main(args) is None
    assert capsys.readouterr().out.count(f"{finished} has finished; --overwrite trains it anew\n") == 1
    assert {file: file.stat().st_mtime_ns for file in finished.iterdir() if file.name != ".lock"} == before
    folders = sorted(runs_dir.iterdir())
    for folder in folders:
        assert_free(folder)
    assert [folder.name[-1] for folder in folders] == ["1", "2", "3"]
    weights = [torch.load(folder / "model.pt") for folder in folders]
    first = next(iter(weights[0]))
    assert not any(torch.equal(weights[0][first], other[first]) for other in weights[1:])


class Fails(Quadrants):
    """Its third game goes wrong."""

    games = 0

    def reset(self, seed=None, options=None):
        self.games += 1
        if self.games == 3:
            raise ZeroDivisionError("the third game goes wrong")
        return super().reset(seed=seed)


@pytest.mark.filterwarnings("ignore::UserWarning")  # gymnasium tells of it before it raises it
@pytest.mark.parametrize(("script", "async_envs"), KINDS)
def test_an_error_leaves_nothing_and_the_folder_can_be_trained_again(
    monkeypatch, runs_dir, unchanged, script, async_envs
):
    """Would catch: a lock that the process keeps, workers that live on, a status that says that it runs."""
    module = module_named(script)
    monkeypatch.setattr(module, "make_env", lambda *arguments, **kwargs: stacked(Fails()))
    args = small_args(module, runs_dir, async_envs=async_envs)
    with pytest.raises(ZeroDivisionError, match="the third game goes wrong") as error:
        module.main(args)
    (folder,) = runs_dir.iterdir()
    assert status(folder)["state"] == "failed"
    assert_free(folder)
    monkeypatch.setattr(module, "make_env", make_quadrants)
    module.main(args)
    assert status(folder)["state"] == "finished"
    assert error.traceback  # until here it has kept all that main had made, as a notebook's last error does


@pytest.mark.parametrize(("script", "async_envs"), KINDS)
def test_a_run_that_is_refused_leaves_nothing(monkeypatch, runs_dir, unchanged, script, async_envs):
    """Other flags than the folder's. Would catch: games, made before the folder was looked at, that live on."""
    module = module_named(script)
    monkeypatch.setattr(module, "make_env", make_quadrants)
    module.main(small_args(module, runs_dir, async_envs=async_envs))
    with pytest.raises(BadInput, match=r"was started with other flags: --gamma 0.1") as error:
        module.main(small_args(module, runs_dir, async_envs=async_envs, gamma=0.1))
    (folder,) = runs_dir.iterdir()
    assert_free(folder)
    assert multiprocessing.active_children() == []
    assert error.traceback


@pytest.mark.parametrize(
    ("script", "async_envs", "signum"), [(*kind, signal.SIGTERM if kind[1] else signal.SIGINT) for kind in KINDS]
)
def test_a_signal_leaves_nothing_and_the_run_can_be_resumed(
    monkeypatch, runs_dir, capsys, unchanged, script, async_envs, signum
):
    """On real games. Would catch: a handler that stays, so that the notebook's next Ctrl-C is lost."""
    module = module_named(script)
    log_games, step_of_signal = Run.log_games, 600

    def signalling(self, step, info):
        if self.step == 0 and step == 600 // self.stride * self.stride + 1:
            os.kill(os.getpid(), signum)
        log_games(self, step, info)

    monkeypatch.setattr(Run, "log_games", signalling)
    args = small_args(module, runs_dir, async_envs=async_envs, metrics_frequency=0)
    with pytest.raises(KeyboardInterrupt) as stopped:
        module.main(args)
    assert type(stopped.value) is Stopped
    assert (stopped.value.signum, stopped.value.saved) == (signum, True)
    (folder,) = runs_dir.iterdir()
    assert status(folder)["state"] == "stopped"
    assert_free(folder)
    assert 0 < status(folder)["checkpoint"] <= step_of_signal + 128
    module.main(args)
    assert "resumed at" in capsys.readouterr().out
    assert status(folder)["state"] == "finished"


@pytest.mark.parametrize("script", SCRIPTS)
def test_in_another_thread_than_the_main_one(monkeypatch, runs_dir, unchanged, script):
    """Would catch: `signal only works in main thread`."""
    module = module_named(script)
    monkeypatch.setattr(module, "make_env", make_quadrants)
    errors = []

    def train():
        try:
            module.main(small_args(module, runs_dir))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert errors == []
    assert len(list(runs_dir.glob("*/model.pt"))) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_activation_of_a_notebooks_own(monkeypatch, runs_dir, unchanged, script):
    """As CONTRIBUTING.md has it. Would catch: flags that can name only what the script itself has."""
    module = module_named(script)
    monkeypatch.setattr(module, "make_env", make_quadrants)
    monkeypatch.setitem(module.REPRESENTATIONS, "mish", module.Recipe((torch.nn.Mish,) * 4))

    @dataclass(kw_only=True)
    class MyArgs(module.Args):
        activation: str = "mish"

    flags = {name: value for name, value in vars(small_args(module, runs_dir)).items() if name != "activation"}
    module.main(MyArgs(**flags))
    (folder,) = runs_dir.iterdir()
    weights = torch.load(folder / "model.pt")
    factors = [
        name for name in weights if ".z.factors." in name and name.endswith("weight") and weights[name].ndim == 2
    ]
    assert len(factors) == 4  # of which none is left out in silence
    monkeypatch.setitem(module.REPRESENTATIONS, "a/b", module.Recipe((torch.nn.Mish,)))
    with pytest.raises(BadInput, match="--activation is a/b; it must be of letters, digits, dots and dashes"):
        module.main(MyArgs(**flags | {"activation": "a/b"}))
    assert [*runs_dir.iterdir()] == [folder]


@pytest.mark.parametrize("error", [None, Stopped(signal.SIGINT, True), RunFailed("no")])
def test_memory_is_free_for_the_next_run(unchanged, error):
    """Would catch: a second seed that is refused for what the first has left to malloc, or a notebook's last error
    that keeps the replay memory of an interrupted run."""

    @leaves_no_trace
    def main(args):
        set_up(args)
        memory = [b"1" * 20_000_000 for _ in range(20)]  # noqa: F841 (each below M_MMAP_THRESHOLD)
        if error:
            raise error

    before = psutil.Process().memory_info().rss
    with pytest.raises(type(error)) if error else contextlib.nullcontext() as caught:
        main(dqn_atari_lan.Args())
    assert psutil.Process().memory_info().rss - before < 100_000_000
    del caught


def train_in_a_pool(script, async_envs, runs_dir, seed):
    """Real games; what had changed in the pool's process, by name."""
    multiprocessing.set_start_method(None, force=True)  # python's default again, as in a user's pool
    module = module_named(script)
    before = state_of_the_process()
    flags = {"async_envs": async_envs, "metrics_frequency": 0, "total_timesteps": 640}
    module.main(small_args(module, runs_dir, seed=seed, **flags))
    after = state_of_the_process()
    return [(name, before[name], after[name]) for name in before if before[name] != after[name]]


@pytest.mark.parametrize(("script", "async_envs"), KINDS)
def test_in_a_process_pool(runs_dir, script, async_envs):
    """Would catch: games that a pool's process may not start, a run that ends its process, a main that is no function
    of its module's name."""
    forked.serve()
    with ProcessPoolExecutor(1, mp_context=forked.CONTEXT) as pool:
        runs = [pool.submit(train_in_a_pool, script, async_envs, runs_dir, seed) for seed in (1, 2)]
        assert [run.result(timeout=250) for run in runs] == [[], []]
    assert len(list(runs_dir.glob("*/model.pt"))) == 2
