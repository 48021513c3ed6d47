"""C++ parts that are tested without torch."""
