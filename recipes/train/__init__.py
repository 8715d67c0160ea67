"""One run: assembled, trained, recorded in its directory."""
