from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import FileMissing, InvalidInput
from saekit.recipe import LanguageModelRecipe, Recipe, parse_recipe, read_recipe, write_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
GOOD = {
    "name": "x",
    "model": "tiny",
    "data": {"text": "tiny"},
    "site": "blocks.3.hook_resid_pre",
    "sae": {"architecture": "topk", "d_sae": 64, "k": 4},
}


@pytest.fixture
def write(tmp_path):
    def put(text: str) -> Path:
        (tmp_path / "r.yaml").write_text(text)
        return tmp_path / "r.yaml"

    return put


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_in_the_repository_is_valid_and_explained(path) -> None:
    recipe = read_recipe(path)
    assert isinstance(recipe, (Recipe, LanguageModelRecipe))
    assert path.read_text().startswith("#"), "a recipe opens with what it shows and costs"


def test_every_mistake_is_listed_at_once_with_its_path() -> None:
    bad = GOOD | {
        "modl": 1,
        "sae": {"architecture": "topk", "d_sea": 1, "d_sae": -4},
        "training": {"lr": "fast", "token": 3},
    }
    with pytest.raises(InvalidInput) as caught:
        parse_recipe(bad)
    text = str(caught.value)
    for line in (
        "6 mistakes",
        "sae.d_sea: unknown key. Did you mean d_sae?",
        "sae.d_sae: Input should be greater than 0 (got -4)",
        "sae.k: missing",
        "training.lr: Input should be a valid number",
        "training.token: unknown key. Did you mean tokens",
        "modl: unknown key. Did you mean model?",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        ({"architecture": "topk", "d_sae": 4, "k": 9}, "k = 9 is more than d_sae = 4"),
        ({"architecture": "standard", "d_sae": 4, "k": 1}, "sae.k: unknown key"),
        ({"architecture": "relu", "d_sae": 4}, "expected tags: 'standard', 'topk'"),
        ({"architecture": "standard", "d_sae": True}, "got a boolean"),
    ],
)
def test_sae_sections(sae, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_recipe(GOOD | {"sae": sae})


def test_numbers_as_people_write_them(write) -> None:
    text = yaml.safe_dump(GOOD) + "training: {lr: 1e-4, tokens: 1_000_000, batch_size: 4e3}\n"
    recipe = read_recipe(write(text), ["training.tokens=5e5", "sae.d_sae=128", "data.shuffle=false"])
    assert (recipe.training.lr, recipe.training.tokens, recipe.training.batch_size) == (1e-4, 500_000, 4000)
    assert (recipe.sae.d_sae, recipe.data.shuffle) == (128, False)


def test_a_written_recipe_reads_back_the_same(tmp_path) -> None:
    recipe = parse_recipe(GOOD)
    write_recipe(tmp_path / "r.yaml", recipe)
    assert read_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "", "x" * 300, "a\0b", ".hidden"])
def test_names_that_leave_the_folder_are_refused(name) -> None:
    with pytest.raises(InvalidInput, match="name: "):
        parse_recipe(GOOD | {"name": name})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: 1\na: 2\n", "key a is given twice"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("- 1\n", "expected keys such as name"),
        ("a: [\n", "not valid YAML"),
        ("", "expected keys"),
    ],
)
def test_hostile_yaml(write, text, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_recipe(write(text))


def test_overrides_that_make_no_sense(write) -> None:
    path = write(yaml.safe_dump(GOOD))
    for override, message in (
        ("lr", "expected key=value"),
        ("name.x=1", "holds a value"),
        ("training.lr=[", "not a YAML value"),
    ):
        with pytest.raises(InvalidInput, match=message):
            read_recipe(path, [override])
    with pytest.raises(InvalidInput, match=r"trainin: unknown key\. Did you mean training"):
        read_recipe(path, ["trainin.lr=1"])
    with pytest.raises(FileMissing, match="recipe: .* does not exist"):
        read_recipe("nowhere.yaml")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda x: st.dictionaries(st.sampled_from([*GOOD, "training", "k"]), x, max_size=4),
        max_leaves=8,
    )
)
def test_any_mapping_is_a_recipe_or_one_error(value) -> None:
    if isinstance(value, dict):
        with pytest.raises(InvalidInput):
            parse_recipe({**value, "unknown": 1})
