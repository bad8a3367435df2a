"""One optimizer step as a value."""

import math

import pytest
import torch
from trainers import lines, make_trainer

from camopd.errors import CaMOPDError
from camopd.step import StepCallback, Trained, check_trained


def test_trained_samples_are_held_against_the_kept_ones():
    kept = {0: 3, 5: 1, 9: 2}
    one, other = Trained(), Trained()
    one.add([9, 0], torch.tensor([[True, True, False], [True, True, True]]))
    other.add([5], torch.tensor([[False, True]]))
    other.add([], torch.zeros(1, 1).bool())  # a dummy
    check_trained(kept, one.rows + other.rows)
    check_trained({}, [])
    for rows, message in (
        (one.rows, r"of 3 kept samples with 6 tokens, 2 samples with 5 tokens .* 1 not trained \(positions \[5\]\)"),
        (one.rows + 2 * other.rows, r"1 trained more than once \(positions \[5\]\)"),
        ([*one.rows, *other.rows, (7, 1)], r"1 trained but not kept \(positions \[7\]\)"),
        ([*one.rows, (5, 4)], r"1 trained with other tokens \(positions \[5\]\)"),
    ):
        with pytest.raises(CaMOPDError, match=message):
            check_trained(kept, rows)
    with pytest.raises(CaMOPDError, match="a dummy row has 2 tokens in the loss"):
        one.add([], torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match="zip"):
        one.add([1, 2], torch.ones(1, 2).bool())


def test_metric_that_is_undefined_is_not_sent_to_trackers(tmp_path, tokenizer):
    """TensorBoard warns of each."""

    class Measure(StepCallback):
        def on_step_closed(self, step):
            step.metrics |= {"some": [1.0, math.nan, 3.0][step.number], "none": math.nan}

    trainer = make_trainer(tmp_path, tokenizer, max_steps=3, logging_steps=3, callbacks=[Measure()])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["some"] == 2.0 and not [name for name, value in log.items() if value is None or value != value]
    assert [(line["some"], line["none"]) for line in lines(tmp_path)] == [(1.0, None), (None, None), (3.0, None)]


def test_callbacks_measure_into_the_line_of_the_step_whenever_they_were_added(tmp_path, tokenizer):
    class Measure(StepCallback):
        def __init__(self, name):
            self.name = name

        def on_step_closed(self, step):
            step.metrics[self.name] = step.number

    trainer = make_trainer(tmp_path, tokenizer, max_steps=2, callbacks=[Measure("mine/early")])
    trainer.add_callback(Measure("mine/late"))
    trainer.train()
    assert [(line["mine/early"], line["mine/late"]) for line in lines(tmp_path)] == [(0, 0), (1, 1)]
