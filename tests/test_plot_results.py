import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import synthetic_study
from conftest import ROOT, run_script
from plots_common import STEPS, draw, make_small_study, rows  # noqa: F401 (a fixture)
from synthetic_study import make_run, true_measurement, true_score

import plot_results
from lan_utils.cli import RunFailed
from plots import command, figures, results


@pytest.fixture(scope="session")
def drawn(study, tmp_path_factory):
    """The whole study, drawn by the command a user would give."""
    out_dir = tmp_path_factory.mktemp("drawn") / "figures"
    done = run_script("plot_results.py", "--runs-dir", study, "--out-dir", out_dir)
    assert (done.returncode, done.stderr) == (0, "")
    return out_dir


@pytest.mark.slow
def test_every_number_of_results_csv(study, drawn):
    """Against the formulas that the study was made from, worked out game by game."""
    found = rows(drawn)
    assert len(found) == 2 * 2 * (11 + 4)
    ends_ = np.linspace(STEPS / 300, STEPS, 300).round().astype(int)
    human = synthetic_study.RANDOM_HUMAN
    for row in found.values():
        game, activation, seed = row["game"], row["activation"], int(row["seed"])
        relu = [np.float32(true_score(game, "relu", s, ends_ / STEPS)) for s in (1, 2)]
        grid = np.linspace(0, STEPS, 1001)
        curve = [
            np.mean([np.mean(scores[: np.sum(ends_ <= g)][-100:]) for scores in relu]) for g in grid if g >= ends_[0]
        ]
        # The study's point: the lowest value lies before the hundredth game, the highest before the end.
        early, curve = curve[: -sum(grid >= ends_[99])], curve[-sum(grid >= ends_[99]) :]
        assert min(early) < min(curve)
        assert 0 < np.argmax(curve) < len(curve) - 1
        final = np.mean(true_score(game, activation, seed, ends_[-100:] / STEPS))
        random, top = human[game]
        expected = {
            "agent_steps": STEPS,
            "final_return": final,
            "normalized_score": (final - min(curve)) / (max(curve) - min(curve)),
            "human_normalized_score": (final - random) / (top - random),
        }
        measured = ["dead_neurons", "effective_rank", "entropy_rank", "dormant_neurons", "std_dead_neurons"]
        for name in [*measured, "dead_neurons_scaled", "effective_rank_centred"]:
            expected[name] = float(true_measurement(name, activation, seed, np.array(1.0)))
        expected["rank_share"] = expected["effective_rank"] / (1024 if activation == "wide-1024" else 512)
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4)
        assert (row["finished"], row["drawn"], row["note"]) == ("True", "True", "")
    with open(drawn / "results.csv") as file:
        header = file.readline()
    assert header.startswith(
        "algorithm,game,activation,seed,agent_steps,finished,final_return,normalized_score,human_normalized_score,"
        "dead_neurons,effective_rank,entropy_rank,dormant_neurons,"
    )


@pytest.mark.slow
def test_every_figure_is_drawn(drawn):
    names = [name for name in figures.FIGURES if "controls" not in name]  # whose runs the paper's study does not have
    for name in names:
        assert (drawn / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (drawn / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    numbers = [name.split("_")[0].removeprefix("fig") for name in names]
    assert " ".join(numbers) == "study study layers layers 01 04 05a 05b 06a 06b 07 08a 08b 10 11 13 14 15 16 17"


@pytest.mark.slow
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, runs_dir):
    for seed in (1, 2):
        make_run(runs_dir, "dqn", "Pong", "relu", seed)
    (tmp_path / "empty").mkdir()
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "out"
    for arguments, expected in (
        (["--runs-dir", tmp_path / "empty"], "holds no run; train first"),
        (["--runs-dir", tmp_path / "nowhere"], "No such file or directory"),
        (["--runs-dir", next(runs_dir.iterdir())], "name its parent"),
        (["--runs-dir", runs_dir, "--only", "fig99"], "fig05a_dqn_normalized"),
        (["--runs-dir", runs_dir, "--out-dir", tmp_path / "site"], "did not make"),
        (["--runs-dir", runs_dir, "--out-dir", tmp_path / "file"], "name a folder that can be written"),
        (["--runs-dir", runs_dir, "--out-dir", next(runs_dir.iterdir())], "is a run's folder"),
        (["--runs-dir", runs_dir, "--out-dir", "x" * 300], "name a folder that can be written"),
    ):
        done = run_script("plot_results.py", "--out-dir", out, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ")
        assert expected in done.stderr
    assert not out.exists()
    assert (tmp_path / "site" / "index.html").read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_while_drawing_is_one_line(tmp_path, study):
    """Would catch: tracebacks of the worker processes, which a terminal interrupts too, or waiting for all figures."""
    arguments = [sys.executable, ROOT / "plot_results.py", "--runs-dir", study, "--out-dir", tmp_path / "out"]
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # `&` around the tests would have ignored it
    )
    while not list((tmp_path / "out").glob("fig*.pdf")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert messages.startswith("interrupted; every file is whole, run this again: python ")
    assert messages.count("\n") == 1
    assert len(list((tmp_path / "out").glob("fig*.png"))) < len(figures.FIGURES)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_workers_leave_ctrl_c_to_the_program():
    """Would catch: a worker's own traceback, at the moments when none of the program's code runs in it."""
    with command.workers() as pool:
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN


def test_a_full_disk_is_named(tmp_path, runs_dir):
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    arguments = [sys.executable, ROOT / "plot_results.py", "--runs-dir", runs_dir, "--out-dir", tmp_path / "out"]
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 8; exec "$@"', "-", *map(str, arguments)]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: cannot use {tmp_path}/out/")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_only_draws_what_was_asked_for(tmp_path, study):
    draw(study, tmp_path / "out", "fig01", "fig06b")
    names = {path.stem for path in (tmp_path / "out").glob("*.*") if path.name[0] != "."}
    assert names == {"fig01_dqn_relu_tanh", "fig06b_dqn_effective_rank"}


def test_what_an_earlier_drawing_left_is_named(tmp_path, runs_dir, capsys):
    """Would catch: figures of an algorithm whose runs are gone, beside those of today; a picture of the user's own."""
    make_run(runs_dir, "pqn", "Pong", "relu", 1)
    draw(runs_dir, tmp_path / "out", "study_pqn")
    (tmp_path / "out" / "mine.png").write_bytes(b"")
    shutil.rmtree(next(runs_dir.iterdir()))
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    capsys.readouterr()
    draw(runs_dir, tmp_path / "out", "study_dqn")
    assert "earlier" not in capsys.readouterr().err  # nothing else was asked for
    draw(runs_dir, tmp_path / "out")
    assert f"from an earlier drawing, still in {tmp_path / 'out'}: study_pqn\n" in capsys.readouterr().err


def test_needs_no_torch():
    """torch and the training scripts would cost seconds at every start."""
    code = "import sys, plot_results; print(*({'torch', 'metrics', 'gymnasium', 'ale_py'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("\n", 0)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, tmp_path, fragment=""):
    """The page's document after its scripts ran, and what the browser's console said."""
    arguments = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri() + fragment]
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=60, env=os.environ | {"HOME": str(tmp_path)}
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)")
def test_page_in_a_browser(drawn, tmp_path):
    """Moved elsewhere it is still whole; numbers sort as numbers; the console is silent."""
    page = tmp_path / "elsewhere.html"
    shutil.copy(drawn / "index.html", page)
    document, console = browse(page, tmp_path, "#sort=results:-6")
    assert console == []
    assert document.count("<img") == len(
        [name for name in figures.figures_of(["dqn", "ppo"]) if "controls" not in name]
    )
    assert 'aria-sort="descending"' in document
    body = document.split('<table id="results">')[1].split("<tbody>")[1].split("</tbody>")[0]
    shown = [float(re.findall(r"<td>(.*?)</td>", row)[6]) for row in body.split("</tr>") if "<td>" in row]
    assert shown == sorted((float(row["final_return"]) for row in rows(drawn).values()), reverse=True)


@pytest.mark.slow
def test_page_is_self_contained(drawn):
    text = (drawn / "index.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
    assert not re.findall(r"url\(|@import|https?://", text)
    assert "{{" not in text
    assert "{%" not in text


# -------------------------------------------------------------------------------- a folder of its own


@pytest.mark.slow
def test_only_a_mark_makes_a_folder_its_own(tmp_path, runs_dir):
    """Would catch: a home folder, which has a .cache, taken for an out folder: results.csv overwritten, files of
    .cache deleted."""
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    theirs = {".cache/embeddings.npz": "theirs", "results.csv": "theirs", "fig05a_dqn_normalized.png": "theirs"}
    for name, text in theirs.items():
        (home / name).write_text(text)
    for refused in ("results.csv", "fig05a_dqn_normalized.png"):
        done = run_script("plot_results.py", "--runs-dir", runs_dir, "--out-dir", home)
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr
            == f"error: --out-dir {home} holds {refused}, which this program did not make; name another one\n"
        )
        assert {name: (home / name).read_text() for name in theirs if (home / name).exists()} == theirs
        assert not (home / ".plot_results").exists()
        (home / refused).unlink()
        theirs.pop(refused)
    for _ in range(2):  # with the mark, its own files are replaced
        draw(runs_dir, home, "fig05a", "tables")
        assert (home / ".cache" / "embeddings.npz").read_text() == "theirs"
        assert len(list((home / ".cache").iterdir())) == 2
    shutil.rmtree(next(runs_dir.iterdir()))
    make_run(runs_dir, "dqn", "Pong", "tanh", 1)
    draw(runs_dir, home, "fig01")
    assert len(list((home / ".cache").iterdir())) == 2  # theirs, and the new run's: the old one's is deleted


@pytest.mark.parametrize("mark", ["", "something else"])
def test_a_foreign_mark_is_none(tmp_path, runs_dir, mark):
    """Would catch: any file of the mark's name, a folder or a link taken for the mark."""
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".plot_results").write_text(mark)
    with pytest.raises(results.BadInput, match=r"holds \.plot_results, which this program did not make"):
        draw(runs_dir, tmp_path / "out")
    assert (tmp_path / "out" / ".plot_results").read_text() == mark


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_plot_leaves_no_workers_behind(tmp_path, study):
    """Would catch: workers that draw on, or wait for ever, when their program was killed."""
    arguments = [sys.executable, ROOT / "plot_results.py", "--runs-dir", study, "--out-dir", tmp_path / "out"]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "out").glob("fig*.pdf")) and process.poll() is None:
        time.sleep(0.05)
    workers = children(process.pid)
    assert workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in workers if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def fail(read, plot):
    raise ValueError("on\npurpose")


def test_a_figure_that_fails_does_not_stop_the_others(tmp_path, study, monkeypatch, capsys):
    """Would catch: a traceback and nothing drawn because of one figure."""
    broken = dataclasses.replace(figures.FIGURES["fig01_dqn_relu_tanh"], draw=fail)
    monkeypatch.setitem(figures.FIGURES, "fig01_dqn_relu_tanh", broken)
    with pytest.raises(RunFailed, match="fig01_dqn_relu_tanh could not be drawn"):
        draw(study, tmp_path / "out", "fig01", "fig05a")
    assert "not drawn, ValueError: on purpose: fig01_dqn_relu_tanh" in capsys.readouterr().err
    assert (tmp_path / "out" / "fig05a_dqn_normalized.png").exists()


def test_runs_of_several_folders_are_drawn_together(tmp_path, runs_dir):
    """Would catch: the second folder forgotten, a folder named twice counted twice, the first's cache deleted."""
    make_run(runs_dir, "dqn", "Pong", "relu", 1)
    make_run(tmp_path / "more", "dqn", "Pong", "gelu", 1)
    folders = (str(runs_dir), str(tmp_path / "more"), f"{runs_dir}/")
    plot_results.main(plot_results.Args(folders, str(tmp_path / "out"), ("tables",)))
    assert sorted(row["activation"] for row in rows(tmp_path / "out").values()) == ["gelu", "relu"]
    assert len(list((tmp_path / "out" / ".cache").glob("*.npz"))) == 2
    done = run_script("plot_results.py", "--runs-dir", runs_dir, tmp_path / "gone", "--out-dir", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "gone: No such file or directory" in done.stderr
