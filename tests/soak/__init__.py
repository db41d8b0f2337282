"""Kills real processes at moments drawn by chance, again and again: `python -m tests.soak --help`."""
