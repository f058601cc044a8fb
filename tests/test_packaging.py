"""The wheel: what must be in it, and what importing it must not cost."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without the network."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, hatchling.build; hatchling.build.build_wheel(sys.argv[1])"
    run(sys.executable, "-c", build, str(folder), cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_packages_the_configs_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [archive.read(n).decode() for n in names if n.endswith("entry_points.txt")]
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"mhc/configs/{config.name}" in names
    assert {"mhc/profile.py", "mhc/py.typed", "tl_kernels/post_res.py", "tuner/workloads.py", "mhc/configs/workloads.yaml"} <= names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"mhc", "tl_kernels", "tuner"}
    assert "mhc-tune = tuner.cli:main" in entry_points
    assert "[pytest11]\nmhc-latency = tuner.pytest_plugin" in entry_points


def test_an_installed_wheel_finds_its_own_configs(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import mhc.profile as m; print(m.packaged_dir()); from tuner.workloads import load_workloads; load_workloads()"
    assert Path(run(sys.executable, "-c", code, cwd=tmp_path).strip()) == tmp_path / "mhc" / "configs"


def test_an_installed_wheel_brings_its_pytest_plugin_however_often_it_is_named(wheel, tmp_path):
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    (tmp_path / "test_k.py").write_text(
        "import sys\n"
        "def test_a(mhc_latency):\n    raise AssertionError\n"
        f"def test_b():\n    assert sys.modules['tuner.pytest_plugin'].__file__.startswith({str(installed)!r})\n"
        "    assert 'torch' not in sys.modules\n"
    )
    by_module, by_name = ("-p", "tuner.pytest_plugin"), ("-p", "mhc-latency")
    for args in ((), by_module, by_name, by_name + by_module, by_module + by_name, "conftest"):
        if args == "conftest":
            (tmp_path / "conftest.py").write_text("pytest_plugins = ['tuner.pytest_plugin']\n")
            args = ()
        command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-W", "error", *args)
        assert "1 passed, 1 skipped" in run(*command, cwd=tmp_path, PYTHONPATH=str(installed)), args


def test_importing_mhc_imports_neither_the_tuner_nor_tilelang():
    code = "import sys, mhc; print(*[m for m in ('tilelang', 'tvm', 'optuna', 'rich', 'typer', 'tuner') if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("tl_kernels", ("mhc", "tuner", "optuna", "rich", "typer")), ("mhc", ("tuner", "optuna", "rich", "typer"))],
)
def test_imports_point_one_way(package, forbidden):
    import ast

    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} line {node.lineno} imports {name}"
