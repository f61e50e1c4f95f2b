"""What follows from events and metrics. Pure: no sockets, clock or randomness."""
