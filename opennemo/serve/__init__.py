"""The server: one model, spoken to in the protocols that clients know."""
