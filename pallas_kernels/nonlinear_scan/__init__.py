"""Nonlinear recurrences whose channels do not meet, step by step."""
