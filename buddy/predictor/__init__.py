"""The budget predictor behind `--budget auto`: how many layers a request is worth, from what its prompt looks like."""
