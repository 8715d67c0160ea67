"""What every part of the library stands on, and no one looks for an algorithm in."""
