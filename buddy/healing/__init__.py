"""Healing: a LoRA adapter that teaches the frozen model to live with skipped layers; the same for every router."""
