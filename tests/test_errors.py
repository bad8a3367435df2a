"""Errors that every rank raises (camopd/errors.py)."""

import pytest

from camopd.errors import CaMOPDError, OtherRankError, TeacherError, on_all_ranks


@pytest.mark.parametrize("error", [ValueError("row 3 has no prompt"), TypeError("x"), TeacherError("gone")])
def test_error_of_this_rank_is_raised_as_it_is_and_told_to_the_others(error):
    told = []

    def gather(mine):
        told.extend(mine)
        return [*mine, None]

    with pytest.raises(type(error)) as raised, on_all_ranks(gather):
        raise error
    assert raised.value is error
    assert told == [(type(error), str(error))]


@pytest.mark.parametrize(
    ("theirs", "kind"),
    [
        (ValueError, ValueError), (TeacherError, TeacherError), (CaMOPDError, CaMOPDError),
        (OSError, OtherRankError), (KeyError, OtherRankError), (UnicodeDecodeError, OtherRankError),
    ],
)  # fmt: skip
def test_error_of_another_rank_is_raised_with_its_text(theirs, kind):
    with pytest.raises(kind, match="row 3") as raised, on_all_ranks(lambda mine: [*mine, (theirs, "row 3 is wrong")]):
        pass
    assert type(raised.value) is kind


def test_ranks_without_an_error_raise_nothing():
    with on_all_ranks(lambda mine: [*mine, None]):
        pass
