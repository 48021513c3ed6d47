"""Megatron with planmoe against Megatron's own all-to-all, on CPU ranks."""
