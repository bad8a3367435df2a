"""A first moment for each branch, in a run. The optimizer is in test_optimizer.py."""

from trainers import lines, make_trainer


def test_per_branch_moments_keep_the_update_on_the_branch(tmp_path, tokenizer):
    cosines = {}
    for moments in ("shared", "per_branch"):
        folder = tmp_path / moments
        make_trainer(folder, tokenizer, optimizer_moments=moments, max_steps=16, learning_rate=1e-4).train()
        written = lines(folder)
        assert all(-1 <= line["update/cosine"] <= 1 for line in written)
        cosines[moments] = [line["update/cosine"] for line in written if line["branch"] == "domain"]
    assert sum(cosines["per_branch"]) > sum(cosines["shared"])
