"""Nonlinear recurrences, solved by Newton's method or step by step."""
