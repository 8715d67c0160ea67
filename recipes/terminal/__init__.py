"""How commands begin and end, and what the terminal shows."""
