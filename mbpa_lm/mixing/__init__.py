"""Several experts become one distribution."""
