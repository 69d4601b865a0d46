"""README and docs say what is there: links, files, flags, activations, tags."""

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS

import dqn_atari_lan
import metrics
import plot_results
import ppo_atari_lan
from lan_utils import study

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "results").glob("*/*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# Flags of other programs, and none of this project's.
FOREIGN_FLAGS = {
    *("--array", "--gres", "--cpus-per-task", "--time", "--mem"),  # sbatch
    *("--logdir", "--citation"),  # tensorboard, parallel
}
# Every tag of the run folder's contract; those of the factors by the ends of their names, too.
TAGS = (
    *("charts/episodic_return", "charts/episodic_length", "charts/SPS", "charts/epsilon", "charts/learning_rate"),
    *("losses/td_loss", "losses/q_values", "losses/policy_loss", "losses/value_loss", "losses/entropy"),
    *("losses/approx_kl", "losses/clipfrac", "losses/explained_variance"),
    *("representation/dead_neurons", "representation/effective_rank", "representation/entropy_rank"),
    *("representation/dormant_neurons", "representation/std_dead_neurons", "representation/feature_norm"),
    *("representation/dead_neurons_scaled", "representation/effective_rank_centred", "representation/kde_peak"),
    *("representation/dead_neurons_z_enc", "representation/dead_neurons_z_star", "representation/dead_neurons_z_star2"),
    *(f"representation/effective_rank_{name}" for name in ("z_enc", "z_star", "z_star2")),
    *("layers/<layer>/constant", "layers/<layer>/zero", "layers/<layer>/dormant", "layers/<layer>/saturated"),
    *("layers/<layer>/weight_norm", "layers/<layer>/grad_norm", "layers/<layer>/no_gradient"),
    "eval/episodic_return",
)
# python X.py, bash scripts/X.sh, sbatch ... scripts/X.slurm
COMMAND = re.compile(
    r"\b(?:python3?|bash|sbatch\b.*?) (?P<script>(?:[\w.]+/)?\w+(?:\.(?:py|sh|slurm))|\.ci/run)(?P<words>.*)"
)


def text_of(page: Path) -> str:
    """Without HTML comments: what they hold is yet to come."""
    return re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings make, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags_of(script: str) -> set[str]:
    """Every flag that a script takes: of its dataclass where it is cheap to import, else of its text."""
    modules = {"dqn_atari_lan.py": dqn_atari_lan, "ppo_atari_lan.py": ppo_atari_lan, "plot_results.py": plot_results}
    if script in modules:
        fields = dataclasses.fields(modules[script].Args)
        names, switches = [field.name for field in fields], [field.name for field in fields if field.type is bool]
        return {flag_of(name) for name in ("help", *names, *(f"no_{name}" for name in switches))}
    text = (ROOT / script).read_text()
    names = ["help"]
    for node in ast.parse(text).body if script.endswith(".py") else ():
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            names += [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
        elif isinstance(node, ast.FunctionDef) and f"tyro.cli({node.name}" in text:
            names += [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        elif isinstance(node, ast.ImportFrom) and node.module == "drawing":  # whose launch reads the command line
            names.append("out_dir")
    negations = {flag_of(f"no_{name}") for name in names}  # tyro's, of what is true by default
    return {flag_of(name) for name in names} | negations | set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(script, words behind it) of every command of this project in a page's code, continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```|`([^`\n]+)`", text_of(page), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in "".join(block).replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        without_remark = re.sub(r"\s+[#(] ?.*", "", line)
        if command := COMMAND.search(without_remark):
            found.append((command["script"], command["words"].split()))
    return found


def test_readme_is_short():
    """A README that grows until nobody reads it to its end."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert sum(not line.startswith("|") for line in lines) <= 165  # a further activation has its row


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_exist(name):
    """A page or a picture that was renamed, or was never committed; a heading that was reworded."""
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("name", NAMES)
def test_recorded_data_exists(name):
    """A number whose data was moved or deleted: every file of results/ that a page names is there."""
    for file in re.findall(r"(?<![\w/.-])results/[\w./-]+\.\w+", text_of(ROOT / name)):
        assert (ROOT / file).exists(), file


def test_scripts_exist_and_take_the_flags_of_the_commands():
    """A command that a reader copies and that fails: a script renamed, or a flag renamed or of another script."""
    seen = set()
    for page in PAGES:
        for script, words in commands(page):
            seen.add(script)
            assert (ROOT / script).is_file(), f"{page.name}: {script}"
            own = words[: words.index("--")] if "--" in words else words
            flags = {word.partition("=")[0] for word in own if word.startswith("--")}
            assert flags <= flags_of(script), f"{page.name}: {script} takes no {flags - flags_of(script)}"
    assert {"dqn_atari_lan.py", "plot_results.py", "scripts/jobs.py", "scripts/sweep.sh", ".ci/run"} <= seen


def test_flags_exist():
    """A flag that prose goes on naming after it was renamed or removed."""
    scripts = [*SCRIPTS, "plot_results.py", "tests/synthetic_study.py"]
    folders = ("scripts", "experiments", "benchmark")
    files = [file for folder in folders for file in (ROOT / folder).iterdir() if file.suffix in (".py", ".sh")]
    scripts += [str(file.relative_to(ROOT)) for file in files]
    known = FOREIGN_FLAGS.union(*map(flags_of, scripts))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text_of(page)))
        assert named <= known, f"{page.name}: {named - known}"


def test_table_of_activations_is_complete():
    """An activation that was added to the code and not to the README's table, or renamed."""
    _, _, table = (ROOT / "README.md").read_text().partition("| `--activation` |")
    rows = table.split("\n\n")[0].splitlines()[2:]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(named) == sorted(study.ACTIVATIONS)


def test_every_tag_is_explained():
    """A tag that is logged and that nobody can look up: each is the head of a row of its own or of a list of tags."""
    rows = [line.split("|") for line in text_of(ROOT / "docs" / "runs.md").splitlines() if line.startswith("|")]
    explained = {tag for row in rows if row[2].strip() for tag in re.findall(r"`([^`]+)`", row[1])}
    logged = {f"representation/{name}" for name in metrics.representation_metrics(torch.randn(9, 2))}
    assert set(TAGS) | logged <= explained, (set(TAGS) | logged) - explained


def test_linter_is_the_same_everywhere():
    """A commit that passes its hook and fails the tests, because ruff's versions drifted apart."""
    (wanted,) = re.findall(r"^ruff==\S+$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    hooks = re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks
    assert set(hooks) == {wanted}
