"""What is kept of a trained model on disk: weights, what was tuned, and what is measured once."""
