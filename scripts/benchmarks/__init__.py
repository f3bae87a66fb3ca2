"""One module for each benchmark, and the report that they share."""
