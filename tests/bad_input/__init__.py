"""Bad input, and the one clear error each has to give."""
