"""One rank's device work."""
