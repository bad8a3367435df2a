"""A teacher with the student's weights rounds as the student does, under each launcher."""

import pytest
from launches import launch


@pytest.mark.parametrize("config", ["zero2", "fsdp2"])
@pytest.mark.slow
def test_teacher_with_the_students_weights_has_gaps_of_exactly_0_in_bfloat16(config, tmp_path):
    """Both launchers cast the float32 weights that were loaded, each in its way, and the teacher's must be cast alike."""
    (line,) = launch(
        config, tmp_path, "--max_steps", "1", "--schedule", "domain:1,general:1", "--save_strategy", "no", bf16=True
    )  # the domain's teacher is the student's own folder
    assert line["branch"] == "domain"
    assert line["gap/domain/abs_mean"] == line["gap/domain/abs_p99"] == line["loss"] == 0
