"""A wheel runs by itself: built from a copy of this checkout, installed into an empty folder, used from another one."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, records, run_script
from PIL import Image

from moco import cli, console, resources
from moco.errors import UserError
from moco.sweep.__main__ import main as sweep

MAINS = ["main_lincls.py", "main_pretrain.py", "main_semisup.py"]
PARTS = ["moco", "detection", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE", *MAINS]
COMMANDS = ["moco", "moco-lincls", "moco-pretrain", "moco-semisup"]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel and nothing else. No network: setuptools is in this environment."""
    source, out, site = (tmp_path_factory.mktemp(name) for name in ("source", "out", "site"))
    for part in (ROOT / name for name in PARTS):
        if part.is_dir():
            shutil.copytree(part, source / part.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, source)
    alone = ["--no-deps", "--no-index"]
    wheel = [*PIP, "wheel", *alone, "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(wheel, check=True, capture_output=True, text=True, cwd=out)
    (built,) = out.iterdir()
    subprocess.run([*PIP, "install", *alone, "--no-compile", "--target", str(site), str(built)], check=True, cwd=out)
    return site


def ran(site: Path, folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """A command from the folder, with the wheel's modules before those of this environment."""
    env = environment(PYTHONPATH=str(site), PATH=f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([*map(str, command)], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def sources() -> dict[str, Path]:
    """The files of this checkout that a wheel has, by their paths in it."""
    trees = [("moco", "moco", "*.py"), ("configs", "moco/recipes", "*.yml")]
    trees += [("detection", "moco_detection", "*.py"), ("detection/configs", "moco_detection/configs", "*.yaml")]
    found = {"moco/py.typed": ROOT / "moco" / "py.typed"} | {f"moco/mains/{name}": ROOT / name for name in MAINS}
    for here, there, kind in trees:
        found |= {f"{there}/{path.relative_to(ROOT / here)}": path for path in (ROOT / here).rglob(kind)}
    del found["moco/mains/__init__.py"]  # leads to the mains of a checkout
    return found


@pytest.mark.slow
def test_it_has_two_packages_with_recipes_and_mains(site):
    (about,) = site.glob("*.dist-info")
    assert sorted(path.name for path in site.iterdir()) == ["bin", "moco", "moco_detection", about.name]
    assert sorted(path.name for path in (site / "bin").iterdir()) == COMMANDS
    found = [path for name in ("moco", "moco_detection") for path in (site / name).rglob("*") if path.is_file()]
    installed, expected = {str(path.relative_to(site)): path for path in found if path.suffix != ".pyc"}, sources()
    assert sorted(installed) == sorted(expected)
    assert [name for name in expected if installed[name].read_bytes() != expected[name].read_bytes()] == []


@pytest.mark.slow
def test_its_demo_runs_from_an_empty_folder_learns_and_shows_it(site, tmp_path):
    """`make demo`, shorter: the same commands, three epochs; what it prints is true and better than before."""
    said = ran(site, tmp_path, sys.executable, "-m", "moco.demo", "--epochs", 3).stdout
    commands = [line.split()[2] for line in said.splitlines() if line.startswith("$ ")]
    assert {(tmp_path / path).resolve() for path in commands} == {site / "moco" / "mains" / name for name in MAINS[:2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    found, run = {}, tmp_path / "runs" / "demo"
    for when in ("untrained", "pretrained"):
        files = (json.loads((run / when / name).read_text()) for name in ("knn.json", "result.json"))
        found[when] = knn, acc1 = tuple(file[name] for file, name in zip(files, ("knn", "acc1"), strict=True))
        assert f"{when:20s} {knn:6.1f} % {acc1:6.1f} %" in said
    assert min(after - before for before, after in zip(found["untrained"], found["pretrained"], strict=True)) > 8
    assert str(Path("runs", "demo", "embedding.png")) in "\n".join(said.splitlines()[-8:])
    with Image.open(run / "embedding.png") as image:
        assert image.width > 1000
    (knn,) = [record["knn"] for record in records(run) if "knn" in record]
    assert knn == pytest.approx(found["pretrained"][0], abs=1.5)  # bf16 where the CPU has it, fp32 in the probe


@pytest.mark.slow
@pytest.mark.dist
def test_its_commands_take_recipes_by_name(site, tmp_path):
    flags = "--config demo --steps 1 -j 0 --knn-every 0 --nproc 2 --save-dir run"
    done = ran(site, tmp_path, "moco-pretrain", *flags.split())
    told = f"demo: no such file, so the recipe {site / 'moco' / 'recipes' / 'demo.yml'} is used\n"
    assert done.stderr.count("no such file") == done.stderr.count(told) == 1  # of two processes
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 1
    probe = "--dataset mnist5k -a test_resnet --size 28 --features cached --epochs 1 -j 0 --save-dir probe"
    weights = next((tmp_path / "run").glob("*.pth.tar"))
    ran(site, tmp_path, "moco-lincls", *probe.split(), "--pretrained", weights)
    assert json.loads((tmp_path / "probe" / "result.json").read_text())["epochs"] == 1


@pytest.mark.slow
def test_detection_is_typed_as_a_path_in_either_place(site, tmp_path):
    for folder in (ROOT / "detection", site / "moco_detection"):
        for name, words, said in (
            ("train_net.py", ["--config-file", "nowhere.yaml"], f"--config-file takes one of {folder}/configs/."),
            ("run.py", ["--help"], f"usage: python {folder / 'run.py'} [-h]"),
        ):
            done = run_script(tmp_path, folder / name, *words)
            assert said in " ".join((done.stdout + done.stderr).split())
            assert done.returncode == (2 if name == "train_net.py" else 0)


def test_a_checkout_has_the_same_modules():
    for name in (name.removesuffix(".py") for name in MAINS):
        module = importlib.import_module(f"moco.mains.{name}")
        assert module.__file__ == str(ROOT / f"{name}.py") == resources.script(f"{name}.py")


@pytest.mark.parametrize("command", [console.pretrain, console.lincls, console.semisup])
def test_a_command_answers_a_wrong_flag_before_torch_is_imported(command, capsys, monkeypatch, restored):
    monkeypatch.setattr(sys, "argv", ["command", "--no-such-flag"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="2"):
        command()
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["synco_in1k_200ep", "synco_in1k_200ep.yml", "configs/synco_in1k_200ep.yml"])
def test_a_recipe_by_name(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "configs" / "synco_in1k_200ep.yml")
    assert cli.parse_pretrain(["--config", name, "DIR"]).n_hard == 1024
    assert capsys.readouterr().err == f"{name}: no such file, so the recipe {path} is used\n"
    Path(tmp_path, "synco_in1k_200ep").write_text("n-hard: 7")
    own = resources.find_recipe("synco_in1k_200ep")
    assert (own, capsys.readouterr().err) == ("synco_in1k_200ep", "")  # a file of the user's comes first


def test_extras_are_installed_where_this_project_came_from(monkeypatch):
    assert resources.extra("demo") == "pip install '.[demo]'"
    monkeypatch.setattr(resources, "INSTALLED", True)
    assert resources.extra("demo") == "pip install 'moco-hard-negatives[demo]'"


def test_a_sweep_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sweep(["linear", "--dry-run", "--", "DIR"]) == 0
    said = capsys.readouterr()
    assert "recipe" in said.err
    assert "runs/sweeps/linear/" in said.out


def test_a_name_that_is_neither_file_nor_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, hint in (
        ("mocov2_in1k", "did you mean moco_v2_in1k or moco_v1_in1k"),
        ("elsewhere/demo.yml", "did you mean demo\\?"),
        ("nothing", "the recipes are demo, mochi_in100, "),
    ):
        with pytest.raises(UserError, match=f"^{name} is neither a file nor a recipe of this project; {hint}"):
            resources.find_recipe(name)
