"""The task: expressions, their solutions in words, and who checks them. Pure Python, no torch."""
