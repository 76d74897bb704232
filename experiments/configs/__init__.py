"""Configuration files; each defines `get_config(arg)`."""
