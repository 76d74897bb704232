"""Flags, errors, devices and plots that all commands share."""
