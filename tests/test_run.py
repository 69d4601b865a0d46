"""run.py with every script: kills and resumes, signals, full disks, and how a run ends."""

import fcntl
import functools
import itertools
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections import Counter

import forked
import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, SCRIPTS, contents, read_events, run_script
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import dqn_atari_lan as dqn
from lan_utils import checkpoint
from lan_utils import folder as run_folder_module
from lan_utils import run as run_module
from lan_utils.checkpoint import Checkpoints, LoopState
from lan_utils.cli import STOP_SIGNALS, RunFailed, Stopped
from lan_utils.replay import ReplayMemory
from lan_utils.run import Run

# -------------------------------------------------------------------------------------- kills and resumes

# Short runs on real Breakout whose checkpoints come often. DQN's memory of 512 wraps around twice.
COMMON = "--env-id BreakoutNoFrameskip-v4 --activation relu --num-threads 1 --metrics-samples 512"
DQN = """dqn_atari_lan.py --total-timesteps 1200 --buffer-size 512 --learning-starts 100 --batch-size 8
    --train-frequency 9 --exploration-fraction 0.5 --target-network-frequency 300 --checkpoint-frequency 200
    --metrics-frequency 500 --eval-episodes 1"""
PPO = """ppo_atari_lan.py --total-timesteps 1152 --num-envs 2 --num-steps 32 --num-minibatches 4 --update-epochs 1
    --checkpoint-frequency 192 --metrics-frequency 500"""
PQN = """pqn_atari_lan.py --total-timesteps 1152 --num-envs 4 --num-steps 16 --num-minibatches 4 --update-epochs 1
    --exploration-fraction 0.5 --checkpoint-frequency 192 --metrics-frequency 500"""
RUNS = {
    "dqn": f"{DQN} {COMMON}".split(),
    "ppo-sync": f"{PPO} {COMMON} --no-async-envs".split(),
    "ppo-async": f"{PPO} {COMMON} --async-envs".split(),
    "dqn-controls": f"""{DQN} {COMMON} --activation layernorm-lan --conv-activation tanh-glu
        --total-timesteps 1100 --train-frequency 45""".split(),
    "pqn-sync": f"{PQN} {COMMON} --no-async-envs".split(),  # what pqn-async must equal
    "pqn-async": f"{PQN} {COMMON} --async-envs".split(),  # several games in each worker
}


def prepare(sabotage, runs_dir):
    """In a run's process: its last checkpoints are kept for inspection, and something may go wrong."""
    os.environ["OMP_NUM_THREADS"] = "2"  # torch has its one thread already: PQN's games share two workers
    ReplayMemory.SEGMENT = 150  # so that segments are many, end between checkpoints, and leave
    run_folder_module._commit = lambda: "one commit"  # although somebody may commit meanwhile
    delete = Checkpoints.delete

    def keeping(checkpoints, keep):
        if not keep and checkpoints:
            kept = kept_checkpoints(runs_dir)
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(checkpoints.folder, kept)
        delete(checkpoints, keep)

    Checkpoints.delete = keeping
    if sabotage:
        sabotage()


def kept_checkpoints(runs_dir):
    """Copies of a finished run's last checkpoints."""
    return runs_dir.parent / f"{runs_dir.name}-checkpoints"


def start(name, runs_dir, *flags, sabotage=None):
    runs_dir.mkdir(parents=True, exist_ok=True)
    arguments = [*RUNS[name], "--runs-dir", runs_dir, *flags]
    return forked.start(arguments, runs_dir / "output.txt", before=functools.partial(prepare, sabotage, runs_dir))


def run(name, runs_dir, *flags, sabotage=None):
    """Run to the end; returns the exit code and what was printed."""
    before = len(printed(runs_dir))
    process = start(name, runs_dir, *flags, sabotage=sabotage)
    process.join(200)
    return process.exitcode, printed(runs_dir)[before:]


def printed(runs_dir):
    """Everything that the runs in a folder have printed so far."""
    return (runs_dir / "output.txt").read_text() if (runs_dir / "output.txt").exists() else ""


def wait_for(process, condition):
    while not condition():
        assert process.is_alive()
        time.sleep(0.005)


def run_folder(runs_dir):
    (folder,) = [path for path in runs_dir.iterdir() if path.is_dir()]
    return folder


def status(runs_dir):
    return json.loads((run_folder(runs_dir) / "status.json").read_text())


def outcome(runs_dir):
    """What must not depend on kills: weights, events, sample, and the last checkpoint with memory and game."""
    folder = run_folder(runs_dir)
    points = Counter()
    for file in folder.glob("events.*"):
        for event in EventFileLoader(str(file)).Load():
            points.update((value.tag, event.step) for value in event.summary.value)
    assert max(points.values()) == 1, points.most_common(3)
    events = read_events(folder)
    events.pop("charts/SPS")
    last = checkpoint.read_checked(max(kept_checkpoints(runs_dir).glob("*.ckpt")))  # names its parts by their digests
    del last["events"]  # the files' number depends on the kills
    for flag in ("runs_dir", "overwrite", "async_envs"):
        last["run"]["args"].pop(flag, None)
    sample = dict(np.load(folder / "activations.npz"))
    weights = torch.load(folder / "model.pt", weights_only=True)
    assert {weight.device.type for weight in weights.values()} == {"cpu"}
    assert (status(runs_dir)["state"], not (folder / "checkpoints").exists()) == ("finished", True)
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


@pytest.fixture(scope="session")
def undisturbed(once):
    """The outcome of each of RUNS when nothing disturbs it; none depends on its processes."""

    def get(name):
        name = name.replace("async", "sync")

        def make(runs_dir):
            code, text = run(name, runs_dir)
            assert code == 0, text

        return outcome(once(f"undisturbed-{name}", make))

    return get


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["dqn", "ppo-async", "pqn-async"])
def test_a_run_killed_six_times_ends_like_one_that_never_was(name, runs_dir, undisturbed):
    """SIGKILL and SIGTERM at random moments, from before the first checkpoint on, then to the end undisturbed.
    Would catch: any state that a checkpoint forgets, a point logged twice, a half-written file taken for whole."""
    expected = undisturbed(name)
    rng = random.Random(name)
    codes = []
    while len(codes) < 6:
        before = len(printed(runs_dir))
        process = start(name, runs_dir)
        if len(codes) < 2:  # while it starts, and before there is a checkpoint
            time.sleep(rng.uniform(0.02, 0.7))
        else:
            wait_for(process, lambda before=before: len(printed(runs_dir)) > before)
            time.sleep(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGTERM if len(codes) % 3 == 2 else signal.SIGKILL)
        process.join(60)
        codes.append(process.exitcode)
    text = printed(runs_dir)
    assert 0 not in codes, codes  # every kill hit an unfinished run
    assert 1 not in codes, text
    assert codes.count(-signal.SIGKILL) >= 3, codes
    assert codes.count(128 + signal.SIGTERM) >= 1, codes
    assert text.count("resumed at") >= 2, text
    code, text = run(name, runs_dir)
    assert code == 0, text
    assert_equal(outcome(runs_dir), expected)


class Die:
    """Sabotage: SIGKILL to oneself before the n-th call of a function of `os` in the writing of checkpoints."""

    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def __call__(self):
        original, save = getattr(os, self.function), Checkpoints.save
        saving = []

        def deadly(path, *arguments):
            if saving and (self.function != "unlink" or os.path.exists(path)):
                self.calls -= 1
                if self.calls < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(path, *arguments)

        def watched(*arguments):
            saving.append(True)
            save(*arguments)
            saving.clear()

        setattr(os, self.function, deadly)
        Checkpoints.save = watched


# Before the first part's content is on the disk, before it has its name, before the checkpoint has, and before old
# files are deleted, one after the other.
DEATHS = (("fsync", 0), ("fsync", 3), ("replace", 0), ("replace", 1), ("replace", 2), ("unlink", 0), ("unlink", 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-sync", "dqn-controls"])
def test_kills_inside_the_writing_of_a_checkpoint(name, runs_dir, undisturbed):
    """Would catch: a checkpoint that is renamed before its part, an old one deleted before the new one is whole."""
    expected = undisturbed(name)
    for function, calls in (
        DEATHS if name.startswith("dqn") else (("fsync", 1), ("replace", 0), ("replace", 1), ("unlink", 0))
    ):
        code, text = run(name, runs_dir, sabotage=Die(function, calls))
        assert code == -signal.SIGKILL, (function, calls, text)
    code, text = run(name, runs_dir)
    assert code == 0, text
    assert "warning" not in text
    assert_equal(outcome(runs_dir), expected)
    kept = kept_checkpoints(runs_dir)
    assert len(list(kept.glob("*.ckpt"))) == 2
    assert not list(kept.glob("*.tmp"))
    assert len(list(kept.glob("*.part"))) <= 7  # a memory of 512 needs no more of 150, but for two unfinished ones


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn"])
def test_every_file_corrupted_in_turn(name, runs_dir, tmp_path, undisturbed):
    """Back to the checkpoint before with a warning; none whole: an error, and nothing is deleted or changed."""
    folder = interrupted(name, runs_dir, 800)
    backup = tmp_path / "backup"
    shutil.copytree(runs_dir, backup)

    def restart():
        shutil.rmtree(runs_dir)
        shutil.copytree(backup, runs_dir)

    old, new = sorted((folder / "checkpoints").glob("*.ckpt"))[-2:]
    for how in ("truncated", "emptied", "one bit flipped"):
        damage(new, how)
        assert next(Checkpoints(old.parent).load())["step"] == int(old.stem), how
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

    for part in sorted((folder / "checkpoints").glob("*.part"))[-1:]:  # DQN's newest, which the older checkpoint lacks
        restart()
        part.unlink()
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
    code, text = run(name, runs_dir)
    assert code == 0
    assert f"warning: {folder}/config.json was missing: the checkpoints tell its flags" in text
    assert_equal(outcome(runs_dir), undisturbed(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn"])
def test_changed_flags_two_processes_and_a_finished_run(name, runs_dir, undisturbed):
    """Would catch: a resume with another schedule, two writers in one folder, a finished run trained again."""
    folder = interrupted(name, runs_dir, 200)
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

    assert status(runs_dir)["state"] == "running"  # the lock tells that it is not
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
        save = Checkpoints.save

        def limited(*arguments):
            save(*arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

        Checkpoints.save = limited


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn"])
def test_a_full_disk_ends_the_run_and_leaves_its_last_checkpoint(name, runs_dir, undisturbed):
    code, text = run(name, runs_dir, sabotage=LimitFileSize())
    assert code == 1
    assert "Traceback" not in text
    assert "error: cannot use" in text
    assert "File too large. What was saved is whole: free some space, then run this again: python" in text
    assert len(list(runs_dir.glob("*/checkpoints/*.ckpt"))) == 1
    code, text = run(name, runs_dir)
    assert code == 0, text
    assert "resumed at 200" in text
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
@pytest.mark.parametrize(
    ("script", "signum"), list(zip(SCRIPTS, itertools.cycle((signal.SIGTERM, signal.SIGINT)), strict=False))
)
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
    assert status(runs_dir)["state"] == "stopped"


def on_a_terminal(command):
    """Start a command in the foreground of a terminal of its own; the process and the terminal, to be closed."""
    terminal, its_end = pty.openpty()

    def take_it():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` around the tests would have ignored

    process = subprocess.Popen(
        command, cwd=ROOT, stdin=its_end, stdout=its_end, stderr=its_end, start_new_session=True, preexec_fn=take_it
    )
    os.close(its_end)
    text = b""
    while b"agent steps" not in text:
        text += os.read(terminal, 1000)
    return process, terminal


@pytest.mark.slow
def test_a_closed_terminal_stops_a_run_and_its_games_together(runs_dir):
    """SIGHUP reaches the workers too, and nothing can be printed any more. Would catch: no checkpoint, a status that
    says `running` for ever, another exit code because the last line could not be written."""
    flags = ["--runs-dir", str(runs_dir), "--checkpoint-frequency", "0", "--total-timesteps", "100000"]
    process, terminal = on_a_terminal([sys.executable, *RUNS["ppo-async"], *flags])
    os.close(terminal)
    os.killpg(process.pid, signal.SIGHUP)  # as the shell does, which gets it first
    assert process.wait(60) == 128 + signal.SIGHUP
    assert len(list(runs_dir.glob("*/checkpoints/*.ckpt"))) == 1
    assert status(runs_dir)["state"] == "stopped"


@pytest.mark.slow
def test_a_run_under_nohup_survives_its_terminal(runs_dir):
    """Would catch: an ignored SIGHUP that stops a run all the same."""
    command = ["bash", "-c", 'trap "" HUP; exec "$@"', "-", sys.executable, *RUNS["dqn"], "--runs-dir", str(runs_dir)]
    process, terminal = on_a_terminal(command)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 0
    assert status(runs_dir)["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn"])
def test_divergence_is_one_line_and_exit_code_1(name, runs_dir):
    """Whatever meets the NaN first: loss, policy, measurement, checkpoint. Would catch: a traceback, a NaN model.pt."""
    for n, flags in enumerate(("--metrics-frequency 150", "--metrics-frequency 0 --checkpoint-frequency 0")):
        code, text = run(name, runs_dir / str(n), "--learning-rate", "1e30", *flags.split())
        assert code == 1, text
        assert "Traceback" not in text
        assert "error: the training diverged before step " in text
        assert "last good losses: " in text
        assert not list(runs_dir.glob("*/*/model.pt"))
        assert status(runs_dir / str(n))["state"] == "failed"
        assert not list(runs_dir.glob("*/*/checkpoints/*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-sync"])
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


# ---------------------------------------------------------------------------------------- ale-py's games

ALE_RUN = (
    "ppo_atari_lan.py", "--env-backend", "ale", "--checkpoint-frequency", "0", "--total-timesteps", "1024",
    "--num-steps", "64", "--update-epochs", "1", "--num-threads", "1", "--metrics-frequency", "0",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_on_ale_games_is_reproducible(runs_dir, seed):
    """Would catch: an unseeded game (seed 0 was, in older releases), a checkpoint that cannot be made."""
    weights = []
    for exp_name in ("first", "second"):
        done = run_script(*ALE_RUN, "--runs-dir", runs_dir, "--exp-name", exp_name, "--seed", seed)
        assert done.returncode == 0, done.stderr
        folder = runs_dir / f"BreakoutNoFrameskip-v4__{exp_name}__tanh-lan__{seed}"
        weights.append(torch.load(folder / "model.pt"))
        assert not (folder / "checkpoints").exists()
        assert len(read_events(folder)["charts/episodic_return"]) >= 1
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


@pytest.mark.slow
def test_a_stopped_run_on_ale_games_says_that_nothing_was_saved(runs_dir):
    """Would catch: a signal that crashes in the missing snapshot, or a promise to resume."""
    command = [sys.executable, *ALE_RUN, "--runs-dir", str(runs_dir), "--total-timesteps", "10000000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "agent steps" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; nothing was saved; this starts anew: python ppo_atari_lan.py" in stderr
    assert "Traceback" not in stderr


# ------------------------------------------------------------------------------- what others do meanwhile


@pytest.mark.slow
def test_a_folder_that_is_begun_anew_while_its_process_sleeps(runs_dir, undisturbed):
    """Deleted while its process is suspended, and trained again. Would catch: two processes that write one run."""
    first = start("dqn", runs_dir)
    # Not while it writes the checkpoint: a file that is gone then is an error of its own, in one line too.
    wait_for(first, lambda: any('"checkpoint": 200' in file.read_text() for file in runs_dir.glob("*/status.json")))
    os.kill(first.pid, signal.SIGSTOP)
    shutil.rmtree(run_folder(runs_dir))
    code, text = run("dqn", runs_dir, sabotage=Die("replace", 5))
    assert code == -signal.SIGKILL, text
    before = contents(run_folder(runs_dir))
    os.kill(first.pid, signal.SIGCONT)
    first.join(60)
    assert first.exitcode == 1
    text = printed(runs_dir)
    assert text.count("was deleted or replaced while this run trained in it: nothing more is written") == 1
    assert "Traceback" not in text
    assert contents(run_folder(runs_dir)) == before
    code, text = run("dqn", runs_dir)
    assert code == 0, text
    assert_equal(outcome(runs_dir), undisturbed("dqn"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-async"])
def test_a_folder_that_is_deleted_ends_its_run_in_one_line(name, runs_dir):
    """Would catch: a traceback of TensorBoard's writer, a folder that comes to life again with half a run in it."""
    process = start(name, runs_dir)
    wait_for(process, lambda: list(runs_dir.glob("*/checkpoints/*.ckpt")))
    folder = run_folder(runs_dir)
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
    process.join(100)
    assert process.exitcode == 1
    lines = [line for line in printed(runs_dir).splitlines() if not line.startswith(("  ", "DQN", "PPO"))]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "deleted" in lines[0] or "No such file or directory" in lines[0]
    assert not folder.exists()


@pytest.mark.slow
def test_workers_that_die_during_the_evaluation_are_not_missed(runs_dir):
    """Would catch: a finished training that fails because nothing plays its games any more."""
    process = start("ppo-async", runs_dir, "--eval-episodes", "8")
    wait_for(process, lambda: "evaluation game 0" in printed(runs_dir))
    for worker in psutil.Process(process.pid).children():
        worker.kill()
    process.join(100)
    assert process.exitcode == 0, printed(runs_dir)
    assert status(runs_dir)["state"] == "finished"


@pytest.mark.slow
def test_another_thread_count_warns_and_is_recorded(runs_dir):
    """It gives other sums, and other weights. Would catch: a resume on other threads without a word."""
    folder = interrupted("ppo-sync", runs_dir, 960)
    if (os.cpu_count() or 1) < 2:
        pytest.skip("one core has one thread count")
    process = start("ppo-sync", runs_dir, "--num-threads", 2)
    wait_for(process, lambda: "resumed at" in printed(runs_dir))
    process.kill()
    process.join()
    text = printed(runs_dir)
    assert "warning: so far this run had threads 1, now 2: it may not continue bit for bit" in text
    config = json.loads((folder / "config.json").read_text())
    assert config["threads"] == 1
    assert [(resume["step"] >= 960, resume["threads"]) for resume in config["resumes"]] == [(True, 2)]


# ------------------------------------------------------------------------------------------ without a script


def begun(tmp_path, **flags):
    """A run that trains nothing."""
    run = Run("dqn", dqn.Args(runs_dir=str(tmp_path), **flags), torch.device("cpu"), np.random.default_rng(1))
    run.resume(network=torch.nn.Linear(2, 2), play=LoopState(step=0, more={}))
    return run


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_what_batch_systems_send_asks_for_a_checkpoint_however_often(monkeypatch, tmp_path, name):
    """The kernel repeats SIGXCPU every second. Would catch: a run killed by a warning, or in its checkpoint."""
    signum = getattr(signal, name)
    before = {other: signal.getsignal(other) for other in STOP_SIGNALS}
    try:
        signal.signal(signum, signal.SIG_DFL)
        run = begun(tmp_path)
        monkeypatch.setattr(run_module.os, "_exit", lambda code: pytest.fail("left without a checkpoint"))
        for seconds in (0, 5, 10):
            run._signalled_at -= seconds
            signal.raise_signal(signum)
            assert run.signum == signum
        with pytest.raises(Stopped) as stopped:
            run.save(7)
        assert (stopped.value.signum, stopped.value.saved) == (signum, True)
        signal.signal(signum, signal.SIG_IGN)
        begun(tmp_path)
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)


def test_weights_are_kept_along_the_way_until_overwrite(tmp_path):
    """Would catch: weights of another step under a name, GPU tensors, copies that no --overwrite deletes, a flag that
    blocks a resume, copies although nobody asked."""
    run = begun(tmp_path, keep_weights=10)
    network, folder = run.things["network"], run.folder.path
    kept = {}
    for step in range(1, 26):
        with torch.no_grad():
            network.weight.fill_(step)
        run.save(step)
    kept = {file.name: torch.load(file, weights_only=True) for file in folder.glob("weights_*")}
    assert {name: weights["weight"].unique().tolist() for name, weights in kept.items()} == {
        "weights_10.pt": [10.0],
        "weights_20.pt": [20.0],
    }
    run._save(25)
    assert begun(tmp_path).step == 25  # without the flag, resumed
    assert len(list(folder.glob("weights_*"))) == 2
    run = begun(tmp_path, overwrite=True)
    assert not list(folder.glob("weights_*"))
    run.save(10)
    assert not list(folder.glob("weights_*"))


def test_one_signal_sent_twice_is_one_and_a_later_one_leaves_at_once(monkeypatch, tmp_path):
    """Would catch: a launcher's repeated SIGTERM that costs the checkpoint; an impatient user who is not heard."""
    run = Run("dqn", dqn.Args(runs_dir=str(tmp_path)), torch.device("cpu"), np.random.default_rng(1))
    clock = [100.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: clock[0])
    for seconds in (0, 0.5, 0.4):
        clock[0] += seconds
        run._on_signal(signal.SIGINT, None)
        assert run.signum == signal.SIGINT
    clock[0] += 0.2
    with pytest.raises(Stopped) as stopped:
        run._on_signal(signal.SIGINT, None)
    assert (stopped.value.signum, stopped.value.saved) == (signal.SIGINT, False)
    assert isinstance(stopped.value, KeyboardInterrupt)  # nothing that catches errors swallows it


@pytest.mark.parametrize(("error", "state"), [(Stopped(signal.SIGTERM, False), "stopped"), (ValueError(), "failed")])
def test_what_status_says_of_a_run_that_was_left(tmp_path, error, state):
    """Would catch: a run that a second signal ended, counted among those that failed."""
    run = begun(tmp_path)
    run._leave(type(error), error, None)
    assert json.loads((run.folder.path / "status.json").read_text())["state"] == state


def test_nothing_is_saved_of_a_state_with_nan(tmp_path):
    run = begun(tmp_path)
    for state in ({"w": torch.tensor([1.0, float("nan")])}, {"o": [{"m": torch.tensor(float("inf"))}]}):
        run.things["play"].more = state
        with pytest.raises(RunFailed, match="before step 7: the state holds NaN or infinity"):
            run._save(7)
    assert not (run.folder.path / "checkpoints").exists()


def test_the_header_says_what_is_about_to_happen(tmp_path, capsys):
    args, rng = dqn.Args(runs_dir=str(tmp_path)), np.random.default_rng(1)
    run = Run("ppo", args, torch.device("cpu"), rng, memory_needed=2_560_000_000, stride=1024)
    run.resume(network=torch.nn.Linear(2, 2), play=LoopState(step=0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "PPO, tanh-lan, on BreakoutNoFrameskip-v4, seed 1"
    assert lines[1] == f"  run folder  {run.folder.path}"
    assert lines[2].startswith("  device      cpu (")
    assert lines[2].endswith(f", {torch.get_num_threads()} threads)")
    assert lines[3].startswith("  size        6 parameters, 2.6 GB needed, ")
    assert lines[4:] == ["  agent steps 9,999,360"]


def test_a_dead_neurons_moments_become_zero_and_its_weights_stay_equal():
    """Without a gradient Adam's first moment falls to the smallest denormal number and stays there, and every update is
    much slower. Would catch: a run that computes with such numbers; one that leaves them on or off."""
    weights, moments = [], []

    def train(in_a_run):
        if in_a_run:
            run_module.set_up(dqn.Args())
        weight = torch.nn.Parameter(torch.ones(64))
        optimizer = torch.optim.Adam([weight], fused=True)
        for step in range(1100):
            weight.grad = torch.full((64,), float(step < 10))
            optimizer.step()
        weights.append(weight.detach())
        moments.append(optimizer.state[weight]["exp_avg"].max().item())

    for in_a_run in (False, True, False):
        run_module.leaves_no_trace(train)(in_a_run)
    assert 0 < moments[0] == moments[2] < torch.finfo(torch.float32).tiny
    assert moments[1] == 0
    assert torch.equal(weights[0], weights[1])


def test_torch_takes_no_more_threads_than_a_quota_has_cores_for(monkeypatch):
    """Would catch: 64 threads that share the time of two cores; a number that somebody chose, overruled."""
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(run_module, "usable_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    with run_module._process_as_before():
        run_module.set_up(dqn.Args())
        assert taken == []
        monkeypatch.delenv("OMP_NUM_THREADS")
        run_module.set_up(dqn.Args())
        run_module.set_up(dqn.Args(num_threads=3))
        assert taken == [2, 3]


def test_what_is_due_when_turns_are_many_steps_long(tmp_path):
    """Would catch: a measurement that is skipped because no rollout ends at its step, or one that is made twice."""
    run = Run("dqn", dqn.Args(runs_dir=str(tmp_path)), torch.device("cpu"), np.random.default_rng(1), stride=384)
    assert [step for step in range(384, 4000, 384) if run._due(1000, step)] == [1152, 2304, 3072]
    assert not any(run._due(0, step) for step in range(384, 4000, 384))
    assert run.total == 9_999_744


class FixedMemory:
    """Gives what it was given, and notes what it was asked for."""

    def __init__(self, sample):
        self.sample, self.asked = sample, []

    def observations(self, n, seed):
        self.asked.append((n, seed))
        return self.sample


class Measured(torch.nn.Module):
    """Its observations are what is measured: z and one factor of it."""

    def __init__(self):
        super().__init__()
        self.z, self.factor, self.other = torch.nn.Flatten(), torch.nn.Flatten(), torch.nn.Linear(1, 1)
        self.measured = {"conv1": self.other, "z": self.z, "z_enc": self.factor}

    def forward(self, observations):
        return self.z(observations[:, 0]) + self.factor(observations[:, 1]) + self.other(observations[:, 0, :1])


def test_what_is_logged_depends_on_seed_and_step_alone(tmp_path):
    """Would catch: jitter from the training's generator, a histogram of other neurons, values logged that are not
    returned, a layer measured that was not asked for."""
    run = begun(tmp_path, dead_threshold=20.0, seed=5)
    network, memory = Measured(), FixedMemory(torch.randn(600, 2, 8) * torch.tensor([0.02, 1.0])[:, None])
    before = torch.get_rng_state()
    run.measure(9_999, network, memory)
    assert memory.asked == []  # not due
    run.measure(10_000, network, memory)
    assert memory.asked == [(2048, (5, 10_000))]
    assert torch.equal(torch.get_rng_state(), before)
    sample = {"z": memory.sample[:, 0], "z_enc": memory.sample[:, 1]}
    values, peaks = run_module.measure_representation(sample, 20.0, (5, 10_000))
    again, _ = run_module.measure_representation(sample, 20.0, (5, 10_000))
    assert again == values
    assert (values["dead_neurons"], values["dead_neurons_z_enc"]) != (0, 1)
    assert not torch.equal(run_module.measure_representation(sample, 20.0, (5, 20_000))[1], peaks)
    assert run_module.measure_representation(sample, 1e-3, (5, 10_000))[0]["dead_neurons"] == 1  # the threshold
    run.writer.flush()
    events = read_events(run.folder.path)
    histogram = events.pop("representation/kde_peak")
    of_layers = {tag: events.pop(tag)[0][1] for tag in list(events) if tag.startswith("layers/")}
    _, layers = run_module.measure_network(network, memory.sample)
    assert of_layers == pytest.approx(
        {f"layers/{layer}/{what}": value for layer, values in layers.items() for what, value in values.items()}
    )
    assert {tag.split("/")[1] for tag in of_layers} == {"conv1", "z", "z_enc"}
    assert {tag.removeprefix("representation/"): value for tag, [(_, value)] in events.items()} == pytest.approx(values)
    assert all(step == 10_000 for points in events.values() for step, _ in points)
    ((step, buckets),) = histogram
    assert (step, sum(buckets)) == (10_000, 8)
    memory.sample = None  # as long as there are too few
    run.measure(20_000, network, memory)
    run.writer.flush()
    assert {step for points in read_events(run.folder.path).values() for step, _ in points} == {10_000}


def test_games_that_end_side_by_side_are_logged_at_steps_of_their_own(tmp_path):
    run = begun(tmp_path)
    games = {"r": np.array([1.0, 2.0, 3.0]), "l": np.array([5, 6, 7])}
    run.log_games(100, {"episode": games, "_episode": np.array([1, 0, 1])})
    run.log_games(110, {"final_info": {"episode": {"r": np.array([4.0]), "l": np.array([8])}}})
    run.writer.flush()
    events = read_events(run.folder.path)
    assert events["charts/episodic_return"] == [(100, 1.0), (102, 3.0), (110, 4.0)]
    assert events["charts/episodic_length"] == [(100, 5.0), (102, 7.0), (110, 8.0)]
    assert list(run.returns) == [1.0, 3.0, 4.0]
