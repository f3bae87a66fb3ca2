"""Faults planted in bundles, to show that the proof of the contract sees them."""
