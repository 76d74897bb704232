"""Recurrences with one state per channel: `linear_scan` and `selective_scan`."""
