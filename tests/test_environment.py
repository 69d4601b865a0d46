"""Pictures and tables are the same bytes in a notebook's environment, with a matplotlibrc, in any locale."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, contents
from synthetic_study import make_run

# What a user keeps for pictures of their own: a dark style, fonts of TeX, transparent files.
MATPLOTLIBRC = """
text.usetex: True
font.size: 30
lines.linewidth: 9
axes.facecolor: black
figure.facecolor: black
savefig.facecolor: black
savefig.transparent: True
savefig.bbox: tight
axes.formatter.use_locale: True
"""

PLOTS = ["--only", "study_dqn", "fig04", "tables"]
# The side experiments take minutes: this is what they share.
EXPERIMENT = """
import sys
sys.path.insert(0, "experiments")
from drawing import launch, plt, save, write_text
def main(out_dir):
    figure, axes = plt.subplots()
    axes.plot([0, 1], [0, 1000])
    save(figure, out_dir, "line")
    write_text(out_dir / "table.md", "0.5 \\u00b1 0.1")
    print("0.5 \\u00b1 0.1")
launch(main, "A line.")
"""


def run(words, folder, **environment):
    """The files that a command makes in a folder, by their names there."""
    folder.mkdir()
    words = [str(word).replace("OUT", str(folder)) for word in words]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {
        path.relative_to(folder): content for path, content in contents(folder).items() if ".cache" not in str(path)
    }


@pytest.mark.parametrize("what", ["compare", "experiment", pytest.param("plot_results", marks=pytest.mark.slow)])
def test_files_are_the_same_in_any_environment(tmp_path, runs_dir, what):
    """Would catch: a notebook's MPLBACKEND that ends the program, TeX that is not installed, ReLU's black line on a
    black ground, tables in the locale's encoding, an order that depends on the hashes of strings."""
    relu, tanh = (make_run(runs_dir, "dqn", "Breakout", activation, 1) for activation in ("relu", "tanh"))
    words = {
        "plot_results": ["plot_results.py", "--runs-dir", runs_dir, "--out-dir", "OUT", *PLOTS],
        "compare": ["scripts/compare.py", relu, tanh, "--out", "OUT/compare.png"],
        "experiment": ["-c", EXPERIMENT, "--out-dir", "OUT"],
    }[what]
    (tmp_path / "matplotlibrc").write_text(MATPLOTLIBRC)
    expected = run(words, tmp_path / "as_usual", PYTHONHASHSEED="1")
    assert len(expected) > (what != "compare")
    hostile = {"MPLBACKEND": "module://a_notebook.of_another_python", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    hostile |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONHASHSEED": "2"}
    found = run(words, tmp_path / "elsewhere", **hostile)
    assert found.keys() == expected.keys()
    assert [str(file) for file in found if found[file] != expected[file]] == []
