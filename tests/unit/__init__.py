"""Parts of planmoe_ds and of the test harness by themselves."""
