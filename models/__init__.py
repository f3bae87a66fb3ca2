"""Model families: one module each, and the blocks that they share.

The folder stands at the top of the repository and is imported as `vlm_export.models`.
"""
