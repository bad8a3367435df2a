"""The prompts of the demo."""

from collections import Counter

from camopd.demo_data import BRANCHES, load_prompts


def test_demo_prompts_are_enough_distinct_and_split_apart():
    general, domain = ({split: load_prompts(name, split) for split in ("train", "heldout")} for name in BRANCHES)
    assert len(general["train"]) >= 160 and len(domain["train"]) >= 160
    assert len(general["heldout"]) >= 40 and len(domain["heldout"]) >= 40
    assert set(Counter(row["category"] for row in general["train"])) == {
        "chat",
        "code",
        "math",
        "stem",
        "instructions",
    }
    finetune = load_prompts("domain", "finetune")
    assert len(finetune) == 128
    assert all(row["answer"] for row in finetune)
    texts = [row["prompt"].lower() for rows in (*general.values(), *domain.values(), finetune) for row in rows]
    assert len(set(texts)) == len(texts)
