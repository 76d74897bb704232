"""Linear recurrences over two-dimensional grids."""
