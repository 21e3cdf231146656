"""Small CLSA steps on several ranks, for tools/check_parallel.py, tools/bench_parallel.py and the tests."""
