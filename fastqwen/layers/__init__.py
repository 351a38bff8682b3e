"""The parts of a decoder, switched by ModelConfig; what they compute with is the Ops table they were given."""
