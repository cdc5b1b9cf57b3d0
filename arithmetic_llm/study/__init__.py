"""Studies: many runs of the numbered scripts that answer one question, and how surely they do."""
