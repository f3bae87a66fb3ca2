"""What every room uses, and the exporter too: files, names, inference, and changes that leave no half."""
