"""rtp-llm-doctor: says what is wrong with this machine, this plan and this gang before it costs anybody ten minutes."""
