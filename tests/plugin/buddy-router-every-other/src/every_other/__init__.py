"""Routers of a stranger: they know nothing of Buddy but its public names."""
