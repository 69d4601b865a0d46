"""pyproject.toml: what `pip install -e .` installs."""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_an_installation_has_every_module_and_what_it_needs(tmp_path):
    """Would catch: a training script or a package that is missing, the report without its page, no dependencies."""
    project, wheels = tmp_path / "project", tmp_path / "wheels"
    modules = {file.name for file in ROOT.glob("*.py")}
    packages = {package.parent.name for package in ROOT.glob("*/__init__.py")}
    project.mkdir()
    wheels.mkdir()
    for name in (*modules, "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for name in packages:
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Without pip, which would want setuptools from the network.
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
        installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
    of_packages = (file for name in packages for file in (project / name).rglob("*") if file.is_file())
    assert installed == modules | {str(file.relative_to(project)) for file in of_packages}
    assert any(name.endswith("page.html") for name in installed)
    needed = {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert needed == {line for line in lines if line and not line.startswith("#")}
