"""`rtp-llm-doctor gang` (tier 2): the doctors of all parts exchange reports, probe the network in both directions and
compare settings."""
