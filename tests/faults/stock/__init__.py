"""What stock DeepSpeed and stock Megatron do in the faults of tests/faults: python -m tests.faults.stock --help."""
