"""The server: one model, served in the protocols that clients know."""
