"""Every op in plain PyTorch: oracle for the tests, baseline for the benchmarks, fallback where no kernel serves."""
