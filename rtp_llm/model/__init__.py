"""Models as data: the spec, the decoder it describes, and its weights."""
