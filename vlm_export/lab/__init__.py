"""The laboratory: what differs between two models, where they part, and whose mistake it is."""
