"""A study of prioritized replay on MinAtar's games: see docs/minatar_study.md."""
