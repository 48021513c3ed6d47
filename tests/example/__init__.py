"""The example: GPT-MoE pretraining and the one-layer comparison, run as a user runs them."""
