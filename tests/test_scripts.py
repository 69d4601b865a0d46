"""What every training script has to be: `<algorithm>_atari_lan.py`, however many there are."""

import ast
import dataclasses
import importlib
import inspect
import re
import sys
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, make_quadrants, module_of, read_events, small_args, without_run
from plots_common import draw, read_study, rows

import metrics
from lan_utils import cli, run
from plots import figures

# ------------------------------------------------------------------------------------ what they share


def sections(script):
    """{heading: text}, in order."""
    parts = re.split(r"\n# -{20,} (.+)\n", (ROOT / script).read_text())
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize(("script", "other"), [*pairwise(SCRIPTS)])
def test_what_the_scripts_share_stands_in_each_word_for_word(script, other):
    """Would catch: the paper's idea, or how a game is seen, changed in one script alone."""
    ours, theirs = sections(script), sections(other)
    assert list(ours) == list(theirs)
    for heading, words in (
        ("representation", "REPRESENTATIONS = {"),
        ("environment", "def make_env("),
        ("encoder", "Eq. 2: z = z_enc * z_star"),
    ):
        assert words in ours[heading]
        assert ours[heading] == theirs[heading], heading


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_layer_of_any_kind_can_be_measured(script):
    """Would catch: `'Encoder' object has no attribute 'measured'`, where the layer has no factors."""
    encoder = importlib.import_module(script.removesuffix(".py")).Encoder("tanh-lan")
    encoder.conv1 = torch.nn.Conv2d(4, 32, 8, stride=4)
    assert list(encoder.measured) == ["conv1", "conv2", "conv3", "z", "z_enc", "z_star"]


# Hyperparameters that each algorithm has from its own paper.
OF_THE_ALGORITHM = {
    *("exp_name", "learning_rate", "anneal_lr", "adam_eps", "num_envs", "num_steps", "num_minibatches"),
    *("update_epochs", "max_grad_norm", "end_e"),
}


@pytest.mark.parametrize(("script", "other"), [*combinations(SCRIPTS, 2)])
def test_what_has_one_name_in_two_scripts_is_one_thing(script, other):
    """Would catch: a schedule or a default that was changed in one script alone."""
    ours, theirs = (importlib.import_module(name.removesuffix(".py")) for name in (script, other))
    if hasattr(ours, "linear_schedule") and hasattr(theirs, "linear_schedule"):
        assert inspect.getsource(ours.linear_schedule) == inspect.getsource(theirs.linear_schedule)
    defaults = {field.name: field.default for field in dataclasses.fields(theirs.Args)}
    for field in dataclasses.fields(ours.Args):
        if field.name in defaults and field.name not in OF_THE_ALGORITHM:
            assert field.default == defaults[field.name], field.name


# -------------------------------------------------------------------------- without its lines of `run.`

# What a script makes only to tell the run: what goes into `run.log` and `run.log_games`, and the run itself.
TOLD_THE_RUN = {"run", "step", "info", "losses", "evaluate"}


def unread_names(source):
    """What `main` assigns, attributes too, and the functions of the script, of which nothing in it is read.

    `x |= y` and the statement `x.append(y)` only write x.
    """
    tree = ast.parse(source)
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    written = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(main):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "LoopState":
            written |= {keyword.arg for keyword in node.keywords}
        if isinstance(getattr(node, "ctx", None), ast.Store) and isinstance(node, (ast.Name, ast.Attribute)):
            written.add(node.id if isinstance(node, ast.Name) else node.attr)
    appends = [
        node.value.func.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if isinstance(node.value.func, ast.Attribute) and node.value.func.attr in ("append", "extend")
    ]
    read = {
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load) and node not in appends
    }
    return written - read - {"_"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_its_run_lines_a_script_is_its_algorithm_alone(script):
    """That it trains to the same weights is tested with each script. Would catch: a buffer, a counter or a function
    that nothing but measuring uses."""
    plain = without_run(script)
    assert unread_names(plain) <= TOLD_THE_RUN
    # And what it says of a loop that keeps observations for measurements.
    keeping = plain.replace(
        "    play = LoopState(", "    newest = []\n    newest.append(1)\n    play = LoopState(recent=None, ", 1
    )
    keeping += "\n\ndef newest_observations():\n    pass\n"
    assert unread_names(keeping) - unread_names(plain) == {"newest", "recent", "newest_observations"}


# ------------------------------------------------------------------------------- what is easy to change


def hooked(network, observations):
    """z and its factors by hooks of the test's own, and what the first convolution is given."""
    kept = {name: [] for name in ("z", "z_enc", "z_star", "input")}
    layer = network.encoder.z
    modules = {"z": layer, "z_enc": layer.factors["enc"], "z_star": layer.factors["star"]}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: kept[name].append(output))
        for name, module in modules.items()
    ]
    first = network.encoder.conv1
    hooks.append(first.register_forward_hook(lambda _, inputs, output: kept["input"].append(inputs[0])))
    with torch.no_grad():
        for piece in observations.split(run.CHUNK):
            network(piece)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(pieces) for name, pieces in kept.items()}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_another_scaling_of_the_input_is_one_line_and_is_measured(monkeypatch, tmp_path, script):
    """In a copy of the script. Would catch: a second forward pass with a scaling of its own in what measures."""
    source = (ROOT / script).read_text()
    assert source.count("observations / 255") == 1
    scaled = source.replace("(observations / 255)", "(observations / 200 - 0.5)")
    module = module_of(scaled, tmp_path / f"scaled_{script}")
    monkeypatch.setattr(module, "make_env", make_quadrants)
    args = small_args(module, tmp_path / "runs")
    expected, measure = {}, run.Run.measure

    def watched(self, step, network, memory):
        if self._due(args.metrics_frequency, step) and memory.observations(args.metrics_samples, 0) is not None:
            found = hooked(network, memory.observations(args.metrics_samples, (args.seed, step)))
            given = found.pop("input")
            assert (given.min(), given.max()) == (-0.5, 255 / 200 - 0.5)
            z = found.pop("z")
            noise = int(np.random.SeedSequence((args.seed, step)).generate_state(1)[0])
            generator = torch.Generator().manual_seed(noise)
            peaks = metrics.kde_peak_density(z, generator=generator)
            expected[step] = metrics.representation_metrics(z, found, args.dead_threshold, generator, peaks)
        measure(self, step, network, memory)

    monkeypatch.setattr(run.Run, "measure", watched)
    module.main(args)
    (folder,) = (tmp_path / "runs").iterdir()
    events = read_events(folder)
    assert len(expected) == 2
    for name in next(iter(expected.values())):
        logged = dict(events[f"representation/{name}"])
        assert logged == {step: pytest.approx(values[name], rel=1e-6) for step, values in expected.items()}, name
    assert len({values["feature_norm"] for values in expected.values()}) == 2  # it did train in between


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_row_in_the_table_is_a_flag_trains_and_is_drawn(monkeypatch, tmp_path, script):
    """In a copy of the script. Would catch: an activation that has to be entered in a second place."""
    source = (ROOT / script).read_text()
    row = '    "relu": Recipe((nn.ReLU,)),\n'
    assert source.count(row) == 1
    module = module_of(
        source.replace(row, row + '    "silu-lan": Recipe((nn.SiLU, nn.SiLU)),\n'), tmp_path / f"own_{script}"
    )
    monkeypatch.setattr(module, "make_env", make_quadrants)
    defaults = dataclasses.asdict(small_args(module, tmp_path / "runs"))
    changed = {name: value for name, value in defaults.items() if value != getattr(module.Args(), name)}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items() if not isinstance(value, bool)]
    for activation in ("relu", "silu-lan"):
        monkeypatch.setattr(sys, "argv", [script, *flags, "--activation", activation])
        args = cli.parse(module.Args)
        if hasattr(args, "async_envs"):
            args.async_envs = False
        module.main(args)
    monkeypatch.setattr(sys, "argv", [script, "--activation", "silu"])
    with pytest.raises(SystemExit):
        cli.parse(module.Args)

    draw(tmp_path / "runs", tmp_path / "out", "tables", "study")
    found = {row["activation"]: row for row in rows(tmp_path / "out").values()}
    assert found.keys() == {"relu", "silu-lan"}
    assert (found["silu-lan"]["drawn"], found["silu-lan"]["note"]) == ("True", "")
    assert float(found["silu-lan"]["effective_rank"]) > 0
    algorithm = script.split("_")[0]
    study = figures.figures_of([algorithm])[f"study_{algorithm}"]
    assert "silu-lan" in figures.shown_activations(read_study(tmp_path / "runs", tmp_path), study)
    sample = np.load(next((tmp_path / "runs").glob("*silu-lan*/activations.npz")))
    assert sorted(sample) == ["z", "z_enc", "z_star"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_sticky_actions_are_those_of_training_and_evaluation(monkeypatch, tmp_path, script):
    """Would catch: a flag that only one of them reads."""
    module = importlib.import_module(script.removesuffix(".py"))
    calls = []

    def watched(*arguments, **kwargs):
        calls.append((arguments, kwargs))
        return make_quadrants(*arguments, **kwargs)

    monkeypatch.setattr(module, "make_env", watched)
    args = small_args(module, tmp_path, repeat_action_probability=0.25, eval_episodes=1, metrics_frequency=0)
    module.main(args)
    assert len(calls) >= 2
    for arguments, kwargs in calls:
        bound = inspect.signature(make_quadrants).bind(*arguments, **kwargs).arguments
        assert (bound["env_id"], bound["repeat_action_probability"]) == (args.env_id, 0.25)
