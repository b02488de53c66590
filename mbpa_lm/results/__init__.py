"""RESULTS.md from run folders: `python -m mbpa_lm.results FOLDER`, or `make results`."""
