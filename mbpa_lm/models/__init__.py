"""Tokens to hidden states, and an output layer. Nothing here knows of memories."""
