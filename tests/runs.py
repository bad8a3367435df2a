"""Runs made by hand: what a metrics.jsonl may have in it."""

import json


def make_run(folder, steps=40, **metrics):
    """A run in which three general steps alternate with a domain step. A metric is a value, or a function of step and
    branch; with `{branch}` in its name it is the branch's."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            branch = "general" if step % 4 else "domain"
            record = {"step": step, "branch": branch}
            for name, value in metrics.items():
                record[name.format(branch=branch)] = value(step, branch) if callable(value) else value
            file.write(json.dumps(record) + "\n")
    return folder / "metrics.jsonl"


def by_branch(general, domain):
    return lambda step, branch: general if branch == "general" else domain


GAP = {"gap/{branch}/abs_mean": 0.5, "gap/{branch}/mean": -0.25}
MEASURED = {
    "conflict/cosine": -0.1, "conflict/dot": -1e-5, "conflict/stale": 0.0, "conflict/general_norm": 0.02,
    "conflict/domain_norm": 0.01, "coherence/{branch}/gcg": 20.0, "coherence/{branch}/gcg_control": 15.0,
    "coherence/{branch}/gcg_excess": 5.0, "update/cosine": 0.5, "selection/{branch}/jaccard_length": 0.5,
    "selection/{branch}/top1_share": 0.2, "selection/{branch}/score_perplexity_spearman": 0.1,
}  # fmt: skip
ALWAYS = {
    **GAP, "selection/{branch}/kept_fraction": 0.5, "selection/{branch}/mass": 0.8, "selection/{branch}/kept": 8,
    "selection/{branch}/length_kept": 100.0, "selection/{branch}/length_dropped": 50.0, "grad_norm": 1.0,
    "score/{branch}/length_spearman": 0.1, "score/{branch}/p90": 1.0, "score/{branch}/p50": 0.5,
    "rollout/{branch}/length": 80.0, "train/tokens": 1000, "train/padding": 0.1, "train/imbalance": 0.0,
    "time/step": 10.0, "time/rollout": 5.0, "time/score": 2.0, "time/train": 3.0, "time/{branch}/teacher": 1.5,
    "time/{branch}/teacher_hidden": 1.0, "time/{branch}/teacher_idle": 8.5,
}  # fmt: skip
