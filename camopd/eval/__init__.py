"""`camopd eval`: benchmarks of any number of models, and whether what came back and what broke is more than chance."""
