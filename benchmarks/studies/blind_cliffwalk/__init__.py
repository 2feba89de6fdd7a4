"""The study with which prioritized replay was introduced: docs/blind_cliffwalk.md."""
