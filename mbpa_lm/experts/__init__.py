"""Ways to predict the next token, one file each, all behind `experts.base.Expert`."""
