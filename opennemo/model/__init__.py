"""The decoder, the ways to attend, and the files that models come in."""
