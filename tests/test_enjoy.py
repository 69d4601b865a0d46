"""scripts/enjoy.py: the training's own games again, of every kind of run, and what is refused."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, contents, read_events, run_script

import metrics
from lan_utils.checkpoint import Checkpoints
from lan_utils.cli import BadInput

sys.path.insert(0, str(ROOT / "scripts"))
import enjoy

# Space Invaders: a barely trained agent scores too, each game something else.
GAMES = 2
FLAGS = {
    "dqn": ("--total-timesteps", 300, "--learning-starts", 100, "--buffer-size", 300),
    "ppo": ("--total-timesteps", 256, "--num-envs", 2, "--num-steps", 64, "--no-async-envs"),
    "pqn": ("--total-timesteps", 256, "--num-envs", 2, "--num-steps", 64, "--no-async-envs", "--layer-norm", "map"),
}


def train(algorithm, runs_dir, *flags):
    command = [f"{algorithm}_atari_lan.py", "--env-id", "SpaceInvadersNoFrameskip-v4", "--runs-dir", runs_dir]
    finished = run_script(*command, "--num-threads", 1, "--metrics-frequency", 0, *FLAGS[algorithm], *flags)
    assert finished.returncode == 0, finished.stderr
    return next(runs_dir.iterdir())


@pytest.fixture(params=["dqn", "ppo", "pqn"])
def finished(request, once, tmp_path):
    """A copy of a finished run that has played two games in the end."""
    trained = once(f"enjoy_{request.param}", lambda folder: train(request.param, folder, "--eval-episodes", GAMES))
    return shutil.copytree(next(trained.iterdir()), tmp_path / "run")


@pytest.fixture
def ppo_run(once, tmp_path):
    trained = once("enjoy_ppo", lambda folder: train("ppo", folder, "--eval-episodes", GAMES))
    return shutil.copytree(next(trained.iterdir()), tmp_path / "run")


def unfinish(folder, step=128, name="network"):
    """Make a finished run an unfinished one with the same weights in its newest checkpoint."""
    weights = torch.load(folder / "model.pt", weights_only=True)
    (folder / "model.pt").unlink()
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"state": "running", "step": step}))
    checkpoints = Checkpoints(folder / "checkpoints")
    for saved, scale in ((step // 2, 0), (step, 1)):  # the older one's weights are all 0
        things = {name: {key: scale * weight for key, weight in weights.items()}, "optimizer": {}}
        checkpoints.save(saved, {"step": saved, "things": things})


class SeesFew(enjoy.Sample):
    """Has seen a hundredth of what it was shown."""

    seen = property(lambda self: self.count // 100, lambda self, count: setattr(self, "count", count))


def play(folder, **flags):
    enjoy.main(enjoy.Args(folder=folder, **{"episodes": GAMES} | flags))


def scores_in(output):
    return [float(line.split()[2]) for line in output.splitlines() if line.startswith("  game ")]


@pytest.mark.slow
def test_the_games_are_those_of_the_trainings_own_evaluation(finished, capsys):
    """Would catch: another seed, exploration, preprocessing or memory layout than in training; a game lost or clipped;
    a mean over something else; a changed run folder."""
    before = contents(finished)
    expected = [score for _, score in read_events(finished)["eval/episodic_return"]]
    assert len(set(expected)) > 1
    play(finished)
    output = capsys.readouterr().out
    assert scores_in(output) == expected
    lines = dict(line.split()[:2] for line in output.splitlines() if line.startswith("  "))
    assert float(lines["mean"]) == pytest.approx(np.mean(expected), abs=0.005)
    assert float(lines["deviation"]) == pytest.approx(np.std(expected, ddof=1), abs=0.005)
    assert (float(lines["random"]), float(lines["human"])) == (148.0, 1668.7)  # Wang et al. (2016)
    assert contents(finished) == before

    play(finished, seed=7)
    assert scores_in(capsys.readouterr().out) != expected


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["dqn"], indirect=True)
def test_of_an_unfinished_run_the_newest_whole_checkpoint_plays(finished, capsys):
    """Would catch: the oldest checkpoint, or none; a replay memory that is read, or missed, for nothing; a truncated
    checkpoint that ends it."""
    expected = [score for _, score in read_events(finished)["eval/episodic_return"]]
    unfinish(finished)
    newest = finished / "checkpoints" / "0000000128.ckpt"
    before = contents(finished)
    play(finished)
    output = capsys.readouterr().out
    assert scores_in(output) == expected
    assert "128 agent steps, not finished yet" in output
    assert contents(finished) == before

    newest.write_bytes(newest.read_bytes()[:-1])
    play(finished, episodes=1)
    output, errors = capsys.readouterr()
    assert "64 agent steps" in output
    assert f"{newest} is truncated or corrupt" in errors
    newest.with_name("0000000064.ckpt").unlink()
    with pytest.raises(BadInput, match="none of its 1 checkpoints is whole"):
        play(finished)


@pytest.mark.slow
def test_the_weights_of_a_step_play_and_are_measured(ppo_run, capsys):
    """Would catch: the newest weights in place of those asked for, a step that is not there."""
    weights = torch.load(ppo_run / "model.pt", weights_only=True)
    torch.save({name: 0 * weight for name, weight in weights.items()}, ppo_run / "weights_64.pt")
    play(ppo_run, episodes=3, step=64, measure=True)
    output = capsys.readouterr().out
    assert f"weights   {ppo_run / 'weights_64.pt'}" in output
    assert "trained   64 agent steps, kept along the way" in output
    (line,) = [line for line in output.splitlines() if line.startswith("  conv3 ")]
    assert line.split()[1:] == ["100.0%", "100.0%", "100.0%"]  # constant, zero, dormant
    with pytest.raises(BadInput, match=r"--step 65: .* has no weights of this agent step; kept are 64$"):
        play(ppo_run, step=65)
    # As a run with --env-backend ale, which has no checkpoints. Would catch: advice to stop it, which loses everything.
    (ppo_run / "model.pt").rename(ppo_run / "weights_9.pt")
    play(ppo_run, episodes=1)
    assert "trained   64 agent steps, kept along the way" in capsys.readouterr().out


@pytest.mark.slow
def test_another_script_than_trained_the_run_is_named(ppo_run, capsys):
    """Would catch: an ablation's weights that are played, and measured, by the encoder of today, without a word."""
    file = ppo_run / "config.json"
    config = json.loads(file.read_text())
    warning = "warning: ppo_atari_lan.py is not the script that trained this run, or has changed since"
    for code, warns in (
        (config["code"], False),
        (config["code"] | {"lan_utils": "0123"}, False),
        (config["code"] | {"ppo_atari_lan.py": "0123"}, True),
        ({"my_ablation.py": config["code"]["ppo_atari_lan.py"]}, True),
    ):
        file.write_text(json.dumps(config | {"code": code}))
        play(ppo_run, episodes=1)
        assert (warning in capsys.readouterr().err) == warns
    del config["code"]  # of an older run
    file.write_text(json.dumps(config | {"resumes": None}))  # damaged
    play(ppo_run, episodes=1)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_films_and_measurements_go_into_a_new_folder(ppo_run, capsys, monkeypatch):
    """Would catch: the run's own activations or films overwritten; numbers that are not those of the file; a film of
    nothing; a folder left behind though nothing was written."""
    before = contents(ppo_run)
    play(ppo_run, measure=True, video=True)
    output = capsys.readouterr().out
    play(ppo_run, measure=True)
    made = contents(ppo_run)
    assert {path: content for path, content in made.items() if path in before} == before
    names = {"activations.npz", *(f"game_{game}.mp4" for game in range(GAMES))}
    assert {path.name for path in (ppo_run / "enjoy_1").iterdir()} == names
    assert {path.name for path in (ppo_run / "enjoy_2").iterdir()} == {"activations.npz"}
    assert all((ppo_run / "enjoy_1" / f"game_{game}.mp4").stat().st_size > 10_000 for game in range(GAMES))
    assert f"written to {ppo_run / 'enjoy_1'}" in output

    with np.load(ppo_run / "enjoy_1" / "activations.npz") as arrays:
        sample = {name: torch.from_numpy(arrays[name]) for name in arrays}
    assert sample.keys() == {"z", "z_enc", "z_star"}
    assert torch.allclose(sample["z"], sample["z_enc"] * sample["z_star"], atol=1e-6)
    assert f"on {len(sample['z']):,} observations" in output
    assert f"  effective_rank {metrics.effective_rank(sample['z']):16.1f}" in output

    monkeypatch.setattr(enjoy, "Sample", SeesFew)
    with pytest.raises(BadInput, match=r"--episodes 1: \d+ observations are too few to measure 512 neurons"):
        play(ppo_run, episodes=1, measure=True)
    assert not (ppo_run / "enjoy_3").exists()


def test_the_sample_is_uniform():
    """Would catch: the first or the last observations instead of a sample of all; more than asked for; a sample that
    the next observation changes in place."""
    network = torch.nn.Identity()
    counts = np.zeros(20)
    for seed in range(400):
        sample = enjoy.Sample(network, 5, seed)
        shown = torch.zeros(1, 1)
        for i in range(20):
            network(shown.fill_(i))
        sample.hook.remove()
        assert len(sample.observations) == 5
        for observation in sample.observations:
            counts[int(observation)] += 1
    assert counts.sum() == 2000
    assert (np.abs(counts - 100) < 45).all()  # five standard deviations


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    args = {key: value for key, value in changes.items() if key != "algorithm"}
    file.write_text(json.dumps(config | {"args": config["args"] | args, "algorithm": changes.get("algorithm", "ppo")}))


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BAD = {
    "no folder": (shutil.rmtree, "{folder} does not exist"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "{folder} is not a run's folder"),
    "half a config": (lambda folder: truncate(folder / "config.json"), "{folder}/config.json is damaged"),
    "a config of something else": (lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged"),
    "half a model": (lambda folder: truncate(folder / "model.pt"), "{folder}/model.pt is damaged"),
    "an empty model": (lambda folder: (folder / "model.pt").write_bytes(b""), "{folder}/model.pt is damaged"),
    "a model of something else": (
        lambda folder: torch.save([1], folder / "model.pt"),
        "{folder}/model.pt does not fit",
    ),
    "another activation's model": (lambda folder: edit_config(folder, activation="relu"), "model.pt does not fit"),
    "unknown activation": (lambda folder: edit_config(folder, activation="swish"), "no activation 'swish'"),
    "unknown algorithm": (lambda folder: edit_config(folder, algorithm="sac"), "there is no sac_atari_lan.py"),
    "an algorithm elsewhere": (lambda folder: edit_config(folder, algorithm="../evil"), "unknown algorithm '../evil'"),
    "unknown game": (lambda folder: edit_config(folder, env_id="BreakotNoFrameskip-v4"), "did you mean Breakout"),
    "nothing saved": (lambda folder: (folder / "model.pt").unlink(), "{folder}: nothing is saved yet"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_in_one_line_and_nothing_is_written(ppo_run, capsys, case):
    """Would catch: a traceback, or an error that does not name what is wrong; an enjoy folder left behind."""
    spoil, message = BAD[case]
    spoil(ppo_run)
    before = contents(ppo_run) if ppo_run.exists() else None
    with pytest.raises(BadInput) as refused:
        play(ppo_run, video=True)
    assert message.format(folder=ppo_run) in str(refused.value)
    assert str(ppo_run) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (contents(ppo_run) if ppo_run.exists() else None) == before
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_weights_that_are_not_finite_are_refused(ppo_run):
    """Would catch: games of a network of NaN."""
    weights = torch.load(ppo_run / "model.pt", weights_only=True)
    weights["actor.bias"][0] = torch.nan
    torch.save(weights, ppo_run / "model.pt")
    with pytest.raises(BadInput, match="NaN or infinite"):
        play(ppo_run)


@pytest.mark.slow
def test_executable_content_is_not_run(ppo_run, tmp_path):
    """Would catch: weights_only forgotten."""

    class Evil:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'evil')!r}, 'w')",))

    torch.save(Evil(), ppo_run / "model.pt")
    with pytest.raises(BadInput, match="damaged"):
        play(ppo_run)
    assert not (tmp_path / "evil").exists()


@pytest.fixture
def without_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDL_VIDEODRIVER", "")  # what enjoy.py sets is taken back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DISPLAY", ""),
        ("DISPLAY", "localhost:10.0"),  # a forwarded one whose ssh has gone
        ("DISPLAY", "nonsense"),
        ("WAYLAND_DISPLAY", "wayland-none"),
        ("SDL_VIDEODRIVER", "dummy"),
        ("SDL_VIDEODRIVER", "Offscreen"),
        ("SDL_VIDEODRIVER", "nonsense"),
    ],
)
def test_watching_without_a_window_is_refused_before_anything_plays(ppo_run, monkeypatch, without_display, name, value):
    """Would catch: games played to their end where nobody sees them, exit code 0."""
    monkeypatch.setenv(name, value)
    before = contents(ppo_run)
    done = run_script("scripts/enjoy.py", ppo_run, "--watch", "--measure")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: --watch")
    assert f"{name}={value.lower()}" in done.stderr or (value == "" and "DISPLAY is not set" in done.stderr)
    assert "--video" in done.stderr
    assert contents(ppo_run) == before


def test_a_display_that_never_answers_is_refused_too(monkeypatch, without_display):
    """Would catch: waiting for ever, deaf to Ctrl-C."""
    monkeypatch.setattr(enjoy, "WINDOW_SECONDS", 8)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        display = silent.getsockname()[1] - 6000
        monkeypatch.setenv("DISPLAY", f"127.0.0.1:{display}")
        with pytest.raises(BadInput, match=rf"^--watch cannot open a window \(DISPLAY=127\.0\.0\.1:{display}\)"):
            enjoy.check_window()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("Xvfb"), reason="needs Xvfb, a display in memory (apt install xvfb)")
def test_the_games_are_shown_where_a_display_answers(ppo_run, tmp_path, monkeypatch, without_display):
    """Would catch: a window refused on a real display, or one that shows nothing."""
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", "1", "-screen", "0", "640x480x24", "-fbdir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        monkeypatch.setenv("DISPLAY", f":{server.stdout.readline().strip()}")
        screen = tmp_path / "Xvfb_screen0"
        blank = screen.read_bytes()
        command = [sys.executable, ROOT / "scripts" / "enjoy.py", ppo_run, "--watch"]
        watching = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        watching.stdout.readline()  # the trial's window has closed
        deadline = time.monotonic() + 60
        while screen.read_bytes() == blank:
            assert time.monotonic() < deadline
            assert watching.poll() is None, watching.stderr.read()
            time.sleep(0.1)
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=60)
        assert watching.returncode == 130
    finally:
        server.terminate()
        server.wait()


def test_flags_are_refused_by_the_name_that_was_typed(tmp_path):
    """Would catch: a film of no game."""
    for flags, message in (
        ({"watch": True, "video": True}, "--watch and --video"),
        ({"episodes": 0}, "--episodes is 0"),
        ({"seed": -1}, "--seed is -1"),
    ):
        with pytest.raises(BadInput, match=f"^{message}"):
            play(tmp_path, **flags)
    (tmp_path / "machine" / "deeper_run").mkdir(parents=True)
    (tmp_path / "machine" / "deeper_run" / "config.json").touch()
    with pytest.raises(BadInput, match=f"one of those in it, e.g. {tmp_path}/machine/deeper_run"):
        play(tmp_path)
    (tmp_path / "a_run").mkdir()
    (tmp_path / "a_run" / "config.json").touch()
    with pytest.raises(BadInput, match=f"one of those in it, e.g. {tmp_path}/a_run"):
        play(tmp_path)
    with pytest.raises(BadInput, match=f"config.json is not a folder; name a run's folder, e.g. {tmp_path}/a_run"):
        play(tmp_path / "a_run" / "config.json")


@pytest.mark.slow
def test_a_training_goes_on_while_its_agent_plays(tmp_path):
    """Would catch: a lock that is taken, a folder that is changed, under a training; a checkpoint written by a real
    training that cannot be read; an exit code other than 0 or 2."""
    runs_dir = tmp_path / "runs"
    flags = ("--total-timesteps", 10**6, "--checkpoint-frequency", 128, "--num-threads", 1, "--runs-dir", runs_dir)
    command = [sys.executable, "ppo_atari_lan.py", *FLAGS["ppo"], *flags, "--metrics-frequency", 0]
    training = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not list(runs_dir.glob("*/checkpoints/*.ckpt")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        folder = next(runs_dir.iterdir())
        played = run_script("scripts/enjoy.py", folder, "--episodes", 1)
        assert played.returncode == 0, played.stderr
        assert "not finished yet" in played.stdout
        assert len(scores_in(played.stdout)) == 1
        assert training.poll() is None
        training.send_signal(signal.SIGTERM)
        _, errors = training.communicate(timeout=120)
        assert training.returncode == 143
        assert b"this resumes it" in errors
    finally:
        training.kill()
    refused = run_script("scripts/enjoy.py", runs_dir)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {runs_dir} is not a run's folder (no config.json); name one of those in it, e.g. {folder}\n"
    )
