"""The gang tier: the parts' doctors meet, try the network between them in both directions, and compare notes."""
