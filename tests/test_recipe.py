from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saekit.errors import FileMissing, InvalidInput
from saekit.recipe import LanguageModelRecipe, Recipe, differences, parse_recipe, read_recipe, write_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
GOOD = {
    "name": "x",
    "model": "tiny",
    "data": {"text": "tiny"},
    "site": "blocks.3.hook_resid_pre",
    "sae": {"architecture": "topk", "d_sae": 64, "k": 4},
}

TOPK = GOOD["sae"]
MATRYOSHKA = {"architecture": "matryoshka", "d_sae": 64, "k": 4}


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
        (
            {"architecture": "relu", "d_sae": 4},
            "sae: .*expected tags: 'standard', 'topk', 'batchtopk', 'matry",
        ),
        ({"architecture": "gated", "d_sae": 4, "k": 2}, "sae.k: unknown key"),
        ({"architecture": "batchtopk", "d_sae": 4}, "sae.k: missing"),
        (
            MATRYOSHKA | {"prefixes": [8, 8, 64]},
            "increase strictly and end with d_sae = 64, got \\[8, 8, 64\\]",
        ),
        (MATRYOSHKA | {"prefixes": [8, 32]}, "end with d_sae = 64, got \\[8, 32\\]"),
        (MATRYOSHKA | {"prefixes": [0, 64]}, "sae.prefixes.0: Input should be greater than 0"),
        (MATRYOSHKA | {"skip": True}, "only a transcoder has one"),
        (MATRYOSHKA | {"target_site": "a", "site": ["b", "c"]}, "not both at once"),
        (MATRYOSHKA | {"target_site": "a", "site": "a"}, "it is the site that is read"),
        (MATRYOSHKA | {"target_site": GOOD["site"]}, "sae.target_site: it is the recipe's site"),
        (MATRYOSHKA | {"site": ["a", "a"]}, "sae.site: .*at least two different ones"),
        (MATRYOSHKA | {"training": {"context": 3}}, "sae.training.context: unknown key"),
        ({"architecture": "standard", "d_sae": True}, "got a boolean"),
    ],
)
def test_sae_sections(sae, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_recipe(GOOD | {"sae": sae})


def named(*sections: dict) -> list[str]:
    return [member.name for member in parse_recipe(GOOD | {"sae": list(sections)}).members]


def test_a_lists_members_are_named_after_what_differs() -> None:
    standard = {"architecture": "standard", "d_sae": 64}
    assert named(TOPK) == ["topk"]
    assert named(TOPK, TOPK | {"k": 8}) == ["k4", "k8"]
    assert named(TOPK, standard) == ["topk", "standard"]
    assert named(TOPK, TOPK | {"k": 8, "d_sae": 128}, standard) == [
        "topk-d_sae64-k4",
        "topk-d_sae128-k8",
        "standard",
    ]
    assert named(standard, standard | {"training": {"lr": "1e-5"}}) == ["standard", "lr1e-05"]
    assert named(TOPK | {"name": "Mine"}, TOPK) == ["Mine", "topk"]
    assert named(TOPK, TOPK | {"site": ["a", "b"]}, TOPK | {"target_site": "m", "skip": True}) == [
        "topk",
        "a-b",
        "m-skip",
    ]
    assert named(MATRYOSHKA, MATRYOSHKA | {"d_sae": 32}) == ["d_sae64", "d_sae32"]
    assert named(MATRYOSHKA, MATRYOSHKA | {"prefixes": [4, 64]}) == ["matryoshka", "prefixes4-64"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((None, None), "sae.1.name: 'topk' is that of sae.0 too"),
        (("a", "b", "A"), "sae.2.name: 'A' is that of sae.0 too"),
        (("step-3", "b"), "sae.0.name: 'step-3' cannot be its folder's"),
        (("a", "Final"), "sae.1.name: 'Final' cannot be its folder's"),
        (("pareto.png", "a"), "sae.0.name: 'pareto.png' cannot be its folder's"),
        (("a", "report.html"), "sae.1.name: 'report.html' cannot be its folder's"),
        (("a", "report.png"), "sae.1.name: 'report.png' cannot be its folder's"),
        (("wandb", "metrics.jsonl"), "2 mistakes\n  sae.0.name: 'wandb' .*\n  sae.1.name: 'metrics.jsonl'"),
        (("../x", "b"), "sae.0.name: String should match pattern"),
    ],
)
def test_members_names_are_folders_of_their_own(names, message) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_recipe(GOOD | {"sae": [TOPK | ({"name": name} if name else {}) for name in names]})


def test_every_mistake_in_a_list_is_told_with_its_place() -> None:
    bad = [
        {"architecture": "topk", "d_sae": 8},
        {"architecture": "relu", "d_sae": 8},
        TOPK | {"kk": 1, "training": {"tokens": 5, "ring": 9, "lr": "fast", "leaning": 1}},
    ]
    with pytest.raises(InvalidInput) as caught:
        parse_recipe(GOOD | {"sae": bad, "seed": -1})
    lines = str(caught.value).splitlines()
    assert lines[0] == "recipe recipe: 8 mistakes"
    for line in (
        "sae.0.k: missing",
        "sae.1: Input tag 'relu' found",
        "sae.2.kk: unknown key. Did you mean k?",
        "sae.2.training.tokens: all SAEs of a run share one stream: set it in the recipe's `training` (got 5)",
        "sae.2.training.ring: all SAEs of a run share one stream",
        "sae.2.training.lr: Input should be a valid number",
        "sae.2.training.leaning: unknown key",
        "seed: Input should be greater",
    ):
        assert [told for told in lines if told.startswith(f"  {line}")], line
    for empty in ([], [[]], 3):
        with pytest.raises(InvalidInput, match=r"sae"):
            parse_recipe(GOOD | {"sae": empty})


def test_a_member_takes_the_recipes_values_where_it_has_none(write) -> None:
    text = yaml.safe_dump(
        GOOD
        | {
            "seed": 3,
            "training": {"lr": 1e-3, "target_l0": 20},
            "sae": [
                {"architecture": "standard", "d_sae": 64},
                TOPK | {"seed": 4, "site": ["a", "b"], "training": {"lr": "2e-3", "target_l0": None}},
                TOPK | {"target_site": "c", "name": "across"},
            ],
        }
    )
    recipe = read_recipe(
        write(text), ["sae.1.k=8", "sae.2.training={lr: 1}", "sae.1.site.0=z", "training.tokens=5e5"]
    )
    one, two, three = recipe.members
    assert (one.seed, one.sites, one.training.lr, one.training.target_l0) == (3, (GOOD["site"],), 1e-3, 20)
    assert (two.seed, two.sites, two.training.lr, two.training.target_l0) == (4, ("z", "b"), 2e-3, None)
    assert two.section.k == 8
    assert (three.sites, three.target_site, three.training.lr, three.name) == (
        (GOOD["site"],),
        "c",
        1.0,
        "across",
    )
    assert {member.training.tokens for member in recipe.members} == {500_000}
    assert recipe.sites == (GOOD["site"], "z", "b", "c")
    write_recipe(write("").with_name("again.yaml"), recipe)
    assert read_recipe(write("").with_name("again.yaml")) == recipe


def test_a_site_is_the_recipes_or_each_saes() -> None:
    without = {key: value for key, value in GOOD.items() if key != "site"}
    with pytest.raises(InvalidInput, match=r"sae\.1\.site: missing"):
        parse_recipe(without | {"sae": [TOPK | {"site": "a"}, TOPK]})
    assert parse_recipe(without | {"sae": TOPK | {"site": "a"}}).sites == ("a",)
    assert parse_recipe(GOOD | {"site": ["a", "b"]}).members[0].is_crosscoder
    with pytest.raises(
        InvalidInput, match=r"sae\.target_site: a transcoder reads one site, the recipe's are 2"
    ):
        parse_recipe(GOOD | {"site": ["a", "b"], "sae": TOPK | {"target_site": "c"}})


def test_matryoshka_prefixes_are_spelled_out() -> None:
    def prefixes(d_sae: int) -> tuple[int, ...]:
        return parse_recipe(GOOD | {"sae": MATRYOSHKA | {"d_sae": d_sae}}).sae.prefixes

    assert prefixes(64) == (8, 16, 32, 64)
    assert prefixes(100) == (12, 25, 50, 100)
    assert prefixes(5) == (1, 2, 5)


def test_differences_are_told_by_place() -> None:
    old, new = (parse_recipe(GOOD | {"sae": [TOPK, TOPK | {"k": k}]}) for k in (8, 9))
    assert differences(old, new, ()) == [("sae.1.k", 8, 9)]
    longer = parse_recipe(GOOD | {"sae": [TOPK, TOPK | {"k": 8}, TOPK | {"k": 2}]})
    assert ("sae.2.k", None, 2) in differences(old, longer, ())


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
    path = write(yaml.safe_dump(GOOD | {"sae": [TOPK, TOPK | {"k": 8}]}))
    for override, message in (
        ("lr", "expected key=value"),
        ("name.x=1", "holds a value"),
        ("training.lr=[", "not a YAML value"),
        ("sae.2.k=3", r"a list of 2 stands there; expected a number 0 … 1, got '2'"),
        ("sae.k=3", "a list of 2 stands there"),
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
