"""What a wheel carries, and that it works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        wheel.extractall(out / "site")
    return out / "site"


def test_a_wheel_carries_the_embedded_model_and_the_page(unpacked) -> None:
    tiny = unpacked / "saekit" / "embedded_files" / "tiny"
    for part in ("model/model.safetensors", "model/tokenizer.json", "sae/cfg.json", "catalog/catalog.json"):
        assert (tiny / part).is_file(), part
    assert list((tiny / "tokens").glob("*.tokens.safetensors"))
    assert (unpacked / "saekit" / "embedded_files" / "recipes" / "tiny.yaml").is_file()
    assert (unpacked / "saekit" / "catalog" / "page" / "files" / "index.html").is_file()
    assert not list(unpacked.rglob("tests"))


def test_it_works_from_anywhere(unpacked, tmp_path) -> None:
    code = (
        "import saekit, sys; assert 'embedded_files' in str(saekit.Catalog.open('tiny').path);"
        "f = saekit.Catalog.open('tiny').search('Jedi')[0]; m = saekit.load_model('tiny');"
        "print(saekit.compare(m, 'Mike pulls out his', f.add(0.5, unit='norm'), max_new_tokens=3).kl > 0)"
    )
    env = os.environ | {"PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_nothing_tracked_speaks_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    homes = tuple("/".join(("", part, "")) for part in ("home", "root", "Users"))
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".yaml", ".json", ".toml", ".txt", ".js", ".html"}
            and path.is_file()
        ):
            text = path.read_text("utf-8", errors="replace")
            assert not any(home in text for home in homes), name
