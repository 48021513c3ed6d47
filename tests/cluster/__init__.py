"""The emulated cluster of benchmarks/cluster."""
