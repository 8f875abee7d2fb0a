"""The index on disk and its queries. Numpy only."""
