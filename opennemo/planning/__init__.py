"""What a run will need, before it starts. A wing."""
