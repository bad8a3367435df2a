"""What runs say, from the metrics.jsonl that they write: read, signs, charts, page. Imports nothing of the training."""
