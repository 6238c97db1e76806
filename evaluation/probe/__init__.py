"""Linear and k-NN probes of frozen features."""
