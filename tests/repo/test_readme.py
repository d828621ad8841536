"""What the README and the changelog say about the repository must be so."""

import re
from pathlib import Path

import pytest

from forkkv_cluster import __version__

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def packages() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "forkkv_cluster").glob("*/__init__.py"))


def test_the_layout_has_one_line_for_each_package():
    listed = re.findall(r"^\| `forkkv_cluster/(\w+)` \|", README, re.MULTILINE)
    assert sorted(listed) == packages()


def test_the_layout_has_one_line_for_each_folder_besides_the_package_and_the_tests():
    listed = re.findall(r"^\| `(\w+)/` \|", README, re.MULTILINE)
    hidden = {"build", "dist"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))} - hidden
    folders = {name for name in folders if not name.endswith(".egg-info")}
    assert set(listed) == folders - {"forkkv_cluster", "tests"}


def test_every_make_verb_that_the_readme_names_exists():
    verbs = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", README, re.MULTILINE)) | set(re.findall(r"`make ([a-z]+)", README))
    assert len(named) >= 4
    assert named <= verbs


@pytest.mark.parametrize("page", ["README.md", "loadtests/README.md"])
def test_every_file_that_a_page_links_to_or_runs_is_there(page: str):
    text = (ROOT / page).read_text()
    paths = re.findall(r"(?:loadtests|deploy|protos|forkkv_cluster/(?:testing|assets))/[\w./-]*\w", text)
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert paths
    for path in {*paths, *links}:
        assert (ROOT / path).exists(), path


def test_the_readme_says_how_the_command_gets_on_the_path_before_it_uses_it():
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    first_use = next(number for number, line in enumerate(lines) if line.startswith("forkkv "))
    assert any(line.startswith("source .venv/bin/activate") for line in lines[:first_use])


def test_every_configuration_key_that_the_readme_names_exists():
    from forkkv_cluster.core.config import ClusterConfig

    table = README.split("## Configuration")[1].split("## Results")[0]
    named = re.findall(r"`(\w+)\.(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
    assert len(named) >= 6
    for section, key in named:
        assert key in type(getattr(ClusterConfig(), section)).model_fields, f"{section}.{key}"


def test_the_changelog_keeps_unreleased_changes_on_top_and_knows_the_version():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert __version__ == re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
