"""`rtp-llm-bench`: measures a server or an engine, computes the machine's bound, and compares with other engines."""
