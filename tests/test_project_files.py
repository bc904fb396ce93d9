"""What the files around the code say of it agrees: versions, Pythons, the test command."""

from __future__ import annotations

import re

import yaml

from .pages import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.MULTILINE)[1]
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    paper = citation["preferred-citation"]
    quoted = re.search(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert paper["title"] in quoted
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) == re.sub(r"\s+", " ", re.search(r"author\s*= \{(.*?)\}", quoted, re.DOTALL)[1])


def test_the_changelog_has_this_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == VERSION


def test_the_workflow_runs_the_test_command_on_every_python_and_every_week():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    # YAML 1.1 takes the key for a truth value.
    assert workflow[True]["schedule"]
    jobs = workflow["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == PYTHONS
    assert PYTHONS[0] == re.search(r'requires-python = ">=(.+)"', PROJECT)[1]
    for job in jobs.values():
        assert job["steps"][-1]["run"] == "bash scripts/test.sh"


def test_the_project_is_described_by_files_that_are_there():
    for name in re.findall(r'^(?:readme|license-files) = \[?"(.+?)"', PROJECT, re.MULTILINE):
        assert (ROOT / name).is_file()
    assert "](docs/assets/" in (ROOT / "README.md").read_text().split("\n## ")[0], "README opens with a picture"
    for picture in (ROOT / "docs/assets").iterdir():
        assert picture.stat().st_size < 300_000
