"""HTTP to vLLM servers, for teachers and for rollouts. Nothing is imported here: `camopd serve` needs no torch."""
