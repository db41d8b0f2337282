"""What the site has beside the prose of docs/: references made from the code, the picture of a token's way, hooks."""
