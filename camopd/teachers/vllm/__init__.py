"""A teacher on vLLM servers. Nothing is imported here: `camopd serve` needs no torch."""
