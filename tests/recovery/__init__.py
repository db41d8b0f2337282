"""What is left after a kill, on a full disk, or from a damaged or hostile file."""
