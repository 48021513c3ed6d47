"""What happens when ranks disagree, die, stop or meet bad numbers: one error on every rank, and nothing hangs."""
