"""The study of all algorithms on three small tasks: python -m benchmarks.study."""
