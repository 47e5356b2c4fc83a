"""Models: specification, decoder, checkpoint and weights."""
