"""checks.py: what is refused before anything is written."""

import importlib
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import get_args, get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Interval
from conftest import ROOT, SCRIPTS, launch_in_process

import dqn_atari_lan as dqn
import ppo_atari_lan as ppo
import pqn_atari_lan as pqn
from lan_utils import checks
from lan_utils.cli import BadInput
from lan_utils.study import transition_bytes

sys.path.insert(0, str(ROOT / "scripts"))
from status import parse_job

BAD_INPUT = {
    "unknown game": (
        "--env-id BrekoutNoFrameskip-v4",
        "unknown game 'BrekoutNoFrameskip-v4'; did you mean Breakout",
    ),
    "no game at all": ("--env-id x", "unknown game 'x'; --env-id takes <Game>NoFrameskip-v4"),
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
    "read-only folder": ("--runs-dir /proc/runs", "cannot use /proc/runs/BreakoutNoFrameskip-v4__"),
}
BAD_ROLLOUT_INPUT = {
    "no environments": ("--num-envs 0", "--num-envs is 0; it must be positive"),
    "minibatches": (
        "--num-envs 3 --num-steps 5 --num-minibatches 4",
        "--num-minibatches is 4; it must divide --num-envs 3 times --num-steps 5 = 15",
    ),
    "less than a rollout": (
        "--num-envs 8 --num-steps 128 --total-timesteps 1023",
        "--total-timesteps is 1023; it must be at least --num-envs 8",
    ),
    "memory": (
        "--num-envs 8 --num-steps 1000000 --total-timesteps 8000000 --num-minibatches 4",
        "lower --num-envs 8, --num-steps 1000000 or --metrics-samples 2048",
    ),
    "ale's seeds": (
        "--env-backend ale --num-envs 8 --checkpoint-frequency 0 --seed 2147483640",
        "--seed is 2147483640; it must be below 2**31 - 8 for --env-backend ale",
    ),
    "checkpoints of ale": ("--env-backend ale", "a run cannot resume; accept that with --checkpoint-frequency 0"),
}
BAD_PPO_INPUT = BAD_ROLLOUT_INPUT | {
    "single transitions": ("--num-envs 2 --num-steps 2", "it must be below --num-envs 2 times --num-steps 2 = 4"),
    "lambda": ("--gae-lambda -0.1", "--gae-lambda is -0.1; it must lie in [0, 1]"),
    "target": ("--target-kl 0", "--target-kl is 0.0; it must be positive, or None"),
}
BAD_PQN_INPUT = BAD_ROLLOUT_INPUT | {
    "lambda": ("--q-lambda 1.1", "--q-lambda is 1.1; it must lie in [0, 1]"),
    "exploration": ("--start-e -1", "--start-e is -1.0; it must lie in [0, 1]"),
    "too many games": ("--num-envs 1000000 --num-steps 8", "lower --num-envs 1000000, --num-steps 8 or --metrics"),
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
BAD_INPUT_OF = {"dqn": BAD_DQN_INPUT, "ppo": BAD_PPO_INPUT, "pqn": BAD_PQN_INPUT}
ALL_BAD_INPUT = [
    pytest.param(script, *case, id=f"{script[:3]}-{name}")
    for script in SCRIPTS
    for name, case in (BAD_INPUT | BAD_INPUT_OF.get(script.removesuffix("_atari_lan.py"), {})).items()
]


@pytest.mark.parametrize(("script", "flags", "message"), ALL_BAD_INPUT)
def test_bad_input_is_one_line_exit_code_2_and_nothing_written(monkeypatch, capsys, tmp_path, script, flags, message):
    runs_dir = tmp_path / "runs"
    before = sorted(tmp_path.iterdir())
    arguments = ["--runs-dir", str(runs_dir), *flags.split()]
    if script.startswith("pqn") and "/proc" in flags:  # is refused last, and making 128 games takes half a minute
        arguments += ["--num-envs", "4"]
    code, stderr = launch_in_process(monkeypatch, capsys, script, arguments)
    assert code == 2
    assert stderr.startswith("error: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def ranges(script):
    """{flag: its limits} of a script's numbers; [] of one without any."""
    found = {}
    for name, hint in get_type_hints(
        importlib.import_module(script.removesuffix(".py")).Args, include_extras=True
    ).items():
        options = [hint, *get_args(hint)]
        if {int, float} & {getattr(option, "__origin__", option) for option in options}:
            found[name] = [limit for option in options for limit in getattr(option, "__metadata__", ())]
    return found


# What they must be depends on other flags: the scripts' `check_relations` say it.
WITHOUT_A_RANGE = {"learning_starts", "metrics_samples"}


def test_every_number_has_a_range():
    """Would catch: a new flag that takes -1, days before it fails."""
    found = {name for script in SCRIPTS for name, limits in ranges(script).items() if not limits}
    assert found == WITHOUT_A_RANGE
    assert all(len(limits) <= 1 for script in SCRIPTS for limits in ranges(script).values())
    assert len({name for script in SCRIPTS for name in ranges(script)}) >= 25


def outside(limit):
    match limit:
        case Interval(gt=None, ge=low, lt=None, le=high):
            return low - 0.5, high + 0.5
        case Gt(gt=bound):
            return bound, bound - 1
        case Ge(ge=bound):
            return (bound - 1,)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_out_of_its_range_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, script):
    """Every flag's own. Would catch: a kind of annotation that `check_ranges` passes over, such as `... | None`."""
    for name, limits in ranges(script).items():
        for value in [value for limit in limits for value in outside(limit)]:
            flag = f"--{name.replace('_', '-')}"
            code, stderr = launch_in_process(
                monkeypatch, capsys, script, [flag, value, "--runs-dir", tmp_path / "runs"]
            )
            assert code == 2, flag
            assert stderr.startswith(f"error: {flag} is {value}"), stderr
            assert "; it must " in stderr
            assert stderr.count("\n") == 1
            assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"activation": "rleu"}, "--activation is rleu; it must be one of relu, tanh, "),
        ({"conv_activation": "wide-1024"}, "--conv-activation is wide-1024; it must be one of relu, "),
        ({"env_backend": "ALE"}, "--env-backend is ALE; it must be one of gymnasium, ale"),
        ({"runs_dir": Path("runs")}, "--runs-dir is runs; it must be text"),
        ({"env_id": None}, "--env-id is None; it must be text"),
        ({"seed": 1.0}, "--seed is 1.0; it must be a whole number"),
        ({"seed": np.int64(3)}, "--seed is 3; it must be a whole number, of type int and not int64"),
        ({"num_envs": "8"}, "--num-envs is 8; it must be a whole number"),
        ({"gamma": "0.9"}, "--gamma is 0.9; it must be a number"),
        ({"target_kl": "0.1"}, "--target-kl is 0.1; it must be a number"),
        ({"total_timesteps": True}, "--total-timesteps is True; it must be a whole number"),
        ({"anneal_lr": "False"}, "--anneal-lr is False; it must be True or False"),
    ],
)
def test_flags_of_a_call_from_python_have_their_types(tmp_path, flags, message):
    """In a notebook nothing reads them from text. Would catch: a KeyError; "ALE" that silently trains gymnasium's
    games; a run that fails hours later."""
    with pytest.raises(BadInput) as refused:
        ppo.main(ppo.Args(**{"runs_dir": str(tmp_path)} | flags))
    assert str(refused.value).startswith(message)
    assert list(tmp_path.iterdir()) == []
    checks.check_flags(ppo.Args(runs_dir=str(tmp_path), gamma=1, dead_threshold=20, target_kl=None))


def test_a_width_that_plots_cannot_tell_is_refused(monkeypatch, tmp_path):
    """Would catch: a rank share that is twice too large; a rank above the axis of a plot; a number in a name that
    plots take for a width."""
    for name, width, advice in (
        ("my-wide", 1024, "end the"),
        ("tanh-1000", 512, "end the"),
        ("tanh-64", 64, "give it"),
    ):
        monkeypatch.setitem(ppo.REPRESENTATIONS, name, ppo.Recipe((torch.nn.Tanh,), width=width, outputs=width))
        with pytest.raises(BadInput, match=rf"^z of {name} has {width} neurons, .* for \d+; {advice}"):
            ppo.check_relations(ppo.Args(activation=name))
    for name, recipe in ppo.REPRESENTATIONS.items():
        if name not in ("my-wide", "tanh-1000", "tanh-64"):
            checks.check_width(ppo.Args(activation=name), recipe.width)


class FakeWandb(types.ModuleType):
    """Weights & Biases with and without a login; names are refused as by its release 0.31."""

    def __init__(self, logged_in=None, error=None):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace(name="wandb")  # what importlib.util.find_spec asks for
        self.logged_in, self.error, self.logins = logged_in, error, []

    def Settings(self, run_id, project, entity):
        if set(run_id) & set(":;,#?/'"):
            raise RuntimeError("Run ID cannot contain the characters: :;,#?/'")
        if set(project) & set("/\\#?%:"):
            raise RuntimeError(f"Invalid project name {project!r}: cannot contain characters")

    def login(self, prompt=True):
        self.logins.append(prompt)
        if self.error:
            raise self.error
        return self.logged_in


@pytest.mark.parametrize("script", SCRIPTS)
def test_tracking_without_a_login_is_refused_before_anything_is_written(monkeypatch, capsys, tmp_path, script):
    """Would catch: a prompt that nobody answers, wandb's traceback in a folder that was begun."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for fake, message in (
        (FakeWandb(logged_in=False), "nobody is logged in to Weights & Biases; wandb login, or WANDB_MODE=offline"),
        (FakeWandb(error=TypeError("unexpected argument\nprompt")), "Weights & Biases says: unexpected argument"),
        (FakeWandb(error=ValueError()), "Weights & Biases says: "),
    ):
        monkeypatch.setitem(sys.modules, "wandb", fake)
        code, stderr = launch_in_process(monkeypatch, capsys, script, ["--track", "--runs-dir", tmp_path / "runs"])
        assert (code, stderr) == (2, f"error: --track: {message}\n")
        assert fake.logins == [False]
        assert list(tmp_path.iterdir()) == []


def test_tracking_with_a_login_or_offline_is_not_refused(monkeypatch):
    fake = FakeWandb(logged_in=True)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    checks.check_wandb("a run", "a project", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    fake.logged_in = False
    checks.check_wandb("a run", "a project", None)
    assert fake.logins == [False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--exp-name", "lr:1e-4"), "Weights & Biases says: Run ID cannot contain the characters: :;,#?/'"),
        (("--wandb-project-name", "a/b"), "Weights & Biases says: Invalid project name 'a/b': cannot contain"),
        (("--exp-name", "x" * 200), "is too long a name for Weights & Biases (227 bytes); shorten --exp-name"),
    ],
)
def test_names_that_weights_and_biases_refuses(monkeypatch, capsys, tmp_path, flags, message):
    """Would catch: its traceback in a folder that was begun; a name that no folder of its own can have."""
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(logged_in=True))
    arguments = ["--track", "--runs-dir", tmp_path / "runs", *flags]
    code, stderr = launch_in_process(monkeypatch, capsys, SCRIPTS[0], arguments)
    assert (code, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("error: --track: ")
    assert message in stderr
    assert list(tmp_path.iterdir()) == []


BROKEN_FFMPEGS = {
    "exits with 127": "exit 127",
    "has a version only": "echo ffmpeg version 7.0; exit 1",
    "writes nothing": "cat > /dev/null",
    "has encoders that do not encode": """case "$*" in *film.mp4) cat > /dev/null; exit 0; esac; exec "$REAL" "$@" """,
    "leaves an empty film": 'cat > /dev/null; for film; do :; done; case "$film" in *.mp4) : > "$film"; esac',
}


@pytest.mark.parametrize("content", [None, *BROKEN_FFMPEGS.values()], ids=["is missing", *BROKEN_FFMPEGS])
def test_an_ffmpeg_that_cannot_film_is_refused(monkeypatch, tmp_path, content):
    """Would catch: a run that trains for a week and cannot film, or a traceback instead of one line."""
    program = tmp_path / "ffmpeg"
    if content:
        program.write_text(f"#!/bin/sh\n{content}\n")
        program.chmod(0o755)
    monkeypatch.setenv("REAL", checks.imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(
        BadInput, match=r"^--capture-video needs a working ffmpeg, and this one cannot encode a film: "
    ) as error:
        checks.check_ffmpeg("--capture-video")
    assert str(program) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_working_ffmpeg_is_not_refused(tmp_path, monkeypatch):
    """Would catch: a check that no ffmpeg passes, or one that leaves its film behind."""
    monkeypatch.setattr(checks.tempfile, "tempdir", str(tmp_path))
    checks.check_ffmpeg("--capture-video")
    assert list(tmp_path.iterdir()) == []


def test_the_address_space_is_a_limit_of_memory_too():
    """As `ulimit -v` or a batch system sets it. Would catch: a run that begins and then runs out of memory."""
    program = "from lan_utils import checks; print(checks.free_memory())"
    limited = f"ulimit -v 12000000; exec {sys.executable} -c '{program}'"
    done = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True)
    assert 0 < int(done.stdout) < 12_000_000 * 1024


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_memory_that_is_asked_for_counts_the_batch(no_gpu):
    """Measured: --batch-size 6000 takes 2.3 GB. Would catch: a header that says 0.8."""
    small = dqn.Args(buffer_size=6000, total_timesteps=6000, batch_size=32)
    large = dqn.Args(buffer_size=6000, total_timesteps=6000, batch_size=6000)
    assert 0.8e9 < dqn.memory_needed(small) < 0.9e9
    assert 2.3e9 < dqn.memory_needed(large) < 3e9
    assert 2.2e9 < dqn.memory_needed(dqn.Args()) < 2.5e9  # the paper's replay memory
    assert dqn.memory_needed(dqn.Args(env_id="UpNDownNoFrameskip-v4")) > 0.8e9 + 1.2 * 2157e6
    rollout = ppo.Args(num_envs=8, num_steps=750, num_minibatches=1)
    assert ppo.memory_needed(rollout) - ppo.memory_needed(ppo.Args(num_envs=8, num_steps=750)) > 1.3e9


def test_memory_that_pqn_asks_for_counts_its_games_and_its_minibatches(no_gpu):
    """Measured: 1.28 GB of a default run with all games in its process, 1.9 MB a game, 0.47 MB for an observation of a
    minibatch, and 1.2 MB with convolutions of three factors. Would catch: PPO's 150 MB for each of 128 games."""
    args = pqn.Args(async_envs=False)
    assert 1.3e9 < pqn.memory_needed(args) < 2e9
    assert pqn.memory_needed(pqn.Args(async_envs=False, num_envs=1280, num_minibatches=320)) > 2.4e9 + 1e9
    whole = pqn.Args(async_envs=False, num_minibatches=1)
    assert pqn.memory_needed(whole) - pqn.memory_needed(args) > 0.47e6 * (4096 - 128)
    whole.conv_activation = "tanh-2xlan"
    assert pqn.memory_needed(whole) - pqn.memory_needed(args) > 1.2e6 * (4096 - 128)


def test_pqn_is_refused_in_time_where_its_memory_is_not_free(monkeypatch):
    """Would catch: a run that is ended by the kernel after its first update."""
    monkeypatch.setattr(checks, "free_memory", lambda: 1_500_000_000)
    with pytest.raises(BadInput, match=r"^not enough memory: .* GB needed, 1\.5 GB free; lower --num-envs 128, "):
        pqn.check_relations(pqn.Args(async_envs=False))


def test_every_game_is_granted_a_fifth_more_than_random_play_took():
    """Would catch: a game that needs more memory than is announced; one that is new and was not measured."""
    rows = (ROOT / "results" / "replay_benchmark_every.txt").read_text().splitlines()[2:]
    measured = {row.split()[0]: max(map(int, row.split()[1:])) for row in rows}
    assert measured.keys() == {name[:-14] for name in gym.registry if name.endswith("NoFrameskip-v4")}
    for game, largest in measured.items():
        assert transition_bytes(f"{game}NoFrameskip-v4") >= int(1.2 * largest), game
        assert (largest > 1250) == (transition_bytes(f"{game}NoFrameskip-v4") > 1500), game


@pytest.mark.parametrize("module", [dqn, ppo, pqn], ids=lambda module: module.__name__)
def test_a_run_on_a_gpu_announces_what_cuda_adds_and_a_sweep_counts_on_it(module, monkeypatch):
    """Measured: 2.0 GB and more where the CPU's run takes 0.7. Would catch: a run that is killed for its memory."""
    for there_is_one in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there_is_one=there_is_one: there_is_one)
        added = module.memory_needed(module.Args()) - module.memory_needed(module.Args(cuda=False))
        sweep = re.search(r"^RUN_CUDA_RAM=(\d+)", (ROOT / "scripts" / "sweep.sh").read_text(), re.M)
        assert added == there_is_one * int(sweep[1]) * 1_000_000


def test_a_sweep_counts_on_what_the_run_announces(no_gpu):
    """Would catch: defaults of the script and of the sweep that drift apart."""
    for flags in ({}, {"env_id": "UpNDownNoFrameskip-v4"}, {"buffer_size": 5000, "batch_size": 320}):
        words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in flags.items())
        job = parse_job(1, f"python dqn_atari_lan.py {words}")
        assert job.ram == dqn.memory_needed(dqn.Args(**flags)) // 1_000_000
    assert parse_job(1, "python ppo_atari_lan.py").ram >= ppo.memory_needed(ppo.Args()) // 1_000_000
    assert parse_job(1, "python pqn_atari_lan.py").ram >= pqn.memory_needed(pqn.Args(async_envs=False)) // 1_000_000


def test_memory_beyond_what_is_free_is_refused(monkeypatch):
    monkeypatch.setattr(checks, "free_memory", lambda: 3_000_000_000)
    checks.check_memory(3_000_000_000, "lower x")
    with pytest.raises(BadInput, match=r"^not enough memory: 3\.1 GB needed, 3\.0 GB free; lower x$"):
        checks.check_memory(3_100_000_000, "lower x")
