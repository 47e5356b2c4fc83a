"""The plan of the gang, and the communication between its ranks."""
