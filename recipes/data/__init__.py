"""Images and labels: found, read, kept and augmented."""
