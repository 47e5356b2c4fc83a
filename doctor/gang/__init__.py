"""The gang tier: the parts' doctors exchange reports, probe the network in both directions and compare settings."""
