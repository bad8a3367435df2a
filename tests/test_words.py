"""Numbers in sentences."""

from camopd.words import counted


def test_counted_is_singular_for_one_alone():
    assert [counted(number, "step") for number in (0, 1, 2, 1234)] == ["0 steps", "1 step", "2 steps", "1,234 steps"]
