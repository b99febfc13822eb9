"""Benchmarks: scored here from local files, or run through lmms-eval or VLMEvalKit (`aspo eval --suite NAME`)."""
