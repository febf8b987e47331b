"""A wheel runs by itself: built from a copy of this checkout, installed into an empty folder, used from another one."""

import email
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, environment, records, run_script
from PIL import Image
from support.logs import words_of

import moco
from moco import cli, console, resources
from moco.errors import UserError
from moco.sweep.__main__ import main as sweep

MAINS = ["main_lincls.py", "main_pretrain.py", "main_semisup.py"]
TOP = ["setup.py", "pyproject.toml", "MANIFEST.in", *(f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING"))]
TOP += ["CITATION.cff", "LICENSE"]
PARTS = ["moco", "detection", "configs", *TOP, *MAINS]
COMMANDS = ["moco", "moco-lincls", "moco-pretrain", "moco-semisup"]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
ALONE = ["--no-deps", "--no-index"]  # no network: setuptools is in this environment


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what this project is built from."""
    folder = tmp_path_factory.mktemp("source")
    for part in (ROOT / name for name in PARTS):
        if part.is_dir():
            shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, folder)
    return folder


def wheel_of(source: Path, out: Path) -> Path:
    command = [*PIP, "wheel", *ALONE, "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return wheel_of(source, tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the installed wheel and nothing else."""
    site = tmp_path_factory.mktemp("site")
    install = [*PIP, "install", *ALONE, "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, cwd=site)
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
    trees += [("moco/pictures/assets", "moco/pictures/assets", "*"), ("moco/cli", "moco/cli", "*.txt")]
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


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist() if not name.endswith("/RECORD")}


@pytest.mark.slow
def test_a_source_distribution_gives_the_same_wheel(source, wheel, tmp_path):
    """And has what a checkout's commands need: moco/mains leads to the mains there."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert contents(wheel_of(archive, tmp_path)) == contents(wheel)
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {*TOP, *MAINS, "moco/mains/__init__.py", "configs/demo.yml"} <= names
    assert [name for name in names if name.startswith(("tests/", "build/", "moco/recipes"))] == []


@pytest.mark.slow
def test_it_says_what_it_is(site):
    """Everything that an index shows; of README.md no link that leads nowhere from there."""
    (about,) = site.glob("*.dist-info")
    told = email.message_from_string((about / "METADATA").read_text(encoding="utf-8"))
    named = ("Version", "Author", "License-Expression", "Requires-Python", "Description-Content-Type")
    expected = [moco.__version__, "The moco hard-negatives authors", "MIT", ">=3.10", "text/markdown"]
    assert [told[name] for name in named] == expected
    assert all(told.get_all(name) for name in ("Summary", "Keywords", "Classifier", "Project-URL", "License-File"))
    text = str(told.get_payload())
    assert text.lstrip().startswith((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0])
    assert "(https://arxiv.org/abs/2410.02401)" in text and "docs/running.md" in text
    assert re.findall(r"\]\((?!https?:|#).*?\)|(?:src|href)=.(?!https?:|#)[^>]*", text) == []


@pytest.mark.slow
def test_its_demo_runs_from_an_empty_folder_learns_and_shows_it(site, tmp_path):
    """`make demo`, shorter: the same commands, one epoch; what it prints is true and better than before."""
    said = ran(site, tmp_path, "moco", "demo", "--epochs", 1).stdout
    commands = [line.split()[1:3] for line in said.splitlines() if line.startswith("$ ")]
    assert commands == [["moco", name] for name in ("lincls", "lincls", "pretrain", "lincls", "lincls")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    found, run = {}, tmp_path / "runs" / "demo"
    for when in ("untrained", "pretrained"):
        files = (json.loads((run / when / name).read_text()) for name in ("knn.json", "result.json"))
        found[when] = knn, acc1 = tuple(file[name] for file, name in zip(files, ("knn", "acc1"), strict=True))
        assert f"{when:20s} {knn:6.1f} % {acc1:6.1f} %" in said
    knn, acc1 = (after - before for before, after in zip(found["untrained"], found["pretrained"], strict=True))
    # of six seeds, and in the rounding of two lesser processors: 2.8 to 12.4 points of k-NN, 27.7 to 35.7 of the probe
    assert knn > 0 and acc1 > 20
    assert str(Path("runs", "demo", "embedding.png")) in "\n".join(said.splitlines()[-8:])
    page = Path("runs", "demo", "report.html")
    assert said.splitlines()[-1].startswith(f"Open {page} in a browser")
    told = words_of(tmp_path / page)
    for part in (
        "demo",
        "untrained (linear probe)",
        "pretrained (k-NN)",
        "Loss relative to chance",
        "Pictures Embedding",
    ):
        assert part in told, part
    with Image.open(run / "embedding.png") as image:
        assert image.width > 1000
    (knn,) = [record["knn"] for record in records(run) if "knn" in record]
    assert knn == pytest.approx(found["pretrained"][0], abs=1.5)  # bf16 where the CPU has it, fp32 in the probe


@pytest.mark.slow
@pytest.mark.dist
def test_its_command_takes_recipes_by_name_starts_processes_and_is_started_by_torchrun(site, tmp_path):
    assert ran(site, tmp_path, "moco", "--version").stdout == f"moco {moco.__version__}\n"
    flags = "--config demo --steps 1 -j 0 --knn-every 0 --nproc 2 --save-dir run"
    done = ran(site, tmp_path, "moco", "pretrain", *flags.split())
    told = f"demo: no such file, so the recipe {site / 'moco' / 'recipes' / 'demo.yml'} is used\n"
    assert done.stderr.count("no such file") == done.stderr.count(told) == 1  # of two processes
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 1
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m moco lincls"
    probe = "--dataset mnist5k -a test_resnet --size 28 --features cached --epochs 1 -j 0 --save-dir probe"
    weights = next((tmp_path / "run").glob("*.pth.tar"))
    done = ran(site, tmp_path, sys.executable, *torchrun.split(), *probe.split(), "--pretrained", weights)
    assert "; 2 process" in done.stdout
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


def test_commands_are_shown_as_they_are_typed_where_this_project_is(monkeypatch):
    pretrain, own = resources.script("main_pretrain.py"), "/elsewhere/main_pretrain.py"
    assert resources.shown(os.path.relpath(pretrain), "my images") == "python main_pretrain.py 'my images'"
    monkeypatch.setattr(resources, "INSTALLED", True)
    assert resources.shown(os.path.relpath(pretrain), "my images") == "moco pretrain 'my images'"
    assert resources.shown(own, "DIR") == f"python {own} DIR"


def test_the_citation_is_valid_and_of_this_version():
    """By the Citation File Format's schema 1.2.0: the keys that it requires, and none that it does not know."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert (cited["cff-version"], str(cited["version"]), cited["type"]) == ("1.2.0", moco.__version__, "software")
    assert f'\nname = "{cited["title"].partition(":")[0]}"\n' in project
    assert f'\nlicense = "{cited["license"]}"\n' in project
    assert [f'authors = [{{ name = "{author["name"]}" }}]' in project for author in cited["authors"]] == [True]
    known = "cff-version message title abstract type version license authors keywords references date-released url"
    assert set(cited) <= {*known.split(), "repository-code"} and cited["message"]
    for work in cited["references"]:
        assert {"type", "title", "authors"} <= set(work)
        assert work["authors"] and all(person.keys() == {"family-names", "given-names"} for person in work["authors"])
        assert work["url"] in project


def test_the_version_is_in_one_place():
    """pyproject.toml reads moco.__version__, CITATION.cff is compared above."""
    files = [
        *ROOT.glob("*.py"),
        *(ROOT / "moco").rglob("*.py"),
        *(ROOT / name for name in ("pyproject.toml", "README.md")),
    ]
    found = [str(path.relative_to(ROOT)) for path in files if moco.__version__ in path.read_text(encoding="utf-8")]
    assert found == [os.path.join("moco", "__init__.py")]


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
