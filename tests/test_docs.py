"""What the pages show is what runs: every Python block, and the commands of the README.

A page's blocks run in order in one namespace, in an empty folder. What the blocks of some pages print stands in their
``text`` blocks.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWS_WHAT_IT_PRINTS = {ROOT / "docs" / "memory.md"}
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def python_blocks(page: str) -> list[tuple[int, str, str]]:
    """Line number of the first line, info string and text of every fenced block that says it is Python."""
    return [
        (page.count("\n", 0, match.start("body")), match["info"].strip(), match["body"])
        for match in FENCE.finditer(page)
        if re.match(r"\s*(py|python)\d?\b", match["info"], re.IGNORECASE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # a real module, so that classes of the page pickle and dataclasses find their annotations
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    text, printed = page.read_text(encoding="utf-8"), []
    for line, _, body in python_blocks(text):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            # empty lines before the block: a traceback names the line of the page
            exec(compile("\n" * line + body, page, "exec"), module.__dict__)
        printed += [output.getvalue()] if output.getvalue() else []
    if page in SHOWS_WHAT_IT_PRINTS:
        assert printed == [match["body"] for match in FENCE.finditer(text) if match["info"] == "text"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_block_is_excused(page: Path) -> None:
    excused = [
        (line, info) for line, info, _ in python_blocks(page.read_text(encoding="utf-8")) if info != "python"
    ]
    assert not excused, (
        f"{page.name}: a Python block is marked ```python and nothing else, so that it runs: {excused}"
    )


def test_blocks_are_found_with_their_lines() -> None:
    page = "# Title\n\n```python\nx = 1\n```\n\n```text\nnot code\n```\n```python no-run\ny\n```\n"
    assert python_blocks(page) == [(3, "python", "x = 1\n"), (10, "python no-run", "y\n")]


def readme_commands() -> list[str]:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    return [
        line for match in FENCE.finditer(page) if match["info"] == "sh" for line in match["body"].splitlines()
    ]


def test_first_screen_holds_the_two_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:30])
    job, check = readme_commands()[:2]
    assert job in first_screen
    assert check in first_screen
    for command in (job, check):
        assert command.startswith("python3 -m venv .venv && ")
        assert "pip install torch==" in command
    assert job.endswith("python -m benchmarks.savings")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    shown = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--show"], capture_output=True, text=True, check=True
    )
    command = shown.stdout.strip()
    assert command == readme_commands()[1]
    for step in ("ruff check", "ruff format --check", "mypy", "pytest"):
        assert f"&& {step}" in command


def test_the_savings_table_is_the_last_result() -> None:
    # python -m benchmarks.savings --out benchmarks/results, and its savings.txt goes into the README as it is
    assert (ROOT / "benchmarks" / "results" / "savings.txt").read_text(encoding="utf-8") in (
        ROOT / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", prose)
    assert not [link for link in links if not (page.parent / link).exists()]
