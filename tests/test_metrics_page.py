"""docs/metrics.md: its code runs, and prints what the page says."""

import re

import torch
from conftest import ROOT
from torch import nn

import metrics

PAGE = (ROOT / "docs" / "metrics.md").read_text()


def blocks():
    """[(code, what the page says it prints, or None)]"""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?"
    return re.findall(pattern, PAGE, flags=re.DOTALL | re.MULTILINE)


class QNetwork(nn.Module):
    """cleanrl's, in dqn_atari.py."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU()),
            nn.Linear(512, 4),
        )

    def forward(self, x):
        return self.network(x / 255.0)


def test_every_number_is_what_the_code_prints(tmp_path, monkeypatch, capsys):
    """Would catch: a number that no longer comes out, a name that metrics.py has no more."""
    monkeypatch.chdir(tmp_path)
    q_network, observations = QNetwork(), torch.randint(0, 256, (520, 4, 84, 84), dtype=torch.uint8)
    torch.save(q_network.state_dict(), "agent.pt")
    torch.save(observations, "observations.pt")
    names = {"torch": torch, "metrics": metrics, "q_network": q_network, "observations": observations}
    found = blocks()
    assert len(found) == 6
    for code, expected in found:
        exec(code, names)
        assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == expected.splitlines()
    assert set(names["layers"]) == {"conv1", "conv2", "conv3", "z"}
    assert names["values"]["effective_rank"] > 1
