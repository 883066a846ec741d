"""The golden cases: see tests/golden.py."""

import pytest

from tests import golden


@pytest.mark.parametrize("path", golden.all_cases(), ids=lambda path: str(path.relative_to(golden.CASES)))
def test_case_runs_and_answers_as_written(path):
    before, after, complaints = golden.run_case(path)
    assert not complaints, "\n\n".join(complaints)
    assert after == before
