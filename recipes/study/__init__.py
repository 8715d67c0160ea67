"""Many runs: trained as a grid, found again, reported side by side."""
