"""Items of an evaluation, as a test gives their scores."""

from camopd.eval.scores import Item


def items(scores, prefix="k", truncated=0.0, text="text {}", unparsed=0.0):
    """One `Item` per score."""
    return [
        Item(f"{prefix}{n}", f"prompt {n}", score, 1, truncated, unparsed, text.format(score))
        for n, score in enumerate(scores)
    ]
