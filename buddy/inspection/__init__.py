"""What a router does with a text: which layers run for which token, and how often plans change."""
