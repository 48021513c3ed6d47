"""`python -m planmoe_ds.doctor`: the same as `planmoe doctor`."""

import sys

from planmoe_ds.cli import app

app(["doctor", *sys.argv[1:]])
