"""Gradients of branches and samples against plain autograd, and that looking at them changes nothing."""

import math

import pytest
import torch
from conftest import make_model, rounding

from camopd.gradients import Sketch, coherence, last_block, of_coherence, random_subsets


COHERENCE = ("coh_full", "coh_selected", "gcg", "gcg_control", "gcg_excess")


# --- the projection ----------------------------------------------------------------------------------------------


def sketch_of(pieces, width: int, seed: int) -> torch.Tensor:
    sketch = Sketch(width, seed=seed)
    for piece in pieces:
        sketch.add(piece)
    return sketch.values


@pytest.mark.parametrize("kind", ["independent", "similar", "flat", "one_block"])
def test_dot_products_of_sketches_are_within_the_stated_error(kind):
    """The mean over 200 seeds is the dot product, and none of the vectors breaks the bound on its spread."""
    width, size, draws = 101, 101 * 40 + 17, 200
    generator = torch.Generator().manual_seed(1)
    u, v = torch.randn(2, size, generator=generator)
    if kind == "similar":
        v = u + 0.3 * v
    elif kind == "flat":  # what a projection without signs would get wrong
        u, v = torch.ones(size), torch.ones(size)
    elif kind == "one_block":  # the weight of a vector in few numbers, at the same place of each row
        u, v = (x * (torch.arange(size) % width < 3) for x in (u, v))
    pieces = [41, 7, 2000, size - 2048]
    found = torch.stack(
        [sketch_of(u.split(pieces), width, s) @ sketch_of(v.split(pieces), width, s) for s in range(draws)]
    )
    norms, exact = u.norm() * v.norm(), u @ v
    errors = (found - exact) / norms
    spread = errors.square().mean().sqrt()
    assert abs(errors.mean()) < 4 * spread / math.sqrt(draws)
    assert spread < 1.1 * 2 / math.sqrt(width)  # flat vectors reach the bound, and 200 draws are not all
    cosine = exact / norms
    if kind in ("independent", "similar"):
        assert spread == pytest.approx(math.sqrt((1 + cosine**2) / width), rel=0.2)


def test_sketches_are_linear_and_do_not_depend_on_how_the_vector_comes():
    u, v = torch.randn(2, 1000)
    whole = sketch_of([u], 101, 3)
    torch.testing.assert_close(sketch_of(u.split([1, 500, 499]), 101, 3), whole, atol=rounding(10, sums=10), rtol=0)
    torch.testing.assert_close(
        sketch_of([u + 2 * v], 101, 3), whole + 2 * sketch_of([v], 101, 3), atol=rounding(30, sums=10), rtol=0
    )
    assert not torch.equal(sketch_of([u], 101, 4), whole)


def test_vector_that_fits_is_kept_exactly():
    u, v = torch.randn(2, 90, dtype=torch.float64)
    assert sketch_of([u], 101, 0) @ sketch_of([v], 101, 0) == pytest.approx(
        (u @ v).item(), abs=rounding((u.norm() * v.norm()).item(), sums=90)
    )


# --- coherence ---------------------------------------------------------------------------------------------------


def test_coherence_of_sets_that_are_known():
    gradients = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 4.0], [-3.0, 0.0]], dtype=torch.float64)
    sets = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]])
    found = coherence(gradients @ gradients.T, sets)
    assert found.tolist() == pytest.approx([1.0, 5 / 7, 0.0, 5 / 13])


@pytest.mark.parametrize(("share", "expected"), [(0.25, 101), (0.5, 41), (0.75, 16)])
def test_random_control_of_isotropic_gradients_is_what_theory_says(share, expected):
    """Coh of n unrelated gradients is about 1/sqrt(n), so a part of them has GCG by its size alone."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(512, 20_000, generator=generator, dtype=torch.float64)
    kept = random_subsets(512, round(share * 512), draws=1, seed=5)[0]
    found = of_coherence("general", gradients @ gradients.T, kept)
    assert found["coherence/general/gcg_control"] == pytest.approx(expected, abs=1.5)
    assert found["coherence/general/gcg"] == pytest.approx(expected, abs=8)  # one draw
    assert found["coherence/general/gcg_excess"] == pytest.approx(
        found["coherence/general/gcg"] - found["coherence/general/gcg_control"]
    )


def test_random_subsets_have_the_size_asked_for_and_every_sample_alike():
    subsets = random_subsets(20, 5, draws=2000)
    assert (subsets.sum(dim=1) == 5).all()
    assert subsets.float().mean(dim=0).tolist() == pytest.approx([0.25] * 20, abs=0.05)


def test_gains_of_nothing_are_no_numbers():
    gram = torch.eye(3, dtype=torch.float64)
    all_kept = of_coherence("general", gram, torch.ones(3, dtype=torch.bool))
    assert all_kept["coherence/general/coh_full"] == all_kept["coherence/general/coh_selected"]
    assert all(math.isnan(all_kept[f"coherence/general/{name}"]) for name in COHERENCE[2:])
    no_gradient = of_coherence("general", 0 * gram, torch.tensor([True, False, False]))
    assert all(math.isnan(no_gradient[f"coherence/general/{name}"]) for name in COHERENCE)


# --- when, and at what price -------------------------------------------------------------------------------------


def test_last_block_has_the_layers_that_are_watched():
    model = make_model(1)
    before, layers = last_block(model)
    assert before is model.model.layers[0]
    assert set(layers) == {m for m in model.model.layers[1].modules() if isinstance(m, torch.nn.Linear)}
    model.model.layers[1].requires_grad_(False)
    before, layers = last_block(model)
    assert before is None
    assert layers[0] is model.model.layers[0].self_attn.q_proj
    del model.config.num_hidden_layers  # as BLT's has none
    assert last_block(model) == (None, [])
