"""The README's Python runs as it stands there, on fewer tokens."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FEWER = {
    '"training.tokens=200_000"': '"training.tokens=16_384", "training.evaluate_tokens=1_000"',
    "max_tokens=100_000": "max_tokens=6_000",
}


def test_the_ten_lines(tmp_path, monkeypatch, capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 1
    code = blocks[0]
    for written, fewer in FEWER.items():
        assert code.count(written) == 1
        code = code.replace(written, fewer)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "feature " in said
    assert "Mike pulls out his" in said
    assert (tmp_path / "site" / "index.html").is_file()
    assert (tmp_path / "checkpoints" / "mine" / "final" / "cfg.json").is_file()


def test_every_local_link_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
