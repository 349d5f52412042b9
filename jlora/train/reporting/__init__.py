"""What a run shows: its log, curves, progress and traces."""
