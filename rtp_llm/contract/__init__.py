"""Plain data classes that several packages share: requests, steps, outputs. Imports no other package of this project,
no torch and no sockets.
"""
