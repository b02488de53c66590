"""Numbers of a run: computed, shown, written and sent."""
