"""Speed and exactness of prioritized replay: `python -m benchmarks`."""
