"""Tasks that papers judge recurrences by: exact, seeded generators, and small real data sets."""
