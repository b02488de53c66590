"""A stream is scored by all experts, in one causal pass, and what they give is looked at."""
