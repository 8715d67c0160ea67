"""Settings of a run: their defaults, their help, and what reads them."""
