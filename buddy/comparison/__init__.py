"""Routers held against each other under one protocol: one recipe, the same windows, the same budgets."""
