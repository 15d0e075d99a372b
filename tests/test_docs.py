"""The pages in docs/ point at the code they describe, and CI runs the command that the README gives."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*\.md|)#([^)]+)\)", page.read_text()):
        lines = (page.parent / target if target else page).read_text().splitlines()
        headings = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines if line[:1] == "#"
        ]
        assert anchor in headings, (target, anchor)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_line_references_show_the_code_they_name(page):
    for code, file, line in re.findall(r"\[`([^`]+)`\]\(([^)#]+)#L(\d+)\)", page.read_text()):
        assert code in (page.parent / file).read_text().splitlines()[int(line) - 1], (code, line)


PAIRS = {"bpo_continuous_action.md", "bpo_atari_envpool.md", "bpo_locomotion.md", "gbpo_llm.md"}
LIMITS = dict.fromkeys(PAIRS | {"results.md", "benchmark.md"}, 150) | {"README.md": 120}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name in LIMITS], ids=lambda page: page.name)
def test_pages_are_short_and_those_of_pairs_have_the_same_headings(page):
    text = page.read_text()
    assert len(text.splitlines()) <= LIMITS[page.name]
    if page.name in PAIRS:
        assert re.findall("^## (.+)", text, re.M) == ["Use", "Metrics", "Details", "Results", "Not done"]


def test_ci_runs_the_test_commands_of_the_readme():
    commands = re.findall(r"python (-m pytest[^\n`]*)", (ROOT / "README.md").read_text())
    script = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2 and commands[1].endswith(" -m slow") and all(x in script for x in commands)
