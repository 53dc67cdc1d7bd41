"""Ray: many engines behind one door, batches in parts. A wing."""
