"""Tests of planmoe_ds."""
