"""The elementwise linear recurrence."""
