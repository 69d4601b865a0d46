"""checkpoint.py, and what both scripts do with it: refusals, the environment, kills and resumes."""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import gymnasium as gym
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, read_events, run_script
from stable_baselines3.common.atari_wrappers import AtariWrapper
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import checkpoint
import dqn_atari_lan as dqn
import ppo_atari_lan as ppo

GAMES = ["BeamRider", "Breakout", "Enduro", "Pong", "Qbert", "Seaquest", "SpaceInvaders", "VideoPinball"]
SCRIPTS = ["dqn_atari_lan.py", "ppo_atari_lan.py"]

# --------------------------------------------------------------------------------------------- bad input

BAD_INPUT = {
    "unknown game": (
        "--env-id BrekoutNoFrameskip-v4",
        "there is no game 'BrekoutNoFrameskip-v4'; did you mean Breakout",
    ),
    "no game at all": ("--env-id x", "there is no game 'x'; --env-id takes <Game>NoFrameskip-v4"),
    "not Atari": ("--env-id CartPole-v1", "CartPole-v1 is not an Atari environment; --env-id takes"),
    "v5": ("--env-id ALE/Breakout-v5", "use --env-id BreakoutNoFrameskip-v4"),
    "frame skip": ("--env-id Breakout-v4", "use --env-id BreakoutNoFrameskip-v4"),
    "sticky actions": ("--env-id BreakoutNoFrameskip-v0", "use --env-id BreakoutNoFrameskip-v4"),
    "no steps": ("--total-timesteps 0", "--total-timesteps is 0; it must be positive"),
    "negative learning rate": ("--learning-rate -1", "--learning-rate is -1.0; it must be positive"),
    "gamma": ("--gamma 1.5", "--gamma is 1.5; it must lie in [0, 1]"),
    "huge seed": ("--seed 18446744073709551616", "--seed is 18446744073709551616; it must be below 2**53"),
    "many threads": ("--num-threads 100000", "--num-threads is 100000; it must not exceed the"),
    "infinite learning rate": ("--learning-rate inf", "--learning-rate is inf; it must be finite"),
    "long name": (f"--exp-name {'x' * 300}", "it must be part of a folder's name, which has at most 255 bytes"),
    "threads": ("--num-threads -1", "--num-threads is -1; it must not be negative"),
    "seed": ("--seed -1", "--seed is -1; it must not be negative"),
    "few samples": ("--metrics-samples 511", "--metrics-samples is 511; it must be at least 512"),
    "few samples for wide": ("--activation wide-1024 --metrics-samples 1023", "must be at least 1024"),
    "video of nothing": ("--capture-video", "--capture-video films the evaluation; add e.g. --eval-episodes 1"),
    "no wandb": ("--track", "--track needs Weights & Biases; install it: pip install wandb"),
    "name": ("--exp-name a/b", "--exp-name is a/b; it must be part of a folder's name, which has"),
    "file as folder": (f"--runs-dir {ROOT}/README.md/runs", "is not a folder; name another one"),
    "read-only folder": ("--runs-dir /proc/runs", "cannot make /proc/runs/BreakoutNoFrameskip-v4__"),
}
BAD_PPO_INPUT = {
    "no environments": ("--num-envs 0", "--num-envs is 0; it must be positive"),
    "minibatches": (
        "--num-envs 3 --num-steps 5 --num-minibatches 4",
        "--num-minibatches is 4; it must divide --num-envs 3 times --num-steps 5 = 15",
    ),
    "single transitions": ("--num-envs 2 --num-steps 2", "it must be below --num-envs 2 times --num-steps 2 = 4"),
    "less than a rollout": ("--total-timesteps 1023", "--total-timesteps is 1023; it must be at least --num-envs 8"),
    "memory": (
        "--num-steps 1000000 --total-timesteps 8000000 --num-minibatches 4",
        "lower --num-envs 8, --num-steps 1000000 or --metrics-samples 2048",
    ),
    "lambda": ("--gae-lambda -0.1", "--gae-lambda is -0.1; it must lie in [0, 1]"),
    "target": ("--target-kl 0", "--target-kl is 0.0; it must be positive, or None"),
    "checkpoints of ale": ("--env-backend ale", "a run cannot resume; accept that with --checkpoint-frequency 0"),
}
BAD_DQN_INPUT = {
    "zero batch": ("--batch-size 0", "--batch-size is 0; it must be positive"),
    "negative memory": ("--buffer-size -5", "--buffer-size is -5; it must be positive"),
    "late start": ("--total-timesteps 79999", "--learning-starts is 80000; it must not exceed --total-timesteps 79999"),
    "early start": ("--learning-starts 31", "--learning-starts is 31; it must be at least --batch-size 32"),
    "memory below a batch": ("--buffer-size 31", "--buffer-size is 31; it must be at least --batch-size 32"),
    "memory": (
        "--buffer-size 1000000000 --total-timesteps 1000000000",
        "not enough memory: 1500.8 GB needed",
    ),
    "exploration": ("--end-e 1.1", "--end-e is 1.1; it must lie in [0, 1]"),
}
ALL_BAD_INPUT = [
    pytest.param(script, *case, id=f"{script[:3]}-{name}")
    for script in SCRIPTS
    for name, case in (BAD_INPUT | (BAD_DQN_INPUT if script.startswith("dqn") else BAD_PPO_INPUT)).items()
]


def launch_in_process(monkeypatch, capsys, script, arguments):
    """`python <script> <arguments>` without starting python: (exit code, stderr)."""
    module = __import__(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    codes = []

    def leave(code):
        codes.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as stopped:
        checkpoint.launch(module.main, module.Args)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("script", "flags", "message"), ALL_BAD_INPUT)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(monkeypatch, capsys, tmp_path, script, flags, message):
    runs_dir = tmp_path / "runs"
    before = sorted(tmp_path.iterdir())
    arguments = ["--runs-dir", str(runs_dir), *flags.split()]
    code, stderr = launch_in_process(monkeypatch, capsys, script, arguments)
    assert code == 2
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_cannot_be_parsed_is_exit_code_2_from_the_shell(script, tmp_path):
    for flags in (["--activation", "swish"], ["--seed", "one"], ["--no-such-flag"]):
        done = run_script(script, *flags, "--runs-dir", tmp_path / "runs")
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert flags[-1].strip("-") in done.stderr
    bad = run_script(script, "--env-id", "Pnog", "--runs-dir", tmp_path / "runs")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: there is no game 'Pnog'; did you mean PongNoFrameskip-v4?\n"
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------- environment


class Recorder(gym.Wrapper):
    """Innermost: the raw rewards between the emulator's true resets."""

    def __init__(self, env):
        super().__init__(env)
        self.finished = []

    def reset(self, **kwargs):
        self.score = 0.0
        return self.env.reset(**kwargs)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.score += reward
        if terminated or truncated:
            self.finished.append(self.score)
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize("game", ["Breakout", "Seaquest"])
def test_frames_are_atari_wrappers_and_scores_are_whole_unclipped_games(monkeypatch, game):
    """Frame by frame against SB3's AtariWrapper; scores against raw rewards below it. Would catch: a clipped or a
    life's return, a game lost at a lost life, a length in emulator frames."""
    env_id = f"{game}NoFrameskip-v4"
    make = gym.make
    recorders = []

    def recorded(*arguments, **kwargs):
        recorders.append(Recorder(make(*arguments, **kwargs)))
        return recorders[-1]

    monkeypatch.setattr(gym, "make", recorded)
    env, oracle = dqn.make_env(env_id), AtariWrapper(make(env_id))
    (frame, _), (expected, _) = env.reset(seed=5), oracle.reset(seed=5)
    rng = np.random.default_rng(1)
    scores, lost_lives, length = [], 0, 0
    for _ in range(1500):
        np.testing.assert_array_equal(frame, expected)
        action = int(rng.integers(env.action_space.n))
        frame, reward, terminated, truncated, info = env.step(action)
        expected, *others, _ = oracle.step(action)
        assert [reward, terminated, truncated] == others
        length += 1
        if "episode" in info:
            scores.append(info["episode"]["r"])
            assert info["episode"]["l"] == length
            length = 0
        if terminated or truncated:
            lost_lives += "episode" not in info
            (frame, reset_info), (expected, _) = env.reset(), oracle.reset()
            assert "episode" not in reset_info
    assert scores == recorders[0].finished
    assert len(scores) >= 2
    assert max(scores) > 1
    assert lost_lives >= 4


def test_a_game_that_is_cut_off_inside_a_reset_is_told_by_the_reset(monkeypatch):
    """After a lost life SB3 plays on inside reset(): a time limit can fall there. Would catch: that game's loss."""
    make = gym.make
    monkeypatch.setattr(gym, "make", lambda *a, **k: make(*a, **k, max_num_frames_per_episode=700))
    env = dqn.make_env("BreakoutNoFrameskip-v4")
    rng = np.random.default_rng(0)
    told = {"step": 0, "reset": 0}
    env.reset(seed=1)
    for _ in range(6000):
        *_, terminated, truncated, info = env.step(int(rng.integers(4)))
        told["step"] += "episode" in info
        if terminated or truncated:
            told["reset"] += "episode" in env.reset()[1]
    assert sum(told.values()) == env.statistics.episode_count
    assert told["step"] > 20
    assert told["reset"] > 0


def test_frames_are_stacked_from_every_reset_on():
    """Four copies after every reset, a lost life's too; PPO's wrapper and DQN's functions agree."""
    plain, stacking = dqn.make_env("BreakoutNoFrameskip-v4"), ppo.make_env("BreakoutNoFrameskip-v4")
    frame, stacked = plain.reset(seed=1)[0], stacking.reset(seed=1)[0]
    stack = dqn.first_stack(frame)
    rng = np.random.default_rng(0)
    ends = 0
    for _ in range(300):
        np.testing.assert_array_equal(stack, stacked[..., 0])
        action = int(rng.integers(4))
        frame, _, terminated, _, _ = plain.step(action)
        stacked, *_ = stacking.step(action)
        stack = dqn.push_frame(stack, frame)
        if terminated:
            ends += 1
            np.testing.assert_array_equal(stack, stacked[..., 0])
            frame, stacked = plain.reset()[0], stacking.reset()[0]
            stack = dqn.first_stack(frame)
            assert (stack == stack[:1]).all()
    assert ends >= 5


def play_on(env, actions):
    """Step and reset; everything that comes out."""
    seen = []
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(int(action))
        seen.append((obs.tobytes(), reward, terminated, truncated, info))
        if terminated or truncated:
            obs, info = env.reset()
            seen.append((obs.tobytes(), info))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("game", GAMES)
def test_a_game_continues_exactly_from_its_snapshot(game, tmp_path):
    """Snapshots at many moments, through a file, into fresh environments in other frame phases. Would catch: any
    wrapper's field left behind, and an emulator that drifts after a restore (Q*bert)."""
    env = ppo.make_env(f"{game}NoFrameskip-v4")
    actions = np.random.default_rng(7).integers(env.action_space.n, size=1600)
    env.reset(seed=3)
    snapshots, seen = {}, []
    for t, action in enumerate(actions):
        if t % 53 == 11:
            checkpoint.write_checked(tmp_path / str(t), {"env": env.snapshot})
            snapshots[t] = len(seen)
        seen += play_on(env, [action])
    assert len(snapshots) == 30
    for t, position in snapshots.items():
        other = ppo.make_env(f"{game}NoFrameskip-v4")
        other.reset(seed=t)
        for _ in range(t % 7):
            other.unwrapped.step(0)
        other.snapshot = checkpoint.arrays(checkpoint.read_checked(tmp_path / str(t))["env"])
        assert play_on(other, actions[t : t + 250])[:250] == seen[position:][:250], t


# -------------------------------------------------------------------------------------- kills and resumes

# Short runs on real Breakout whose checkpoints come often. DQN's memory of 512 wraps around three times.
COMMON = "--env-id BreakoutNoFrameskip-v4 --activation relu --num-threads 1 --metrics-samples 512"
DQN = """dqn_atari_lan --total-timesteps 1800 --buffer-size 512 --learning-starts 100 --batch-size 8 --train-frequency 9
    --exploration-fraction 0.5 --target-network-frequency 300 --checkpoint-frequency 200 --metrics-frequency 700
    --eval-episodes 1"""
PPO = """ppo_atari_lan --total-timesteps 1728 --num-envs 2 --num-steps 32 --num-minibatches 4 --update-epochs 1
    --checkpoint-frequency 192 --metrics-frequency 700"""
RUNS = {
    "dqn": f"{DQN} {COMMON}".split(),
    "ppo-sync": f"{PPO} {COMMON} --no-async-envs".split(),
    "ppo-async": f"{PPO} {COMMON} --async-envs".split(),
}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["test_checkpoint"])  # so that a run starts in an instant


def child(arguments, output, sabotage):
    """In a process of its own: a script as from the shell, but that its last checkpoints stay for inspection."""
    os.chdir(ROOT)
    script, *flags = arguments
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [f"{script}.py", *flags]
    delete = checkpoint.Run.delete_checkpoints
    checkpoint.Run.delete_checkpoints = lambda run, keep: delete(run, keep) if keep else None
    if sabotage:
        sabotage()
    module = __import__(script)
    checkpoint.launch(module.main, module.Args)


def start(name, runs_dir, *flags, sabotage=None):
    runs_dir.mkdir(parents=True, exist_ok=True)
    arguments = [*RUNS[name], "--runs-dir", str(runs_dir), *map(str, flags)]
    process = CONTEXT.Process(target=child, args=(arguments, str(runs_dir / "output.txt"), sabotage))
    process.start()
    return process


def run(name, runs_dir, *flags, sabotage=None):
    """Run to the end; returns the exit code and what was printed."""
    before = len(printed(runs_dir))
    process = start(name, runs_dir, *flags, sabotage=sabotage)
    process.join(200)
    return process.exitcode, printed(runs_dir)[before:]


def printed(runs_dir):
    """All that runs in a folder have said so far."""
    return (runs_dir / "output.txt").read_text() if (runs_dir / "output.txt").exists() else ""


def wait_for(process, condition):
    while not condition():
        assert process.is_alive()
        time.sleep(0.005)


def run_folder(runs_dir):
    (folder,) = [path for path in runs_dir.iterdir() if path.is_dir()]
    return folder


def outcome(runs_dir):
    """All that must not depend on kills: weights, events, sample, and the last checkpoint with optimizer and game."""
    folder = run_folder(runs_dir)
    points = Counter()
    for file in folder.glob("events.*"):
        for event in EventFileLoader(str(file)).Load():
            points.update((value.tag, event.step) for value in event.summary.value)
    assert max(points.values()) == 1, points.most_common(3)
    events = read_events(folder)
    events.pop("charts/SPS")
    last = checkpoint.read_checked(max((folder / "checkpoints").glob("*.ckpt")))
    for key in ("event_files", "segments"):  # where they are cut depends on the kills
        del last[key]
    sample = dict(np.load(folder / "activations.npz"))
    weights = torch.load(folder / "model.pt", weights_only=True)
    return {"weights": weights, "events": events, "last": last, "sample": sample}


def assert_equal(ours, theirs, where=""):
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}/{i}")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, np.ndarray):
        np.testing.assert_array_equal(ours, theirs, where)
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The outcome of each of RUNS when nothing disturbs it."""
    outcomes = {}

    def get(name):
        if name not in outcomes:
            runs_dir = tmp_path_factory.mktemp("undisturbed")
            code, text = run(name, runs_dir)
            assert code == 0, text
            outcomes[name] = outcome(runs_dir)
        return outcomes[name]

    return get


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_twenty_times_ends_like_one_that_never_was(name, runs_dir, undisturbed):
    """SIGKILL and SIGTERM at random moments, from before the first checkpoint on, then to the end undisturbed.
    Would catch: any state that a checkpoint forgets, a point logged twice, a half-written file taken for whole."""
    expected = undisturbed(name)
    rng = random.Random(name)
    codes = []
    while len(codes) < 22:
        before = len(printed(runs_dir))
        process = start(name, runs_dir)
        if len(codes) < 6:  # while it starts, and before there is a checkpoint
            time.sleep(rng.uniform(0.02, 1.0))
        else:
            wait_for(process, lambda before=before: len(printed(runs_dir)) > before)
            time.sleep(rng.uniform(0, 0.5))
        os.kill(process.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        process.join(60)
        codes.append(process.exitcode)
    text = printed(runs_dir)
    assert 0 not in codes, codes  # every kill hit an unfinished run
    assert 1 not in codes, text
    assert codes.count(-signal.SIGKILL) >= 8, codes
    assert codes.count(128 + signal.SIGTERM) >= 2, codes
    assert text.count("resumed at") >= 5, text
    code, text = run(name, runs_dir)
    assert code == 0, text
    assert_equal(outcome(runs_dir), expected)


class Die:
    """Sabotage: SIGKILL to oneself at the n-th call of a function that the writing of checkpoints uses."""

    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def __call__(self):
        original = getattr(os, self.function)

        def deadly(*arguments):
            self.calls -= 1
            if self.calls < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        setattr(os, self.function, deadly)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "ppo-sync"])
def test_kills_inside_the_writing_of_a_checkpoint(name, runs_dir, undisturbed):
    """Would catch: a checkpoint that is renamed before its segment, an old one deleted before the new one is whole."""
    expected = undisturbed(name)
    # Counted from the start of each process, whose first calls may be config.json's.
    for function, calls in (("fsync", 3), ("fsync", 4), ("fsync", 5), ("replace", 1), ("replace", 2), ("unlink", 0)):
        code, text = run(name, runs_dir, sabotage=Die(function, calls))
        assert code == -signal.SIGKILL, (function, calls, text)
    code, text = run(name, runs_dir)
    assert code == 0, text
    assert "warning" not in text
    assert_equal(outcome(runs_dir), expected)
    checkpoints = run_folder(runs_dir) / "checkpoints"
    assert len(list(checkpoints.glob("*.ckpt"))) == 2
    assert not list(checkpoints.glob("*.tmp"))
    assert len(list(checkpoints.glob("*.segment"))) <= 6  # a memory of 512 needs no more of 200


def interrupted(name, runs_dir, steps):
    """The folder of a run that was killed once it had a checkpoint at `steps`, and the one before."""
    process = start(name, runs_dir)
    wait_for(process, lambda: list(runs_dir.glob(f"*/checkpoints/*{steps}.ckpt")))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    folder = run_folder(runs_dir)
    for superfluous in sorted((folder / "checkpoints").glob("*.ckpt"))[:-2]:  # where the kill came before its deletion
        superfluous.unlink()
    return folder


def damage(path, how):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"truncated": content[: len(content) // 2], "emptied": b"", "one bit flipped": content}[how])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "ppo-sync"])
def test_every_file_corrupted_in_turn(name, runs_dir, tmp_path, undisturbed):
    """Back to the checkpoint before with a warning; none whole: an error, and nothing is deleted or changed."""
    folder = interrupted(name, runs_dir, 800 if name == "dqn" else 768)
    backup = tmp_path / "backup"
    shutil.copytree(runs_dir, backup)

    def restart():
        shutil.rmtree(runs_dir)
        shutil.copytree(backup, runs_dir)

    old, new = sorted((folder / "checkpoints").glob("*.ckpt"))[-2:]
    for how in ("truncated", "emptied", "one bit flipped"):
        damage(new, how)
        loaded = checkpoint.Run(folder, name.split("-")[0])
        loaded.load()
        assert loaded.resumed["step"] == int(old.stem), how
        shutil.copy(backup / new.relative_to(runs_dir), new)

    damage(new, "one bit flipped")
    code, text = run(name, runs_dir)
    assert code == 0, text
    assert f"warning: {new} is truncated or corrupt; trying the checkpoint before it" in text
    assert f"resumed at {int(old.stem):,}" in text
    assert_equal(outcome(runs_dir), undisturbed(name))

    restart()
    damage(new, "truncated")
    damage(old, "emptied")
    before = contents(folder)
    code, text = run(name, runs_dir)
    assert code == 2
    assert "error: none of the 2 checkpoints" in text
    assert "--overwrite" in text
    assert "Traceback" not in text
    assert contents(folder) == before

    for segment in sorted((folder / "checkpoints").glob("*.segment"))[-1:]:
        restart()
        segment.unlink()
        code, text = run(name, runs_dir)
        assert code == 0, text
        assert "trying the checkpoint before it" in text
        assert_equal(outcome(runs_dir), undisturbed(name))

    restart()
    (events,) = folder.glob("events.*")
    damage(events, "one bit flipped")
    code, text = run(name, runs_dir)
    assert code == 0
    assert f"warning: {events} is damaged; curves will lack points" in text
    restart()
    damage(folder / "config.json", "truncated")
    before = contents(folder)
    code, text = run(name, runs_dir)
    assert code == 2
    assert text.count("\n") == 1
    assert "config.json is unreadable: restore it, or start anew with --overwrite" in text
    assert contents(folder) == before
    code, text = run(name, runs_dir, "--overwrite")
    assert code == 0
    assert_equal(outcome(runs_dir), undisturbed(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "ppo-async"])
def test_changed_flags_two_processes_and_a_finished_run(name, runs_dir, undisturbed):
    """Would catch: a resume with another schedule, two writers in one folder, a finished run trained again."""
    folder = interrupted(name, runs_dir, 200 if name == "dqn" else 192)
    before = contents(folder)
    code, text = run(name, runs_dir, "--total-timesteps", 3456, "--gamma", 0.9)
    assert code == 2
    total = RUNS[name][RUNS[name].index("--total-timesteps") + 1]
    assert f"--gamma 0.9 (was 0.99), --total-timesteps 3456 (was {total});" in text
    assert contents(folder) == before

    process = start(name, runs_dir)
    wait_for(process, lambda: "resumed at" in printed(runs_dir))
    code, text = run(name, runs_dir)
    assert code == 2
    assert f"is being trained by process {process.pid} on " in text
    assert "Traceback" not in text
    os.kill(process.pid, signal.SIGKILL)  # its lock is free although its workers may live on for a moment
    process.join()

    code, text = run(name, runs_dir, "--checkpoint-frequency", "384", "--num-threads", "0", "--eval-episodes", "0")
    assert code == 0, text  # these never block a resume
    finished = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    code, text = run(name, runs_dir)
    assert (code, text) == (0, f"{folder} has finished; --overwrite trains it anew\n")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == finished
    assert_equal(torch.load(folder / "model.pt", weights_only=True).keys(), undisturbed(name)["weights"].keys())


class LimitFileSize:
    """Sabotage: after the first checkpoint no file may grow beyond 1 MB, as on a disk that is full."""

    def __call__(self):
        save = checkpoint.Run.save

        def limited(*arguments, **kwargs):
            save(*arguments, **kwargs)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

        checkpoint.Run.save = limited


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "ppo-async"])
def test_a_full_disk_ends_the_run_and_leaves_its_last_checkpoint(name, runs_dir, undisturbed):
    code, text = run(name, runs_dir, sabotage=LimitFileSize())
    assert code == 1
    assert "Traceback" not in text
    assert "error: cannot use" in text
    assert (
        "File too large. The last checkpoint, if there was one, is whole: free some space, then resume with python"
        in text
    )
    assert len(list(runs_dir.glob("*/checkpoints/*.ckpt"))) == 1
    code, text = run(name, runs_dir)
    assert code == 0, text
    assert f"resumed at {200 if name == 'dqn' else 192}" in text
    assert_equal(outcome(runs_dir), undisturbed(name))


@pytest.mark.slow
def test_a_full_tmpfs(tmp_path, undisturbed):
    """ENOSPC for real: room for some checkpoints, not for three at once; then the file system is enlarged."""
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        code, text = run("dqn", mount / "runs")
        assert code == 1
        assert "No space left on device" in text
        assert "Traceback" not in text
        subprocess.run(["mount", "-o", "remount,size=400m", mount], check=True)
        code, text = run("dqn", mount / "runs")
        assert code == 0, text
        assert "resumed at" in text
        assert_equal(outcome(mount / "runs"), undisturbed("dqn"))
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", SCRIPTS)
def test_signals_from_the_shell(script, signum, runs_dir):
    """Ctrl-C reaches the whole process group, workers too. Exit code 128 + n, and the line that resumes."""
    flags = RUNS["dqn" if script.startswith("dqn") else "ppo-async"][1:]
    command = [sys.executable, script, *flags, "--runs-dir", str(runs_dir), "--checkpoint-frequency", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while "agent steps" not in process.stdout.readline():
        pass
    time.sleep(0.5)
    os.killpg(process.pid, signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith(f"stopped by {signum.name}; this resumes it: python {script} --total-timesteps")
    assert len(list(runs_dir.glob("*/checkpoints/*.ckpt"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "ppo-async"])
def test_divergence_is_one_line_and_exit_code_1(name, runs_dir):
    """Whatever meets the NaN first: loss, policy, measurement, checkpoint. Would catch: a traceback, a NaN model.pt."""
    for n, flags in enumerate(("--metrics-frequency 150", "--metrics-frequency 0 --checkpoint-frequency 0")):
        code, text = run(name, runs_dir / str(n), "--learning-rate", "1e30", *flags.split())
        assert code == 1, text
        assert "Traceback" not in text
        assert "error: the training diverged before step " in text
        assert "last good losses: " in text
        assert not list(runs_dir.glob("*/*/model.pt"))
        assert not list(runs_dir.glob("*/*/checkpoints/*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "ppo-sync"])
def test_a_signal_during_the_evaluation_loses_no_training(name, runs_dir):
    process = start(name, runs_dir, "--checkpoint-frequency", "0", "--eval-episodes", "200")
    wait_for(process, lambda: "evaluation game 0" in printed(runs_dir))
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    code, text = run(name, runs_dir, "--checkpoint-frequency", "0", "--eval-episodes", "2")
    assert code == 0
    total = RUNS[name][RUNS[name].index("--total-timesteps") + 1]
    assert f"resumed at {int(total):,}" in text
    events = read_events(run_folder(runs_dir))
    assert [step for step, _ in events["eval/episodic_return"]] == [0, 1]


@pytest.mark.slow
def test_a_dead_worker_ends_the_run_in_one_line(runs_dir):
    """As the out-of-memory killer does it. Would catch: a parent that waits for ever and holds the lock."""
    process = start("ppo-async", runs_dir, "--num-steps", "512", "--checkpoint-frequency", "0")
    wait_for(process, lambda: "agent steps" in printed(runs_dir))
    worker = psutil.Process(process.pid).children()[-1]
    worker.kill()
    process.join(60)
    assert process.exitcode == 1
    text = printed(runs_dir)
    assert "error: a worker process died" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    "script",
    ["dqn_atari_lan.py", "ppo_atari_lan.py", "plot_results.py", "scripts/regression.py", "scripts/benchmark.py",
     "scripts/replay_benchmark.py"],
)  # fmt: skip
def test_help_that_nobody_reads_ends_quietly(script):
    """As behind `| head`. Would catch: a traceback of BrokenPipeError below the help."""
    command = f"{sys.executable} {script} --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("benchmark.py", ["--rounds", "0"], "--rounds is 0; it must be positive"),
        ("benchmark.py", ["--num-threads", "-1"], "--num-threads is -1; it must lie in 1 to "),
        ("benchmark.py", ["--env-id", "Breakuot"], "did you mean BreakoutNoFrameskip-v4"),
        ("replay_benchmark.py", ["--steps", "0"], "--steps is 0; it must lie in 32"),
    ],
)
def test_benchmarks_refuse_bad_flags(script, flags, message):
    """Would catch: a traceback, and a table of nothing written over the recorded one."""
    command = [sys.executable, f"scripts/{script}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_training_goes_on_when_nobody_reads_its_output(runs_dir):
    """As behind `| head -1`. Would catch: a BrokenPipeError days into a run."""
    command = [sys.executable, "dqn_atari_lan.py", *RUNS["dqn"][1:], "--total-timesteps", "700", "--runs-dir", runs_dir]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert process.stderr.read() == ""
    assert (run_folder(runs_dir) / "model.pt").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pt", "", "model.pt is not a whole file: move it away"),
        ("config.json", '{"args": []}', "config.json is unreadable"),
        (
            "config.json",
            '{"args": {}, "algorithm": "dqn", "device": "cpu", "parameters": 1}',
            "config.json is unreadable",
        ),
        ("checkpoints", "", "checkpoints is not what a run makes: move it away"),
        ("checkpoints/0000000100.ckpt", "", "none of the 1 checkpoints"),
    ],
)
def test_odd_run_folders_are_refused_unchanged(tmp_path, name, content, message):
    """Would catch: a traceback, or event files deleted before the folder is found to be odd."""
    args = dqn.Args(runs_dir=str(tmp_path))
    folder = checkpoint.open_run("dqn", args, torch.device("cpu"), 1).folder
    (folder / "events.out.tfevents.1.x").write_text("points")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    before = contents(folder)
    with pytest.raises(checkpoint.BadInput, match=message):
        checkpoint.open_run("dqn", args, torch.device("cpu"), 1)
    assert contents(folder) == before


def test_strangers_files_among_the_checkpoints_stay(tmp_path):
    """Would catch: cleaning up by deleting all that is unknown."""
    run = checkpoint.open_run("dqn", dqn.Args(runs_dir=str(tmp_path)), torch.device("cpu"), 1)
    run.checkpoints.mkdir()
    (run.checkpoints / "backup").mkdir()
    (run.checkpoints / "notes.txt").write_text("mine")
    for step in (1, 2, 3):
        run.save(step, {})
    assert {file.name for file in run.checkpoints.iterdir()} == {
        *("backup", "notes.txt", "0000000002.ckpt", "0000000003.ckpt")
    }
    run.delete_checkpoints(keep=set())
    assert {file.name for file in run.checkpoints.iterdir()} == {"backup", "notes.txt"}


def test_the_resume_line_never_overwrites(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dqn_atari_lan.py", "--seed", "2", "--overwrite", "--exp-name", "a b"])
    assert checkpoint._same_command() == "python dqn_atari_lan.py --seed 2 --exp-name 'a b'"


def test_one_signal_sent_twice_is_one_and_a_later_one_leaves_at_once(monkeypatch, tmp_path):
    """Would catch: a launcher's repeated SIGTERM that costs the checkpoint; an impatient user who is not heard."""
    run = checkpoint.Run(tmp_path, "dqn")
    clock, left = [100.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint.os, "_exit", left.append)
    for seconds, expected in ((0, []), (0.5, []), (0.4, []), (0.2, [130])):
        clock[0] += seconds
        run.on_signal(signal.SIGINT, None)
        assert (run.signum, left) == (signal.SIGINT, expected)


def test_nothing_is_saved_of_a_state_with_nan(tmp_path):
    run = checkpoint.Run(tmp_path, "dqn")
    for state in ({"network": {"w": torch.tensor([1.0, float("nan")])}}, {"o": [{"m": torch.tensor(float("inf"))}]}):
        with pytest.raises(checkpoint.RunFailed, match="before step 7: the state holds NaN or infinity"):
            run.save(7, state)
    assert list(tmp_path.iterdir()) == []


def test_loading_executes_nothing(tmp_path):
    """A file that would run code when unpickled is refused."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    content = pickle.dumps(Evil(), protocol=2)
    (tmp_path / "x.ckpt").write_bytes(hashlib.sha256(content).digest() + content)
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.read_checked(tmp_path / "x.ckpt")
    assert not (tmp_path / "executed").exists()


def test_random_states_survive_a_file(tmp_path):
    """Would catch: one generator left out of the checkpoint."""
    rng = checkpoint.seed_everything(3, deterministic=False)

    def draws():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(1).item(), rng.normal()

    draws()
    checkpoint.write_checked(tmp_path / "states", checkpoint.random_states(rng))
    expected = draws()
    rng = checkpoint.seed_everything(4, deterministic=False)
    assert all(one != other for one, other in zip(draws(), expected, strict=True))
    checkpoint.restore_random_states(checkpoint.read_checked(tmp_path / "states"), rng)
    assert draws() == expected


def test_other_versions_and_another_device_warn_and_are_recorded(monkeypatch, tmp_path, capsys):
    """Would catch: a silent resume under another torch."""
    args = dqn.Args(runs_dir=str(tmp_path))
    first = checkpoint.open_run("dqn", args, torch.device("cpu"), 1)
    monkeypatch.setattr(checkpoint.importlib.metadata, "version", lambda name: "0.1" if name == "torch" else "1.0")
    checkpoint.open_run("dqn", args, torch.device("cuda"), 1)
    warnings = capsys.readouterr().err
    assert "warning: this run began with versions {'torch': '2.13.0" in warnings
    assert "warning: this run began with device cpu, now cuda" in warnings
    config = json.loads((first.folder / "config.json").read_text())
    assert config["device"] == "cpu"
    assert config["resumes"][0]["step"] == 0
    assert config["resumes"][0]["device"] == "cuda"
    assert config["resumes"][0]["versions"]["torch"] == "0.1"
    assert config.keys() >= {"algorithm", "args", "versions", "commit", "device", "parameters"}
    assert config["args"]["target_network_frequency"] == 1000


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    """Would catch: --overwrite deleting a stranger's files."""
    args = dqn.Args(runs_dir=str(tmp_path), overwrite=True)
    folder = tmp_path / "BreakoutNoFrameskip-v4__dqn_atari_lan__tanh-lan__1"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(checkpoint.BadInput, match="is not a run's folder"):
        checkpoint.open_run("dqn", args, torch.device("cpu"), 1)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]
