"""Training speed and memory compared with stable-baselines3, and where a step goes.

python benchmark/benchmark.py                 one run at a time, five rounds, and a breakdown
python benchmark/benchmark.py --quick         one round of the main ones, in three minutes; writes nothing
python benchmark/benchmark.py --at-once 1 2   as many runs at once, one core and one thread each: what a sweep sees
python benchmark/benchmark.py --against DIR   another checkout of this project in place of stable-baselines3

The same game, activation (relu), hyperparameters and number of threads for all; each run is a process of its own, timed
after its warm-up. Compare ratios, not seconds: both sides alternate, so that both see the same load. Games run in the
training's process. With a GPU the runs use it, its memory is measured too, and ours play in worker processes, as by
default: their time is in "by CPU", their memory is not in "peak GB". Recorded in results/benchmark*.json, by machine.
"""

import bisect
import contextlib
import datetime
import functools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lan_utils.checks import check_env_id, refuse_unless, require
from lan_utils.cli import BadInput, RunFailed, launch
from lan_utils.files import replace
from lan_utils.folder import hardware
from lan_utils.study import ROOT

ALE = ["--env-backend", "ale", "--checkpoint-frequency", "0"]
# What is compared: name -> (algorithm, flags of its script, or None for stable-baselines3).
CONTENDERS = {
    "sb3 dqn": ("dqn", None),
    "dqn": ("dqn", []),
    "dqn --amp --compile": ("dqn", ["--amp", "--compile"]),
    "sb3 ppo": ("ppo", None),
    "ppo": ("ppo", []),
    "ppo --amp --compile": ("ppo", ["--amp", "--compile"]),
    "ppo --env-backend ale": ("ppo", ALE),
    "ppo --amp --compile --env-backend ale": ("ppo", ["--amp", "--compile", *ALE]),
    "pqn": ("pqn", []),  # stable-baselines3 has none: it is compared with PPO
    "pqn --amp --compile": ("pqn", ["--amp", "--compile"]),
}
MAIN = ("sb3 dqn", "dqn", "sb3 ppo", "ppo", "pqn")
# On a GPU each of the two flags is of interest alone, and so are both together.
ON_CUDA = {f"{name} {flag}": (name, [flag]) for name in ("dqn", "ppo", "pqn") for flag in ("--amp", "--compile")}
MAIN_ON_CUDA = (*MAIN, *(f"{name} --amp --compile" for name in ("dqn", "ppo", "pqn")))
# Where an agent step goes; not with --compile, which would compile the timers too.
BROKEN_DOWN = {
    "dqn": ("dqn", []),
    "dqn --amp": ("dqn", ["--amp"]),
    "ppo": ("ppo", []),
    "ppo --amp": ("ppo", ["--amp"]),
    "ppo --env-backend ale": ("ppo", ALE),
    "ppo --amp --env-backend ale": ("ppo", ["--amp", *ALE]),
    "pqn": ("pqn", []),
    "pqn --amp": ("pqn", ["--amp"]),
}
# Agent steps: past the start of learning, compilation, and the first observations that can be measured.
WARM_UP = {"dqn": 2500, "ppo": 3 * 1024, "pqn": 2 * 4096}
TIMED = {"dqn": 2000, "ppo": 5 * 1024, "pqn": 2 * 4096}
TIMES_ON_CUDA = 4  # as many times longer, or PPO and PQN would take only seconds
RAM_GB = 24  # of the machine for which `how_many_fit` counts runs
CARD_SECONDS = 1  # between two looks at the GPU's memory


@dataclass
class Args:
    """Training speed and memory compared with stable-baselines3, and where a step goes."""

    rounds: int = 5
    """measurements of each contender"""
    env_id: str = "BreakoutNoFrameskip-v4"
    """the game"""
    num_threads: int = 2
    """CPU threads of torch; with --at-once it is one"""
    at_once: tuple[int, ...] = ()
    """numbers of runs at once, each on a core of its own; of several, the one with the highest sum is printed"""
    algorithms: tuple[Literal["dqn", "ppo", "pqn"], ...] = ("dqn", "ppo", "pqn")
    """the algorithms to measure; beside pqn, which stable-baselines3 does not have, ppo"""
    against: Path | None = None
    """folder of another checkout of this project, to compare with instead of stable-baselines3"""
    quick: bool = False
    """one round of sb3 and the default flags; writes nothing"""
    breakdown: bool = True
    """also say where an agent step goes"""
    note: str = ""
    """what else a reader of the record has to know, such as what else was running"""
    cuda: bool = field(default=False, init=False)  # is there a GPU?


@dataclass
class Timeline:
    """Agent steps, or CPU seconds, of a run by the wall clock."""

    seconds: list[float] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)

    def add(self, amount: float) -> None:
        self.seconds.append(time.time())
        self.amounts.append(amount)

    def between(self, start: float, stop: float) -> float:
        """The amount between two moments, each interpolated between the points around it."""
        return self._at(stop) - self._at(start)

    def _at(self, seconds: float) -> float:
        i = min(max(bisect.bisect_right(self.seconds, seconds), 1), len(self.seconds) - 1)
        share = (seconds - self.seconds[i - 1]) / (self.seconds[i] - self.seconds[i - 1])
        return self.amounts[i - 1] + share * (self.amounts[i] - self.amounts[i - 1])


def speeds_of_all(steps: list[Timeline], cpu: list[Timeline], warm_up: int) -> dict[str, float]:
    """Agent steps of all runs per second, and per CPU second, while all are past their warm-up and none has ended.

    Raises:
        RunFailed: there was no such period.
    """
    start = max(next(s for s, step in zip(t.seconds, t.amounts, strict=True) if step >= warm_up) for t in steps)
    stop = min(t.seconds[-1] for t in steps)
    if stop <= start:
        raise RunFailed("the runs were not at work at the same time; the machine is too busy to measure")
    done = sum(t.between(start, stop) for t in steps)
    return {"speed": done / (stop - start), "per_cpu_second": done / sum(t.between(start, stop) for t in cpu)}


# -------------------------------------------------------------------------------------- one measurement


def measure(name: str, args: Args, at_once: int = 0) -> dict[str, float]:
    """One contender, in `at_once` processes of one core each, or in one process of its own.

    Returns:
        `speed`: agent steps per second, the sum of all; `per_cpu_second` says more on a busy machine. `peak_gb`: peak
        resident memory, the sum of all. On a GPU also `gpu_gb`: the peak of what all take of it, with their contexts.

    Raises:
        RunFailed: one of them did not end well.
    """
    algorithm, flags = contenders(args)[name]
    threads = 1 if at_once else args.num_threads
    with tempfile.TemporaryDirectory() as folder:
        commands = []
        for n in range(at_once or 1):
            runs_dir = Path(folder) / str(n)
            runs_dir.mkdir()
            run_flags = our_flags(algorithm, args, threads, str(runs_dir), seed=n + 1)
            if flags is None and args.against:
                commands.append([str(args.against / f"{algorithm}_atari_lan.py"), *run_flags])
            elif flags is None:
                call = f"train_sb3({algorithm!r}, {args.env_id!r}, {threads}, {steps_of(algorithm, args)}, {n + 1})"
                commands.append(["-c", f"{THIS_FILE}; benchmark.{call}"])
            else:
                commands.append([str(ROOT / f"{algorithm}_atari_lan.py"), *run_flags, *flags])
        peaks, cpu, gpu_gb = run_all(commands, Path(folder), threads, pinned=at_once > 0, name=name, cuda=args.cuda)
        about: dict[str, float] = {"gpu_gb": gpu_gb} if args.cuda else {}
        if flags is None and not args.against:
            printed = [
                json.loads((Path(folder) / f"{n}.out").read_text().splitlines()[-1]) for n in range(len(commands))
            ]
            about |= printed[0]["about"]
            steps = [Timeline(run["seconds"], run["steps"]) for run in printed]
        else:
            steps = [logged_steps(Path(folder) / str(n)) for n in range(len(commands))]
    return speeds_of_all(steps, cpu, steps_of(algorithm, args)[0]) | {"peak_gb": sum(peaks)} | about


THIS_FILE = f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent)!r}); import benchmark"


def run_all(
    commands: list[list[str]], folder: Path, threads: int, pinned: bool, name: str, cuda: bool
) -> tuple[list[float], list[Timeline], float]:
    """Run python with each command, all at once, their output into `folder`.

    Returns:
        Peak resident memory of each in GB, CPU seconds of each, and the peak of what all together took of the GPUs.

    Raises:
        RunFailed: one of them did not end well; the others are killed.
    """
    cores = sorted(os.sched_getaffinity(0))
    before = card_memory() if cuda else 0
    most, looked = before, time.monotonic()
    processes: dict[int, subprocess.Popen] = {}
    peaks, cpu = [0.0] * len(commands), [Timeline() for _ in commands]
    with contextlib.ExitStack() as stack:
        try:
            for n, command in enumerate(commands):
                processes[n] = subprocess.Popen(
                    [sys.executable, *command],
                    stdout=stack.enter_context(open(folder / f"{n}.out", "w")),
                    stderr=stack.enter_context(open(folder / f"{n}.err", "w")),
                    env=os.environ | ({} if cuda and not pinned else {"OMP_NUM_THREADS": str(threads)}),
                    cwd=folder,
                    preexec_fn=functools.partial(os.sched_setaffinity, 0, {cores[n]}) if pinned else None,
                )
            running = dict(processes)
            while running:
                time.sleep(0.2)
                for n, process in list(running.items()):
                    cpu[n].add(cpu_seconds(process.pid))
                    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                    if pid:
                        process.returncode = os.waitstatus_to_exitcode(status)
                        peaks[n] = usage.ru_maxrss * 1024 / 1e9
                        del running[n]
                        if process.returncode:
                            raise RunFailed(failure(name, process.returncode, folder / f"{n}.err"))
                if cuda and time.monotonic() - looked >= CARD_SECONDS:
                    most, looked = max(most, card_memory()), time.monotonic()
        finally:
            for process in processes.values():
                if process.returncode is None:
                    process.kill()
                    process.wait()
    return peaks, cpu, most - before


def cpu_seconds(pid: int) -> float:
    """Of a process and of the workers that it has."""
    process = psutil.Process(pid)
    seconds = sum(process.cpu_times()[:2])
    with contextlib.suppress(psutil.NoSuchProcess):  # it, or a worker, ends meanwhile
        for worker in process.children(recursive=True):
            seconds += sum(worker.cpu_times()[:2])
    return seconds


def failure(name: str, code: int, errors: Path) -> str:
    last_line = "".join(errors.read_text(errors="replace").splitlines()[-1:])
    return f"{name} failed with exit code {code}: {last_line}"


def card_memory() -> float:
    """GB in use on the visible GPUs, of all processes; only the driver knows what a context takes."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={os.environ['CUDA_VISIBLE_DEVICES']}")
    done = subprocess.run(command, capture_output=True, text=True)
    return sum(float(line) for line in done.stdout.split()) * 2**20 / 1e9


def contenders(args: Args) -> dict[str, tuple[str, list[str] | None]]:
    """Those of CONTENDERS that are measured, in their order; an algorithm's rival is called "sb3" or "before"."""
    every = CONTENDERS | (ON_CUDA if args.cuda else {})
    main = MAIN_ON_CUDA if args.cuda else MAIN
    chosen = main if args.quick or args.at_once or args.against else every
    rival = "before" if args.against else "sb3"
    if args.against:
        every["before pqn"] = ("pqn", None)
        chosen = (*chosen, "before pqn")
    beside = {"ppo"} if "pqn" in args.algorithms and not args.against else set()
    return {
        name.replace("sb3", rival): every[name]
        for name in chosen
        if every[name][0] in args.algorithms or name in beside
    }


def rival_of(name: str, args: Args) -> str:
    algorithm = contenders(args)[name][0]
    rival = f"{'before' if args.against else 'sb3'} {algorithm}"
    return rival if rival in contenders(args) else "ppo"


def steps_of(algorithm: str, args: Args) -> tuple[int, int]:
    """Agent steps of warm-up, and those that are timed."""
    times = TIMES_ON_CUDA if args.cuda else 1
    return WARM_UP[algorithm] * times, TIMED[algorithm] * times


def our_flags(algorithm: str, args: Args, threads: int, runs_dir: str, seed: int = 1) -> list[str]:
    flags: list[Any] = ["--env-id", args.env_id, "--activation", "relu", "--seed", seed, "--runs-dir", runs_dir]
    flags += ["--num-threads", threads, "--total-timesteps", sum(steps_of(algorithm, args))]
    if algorithm == "dqn":  # the target of stable-baselines3
        flags += ["--learning-starts", 1000, "--start-e", 0.1, "--buffer-size", 100_000, "--no-double-q"]
    elif not args.cuda:  # as stable-baselines3 has its games
        flags += ["--no-async-envs"]
    return [str(flag) for flag in flags]


def logged_steps(runs_dir: Path) -> Timeline:
    """Agent steps of a run of the project: the wall clock of its own TensorBoard points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = runs_dir.iterdir()
    events = EventAccumulator(str(run)).Reload().Scalars("charts/SPS")
    return Timeline([event.wall_time for event in events], [event.step for event in events])


def train_sb3(algorithm: str, env_id: str, num_threads: int, steps: tuple[int, int], seed: int) -> None:
    """The same with stable-baselines3; comments say where it differs."""
    import ale_py
    import gymnasium
    import numpy as np
    import torch
    from stable_baselines3 import DQN, PPO
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    torch.set_num_threads(num_threads)
    policy_kwargs = {"optimizer_kwargs": {"eps": 1e-5}}
    about = {}
    if algorithm == "dqn":  # its loss is Huber's, and it clips the gradient's norm
        env = VecFrameStack(make_atari_env(env_id, n_envs=1, seed=seed), n_stack=4)
        model = DQN(
            "CnnPolicy", env, seed=seed, learning_rate=1e-4, buffer_size=max(20_000, sum(steps)), learning_starts=1000,
            batch_size=32, gamma=0.99, train_freq=4, gradient_steps=1, target_update_interval=1000,
            exploration_initial_eps=0.1, exploration_final_eps=0.1, policy_kwargs=policy_kwargs,
        )  # fmt: skip
        spaces = (model.observation_space, model.action_space)
        thrifty = ReplayBuffer(1000, *spaces, optimize_memory_usage=True, handle_timeout_termination=False)
        for key, memory in (("transition_bytes", model.replay_buffer), ("least_transition_bytes", thrifty)):
            arrays = [array for array in vars(memory).values() if isinstance(array, np.ndarray)]
            about[key] = sum(array.nbytes for array in arrays) / memory.buffer_size
    else:
        env = VecFrameStack(make_atari_env(env_id, n_envs=8, seed=seed), n_stack=4)
        model = PPO(
            "CnnPolicy", env, seed=seed, learning_rate=2.5e-4, n_steps=128, batch_size=256, n_epochs=4, gamma=0.99,
            gae_lambda=0.95, clip_range=0.1, clip_range_vf=0.1, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5,
            policy_kwargs=policy_kwargs,
        )  # fmt: skip
    timeline = Timeline()

    class Clock(BaseCallback):
        """As often as the project's scripts log: between two updates, every 1,000 steps or every rollout."""

        def _on_step(self) -> bool:
            return timeline.amounts[-1:] < [sum(steps)]

        def _on_rollout_start(self) -> None:
            if self.num_timesteps >= 1000 * (1 + len(timeline.amounts)):
                timeline.add(self.num_timesteps)

    model.learn(2 * sum(steps), callback=Clock())  # ends with the last point
    print(json.dumps({"seconds": timeline.seconds, "steps": timeline.amounts, "about": about}))


# -------------------------------------------------------------------------------- where an agent step goes


def breakdown(algorithm: str, env_id: str, num_threads: int, more_flags: list[str]) -> None:
    """Print where an agent step goes: wall-clock time of what a script calls, nested calls with the outer one."""
    import torch

    from lan_utils import atari, cli, replay, run

    module = __import__(f"{algorithm}_atari_lan")
    spent: dict[str, float] = {}
    calls: dict[str, int] = {}
    inside: list[str] = []
    learning: dict[str, Any] = {"start": None}
    on_cuda = torch.cuda.is_available()

    def timed(owner, name, label):
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*arguments, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            if inside:
                return original(*arguments, **kwargs)
            inside.append(label)
            start = time.perf_counter()
            try:
                return original(*arguments, **kwargs)
            finally:
                if on_cuda:
                    torch.cuda.synchronize()
                inside.pop()
                spent[label] = spent.get(label, 0) + time.perf_counter() - start

        setattr(owner, name, wrapper)

    timed(run.Run, "log", "logging")
    timed(run.Run, "log_games", "logging")
    timed(run.Run, "measure", "metrics")
    timed(run.Run, "_measure", "metrics")
    timed(run.Run, "save", "checkpoints")
    timed(run.Run, "_save", "checkpoints")
    timed(torch.Tensor, "backward", "update: backward")
    timed(torch.optim.RAdam if algorithm == "pqn" else torch.optim.Adam, "step", "update: optimizer")
    if algorithm == "dqn":
        timed(atari.WholeGames, "step", "environment")
        timed(atari.WholeGames, "reset", "environment")
        timed(module, "act", "acting")
        timed(module, "td_loss", "update: forward")
        timed(replay.ReplayMemory, "add", "replay: add")
        timed(replay.ReplayMemory, "sample", "replay: sample")
    else:
        timed(atari.VectorGames, "step", "environment")
        timed(atari.AleGames, "step", "environment")
        timed(module.Network, "forward", "acting")  # inside the loss it is counted with it
        timed(module, "ppo_loss" if algorithm == "ppo" else "td_loss", "update: forward")
        if algorithm == "ppo":
            timed(module, "compute_gae", "advantages")
        else:
            timed(module, "lambda_returns", "returns")
        timed(torch.nn.utils, "clip_grad_norm_", "update: clipping")
    update = cli.Progress.update

    def on_progress(progress, step, **values):
        now = time.perf_counter()
        if step >= WARM_UP[algorithm] and learning["start"] is None:
            spent.clear()
            calls.clear()
            learning.update(start=now, first=step)
        learning.update(last=step, stop=now, spent=dict(spent), calls=dict(calls))
        update(progress, step, **values)

    cli.Progress.update = on_progress
    with tempfile.TemporaryDirectory() as runs_dir:
        args = Args(env_id=env_id)
        flags = our_flags(algorithm, args, num_threads, runs_dir)
        flags += ["--metrics-frequency", "500", "--checkpoint-frequency", "500"]  # a few of these rare events
        sys.argv = [f"{algorithm}_atari_lan.py", *flags, *more_flags]
        cli.launch(module.main, module.Args)
    steps = learning["last"] - learning["first"]
    total = (learning["stop"] - learning["start"]) / steps
    shares = {label: seconds / steps for label, seconds in learning["spent"].items()}
    shares["the rest"] = total - sum(shares.values())
    for label, call, frequency in (
        ("metrics", "_measure", "metrics_frequency"),
        ("checkpoints", "_save", "checkpoint_frequency"),
    ):
        # As often as by default; DQN's memory is nearly empty here, and so its checkpoint small.
        if call in learning["calls"]:
            seconds = learning["spent"][label] / learning["calls"][call]
            shares[label] = seconds / getattr(module.Args(), frequency)
    total = sum(shares.values())
    parts = {label: round(1000 * seconds, 4) for label, seconds in sorted(shares.items(), key=lambda row: -row[1])}
    print(json.dumps({"ms per agent step": round(1000 * total, 4), "parts": parts}))


def breakdowns(args: Args) -> Iterator[tuple[str, dict]]:
    names = ("dqn", "ppo", "pqn") if args.at_once or args.against else tuple(BROKEN_DOWN)
    threads = 1 if args.at_once else args.num_threads
    for name in names:
        algorithm, flags = BROKEN_DOWN[name]
        if algorithm not in args.algorithms:
            continue
        call = f"breakdown({algorithm!r}, {args.env_id!r}, {threads}, {flags!r})"
        with tempfile.TemporaryDirectory() as folder:
            command = ["-c", f"{THIS_FILE}; benchmark.{call}"]
            run_all([command], Path(folder), threads, args.at_once != (), f"the breakdown of {name}", cuda=False)
            yield name, json.loads((Path(folder) / "0.out").read_text().splitlines()[-1])


# ------------------------------------------------------------------------------------- the whole record


def compare(args: Args, at_once: int, rounds: int) -> dict[str, dict]:
    """Measure all contenders in alternation, and print a table of them."""
    names = tuple(contenders(args))
    found: dict[str, list[dict]] = {name: [] for name in names}
    for n in range(rounds):
        for name in names:
            found[name].append(measure(name, args, at_once))
            runs = f"{at_once} at once  " if at_once else ""
            print(f"round {n + 1}/{rounds}  {runs}{name:<40}{found[name][-1]['speed']:>8.1f} steps/s", flush=True)

    rival = "x before" if args.against else "x ppo" if args.algorithms == ("pqn",) else "x sb3"
    gpu = f"{'GPU GB':>9}" if args.cuda else ""
    print(f"\n{'':<40}{'median':>9}{'lowest':>9}{'highest':>9}{rival:>9}{'by CPU':>9}{'peak GB':>9}{gpu}")
    table = {}
    for name, runs in found.items():
        speeds = [run["speed"] for run in runs]
        pairs = list(zip(runs, found[rival_of(name, args)], strict=True))
        ratios = [run["speed"] / other["speed"] for run, other in pairs]
        cpu_ratios = [run["per_cpu_second"] / other["per_cpu_second"] for run, other in pairs]
        row = {
            "median": statistics.median(speeds),
            "lowest": min(speeds),
            "highest": max(speeds),
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "per_cpu_second": statistics.median(run["per_cpu_second"] for run in runs),
            "cpu_ratio": statistics.median(cpu_ratios),
            "cpu_ratios": [round(ratio, 3) for ratio in cpu_ratios],
        }
        for key in sorted(runs[0].keys() - {"speed", "per_cpu_second"}):
            row[key] = max(run[key] for run in runs)
        table[name] = row
        numbers = "".join(f"{row[key]:>9.1f}" for key in ("median", "lowest", "highest"))
        gpu = f"{row['gpu_gb']:>9.2f}" if args.cuda else ""
        print(f"{name:<40}{numbers}{row['ratio']:>9.2f}{row['cpu_ratio']:>9.2f}{row['peak_gb']:>9.2f}{gpu}")
    if "pqn" in table and rival == "x sb3":
        print("pqn: x ppo, since stable-baselines3 has none")
    print()
    return table


def how_many_fit(ours: dict, theirs: dict) -> dict[str, float]:
    """How many DQN runs with the paper's 1,000,000 transitions fit into a machine of RAM_GB.

    Args:
        ours, theirs: rows of one run each; the part of its small memory that each has filled is counted twice here
            (ours 2 MB, theirs 0.2 GB).

    Returns:
        GB of a run, and runs: ours at what the largest of the eight games needs, theirs at its thriftiest setting.
    """
    ours_gb = ours["peak_gb"] + 1500 * 1e6 / 1e9  # Q*bert takes 1,426 bytes a transition
    theirs_gb = theirs["peak_gb"] + theirs["least_transition_bytes"] * 1e6 / 1e9
    runs = {"dqn runs": int(RAM_GB / ours_gb), "sb3 dqn runs": int(RAM_GB / theirs_gb)}
    return {"machine_gb": RAM_GB, "dqn_gb": round(ours_gb, 2), "sb3_dqn_gb": round(theirs_gb, 2)} | runs


def this_machine(cuda: bool) -> str:
    """The CPU, its instructions for bfloat16, on which --amp depends, and the GPU."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if cpuinfo.exists() else []
    bfloat16 = sorted({word for word in words if word.endswith("_bf16")})
    parts = [f"{os.cpu_count()} cores", hardware(torch.device("cpu")), " ".join(bfloat16) or "no bf16"]
    return ", ".join(parts + ([hardware(torch.device("cuda", 0))] if cuda else []))


def check(args: Args) -> None:
    """Refuse what cannot work, before hours are spent on it.

    Raises:
        BadInput
    """
    cores = len(os.sched_getaffinity(0))
    check_env_id(args.env_id)
    require(args.rounds > 0, args, "rounds", "be positive")
    require(0 < args.num_threads <= os.cpu_count(), args, "num_threads", f"lie in 1 to {os.cpu_count()}")
    for n in args.at_once:
        refuse_unless(0 < n <= cores, f"--at-once {n}: each run has a core of its own; it must lie in 1 to {cores}")
    refuse_unless(len(args.algorithms) > 0, "--algorithms takes one or more of dqn, ppo, pqn")
    scripts = [(args.against or ROOT) / f"{algorithm}_atari_lan.py" for algorithm in ("dqn", *args.algorithms)]
    refuse_unless(scripts[0].is_file(), f"--against {args.against} is not a checkout of this project")
    missing = [script.name for script in scripts if args.against and not script.is_file()]
    refuse_unless(not missing, f"--against {args.against} has no {', '.join(missing)}; leave it out by --algorithms")
    file = record_file(args)
    try:
        refuse_unless(isinstance(json.loads(file.read_text()), dict) if file.exists() else True, "")
    except (ValueError, BadInput):
        raise BadInput(f"{file} is damaged; move it away, or take it from git again") from None
    refuse_unless(args.quick or os.access(file.parent, os.W_OK), f"{file.parent} is not writable")


def record_file(args: Args) -> Path:
    kind = "_against" if args.against else "_at_once" if args.at_once else ""
    return ROOT / "results" / f"benchmark{kind}.json"


def main(args: Args) -> None:
    import torch

    if args.against:
        args.against = args.against.resolve()
    check(args)
    args.cuda = torch.cuda.is_available()
    rounds = 1 if args.quick else args.rounds
    load = round(os.getloadavg()[0], 1)
    content = {
        "command": shlex.join(["python", "benchmark/benchmark.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "note": args.note,
        "processes at work before it began": load,
        "env_id": args.env_id,
        "rounds": rounds,
    }
    if args.at_once:
        content["at_once"] = {n: compare(args, n, rounds) for n in args.at_once}
        for name in contenders(args) if len(args.at_once) > 1 else ():
            sums = {n: table[name]["median"] for n, table in content["at_once"].items()}
            best = max(sums, key=sums.get)
            print(f"{name:<40}most with {best} at once: {sums[best]:.1f} steps/s")
        if not args.against and "dqn" in args.algorithms:
            first = content["at_once"][args.at_once[0]]
            per_run = [{**first[name], "peak_gb": first[name]["peak_gb"] / args.at_once[0]} for name in MAIN[:2]]
            content["fit"] = how_many_fit(per_run[1], per_run[0])
            print(f"with the paper's replay memory: {content['fit']}")
    else:
        content["contenders"] = compare(args, 0, rounds)
    if args.breakdown and not args.quick:
        content["breakdown"] = {}
        for name, parts in breakdowns(args):
            content["breakdown"][name] = parts
            print(f"\n{name}: {parts['ms per agent step']} ms per agent step")
            for label, milliseconds in parts["parts"].items():
                print(f"  {label:<22}{milliseconds:>8.3f}")
    if not args.quick:
        file = record_file(args)
        machines = json.loads(file.read_text()) if file.exists() else {}
        machine = this_machine(args.cuda)
        if len(args.algorithms) == 1:  # has a place of its own
            machine += f", {args.algorithms[0]}"
        text = json.dumps(machines | {machine: content}, indent=2) + "\n"
        replace(file, lambda opened: opened.write(text.encode()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # and end the runs too
    launch(main, Args)
