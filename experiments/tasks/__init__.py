"""Tasks from papers on recurrences: exact, seeded generators, and small real data sets."""
