"""Records, errors and small helpers that every other package may import. Imports nothing of ours."""
