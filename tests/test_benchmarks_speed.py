"""The machinery of `benchmarks.speed`: what is asked of whom and when, what becomes of failures, how ratios are taken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
print("what libraries print")
from benchmarks.speed_process import Task

def make(job, arrays):
    print("and more")
    if job["do"] == "raise":
        raise ValueError("no such thing\\nsecond line")
    if job["do"] == "die":
        raise SystemExit("gone for good")
    done = []
    return Task(lambda: done.append(1), lambda: {"done": len(done)})
"""


@pytest.fixture(autouse=True)
def _from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


class Fake:
    """A worker whose steps last what they are told; it notes when it is asked."""

    def __init__(self, name: str, seconds: list[float], asked: list[str], fails: bool = False) -> None:
        self.name, self.seconds, self.asked, self.fails = name, list(seconds), asked, fails

    def ask(self, **request: Any) -> dict[str, Any]:
        from benchmarks.speed_process import Failed

        if "open" in request and self.fails:
            raise Failed("ImportError: nothing there")
        if "steps" in request:
            self.asked.append(f"{self.name}{request['steps']}")
            return {"seconds": [self.seconds.pop(0) for _ in range(request["steps"])]}
        return {"memory_mb": 1.0} if "close" in request else {}


def row_of(names: str, **how: Any) -> Any:
    from benchmarks.speed_clocks import Contender, Row

    return Row("topk", 100, [(Contender(name, name), {}) for name in names], **how)


def test_a_child_answers_fails_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.speed_process import Failed, Worker

    (tmp_path / "a_child.py").write_text(CHILD, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    worker = Worker(sys.executable, "a_child", log, threads=1)
    try:
        with pytest.raises(Failed, match="^ValueError: no such thing$"):
            worker.ask(open={"do": "raise"})
        assert worker.ask(open={"do": "work"}) == {}
        assert len(worker.ask(steps=3)["seconds"]) == 3
        answer = worker.ask(close=True)
        assert answer["done"] == 3
        assert answer["memory_mb"] >= 0
        with pytest.raises(Failed, match="its process ended with 1: gone for good"):
            worker.ask(open={"do": "die"})
    finally:
        worker.stop()
    assert "what libraries print" in log.read_text("utf-8")


def test_contenders_take_turns_and_ratios_are_taken_round_by_round() -> None:
    from benchmarks.speed_clocks import measure

    asked: list[str] = []
    workers = {
        "a": Fake("a", [9, 9, 1, 1, 1, 2, 2, 2], asked),
        "b": Fake("b", [9, 9, 3, 3, 9, 8, 8, 0], asked),  # medians 3 and 8
    }
    row = row_of("ab", rounds=2, at_once=3, warm_up=2)
    entries = measure(row, lambda contender: workers[contender.name], quick=False)
    assert asked == ["a1", "a1", "b1", "b1", "a3", "b3", "a3", "b3"]
    assert row.ratios(entries) == {"b": (3.5, 3.0, 4.0)}
    assert entries[0].spread(False) == (1.5, 1, 2)


def test_slow_steps_are_timed_one_to_a_round_but_compiling_is_not_slowness() -> None:
    from benchmarks.speed_clocks import measure

    asked: list[str] = []
    workers = {
        "a": Fake("a", [5.0] * 8, asked),
        "b": Fake("b", [30.0, 20.0, 0.1, 0.1, 0.1, *[0.1] * 8], asked),
    }
    measure(row_of("ab", rounds=2), lambda contender: workers[contender.name], quick=False)
    assert asked == ["a1"] * 3 + ["b1"] * 5 + ["a1", "b4"] * 2


def test_who_fails_stays_in_the_row_with_its_reason() -> None:
    from benchmarks.speed import record
    from benchmarks.speed_clocks import measure

    workers = {"a": Fake("a", [1.0] * 9, []), "b": Fake("b", [], [], fails=True)}
    row = row_of("ab", rounds=2, at_once=2)
    entries = measure(row, lambda contender: workers[contender.name], quick=False)
    first, second = record(row, entries)["entries"]
    assert second == {"name": "b", "failed": "ImportError: nothing there"}
    assert first["tokens_per_second"] == 100.0
    assert row.ratios(entries) == {}


def test_what_is_not_installed_is_said() -> None:
    from benchmarks.speed import Workers
    from benchmarks.speed_clocks import Contender
    from benchmarks.speed_process import Failed

    with pytest.raises(Failed, match="not installed: no matching distribution"):
        Workers({"sparsify": "no matching distribution"}, ROOT, 1).of(
            Contender("sparsify autocast", "sparsify")
        )


def test_a_run_replaces_its_rows_and_leaves_the_others(tmp_path: Path) -> None:
    from benchmarks.speed import merged

    path = tmp_path / "speed.json"
    older = {
        "clocks": {
            "step": {"rows": [{"name": "x", "tokens": 1}, {"name": "y", "tokens": 2}]},
            "lm": {"rows": []},
        }
    }
    path.write_text(json.dumps(older), "utf-8")
    found = {"rates": {}, "rows": [{"name": "y", "tokens": 3}, {"name": "z", "tokens": 4}]}
    report = merged(path, "step", found)
    assert [(row["name"], row["tokens"]) for row in report["clocks"]["step"]["rows"]] == [
        ("x", 1),
        ("y", 3),
        ("z", 4),
    ]
    assert report["clocks"]["lm"] == {"rows": []}


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    from benchmarks.speed_plot import draw

    ratio = {"median": 3.0, "least": 2.5, "most": 3.5}
    rows = [{"name": "topk", "entries": [{"name": "saekit"}, {"name": "SAELens autocast", "ratio": ratio}]}]
    draw({"clocks": {"step": {"rows": rows}}}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    draw({"clocks": {}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
