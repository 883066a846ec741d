"""What every test may use. A test that needs root says so with the marker `root` and is skipped, aloud, without it."""

import os

import pytest

IS_ROOT = os.geteuid() == 0


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("root") and not IS_ROOT:
            item.add_marker(pytest.mark.skip(reason="needs root and network namespaces: sudo make test"))


def pytest_terminal_summary(terminalreporter):
    """Figures that tests measured, for people: see the fixture `figure`."""
    for text in getattr(terminalreporter.config, "figures", []):
        terminalreporter.write_line(f"measured: {text}")


@pytest.fixture
def figure(request):
    """figure("text"): print a measured figure at the end of the run."""
    request.config.figures = getattr(request.config, "figures", [])
    return request.config.figures.append
