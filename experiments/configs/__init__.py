"""Configurations: one file per job, each with a `get_config(arg)`."""
