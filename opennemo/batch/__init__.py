"""Files of requests, answered apart from live ones. A wing."""
