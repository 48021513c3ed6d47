"""Makes an unedited Megatron-LM accept --moe-token-dispatcher planmoe: `import megatron_patches` before megatron.

Importing this package calls apply(). Without the flag Megatron does what it did; remove() takes everything back. What
is touched, and why, stands in one small file per Megatron version. `python -m planmoe_ds.megatron script.py …` runs a
script that does not have the line.
"""

from __future__ import annotations

from megatron_patches.patching import apply, remove

__all__ = ["apply", "remove"]

apply()
