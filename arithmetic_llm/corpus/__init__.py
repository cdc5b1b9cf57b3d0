"""Corpora: how problems are drawn, written, stored, read back and surveyed. No torch."""
