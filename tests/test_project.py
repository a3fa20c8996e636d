"""The files about the project agree with one another and with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import dq_export

ROOT = Path(__file__).parent.parent
PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md")))


def test_one_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == dq_export.__version__
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[:2] == ["Unreleased", dq_export.__version__]


def test_the_workflow_runs_what_a_contributor_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job.get("steps", ()) if "run" in step]
    assert ".ci/run" in commands
    called = [job["uses"] for job in jobs.values() if "uses" in job]
    assert called == ["./.github/workflows/parity.yml"]
    assert (ROOT / called[0]).is_file()
    for path in re.findall(r"tests/[\w.]+", "\n".join(commands)):
        assert (ROOT / path).exists(), path
    pythons = {str(version) for version in jobs["parts"]["strategy"]["matrix"]["python"]}
    assert pythons | {"3.11"} == set(re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.cfg").read_text()))


def test_hooks_run_what_the_suite_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == [
        "ruff check",
        "ruff format",
        "mypy -p dq_export",
        "codespell",
        "proselint check",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        if re.match(r"\w+:", target):
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if heading:
            assert heading in headings(linked), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as Markdown's table of contents and GitHub make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text.lower()).strip()) for text in titles}
