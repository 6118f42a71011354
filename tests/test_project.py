"""What the files around the code say of the project."""

import ast
import tomllib
from collections.abc import Iterator

import pytest
import yaml

from medsynth import __version__
from tests.conftest import REPOSITORY
from tests.test_architecture import SOURCES

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


def _is_text(call: ast.Call, name: str) -> bool:
    """Whether a call opens, reads or writes text, by its name and mode."""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return "text" in keywords or "universal_newlines" in keywords
    if name not in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        return False
    of_module = isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)
    place = 0 if isinstance(call.func, ast.Attribute) and not of_module else 1  # Path(…).open(mode), open(file, mode)
    modes = [keywords.get("mode"), *call.args[: place + 1]]
    said = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    binary = any("b" in mode for mode in said if set(mode) <= set("rwxab+t"))
    return not binary and name in ("open", "fdopen")


def text_without_encoding(source: str) -> Iterator[int]:
    """The lines of calls that read or write text in whatever encoding the locale has."""
    elsewhere = {"Image", "tarfile", "webbrowser", "os"}  # their open takes no text
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            foreign = isinstance(owner, ast.Name) and owner.id in elsewhere and name == "open"
            if not foreign and _is_text(node, name) and "encoding" not in {keyword.arg for keyword in node.keywords}:
                yield node.lineno


def test_all_text_has_its_encoding():
    found = {
        f"{path}:{line}"
        for path in [*SOURCES, *(REPOSITORY / "benchmarks").glob("*.py")]
        for line in text_without_encoding((REPOSITORY / path).read_text(encoding="utf-8"))
    }
    assert not found, "the locale of a container is often C"


@pytest.mark.parametrize(
    ("source", "is_text"),
    [
        ("path.read_text()", True),
        ("path.open()", True),
        ("path.open('w')", True),
        ("open(path)", True),
        ("subprocess.run(['git'], text=True)", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open('rb')", False),
        ("path.open('a+b', buffering=0)", False),
        ("open(path, 'wb')", False),
        ("Image.open(path)", False),
        ("subprocess.run(['git'])", False),
    ],
)
def test_text_is_known(source, is_text):
    assert list(text_without_encoding(source)) == [1] * is_text
