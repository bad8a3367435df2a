"""Teachers: a vLLM server, a model in this process, or the student without its adapter."""
