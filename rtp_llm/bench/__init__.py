"""`rtp-llm-bench`: measures the speed of a server or an engine, compares it with other engines, and computes the
highest speed that the machine allows (the bound).
"""
