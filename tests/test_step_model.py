"""The model of the step: by hand, what must hold whatever the rates, and servers that sleep for a known time."""

import json
import math
import queue
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import step_model
from step_model import Rates, Stages, ends, finish_times, scored_at, seconds_a_step, stages


ONE = Rates(servers=1, slots=2, single=1.0, server=1.0, teacher=4.0, student=8.0, train=2.0)
SECONDS = st.floats(0, 100)
STEPS = st.lists(st.builds(Stages, SECONDS, SECONDS, SECONDS, SECONDS), min_size=2, max_size=6)
LENGTHS = st.lists(st.integers(0, 50), min_size=1, max_size=12)
RATES = st.builds(
    Rates, st.integers(1, 4), st.integers(1, 4), *[st.floats(0.5, 20)] * 2, *[st.floats(0.5, 50)] * 3
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- by hand


def test_finish_times_of_three_completions_on_two_slots():
    """The first two share a rate of 1 until the short one has its 2 tokens at second 4; the third comes in and has its
    one at 6, when the first has 3 of its 5 tokens and goes on alone."""
    assert finish_times([5, 2, 1], ONE) == [8, 4, 6]
    assert finish_times([5, 2, 1], ONE._replace(servers=2)) == [5.5, 2.5, 1.5]  # 2/3 each, then 1
    assert finish_times([5, 2, 1], ONE._replace(servers=3)) == [5, 2, 1]  # each as if alone
    assert finish_times([5, 2, 1], ONE._replace(slots=1)) == [5, 7, 8]
    assert finish_times([], ONE) == [] and finish_times([0, 3], ONE) == [0, 3]


def test_stages_of_a_step_by_hand():
    """The three of before with prompts of 3: 8, 5 and 4 tokens. A teacher at 4 a second is done with the second and
    third long before the first is there at 8, and takes 2 s for it; all 17 take 4.25 s where it may only begin
    then."""
    lengths = [3, 3, 3], [5, 2, 1]
    assert stages(*lengths, 0.5, ONE) == Stages(8, 17 / 4, 17 / 8, 17 / 4)
    assert stages(*lengths, 0.5, ONE, streaming=True) == Stages(8, 2, 17 / 8, 17 / 4)
    assert stages(*lengths, 1.0, ONE, streaming=True, idle_trainer=True) == Stages(8, 2, 1, 17 / 2)
    assert stages(*lengths, 1.0, ONE._replace(student=math.inf)).student == 0


def test_steps_one_after_the_other_and_one_ahead_by_hand():
    step = Stages(rollout=10, teacher=3, student=2, train=4)
    assert ends([step] * 3, sync=1) == [17, 35, 53]
    # One ahead: the servers begin at 11, are done at 21; the trainer, free at 18, waits for them.
    assert ends([step] * 3, sync=1, lag=1) == [18, 29, 40]
    assert seconds_a_step([step], sync=1, lag=1) == 11
    # Where training is longer, the servers wait for it: 1 + 3 + 20.
    assert seconds_a_step([step._replace(train=20)], sync=1, lag=1) == 24
    # Teachers that score in the meantime are done by then, and the student's second is left.
    assert seconds_a_step([step._replace(train=20, student=1)], sync=1, lag=1, streaming=True) == 22
    with pytest.raises(ValueError, match="lag is 0 or 1, not 2"):
        ends([step], lag=2)


# ---------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=40, deadline=None)
@given(STEPS, SECONDS)
def test_step_ahead_takes_the_longest_stage_at_least_and_all_of_them_at_most(steps, sync):
    after, ahead = ends(steps, sync), ends(steps, sync, lag=1)
    trainer = sum(max(step.teacher, step.student) + step.train for step in steps)
    rollout = sum(step.rollout for step in steps)
    close = 1e-9 * (1 + after[-1])
    for found in (after, ahead):
        assert found[-1] + close >= max(rollout, trainer) + (len(steps) - 1) * sync
    assert after[-1] == pytest.approx(rollout + trainer + (len(steps) - 1) * sync)
    assert ahead[-1] <= after[-1] + sync + close  # it syncs before its first step as well
    assert sorted(ahead) == ahead


@settings(max_examples=40, deadline=None)
@given(STEPS, SECONDS, st.sampled_from([0, 1]))
def test_step_is_never_longer_with_streaming(steps, sync, lag):
    plain, streamed = ends(steps, sync, lag), ends(steps, sync, lag, streaming=True)
    assert all(one <= other + 1e-9 * (1 + other) for one, other in zip(streamed, plain, strict=True))


@settings(max_examples=40, deadline=None)
@given(LENGTHS, RATES)
def test_finish_times_are_never_later_with_more_servers(lengths, rates):
    few, more = finish_times(lengths, rates), finish_times(lengths, rates._replace(servers=rates.servers + 1))
    assert all(one <= other * (1 + 1e-9) + 1e-9 for one, other in zip(more, few, strict=True))
    assert all(found >= length / rates.single * (1 - 1e-9) for found, length in zip(more, lengths, strict=True))
    assert max(few) >= sum(lengths) / (rates.servers * rates.server) * (1 - 1e-9)  # nothing is decoded for free


@settings(max_examples=40, deadline=None)
@given(LENGTHS, RATES, st.floats(0, 1))
def test_stages_with_more_servers_or_streaming_or_fewer_kept_are_never_longer(lengths, rates, kept):
    prompts = [7] * len(lengths)

    def whole(kept, rates, streaming=False):
        step = stages(prompts, lengths, kept, rates, streaming, idle_trainer=streaming)
        return step.rollout + max(step.teacher, step.student) + step.train

    close = 1e-9 * (1 + whole(1.0, rates))
    assert whole(kept, rates) <= whole(1.0, rates) + close
    assert whole(kept, rates, streaming=True) <= whole(kept, rates) + close
    for streaming in (False, True):
        more = rates._replace(servers=rates.servers + 1)
        assert whole(kept, more, streaming) <= whole(kept, rates, streaming) + close


@settings(max_examples=40, deadline=None)
@given(LENGTHS, RATES)
def test_stages_with_streaming_hide_all_but_what_comes_last(lengths, rates):
    """What is left when the last completion is there is at most all, and at least the last one itself."""
    prompts = [7] * len(lengths)
    finished = finish_times(lengths, rates)
    last = min(length for length, time in zip(lengths, finished, strict=True) if time == max(finished))
    plain, streamed = (stages(prompts, lengths, 1.0, rates, streaming).teacher for streaming in (False, True))
    assert (7 + last) / rates.teacher * (1 - 1e-6) - 1e-9 <= streamed <= plain * (1 + 1e-9) + 1e-9
    assert scored_at([0.0] * len(lengths), lengths, rates.teacher) == pytest.approx(sum(lengths) / rates.teacher)


# --------------------------------------------------------------------------------------------------------- fake servers


def run_with_sleeping_servers(steps, sync, lag, streaming):
    """When each step is trained, in seconds: servers and teachers are threads that sleep, the trainer asks and sleeps."""
    asked, done, for_teacher, scored = (queue.Queue() for _ in range(4))

    def servers():
        while (step := asked.get()) is not None:
            time.sleep(step.rollout)
            done.put(step)
            if streaming:
                for_teacher.put(step)

    def teachers():
        while (step := for_teacher.get()) is not None:
            time.sleep(step.teacher)
            scored.put(step)

    threads = [threading.Thread(target=work) for work in (servers, teachers)]
    for thread in threads:
        thread.start()
    started, found = time.perf_counter(), []
    asked.put(steps[0])
    for number, step in enumerate(steps):
        done.get()
        following = steps[number + 1] if number + 1 < len(steps) else None
        if lag:
            time.sleep(sync)
            asked.put(following)
        if not streaming:
            for_teacher.put(step)
        time.sleep(step.student)
        scored.get()
        time.sleep(step.train)
        found.append(time.perf_counter() - started)
        if not lag:
            time.sleep(sync)
            asked.put(following)
    for_teacher.put(None)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("streaming", [False, True])
def test_ends_are_those_of_servers_with_known_latencies(lag, streaming):
    steps = [
        Stages(0.40, 0.16, 0.08, 0.12), Stages(0.12, 0.08, 0.20, 0.32), Stages(0.32, 0.12, 0.04, 0.08),
        Stages(0.20, 0.24, 0.08, 0.20),
    ]  # fmt: skip
    # A sleep is never too short. On a busy machine it is too long, by what does not grow with it.
    for slower in (1, 1, 2, 4, 8):
        times = [Stages(*(slower * seconds for seconds in step)) for step in steps]
        expected = ends(times, slower * 0.04, lag, streaming)
        found = run_with_sleeping_servers(times, slower * 0.04, lag, streaming)
        assert all(one >= other - 1e-3 for one, other in zip(found, expected, strict=True))
        if all(one <= 1.1 * other for one, other in zip(found, expected, strict=True)):
            return
    pytest.fail(f"{found} is more than a tenth above {expected}")


def step_with_sleeping_servers(prompts, completions, rates, streaming):
    """Seconds until the last completion is there, and until the teacher has scored all: every slot has a thread that sleeps
    for a sequence's tokens, the teacher one that sleeps for those of a request."""
    waiting, for_teacher, finished, later = queue.SimpleQueue(), queue.SimpleQueue(), [], []
    for request in zip(prompts, completions, strict=True):
        waiting.put(request)

    def slot():
        while True:
            try:
                prompt, completion = waiting.get_nowait()
            except queue.Empty:
                return
            time.sleep(completion / rates.single)
            finished.append(time.perf_counter() - started)
            (for_teacher.put if streaming else later.append)(prompt + completion)

    def teacher():
        for _ in prompts:
            time.sleep(for_teacher.get() / rates.teacher)

    started = time.perf_counter()
    slots = [threading.Thread(target=slot) for _ in range(rates.servers * rates.slots)]
    scoring = threading.Thread(target=teacher)
    for thread in [*slots, scoring]:
        thread.start()
    for thread in slots:
        thread.join()
    for tokens in later:
        for_teacher.put(tokens)
    scoring.join()
    return max(finished), time.perf_counter() - started


@pytest.mark.parametrize("streaming", [False, True])
def test_stages_are_those_of_servers_with_known_latencies(streaming):
    """Two servers of two slots each, which never slow each other down; the teacher is behind when the last one comes."""
    prompts, completions = [10] * 7, [5, 12, 9, 20, 7, 3, 11]
    for slower in (1, 1, 2, 4, 8):
        rates = Rates(
            servers=2,
            slots=2,
            single=25 / slower,
            server=50 / slower,
            teacher=62.5 / slower,
            student=math.inf,
            train=1,
        )
        step = stages(prompts, completions, 1.0, rates, streaming)
        expected = step.rollout, step.rollout + step.teacher
        found = step_with_sleeping_servers(prompts, completions, rates, streaming)
        assert all(one >= other - 1e-3 for one, other in zip(found, expected, strict=True))
        if all(one <= 1.1 * other for one, other in zip(found, expected, strict=True)):
            return
    pytest.fail(f"{found} is more than a tenth above {expected}")


# ------------------------------------------------------------------------------------------------------------- of a run


def write(path, rows):
    """Lines of metrics.jsonl: rollout, score, train, and where there is a fourth what the servers took to write."""
    names = ("time/rollout", "time/score", "time/train", "time/rollout/writing")
    path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=False))) for row in rows) + "\n")
    return path


def test_run_without_lag_is_held_to_one_with_it(tmp_path, capsys):
    """A warm-up and four steps; one ahead they take as long as the rollout, 10 s, of which the trainer's 7 s are a part.
    In the run that was one ahead, the trainer waited 4 s for what the servers took 10.5 s to write."""
    run = write(tmp_path / "run.jsonl", [(99, 99, 99), *[(10, 3, 4)] * 4])
    lagged = write(tmp_path / "lagged.jsonl", [(99, 99, 99, 99), *[(4, 3, 4, 10.5)] * 4])
    step_model.main([str(run), "--against", str(lagged)])
    printed = capsys.readouterr().out
    assert "one after the other, measured | 17.00 |" in printed
    assert "one step ahead, predicted | 10.00 |" in printed
    assert "the same, predicted from its own stages | 10.50 |" in printed
    assert f"measured in {lagged} | 11.00 |" in printed
    assert "measured / predicted: 1.100; by its own stages 1.048" in printed


def test_run_of_too_few_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has 1 steps after the first 1; at least 2 are needed"):
        step_model.of_run(write(tmp_path / "run.jsonl", [(1, 1, 1), (1, 1, 1)]))
