"""What the files around the code say of the project."""

import tomllib

import pytest
import yaml

from medsynth import __version__
from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CITATION = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
FORMS = sorted(path for path in (REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
KINDS = {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def test_there_is_one_version():
    assert CITATION["version"] == PROJECT["version"] == __version__


def test_the_changelog_has_the_version():
    headings = [line for line in (REPOSITORY / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]"
    assert any(heading.startswith(f"## [{__version__}] - ") for heading in headings)


def test_the_citation_has_what_its_format_requires():
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys()
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert CITATION["license"] == PROJECT["license"]
    assert all(author["name"] for author in CITATION["authors"])


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_are_as_github_reads_them(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and form.keys() <= {"name", "description", "title", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    assert (
        len({field["id"] for field in fields}) == len({field["attributes"]["label"] for field in fields}) == len(fields)
    )
    for field in form["body"]:
        assert field["type"] in KINDS and field.keys() <= {"type", "id", "attributes", "validations"}
        if field["type"] == "markdown":
            assert field.keys() == {"type", "attributes"} and field["attributes"]["value"]
        if field["type"] == "dropdown":
            options = field["attributes"]["options"]
            assert len(set(options)) == len(options) and all(isinstance(option, str) for option in options)
        assert isinstance(field.get("validations", {}).get("required", False), bool)
