"""docs/published.md against the recipes of configs/: every recipe occurs, and the page and a recipe's comment agree."""

import re

import pytest
import yaml
from conftest import ROOT

from moco import cli

TEXT = (ROOT / "docs" / "published.md").read_text(encoding="utf-8")
RECIPES = sorted((ROOT / "configs").glob("*.yml"))
PERCENT = r"\d\d\.\d\b"
PARSE = {"main_pretrain.py": cli.parse_pretrain, "main_lincls.py": cli.parse_lincls}


def comment(recipe) -> str:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return " ".join(line for line in lines if line.startswith("#"))


def rows(recipe) -> list[list[str]]:
    """The cells of each row that aims a recipe at a number, up to and with the recipe's."""
    found = []
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        place = [i for i, cell in enumerate(cells) if f"(../configs/{recipe.name})" in cell]
        if line.startswith("|") and place:
            found.append(cells[: place[0] + 1])
    return found


@pytest.mark.parametrize(
    "recipe", [*RECIPES, *sorted((ROOT / "configs" / "sweeps").glob("*.yml"))], ids=lambda p: p.stem
)
def test_every_recipe_occurs(recipe):
    assert f"(../{recipe.relative_to(ROOT)})" in TEXT


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_the_numbers_of_the_page_are_those_of_the_recipes_comment(recipe):
    aimed = {number for cells in rows(recipe) if len(cells) > 1 for number in re.findall(PERCENT, cells[-3])[:1]}
    said = set(re.findall(PERCENT + r"(?=[\d ./]*%)", comment(recipe)))
    assert aimed <= said, "on the page alone"
    assert said <= {number for cells in rows(recipe) for number in re.findall(PERCENT, " ".join(cells))}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_row_has_the_epochs_of_its_recipe(recipe):
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for cells in rows(recipe):
        epochs = [cell for cell in cells[:-1] if cell.isdecimal()]
        asked = re.findall(r"--epochs (\d+)", cells[-1]) or [str(settings["epochs"])]
        assert epochs in ([], asked), cells


def test_the_commands_parse():
    lines = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
    assert len(lines) == 5
    for _, script, *words in map(str.split, lines):
        if script in PARSE:
            PARSE[script](words)


def test_every_source_is_listed():
    assert set(re.findall(r"\[\d+\]", TEXT.split("## Sources")[0])) == set(re.findall(r"^\| (\[\d+\])", TEXT, re.M))
