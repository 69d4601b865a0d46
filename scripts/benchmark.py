"""Training speed and memory, side by side with stable-baselines3, and where an agent step goes.

python scripts/benchmark.py            all contenders in turn, five rounds, and a breakdown, into results/benchmark.json
python scripts/benchmark.py --quick    one round of the main ones, in three minutes; writes nothing

The same game, activation (relu), hyperparameters and number of threads for all; each measurement is a process of its
own, timed after its warm-up. Compare ratios, not seconds: both sides alternate, so that they share the machine's moods.
"""

import datetime
import functools
import json
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

ALE = ["--env-backend", "ale", "--checkpoint-frequency", "0"]
# What is compared: name -> (algorithm, flags of the project's script, or None for stable-baselines3).
CONTENDERS = {
    "sb3 dqn": ("dqn", None),
    "dqn": ("dqn", ["--no-double-q"]),
    "dqn --amp --compile": ("dqn", ["--no-double-q", "--amp", "--compile"]),
    "sb3 ppo": ("ppo", None),
    "ppo": ("ppo", []),
    "ppo --amp --compile": ("ppo", ["--amp", "--compile"]),
    "ppo --env-backend ale": ("ppo", ALE),
    "ppo --amp --compile --env-backend ale": ("ppo", ["--amp", "--compile", *ALE]),
}
# Where an agent step goes; not with --compile, which would compile the clocks too.
BROKEN_DOWN = {
    "dqn": ("dqn", []),
    "dqn --amp": ("dqn", ["--amp"]),
    "ppo": ("ppo", []),
    "ppo --amp": ("ppo", ["--amp"]),
    "ppo --env-backend ale": ("ppo", ALE),
    "ppo --amp --env-backend ale": ("ppo", ["--amp", *ALE]),
}
QUICK = ("sb3 dqn", "dqn", "sb3 ppo", "ppo")
WARM_UP = {"dqn": 2000, "ppo": 3 * 1024}  # agent steps: past the start of learning, and compilation
TIMED = {"dqn": 2000, "ppo": 5 * 1024}


@dataclass
class Args:
    rounds: int = 5
    """measurements of each contender"""
    env_id: str = "BreakoutNoFrameskip-v4"
    """the game"""
    num_threads: int = 2
    """CPU threads of torch"""
    quick: bool = False
    """one round of sb3 and the default flags, nothing written"""
    breakdown: bool = True
    """also say where an agent step goes"""


def measure(name: str, args: Args) -> dict[str, float]:
    """One contender, in a process of its own: agent steps per second and peak resident memory in GB."""
    algorithm, flags = CONTENDERS[name]
    call = f"train_sb3({algorithm!r}, {args.env_id!r}, {args.num_threads})"
    if flags is not None:
        call = f"train_ours({algorithm!r}, {flags!r}, {args.env_id!r}, {args.num_threads})"
    return in_a_process(call, name)


def in_a_process(call: str, name: str) -> dict:
    """What a call of this file's functions reports; where it fails, this ends with its own last word."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import benchmark as b; b.{call}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: {name} failed with exit code {done.returncode}: {''.join(done.stderr.splitlines()[-1:])}")
    return json.loads(done.stdout.splitlines()[-1])


def our_flags(algorithm: str, env_id: str, num_threads: int, runs_dir: str) -> list[str]:
    steps = WARM_UP[algorithm] + TIMED[algorithm]
    flags = ["--env-id", env_id, "--activation", "relu", "--num-threads", num_threads, "--runs-dir", runs_dir]
    flags += ["--total-timesteps", steps]
    if algorithm == "dqn":
        flags += ["--learning-starts", 1000, "--start-e", 0.1, "--buffer-size", 100_000]
    return [str(flag) for flag in flags]


def train_ours(algorithm: str, flags: list[str], env_id: str, num_threads: int) -> None:
    """Run a script of the project; its speed is read off the wall clock of its own TensorBoard points."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import checkpoint

    module = __import__(f"{algorithm}_atari_lan")
    with tempfile.TemporaryDirectory() as runs_dir:
        sys.argv = [f"{algorithm}_atari_lan.py", *our_flags(algorithm, env_id, num_threads, runs_dir), *flags]
        checkpoint.launch(module.main, module.Args)
        (folder,) = Path(runs_dir).iterdir()
        events = EventAccumulator(str(folder)).Reload().Scalars("charts/SPS")
    first = next(event for event in events if event.step >= WARM_UP[algorithm])
    last = events[-1]
    report(last.step - first.step, last.wall_time - first.wall_time)


def train_sb3(algorithm: str, env_id: str, num_threads: int) -> None:
    """The same with stable-baselines3; what it cannot do alike is said where it differs."""
    import torch
    from stable_baselines3 import DQN, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    import checkpoint  # noqa: F401 (registers the games)

    torch.set_num_threads(num_threads)
    policy_kwargs = {"optimizer_kwargs": {"eps": 1e-5}}
    if algorithm == "dqn":  # its loss is Huber's, and it clips the gradient's norm
        env = VecFrameStack(make_atari_env(env_id, n_envs=1, seed=1), n_stack=4)
        model = DQN(
            "CnnPolicy", env, seed=1, learning_rate=1e-4, buffer_size=20_000, learning_starts=1000, batch_size=32,
            gamma=0.99, train_freq=4, gradient_steps=1, target_update_interval=1000, exploration_initial_eps=0.1,
            exploration_final_eps=0.1, policy_kwargs=policy_kwargs,
        )  # fmt: skip
    else:
        env = VecFrameStack(make_atari_env(env_id, n_envs=8, seed=1), n_stack=4)
        model = PPO(
            "CnnPolicy", env, seed=1, learning_rate=2.5e-4, n_steps=128, batch_size=256, n_epochs=4, gamma=0.99,
            gae_lambda=0.95, clip_range=0.1, clip_range_vf=0.1, ent_coef=0.01, vf_coef=0.5, max_grad_norm=0.5,
            policy_kwargs=policy_kwargs,
        )  # fmt: skip
    times = {}

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            times[self.num_timesteps] = time.perf_counter()
            return True

    model.learn(WARM_UP[algorithm] + TIMED[algorithm] + (8 if algorithm == "ppo" else 0), callback=Clock())
    warm = next(step for step in times if step > WARM_UP[algorithm])
    last = max(step for step in times if step <= WARM_UP[algorithm] + TIMED[algorithm] + 8)
    report(last - warm, times[last] - times[warm])


def report(steps: int, seconds: float) -> None:
    status = Path("/proc/self/status").read_text()
    print(json.dumps({"speed": steps / seconds, "peak_gb": int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9}))


def breakdown(algorithm: str, env_id: str, num_threads: int, more_flags: list[str]) -> None:
    """Print where an agent step goes: exclusive wall-clock time by timing wrappers around what a script calls."""
    import torch

    import checkpoint

    module = __import__(f"{algorithm}_atari_lan")
    spent: dict[str, float] = {}
    calls: dict[str, int] = {}
    running: list[list] = []  # [label, seconds in inner wrappers] of the open calls
    learning = {"start": None, "steps": 0}

    def timed(owner, name, label):
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*arguments, **kwargs):
            running.append([label, 0.0])
            start = time.perf_counter()
            try:
                return original(*arguments, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                calls[name] = calls.get(name, 0) + 1
                spent[label] = spent.get(label, 0) + elapsed - running.pop()[1]
                if running:
                    running[-1][1] += elapsed

        setattr(owner, name, wrapper)

    timed(checkpoint.WholeGames, "step", "environment")
    timed(checkpoint.WholeGames, "reset", "environment")
    timed(checkpoint.SummaryWriter, "add_scalar", "logging")
    timed(checkpoint.Run, "log_losses", "logging")
    timed(checkpoint.Run, "save", "checkpoints")
    timed(module, "activations", "metrics")
    timed(module, "log_representation", "metrics")
    timed(torch.Tensor, "backward", "update: backward")
    timed(torch.optim.Adam, "step", "update: optimizer")
    if algorithm == "dqn":
        timed(module, "td_loss", "update: forward")
        timed(module.ReplayMemory, "add", "replay: add")
        timed(module.ReplayMemory, "sample", "replay: sample")
        timed(module.QNetwork, "forward", "acting")  # inside td_loss it is counted with it
    else:
        timed(module, "ppo_loss", "update: forward")
        timed(module, "compute_gae", "advantages")
        timed(module.ActorCritic, "forward", "acting")
        timed(module.AleGames, "step", "environment")
    inner = module.QNetwork if algorithm == "dqn" else module.ActorCritic
    forward = inner.forward

    def labelled(*arguments, **kwargs):
        if running and running[-1][0] == "update: forward":
            return forward.__wrapped__(*arguments, **kwargs)
        return forward(*arguments, **kwargs)

    inner.forward = labelled
    update = checkpoint.Progress.update

    def on_progress(progress, step, **values):
        if step >= WARM_UP[algorithm] and learning["start"] is None:
            spent.clear()
            calls.clear()
            learning.update(start=time.perf_counter(), first=step)
        learning.update(last=step, stop=time.perf_counter(), spent=dict(spent), calls=dict(calls))
        update(progress, step, **values)

    checkpoint.Progress.update = on_progress
    with tempfile.TemporaryDirectory() as runs_dir:
        flags = our_flags(algorithm, env_id, num_threads, runs_dir)
        flags += ["--no-double-q"] if algorithm == "dqn" else ["--no-async-envs"]
        flags += ["--metrics-frequency", "500", "--checkpoint-frequency", "500"]  # a few of what is rare
        flags += more_flags
        sys.argv = [f"{algorithm}_atari_lan.py", *flags]
        checkpoint.launch(module.main, module.Args)
    steps = learning["last"] - learning["first"]
    total = (learning["stop"] - learning["start"]) / steps
    shares = {label: seconds / steps for label, seconds in learning["spent"].items()}
    shares["the rest"] = total - sum(shares.values())
    for label, call, frequency in (
        ("metrics", "log_representation", "metrics_frequency"),
        ("checkpoints", "save", "checkpoint_frequency"),
    ):
        if label in shares:  # as often as by default
            seconds = learning["spent"][label] / learning["calls"][call]
            shares[label] = seconds / getattr(module.Args(), frequency)
    total = sum(shares.values())
    report = {label: round(1000 * seconds, 4) for label, seconds in sorted(shares.items(), key=lambda row: -row[1])}
    print(json.dumps({"ms per agent step": round(1000 * total, 4), "parts": report}))


def this_machine() -> str:
    """The CPU, and what it has for bfloat16, on which --amp depends."""
    about = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t" in line)
    about = {name.strip(): value.strip("\t: ") for name, value in about.items()}
    bfloat16 = [flag for flag in about.get("flags", "").split() if flag.endswith("_bf16")]
    return f"{os.cpu_count()} cores, {about.get('model name', platform.machine())}, {' '.join(bfloat16) or 'no bf16'}"


def main(args: Args) -> None:
    import checkpoint

    try:
        checkpoint.check_env_id(args.env_id)
        checkpoint.require(args.rounds > 0, args, "rounds", "be positive")
        checkpoint.require(0 < args.num_threads <= os.cpu_count(), args, "num_threads", f"lie in 1 to {os.cpu_count()}")
    except checkpoint.BadInput as error:
        checkpoint.leave(2, f"error: {error}")
    file = ROOT / "results" / "benchmark.json"
    try:
        machines = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        checkpoint.leave(2, f"error: {file} is damaged; move it away, or take it from git again")
    names = QUICK if args.quick else tuple(CONTENDERS)
    rounds = 1 if args.quick else args.rounds
    found: dict[str, list[dict]] = {name: [] for name in names}
    for n in range(rounds):
        for name in names:
            found[name].append(measure(name, args))
            print(f"round {n + 1}/{rounds}  {name:<40}{found[name][-1]['speed']:>8.1f} steps/s", flush=True)

    print(f"\n{'':<40}{'median':>9}{'lowest':>9}{'highest':>9}{'x sb3':>8}{'peak GB':>9}")
    table = {}
    for name, runs in found.items():
        speeds = [run["speed"] for run in runs]
        rival = found[f"sb3 {CONTENDERS[name][0]}"]
        ratio = statistics.median(ours / theirs["speed"] for ours, theirs in zip(speeds, rival, strict=True))
        table[name] = {
            "median": statistics.median(speeds),
            "lowest": min(speeds),
            "highest": max(speeds),
            "ratio": ratio,
            "peak_gb": max(run["peak_gb"] for run in runs),
        }
        row = table[name]
        print(
            f"{name:<40}{row['median']:>9.1f}{row['lowest']:>9.1f}{row['highest']:>9.1f}{ratio:>8.2f}{row['peak_gb']:>9.2f}"
        )

    parts = {}
    if args.breakdown and not args.quick:
        for name, (algorithm, flags) in BROKEN_DOWN.items():
            call = f"breakdown({algorithm!r}, {args.env_id!r}, {args.num_threads}, {flags!r})"
            parts[name] = in_a_process(call, f"the breakdown of {name}")
            print(f"\n{name}: {parts[name]['ms per agent step']} ms per agent step")
            for label, milliseconds in parts[name]["parts"].items():
                print(f"  {label:<22}{milliseconds:>8.3f}")
    if not args.quick:
        content = {
            "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "env_id": args.env_id,
            "rounds": rounds,
            "contenders": table,
            "breakdown": parts,
        }
        text = json.dumps(machines | {this_machine(): content}, indent=2) + "\n"
        checkpoint.replace(file, lambda opened: opened.write(text.encode()))


if __name__ == "__main__":
    for signum in (signal.SIGPIPE, signal.SIGINT):  # end quietly, behind `| head` too
        signal.signal(signum, signal.SIG_DFL)
    main(tyro.cli(Args, description=__doc__))
