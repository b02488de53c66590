"""A model reads texts into memories on disk."""
