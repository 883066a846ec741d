"""The documents' links lead somewhere, and the references are whole."""

import re
from pathlib import Path

import pytest

import agent
import kube
import mncni
import nodeipam

ROOT = Path(__file__).resolve().parents[2]
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS = sorted(path.relative_to(ROOT) for path in [*TOP, *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md")])


def text_of(path):
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", (ROOT / path).read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """The names that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path):
    dead = []
    for link in re.findall(r"\]\(([^)]+)\)", text_of(path)):
        target, _, anchor = link.partition("#")
        place = (ROOT / path.parent / target).resolve() if target else ROOT / path
        is_dead = not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place))
        if "://" not in link and is_dead:
            dead.append(link)
    return dead


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_commands_are_in_fenced_blocks(path):
    """tests/docs runs these; it does not see a block that is only indented."""
    assert not re.findall(r"^ {4}.*", text_of(path), re.MULTILINE)


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings(path):
    assert not dead_links(path)


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](page.md#one) [b](page.md#two) [c](none.md) [d](https://example.com/none)\n")
    assert dead_links(page) == ["page.md#two", "none.md"]


def test_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page, names", [
    ("docs/agent.md", [row[0] for row in (*agent.FLAGS, *nodeipam.FLAGS)]),
    ("docs/observe.md", [*agent.METRICS, *nodeipam.METRICS, *kube.METRICS]),
    ("docs/plugin.md", list(mncni.PLUGINS)),
])
def test_a_reference_has_every_flag_metric_and_plugin(page, names):
    text = (ROOT / page).read_text()
    assert [name for name in names if f"`{name}" not in text] == []
