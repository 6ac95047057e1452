"""Ranges for Nsight: nothing where they are off, and ended whatever happens where they are on."""

import pytest

from fairlead.observe.nvtx import around, asked, ranged


def test_off_a_function_stays_what_it_is() -> None:
    def step() -> None: ...

    assert ranged("step")(step) is step
    assert [asked({"FAIRLEAD_NVTX": text}) for text in ("", "0", "1")] == [False, False, True]


def test_on_each_call_is_a_range_that_ends_even_where_it_fails() -> None:
    said = []

    def half(number: int) -> float:
        return 1 / number

    marked = around(half, lambda number: f"half of {number}", lambda: (said.append, lambda: said.append("end")))
    assert marked(2) == 0.5
    with pytest.raises(ZeroDivisionError):
        marked(0)
    assert said == ["fairlead half of 2", "end", "fairlead half of 0", "end"]
    assert around(half, "half", lambda: None)(4) == 0.25
