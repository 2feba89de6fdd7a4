"""DQN from uniform and from prioritized replay, many independent runs of each in lockstep.

`python -m benchmarks.studies.cartpole --help` has the options, docs/cartpole_study.md the results.
"""
