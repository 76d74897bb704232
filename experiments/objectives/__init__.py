"""Losses and evaluations: text and tasks."""
