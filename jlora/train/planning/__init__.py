"""Device memory, computation and communication of a step, known before it runs."""
