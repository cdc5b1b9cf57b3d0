"""Evaluation: judging what a model writes, reports, and the solver."""
