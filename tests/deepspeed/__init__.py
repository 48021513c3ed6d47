"""planmoe under DeepSpeed, compared with DeepSpeed's own dispatch."""
