"""Concurrency: buffers that threads and processes share, and batches drawn ahead."""
