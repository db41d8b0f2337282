"""Processes that are killed at random moments, as often as asked."""
