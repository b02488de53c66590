"""What the computer, its disk and other processes do. Knows nothing of language models."""
