"""A memory for models of other libraries."""
