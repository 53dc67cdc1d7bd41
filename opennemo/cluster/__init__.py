"""Ray: many engines behind one interface, batches in parts. A wing."""
