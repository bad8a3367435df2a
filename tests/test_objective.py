"""Eq. 1-9: golden vectors, numbers worked by hand, the exact reverse KL, and what must not change the result."""

import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from camopd.objective import (
    distillation_loss,
    gap_scores,
    importance_weights,
    select_by_mass,
    token_gaps,
)


GOLDEN = json.loads((Path(__file__).parent / "golden_vectors.json").read_text())
LOG2 = math.log(2)
SEEDS = range(8)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual, expected, tolerance=1e-12):
    expected = expected if isinstance(expected, torch.Tensor) else double(expected)
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance)


def random_batch(seed, rows=7, width=6):
    """(teacher, student, rollout, mask), right-padded; row 0 is full, the others have 1 to `width` tokens."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (-3 * torch.rand(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    rollout = student + 0.4 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    lengths[0] = width
    return teacher, student, rollout, torch.arange(width) < lengths[:, None]


def loss_and_gradient(teacher, student, rollout, mask, scale=2.0, num_kept=None):
    """Eq. 9 as the trainer computes it, with the gradient with respect to the student's log-probs."""
    student = student.detach().clone().requires_grad_()
    weights = importance_weights(student, rollout, mask, 0.5, 2.0)
    loss = distillation_loss(student, token_gaps(teacher, student, mask), weights, mask, scale, num_kept or len(mask))
    loss.backward()
    return loss.detach(), student.grad


# --- golden vectors ---


@pytest.mark.parametrize("case", GOLDEN["selection"], ids=lambda case: f"{len(case['scores'])}rows-rho{case['rho']}")
def test_golden_selection(case):
    selection = select_by_mass(double(case["scores"]), case["rho"])
    assert selection.kept.tolist() == case["selected"]
    assert selection.kept.dtype == torch.int64
    assert selection.degenerate == (case["status"] == "degenerate")


def test_golden_gaps_and_scores():
    golden = GOLDEN["scores"]
    mask = torch.ones(1, 4, dtype=torch.bool)
    gaps = token_gaps(double([golden["teacher_p"]]).log(), double([golden["student_p"]]).log(), mask)
    assert_equal(gaps, [golden["gap"]])
    assert_equal(gap_scores(gaps, mask, "absolute"), [golden["s_abs"]])
    assert_equal(gap_scores(gaps, mask, "positive"), [golden["s_pos"]])


@pytest.mark.parametrize(
    "key, low, high", [("eps_0_5_2_0", 0.5, 2.0), ("eps_0_5_5", 0.5, 5.0), ("eps_0_2_5", 0.2, 5.0)]
)
def test_golden_importance_weights_of_three_bands(key, low, high):
    # exp(log(r)) need not be r to the last digit, and some ratios lie on a bound: go 1e-12 inside, towards 1.
    # A ratio exactly on a bound is the subject of `test_importance_bounds_are_inclusive`.
    ratios = double(GOLDEN["w_t"]["ratio"])
    nudge = torch.where(ratios < 1, 1 + 1e-12, 1 - 1e-12)
    train = (ratios * nudge).log()[None]
    weights = importance_weights(train, torch.zeros_like(train), torch.ones_like(train, dtype=torch.bool), low, high)
    assert_equal(weights, [GOLDEN["w_t"][key]], tolerance=1e-10)


def test_golden_loss_and_gradient():
    golden = GOLDEN["loss"]
    # The last token of row 1 is padding: s_abs is the mean over two tokens, and its A and ratio belong to no token.
    mask = torch.tensor([[True, True, True], [True, True, False]])
    student = double(golden["student_lp"])
    teacher = student + double(golden["A"])
    rollout = student - double(golden["ratio"]).log()

    gaps = token_gaps(teacher, student, mask)
    weights = importance_weights(student, rollout, mask, 0.5, 2.0)
    assert_equal(gaps, double(golden["A"]) * mask)
    assert_equal(weights, golden["w"])
    assert_equal(gap_scores(gaps, mask, "absolute"), golden["s_abs"])
    assert_equal(gap_scores(gaps, mask, "positive"), golden["s_pos"])

    # Token (0, 0) comes from the logits [0.3, 0, 0.5] and y = 0: 0.3 - log(e^0.3 + e^0 + e^0.5) = -1.0859...
    logits = double([0.3, 0.0, 0.5]).requires_grad_()
    logp = logits.log_softmax(dim=0)[0]
    assert_equal(logp.detach(), student[0, 0])
    student = torch.cat([logp[None], student.flatten()[1:]]).view(2, 3)
    both = distillation_loss(student, gaps, weights, mask, scale=2.0, num_kept=2)
    first = distillation_loss(student[:1], gaps[:1], weights[:1], mask[:1], scale=2.0, num_kept=1)
    assert_equal(both.detach(), golden["loss_both_r2"])
    assert_equal(first.detach(), golden["loss_sel0_r2"])
    both.backward()
    assert_equal(logits.grad, golden["grad_0_0"])


# --- worked by hand ---

# Two rows, padded to three columns; L = log 2.
#             row 0 (T = 2)        row 1 (T = 1)
#   teacher   1/2     1/8          1/2
#   student   1/4     1/4          1/8
#   gap A     L       -L           2L
TEACHER = double([[1 / 2, 1 / 8, 1.0], [1 / 2, 1.0, 1.0]]).log()
STUDENT = double([[1 / 4, 1 / 4, 1.0], [1 / 8, 1.0, 1.0]]).log()
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_gap_is_teacher_minus_student_and_zero_outside_the_mask():
    garbage = STUDENT.masked_fill(~MASK, -5.0)
    assert_equal(token_gaps(TEACHER, garbage, MASK), [[LOG2, -LOG2, 0], [2 * LOG2, 0, 0]])


def test_scores_are_means_over_the_completion_not_over_the_padding():
    gaps = token_gaps(TEACHER, STUDENT, MASK)
    # |A|: (L + L) / 2 = L and 2L / 1.   max(A, 0): (L + 0) / 2 = L / 2 and 2L / 1.
    assert_equal(gap_scores(gaps, MASK, "absolute"), [LOG2, 2 * LOG2])
    assert_equal(gap_scores(gaps, MASK, "positive"), [LOG2 / 2, 2 * LOG2])


def test_loss_and_gradient_worked_by_hand():
    student = STUDENT.clone().requires_grad_()
    weights = double([[1.0, 1.5, 0.0], [0.5, 0.0, 0.0]])
    loss = distillation_loss(student, token_gaps(TEACHER, student, MASK), weights, MASK, scale=2.0, num_kept=2)
    loss.backward()
    # row 0: w A log pi = 1 * L * -2L = -2L^2 and 1.5 * -L * -2L = 3L^2, mean L^2 / 2.   row 1: 0.5 * 2L * -3L = -3L^2.
    # loss = -(r / |S|) (L^2 / 2 - 3 L^2) = -(2 / 2) * -2.5 L^2
    assert_equal(loss.detach(), 2.5 * LOG2**2)
    # d/d log pi = -r w A / (|S| T_i): row 0: -2 * 1 * L / 4 and -2 * 1.5 * -L / 4.   row 1: -2 * 0.5 * 2L / 2.
    assert_equal(student.grad, [[-LOG2 / 2, 0.75 * LOG2, 0], [-LOG2, 0, 0]])


def test_scale_may_differ_between_rows():
    # As above with w = 1: row 0: (-2L^2 + 2L^2) / 2 = 0 and row 1: 2L * -3L = -6L^2. r = (2, 5): -(5 * -6L^2) / 2.
    gaps, ones = token_gaps(TEACHER, STUDENT, MASK), MASK.double()
    loss = distillation_loss(STUDENT, gaps, ones, MASK, scale=double([2.0, 5.0]), num_kept=2)
    assert_equal(loss, 15 * LOG2**2)


def test_tokens_of_weight_zero_count_in_the_length():
    # Row 0 with w = (1, 0): -(L * -2L + 0) / 2 = L^2, and not 2L^2.
    gaps = token_gaps(TEACHER, STUDENT, MASK)[:1]
    loss = distillation_loss(STUDENT[:1], gaps, double([[1.0, 0.0, 0.0]]), MASK[:1], scale=1.0, num_kept=1)
    assert_equal(loss, LOG2**2)


def test_loss_uses_negative_gaps_that_the_positive_score_ignores():
    # Only the second token of row 0, gap -L: score 0, gradient -A / T = L / 1, which pushes the token down.
    mask = torch.ones(1, 1, dtype=torch.bool)
    student = STUDENT[:1, 1:2].clone().requires_grad_()
    gaps = token_gaps(TEACHER[:1, 1:2], student, mask)
    assert gap_scores(gaps, mask, "positive").tolist() == [0.0]
    distillation_loss(student, gaps, mask.double(), mask, scale=1.0, num_kept=1).backward()
    assert_equal(student.grad, [[LOG2]])


def test_empty_completion_scores_zero_and_adds_nothing_to_loss_and_gradient():
    mask = torch.cat([MASK, torch.zeros(1, 3, dtype=torch.bool)])
    teacher, student = (torch.cat([logps, torch.full((1, 3), math.nan).double()]) for logps in (TEACHER, STUDENT))
    gaps = token_gaps(teacher, student, mask)
    assert gap_scores(gaps, mask, "absolute")[2] == 0
    assert gap_scores(gaps, mask, "positive")[2] == 0
    loss, gradient = loss_and_gradient(teacher, student, None, mask, num_kept=2)
    loss_without, gradient_without = loss_and_gradient(TEACHER, STUDENT, None, MASK, num_kept=2)
    assert torch.equal(loss, loss_without)
    assert torch.equal(gradient, torch.cat([gradient_without, torch.zeros(1, 3).double()]))


def test_scores_are_float64_so_that_long_completions_keep_their_small_gaps():
    # 2^25 + 101 has 26 significant bits, float32 holds 24.
    gaps = torch.cat([torch.tensor([[2.0**25]]), torch.ones(1, 101)], dim=1)
    scores = gap_scores(gaps, torch.ones(1, 102, dtype=torch.bool), "absolute")
    assert scores.dtype == torch.float64
    assert scores.item() * 102 == 2**25 + 101


# --- the exact reverse KL ---


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_gradient_of_one_token_is_that_of_the_exact_reverse_kl(seed):
    torch.manual_seed(seed)
    teacher = torch.randn(5, dtype=torch.float64).log_softmax(dim=0)
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    student = logits.log_softmax(dim=0)

    exact = (student.exp() * (student - teacher)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)

    # Every y of the vocabulary is one row of length 1; `scale` weighs it by pi_student(y).
    logps, mask = student[:, None], torch.ones(5, 1, dtype=torch.bool)
    loss = distillation_loss(
        logps, token_gaps(teacher[:, None], logps, mask), mask.double(), mask, student.detach().exp(), num_kept=1
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() > 0.01
    assert_equal(gradient, exact_gradient)
    assert_equal(loss.detach(), -(student.exp() * (teacher - student) * student).sum().detach())


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_gradient_of_two_tokens_is_that_of_the_exact_token_level_reverse_kl(seed):
    # The advantage of Eq. 1 is the gap of this token alone, so a token is not credited for the gaps that follow it:
    # the exact objective is the sum over t of KL(student || teacher | h_t) under the student's own, *fixed* prefixes.
    # Eq. 9 has 1/T = 1/2 in front. Both positions share one head, so that their gradients meet in it.
    torch.manual_seed(seed)
    teacher_1 = torch.randn(5, dtype=torch.float64).log_softmax(dim=0)
    teacher_2 = torch.randn(5, 5, dtype=torch.float64).log_softmax(dim=1)
    features_1 = torch.randn(3, dtype=torch.float64)
    features_2 = torch.randn(5, 3, dtype=torch.float64)  # of the history y_1
    head = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    student_1 = (features_1 @ head).log_softmax(dim=0)  # log pi(y_1)
    student_2 = (features_2 @ head).log_softmax(dim=1)  # log pi(y_2 | y_1)

    prefix = student_1.detach().exp()
    kl_1 = (student_1.exp() * (student_1 - teacher_1)).sum()
    kl_2 = (prefix * (student_2.exp() * (student_2 - teacher_2)).sum(dim=1)).sum()
    (exact_gradient,) = torch.autograd.grad((kl_1 + kl_2) / 2, head, retain_graph=True)

    def rows(first, second):
        return torch.stack([first[:, None].expand(5, 5), second], dim=-1).view(25, 2)

    logps, mask = rows(student_1, student_2), torch.ones(25, 2, dtype=torch.bool)
    probability = logps.detach().sum(dim=1).exp()
    assert_equal(probability.sum(), 1.0)
    gaps = token_gaps(rows(teacher_1, teacher_2), logps, mask)
    loss = distillation_loss(logps, gaps, mask.double(), mask, scale=probability, num_kept=1)
    (gradient,) = torch.autograd.grad(loss, head)
    assert gradient.abs().max() > 0.01
    assert_equal(gradient, exact_gradient)


# --- Eq. 1 ---


def test_gaps_and_weights_carry_no_gradient():
    student = STUDENT.clone().requires_grad_()
    teacher = TEACHER.clone().requires_grad_()
    assert not token_gaps(teacher, student, MASK).requires_grad
    for mode in ("mask", "truncate", "none"):
        assert not importance_weights(student, teacher, MASK, 0.5, 2.0, mode).requires_grad
    assert not importance_weights(student, None, MASK, 0.5, 2.0).requires_grad


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_treats_gap_and_weight_as_constants(seed):
    teacher, student, rollout, mask = random_batch(seed)
    _, gradient = loss_and_gradient(teacher, student, rollout, mask)
    weights = importance_weights(student, rollout, mask, 0.5, 2.0)
    lengths = mask.sum(dim=1, keepdim=True)
    assert_equal(gradient, -2.0 * weights * (teacher - student) * mask / lengths / len(mask))


@pytest.mark.parametrize("seed", SEEDS)
def test_teacher_equal_to_student_gives_exactly_zero(seed):
    _, student, rollout, mask = random_batch(seed)
    gaps = token_gaps(student.clone(), student, mask)
    loss, gradient = loss_and_gradient(student.clone(), student, rollout, mask)
    assert torch.equal(gaps, torch.zeros_like(gaps))
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert select_by_mass(gap_scores(gaps, mask, "positive"), 0.8).degenerate


@pytest.mark.parametrize("garbage", [math.nan, -math.inf, math.inf, 1e30])
@pytest.mark.parametrize("mode", ["mask", "truncate", "none"])
@pytest.mark.parametrize("seed", range(3))
def test_padding_may_hold_anything(seed, mode, garbage):
    def run(teacher, student, rollout):
        student = student.clone().requires_grad_()
        gaps = token_gaps(teacher, student, mask)
        weights = importance_weights(student, rollout, mask, 0.5, 2.0, mode)
        loss = distillation_loss(student, gaps, weights, mask, 2.0, len(mask))
        loss.backward()
        scores = [gap_scores(gaps, mask, kind) for kind in ("absolute", "positive")]
        return [gaps, weights, loss.detach(), student.grad, *scores]

    teacher, student, rollout, mask = random_batch(seed)
    clean = run(*(logps.masked_fill(~mask, 0.0) for logps in (teacher, student, rollout)))
    dirty = run(*(logps.masked_fill(~mask, garbage) for logps in (teacher, student, rollout)))
    assert all(torch.isfinite(value).all() for value in dirty)
    assert all(torch.equal(value, expected) for value, expected in zip(dirty, clean, strict=True))
    assert (dirty[3][~mask] == 0).all()


# --- w_t ---


def weights_of_ratios(ratios, mode, low=0.5, high=2.0):
    train = double([ratios]).log()
    mask = torch.ones_like(train, dtype=torch.bool)
    return importance_weights(train, torch.zeros_like(train), mask, low, high, mode)


def test_mask_mode_zeroes_what_lies_outside_and_truncate_mode_clamps_it():
    ratios = [0.1, 0.6, 1.0, 1.9, 7.0]
    assert_equal(weights_of_ratios(ratios, "mask"), [[0.0, 0.6, 1.0, 1.9, 0.0]])
    assert_equal(weights_of_ratios(ratios, "truncate"), [[0.5, 0.6, 1.0, 1.9, 2.0]])
    assert_equal(weights_of_ratios(ratios, "none"), [[1.0] * 5])


def test_mask_is_the_default_mode():
    train, mask = double([[0.1, 0.6]]).log(), torch.ones(1, 2, dtype=torch.bool)
    assert_equal(importance_weights(train, torch.zeros_like(train), mask, 0.5, 2.0), [[0.0, 0.6]])


def test_weight_is_trainer_over_rollout_engine():
    # pi_theta = 1/2, mu_theta = 1/3: 3/2
    train, rollout, mask = double([[1 / 2]]).log(), double([[1 / 3]]).log(), torch.ones(1, 1, dtype=torch.bool)
    assert_equal(importance_weights(train, rollout, mask, 0.5, 2.0), [[1.5]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [-1.5, -0.7, 0.0, 0.3, 1.6])
def test_importance_bounds_are_inclusive(log_ratio, dtype):
    train, mask = torch.tensor([[log_ratio]], dtype=dtype), torch.ones(1, 1, dtype=torch.bool)
    rollout, ratio = torch.zeros_like(train), float(train.exp())
    for low, high in [(ratio, ratio), (ratio, 10.0), (0.0, ratio)]:
        assert importance_weights(train, rollout, mask, low, high).item() == ratio
    assert importance_weights(train, rollout, mask, ratio * (1 + 1e-6), 10.0).item() == 0
    assert importance_weights(train, rollout, mask, 0.0, ratio * (1 - 1e-6)).item() == 0


@pytest.mark.parametrize("mode", ["mask", "truncate", "none"])
def test_importance_weight_without_rollout_logps_is_one_on_the_mask(mode):
    weights = importance_weights(STUDENT, None, MASK, 0.5, 2.0, mode)
    assert torch.equal(weights, MASK.double())


@pytest.mark.parametrize("mode", ["mask", "truncate", "none"])
def test_single_token_without_rollout_logp_has_weight_one(mode):
    # Ratios 1.5, unknown, and a padded token which is unknown as well.
    train = double([[0.5, 0.5, 0.5]]).log()
    rollout = torch.cat([double([[1 / 3]]).log(), torch.full((1, 2), math.nan).double()], dim=1)
    weights = importance_weights(train, rollout, torch.tensor([[True, True, False]]), 0.5, 2.0, mode)
    assert_equal(weights, [[1.0 if mode == "none" else 1.5, 1.0, 0.0]])


def test_token_that_the_engine_calls_impossible_is_masked_or_truncated():
    train, rollout, mask = double([[-1.0]]), double([[-math.inf]]), torch.ones(1, 1, dtype=torch.bool)
    assert importance_weights(train, rollout, mask, 0.5, 2.0, "mask").item() == 0.0
    assert importance_weights(train, rollout, mask, 0.5, 2.0, "truncate").item() == 2.0


def test_importance_mode_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match=r"mode must be one of \('mask', 'truncate', 'none'\), got 'clip'\."):
        importance_weights(STUDENT, TEACHER, MASK, 0.5, 2.0, "clip")


# --- Eq. 6-7 ---


def test_score_kind_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match=r"kind must be one of \('absolute', 'positive'\), got 'abs'\."):
        gap_scores(torch.zeros(1, 3), MASK[:1], "abs")


@pytest.mark.parametrize("seed", SEEDS)
def test_positive_score_never_exceeds_the_absolute_one(seed):
    teacher, student, _, mask = random_batch(seed)
    gaps = token_gaps(teacher, student, mask)
    absolute, positive = gap_scores(gaps, mask, "absolute"), gap_scores(gaps, mask, "positive")
    assert (positive >= 0).all()
    assert (positive <= absolute).all()
    # |x| = max(x, 0) + max(-x, 0)
    assert_equal(positive + gap_scores(-gaps, mask, "positive"), absolute)


# --- Eq. 8 ---


@pytest.mark.parametrize("seed", range(40))
def test_selection_is_the_shortest_prefix_in_exact_arithmetic(seed):
    # Whole-number scores with many ties, and rho a fraction that a prefix often hits exactly.
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 40, (1,), generator=generator))
    scores = torch.randint(0, 6, (count,), generator=generator)
    scores[int(torch.randint(count, (1,), generator=generator))] = 5
    for rho in (Fraction(1, 10), Fraction(3, 10), Fraction(1, 2), Fraction(3, 5), Fraction(4, 5), Fraction(1)):
        order = sorted(range(count), key=lambda row: (-int(scores[row]), row))
        expected, mass = [], 0
        for row in order:
            expected.append(row)
            mass += int(scores[row])
            if Fraction(mass, int(scores.sum())) >= rho:
                break
        selection = select_by_mass(scores.double(), float(rho))
        assert selection.kept.tolist() == expected
        assert not selection.degenerate


def test_rounding_does_not_ask_for_one_row_more():
    # The running sums of five scores of 0.7 are 0.7999999999999999 of the total at the fourth, in float64.
    assert select_by_mass(double([0.7] * 5), 0.8).kept.tolist() == [0, 1, 2, 3]
    assert select_by_mass(double([0.1] * 10), 0.3).kept.tolist() == [0, 1, 2]
    for score in (0.1, 0.3, 0.7, 1 / 3):
        for count in range(1, 30):
            for asked in range(1, count + 1):
                assert len(select_by_mass(double([score] * count), asked / count).kept) == asked


def test_ties_go_to_the_earlier_row():
    assert select_by_mass(double([1, 2, 1, 2, 1]), 0.7).kept.tolist() == [1, 3, 0]
    assert select_by_mass(torch.ones(1000), 0.8).kept.tolist() == list(range(800))  # long enough for an unstable sort
    ties = double([3, 1] * 500)
    assert select_by_mass(ties, 0.75).kept.tolist() == list(range(0, 1000, 2))


def test_full_mass_target_drops_only_rows_that_score_zero():
    assert select_by_mass(double([0, 4, 0, 3, 0]), 1.0).kept.tolist() == [1, 3]
    assert select_by_mass(double([2, 4, 1, 3, 5]), 1.0).kept.tolist() == [4, 1, 3, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_that_are_many_and_small_are_not_lost_in_the_running_sum(dtype):
    # One score of 2^26 and a thousand of 1, of which half are asked for. Float32 counts in steps of 8 up there.
    scores = torch.ones(1001, dtype=dtype)
    scores[700] = 2.0**26
    kept = select_by_mass(scores, (2**26 + 500) / (2**26 + 1000)).kept
    assert kept.tolist() == [700, *range(500)]


def test_rows_that_are_not_valid_never_enter():
    scores = double([math.nan, 1.0, 100.0, 3.0, 0.0])
    valid = torch.tensor([False, True, False, True, True])
    # Mass 4 of which row 3 holds 0.75.
    assert select_by_mass(scores, 0.75, valid).kept.tolist() == [3]
    assert select_by_mass(scores, 0.8, valid).kept.tolist() == [3, 1]
    assert select_by_mass(scores, 1.0, valid).kept.tolist() == [3, 1]
    assert not select_by_mass(scores, 1.0, valid).degenerate


def test_selection_without_mass_keeps_every_valid_row_and_says_so():
    selection = select_by_mass(double([0.0, 7.0, 0.0]), 0.8, torch.tensor([True, False, True]))
    assert selection.kept.tolist() == [0, 2]
    assert selection.degenerate


@pytest.mark.parametrize("scores", [[], [1.0, 2.0]])
def test_selection_without_a_valid_row_keeps_nothing_and_says_so(scores):
    selection = select_by_mass(double(scores), 0.8, torch.zeros(len(scores), dtype=torch.bool))
    assert selection.kept.tolist() == []
    assert selection.degenerate


def test_selection_carries_no_gradient_and_leaves_the_scores_alone():
    scores = double([1.0, 3.0]).requires_grad_()
    assert not select_by_mass(scores, 0.5).kept.requires_grad
    assert scores.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_permuting_the_batch_permutes_the_selection(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(50, generator=generator, dtype=torch.float64)
    valid = torch.rand(50, generator=generator) < 0.8
    permutation = torch.randperm(50, generator=generator)
    kept = select_by_mass(scores, 0.6, valid).kept
    kept_of_permuted = select_by_mass(scores[permutation], 0.6, valid[permutation]).kept
    assert torch.equal(permutation[kept_of_permuted], kept)


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_all_scores_leaves_the_selection_unchanged(seed):
    scores = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = select_by_mass(scores, 0.8).kept
    for factor in (1e-9, 0.3, 2.0, 1e9):
        assert torch.equal(select_by_mass(factor * scores, 0.8).kept, kept)


@pytest.mark.parametrize("seed", SEEDS)
def test_higher_mass_target_only_appends_rows(seed):
    scores = torch.rand(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    previous = []
    for rho in torch.linspace(0.01, 1, 100).tolist():
        kept = select_by_mass(scores, rho).kept.tolist()
        assert kept[: len(previous)] == previous
        previous = kept
    assert len(previous) == 50


@pytest.mark.parametrize("seed", SEEDS)
def test_removing_an_empty_completion_equals_calling_it_not_valid(seed):
    scores = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    valid = torch.ones(20, dtype=torch.bool)
    valid[seed] = False
    kept = select_by_mass(scores, 0.8, valid).kept
    assert torch.equal(torch.arange(20)[valid][select_by_mass(scores[valid], 0.8).kept], kept)


# --- Eq. 9 ---


@pytest.mark.parametrize("seed", SEEDS)
def test_scale_multiplies_loss_and_gradient(seed):
    batch = random_batch(seed)
    loss, gradient = loss_and_gradient(*batch, scale=1.0)
    for scale in (0.0, 0.5, 2.0, 3.0):
        scaled_loss, scaled_gradient = loss_and_gradient(*batch, scale=scale)
        assert_equal(scaled_loss, scale * loss)
        assert_equal(scaled_gradient, scale * gradient)


@pytest.mark.parametrize("seed", SEEDS)
def test_dropping_unselected_rows_leaves_the_gradient_unchanged(seed):
    teacher, student, rollout, mask = random_batch(seed)
    scores = gap_scores(token_gaps(teacher, student, mask), mask, "absolute")
    kept = select_by_mass(scores, 0.6).kept
    assert 0 < len(kept) < len(mask)
    is_kept = torch.zeros(len(mask), dtype=torch.float64)
    is_kept[kept] = 1.0
    loss, gradient = loss_and_gradient(teacher, student, rollout, mask, scale=is_kept, num_kept=len(kept))
    kept_loss, kept_gradient = loss_and_gradient(teacher[kept], student[kept], rollout[kept], mask[kept], scale=1.0)
    assert_equal(kept_loss, loss)
    assert_equal(kept_gradient, gradient[kept])
    assert (gradient[is_kept == 0] == 0).all()


@pytest.mark.parametrize("sizes", [[7], [1] * 7, [3, 3, 1], [2, 5], [6, 1]], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_of_any_size_and_width_add_up_to_one_batch(seed, sizes):
    batch = random_batch(seed)
    loss, gradient = loss_and_gradient(*batch, num_kept=7)
    losses, gradients = [], []
    for part in zip(*(values.split(sizes) for values in batch), strict=True):
        width = int(part[3].sum(dim=1).max())  # each micro-batch is padded to its own longest row
        part_loss, part_gradient = loss_and_gradient(*(values[:, :width] for values in part), num_kept=7)
        losses.append(part_loss)
        gradients.append(torch.nn.functional.pad(part_gradient, (0, batch[3].size(1) - width)))
    assert_equal(sum(losses), loss)
    assert_equal(torch.cat(gradients), gradient)


@pytest.mark.parametrize("seed", SEEDS)
def test_wider_padding_and_another_row_order_change_nothing(seed):
    batch = random_batch(seed)
    loss, gradient = loss_and_gradient(*batch)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    padded = [torch.nn.functional.pad(values[order], (0, 9)) for values in batch]
    padded_loss, padded_gradient = loss_and_gradient(*padded)
    assert_equal(padded_loss, loss)
    assert_equal(padded_gradient[:, : batch[3].size(1)], gradient[order])


def test_loss_of_no_rows_is_zero_and_differentiable():
    loss, gradient = loss_and_gradient(TEACHER[:0], STUDENT[:0], None, MASK[:0], num_kept=4)
    assert loss == 0
    assert gradient.shape == (0, 3)
