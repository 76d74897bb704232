"""Backend selection, custom derivatives, checks and scans that the ops share."""
