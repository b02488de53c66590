"""Text to token streams. Nothing here knows of models or memories."""
