"""Models: the architecture that config.json describes, the decoder, checkpoint files, and loading of weights."""
