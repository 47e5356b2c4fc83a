"""The gang's plan (ranks, addresses and ports of all parts), its rendezvous, and the communication between ranks."""
