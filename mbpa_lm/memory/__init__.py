"""(hidden state, next token) entries to nearest neighbours. Nothing here knows of models or of the softmax."""
