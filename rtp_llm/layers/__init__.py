"""The parts a decoder is made of, each aware of its tensor-parallel share."""
