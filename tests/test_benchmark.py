"""benchmark/benchmark.py, replay_benchmark.py: arithmetic by hand, refusals, and small real measurements."""

import json
import sys

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "benchmark"))
import benchmark

BENCHMARK = "benchmark/benchmark.py"


def line(seconds, amounts):
    return benchmark.Timeline(list(seconds), list(amounts))


def test_the_speed_of_all_is_that_of_the_time_when_all_were_at_work():
    """Worked out by hand. Would catch: a run's start or end that the others do not share, a mean for the sum.

    Warm from second 10 (the first) and 14 (the second) on; the first ends at 30, the second at 34: seconds 14 to 30.
    The first does 100 steps in 10 seconds, the second 50.
    """
    steps = [line((0, 10, 20, 30), (0, 100, 200, 300)), line((4, 14, 24, 34), (50, 100, 150, 200))]
    cpu = [line((0, 40), (0, 20)), line((0, 40), (0, 40))]  # 0.5 and 1 CPU second a second
    found = benchmark.speeds_of_all(steps, cpu, warm_up=100)
    assert found["speed"] == pytest.approx(10 + 5)
    assert found["per_cpu_second"] == pytest.approx((160 + 80) / (8 + 16))


def test_runs_that_were_never_at_work_together_are_no_measurement():
    """Would catch: a negative or infinite speed in the record."""
    cpu = [line((0, 40), (0, 20))] * 2
    with pytest.raises(benchmark.RunFailed, match="not at work at the same time"):
        benchmark.speeds_of_all([line((0, 10), (0, 100)), line((20, 30), (0, 100))], cpu, warm_up=100)


def test_how_many_runs_fit_into_24_gb():
    """By hand: 0.7 + 1.5 GB, ten times; 0.7 + 28.2 GB, never. Would catch: bytes for GB, a memory left out."""
    found = benchmark.how_many_fit({"peak_gb": 0.7}, {"peak_gb": 0.7, "least_transition_bytes": 28_232})
    assert (found["dqn_gb"], found["dqn runs"]) == (2.2, 10)
    assert (found["sb3_dqn_gb"], found["sb3 dqn runs"]) == (28.93, 0)


def test_peak_memory_and_cpu_time_are_each_process_s_own(tmp_path):
    """Would catch: kilobytes for bytes, one process's peak given to all, the time of the starting process."""
    hold = "import time; x = bytearray(b'1') * 2_200_000_000; time.sleep(0.6)"
    spin = "import time; start = time.process_time()\nwhile time.process_time() < start + 1.5: pass"
    peaks, cpu, gpu = benchmark.run_all([["-c", hold], ["-c", spin]], tmp_path, 1, False, "test", cuda=False)
    assert 2.2 < peaks[0] < 2.3
    assert peaks[1] < 1.9  # the kernel counts what the process that starts it held before the program began
    assert cpu[1].amounts[-1] > 1.2
    assert gpu == 0


def test_workers_time_is_their_trainings(tmp_path):
    """Would catch: games in worker processes that seem to cost nothing."""
    spin = "import time\nwhile time.process_time() < 1.5: pass"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    _, (cpu,), _ = benchmark.run_all([["-c", start]], tmp_path, 1, False, "test", cuda=False)
    assert max(cpu.amounts) > 1.2


def test_games_are_played_where_stable_baselines3_plays_them():
    """Would catch: worker processes for one side alone; on a GPU a run that is not the default one."""
    args = benchmark.Args()
    for algorithm, cuda, expected in (("dqn", False, 0), ("ppo", False, 1), ("pqn", False, 1), ("ppo", True, 0)):
        args.cuda = cuda
        assert benchmark.our_flags(algorithm, args, 4, "runs").count("--no-async-envs") == expected


def test_where_one_run_fails_the_others_are_ended_and_its_last_word_is_said(tmp_path):
    """Would catch: a measurement of what is left, and processes that go on behind the user's back."""
    wait = f"import time; open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(5); open({str(tmp_path / 'ended')!r}, 'w')"
    fail = "import sys, time; time.sleep(1); sys.exit('error: no such thing')"
    with pytest.raises(benchmark.RunFailed, match=r"^two failed with exit code 1: error: no such thing$"):
        benchmark.run_all([["-c", wait], ["-c", fail]], tmp_path, 1, False, "two", cuda=False)
    assert (tmp_path / "begun").exists()
    assert not (tmp_path / "ended").exists()


def test_runs_at_once_have_a_core_each(tmp_path):
    """Would catch: two runs that share a core, and threads that spread over all."""
    show = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])"
    cores = sorted(benchmark.os.sched_getaffinity(0))
    n = min(2, len(cores))
    benchmark.run_all([["-c", show]] * n, tmp_path, 1, True, "test", cuda=False)
    assert [(tmp_path / f"{i}.out").read_text() for i in range(n)] == [f"[{core}] 1\n" for core in cores[:n]]


def test_gpu_memory_is_what_all_cards_and_processes_say(tmp_path, monkeypatch):
    """With a stand-in for nvidia-smi. Would catch: MB for MiB, the first card alone, another card than the visible."""
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\necho 1000\necho 500\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert benchmark.card_memory() == pytest.approx(1.572864)
    assert "--id=2,3" in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(("cuda", "expected"), [(False, 10), (True, 16)])
def test_contenders(cuda, expected):
    """Would catch: a contender without its rival, --amp and --compile alone left out where there is a GPU."""
    args = benchmark.Args()
    args.cuda = cuda
    names = list(benchmark.contenders(args))
    assert len(names) == expected
    assert all(benchmark.rival_of(name, args) in names for name in names)
    assert ("dqn --amp" in names) == ("ppo --compile" in names) == cuda
    args.against, args.algorithms = ROOT, ("ppo",)
    names = list(benchmark.contenders(args))
    assert names[:2] == ["before ppo", "ppo"]
    assert {benchmark.rival_of(name, args) for name in names} == {"before ppo"}


def test_pqn_stands_beside_ppo():
    """stable-baselines3 has no PQN. Would catch: a rival that is not measured, which ends the benchmark at its end."""
    args = benchmark.Args(algorithms=("pqn",))
    assert list(benchmark.contenders(args)) == ["ppo", "pqn", "pqn --amp --compile"]
    assert {benchmark.rival_of(name, args) for name in benchmark.contenders(args)} == {"ppo"}
    args = benchmark.Args(algorithms=("dqn", "pqn"), quick=True)
    assert {name: benchmark.rival_of(name, args) for name in benchmark.contenders(args)} == {
        "sb3 dqn": "sb3 dqn", "dqn": "sb3 dqn", "ppo": "ppo", "pqn": "ppo",
    }  # fmt: skip
    args.against = ROOT
    assert {name: benchmark.rival_of(name, args) for name in benchmark.contenders(args)} == {
        "before dqn": "before dqn", "dqn": "before dqn", "pqn": "before pqn", "before pqn": "before pqn",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--at-once 0", "--at-once 0: each run has a core of its own; it must lie in 1 to "),
        ("--at-once 1 1000", "--at-once 1000: each run has a core of its own; it must lie in 1 to "),
        ("--rounds 0", "--rounds is 0; it must be positive"),
        ("--num-threads 0", "--num-threads is 0; it must lie in 1 to "),
        ("--env-id Breakout-v5", "Breakout-v5 skips frames or repeats actions by itself; use --env-id Breakout"),
        ("--against tests", "is not a checkout of this project"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(flags, expected):
    """Would catch: hours of measurements before the refusal, a traceback."""
    done = run_script(BENCHMARK, *flags.split())
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.slow
def test_replay_benchmark_refuses_less_than_a_minibatch():
    done = run_script("benchmark/replay_benchmark.py", "--steps", "31")
    assert done.returncode == 2
    assert done.stderr == "error: --steps is 31; it must lie in 32, a minibatch, to 1,000,000\n"


def test_a_damaged_record_is_not_written_over(monkeypatch, tmp_path):
    """Would catch: other machines' numbers lost with it, after the hours that the measurement took."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "benchmark.json").write_text("[1, 2]")
    (tmp_path / "dqn_atari_lan.py").touch()
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    with pytest.raises(benchmark.BadInput, match="is damaged"):
        benchmark.check(benchmark.Args(num_threads=1))


@pytest.mark.slow
def test_a_small_measurement_of_both_sides(monkeypatch):
    """Would catch: a rival that is not trained alike any more, a script's flag or TensorBoard tag that is gone."""
    monkeypatch.setattr(benchmark, "WARM_UP", {"dqn": 1000})
    args, measured = benchmark.Args(num_threads=1, quick=True, algorithms=("dqn",)), {}
    for name, steps in (("sb3 dqn", 200), ("dqn", 1000)):  # ours has a point every 1,000 steps, theirs at each
        monkeypatch.setattr(benchmark, "TIMED", {"dqn": steps})
        measured[name] = benchmark.measure(name, args)
    assert measured.keys() == benchmark.contenders(args).keys()
    for found in measured.values():
        assert 1 < found["speed"] < 100_000
        assert found["per_cpu_second"] >= 0.9 * found["speed"]  # on one core
        assert 0.3 < found["peak_gb"] < 2
    theirs = measured["sb3 dqn"]
    assert theirs["least_transition_bytes"] == 4 * 84 * 84 + 8 + 4 + 4 + 4  # picture, action, reward, ends
    assert theirs["transition_bytes"] == theirs["least_transition_bytes"] + 4 * 84 * 84


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dqn", "pqn"])
def test_a_small_breakdown(algorithm):
    """Would catch: a function that the breakdown times and the scripts do not call any more."""
    code = f"import sys; sys.path.insert(0, 'benchmark'); import benchmark as b; b.WARM_UP = {{'{algorithm}': 256}}; "
    code += f"b.TIMED = {{'{algorithm}': 800}}; from lan_utils import run; run.LOG_FREQUENCY = 256; "
    flags = ["--metrics-samples", "512"]
    if algorithm == "dqn":
        flags += ["--learning-starts", "200", "--train-frequency", "8"]
    else:
        flags += ["--num-envs", "8", "--num-steps", "32", "--num-minibatches", "8"]
    code += f"b.breakdown('{algorithm}', 'BreakoutNoFrameskip-v4', 1, {flags})"
    done = run_script("-c", code)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = {"environment", "acting", "update: forward", "update: backward", "update: optimizer"}
    expected |= {"logging", "metrics", "checkpoints", "the rest"}
    expected |= {
        "dqn": {"replay: add", "replay: sample"},
        "pqn": {"returns", "update: clipping"},
    }[algorithm]
    assert found["parts"].keys() == expected
    assert sum(found["parts"].values()) == pytest.approx(found["ms per agent step"], rel=0.01)
    assert all(milliseconds > 0 for milliseconds in found["parts"].values())
