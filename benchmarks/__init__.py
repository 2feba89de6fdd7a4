"""What prioritized replay costs, and whether it draws what it should: `python -m benchmarks`."""
