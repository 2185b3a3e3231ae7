"""A part of `make fuzz` for each run of the tests; the seeds are fixed."""

from tests.fuzz.run import run

CASES = 1500


def test_mutated_files_are_refused_in_words_or_do_no_harm():
    found, wrong = run(CASES, first=1_000_000)
    assert not wrong, "\n".join(wrong)
    assert found["loaded"] > CASES // 20
    assert found["refused"] > CASES // 2
