"""rtp-llm-doctor: finds problems of this machine, the configuration and the gang before a model is loaded."""
