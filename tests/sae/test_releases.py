"""The registry of published SAEs against `sae_lens`'s own reading of it, the search, and the command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

import saekit
from saekit.cli import main
from saekit.errors import FileMissing, InvalidInput
from saekit.sae import releases as module
from saekit.sae.releases import registry, releases


@pytest.fixture(scope="module")
def theirs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    return get_pretrained_saes_directory()


def test_every_release_and_sae_is_as_sae_lens_reads_it(theirs) -> None:
    ours = registry()
    assert list(ours) == list(theirs)
    for name, release in ours.items():
        there = theirs[name]
        assert (release.model, release.repo_id, release.conversion) == (
            there.model,
            there.repo_id,
            there.conversion_func,
        )
        assert [sae.id for sae in release.saes] == list(there.saes_map)
        for sae in release.saes:  # sae_lens puts 0 and 1 where the registry says nothing
            assert (sae.l0 or 0.0) == there.expected_l0[sae.id]
            assert (1.0 if sae.explained_variance is None else sae.explained_variance) == (
                there.expected_var_explained[sae.id]
            )
            assert sae.neuronpedia == there.neuronpedia_id[sae.id]


def test_sites_are_those_that_the_converters_give(theirs) -> None:
    """For the converters that need not download anything to say."""
    import sae_lens.loading.pretrained_sae_loaders as loaders

    asked = {
        "gemma_2": loaders.get_gemma_2_config_from_hf,
        "gemma_2_transcoder": loaders.get_gemma_2_transcoder_config_from_hf,
        "qwen_scope": loaders.get_qwen_scope_config_from_hf,
        "goodfire": loaders.get_goodfire_config_from_hf,
    }
    compared = 0
    for release in registry().values():
        if convert := asked.get(release.conversion or ""):
            for sae in release.saes:
                config = convert(release.repo_id, theirs[release.name].saes_map[sae.id], "cpu")
                assert sae.site == config["hook_name"], (release.name, sae.id)
                compared += 1
    assert compared > 3000


def test_every_site_looks_like_one() -> None:
    sites = {site for release in registry().values() for site in release.sites}
    assert all(
        re.fullmatch(r"hook_embed|blocks\.\d+\.((attn|mlp|ln2)\.)?hook_[a-z_]+", site) for site in sites
    )
    known = [sae.site is not None for release in registry().values() for sae in release.saes]
    assert sum(known) / len(known) > 0.95
    jb = registry()["gpt2-small-res-jb"]
    assert jb.sites[2] == jb.saes[2].id == "blocks.2.hook_resid_pre"
    assert registry()["gpt2-small-hook-z-kk"].sites[0] == "blocks.0.attn.hook_z"


@pytest.mark.parametrize(
    ("query", "first", "count"),
    [
        ("gpt2-small-res-jb", "gpt2-small-res-jb", 1),  # an exact name, though others hold it
        ("GPT2 res JB", "gpt2-small-res-jb", None),
        ("gemma 2b canonical att", "gemma-scope-2b-pt-att-canonical", 1),
        ("jbloom/GPT2-Small-SAEs-Reformatted", "gpt2-small-res-jb", 1),  # a repository
        ("pythia-70m-deduped hook_mlp_out", "pythia-70m-deduped-mlp-sm", 1),  # an SAE's id
        ("lightsaber", None, 0),
        ("", None, None),
    ],
)
def test_all_words_have_to_be_there(query, first, count) -> None:
    found = saekit.releases(query)
    if first:
        assert found[0].name == first
    assert count is None or len(found) == count
    if not query:
        assert len(found) == len(registry())


def test_words_of_an_id_are_in_one_id_and_names_come_first() -> None:
    assert not releases("gpt2-small-res-jb blocks.2.hook_resid_pre blocks.3.hook_resid_pre")
    named = ["gemma-2-2b" in release.name for release in releases("gemma-2-2b")]  # others are of this model
    assert named == sorted(named, reverse=True)
    assert set(named) == {True, False}
    assert not registry()["temporal-sae-gemma-2-2b"].supported


def test_the_command_needs_neither_torch_nor_sae_lens() -> None:
    code = (
        "import sys; from saekit.cli import main; code = main(['releases', 'gpt2', '--json']); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'sae_lens', 'transformers')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout)) == len(releases("gpt2")[:20])


def test_the_command_lists_releases_and_saes(capsys) -> None:
    assert main(["releases", "gpt2", "res", "--limit", "2"]) == 0
    shown = capsys.readouterr()
    assert "gpt2-small-res" in shown.out
    assert "hook_resid_pre" in shown.out
    assert re.search(r"\d+ more: --limit \d+", shown.err)

    assert main(["releases", "gpt2-small-res-jb"]) == 0
    shown = capsys.readouterr()
    assert "gpt2-small/2-res-jb" in shown.out
    assert not shown.err

    assert main(["releases", "gpt2-small-res-jb", "--json", "--limit", "3"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["count"], len(record["saes"]), record["supported"]) == (13, 3, True)
    assert record["saes"][2] == {
        "id": "blocks.2.hook_resid_pre",
        "site": "blocks.2.hook_resid_pre",
        "neuronpedia": "gpt2-small/2-res-jb",
        "l0": 18.0,
        "explained_variance": 0.999,
    }
    assert main(["releases", "lightsaber"]) == 0
    assert "nothing found" in capsys.readouterr().out
    assert main(["releases", "lightsaber", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.fixture
def another_registry(monkeypatch, tmp_path):
    """Lets a test write its own registry; None for a machine without sae_lens."""
    registry.cache_clear()

    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])

    def use(content: str | None) -> None:
        if content is not None:
            (tmp_path / module.REGISTRY).write_text(content)
        found = package if content is not None else None
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: found)

    yield use
    registry.cache_clear()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileMissing, "part of sae_lens"),
        ("{", InvalidInput, "not a registry saekit understands"),
        ("[1]", InvalidInput, "not a registry saekit understands"),
        ("a: {model: m, repo_id: r}", InvalidInput, "KeyError: 'saes'"),
        ("a: !!python/object/apply:os.getpid []", InvalidInput, "not a registry saekit understands"),
    ],
)
def test_a_registry_that_is_not_there_or_not_one(another_registry, content, error, message) -> None:
    another_registry(content)
    with pytest.raises(error, match=message):
        releases("gpt2")
