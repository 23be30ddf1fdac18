"""Data sets, running text and multiple choice: from packages, the hub or a folder, on one path."""
