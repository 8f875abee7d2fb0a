"""An index on disk and its queries, with numpy alone."""
