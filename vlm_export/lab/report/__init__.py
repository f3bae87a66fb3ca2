"""A report about a bundle: what was exported from what, whether it holds, and how to use it."""
