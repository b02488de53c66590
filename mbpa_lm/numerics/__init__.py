"""Loops that the CPU runs compiled, and arithmetic that several folders share."""
