"""Recurrences with a matrix state per head: linear attention and the delta rules."""
