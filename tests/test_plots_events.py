import math

import numpy as np
from conftest import read_events
from plots_common import STEPS, event_file, points
from synthetic_study import make_run, write_events
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from plots import events


def test_check_sums_are_those_of_tensorboard():
    rng = np.random.default_rng(1)
    for length in rng.integers(0, 900, 50):
        content = rng.bytes(int(length))
        assert events.masked_crc32c(content) == masked_crc32c(content)


def test_reads_every_point_that_tensorboard_reads(runs_dir):
    """Fails where points are down-sampled (TensorBoard keeps 10,000), confused between tags or lost."""
    folder = make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1, games=12_000, agent_steps=1_000_000, histograms=True)
    found, last_step, problems = events.read_events([event_file(folder)])
    expected = {tag: p for tag, p in read_events(folder).items() if not tag.endswith(("_length", "kde_peak"))}
    assert {tag: p.tolist() for tag, p in found.items()} == expected
    assert len(found["charts/episodic_return"]) == 12_000
    assert (last_step, problems) == (1_000_000, [])


def test_every_layer_is_read(runs_dir):
    """Would catch: tags of the representation only, or of some layers; a tag that nobody draws among them."""
    folder = make_run(runs_dir, "dqn", "Pong", "tanh-lan", 1)
    found, _, _ = events.read_events([event_file(folder)])
    layers = {tag for tag in found if tag.startswith(events.LAYERS)}
    names = ("conv1", "conv2", "conv3", "z_enc", "z_star", "z")
    assert layers == {f"layers/{layer}/{what}" for layer in names for what in ("constant", "dormant", "grad_norm")}
    assert "charts/episodic_length" not in found


def test_layers_keep_the_order_in_which_they_are_measured(tmp_path):
    """Would catch: layers by the alphabet, a head of the network below its convolutions."""
    names = ["stem", "conv2", "z", "critic", "actor"]
    tags = [f"layers/{name}/{what}" for name in names for what in ("zero", "constant")]
    write_events(tmp_path / "events.out.tfevents.1.host.1.0", [("representation/dead_neurons", 10, 0.5)])
    write_events(tmp_path / "events.out.tfevents.2.host.1.0", [(tag, 20, 0.5) for tag in tags])
    found, _, problems = events.read_events(sorted(tmp_path.iterdir()))
    measured = [f"layers/{name}/{what}" for name in names for what in ("constant", "zero")]
    assert list(found) == [*measured, "representation/dead_neurons"]
    assert problems == []


def test_a_resumed_run_counts_each_step_once(tmp_path):
    """A kill left points up to step 30 behind; the run went on from its checkpoint at 20."""
    tag = "charts/episodic_return"
    first, second = tmp_path / "events.1", tmp_path / "events.2"
    write_events(first, [(tag, 10, 1.0), (tag, 20, 2.0), (tag, 30, 666.0)])
    write_events(second, [(tag, 25, 3.0), (tag, 40, 4.0)], purge_step=21)
    found, last_step, _ = events.read_events([first, second])
    assert found[tag].tolist() == [(10, 1.0), (20, 2.0), (25, 3.0), (40, 4.0)]
    assert last_step == 40


def test_evaluation_is_no_training(tmp_path):
    """Its steps are games: they must not lengthen a run, and their scores are not the curve's."""
    write_events(tmp_path / "events", [("charts/episodic_return", 7, 1.0), ("eval/episodic_return", 99, 5.0)])
    found, last_step, _ = events.read_events([tmp_path / "events"])
    assert (list(found), last_step) == (["charts/episodic_return"], 7)


def test_nan_and_repeated_points_are_named(tmp_path):
    tag = "representation/dead_neurons"
    write_events(tmp_path / "events", [(tag, 1, 0.5), (tag, 2, math.nan), (tag, 3, math.inf), (tag, 1, 0.25)])
    found, _, problems = events.read_events([tmp_path / "events"])
    assert found[tag].tolist() == [(1, 0.25)]
    assert problems == [
        f"{tag}: 1 steps logged twice, the later value counts",
        f"{tag}: 2 NaN or infinite values left out",
    ]


def test_damaged_event_files(tmp_path):
    """Whatever is cut off or flipped: what is read is true, what is lost is named, nothing raises."""
    tag = "charts/episodic_return"
    file = tmp_path / "events"
    true = [(step, float(step * step)) for step in range(1, 11)]
    write_events(file, [(tag, step, value) for step, value in true])
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        found, _, problems = events.read_events([file])
        kept = found.get(tag, points()).tolist()
        assert kept == true[: len(kept)]
        assert problems or not size or len(kept) == sum(size >= end for end in ends(content)) - 1
    for place in range(len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        found, _, problems = events.read_events([file])
        assert problems
        assert set(found.get(tag, points()).tolist()) < set(true) or place < ends(content)[0]


def ends(content):
    """Where each record of a TFRecord file ends."""
    position, found = 0, []
    while position < len(content):
        position += 16 + int.from_bytes(content[position : position + 8], "little")
        found.append(position)
    return found


def test_cache_is_used_refreshed_and_rebuilt(tmp_path, runs_dir, capsys, monkeypatch):
    folders = [make_run(runs_dir, "dqn", "Pong", "relu", seed) for seed in (1, 2)]
    read = []
    original = events.read_events
    monkeypatch.setattr(events, "read_events", lambda files: read.append(files[0].parent) or original(files))

    def read_all():
        read.clear()
        return [events.read_run(folder, tmp_path / folder.name) for folder in folders], len(read)

    first, count = read_all()
    assert count == 2
    again, count = read_all()
    assert count == 0
    assert [{tag: p.tolist() for tag, p in run[0].items()} for run in first] == [
        {tag: p.tolist() for tag, p in run[0].items()} for run in again
    ]
    write_events(folders[1] / "events.out.tfevents.1800000000", [("charts/episodic_return", STEPS + 5, 1.0)])
    changed, count = read_all()
    assert (count, changed[1][1]) == (1, STEPS + 5)
    (tmp_path / folders[0].name).write_bytes(b"PK\x03\x04 no more")
    _, count = read_all()
    assert (count, read) == (1, [folders[0]])
    monkeypatch.setattr(events, "CACHE_FORMAT", -1)
    assert read_all()[1] == 2
    # A disk that is away for a moment. Would catch: its error in the cache, and a run that stays left out.
    (tmp_path / folders[0].name).unlink()
    with monkeypatch.context() as away:
        away.setattr(events.Path, "read_bytes", lambda file: (_ for _ in ()).throw(PermissionError(13, "denied")))
        assert "cannot be read (denied)" in read_all()[0][0][2][0]
    assert read_all()[0][0][2] == []


# --------------------------------------------------------------------------------------- order and oddities

TAG = "charts/episodic_return"


def test_files_are_ordered_by_their_restarts_not_by_names_or_clocks(tmp_path):
    """Would catch: files read by name, so that a clock set back between kill and resume voids the later points."""
    first, second, third = (tmp_path / f"events.out.tfevents.{when}" for when in (1_900_000_000, 1_850_000_000, 18))
    write_events(first, [(TAG, 10, 1.0), (TAG, 20, 2.0)], wall_time=1.9e9)
    write_events(second, [(TAG, 25, 3.0), (TAG, 40, 4.0)], purge_step=21, wall_time=1.85e9)
    write_events(third, [(TAG, 45, 5.0), (TAG, 60, 6.0)], purge_step=41, wall_time=1.8e9)
    found, last_step, problems = events.read_events(sorted([first, second, third]))
    assert found[TAG].tolist() == [(10, 1.0), (20, 2.0), (25, 3.0), (40, 4.0), (45, 5.0), (60, 6.0)]
    assert (last_step, problems) == (60, [])


def test_files_without_restarts_are_ordered_by_the_times_in_them(tmp_path):
    """Would catch: names before wall times, so that the earlier of two values of a step counts."""
    later, earlier = tmp_path / "events.1", tmp_path / "events.2"
    write_events(later, [(TAG, 10, 2.0)], wall_time=1.8e9)
    write_events(earlier, [(TAG, 10, 1.0)], wall_time=1.7e9)
    found, _, problems = events.read_events([later, earlier])
    assert found[TAG].tolist() == [(10, 2.0)]
    assert problems == [f"{TAG}: 1 steps logged twice, the later value counts"]


def test_what_a_restart_voids_is_said(tmp_path):
    """Would catch: points dropped without a word."""
    write_events(tmp_path / "events.1", [(TAG, 10, 1.0), (TAG, 20, 2.0), (TAG, 30, 3.0)])
    write_events(tmp_path / "events.2", [(TAG, 15, 4.0)], purge_step=15)
    found, _, problems = events.read_events([tmp_path / "events.1", tmp_path / "events.2"])
    assert found[TAG].tolist() == [(10, 1.0), (15, 4.0)]
    assert problems == ["events.2: its restart at step 15 voids 2 earlier points"]


def test_a_restart_that_voids_everything_leaves_nothing(tmp_path):
    """Would catch: an index error on a tag whose points are all gone."""
    write_events(tmp_path / "events.1", [(TAG, 10, 1.0)])
    write_events(tmp_path / "events.2", [], purge_step=0)
    found, last_step, problems = events.read_events([tmp_path / "events.1", tmp_path / "events.2"])
    assert (found, last_step) == ({}, 0)
    assert problems == ["events.2: its restart at step 0 voids 1 earlier points"]
