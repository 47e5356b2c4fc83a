"""The gang's plan, its rendezvous, and the communication between its ranks."""
