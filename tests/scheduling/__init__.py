"""The task graph, its solver and the schedulers."""
