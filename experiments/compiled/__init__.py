"""Readers of compiled programs: collectives, TPU schedules, FLOPs."""
